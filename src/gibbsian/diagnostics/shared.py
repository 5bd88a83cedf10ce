"""Diagnostics of chains that are spread over the processes of a job."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gibbsian.processes.work import gathered_along
from gibbsian.processes.world import world

_CHUNK = 1 << 23
"""Numbers of all processes that are looked at together."""


def over_processes(diagnostic: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """Compute a diagnostic of each coordinate over the chains of all processes, of which each holds its own.

    No process holds all draws at once: they are collected some coordinates at a time.

    Parameters
    ----------
    diagnostic
        `split_r_hat`, `effective_sample_size` and others: ``(draws, chains, d) -> (d,)``.
    draws
        This process's, ``(draws, chains, *event)``, as many of each chain everywhere.

    Returns
    -------
    Tensor
        Of the event's shape, the same on every process.
    """
    flat = draws.reshape(*draws.shape[:2], -1)
    width = max(1, _CHUNK // max(1, draws.shape[0] * draws.shape[1] * world().size))
    return torch.cat([diagnostic(gathered_along(x, 1)) for x in flat.split(width, 2)]).reshape(draws.shape[2:])
