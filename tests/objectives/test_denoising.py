"""Denoising score matching: the smoothed density's parameters are recovered, and the loss has its exact value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gibbsian import Bernoulli, Energy, Gaussian
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import row_sum
from gibbsian.objectives import denoising
from gibbsian.objectives.base import Batch
from gibbsian.objectives.denoising import (
    DenoisingScoreMatching,
    EDMWeight,
    LogNormal,
    LogUniform,
    MultiLevelDenoising,
)

REPLICATES = 32
Z = 7.5  # A t statistic with 31 degrees of freedom exceeds it once in 5e7; see check_mean.


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Family(Energy):
    """Sum over coordinates of theta . f(x): each coordinate is a replicate of one experiment."""

    def __init__(self, *features) -> None:
        super().__init__()
        self.features = features
        self.theta = nn.Parameter(torch.zeros(len(features), REPLICATES, dtype=torch.float64))

    def forward(self, x):
        return row_sum(sum(t * f(x) for t, f in zip(self.theta, self.features)))


class NoisyGaussian(Energy):
    """The density of N(m, s^2) smoothed by sigma, for every sigma at once."""

    context = ("sigma",)

    def __init__(self, m: float = 0.0, log_s: float = 0.0) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.full((REPLICATES,), m, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.full((REPLICATES,), log_s, dtype=torch.float64))

    def forward(self, x, sigma):
        variance = (2 * self.log_s).exp() + sigma[:, None] ** 2
        return row_sum((x - self.m) ** 2 / (2 * variance))


def normal_data(n: int, m: float, s: float, seed: int = 1) -> torch.Tensor:
    return m + s * torch.randn(n, REPLICATES, generator=generator(seed), dtype=torch.float64)


def minimise(objective, energy, data) -> None:
    """With the same noise at every call the loss is smooth and fixed; L-BFGS finds its minimum."""
    optimiser = torch.optim.LBFGS(energy.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimiser.zero_grad()
        value = objective(energy, Batch.of(data), generator(2)).value
        value.backward()
        return value

    optimiser.step(closure)


def check_mean(estimates: torch.Tensor, truth: float, least_power: float) -> None:
    """The replicates' mean is the truth within its standard error, which is small enough to see ``least_power``."""
    assert bool(torch.isfinite(estimates).all()), "missed: not finite"
    error = estimates.std() / math.sqrt(REPLICATES)
    assert float(error) * Z < least_power, f"no power: {float(error)}"
    assert abs(float(estimates.mean()) - truth) < Z * float(error), f"missed: {float(estimates.mean())} for {truth}"


def check_gaussian() -> None:
    """Data N(1.5, 0.7^2) and noise 0.5: the fit has precision 1/(s^2 + sigma^2), well apart from 1/s^2."""
    m, s, sigma = 1.5, 0.7, 0.5
    energy = Family(lambda x: -x, lambda x: 0.5 * x**2)
    minimise(DenoisingScoreMatching(sigma), energy, normal_data(1500, m, s))
    field, precision = energy.theta.detach()
    truth = 1 / (s**2 + sigma**2)
    check_mean(precision, truth, least_power=(1 / s**2 - truth) / 5)
    check_mean(field / precision, m, least_power=0.1)


def check_value() -> None:
    """At the truth the loss is half the sum of s^2 / (s^2 + sigma^2): not its mean, not its negative."""
    s, sigma, n = 0.7, 0.5, 20_000
    variance = s**2 + sigma**2
    energy = Family(lambda x: x**2 / (2 * variance))
    nn.init.ones_(energy.theta)
    loss = DenoisingScoreMatching(sigma)(energy, Batch.of(normal_data(n, 0.0, s)), generator(3))
    ratio = s**2 / variance
    error = ratio * math.sqrt(0.5 * REPLICATES / n)
    assert abs(loss.value.item() - 0.5 * REPLICATES * ratio) < 5.5 * error, f"missed: {loss.value.item()}"
    assert abs(loss.metrics["denoising_error"].item() - ratio) < 5.5 * error * 2 / REPLICATES
    assert abs(loss.metrics["energy_noisy"].item() - 0.5 * REPLICATES) < 5.5 * math.sqrt(0.5 * REPLICATES / n)


def check_levels(weight=None) -> None:
    """One m and one s behind all levels."""
    m, s = -0.8, 0.6
    energy = NoisyGaussian()
    minimise(MultiLevelDenoising(LogUniform(0.05, 3.0), weight), energy, normal_data(2000, m, s))
    check_mean(energy.m.detach(), m, least_power=0.15)
    check_mean(energy.log_s.detach(), math.log(s), least_power=0.15)


def test_a_gaussian_is_recovered_smoothed():
    check_gaussian()


def test_the_loss_has_its_exact_value():
    check_value()


@pytest.mark.parametrize("weight", [None, EDMWeight(0.6)])
def test_many_levels_recover_one_gaussian(weight):
    check_levels(weight)


def broken(residual):
    """A twin of `noise_error` with another residual, of noise, level and gradient."""

    def noise_error(energy, x, eps, sigma, context):
        scale = sigma.reshape(-1, 1)
        with torch.enable_grad():
            y = (x + scale * eps).requires_grad_(True)
            value = energy(y, **context)
            (grad,) = torch.autograd.grad(value.sum(), y, create_graph=True)
        error = residual(eps, scale, grad)
        return error.square().sum(1), value

    return noise_error


TWINS = {
    "flipped sign": broken(lambda eps, sigma, grad: eps + sigma * grad),
    "no sigma": broken(lambda eps, sigma, grad: eps - grad),
    "sigma squared": broken(lambda eps, sigma, grad: eps - sigma**2 * grad),
    "another row's level": broken(lambda eps, sigma, grad: eps - sigma.flip(0) * grad),
    "divided by dimension": broken(lambda eps, sigma, grad: (eps - sigma * grad) / math.sqrt(REPLICATES)),
}


@pytest.mark.parametrize(
    ("twin", "check"),
    [
        ("flipped sign", check_gaussian),
        ("flipped sign", check_value),
        ("flipped sign", check_levels),
        ("no sigma", check_gaussian),
        ("no sigma", check_value),
        ("no sigma", check_levels),
        ("sigma squared", check_gaussian),
        ("another row's level", check_levels),
        ("divided by dimension", check_value),
    ],
)
def test_a_broken_twin_is_caught(monkeypatch, twin, check):
    monkeypatch.setattr(denoising, "noise_error", TWINS[twin])
    with pytest.raises(AssertionError, match=r"missed|no power"):
        check()


def test_an_unbroken_twin_passes(monkeypatch):
    monkeypatch.setattr(denoising, "noise_error", broken(lambda eps, sigma, grad: eps - sigma * grad))
    check_gaussian()
    check_value()
    check_levels()


def test_a_two_mode_family_is_recovered():
    # N(+-m, s^2), smoothed, has the energy x^2 / 2v - log cosh(m x / v) with v = s^2 + sigma^2.
    m, s, sigma, n = 1.0, 0.5, 0.4, 3000
    v = s**2 + sigma**2
    energy = Family(lambda x: 0.5 * x**2, lambda x: -(torch.cosh(m / v * x).log()), lambda x: x)
    signs = 2.0 * torch.randint(0, 2, (n, REPLICATES), generator=generator(4), dtype=torch.float64) - 1.0
    minimise(DenoisingScoreMatching(sigma), energy, normal_data(n, 0.0, s) + m * signs)
    precision, coupling, tilt = energy.theta.detach()
    check_mean(precision, 1 / v, least_power=(1 / s**2 - 1 / v) / 5)
    check_mean(coupling, 1.0, least_power=0.15)
    check_mean(tilt, 0.0, least_power=0.15)


def test_the_value_at_many_levels_is_exact():
    # Given sigma the error has mean s^2 / (s^2 + sigma^2) a coordinate; its integral over log sigma is closed.
    s, n, low, high = 0.8, 20_000, 0.1, 5.0
    energy = NoisyGaussian(0.0, math.log(s))
    data = Batch.of(normal_data(n, 0.0, s))
    loss = MultiLevelDenoising(LogUniform(low, high))(energy, data, generator(5))

    def integral(sigma: float) -> float:
        return math.log(sigma) - 0.5 * math.log(s**2 + sigma**2)

    mean = 0.5 * REPLICATES * (integral(high) - integral(low)) / math.log(high / low)
    # A row's loss lies in a law with second moment at most (d/2)^2 + d/2.
    error = math.sqrt((REPLICATES**2 / 4 + REPLICATES / 2) / n)
    assert abs(loss.value.item() - mean) < 5.5 * error < 0.1 * mean


def test_the_edm_weight_is_karras_loss_of_the_denoiser():
    data, levels, sigma_data = normal_data(64, 0.3, 0.5), LogNormal(), 0.5
    energy = NoisyGaussian(0.1, -0.2)
    loss = MultiLevelDenoising(levels, EDMWeight(sigma_data))(energy, Batch.of(data), generator(6))
    rng = generator(6)
    sigma = levels.draw(64, rng, data)
    noisy = data + sigma[:, None] * torch.randn(data.shape, generator=rng, dtype=torch.float64)
    s2 = (2 * energy.log_s).exp()
    denoised = (sigma[:, None] ** 2 * energy.m + s2 * noisy) / (sigma[:, None] ** 2 + s2)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    karras = 0.5 * (weight * (denoised - data).square().sum(1)).mean()
    torch.testing.assert_close(loss.value, karras)


@pytest.mark.parametrize("levels", [LogUniform(0.01, 20.0), LogNormal(), LogNormal(0.0, 2.0, 0.5, 3.0)])
def test_levels_follow_their_law(levels):
    n = 20_000
    sigma = levels.draw(n, generator(7), torch.empty(0, dtype=torch.float64))
    assert float(sigma.min()) >= levels.low
    assert float(sigma.max()) <= levels.high
    if isinstance(levels, LogUniform):
        u = (sigma / levels.low).log() / math.log(levels.high / levels.low)
    else:
        normal = torch.distributions.Normal(levels.mean, levels.std)
        a, b = (normal.cdf(torch.tensor(math.log(end), dtype=torch.float64)) for end in (levels.low, levels.high))
        u = (normal.cdf(sigma.log()) - a) / (b - a)
    distance = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    # Kolmogorov: P(D > 2.7 / sqrt(n)) = 2 exp(-2 * 2.7^2) = 9e-7.
    assert float(distance) < 2.7 / math.sqrt(n) + 0.5 / n


def test_single_precision_levels_stay_in_range():
    sigma = LogNormal(0.0, 0.1, 1e-3, 1e3).draw(200_000, generator(8), torch.empty(0))
    assert bool(torch.isfinite(sigma).all())
    assert sigma.dtype == torch.float32


def test_labels_reach_the_energy_beside_the_level():
    def conditional(x, sigma, y):
        return row_sum((x - y[:, None]) ** 2) / (2 * (0.25 + sigma**2))

    energy = Energy.of(conditional, context=("sigma", "y"))
    y = torch.tensor([0.0, 4.0], dtype=torch.float64).repeat(2000)
    x = y[:, None] + 0.5 * torch.randn(4000, 3, generator=generator(9), dtype=torch.float64)
    objective = MultiLevelDenoising(LogUniform(0.1, 1.0))
    right = objective(energy, Batch(x, {"y": y, "unused": y}), generator(10)).value
    wrong = objective(energy, Batch(x, {"y": y.flip(0)}), generator(10)).value
    assert right.item() < 1.5 < wrong.item()
    fixed = DenoisingScoreMatching(0.3)(energy.given(sigma=0.3), Batch(x, {"y": y}), generator(11))
    expected = 0.5 * 3 * 0.25 / (0.25 + 0.09)
    assert abs(fixed.value.item() - expected) < 5.5 * 0.25 / 0.34 * math.sqrt(1.5 / 4000)


def test_nothing_is_tracked_where_gradients_are_off():
    energy, data = NoisyGaussian(), Batch.of(normal_data(8, 0.0, 1.0))
    with torch.no_grad():
        off = MultiLevelDenoising(LogUniform(0.1, 1.0))(energy, data, generator())
    on = MultiLevelDenoising(LogUniform(0.1, 1.0))(energy, data, generator())
    assert not off.value.requires_grad
    assert on.value.requires_grad
    assert not any(metric.requires_grad for metric in on.metrics.values())
    torch.testing.assert_close(off.value, on.value)
    on.value.backward()
    assert all(p.grad is not None and bool((p.grad != 0).all()) for p in energy.parameters())


@pytest.mark.parametrize("sigma", [0.0, -0.1, math.nan, math.inf])
def test_a_level_that_is_not_positive_is_refused(sigma):
    with pytest.raises(OptionError, match=str(sigma)):
        DenoisingScoreMatching(sigma)
    with pytest.raises(OptionError, match=str(sigma)):
        LogUniform(sigma, 1.0)
    with pytest.raises(OptionError, match=str(sigma)):
        EDMWeight(sigma)
    with pytest.raises(OptionError, match=str(sigma)):
        LogNormal(std=sigma)


def test_energies_that_do_not_fit_are_refused():
    data, rng = Batch.of(torch.zeros(4, 3)), generator()
    bits = Bernoulli(probs=torch.full((3,), 0.5))
    for objective in (DenoisingScoreMatching(0.1), MultiLevelDenoising(LogUniform(0.1, 1.0))):
        with pytest.raises(DomainError, match=r"Boolean.*PersistentContrastiveDivergence"):
            objective(bits, data, rng)
        with pytest.raises(ArgumentTypeError, match="int64"):
            objective(Gaussian(3), Batch.of(torch.zeros(4, 3, dtype=torch.int64)), rng)
    with pytest.raises(OptionError, match=r"MultiLevelDenoising"):
        DenoisingScoreMatching(0.1)(NoisyGaussian(), data, rng)
    with pytest.raises(OptionError, match=r"context is: none.*DenoisingScoreMatching"):
        MultiLevelDenoising(LogUniform(0.1, 1.0))(Gaussian(3), data, rng)
    with pytest.raises(OptionError, match="conditioned on y"):
        DenoisingScoreMatching(0.1)(Energy.of(lambda x, y: x.sum(1), context=("y",)), data, rng)
    with pytest.raises(ShapeError, match=r"\(4,\).*\(4, 1\)"):
        DenoisingScoreMatching(0.1)(Energy.of(lambda x: x.square().sum(1, keepdim=True)), data, rng)
    with pytest.raises(ArgumentTypeError, match="LogUniform"):
        MultiLevelDenoising(0.1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"low=1\.0, high=0\.5"):
        LogUniform(1.0, 0.5)
