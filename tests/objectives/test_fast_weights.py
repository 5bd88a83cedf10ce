"""Fast weights: chains run on an overlay that is the formula's, the model's weights stay, and chains leave modes."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import gibbsian as gb
from gibbsian import Energy
from gibbsian.energies.grids import states
from gibbsian.errors import OptionError
from gibbsian.objectives import fast_weights
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.training.state import restore_module
from recovery import Case, assert_recovered, descend, estimates, flat, seeded

SPINS = 4
RUN = {"decay": "constant", "learning_rate": 0.05, "warmup_steps": 1}


class Ferromagnet(Energy):
    """Spins with a coupling between neighbours along a line, and fields."""

    support, event_shape = constraints.boolean, torch.Size((SPINS,))

    def __init__(self, coupling=0.0) -> None:
        super().__init__()
        self.coupling = nn.Parameter(torch.full((SPINS - 1,), coupling, dtype=torch.float64))
        self.field = nn.Parameter(torch.zeros(SPINS, dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(self.field.detach().clone())
        s = 2 * x - 1
        return -(s[:, 1:] * s[:, :-1]) @ self.coupling - s @ self.field


def pcd(steps=1, buffer_size=100, **options):
    base = gb.Bernoulli(torch.zeros(SPINS, dtype=torch.float64))
    return PersistentContrastiveDivergence(
        gb.SingleSiteGibbs(), base, steps, buffer_size, restart=0.0, **options
    ).double()


def rows(n, seed=0):
    return torch.randint(2, (n, SPINS), generator=seeded(seed)).double()


def test_chains_run_on_the_overlay_of_the_formula_and_the_weights_stay():
    energy, objective = Ferromagnet(0.3), pcd(fast_rate=0.5, fast_decay=0.9)
    before, overlay, rng = flat(energy), torch.zeros(2 * SPINS - 1, dtype=torch.float64), seeded()
    for call in range(4):
        energy.seen.clear()
        loss = objective(energy, Batch(rows(100, call)), rng)
        # The chains come first, the contrast last.
        assert torch.equal(energy.seen[0], (before + overlay)[SPINS - 1 :])
        assert torch.equal(energy.seen[-1], before[SPINS - 1 :])
        assert torch.equal(flat(energy), before)
        grad = torch.cat(torch.autograd.grad(loss.value, list(energy.parameters()), retain_graph=True))
        overlay = 0.9 * overlay - 0.5 * grad
        assert torch.allclose(objective.fast.overlay, overlay, rtol=1e-12)
        assert float(loss.metrics["fast_norm"]) == pytest.approx(float(overlay.norm()))
        loss.value.backward()


def test_an_evaluation_changes_nothing_and_an_error_in_a_chain_leaves_the_weights():
    energy, objective = Ferromagnet(0.3), pcd(fast_rate=0.5)
    objective(energy, Batch(rows(100)), seeded())
    overlay, before = objective.fast.overlay.clone(), flat(energy)
    with torch.no_grad():
        objective(energy, Batch(rows(100)), seeded())
    objective.eval()(energy, Batch(rows(100)), seeded())
    assert torch.equal(objective.fast.overlay, overlay)

    def fails(x):
        assert not torch.equal(flat(energy), before)
        raise RuntimeError("stop")

    energy.forward = fails
    with pytest.raises(RuntimeError, match="stop"):
        objective(energy, Batch(rows(100)), seeded())
    assert torch.equal(flat(energy), before)


def check_leaves(objective) -> None:
    """Of 100 chains in one of two modes, half are to be in the other after 60 calls; the model never learns."""
    energy = Ferromagnet(2.0)
    data = torch.cat((torch.zeros(50, SPINS), torch.ones(50, SPINS))).double()
    rng = seeded(1)
    objective(energy, Batch(data), rng)
    objective.buffer.positions.fill_(1.0)
    for _ in range(60):
        objective(energy, Batch(data), rng)
    away = float((objective.buffer.positions.mean(1) < 0.5).double().mean())
    assert 0.2 < away < 0.8, f"missed: {away} of the chains are in the other mode"


def test_chains_leave_their_mode_by_fast_weights_alone():
    check_leaves(pcd(fast_rate=0.2))
    with pytest.raises(AssertionError, match="missed"):
        check_leaves(pcd())


def test_fast_weights_of_the_wrong_sign_do_not(monkeypatch):
    update = fast_weights.FastWeights.update

    def flipped(self, value, energy):
        return update(self, -value, energy)

    monkeypatch.setattr(fast_weights.FastWeights, "update", flipped)
    with pytest.raises(AssertionError, match="missed"):
        check_leaves(pcd(fast_rate=0.2))


def case():
    truth = torch.tensor([0.5, -0.4, 0.3, 0.2, -0.3, 0.1, 0.4], dtype=torch.float64)
    energy = Ferromagnet()
    nn.utils.vector_to_parameters(truth, energy.parameters())
    listed = states((SPINS,), constraints.boolean, truth)
    log_p = -energy(listed).detach()
    return Case(
        "chain",
        Ferromagnet,
        tuple(truth.tolist()),
        lambda n, rng: listed[torch.multinomial(log_p.softmax(0), n, replacement=True, generator=rng)],
        float(log_p.logsumexp(0)),
    )


def test_a_small_model_is_recovered():
    found = estimates(lambda: pcd(2, 500, fast_rate=0.02), case(), 500, solve=partial(descend, steps=100, rate=0.1))
    assert_recovered(found, case().truth, 0.15)


def test_a_run_resumes_to_the_bit(tmp_path):
    data, found = rows(300), []
    for steps in ([30], [15, 30]):
        for last in steps:
            energy, objective, rng = Ferromagnet(0.1), pcd(fast_rate=0.1), seeded()
            folder = tmp_path / str(len(steps))
            gb.fit(
                energy,
                data,
                objective,
                rng=rng,
                steps=last,
                batch_size=50,
                folder=folder,
                **RUN,
                resume=last != steps[0],
            )
        found.append(torch.cat((flat(energy), objective.fast.overlay)))
    assert torch.equal(*found)


def test_a_fresh_objective_takes_the_state():
    energy, objective = Ferromagnet(0.3), pcd(fast_rate=0.5)
    objective(energy, Batch(rows(100)), seeded())
    fresh = pcd(fast_rate=0.5)
    restore_module(fresh, objective.state_dict())
    assert torch.equal(fresh.fast.overlay, objective.fast.overlay)
    assert "fast_rate=0.5, fast_decay=0.95" in repr(fresh)
    assert pcd().fast is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fast_rate": -0.1}, "positive learning rate"),
        ({"fast_rate": float("nan")}, "positive learning rate"),
        ({"fast_rate": 0.1, "fast_decay": 1.0}, "below 1"),
        ({"fast_rate": 0.1, "fast_decay": -0.1}, "below 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        pcd(**options)


def test_fast_weights_and_the_gradient_through_the_sampler_do_not_go_together():
    with pytest.raises(OptionError, match="leave one out"):
        PersistentContrastiveDivergence(gb.ULA(0.1), gb.Gaussian(2), kl=gb.SamplerKL(), fast_rate=0.1)
