"""Work that lanes do each by themselves, and whose results every process has in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from gibbsian.errors import GibbsianError, ProcessError
from gibbsian.processes.collectives import agree, gathered_objects
from gibbsian.processes.lanes import Lanes
from gibbsian.processes.world import world


@contextmanager
def together() -> Iterator[None]:
    """Let all processes come through a block, or none: what goes wrong in one is raised in all of them.

    Without it the others would wait for the one that failed until their patience ends. What is in the block must not
    itself wait for other processes.

    Raises
    ------
    GibbsianError
        Where the block failed, what it raised; elsewhere what `raise_together` makes of it.
    """
    if world().size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise this process's error, or tell of another's; nothing if there is none anywhere.

    Raises
    ------
    GibbsianError
        If another process has one: of the same kind, with the number of the process.
    ProcessError
        If what another process has is none of Gibbsian's.
    """
    told = gathered_objects(
        error if error is None or isinstance(error, GibbsianError) else f"{type(error).__name__}: {error}"
    )
    if error is not None:
        raise error
    for rank, other in enumerate(told):
        if isinstance(other, GibbsianError):
            raise type(other)(f"On rank {rank}: {other}")
        if other is not None:
            raise ProcessError(f"Process {rank} of {len(told)} stopped, and the others with it. {other}")


def numbers(rng: Generator, count: int = 1) -> Tensor:
    """Draw seeds of 63 bits, ``(count,)`` on the host; so many at once are the same as one after the other.

    Parameters
    ----------
    rng
        The caller's; it is moved on by so many draws, whatever the number of lanes and processes.
    count
        How many.
    """
    draw = lambda n: torch.randint(2**63 - 1, (n,), generator=rng, device=rng.device)  # noqa: E731
    # An accelerator's generator gives several numbers at once that differ from those one by one.
    drawn = draw(count) if rng.device.type == "cpu" else torch.cat([draw(1) for _ in range(count)])
    return drawn.cpu()


def over_lanes(
    lanes: int,
    total: int,
    rng: Generator,
    work: Callable[[slice, Generator], tuple[Tensor, ...]],
    what: str = "chains",
) -> tuple[Tensor, ...]:
    """Let each lane do its share, and put what all have found behind one another, on every process.

    Parameters
    ----------
    lanes
        How many; a multiple of the number of processes.
    total
        Chains, or other things, that they share equally.
    rng
        The caller's, in the same state on every process; it is moved on by one number.
    work
        From the rows of a lane and its generator to tensors whose first axis counts these rows.
    what
        What is shared, for messages.

    Raises
    ------
    OptionError
        If lanes and processes, or lanes and things, do not go into each other.
    ProcessError
        If the generator is not in the same state everywhere.
    """
    shared = Lanes(lanes)
    shared.share(total, what)
    seed = int(numbers(rng))
    agree({"random numbers": f"{seed:016x}", what: str(total), "lanes": str(lanes)}, "options or generators")

    with together():
        found = [work(shared.rows(lane, total, what), each) for lane, each in shared.generators(seed, rng.device)]
        own = [torch.cat(parts) for parts in zip(*found)]
    return tuple(alike(part) for part in own)


def alike(x: Tensor) -> Tensor:
    """Put the rows of all processes behind one another, as `gathered` does, where all have the same number."""
    if world().size == 1:
        return x
    # Collectives know no bool on every backend.
    own = (x.to(torch.uint8) if x.dtype == torch.bool else x).contiguous()
    parts = [torch.empty_like(own) for _ in range(world().size)]
    dist.all_gather(parts, own)
    return torch.cat(parts).to(x.dtype)


def gathered_along(x: Tensor, dim: int) -> Tensor:
    """Put tensors of all processes, of one shape, behind one another along an axis, in the order of ranks."""
    return x if world().size == 1 else alike(x.movedim(dim, 0)).movedim(0, dim)


def from_owners(x: Tensor, mine: Tensor) -> Tensor:
    """Let every process have the rows that one of them owns each.

    Parameters
    ----------
    x
        ``(n, ...)``, floating point; rows that are another's are not looked at.
    mine
        Which are this process's, ``(n,)`` of bools; each row is that of one.
    """
    if world().size == 1:
        return x
    own = torch.where(mine.reshape(-1, *([1] * (x.ndim - 1))), x, 0.0).contiguous()
    dist.all_reduce(own)
    return own
