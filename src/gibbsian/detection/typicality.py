r"""Whether a batch of rows is typical: the test of Nalisnick et al. on mean energies.

The typical set of a density holds the batches whose mean energy is near the entropy,

.. math:: d(x_1, \dots, x_M) = \Bigl| \frac{1}{M} \sum_i E(x_i) - \overline{E} \Bigr| \le \epsilon,

with :math:`\overline{E}` the mean over training rows, and :math:`\epsilon` such that batches of M validation rows pass
at the rate wanted. An additive constant of the energy drops out. A batch tells far more than its rows do one by one:
the mean's spread falls as the root of M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.detection.base import check_finite, check_rows
from gibbsian.detection.calibration import Calibration, calibrate
from gibbsian.detection.scores import EnergyScore, typicality
from gibbsian.errors import OptionError, ShapeError
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class BatchTypicality:
    """A test of batches; made by `batch_typicality`.

    Attributes
    ----------
    energy
        The energy, or another score.
    mean
        Its mean over the training rows, nats.
    size
        Rows in a batch, M.
    calibration
        From the distances of validation batches.
    """

    energy: EnergyFn
    mean: float
    size: int
    calibration: Calibration

    def distance(self, batch: Tensor) -> float:
        """Distance of a batch's mean energy from the usual one, nats.

        Raises
        ------
        ShapeError
            If the batch has another number of rows than the test was made for.
        """
        if len(batch) != self.size:
            raise ShapeError(
                f"The test was made for batches of {self.size} rows; got {len(batch)}. Make one of its own."
            )
        return abs(float(EnergyScore(self.energy)(batch).double().mean()) - self.mean)

    def p_value(self, batch: Tensor) -> float:
        """Part of validation batches at least as far from the usual energy, itself counted: (1 + #) / (1 + batches)."""
        return float(self.calibration.p_values([self.distance(batch)])[0])

    def is_foreign(self, batch: Tensor) -> bool:
        """Whether the batch is further than the threshold."""
        return bool(self.calibration.flags([self.distance(batch)])[0])


def batch_typicality(
    energy: EnergyFn,
    training: Tensor,
    validation: Tensor,
    size: int,
    *,
    rng: Generator,
    false_positive_rate: float = 0.05,
    resamples: int | None = 1000,
) -> BatchTypicality:
    """Calibrate the typicality test of batches.

    `Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick et al., 2019)
    <https://arxiv.org/abs/1906.02994>`_.

    Parameters
    ----------
    energy
        From rows to ``(n,)``, or another score.
    training
        Rows whose mean energy is the usual one, ``(n, *event)``.
    validation
        Rows that the energy was not fitted to, ``(m, *event)``.
    size
        Rows in a batch, M.
    rng
        Draws the batches.
    false_positive_rate
        Part of batches of the data's kind that are called foreign.
    resamples
        Batches drawn from the validation rows with replacement, as in the paper: the rate then holds approximately, as
        batches share rows. ``None``: the rows are cut into batches that share none, for which the rate is guaranteed as
        in `calibrate`, and which takes many rows.

    Raises
    ------
    OptionError
        If a number is out of range, or there are too few batches for the rate.
    ShapeError, InputError
        If there are too few rows, or an energy is not finite.
    """
    if not isinstance(size, int) or size < 1 or (resamples is not None and resamples < 1):
        raise OptionError(f"size and resamples count rows and batches, 1 or more; got {size} and {resamples}.")
    usual = typicality(energy, training)
    check_rows(validation, 2 if resamples else size, "The typicality test")
    values = EnergyScore(energy)(validation).double().cpu()
    check_finite(values, "The energy")
    if resamples is None:
        order = torch.randperm(len(values), generator=rng, device=rng.device).cpu()
        means = values[order[: len(values) // size * size]].reshape(-1, size).mean(1)
    else:
        picked = torch.randint(len(values), (resamples, size), generator=rng, device=rng.device).cpu()
        means = values[picked].mean(1)
    return BatchTypicality(energy, usual.mean, size, calibrate((means - usual.mean).abs(), false_positive_rate))
