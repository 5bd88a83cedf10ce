r"""A periodic function of two angles from its values on a grid, as a trigonometric polynomial.

.. math:: E(x) = \sum_{|k|, |l| \le m} c_{kl}\, e^{i (k x_1 + l x_2)},

with the coefficients of the discrete Fourier transform. It goes through the values at the grid's points where these
hold no higher frequency, and is smooth, with exact derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.periodic import TURN
from gibbsian.energies.tractable import batch_rows
from gibbsian.errors import OptionError, ShapeError


class FourierTable(Energy):
    r"""A fixed energy of two angles in radians, from a table of its values.

    Parameters
    ----------
    values
        At :math:`-\pi + 2 \pi i / m` along both axes, ``(m, m)``, without the points at the end that are the first
        again.
    tolerance
        High frequencies are left out as long as their amplitudes, which bound what this changes, add up to less.
    columns
        Which two angles of a point it is a function of.
    dim
        Angles of a point.

    Raises
    ------
    ShapeError
        If the values do not form a square.
    OptionError
        If values are not finite, or a number is out of its range.
    """

    support = TURN
    cosines: Tensor
    sines: Tensor
    orders: Tensor

    def __init__(self, values: Tensor, tolerance: float = 0.0, columns: tuple[int, int] = (0, 1), dim: int = 2) -> None:
        super().__init__()
        table = torch.as_tensor(values).double()
        if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 3:
            raise ShapeError(f"Values on a grid of two angles form a square (m, m); got {tuple(table.shape)}.")
        if len(set(columns)) != 2 or not all(0 <= c < dim for c in columns) or not tolerance >= 0.0:
            raise OptionError(
                f"A table is of two different columns below {dim}, with a tolerance of 0 or more; got {columns} and "
                f"{tolerance}."
            )
        if not bool(table.isfinite().all()):
            raise OptionError(f"The values of a table are finite; {int((~table.isfinite()).sum())} are not.")
        self.event_shape = torch.Size((dim,))
        self.columns = columns
        found = torch.fft.fft2(table) / table.numel()
        harmonics = _needed(found.abs(), tolerance)
        order = torch.arange(-harmonics, harmonics + 1)
        kept = found[order % len(table)][:, order % len(table)]
        # The grid begins at minus pi, where a transform takes its origin to be.
        shift = torch.exp(1j * math.pi * (order[:, None] + order[None, :]).double())
        kept = kept * shift
        dtype = torch.get_default_dtype()
        self.register_buffer("cosines", kept.real.to(dtype))
        self.register_buffer("sines", kept.imag.to(dtype))
        self.register_buffer("orders", order.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row: ``(n, d) -> (n,)``."""
        x = batch_rows(x, self.event_shape)  # pyright: ignore[reportArgumentType]
        a, b = (x[:, c : c + 1] * self.orders for c in self.columns)
        # The real part of the sum, with the products of exponentials written out.
        real = (a.cos() @ self.cosines - a.sin() @ self.sines) * b.cos()
        imaginary = (a.sin() @ self.cosines + a.cos() @ self.sines) * b.sin()
        return (real - imaginary).sum(1)

    def extra_repr(self) -> str:
        """Columns and frequencies."""
        return f"columns={self.columns}, harmonics={(len(self.orders) - 1) // 2}"


def _needed(amplitude: Tensor, tolerance: float) -> int:
    """The lowest frequency beyond which amplitudes add up to no more than the tolerance."""
    m = len(amplitude)
    order = torch.arange(m)
    order = torch.minimum(order, m - order)
    outer = torch.maximum(order[:, None], order[None, :])
    for harmonics in range(1, (m - 1) // 2):
        if float(amplitude[outer > harmonics].sum()) <= tolerance:
            return harmonics
    return (m - 1) // 2
