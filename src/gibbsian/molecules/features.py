r"""Features of conformations: torsions as points on the torus, distances, and Cartesian coordinates superposed.

A torsion is the angle :math:`(-\pi, \pi]` between the planes of atoms 1, 2, 3 and 2, 3, 4, by the convention of IUPAC:
0 is cis, positive is clockwise along the bond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gibbsian.energies.periodic import TURN
from gibbsian.errors import DataError, OptionError, ShapeError, unknown_name
from gibbsian.molecules.extras import require_mdtraj
from gibbsian.molecules.restraints import torsion_angles as angles_at

KINDS = ("phi", "psi", "omega", "chi1", "chi2", "chi3", "chi4")
"""Torsions of proteins: of the backbone, and of side chains outwards."""

_OWNER = {"phi": 1, "psi": 1, "omega": 2}
"""Which of a backbone torsion's four atoms is of the residue whose name it bears."""


@dataclass(frozen=True)
class Torsions:
    """Torsions of a trajectory.

    Attributes
    ----------
    names
        For example ``"phi ALA2"``, one per torsion.
    atoms
        Indices of the four atoms of each, ``(d, 4)``.
    angles
        In radians in ``[-pi, pi)``, ``(n, d)``, float32: points of ``Torus(2 pi)``.
    """

    names: tuple[str, ...]
    atoms: np.ndarray
    angles: Tensor

    def pairs(self) -> dict[str, tuple[int, int]]:
        """Columns of phi and psi by residue, where both are there."""
        at = {name: i for i, name in enumerate(self.names)}
        residues = [name.split(" ", 1)[1] for name in self.names if name.startswith("phi ")]
        return {r: (at[f"phi {r}"], at[f"psi {r}"]) for r in residues if f"psi {r}" in at}

    def __len__(self) -> int:
        return len(self.names)


def torsions(trajectory: Any, kinds: Sequence[str] = ("phi", "psi"), residues: Sequence[int] | None = None) -> Torsions:
    """Compute torsions of backbone and side chains.

    Parameters
    ----------
    trajectory
        An mdtraj ``Trajectory``.
    kinds
        Some of `KINDS`.
    residues
        Numbers of the residues, as in the file (``resSeq``); all when left out.

    Raises
    ------
    DataError
        If there is no such torsion.
    OptionError
        If a kind is unknown.
    MissingPackageError
        If mdtraj is not installed.
    """
    md = require_mdtraj()
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of torsion", kind, KINDS)
    if not kinds:
        raise OptionError(f"kinds names torsions, some of {', '.join(KINDS)}; got none.")
    topology = trajectory.topology
    several = topology.n_chains > 1
    found: list[tuple[int, int, str, np.ndarray]] = []
    for place, kind in enumerate(kinds):
        indices = getattr(md.geometry.dihedral, f"indices_{kind}")(topology)
        for four in np.asarray(indices, dtype=int).reshape(-1, 4):
            owner = topology.atom(int(four[_OWNER.get(kind, 1)])).residue
            if residues is None or owner.resSeq in residues:
                name = f"{kind} {owner.name}{owner.resSeq}" + (f":{owner.chain.index}" if several else "")
                found.append((owner.index, place, name, four))
    if not found:
        asked = "" if residues is None else f" in residues {', '.join(map(str, residues))}"
        have = ", ".join(f"{r.name}{r.resSeq}" for r in list(topology.residues)[:10])
        raise DataError(
            f"There is no torsion {', '.join(kinds)}{asked}, of a molecule of the residues {have}"
            f"{', ...' if topology.n_residues > 10 else ''}. Phi and psi need a residue between two others, or caps."
        )
    found.sort(key=lambda one: one[:2])
    atoms = np.stack([one[3] for one in found])
    return Torsions(tuple(one[2] for one in found), atoms, torsion_angles(trajectory.xyz, atoms))


def torsion_angles(xyz: np.ndarray | Tensor, atoms: np.ndarray) -> Tensor:
    """Angles of quadruples of atoms, in radians in ``[-pi, pi)``.

    Parameters
    ----------
    xyz
        Coordinates, ``(n, atoms, 3)``, in any unit.
    atoms
        Indices, ``(d, 4)``.

    Returns
    -------
    Tensor
        ``(n, d)``, float32 (float64 of float64 coordinates).
    """
    x = torch.as_tensor(xyz)
    angles = angles_at(x.double(), torch.as_tensor(atoms))
    return TURN.wrap(angles).to(x.dtype if x.is_floating_point() else torch.float32)


def distances(trajectory: Any, pairs: np.ndarray | Sequence[tuple[int, int]]) -> Tensor:
    """Distances of pairs of atoms in nm, ``(n, k)``, float32.

    Raises
    ------
    ShapeError
        If the pairs do not form ``(k, 2)``.
    """
    index = np.asarray(pairs, dtype=int)
    if index.ndim != 2 or index.shape[1] != 2:
        raise ShapeError(f"Pairs of atoms have shape (k, 2); got {index.shape}.")
    xyz = torch.as_tensor(trajectory.xyz)
    return torch.linalg.vector_norm(xyz[:, index[:, 0]] - xyz[:, index[:, 1]], dim=2)


def residue_pairs(topology: Any, apart: int = 3, atom: str = "CA") -> np.ndarray:
    """Pairs of one atom of each residue, of residues at least so many apart in their chain, ``(k, 2)``."""
    sites = [(a.residue.chain.index, a.residue.index, a.index) for a in topology.atoms if a.name == atom]
    pairs = [(i, j) for n, (c, r, i) in enumerate(sites) for d, s, j in sites[n + 1 :] if c != d or abs(s - r) >= apart]
    return np.array(pairs, dtype=int).reshape(-1, 2)


def aligned(trajectory: Any, reference: Any | None = None, atoms: np.ndarray | None = None) -> Tensor:
    r"""Cartesian coordinates superposed on a reference by the rotation of least squares, ``(n, atoms, 3)`` in nm.

    `A solution for the best rotation to relate two sets of vectors (Kabsch, 1976)
    <https://doi.org/10.1107/S0567739476001873>`_.

    Parameters
    ----------
    trajectory
        An mdtraj ``Trajectory``; it is left as it is.
    reference
        One frame of the same atoms; the first frame when left out.
    atoms
        Indices of those that are superposed and returned; all when left out.
    """
    x = torch.as_tensor(trajectory.xyz).double()
    y = torch.as_tensor((trajectory if reference is None else reference).xyz[0]).double()
    if atoms is not None:
        index = torch.as_tensor(np.asarray(atoms, dtype=int))
        x, y = x[:, index], y[index]
    return superposed(x, y).float()


def superposed(x: Tensor, y: Tensor) -> Tensor:
    """Move sets of points ``(n, a, 3)`` onto one set ``(a, 3)`` by rotation and translation."""
    centre = y.mean(0)
    x, y = x - x.mean(1, keepdim=True), y - centre
    u, _, v = torch.linalg.svd(x.transpose(1, 2) @ y)
    turn = u @ v
    # The nearest orthogonal matrix may be a reflection; the last singular vector is then turned round.
    sign = torch.ones(len(x), 1, 3, dtype=x.dtype, device=x.device)
    sign[:, 0, 2] = torch.linalg.det(turn).sign()
    return x @ ((u * sign) @ v) + centre


def fluctuations(trajectory: Any, atom: str = "CA") -> Tensor:
    """Root mean square fluctuation in nm of one atom of each residue around its mean, after superposition, ``(k,)``."""
    index = np.array([a.index for a in trajectory.topology.atoms if a.name == atom], dtype=int)
    if not len(index):
        raise DataError(f"No atom is named {atom!r}.")
    x = torch.as_tensor(trajectory.xyz)[:, torch.as_tensor(index)].double()
    mean = x[0]
    for _ in range(3):
        x = superposed(x, mean)
        mean = x.mean(0)
    return (x - mean).square().sum(2).mean(0).sqrt().float()
