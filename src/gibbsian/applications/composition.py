r"""Composition: draws of products, negations and mixtures of energies that know noise levels.

Write the composition by the algebra, over energies with the context ``sigma`` and others without: ``a + b``,
``a - 0.5 * b``, ``mixture(a, b)``, ``a + 2.0 * windowed(b, low=0.5)``. At each level it stands for a density,

.. math:: \gamma_k(x) = e^{-E(x, \sigma_k)}, \qquad E = \textstyle\sum_i w_i E_i,

and the last level's is what draws are of. These densities are not one density under more and more noise, even if those
of each term are: a walk along the summed scores (`gibbsian.bridges.reverse`) ends somewhere else. Two corrections go
together.

**Weights.** Populations of particles walk down the levels by a reverse step F with the summed score, and gain

.. math:: w = \frac{\gamma_{k+1}(x')\, B(x \mid x')}{\gamma_k(x)\, F(x' \mid x)}, \qquad
          B(x \mid x') = N(x; x', q), \quad F(x' \mid x) = N(x'; x + q S(x), \, q\,(1 - q\, \overline{S^2})),

with :math:`S = -\nabla E(\cdot, \sigma_k)`: B adds noise, F takes it back, and their ratio repairs what F gets wrong.
Weighted, the particles are draws of :math:`\gamma_{k+1}` whatever the energies are; nothing asks that those of a term
be one density under noise, or that the levels be close. Where they are both, and c below is 1, these are the
Feynman-Kac weights of `feynman_kac`, which needs no energies. Populations are resampled as their weights become uneven,
and the mean weight estimates log Z. The noise q matters for the variance of the weights only: it starts from
:math:`q = c\,(\sigma_k^2 - \sigma_{k+1}^2)`, c the variance of the composition at the highest level over that of the
noise (1/2 for a product of two), and c follows what leaves the weights most even, staying in place (q = 0) included.

**Moves.** At each level a kernel that leaves :math:`\gamma_k` invariant moves the particles, its step size set by the
acceptance as it goes. Without weights, chains forget the levels above as well as they mix.

`Compositional visual generation with energy based models (Du, Li & Mordatch, 2020)
<https://arxiv.org/abs/2004.06030>`_; `Reduce, reuse, recycle: compositional generation with energy-based diffusion
models and MCMC (Du et al., 2023) <https://arxiv.org/abs/2302.11552>`_ for the moves; `Feynman-Kac correctors in
diffusion: annealing, guidance, and product of experts (Skreta et al., 2025) <https://arxiv.org/abs/2503.02819>`_ and
`Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006)
<https://doi.org/10.1111/j.1467-9868.2006.00553.x>`_ for the weights; `Analytic-DPM: an analytic estimate of the optimal
reverse variance in diffusion probabilistic models (Bao et al., 2022) <https://arxiv.org/abs/2201.06503>`_ for the
variance of F.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.applications.composed import Composed, correction_of, log_z_of
from gibbsian.applications.feynman_kac import Step, check_counts
from gibbsian.applications.normalisable import Growth, check_normalisable, has_negative_weight, warn_not_normalisable
from gibbsian.applications.starts import ENOUGH, fitted_gaussian
from gibbsian.bridges.reverse import falling
from gibbsian.energies.base import Combination, Energy, formula
from gibbsian.energies.domains import kind_of
from gibbsian.energies.layers import check_function
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel, evaluate, has_step_size, is_adjusted
from gibbsian.kernels.langevin import MALA
from gibbsian.partition.paths import geometric
from gibbsian.partition.population import Walk, move, walk, weigh
from gibbsian.sampling import check_domain, with_tensor_settings

SPARE = 0.5
"""Conditional effective size, as a fraction, that a temperature between the start and the highest level leaves."""


@torch.no_grad()
def compose(
    energy: Energy,
    levels: Sequence[float],
    *,
    rng: Generator,
    kernel: Kernel | Callable[[float], Kernel] | None = None,
    steps: int = 5,
    chains: int = 2048,
    start: Tractable | None = None,
    weights: bool = True,
    predict: bool = True,
    populations: int = 16,
    resample: float = 0.5,
    last_steps: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Composed:
    """Draw from a composition of noise-conditional energies, corrected by weights and by moves at each level.

    Parameters
    ----------
    energy
        The composition, with the context ``sigma`` and no other: fix labels with ``given(y=...)``. Terms without
        ``sigma`` act at every level.
    levels
        Falling noise levels, two or more, the last above 0; the first far above the spread of the data. ``schedule
        .levels(40)`` lists some.
    rng
        The generator of everything, on the energy's device.
    kernel
        How particles move at each level; its step size, where it has one, follows its acceptance. Or a function from a
        level to the kernel to use there, as it is: ``lambda sigma: ULA(0.1 * sigma**2)``. `MALA` when left out.
    steps
        Kernel steps at each level; 0 for none.
    chains
        Particles.
    start
        A density to start from. It is corrected for, by temperatures between it and the highest level where need be.
        When left out, the Gaussian that the composition comes close to there.
    weights
        Whether particles are weighted and resampled.
    predict
        Whether a reverse step leads from level to level; else particles stay where they are until they are moved.
    populations
        Equal parts of the particles that are resampled apart; 1 for as a whole, which leaves log Z without an error.
    resample
        A population is resampled when its effective size falls to this fraction of it.
    last_steps
        Kernel steps at the last level, when they are to be more.
    progress
        Called with 1 after each level.

    Raises
    ------
    OptionError
        If the energy takes no ``sigma``, has other context open or a weight that is not finite, levels do not fall or
        never reach noise, or another option is out of its range.
    ArgumentTypeError, DomainError, ShapeError
        If something is of another kind, or lives elsewhere.
    DivergenceError
        If no energy, or no point, is finite.

    Warns
    -----
    RuntimeWarning
        If a difference is probably not normalisable, the highest level is no noise although a start was given, or
        populations disagree.
    """
    told = _checked(energy, levels)
    check_counts(chains, populations, resample)
    if min(steps, last_steps or 0) < 0:
        raise OptionError(f"steps and last_steps count the kernel's steps, 0 or more; got {steps} and {last_steps}.")
    base, growth = _start(energy, start, told, rng)
    moves = _Moves(kernel, told[0], base)
    check_domain(energy, moves.kernel)
    top = energy.given(sigma=told[0])
    at = walk(
        geometric(base, top) if weights else lambda beta: top,
        base,
        moves.kernel,
        rng,
        chains=chains,
        moves=steps,
        populations=populations,
        spare=SPARE,
        resample=resample,
        adapt=moves.adapted,
    )
    temperatures, ess, noise = len(at.betas) - 1, at.ess[-1:], []
    moves.note(at.acceptance[-1], at.log_sizes[-1])
    # The first guess of c; a start that was given says nothing about it.
    spread = _spread(base) / told[0] ** 2 if start is None and weights else 1.0
    if progress is not None:
        progress(1)
    for place, (high, low) in enumerate(pairwise(told)):
        step, taken = Step(energy, at.x, high, low, at.log_w + at.log_z[:, None]), float(predict)
        if predict and weights:
            taken = step.best(spread, rng)
            spread = taken or spread
        at.x, gained = step.take(taken, rng)
        noise.append(taken)
        _weigh(at, gained, weights, resample, rng, low)
        ess.append(at.ess[-1])
        count = last_steps if last_steps is not None and place == len(told) - 2 else steps
        at.x = moves.make(energy.given(sigma=at.x.new_tensor(low)), at.x, low, count, rng)
        if progress is not None:
            progress(1)
    exact = steps == 0 or moves.exact
    return Composed(
        at.x,
        (at.log_w + at.log_z[:, None]).flatten(),
        told,
        _numbers(moves.acceptance),
        _numbers(ess),
        _numbers(moves.sizes),
        _numbers(noise),
        log_z_of(at) if weights and exact else None,
        correction_of(weights, steps, moves.kernel, exact),
        base,
        temperatures,
        growth,
        int(at.nonfinite.sum()),
    )


class _Moves:
    """The kernel on its way down the levels, and what became of it at each."""

    def __init__(self, kernel: Any, sigma: float, base: Tractable) -> None:
        self.at_level = kernel if kernel is not None and not isinstance(kernel, (Kernel, type)) else None
        self.kernel = self._kernel(kernel, sigma, base)
        self.adapted = self.at_level is None and has_step_size(self.kernel)
        self.exact = is_adjusted(self.kernel)
        self.log_h = 0.0
        self.acceptance: list[float] = []
        self.sizes: list[float] = []

    def _kernel(self, kernel: Any, sigma: float, base: Tractable | None) -> Kernel:
        if kernel is None:
            return MALA(0.5 * _spread(base))
        found = kernel(sigma) if self.at_level is not None and callable(kernel) else kernel
        if isinstance(found, type) or not isinstance(found, Kernel):
            raise ArgumentTypeError(
                f"A kernel is MALA(...), HMC(...), or a function from a level to one; got {found!r}."
            )
        return found

    def note(self, acceptance: float, log_h: float) -> None:
        """Note how a level went."""
        self.log_h = log_h
        self.acceptance.append(acceptance)
        own = float(getattr(self.kernel, "step_size", math.nan))
        self.sizes.append(math.exp(log_h) if self.adapted else own)

    def make(self, energy: Energy, x: Tensor, sigma: float, count: int, rng: Generator) -> Tensor:
        """Move particles at a level."""
        if self.at_level is not None:
            self.kernel = self._kernel(self.at_level, sigma, None)
            self.exact = self.exact and is_adjusted(self.kernel)
        gain = 1.0 if self.adapted else None
        x, log_h, rate = move(energy, with_tensor_settings(self.kernel, x), x, self.log_h, gain, count, rng)
        self.note(rate, log_h)
        return x


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _weigh(at: Walk, gained: Tensor, weights: bool, resample: float, rng: Generator, low: float) -> None:
    if not weights:
        if not bool(torch.isfinite(gained).all()):
            raise DivergenceError(
                f"Points left the numbers on the way to noise level {low:.4g}. Use more levels, or weights=True, which "
                "drops such points and counts them."
            )
        at.ess.append(float(len(at.x)))
        return
    if not bool(torch.isfinite(gained.reshape(at.log_w.shape) + at.log_w).any()):
        raise DivergenceError(
            f"The energy is infinite or NaN at all {len(at.x)} particles at noise level {low:.4g}. Look for NaN in a "
            "term, or for terms whose domains do not meet."
        )
    weigh(at, gained, resample, rng)


def _checked(energy: object, levels: Sequence[float]) -> tuple[float, ...]:
    """Refuse what cannot be walked down noise levels; return these."""
    if not isinstance(energy, Energy):
        raise ArgumentTypeError(
            f"A composition is an energy, built by a + b, w * a, a - b or mixture(a, b); got {type(energy).__name__}. "
            "Scores without energies are composed by compose_scores."
        )
    if kind_of(energy.support) not in ("real", "box"):
        raise DomainError(
            f"Noise levels are of Gaussian noise, on the reals; {formula(energy)} lives on {energy.support}."
        )
    if "sigma" not in energy.context:
        raise OptionError(
            f"No term of {formula(energy)} knows noise levels (has the context sigma open), so that there is nothing "
            "to walk down. Draw from it by smc(energy, base), or by sample with MALA or HMC."
        )
    if others := [name for name in energy.context if name != "sigma"]:
        raise OptionError(f"{formula(energy)} still asks for {', '.join(others)}; fix it with given({others[0]}=...).")
    for weight, term in energy.terms if isinstance(energy, Combination) else ():
        if not math.isfinite(float(weight)):
            raise OptionError(f"The weight of {formula(term)} is {float(weight)}; weights are finite numbers.")
    check_function(energy)
    told = falling(levels)
    if told[-1] <= 0.0:
        raise OptionError(f"An energy has no density without noise: the last level is above 0; got {told[-1]}.")
    return told


def _start(
    energy: Energy, start: Tractable | None, levels: Sequence[float], rng: Generator
) -> tuple[Tractable, Growth | None]:
    """Find where to start, and see that the highest level is noise and that a difference is normalisable."""
    if start is not None and not isinstance(start, Tractable):
        raise ArgumentTypeError(
            f"A start is a density to draw from, such as Gaussian(2, scale={levels[0]:.3g}); got "
            f"{type(start).__name__}. Points alone could not be corrected for."
        )
    shape = energy.event_shape if start is None else start.event_shape
    if shape is None:
        raise OptionError(
            f"{formula(energy)} does not tell the shape of a point; pass start=Gaussian(shape, scale=...)"
        )
    if energy.event_shape not in (None, shape):
        raise ShapeError(f"The energy takes points of shape {tuple(energy.event_shape)}, the start {tuple(shape)}.")
    own = next((t for t in chain(energy.parameters(), energy.buffers()) if t.is_floating_point()), torch.zeros(()))
    like = own if start is None else start.sample(1, rng)
    zero = torch.zeros(shape, dtype=like.dtype, device=like.device)
    around = start if isinstance(start, Gaussian) else Gaussian(loc=zero, scale=torch.full_like(zero, levels[0]))
    growth = None
    if has_negative_weight(energy):
        found = [
            (check_normalisable(energy.given(sigma=zero.new_tensor(s)), around, rng=rng, warn=False), s) for s in levels
        ]
        growth, sigma = min(found, key=lambda pair: (pair[0].normalisable, pair[0].growth[-1]))
        if not growth.normalisable:
            warn_not_normalisable(energy, growth, f" at noise level {sigma:.3g}", stacklevel=5)
    top = energy.given(sigma=zero.new_tensor(levels[0]))
    base, explained = fitted_gaussian(lambda x: -evaluate(top, x)[1], around, rng)
    # Written so that NaN counts as too little.
    if base is None or not explained >= ENOUGH:
        message = (
            f"These noise levels never reach noise: at the highest, {levels[0]:.4g}, a Gaussian explains "
            f"{explained:.0%} of the score of {formula(energy)}, where {ENOUGH:.0%} is asked for. Begin at a higher "
            "level, at which the energies were trained"
        )
        if start is None:
            raise OptionError(f"{message}, or pass a start, from which temperatures lead to this level.")
        warnings.warn(
            f"{message}. The masses of modes that are apart there rest on the weights from the start to that level.",
            RuntimeWarning,
            stacklevel=4,
        )
    return (cast(Tractable, base) if start is None else start), growth


def _spread(base: Tractable | None) -> float:
    """The variance of a coordinate under a Gaussian, the smallest one; 1 for another density."""
    return float(base.scale.min()) ** 2 if isinstance(base, Gaussian) and not base.full else 1.0
