"""What processes tell each other. With one process each of these is the plain function of its name.

Sums go in the order of ranks and of the rows that each holds, so that every process has the same result, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gibbsian.errors import ProcessError
from gibbsian.processes.world import world


def collected(x: Tensor) -> list[Tensor]:
    """Collect one tensor from every process, of any length along the first axis, in the order of ranks.

    Parameters
    ----------
    x
        ``(n, ...)``, of one dtype and of the same further axes everywhere; ``n`` may differ.
    """
    if world().size == 1:
        return [x]
    sizes = [int(n) for n in gathered_objects(len(x))]
    most = max(sizes)
    whole = x if len(x) == most else torch.cat((x, x.new_zeros((most - len(x), *x.shape[1:]))))
    whole = whole.contiguous()
    # Collectives know no bool on every backend.
    carried = whole.to(torch.uint8) if whole.dtype == torch.bool else whole
    parts = [torch.empty_like(carried) for _ in sizes]
    dist.all_gather(parts, carried)
    return [part[:n].to(x.dtype) for part, n in zip(parts, sizes)]


def gathered(x: Tensor) -> Tensor:
    """Put the rows of all processes behind one another, ``(n_0 + n_1 + ..., ...)``, in the order of ranks."""
    return x if world().size == 1 else torch.cat(collected(x))


def gathered_objects(value: Any) -> list[Any]:
    """Collect a small value that pickles from every process, in the order of ranks."""
    here = world()
    if here.size == 1:
        return [value]
    found: list[Any] = [None] * here.size
    dist.all_gather_object(found, value)
    return found


def told_by_main(value: Any) -> Any:
    """Give every process the value that the first one has; what the others pass is ignored."""
    if world().size == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def agree(marks: Mapping[str, str], what: str) -> None:
    """Refuse to go on with processes that were given different things.

    Parameters
    ----------
    marks
        What this process has, by name: versions, settings, checksums of data.
    what
        What they are marks of, for the message.

    Raises
    ------
    ProcessError
        On every process, naming what differs and on which ranks.
    """
    told = gathered_objects(dict(marks))
    names = dict.fromkeys(name for each in told for name in each)
    differing = [name for name in names if len({each.get(name, "absent") for each in told}) > 1]
    if not differing:
        return
    lines = []
    for name in differing[:3]:
        by_value: dict[str, list[int]] = {}
        for rank, each in enumerate(told):
            by_value.setdefault(each.get(name, "absent"), []).append(rank)
        lines.append(f"{name} is " + ", ".join(f"{v} on rank {_ranks(r)}" for v, r in by_value.items()))
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ProcessError(
        f"The processes of this job were given different {what}: {'; '.join(lines)}{more}. Start all with the same "
        "code, options and data."
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"
