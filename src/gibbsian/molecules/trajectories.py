"""Structures and trajectories from files, read by mdtraj and checked before anything is learned from them.

Topologies: PDB, mmCIF, GRO, AMBER's prmtop, CHARMM's PSF (mdtraj's formats), and GROMACS's and AMBER's ``.top`` by
OpenMM. Trajectories: DCD, XTC, TRR, NetCDF, multi-model PDB and what else mdtraj reads. Lengths are in nanometres and
times in picoseconds, as in mdtraj.

`MDTraj: a modern open library for the analysis of molecular dynamics trajectories (McGibbon et al., 2015)
<https://doi.org/10.1016/j.bpj.2015.08.015>`_.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.completeness import check_complete, check_gaps, without_gap_bonds
from gibbsian.molecules.extras import require_mdtraj
from gibbsian.molecules.geometry import check_coordinates, made_whole
from gibbsian.molecules.topologies import STRUCTURES, brief, check_there, ending_of, read_topology, selected_atoms, told

CHUNK = 1000
"""Frames read at once."""


def read_structure(path: str | Path, **options: Any) -> Any:
    """Read a structure, or every model of one, from a PDB, mmCIF or GRO file; the options of `read_trajectory`."""
    return read_trajectory(path, None, **options)


def read_trajectory(
    files: str | Path | Sequence[str | Path],
    topology: str | Path | Any | None = None,
    *,
    atoms: str | None = None,
    stride: int = 1,
    unit: str = "nanometre",
    incomplete: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Read a trajectory, in chunks, and check it.

    Parameters
    ----------
    files
        One trajectory or several that continue each other; or structures with coordinates of their own.
    topology
        A file, or an mdtraj ``Topology`` for the atoms that are in the trajectory. May be left out for structures.
    atoms
        Which atoms to keep, in mdtraj's language of selections: ``"protein"``, ``"chainid 0 and not element H"``.
    stride
        Keep every so-manieth frame.
    unit
        Of the coordinates: ``"nanometre"`` (as mdtraj gives them, whatever the format), or ``"angstrom"`` for files
        whose writer forgot to convert.
    incomplete
        Take residues that lack backbone atoms, and chains with gaps, as they are.
    progress
        Called with the number of frames just read.

    Returns
    -------
    mdtraj.Trajectory
        With molecules made whole where a periodic box had split them.

    Raises
    ------
    DataError
        If a file cannot be read or holds no frames, the atoms are not those of the topology, coordinates are not
        finite, bonds show that the unit is mistaken or the atoms are in another order, molecules are split without a
        box to make them whole by, or residues are incomplete.
    OptionError
        If an option is out of its range, or nothing is selected.
    MissingPackageError
        If mdtraj is not installed.
    """
    parts = []
    for part in trajectory_chunks(files, topology, atoms=atoms, stride=stride, unit=unit, incomplete=incomplete):
        parts.append(part)
        if progress is not None:
            progress(len(part))
    return parts[0] if len(parts) == 1 else require_mdtraj().join(parts, check_topology=False)


def trajectory_chunks(
    files: str | Path | Sequence[str | Path],
    topology: str | Path | Any | None = None,
    *,
    atoms: str | None = None,
    stride: int = 1,
    chunk: int = CHUNK,
    unit: str = "nanometre",
    incomplete: bool = False,
) -> Iterator[Any]:
    """Read a trajectory that need not fit the memory, chunk by chunk, each one checked as by `read_trajectory`.

    Parameters
    ----------
    files, topology, atoms, stride, unit, incomplete
        As in `read_trajectory`.
    chunk
        Frames held at once.

    Yields
    ------
    mdtraj.Trajectory
        Of up to ``chunk`` frames.

    Raises
    ------
    DataError, OptionError, MissingPackageError
        As in `read_trajectory`.
    """
    require_mdtraj()
    paths = [Path(f) for f in ([files] if isinstance(files, (str, Path)) else files)]
    if not paths or stride < 1 or chunk < 1:
        raise OptionError(f"Reading takes one file or more, stride and chunk of 1 or more; got {paths}, {stride}.")
    if unit not in ("nanometre", "angstrom"):
        raise OptionError(f"unit is 'nanometre' or 'angstrom'; got {unit!r}.")
    for path in paths:
        check_there(path)
    whole = _topology_for(paths, topology)
    kept = selected_atoms(whole, atoms)
    if not incomplete:
        check_complete(whole if kept is None else whole.subset(kept), str(topology or paths[0]))
    seen, mended = 0, None
    for path in paths:
        for part in _frames(path, whole, kept, stride, chunk):
            if unit == "angstrom":
                part.xyz = part.xyz * 0.1
            check_coordinates(part, str(path), first=seen, stride=stride)
            if not seen and not incomplete:
                check_gaps(part, str(topology or path))
            elif not seen:
                mended = without_gap_bonds(part)
            if mended is not None:
                part.topology = mended
            seen += len(part)
            yield made_whole(part, str(path))
    if not seen:
        raise DataError(f"{', '.join(map(str, paths))} holds no frames.")


def _topology_for(paths: list[Path], topology: Any) -> Any:
    if topology is None:
        if ending_of(paths[0]) not in (*STRUCTURES, ".h5", ".hdf5"):
            raise OptionError(
                f"{paths[0]} holds coordinates alone: give the topology they belong to, such as top.pdb before it."
            )
        return read_topology(paths[0])
    return read_topology(topology) if isinstance(topology, (str, Path)) else topology


def _frames(path: Path, topology: Any, kept: np.ndarray | None, stride: int, chunk: int) -> Iterator[Any]:
    """Frames of one file, after a look at whether its atoms can be those of the topology."""
    md = require_mdtraj()
    ending = ending_of(path)
    if ending in STRUCTURES:
        try:
            found = md.load(str(path))
        except Exception as error:
            raise DataError(f"{path} cannot be read: {brief(error)}") from error
        _check_atoms(path, found.n_atoms, topology)
        found = md.Trajectory(found.xyz, topology, found.time, found.unitcell_lengths, found.unitcell_angles)
        found = found if kept is None else found.atom_slice(kept)
        for start in range(0, len(found), chunk * stride):
            yield found[start : start + chunk * stride : stride]
        return
    _check_atoms(path, _atoms_in(path), topology)
    _warn_if_cut(path)
    frames = iter(md.iterload(str(path), top=topology, chunk=chunk, stride=stride, atom_indices=kept))
    try:
        while True:
            with silent():
                part = next(frames, None)
            if part is None:
                return
            yield part
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        if isinstance(error, (DataError, OptionError)):
            raise
        raise DataError(f"{path} cannot be read to its end: {brief(error)}") from error


def _atoms_in(path: Path) -> int | None:
    """Atoms per frame of a trajectory file, where its format tells."""
    md = require_mdtraj()
    try:
        with silent(), md.open(str(path)) as file:
            if hasattr(file, "n_atoms") and not callable(file.n_atoms):
                return int(file.n_atoms)
            first = file.read(1)
            xyz = first[0] if isinstance(first, tuple) else first
            return int(np.asarray(getattr(xyz, "coordinates", xyz)).shape[1])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a trajectory: {brief(error)}. It may be cut off, or of another format than its "
            "ending says."
        ) from error


def _warn_if_cut(path: Path) -> None:
    """Say when a DCD file tells of more frames than it holds; its reader takes what is there without a word."""
    if ending_of(path) != ".dcd":
        return
    with open(path, "rb") as file:
        head = file.read(12)
    told = int.from_bytes(head[8:12], "little") if head[4:8] == b"CORD" else 0
    with silent(), require_mdtraj().open(str(path)) as file:
        found = len(file)
    if 0 < found < told < 2**31:
        warnings.warn(
            f"{path} is cut off: its head tells of {told} frames, and {found} are there, which are read.",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_atoms(path: Path, found: int | None, topology: Any) -> None:
    if found is None or found == topology.n_atoms:
        return
    remedy = "Give the topology from which the trajectory was written"
    protein = topology.select("protein")
    sizes = np.cumsum([chain.n_atoms for chain in topology.chains])
    if found == len(protein):
        remedy = "They are as many as the protein's: write a topology of these, as in top.atom_slice(protein), or"
        remedy += " mdconvert with --atoms"
    elif found in sizes:
        remedy = f"They are as many as those of the first {int(np.searchsorted(sizes, found)) + 1} chains: the rest is"
        remedy += " missing from the trajectory; take them out of the topology"
    raise DataError(
        f"{path} does not match its topology: it has {found} atoms in a frame, and the topology {topology.n_atoms}: "
        f"{told(topology)}. {remedy}."
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what the reader of DCD files prints about every file from the terminal; it writes past Python's streams."""
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    sys.stdout.flush()
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        if libc is not None:
            libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
