r"""Windowed warm-up: step size and scale of the chains together, fast, slow, fast.

A first part lets the chains find where the mass is. Then come windows, each twice as long as the one before; at the end
of each, the positions visited in it give a new scale, and the step size is sought anew. A last part settles the step
size. Step sizes follow dual averaging throughout. Early windows, with positions far from the target, are forgotten.

With n positions of all chains in a window, their covariance :math:`\hat\Sigma` about their common mean, and the scale L
with which they were made, the new scale is a factor of

.. math:: \frac{n}{n + 5} \hat\Sigma + 10^{-3} \frac{5}{n + 5} L L^T,

or the roots of its diagonal. It is Stan's rule, which shrinks to 1e-3, but in units of the last scale, so that it does
not matter in which units x is measured; and it makes a factor of any positions, also of fewer than coordinates.

`Stan reference manual, HMC algorithm parameters (Stan Development Team)
<https://mc-stan.org/docs/reference-manual/mcmc.html>`_. There every chain warms up alone; here all share what they see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import DualAveraging, Tuned, check_tunable, first_step_size, mean_acceptance, measured
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError, unknown_name
from gibbsian.kernels.base import State, owner_of_setting, with_setting, with_step_size
from gibbsian.kernels.scales import is_dense
from gibbsian.samples import Samples
from gibbsian.sampling import reporter, sample, steps_per_block
from gibbsian.typing import EnergyFn

INITIAL, FIRST, FINAL = 75, 25, 50
"""Stan's steps of the first part, the first window, and the last part."""

SETTLING = 20
"""Rounds of dual averaging in the last part, where ``FINAL`` steps make fewer: a round is a block of steps."""

FEWEST = 20
"""Steps below which no part is left."""

SHRINKAGE, FLOOR = 5.0, 1e-3
"""Stan's weight, in positions, of the regularisation, and what it shrinks to."""


def warm_up(
    energy: EnergyFn,
    kernel: Any,
    start: Tensor | State,
    *,
    rng: Generator,
    steps: int = 1000,
    scale: str | None = "diagonal",
    target: float | None = None,
    compile: bool = False,
    progress: bool | Callable[[int], object] = False,
) -> Tuned:
    """Warm chains up while tuning the step size and the scale they share.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        Its ``step_size`` is the first guess, and so is its ``scale`` if it has one; every other setting is kept.
    start
        Positions ``(n, *event)``, or a state of earlier `Samples`. More chains give a sharper scale.
    rng
        The generator of all noise.
    steps
        Steps in all, 20 or more, every part rounded up to whole blocks; the searches for a step size after each new
        scale, and the fresh steps that measure the acceptance, come on top.
    scale
        ``"diagonal"`` for standard deviations, ``"dense"`` for a triangular factor of the covariance, where points are
        vectors; ``None`` to keep the kernel's.
    target
        The mean acceptance to reach, between 0 and 1; the kernel's ``target_acceptance`` when ``None``.
    compile, progress
        As in `sample`.

    Raises
    ------
    ArgumentTypeError
        If the kernel has no acceptance, no step size or no scale to tune.
    OptionError
        If there are too few steps, or ``scale`` or ``target`` is none.
    ShapeError
        If a dense scale is asked for where points are no vectors.
    DivergenceError
        If no step size gives an acceptance on either side of the target.
    """
    aim = check_tunable(kernel, steps, target)
    if steps < FEWEST:
        raise OptionError(f"steps is {FEWEST} or more, for three parts of a warm-up; got {steps}. tune() takes fewer.")
    x = start.x if isinstance(start, State) else start
    _check_scale(kernel, scale, x)
    moving = kernel
    if scale is not None:
        moving = with_setting(kernel, "scale", first_scale(owner_of_setting(kernel, "scale").scale, scale, x))
    size = steps_per_block(kernel, x)
    initial, slow, final = windows(steps, size)
    report, close = reporter(progress, (initial + sum(slow) + final) * size, "warming up")
    tried: list[float] = []

    def run(log_h: float, at: Tensor | State, count: int = size) -> Samples:
        now = with_step_size(moving, math.exp(log_h))
        return sample(energy, now, at, steps=count, rng=rng, thin=1, compile=compile)

    def adapt(log_h: float, at: Tensor | State, rounds: int, seen: Moments | None = None) -> tuple[float, State]:
        log_h, state = first_step_size(run, log_h, at, aim)
        search = DualAveraging(log_h, aim)
        for _ in range(rounds):
            tried.append(search.log_h)
            made = run(search.log_h, state)
            state = made.state
            search.update(mean_acceptance(made))
            if seen is not None and made.draws is not None:
                seen.add(made.draws)
            report(size)
        return search.log_average, state

    try:
        log_h, state = adapt(math.log(float(kernel.step_size)), start, initial)
        for rounds in slow:
            seen = None if scale is None else Moments(dense=scale == "dense")
            log_h, state = adapt(log_h, state, rounds, seen)
            if seen is not None:
                moving = with_setting(moving, "scale", seen.scale(owner_of_setting(moving, "scale").scale))
        log_h, state = adapt(log_h, state, final)
    finally:
        close()
    return measured(run(log_h, state, max(1, final // 5) * size), tried)


def windows(steps: int, size: int = 1) -> tuple[int, list[int], int]:
    """Part a warm-up as Stan does: rounds of ``size`` steps in the first part, in each window, and in the last part.

    Where the steps do not suffice for the usual parts, 15 % and 10 % of them go to the first and the last.
    """
    initial, final = INITIAL, max(FINAL, min(SETTLING * size, steps // 4))
    if initial + FIRST + final > steps:
        initial, final = int(0.15 * steps), int(0.1 * steps)
        slow = [steps - initial - final]
    else:
        slow, left, next_one = [], steps - initial - final, FIRST
        # A window that the next one could not follow in full takes all that is left.
        while left >= 3 * next_one:
            slow.append(next_one)
            left, next_one = left - next_one, 2 * next_one
        slow.append(left)
    return -(-initial // size), [-(-each // size) for each in slow], -(-final // size)


@dataclasses.dataclass
class Moments:
    """Mean and squares of positions, taken in block by block, in float64.

    Parameters
    ----------
    dense
        Whether products of different coordinates are kept too.
    """

    dense: bool
    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None

    def add(self, draws: Tensor) -> None:
        """Take in the positions of a block, ``(steps, n, *event)``."""
        x = draws.flatten(0, 1).double()
        n, mean = len(x), x.mean(0)
        off = x - mean
        squares = off.mT @ off if self.dense else off.square().sum(0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = n, mean, squares
            return
        total, gap = self.count + n, mean - self.mean
        between = torch.outer(gap, gap) if self.dense else gap.square()
        self.squares = self.squares + squares + between * (self.count * n / total)
        self.mean = self.mean + gap * (n / total)
        self.count = total

    def scale(self, before: Tensor) -> Tensor:
        """Apply the rule of the module's head; ``before`` is the window's scale, whose type and device it keeps."""
        assert self.squares is not None
        n, old = self.count, before.double()
        keep, floor = n / (n + SHRINKAGE) / max(n - 1, 1), FLOOR * SHRINKAGE / (n + SHRINKAGE)
        if self.dense:
            # Laid out as the first scale is, or a compiled step would be compiled again.
            return torch.linalg.cholesky(keep * self.squares + floor * old @ old.mT).to(before).contiguous()
        return (keep * self.squares + floor * old.square()).sqrt().to(before)


def first_scale(own: Tensor | None, kind: str, x: Tensor) -> Tensor:
    """Bring a kernel's scale into the form asked for, with the type and device of ``x``; ones where it has none."""
    if own is None:
        own = torch.ones_like(x[0], memory_format=torch.contiguous_format)
    own = own.to(x)
    if kind == "dense":
        return own if is_dense(own, x) else own.diag()
    return own.square().sum(1).sqrt() if is_dense(own, x) else own


def _check_scale(kernel: object, scale: object, x: Tensor) -> None:
    if scale is None:
        return
    if not isinstance(scale, str) or scale not in ("diagonal", "dense"):
        raise unknown_name("scale", str(scale), ("diagonal", "dense", "None"))
    if owner_of_setting(kernel, "scale") is None:
        raise ArgumentTypeError(
            f"{type(kernel).__name__} has no scale to warm up; MALA, HMC, NUTS, Barker and AdjustedMCLMC have one. "
            "warm_up(..., scale=None) and tune() set the step size alone."
        )
    if scale == "dense" and x.ndim != 2:
        raise ShapeError(
            f"A dense scale is a factor (d, d) for vectors (n, d); the chains have shape {tuple(x.shape)}. "
            'Use scale="diagonal".'
        )
