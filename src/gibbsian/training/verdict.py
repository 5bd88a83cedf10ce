r"""A last look at a run: whether its chains came nearer to the data.

A run may end in good health and be useless: a learning rate so low that nothing was learned in the steps there were,
chains so slow that the energy never saw where they go. Persistent chains show it. With the energy distance D,

.. math:: \frac{D(\text{chains}, \text{data})}{D(\text{base}, \text{data})}

is near 1 where the chains are as far from the data as the draws they started from, and near 0 where they have become
like the data.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from gibbsian.buffers import ReplayBuffer
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.training.health import Alarm, unlike
from gibbsian.training.state import TrainingState

CLOSE = 0.01
"""Distances below this part of the data's own mean distance are small, however near the base was to begin with."""

FEWEST = 16
"""Chains or rows below which nothing can be said."""


def chains_unlike_data(state: TrainingState) -> Alarm | None:
    """Compare every replay buffer with the data; return the verdict on the first that is hardly nearer than its base.

    Parameters
    ----------
    state
        At the end of a run; its generator is not touched. The data are those of its probe.
    """
    data = state.probe.x
    rng = torch.Generator(data.device).manual_seed(state.order_seed)
    for buffer in buffers(state.objective):
        n = min(len(data), buffer.size)
        if not buffer.filled or n < FEWEST:
            continue
        rows = data[torch.randperm(len(data), generator=rng, device=data.device)[:n]]
        found = buffer.sample(n, rng)
        if not bool(torch.isfinite(found).all()):
            return unlike(state.step, math.inf, state.settings.unlike_limit)
        chains = energy_distance(found, rows)
        before = energy_distance(buffer.base.sample(n, rng), rows)
        scale = float(torch.pdist(rows.flatten(1).double()).mean())
        limit = state.settings.unlike_limit
        # Beyond chance, beyond what is small for such data, and then beyond the limit.
        least = max(limit * before.value, CLOSE * scale) + 3.0 * chains.stderr
        if chains.value > least:
            return unlike(state.step, chains.value / max(before.value, CLOSE * scale), limit)
    return None


def buffers(objective: nn.Module) -> list[ReplayBuffer]:
    """Find the replay buffers of an objective, each once."""
    return [module for module in objective.modules() if isinstance(module, ReplayBuffer)]


def warn(verdict: Alarm) -> None:
    """Tell the caller."""
    warnings.warn(
        f"Training ended, but its chains are hardly nearer to the data than the base they started from: {verdict}. "
        f"{verdict.remedy}",
        UserWarning,
        stacklevel=5,
    )
