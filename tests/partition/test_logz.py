"""What weights say of log Z: value, error, bound, and what happens to weights that are not finite."""

import math

import pytest
import torch

from gibbsian.errors import DivergenceError, OptionError
from gibbsian.partition.base import LogZ, effective_size, from_log_weights, lower_bound, mirrored, warn_if_degenerate

TRUTH = 3.0


def lognormal(runs: int, n: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Log-weights with E[w] = exp(TRUTH): log w is N(TRUTH - spread^2 / 2, spread^2)."""
    z = torch.randn(runs, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return TRUTH - 0.5 * spread**2 + spread * z


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("n", [4, 100])
def test_lower_bound_holds_at_its_confidence(spread, n):
    # 1,000 runs at 99%: more than 30 failures have probability below 1e-7 even if the bound is only just valid.
    bounds = torch.stack([lower_bound(w, 0.99) for w in lognormal(1000, n, spread)])
    assert int((bounds > TRUTH).sum()) <= 30


def test_lower_bound_is_close_when_weights_agree():
    bounds = torch.stack([lower_bound(w, 0.99) for w in lognormal(50, 512, 0.1)])
    assert float((TRUTH - bounds).max()) < 0.05
    bounds = torch.stack([lower_bound(w, 0.99) for w in lognormal(50, 512, 0.8)])
    assert float((TRUTH - bounds).max()) < 0.4


def test_broken_twin_bound_without_its_price_fails():
    values = torch.logsumexp(lognormal(1000, 100, 1.0), 1) - math.log(100)
    assert int((values > TRUTH).sum()) > 30


def test_standard_error_is_the_spread_of_repeated_runs():
    runs = [from_log_weights(w) for w in lognormal(2000, 400, 0.5)]
    values = torch.stack([r.value for r in runs])
    stated = torch.stack([r.stderr for r in runs]).mean()
    # The spread of 2,000 normal values is known to 1.6%; 9% is beyond 5.5 of those.
    assert float(values.std() / stated) == pytest.approx(1.0, abs=0.09)
    assert float((values - TRUTH).abs().max()) < 6 * float(stated)


def test_effective_size():
    w = torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    assert float(effective_size(w.log())) == pytest.approx(2.5**2 / 2.25)


def test_equal_weights_have_no_error():
    r = from_log_weights(torch.full((64,), 1.5))
    assert float(r.value) == pytest.approx(1.5, abs=1e-12)
    assert float(r.stderr) == pytest.approx(0.0, abs=1e-7)
    assert float(r.ess) == pytest.approx(64.0)
    assert math.isinf(float(r.upper))


def test_nonfinite_weights_count_as_zero_and_are_counted():
    w = torch.zeros(8)
    w[0], w[1], w[2] = torch.nan, -torch.inf, torch.inf
    r = from_log_weights(w)
    assert r.nonfinite == 3
    assert float(r.value) == pytest.approx(math.log(5 / 8))
    assert float(r.lower) < 0.0
    assert "3 non-finite" in str(r)


def test_no_finite_weight_stops():
    with pytest.raises(DivergenceError, match="None of 5"):
        from_log_weights(torch.full((5,), torch.nan))


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.99), (10, 1.0), (10, 0.0)])
def test_impossible_requests_are_refused(n, confidence):
    with pytest.raises(OptionError):
        from_log_weights(torch.zeros(n), confidence)


def test_mirrored_swaps_the_bounds():
    r = mirrored(from_log_weights(-lognormal(1, 100, 0.3)[0]))
    assert float(r.lower) == -math.inf
    assert float(r.upper) > float(r.value)


def test_reading():
    t = torch.tensor
    r = LogZ(t(-3.214), t(0.02), t(-3.25), t(-3.17), t(412.3), 512)
    assert str(r) == "-3.21 ± 0.02, bracket [-3.25, -3.17], ess 412 of 512"
    assert "at least -3.25" in f"{r._replace(upper=t(torch.inf))}"
    assert "at most -3.17" in f"{r._replace(lower=t(-torch.inf))}"


def test_degenerate_weights_are_named():
    w = torch.zeros(1000)
    w[0] = 50.0
    with pytest.warns(RuntimeWarning, match="ess 1.0 of 1000"):
        warn_if_degenerate(from_log_weights(w), "weights", "Try more.")
