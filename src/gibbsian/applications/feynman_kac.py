r"""Feynman-Kac weights: what a step down the noise levels owes to the density that it should reach.

**With energies** (`Step`) the weights are exact for levels at any distance and for any energies: see `composition`.

**With scores alone** (`compose_scores`) the densities of a composition are unknown, but their change is known if each
term is one density under noise. Such :math:`q_i` obey the heat equation, so that as the noise falls,
:math:`d\tau = -d\sigma^2`,

.. math:: \partial_\tau \log q_i = -\tfrac12 \left(\nabla \cdot s_i + |s_i|^2\right).

Let :math:`U = \sum_i w_i \log q_i` and :math:`S = \nabla U = \sum_i w_i s_i`. The density of the walk
:math:`dx = \kappa S \, d\tau + \sqrt{c}\, dW`, whose particles gain log-weight at the rate :math:`\omega`, stays
:math:`e^U / Z` if

.. math:: \omega = \partial_\tau U + \nabla \cdot (\kappa S) + \kappa |S|^2 - \tfrac{c}{2}
          \left(\nabla \cdot S + |S|^2\right) + \text{const},

and with :math:`\kappa = (1 + c) / 2` the divergences cancel, whatever c is:

.. math:: \omega = \tfrac12 \Bigl( |S|^2 - \sum_i w_i |s_i|^2 \Bigr).

A drift :math:`a\,(x - m)` may be added to the walk, which adds :math:`a\,(x - m) \cdot S` to the rate: its divergence
is the same everywhere. A product's walk shrinks too fast, and such a drift undoes it; for Gaussian terms it leaves all
weights equal. At each level m is the mean of the particles, and a makes the rates as even as they get.

For a product of two the rate without it is :math:`s_1 \cdot s_2`; for guidance, weights :math:`1 - s` and s, it is
:math:`\tfrac12 s (s - 1) |s_1 - s_2|^2`; for one term of weight 1 it is 0. The rate is integrated by the trapezoidal
rule and the walk by Euler steps, so that the distance of the levels leaves an error of first order; a score that is not
one of a density under noise leaves another.

`Feynman-Kac correctors in diffusion: annealing, guidance, and product of experts (Skreta et al., 2025)
<https://arxiv.org/abs/2503.02819>`_.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.applications.composed import Composed, correction_of
from gibbsian.applications.starts import ENOUGH, fitted_gaussian
from gibbsian.applications.terms import SummedScore, WindowedScore
from gibbsian.bridges.reverse import falling, readable
from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.base import evaluate, row_sum
from gibbsian.partition.population import Walk, conditional_size, weigh

PILOT = 512
"""Particles by which the noise of a step is chosen."""


class Step:
    """Particles about to go from one noise level to the next, under an energy.

    Parameters
    ----------
    energy
        With the context ``sigma``.
    x
        Particles at the higher level, ``(n, *event)``.
    high, low
        The levels.
    log_w
        Their log-weights, ``(n,)`` in all.
    """

    def __init__(self, energy: Energy, x: Tensor, high: float, low: float, log_w: Tensor) -> None:
        self.x, self.high, self.low, self.log_w = x, high, low, log_w.flatten()
        self.target = energy.given(sigma=x.new_tensor(low))
        self.value, self.grad = evaluate(energy.given(sigma=x.new_tensor(high)), x)
        w = self.log_w.softmax(0).to(x.dtype)
        squares = torch.where(self.grad.isfinite(), self.grad, 0.0).square()
        self.moment = torch.tensordot(w, squares, 1)

    def take(self, c: float, rng: Generator, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Step with noise c, all particles or some rows; return where to, and the log-weights gained, float64."""
        x, value, grad = (t if rows is None else t[rows] for t in (self.x, self.value, self.grad))
        q = c * (self.high - self.low) * (self.high + self.low)
        if q == 0.0:
            return x, _finite(value.double() - self.target(x).double())
        # The variance of the cleaner point given the noisier one, never below what it is for data without spread.
        ratio = (1.0 - q * self.moment).clamp(min=(self.low / self.high) ** 2)
        z = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        new = x - q * grad + (q * ratio).sqrt() * z
        new = torch.where(new.isfinite(), new, x)
        forth = -0.5 * row_sum(z.square()) - 0.5 * ratio.log().sum()
        back = -0.5 * row_sum((x - new).square()) / q
        gained = value.double() - self.target(new).double() + (back - forth).double()
        return new, _finite(gained)

    def best(self, c: float, rng: Generator) -> float:
        """Choose the noise whose weights are the most even, on a part of the particles."""
        n = len(self.x)
        rows = torch.arange(0, n, max(1, n // PILOT), device=self.x.device)
        carried, sizes = self.log_w[rows], {}
        # Noise leads across walls, from where no particle is: only in place are the weights right.
        if bool((self.take(c, rng, rows)[1] == -torch.inf).any()):
            return 0.0
        for factor in (1.0, 0.6, 1.6, 0.0):
            gained = self.take(factor * c, rng, rows)[1]
            alive = torch.isfinite(gained + carried)
            sizes[factor * c] = conditional_size(carried[alive], gained[alive]) if bool(alive.any()) else 0.0
        return max(sizes, key=lambda key: sizes[key])


@torch.no_grad()
def compose_scores(
    score: SummedScore,
    levels: Sequence[float],
    *,
    rng: Generator,
    shape: Sequence[int] | None = None,
    start: Tractable | None = None,
    chains: int = 2048,
    weights: bool = True,
    noise: float = 1.0,
    populations: int = 16,
    resample: float = 0.5,
    progress: Callable[[int], object] | None = None,
) -> Composed:
    r"""Draw from a product or negation of scores without energies, corrected by Feynman-Kac weights.

    Parameters
    ----------
    score
        The weighted sum, ``SummedScore((a, b), (1.0, -0.5))``, without open context.
    levels
        Falling noise levels, the last above 0; a hundred or more, as their distance leaves an error.
    rng
        The generator of everything, on the scores' device.
    shape
        Of one point; needed without ``start``.
    start
        A density to start from, which is trusted: without energies nothing can correct for it. When left out, the
        Gaussian that the sum comes close to at the highest level.
    chains, populations, resample
        As for `compose`.
    weights
        Whether particles are weighted and resampled; else it is a plain walk along the summed scores.
    noise
        c above, how much noise a step draws anew: 1 is the usual reverse diffusion, 0 draws none.
    progress
        Called with 1 after each level.

    Raises
    ------
    OptionError
        If the score has open context or a windowed term, levels do not fall or never reach noise, or an option is out
        of its range.
    ArgumentTypeError
        If the score is no `SummedScore`.
    DivergenceError
        If points leave the numbers.
    """
    if not isinstance(score, SummedScore):
        raise ArgumentTypeError(
            f"The weights need to know the terms: SummedScore((a, b), (1.0, 1.0)); got {type(score).__name__}."
        )
    if weights and any(isinstance(term, WindowedScore) for term in score.scores):
        raise OptionError(
            "At the end of its window a term's whole density comes in at once, and a score does not tell how much "
            "that is. Compose energies, or pass weights=False."
        )
    told = falling(levels)
    if told[-1] <= 0.0:
        raise OptionError(f"A density needs noise: the last level is above 0; got {told[-1]}.")
    readable(score, torch.zeros(()))
    check_counts(chains, populations, resample)
    if not 0.0 <= noise <= 1.0:
        raise OptionError(f"noise, the part of it that is drawn anew, lies between 0 and 1; got {noise}.")
    base = _trusted(score, start, shape, told[0], rng)
    x = base.sample(chains, rng)
    w = x.new_zeros((populations, chains // populations), dtype=torch.float64)
    at = Walk(x, w, w.new_zeros(populations), w.new_zeros(populations), [], [], [], [])
    before, drift = 0.0, _Drift(0.0, torch.zeros_like(x[:1]))
    for place, sigma in enumerate(told):
        parts = score.parts(at.x, at.x.new_full((chains,), sigma))
        total = torch.tensordot(score.weights.to(parts.dtype), parts, 1)
        after = 0.0 if place == len(told) - 1 else (sigma - told[place + 1]) * (sigma + told[place + 1])
        if weights:
            squares = parts.double().square().flatten(2).sum(2)
            rate = 0.5 * (row_sum(total.double().square()) - torch.tensordot(score.weights, squares, 1))
            # Half of the step that led here, and half of the one that leads on.
            led = 0.5 * before * (rate + drift.rate(at.x, total))
            drift = _Drift.evening(at.x, total, rate, (at.log_w + at.log_z[:, None]).flatten())
            gained = led + 0.5 * after * (rate + drift.rate(at.x, total))
            at.x = torch.stack((at.x, total), 1)
            weigh(at, torch.where(gained.isfinite(), gained, -torch.inf), resample, rng)
            at.x, total = at.x.unbind(1)
        else:
            at.ess.append(float(chains))
        added = after * drift.factor * (at.x - drift.centre)
        at.x = _euler(at.x, total, sigma, after, noise, at.log_w + at.log_z[:, None], rng) + added
        if not bool(at.x.isfinite().all()):
            raise DivergenceError(
                f"Points left the numbers below noise level {sigma:.4g}. Use more levels, or smaller weights."
            )
        before = after
        if progress is not None:
            progress(1)
    nothing = torch.full((len(told),), math.nan, dtype=torch.float64)
    ess = torch.tensor(at.ess, dtype=torch.float64)
    log_w = (at.log_w + at.log_z[:, None]).flatten()
    drawn = torch.full((len(told) - 1,), noise, dtype=torch.float64)
    correction = correction_of(weights, 0)
    lost = int(at.nonfinite.sum())
    return Composed(at.x, log_w, told, nothing, ess, nothing, drawn, None, correction, base, nonfinite=lost)


def check_counts(chains: int, populations: int, resample: float) -> None:
    """Refuse particles that do not part into populations.

    Raises
    ------
    OptionError
        With the numbers.
    """
    if populations < 1 or chains % populations or chains < 2 * populations:
        raise OptionError(
            f"chains is a multiple of populations, with 2 or more particles in each; got chains={chains} and "
            f"populations={populations}."
        )
    if not 0.0 < resample <= 1.0:
        raise OptionError(f"resample, a fraction of a population, lies above 0, 1 at most; got {resample}.")


class _Drift(NamedTuple):
    """A drift along straight lines through a centre, ``factor * (x - centre)``."""

    factor: float
    centre: Tensor

    def rate(self, x: Tensor, s: Tensor) -> Tensor:
        """What it adds to the rate of the log-weights, ``(n,)``, float64."""
        return self.factor * row_sum((x - self.centre).double() * s.double())

    @staticmethod
    def evening(x: Tensor, s: Tensor, rate: Tensor, log_w: Tensor) -> _Drift:
        """Find the one, around the weighted mean, that leaves the least variance of the rate."""
        w = log_w.softmax(0)
        centre = torch.tensordot(w.to(x.dtype), x, 1).unsqueeze(0)
        along = _Drift(1.0, centre).rate(x, s)
        along, rate = along - w @ along, rate - w @ rate
        factor = -float((w @ (along * rate)) / (w @ along.square()))
        return _Drift(factor if math.isfinite(factor) else 0.0, centre)


def _euler(x: Tensor, s: Tensor, high: float, length: float, c: float, log_w: Tensor, rng: Generator) -> Tensor:
    """One step of the walk; its noise is that of the cleaner point given the noisier one, as in `Step`."""
    if length == 0.0:
        return x
    moment = torch.tensordot(log_w.flatten().softmax(0).to(x.dtype), s.square(), 1)
    ratio = (1.0 - length * moment).clamp(min=1.0 - length / high**2)
    z = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
    return x + 0.5 * (1.0 + c) * length * s + (c * length * ratio).sqrt() * z


def _trusted(
    score: SummedScore, start: Tractable | None, shape: Sequence[int] | None, sigma: float, rng: Generator
) -> Tractable:
    if start is not None:
        return start
    if shape is None:
        raise OptionError("Scores do not tell the shape of a point: pass shape=(2,), or a start.")
    zero = torch.zeros(tuple(shape), dtype=torch.get_default_dtype(), device=rng.device)
    first = Gaussian(loc=zero, scale=torch.full_like(zero, sigma))
    base, explained = fitted_gaussian(lambda x: score(x, x.new_full((len(x),), sigma)), first, rng)
    if base is None or not explained >= ENOUGH:
        raise OptionError(
            f"These noise levels never reach noise: at the highest, {sigma:.4g}, a Gaussian explains {explained:.0%} "
            f"of the summed score, where {ENOUGH:.0%} is asked for. Begin at a higher level, or pass a start."
        )
    return base


def _finite(log_w: Tensor) -> Tensor:
    return torch.where(torch.isfinite(log_w), log_w, -torch.inf)
