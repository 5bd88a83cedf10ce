"""Chain diagnostics against the AR(1) process and closed forms; against ArviZ, see test_arviz_oracle.py."""

import math

import numpy as np
import pytest
import torch
from chain_cases import ar1
from scipy.stats import norm

from gibbsian.diagnostics.chains import (
    autocorrelation,
    chain_mean,
    effective_sample_size,
    grid_total_variation,
    split_r_hat,
    total_variation,
)
from gibbsian.errors import DomainError, InputError, ShapeError

# Five and a half standard errors: one false alarm in 26 million for a normal statistic.
Z = 5.5


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9, -0.4])
@pytest.mark.parametrize("ranked", [True, False])
def test_ess_of_an_autoregression_is_the_closed_form(rho, ranked):
    x = ar1(rho, 4000, 8)
    exact = x.numel() * (1 - rho) / (1 + rho)
    # Over 200 seeds the estimate's relative spread is below 4 per cent at rho = 0.9.
    assert float(effective_sample_size(x, ranked=ranked)) == pytest.approx(exact, rel=0.2)


def plain_r_hat(x):  # the broken twin: whole chains, no folding
    within, between = x.var(dim=0).mean(), x.mean(dim=0).var()
    return float(((len(x) - 1) / len(x) + between / within).sqrt())


def test_r_hat_sees_what_the_plain_one_misses():
    x = ar1(0.3, 400, 4)
    assert float(split_r_hat(x)) < 1.02
    trend = x + torch.linspace(-1.5, 1.5, 400, dtype=x.dtype)[:, None]
    wider = x * torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=x.dtype)
    for broken in (trend, wider):
        assert float(split_r_hat(broken)) > 1.1
        assert plain_r_hat(broken) < 1.02
    shifted = x + torch.tensor([0.0, 0.0, 0.0, 3.0], dtype=x.dtype)
    assert float(split_r_hat(shifted)) > 1.2
    assert float(effective_sample_size(shifted)) < 20


def test_each_coordinate_is_judged_alone_and_the_unknown_is_nan():
    x = torch.stack([ar1(0.5, 100, 3, seed=s) for s in range(4)], dim=-1).reshape(100, 3, 2, 2)
    alone = effective_sample_size(x[:, :, 1, 0])
    x[:, :, 0, 0] = 7.0
    x[5, 1, 0, 1] = math.inf
    for value in (split_r_hat(x), effective_sample_size(x)):
        assert value.shape == (2, 2)
        assert value.isnan().tolist() == [[True, True], [False, False]]
    assert float(effective_sample_size(x)[1, 0]) == pytest.approx(float(alone))


def test_chain_mean_has_the_error_of_the_autoregression():
    x = ar1(0.8, 2000, 10, seed=5)
    mean, stderr = chain_mean(x)
    assert float(stderr) == pytest.approx(math.sqrt(9 / x.numel()), rel=0.25)
    assert abs(float(mean)) < Z * float(stderr)


def test_autocorrelation_is_the_direct_sum():
    x = ar1(0.8, 65, 2, seed=1)
    found = autocorrelation(x)
    for c in range(2):
        centred = (x[:, c] - x[:, c].mean()).numpy()
        direct = np.correlate(centred, centred, mode="full")[64:] / (centred @ centred)
        np.testing.assert_allclose(found[:, c].numpy(), direct, atol=1e-12)


def half_square(x):
    return x.square().sum(dim=1) / 2


def test_exact_draws_read_the_floor_and_a_shifted_sampler_its_distance():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=rng, dtype=torch.float64)
    exact = grid_total_variation(x, half_square, [-6.0], [6.0], bins=50)
    assert abs(exact.value - exact.floor) < Z * exact.stderr
    shifted = grid_total_variation(x + 0.8, half_square, [-6.0], [6.0], bins=200, per_bin=8)
    truth = 2 * norm.cdf(0.4) - 1
    # Noise in the tails, where the two densities are equal, adds at most the floor.
    assert truth - Z * shifted.stderr < shifted.value < truth + shifted.floor + Z * shifted.stderr
    assert shifted.value > exact.floor + 20 * exact.stderr


def test_grid_in_two_dimensions_keeps_its_axes_apart():
    rng = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    x = torch.randn(20_000, 2, generator=rng, dtype=torch.float64) * scales

    def energy(p):
        return (p / scales).square().sum(dim=1) / 2

    right = grid_total_variation(x, energy, [-3.0, -9.0], [3.0, 9.0], bins=25)
    assert abs(right.value - right.floor) < Z * right.stderr
    swapped = grid_total_variation(x.flip(1), energy, [-9.0, -9.0], [9.0, 9.0], bins=25)
    assert swapped.value > 0.4


def test_draws_outside_the_grid_count_in_full():
    x = torch.full((10, 1), 100.0)
    found = grid_total_variation(x, half_square, [-6.0], [6.0])
    assert found.value == pytest.approx(1.0)
    assert found.stderr == pytest.approx(0.0, abs=1e-9)


def test_total_variation_of_counts():
    assert float(total_variation(torch.tensor([3, 1]), torch.tensor([0.5, 0.5]))) == pytest.approx(0.25)
    with pytest.raises(InputError):
        total_variation(torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 0.5]))


def test_refusals():
    with pytest.raises(ShapeError, match="4 or more"):
        split_r_hat(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="d at most 3"):
        grid_total_variation(torch.zeros(3, 5), half_square, [0] * 5, [1] * 5)
    with pytest.raises(DomainError, match="energy"):
        grid_total_variation(torch.zeros(3, 1), lambda x: x[:, 0] * math.nan, [-1.0], [1.0])
