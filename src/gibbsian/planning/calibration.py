"""Calibrating the cost model on the spot: what a recipe takes on this machine, at other sizes than those planned."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from gibbsian.kernels.base import evaluate
from gibbsian.planning.clocks import (
    Timed,
    built,
    chain_part,
    chains_of,
    kernel_of,
    sized,
    time_chains,
    time_training,
)
from gibbsian.planning.costs import Curve, Work
from gibbsian.planning.counts import kept_bytes, line_through, moment_bytes, resident, size_of, work_of
from gibbsian.planning.model import PARTS, Costs, Sizes
from gibbsian.recipes import Recipe
from gibbsian.training.state import trained_parameters

FACTORS = (1 / 24, 1 / 6, 1 / 2, 3 / 2)
"""Sizes at which times are measured, over the size that is planned: around it, and never it."""

T = TypeVar("T")

COUNTED = 8
"""Rows of a step whose operations are counted."""

ON_ROWS = ("mlp", "convolutional", "residual", "rbm")
"""Energies whose training chains walk over rows, with the recipe's kernel."""


@dataclass(frozen=True)
class Budget:
    """Seconds for measuring.

    Attributes
    ----------
    training, sampling
        Of steps of each.
    """

    training: float
    sampling: float


def around(size: float, least: int = 1) -> list[int]:
    """Choose sizes to measure at, around one that is planned and never it.

    Parameters
    ----------
    size
        That is planned.
    least
        That makes sense.
    """
    planned = round(size)
    found = {max(least, round(size * factor)) for factor in FACTORS} - {planned}
    more = planned
    while len(found) < 2:
        more += 1
        found.add(max(least, more))
    return sorted(found)


def calibrated(
    recipe: Recipe,
    batch: float | None,
    chains: float | None,
    budget: Budget | None,
    data: Tensor | None = None,
    program: float | None = None,
) -> Costs:
    """Measure what one process takes for a recipe.

    Parameters
    ----------
    recipe
        What is trained, or drawn from.
    batch
        Rows of a lane that are planned; ``None`` leaves training out.
    chains
        Chains of a lane that are planned; ``None`` leaves sampling out.
    budget
        Seconds; ``None`` counts without timing.
    data
        Rows in model units; made up when left out.
    program
        Bytes of memory that the process had before; those it has now when left out.
    """
    program = resident() if program is None else program
    before = resident()
    if budget is not None:
        _load_the_rest(recipe, batch is not None, data)
    program += max(0.0, resident() - before)
    costs = Costs(log_every=recipe.training.log_every, sizes=sizes_of(recipe, data, program))
    if batch is not None:
        costs = replace(costs, work=counted_work(recipe, data))
        costs = costs if budget is None else _with_training(costs, recipe, batch, budget.training, data)
    if chains is not None:
        costs = _with_chain_counts(costs, recipe, data)
        if budget is not None:
            costs = replace(costs, sampling=_chain_curve(recipe, around(chains), budget.sampling, data))
    return costs


def _load_the_rest(recipe: Recipe, training: bool, data: Tensor | None) -> None:
    """Let torch load what it has left for later, which every further run has, too."""
    if training:
        time_training(recipe, 2, 0.0, data)
        return
    energy, start = chains_of(recipe, data)
    time_chains(energy, kernel_of(recipe), start(2, torch.Generator().manual_seed(0)), 0.0)


def _with_training(costs: Costs, recipe: Recipe, batch: float, seconds: float, data: Tensor | None) -> Costs:
    part = chain_part(built(recipe, 2, data)[1]) if recipe.energy in ON_ROWS else None
    sizes = around(batch, 2)
    each = seconds / (len(sizes) + (part is not None))
    timed = _affordable(sizes, lambda rows: time_training(recipe, rows, each, data), whole_step, each)
    curves = {name: Curve(tuple(timed), tuple(one.parts[name] for one in timed.values())) for name in PARTS}
    # Records cost alike whatever the batch; the run with the most steps saw the most of them.
    record = max(timed.values(), key=lambda one: one.steps).record
    costs = replace(costs, training=curves, record=record)
    if part is None:
        return costs
    return replace(costs, chain_step=_chain_curve(recipe, sizes, each, data), chain_steps=part.steps)


def counted_work(recipe: Recipe, data: Tensor | None) -> Work:
    """Count what a step of training computes."""
    energy, objective, rows = built(sized(recipe, COUNTED), COUNTED, data)
    rng = torch.Generator().manual_seed(0)

    objective(energy, rows, rng).value.backward()  # what is made at the first call is no part of a step
    losses: list[Tensor] = []
    forward = work_of(lambda: losses.append(objective(energy, rows, rng).value), COUNTED)
    back = work_of(lambda: losses[0].backward(), COUNTED)
    flops = forward.flops_per_row + back.flops_per_row
    return Work(flops, forward.operations + back.operations, back.flops_per_row / flops if flops else 0.0)


def _with_chain_counts(costs: Costs, recipe: Recipe, data: Tensor | None) -> Costs:
    """Count what a kernel's step keeps and does."""
    energy, start = chains_of(recipe, data)
    kernel, rng = kernel_of(recipe), torch.Generator().manual_seed(0)

    def kept(n: int) -> float:
        x = start(n, rng)
        peak, largest = kept_bytes(lambda: evaluate(energy, x), (energy,))
        # Positions and gradients twice over, before and after a step, the place to return to, and noise.
        return peak + 2.0 * largest + 8.0 * size_of(x)

    bytes_of = line_through({n: kept(n) for n in (2, 16)})
    with torch.no_grad():
        state = kernel.init(energy, start(COUNTED, rng))
        noise = tuple(z[0] for z in kernel.noise(state, 1, rng))
        counted = work_of(lambda: kernel.step(energy, state, noise), COUNTED)
    return replace(costs, chains=bytes_of, chain_work=counted)


def _chain_curve(recipe: Recipe, sizes: list[int], seconds: float, data: Tensor | None) -> Curve:
    energy, start = chains_of(recipe, data)
    kernel, rng = kernel_of(recipe), torch.Generator().manual_seed(0)
    each = seconds / len(sizes)
    timed = _affordable(sizes, lambda n: time_chains(energy, kernel, start(n, rng), each), lambda q: q.value, each)
    return Curve(tuple(timed), tuple(timed.values()))


def _affordable(sizes: list[int], measure: Callable[[int], T], cost: Callable[[T], float], each: float) -> dict[int, T]:
    """Measure from the smallest size on, two at least, as long as some steps fit the time for each."""
    found: dict[int, T] = {}
    for size in sizes:
        last = next(reversed(found.items()), None)
        if len(found) >= 2 and last is not None and 6 * cost(last[1]) * size / last[0] > 3 * each:
            break
        found[size] = measure(size)
    return found


def whole_step(timed: Timed) -> float:
    """Seconds of a step in all, but for records."""
    return sum(part.value for part in timed.parts.values())


def sizes_of(recipe: Recipe, data: Tensor | None, program: float) -> Sizes:
    """Count the bytes of what a process holds, from a model that is built and a few rows."""
    found: dict[int, tuple[float, float]] = {}
    for rows in (4, 16):
        energy, objective, batch = built(sized(recipe, rows), rows, data)
        rng = torch.Generator().manual_seed(0)
        objective(energy, batch, rng).value.backward()  # fills buffers
        peak, largest = kept_bytes(lambda: objective(energy, batch, rng).value, (energy, objective))  # noqa: B023
        found[rows] = (float(peak), float(largest))
    activations = line_through({rows: peak + 2.0 * largest for rows, (peak, largest) in found.items()})
    trained = list(trained_parameters(energy, objective).values())
    everything = {id(p): p for module in (energy, objective) for p in module.parameters()}
    return Sizes(
        weights=float(size_of(*everything.values())),
        trained=float(size_of(*trained)),
        moments=moment_bytes(energy, objective, recipe.training),
        average=float(size_of(*trained)),
        buffer=float(size_of(*objective.buffers())),
        row=float(size_of(batch.x[:1])),
        activations=activations,
        program=program,
    )


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
