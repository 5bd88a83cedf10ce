r"""A last look at a run: whether its chains became like the data.

A run may end in good health and be useless: a learning rate so low that nothing was learned in the steps there were,
chains so slow that the energy never saw where they go. Persistent chains show it. With the energy distance D,

.. math:: \frac{D(\text{chains}, \text{data})}{D(\text{plain}, \text{data})}

compares them with what needs no network: draws of a Gaussian that has the data's mean and covariance, or, where states
are discrete, rows of data whose columns were permuted, each on its own. Where noise was added to the data, it is taken
out of the chains first, as it would be of draws.

And a run may end just as it runs away, before that has lasted long enough to be stopped, or with a generator that has
collapsed or never spread: that is told too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor, nn

from gibbsian.annealing import denoised
from gibbsian.buffers import ReplayBuffer
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.energies.base import Energy
from gibbsian.energies.score import Score
from gibbsian.objectives.diversity import COMPARED, diversity
from gibbsian.objectives.parts import OfPart, part_of
from gibbsian.processes import gathered, lane_seed
from gibbsian.training.health import Alarm, unlike
from gibbsian.training.state import TrainingState

AsData: TypeAlias = Callable[[Energy, Tensor, Generator], Tensor]
"""From an energy and chains to what they are as data."""

CLOSE = 0.01
"""The unit is this part of the data's own mean distance at least: the data may be plain by nature."""

FEWEST = 16
"""Chains or rows below which nothing can be said."""

TOLD = {
    "unlike": "chains unlike the data",
    "gap": "a runaway at its end",
    "collapsed": "draws collapsed onto few points",
}
"""Each verdict in a few words."""


def chain_distance(state: TrainingState) -> Estimate | None:
    """Distance of the replay buffer's chains from the data, in units of that of a plain model.

    Parameters
    ----------
    state
        At the end of a run; its generator is not touched. The data are its rows of reference.

    Returns
    -------
    Estimate or None
        With its standard error, of several buffers the largest; infinite if a chain is not finite, ``None`` without
        enough chains.
    """
    if isinstance(state.energy, Score):
        return None
    data = state.reference.x
    rng = torch.Generator(data.device).manual_seed(state.order_seed)
    found: list[Estimate] = []
    for held, noise, as_data in buffers_of(state):
        n = min(len(data), held[0].size * state.settings.lanes)
        if not held[0].filled or n < FEWEST:
            continue
        rows = data[torch.randperm(len(data), generator=rng, device=data.device)[:n]]
        chains = without_noise(state, held, n, noise, rng)
        chains = chains if as_data is None else as_data(state.energy, chains, rng)
        if not bool(torch.isfinite(chains).all()):
            return Estimate(math.inf, 0.0)
        unit = plain_distance(rows, rng, state.energy.support.is_discrete)
        distance = energy_distance(chains, rows)
        found.append(Estimate(distance.value / unit, distance.stderr / unit))
    return max(found, default=None, key=lambda estimate: estimate.value)


def buffer_diversity(state: TrainingState) -> dict[str, float]:
    """Coverage and entropy gap of the chains in each replay buffer, of real states, against the rows of reference.

    Parameters
    ----------
    state
        Of a run; its generator is not touched.

    Returns
    -------
    dict of str to float
        ``buffer.coverage`` and ``buffer.entropy_gap``, of a second buffer ``buffer2.coverage`` and so on; nothing of
        buffers without chains or of discrete states.
    """
    found: dict[str, float] = {}
    if isinstance(state.energy, Score) or state.energy.support.is_discrete:
        return found
    data = state.reference.x
    rng = torch.Generator(data.device).manual_seed(state.order_seed)
    for place, (held, noise, as_data) in enumerate(buffers_of(state), 1):
        n = min(COMPARED, len(data), held[0].size * state.settings.lanes)
        if not held[0].filled:
            continue
        rows = data[torch.randperm(len(data), generator=rng, device=data.device)[:n]]
        chains = peek(state, held, n, rng)[0]
        if as_data is not None:
            chains = as_data(state.energy, chains, rng)
        elif noise:
            rows = rows + noise * torch.randn(rows.shape, generator=rng, device=rows.device, dtype=rows.dtype)
        told = diversity(chains, rows) if chains.shape == rows.shape else {}
        found |= {f"buffer{'' if place == 1 else place}.{name}": float(value) for name, value in told.items()}
    return found


def buffers(objective: nn.Module) -> list[tuple[ReplayBuffer, float, AsData | None]]:
    """Find the replay buffers of an objective, each once.

    With each comes the noise that its chains should have, and what makes data of its chains where they are more than
    that, as with latents: the ``as_data(energy, chains, rng)`` of an objective around it.
    """
    found: dict[int, tuple[ReplayBuffer, float, AsData | None]] = {}

    def visit(module: nn.Module, as_data: AsData | None, part: str = "") -> None:
        if (own := getattr(module, "as_data", None)) is not None:
            as_data = seen_through(own, part)
        part = module.part if isinstance(module, OfPart) else part
        buffer = getattr(module, "buffer", None)
        if isinstance(buffer, ReplayBuffer):
            found.setdefault(id(buffer), (buffer, float(getattr(module, "data_noise", 0.0)), as_data))
        for child in module.children():
            visit(child, as_data, part)

    visit(objective, None)
    return list(found.values())


def seen_through(as_data: AsData, part: str) -> AsData:
    """Make data of chains of an objective that fits a part of the energy."""
    return lambda energy, chains, rng: as_data(part_of(energy, part), chains, rng)


def buffers_of(state: TrainingState) -> list[tuple[list[ReplayBuffer], float, AsData | None]]:
    """Find the replay buffers of a run, each with its parts in this process's lanes."""
    found = [buffers(lane.objective) for lane in state.lanes]
    return [([each[place][0] for each in found], *found[0][place][1:]) for place in range(len(found[0]))]


def peek(state: TrainingState, held: list[ReplayBuffer], n: int, rng: Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy chains of a buffer with their labels, from all lanes in equal parts, the same ones in every process."""
    lanes = state.settings.lanes
    if lanes == 1:
        slots = held[0].peek(n, rng)
        return slots.x, slots.context
    parts = []
    for lane, buffer in zip(state.lanes, held):
        own = Generator(rng.device).manual_seed(lane_seed(state.order_seed, lane.number))
        parts.append(buffer.peek(-(-n // lanes), own))
    context = {name: gathered(torch.cat([part.context[name] for part in parts]))[:n] for name in parts[0].context}
    return gathered(torch.cat([part.x for part in parts]))[:n], context


def without_noise(state: TrainingState, held: list[ReplayBuffer], n: int, noise: float, rng: Generator) -> Tensor:
    """Chains of a buffer, less the noise that was added to the data."""
    x, context = peek(state, held, n, rng)
    if not noise:
        return x
    return denoised(state.energy.given(**context) if context else state.energy, x, noise)


def plain_distance(rows: Tensor, rng: Generator, discrete: bool) -> float:
    """Distance from the data of what a model without a network makes of them."""
    flat = rows.flatten(1).double()
    if discrete:
        plain = flat.gather(0, torch.rand(flat.shape, generator=rng, device=flat.device).argsort(0))
    else:
        values, axes = torch.linalg.eigh(flat.T.cov().reshape(flat.shape[1], -1))
        noise = torch.randn(flat.shape, generator=rng, device=flat.device, dtype=flat.dtype)
        plain = flat.mean(0) + (noise * values.clamp(min=0.0).sqrt()) @ axes.T
    return max(energy_distance(plain, flat).value, CLOSE * float(torch.pdist(flat).mean()))


def verdicts(state: TrainingState, distance: Estimate | None) -> list[Alarm]:
    """Find what is wrong at the end: a gap that runs away, a collapsed generator, chains too far beyond chance."""
    found = [a for kind in ("gap", "collapsed") for a in [b for b in state.health.suspected if b.kind == kind][:1]]
    limit = state.settings.unlike_limit
    if distance is not None and distance.value > limit + 3.0 * distance.stderr:
        found.append(unlike(state.step, distance.value, limit))
    return found


def warn(alarm: Alarm) -> None:
    """Tell the caller of `fit`."""
    what = {
        "unlike": "its chains are farther from the data than a Gaussian would be",
        "gap": "it was running away",
        "collapsed": "its draws lie on few points of the data",
    }[alarm.kind]
    warnings.warn(f"Training ended, but {what}: {alarm}. {alarm.remedy}", UserWarning, stacklevel=5)
