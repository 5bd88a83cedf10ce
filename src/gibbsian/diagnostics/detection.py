"""Telling in-distribution from out-of-distribution points by their energy.

A point is called foreign when its energy is high. Beware: a density model may give simple foreign points *lower* energy
than its own data (an AUROC below 0.5), which is a property of densities and not a bug.

Do Deep Generative Models Know What They Don't Know? (Nalisnick et al., 2019) <https://arxiv.org/abs/1810.09136>

All metrics depend on the order of the energies alone, so that they are functions of how many points of either kind have
each of the distinct values; a bootstrap draws these numbers anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Generator

from gibbsian.diagnostics.estimate import Estimate, bootstrap_stderr, picks
from gibbsian.errors import InputError, OptionError, ShapeError, unknown_name

Positive = Literal["inside", "outside"]

Metric: TypeAlias = Callable[[np.ndarray, np.ndarray], float]
"""From numbers of inside and of outside points at each distinct energy, in ascending order."""


class Interval(NamedTuple):
    """A number and where it lies by a bootstrap's percentiles.

    Attributes
    ----------
    value
        The number.
    lower, upper
        Ends of the interval. Where kinds are parted without exception, no resample tells otherwise, and they are equal.
    """

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        """Print as ``0.9876 [0.9850, 0.9901]``."""
        return f"{self.value:.4f} [{self.lower:.4f}, {self.upper:.4f}]"


class Separation(NamedTuple):
    """How well a score parts two kinds of points; made by `separation`.

    Attributes
    ----------
    auroc
        As of `auroc`.
    average_precision
        As of `average_precision`.
    false_positive_rate
        As of `false_positive_rate`.
    """

    auroc: Interval
    average_precision: Interval
    false_positive_rate: Interval


def auroc(inside: Any, outside: Any, *, rng: Generator, resamples: int = 200) -> Estimate:
    """Probability that a foreign point has the higher energy: 1 separates, 0.5 is chance, ties count half.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)`` of in- and out-of-distribution points; infinite ones rank last.
    rng
        The generator of the bootstrap that gives the error, both sets resampled.
    resamples
        Bootstrap resamples.

    Raises
    ------
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    return _Counted(inside, outside).estimate(_area, rng, resamples)


def false_positive_rate(
    inside: Any, outside: Any, *, rng: Generator, detected: float = 0.95, resamples: int = 200
) -> Estimate:
    """Fraction of in-distribution points called foreign when the threshold catches so many foreign ones.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)``; infinite ones rank last.
    rng
        The generator of the bootstrap that gives the error.
    detected
        The fraction of foreign points to catch: 0.95 gives the usual FPR95.
    resamples
        Bootstrap resamples.

    Raises
    ------
    OptionError
        If ``detected`` is not between 0 and 1.
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    counted = _Counted(inside, outside)
    return counted.estimate(_rate_at(detected), rng, resamples)


def average_precision(
    inside: Any, outside: Any, *, positive: Positive, rng: Generator, resamples: int = 200
) -> Estimate:
    """Area under precision against recall (AUPR) for one of the two kinds: chance is that kind's share of the points.

    Unlike `auroc` it depends on which kind is sought and on the numbers of points, so that the kind must be named. It
    is the sum over thresholds of precision times the recall gained there, without interpolation.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)``; infinite ones rank last.
    positive
        The kind sought: ``"outside"`` by high energies, ``"inside"`` by low ones.
    rng
        The generator of the bootstrap that gives the error, both sets resampled.
    resamples
        Bootstrap resamples.

    Raises
    ------
    OptionError
        If ``positive`` names neither set.
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    metric = _precision_of(positive)
    return _Counted(inside, outside).estimate(metric, rng, resamples)


def separation(
    inside: Any,
    outside: Any,
    *,
    positive: Positive,
    rng: Generator,
    detected: float = 0.95,
    level: float = 0.95,
    resamples: int = 1000,
) -> Separation:
    """All three metrics, with intervals by the percentiles of one bootstrap.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)``; infinite ones rank last.
    positive
        The kind sought by `average_precision`; the other two metrics do not depend on it.
    rng
        The generator of the bootstrap, both sets resampled.
    detected
        The fraction of foreign points to catch in `false_positive_rate`.
    level
        Of the intervals, between 0 and 1.
    resamples
        Bootstrap resamples, 2 or more.

    Raises
    ------
    OptionError
        If a number is out of its range, or ``positive`` names neither set.
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    if not 0.0 < level < 1.0 or resamples < 2:
        raise OptionError(f"level lies between 0 and 1, resamples are 2 or more; got {level} and {resamples}.")
    metrics = (_area, _precision_of(positive), _rate_at(detected))
    counted = _Counted(inside, outside)
    values = [metric(counted.low, counted.high) for metric in metrics]
    drawn = [counted.resampled(rng) for _ in range(resamples)]
    tails = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    ends = [np.quantile([metric(*each) for each in drawn], tails).tolist() for metric in metrics]
    return Separation(*(Interval(value, *pair) for value, pair in zip(values, ends)))


class _Counted:
    """Points of either kind at each distinct energy, in ascending order."""

    def __init__(self, inside: Any, outside: Any) -> None:
        sets = [torch.as_tensor(s).detach().to("cpu", torch.float64) for s in (inside, outside)]
        for name, values in zip(("inside", "outside"), sets):
            if values.ndim != 1 or len(values) == 0:
                raise ShapeError(f"{name} holds one energy per point, (n,), n at least 1; got {tuple(values.shape)}.")
            if bad := int(values.isnan().sum()):
                raise InputError(
                    f"{bad} of {len(values)} energies in {name} are NaN and cannot be ranked; find out why."
                )
        distinct, places = torch.cat(sets).unique(return_inverse=True)
        self.size = len(distinct)
        self.places = places.split([len(values) for values in sets])
        self.low, self.high = (self._counts(p) for p in self.places)

    def _counts(self, places: torch.Tensor) -> np.ndarray:
        return torch.bincount(places, minlength=self.size).double().numpy()

    def resampled(self, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of points that are drawn with replacement, as many of each kind as there are."""
        low, high = (self._counts(p[picks(len(p), (len(p),), rng).cpu()]) for p in self.places)
        return low, high

    def estimate(self, metric: Metric, rng: Generator, resamples: int) -> Estimate:
        """A metric with its bootstrap standard error."""
        return Estimate(metric(self.low, self.high), bootstrap_stderr(lambda: metric(*self.resampled(rng)), resamples))


def _area(low: np.ndarray, high: np.ndarray) -> float:
    return float((high * (low.cumsum() - low / 2.0)).sum() / (low.sum() * high.sum()))


def _from_above(counts: np.ndarray) -> np.ndarray:
    """Points at an energy or above it."""
    return counts[::-1].cumsum()[::-1]


def _precision(sought: np.ndarray, other: np.ndarray) -> float:
    hits, wrong = _from_above(sought), _from_above(other)
    # Above the highest energy drawn there is nothing to be precise about.
    return float((sought * hits / np.maximum(hits + wrong, 1.0)).sum() / sought.sum())


def _precision_of(positive: str) -> Metric:
    if positive not in get_args(Positive):
        raise unknown_name("positive class", str(positive), get_args(Positive))
    if positive == "outside":
        return lambda low, high: _precision(high, low)
    return lambda low, high: _precision(low[::-1], high[::-1])


def _rate_at(detected: float) -> Metric:
    if not 0 < detected <= 1:
        raise OptionError(f"detected is a fraction above 0 and at most 1; got {detected}.")

    def rate(low: np.ndarray, high: np.ndarray) -> float:
        enough = _from_above(high) >= math.ceil(detected * high.sum())
        return float(low[enough.nonzero()[0][-1] :].sum() / low.sum())

    return rate
