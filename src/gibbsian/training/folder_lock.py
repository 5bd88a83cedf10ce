"""One job at a time writes into a run's folder.

The lock is the system's on a file, held by the job's first process. The system lets go of it when that process ends,
however it ends, so that a killed run leaves nothing behind that would keep it from going on.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from gibbsian.errors import OptionError
from gibbsian.processes import told_by_main, world

try:
    import fcntl
except ImportError:  # where the system has no such locks, a user's care has to do
    fcntl = None

NAME = ".lock"


class FolderLock:
    """The right to write into a run's folder.

    POSIX record locks, since they work on network file systems too and are not passed on to forked children. Where the
    file system knows none, there is none.

    Parameters
    ----------
    folder
        Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: int | None = None

    def acquire(self) -> None:
        """Take it; every process of the job calls this.

        Raises
        ------
        OptionError
            On every process, if another job has it.
        """
        holder: str | None = told_by_main(self._taken() if world().main else None)
        if holder is not None:
            raise OptionError(
                f"Another job is writing to {self.folder} ({holder}). Wait until it has ended, stop it, or choose "
                "another folder."
            )

    def release(self) -> None:
        """Give it back."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                (self.folder / NAME).unlink()
            os.close(self.file)
            self.file = None

    def _taken(self) -> str | None:
        """Take it; tell who has it, if it cannot be had."""
        if fcntl is None:
            return None
        path = self.folder / NAME
        while True:
            # What hinders here will hinder the first checkpoint, and be told then.
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError:
                return None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                told = os.read(file, 200).decode(errors="replace").strip()
                os.close(file)
                return told or "which process is not known"
            except OSError:
                os.close(file)
                return None
            # The one before may have removed the file between our opening and our locking it.
            with contextlib.suppress(OSError):
                if os.fstat(file).st_ino == path.stat().st_ino:
                    break
            os.close(file)
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self.file = file
        return None
