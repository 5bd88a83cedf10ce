"""Errors of means, spreads and quantiles: how often they cover the truth. ArviZ's numbers are compared elsewhere."""

import math

import pytest
import torch
from chain_cases import ar1
from scipy.stats import binom, norm

from gibbsian.diagnostics.chains import chain_mean, chain_sd, effective_sample_size
from gibbsian.diagnostics.quantiles import chain_quantile, quantile_effective_sample_size, tail_effective_sample_size
from gibbsian.errors import OptionError, ShapeError

FALSE_ALARM = 1e-6
RUNS = 200


def naive_mean(x):  # the broken twin: all draws count as independent
    return x.mean(dim=(0, 1)), x.flatten(0, 1).std(dim=0) / math.sqrt(x.shape[0] * x.shape[1])


def assert_covers(estimate, truth, rho, z=1.96):
    """The truth lies within z errors as often as a normal law says, in 200 runs of 4 chains of 1,000 draws."""
    x = ar1(rho, 1000, 4 * RUNS, seed=40).reshape(1000, 4, RUNS)
    value, error = estimate(x)
    inside = int(((value - truth).abs() < z * error).sum())
    # The error itself is estimated (a few per cent here), which moves the share by less than one per cent.
    share = 2 * norm.cdf(z) - 1
    low = binom.ppf(FALSE_ALARM / 2, RUNS, share - 0.01)
    high = binom.ppf(1 - FALSE_ALARM / 2, RUNS, share + 0.01)
    assert low <= inside <= high, f"{inside} of {RUNS} runs cover; expected {low:.0f} to {high:.0f}"


CASES = {
    "mean": (chain_mean, 0.0),
    "sd": (chain_sd, 1.0),
    "median": (chain_quantile, 0.0),
    "95%": (lambda x: chain_quantile(x, 0.95), norm.ppf(0.95)),
}


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.8])
@pytest.mark.parametrize("case", CASES)
def test_errors_cover_the_truth_at_their_rate(case, rho):
    estimate, truth = CASES[case]
    assert_covers(estimate, truth, rho, z=1.0)
    assert_covers(estimate, truth, rho, z=1.96)


@pytest.mark.parametrize("rho", [0.8, -0.5])
def test_an_error_that_takes_draws_for_independent_is_seen(rho):
    """Three times too small at rho = 0.8; 1.7 times too large at -0.5, which one standard error shows."""
    with pytest.raises(AssertionError, match="of 200 runs cover"):
        assert_covers(naive_mean, 0.0, rho, z=1.0)


def test_the_tail_is_the_worse_of_the_two():
    """A chain that rarely leaves for far positive values: its upper quantile is known badly."""
    x = ar1(0.2, 2000, 4, seed=41)
    slow = ar1(0.99, 2000, 4, seed=42)
    x = torch.where(slow > 1.3, x + 8.0, x)
    low, high = (float(quantile_effective_sample_size(x, p)) for p in (0.05, 0.95))
    assert float(tail_effective_sample_size(x)) == min(low, high) == high
    assert high < 0.1 * low
    assert float(tail_effective_sample_size(-x)) == pytest.approx(high, rel=0.02)


def test_a_quantile_s_error_needs_no_moments():
    x = torch.tan(ar1(0.0, 4000, 4, seed=43).mul(math.sqrt(0.5)).erf() * math.pi / 2)  # exact Cauchy draws
    value, error = chain_quantile(x)
    # Of independent draws: 1 / (2 f(0) sqrt(n)) with f(0) = 1 / pi.
    assert float(error) == pytest.approx(math.pi / 2 / math.sqrt(x.numel()), rel=0.2)
    assert abs(float(value)) < 5.5 * float(error)


def test_shapes_and_the_unknown():
    x = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 7.0
    x[5, 1, 0, 1] = math.nan
    for value in (tail_effective_sample_size(x), chain_sd(x)[1], chain_quantile(x)[1]):
        assert value.dtype == torch.float64
        assert value.isnan().tolist() == [[True, True], [False, False]]
    assert chain_quantile(x)[0].isnan().tolist() == [[False, True], [False, False]]
    assert float(chain_quantile(x)[0][0, 0]) == 7.0


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, math.nan])
def test_a_probability_outside_is_refused(probability):
    x = ar1(0.0, 10, 2)
    for fn in (chain_quantile, quantile_effective_sample_size, tail_effective_sample_size):
        with pytest.raises(OptionError, match="lies between 0 and 1; got"):
            fn(x, probability)


@pytest.mark.parametrize("fn", [chain_sd, chain_quantile, tail_effective_sample_size, effective_sample_size])
def test_too_few_draws_are_refused(fn):
    with pytest.raises(ShapeError, match=r"4 or more draws; got \(3, 2\)"):
        fn(torch.zeros(3, 2))
