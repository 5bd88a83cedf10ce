r"""Schedules: at which temperatures an annealed run stops, and with which step size it moves there.

A pilot run finds both. A small population is carried from the base to the target by sequential Monte Carlo; each
temperature is taken as far from the last as leaves the incremental weights a set effective sample size, so that
temperatures lie dense where the density changes fast; and step sizes follow the acceptance. The main run then keeps to
what was found: with settings that followed its own chains, its weights would not be exactly unbiased. Along the
temperatures, step sizes cycle through a range below the one found: densities with several scales need small ones too,
and no trajectory length stays in resonance.

`Sequential Monte Carlo samplers (Del Moral et al., 2006) <https://doi.org/10.1111/j.1467-9868.2006.00553.x>`_;
`Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo (Jasra et al., 2011)
<https://doi.org/10.1111/j.1467-9469.2010.00723.x>`_ for the choice of temperatures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.kernels.base import Kernel, has_step_size, with_step_size
from gibbsian.partition.base import effective_size
from gibbsian.partition.paths import Path
from gibbsian.sampling import with_tensor_settings

SPARE = 0.7
"""Effective sample size, as a fraction, that the pilot run leaves to the weights of each of its stages."""

STAGES = 1000
"""Stages after which a pilot run gives up."""

PALETTE = 4.0
"""Ratio of the largest to the smallest step size that take turns along the temperatures."""


@dataclass(frozen=True)
class Schedule:
    """The stops of an annealed run.

    Attributes
    ----------
    betas
        ``(K + 1,)``, from 0 to 1, not decreasing.
    step_sizes
        ``(K - 1,)``, at ``betas[1:-1]``; or ``None`` to leave the kernel as it is.

    Raises
    ------
    OptionError
        If the betas do not run from 0 to 1, or the step sizes are not one per inner temperature.
    """

    betas: Tensor
    step_sizes: Tensor | None = None

    def __post_init__(self) -> None:
        b = self.betas
        if b.ndim != 1 or b.numel() < 2 or float(b[0]) != 0.0 or float(b[-1]) != 1.0 or bool((b.diff() < 0).any()):
            raise OptionError(f"A schedule's betas increase from 0 to 1, two or more of them; got {b}.")
        if self.step_sizes is not None and self.step_sizes.shape != (b.numel() - 2,):
            raise OptionError(
                f"{b.numel()} betas take {b.numel() - 2} step sizes, one per inner temperature; got "
                f"{tuple(self.step_sizes.shape)}."
            )

    @staticmethod
    def linear(temperatures: int) -> Schedule:
        """Space ``temperatures`` increments of beta evenly, and leave the kernel's step size as it is."""
        return Schedule(torch.linspace(0.0, 1.0, temperatures + 1))

    def reversed(self) -> tuple[Tensor, Tensor | None]:
        """Betas and step sizes in the order of the way back."""
        return self.betas.flip(0), None if self.step_sizes is None else self.step_sizes.flip(0)


@torch.no_grad()
def pilot(
    path: Path,
    base: Tractable,
    kernel: Kernel,
    *,
    rng: Generator,
    temperatures: int | None = None,
    chains: int = 128,
    moves: int = 5,
) -> Schedule:
    """Find temperatures and step sizes by a pilot run.

    Parameters
    ----------
    path
        From the base to the target.
    base
        Where the population is drawn.
    kernel
        Its ``step_size``, where it has one, is the first guess.
    rng
        The generator, on the base's device.
    temperatures
        How many increments of beta to return. ``None`` for twice J squared, J being the stages that the run needed,
        between 200 and 5000: with perfect mixing the log-weights then have a variance of about a fifth.
    chains
        Size of the population.
    moves
        Kernel steps per stage.

    Raises
    ------
    DivergenceError
        If the target is not reached in 1000 stages, or all energies are infinite.
    OptionError
        If there is not at least one increment.
    """
    if temperatures is not None and temperatures < 1:
        raise OptionError(f"temperatures counts increments of beta, 1 or more; got {temperatures}.")
    betas, sizes = _walk(path, base, kernel, rng, chains, moves)
    stages = len(betas) - 1
    count = min(5000, max(200, 2 * stages**2)) if temperatures is None else temperatures
    place = torch.linspace(0.0, stages, count + 1, dtype=torch.float64)
    fine = _interpolate(place, torch.tensor(betas, dtype=torch.float64))
    fine[0], fine[-1] = 0.0, 1.0
    if not sizes:
        return Schedule(fine)
    logs = _interpolate(place[1:-1], torch.tensor(sizes, dtype=torch.float64))
    # The golden ratio's multiples fill [0, 1) evenly in any stretch of the schedule.
    turn = torch.arange(1, count, dtype=torch.float64) * (0.5 * (math.sqrt(5.0) - 1.0)) % 1.0
    return Schedule(fine, (logs - math.log(PALETTE) * turn).exp())


def _walk(
    path: Path, base: Tractable, kernel: Kernel, rng: Generator, chains: int, moves: int
) -> tuple[list[float], list[float]]:
    """Carry a population from base to target; return the betas and the log step sizes found there."""
    x = base.sample(chains, rng)
    adapted = has_step_size(kernel)
    moving = cast(Any, with_tensor_settings(kernel, x))
    log_h = float(moving.step_size.log()) if adapted else 0.0
    betas, sizes, stride = [0.0], [], 1.0
    start = path(x.new_zeros(()))
    # From a first guess that may be orders of magnitude off: large corrections, then small ones.
    for gain in (4.0, 1.0) if adapted else ():
        x, log_h = _move(start, moving, x, log_h, gain, 4 * moves, rng)
    sizes.append(log_h)
    while betas[-1] < 1.0:
        if len(betas) > STAGES:
            raise DivergenceError(
                f"The pilot run reached only beta={betas[-1]:.3g} in {STAGES} stages: the base is too far from the "
                "energy. Widen or shift the base, or give a path that passes through what lies between."
            )
        beta, log_w = _next(path, x, betas[-1], stride)
        stride = beta - betas[-1]
        betas.append(beta)
        x = x[_systematic(log_w, rng)]
        x, log_h = _move(path(x.new_tensor(beta)), moving, x, log_h, 1.0 if adapted else 0.0, moves, rng)
        sizes.append(log_h)
    return betas, sizes if adapted else []


def _next(path: Path, x: Tensor, beta: float, stride: float) -> tuple[float, Tensor]:
    """Take the farthest beta whose incremental weights keep their effective sample size; return it with them."""
    here = path(x.new_tensor(beta))(x).double()

    def weights(b: float) -> tuple[Tensor, float]:
        log_w = here - path(x.new_tensor(b))(x).double()
        log_w = torch.where(torch.isfinite(log_w), log_w, -torch.inf)
        alive = int(torch.isfinite(log_w).sum())
        if not alive:
            raise DivergenceError(
                f"The energy is infinite or NaN at all {x.shape[0]} points of the pilot run at beta={b:.3g}. Choose a "
                "base that covers the energy's domain, or look for NaN in the energy."
            )
        # Points outside the domain are lost at any beta; the step is judged by those that are left.
        return log_w, float(effective_size(log_w)) / alive

    high = min(1.0, beta + 4.0 * stride)
    log_w, spared = weights(high)
    if spared >= SPARE and high < 1.0:
        high = 1.0
        log_w, spared = weights(high)
    low = high
    while spared < SPARE and low - beta > 1e-12:
        high, low = low, beta + 0.5 * (low - beta)
        log_w, spared = weights(low)
    if low == high:
        return high, log_w
    for _ in range(4):
        middle = 0.5 * (low + high)
        at_middle, spared = weights(middle)
        if spared >= SPARE:
            low, log_w = middle, at_middle
        else:
            high = middle
    return low, log_w


def _systematic(log_w: Tensor, rng: Generator) -> Tensor:
    n = log_w.numel()
    cumulative = log_w.softmax(0).cumsum(0)
    u = torch.rand(1, generator=rng, device=log_w.device, dtype=log_w.dtype)
    ticks = (torch.arange(n, device=log_w.device, dtype=log_w.dtype) + u) / n
    return torch.searchsorted(cumulative, ticks).clamp(max=n - 1)


def _move(
    energy: Any, moving: Any, x: Tensor, log_h: float, gain: float, steps: int, rng: Generator
) -> tuple[Tensor, float]:
    """Make some kernel steps; the step size follows the acceptance with some gain, 0 to leave it."""
    state = moving.init(energy, x)
    for _ in range(steps):
        kernel = with_step_size(moving, x.new_tensor(math.exp(log_h))) if gain else moving
        noise = kernel.noise(state, 1, rng)
        state, info = kernel.step(energy, state, tuple(z[0] for z in noise))
        if gain:
            log_h += gain * (float(info.acceptance.mean()) - moving.target_acceptance)
    return state.x, log_h


def _interpolate(place: Tensor, values: Tensor) -> Tensor:
    """Read a table at fractional indices, linearly."""
    i = place.floor().long().clamp(0, values.numel() - 2)
    return values[i] + (place - i) * (values[i + 1] - values[i])
