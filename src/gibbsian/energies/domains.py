"""Domains beside those of ``torch.distributions``: the torus and the sphere; and what kind of domain a support is.

A box is ``constraints.interval(low, high)``, the reals are ``constraints.real``, binary and one-hot states are
``constraints.boolean`` and ``constraints.one_hot``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.errors import OptionError


class Torus(Constraint):
    """Angles: every coordinate is periodic, and its values are taken in ``[low, low + period)``.

    Parameters
    ----------
    period
        Length of a turn, for example ``2 * math.pi``.
    low
        Where the interval of values begins; minus half a period when left out.

    Raises
    ------
    OptionError
        If the period is not positive and finite.
    """

    def __init__(self, period: float, low: float | None = None) -> None:
        if not 0.0 < period < float("inf"):
            raise OptionError(f"period is the positive length of a turn; got {period}.")
        self.period = float(period)
        self.low = -0.5 * self.period if low is None else float(low)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each coordinate lies in the interval of values."""
        return (value >= self.low) & (value < self.low + self.period)

    def wrap(self, x: Tensor) -> Tensor:
        """Bring every coordinate into the interval of values, by whole turns."""
        y = self.low + torch.remainder(x - self.low, self.period)
        # A value just below the interval may be rounded to its end, which is its beginning.
        return torch.where(y == self.low + self.period, self.low, y)

    def __repr__(self) -> str:
        return f"Torus(period={self.period:.6g}, low={self.low:.6g})"


class Sphere(Constraint):
    """Unit vectors ``(n, d)``: the sphere of dimension d - 1."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether each row has unit length, to the precision of its type."""
        tolerance = 100.0 * torch.finfo(value.dtype).eps
        return (value.square().sum(-1) - 1.0).abs() < tolerance

    def __repr__(self) -> str:
        return "Sphere()"


def kind_of(support: Constraint) -> str:
    """Tell the kind of a domain: ``"boolean"``, ``"one_hot"``, ``"torus"``, ``"sphere"``, ``"box"`` or ``"real"``."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, Torus):
        return "torus"
    if isinstance(support, Sphere):
        return "sphere"
    # By type, for a copied energy holds a copy of the constraint.
    if isinstance(support, type(constraints.boolean)):
        return "boolean"
    if isinstance(support, type(constraints.one_hot)):
        return "one_hot"
    if isinstance(support, (type(constraints.interval(0.0, 1.0)), type(constraints.half_open_interval(0.0, 1.0)))):
        return "box"
    return "discrete" if support.is_discrete else "real"
