"""Conformal thresholds: against enumeration, against their own intervals, and with twins that break the guarantee."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import beta, betabinom, binom, kstest

from gibbsian.detection.calibration import Calibration, calibrate, rows_needed
from gibbsian.errors import InputError, OptionError, ShapeError

ALARM = 1e-6
"""Rate of false alarms of each test that looks at draws."""


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alarms(make, n, rate, sets, rows):
    """Rows called foreign by the thresholds of so many reference sets, each among new rows of its own."""
    all_scores = normals(sets, n + rows, seed=n)
    return np.array([int(make(s[:n], s[n:], rate).flags(s[n:]).sum()) for s in all_scores])


def right(reference, new, rate):
    return calibrate(reference, rate)


def without_one(reference, new, rate):
    """A broken twin: the plain quantile of the reference scores."""
    k = math.ceil(len(reference) * (1 - rate))
    return Calibration(reference.sort().values, rate, k)


def on_the_test_rows(reference, new, rate):
    """A broken twin: the threshold is chosen where the new rows show the rate wanted."""
    order = new.sort().values
    return Calibration(order, rate, len(order) - int(rate * len(order)))


def within(make, n, rate, sets=400, rows=60, level=0.9):
    """Whether realised rates are as stated: their mean, and how many lie within the stated interval."""
    counts = alarms(make, n, rate, sets, rows)
    stated = calibrate(normals(n), rate)
    low, high = stated.count_interval(rows, level)
    inside = int(((low <= counts) & (counts <= high)).sum())
    # The interval holds with probability at least `level`; in a discrete law with more, but not with far more.
    law = betabinom(rows, n + 1 - stated.rank, stated.rank)
    held = law.cdf(high) - law.cdf(low - 1)
    spread = law.std() / math.sqrt(sets)
    mean_right = abs(counts.mean() - rows * stated.mean_rate) < 5.0 * spread
    count_right = binom.ppf(ALARM, sets, held) <= inside <= binom.isf(ALARM, sets, held)
    return bool(mean_right), bool(count_right)


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (40, 0.1), (99, 0.05)])
def test_realised_rates_lie_in_their_stated_interval(n, rate):
    assert within(right, n, rate) == (True, True)


def test_a_quantile_without_the_one_is_caught():
    assert not within(without_one, 40, 0.1)[0]


def test_a_threshold_chosen_on_the_test_rows_is_caught():
    # Its mean is right by force, and its spread is none.
    assert not within(on_the_test_rows, 19, 0.05)[1]


def test_the_rate_of_one_threshold_follows_its_beta_law():
    n, rate = 59, 0.1
    thresholds = [calibrate(s, rate).threshold for s in normals(500, n, seed=3)]
    rates = 0.5 * torch.special.erfc(torch.tensor(thresholds, dtype=torch.float64) / math.sqrt(2)).numpy()
    found = calibrate(normals(n), rate)
    assert kstest(rates, beta(n + 1 - found.rank, found.rank).cdf).pvalue > ALARM
    assert kstest(rates, beta(n - found.rank, found.rank + 1).cdf).pvalue < ALARM
    low, high = found.rate_interval(0.9)
    inside = int(((low <= rates) & (rates <= high)).sum())
    assert binom.ppf(ALARM, 500, 0.9) <= inside <= binom.isf(ALARM, 500, 0.9)


def test_the_mean_rate_is_exact_over_all_orders():
    # Every one of n + 1 scores is the new one equally often: the rate over all of them is exactly the mean one.
    for n, rate in itertools.product(range(1, 25), (0.07, 0.1, 0.25, 0.5)):
        if n < rows_needed(rate):
            continue
        scores = normals(n + 1, seed=n)
        flagged = [
            bool(calibrate(scores[torch.arange(n + 1) != i], rate).flags(scores[i : i + 1])) for i in range(n + 1)
        ]
        found = calibrate(scores[1:], rate)
        assert sum(flagged) / (n + 1) == pytest.approx(found.mean_rate)
        assert found.mean_rate <= rate + 1e-12
        assert Fraction(n + 1 - found.rank + 1, n + 1) > Fraction(str(rate))  # one rank lower would break it


def test_ranks_are_those_of_exact_arithmetic():
    # In floating point 0.07 * 100 is more than 7, and (1 - 0.07) * 100 less than 93.
    for percent in range(1, 100):
        found = calibrate(torch.arange(99.0), percent / 100)
        assert found.rank == 100 - percent
        assert found.threshold == 99 - percent


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_ties_only_lower_the_rate_and_p_values_agree_with_flags(rate):
    draws = torch.randint(4, (300, 40), generator=torch.Generator().manual_seed(1)).double()
    rates = []
    for s in draws:
        found = calibrate(s[:20], rate)
        flags = found.flags(s[20:])
        assert torch.equal(flags, found.p_values(s[20:]) <= rate)
        rates.append(float(flags.double().mean()))
    assert np.mean(rates) < rate
    assert "tied there" in str(calibrate(draws[0, :20], rate))


def test_p_values_by_counting():
    found = calibrate(torch.tensor([3.0, 1.0, 2.0, 2.0, math.inf]), 0.25)
    new = torch.tensor([0.0, 1.0, 2.0, 2.5, 4.0, math.inf])
    assert (6 * found.p_values(new)).round().tolist() == [6, 6, 5, 3, 2, 2]
    assert found.threshold == math.inf
    assert not found.flags(new).any()


def test_random_ties_make_p_values_uniform():
    draws = torch.randint(3, (4000, 10), generator=torch.Generator().manual_seed(2)).double()
    rng = torch.Generator().manual_seed(5)
    p = torch.cat([calibrate(s[1:], 0.5).p_values(s[:1], rng) for s in draws])
    assert kstest(p.numpy(), "uniform").pvalue > ALARM
    plain = torch.cat([calibrate(s[1:], 0.5).p_values(s[:1]) for s in draws])
    assert kstest(plain.numpy(), "uniform").pvalue < ALARM


def test_a_rate_with_confidence_holds_for_most_reference_sets():
    n, rate, confidence = 120, 0.1, 0.9
    found = calibrate(normals(n), rate, confidence=confidence)
    assert beta.cdf(rate, n + 1 - found.rank, found.rank) >= confidence
    assert beta.cdf(rate, n + 2 - found.rank, found.rank - 1) < confidence
    assert found.rank > calibrate(normals(n), rate).rank
    assert "with confidence 0.9" in str(found)


@pytest.mark.parametrize(("rate", "confidence"), [(0.05, None), (0.3, None), (0.01, None), (0.05, 0.95), (0.1, 0.5)])
def test_as_many_rows_as_are_said_to_be_needed_are_enough(rate, confidence):
    n = rows_needed(rate, confidence)
    assert calibrate(torch.arange(float(n)), rate, confidence=confidence).rank <= n
    with pytest.raises(OptionError, match=rf"{n - 1} reference rows.*: {n} are needed"):
        calibrate(torch.arange(float(n - 1)), rate, confidence=confidence)


def test_known_numbers_of_rows():
    assert (rows_needed(0.05), rows_needed(0.01), rows_needed(0.05, 0.95)) == (19, 99, 59)


def test_bad_input():
    with pytest.raises(OptionError, match="false_positive_rate is a probability"):
        calibrate(normals(30), 1.0)
    with pytest.raises(OptionError, match="confidence is a probability"):
        calibrate(normals(30), 0.1, confidence=0.0)
    with pytest.raises(ShapeError, match=r"\(3, 10\)"):
        calibrate(normals(3, 10))
    with pytest.raises(InputError, match="NaN at 1 of 30"):
        calibrate(torch.cat([normals(29), torch.tensor([math.nan])]))
    found = calibrate(normals(30))
    with pytest.raises(InputError, match="NaN at 1 of 1"):
        found.flags([math.nan])
    with pytest.raises(OptionError, match="level"):
        found.rate_interval(2.0)
    with pytest.raises(OptionError, match="new rows"):
        found.count_interval(0)
