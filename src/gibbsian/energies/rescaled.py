r"""An energy in other units: the same density over points that are measured otherwise.

With :math:`z = (x - a) / b`, coordinate by coordinate, a density of z with energy E has over x

.. math:: E_x(x) = E\!\left(\frac{x - a}{b}\right) + \sum_i \log b_i

and the same Z. Models of one kind of data that were scaled differently come into common units so, before they can be
multiplied or mixed. Noise of standard deviation :math:`\sigma` on x is noise of :math:`\sigma / b` on z: where b is not
the same for all coordinates the level is taken with their geometric mean, and the energy at a level is then not that of
the same noise in every coordinate, though still one on the way from noise to data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.energies.base import Energy, formula
from gibbsian.errors import OptionError, ShapeError


class Rescaled(Energy):
    """An energy in other units: see `rescaled`."""

    offset: Tensor
    unit: Tensor

    def __init__(self, energy: Energy, offset: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.energy = energy
        self.event_shape, self.support, self.context = energy.event_shape, energy.support, energy.context
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("unit", unit, persistent=False)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Energy of the points in the energy's own units, and the logarithm of the volume of one of those."""
        logs = self.unit.log()
        if "sigma" in context:
            context = {**context, "sigma": context["sigma"] / logs.mean().exp()}
        volume = logs.sum() if logs.ndim else x[0].numel() * logs
        return self.energy((x - self.offset) / self.unit, **context) + volume

    def extra_repr(self) -> str:
        """The energy inside."""
        return formula(self.energy)


def rescaled(energy: Energy, offset: Tensor | float, unit: Tensor | float) -> Energy:
    """Give an energy over points measured in other units; its log Z stays what it was.

    Parameters
    ----------
    energy
        Over real points z.
    offset
        What x is where z is 0: one number, or one per coordinate of points of shape ``(d,)``.
    unit
        What x grows by where z grows by 1, above 0; likewise.

    Raises
    ------
    OptionError
        If a unit is not positive and finite, or the offset is not finite.
    ShapeError
        If there are neither one nor ``d`` of them.
    """
    a, b = (torch.as_tensor(value, dtype=torch.get_default_dtype()) for value in (offset, unit))
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()) and bool((b > 0).all())):
        raise OptionError(f"Units are finite numbers above 0, and offsets finite; got {offset} and {unit}.")
    shape = energy.event_shape
    if any(v.ndim and tuple(v.shape) != tuple(shape or v.shape) for v in (a, b)) or max(a.ndim, b.ndim) > 1:
        raise ShapeError(
            f"Points of shape {None if shape is None else tuple(shape)} have one offset and unit, or one per "
            f"coordinate; got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return Rescaled(energy, a, b)
