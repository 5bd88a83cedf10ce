"""Telescoping ratios: known models are recovered, also where one ratio teaches nothing, and slips are caught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gibbsian import MALA, MLP, ais, fit, sample
from gibbsian.energies.base import Energy
from gibbsian.energies.telescope import Telescope, geometric_alphas
from gibbsian.energies.tractable import Bernoulli, Gaussian, Uniform
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import telescoping
from gibbsian.objectives.base import Batch
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.objectives.telescoping import TelescopingRatios
from recovery import GAUSSIAN, LAPLACES, QUARTIC, assert_recovered, estimates, minimise, seeded, slope

D = torch.float64
ALPHAS = (0.4, 0.7, 1.0)
GRID = torch.linspace(-8.0, 8.0, 161, dtype=D)
WIDE = 2.0
"""Standard deviation of the noise, whose mean is 0."""


class GaussianBridges(Energy):
    """Exact bridges of a Gaussian model to Gaussian noise: its waymarks are Gaussian too."""

    context = ("level",)

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.event_shape = model, model.event_shape

    def forward(self, x, level):
        a, b = self.model.log_diagonal.exp(), self.model.below[0]
        factor = torch.stack((torch.stack((a[0], b)), torch.stack((0 * b, a[1]))))
        spread = torch.linalg.inv(factor.T @ factor)
        alphas = torch.tensor((0.0, *ALPHAS[:-1], 1.0), dtype=D)

        def waymark(alpha):
            keep = 1 - alpha.square()
            cover = keep[:, None, None] * spread + (WIDE * alpha)[:, None, None].square() * torch.eye(2, dtype=D)
            y = x - keep.sqrt()[:, None] * self.model.mean
            return 0.5 * ((torch.linalg.inv(cover) @ y[:, :, None])[:, :, 0] * y).sum(1) + 0.5 * torch.logdet(cover)

        return waymark(alphas[level]) - waymark(alphas[level + 1])


class LineBridges(Energy):
    """Bridges of a model on the line to Gaussian noise, by integrating over a grid."""

    context = ("level",)

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.event_shape = model, model.event_shape

    def forward(self, x, level):
        logs = -self.model(GRID[:, None])
        logs = logs - torch.logsumexp(logs, 0) - math.log(float(GRID[1] - GRID[0]))
        alphas = torch.tensor((0.0, *ALPHAS), dtype=D)
        values = []
        for k in range(len(ALPHAS)):
            y = x[level == k]
            values.append(self.waymark(y, alphas[k], logs) - self.waymark(y, alphas[k + 1], logs))
        return torch.cat(values)[torch.argsort(torch.argsort(level, stable=True), stable=True)]

    def waymark(self, x, alpha, logs):
        step = math.log(float(GRID[1] - GRID[0]))
        if alpha == 0:
            mass = torch.logsumexp(-self.model(GRID[:, None]), 0) + step
            return self.model(x) + mass
        gap = (x - (1 - alpha.square()).sqrt() * GRID) / (WIDE * alpha)
        kernel = -0.5 * gap.square() - (WIDE * alpha).log() - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(kernel + logs + step, 1)


def telescope(model):
    bridges = GaussianBridges if model.event_shape[0] == 2 else LineBridges
    return Telescope(bridges(model), Gaussian(model.event_shape[0], scale=WIDE).double(), ALPHAS)


def found(case, n=600, replicates=24):
    return estimates(TelescopingRatios, case, n, replicates, wrap=telescope)


@pytest.mark.parametrize("case", [GAUSSIAN, LAPLACES, QUARTIC], ids=lambda c: c.name)
def test_known_models_are_recovered(case):
    assert_recovered(found(case), case.truth, 0.35)


@pytest.mark.parametrize("case", [GAUSSIAN, LAPLACES, QUARTIC], ids=lambda c: c.name)
def test_at_the_truth_the_telescope_is_the_normalised_energy(case):
    """The bridges of the yardstick are right: their sum with the noise is the energy plus its log Z."""
    energy, x = case.at_truth(), case.rows(50, seeded(1))
    torch.testing.assert_close(telescope(energy)(x), energy(x) + case.log_z, rtol=1e-5, atol=1e-5)


def test_the_error_falls_as_the_square_root_of_the_rows():
    rate = slope(lambda n: found(GAUSSIAN, n, 16), GAUSSIAN.truth, (250, 1000, 4000))
    assert rate == pytest.approx(-0.5, abs=0.2)


def turned_round(energy, x, noise):
    """The twin whose bridges lead the wrong way."""
    return ENDS(energy, x, noise).flip(0)


def not_mixed(energy, x, noise):
    """The twin that adds the noise without shrinking the data."""
    alphas = torch.tensor((0.0, *ALPHAS), dtype=D)
    return torch.stack((alphas[:-1], alphas[1:])).view(2, -1, 1, 1) * noise + x


def one_level_off(energy, x, noise):
    """The twin whose bridges are numbered from the noise."""
    return ENDS(energy, x, noise).flip(1)


ENDS = Telescope.ends


@pytest.mark.parametrize("twin", [turned_round, not_mixed, one_level_off])
def test_a_slip_in_the_waymarks_is_caught(twin, monkeypatch):
    monkeypatch.setattr(Telescope, "ends", twin)
    with pytest.raises(AssertionError, match=r"missed|no power"):
        assert_recovered(found(GAUSSIAN, replicates=12), GAUSSIAN.truth, 0.35)


def test_a_slip_in_the_sign_is_caught(monkeypatch):
    monkeypatch.setattr(telescoping, "softplus", lambda odds: nn.functional.softplus(-odds))
    with pytest.raises(AssertionError, match=r"missed|no power"):
        assert_recovered(found(GAUSSIAN, replicates=12), GAUSSIAN.truth, 0.35)


def test_the_gradient_vanishes_at_the_truth():
    """A t statistic with 59 degrees of freedom exceeds 6.5 once in 5e7."""
    model = GAUSSIAN.at_truth()
    energy, rng, grads = telescope(model), seeded(5), []
    for seed in range(60):
        value = TelescopingRatios()(energy, Batch(GAUSSIAN.rows(500, seeded(100 + seed))), rng).value
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    g = torch.stack(grads)
    assert float((g.mean(0) / (g.std(0) / len(g) ** 0.5)).abs().max()) < 6.5


# Data ten times narrower than the noise in twenty dimensions: 37 nats of divergence.

DIM, WIDTH, BRIDGES = 20, 0.1, 8


class Rounds(Energy):
    """One coefficient of the squared radius and one constant for each bridge."""

    context = ("level",)
    event_shape = torch.Size([DIM])

    def __init__(self) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(BRIDGES, dtype=D))
        self.constant = nn.Parameter(torch.zeros(BRIDGES, dtype=D))

    def forward(self, x, level):
        return self.log_slope.exp()[level] * x.square().sum(1) + self.constant[level]


class Round(Energy):
    event_shape = torch.Size([DIM])

    def __init__(self) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros((), dtype=D))

    def forward(self, x):
        return self.log_slope.exp() * x.square().sum(1)


def test_telescoping_succeeds_where_one_ratio_fails():
    """The logarithm of the data's width and log Z; a single classifier separates the classes and stops anywhere."""
    noise, log_z = Gaussian(DIM).double(), DIM * (0.5 * math.log(2 * math.pi) + math.log(WIDTH))
    chain, single = [], []
    for seed in range(8):
        x = WIDTH * torch.randn((1000, DIM), generator=seeded(seed), dtype=D)
        energy = Telescope(Rounds(), noise, geometric_alphas(BRIDGES, WIDTH))
        minimise(TelescopingRatios(), energy, x, seed, 400)
        with torch.no_grad():
            precision = 1.0 + 2.0 * energy.bridges.log_slope.exp().sum()
            # Of the normalised energy at 0, which is log Z of the plain square.
            chain.append(torch.stack((-0.5 * precision.log(), energy(torch.zeros(1, DIM, dtype=D))[0])))
        one, objective = Round(), NoiseContrastiveEstimation(noise, 4).double()
        minimise(objective, one, x, seed)
        single.append(torch.stack((-0.5 * (2 * one.log_slope.exp()).log(), objective.log_z)).detach())
    truth = torch.tensor([math.log(WIDTH), log_z], dtype=D)
    error, other = ((torch.stack(e) - truth).square().mean(0).sqrt() for e in (chain, single))
    assert float(error[0]) < 0.03
    assert float(error[1]) < 1.5
    assert float(other[0]) > 0.3
    assert float(other[1]) > 10


def test_alphas_spread_the_variances_evenly():
    alphas = torch.tensor((0.0, *geometric_alphas(6, 0.05)), dtype=D)
    variance = (1 - alphas.square()) * 0.05**2 + alphas.square()
    torch.testing.assert_close(variance[1:] / variance[:-1], torch.full((6,), 0.05 ** (-2 / 6), dtype=D))


# A telescope is an energy like any other.


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    x = torch.tensor([1.0, -0.5]) + 0.4 * torch.randn((4000, 2), generator=seeded(1))
    energy = Telescope(MLP(2, hidden=(64,), classes=4), Gaussian(2, scale=2.0), geometric_alphas(4, 0.25))
    run = fit(energy, x, TelescopingRatios(), rng=seeded(2), steps=2000, batch_size=256, learning_rate=5e-3)
    return energy, run


def test_a_short_fit_gives_an_energy_that_is_almost_normalised(fitted):
    energy, run = fitted
    assert run.events == []
    z = ais(energy, energy.noise, chains=256, rng=seeded(3))
    assert abs(float(z.value)) < 0.15
    assert run.history[-1]["accuracy_most"] < 0.95


def test_it_can_be_sampled(fitted):
    energy, _ = fitted
    run = sample(energy, MALA(0.1), energy.noise.sample(512, seeded(4)), steps=300, rng=seeded(5))
    torch.testing.assert_close(run.x.mean(0), torch.tensor([1.0, -0.5]), atol=0.15, rtol=0)
    torch.testing.assert_close(run.x.std(0), torch.full((2,), 0.4), atol=0.12, rtol=0)


def test_bridges_learn_what_they_are_conditioned_on():
    seen = []

    def fn(x, y, level):
        seen.append((x, y, level))
        return x.flatten(1).sum(1) * level + y

    energy = Telescope(Energy.of(fn, context=("y", "level")), Gaussian((1, 2, 2)), 3, level="level")
    assert energy.context == ("y",)
    x, y = torch.randn((5, 1, 2, 2), generator=seeded()), torch.arange(5.0)
    TelescopingRatios()(energy, Batch(x, {"y": y}), seeded())
    points, labels, level = seen[0]
    assert torch.equal(points[:5], x)
    assert torch.equal(labels, y.repeat(6))
    assert torch.equal(level, torch.arange(3).repeat_interleave(5).repeat(2))
    expected = energy.noise(x) + 3 * x.flatten(1).sum(1) + 3 * y
    torch.testing.assert_close(energy(x, y=y), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_follows_the_generator_in_either_precision(dtype):
    torch.manual_seed(0)
    energy = Telescope(MLP(2, hidden=(8,), classes=3), Gaussian(2), 3).to(dtype)
    x = torch.randn((1, 2), generator=seeded(), dtype=dtype)
    a, b, c = (TelescopingRatios()(energy, Batch(x), seeded(s)).value for s in (1, 1, 2))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_state_goes_round():
    energies = [Telescope(MLP(2, hidden=(8,), classes=2), Gaussian(2), a) for a in ((0.5, 1.0), (0.3, 1.0))]
    energies[1].load_state_dict(energies[0].state_dict())
    x = torch.randn((4, 2), generator=seeded())
    assert torch.equal(energies[0](x), energies[1](x))
    assert torch.equal(energies[0].alphas, energies[1].alphas)


def test_what_does_not_fit_is_refused():
    bridges, noise = MLP(2, classes=2), Gaussian(2)
    for alphas in (0, (), (0.5,), (0.0, 1.0), (0.7, 0.5, 1.0), (0.5, 0.5, 1.0)):
        with pytest.raises(OptionError, match="alphas rise from above 0 to 1"):
            Telescope(bridges, noise, alphas)
    with pytest.raises(OptionError, match=r"takes: none.*classes=4"):
        Telescope(MLP(2), noise, 2)
    with pytest.raises(OptionError, match="level=k"):
        Telescope(bridges, noise, 2, level="k")
    with pytest.raises(ArgumentTypeError, match="tractable"):
        Telescope(bridges, MLP(2), 2)
    with pytest.raises(ArgumentTypeError, match=r"Energy\.of"):
        Telescope(lambda x, level: x[:, 0], noise, 2)
    with pytest.raises(ShapeError, match="different shapes"):
        Telescope(bridges, Gaussian(3), 2)
    with pytest.raises(DomainError, match="reals"):
        Telescope(bridges, Bernoulli(probs=torch.full((2,), 0.5)), 2)
    for wrong in ((0, 0.5), (2, 0.0), (2, 1.0)):
        with pytest.raises(OptionError, match="between 0 and 1"):
            geometric_alphas(*wrong)
    objective, x = TelescopingRatios(), torch.rand(4, 2)
    with pytest.raises(ArgumentTypeError, match="fits a Telescope"):
        objective(MLP(2), Batch(x), seeded())
    with pytest.raises(ArgumentTypeError, match="floating-point"):
        objective(Telescope(bridges, noise, 2), Batch(x.long()), seeded())
    with pytest.raises(ShapeError, match="points of shape"):
        objective(Telescope(bridges, noise, 2), Batch(torch.rand(4, 3)), seeded())
    with pytest.raises(OptionError, match="not finite at 4 of 4 rows"):
        objective(Telescope(bridges, Uniform(2, low=0.0, high=1.0), 2), Batch(x + 2.0), seeded())
