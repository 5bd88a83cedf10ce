r"""Step sizes tuned to a target acceptance, by dual averaging.

With :math:`h_t` the step size of round t and :math:`\bar\alpha_t` the acceptance it gave, averaged over all chains,

.. math::

    \log h_{t+1} = \mu - \frac{\sqrt{t}}{\gamma}\,\bar H_t, \qquad
    \bar H_t = \Big(1 - \frac{1}{t + t_0}\Big) \bar H_{t-1} + \frac{\delta - \bar\alpha_t}{t + t_0},

drives the acceptance to its target :math:`\delta`. What is kept is the average of the rounds, later ones weighing more,
:math:`\log \bar h_t = t^{-\kappa} \log h_t + (1 - t^{-\kappa}) \log \bar h_{t-1}`.

`The No-U-Turn Sampler (Hoffman & Gelman, 2014) <https://jmlr.org/papers/v15/hoffman14a.html>`_, section 3.2. There one
chain adapts alone; here all chains share a step size, so a round's acceptance is far less noisy and few rounds suffice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.base import State, with_step_size
from gibbsian.samples import Samples
from gibbsian.sampling import reporter, sample, steps_per_block
from gibbsian.typing import EnergyFn

DOUBLINGS = 40
"""How often the first step size is doubled or halved, and how far (in powers of two) the search goes from there."""

GAMMA, T0, KAPPA = 0.2, 10.0, 0.75
"""The pull to mu, the damping of early rounds, the forgetting of the average.

T0 and KAPPA are Hoffman & Gelman's. Their GAMMA of 0.05 answers one chain's noisy acceptance; to an acceptance averaged
over chains it overreacts, and HMC swings between accepting all and nothing (the realised acceptance then missed its
target by up to 0.17 with 64 chains, and by 0.03 with 0.2).
"""


class Tuned(NamedTuple):
    """What `tune` returns; ``kernel, state, *_ = tune(...)`` takes what most calls need.

    Attributes
    ----------
    kernel
        The kernel with its step size, a plain float.
    state
        Where the chains stand after the warm-up; start `sample` from it.
    acceptance
        Mean acceptance of that kernel in fresh steps after the tuning.
    stderr
        Its standard error over the chains; NaN for a single chain, which cannot tell.
    step_sizes
        The step size of each round, float64 on the CPU, to plot.
    """

    kernel: Any
    state: State
    acceptance: float
    stderr: float
    step_sizes: Tensor


@dataclasses.dataclass
class DualAveraging:
    """The recursion of the module's head.

    Parameters
    ----------
    log_h
        Logarithm of the first step size; also the point mu that later ones are pulled to. Hoffman & Gelman pull to ten
        times the first, to favour long steps where a long step saves gradients; here a step costs the same at any size.
    target
        The acceptance to reach.
    """

    log_h: float
    target: float
    log_average: float = 0.0
    error: float = 0.0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.mu = self.log_h

    def update(self, acceptance: float) -> None:
        """Take in the acceptance that ``log_h`` gave, and move on to the next."""
        self.rounds += 1
        t = self.rounds
        self.error += (self.target - acceptance - self.error) / (t + T0)
        reach = DOUBLINGS * math.log(2.0)
        self.log_h = self.mu + min(max(-math.sqrt(t) / GAMMA * self.error, -reach), reach)
        self.log_average += t**-KAPPA * (self.log_h - self.log_average)


def tune(
    energy: EnergyFn,
    kernel: Any,
    start: Tensor | State,
    *,
    rng: Generator,
    steps: int = 500,
    target: float | None = None,
    compile: bool = False,
    progress: bool | Callable[[int], object] = False,
    lanes: int | None = None,
) -> Tuned:
    """Warm chains up while tuning the step size they share.

    The first step size is doubled or halved until the acceptance crosses the target; dual averaging goes on from there,
    one round per block of steps, so that a compiled block serves every round and the sampling after it.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        Its ``step_size`` is the first guess; every other setting is kept.
    start
        Positions ``(n, *event)``, or a state of earlier `Samples`. More chains give a sharper step size.
    rng
        The generator of all noise.
    steps
        Steps of dual averaging, rounded up to whole blocks; the search for a first step size and the fresh steps that
        measure the acceptance come on top.
    target
        The mean acceptance to reach, between 0 and 1; the kernel's ``target_acceptance`` when ``None``.
    compile, progress, lanes
        As in `sample`; with lanes the processes of a job share the chains and find one step size.

    Raises
    ------
    ArgumentTypeError
        If the kernel has no acceptance or no step size to tune.
    OptionError
        If ``target`` is not between 0 and 1, or there is no step to make.
    DivergenceError
        If no step size gives an acceptance on either side of the target.
    """
    aim = check_tunable(kernel, steps, target)
    size = steps_per_block(kernel, start.x if isinstance(start, State) else start)
    rounds = -(-steps // size)
    report, close = reporter(progress, rounds * size, "tuning")

    def run(log_h: float, at: Tensor | State, count: int = size) -> Samples:
        now = with_step_size(kernel, math.exp(log_h))
        return sample(energy, now, at, steps=count, rng=rng, compile=compile, lanes=lanes)

    try:
        log_h, state = first_step_size(run, math.log(float(kernel.step_size)), start, aim)
        search = DualAveraging(log_h, aim)
        tried = []
        for _ in range(rounds):
            tried.append(search.log_h)
            made = run(search.log_h, state)
            state = made.state
            search.update(mean_acceptance(made))
            report(size)
    finally:
        close()
    return measured(run(search.log_average, state, max(1, rounds // 5) * size), tried)


def measured(check: Samples, tried: list[float]) -> Tuned:
    """Report a tuned kernel by the acceptance in fresh steps, and the logarithms of the step sizes tried before."""
    each = torch.where(check.acceptance.isfinite(), check.acceptance, 0.0).double()
    stderr = float(each.std() / len(each) ** 0.5) if len(each) > 1 else math.nan
    return Tuned(check.kernel, check.state, float(each.mean()), stderr, torch.tensor(tried, dtype=torch.float64).exp())


def mean_acceptance(made: Samples) -> float:
    """Acceptance averaged over chains; a chain without a number for it has accepted nothing."""
    return float(torch.where(made.acceptance.isfinite(), made.acceptance, 0.0).mean())


def first_step_size(
    run: Callable[[float, Tensor | State], Samples], log_h: float, start: Tensor | State, target: float
) -> tuple[float, State]:
    """Double or halve a step size until the acceptance crosses the target; return its logarithm, and the state there.

    Raises
    ------
    DivergenceError
        If no step size gives an acceptance on either side of the target.
    """
    made = run(log_h, start)
    direction = 1 if mean_acceptance(made) > target else -1
    for _ in range(DOUBLINGS):
        log_h += direction * math.log(2.0)
        before, made = made.x, run(log_h, made.state)
        above = mean_acceptance(made) > target
        if direction < 0 and above and bool((made.x == before).all()):
            above = False  # too small a step for the floating-point type: always accepted, and goes nowhere
        if above != (direction > 0):
            return log_h, made.state
    last, acceptance = f"{math.exp(log_h):.3g}", mean_acceptance(made)
    if direction < 0:
        raise DivergenceError(
            f"No step size gives acceptance: even {last} gave {acceptance:.3g} where the target is {target:g}, and "
            f"{int(made.nonfinite.sum())} of {made.steps * len(made.x)} proposals were not finite. Look for NaN or "
            "infinity in the energy or its gradient near the start, and for a gradient that does not fit the energy."
        )
    walks = made.kernel.domain
    if "real" not in ((walks,) if isinstance(walks, str) else walks):
        return log_h, made.state  # Bits, classes and spheres have no far away: a flat energy there has a density.
    raise DivergenceError(
        f"Every step size is accepted: {last} still gave {acceptance:.3g} where the target is {target:g}. The energy "
        "is flat or falls without end, so it has no normalised density; add a tractable base, as in net + Gaussian."
    )


def check_tunable(kernel: Any, steps: int, target: float | None) -> float:
    """Return the acceptance to reach, or refuse a kernel that has none; see `tune`."""
    if isinstance(kernel, type) or not hasattr(kernel, "step_size"):
        raise ArgumentTypeError(f"Tuning sets the step_size of a kernel such as MALA or HMC; got {kernel!r}.")
    if getattr(kernel, "target_acceptance", None) is None:
        raise ArgumentTypeError(
            f"{type(kernel).__name__} accepts every step, so its acceptance says nothing about its step size. Tune "
            "MALA and take its step size or a smaller one, or compare the draws of two step sizes."
        )
    aim = float(kernel.target_acceptance if target is None else target)
    if not 0.0 < aim < 1.0:
        raise OptionError(f"target is an acceptance strictly between 0 and 1; got {target}.")
    if steps < 1:
        raise OptionError(f"steps is 1 or more; got {steps}.")
    return aim
