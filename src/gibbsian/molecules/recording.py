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
    bias: list[float] = field(default_factory=list)

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

    def add(self, positions: np.ndarray, bias: float = 0.0) -> None:
        """Take a frame, ``(atoms, 3)`` in nanometres, and the bias that it was drawn under, in kJ/mol."""
        self.pending.append(positions.astype("<f4"))
        self.bias.append(bias)

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
                bias=np.array(self.bias),
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
                self.bias = kept["bias"].tolist()
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
