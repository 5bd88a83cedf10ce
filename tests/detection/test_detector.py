"""A score with a threshold, in scikit-learn's words, over many splits."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, binom
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from gibbsian import Gaussian
from gibbsian.data import load
from gibbsian.detection.detector import Detector, detector_of
from gibbsian.detection.features import mahalanobis, nearest_neighbours
from gibbsian.detection.scores import typicality
from gibbsian.errors import ArgumentTypeError, InputError, OptionError, ShapeError

ALARM = 1e-6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def squares(x):
    return 0.5 * x.square().sum(1)


def flat(x):
    return x.flatten(1)


def test_scikit_learns_conventions():
    detector = Detector(Gaussian(dim=2), normals(199, 2)).fit()
    x = torch.cat([normals(50, 2, seed=1), 9.0 + normals(50, 2, seed=2)])
    called, decided = detector.predict(x), detector.decision_function(x)
    assert set(called) == {-1, 1}
    assert np.array_equal(called == -1, decided < 0)
    np.testing.assert_allclose(decided, detector.score_samples(x) - detector.offset_)
    assert (called[50:] == -1).all()
    assert (called[:50] == 1).mean() > 0.8
    assert np.array_equal(detector.p_values(x) <= 0.05, called == -1)
    assert np.array_equal(detector.predict(x.numpy()), called)
    assert detector.get_params()["false_positive_rate"] == 0.05
    again = clone(Detector(squares, false_positive_rate=0.2))
    assert (again.false_positive_rate, again.fit(normals(40, 2)).calibration_.rate) == (0.2, 0.2)
    assert (Detector(squares, false_positive_rate=0.1).fit_predict(normals(99, 2)) == -1).sum() == 9


def test_rows_at_the_threshold_are_usual_even_where_it_is_infinite():
    scores = torch.tensor([math.inf] * 3 + [0.0] * 17)
    detector = Detector(lambda x: x[:, 0], scores[:, None]).fit()
    assert detector.decision_function(torch.tensor([[math.inf], [1.0]])).tolist() == [0.0, math.inf]
    assert detector.predict(torch.tensor([[math.inf], [1.0]])).tolist() == [1, 1]


MAKERS = {
    "typicality": lambda rows: typicality(squares, rows),
    "mahalanobis": lambda rows: mahalanobis(flat, rows),
    "neighbours": lambda rows: nearest_neighbours(flat, rows, 1, scaling="none"),
}
SPLITS, NEW, RATE = 120, 50, 0.1


def alarms(make, fit):
    return np.array([(fit(make, normals(80, 2, seed=s), s).predict(normals(NEW, 2, seed=9000 + s)) < 0).sum()
                     for s in range(SPLITS)])  # fmt: skip


def parted(make, rows, seed):
    return detector_of(make, rows, rng=seeded(seed), false_positive_rate=RATE)


def on_the_same_rows(make, rows, seed):
    """A broken twin: what the score was fitted to calibrates it."""
    return Detector(make(rows), rows, false_positive_rate=RATE).fit()


@pytest.mark.parametrize("name", MAKERS)
def test_realised_rates_of_fitted_scores_lie_in_their_interval_over_120_splits(name):
    found = parted(MAKERS[name], normals(80, 2), 0).calibration_
    assert found.rows == 40
    low, high = found.count_interval(NEW, 0.95)
    counts = alarms(MAKERS[name], parted)
    # As many splits as chance allows lie outside of an interval that holds at 0.95 or more.
    assert ((counts < low) | (counts > high)).sum() <= binom.isf(ALARM, SPLITS, 0.05)
    assert abs(counts.mean() / NEW - found.mean_rate) < 5 * counts.std() / NEW / math.sqrt(SPLITS)
    assert found.mean_rate <= RATE


def test_a_score_calibrated_on_the_rows_it_was_fitted_to_is_caught():
    found = parted(MAKERS["neighbours"], normals(80, 2), 0).calibration_
    counts = alarms(MAKERS["neighbours"], on_the_same_rows)
    low, high = found.count_interval(NEW, 0.95)
    assert ((counts < low) | (counts > high)).sum() > binom.isf(ALARM, SPLITS, 0.05)


BAD = {
    "no reference": (lambda: Detector(squares).fit(), ArgumentTypeError, "rows of the usual kind"),
    "no score": (lambda: Detector("energy", normals(30, 2)).fit(), ArgumentTypeError, "'energy'"),
    "not fitted": (lambda: Detector(squares, normals(30, 2)).predict(normals(3, 2)), NotFittedError, "fitted"),
    "too few": (lambda: Detector(squares, normals(18, 2)).fit(), OptionError, r"18 reference rows.*0\.05: 19 are"),
    "too few for both": (
        lambda: detector_of(MAKERS["typicality"], normals(30, 2), rng=seeded()),
        OptionError,
        "Of 30 rows, 15 fit the score and 15 are left.*needs 19 there. Give 39 rows",
    ),
    "rate": (lambda: Detector(squares, normals(30, 2), false_positive_rate=5).fit(), OptionError, "got 5"),
    "shape": (lambda: Detector(lambda x: x, normals(30, 2)).fit(), ShapeError, r"\(30,\); got \(30, 2\)"),
    "nan": (
        lambda: Detector(squares, normals(30, 2)).fit().predict(torch.full((2, 2), math.nan)), InputError, "at 2 of 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_as_many_rows_as_are_asked_for_are_enough():
    detector = detector_of(MAKERS["typicality"], normals(39, 2), rng=seeded())
    assert math.isfinite(detector.calibration_.threshold)


def split_rates(make, values, n, rate, splits=100, level=0.95):
    """Whether realised rates over random splits of the same rows are as stated: their mean, and how many lie inside.

    Given the scores, all that is random is the order, so that the counts of foreign rows are independent draws of the
    beta-binomial law, whatever the rows.
    """
    rng, rest, counts = seeded(n), len(values) - n, []
    for _ in range(splits):
        first, second = torch.randperm(len(values), generator=rng).split([n, rest])
        counts.append(make(values, first, second, rate))
    stated = Detector(lambda rows: values[rows], torch.arange(n), false_positive_rate=rate).fit().calibration_
    low, high = stated.count_interval(rest, level)
    law = betabinom(rest, n + 1 - stated.rank, stated.rank)
    held = law.cdf(high) - law.cdf(low - 1)
    inside = sum(low <= count <= high for count in counts)
    mean_right = abs(np.mean(counts) - law.mean()) < 5.0 * law.std() / math.sqrt(splits)
    return bool(mean_right), bool(binom.ppf(ALARM, splits, held) <= inside <= binom.isf(ALARM, splits, held))


def by_detector(values, first, second, rate):
    detector = Detector(lambda rows: values[rows], first, false_positive_rate=rate).fit()
    return int((detector.predict(second) < 0).sum())


def by_plain_quantile(values, first, second, rate):
    """A broken twin: the quantile of the reference scores, without the place of the new row among them."""
    threshold = values[first].sort().values[math.ceil(len(first) * (1 - rate)) - 1]
    return int((values[second] > threshold).sum())


@pytest.fixture(scope="module")
def held_out_energies():
    """Of digits that a Gaussian was not fitted to."""
    rows = load("digits")
    x, new = rows.train.flatten(1).double(), rows.held_out.flatten(1).double()
    energy = Gaussian(loc=x.mean(0), covariance=x.T.cov() + torch.eye(64).double()).double()
    return energy(new).detach()


@pytest.mark.parametrize(("n", "rate"), [(20, 0.05), (40, 0.1), (150, 0.01)])
def test_realised_rates_over_splits_of_held_out_rows_are_as_stated(held_out_energies, n, rate):
    assert split_rates(by_detector, held_out_energies, n, rate) == (True, True)


def test_a_plain_quantile_of_few_rows_is_caught(held_out_energies):
    # Its mean rate is 2/21 in place of 1/21: ten standard errors of a hundred splits.
    assert not split_rates(by_plain_quantile, held_out_energies, 20, 0.05)[0]
