"""The files that a simulation leaves: frames, their table, the bias, the structure, the record."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import StorageError
from gibbsian.files import replace_file
from gibbsian.molecules.backbone import torsion_of
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.metadynamics import unbiasing_weights
from gibbsian.molecules.recording import BIAS, FRAMES, SETTINGS, TOPOLOGY, TRAJECTORY, Recording
from gibbsian.molecules.systems import MolecularSystem


def frames_table(
    recording: Recording,
    torsions: tuple[tuple[int, ...], tuple[int, ...]] | None,
    biased: bool,
    temperature: float,
    frame_ps: float,
    discard: float,
) -> Any:
    """Times, torsions, bias and weight of all frames.

    Parameters
    ----------
    recording
        The frames.
    torsions
        Atoms of phi and of psi; ``None`` leaves the columns of torsions out.
    biased
        Whether the bias at each frame makes its weight; frames of a plain simulation weigh 1.
    temperature
        In kelvin.
    frame_ps
        Time between frames.
    discard
        Part of the frames at the start of a biased simulation that weighs nothing.

    Returns
    -------
    A ``pandas.DataFrame``.
    """
    import pandas as pd

    x, count = recording.positions(), recording.frames
    columns: dict[str, np.ndarray] = {"time_ps": frame_ps * np.arange(1, count + 1)}
    angles: list[np.ndarray] = []
    if torsions is not None:
        angles = [np.concatenate([torsion_of(part, t) for part in _parts(x)]) for t in torsions]
        columns |= {"phi_deg": np.degrees(angles[0]), "psi_deg": np.degrees(angles[1])}
    if not biased:
        columns |= {"bias_kj_mol": np.zeros(count), "weight": np.ones(count)}
    else:
        bias = np.array(recording.bias[:count])
        columns |= {"bias_kj_mol": bias, "weight": unbiasing_weights(bias, temperature, discard)}
    return pd.DataFrame(columns)


def finish(
    recording: Recording, molecule: MolecularSystem, table: np.ndarray | None, frames: Any, record: dict[str, Any]
) -> None:
    """Write the files that stay; ``simulation.json``, which says that it is finished, last.

    Parameters
    ----------
    recording
        The frames.
    molecule
        For the topology.
    table
        The last bias, or ``None``.
    frames
        The table of `frames_table`.
    record
        Of ``simulation.json``.

    Raises
    ------
    StorageError
        If they cannot be written; the frames are still there, and resuming writes them again.
    """
    folder = recording.folder
    try:
        write_structure(folder / TOPOLOGY, molecule)
        _write_dcd(folder / TRAJECTORY, recording, molecule, record["settings"]["frame_ps"])
        replace_file(folder / FRAMES, frames.to_csv(index=False, float_format="%.7g").encode())
        if table is not None:
            grid, content = np.linspace(-180.0, 180.0, len(table)), io.BytesIO()
            np.savez(content, phi_deg=grid, psi_deg=grid, bias_kj_mol=table.T)
            replace_file(folder / BIAS, content.getvalue())
        replace_file(folder / SETTINGS, (json.dumps(record, indent=1) + "\n").encode())
        shutil.rmtree(recording.partial)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}. Make room, and resume.") from error


def write_structure(path: Path, molecule: MolecularSystem, positions: np.ndarray | None = None) -> None:
    """Write a structure as PDB: the start's, or other coordinates in nanometres, ``(atoms, 3)``."""
    openmm = require_openmm()
    text = io.StringIO()
    where = molecule.positions if positions is None else positions
    openmm.app.PDBFile.writeFile(molecule.topology, where * openmm.unit.nanometer, text, keepIds=True)
    replace_file(path, text.getvalue().encode())


def _write_dcd(path: Path, recording: Recording, molecule: MolecularSystem, frame_ps: float) -> None:
    openmm = require_openmm()
    step = frame_ps * openmm.unit.picoseconds
    with open(path, "wb") as file:
        dcd = openmm.app.DCDFile(file, molecule.topology, step)
        for frame in recording.positions():
            dcd.writeModel(np.asarray(frame, dtype=np.float64) * openmm.unit.nanometer)


def _parts(x: np.ndarray, size: int = 10_000) -> list[np.ndarray]:
    return [np.asarray(x[i : i + size], dtype=np.float64) for i in range(0, max(len(x), 1), size)]
