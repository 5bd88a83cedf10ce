"""A plan on the terminal: what a step takes, what a process holds, how it goes on with more processes, and advice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gibbsian.planning.clocks import kernel_of
from gibbsian.planning.costs import Quantity, Step
from gibbsian.planning.model import Row
from gibbsian.planning.planned import Plan
from gibbsian.recipes import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType


def renderables(plan: Plan) -> Iterator[RenderableType]:
    """Tables and sentences, from top to bottom."""
    q = plan.question
    parts: list[tuple[str, Step | None, Mapping[str, float], str, int | None]] = [
        ("training", plan.training, plan.training_memory, "rows", q.batch),
        ("sampling", plan.sampling, plan.sampling_memory, "chains", q.chains),
    ]
    for what, step, memory, unit, size in parts:
        if step is None or size is None:
            continue
        among = f"{q.ranks} process{'es' * (q.ranks != 1)}"
        lanes = f", {q.shares} lanes" if q.shares != q.ranks else ""
        yield step_table(f"A step of {what}: {size} {unit}, {among}{lanes}", step)
        yield from told(plan, what, step, size)
        yield memory_table(f"Memory of each process, {what}", memory)
        yield scaling_table(f"{what.capitalize()}, the same {unit} divided among more", plan.scaling(what, True))
        yield scaling_table(f"{what.capitalize()}, as many {unit} for each process", plan.scaling(what, False))
    for sentence in plan.assumptions:
        yield f"[dim]* {sentence}[/]"
    if plan.refused:
        yield f"[bold]Training among processes is refused for this recipe:[/] {plan.refused}"
    yield f"[bold]{advice(plan)}[/]"


def step_table(title: str, step: Step) -> RenderableType:
    """Seconds of a step by part, with spreads and shares."""
    from rich.table import Column, Table

    table = Table("part", Column("time", justify="right"), Column("share", justify="right"), title=title)
    table.title_justify = "left"
    whole = step.seconds.value
    for name, part in (*step.compute.items(), *step.talk.items()):
        table.add_row(name, seconds(part), f"{100 * part.value / whole:.0f} %")
    table.add_section()
    table.add_row("in all", seconds(step.seconds), f"bound by {step.bound}")
    return table


def told(plan: Plan, what: str, step: Step, size: int) -> Iterator[str]:
    """Say rates, hours and bytes in words."""
    q = plan.question
    rate = size / step.seconds.value
    if what == "sampling":
        steps, how = draw_steps(q.recipe)
        yield (
            f"{rate:,.0f} steps of single chains a second; {size} draws {how}, take "
            f"{seconds(step.seconds * steps)}: {rate / steps:,.1f} draws a second."
        )
        return
    hours = plan.hours
    assert hours is not None
    yield (
        f"{1.0 / step.seconds.value:,.3g} steps a second, {rate:,.0f} rows a second; the recipe's "
        f"{q.recipe.training.steps} steps take {seconds(hours * 3600.0)}."
    )
    if q.ranks > 1:
        yield (
            f"In a step each process sends {size_of(plan.sent)}: copies of the weights (DDP) by an all-reduce, or full "
            f"sharding (FSDP2) by a gather and a scatter, which take {seconds(plan.sharded_exchange)}."
        )


def memory_table(title: str, memory: Mapping[str, float]) -> RenderableType:
    """Bytes by what they are for."""
    from rich.table import Column, Table

    table = Table("what", Column("memory", justify="right"), title=title)
    table.title_justify = "left"
    for name, size in memory.items():
        if size:
            table.add_row(name, size_of(size))
    table.add_section()
    table.add_row("in all", size_of(sum(memory.values())))
    return table


def scaling_table(title: str, rows: list[Row]) -> RenderableType:
    """Steps by the number of processes."""
    from rich.table import Column, Table

    columns = ("total", "a step", "of it talk", "efficiency", "bound by")
    table = Table("processes", *(Column(name, justify="right") for name in columns), title=title)
    table.title_justify = "left"
    for row in rows:
        talk = f"{100 * row.step.talking.value / row.step.seconds.value:.0f} %"
        table.add_row(
            f"{row.ranks:,}",
            f"{row.size:,}",
            seconds(row.step.seconds),
            talk,
            f"{100 * row.efficiency:.0f} %",
            "talk" if row.step.bound == "communication" else row.step.bound,
        )
    return table


def advice(plan: Plan) -> str:
    """Say in a sentence or two what to do."""
    q = plan.question
    if plan.bound == "memory":
        return (
            "This does not fit the memory that is free here: take a smaller batch, fewer chains, more processes on "
            "other machines, or data that are streamed."
        )
    if plan.training is None:
        assert plan.sampling is not None
        return "Chains do not talk to each other: as many processes as there are processors pay."
    best, cross = best_ranks(plan.scaling("training", True)), plan.crossover
    if plan.training.bound == "communication":
        return (
            f"With {q.ranks} processes a step talks longer than it computes: divide this batch among {best}, or give "
            "each process more rows."
        )
    where = (
        f"Talking takes longer than computing from {cross} processes on."
        if cross is not None
        else "Computing takes longer than talking however many processes share the batch."
    )
    if best <= 1:
        return f"One process is enough for this batch; more are worth it only with more rows for each. {where}"
    return f"Up to {best} processes are worth having for this batch (efficiency above {ENOUGH:.0%}). {where}"


ENOUGH = 0.7
"""Efficiency down to which more processes are worth having."""


def best_ranks(rows: list[Row]) -> int:
    """The most processes of a table whose efficiency is enough."""
    return max((row.ranks for row in rows if row.efficiency >= ENOUGH), default=1)


def draw_steps(recipe: Recipe) -> tuple[float, str]:
    """Say how many steps of the recipe's kernel draws take, and in words what they are."""
    if not recipe.noise_conditional:
        return float(recipe.sample_steps), f"after the recipe's {recipe.sample_steps} steps"
    # Heun's step looks twice; the corrector once where it starts and once at each of its steps.
    looks = recipe.levels * (2 + (recipe.corrector_steps + 1 if recipe.corrector_steps else 0))
    return looks / kernel_of(recipe).gradients, f"down {recipe.levels} noise levels, by {looks} gradients"


_TIMES = (("us", 1e6, 1e-3), ("ms", 1e3, 1.0), ("s", 1.0, 120.0), ("min", 1 / 60, 7200.0), ("h", 1 / 3600, math.inf))
_SIZES = (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12))


def seconds(q: Quantity) -> str:
    """Write a time with its spread in one unit: ``3.42 ± 0.11 ms``."""
    if q.value <= 0.0:
        return "0"
    unit, scale = next((unit, scale) for unit, scale, largest in _TIMES if q.value < largest)
    value, spread = q.value * scale, q.spread * scale
    digits = max(0, min(2, 2 - math.floor(math.log10(value))))
    return f"{value:.{digits}f} ± {spread:.{digits}f} {unit}"


def size_of(count: float) -> str:
    """Write a number of bytes: ``3.2 MB``."""
    unit, scale = next(((unit, scale) for unit, scale in _SIZES if count < 1000.0 * scale), _SIZES[-1])
    value = count / scale
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
