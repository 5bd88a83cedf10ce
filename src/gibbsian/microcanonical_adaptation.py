r"""Step size and length of microcanonical chains, which reject nothing, from their errors in energy.

One step changes the energy by W, zero for the exact dynamics. While the step size is small, its variance per coordinate
grows as the sixth power, :math:`E[W^2] / d = c h^6`. So :math:`h = (v / c)^{1/6}` gives it the variance v, with c
averaged over chains and rounds, later ones weighing more. The papers take v = 5e-4, at which the variances of Gaussians
in 50 dimensions come out wrong by 2 % (root mean square over coordinates; measured).

The length comes twice: first as the size of the target, :math:`\sqrt{\sum_i \operatorname{Var} x_i}`; then as 0.4 of
what a chain travels in an autocorrelation time.

`Microcanonical Hamiltonian Monte Carlo (Robnik, De Luca, Silverstein & Seljak, 2023)
<https://arxiv.org/abs/2212.08549>`_; `Fluctuation without dissipation: Microcanonical Langevin Monte Carlo (Robnik &
Seljak, 2023) <https://arxiv.org/abs/2303.18221>`_.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import Tuned
from gibbsian.diagnostics.chains import effective_sample_size
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.base import State
from gibbsian.kernels.microcanonical import MCLMC
from gibbsian.kernels.scales import is_dense
from gibbsian.samples import Samples
from gibbsian.sampling import reporter, sample
from gibbsian.typing import EnergyFn

ENERGY_VARIANCE = 5e-4
"""Variance of the error in energy of a step, per coordinate, in squared nats."""

LENGTH_FACTOR = 0.4
"""Length over what is travelled in an autocorrelation time: the papers' optimum on Gaussians."""

ROUND = 5
"""Steps between two looks at the errors in energy."""

SEARCHES, REACH = 60, 4.0
"""Rounds of the search for a first step size, and the most that one changes it by."""


@dataclasses.dataclass
class EnergyErrors:
    """The step size that gives the errors in energy a variance, from errors at other step sizes.

    Parameters
    ----------
    log_h
        Logarithm of the first step size.
    target
        The variance per coordinate to reach.
    """

    log_h: float
    target: float
    total: float = 0.0
    weight: float = 0.0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.first = self.log_h

    def update(self, variance: float) -> None:
        """Take in the variance that ``log_h`` gave, and move on to the next."""
        before = self.log_h
        if not math.isfinite(variance):
            self.log_h -= math.log(2.0)
            return
        self.rounds += 1
        w = float(self.rounds**2)
        # Powers of the step sizes relative to the first one, so that none overflows.
        self.total += w * variance / self.target * math.exp(-6.0 * (before - self.first))
        self.weight += w
        aim = self.first - math.log(max(self.total / self.weight, 1e-300)) / 6.0
        self.log_h = min(max(aim, before - math.log(2.0)), before + math.log(2.0))


def tune_mclmc(
    energy: EnergyFn,
    kernel: MCLMC,
    start: Tensor | State,
    *,
    rng: Generator,
    steps: int = 1000,
    energy_variance: float = ENERGY_VARIANCE,
    compile: bool = False,
    progress: bool | Callable[[int], object] = False,
) -> Tuned:
    """Warm microcanonical chains up while tuning the step size and the length they share.

    A quarter of the steps finds the step size with the kernel's own length; one measures the spread of the chains,
    which becomes the length; one adjusts the step size to it; the last measures the autocorrelation time and with it
    the final length. The positions of a quarter of the steps are held in memory.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        Its ``step_size`` and ``length`` are first guesses; its scale, which `warm_up` of an adjusted kernel finds, is
        kept.
    start
        Positions ``(n, *event)``, or a state of earlier `Samples`.
    rng
        The generator of all noise.
    steps
        Steps in all, 80 or more, rounded up to whole rounds of five; the search for a first step size comes on top.
    energy_variance
        The variance of the error in energy of a step to reach, per coordinate, in squared nats. Biases fall at least
        as its cube root.
    compile, progress
        As in `sample`.

    Returns
    -------
    Tuned
        Its acceptance is 1, with no error: nothing is rejected.

    Raises
    ------
    ArgumentTypeError
        If the kernel is not `MCLMC`.
    OptionError
        If there are too few steps, or the variance is not positive.
    DivergenceError
        If no step size gives the variance.
    """
    _check(kernel, steps, energy_variance)
    rounds = -(-steps // (4 * ROUND))
    report, close = reporter(progress, 4 * rounds * ROUND, "tuning")
    tried: list[float] = []

    def run(log_h: float, length: float, at: Tensor | State, count: int = ROUND) -> Samples:
        moving = dataclasses.replace(kernel, step_size=math.exp(log_h), length=length)
        return sample(energy, moving, at, steps=count, rng=rng, thin=1, compile=compile)

    def adapt(search: EnergyErrors, length: float, state: State) -> State:
        for _ in range(rounds):
            tried.append(search.log_h)
            made = run(search.log_h, length, state)
            state = made.state
            search.update(variance_per_coordinate(made))
            report(ROUND)
        return state

    try:
        length = float(kernel.length)
        log_h, state = _first_step_size(run, math.log(float(kernel.step_size)), length, start, energy_variance)
        search = EnergyErrors(log_h, energy_variance)
        state = adapt(search, length, state)
        made = run(search.log_h, length, state, rounds * ROUND)
        report(rounds * ROUND)
        length = spread(made.draws, kernel.scale)
        search = EnergyErrors(search.log_h, energy_variance)
        state = adapt(search, length, made.state)
        made = run(search.log_h, length, state, rounds * ROUND)
        report(rounds * ROUND)
    finally:
        close()
    step_size = math.exp(search.log_h)
    length = LENGTH_FACTOR * step_size * autocorrelation_time(made.draws)
    tuned = dataclasses.replace(kernel, step_size=step_size, length=length)
    return Tuned(tuned, made.state, 1.0, 0.0, torch.tensor(tried, dtype=torch.float64).exp())


def variance_per_coordinate(made: Samples) -> float:
    """Mean square of the errors in energy over dimension; infinite where most steps left the numbers."""
    change = made.kept["energy_change"].double()
    known = change.isfinite()
    if 2 * int(known.sum()) <= known.numel():
        return math.inf
    return float(torch.where(known, change, 0.0).square().sum() / known.sum() / made.x[0].numel())


def spread(draws: Tensor | None, scale: Tensor | None) -> float:
    """Root of the sum of variances over draws and chains, in round coordinates."""
    assert draws is not None
    x = draws.flatten(0, 1).double()
    if scale is not None:
        own = scale.to(x)
        x = torch.linalg.solve_triangular(own, x.mT, upper=False).mT if is_dense(own, x) else x / own
    return float(x.var(0).sum().sqrt())


def autocorrelation_time(draws: Tensor | None) -> float:
    """Draws per effective one, averaged over coordinates; no more than a chain is long, nor less than one."""
    assert draws is not None
    ess = effective_sample_size(draws, ranked=False)
    times = draws.shape[0] * draws.shape[1] / ess[ess.isfinite()]
    return float(times.clamp(1.0, draws.shape[0]).mean())


def _first_step_size(
    run: Callable[..., Samples], log_h: float, length: float, start: Tensor | State, target: float
) -> tuple[float, State]:
    """Follow the sixth power until the variance is within a factor of ten of the target."""
    at: Any = start
    variance, last = math.nan, log_h
    for _ in range(SEARCHES):
        made = run(log_h, length, at)
        at, variance = made.state, variance_per_coordinate(made)
        if 0.1 * target < variance < 10.0 * target:
            return log_h, made.state
        change = (target / max(variance, 1e-300)) ** (1.0 / 6.0)
        last = log_h
        log_h += math.log(min(max(change, 1.0 / REACH), REACH))
    raise DivergenceError(
        f"No step size gives errors in energy a variance of {target:g} per coordinate: {math.exp(last):.3g} gave "
        f"{variance:.3g}. A flat energy makes none at any size; else look for NaN or infinity in the energy or its "
        "gradient near the start, and for a gradient that does not fit the energy."
    )


def _check(kernel: object, steps: int, energy_variance: float) -> None:
    if not isinstance(kernel, MCLMC):
        raise ArgumentTypeError(
            f"tune_mclmc() sets step_size and length of an MCLMC kernel, as MCLMC(0.1, 1.0); got {kernel!r}. "
            "Kernels with an acceptance are tuned by tune() and warm_up()."
        )
    if steps < 80:
        raise OptionError(f"steps is 80 or more, a quarter for each of four parts; got {steps}.")
    if not 0.0 < energy_variance < math.inf:
        raise OptionError(f"energy_variance is a positive number of squared nats; got {energy_variance}.")
