"""The chain loop: the only place where a kernel is stepped.

Chains move together, as one batch. Noise is drawn from the caller's generator a block ahead, and a block of steps is a
pure function of state and noise, which is what makes it compilable, testable to the bit, and resumable: ``sample`` of a
returned state goes on exactly where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from gibbsian.compilation import compiled, owner_of, seconds_spent, wanting
from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of
from gibbsian.energies.layers import check_function
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel, State
from gibbsian.kernels.groups import joined, row_groups, run_groups, split, visited_by_all
from gibbsian.samples import Samples
from gibbsian.typing import EnergyFn

K = TypeVar("K")

_DISCRETE = (
    "Discrete states need a discrete kernel: BlockGibbs, GibbsWithGradients, DiscreteLangevin, PathAuxiliary, "
    "SingleSiteGibbs."
)
FITTING = {
    "real": "Kernels over the reals: RandomWalk, MALA, HMC, NUTS, ULA and others.",
    "box": "Kernels over the reals fit a box, as they are, reflected (Reflected), or after unconstrain(energy).",
    "torus": "Wrap a kernel over the reals: Wrapped(MALA(0.1), energy.support).",
    "sphere": "SphericalHMC moves along great circles.",
    "boolean": _DISCRETE,
    "one_hot": _DISCRETE,
    "discrete": "Discrete states need a discrete kernel, over binary (boolean) or one-hot states.",
}
"""What walks where, for messages."""

_DECLARE = (
    "If its states are zeros and ones, declare it: Energy.of(fn, support=constraints.boolean), or constraints.one_hot, "
    "or add a base such as Bernoulli. " + FITTING["real"]
)

GRADIENTS_PER_BLOCK = 10
"""Gradient evaluations compiled together: enough to hide the overhead of a call, few enough to compile quickly."""

GRADIENTS_OF_IMAGES = 1
"""The same for images, whose steps hide a call at once, and take longer to compile."""

NOISE_PER_BLOCK = 4 * 2**20
"""Bytes of noise that a block on a CPU may draw ahead: with more, most of a cheap step is waiting for memory."""


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
) -> Samples:
    """Run a batch of chains.

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
        The generator of all noise, on the chains' device.
    warmup
        Steps at the start from which no draw is kept.
    thin
        Keep every ``thin``-th position after the warm-up. Without it only the final state is held, and memory does not
        grow with ``steps``.
    compile
        Compile blocks of steps (a few seconds once per energy and shape).
    progress
        ``True`` for a bar on the terminal, or a function called with the number of steps just made.

    Raises
    ------
    OptionError, ShapeError, DomainError, ArgumentTypeError
        If an argument does not fit; the message says what does.
    """
    began, compiled_before = time.perf_counter(), seconds_spent()
    _check_options(steps, warmup, thin)
    state = checked_start(energy, kernel, start, rng)
    x = state.x
    moving = with_tensor_settings(kernel, x)
    chains, kept = _Chains(energy, moving, state, compile), []
    # Noise goes step by step through the batches, so that two runs of five steps are one of ten.
    size = steps_per_block(kernel, x) if len(chains.batches) == 1 else 1
    report, close = reporter(progress, steps, "sampling")
    done = 0
    try:
        while done < steps:
            count = size if steps - done >= size else 1
            for i, place in enumerate(chains.advance(count, rng, visit=thin is not None), start=done + 1):
                if thin is not None and i > warmup and (i - warmup) % thin == 0:
                    kept.append(place)
            done += count
            report(count)
    finally:
        close()
    names, total = detail_names(kernel), torch.cat(chains.totals, 1)
    return Samples(
        state=joined(chains.batches),
        draws=torch.stack([place[0] for place in kept]) if thin is not None else None,
        acceptance=total[0] / steps,
        nonfinite=total[1],
        kernel=kernel,
        steps=steps,
        seconds=time.perf_counter() - began,
        details={name: total[2 + i] / steps for i, name in enumerate(names)},
        compilation=seconds_spent() - compiled_before,
        kept={
            name: torch.stack([place[1 + i] for place in kept])
            for i, name in enumerate(("energy", "acceptance", *names))
            if kept
        },
    )


def checked_start(energy: EnergyFn, kernel: Kernel, start: Tensor | State, rng: Generator) -> State:
    """Check that energy, kernel and start fit together, as `sample` does, and begin."""
    _check_energy(energy, kernel)
    x = start.x if isinstance(start, State) else start
    _check_start(x, energy, rng)
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
        self.groups = row_groups(energy, self.batches[0].x)
        fixed = not getattr(kernel, "dynamic", False)
        self.run: Callable[..., Any] = compiled(run_block, owner_of(energy)) if compile and fixed else run_block
        # Half precision counts no further than 2048 (bfloat16: 256), and would call every longer run's acceptance low.
        own = {"dtype": torch.promote_types(state.energy.dtype, torch.float32), "device": state.x.device}
        self.totals = [torch.zeros((2 + len(detail_names(kernel)), len(b.x)), **own) for b in self.batches]

    def advance(self, count: int, rng: Generator, visit: bool) -> list[tuple[Tensor, ...]]:
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
                    by_step(self.kernel.noise(state, count, rng)),
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
    together = GRADIENTS_PER_BLOCK if x is None or x.ndim < 4 else min(GRADIENTS_PER_BLOCK, GRADIENTS_OF_IMAGES)
    steps = max(1, together // kernel.gradients)
    if x is None or x.device.type != "cpu":
        return steps
    return max(1, min(steps, NOISE_PER_BLOCK // max(1, x.numel() * x.element_size())))


def by_step(noise: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Take a block's noise apart, step by step.

    It is done before the block is compiled: the code of two steps is then the same to the letter, without a place in
    the noise written into it, and a compiler makes it once.
    """
    return list(zip(*(z.unbind(0) for z in noise)))


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


def _check_options(steps: int, warmup: int, thin: int | None) -> None:
    if steps < 1:
        raise OptionError(f"steps is 1 or more; got {steps}.")
    if not 0 <= warmup <= steps:
        raise OptionError(f"warmup lies between 0 and steps={steps}; got {warmup}.")
    if thin is not None and not 1 <= thin <= steps - warmup:
        raise OptionError(
            f"thin lies between 1 (keep every position) and the steps after the warm-up, {steps - warmup}; got {thin}."
        )


def _check_energy(energy: object, kernel: object) -> None:
    if not callable(energy):
        raise ArgumentTypeError(f"The energy must be a function or module from (n, *event) to (n,); got {energy!r}.")
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise ArgumentTypeError(f"The kernel needs init, noise and step (ULA, MALA, HMC, ...); got {kernel!r}.")
    if isinstance(energy, Energy) and energy.context:
        missing = ", ".join(f"{name}=..." for name in energy.context)
        raise OptionError(f"The energy is conditional; fix its context before sampling: energy.given({missing}).")
    check_function(energy)
    check_domain(energy, kernel)


def check_domain(energy: object, kernel: Kernel) -> None:
    """Refuse a kernel that cannot walk where the energy lives.

    Raises
    ------
    DomainError
        With both domains and what fits.
    """
    support = getattr(energy, "support", constraints.real)
    kind = kind_of(support)
    walks = (kernel.domain,) if isinstance(kernel.domain, str) else tuple(kernel.domain)
    # Outside a box an energy is infinite, and kernels over the reals reject or restart there.
    if kind in walks or (kind == "box" and "real" in walks):
        return
    name = type(kernel).__name__
    does = "follows gradients over the reals" if walks == ("real",) else f"walks on {' and '.join(walks)} states"
    undeclared = kind == "real" and "boolean" in walks
    raise DomainError(f"{name} {does}, but the energy lives on {support}. {_DECLARE if undeclared else FITTING[kind]}")


def _check_start(x: Tensor, energy: object, rng: Generator) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentTypeError(f"Chains start from a floating-point tensor (n, *event); got {found}.")
    if x.ndim < 2 or x.shape[0] < 1:
        raise ShapeError(f"Chains start from a tensor (n, *event) with n of 1 or more; got shape {tuple(x.shape)}.")
    expected = energy.event_shape if isinstance(energy, Energy) else None
    if expected is not None and expected != x.shape[1:]:
        raise ShapeError(f"The energy takes points of shape {tuple(expected)}; the chains start at {tuple(x.shape)}.")
    if not isinstance(rng, Generator):
        raise ArgumentTypeError(f"rng is a torch.Generator, as torch.Generator().manual_seed(0); got {rng!r}.")
    if rng.device.type != x.device.type:
        raise OptionError(
            f"The generator is on {rng.device} and the chains are on {x.device}; "
            f"use torch.Generator(device={str(x.device)!r})."
        )


def check_state(state: State) -> None:
    """Check where chains start: one floating-point energy each, and everything finite."""
    n = state.x.shape[0]
    if not state.energy.is_floating_point():
        raise ArgumentTypeError(
            f"An energy returns floating-point numbers, in nats; got {state.energy.dtype}. Return value.to(x.dtype)."
        )
    if tuple(state.energy.shape) != (n,):
        raise ShapeError(
            f"The energy of {n} points must have shape ({n},); it returned {tuple(state.energy.shape)}. "
            "Sum over the event's axes, or drop a trailing axis with .squeeze(-1)."
        )
    check_sound(torch.isfinite(state.energy) & torch.isfinite(state.grad).flatten(1).all(1))


def check_sound(finite: Tensor) -> None:
    """Refuse chains that start where the energy or its gradient is not finite: ``(n,)`` of bools."""
    if bad := int((~finite).sum()):
        raise DomainError(
            f"{bad} of {len(finite)} chains start where the energy or its gradient is not finite; start them inside "
            "the energy's domain, for example from base.sample(n, rng)."
        )


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
