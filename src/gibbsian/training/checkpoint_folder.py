"""The checkpoints of a run on disk: a file each, or, where several processes have lanes, a folder each.

A file is written beside its final name, flushed to the disk, and then renamed, so that under a final name there is
always a whole checkpoint. It is read with ``torch.load(weights_only=True)``: reading one runs no code. Folders are
those of `gibbsian.training.shared_checkpoints`; they are written in the background, while training goes on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.files import flush_folder
from gibbsian.processes import gathered_objects, told_by_main, world
from gibbsian.processes.world import TIMEOUT
from gibbsian.training.state import FORMAT, State

UNREADABLE = (OSError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What reading something that is no whole checkpoint raises."""

SLOWEST = timedelta(hours=1)
"""How long processes wait for one another's writing; one that dies meanwhile is noticed at once."""

GRACE = 10.0
"""Seconds that a run which broke off waits for a checkpoint under way."""

_NAME = re.compile(r"step-(\d{7,})(?:-(\d+))?(\.pt)?")


class CheckpointFolder:
    """The checkpoints of one run: ``checkpoints/step-0000500.pt``, or the folders ``checkpoints/step-0000500-0``.

    The second number of a folder is that of the rollbacks before it: a state that is written anew after a rollback
    cannot take a folder's place in one move, as it can a file's.

    Parameters
    ----------
    folder
        Of the run; made when it is missing.
    every
        Steps between regular checkpoints. Others (at an interrupt, at the end) are kept only while they are the newest.
    keep
        Regular checkpoints that are kept.
    shared
        Write folders. Either kind is read.
    """

    def __init__(self, folder: Path, every: int, keep: int, *, shared: bool = False) -> None:
        self.folder, self.every, self.keep, self.shared = folder / "checkpoints", every, keep, shared
        self.group: Any = None
        self.background = Background()

    def paths(self) -> dict[int, Path]:
        """The newest checkpoint of every step, oldest step first."""
        return {step: path for (step, _), path in sorted(self._found().items())}

    def _found(self) -> dict[tuple[int, int], Path]:
        found: dict[tuple[int, int], Path] = {}
        for path in self.folder.glob("step-*"):
            named = _NAME.fullmatch(path.name)
            # A file has a suffix and no second number, a folder the other way round.
            if named is not None and (named[2] is None) != (named[3] is None):
                found[int(named[1]), -1 if named[2] is None else int(named[2])] = path
        return found

    def open(self) -> None:
        """Prepare to save; every process of the job calls this."""
        # Collectives of the background must not meet those of the training.
        if self.shared and world().size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
            # They meet at once or never, and may take their time over writing.
            dist.distributed_c10d._set_pg_timeout(SLOWEST, self.group)

    def save(self, state: State) -> None:
        """Write a checkpoint, whole or not at all, and remove those that are no longer needed.

        Later ones are among these: they were left behind by a rollback. A folder is written in the background, once
        the one before it is there; the state is not to be changed.

        Raises
        ------
        StorageError
            If it cannot be written, or the one before it could not; earlier checkpoints are untouched.
        """
        if not self.shared:
            path = self.folder / f"step-{state['step']:07d}.pt"
            self._try(path, state, lambda: write_whole(path, state))
            return
        self.wait()
        from gibbsian.training.shared_checkpoints import write_shared

        path = self.folder / f"step-{state['step']:07d}-{state['rollbacks']}"
        self.background.start(lambda: self._try(path, state, lambda: write_shared(path, state, self.group)))

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the checkpoint that is being written.

        Raises
        ------
        StorageError
            If it could not be written.
        """
        self.background.wait(seconds)

    def close(self) -> None:
        """Wait, and give back what saving needed."""
        self.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def _try(self, path: Path, state: State, write: Callable[[], None]) -> None:
        step: int = state["step"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write()
        except (OSError, RuntimeError) as error:
            # What the network says is not about the disk.
            if self.group is not None and not isinstance(error, OSError):
                raise
            last = next(reversed(self.paths().values()), None)
            saved = f"The last good checkpoint is {last}" if last else "No checkpoint has been saved yet"
            raise StorageError(
                f"The checkpoint of step {step} could not be written to {path} ({error}). {saved}. Free some space or "
                "choose a folder that can be written to; resume=True goes on from the last good checkpoint."
            ) from error
        if world().main:
            self.tidy(step)

    def tidy(self, step: int) -> None:
        """Remove what is no longer needed once the checkpoint of a step is there; the first process calls this."""
        path = self.paths().get(step)
        found = self._found()
        regular = [s for s in sorted({s for s, _ in found}) if s % self.every == 0 and s <= step][-self.keep :]
        newest = self.paths()
        for (s, _), old in found.items():
            if old != path and (s == step or s not in regular or old != newest[s]):
                with contextlib.suppress(OSError):
                    _remove(old)

    def read(self, only: Collection[str] = (), like: State | None = None) -> Iterator[State]:
        """Read checkpoints, newest first, with the lanes that this process has; all processes read the same ones.

        One that cannot be read by all of them is passed over, with a warning.

        Parameters
        ----------
        only
            Entries that are asked for, without lanes; all when left out. A file is read whole.
        like
            A state whose sharded tensors tell which shards this process has; without it tensors come whole.

        Raises
        ------
        ModelFileError
            If there are checkpoints and none can be read.
        OptionError
            If the processes there are now cannot share its lanes.
        """
        paths: list[Path] = told_by_main(list(reversed(self.paths().values())))
        problems = []
        for path in paths:
            state, reason = None, None
            try:
                state = read_checkpoint(path, only, like)
            except OptionError:
                raise
            except UNREADABLE as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
            # One reads what another finds damaged: each looks at a part of the files.
            reasons = [told for told in gathered_objects(reason) if told is not None]
            if state is not None and not reasons:
                yield state
                continue
            problems.append(f"{path} cannot be read ({reasons[0]})")
            if len(problems) < len(paths) and world().main:
                warnings.warn(f"{problems[-1]}; using the one before it.", RuntimeWarning, stacklevel=4)
        if problems and len(problems) == len(paths):
            raise ModelFileError(f"No checkpoint of the run is whole: {'; '.join(problems)}.")


class Background:
    """One piece of work at a time, on a thread of its own; what it raises is raised where it is waited for."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; what was begun before has been waited for."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error

        # A daemon: a process that has lost the others must be able to end while this waits for them.
        self.thread = threading.Thread(target=run, name="gibbsian-checkpoint", daemon=True)
        self.thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the work to end, so many seconds at most."""
        if self.thread is not None:
            self.thread.join(seconds)
            if self.thread.is_alive():
                return
        self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error


def shared_out(path: Path, lanes: list[int]) -> list[int]:
    """Say which of a checkpoint's lanes are this process's.

    Raises
    ------
    OptionError
        If the processes cannot share them.
    """
    here = world()
    if len(lanes) % here.size:
        fitting = [str(n) for n in range(1, len(lanes) + 1) if len(lanes) % n == 0]
        raise OptionError(
            f"The run saved in {path} has {len(lanes)} lane{'s' * (len(lanes) != 1)}, which {here.size} processes "
            f"cannot share equally. Go on with it in {', '.join(fitting[:-1])}{' or ' * (len(fitting) > 1)}"
            f"{fitting[-1]} process{'es' * (fitting != ['1'])}."
        )
    per = len(lanes) // here.size
    return lanes[here.rank * per : (here.rank + 1) * per]


def read_checkpoint(path: Path, only: Collection[str] = (), like: State | None = None) -> State:
    """Read a checkpoint of either kind, with the lanes that are this process's.

    Raises
    ------
    OptionError
        If the processes cannot share its lanes.
    OSError, RuntimeError, ValueError, UnpicklingError, BadZipFile
        If it is not whole, or not a checkpoint.
    """
    here = world()
    if path.is_dir():
        from gibbsian.training.shared_checkpoints import read_manifest, read_shared

        lanes = [] if only else shared_out(path, read_manifest(path)["lanes"])
        return read_shared(path, lanes, only=only, like=like, place=(here.rank, here.size))
    state = read_whole(path)
    if "lanes" in state:
        state["lanes"] = {lane: state["lanes"][lane] for lane in shared_out(path, sorted(state["lanes"]))}
    return state


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
    flush_folder(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        from gibbsian.training.shared_checkpoints import remove

        remove(path)
    else:
        path.unlink()
