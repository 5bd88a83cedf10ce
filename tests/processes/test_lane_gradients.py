"""The same batch has the same gradient in one process and in several, for every objective; broken twins do not."""

import pytest
import torch
from lane_cases import CASES, apart, gradients_of, run_of, seeded

import gibbsian as gb
from gibbsian.errors import OptionError
from gibbsian.processes import Lanes, world
from gibbsian.sequences.boltzmann import BoltzmannLearning
from gibbsian.training import engine, lanes
from spawned import run_in

LIMIT = 1e-5
"""Relative error in single precision. Summing in another order was seen to make 3e-7."""

SOME = (
    "Adversarial, every 2",
    "Centred",
    "ContrastiveDivergence, all starts",
    "DenoisingScoreMatching",
    "MultiLevelDenoising, dropout",
    "NoiseContrastiveEstimation",
    "PersistentContrastiveDivergence, spectral norms",
    "PersistentContrastiveDivergence, tempering",
    "Phases",
    "ScoreMatching",
)
"""Chains, second derivatives, generators, parameters without gradients, energies and objectives with state."""

WHOLE = ("Centred", "MeanFieldPCD, centred", "PersistentContrastiveDivergence, fast weights")
"""Write to weights outside of the gradient; refused where these are sharded."""

PRECISE = (
    "FiniteDifferenceScoreMatching",
    "PersistentContrastiveDivergence, spectral norms",
    "ScoreMatching",
    "SlicedScoreMatching",
)
"""Refused in bfloat16."""

EXACT = ("ExactLikelihood", "ForceMatching", "MaximumLikelihood", "PseudoLikelihood", "RatioMatching", "ScoreMatching")
"""Nothing is random, and the loss is a mean over rows: lanes make no difference but rounding."""


def test_every_objective_has_a_case():
    exported = {getattr(gb, name) for name in gb.__all__}
    known = {each.__name__ for each in exported if isinstance(each, type) and issubclass(each, gb.Objective)}
    known = known - {"Objective"} | {BoltzmannLearning.__name__}
    assert known == {name.partition(",")[0] for name in CASES}
    assert all(
        type(make()[2]).__name__ == name.partition(",")[0] for name, make in CASES.items() if name != "SleepPhase"
    )


def both(names):
    return gradients_of(names), gradients_of(names, "full")


def check(names, size):
    alone = gradients_of(names)
    for averaged, sharded in run_in(size, both, names):
        for name in names:
            assert apart(averaged[name], alone[name]) < LIMIT, name
            if name in WHOLE:
                assert "sharding='none'" in sharded[name]
            else:
                assert apart(sharded[name], alone[name]) < LIMIT, name


def test_gradients_of_two_processes_are_those_of_one():
    check(SOME, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_of_all_objectives(size):
    check(list(CASES), size)


@pytest.mark.parametrize("name", EXACT)
def test_without_randomness_lanes_have_the_gradient_of_the_batch(name):
    assert apart(run_of(name, lanes=4)[0], run_of(name, lanes=1)[0]) < LIMIT


def test_offsets_follow_the_means_of_the_whole_batch():
    """Exact likelihood, centred: whatever the lanes, machine and gradient are those of one batch."""
    CASES["Centred, exact"] = lambda: (*CASES["ExactLikelihood"]()[:2], gb.Centred(gb.ExactLikelihood(), rate=0.3))
    try:
        (found, four), (due, one) = (run_of("Centred, exact", lanes=count) for count in (4, 1))
    finally:
        del CASES["Centred, exact"]
    assert apart(found, due) < LIMIT
    torch.testing.assert_close(four.energy.visible_offset, one.energy.visible_offset)
    assert float(one.energy.visible_offset.norm()) > 0.1


@pytest.mark.slow
def test_losses_in_bfloat16_have_nearly_the_gradient():
    for name in CASES:
        found = gradients_of([name], steps=1, precision="bfloat16")[name]
        if name in PRECISE:
            assert "too few digits" in found
        else:
            assert apart(found, run_of(name, steps=1)[0]) < 0.1, name


def test_training_in_bfloat16_learns_as_well():
    """Weights stay in float32, and the likelihood that is reached is the same within a twentieth of a nat."""
    found = {}
    for precision in ("float32", "bfloat16"):
        energy, data, objective = CASES["PseudoLikelihood"]()
        gb.fit(energy, data, objective, rng=seeded(), steps=150, batch_size=32, learning_rate=0.05, precision=precision)
        assert {p.dtype for p in energy.parameters()} == {torch.float32}
        found[precision] = float(gb.ExactLikelihood()(energy, gb.Batch(data), seeded()).value.detach())
    start = float(gb.ExactLikelihood()(CASES["PseudoLikelihood"]()[0], gb.Batch(data), seeded()).value.detach())
    assert max(found.values()) < start - 0.3
    assert abs(found["bfloat16"] - found["float32"]) < 0.05
    with pytest.raises(OptionError, match="weights are float64"):
        gb.fit(energy.double(), data.double(), objective, rng=seeded(), steps=1, precision="bfloat16")


def twin(kind):
    """Gradients under a slip: noise by place in the process, gradients that stay there, offsets by own means."""
    kept = Lanes.generators, engine.Engine.accumulating, lanes.gathered
    try:
        if kind == "noise":
            Lanes.generators = lambda self, seed, device="cpu": (
                (lane, torch.Generator().manual_seed(seed + place)) for place, lane in enumerate(self.own)
            )
        if kind == "gradients":
            engine.Engine.accumulating = lambda self, last: self.module.no_sync()
        if kind == "means":
            lanes.gathered = lambda x: x
        return gradients_of(["Centred"])["Centred"]
    finally:
        Lanes.generators, engine.Engine.accumulating, lanes.gathered = kept


def slips():
    return {kind: twin(kind) for kind in ("", "noise", "gradients", "means")} | {"rank": world().rank}


def test_slips_are_caught():
    alone = gradients_of(["Centred"])["Centred"]
    for found in run_in(2, slips):
        assert apart(found[""], alone) < LIMIT
        # The first process's lanes keep their noise under that slip, yet the gradient is the mean over both.
        for kind in ("noise", "gradients", "means"):
            assert apart(found[kind], alone) > 100 * LIMIT, kind
