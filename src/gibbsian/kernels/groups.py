"""Groups of chains: what a processor moves at a time, so that its intermediate results stay in its cache.

A convolutional energy keeps hundreds of values per pixel for its backward pass. For a whole batch of images they go out
to memory and come back, which takes as long as the arithmetic. Chains are independent, so a few images can make a block
of steps while the others wait, and the chains are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.errors import ArgumentTypeError
from gibbsian.kernels.base import Kernel, State, evaluate, map_state, settings_inside
from gibbsian.typing import EnergyFn

CACHE = 4.5 * 2**20
"""Bytes of intermediate results that a group may keep: the fastest for images of 28 x 28 on caches of 1 MiB a core."""


def row_groups(energy: EnergyFn, x: Tensor) -> list[slice]:
    """Part chains into groups; vectors, and chains on an accelerator, stay in one.

    Parameters
    ----------
    energy
        Batched; one chain is tried, to count what its backward pass keeps.
    x
        Positions, ``(n, *event)``.
    """
    n = x.shape[0]
    kept = _kept_for_backward(energy, x[:1]) if x.ndim >= 3 and n > 1 and x.device.type == "cpu" else None
    if kept is None:
        return [slice(0, n)]
    weights = sum(p.numel() * p.element_size() for p in energy.parameters()) if isinstance(energy, nn.Module) else 0
    # Weights are read again for every group: a group worth reading them for holds as much of its own.
    rows = int(max(CACHE, weights) / max(1, kept))
    rows = min(n, max(rows, torch.get_num_threads()))
    # Equal groups are one compiled graph, and a remainder would be a second.
    even = next(k for k in range(rows, 0, -1) if n % k == 0)
    rows = even if 2 * even >= rows else rows
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def run_groups(
    run: Callable[..., Any],
    groups: list[slice],
    energy: EnergyFn,
    kernel: Kernel,
    state: State,
    noise: tuple[Tensor, ...],
    totals: Tensor,
    visit: bool,
) -> tuple[State, Tensor, list[tuple[Tensor, ...]]]:
    """Run a block of steps for one group after another, and put the chains together again.

    Noise that is not drawn chain by chain, ``(steps, n, ...)``, ties chains together, and so does a setting that holds
    a value for each: then all move at once.
    """
    n = state.x.shape[0]
    if len(groups) == 1 or any(z.ndim < 2 or z.shape[1] != n for z in noise):
        return run(energy, kernel, state, noise, totals, visit)
    if any(isinstance(value, Tensor) and value.ndim == 1 for value in settings_inside(kernel)):
        return run(energy, kernel, state, noise, totals, visit)
    parts = []
    for rows in groups:
        own = map_state(lambda t, rows=rows: t[rows], state)
        parts.append(run(energy, kernel, own, tuple(z[:, rows] for z in noise), totals[:, rows], visit))
    joined = map_state(lambda *each: torch.cat(each), *(part[0] for part in parts))
    visited = [tuple(torch.cat(each) for each in zip(*places)) for places in zip(*(part[2] for part in parts))]
    return joined, torch.cat([part[1] for part in parts], 1), visited


def _kept_for_backward(energy: EnergyFn, x: Tensor) -> int | None:
    """Bytes that the backward pass of one chain keeps, weights aside; None where a chain cannot be moved alone."""
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in energy.parameters()} if isinstance(energy, nn.Module) else set()

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value, _ = evaluate(energy, x)
    except (RuntimeError, IndexError, ValueError, ArgumentTypeError):
        return None  # Nothing to differentiate; or a label for each of many chains, given beforehand, does not fit one.
    return sum(kept.values()) if value.shape == (1,) else None
