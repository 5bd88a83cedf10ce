"""Groups of chains: what a processor moves at a time, so that its intermediate results stay in its cache.

A convolutional energy keeps hundreds of values per pixel for its backward pass. For a whole batch of images they go out
to memory and come back, which takes as long as the arithmetic. Chains are independent, so a few images can make a block
of steps while the others wait, and the chains are the same.

Very many vectors move in batches, which draw noise of their own step by step: positions, gradients and noise of all of
them would go out to memory between the passes of a step. Beyond 32 MiB the C library even takes each array from the
system and gives it back at once, and the system clears its pages: more than half of a Langevin step.
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

CACHE_OF_NETWORKS = 2**20
"""The same for vectors under a network, whose layers are compiled together with their activations."""

FEW = 256
"""Vectors under a network that a group holds at least: products of fewer rows take longer for each."""

LARGE = 3.5 * 2**20
"""Bytes of positions beyond which vectors move in batches: a third faster for ULA from there on."""

VECTORS = 2 * 2**20
"""Bytes of positions in such a batch: as fast as smaller ones, and 10 percent faster than 12 MiB."""


def split(energy: EnergyFn, kernel: Kernel, state: State) -> list[State]:
    """Part very many vectors into several batches, which draw noise of their own at each step; others are one batch.

    Parameters
    ----------
    energy
        Batched; one chain is tried alone.
    kernel
        Moves the chains.
    state
        Theirs.
    """
    x = state.x
    n, row = x.shape[0], x[:1].numel() * x.element_size()
    if x.ndim != 2 or x.device.type != "cpu" or n * row <= LARGE or _tied(kernel, state):
        return [state]
    if _kept_for_backward(energy, x[:1]) is None:
        return [state]
    return [map_state(lambda t, rows=rows: t[rows], state) for rows in _parted(n, max(1, VECTORS // row))]


def joined(states: list[State]) -> State:
    """Put batches together again."""
    return states[0] if len(states) == 1 else map_state(lambda *each: torch.cat(each), *states)


def row_groups(energy: EnergyFn, x: Tensor, grad: Tensor | None = None) -> list[slice]:
    """Part chains of images, or under a network, into groups; others, and those on an accelerator, stay in one.

    Parameters
    ----------
    energy
        Batched; one chain is tried, to count what its backward pass keeps.
    x
        Positions, ``(n, *event)``.
    grad
        Gradients there; vectors are parted only where a kernel takes some.
    """
    n = x.shape[0]
    alone = [slice(0, n)]
    if n == 1 or x.device.type != "cpu" or (x.ndim == 2 and (n <= FEW or not _has_layers(energy, grad))):
        return alone
    if x.ndim < 2 or (kept := _kept_for_backward(energy, x[:1])) is None:
        return alone
    weights = sum(p.numel() * p.element_size() for p in energy.parameters()) if isinstance(energy, nn.Module) else 0
    # Weights are read again for every group: a group worth reading them for holds as much of its own.
    rows = int(max(CACHE if x.ndim > 2 else CACHE_OF_NETWORKS, weights) / max(1, kept))
    return _parted(n, min(n, max(rows, torch.get_num_threads() if x.ndim > 2 else FEW)))


def stands_alone(energy: EnergyFn, x: Tensor) -> bool:
    """Whether one of these chains, ``(n, *event)``, can be moved without the others; it is tried."""
    return _kept_for_backward(energy, x[:1]) is not None


def run_groups(
    run: Callable[..., Any],
    groups: list[slice],
    energy: EnergyFn,
    kernel: Kernel,
    state: State,
    noise: list[tuple[Tensor, ...]],
    totals: Tensor,
    visit: bool,
) -> tuple[State, Tensor, list[tuple[Tensor, ...]]]:
    """Run a block of steps for one group after another, and put the chains together again.

    Noise that is not drawn chain by chain ties chains together, and so does a setting that holds a value for each: then
    all move at once.
    """
    n = state.x.shape[0]
    if len(groups) == 1 or not _apart(noise[0], n) or _chainwise(kernel):
        return run(energy, kernel, state, noise, totals, visit)
    parts = []
    for rows in groups:
        own = map_state(lambda t, rows=rows: t[rows], state)
        parts.append(
            run(energy, kernel, own, [tuple(z[rows] for z in drawn) for drawn in noise], totals[:, rows], visit)
        )
    state = joined([part[0] for part in parts])
    return state, torch.cat([part[1] for part in parts], 1), visited_by_all([part[2] for part in parts])


def visited_by_all(visits: list[list[tuple[Tensor, ...]]]) -> list[tuple[Tensor, ...]]:
    """Put together what groups, or batches, have seen at each step."""
    if len(visits) == 1:
        return visits[0]
    return [tuple(torch.cat(each) for each in zip(*places)) for places in zip(*visits)]


def _has_layers(energy: EnergyFn, grad: Tensor | None) -> bool:
    """Whether gradients pass through layers: without, the compiler keeps what it computes of a chain in registers."""
    derived = grad is not None and grad.shape[1:].numel() > 0
    return derived and isinstance(energy, nn.Module) and any(p.ndim == 2 for p in energy.parameters())


def _parted(n: int, rows: int) -> list[slice]:
    # Equal groups are one compiled graph, and a remainder would be a second.
    even = next(k for k in range(rows, 0, -1) if n % k == 0)
    rows = even if 2 * even >= rows else rows
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _apart(noise: tuple[Tensor, ...], n: int) -> bool:
    return all(z.ndim >= 1 and z.shape[0] == n for z in noise)


def _chainwise(kernel: Kernel) -> bool:
    return any(isinstance(value, Tensor) and value.ndim == 1 for value in settings_inside(kernel))


def _tied(kernel: Kernel, state: State) -> bool:
    """Whether chains cannot be moved apart: by their noise, tried on two of them, or by a setting for each."""
    two = map_state(lambda t: t[:2], state)
    noise = kernel.noise(two, 1, torch.Generator(two.x.device))
    return _chainwise(kernel) or not _apart(tuple(z[0] for z in noise), 2)


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
