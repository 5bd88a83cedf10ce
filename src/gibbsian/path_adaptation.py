r"""Step size and path length of Hamiltonian chains, tuned together by what many chains do at once.

The change in the estimator of the expected square says how far a trajectory carries the squared distance from the
centre, which is what mixes last:

.. math:: C = \tfrac14 E\big[(|y' - E y'|^2 - |y - E y|^2)^2\big],

with y and y' the ends of a trajectory, in the coordinates where the kernel's scale makes the target round. A trajectory
of length uT ends u T' later if T grows by T', and moves there with its momentum v', so that

.. math::

    \frac{\partial C}{\partial \log T} = E\big[u T\,(|y' - E y'|^2 - |y - E y|^2)\,(y' - E y') \cdot v'\big].

Each round estimates it over the chains, weighted by their acceptance, and climbs in log T by Adam; u runs through a
Halton sequence. Meanwhile the step size is brought by dual averaging to a harmonic mean acceptance of 0.651: one chain
that never moves weighs in it as it should.

`An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo (Hoffman, Radul & Sountsov, 2021)
<https://proceedings.mlr.press/v130/hoffman21a.html>`_; the acceptance is that of `Optimal tuning of the hybrid Monte
Carlo algorithm (Beskos et al., 2013) <https://arxiv.org/abs/1001.4460>`_.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import DualAveraging, Tuned, first_step_size
from gibbsian.compilation import wanting
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import State, per_chain, row_sum
from gibbsian.kernels.dynamic_hmc import DynamicHMC, settle, trajectory
from gibbsian.kernels.scales import is_dense
from gibbsian.sampling import Samples, reporter, sample, with_tensor_settings
from gibbsian.typing import EnergyFn

RATE, BETA, CLIP, KAPPA = 0.025, 0.95, 0.35, 0.5
"""Adam's rate and its memory of squares (it has none of the gradients), the longest step in log T, the forgetting of
the average of log T."""

LOWEST = 1e-3
"""An acceptance counts as this much at least: the harmonic mean of many chains would be 0 for one that diverged."""


@torch.no_grad()
def tune_path(
    energy: EnergyFn,
    kernel: DynamicHMC,
    start: Tensor | State,
    *,
    rng: Generator,
    steps: int = 500,
    target: float | None = None,
    compile: bool = False,
    progress: bool | Callable[[int], object] = False,
) -> Tuned:
    """Warm chains up while tuning the step size and the path length they share.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        Its two lengths are first guesses; every other setting is kept.
    start
        Positions ``(n, *event)``, or a state of earlier `Samples`; 2 chains or more, and better dozens, since all that
        is known of the path length is known across chains.
    rng
        The generator of all noise.
    steps
        Steps of the adaptation; the search for a first step size and those that measure the acceptance come on top.
    target
        The harmonic mean acceptance to reach, between 0 and 1; the kernel's ``target_acceptance`` when ``None``.
    compile, progress
        As in `sample`.

    Returns
    -------
    Tuned
        Its ``acceptance`` is the plain mean over fresh steps, which lies above the harmonic one.

    Raises
    ------
    ArgumentTypeError
        If the kernel is not a `DynamicHMC`.
    ShapeError
        If there is only one chain.
    OptionError
        If ``target`` is not between 0 and 1, or there is no step to make.
    DivergenceError
        If no step size gives an acceptance on either side of the target.
    """
    aim = _check(kernel, start, steps, target)

    def run(log_h: float, at: Tensor | State, count: int = 1, path: float | None = None) -> Samples:
        h = math.exp(log_h)
        # While the first step size is sought, a trajectory is one step.
        made = dataclasses.replace(kernel, step_size=h, path_length=path or h)
        return sample(energy, made, at, steps=count, rng=rng, compile=compile)

    report, close = reporter(progress, steps, "tuning")
    tried = []
    try:
        log_h, state = first_step_size(run, math.log(float(kernel.step_size)), start, aim)
        search, climb = DualAveraging(log_h, aim), Climb(math.log(float(kernel.path_length)))
        for t in range(1, steps + 1):
            h = math.exp(search.log_h)
            tried.append(h)
            # The shortest trajectory is one step; the longest, as many as the kernel allows.
            length = min(max(math.exp(climb.log_path), h), kernel.max_leapfrog * h)
            moving = with_tensor_settings(dataclasses.replace(kernel, step_size=h, path_length=length), state.x)
            with wanting(compile):
                v, uniform, _ = (z[0] for z in moving.noise(state, 1, rng))
                share = halton(t)
                new, v_end, _ = trajectory(energy, moving, state, v, v.new_tensor(share))
                after, probability, _, _ = settle(state, new, v, v_end, uniform)
            climb.update(share * length * slope(moving.scale, state.x, new.x, v_end, probability))
            search.update(harmonic_mean(probability))
            state = after
            report(1)
    finally:
        close()
    check = run(search.log_average, state, max(10, steps // 5), math.exp(climb.log_average))
    each = check.acceptance.double()
    stderr = float(each.std() / len(each) ** 0.5)
    return Tuned(check.kernel, check.state, float(each.mean()), stderr, torch.tensor(tried, dtype=torch.float64))


def slope(scale: Tensor | None, x: Tensor, new: Tensor, v: Tensor, acceptance: Tensor) -> float:
    """Estimate the criterion's derivative by the time at the end of a trajectory, as above.

    Parameters
    ----------
    scale
        The map from round coordinates.
    x, new, v
        Start, end, and momentum at the end, ``(n, *event)``; ends that were not finite have acceptance 0.
    acceptance
        ``(n,)``.
    """
    weight = acceptance / acceptance.sum().clamp(min=torch.finfo(acceptance.dtype).tiny)
    # A chain that left the numbers has no weight, and 0 times NaN would give it some.
    sound = per_chain(acceptance > 0, x)
    end, v = _round(scale, torch.where(sound, new, 0.0)), torch.where(sound, v, 0.0)
    begin = _round(scale, x)
    begin = begin - begin.mean(0)
    end = end - (per_chain(weight, end) * end).sum(0)
    change = row_sum(end * end) - row_sum(begin * begin)
    return float((weight * change * row_sum(end * v)).sum())


def harmonic_mean(acceptance: Tensor) -> float:
    """Harmonic mean over chains, none below `LOWEST`."""
    return 1.0 / float((1.0 / acceptance.double().nan_to_num(0.0).clamp(min=LOWEST)).mean())


def halton(t: int) -> float:
    """Return term t of the sequence 1/2, 1/4, 3/4, 1/8, ...: the binary digits of t, mirrored at the point."""
    value, digit = 0.0, 0.5
    while t:
        value += digit * (t & 1)
        t, digit = t >> 1, 0.5 * digit
    return value


@dataclass
class Climb:
    """Adam in the logarithm of the path length, without momentum, and the average of where it was.

    Parameters
    ----------
    log_path
        Where it starts.
    """

    log_path: float
    square: float = 0.0
    rounds: int = 0
    log_average: float = 0.0

    def update(self, gradient: float) -> None:
        """Take a step uphill; a gradient that is not finite moves nothing."""
        self.rounds += 1
        if math.isfinite(gradient):
            self.square = BETA * self.square + (1.0 - BETA) * gradient * gradient
            size = math.sqrt(self.square / (1.0 - BETA**self.rounds))
            self.log_path += min(max(RATE * gradient / (size + 1e-30), -CLIP), CLIP)
        weight = self.rounds**-KAPPA
        self.log_average += weight * (self.log_path - self.log_average)


def _round(scale: Tensor | None, x: Tensor) -> Tensor:
    """Take positions to the coordinates where the target is round, the inverse of `stretch`."""
    if scale is None:
        return x
    return torch.linalg.solve_triangular(scale, x.mT, upper=False).mT if is_dense(scale, x) else x / scale


def _check(kernel: object, start: Tensor | State, steps: int, target: float | None) -> float:
    if not isinstance(kernel, DynamicHMC):
        raise ArgumentTypeError(f"tune_path() tunes DynamicHMC(step_size, path_length); got {kernel!r}.")
    aim = float(kernel.target_acceptance if target is None else target)
    if not 0.0 < aim < 1.0:
        raise OptionError(f"target is an acceptance strictly between 0 and 1; got {target}.")
    if steps < 1:
        raise OptionError(f"steps is 1 or more; got {steps}.")
    x = start.x if isinstance(start, State) else start
    if isinstance(x, Tensor) and x.ndim and x.shape[0] < 2:
        raise ShapeError(
            f"tune_path() learns the path length across chains and needs 2 or more, better 64; got {x.shape[0]}. "
            "For one chain use NUTS."
        )
    return aim
