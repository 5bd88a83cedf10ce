"""What runs of chains are made of besides the loop: plans, sources of noise, and what chains have gone through."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from gibbsian.kernels.base import Kernel, State, map_state
from gibbsian.kernels.groups import joined
from gibbsian.processes.lanes import lane_seed
from gibbsian.processes.work import alike, gathered_along


class Plan(NamedTuple):
    """How far chains go and what is kept: as the arguments of `gibbsian.sample`."""

    steps: int
    warmup: int = 0
    thin: int | None = None
    compile: bool = False

    def keeps(self, step: int) -> bool:
        """Whether the position after so many steps is kept."""
        return self.thin is not None and step > self.warmup and (step - self.warmup) % self.thin == 0


class Course(NamedTuple):
    """What chains have gone through.

    Attributes
    ----------
    state
        Where they stand.
    totals
        Sums over steps, ``(2 + details, n)``: of acceptances, of non-finite proposals, and of the kernel's details.
    kept
        Positions, energies, acceptances and details of the kept steps, ``(kept, n, ...)``; empty if none are kept.
    """

    state: State
    totals: Tensor
    kept: tuple[Tensor, ...]


def put_together(courses: list[Course]) -> Course:
    """Put the chains of several lanes behind one another."""
    kept = tuple(torch.cat(each, 1) for each in zip(*(c.kept for c in courses)))
    return Course(joined([c.state for c in courses]), torch.cat([c.totals for c in courses], 1), kept)


def gathered_course(course: Course) -> Course:
    """Put the chains of all processes behind one another, in every process."""
    kept = tuple(gathered_along(t, 1) for t in course.kept)
    return Course(map_state(alike, course.state), gathered_along(course.totals, 1), kept)


class Source(Protocol):
    """Where the noise of a block of steps comes from."""

    def __call__(self, kernel: Kernel, state: State, steps: int, at: int, batch: int) -> list[tuple[Tensor, ...]]:
        """Draw it, step by step: for so many steps, of which ``at`` were made before, for one batch of the chains."""
        ...


def drawn_from(rng: Generator) -> Source:
    """Draw noise from one generator, as it comes."""
    return lambda kernel, state, steps, at, batch: by_step(kernel.noise(state, steps, rng))


def drawn_for(lane: int, keys: Tensor, device: torch.device) -> Source:
    """Draw a lane's noise from a generator of its own, which is seeded anew for every step.

    Where a run stops and goes on then leaves no trace, and nothing has to be remembered but the caller's generator.

    Parameters
    ----------
    lane
        Its number.
    keys
        One for each step, the same in all lanes, ``(steps,)`` on the host.
    device
        Of the chains.
    """
    rng = Generator(device)

    def draw(kernel: Kernel, state: State, steps: int, at: int, batch: int) -> list[tuple[Tensor, ...]]:
        drawn = []
        for key in keys[at : at + steps].tolist():
            if batch == 0:
                rng.manual_seed(lane_seed(key, lane))
            drawn += by_step(kernel.noise(state, 1, rng))
        return drawn

    return draw


def drawn_ahead(draw: Source, total: int, most: int) -> Source:
    """Draw for several blocks at once, and hand out what each asks for: the same numbers with fewer calls.

    Parameters
    ----------
    draw
        Where they come from.
    total
        Steps of the run, beyond which nothing is drawn.
    most
        Steps to draw at once, a multiple of what is asked for; as many as are asked for near the end.
    """
    ahead: list[tuple[Tensor, ...]] = []

    def take(kernel: Kernel, state: State, steps: int, at: int, batch: int) -> list[tuple[Tensor, ...]]:
        nonlocal ahead
        if len(ahead) < steps:
            start = at + len(ahead)
            # Two sizes only: what draws may be compiled for each.
            size = most if total - start >= most else steps
            ahead += draw(kernel, state, size, start, batch)
        taken, ahead = ahead[:steps], ahead[steps:]
        return taken

    return take


def by_step(noise: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Take a block's noise apart, step by step.

    It is done before the block is compiled: the code of two steps is then the same to the letter, without a place in
    the noise written into it, and a compiler makes it once.
    """
    return list(zip(*(z.unbind(0) for z in noise)))


def in_parts(report: Callable[[int], object], lanes: int) -> Callable[[int], object]:
    """Turn the steps of one lane after another into those of all."""
    made = 0

    def part(count: int) -> None:
        nonlocal made
        before, made = made // lanes, made + count
        if made // lanes > before:
            report(made // lanes - before)

    return part


def reporter(
    progress: bool | Callable[[int], object], steps: int, title: str, done: int = 0
) -> tuple[Callable[[int], object], Callable[[], None]]:
    """Return what to call with the steps just made, and what to call at the end; some may have been made before."""
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return lambda _: None, lambda: None
    from rich.progress import Progress

    bar = Progress()
    bar.start()
    task = bar.add_task(title, total=steps, completed=done)
    return lambda count: bar.advance(task, count), bar.stop
