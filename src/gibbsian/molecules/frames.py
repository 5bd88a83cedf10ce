r"""Unphysical frames: bonds out of their length, atoms in each other's place, amino acids of the wrong hand.

Three numbers per frame, each with a limit that frames of a sound simulation keep and broken ones do not. They are
checks of geometry, not of energy: a frame that passes may still be improbable.

`MolProbity: all-atom structure validation for macromolecular crystallography (Chen et al., 2010)
<https://doi.org/10.1107/S0907444909042073>`_ is the model of such checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gibbsian.errors import OptionError
from gibbsian.molecules.completeness import is_amino_acid
from gibbsian.molecules.geometry import bond_indices, bond_lengths, expected_lengths

FAR = 3
"""Atoms this many bonds apart, or fewer, are not in each other's way: geometry brings them close."""


@dataclass(frozen=True)
class FrameChecks:
    """What is wrong with each frame.

    Attributes
    ----------
    bond_error
        Largest relative deviation of a bond from the length its elements say, ``(n,)``.
    clashes
        Pairs of heavy atoms, more than three bonds apart, that are closer than ``clash_distance``, ``(n,)``.
    inverted
        Alpha carbons of D hand among L amino acids, ``(n,)``.
    bond_tolerance, clash_distance
        The limits that were asked for, the second in nm.
    """

    bond_error: np.ndarray
    clashes: np.ndarray
    inverted: np.ndarray
    bond_tolerance: float
    clash_distance: float

    @property
    def physical(self) -> np.ndarray:
        """Which frames pass all checks, ``(n,)``."""
        return (self.bond_error <= self.bond_tolerance) & (self.clashes == 0) & (self.inverted == 0)

    def table(self) -> Any:
        """A pandas ``DataFrame`` with one row per frame."""
        import pandas as pd

        return pd.DataFrame(
            {
                "bond_error": self.bond_error,
                "clashes": self.clashes,
                "inverted": self.inverted,
                "physical": self.physical,
            }
        )

    def __str__(self) -> str:
        """Say in words how many frames fail, and by what."""
        n, bad = len(self.physical), int((~self.physical).sum())
        if not bad:
            return f"All {n} frames are physical."
        kinds = {
            "bonds out of their length": int((~(self.bond_error <= self.bond_tolerance)).sum()),
            "clashes": int((self.clashes > 0).sum()),
            "inverted amino acids": int((self.inverted > 0).sum()),
        }
        told = ", ".join(f"{count} with {what}" for what, count in kinds.items() if count)
        return f"{bad} of {n} frames are unphysical: {told}."


def check_frames(trajectory: Any, *, bond_tolerance: float = 0.35, clash_distance: float = 0.2) -> FrameChecks:
    """Look for unphysical frames.

    Parameters
    ----------
    trajectory
        An mdtraj ``Trajectory``.
    bond_tolerance
        The largest relative deviation of a bond's length from the sum of covalent radii that passes. The sum itself is
        off by up to 0.15 for double bonds.
    clash_distance
        In nm: heavy atoms nearer than this, more than three bonds apart, clash. Hydrogen bonds bring them to 0.25.

    Raises
    ------
    OptionError
        If a limit is not positive.
    """
    if not bond_tolerance > 0 or not clash_distance > 0:
        raise OptionError(f"Limits of a check are positive; got {bond_tolerance} and {clash_distance}.")
    topology = trajectory.topology
    pairs = bond_indices(topology)
    error = np.zeros(len(trajectory))
    if len(pairs):
        ratio = bond_lengths(trajectory, pairs) / expected_lengths(topology, pairs)
        error = np.abs(ratio - 1.0).max(1)
    error = np.where(np.isfinite(trajectory.xyz).all((1, 2)), error, np.inf)
    return FrameChecks(
        error, _clashes(trajectory, clash_distance), _inverted(trajectory), bond_tolerance, clash_distance
    )


def _clashes(trajectory: Any, nearest: float) -> np.ndarray:
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]

    topology = trajectory.topology
    heavy = np.array([a.index for a in topology.atoms if a.element is None or a.element.symbol != "H"], dtype=int)
    near = bonded_within(topology, FAR)
    allowed = {(min(i, j), max(i, j)) for i, others in enumerate(near) for j in others}
    counts = np.zeros(len(trajectory), dtype=int)
    for frame, xyz in enumerate(trajectory.xyz[:, heavy]):
        if np.isfinite(xyz).all():
            found = cKDTree(xyz).query_pairs(nearest, output_type="ndarray")
            counts[frame] = sum((heavy[i], heavy[j]) not in allowed for i, j in found)
    return counts


def bonded_within(topology: Any, bonds: int) -> list[set[int]]:
    """Atoms that at most so many bonds part from each atom, itself left out."""
    near: list[set[int]] = [set() for _ in range(topology.n_atoms)]
    for a, b in bond_indices(topology).tolist():
        near[a].add(b)
        near[b].add(a)
    found = [set(direct) for direct in near]
    for _ in range(bonds - 1):
        found = [reached.union(*(near[j] for j in reached)) if reached else reached for reached in found]
    return [reached - {i} for i, reached in enumerate(found)]


def _inverted(trajectory: Any) -> np.ndarray:
    """Amino acids of D hand: seen from the alpha carbon, N, C and CB turn the other way round."""
    sites = []
    for residue in trajectory.topology.residues:
        names = {a.name: a.index for a in residue.atoms}
        if is_amino_acid(residue) and {"N", "CA", "C", "CB"} <= names.keys():
            sites.append([names[n] for n in ("CA", "N", "C", "CB")])
    if not sites:
        return np.zeros(len(trajectory), dtype=int)
    return (chirality(trajectory.xyz, np.array(sites)) < 0).sum(1)


def chirality(xyz: np.ndarray, sites: np.ndarray) -> np.ndarray:
    """Signed volumes in nm^3 of the three bonds around each site, positive for L amino acids.

    Parameters
    ----------
    xyz
        Coordinates, ``(n, atoms, 3)``.
    sites
        Indices of centre, N, C and CB, ``(k, 4)``.

    Returns
    -------
    numpy.ndarray
        ``(n, k)``.
    """
    centre, a, b, c = (xyz[:, sites[:, i]].astype(np.float64) for i in range(4))
    return (np.cross(a - centre, b - centre) * (c - centre)).sum(2)
