r"""Thresholds with a guaranteed rate of false alarms, whatever the score and the law of the rows.

Let :math:`s_1, \dots, s_n` be the scores of reference rows and s that of a new row, all drawn alike. Each place in the
order is as likely for s as any other, so that

.. math:: p = \frac{1 + \#\{i : s_i \ge s\}}{n + 1}, \qquad P(p \le \alpha) \le \alpha,

and :math:`p \le \alpha` just where s lies above the k-th smallest score, :math:`k = \lceil (n + 1)(1 - \alpha)
\rceil`. Over the draws of reference and new row together the rate of false alarms is :math:`(n + 1 - k) / (n + 1)`, and
less where scores are tied.

That is an average. One reference set has a threshold, and that threshold a rate of its own, which follows

.. math:: R \sim \mathrm{Beta}(n + 1 - k,\, k)

where scores have a density, and lies below that otherwise. With a confidence :math:`1 - \delta`, k is chosen such that
:math:`P(R \le \alpha) \ge 1 - \delta`. The guarantees ask that neither the energy nor the score was fitted to the
reference rows.

`Conditional validity of inductive conformal predictors (Vovk, 2012) <https://arxiv.org/abs/1209.2673>`_; `Testing for
outliers with conformal p-values (Bates et al., 2023) <https://arxiv.org/abs/2104.08279>`_.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.errors import InputError, OptionError, ShapeError


@dataclass(frozen=True)
class Calibration:
    """A threshold from the scores of reference rows; made by `calibrate`.

    Attributes
    ----------
    scores
        Of the reference rows, sorted, ``(n,)`` float64.
    rate
        The rate of false alarms asked for.
    rank
        k: the threshold is the k-th smallest score.
    confidence
        That the rate of this very threshold is at most ``rate``; ``None`` where the rate holds on average over
        reference sets.
    """

    scores: Tensor
    rate: float
    rank: int
    confidence: float | None = None

    @property
    def rows(self) -> int:
        """Reference rows, n."""
        return len(self.scores)

    @property
    def threshold(self) -> float:
        """Rows with a score above this are called foreign."""
        return float(self.scores[self.rank - 1])

    @property
    def mean_rate(self) -> float:
        """The rate of false alarms on average over reference sets, (n + 1 - k) / (n + 1); less where tied."""
        return (self.rows + 1 - self.rank) / (self.rows + 1)

    @property
    def tied(self) -> int:
        """Reference scores that equal the threshold, itself included."""
        return int((self.scores == self.scores[self.rank - 1]).sum())

    def rate_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Where the rate of such a threshold lies with probability ``level``, in the middle of its beta law.

        With tied scores only the upper end holds.

        Raises
        ------
        OptionError
            If ``level`` is not between 0 and 1.
        """
        from scipy.stats import beta

        _check_share(level, "level")
        low, high = beta.interval(level, self.rows + 1 - self.rank, self.rank)
        return float(low), float(high)

    def count_interval(self, rows: int, level: float = 0.95) -> tuple[int, int]:
        """How many of so many new rows of the reference's kind are called foreign, with probability ``level`` or more.

        The beta law of the rate and the chance of the new rows together: a beta-binomial law.

        Raises
        ------
        OptionError
            If ``level`` is not between 0 and 1, or there are no rows.
        """
        from scipy.stats import betabinom

        _check_share(level, "level")
        if rows < 1:
            raise OptionError(f"rows counts new rows, 1 or more; got {rows}.")
        low, high = betabinom.interval(level, rows, self.rows + 1 - self.rank, self.rank)
        return int(low), int(high)

    def flags(self, scores: Any) -> Tensor:
        """Whether each score is above the threshold, ``(m,)`` bool; the same as a p-value that is small enough.

        Raises
        ------
        ShapeError, InputError
            If the scores are no vector or hold NaN.
        """
        return _vector(scores, "The scores") > self.threshold

    def p_values(self, scores: Any, rng: Generator | None = None) -> Tensor:
        """Conformal p-values, ``(m,)`` float64, at least 1 / (n + 1).

        Parameters
        ----------
        scores
            Of new rows, ``(m,)``; infinite ones rank last.
        rng
            Breaks ties at random, which makes the p-values of the reference's kind uniform to the last digit; without
            it ties count against foreignness, and p-values are multiples of 1 / (n + 1).

        Raises
        ------
        ShapeError, InputError
            If the scores are no vector or hold NaN.
        """
        s = _vector(scores, "The scores")
        at_least = self.rows - torch.searchsorted(self.scores, s)
        if rng is None:
            return (1 + at_least).double() / (self.rows + 1)
        above = self.rows - torch.searchsorted(self.scores, s, right=True)
        u = torch.rand(len(s), generator=rng, device=rng.device, dtype=torch.float64).cpu()
        return (above + u * (1 + at_least - above)) / (self.rows + 1)

    def __str__(self) -> str:
        """Say the threshold and what it guarantees."""
        low, high = self.rate_interval()
        held = "on average" if self.confidence is None else f"with confidence {self.confidence:g}"
        told = (
            f"foreign above {self.threshold:.6g}, number {self.rank} of {self.rows} reference scores in their order: "
            f"at most {self.rate:g} of rows like the reference are called foreign, {held} (mean {self.mean_rate:.4g}; "
            f"this threshold's own rate lies in [{low:.3g}, {high:.3g}] with probability 0.95)"
        )
        return told if self.tied == 1 else f"{told}; {self.tied} reference scores are tied there, which lowers the rate"


def calibrate(scores: Any, false_positive_rate: float = 0.05, *, confidence: float | None = None) -> Calibration:
    """Find the threshold above which at most such a part of rows of the reference's kind lies.

    Parameters
    ----------
    scores
        Of reference rows that neither the energy nor the score was fitted to, ``(n,)``; infinite ones rank last.
    false_positive_rate
        Between 0 and 1, read as the decimal number it prints as.
    confidence
        Ask that the rate of this very threshold is at most the one asked for, with this probability over reference
        sets; ``None`` asks it on average over them.

    Raises
    ------
    OptionError
        If a probability is not between 0 and 1, or there are too few reference rows for it: the message says how many
        are needed.
    ShapeError, InputError
        If the scores are no vector, or hold NaN.
    """
    needed = rows_needed(false_positive_rate, confidence)
    values = _vector(scores, "The reference scores").sort().values
    if len(values) < needed:
        extra = "" if confidence is None else f" with confidence {confidence:g}"
        raise OptionError(
            f"{len(values)} reference rows cannot hold a false positive rate of {false_positive_rate:g}{extra}: "
            f"{needed} are needed. Give more rows, or ask for a higher rate."
        )
    rank = _rank(len(values), false_positive_rate, confidence)
    return Calibration(values, false_positive_rate, rank, confidence)


def rows_needed(false_positive_rate: float, confidence: float | None = None) -> int:
    r"""Reference rows that a rate takes: :math:`1/\alpha - 1`, or :math:`\log \delta / \log (1 - \alpha)`, rounded up.

    Parameters
    ----------
    false_positive_rate, confidence
        As in `calibrate`.
    """
    _check_share(false_positive_rate, "false_positive_rate")
    if confidence is None:
        return math.ceil(1 / Fraction(str(false_positive_rate))) - 1
    _check_share(confidence, "confidence")
    # The highest score is the threshold: all n rows lie below the quantile with probability (1 - alpha)^n.
    n = max(1, math.floor(math.log1p(-confidence) / math.log1p(-false_positive_rate)))
    return n if _rank(n, false_positive_rate, confidence) <= n else n + 1


def _rank(n: int, rate: float, confidence: float | None) -> int:
    """The smallest k that keeps the rate; n + 1 where none does."""
    # In floating point (n + 1)(1 - alpha) may fall on either side of the whole number that it is.
    alpha = Fraction(str(rate))
    marginal = math.ceil((n + 1) * (1 - alpha))
    if confidence is None:
        return marginal
    from scipy.stats import binom

    # The rate is at most alpha where fewer than k scores lie below the quantile of 1 - alpha: P(Binomial <= k - 1).
    return int(binom.ppf(confidence, n, 1 - rate)) + 1


def _check_share(value: float, name: str) -> None:
    if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
        raise OptionError(f"{name} is a probability between 0 and 1, both excluded; got {value!r}.")


def _vector(values: Any, what: str) -> Tensor:
    found = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if found.ndim != 1 or len(found) == 0:
        raise ShapeError(f"{what} are one number per row, (n,), n at least 1; got shape {tuple(found.shape)}.")
    if bad := int(found.isnan().sum()):
        raise InputError(
            f"{what} are NaN at {bad} of {len(found)} rows, which have no place in the order; find out why (rows far "
            "outside of what the model takes, or a diverged model?)."
        )
    return found
