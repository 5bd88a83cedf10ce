r"""Ladders of temperatures for parallel tempering, tuned so that all neighbours swap equally often.

With :math:`r_k` the rate at which swaps between levels k and k + 1 are rejected, the sum

.. math:: \Lambda(\beta_k) = \sum_{j < k} r_j

hardly depends on where between its ends the levels lie, as long as they are dense; over the whole ladder it is the
*global communication barrier* :math:`\Lambda`. Levels at equal distances of :math:`\Lambda(\beta)` are rejected equally
often, which is best: round trips between the ends are then completed, by all replicas of a chain together, at the rate

.. math:: \Bigl(2 + 2 \sum_k \frac{r_k}{1 - r_k}\Bigr)^{-1} \text{ per step},

which rises towards :math:`1 / (2 + 2\Lambda)` with the number of levels. Per replica it is greatest at about
:math:`2 \Lambda + 1` of them, where half of all swaps are accepted.

`Non-reversible parallel tempering: a scalable highly parallel MCMC scheme (Syed, Bouchard-Côté, Deligiannidis & Doucet,
2022) <https://arxiv.org/abs/1905.02939>`_, sections 4 and 5.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import State, has_step_size
from gibbsian.kernels.tempering import ParallelTempering, replicas_of
from gibbsian.sampling import sample, with_tensor_settings
from gibbsian.typing import EnergyFn

BLOCKS = 8
"""Parts of a round, after each of which the step sizes follow the acceptance."""

FLAT = 1e-3
"""A rejection rate that every pair counts with at least, so that levels with none between them keep apart."""


class TunedLadder(NamedTuple):
    """What `tune_ladder` returns; ``kernel, state, *_ = tune_ladder(...)`` takes what most calls need.

    Attributes
    ----------
    kernel
        Parallel tempering with the ladder and the step sizes found.
    state
        Where the replicas stand; start `sample` from it.
    barrier
        The global communication barrier: the sum of the rejection rates between neighbours.
    swaps
        Acceptance of swaps between neighbours, ``(K - 1,)``, in fresh steps after the tuning.
    acceptance
        Acceptance of the inner kernel at every level, ``(K,)``, in the same steps.
    round_trip_rate
        Round trips per step of a chain that these acceptances predict, if replicas mix well at each level. Compare with
        ``samples.details["round_trips"]``: far fewer mean that points do not mix at the hottest level.
    """

    kernel: ParallelTempering
    state: State
    barrier: float
    swaps: Tensor
    acceptance: Tensor
    round_trip_rate: float


def tune_ladder(
    energy: EnergyFn,
    kernel: ParallelTempering,
    start: Tensor | State,
    *,
    rng: Generator,
    rounds: int = 6,
    steps: int = 32,
    resize: bool = False,
    compile: bool = False,
) -> TunedLadder:
    """Warm replicas up while placing their temperatures, and tuning a step size for each.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        Its ladder is where the search starts; the ends stay. Step sizes are tuned if its inner kernel has one and a
        ``target_acceptance``.
    start
        Positions ``(n, *event)``, or a state of the same ladder. More chains give sharper rates.
    rng
        The generator of all noise.
    rounds
        How often the ladder is placed anew.
    steps
        Steps of the first round, 16 or more; each round is twice as long as the one before, and steps as many as the
        last round's then measure what was found.
    resize
        Let the ladder have as many levels as pay best, ``2 * barrier + 1``, but no fewer than 3.
    compile
        As in `sample`.

    Raises
    ------
    ArgumentTypeError
        If the kernel is not parallel tempering.
    OptionError
        If there are no rounds or too few steps.
    """
    if not isinstance(kernel, ParallelTempering):
        raise ArgumentTypeError(f"tune_ladder() tunes ParallelTempering(kernel, betas); got {kernel!r}.")
    if rounds < 1 or steps < 2 * BLOCKS:
        raise OptionError(
            f"tune_ladder makes 1 or more rounds, the first of {2 * BLOCKS} or more steps; got {rounds} and {steps}."
        )
    inner: Any = kernel.kernel
    tunable = has_step_size(inner)
    if tunable and kernel.step_sizes is None:
        first = torch.as_tensor(inner.step_size, dtype=torch.float64).cpu().expand(len(kernel.betas))
        kernel = dataclasses.replace(kernel, step_sizes=first)
    at, target = start, getattr(inner, "target_acceptance", math.nan)
    for i in range(rounds):
        for _ in range(BLOCKS):
            at, acceptance = _run(energy, kernel, at, steps * 2**i // BLOCKS, rng, compile)
            if tunable:
                kernel = _corrected(kernel, acceptance - target, 4.0 / (1 + i))
        kernel, at = _placed(energy, kernel, cast(State, at), resize)
    at, acceptance = _run(energy, kernel, at, steps * 2 ** (rounds - 1), rng, compile)
    swaps = swap_acceptance(at)
    rate = predicted_round_trips(swaps)
    return TunedLadder(kernel, at, float((1.0 - swaps).sum()), swaps, acceptance, rate)


def swap_acceptance(state: State) -> Tensor:
    """Mean acceptance of swaps between neighbours since a state's replicas started, ``(K - 1,)`` in float64.

    Parameters
    ----------
    state
        Of `ParallelTempering`.
    """
    r = replicas_of(state)
    time, pairs = int(r.time[0]), r.swapped.shape[1]
    # Even pairs have their turn first; a pair alone has it always.
    turns = [max(1, time if pairs == 1 else (time + 1 - k % 2) // 2) for k in range(pairs)]
    return r.swapped.double().mean(0).cpu() / torch.tensor(turns, dtype=torch.float64)


def predicted_round_trips(swaps: Tensor) -> float:
    """Round trips per step of all replicas of a chain together, by the formula of the module's head.

    Parameters
    ----------
    swaps
        Acceptance between neighbours, ``(K - 1,)``.
    """
    rate = 1.0 / (2.0 + 2.0 * float(((1.0 - swaps) / swaps).sum()))
    # A pair alone swaps in every step, and not in every other.
    return 2.0 * rate if len(swaps) == 1 else rate


def _run(
    energy: EnergyFn, kernel: ParallelTempering, at: Tensor | State, steps: int, rng: Generator, compile: bool
) -> tuple[State, Tensor]:
    """Make steps; return the state and the inner kernel's mean acceptance at every level, ``(K,)``."""
    before = replicas_of(at).moved if isinstance(at, State) else 0.0
    state = sample(energy, kernel, at, steps=steps, rng=rng, compile=compile).state
    each = (replicas_of(state).moved - before) / steps
    return state, torch.where(each.isfinite(), each, 0.0).double().mean(0).cpu()


def _corrected(kernel: ParallelTempering, error: Tensor, gain: float) -> ParallelTempering:
    sizes = cast(Tensor, kernel.step_sizes).double().cpu()
    return dataclasses.replace(kernel, step_sizes=sizes * (gain * error).exp())


def _placed(energy: EnergyFn, kernel: ParallelTempering, state: State, resize: bool) -> tuple[ParallelTempering, State]:
    """Place the levels at equal distances of the barrier, and replicas on them."""
    rejected = (1.0 - swap_acceptance(state)).clamp(min=FLAT)
    passed = torch.cat((rejected.new_zeros(1), rejected.cumsum(0)))
    barrier = float(passed[-1])
    old = len(passed)
    levels = max(3, math.ceil(2.0 * barrier) + 1) if resize else old
    places = torch.linspace(0.0, barrier, levels, dtype=torch.float64)
    betas = cast(Tensor, kernel.betas).double().cpu()
    new = interpolated(places, passed, betas.log()).exp()
    # Between a base, at 0, and the level before it there is no logarithm to go by.
    new = torch.where(places > passed[-2], interpolated(places, passed, betas), new) if betas[-1] == 0.0 else new
    new[0], new[-1] = betas[0], betas[-1]
    sizes = kernel.step_sizes
    if sizes is not None:
        sizes = interpolated(places, passed, cast(Tensor, sizes).double().cpu().log()).exp()
    kernel = dataclasses.replace(kernel, betas=new, step_sizes=sizes)
    x = replicas_of(state).x
    if levels != old:
        nearest = (places[:, None] - passed).abs().argmin(1)
        x = x[:, nearest.to(x.device)]
    return kernel, with_tensor_settings(kernel, state.energy).init_replicas(energy, x)


def interpolated(places: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Read a table ``values`` at increasing ``knots`` linearly at ``places`` between them."""
    i = torch.searchsorted(knots, places).clamp(1, len(knots) - 1)
    share = (places - knots[i - 1]) / (knots[i] - knots[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])
