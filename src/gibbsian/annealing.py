r"""Walking down the noise levels of a noise-conditional energy.

With :math:`E(x, \sigma)` for the density of the data under noise, the probability-flow equation
:math:`dx / d\sigma = \sigma \nabla E(x, \sigma)` carries the noisy density at one level to that of the next. A Heun
step along it predicts; Langevin steps at the new level correct. Without the predictor it is annealed Langevin dynamics.

Or a chain on each level's energy, with a Metropolis test, starts where the one above has ended (`annealed_chains`).
That needs no level to be the next one's noisy version, and so serves products and guided energies, which are not.

Or each level is drawn given the one above, by a chain on :math:`E(x, \sigma_t) + |x_{t+1} - x|^2 / 2 s_t^2`: ancestral
sampling, which is exact at any distance of the levels when the chains are long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.chain_lanes import in_parts
from gibbsian.energies.base import Energy
from gibbsian.energies.recovery import RecoveryEnergy, check_levels, check_noise_conditional, spreads
from gibbsian.energies.schedules import rho_levels
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.kernels.base import Kernel, evaluate, has_step_size, with_step_size
from gibbsian.kernels.langevin import ULA
from gibbsian.processes.lanes import Lanes
from gibbsian.processes.work import over_lanes
from gibbsian.samples import Samples
from gibbsian.sampling import sample
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class Annealing:
    r"""How to walk down the noise levels.

    The levels are :math:`\sigma_i = (\sigma_{\max}^{1/\rho} + \tfrac{i}{m}(\sigma_{\min}^{1/\rho} -
    \sigma_{\max}^{1/\rho}))^{\rho}`. A corrector step at level :math:`\sigma` is unadjusted Langevin of step size
    :math:`c\,\sigma^2`.

    `Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
    <https://arxiv.org/abs/2206.00364>`_ for levels and predictor; `Score-based generative modeling through stochastic
    differential equations (Song et al., 2021) <https://arxiv.org/abs/2011.13456>`_ for predictor and corrector;
    `Generative modeling by estimating gradients of the data distribution (Song & Ermon, 2019)
    <https://arxiv.org/abs/1907.05600>`_ for annealed Langevin dynamics.

    Parameters
    ----------
    sigma_max, sigma_min
        The ends.
    levels
        Steps between them, m.
    corrector_steps
        Langevin steps at each level.
    corrector_size
        c above.
    predictor
        Whether a Heun step leads from level to level; each costs two gradients.
    rho
        How much denser the levels are at the low end.
    denoise
        End with the mean of the clean point given the noisy one, :math:`x - \sigma_{\min}^2 \nabla E` (Tweedie's
        formula): points of the data then, no longer draws of the density at ``sigma_min``.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    sigma_max: float
    sigma_min: float
    levels: int = 24
    corrector_steps: int = 1
    corrector_size: float = 0.1
    predictor: bool = True
    rho: float = 5.0
    denoise: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise OptionError(f"Noise levels need 0 < sigma_min < sigma_max; got {self.sigma_min}, {self.sigma_max}.")
        if self.levels < 1 or self.corrector_steps < 0 or not self.corrector_size > 0 or not self.rho > 0:
            raise OptionError(
                "levels is 1 or more, corrector_steps 0 or more, corrector_size and rho positive; got "
                f"{self.levels}, {self.corrector_steps}, {self.corrector_size}, {self.rho}."
            )
        if not self.predictor and self.corrector_steps == 0:
            raise OptionError("Annealing without predictor and without corrector steps would not move.")

    def sigmas(self) -> list[float]:
        """The levels from the highest to the lowest, ``levels + 1`` of them."""
        return rho_levels(self.sigma_max, self.sigma_min, self.levels, self.rho)


@torch.no_grad()
def anneal(
    energy: Energy,
    start: Tensor,
    annealing: Annealing,
    *,
    rng: Generator,
    progress: Callable[[int], object] | None = None,
    lanes: int | None = None,
) -> Tensor:
    """Carry points from the highest noise level to the lowest.

    Parameters
    ----------
    energy
        With the context ``sigma``.
    start
        Draws at the highest level, ``(n, *event)``; for a `NoiseConditional`, from ``energy.base(sigma_max)``.
    annealing
        The levels and how to step.
    rng
        The generator of the corrector's noise.
    progress
        Called with 1 after each level.
    lanes
        Equal shares of the points, each with random numbers of its own, among the processes of a job: as in
        `gibbsian.sample`, with all points on every process.

    Returns
    -------
    Tensor
        Draws at ``sigma_min``, ``(n, *event)``.

    Raises
    ------
    OptionError
        If the energy takes no ``sigma``.
    DivergenceError
        If a point leaves the numbers.
    """
    if "sigma" not in energy.context:
        raise OptionError(f"Annealing needs an energy with the context 'sigma'; {energy!r} takes {energy.context}.")
    if lanes is not None:
        return _in_lanes(
            lanes, start, rng, progress, lambda x, own, told: anneal(energy, x, annealing, rng=own, progress=told)
        )
    x = start
    sigmas = annealing.sigmas()
    for high, low in pairwise(sigmas):
        if annealing.predictor:
            x = heun(lambda y, sigma: sigma * evaluate(energy.given(sigma=sigma), y)[1], x, high, low)
            _require_finite(x, f"between noise levels {high:.4g} and {low:.4g}")
        if annealing.corrector_steps:
            kernel = ULA(step_size=annealing.corrector_size * low**2)
            x = sample(energy.given(sigma=low), kernel, x, steps=annealing.corrector_steps, rng=rng).x
        if progress is not None:
            progress(1)
    if annealing.denoise:
        x = denoised(energy.given(sigma=sigmas[-1]), x, sigmas[-1])
        _require_finite(x, f"when the noise of {sigmas[-1]:.4g} was taken out")
    return x


def _in_lanes(
    lanes: int,
    start: Tensor,
    rng: Generator,
    progress: Callable[[int], object] | None,
    walk: Callable[[Tensor, Generator, Callable[[int], object]], Tensor],
) -> Tensor:
    """Walk down with the points of each lane, and put those of all processes behind one another."""
    part = in_parts(progress or (lambda _: None), len(Lanes(lanes).own))
    return over_lanes(lanes, len(start), rng, lambda rows, own: (walk(start[rows].clone(), own, part),), "points")[0]


def heun(slope: Callable[[Tensor, float], Tensor], x: Tensor, high: float, low: float) -> Tensor:
    r"""One step of Heun's method along :math:`dx / d\sigma`, from one noise level to another.

    Parameters
    ----------
    slope
        The derivative, of points ``(n, *event)`` and a level.
    x
        Points at ``high``.
    high, low
        The levels.
    """
    first = slope(x, high)
    return x + 0.5 * (low - high) * (first + slope(x + (low - high) * first, low))


def denoised(energy: EnergyFn, x: Tensor, sigma: float) -> Tensor:
    r"""Take out the noise that a density was smoothed with: :math:`x - \sigma^2 \nabla E(x)`.

    It is the mean of what x was before Gaussian noise of standard deviation ``sigma`` was added. Chains that walk a
    smoothed density and end with this are those of `Neural empirical Bayes (Saremi & Hyvärinen, 2019)
    <https://www.jmlr.org/papers/v20/19-216.html>`_.
    """
    return x - sigma**2 * evaluate(energy, x)[1]


class Annealed(NamedTuple):
    """What `annealed_chains` returns.

    Attributes
    ----------
    samples
        Of the last level.
    levels
        The noise levels, from the highest.
    acceptance
        Mean acceptance at each, ``(levels,)``.
    step_sizes
        The step size with which each was left, ``(levels,)``; NaN for a kernel without one.
    """

    samples: Samples
    levels: tuple[float, ...]
    acceptance: Tensor
    step_sizes: Tensor


@torch.no_grad()
def annealed_chains(
    energy: Energy,
    start: Tensor,
    levels: Sequence[float],
    kernel: Kernel | Callable[[float], Kernel],
    *,
    steps: int,
    rng: Generator,
    rounds: int = 2,
    thin: int | None = None,
    last_steps: int | None = None,
    progress: Callable[[int], object] | None = None,
    lanes: int | None = None,
) -> Annealed:
    """Run chains on the energy of each noise level, from the highest to the lowest.

    With a kernel that is exact at every level, what is left of the levels above is what the chains have not forgotten.
    Where levels lie close and modes part slowly that is little, also when the energies are not those of one density
    under more and more noise: sums and guided energies. `Reduce, reuse, recycle: compositional generation with
    energy-based diffusion models and MCMC (Du et al., 2023) <https://arxiv.org/abs/2302.11552>`_.

    A kernel with a step size has it set on the way, from the mean acceptance of all chains after each round: it
    grows or shrinks towards the kernel's ``target_acceptance``. With hundreds of chains no chain notices its own part
    in that mean.

    Parameters
    ----------
    energy
        With the context ``sigma`` and no other; fix labels with ``energy.given(y=...)``.
    start
        Draws at the highest level, or points as spread out, ``(n, *event)``.
    levels
        Falling noise levels, two or more, the last above 0.
    kernel
        `MALA`, `HMC` and the like, whose step size suits the highest level or comes to suit it; or a function from a
        level to the kernel to use there, as it is.
    steps
        Of the kernel in each round.
    rng
        The generator of all noise.
    rounds
        How many rounds at each level, between which the step size is set.
    thin
        Keep every ``thin``-th position of the last round at the last level.
    last_steps
        Steps of that last round, when it is to be longer.
    progress
        Called with 1 after each level.
    lanes
        Equal shares of the points, each with random numbers of its own, among the processes of a job: as in
        `gibbsian.sample`, with all points on every process.

    Raises
    ------
    OptionError
        If the energy takes no ``sigma``, the levels do not fall, or a count is below 1.
    DomainError
        If it lives on discrete states, or is not finite at a point.
    """
    check_noise_conditional(energy, start)
    told = tuple(float(level) for level in levels)
    if len(told) < 2 or any(high <= low for high, low in pairwise(told)) or not 0.0 < told[-1] <= told[0] < math.inf:
        raise OptionError(
            f"Chains go down two or more noise levels, falling, the last above 0; got {told}. "
            "Annealing(sigma_max, sigma_min).sigmas() lists some."
        )
    if min(steps, rounds, last_steps or 1) < 1:
        raise OptionError(f"steps, rounds and last_steps are 1 or more; got {steps}, {rounds}, {last_steps}.")
    state, moving, done = start, kernel, None
    acceptance: list[float] = []
    sizes: list[float] = []
    for place, sigma in enumerate(told):
        at, total = energy.given(sigma=start.new_tensor(sigma)), 0.0
        for number in range(rounds):
            last = place == len(told) - 1 and number == rounds - 1
            now = moving if isinstance(moving, Kernel) else moving(sigma)
            count = last_steps or steps if last else steps
            done = sample(at, now, state, steps=count, rng=rng, thin=thin if last else None, lanes=lanes)
            state, rate = done.x, float(done.acceptance.mean())
            total += rate / rounds
            if isinstance(kernel, Kernel) and has_step_size(now) and not last:
                moving = _resized(now, rate)
        assert done is not None
        acceptance.append(total)
        sizes.append(float(getattr(done.kernel, "step_size", math.nan)))
        if progress is not None:
            progress(1)
    assert done is not None
    return Annealed(done, told, torch.tensor(acceptance), torch.tensor(sizes))


def _resized(kernel: Any, acceptance: float) -> Kernel:
    """A kernel whose step size has gone some way towards its best acceptance; at most by a factor of about two."""
    return with_step_size(kernel, float(kernel.step_size) * math.exp(1.5 * (acceptance - kernel.target_acceptance)))


@torch.no_grad()
def ancestral_sample(
    energy: Energy,
    start: Tensor,
    levels: Sequence[float] | Tensor,
    kernel: Kernel,
    *,
    steps: int,
    rng: Generator,
    compile: bool = False,
    progress: Callable[[int], object] | None = None,
    lanes: int | None = None,
) -> Tensor:
    r"""Draw each noise level given the one above, from the highest to the lowest.

    The draws of a model fitted by `RecoveryLikelihood`, with the levels, kernel and steps of its training: short chains
    are part of what was learned. `Learning energy-based models by diffusion recovery likelihood (Gao, Song, Poole, Wu &
    Kingma, 2021) <https://arxiv.org/abs/2012.08125>`_.

    Parameters
    ----------
    energy
        With the context ``sigma`` and no other; fix labels with ``energy.given(y=...)``.
    start
        Draws at the highest level, ``(n, *event)``; for a `NoiseConditional`, from ``energy.base(levels[-1])``.
    levels
        Rising, two or more; the last is that of ``start``.
    kernel
        How a chain moves, in units of the noise between two levels.
    steps
        Steps of the chain at each level.
    rng
        The generator of all noise.
    compile
        As in `gibbsian.sample`.
    progress
        Called with 1 after each level.
    lanes
        Equal shares of the points, each with random numbers of its own, among the processes of a job: as in
        `gibbsian.sample`, with all points on every process.

    Returns
    -------
    Tensor
        Draws at ``levels[0]``, ``(n, *event)``.

    Raises
    ------
    OptionError
        If the energy takes no ``sigma``, or the levels do not rise.
    DomainError
        If it lives on discrete states, or is not finite at a point.
    """
    check_noise_conditional(energy, start)
    told, x = check_levels(levels), start
    if lanes is not None:

        def walk(x: Tensor, own: Generator, part: Callable[[int], object]) -> Tensor:
            how = {"steps": steps, "rng": own, "compile": compile, "progress": part}
            return ancestral_sample(energy, x, levels, kernel, **how)

        return _in_lanes(lanes, start, rng, progress, walk)
    for sigma, spread in reversed(list(zip(told, spreads(told)))):
        given = RecoveryEnergy(energy.given(sigma=x.new_tensor(sigma)), x, x.new_tensor(spread))
        x = given.points(sample(given, kernel, torch.zeros_like(x), steps=steps, rng=rng, compile=compile).x)
        if progress is not None:
            progress(1)
    return x


def _require_finite(x: Tensor, where: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise DivergenceError(
            f"Points left the numbers {where}. Use more levels, or train longer: the energy's gradient is not that of "
            "a density under noise."
        )
