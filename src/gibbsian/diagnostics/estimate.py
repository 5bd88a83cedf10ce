"""A number and its standard error, and how the two are printed.

An error is shown with two significant digits and the value to the same decimal place: more digits would be noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.errors import InputError, OptionError, ShapeError


class Estimate(NamedTuple):
    """An estimate.

    Attributes
    ----------
    value
        The number.
    stderr
        Its standard error, in the same unit; NaN where none can be given.
    """

    value: float
    stderr: float

    def __str__(self) -> str:
        """Print as ``0.312 ± 0.014``."""
        return with_error(self.value, self.stderr)


def with_error(value: float, stderr: float | None = None) -> str:
    """Write a value with its error, both to the second significant digit of the error.

    Parameters
    ----------
    value, stderr
        The number and its standard error; without a usable error (``None``, NaN) the text says so.
    """
    if not math.isfinite(value):
        return plain(value)
    if stderr is None or math.isnan(stderr):
        return f"{plain(value)} ± ?"
    if stderr <= 1e-12 * abs(value) or math.isinf(stderr):
        # An error below the rounding of the value is no error: resamples that all agree.
        return f"{plain(value)} ± {plain(stderr) if math.isinf(stderr) else '0'}"
    first = math.floor(math.log10(stderr))
    if first < -6 and abs(value) >= 1e-4:
        return f"{plain(value, 6)} ± {stderr:.0e}".replace("-", "−")
    largest = max(abs(value), stderr)
    if largest >= 1e6 or largest < 1e-4:
        power = math.floor(math.log10(largest))
        digits = max(power - first + 1, 0)
        return f"({value / 10**power:.{digits}f} ± {stderr / 10**power:.{digits}f})e{power}".replace("-", "−")
    digits = max(1 - first, 0)
    return f"{value:.{digits}f} ± {stderr:.{digits}f}".replace("-", "−")


def plain(value: float, digits: int = 4) -> str:
    """Write a number without error, to so many significant digits.

    Parameters
    ----------
    value
        Any float; what is not finite is written ``∞``, ``−∞`` or ``NaN``.
    digits
        Significant digits.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}".replace("-", "−").replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.{digits}g}".replace("-", "−")


def rows_of(x: Any, name: str, fewest: int = 2) -> Tensor:
    """Read ``(n, *event)`` as rows of float64, ``(n, d)``.

    Parameters
    ----------
    x
        A tensor or an array; ``(n,)`` counts as one column.
    name
        What the error calls it.
    fewest
        Rows needed.

    Raises
    ------
    ShapeError
        If there are too few rows.
    InputError
        If a value is not finite.
    """
    tensor = torch.as_tensor(x).detach()
    if tensor.ndim < 1 or tensor.shape[0] < fewest or tensor.numel() == 0:
        raise ShapeError(f"{name} needs {fewest} or more rows, (n, *event); got shape {tuple(tensor.shape)}.")
    rows = tensor.reshape(tensor.shape[0], -1).to(torch.float64)
    bad = int((~rows.isfinite()).any(dim=1).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(rows)} rows of {name} hold values that are not finite; a distance to them says nothing. "
            "Find out why (a diverged chain?), then drop these rows and report their number."
        )
    return rows


def two_rows_of(a: Any, b: Any, fewest: int = 2) -> tuple[Tensor, Tensor]:
    """Read two sets of rows with the same columns, on the first one's device.

    Raises
    ------
    ShapeError, InputError
        As `rows_of`, and if the columns differ.
    """
    left, right = rows_of(a, "the first sample", fewest), rows_of(b, "the second sample", fewest)
    if left.shape[1] != right.shape[1]:
        raise ShapeError(f"The two samples have {left.shape[1]} and {right.shape[1]} numbers per row; they must agree.")
    return left, right.to(left.device)


def picks(n: int, size: tuple[int, ...], rng: Generator, device: torch.device | None = None) -> Tensor:
    """Draw row numbers below ``n`` with replacement, for a bootstrap."""
    return torch.randint(n, size, generator=rng, device=rng.device).to(device or rng.device)


def bootstrap_stderr(statistic: Callable[[], float], resamples: int) -> float:
    """Spread of a statistic over resamples.

    Parameters
    ----------
    statistic
        Draws its own resample at each call.
    resamples
        How many, 2 or more.

    Raises
    ------
    OptionError
        If there are fewer than two.
    """
    if resamples < 2:
        raise OptionError(f"A bootstrap needs 2 or more resamples (100 is usual); got {resamples}.")
    values = torch.tensor([statistic() for _ in range(resamples)], dtype=torch.float64)
    return float(values.std())
