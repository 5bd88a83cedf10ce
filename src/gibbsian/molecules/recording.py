"""What a simulation leaves in its folder, and how it goes on after an interruption.

While it runs, frames go to ``partial/``: coordinates are appended to one file, and a checkpoint, replaced whole, says
how many of them count and holds what is needed to go on. At the end they become the files that other programs read::

    topology.pdb       names, bonds and the structure at the start
    trajectory.dcd     frames, readable by mdtraj, VMD, PyMOL, ChimeraX
    frames.csv         time_ps, phi_deg, psi_deg, bias_kj_mol, weight: a line per frame
    bias.npz           with metadynamics: phi_deg, psi_deg, bias_kj_mol
    simulation.json    settings, versions, seconds
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import OptionError, StorageError
from gibbsian.files import replace_file
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.metadynamics import bias_at, unbiasing_weights
from gibbsian.molecules.systems import MolecularSystem, torsion_of

TOPOLOGY, TRAJECTORY, FRAMES, BIAS, SETTINGS = (
    "topology.pdb",
    "trajectory.dcd",
    "frames.csv",
    "bias.npz",
    "simulation.json",
)


@dataclass
class Recording:
    """Frames of a simulation under way.

    Parameters
    ----------
    folder
        Where the simulation is kept.
    atoms
        How many.
    identity
        What a run must share with an interrupted one to go on with it.
    """

    folder: Path
    atoms: int
    identity: dict[str, Any]
    frames: int = 0
    seconds: float = 0.0
    pending: list[np.ndarray] = field(default_factory=list)

    @property
    def partial(self) -> Path:
        """Where it is kept until it is complete."""
        return self.folder / "partial"

    def begin(self) -> None:
        """Make the folder.

        Raises
        ------
        OptionError
            If it holds a simulation already.
        StorageError
            If it cannot be written.
        """
        if (self.folder / SETTINGS).exists():
            raise OptionError(f"{self.folder} holds a finished simulation: choose another folder, or delete it.")
        if self._checkpoint.exists():
            raise OptionError(
                f"{self.folder} holds an interrupted simulation: go on with it (resume=True, or --resume), choose "
                "another folder, or delete it."
            )
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"Nothing can be written to {self.folder}: {error}") from error

    def add(self, positions: np.ndarray) -> None:
        """Take a frame, ``(atoms, 3)`` in nanometres."""
        self.pending.append(positions.astype("<f4"))

    def save(self, state: bytes, step: int, table: np.ndarray | None, seconds: float) -> None:
        """Keep all frames so far and what is needed to go on.

        Parameters
        ----------
        state
            OpenMM's checkpoint.
        step
            Of the integrator.
        table
            The bias, if there is one.
        seconds
            Spent so far.

        Raises
        ------
        StorageError
            If it cannot be written; the checkpoint before stays good.
        """
        try:
            with open(self._coordinates, "ab") as file:
                file.write(b"".join(frame.tobytes() for frame in self.pending))
            self.frames += len(self.pending)
            self.pending.clear()
            content = io.BytesIO()
            np.savez(
                content,
                identity=json.dumps(self.identity),
                state=np.frombuffer(state, np.uint8),
                step=step,
                frames=self.frames,
                seconds=seconds,
                table=np.zeros(0) if table is None else table,
            )
            replace_file(self._checkpoint, content.getvalue())
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be written: {error}. What was saved before is intact.") from error

    def load(self) -> tuple[bytes, int, np.ndarray | None] | None:
        """Take up an interrupted simulation: OpenMM's checkpoint, the step, the bias; ``None`` where there is none.

        Raises
        ------
        OptionError
            If it is finished, or was started with other settings.
        StorageError
            If its files are damaged.
        """
        if not self._checkpoint.exists():
            self.begin()
            return None
        try:
            with np.load(self._checkpoint) as kept:
                identity = json.loads(str(kept["identity"]))
                state, step = kept["state"].tobytes(), int(kept["step"])
                self.frames, self.seconds = int(kept["frames"]), float(kept["seconds"])
                table = kept["table"] if kept["table"].size else None
            size = self.frames * self.atoms * 12
            if self._coordinates.stat().st_size < size:
                raise ValueError(f"{self._coordinates} is shorter than the {self.frames} frames of the checkpoint")
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(
                f"The interrupted simulation in {self.folder} is damaged: {error}. Start anew."
            ) from error
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise OptionError(
                    f"The simulation in {self.folder} was started with {name}={identity.get(name)}, and this one has "
                    f"{value}: resume it with the same settings, or choose another folder."
                )
        # Frames that came after the last checkpoint are made again.
        with open(self._coordinates, "r+b") as file:
            file.truncate(size)
        return state, step, table

    def positions(self) -> np.ndarray:
        """All frames saved, ``(frames, atoms, 3)``, read as they are needed."""
        if not self.frames:
            return np.zeros((0, self.atoms, 3), np.float32)
        return np.memmap(self._coordinates, "<f4", "r", shape=(self.frames, self.atoms, 3))

    @property
    def _checkpoint(self) -> Path:
        return self.partial / "checkpoint.npz"

    @property
    def _coordinates(self) -> Path:
        return self.partial / "positions.f32"


def frames_table(
    recording: Recording,
    torsions: tuple[tuple[int, ...], tuple[int, ...]] | None,
    table: np.ndarray | None,
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
    table
        The last bias; ``None`` for a plain simulation, whose frames weigh 1.
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
    if not angles or table is None:
        columns |= {"bias_kj_mol": np.zeros(count), "weight": np.ones(count)}
    else:
        bias = bias_at(table, *angles)
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
