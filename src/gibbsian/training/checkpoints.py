"""Checkpoints: the last good states of a run, in memory for rollbacks and, with a folder, on disk for resuming.

A file is written beside its final name, flushed to the disk, and then renamed, so that under a final name there is
always a whole checkpoint. It is read with ``torch.load(weights_only=True)``: reading one runs no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from gibbsian.energies.base import Energy
from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.objectives.base import Batch
from gibbsian.training.feed import Feed, MemoryFeed, brief
from gibbsian.training.settings import TrainingSettings
from gibbsian.training.state import FORMAT, State, restore_module

FREE = ("steps", "keep_checkpoints", "tensorboard", "max_rollbacks")
"""Settings that may change when a run is resumed."""

LATER = {"lanes": "1", "precision": "'float32'", "sharding": "'none'"}
"""Settings that older checkpoints do not tell, and what they were."""


class Checkpoints:
    """The last good states of a run.

    Two regular ones (at multiples of ``checkpoint_every``) are held in memory: if the newer one was itself already on
    its way down, the older is there to go back to.

    Parameters
    ----------
    settings
        Of the run.
    folder
        Of the run, or ``None`` to keep checkpoints in memory only.
    marks
        The run's `fingerprint`, stored in every checkpoint and compared when one is taken up.
    """

    def __init__(self, settings: TrainingSettings, folder: Path | None, marks: Mapping[str, str]) -> None:
        self.every, self.marks = settings.checkpoint_every, dict(marks)
        self.files = None if folder is None else CheckpointFolder(folder, self.every, settings.keep_checkpoints)
        self.good: list[State] = []

    def is_regular(self, step: int) -> bool:
        """Whether a checkpoint is due at this step."""
        return step % self.every == 0

    def save(self, state: State) -> None:
        """Keep a state, in memory if it is a regular one, and on disk if there is a folder."""
        step = state["step"]
        if self.is_regular(step):
            self.good = [*(s for s in self.good if s["step"] < step), state][-2:]
        if self.files is not None:
            self.files.save({**state, "fingerprint": self.marks})

    def rollback_target(self, last_target: int) -> State:
        """Choose the state to go back to: the newest, or the one before if the newest was gone back to already."""
        if len(self.good) > 1 and self.good[-1]["step"] == last_target:
            self.good.pop()
        return self.good[-1]

    def take_up(self) -> State | None:
        """Read the newest checkpoint of the folder, and the regular ones before it, for rollbacks.

        Raises
        ------
        OptionError
            If it is of another run.
        ModelFileError
            If there are checkpoints and none can be read.
        """
        newest: State | None = None
        for state in self.files.read() if self.files is not None else ():
            if newest is None:
                require_same(state["fingerprint"], self.marks, state["step"])
                newest = state
            if self.is_regular(state["step"]):
                self.good.insert(0, state)
            if len(self.good) == 2:
                break
        if newest is not None and not self.good:
            self.good = [newest]
        return newest

    @property
    def last_file(self) -> Path | None:
        """The newest file, if there is one."""
        return None if self.files is None else next(reversed(self.files.paths().values()), None)


class CheckpointFolder:
    """The checkpoint files of one run, ``<folder>/checkpoints/step-0000500.pt``.

    Parameters
    ----------
    folder
        Of the run; made when it is missing.
    every
        Steps between regular checkpoints. Others (at an interrupt, at the end) are kept only while they are the newest.
    keep
        Regular checkpoints that are kept.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder / "checkpoints", every, keep

    def paths(self) -> dict[int, Path]:
        """Files by step, oldest first."""
        found = {int(p.stem[5:]): p for p in self.folder.glob("step-*.pt") if p.stem[5:].isdigit()}
        return dict(sorted(found.items()))

    def save(self, state: State) -> None:
        """Write a checkpoint, whole or not at all, and remove those that are no longer needed.

        Later ones are among these: they were left behind by a rollback.

        Raises
        ------
        StorageError
            If it cannot be written; earlier checkpoints are untouched.
        """
        step: int = state["step"]
        path = self.folder / f"step-{step:07d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, state)
        except (OSError, RuntimeError) as error:
            last = next(reversed(self.paths().values()), None)
            saved = f"The last good checkpoint is {last}" if last else "No checkpoint has been saved yet"
            raise StorageError(
                f"The checkpoint of step {step} could not be written to {path} ({error}). {saved}. Free some space or "
                "choose a folder that can be written to; resume=True goes on from the last good checkpoint."
            ) from error
        paths = self.paths()
        regular = [s for s in paths if s % self.every == 0 and s <= step][-self.keep :]
        for s, old in paths.items():
            if s != step and s not in regular:
                with contextlib.suppress(OSError):
                    old.unlink()

    def read(self) -> Iterator[State]:
        """Read checkpoints, newest first; one that cannot be read is passed over, with a warning.

        Raises
        ------
        ModelFileError
            If there are files and none can be read.
        """
        paths = list(reversed(self.paths().values()))
        problems = []
        for path in paths:
            try:
                state = read_whole(path)
            except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                problems.append(f"{path} cannot be read ({reason})")
                if len(problems) < len(paths):
                    warnings.warn(f"{problems[-1]}; using the one before it.", RuntimeWarning, stacklevel=4)
            else:
                yield state
        if problems and len(problems) == len(paths):
            raise ModelFileError(f"No checkpoint of the run is whole: {'; '.join(problems)}.")


def read_whole(path: Path) -> State:
    """Read a checkpoint, after its checksums, which torch writes but does not compare.

    Raises
    ------
    OSError, RuntimeError, ValueError, UnpicklingError, BadZipFile
        If it is not whole, or not a checkpoint.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"it is no checkpoint of format {FORMAT}")
    return state


def write_whole(path: Path, state: State) -> None:
    """Write a file such that under its name there is, at any moment, the old content or the new, whole."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    with contextlib.suppress(OSError):  # some systems do not let a folder be opened; there, renames are durable
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint(
    data: Feed | Batch, energy: nn.Module, objective: nn.Module, settings: TrainingSettings
) -> dict[str, str]:
    """Describe what a run is of, by name, so that a resumed run can tell what differs."""
    marks = (MemoryFeed(data, len(data)) if isinstance(data, Batch) else data).marks()
    for owner, module in (("energy", energy), ("objective", objective)):
        for path, part in module.named_modules(prefix=owner):
            marks[path] = type(part).__name__
            marks |= {f"{path}.{name}": value for name, value in _settings_of(part).items()}
        marks |= {f"{owner}.{name}": brief(p) for name, p in module.named_parameters()}
    marks |= {name: repr(value) for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    return marks


def require_same(saved: Mapping[str, str], now: Mapping[str, str], step: int) -> None:
    """Refuse to resume another run.

    Raises
    ------
    OptionError
        Naming what differs.
    """
    saved = {**LATER, **saved}
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        told = "; ".join(f"{n} was {saved.get(n, 'absent')}, now {now.get(n, 'absent')}" for n in names[:5])
        more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
        raise OptionError(
            f"The run saved at step {step} cannot go on with something else: {told}{more}. Resume with what it was "
            f"started with (free to change: {', '.join(FREE)}), or start anew in another folder."
        )


def load_weights(energy: nn.Module, folder: str | Path, *, average: bool = True) -> int:
    """Load the weights of the newest readable checkpoint of a run into an energy.

    Parameters
    ----------
    energy
        Built like the one that was trained; changed in place.
    folder
        Of the run.
    average
        Take the averaged weights, as `fit` returns them, instead of those of the last step.

    Returns
    -------
    int
        The step of the checkpoint.

    Raises
    ------
    ModelFileError
        If no checkpoint can be read, or it is of another energy.
    """
    energy = Energy.of(energy)
    for state in CheckpointFolder(Path(folder), 1, 2).read():
        restore_module(energy, state["energy"])
        if average:
            for name, p in energy.named_parameters():
                if f"energy.{name}" in state["average"]:
                    p.detach().copy_(state["average"][f"energy.{name}"])
        return state["step"]
    raise ModelFileError(f"There is no checkpoint in {Path(folder) / 'checkpoints'}.")


def _settings_of(owner: object) -> dict[str, str]:
    """Read the plain values that an object was made with: attributes named like arguments of its constructor."""
    told = {}
    for name in inspect.signature(type(owner).__init__).parameters:
        value = _plain(vars(owner).get(name))
        if value is not None:
            told[name] = value
    return told


def _plain(value: object) -> str | None:
    """Write a plain value, a dataclass of such or a tuple of either; ``None`` for anything else."""
    parts = value if isinstance(value, tuple) else (value,)
    if all(isinstance(part, (bool, int, float, str)) for part in parts):
        return repr(value)
    if isinstance(value, tuple):
        written = [_plain(part) for part in value]
        return None if None in written else f"({', '.join(map(str, written))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(f'{k}={v}' for k, v in _settings_of(value).items())})"
    return None
