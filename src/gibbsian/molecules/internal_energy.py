r"""A molecule's energy over its internal coordinates: the same law, without rigid motion.

.. math:: E(z) = E(x(z)) - \log \left| \frac{dx}{dz} \right| ,

whose density has a finite Z, for a place and a direction in space are no part of z.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, ShapeError
from gibbsian.molecules.internal import InternalCoordinates


class InternalEnergy(Energy):
    """An energy of Cartesian coordinates, such as `MolecularEnergy`, as one of internal coordinates, in nats.

    Points are ``(3 * atoms - 6,)`` in nanometres and radians, as `InternalCoordinates` has them; torsions may be any
    whole turns away. The energy is infinite where a length is not positive or an angle not between 0 and a half turn.

    Parameters
    ----------
    energy
        ``(n, atoms, 3) -> (n,)``; one that does not change as the molecule moves and turns as a whole.
    internal
        From `internal_coordinates`.

    Raises
    ------
    ArgumentTypeError
        If ``internal`` is no such thing.
    ShapeError
        If the energy is of another number of atoms.
    """

    def __init__(self, energy: Energy, internal: InternalCoordinates) -> None:
        super().__init__()
        if not isinstance(internal, InternalCoordinates):
            raise ArgumentTypeError(f"internal comes from internal_coordinates(topology); got {internal!r}.")
        self.energy = Energy.of(energy)
        shape = self.energy.event_shape
        if shape is not None and tuple(shape) != (internal.atoms, 3):
            raise ShapeError(
                f"The internal coordinates are of {internal.atoms} atoms, and the energy of points {tuple(shape)}."
            )
        self.internal = internal
        self.event_shape = torch.Size((internal.dim,))

    def forward(self, z: Tensor) -> Tensor:
        """Energy of each row, ``(n, 3 * atoms - 6) -> (n,)``."""
        valid = self.internal.valid(z)
        # Points that are no molecule go where one is, if there is any, so that gradients stay finite.
        some = torch.where(valid.any(), z.detach()[valid.to(torch.uint8).argmax()], torch.ones_like(z[0]))
        safe = torch.where(valid.unsqueeze(1), z, some)
        value = cast(Tensor, self.energy(self.internal.cartesian(safe))) - self.internal.log_det(safe)
        return torch.where(valid, value, torch.inf)

    def extra_repr(self) -> str:
        """How many coordinates."""
        return f"{self.internal.dim} internal coordinates"
