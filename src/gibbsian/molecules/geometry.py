"""What coordinates must satisfy: completeness, finite numbers, bonds of a credible length, molecules in one piece.

Bonds tell most: their lengths are known to a few percent from the two elements, whatever the molecule, so that a length
of ten times that is a mistaken unit, one of half a box a molecule split by its periodic images, and wild lengths of all
kinds another order of the atoms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gibbsian.errors import DataError

RADII = {
    "H": 0.031, "D": 0.031, "C": 0.076, "N": 0.071, "O": 0.066, "F": 0.057, "P": 0.107, "S": 0.105, "CL": 0.102,
    "BR": 0.120, "I": 0.139, "SE": 0.120, "B": 0.084, "SI": 0.111,
}  # fmt: skip
"""Covalent radii in nm: `Covalent radii revisited (Cordero et al., 2008) <https://doi.org/10.1039/b801115j>`_."""

OTHER = 0.13
"""Radius of other elements, in nm."""


SCALE = 3.0
"""From this factor between found and expected bond lengths on, the unit is mistaken; the true one is ten."""


BROKEN = 0.5
"""A bond longer than this, in nm, is none: its ends are in two images of a box, or it joins the wrong atoms."""


def bond_indices(topology: Any) -> np.ndarray:
    """Pairs of bonded atoms, ``(b, 2)``."""
    pairs = [(a.index, b.index) for a, b in topology.bonds]
    return np.array(pairs, dtype=int).reshape(-1, 2)


def radii(topology: Any) -> np.ndarray:
    """Covalent radius of each atom in nm, ``(n_atoms,)``."""
    symbols = ["" if a.element is None else str(a.element.symbol).upper() for a in topology.atoms]
    return np.array([RADII.get(s, OTHER) for s in symbols])


def bond_lengths(trajectory: Any, pairs: np.ndarray | None = None) -> np.ndarray:
    """Lengths of bonds in nm, ``(n, b)``, without regard to images."""
    pairs = bond_indices(trajectory.topology) if pairs is None else pairs
    xyz = trajectory.xyz.astype(np.float64)
    return np.linalg.norm(xyz[:, pairs[:, 0]] - xyz[:, pairs[:, 1]], axis=2)


def expected_lengths(topology: Any, pairs: np.ndarray | None = None) -> np.ndarray:
    """Lengths in nm that the elements of bonded atoms lead to expect, ``(b,)``."""
    pairs = bond_indices(topology) if pairs is None else pairs
    return radii(topology)[pairs].sum(1)


def check_coordinates(trajectory: Any, source: str, first: int = 0, stride: int = 1) -> None:
    """Check that coordinates are finite, in nanometres, and in the topology's order.

    Parameters
    ----------
    trajectory
        An mdtraj ``Trajectory``.
    source
        Where it is from, for messages.
    first
        How many kept frames came before these.
    stride
        Between the frames that were kept, for the frame's number in the file.

    Raises
    ------
    DataError
        With the frame and the remedy.
    """
    finite = np.isfinite(trajectory.xyz).all((1, 2))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        at = np.argwhere(~np.isfinite(trajectory.xyz[bad[0]]))[0]
        raise DataError(
            f"{source} has coordinates that are not finite in {len(bad)} of {len(trajectory)} frames, first in frame "
            f"{(first + bad[0]) * stride}, atom {trajectory.topology.atom(int(at[0]))}. The simulation blew up or the "
            "file is damaged: cut it before that frame."
        )
    pairs = bond_indices(trajectory.topology)
    if not len(pairs):
        return
    some = trajectory[:: max(1, len(trajectory) // 20)]
    ratio = _lengths_over_expected(some, pairs)
    typical = float(np.median(ratio))
    # A mistaken unit is one factor for all; another order of atoms makes lengths of all kinds.
    alike = float((np.abs(np.log(np.maximum(ratio, 1e-6) / max(typical, 1e-6))) < np.log(1.6)).mean())
    if alike > 0.8 and not 1.0 / SCALE < typical < SCALE:
        length = float(np.median(bond_lengths(some, pairs)))
        what = "angstrom" if typical > SCALE else "a unit ten times too large (nanometres divided by ten again)"
        remedy = "Read it with unit='angstrom' (--unit angstrom)" if typical > SCALE else "Multiply them by ten"
        if not (SCALE < typical < 100.0 / SCALE or SCALE / 100.0 < typical < 1.0 / SCALE):
            what, remedy = "no known unit", "Look at the file: its atoms may be in another order than the topology's"
        raise DataError(
            f"The unit of {source} is mistaken: half of its bonds are longer than {length:.3g} nm, {typical:.2g} times "
            f"what their elements say, so that its coordinates are in {what}. {remedy}."
        )
    wild = float((np.abs(np.log(np.maximum(ratio, 1e-6))) > np.log(1.6)).mean())
    # Bonds across an oblique box are long here too; a mistaken order makes most lengths wild, in any frame.
    oblique = trajectory.unitcell_lengths is not None and not np.allclose(trajectory.unitcell_angles, 90.0)
    if wild > 0.3 and not oblique:
        raise DataError(
            f"{source} does not match its topology: {wild:.0%} of the topology's bonds have lengths that their "
            "elements do not allow. The number of atoms fits and their order does not: use the topology from which the "
            "trajectory was written."
        )


def _lengths_over_expected(trajectory: Any, pairs: np.ndarray) -> np.ndarray:
    lengths = bond_lengths(trajectory, pairs)
    box = trajectory.unitcell_lengths
    if box is not None and np.allclose(trajectory.unitcell_angles, 90.0):
        xyz = trajectory.xyz.astype(np.float64)
        apart = xyz[:, pairs[:, 0]] - xyz[:, pairs[:, 1]]
        wide = np.where(box > 0, box, np.inf)[:, None, :]
        turns = np.where(np.isfinite(wide), np.round(apart / wide), 0.0)
        apart = apart - turns * np.where(np.isfinite(wide), wide, 0.0)
        lengths = np.linalg.norm(apart, axis=2)
    return lengths / expected_lengths(trajectory.topology, pairs)


def made_whole(trajectory: Any, source: str) -> Any:
    """Put molecules that a periodic box has split together again.

    Parameters
    ----------
    trajectory
        An mdtraj ``Trajectory`` in nanometres.
    source
        Where it is from, for messages.

    Returns
    -------
    mdtraj.Trajectory
        The same where nothing is split.

    Raises
    ------
    DataError
        If molecules are split and there is no box, or they are split still.
    """
    pairs = bond_indices(trajectory.topology)
    if not len(pairs) or not (bond_lengths(trajectory, pairs) > BROKEN).any():
        return trajectory
    split = (bond_lengths(trajectory, pairs) > BROKEN).any(1)
    if trajectory.unitcell_vectors is not None:
        # Bonds sorted from the first atom of each molecule outwards, which the walk over images relies on.
        trajectory = trajectory.make_molecules_whole(inplace=False, sorted_bonds=_outwards(trajectory.topology))
        split = (bond_lengths(trajectory, pairs) > BROKEN).any(1)
        if not split.any():
            return trajectory
    frame = int(np.flatnonzero(split)[0])
    worst = int(bond_lengths(trajectory[frame], pairs)[0].argmax())
    a, b = (trajectory.topology.atom(int(i)) for i in pairs[worst])
    length = float(bond_lengths(trajectory[frame], pairs)[0].max())
    why = "it holds no box to make them whole by" if trajectory.unitcell_vectors is None else "its box does not help"
    raise DataError(
        f"Molecules in {source} are split, by a periodic box or by another order of the atoms: the bond {a}-{b} is "
        f"{length:.3g} nm long in a frame, {int(split.sum())} of {len(trajectory)} frames have such bonds, and {why}. "
        "Make molecules whole with the program that wrote it: gmx trjconv -pbc whole, or autoimage in cpptraj."
    )


def _outwards(topology: Any) -> np.ndarray:
    """Bonds in the order in which a walk from each molecule's first atom meets them, ``(b, 2)``."""
    near: dict[int, list[int]] = {a.index: [] for a in topology.atoms}
    for a, b in bond_indices(topology).tolist():
        near[a].append(b)
        near[b].append(a)
    seen: set[int] = set()
    order = []
    for start in near:
        if start in seen:
            continue
        seen.add(start)
        queue = [start]
        for here in queue:
            for there in near[here]:
                if there not in seen:
                    seen.add(there)
                    order.append((here, there))
                    queue.append(there)
    return np.array(order, dtype=np.int32).reshape(-1, 2)
