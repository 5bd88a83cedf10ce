r"""Restraints: energies of a few distances, angles or torsions, to be added to a molecule's.

A collective variable :math:`s(x)` is a number of the coordinates; a restraint is an energy of it, in nats::

    restrained = MolecularEnergy(molecule) + TorsionRestraint(phi, centre=-60.0, concentration=50.0)

All of them are differentiable and batched, and take coordinates ``(n, atoms, 3)`` in nanometres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


def pair_distances(x: Tensor, pairs: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Distances of pairs of atoms, in nanometres.

    Parameters
    ----------
    x
        Coordinates ``(n, atoms, 3)``.
    pairs
        Indices of atoms, ``(m, 2)``.

    Returns
    -------
    ``(n, m)``.
    """
    first, second = _atoms(x, pairs, 2)
    return torch.linalg.vector_norm(second - first, dim=-1)


def bond_angles(x: Tensor, triples: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Angles at the middle one of three atoms, in radians from 0 to pi.

    Parameters
    ----------
    x
        Coordinates ``(n, atoms, 3)``.
    triples
        Indices of atoms, ``(m, 3)``.

    Returns
    -------
    ``(n, m)``.
    """
    a, b, c = _atoms(x, triples, 3)
    u, v = a - b, c - b
    # By the tangent: the arc cosine has no derivative at 0 and pi, and loses digits near them.
    return torch.atan2(torch.linalg.vector_norm(torch.linalg.cross(u, v), dim=-1), (u * v).sum(-1))


def torsion_angles(x: Tensor, quadruples: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Torsions around the middle bond of four atoms, in radians from -pi to pi (IUPAC's sign).

    Parameters
    ----------
    x
        Coordinates ``(n, atoms, 3)``.
    quadruples
        Indices of atoms, ``(m, 4)``.

    Returns
    -------
    ``(n, m)``.
    """
    a, b, c, d = _atoms(x, quadruples, 4)
    before, axis, after = b - a, c - b, d - c
    first, second = torch.linalg.cross(before, axis), torch.linalg.cross(axis, after)
    length = torch.linalg.vector_norm(axis, dim=-1)
    return torch.atan2(length * (before * second).sum(-1), (first * second).sum(-1))


class DistanceRestraint(Energy):
    r"""Hold the distance of two atoms: :math:`\frac{1}{2} ((d - d_0) / \sigma)^2`, or 0 within a flat part.

    Parameters
    ----------
    pair
        Two atoms.
    centre
        In nanometres.
    width
        Sigma, in nanometres.
    flat
        Half the width of the part around the centre where nothing is restrained.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    def __init__(self, pair: Sequence[int], centre: float, width: float, flat: float = 0.0) -> None:
        super().__init__()
        _check_atoms(pair, 2)
        if not (centre >= 0 and width > 0 and flat >= 0):
            raise OptionError(
                f"A distance is 0 or more, its width positive, its flat part 0 or more (nanometres); got {centre}, "
                f"{width}, {flat}."
            )
        self.pair, self.centre, self.width, self.flat = tuple(pair), centre, width, flat

    def forward(self, x: Tensor) -> Tensor:
        """``(n, atoms, 3) -> (n,)``, in nats."""
        beyond = (pair_distances(x, [self.pair])[:, 0] - self.centre).abs() - self.flat
        return 0.5 * (beyond.clamp(min=0.0) / self.width).square()

    def extra_repr(self) -> str:
        """Atoms and centre."""
        return f"{self.pair}, {self.centre:g} nm"


class TorsionRestraint(Energy):
    r"""Hold a torsion near an angle by a von Mises density: :math:`\kappa (1 - \cos(\theta - \theta_0))`.

    Near the centre it is harmonic with a standard deviation of :math:`1/\sqrt\kappa` radians, and periodic.

    Parameters
    ----------
    atoms
        Four of them.
    centre
        In degrees.
    concentration
        Kappa: 3283 for a standard deviation of 1 degree, 33 for 10.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    def __init__(self, atoms: Sequence[int], centre: float, concentration: float) -> None:
        super().__init__()
        _check_atoms(atoms, 4)
        if not (math.isfinite(centre) and concentration > 0):
            raise OptionError(
                f"A torsion's centre is an angle in degrees, its concentration positive; got {centre}, {concentration}."
            )
        self.atoms, self.centre, self.concentration = tuple(atoms), float(centre), float(concentration)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, atoms, 3) -> (n,)``, in nats."""
        return self.concentration * (1.0 - torch.cos(torsion_angles(x, [self.atoms])[:, 0] - math.radians(self.centre)))

    def extra_repr(self) -> str:
        """Atoms and centre."""
        return f"{self.atoms}, {self.centre:g} deg"


class Centred(Energy):
    r"""Hold the centre of some atoms at the origin: :math:`\frac{1}{2} |\bar x|^2 / \sigma^2`.

    A molecule's energy does not change as the molecule moves as a whole; with this its density is normalisable, and
    nothing else of it changes.

    Parameters
    ----------
    width
        Sigma, in nanometres.
    atoms
        Which; all when left out.

    Raises
    ------
    OptionError
        If the width is not positive.
    """

    def __init__(self, width: float = 0.1, atoms: Sequence[int] | None = None) -> None:
        super().__init__()
        if not width > 0:
            raise OptionError(f"A width is positive, in nanometres; got {width}.")
        self.width, self.atoms = width, None if atoms is None else list(atoms)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, atoms, 3) -> (n,)``, in nats."""
        some = x if self.atoms is None else x[:, self.atoms]
        return 0.5 * (some.mean(1) / self.width).square().sum(1)

    def extra_repr(self) -> str:
        """The width."""
        return f"{self.width:g} nm"


class OfVariables(Energy):
    """An energy of collective variables as one of the coordinates: E(s(x)).

    It is how an energy that was learned on torsions biases a simulation, or a restraint of any other form is written. A
    density of x, not of s: how many x there are at an s is left as it is.

    Parameters
    ----------
    energy
        From ``(n, m)`` to ``(n,)``, in nats.
    variables
        From coordinates ``(n, atoms, 3)`` to ``(n, m)``, differentiable, as `torsion_angles` with its atoms filled in.

    Raises
    ------
    ArgumentTypeError
        If the variables are not a function.
    """

    def __init__(self, energy: Energy | Callable[[Tensor], Tensor], variables: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(variables):
            raise ArgumentTypeError(f"Collective variables are a function of coordinates; got {variables!r}.")
        self.inner, self.variables = Energy.of(energy), variables
        self.context = self.inner.context

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """``(n, atoms, 3) -> (n,)``, in nats."""
        return self.inner(self.variables(x), **context)

    def extra_repr(self) -> str:
        """The energy inside."""
        return repr(self.inner)


def _atoms(x: Tensor, indices: Tensor | Sequence[Sequence[int]], count: int) -> tuple[Tensor, ...]:
    if x.ndim != 3 or x.shape[2] != 3:
        raise ShapeError(f"Coordinates are (n, atoms, 3), in nanometres; got {tuple(x.shape)}.")
    index = indices if isinstance(indices, Tensor) else torch.tensor([list(each) for each in indices])
    if index.ndim != 2 or index.shape[1] != count:
        raise ShapeError(f"Each variable has {count} atoms, (m, {count}); got {tuple(index.shape)}.")
    return cast(tuple[Tensor, ...], tuple(x[:, index[:, i]] for i in range(count)))


def _check_atoms(atoms: Sequence[int], count: int) -> None:
    if len(atoms) != count or len(set(atoms)) != count or any(int(a) != a or a < 0 for a in atoms):
        raise OptionError(f"The restraint is of {count} different atoms, by their numbers from 0; got {list(atoms)}.")
