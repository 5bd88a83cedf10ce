"""Running chains: `sample`, and the checks of what it is given.

Chains move together, as one batch. Noise is drawn from the caller's generator a block ahead, and a block of steps is a
pure function of state and noise, which is what makes it compilable, testable to the bit, and resumable: ``sample`` of a
returned state goes on exactly where it stopped. Chains in lanes do so too: a lane's noise at a step is keyed by its
number and by one number that is drawn for the step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from gibbsian.chain_checks import (
    FITTING,
    check_chainwise,
    check_divisible,
    check_domain,
    check_energies,
    check_energy,
    check_sound,
    check_start,
    check_state,
    checked_plan,
    finite_chains,
)
from gibbsian.chain_lanes import (
    Course,
    Plan,
    Source,
    by_step,
    drawn_ahead,
    drawn_for,
    drawn_from,
    gathered_course,
    in_parts,
    put_together,
    reporter,
)
from gibbsian.compilation import compiled, owner_of, seconds_spent, wanting
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel, State, map_state
from gibbsian.kernels.groups import joined, row_groups, run_groups, split, visited_by_all
from gibbsian.kernels.parts import comes_in_parts
from gibbsian.processes.collectives import agree
from gibbsian.processes.lanes import Lanes
from gibbsian.processes.work import alike, numbers, together
from gibbsian.processes.world import world
from gibbsian.replaying import loop
from gibbsian.samples import Samples
from gibbsian.typing import EnergyFn

__all__ = [
    "FITTING",
    "GRADIENTS_PER_BLOCK",
    "begin",
    "by_step",
    "check_domain",
    "check_sound",
    "check_state",
    "checked_start",
    "detail_names",
    "own_rows",
    "reporter",
    "run_block",
    "sample",
    "start_chains",
    "steps_per_block",
    "with_tensor_settings",
]

K = TypeVar("K")

GRADIENTS_PER_BLOCK = 10
"""Gradient evaluations compiled together: enough to hide the overhead of a call, few enough to compile quickly."""

GRADIENTS_OF_IMAGES = 1
"""The same for images, whose steps hide a call at once, and take longer to compile."""

NOISE_PER_BLOCK = 4 * 2**20
"""Bytes of noise that a block on a CPU may draw ahead: with more, most of a cheap step is waiting for memory."""

NOISE_AHEAD = 2**18
"""Bytes of noise that are drawn at once for several blocks, where steps are so small that the calls take the time."""

MOST_BLOCKS = 16
"""Blocks whose noise is drawn at once at most: with more of them the calls are no time any more."""


@torch.no_grad()
def sample(
    energy: EnergyFn,
    kernel: Kernel,
    start: Tensor | State,
    *,
    steps: int,
    rng: Generator,
    warmup: int = 0,
    thin: int | None = None,
    compile: bool = False,
    progress: bool | Callable[[int], object] = False,
    lanes: int | None = None,
    own: bool = False,
) -> Samples:
    """Run a batch of chains, in one process or shared by those of a job.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        How a chain moves.
    start
        Positions ``(n, *event)``, floating point, or the ``state`` of earlier `Samples` to continue exactly.
    steps
        Steps to make, 1 or more, ``warmup`` included.
    rng
        The generator of all noise, on the chains' device; in the same state on every process of a job.
    warmup
        Steps at the start from which no draw is kept.
    thin
        Keep every ``thin``-th position after the warm-up. Without it only the final state is held, and memory does not
        grow with ``steps``.
    compile
        Compile blocks of steps (a few seconds once per energy and shape).
    progress
        ``True`` for a bar on the terminal, or a function called with the number of steps just made.
    lanes
        Equal shares of the chains, each with random numbers of its own and moved as a batch of its own. The processes
        of a job have equal shares of the lanes, and the draws do not depend on how many processes there are.
        Particles that act on each other (`SVGD`) then do so within a lane. ``None`` moves all chains as one batch, in
        every process.
    own
        With lanes: ``start`` and what is returned are this process's chains alone, ``(n / processes, *event)``, and not
        those of all processes on each of them. `gibbsian.sampling.own_rows` takes them out of all.

    Raises
    ------
    OptionError, ShapeError, DomainError, ArgumentTypeError
        If an argument does not fit; the message says what does.
    ProcessError
        If processes were given different arguments, or generators in different states.
    """
    began, compiled_before = time.perf_counter(), seconds_spent()
    plan = checked_plan(Plan(steps, warmup, thin, compile))
    if own and lanes is None:
        raise OptionError("own=True is about the chains of this process's lanes; say how many, lanes=....")
    shown = progress is True and lanes is not None and not world().main
    report, close = reporter(False if shown else progress, steps, "sampling")
    try:
        # A function of the user's may change an energy between two blocks.
        with loop(steady=not callable(progress)):
            if lanes is None:
                state = checked_start(energy, kernel, start, rng)
                size = steps_per_block(kernel, state.x)
                course = run_chains(energy, kernel, state, drawn_from(rng), plan, report, size)
            else:
                course = _run_lanes(energy, kernel, start, rng, plan, report, Lanes(lanes), own)
    finally:
        close()
    names, total = detail_names(kernel), course.totals
    return Samples(
        state=course.state,
        draws=course.kept[0] if course.kept else None,
        acceptance=total[0] / steps,
        nonfinite=total[1],
        kernel=kernel,
        steps=steps,
        seconds=time.perf_counter() - began,
        details={name: total[2 + i] / steps for i, name in enumerate(names)},
        compilation=seconds_spent() - compiled_before,
        kept=dict(zip(("energy", "acceptance", *names), course.kept[1:])),
        own=own,
    )


def own_rows(lanes: int, x: Tensor) -> Tensor:
    """Take this process's chains out of those of all, ``(n, *event) -> (n / processes, *event)``."""
    shared = Lanes(lanes)
    per = shared.share(len(x), "chains")
    return x[shared.own.start * per : shared.own.stop * per]


def _run_lanes(
    energy: EnergyFn,
    kernel: Kernel,
    start: Tensor | State,
    rng: Generator,
    plan: Plan,
    report: Callable[[int], object],
    lanes: Lanes,
    own: bool,
) -> Course:
    """Run this process's lanes, one after another, and put the chains of all processes behind one another."""
    check_energy(energy, kernel)
    given = start.x if isinstance(start, State) else start
    check_start(given, energy, rng)
    check_divisible(kernel)
    total = len(given) * (world().size if own else 1)
    per = lanes.share(total, "chains")
    keys = numbers(rng, plan.steps)
    told = (type(kernel).__name__, total, lanes.count, *plan[:3])
    agree({"random numbers": f"{int(keys[0]):016x}", "chains, lanes and steps": str(told)}, "options or generators")
    first = lanes.own.start if own else 0
    rows = [slice((k - first) * per, (k - first + 1) * per) for k in lanes.own]
    with together():
        states = [_begun(energy, kernel, start, each) for each in rows]
    check_sound(alike(torch.cat([finite_chains(state) for state in states])))
    part, size = in_parts(report, len(rows)), steps_per_block(kernel, states[0].x)

    with together():
        made = [
            run_chains(energy, kernel, state, drawn_for(lane, keys, given.device), plan, part, size)
            for lane, state in zip(lanes.own, states)
        ]
        course = put_together(made)
    return course if own else gathered_course(course)


def _begun(energy: EnergyFn, kernel: Kernel, start: Tensor | State, rows: slice) -> State:
    """Begin a lane's chains; memory and layout of their own, so that every process has the same numbers to the bit."""
    if isinstance(start, State):
        return map_state(lambda t: _laid_out(t[rows]).clone(), start)
    x = _laid_out(start[rows]).clone()
    try:
        state = begin(energy, with_tensor_settings(kernel, x), x)
    except RuntimeError as error:
        if len(x) == len(start) or "memory" in str(error):
            raise
        raise OptionError(
            f"The energy cannot be evaluated for the {len(x)} chains of a lane out of {len(start)} ({error}). One with "
            "a label for each chain cannot be shared by lanes: run the chains of each label by themselves."
        ) from error
    check_energies(state)
    return state


def run_chains(
    energy: EnergyFn,
    kernel: Kernel,
    state: State,
    draw: Source,
    plan: Plan,
    report: Callable[[int], object],
    block: int,
) -> Course:
    """Move chains along, in blocks of so many steps, of one where they are in several batches."""
    chains, kept = _Chains(energy, with_tensor_settings(kernel, state.x), state, plan.compile), []
    # Noise goes step by step through the batches, so that two runs of five steps are one of ten.
    size = block if len(chains.batches) == 1 else 1
    blocks = NOISE_AHEAD // max(1, size * state.x.numel() * state.x.element_size())
    if len(chains.batches) == 1 and blocks > 1:
        draw = drawn_ahead(draw, plan.steps, size * min(blocks, MOST_BLOCKS))
    done = 0
    while done < plan.steps:
        count = size if plan.steps - done >= size else 1
        visits = chains.advance(count, draw, done, visit=plan.thin is not None)
        kept += [place for i, place in enumerate(visits, start=done + 1) if plan.keeps(i)]
        done += count
        report(count)
    return Course(joined(chains.batches), torch.cat(chains.totals, 1), tuple(map(torch.stack, zip(*kept))))


def checked_start(energy: EnergyFn, kernel: Kernel, start: Tensor | State, rng: Generator) -> State:
    """Check that energy, kernel and start fit together, as `sample` does, and begin."""
    check_energy(energy, kernel)
    x = start.x if isinstance(start, State) else start
    check_start(x, energy, rng)
    check_chainwise(kernel, len(x))
    state = start if isinstance(start, State) else begin(energy, with_tensor_settings(kernel, x), x)
    check_state(state)
    return state


@torch.no_grad()
def begin(energy: EnergyFn, kernel: Kernel, x: Tensor, compile: bool = False) -> State:
    """Evaluate the energy where chains start.

    Parameters
    ----------
    energy, kernel, x
        As for `sample`, which does this by itself when it is given positions.
    compile
        For starts that come again and again, as those of training: compile this too.
    """
    _lay_out_weights(energy, x)
    x = _laid_out(x)
    if not compile:
        return kernel.init(energy, x)
    start = compiled(start_chains, owner_of(energy))
    return joined([start(energy, kernel, x[rows]) for rows in row_groups(energy, x)])


def start_chains(energy: EnergyFn, kernel: Kernel, x: Tensor) -> State:
    """Start chains; a pure function, compiled or not."""
    return kernel.init(energy, x)


class _Chains:
    """Chains on their way: in one batch, or in several that draw their noise in turn, with the totals of each."""

    def __init__(self, energy: EnergyFn, kernel: Kernel, state: State, compile: bool) -> None:
        self.energy, self.kernel, self.compile = energy, kernel, compile
        self.batches = split(energy, kernel, state)
        self.groups = row_groups(energy, self.batches[0].x, self.batches[0].grad)
        fixed = not (getattr(kernel, "dynamic", False) or comes_in_parts(kernel, state.x))
        self.run: Callable[..., Any] = compiled(run_block, owner_of(energy)) if compile and fixed else run_block
        # Half precision counts no further than 2048 (bfloat16: 256), and would call every longer run's acceptance low.
        own = {"dtype": torch.promote_types(state.energy.dtype, torch.float32), "device": state.x.device}
        self.totals = [torch.zeros((2 + len(detail_names(kernel)), len(b.x)), **own) for b in self.batches]

    def advance(self, count: int, draw: Source, at: int, visit: bool) -> list[tuple[Tensor, ...]]:
        """Make some steps, one where there are several batches; return what was visited, if asked."""
        visits = []
        for i, state in enumerate(self.batches):
            with wanting(self.compile):
                # The noise has no name of its own: its memory is free again, and warm, for the next block.
                self.batches[i], self.totals[i], seen = run_groups(
                    self.run,
                    self.groups,
                    self.energy,
                    self.kernel,
                    state,
                    draw(self.kernel, state, count, at, i),
                    self.totals[i],
                    visit,
                )
            visits.append(seen)
        return visited_by_all(visits)


def detail_names(kernel: object) -> tuple[str, ...]:
    """Names of what a kernel tells of a step besides acceptance."""
    return tuple(getattr(kernel, "details", ()))


def steps_per_block(kernel: Kernel, x: Tensor | None = None) -> int:
    """Steps that are compiled, and run, together: fewer on a CPU where the noise of many would not fit its caches.

    Parameters
    ----------
    kernel
        Its gradients count.
    x
        The chains, where they are known; blocks of any length use the same numbers.
    """
    together = min(GRADIENTS_PER_BLOCK, getattr(kernel, "gradients_together", GRADIENTS_PER_BLOCK))
    if x is not None and x.ndim >= 4:
        together = min(together, GRADIENTS_OF_IMAGES)
    steps = max(1, together // kernel.gradients)
    if x is None or x.device.type != "cpu":
        return steps
    return max(1, min(steps, NOISE_PER_BLOCK // max(1, x.numel() * x.element_size())))


def run_block(
    energy: EnergyFn, kernel: Kernel, state: State, noise: list[tuple[Tensor, ...]], totals: Tensor, visit: bool
) -> tuple[State, Tensor, list[tuple[Tensor, ...]]]:
    """Make as many steps as there is noise for; a pure function, compiled or not."""
    visited, names = [], detail_names(kernel)
    for drawn in noise:
        state, info = kernel.step(energy, state, drawn)
        details = [info.details[name] for name in names]
        totals = totals + torch.stack((info.acceptance, info.nonfinite, *details))
        if visit:
            visited.append((state.x, state.energy, info.acceptance, *details))
    return state, totals, visited


def with_tensor_settings(kernel: K, like: Tensor) -> K:
    """Turn a kernel's float settings, and those of kernels inside, into 0-d tensors: no recompiling as they change.

    Parameters
    ----------
    kernel
        A frozen dataclass; kernels inside of it are turned too.
    like
        Gives dtype and device.
    """
    if not dataclasses.is_dataclass(kernel):
        return kernel
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(kernel):
        value = getattr(kernel, f.name)
        if isinstance(value, (float, Tensor)):
            changed[f.name] = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        elif dataclasses.is_dataclass(value) and isinstance(value, Kernel):
            changed[f.name] = with_tensor_settings(value, like)
    return dataclasses.replace(kernel, **changed)  # type: ignore[type-var]


def _lay_out_weights(energy: object, x: Tensor) -> None:
    """Lay the kernels of an image energy out in channels_last too, in place: values, names and gradients stay."""
    if x.ndim != 4 or not isinstance(energy, nn.Module):
        return
    for parameter in energy.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _laid_out(x: Tensor) -> Tensor:
    """Images in channels_last, which convolutions run fastest in."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()
