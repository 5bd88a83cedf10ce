"""Denoising recovers what lies under the noise, on events of any shape, and its slips are caught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gibbsian import ConvEnergy, DenoisingScoreMatching, Energy, LogUniform, MultiLevelDenoising
from gibbsian.errors import ArgumentTypeError, ShapeError
from gibbsian.objectives import denoising
from gibbsian.objectives.base import Batch, energy_and_gradient
from recovery import GAUSSIAN, LAPLACES, QUARTIC, Smoothed, assert_recovered, estimates, seeded, slope

SIGMA = 0.4


class NoisyPlane(Energy):
    """The plane's Gaussian under noise, of any level: the precision's inverse grows by sigma squared."""

    context = ("sigma",)

    def __init__(self, energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x, sigma):
        e = self.energy
        scale = e.log_diagonal.exp()
        factor = torch.stack((torch.stack((scale[0], e.below[0])), torch.stack((0 * scale[1], scale[1]))))
        covariance = torch.linalg.inv(factor.T @ factor) + sigma.square()[:, None, None] * torch.eye(2).double()
        y = x - e.mean
        return 0.5 * (y * torch.linalg.solve(covariance, y)).sum(1)


def one_level(energy):
    """The plane's Gaussian under noise of one level."""
    return NoisyPlane(energy).given(sigma=torch.tensor(SIGMA, dtype=torch.float64))


def smoothed(energy):
    return Smoothed(energy, SIGMA)


def at_one_level(case, n=2000, replicates=24):
    wrap = one_level if case is GAUSSIAN else smoothed
    return estimates(lambda: DenoisingScoreMatching(SIGMA), case, n, replicates, wrap=wrap)


def at_many_levels(n=2000, replicates=24):
    return estimates(lambda: MultiLevelDenoising(LogUniform(0.05, 3.0)), GAUSSIAN, n, replicates, wrap=NoisyPlane)


CASES = [GAUSSIAN, QUARTIC, pytest.param(LAPLACES, marks=pytest.mark.slow)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_level_recovers_what_lies_under_the_noise(case):
    assert_recovered(at_one_level(case), case.truth, 0.7 if case is LAPLACES else 0.25)


def test_many_levels_recover_what_lies_under_the_noise():
    assert_recovered(at_many_levels(), GAUSSIAN.truth, 0.2)


def test_errors_fall_with_the_square_root_of_rows():
    # Over a range of 16 in n the slope scatters by 0.05; see test_score_matching.
    for fit in (lambda n: at_one_level(GAUSSIAN, n, 16), lambda n: at_many_levels(n, 16)):
        assert slope(fit, GAUSSIAN.truth) == pytest.approx(-0.5, abs=0.25)


def residual(of):
    """`noise_error` with another residual."""

    def noise_error(energy, x, eps, sigma, context):
        scale = sigma.reshape(-1, *[1] * (x.ndim - 1))
        with torch.enable_grad():
            value, grad = energy_and_gradient(energy, (x + scale * eps).requires_grad_(True), context, True)
        return of(eps, scale, grad).square().sum(1), value

    return noise_error


TWINS = {
    # The score is -eps / sigma: both of these leave a factor of sigma squared out, or put one in.
    "gradient times sigma cubed": residual(lambda eps, sigma, grad: eps - sigma**3 * grad),
    "gradient over sigma": residual(lambda eps, sigma, grad: eps - grad / sigma),
    "sign of the gradient": residual(lambda eps, sigma, grad: eps + sigma * grad),
    "half the gradient": residual(lambda eps, sigma, grad: eps - 0.5 * sigma * grad),
    "gradient over the dimension": residual(lambda eps, sigma, grad: eps - sigma * grad / 2),
}


@pytest.mark.parametrize("name", TWINS)
def test_slips_are_caught(name, monkeypatch):
    monkeypatch.setattr(denoising, "noise_error", TWINS[name])
    for fit in (lambda: at_one_level(GAUSSIAN, 1000, 8), lambda: at_many_levels(1000, 8)):
        with pytest.raises(AssertionError, match=r"missed|no power"):
            assert_recovered(fit(), GAUSSIAN.truth, 1.5)


def test_a_twin_without_a_slip_passes(monkeypatch):
    monkeypatch.setattr(denoising, "noise_error", residual(lambda eps, sigma, grad: eps - sigma * grad))
    assert_recovered(at_one_level(GAUSSIAN, 1000, 8), GAUSSIAN.truth, 1.5)
    assert_recovered(at_many_levels(1000, 8), GAUSSIAN.truth, 1.5)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 4, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_events_have_any_shape(shape, dtype):
    """With the energy |x|^2 / 2 the residual is eps - sigma (x + sigma eps), summed over all axes of the event."""
    axes = tuple(range(1, 1 + len(shape)))
    x = torch.randn((6, *shape), generator=seeded(1)).to(dtype)
    loss = DenoisingScoreMatching(0.5)(Energy.of(lambda x: 0.5 * x.square().sum(axes)), Batch(x), seeded(2))
    eps = torch.randn(x.shape, generator=seeded(2), dtype=dtype)
    expected = 0.5 * (eps - 0.5 * (x + 0.5 * eps)).square().sum(axes).mean()
    torch.testing.assert_close(loss.value.detach(), expected)

    def noisy(x, sigma):
        return 0.5 * x.square().sum(axes) / (1 + sigma.square())

    many = MultiLevelDenoising(LogUniform(0.1, 2.0), level_weight=0.2)
    loss = many(Energy.of(noisy, context=("sigma",)), Batch(x), seeded(2))
    assert loss.value.dtype == dtype
    assert bool(loss.value.isfinite())


def test_images_one_row_and_equal_rows_are_fitted_like_any():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = ConvEnergy((1, 4, 4), widths=(3, 5))
    for x in (torch.ones(1, 1, 4, 4), torch.ones(5, 1, 4, 4)):
        loss = DenoisingScoreMatching(0.1)(energy, Batch(x), seeded()).value
        loss.backward()
        assert bool(loss.isfinite())


def test_on_equal_rows_the_fit_is_the_noise_itself():
    energy = GAUSSIAN.model()
    wrapped = Energy.of(energy)
    optimiser = torch.optim.LBFGS(wrapped.parameters(), max_iter=50, line_search_fn="strong_wolfe")
    x = torch.full((4000, 2), 0.3, dtype=torch.float64)

    def closure():
        optimiser.zero_grad()
        value = DenoisingScoreMatching(0.5)(wrapped, Batch(x), seeded(1)).value
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(energy.mean.detach(), torch.full((2,), 0.3, dtype=torch.float64), atol=0.02, rtol=0)
    expected = torch.full((2,), math.log(2.0), dtype=torch.float64)
    torch.testing.assert_close(energy.log_diagonal.detach(), expected, atol=0.05, rtol=0)


def test_energies_without_a_score_are_refused_by_name():
    x, scale = torch.ones(4, 2), nn.Parameter(torch.ones(()))
    for flat in (
        lambda x: scale * torch.ones(len(x)),
        lambda x: scale * x.detach().sum(1),
        lambda x: x.round().detach().sum(1),
    ):
        with pytest.raises(ArgumentTypeError, match="does not depend on x"):
            DenoisingScoreMatching(0.1)(Energy.of(flat), Batch(x), seeded())
    with pytest.raises(ShapeError, match=r"must have shape \(4,\); it returned \(4, 1\)"):
        DenoisingScoreMatching(0.1)(Energy.of(lambda x: x[:, :1] * scale), Batch(x), seeded())
