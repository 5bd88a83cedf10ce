"""Domains beside those of ``torch.distributions``: the torus and the sphere; and what kind of domain a support is.

A box is ``constraints.interval(low, high)``, the reals are ``constraints.real``, binary and one-hot states are
``constraints.boolean`` and ``constraints.one_hot``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.errors import DomainError, OptionError, ShapeError


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


class Inhabitant(Protocol):
    """What says where it lives, as an energy does."""

    @property
    def event_shape(self) -> torch.Size | None:
        """The shape of one point, or ``None`` for any."""
        ...

    @property
    def support(self) -> Constraint:
        """The domain of a point."""
        ...


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


def common_event_shape(energies: Iterable[Inhabitant]) -> torch.Size | None:
    """Return the one event shape that these energies share; ``None`` stands for any.

    Raises
    ------
    ShapeError
        If two of them differ.
    """
    shape: torch.Size | None = None
    for energy in energies:
        if energy.event_shape is None:
            continue
        if shape is not None and shape != energy.event_shape:
            raise ShapeError(
                f"These energies are over points of different shapes, {tuple(shape)} and {tuple(energy.event_shape)}; "
                "only energies over the same space can be combined."
            )
        shape = energy.event_shape
    return shape


def common_support(energies: Iterable[Inhabitant]) -> Constraint:
    """Return the narrowest domain among these energies, which must not mix discrete and continuous.

    Raises
    ------
    DomainError
        If some are discrete and others declare a bounded continuous domain, or two bounded domains differ.
    """
    support: Constraint = constraints.real
    for energy in energies:
        if same_support(energy.support, constraints.real) or same_support(energy.support, support):
            continue
        if not same_support(support, constraints.real):
            raise DomainError(f"These energies live on different domains: {support} and {energy.support}.")
        support = energy.support
    return support


def same_support(a: Constraint, b: Constraint) -> bool:
    """Whether two constraints describe one domain; ``real`` and ``real_vector`` count as one."""
    return a is b or _canonical(a) == _canonical(b)


def is_real(support: Constraint) -> bool:
    """Whether a support is all of the reals, of any event shape."""
    return same_support(support, constraints.real)


def _canonical(support: Constraint) -> str:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return repr(support)
