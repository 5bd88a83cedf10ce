"""Checkpoints: the last good states of a run, in memory for rollbacks and, with a folder, on disk for resuming."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from gibbsian.energies.base import Energy
from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.objectives.base import Batch
from gibbsian.processes import world
from gibbsian.training.checkpoint_folder import GRACE, CheckpointFolder
from gibbsian.training.feed import Feed, MemoryFeed, brief
from gibbsian.training.folder_lock import FolderLock
from gibbsian.training.settings import TrainingSettings
from gibbsian.training.state import State, restore_module

FREE = ("steps", "keep_checkpoints", "checkpoint_format", "tensorboard", "max_rollbacks")
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

    Raises
    ------
    OptionError
        If several processes were to write one file.
    """

    def __init__(self, settings: TrainingSettings, folder: Path | None, marks: Mapping[str, str]) -> None:
        self.every, self.marks = settings.checkpoint_every, dict(marks)
        several, told = world().size > 1, settings.checkpoint_format
        if several and told == "file":
            raise OptionError(
                f"checkpoint_format='file' holds what one process has, and there are {world().size}; leave it at "
                "'auto', or choose 'shared'."
            )
        shared = told == "shared" or (told == "auto" and (several or settings.lanes > 1))
        self.files = None
        if folder is not None:
            self.files = CheckpointFolder(folder, self.every, settings.keep_checkpoints, shared=shared)
        self.lock = None if folder is None else FolderLock(folder)
        self.good: list[State] = []

    def __enter__(self) -> Checkpoints:
        if self.lock is not None:
            self.lock.acquire()
        if self.files is not None:
            self.files.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        """Wait until everything is written; a run that broke off does so for a while, and keeps to its own error."""
        try:
            if self.files is not None and error is None:
                self.files.close()
            elif self.files is not None:
                self.files.wait(GRACE)
        except (StorageError, RuntimeError) as failed:
            if error is None:
                raise
            told = isinstance(error, StorageError) or not isinstance(failed, StorageError)
            if not told and world().main:
                warnings.warn(str(failed), RuntimeWarning, stacklevel=2)
        finally:
            if self.lock is not None:
                self.lock.release()

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises
        ------
        StorageError
            If it could not be written.
        """
        if self.files is not None:
            self.files.wait()

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

    def take_up(self, like: State | None = None) -> State | None:
        """Read the newest checkpoint of the folder, and the regular ones before it, for rollbacks.

        Parameters
        ----------
        like
            A state whose sharded tensors tell which shards this process has; without it tensors come whole.

        Raises
        ------
        OptionError
            If it is of another run.
        ModelFileError
            If there are checkpoints and none can be read.
        """
        newest: State | None = None
        for state in self.files.read(like=like) if self.files is not None else ():
            if newest is None:
                require_same(state["fingerprint"], self.marks, state["step"])
                newest = state
            if self.is_regular(state["step"]):
                self.good.insert(0, state)
            if len(self.good) == 2:
                break
        if newest is not None and not self.good:
            self.good = [newest]
        if newest is not None and self.files is not None and world().main:
            # A run that was killed after its last checkpoint, before it removed others, saves no more.
            self.files.tidy(newest["step"])
        return newest

    @property
    def last_file(self) -> Path | None:
        """The newest file or folder, if there is one."""
        return None if self.files is None else next(reversed(self.files.paths().values()), None)


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
    for state in CheckpointFolder(Path(folder), 1, 2).read(only=("energy", "average")):
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
