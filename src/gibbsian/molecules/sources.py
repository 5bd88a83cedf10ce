"""Where frames and their weights come from: a simulation's folder, or trajectories and a table of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.reweighting import (
    FEW,
    bias_log_weights,
    checked_weights,
    normalised_weights,
    temperature_log_weights,
)
from gibbsian.molecules.thermal import checked_temperature
from gibbsian.molecules.trajectories import read_trajectory

SIMULATION = ("topology.pdb", "trajectory.dcd", "frames.csv", "simulation.json")
"""Files of a folder that ``gibbsian protein simulate`` made."""

ROOM_TEMPERATURE = 300.0
"""In kelvin, where nothing tells another."""


@dataclass(frozen=True)
class Frames:
    """A trajectory with weights.

    Attributes
    ----------
    trajectory
        An mdtraj ``Trajectory``.
    weights
        Towards the Boltzmann law at ``temperature``, ``(n,)``, that sum to one.
    temperature
        In kelvin.
    weighted
        Whether the weights differ.
    name
        Of what was read, for titles.
    bias
        The bias of metadynamics, where its table is there.
    """

    trajectory: Any
    weights: Tensor
    temperature: float
    weighted: bool
    name: str
    bias: TorsionBias | None = None


@dataclass(frozen=True)
class TorsionBias:
    """The bias under which frames were drawn, as a function of two torsions.

    Attributes
    ----------
    table
        In kJ/mol, ``(m, m)``, at ``-180 + 360 i / m`` degrees of phi along the first axis and of psi along the second.
    phi, psi
        The four atoms of each.
    """

    table: np.ndarray
    phi: tuple[int, ...]
    psi: tuple[int, ...]


def read_frames(
    files: Sequence[str | Path],
    weights: str | Path | None = None,
    temperature: float | None = None,
    to: float | None = None,
    **reading: Any,
) -> Frames:
    """Read frames.

    Parameters
    ----------
    files
        The folder of a simulation; or a topology and one trajectory or more; or one structure of several models.
    weights
        A table as `read_weights` reads it; a simulation's own when left out, else all frames weigh the same.
    temperature
        In kelvin; the simulation's, or 300, when left out.
    to
        Another temperature to weigh the frames to, in kelvin; the table of weights then needs a column
        ``potential_kj_mol``, and the frames must be worth `FEW` there.
    reading
        Options of `gibbsian.molecules.trajectories.read_trajectory`; frames of weight 0 are kept.

    Raises
    ------
    DataError, OptionError, MissingPackageError
        If something is missing, cannot be read, or does not fit.
    """
    if not files:
        raise OptionError("Give a simulation's folder, or a topology and a trajectory: top.pdb traj.dcd.")
    first = Path(files[0])
    if first.is_dir():
        if len(files) > 1:
            raise OptionError(f"{first} is a simulation's folder and stands alone; got {len(files)} arguments.")
        return _of_simulation(first, weights, temperature, to, reading)
    if to is not None and weights is None:
        raise OptionError("Weighing to another temperature takes a table of potential_kj_mol: --weights FILE.csv.")
    stride = int(reading.get("stride", 1))
    if len(files) == 1:
        trajectory = read_trajectory(first, None, **reading)
    else:
        trajectory = read_trajectory([Path(f) for f in files[1:]], first, **reading)
    kelvin = checked_temperature(ROOM_TEMPERATURE if temperature is None else temperature)
    n = len(trajectory)
    w = read_weights(weights, n, kelvin, stride, to) if weights else checked_weights(None, n)
    return Frames(trajectory, w, to or kelvin, weights is not None, Path(files[-1]).stem)


def read_weights(path: str | Path, n: int, temperature: float, stride: int = 1, to: float | None = None) -> Tensor:
    """Read weights of n frames from a CSV file, ``(n,)`` float64 that sum to one.

    Parameters
    ----------
    path
        With a column ``weight``, ``log_weight`` (nats) or ``bias_kj_mol``; the first of these that is there counts.
    n
        How many frames were kept.
    temperature
        In kelvin, for biases.
    stride
        Between kept frames: of a table with a line per frame of the file the same ones are kept.
    to
        As in `read_frames`; without a column of weights all frames weigh the same before.

    Raises
    ------
    DataError
        If the file cannot be read, has no such column, another number of lines, or holds no weights.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"The weights in {path} cannot be read: {error}") from error
    name = next((c for c in ("weight", "log_weight", "bias_kj_mol") if c in table.columns), None)
    wanted = [] if to is None else ["potential_kj_mol"]
    if (name is None and to is None) or any(c not in table.columns for c in wanted):
        lacks = "potential_kj_mol" if wanted else "weight, log_weight or bias_kj_mol"
        columns = ", ".join(map(str, table.columns))
        raise DataError(f"{path} has no column {lacks}; its columns are {columns}.")

    def column(which: str) -> Tensor:
        return torch.tensor(_kept(path, table[which], n, stride))

    if name is None:
        log_w = torch.zeros(n, dtype=torch.float64)
    elif name == "weight":
        log_w = checked_weights(column(name), n).log()
    else:
        log_w = column(name) if name == "log_weight" else bias_log_weights(column(name), temperature)
    if to is None:
        return normalised_weights(log_w)
    return normalised_weights(log_w + temperature_log_weights(column("potential_kj_mol"), temperature, to), fewest=FEW)


def _kept(path: str | Path, column: Any, n: int, stride: int) -> np.ndarray:
    """The numbers of a column at the frames that were kept."""
    import pandas as pd

    numbers: Any = pd.to_numeric(column, errors="coerce")
    values = np.array(numbers, dtype=np.float64)
    if len(values) != n and len(values[::stride]) == n:
        values = values[::stride]
    if len(values) != n:
        raise DataError(
            f"{path} has {len(values)} lines and there are {n} frames: a table of weights has a line for each frame, "
            "in their order."
        )
    return values


def _of_simulation(
    folder: Path, weights: str | Path | None, temperature: float | None, to: float | None, reading: dict[str, Any]
) -> Frames:
    missing = [name for name in SIMULATION if not (folder / name).is_file()]
    if missing:
        unfinished = (folder / "partial").exists()
        raise DataError(
            f"{folder} is no finished simulation: it lacks {', '.join(missing)}. "
            + ("It was interrupted: go on with it, gibbsian protein simulate ... --resume." if unfinished else "")
            + ("" if unfinished else "Make one with gibbsian protein simulate, or name files: top.pdb traj.dcd.")
        )
    try:
        record = json.loads((folder / "simulation.json").read_text())
        kelvin = float(record["temperature_k"]) if temperature is None else temperature
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'simulation.json'} is damaged: {error}.") from error
    trajectory = read_trajectory(folder / "trajectory.dcd", folder / "topology.pdb", **reading)
    kelvin, stride = checked_temperature(kelvin), int(reading.get("stride", 1))
    _take_times(trajectory, folder / "frames.csv", stride)
    w = read_weights(weights or folder / "frames.csv", len(trajectory), kelvin, stride, to)
    weighted = bool(w.max() > w.min())
    # Atoms that are selected are counted anew, and the table's torsions would be others; so would other weights.
    own = weights is None and to is None and reading.get("atoms") is None
    bias = _bias_of(folder, record) if weighted and own else None
    return Frames(trajectory, w, to or kelvin, weighted, str(record.get("molecule", folder.name)), bias)


def _take_times(trajectory: Any, path: Path, stride: int) -> None:
    """Give frames the times of their table, for a DCD file has none."""
    import pandas as pd

    times = pd.read_csv(path).get("time_ps")
    if times is not None and len(times[::stride]) == len(trajectory):
        trajectory.time = np.array(times[::stride], dtype=np.float32)


def _bias_of(folder: Path, record: dict[str, Any]) -> TorsionBias | None:
    """The table of metadynamics, where there is one."""
    if not (folder / "bias.npz").is_file() or not record.get("torsions"):
        return None
    try:
        with np.load(folder / "bias.npz") as kept:
            table = np.array(kept["bias_kj_mol"], dtype=np.float64)
        phi, psi = (tuple(int(i) for i in record["torsions"][name]) for name in ("phi", "psi"))
        if table.ndim != 2 or table.shape[0] != table.shape[1] or not np.isfinite(table).all():
            raise ValueError(f"a table of shape {table.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'bias.npz'} is damaged: {error}. The weights are in frames.csv.") from error
    # The last row and column are the first again.
    return TorsionBias(table[:-1, :-1], phi, psi)
