"""Structures from files, with what their coordinates may be wrong in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import DataError
from gibbsian.molecules.extras import require_openmm

LONGEST_BOND = 0.3
"""Nanometres; bonds of proteins are 0.21 at most, between sulphurs."""


def read_structure(path: Path) -> tuple[Any, np.ndarray]:
    """Read a structure and look at its coordinates.

    Parameters
    ----------
    path
        A ``.pdb``, ``.cif`` or ``.mmcif`` file.

    Returns
    -------
    The ``openmm.app.Topology``, and coordinates in nanometres, ``(atoms, 3)``.

    Raises
    ------
    DataError
        If there is no such file, it cannot be read, or its coordinates are not finite, not in angstroms, or those of a
        molecule in pieces.
    """
    app = require_openmm().app
    if not path.is_file():
        raise DataError(f"There is no file {path}. A structure is a .pdb, .cif or .mmcif file.")
    kinds = {".pdb": app.PDBFile, ".ent": app.PDBFile, ".cif": app.PDBxFile, ".mmcif": app.PDBxFile}
    if path.suffix.lower() not in kinds:
        raise DataError(f"A structure is a .pdb, .cif or .mmcif file; got {path}.")
    try:
        file = kinds[path.suffix.lower()](str(path))
        topology, positions = file.topology, in_nanometres(file.positions)
    except Exception as error:
        raise DataError(f"{path} cannot be read as a structure: {error}") from error
    if not len(positions):
        raise DataError(f"{path} holds no atoms.")
    if (bad := int((~np.isfinite(positions)).any(1).sum())) > 0:
        raise DataError(f"{bad} of {len(positions)} atoms in {path} have coordinates that are not finite.")
    _check_bonds(topology, positions, path)
    return topology, positions


def in_nanometres(positions: Any) -> np.ndarray:
    """Quantities of vectors as numbers, in nanometres."""
    unit = require_openmm().unit
    return np.array(positions.value_in_unit(unit.nanometer), dtype=np.float64).reshape(-1, 3)


def _check_bonds(topology: Any, positions: np.ndarray, path: Path) -> None:
    """Refuse lengths of bonds that tell of another unit, or of a molecule in pieces."""
    bonds = list(topology.bonds())
    ends = np.array([(a.index, b.index) for a, b in bonds], dtype=int).reshape(-1, 2)
    lengths = np.linalg.norm(positions[ends[:, 0]] - positions[ends[:, 1]], axis=1)
    if len(lengths) and not 0.06 < float(np.median(lengths)) < 0.3:
        raise DataError(
            f"Bonds in {path} have a median length of {10 * float(np.median(lengths)):.3g} angstroms, and 1 to 1.5 is "
            "usual: the coordinates are in another unit. PDB files are in angstroms, ten to a nanometre."
        )
    if (torn := lengths > LONGEST_BOND).any():
        (a, b), length = bonds[int(torn.argmax())], 10 * float(lengths[torn.argmax()])
        raise DataError(
            f"{int(torn.sum())} bonds in {path} are longer than {10 * LONGEST_BOND:g} angstroms, such as {length:.1f} "
            f"between {a.residue.name}{a.residue.id} {a.name} and {b.residue.name}{b.residue.id} {b.name}: a periodic "
            "box splits the molecule (make it whole, for example with mdtraj's image_molecules), or residues are "
            "missing in between (model them, or end the chain there with TER)."
        )
