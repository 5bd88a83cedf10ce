r"""Energies on a box, the positive numbers or a simplex, seen from the reals, where every kernel over the reals walks.

With T a smooth one-to-one map from the reals onto the support, a point x = T(y) with density :math:`e^{-E(x)} / Z` has

.. math:: E_y(y) = E(T(y)) - \log |\det T'(y)|

for the energy of y, with the same Z. The map is the one that ``torch.distributions.biject_to`` gives: a sigmoid for an
interval, an exponential for a half-line, stick breaking for a simplex.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from gibbsian.energies.base import Energy, formula
from gibbsian.energies.domains import kind_of
from gibbsian.errors import DomainError, ShapeError


class Unconstrained(Energy):
    """An energy over the reals that stands for another on a smaller support: see `unconstrain`."""

    def __init__(self, energy: Energy, inside: Constraint) -> None:
        super().__init__()
        self.energy = energy
        self.inside = inside
        self.transform = biject_to(inside)
        self.context = energy.context
        shape = energy.event_shape
        self.event_shape = None if shape is None else torch.Size(self.transform.inverse_shape(shape))

    def forward(self, y: Tensor, **context: Tensor) -> Tensor:
        """Energy of the point that y stands for, less the log of the volume that a unit volume there becomes."""
        x = self.transform(y)
        log_det = self.transform.log_abs_det_jacobian(y, x)
        return self.energy(x, **context) - log_det.reshape(y.shape[0], -1).sum(1)

    def constrain(self, y: Tensor) -> Tensor:
        """Take points ``(..., *event)`` of the reals, such as draws, to the support."""
        return self.transform(y)

    def unconstrain(self, x: Tensor) -> Tensor:
        """Take points ``(..., *event)`` of the support to the reals, to start chains there.

        Raises
        ------
        DomainError
            If some lie outside, or on an edge that stands at infinity.
        """
        y = self.transform.inv(x)
        inside = self.inside.check(x)
        rows = (torch.isfinite(y).flatten(1).all(1)) & inside.reshape(x.shape[0], -1).all(1)
        if not bool(rows.all()):
            raise DomainError(
                f"{int((~rows).sum())} of {x.shape[0]} points lie outside the inner part of {self.inside}, which is "
                "all that the reals are mapped to."
            )
        return y

    def extra_repr(self) -> str:
        """The energy inside and its support."""
        return f"{formula(self.energy)}, {self.inside}"


def unconstrain(energy: Energy, support: Constraint | None = None) -> Unconstrained:
    """Give an energy on a box, on positive numbers or on a simplex a form over the reals.

    Sample the result with any kernel over the reals, and take its draws back with ``.constrain(draws)``. Its log Z is
    the energy's.

    Parameters
    ----------
    energy
        On a continuous support.
    support
        Where it lives, if not where it says; an energy over the reals is so restricted, for example to
        ``constraints.interval(0.0, 1.0)``.

    Raises
    ------
    DomainError
        If the support is discrete, a torus or a sphere, which no such map covers.
    ShapeError
        If the energy's points are none of the support.
    """
    energy = Energy.of(energy)
    inside = energy.support if support is None else support
    kind = kind_of(inside)
    if kind not in ("real", "box"):
        fits = {
            "torus": "Wrapped(kernel, energy.support) walks there",
            "sphere": "SphericalHMC walks there",
        }.get(kind, "discrete states need a discrete kernel")
        raise DomainError(f"No smooth map takes the reals one to one onto {inside}; {fits}.")
    try:
        return Unconstrained(energy, inside)
    except NotImplementedError:
        raise DomainError(f"torch.distributions has no map from the reals onto {inside}.") from None
    except ValueError as error:
        raise ShapeError(f"Points of shape {tuple(energy.event_shape or ())} do not fit {inside}: {error}") from None
