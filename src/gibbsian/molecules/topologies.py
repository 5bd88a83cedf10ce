"""Which atoms there are and how they are bonded, from files; and selections of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.extras import require_mdtraj, require_openmm

STRUCTURES = (".pdb", ".cif", ".mmcif", ".pdbx", ".gro")
"""Files that hold coordinates besides a topology."""


TOPOLOGIES = (*STRUCTURES, ".prmtop", ".parm7", ".prm7", ".top", ".psf", ".mol2", ".h5", ".hdf5", ".hoomdxml", ".gsd")
"""Endings of the files that `read_topology` reads."""


def read_topology(path: str | Path) -> Any:
    """Read which atoms there are and how they are bonded.

    Parameters
    ----------
    path
        A PDB, mmCIF, GRO, prmtop, PSF or GROMACS .top file; others as mdtraj reads them.

    Returns
    -------
    mdtraj.Topology
        With the standard bonds of amino acids where the file has none.

    Raises
    ------
    DataError
        If the file is not there or cannot be read.
    OptionError
        If its ending is that of no topology.
    MissingPackageError
        If mdtraj is not installed.
    """
    md, path = require_mdtraj(), Path(path)
    ending = ending_of(path)
    check_there(path)
    if ending not in TOPOLOGIES:
        raise OptionError(
            f"{path} is no topology: it ends in {ending or 'nothing'}, and topologies in {', '.join(TOPOLOGIES)}. A "
            "trajectory needs one beside it: top.pdb traj.dcd."
        )
    try:
        topology = _from_top(path) if ending == ".top" else md.load_topology(str(path))
    except Exception as error:
        raise DataError(f"{path} cannot be read as a topology: {brief(error)}") from error
    if not topology.n_atoms:
        raise DataError(f"{path} holds no atoms.")
    if not topology.n_bonds:
        topology.create_standard_bonds()
    return topology


def selected_atoms(topology: Any, atoms: str | None) -> np.ndarray | None:
    """Return the indices of selected atoms; ``None`` for all.

    Raises
    ------
    OptionError
        If the selection cannot be read, or nothing is selected; the message says which chains and residues there are.
    """
    if atoms is None:
        return None
    try:
        kept = topology.select(atoms)
    except Exception as error:
        raise OptionError(
            f"{atoms!r} cannot be read as a selection ({brief(error)}). Examples: 'protein', 'chainid 0', 'name CA', "
            "'resSeq 3 to 20 and not element H'."
        ) from error
    if not len(kept):
        raise OptionError(
            f"The selection {atoms!r} picks none of {topology.n_atoms} atoms. There are {told(topology)}."
        )
    return kept


def told(topology: Any) -> str:
    """Say what a topology holds, chain by chain."""
    chains = []
    for chain in topology.chains:
        residues = [r.name for r in chain.residues]
        names = ", ".join(dict.fromkeys(residues))
        names = names if len(names) < 40 else names[:37] + "..."
        chains.append(f"chain {chain.index} of {chain.n_atoms} atoms ({len(residues)} residues: {names})")
    shown = "; ".join(chains[:6])
    return shown if len(chains) <= 6 else f"{shown}; and {len(chains) - 6} chains more"


def _from_top(path: Path) -> Any:
    """A .top file: AMBER's prmtop by its first word, else GROMACS's by OpenMM."""
    md = require_mdtraj()
    with open(path, encoding="utf-8", errors="replace") as file:
        amber = file.read(8).startswith("%VERSION")
    if amber:
        return md.load_prmtop(str(path))
    app = require_openmm().app
    return md.Topology.from_openmm(app.GromacsTopFile(str(path)).topology)


def check_there(path: Path) -> None:
    """Refuse a file that is not there, by a `DataError`."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")


def ending_of(path: Path) -> str:
    """Ending of a file in small letters, of what is packed where it is packed."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def brief(error: Exception) -> str:
    """What another library says is wrong, in one line that is not too long."""
    words = " ".join(str(error).split())
    return words if len(words) < 200 else words[:197] + "..."
