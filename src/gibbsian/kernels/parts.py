"""Trajectories of images compiled in parts: ten gradients of a convolutional network in one graph take 20 s to compile.

A gradient of many images takes so long that a call for every second one costs nothing. Of vectors a trajectory is one
graph, which may keep a chain in registers from end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gibbsian.compilation import made_ready, wanted
from gibbsian.kernels.base import State
from gibbsian.typing import EnergyFn, Scalar


def comes_in_parts(kernel: object, x: Tensor) -> bool:
    """Whether a kernel compiles the trajectories of these chains itself, part by part; one that is ``parted`` can."""
    return x.ndim >= 4 and getattr(kernel, "parted", False) and getattr(kernel, "leapfrog", 1) > 1


def follow(
    run: Callable[..., Any],
    energy: EnergyFn,
    kernel: Any,
    state: State,
    v: Tensor,
    step_size: Scalar,
    *settings: Any,
) -> tuple[Any, ...]:
    """Follow a trajectory of ``kernel.leapfrog`` steps: in one piece, or in equal parts, each compiled.

    Parameters
    ----------
    run
        ``run(energy, state, v, step_size, steps, *settings)`` returns state and momentum after so many steps, and what
        adds up along the way. Two runs of one step must be a run of two.
    energy, kernel, state, v, step_size, settings
        What it takes.

    Returns
    -------
    state, v, *sums
        At the end.
    """
    steps = kernel.leapfrog
    if not comes_in_parts(kernel, state.x) or not wanted() or torch.compiler.is_compiling():
        return run(energy, state, v, step_size, steps, *settings)
    ready = made_ready(run, energy)
    size = 2 if steps % 2 == 0 else 1
    sums: list[Tensor] = []
    for _ in range(steps // size):
        state, v, *more = ready(energy, state, v, step_size, size, *settings)
        sums = [so_far + now for so_far, now in zip(sums, more)] if sums else more
    return state, v, *sums
