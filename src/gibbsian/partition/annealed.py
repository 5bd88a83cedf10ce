r"""Annealed importance sampling, forwards from the base and backwards from the model.

A chain starts with an exact draw of the base, whose log Z is 0, and is carried along a path of energies
:math:`E_0, \ldots, E_K` by kernels :math:`T_k` that leave :math:`e^{-E_k}` invariant. Its weight

.. math:: \log w = \sum_{k=1}^{K} E_{k-1}(x_{k-1}) - E_k(x_{k-1}), \qquad x_k \sim T_k(x_{k-1})

has :math:`E[w] = Z` however badly the chain mixes: bad mixing costs variance, never bias. Started from an exact draw
of the *model* and carried down, the same sum has :math:`E[1/w] = 1/Z`. The first bounds log Z from below, the second
from above.

`Annealed importance sampling (Neal, 2001) <https://arxiv.org/abs/physics/9803008>`_;
`Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse et al., 2015)
<https://arxiv.org/abs/1511.02543>`_.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.compilation import compiled, owner_of, wanting
from gibbsian.energies.base import Energy
from gibbsian.energies.domains import common_support, same_support
from gibbsian.energies.layers import check_function
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel, State, is_adjusted, with_step_size
from gibbsian.kernels.hmc import HMC
from gibbsian.partition.base import LogZ, from_log_weights, mirrored, warn_if_degenerate
from gibbsian.partition.paths import Path, geometric
from gibbsian.partition.schedule import Schedule, pilot
from gibbsian.processes.collectives import told_by_main
from gibbsian.processes.work import over_lanes
from gibbsian.sampling import GRADIENTS_PER_BLOCK, check_domain, with_tensor_settings

REMEDY = "Try more temperatures, a base closer to the energy, or a kernel that moves farther."


def ais(
    energy: Energy,
    base: Tractable,
    *,
    rng: Generator,
    chains: int = 512,
    temperatures: int | None = None,
    kernel: Kernel | None = None,
    path: Path | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    confidence: float = 0.99,
    compile: bool = False,
    lanes: int | None = None,
) -> LogZ:
    r"""Estimate log Z by annealed importance sampling from a base.

    Parameters
    ----------
    energy
        The energy whose log Z is sought.
    base
        Where the chains start; it should be at least as wide as the energy's density.
    rng
        The generator, on the base's device.
    chains
        Independent chains, 2 or more.
    temperatures
        Increments of beta, when there is no schedule: more make the bounds closer, in proportion to the time. ``None``
        for as many as the pilot run finds fit.
    kernel
        How chains move at each temperature: one that leaves the density invariant (HMC, MALA, Gibbs). ``None`` for HMC
        with five leapfrog steps.
    path
        From base to energy; geometric when ``None``.
    schedule
        Temperatures and step sizes; found by a `pilot` run when ``None``.
    steps
        Kernel steps at each temperature.
    confidence
        Probability with which ``lower`` is below log Z; this holds for any number of chains, however badly they mix.
    compile
        Compile blocks of temperatures (some seconds once per energy and shape).
    lanes
        Equal shares of the chains, each with random numbers of its own, among the processes of a job; the estimate does
        not depend on how many there are. All arguments, ``rng``'s state too, are the same on every process.

    Returns
    -------
    LogZ
        ``upper`` is infinite: draws of the base cannot tell how much of the energy they never saw. See `bracket`.

    Raises
    ------
    OptionError, DomainError, ArgumentTypeError, DivergenceError
        If an argument does not fit or no energy is finite; the message says what to try.
    """
    kernel, path = settle(energy, base, kernel, path)
    if chains < 2:
        raise OptionError(f"chains is 2 or more, for an error needs two weights; got {chains}.")
    schedule = scheduled(schedule, path, base, kernel, rng, temperatures, lanes)
    how = {"rng": rng, "steps": steps, "compile": compile, "lanes": lanes}
    log_w = forward_weights(path, schedule, kernel, base, chains, **how)
    result = from_log_weights(log_w, confidence)
    warn_if_degenerate(result, "forward weights", REMEDY)
    return result


def reverse_ais(
    energy: Energy,
    base: Tractable,
    draws: Tensor,
    *,
    rng: Generator,
    temperatures: int | None = None,
    kernel: Kernel | None = None,
    path: Path | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    confidence: float = 0.99,
    compile: bool = False,
    lanes: int | None = None,
) -> LogZ:
    """Estimate log Z by annealing draws of the model down to the base.

    With exact, independent draws ``upper`` is above log Z with the stated confidence. With approximate ones, from a
    chain, it bounds what log Z would be if the model were where the draws are: a mode they miss is missing from it, and
    correlated draws count for more than they are worth. Judge the chains (R-hat, ESS) before the bound.

    Parameters
    ----------
    energy, base, rng, temperatures, kernel, path, schedule, steps, confidence, compile, lanes
        As in `ais`.
    draws
        Draws of the model, ``(n, *event)``, 2 or more; with lanes, all of them on every process.

    Returns
    -------
    LogZ
        ``lower`` is minus infinity.

    Raises
    ------
    ShapeError, OptionError, DomainError, ArgumentTypeError, DivergenceError
        If an argument does not fit or no energy is finite; the message says what to try.
    """
    kernel, path = settle(energy, base, kernel, path)
    check_draws(draws, base)
    schedule = scheduled(schedule, path, base, kernel, rng, temperatures, lanes)
    how = {"rng": rng, "steps": steps, "compile": compile, "lanes": lanes}
    back = reverse_weights(path, schedule, kernel, draws, **how)
    result = mirrored(from_log_weights(-back, confidence))
    warn_if_degenerate(result, "reverse weights", REMEDY)
    return result


def scheduled(
    schedule: Schedule | None,
    path: Path,
    base: Tractable,
    kernel: Kernel,
    rng: Generator,
    temperatures: int | None,
    lanes: int | None,
) -> Schedule:
    """Find a schedule by a pilot run where none is given; with lanes, that of the first process for all."""
    if schedule is not None:
        return schedule
    # Every process makes the run, so that all generators stay in one state; it would not be shorter if they shared it.
    found = pilot(path, base, kernel, rng=rng, temperatures=temperatures)
    return found if lanes is None else told_by_main(found)


def forward_weights(
    path: Path,
    schedule: Schedule,
    kernel: Kernel,
    base: Tractable,
    chains: int,
    *,
    rng: Generator,
    steps: int,
    compile: bool,
    lanes: int | None,
) -> Tensor:
    r"""Carry draws of the base along the path: :math:`\log w`, ``(chains,)``; as `ais`."""

    def work(count: int, own: Generator) -> Tensor:
        return log_weights(path, schedule, kernel, base.sample(count, own), rng=own, steps=steps, compile=compile)

    if lanes is None:
        return work(chains, rng)
    return over_lanes(lanes, chains, rng, lambda rows, own: (work(rows.stop - rows.start, own),))[0]


def reverse_weights(
    path: Path,
    schedule: Schedule,
    kernel: Kernel,
    draws: Tensor,
    *,
    rng: Generator,
    steps: int,
    compile: bool,
    lanes: int | None,
) -> Tensor:
    r"""Carry draws of the model back along the path: :math:`\log w`, ``(n,)``; as `reverse_ais`."""

    def work(start: Tensor, own: Generator) -> Tensor:
        return log_weights(path, schedule, kernel, start, rng=own, steps=steps, compile=compile, backwards=True)

    if lanes is None:
        return work(draws, rng)
    return over_lanes(lanes, len(draws), rng, lambda rows, own: (work(draws[rows].clone(), own),), "draws")[0]


@torch.no_grad()
def log_weights(
    path: Path,
    schedule: Schedule,
    kernel: Kernel,
    start: Tensor,
    *,
    rng: Generator,
    steps: int = 1,
    compile: bool = False,
    backwards: bool = False,
) -> Tensor:
    r"""Carry chains along the path and return :math:`\log w`, ``(n,)``, in float64; see `carry` for the arguments."""
    return carry(path, schedule, kernel, start, rng=rng, steps=steps, compile=compile, backwards=backwards).log_weights


class Carried(NamedTuple):
    r"""Chains that were carried along a path, by `carry`.

    Attributes
    ----------
    x
        Where they ended, ``(n, *event)``: moved at the last inner temperature, and weighed at the end of the path.
    log_weights
        :math:`\log w`, ``(n,)``, in float64.
    acceptance
        Mean acceptance of each chain's moves, ``(n,)``; NaN where there was no inner temperature.
    """

    x: Tensor
    log_weights: Tensor
    acceptance: Tensor


@torch.no_grad()
def carry(
    path: Path,
    schedule: Schedule,
    kernel: Kernel,
    start: Tensor,
    *,
    rng: Generator,
    steps: int = 1,
    compile: bool = False,
    backwards: bool = False,
) -> Carried:
    r"""Carry chains along the path: where they end, and their weights.

    Parameters
    ----------
    path
        The energies.
    schedule
        Where to stop on it.
    kernel
        How to move.
    start
        Draws of the base, ``(n, *event)``; of the model when ``backwards``.
    rng
        The generator, on the chains' device.
    steps
        Kernel steps at each inner temperature.
    compile
        Compile blocks of temperatures.
    backwards
        Run from beta = 1 to 0. The sign is that of the forward weight: E[1/w] = 1/Z.
    """
    if steps < 1:
        raise OptionError(f"steps counts the kernel steps at each temperature, 1 or more; got {steps}.")
    moving = with_tensor_settings(kernel, start)
    sign = -1.0 if backwards else 1.0
    betas, sizes = schedule.reversed() if backwards else (schedule.betas, schedule.step_sizes)
    betas = betas.to(start)
    settings = [moving] * (betas.numel() - 2)
    if sizes is not None:
        settings = [with_step_size(moving, h) for h in sizes.to(start)]
    state = moving.init(path(betas[0]), start)
    gained = torch.zeros((2, start.shape[0]), dtype=torch.float64, device=start.device)
    size = max(1, GRADIENTS_PER_BLOCK // (1 + steps * kernel.gradients))
    inner = betas.numel() - 2
    fixed = not getattr(kernel, "dynamic", False)
    i = 0
    while i < inner:
        count = size if inner - i >= size else 1
        energies = _energies(path, betas[i + 1 : i + 1 + count], compile and fixed)
        kernels = settings[i : i + count]
        run: Any = compiled(anneal_block, owner_of(energies[0])) if compile and fixed else anneal_block
        with wanting(compile):
            state, gained = run(energies, kernels, state, moving.noise(state, count * steps, rng), gained)
        i += count
    last = path(betas[-1])(state.x)
    log_w = sign * (gained[0] + (state.energy - last).double())
    return Carried(state.x, log_w, gained[1] / (inner * steps))


def _energies(path: Path, betas: Tensor, together: bool) -> list[Any]:
    """The energies at some temperatures; those of a compiled block are one module, where the path's can tell others.

    A compiled block looks at every module that it is given before each run, which takes longer than the call.
    """
    if together and (at := getattr(first := path(betas[0]), "at", None)) is not None:
        return [first, *(at(b) for b in betas[1:].unbind())]
    return [path(b) for b in betas]


def anneal_block(
    energies: Sequence[Energy], kernels: Sequence[Kernel], state: State, noise: tuple[Tensor, ...], gained: Tensor
) -> tuple[State, Tensor]:
    """Pass through some temperatures: weigh on arrival, then move; a pure function, compiled or not.

    ``gained`` holds the sums of log-weights and of acceptances, ``(2, n)``.
    """
    steps = noise[0].shape[0] // len(energies)
    for i, (energy, kernel) in enumerate(zip(energies, kernels)):
        # The state holds the energy at the last temperature, and is evaluated once at this one: that is the weight.
        # A kernel may carry over what does not depend on the temperature.
        arrive = getattr(kernel, "arrive", None) if i else None
        arrived = kernel.init(energy, state.x) if arrive is None else arrive(energy, state, energies[i - 1])
        weight, accepted = (state.energy - arrived.energy).double(), torch.zeros_like(gained[1])
        state = arrived
        for j in range(i * steps, (i + 1) * steps):
            state, info = kernel.step(energy, state, tuple(z[j] for z in noise))
            accepted = accepted + info.acceptance
        gained = gained + torch.stack((weight, accepted))
    return state, gained


def settle(energy: Energy, base: Tractable, kernel: Kernel | None, path: Path | None) -> tuple[Kernel, Path]:
    """Check what `ais`, `reverse_ais` and `bracket` are given, and fill in kernel and path.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError, ShapeError
        If an argument does not fit.
    """
    require_tractable(base, "base")
    if path is None and getattr(energy, "context", ()):
        raise OptionError(
            f"The energy is conditional on {', '.join(energy.context)}: fix it with energy.given(...), or give a path."
        )
    check_function(energy)
    adopted = Energy.of(energy)
    support = common_support((base, adopted))
    if not same_support(base.support, support) and getattr(support, "is_discrete", False):
        raise DomainError(
            f"The base lives on {base.support} and the energy on {support}; choose a base of the same kind."
        )
    if kernel is None:
        if getattr(support, "is_discrete", False):
            raise OptionError(f"The energy lives on {support}; give a discrete kernel: kernel=....")
        kernel = HMC(0.1, leapfrog=5)
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise ArgumentTypeError(f"The kernel needs init, noise and step (HMC, MALA, Gibbs, ...); got {kernel!r}.")
    if not is_adjusted(kernel):
        raise OptionError(
            f"Chains along a path need a kernel that leaves each density invariant; {kernel!r} is unadjusted, and the "
            "weights would be biased. Use MALA or HMC, or on discrete states an adjusted kernel."
        )
    check_domain(base, kernel)
    return kernel, geometric(base, adopted) if path is None else path


def check_draws(draws: Tensor, base: Tractable) -> None:
    """Check that draws of the model fit the base.

    Raises
    ------
    ArgumentTypeError, ShapeError
        If they are not floating point, fewer than two, or not of the base's event shape.
    """
    if not isinstance(draws, Tensor) or not draws.is_floating_point():
        raise ArgumentTypeError(f"draws is a floating-point tensor (n, *event); got {type(draws).__name__}.")
    if draws.shape[1:] != base.event_shape or draws.shape[0] < 2:
        raise ShapeError(
            f"draws holds two or more points of shape {tuple(base.event_shape)}, the base's; got {tuple(draws.shape)}."
        )
