"""The processes of a job: how many there are, which one this is, and how they find each other.

PyTorch's own engine does the work: ``torchrun``, or any scheduler that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``
and ``MASTER_PORT``, starts the processes, and ``torch.distributed`` joins them. Without it there is one process, and
every function of this room does what it does for one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from gibbsian.errors import OptionError, ProcessError

TIMEOUT = 60.0
"""Seconds that a process waits for another before it counts as lost."""

GRACE = 0.1
"""Seconds that gloo's threads have to finish before a process leaves the others."""


@dataclass(frozen=True)
class World:
    """Where this process stands among those of its job.

    Attributes
    ----------
    rank
        Its number, from 0.
    size
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0


def world() -> World:
    """Look where this process stands; alone, where no process group has been started."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def launched() -> bool:
    """Whether something such as torchrun started this process as one of several, or of a group of one."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def join_processes(backend: str | None = None, timeout: float = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun or a scheduler has started, and part at the end.

    Inside a process group that exists already, and in a process that was started alone, it changes nothing.

    Parameters
    ----------
    backend
        Of ``torch.distributed``: ``"nccl"`` by default where every process has a GPU of its own, else ``"gloo"``.
    timeout
        Seconds after which a process that does not answer counts as lost.

    Raises
    ------
    OptionError
        If torch was built without the backend, or what the launcher says is incomplete.
    ProcessError
        If the others are not found: a port in use, an address that nobody answers.
    """
    if not launched() or dist.is_initialized():
        yield world()
        return
    name = backend or default_backend()
    if not dist.is_available() or not dist.is_backend_available(name):
        known = [
            each for each in ("gloo", "nccl", "mpi", "ucc") if dist.is_available() and dist.is_backend_available(each)
        ]
        raise OptionError(f"This torch has no backend {name!r}; it has {', '.join(known) or 'none'}.")
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError as error:
        raise OptionError(
            f"RANK and WORLD_SIZE are whole numbers, set by torchrun or the scheduler; {error}."
        ) from None
    if name == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    try:
        dist.init_process_group(name, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise ProcessError(_no_meeting(rank, size, error)) from error
    try:
        yield world()
    finally:
        part()


def part() -> None:
    """Leave the other processes, if there are any: what follows is done as if this process had been started alone."""
    if dist.is_available() and dist.is_initialized():
        # A thread of gloo that still waits for the interpreter, to let go of a tensor it has sent, when that ends takes
        # the whole process down (seen with torch 2.13, once in twenty runs).
        time.sleep(GRACE)
        dist.destroy_process_group()


def default_backend() -> str:
    """Name the backend that suits this machine."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    each_its_own = torch.cuda.is_available() and torch.cuda.device_count() >= local
    return "nccl" if each_its_own and dist.is_nccl_available() else "gloo"


def _no_meeting(rank: int, size: int, error: Exception) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"Port {where} is in use by another program ({first}). Choose another: torchrun --master-port PORT, or "
            "--standalone, which finds a free one."
        )
    return (
        f"Process {rank} of {size} did not find the others at {where} ({first}). Check that all were started, that the "
        "address is that of the machine of rank 0, and that its port is open to the others."
    )
