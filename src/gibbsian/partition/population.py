r"""Populations carried from a base to a target by sequential Monte Carlo, with temperatures found on the way.

A particle of weight W gains :math:`w = e^{E_\beta(x) - E_{\beta'}(x)}` from the step :math:`\beta \to \beta'`. The
step is taken as long as leaves the conditional effective sample size

.. math:: \Bigl(\sum_i W_i w_i\Bigr)^2 \Big/ \sum_i W_i w_i^2, \qquad \sum_i W_i = 1,

at a set fraction. Where the weights have become uneven the particles are resampled, systematically, and then moved by a
kernel that leaves the new density invariant, with a step size that follows its acceptance. Several populations may move
as one: they share temperatures and step sizes, and nothing else.

`Sequential Monte Carlo samplers (Del Moral et al., 2006) <https://doi.org/10.1111/j.1467-9868.2006.00553.x>`_;
`Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo (Jasra et al., 2011)
<https://doi.org/10.1111/j.1467-9469.2010.00723.x>`_ for the choice of temperatures; `Toward automatic model comparison
(Zhou, Johansen & Aston, 2016) <https://doi.org/10.1080/10618600.2015.1060885>`_ for the conditional effective size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DivergenceError
from gibbsian.kernels.base import Kernel, has_step_size, with_step_size
from gibbsian.partition.base import effective_size
from gibbsian.partition.paths import Path
from gibbsian.processes.collectives import agree
from gibbsian.processes.lanes import Lanes
from gibbsian.processes.work import alike, numbers
from gibbsian.sampling import with_tensor_settings

SPARE = 0.7
"""Effective sample size, as a fraction, that a stage leaves to the weights that it gains."""

STAGES = 1000
"""Stages after which a walk to the target gives up."""


@dataclass
class Walk:
    """Where populations stand, and how they came there.

    Attributes
    ----------
    x
        Particles, ``(P * n, *event)``, population by population.
    log_w
        Log-weights within each population, ``(P, n)``, float64, of mean weight 1.
    log_z
        What each population has gained, ``(P,)``: its estimate of log Z.
    nonfinite
        Weights of each population that came from a non-finite energy, ``(P,)``.
    betas, log_sizes
        Temperatures way.betas, from 0 on, and the log step size with which each was left.
    acceptance, ess
        At each temperature after the first: the mean acceptance of the moves; the effective number of particles, all
        populations together, before resampling.
    """

    x: Tensor
    log_w: Tensor
    log_z: Tensor
    nonfinite: Tensor
    betas: list[float]
    log_sizes: list[float]
    acceptance: list[float]
    ess: list[float]


def walk(
    path: Path,
    base: Tractable,
    kernel: Kernel,
    rng: Generator,
    *,
    chains: int,
    moves: int,
    populations: int = 1,
    spare: float = SPARE,
    resample: float = 1.0,
    betas: Tensor | None = None,
    step_sizes: Tensor | None = None,
    adapt: bool = True,
    lanes: int | None = None,
) -> Walk:
    """Carry populations from base to target.

    Parameters
    ----------
    path, base, kernel, rng
        From where to where, and how.
    chains
        Particles, all populations together.
    moves
        Kernel steps per stage.
    populations
        How many of equal size the particles form.
    spare
        The fraction of the conditional effective size that a stage leaves.
    resample
        A population is resampled when its effective size is at most this fraction of it; 1 for always.
    betas
        The temperatures, from 0 to 1, to stop at; found on the way when ``None``.
    step_sizes
        One for each of ``betas`` after the first; with given ``betas``, ``None`` leaves the kernel as it is.
    adapt
        Whether the kernel's step size, where it has one, follows its acceptance; never with given ``betas``.
    lanes
        Equal shares of the populations, each with a generator of its own, among the processes of a job.

    Raises
    ------
    DivergenceError
        If the target is not reached in 1000 stages, or all energies are infinite.
    """
    crowd = _crowd(base, rng, chains, populations, lanes)
    way = crowd.parts[0][0]  # Which also keeps what concerns all.
    x = way.x
    moving = cast(Any, with_tensor_settings(kernel, x))
    adapted = adapt and has_step_size(kernel) and betas is None
    log_h = float(moving.step_size.log()) if adapted else 0.0
    stride, start = 1.0, path(x.new_zeros(()))
    # From a first guess that may be orders of magnitude off: large corrections, then small ones.
    for gain in (4.0, 1.0) if adapted else ():
        log_h, _ = crowd.move(start, moving, log_h, gain, 4 * moves)
    way.log_sizes.append(log_h)
    while way.betas[-1] < 1.0:
        if betas is None and len(way.betas) > STAGES:
            raise DivergenceError(
                f"The population reached only beta={way.betas[-1]:.3g} in {STAGES} stages: the base is too far from "
                "the energy. Widen or shift the base, or give a path that passes through what lies between."
            )
        if betas is None:
            beta, gained = _farthest(path, crowd, way.betas[-1], stride, spare)
        else:
            beta = float(betas[len(way.betas)])
            gained = [_gain(path, at.x, way.betas[-1])(beta) for at, _ in crowd.parts]
        stride = beta - way.betas[-1]
        way.betas.append(beta)
        ess = crowd.effective_size(gained)
        for (at, each), own in zip(crowd.parts, gained):
            weigh(at, own, resample, each)
        way.ess[-1] = ess
        if step_sizes is not None:
            log_h = math.log(float(step_sizes[len(way.betas) - 2]))
        gain = 1.0 if adapted else (0.0 if step_sizes is not None else None)
        log_h, acceptance = crowd.move(path(x.new_tensor(beta)), moving, log_h, gain, moves)
        way.log_sizes.append(log_h)
        way.acceptance.append(acceptance)
    return crowd.walked(way)


@dataclass
class Crowd:
    """The populations of one process: all as one batch, or a batch for each of its lanes.

    Attributes
    ----------
    parts
        Each batch, with the generator of its noise.
    count
        Particles in all lanes of all processes.
    shared
        Whether there are lanes: what concerns all populations is then a sum over those of all processes, in their
        order, so that it does not depend on how many there are.
    """

    parts: list[tuple[Walk, Generator]]
    count: int
    shared: bool

    def log_sum_exp(self, own: list[Tensor]) -> Tensor:
        """Combine logarithms of sums over each part, all of one shape."""
        return torch.logsumexp(self._all(own), 0)

    def effective_size(self, gained: list[Tensor]) -> float:
        """Effective number of all particles with what the log-weights of each part have gained."""
        sums = []
        for (at, _), own in zip(self.parts, gained):
            whole = (at.log_w + own.reshape(at.log_w.shape) + at.log_z[:, None]).flatten()
            sums.append(torch.stack((torch.logsumexp(whole, 0), torch.logsumexp(2.0 * whole, 0))))
        whole, squares = self.log_sum_exp(sums)
        return float((2.0 * whole - squares).exp())

    def move(self, energy: Any, moving: Any, log_h: float, gain: float | None, steps: int) -> tuple[float, float]:
        """Do as `move` does with all parts; the log step size and the mean acceptance."""
        points, generators = [at.x for at, _ in self.parts], [rng for _, rng in self.parts]
        mean = lambda own: self._all(own).mean()  # noqa: E731
        points, log_h, acceptance = _moved(energy, moving, points, generators, log_h, gain, steps, mean)
        for (at, _), x in zip(self.parts, points):
            at.x = x
        return log_h, acceptance

    def walked(self, way: Walk) -> Walk:
        """Put the populations of all parts, and processes, together."""
        for name in ("x", "log_w", "log_z", "nonfinite"):
            own = [getattr(at, name) for at, _ in self.parts]
            whole = own[0] if len(own) == 1 else torch.cat(own)
            setattr(way, name, alike(whole) if self.shared else whole)
        return way

    def _all(self, own: list[Tensor]) -> Tensor:
        return alike(torch.stack(own)) if self.shared else torch.stack(own)


def _crowd(base: Tractable, rng: Generator, chains: int, populations: int, lanes: int | None) -> Crowd:
    """Draw populations from the base."""

    def part(count: int, populations: int, rng: Generator) -> tuple[Walk, Generator]:
        x = base.sample(count, rng)
        w = torch.zeros((populations, count // populations), dtype=torch.float64, device=x.device)
        return Walk(x, w, w.new_zeros(populations), w.new_zeros(populations), [0.0], [], [], []), rng

    if lanes is None:
        return Crowd([part(chains, populations, rng)], chains, False)
    shared = Lanes(lanes)
    per, each = shared.share(chains, "particles"), shared.share(populations, "populations")
    seed = int(numbers(rng))
    marks = {"random numbers": f"{seed:016x}", "particles, populations and lanes": str((chains, populations, lanes))}
    agree(marks, "options or generators")
    return Crowd([part(per, each, own) for _, own in shared.generators(seed, rng.device)], chains, True)


def _gain(path: Path, x: Tensor, beta: float) -> Any:
    """The function from a temperature to the log-weights ``(n,)`` that particles gain on the way to it."""
    here = path(x.new_tensor(beta))(x).double()

    def gained(to: float) -> Tensor:
        log_w = here - path(x.new_tensor(to))(x).double()
        return torch.where(torch.isfinite(log_w), log_w, -torch.inf)

    return gained


def _farthest(path: Path, crowd: Crowd, beta: float, stride: float, spare: float) -> tuple[float, list[Tensor]]:
    """Take the farthest beta whose incremental weights keep their effective sample size; return it with them."""
    gains = [_gain(path, at.x, beta) for at, _ in crowd.parts]

    def weights(b: float) -> tuple[list[Tensor], float]:
        log_w = [gained(b) for gained in gains]
        sums = [_size_sums(at.log_w.flatten(), own) for (at, _), own in zip(crowd.parts, log_w)]
        both, squares, carried = crowd.log_sum_exp(sums)
        if not bool(torch.isfinite(both)):
            raise DivergenceError(
                f"The energy is infinite or NaN at all {crowd.count} points of the population at beta={b:.3g}. "
                "Choose a base that covers the energy's domain, or look for NaN in the energy."
            )
        return log_w, float((2.0 * both - squares - carried).exp())

    high = min(1.0, beta + 4.0 * stride)
    log_w, spared = weights(high)
    if spared >= spare and high < 1.0:
        high = 1.0
        log_w, spared = weights(high)
    low = high
    while spared < spare and low - beta > 1e-12:
        high, low = low, beta + 0.5 * (low - beta)
        log_w, spared = weights(low)
    if low == high:
        return high, log_w
    for _ in range(4):
        middle = 0.5 * (low + high)
        at_middle, spared = weights(middle)
        if spared >= spare:
            low, log_w = middle, at_middle
        else:
            high = middle
    return low, log_w


def _size_sums(carried: Tensor, gained: Tensor) -> Tensor:
    """The three logarithms of sums that a conditional effective size is made of, ``(3,)``.

    Points outside the domain are lost at any beta; the step is judged by those that are left.
    """
    alive = torch.isfinite(gained + carried)
    return _sums(carried[alive], gained[alive])


def _sums(carried: Tensor, gained: Tensor) -> Tensor:
    both = carried + gained
    return torch.stack([torch.logsumexp(each, 0) for each in (both, both + gained, carried)])


def conditional_size(carried: Tensor, gained: Tensor) -> float:
    """Conditional effective size, as a fraction, from log-weights carried and gained; both finite, ``(n,)``."""
    both, squares, carried_only = _sums(carried, gained)
    return float((2.0 * both - squares - carried_only).exp())


def weigh(at: Walk, gained: Tensor, resample: float, rng: Generator) -> None:
    """Give populations the weights they gained, and resample those whose weights are uneven.

    Parameters
    ----------
    at
        The populations; changed in place.
    gained
        Log-weights, ``(P * n,)``; minus infinity for a particle that is lost.
    resample
        As for `walk`.
    rng
        The generator.
    """
    count, per = at.log_w.shape
    gained = gained.reshape(count, per)
    at.nonfinite = at.nonfinite + (gained == -torch.inf).sum(1)
    log_w = at.log_w + gained
    mean = torch.logsumexp(log_w, 1) - math.log(per)
    at.ess.append(float(effective_size((log_w + at.log_z[:, None]).flatten())))
    at.log_z = at.log_z + mean
    # A population that has died out weighs nothing, and moves on so that the others may.
    dead = ~torch.isfinite(mean)
    log_w = torch.where(dead[:, None], 0.0, log_w - torch.where(dead, 0.0, mean)[:, None])
    sizes = (2.0 * torch.logsumexp(log_w, 1) - torch.logsumexp(2.0 * log_w, 1)).exp()
    due = sizes <= resample * per if resample < 1.0 else torch.ones_like(dead)
    if bool(due.any()):
        kept = torch.arange(per, device=log_w.device).expand(count, per)
        chosen = torch.where(due[:, None], systematic(log_w, rng), kept)
        rows = chosen + per * torch.arange(count, device=log_w.device)[:, None]
        at.x = at.x[rows.flatten()]
        log_w = torch.where(due[:, None], 0.0, log_w)
    at.log_w = log_w


def systematic(log_w: Tensor, rng: Generator, count: int | None = None) -> Tensor:
    """Resample with one uniform number: the indices of ``count`` draws, as many as there are weights when ``None``.

    Parameters
    ----------
    log_w
        Log-weights ``(n,)``, or ``(P, n)`` for each row apart.
    rng
        The generator, on their device.
    count
        How many to draw.
    """
    n = log_w.shape[-1]
    m = n if count is None else count
    cumulative = log_w.softmax(-1).cumsum(-1)
    u = torch.rand((*log_w.shape[:-1], 1), generator=rng, device=log_w.device, dtype=log_w.dtype)
    ticks = (torch.arange(m, device=log_w.device, dtype=log_w.dtype) + u) / m
    return torch.searchsorted(cumulative, ticks).clamp(max=n - 1)


def move(
    energy: Any, moving: Any, x: Tensor, log_h: float, gain: float | None, steps: int, rng: Generator
) -> tuple[Tensor, float, float]:
    """Make some kernel steps; the step size follows the acceptance with some gain, and is the kernel's own if None.

    Parameters
    ----------
    energy, moving, x
        What is moved, how and from where; the kernel's settings are tensors.
    log_h, gain
        Log step size, and how much of the acceptance's deviation from its target is added to it at each step.
    steps
        How many; with 0 the points stay, and the acceptance is NaN.
    rng
        The generator.

    Returns
    -------
    tuple
        Positions, the log step size, and the mean acceptance.
    """
    (x,), log_h, acceptance = _moved(energy, moving, [x], [rng], log_h, gain, steps, lambda means: means[0])
    return x, log_h, acceptance


def _moved(
    energy: Any,
    moving: Any,
    points: list[Tensor],
    generators: list[Generator],
    log_h: float,
    gain: float | None,
    steps: int,
    mean: Callable[[list[Tensor]], Tensor],
) -> tuple[list[Tensor], float, float]:
    """Move several batches of points, with generators of their own, that share a step size."""
    if steps == 0:
        return points, log_h, math.nan
    states = [moving.init(energy, x) for x in points]
    total = 0.0
    for _ in range(steps):
        kernel = moving if gain is None else with_step_size(moving, points[0].new_tensor(math.exp(log_h)))
        means = []
        for i, (state, rng) in enumerate(zip(states, generators)):
            noise = kernel.noise(state, 1, rng)
            states[i], info = kernel.step(energy, state, tuple(z[0] for z in noise))
            means.append(info.acceptance.mean())
        acceptance = float(mean(means))
        total += acceptance
        if gain:
            log_h += gain * (acceptance - moving.target_acceptance)
    return [state.x for state in states], log_h, total / steps
