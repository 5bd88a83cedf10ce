"""Sums and sequences of objectives: values, gradients, metrics, counts that survive, and training with them."""

import math

import pytest
import torch
from torch import nn

from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.base import Batch, Loss, Objective, Ramp, WeightedSum
from gibbsian.objectives.combination import Phases
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.training.fit import fit
from recovery import QUARTIC, assert_recovered, estimates, seeded


class Mean(Objective):
    """The mean energy, times a factor, with given metrics."""

    def __init__(self, factor=1.0, **metrics):
        super().__init__()
        self.factor = factor
        self.told = {name: torch.tensor(value) for name, value in metrics.items()}

    def forward(self, energy, batch, rng):
        return Loss(self.factor * energy(batch.x).mean(), dict(self.told))

    def extra_repr(self):
        return f"{self.factor:g}"


class Other(Mean):
    """The same under another name."""


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x):
        return x @ self.w


BATCH = Batch(torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=torch.float64))
MEAN = 4.0


def value(objective):
    from gibbsian.energies.base import Energy

    return float(objective(Energy.of(Slope()), BATCH, seeded()).value.detach())


def test_the_algebra():
    a, b, c = Mean(1.0), Mean(10.0), Mean(100.0)
    for objective, factor in (
        (a + b, 11),
        (2.0 * a + b, 12),
        (a - 0.5 * b, -4),
        (a * 3 + b - c, -87),
        (-(a + b), -11),
        (2 * (a + 0.5 * (b + c)), 112),
        (sum([a, b, c]), 111),
        (0.0 * a + b, 10),
    ):
        assert value(objective) == pytest.approx(MEAN * factor, rel=1e-12)
        assert all(not isinstance(term.objective, WeightedSum) for term in objective.parts)


def test_a_sums_gradient_is_the_sum_of_gradients():
    energy = QUARTIC.at_truth()
    batch = Batch(QUARTIC.rows(64, seeded()))

    def gradient(objective, rng):
        return torch.cat(torch.autograd.grad(objective(energy, batch, rng).value, list(energy.parameters())))

    score, exact = DenoisingScoreMatching(0.3), ExactLikelihood()
    # The exact likelihood draws nothing, so the order of the parts does not matter to the noise of the other.
    expected = 0.7 * gradient(score, seeded(3)) - 2.0 * gradient(exact, seeded())
    torch.testing.assert_close(gradient(0.7 * score - 2.0 * exact, seeded(3)), expected, rtol=1e-10, atol=1e-12)


def test_parts_draw_one_after_the_other():
    energy, batch = QUARTIC.at_truth(), Batch(QUARTIC.rows(64, seeded()))
    first, second = DenoisingScoreMatching(0.3), DenoisingScoreMatching(0.5)
    rng = seeded(3)
    apart = first(energy, batch, rng).value + second(energy, batch, rng).value
    assert torch.equal((first + second)(energy, batch, seeded(3)).value, apart)


def test_a_sum_of_two_unbiased_objectives_recovers():
    found = estimates(
        lambda: ExactLikelihood() + 0.5 * NoiseContrastiveEstimation(Gaussian(1, scale=2.0).double()), QUARTIC, 4000
    )
    assert_recovered(found, QUARTIC.truth, 0.4)


def test_a_wrong_sign_in_a_sum_is_caught():
    # Half of the exact likelihood's log Z is taken away again.
    class Bare(Objective):
        def forward(self, energy, batch, rng):
            loss = ExactLikelihood()(energy, batch, rng)
            return Loss(loss.metrics["log_z"] * 0.0 + loss.value - energy(batch.x).mean())

    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(estimates(lambda: ExactLikelihood() - 0.1 * Bare(), QUARTIC, 4000), QUARTIC.truth, 0.4)


def test_a_ramp_is_linear_and_stays():
    ramp = Ramp(1.0, 3.0, 4)
    assert [ramp.at(t) for t in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    objective = 2.0 * (ramp * Mean(1.0) + Mean(10.0))
    assert [value(objective) / MEAN for _ in range(6)] == pytest.approx([22, 23, 24, 25, 26, 26])
    twice = Ramp(0.0, 1.0, 2) * (Ramp(1.0, 2.0, 2) * Mean(1.0) + Mean(1.0))
    assert [value(twice) / MEAN for _ in range(4)] == pytest.approx([0, 0.5 * 2.5, 3, 3])


def test_phases_take_over_at_their_steps():
    objective = Phases([(2, Mean(1.0)), (3, Mean(10.0)), (None, Mean(100.0))])
    assert [value(objective) / MEAN for _ in range(8)] == [1, 1, 10, 10, 10, 100, 100, 100]
    ends = Phases([(1, Mean(1.0)), (1, Mean(10.0))])
    assert [value(ends) / MEAN for _ in range(4)] == [1, 10, 10, 10]
    inner = Phases([(1, Mean(0.0)), (3, Phases([(2, Mean(1.0)), (9, Mean(2.0))])), (None, Mean(3.0))])
    assert [value(inner) / MEAN for _ in range(6)] == [0, 1, 1, 2, 3, 3]


def test_only_training_calls_count():
    objective = Phases([(1, Mean(1.0)), (None, Mean(10.0))])
    with torch.no_grad():
        assert [value(objective) for _ in range(3)] == [MEAN] * 3
    objective.eval()
    assert value(objective) == MEAN
    objective.train()
    assert [value(objective), value(objective)] == [MEAN, 10 * MEAN]


def test_the_count_is_part_of_the_state():
    make = lambda: Phases([(2, Ramp(0.0, 1.0, 4) * Mean(1.0) + Mean(1.0)), (None, Mean(10.0))])  # noqa: E731
    first, second = make(), make()
    value(first)
    state = first.state_dict()
    assert state["_extra_state"] == 1
    value(first)
    second.load_state_dict(state)
    assert value(second) == pytest.approx(1.25 * MEAN)
    assert value(second) == value(first) == 10 * MEAN


def test_metrics_keep_their_names_or_get_the_parts():
    a = Mean(1.0, gap=1.0, energy_data=2.0, accuracy=0.5)
    b = Other(1.0, gap=3.0, energy_data=4.0, accuracy=0.6, log_z=5.0)
    metrics = (Ramp(2.0, 3.0, 5) * a + b)(Slope(), BATCH, seeded()).metrics
    assert {name: float(v) for name, v in metrics.items()} == pytest.approx(
        {
            "gap": 1.0,
            "energy_data": 2.0,
            "Mean.accuracy": 0.5,
            "Other.gap": 3.0,
            "Other.energy_data": 4.0,
            "Other.accuracy": 0.6,
            "log_z": 5.0,
            "Mean.loss": MEAN,
            "Other.loss": MEAN,
            "Mean.weight": 2.0,
        }
    )
    assert {"Mean2.gap", "Mean1.loss", "Mean2.loss"} <= (a + Mean(2.0, gap=0.0))(
        Slope(), BATCH, seeded()
    ).metrics.keys()
    assert (2.0 * a)(Slope(), BATCH, seeded()).metrics.keys() == a.told.keys()
    phases = Phases([(1, a), (None, b)])
    assert [float(phases(Slope(), BATCH, seeded()).metrics["phase"]) for _ in range(2)] == [0.0, 1.0]


def test_printing_gives_the_formula():
    objective = 2 * Mean(3.0) - 0.5 * Other(1.0) + Ramp(0.0, 1.0, 10) * Mean(2.0)
    assert repr(objective) == "2*Mean(3) - 0.5*Other(1) + ramp(0 to 1 in 10)*Mean(2)"
    assert repr(Phases([(5, objective), (None, -Mean(1.0))])) == f"Phases((5, {objective!r}), (None, -Mean(1)))"


def test_a_shared_objective_goes_on_with_its_state():
    base = Gaussian(2)
    pcd = PersistentContrastiveDivergence(MALA(0.1), base, steps=2, buffer_size=8, restart=0.0)
    objective = Phases([(1, pcd), (1, DenoisingScoreMatching(0.3)), (None, pcd)])
    energy, x = base + MLP(2, (4,)), Batch(torch.randn(8, 2, generator=seeded()))
    for age in (2.0, 2.0, 4.0):
        objective(energy, x, seeded())
        assert float(pcd.buffer.mean_age) == age
    (pcd + pcd)(energy, x, seeded())
    assert float(pcd.buffer.mean_age) == 8.0


def test_context_and_shapes_pass_through():
    energy = MLP((1, 2, 2), (4,), classes=2)
    batch = Batch(torch.randn(6, 1, 2, 2, generator=seeded()), {"y": torch.tensor([0, 1, 0, 1, 1, 0])})
    loss = (DenoisingScoreMatching(0.3) + ContrastiveDivergence(MALA(0.1)))(energy, batch, seeded())
    assert loss.value.dtype == torch.float32
    assert {"DenoisingScoreMatching.loss", "ContrastiveDivergence.loss", "gap"} <= loss.metrics.keys()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mean() + 3, ArgumentTypeError, "Only objectives add up.*got 3"),
        (lambda: 3 + Mean(), ArgumentTypeError, "Only objectives add up.*got 3"),
        (lambda: Mean() + Gaussian(2), ArgumentTypeError, "Only objectives"),
        (lambda: Mean() - "b", ArgumentTypeError, "Only objectives"),
        (lambda: Mean() * "2", ArgumentTypeError, "a number or a Ramp; got '2'"),
        (lambda: Mean() * True, ArgumentTypeError, "a number or a Ramp"),
        (lambda: Mean() * Mean(), ArgumentTypeError, "a number or a Ramp"),
        (lambda: math.nan * Mean(), OptionError, "finite; got nan"),
        (lambda: math.inf * Mean(), OptionError, "finite; got inf"),
        (lambda: WeightedSum([]), OptionError, "got none"),
        (lambda: Ramp(0.0, math.inf, 3), OptionError, "finite weights"),
        (lambda: Ramp(0.0, 1.0, 0), OptionError, "1 or more; got 0"),
        (lambda: Phases([]), OptionError, "got none"),
        (lambda: Phases([(0, Mean())]), OptionError, "1 or more; got 0"),
        (lambda: Phases([(2.5, Mean())]), OptionError, "got 2.5"),
        (lambda: Phases([(None, Mean()), (3, Mean())]), OptionError, "Only the last"),
        (lambda: Phases([(3, Gaussian(2))]), ArgumentTypeError, "A phase uses an objective"),
        (lambda: Phases([Mean()]), ArgumentTypeError, "a pair"),
    ],
)
def test_mistakes_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make()


def recipe(ramp=30, weight=2.0):
    """Denoising first, then persistent chains beside contrasted noise, which learns its own log Z."""
    base = Gaussian(2, scale=2.0)
    pcd = PersistentContrastiveDivergence(MALA(0.1), base, steps=3, buffer_size=32, restart=0.1)
    later = pcd + Ramp(weight, 0.0, ramp) * NoiseContrastiveEstimation(base)
    return Phases([(15, DenoisingScoreMatching(0.3)), (None, later)])


RUN = {
    "steps": 60,
    "log_every": 4,
    "checkpoint_every": 10,
    "batch_size": 16,
    "learning_rate": 0.01,
    "tensorboard": False,
}


def train(objective, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(2, (8,)) + Gaussian(2, scale=2.0)
    data = 1.0 + 0.5 * torch.randn(48, 2, generator=seeded(5))
    return fit(energy, data, objective, rng=seeded(1), **{**RUN, **options})


@pytest.mark.parametrize("at", [12, 28, 44])
def test_a_broken_off_run_goes_on_exactly(tmp_path, at):
    whole, objective = train(recipe(), folder=tmp_path / "a"), recipe()
    with pytest.raises(ZeroDivisionError):
        train(recipe(), folder=tmp_path / "b", callbacks=[lambda record: 1 / (record["step"] < at)])
    again = train(objective, folder=tmp_path / "b", resume=True)
    for a, b in zip(whole.energy.state_dict().values(), again.energy.state_dict().values()):
        assert torch.equal(a, b)
    assert objective.calls == 60
    assert objective.phases[1].objective.calls == 45
    timeless = [{k: v for k, v in r.items() if "second" not in k} for r in whole.history]
    assert [{k: v for k, v in r.items() if "second" not in k} for r in again.history] == timeless


def test_parameters_of_all_parts_are_trained():
    objective = recipe()
    train(objective)
    assert float(objective.phases[1].objective.terms[1].objective.log_z.detach()) != 0.0


def test_other_weights_and_lengths_are_refused_on_resuming(tmp_path):
    train(recipe(), folder=tmp_path)
    with pytest.raises(OptionError, match=r"weight was Ramp\(start=2.0.*steps=30\), now Ramp\(start=2.5"):
        train(recipe(weight=2.5), folder=tmp_path, resume=True)


class Misfortune(Objective):
    """Denoising whose loss is NaN at one call; the count is no part of its state."""

    def __init__(self, call):
        super().__init__()
        self.inner, self._left = DenoisingScoreMatching(0.3), call

    def forward(self, energy, batch, rng):
        self._left -= 1
        loss = self.inner(energy, batch, rng)
        return Loss(loss.value * math.nan) if self._left == 0 else loss


def test_a_rollback_takes_the_count_back():
    objective = Phases([(25, DenoisingScoreMatching(0.3)), (None, Misfortune(9))])
    run = train(objective)
    (event,) = run.events
    assert (event["step"], event["to_step"]) == (34, 30)
    assert objective.calls == 60
    back = Phases([(35, Misfortune(33)), (None, DenoisingScoreMatching(0.3))])
    assert [e["to_step"] for e in train(back).events] == [30]
    assert back.calls == 60
