r"""From the units of the data to the units of the model, and back.

Models see :math:`z = (x - a) / b`: pictures in :math:`[-1, 1]` by one offset and one scale for all pixels, so that the
picture keeps its contrasts; tables with mean 0 and standard deviation 1 in every column. A density in the data's own
units follows from :math:`\log p_X(x) = \log p_Z(z) - \sum_i \log b_i`, whose last term is `Scaling.log_det`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gibbsian.errors import DataError, ModelFileError, OptionError, ShapeError


@dataclass(frozen=True)
class Scaling:
    """An offset and a scale, one for all coordinates or one each: ``z = (x - offset) / scale``.

    Attributes
    ----------
    offset, scale
        One number for the whole point, or one per column of points of shape ``(d,)``; in the data's units.
    event_shape
        The shape of one point.

    Raises
    ------
    OptionError
        If a number is not finite, a scale is not positive, or there are neither one nor ``d`` of them.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    event_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        allowed = {1, *self.event_shape} if len(self.event_shape) == 1 else {1}
        if len(self.offset) != len(self.scale) or len(self.scale) not in allowed:
            raise OptionError(
                f"A scaling of points of shape {self.event_shape} has {' or '.join(map(str, sorted(allowed)))} offsets "
                f"and as many scales; got {len(self.offset)} and {len(self.scale)}."
            )
        for a, b in zip(self.offset, self.scale):
            if not (math.isfinite(a) and math.isfinite(b) and b > 0):
                raise OptionError(f"A scaling needs finite offsets and positive scales; got {a} and {b}.")

    @property
    def log_det(self) -> float:
        """What to add to a log-density in model units to have it in data units, in nats per row."""
        repeats = math.prod(self.event_shape) if len(self.scale) == 1 else 1
        return 0.0 - repeats * math.fsum(math.log(b) for b in self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Take points ``(n, *event)`` from data units to model units."""
        offset, scale = self._like(x)
        return (x - offset) / scale

    def backward(self, z: Tensor) -> Tensor:
        """Take points ``(n, *event)`` from model units to data units."""
        offset, scale = self._like(z)
        return z * scale + offset

    def to_dict(self) -> dict[str, list[float] | list[int]]:
        """Lists of plain numbers, fit for JSON."""
        return {"offset": list(self.offset), "scale": list(self.scale), "event_shape": list(self.event_shape)}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> Scaling:
        """Rebuild what `to_dict` gave.

        Raises
        ------
        ModelFileError
            If a part is missing or is not a list of numbers.
        """
        try:
            return Scaling(
                tuple(float(a) for a in saved["offset"]),
                tuple(float(b) for b in saved["scale"]),
                tuple(int(s) for s in saved["event_shape"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(
                f"A saved scaling has the lists offset, scale and event_shape; got {saved!r} ({error}). "
                "The file was changed by hand or written by another program; save the model again."
            ) from error

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != self.event_shape or x.ndim == 0:
            expected = ", ".join(("n", *map(str, self.event_shape)))
            raise ShapeError(f"This scaling is for points of shape ({expected}); got {tuple(x.shape)}.")
        # One number broadcasts over any point; d numbers stand along the last and only axis.
        return x.new_tensor(self.offset).squeeze(), x.new_tensor(self.scale).squeeze()


def identity_scaling(event_shape: Sequence[int]) -> Scaling:
    """Leave points as they are, as binary ones must be.

    Parameters
    ----------
    event_shape
        The shape of one point.
    """
    return Scaling((0.0,), (1.0,), tuple(event_shape))


def range_scaling(low: float, high: float, event_shape: Sequence[int]) -> Scaling:
    """Take the range from ``low`` to ``high`` to [-1, 1], alike for every coordinate.

    Parameters
    ----------
    low, high
        In the data's units, for example 0 and 255.
    event_shape
        The shape of one point.

    Raises
    ------
    OptionError
        If ``low`` is not below ``high``.
    """
    if not low < high:
        raise OptionError(f"A range runs from low to high; got {low} to {high}.")
    return Scaling(((high + low) / 2,), ((high - low) / 2,), tuple(event_shape))


def standard_scaling(x: Tensor, columns: tuple[str, ...] = ()) -> Scaling:
    """Give every column mean 0 and (population) standard deviation 1.

    Parameters
    ----------
    x
        Rows of a table, ``(n, d)``; the training rows only, so that nothing of the held-out ones leaks in.
    columns
        The columns' names, for the error message.

    Raises
    ------
    ShapeError
        If ``x`` is no table.
    DataError
        If a column is constant, which no scale can repair.
    """
    if x.ndim != 2:
        raise ShapeError(f"Columns are standardised in a table of shape (n, d); got {tuple(x.shape)}.")
    x = x.double()
    mean = x.mean(0)
    deviation = (x - mean).square().mean(0).sqrt()
    # A constant column may show rounding in its mean, so equality with the first row decides.
    constant = (x == x[:1]).all(0)
    if bool(constant.any()):
        names = [columns[i] if i < len(columns) else f"column {i + 1}" for i in constant.nonzero().flatten().tolist()]
        raise DataError(
            f"Constant over all {x.shape[0]} rows: {', '.join(names)}. A column without spread has no density to learn "
            "and cannot be scaled; drop it."
        )
    return Scaling(tuple(mean.tolist()), tuple(deviation.tolist()), (x.shape[1],))
