"""Out-of-distribution scores against the two-normal closed forms."""

import math

import pytest
import torch
from scipy.stats import norm

from gibbsian.diagnostics.detection import Interval, auroc, average_precision, false_positive_rate, separation
from gibbsian.diagnostics.estimate import Estimate, plain, with_error
from gibbsian.errors import InputError, OptionError

# Five and a half standard errors: one false alarm in 26 million for a normal statistic.
Z = 5.5


def energies(n, shift, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_auroc_of_two_normals_and_its_error():
    rng = torch.Generator().manual_seed(0)
    found = auroc(energies(2000, 0.0, 1), energies(1500, 1.0, 2), rng=rng)
    assert abs(found.value - norm.cdf(1 / math.sqrt(2))) < Z * found.stderr
    values = [auroc(energies(200, 0.0, 3 + s), energies(150, 1.0, 500 + s), rng=rng, resamples=2) for s in range(80)]
    spread = float(torch.tensor([v.value for v in values]).std())
    small = auroc(energies(200, 0.0, 3), energies(150, 1.0, 500), rng=rng, resamples=300)
    assert small.stderr == pytest.approx(spread, rel=0.45)


def test_higher_energy_means_foreign():
    rng = torch.Generator().manual_seed(0)
    assert auroc(torch.zeros(5), torch.ones(5), rng=rng, resamples=2).value == 1.0
    assert auroc(torch.ones(5), torch.zeros(5), rng=rng, resamples=2).value == 0.0
    assert auroc(torch.zeros(5), torch.zeros(5), rng=rng, resamples=2).value == 0.5


def test_false_positive_rate_of_two_normals():
    found = false_positive_rate(energies(4000, 0.0, 1), energies(4000, 2.0, 2), rng=torch.Generator().manual_seed(0))
    assert abs(found.value - norm.cdf(norm.ppf(0.95) - 2.0)) < Z * found.stderr
    assert found.stderr < 0.03


def test_infinite_energies_rank_last_and_nan_is_refused():
    rng = torch.Generator().manual_seed(0)
    inside, outside = torch.tensor([0.0, 1.0]), torch.tensor([0.5, math.inf])
    assert auroc(inside, outside, rng=rng).value == 0.75
    with pytest.raises(InputError, match="1 of 2"):
        auroc(inside, torch.tensor([math.nan, 1.0]), rng=rng)


def test_numbers_are_written_to_the_error():
    assert str(Estimate(0.31234, 0.0142)) == "0.312 ± 0.014"
    assert with_error(-1234.5, 25.0) == "−1234 ± 25"
    assert with_error(3.2e-9, 1.2e-10) == "(3.20 ± 0.12)e−9"
    assert with_error(1.5) == "1.5 ± ?"
    assert with_error(math.nan, 0.1) == "NaN"
    assert plain(-math.inf) == "−∞"


def by_hand(inside, outside, positive):
    """Precision times the recall gained, threshold by threshold, from the definition."""
    sought, other = (outside, inside) if positive == "outside" else ([-v for v in inside], [-v for v in outside])
    area, before = 0.0, 0.0
    for t in sorted({*sought}, reverse=True):
        hits, wrong = sum(v >= t for v in sought), sum(v >= t for v in other)
        area += (hits / len(sought) - before) * hits / (hits + wrong)
        before = hits / len(sought)
    return area


@pytest.mark.parametrize("positive", ["inside", "outside"])
def test_average_precision_of_either_kind(positive):
    rng = torch.Generator().manual_seed(0)
    inside, outside = energies(30, 0.0, 1).round(decimals=1), energies(12, 1.0, 2).round(decimals=1)
    found = average_precision(inside, outside, positive=positive, rng=rng, resamples=2)
    inside, outside = inside.tolist(), outside.tolist()
    assert found.value == pytest.approx(by_hand(inside, outside, positive))
    # The other kind, the other sign and the other order each give another number.
    other = "inside" if positive == "outside" else "outside"
    for wrong in (
        by_hand(inside, outside, other),
        by_hand(outside, inside, positive),
    ):
        assert abs(found.value - wrong) > 0.05


def test_average_precision_of_chance_is_the_share_and_of_parted_sets_one():
    rng = torch.Generator().manual_seed(0)
    zeros, ones, far = torch.zeros(30), torch.ones(10), torch.tensor([math.inf] * 10)
    for positive, share in (("inside", 0.75), ("outside", 0.25)):
        assert average_precision(zeros, zeros[:10], positive=positive, rng=rng, resamples=2).value == share
        assert average_precision(zeros, ones, positive=positive, rng=rng, resamples=2).value == 1.0
        assert average_precision(zeros, far, positive=positive, rng=rng, resamples=2).value == 1.0


def test_the_error_of_average_precision_is_its_spread():
    rng = torch.Generator().manual_seed(0)
    sets = [(energies(150, 0.0, 3 + s), energies(100, 1.0, 500 + s)) for s in range(60)]
    values = [average_precision(a, b, positive="outside", rng=rng, resamples=2).value for a, b in sets]
    found = average_precision(*sets[0], positive="outside", rng=rng, resamples=200)
    assert found.stderr == pytest.approx(float(torch.tensor(values).std()), rel=0.45)


def test_the_positive_class_is_named():
    with pytest.raises(OptionError, match="Did you mean 'inside'"):
        average_precision(torch.zeros(3), torch.ones(3), positive="insides", rng=torch.Generator())
    with pytest.raises(InputError, match="1 of 1"):
        average_precision(torch.zeros(3), torch.tensor([math.nan]), positive="inside", rng=torch.Generator())


def test_all_metrics_are_those_of_scikit_learn_with_ties_too():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    for decimals in (0, 1, 8):
        inside, outside = energies(70, 0.0, 1).round(decimals=decimals), energies(40, 1.0, 2).round(decimals=decimals)
        truth, values = torch.tensor([0] * 70 + [1] * 40).numpy(), torch.cat((inside, outside)).numpy()
        found = separation(inside, outside, positive="outside", rng=rng, resamples=2)
        assert found.auroc.value == pytest.approx(metrics.roc_auc_score(truth, values))
        assert found.average_precision.value == pytest.approx(metrics.average_precision_score(truth, values))
        wrong, right, _ = metrics.roc_curve(truth, values, drop_intermediate=False)
        assert found.false_positive_rate.value == pytest.approx(wrong[(right >= 0.95).argmax()])
        reverse = separation(inside, outside, positive="inside", rng=rng, resamples=2).average_precision.value
        assert reverse == pytest.approx(metrics.average_precision_score(1 - truth, -values))
        # Each metric alone says the same.
        assert auroc(inside, outside, rng=rng, resamples=2).value == found.auroc.value
        assert false_positive_rate(inside, outside, rng=rng, resamples=2).value == found.false_positive_rate.value


def coverage(inside, outside, level=0.8, sets=200):
    """How often the interval of the area holds that of the normals themselves."""
    truth, hits = norm.cdf(1 / math.sqrt(2)), 0
    for seed in range(sets):
        a, b = inside(seed), outside(seed)
        rng = torch.Generator().manual_seed(seed)
        found = separation(a, b, positive="outside", rng=rng, level=level, resamples=100).auroc
        hits += found.lower <= truth <= found.upper
    return hits / sets


def test_intervals_hold_the_truth_as_often_as_they_say():
    def inside(seed):
        return energies(120, 0.0, 2 * seed)

    def outside(seed):
        return energies(80, 1.0, 2 * seed + 1)

    # The standard error of the share is 0.028; percentiles of a bootstrap of so few rows hold a little less.
    assert 0.68 < coverage(inside, outside) < 0.92
    # A twin whose resamples are four times as large as the sets is sure too soon.
    assert coverage(lambda s: inside(s).repeat(4), lambda s: outside(s).repeat(4)) < 0.65


def test_an_interval_is_written_with_its_ends():
    assert str(Interval(0.98764, 0.98, 1.0)) == "0.9876 [0.9800, 1.0000]"
    rng = torch.Generator().manual_seed(0)
    parted = separation(torch.zeros(9), torch.ones(9), positive="outside", rng=rng, resamples=20)
    assert parted.auroc == (1.0, 1.0, 1.0)
    assert parted.false_positive_rate == (0.0, 0.0, 0.0)


def test_bad_options_of_a_separation():
    rng = torch.Generator()
    for bad in ({"level": 1.0}, {"resamples": 1}, {"detected": 0.0}, {"positive": "insides"}):
        with pytest.raises(OptionError):
            separation(torch.zeros(3), torch.ones(3), rng=rng, **{"positive": "outside", **bad})
