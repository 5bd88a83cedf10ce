"""A lost process: the others end with one clear line instead of waiting, or telling of sockets.

When a process dies, its connections close and the others' collectives fail at once; when it hangs or its machine is
gone, they fail after the process group's timeout. What they raise then tells of an address. Which process it was is
found out by looking after those of the same machine.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from gibbsian.errors import GibbsianError, ProcessError
from gibbsian.processes.collectives import gathered_objects
from gibbsian.processes.world import world

LINGER = 2.0
"""Seconds that a process looks for the lost one: connections close a little before a process counts as gone."""

_SIGNS = ("gloo", "connection closed by peer", "connection reset by peer", "nccl", "broken pipe")
_NOTE = "gibbsian/lost"


@dataclass(frozen=True)
class Peer:
    """Where a process of the job runs.

    Attributes
    ----------
    machine
        Name of its machine, and of the space of process numbers in it.
    number
        Of the process there.
    """

    machine: str
    number: int


@contextmanager
def watching(remedy: str) -> Iterator[None]:
    """Tell a lost process in one line, while several work together.

    Parameters
    ----------
    remedy
        What to do then; the end of the message.

    Raises
    ------
    ProcessError
        In every process that is left, when another is lost. One of them ``speaks``.
    """
    if world().size == 1:
        yield
        return
    try:
        peers: list[Peer] = gathered_objects(_self())
    except RuntimeError as error:
        if not is_lost(error):
            raise
        told = "A process of this job was lost as the work began (killed, or ended by an error of its own)."
        raise ProcessError(f"{told} {remedy}") from error
    try:
        yield
    except GibbsianError:
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise _lost(peers, error, remedy) from error


def is_lost(error: BaseException) -> bool:
    """Tell whether an error is that of a collective whose partner has gone."""
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _SIGNS)


def gone(peers: Sequence[Peer]) -> list[int]:
    """Ranks of the processes on this machine that have ended or been stopped."""
    own = _self().machine
    return [rank for rank, peer in enumerate(peers) if peer.machine == own and _has_ended(peer.number)]


def _lost(peers: Sequence[Peer], error: BaseException, remedy: str) -> ProcessError:
    here = world()
    until = time.monotonic() + LINGER
    while not (ranks := gone(peers)) and time.monotonic() < until:
        time.sleep(0.02)
    own = [rank for rank, peer in enumerate(peers) if peer.machine == peers[here.rank].machine]
    if ranks:
        which = f"Rank {' and '.join(map(str, ranks))} of {here.size} was lost"
        why = "killed, out of memory, or ended by an error of its own"
    elif len(own) < here.size:
        elsewhere = sorted(set(range(here.size)) - set(own))
        which = f"A process of this job was lost, one of rank {', '.join(map(str, elsewhere))}"
        why = "its machine or the network between may be down"
    else:
        which, why = f"One of the {here.size} processes of this job did not answer in time", "it may hang"
    found = ProcessError(f"{which} ({why}). {remedy}")
    found.speaks = not _told_by_another(ranks, here.rank, here.size)
    # Those that wait for this process and not for the lost one fail when it ends, and would count it as lost.
    time.sleep(max(0.0, until - time.monotonic()) / 2)
    return found


def _told_by_another(lost: Sequence[int], rank: int, size: int) -> bool:
    """Whether another process says what happened: the first of those left does, unless it has been said."""
    left = [r for r in range(size) if r not in lost]
    first = left[:1] == [rank]
    # The first rank keeps the notes, unless torchrun does; asking one that is gone prints pages.
    if 0 in lost and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") != str(True):
        return not first or len(lost) > 1
    try:
        store = dist.distributed_c10d._get_default_store()
        if store.check([_NOTE]):
            return True
        if first:
            store.set(_NOTE, "told")
    except RuntimeError:
        return False
    return not first


def _has_ended(number: int) -> bool:
    status = Path(f"/proc/{number}/stat")
    try:
        # After the name, which is in brackets and may hold any character: dead, a zombie, or stopped.
        return status.read_text().rpartition(")")[2].split()[0] in "ZXxTt"
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()
    except OSError:
        return False


def _self() -> Peer:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return Peer(f"{socket.gethostname()} {space}", os.getpid())
