r"""Internal coordinates: bond lengths, angles and torsions of a molecule, and the way back to Cartesian ones.

Each atom is placed from three that stand already: at a distance from the one it is bonded to, at an angle with a
second, at a torsion about the bond of these two from a third. Of the atoms on one end of a bond the first has the
torsion itself; the others are placed from that first one, so that the first torsion turns all of them, as a rotation
about a bond does. Moving and turning the molecule as a whole changes no coordinate.

With :math:`N` atoms there are :math:`3N - 6` coordinates, and the volume element is

.. math:: dx = \prod_{i=2}^{N} b_i^2 \prod_{i=3}^{N} \sin\theta_i \; db\, d\theta\, d\tau \times d(\text{rigid motion}).

`Practical conversion from torsion space to Cartesian space for in silico protein synthesis (Parsons et al., 2005)
<https://doi.org/10.1002/jcc.20237>`_ for the placing; the volume element is that of polar coordinates about each atom:
`Rotational-translational entropy and the classical partition function in internal coordinates: On the treatment of
internal degrees of freedom (Gō & Scheraga, 1976) <https://doi.org/10.1021/ma60052a001>`_.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gibbsian.errors import OptionError, ShapeError


@dataclass(frozen=True)
class InternalCoordinates:
    """Which atom is placed from which: a Z-matrix.

    Points are ``(n, 3 * atoms - 6)``: lengths in nanometres of all atoms but the first, angles in radians of all but
    two, torsions in radians of all but three, each in the order of placing.

    Attributes
    ----------
    order
        The atoms as they are placed.
    bonded, second, third
        From which each is placed; -1 where there is none, for the first atoms.
    leads
        Whether an atom's torsion turns others with it: it is placed from atoms further down the chain, not from one
        on the same end of the bond.
    """

    order: tuple[int, ...]
    bonded: tuple[int, ...]
    second: tuple[int, ...]
    third: tuple[int, ...]
    leads: tuple[bool, ...]

    @property
    def atoms(self) -> int:
        """How many atoms there are."""
        return len(self.order)

    @property
    def dim(self) -> int:
        """How many coordinates there are."""
        return 3 * self.atoms - 6

    @property
    def torsion_atoms(self) -> list[tuple[int, int, int, int]]:
        """The four atoms of each torsion, in order of the coordinates: the third, second, bonded, and the placed."""
        rows = zip(self.third, self.second, self.bonded, self.order)
        return list(rows)[3:]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths ``(n, atoms - 1)``, angles ``(n, atoms - 2)`` and torsions ``(n, atoms - 3)`` of points.

        Raises
        ------
        ShapeError
            If the points are of another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ShapeError(
                f"{self.atoms} atoms have {self.dim} internal coordinates, (n, {self.dim}); got {tuple(z.shape)}."
            )
        return tuple(z.split((self.atoms - 1, self.atoms - 2, self.atoms - 3), 1))  # pyright: ignore[reportReturnType]

    def torsion(self, atoms: Sequence[int]) -> int:
        """The index, among all coordinates, of a torsion by its four atoms in either direction.

        Raises
        ------
        OptionError
            If it is none of the coordinates.
        """
        known = self.torsion_atoms
        for i, four in enumerate(known):
            if tuple(atoms) in (four, four[::-1]):
                return 2 * self.atoms - 3 + i
        raise OptionError(f"The torsion of atoms {tuple(atoms)} is none of the internal coordinates: {known}.")

    def of(self, x: Tensor) -> Tensor:
        r"""Internal coordinates of Cartesian ones, ``(n, atoms, 3) -> (n, 3 * atoms - 6)``.

        Torsions are in :math:`(-\pi, \pi]`.

        Raises
        ------
        ShapeError
            If the points are of another shape.
        """
        if x.ndim != 3 or x.shape[1:] != (self.atoms, 3):
            raise ShapeError(f"Coordinates of {self.atoms} atoms are (n, {self.atoms}, 3); got {tuple(x.shape)}.")
        d, a, b, c = (x[:, list(t)] for t in (self.order, self.bonded, self.second, self.third))
        lengths = (d - a)[:, 1:].norm(dim=2)
        u, v = (d - a)[:, 2:], (b - a)[:, 2:]
        angles = torch.atan2(torch.linalg.cross(u, v).norm(dim=2), (u * v).sum(2))
        return torch.cat((lengths, angles, _torsions(d[:, 3:], a[:, 3:], b[:, 3:], c[:, 3:])), 1)

    def cartesian(self, z: Tensor) -> Tensor:
        """Cartesian coordinates in nanometres, ``(n, 3 * atoms - 6) -> (n, atoms, 3)``.

        The first atom is at the origin, the second on the first axis, the third in the plane of the first two.

        Raises
        ------
        ShapeError
            If the points are of another shape.
        """
        lengths, angles, torsions = self.split(z)
        zero = torch.zeros_like(lengths[:, 0])
        placed: list[Tensor] = [torch.empty(0)] * self.atoms
        first, other, last = self.order[:3]
        placed[first] = torch.stack((zero, zero, zero), 1)
        placed[other] = torch.stack((lengths[:, 0], zero, zero), 1)
        # The third atom hangs on either of the two, at an angle with the other.
        sign = 1.0 if self.bonded[2] == first else -1.0
        cosine, sine = angles[:, 0].cos(), angles[:, 0].sin()
        arm = torch.stack((sign * cosine, sine, zero), 1) * lengths[:, 1:2]
        placed[last] = placed[self.bonded[2]] + arm
        for rows in self._levels():
            at = torch.as_tensor(rows)
            a, b, c = (torch.stack([placed[t[i]] for i in rows], 1) for t in (self.bonded, self.second, self.third))
            new = _place(a, b, c, lengths[:, at - 1], angles[:, at - 2], torsions[:, at - 3])
            for k, i in enumerate(rows):
                placed[self.order[i]] = new[:, k]
        return torch.stack(placed, 1)

    def log_det(self, z: Tensor) -> Tensor:
        """Log of the volume element dx/dz, without that of rigid motion, ``(n, 3 * atoms - 6) -> (n,)``.

        NaN where a length or the sine of an angle is negative: `valid` tells.
        """
        lengths, angles, _ = self.split(z)
        return 2.0 * lengths.log().sum(1) + angles.sin().log().sum(1)

    def valid(self, z: Tensor) -> Tensor:
        """Which points have positive lengths and angles between 0 and a half turn, ``(n,)`` of bools."""
        lengths, angles, torsions = self.split(z)
        inside = (lengths > 0).all(1) & ((angles > 0) & (angles < torch.pi)).all(1)
        return inside & torsions.isfinite().all(1)

    def wrap(self, z: Tensor, centres: Tensor | None = None) -> Tensor:
        """Bring torsions within half a turn of centres ``(atoms - 3,)``, or of 0."""
        torsions = z[:, 2 * self.atoms - 3 :]
        middle = torch.zeros_like(torsions[:1]) if centres is None else centres
        turned = middle + torch.remainder(torsions - middle + torch.pi, 2 * torch.pi) - torch.pi
        return torch.cat((z[:, : 2 * self.atoms - 3], turned), 1)

    def _levels(self) -> list[list[int]]:
        """Rows from the fourth on, in groups that can be placed at once."""
        level = dict.fromkeys(self.order[:3], 0)
        groups: dict[int, list[int]] = {}
        for i in range(3, self.atoms):
            here = 1 + max(level[t[i]] for t in (self.bonded, self.second, self.third))
            level[self.order[i]] = here
            groups.setdefault(here, []).append(i)
        return [groups[k] for k in sorted(groups)]


def _place(a: Tensor, b: Tensor, c: Tensor, length: Tensor, angle: Tensor, torsion: Tensor) -> Tensor:
    """Points d at lengths from a, with angles d-a-b and torsions d-a-b-c, ``(n, k, 3)``."""
    along = torch.nn.functional.normalize(b - a, dim=2)
    normal = torch.nn.functional.normalize(torch.linalg.cross(along, c - b), dim=2)
    across = torch.linalg.cross(normal, along)
    aside = across * torsion.cos().unsqueeze(2) - normal * torsion.sin().unsqueeze(2)
    return a + length.unsqueeze(2) * (along * angle.cos().unsqueeze(2) + aside * angle.sin().unsqueeze(2))


def _torsions(d: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Torsions d-a-b-c in radians, ``(n, k)``."""
    along = torch.nn.functional.normalize(b - a, dim=2)
    u, v = torch.linalg.cross(along, d - a), torch.linalg.cross(along, c - b)
    return torch.atan2((torch.linalg.cross(u, v) * along).sum(2), (u * v).sum(2))
