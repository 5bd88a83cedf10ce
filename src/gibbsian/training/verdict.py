r"""A last look at a run: whether its chains became like the data.

A run may end in good health and be useless: a learning rate so low that nothing was learned in the steps there were,
chains so slow that the energy never saw where they go. Persistent chains show it. With the energy distance D,

.. math:: \frac{D(\text{chains}, \text{data})}{D(\text{independent}, \text{data})}

compares them with what needs no model at all: rows of data whose columns were permuted, each on its own. A model of the
data is well below 1; one that has learned less than the columns' own histograms is above.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from gibbsian.buffers import ReplayBuffer
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.training.health import Alarm, unlike
from gibbsian.training.state import TrainingState

CLOSE = 0.01
"""The unit is this part of the data's own mean distance at least: columns may be nearly independent by nature."""

FEWEST = 16
"""Chains or rows below which nothing can be said."""


def chain_distance(state: TrainingState) -> Estimate | None:
    """Distance of the replay buffer's chains from the data, in units of that of independent columns.

    Parameters
    ----------
    state
        At the end of a run; its generator is not touched. The data are those of its probe.

    Returns
    -------
    Estimate or None
        With its standard error, of several buffers the largest; infinite if a chain is not finite, ``None`` without
        enough chains.
    """
    data = state.probe.x
    rng = torch.Generator(data.device).manual_seed(state.order_seed)
    found: list[Estimate] = []
    for buffer in buffers(state.objective):
        n = min(len(data), buffer.size)
        if not buffer.filled or n < FEWEST:
            continue
        rows = data[torch.randperm(len(data), generator=rng, device=data.device)[:n]]
        chains = buffer.sample(n, rng)
        if not bool(torch.isfinite(chains).all()):
            return Estimate(math.inf, 0.0)
        flat = rows.flatten(1)
        order = torch.rand(flat.shape, generator=rng, device=flat.device).argsort(0)
        scale = float(torch.pdist(flat.double()).mean())
        unit = max(energy_distance(flat.gather(0, order), flat).value, CLOSE * scale)
        distance = energy_distance(chains, rows)
        found.append(Estimate(distance.value / unit, distance.stderr / unit))
    return max(found, default=None, key=lambda estimate: estimate.value)


def buffers(objective: nn.Module) -> list[ReplayBuffer]:
    """Find the replay buffers of an objective, each once."""
    return [module for module in objective.modules() if isinstance(module, ReplayBuffer)]


def verdict(state: TrainingState, distance: Estimate) -> Alarm | None:
    """Find a run useless whose chains are farther than the limit beyond chance."""
    limit = state.settings.unlike_limit
    return unlike(state.step, distance.value, limit) if distance.value > limit + 3.0 * distance.stderr else None


def warn(alarm: Alarm) -> None:
    """Tell the caller of `fit`."""
    warnings.warn(
        f"Training ended, but its chains are farther from the data than independent columns would be: {alarm}. "
        f"{alarm.remedy}",
        UserWarning,
        stacklevel=5,
    )
