"""`Detector`: a score with a calibrated threshold, in scikit-learn's conventions for outliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Generator, Tensor

from gibbsian.detection.base import Score, check_scored, one_each, parted
from gibbsian.detection.calibration import Calibration, calibrate, rows_needed
from gibbsian.errors import ArgumentTypeError, OptionError


class Detector(OutlierMixin, BaseEstimator):
    """Calls rows foreign, with a guaranteed rate of false alarms.

    Parameters
    ----------
    score
        Any function from rows ``(n, *event)`` to ``(n,)``, higher for foreign rows: an energy, or a score of
        `gibbsian.detection`.
    reference
        Rows of the usual kind, ``(n, *event)``, that neither the score nor the model behind it was fitted to; or
        given to `fit`.
    false_positive_rate
        Part of usual rows that may be called foreign.
    confidence
        With which the rate holds for this reference set; on average over reference sets when ``None``. See
        `gibbsian.detection.calibration.calibrate`.

    Attributes
    ----------
    calibration_
        The threshold and what it guarantees; print it.
    offset_
        Minus the threshold: scores of `score_samples` below it are foreign.

    Examples
    --------
    >>> import torch
    >>> from gibbsian import Gaussian
    >>> from gibbsian.detection.detector import Detector
    >>> energy, rng = Gaussian(dim=2), torch.Generator().manual_seed(0)
    >>> detector = Detector(energy, energy.sample(199, rng)).fit()
    >>> detector.predict(torch.tensor([[0.0, 0.0], [9.0, 9.0]])).tolist()
    [1, -1]
    """

    calibration_: Calibration
    offset_: float

    def __init__(
        self,
        score: Score,
        reference: Any = None,
        *,
        false_positive_rate: float = 0.05,
        confidence: float | None = None,
    ) -> None:
        self.score = score
        self.reference = reference
        self.false_positive_rate = false_positive_rate
        self.confidence = confidence

    def fit(self, X: Any = None, y: Any = None) -> Detector:
        """Find the threshold from reference rows: X, or those given at the start.

        Parameters
        ----------
        X
            ``(n, *event)``.
        y
            Ignored; there by convention.

        Raises
        ------
        ArgumentTypeError
            If there are no reference rows, or the score cannot be called.
        OptionError
            If they are too few for the rate; the message says how many are needed.
        ShapeError, InputError
            If the score gives anything but one number per row, or NaN, or is in training mode.
        """
        rows = self.reference if X is None else X
        if rows is None:
            raise ArgumentTypeError("A detector is calibrated on rows of the usual kind: Detector(score, rows).fit()")
        check_scored(self.score, "score")
        self.calibration_ = calibrate(self._foreignness(rows), self.false_positive_rate, confidence=self.confidence)
        self.offset_ = -self.calibration_.threshold
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Minus the score of each row, ``(n,)``: lower is more foreign, as scikit-learn has it."""
        return -self._foreignness(X).numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """Threshold minus score, ``(n,)``: negative for foreign rows."""
        check_is_fitted(self)
        values, offset = self.score_samples(X), self.offset_
        # Infinity less itself would be no number; at the threshold a row is not foreign.
        return np.subtract(values, offset, out=np.zeros_like(values), where=values != offset)

    def predict(self, X: Any) -> np.ndarray:
        """+1 for rows of the usual kind, -1 for foreign ones, ``(n,)``.

        Raises
        ------
        InputError
            If a score is NaN.
        """
        check_is_fitted(self)
        return np.where(self.calibration_.flags(self._foreignness(X)).numpy(), -1, 1)

    def p_values(self, X: Any) -> np.ndarray:
        """Conformal p-values, ``(n,)``: small for foreign rows, and at least 1 / (1 + reference rows)."""
        check_is_fitted(self)
        return self.calibration_.p_values(self._foreignness(X)).numpy()

    def _foreignness(self, X: Any) -> Tensor:
        x = X if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X), dtype=torch.get_default_dtype())
        return one_each(self.score(x), len(x), "A score").detach().cpu().double()


def detector_of(
    make: Callable[[Tensor], Score],
    rows: Tensor,
    *,
    rng: Generator,
    share: float = 0.5,
    false_positive_rate: float = 0.05,
    confidence: float | None = None,
) -> Detector:
    """Make a detector whose score is itself fitted to rows: to one part of them, and calibrated on the other.

    Parameters
    ----------
    make
        From rows to a score, such as ``lambda rows: mahalanobis(features, rows)``.
    rows
        Of the usual kind, ``(n, *event)``, that the model behind the score was not fitted to.
    rng
        Parts the rows.
    share
        Of the rows that the score is fitted to.
    false_positive_rate, confidence
        As in `Detector`.

    Raises
    ------
    OptionError
        If a part is empty, or too small for the rate.
    """
    fitted, reference = parted(rows, share, rng)
    needed = rows_needed(false_positive_rate, confidence)
    if len(reference) < needed:
        raise OptionError(
            f"Of {len(rows)} rows, {len(fitted)} fit the score and {len(reference)} are left to calibrate it; a false "
            f"positive rate of {false_positive_rate:g} needs {needed} there. Give "
            f"{math.ceil(needed / (1 - share)) + 1} rows or more, lower share, or ask for a higher rate."
        )
    return Detector(make(fitted), false_positive_rate=false_positive_rate, confidence=confidence).fit(reference)
