r"""From noise to data: walks down the noise levels along a score.

In units where points are not shrunk (see `gibbsian.energies.schedules`) the noisy densities are carried into each other
by the *probability flow*

.. math:: \frac{dx}{d\sigma} = -\sigma\, s(x, \sigma) = \frac{x - D(x, \sigma)}{\sigma}, \qquad
          D = x + \sigma^2 s(x, \sigma) = \mathbb{E}[x_0 \mid x],

and with noise by the *ancestral* law of a cleaner point given a noisier one. A variance-preserving schedule walks the
same levels in other units, so that a sampler is the same for both; only where the levels lie differs
(``schedule.levels(steps)``).

====================  ===========================================================  ==========  ===============
way                   step from :math:`\sigma` to :math:`\sigma'`                  scores      error of levels
====================  ===========================================================  ==========  ===============
`Heun`                trapezoidal step of the flow                                 2           second order
`Multistep`           exponential step, D extrapolated from two levels             1           second order
`Ancestral`           :math:`x' \sim p(x' \mid x, x_0 = D)`; at eta = 0 Euler      1           first order
`PredictorCorrector`  any of these, then Langevin steps at :math:`\sigma'`         + steps     of the predictor
====================  ===========================================================  ==========  ===============

Every step is a function of the points and of noise that was drawn beforehand. For energies there is `anneal`, too, and
`gibbsian.annealing.annealed_chains`, whose Metropolis steps a score cannot have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Generator, Tensor

from gibbsian.annealing import heun
from gibbsian.bridges.scores import Score, score_of
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError

Memory = tuple[Tensor, ...]
"""What a way keeps of the step before."""


class Reverse(ABC):
    """A way of stepping from one noise level to the next lower one; a frozen dataclass of its settings."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """How many standard normals of the points' shape a step uses."""

    @abstractmethod
    def step(
        self, score: Score, x: Tensor, high: float, low: float, noise: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Move points from level ``high`` to ``low``; what is returned second is the next step's ``memory``."""


@dataclass(frozen=True)
class Heun(Reverse):
    """The probability flow by Heun's method, of second order; the step to level 0 is Euler's.

    `Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
    <https://arxiv.org/abs/2206.00364>`_, algorithm 1.
    """

    @property
    def draws(self) -> int:
        """None."""
        return 0

    def step(
        self, score: Score, x: Tensor, high: float, low: float, noise: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One step; two scores."""
        if low == 0.0:
            return denoised(score, x, high), ()
        return heun(lambda y, sigma: -sigma * _at(score, y, sigma), x, high, low), ()


@dataclass(frozen=True)
class Multistep(Reverse):
    r"""The probability flow by a two-step exponential integrator: DPM-Solver++(2M).

    With :math:`\lambda = -\log \sigma`, :math:`h = \lambda' - \lambda` and :math:`r` the last step's h over this one's,

    .. math:: x' = e^{-h} x + (1 - e^{-h}) \left[ \left(1 + \tfrac{1}{2r}\right) D - \tfrac{1}{2r} D_{-1} \right],

    which solves the flow exactly but for the change of D; the first step, and one to level 0, take D alone. Of second
    order at one score per step. `DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models (Lu et
    al., 2022) <https://arxiv.org/abs/2211.01095>`_.
    """

    @property
    def draws(self) -> int:
        """None."""
        return 0

    def step(
        self, score: Score, x: Tensor, high: float, low: float, noise: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One step; one score."""
        clean = denoised(score, x, high)
        if low == 0.0:
            return clean, ()
        h = math.log(high / low)
        aim = clean
        if memory:
            before, last = memory
            aim = clean + h / (2.0 * last) * (clean - before)
        return torch.lerp(aim, x, low / high), (clean, x.new_tensor(h))


@dataclass(frozen=True)
class Ancestral(Reverse):
    r"""Draw the cleaner point from its law given the noisier one and the clean point that the score expects.

    .. math:: x' = D + \frac{\sqrt{\sigma'^2 - \tau^2}}{\sigma} (x - D) + \tau z, \qquad
              \tau = \eta\, \frac{\sigma'}{\sigma} \sqrt{\sigma^2 - \sigma'^2}.

    With :math:`\eta = 1` it is the sampler of `Denoising diffusion probabilistic models (Ho et al., 2020)
    <https://arxiv.org/abs/2006.11239>`_, with :math:`\eta = 0` that of `Denoising diffusion implicit models (Song et
    al., 2021) <https://arxiv.org/abs/2010.02502>`_, which is Euler's method in :math:`\sigma`.

    Parameters
    ----------
    eta
        How much of the noise is drawn anew, from 0 to 1.

    Raises
    ------
    OptionError
        If it lies outside.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise OptionError(f"eta, the part of the noise that is drawn anew, lies between 0 and 1; got {self.eta}.")

    @property
    def draws(self) -> int:
        """1, or 0 when nothing is drawn anew."""
        return int(self.eta > 0.0)

    def step(
        self, score: Score, x: Tensor, high: float, low: float, noise: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One step; one score."""
        clean = denoised(score, x, high)
        fresh = self.eta * low / high * math.sqrt((high - low) * (high + low))
        x = clean + math.sqrt(low**2 - fresh**2) / high * (x - clean)
        return (x + fresh * noise[0] if self.eta else x), ()


@dataclass(frozen=True)
class PredictorCorrector(Reverse):
    r"""A predictor from level to level, then Langevin steps at the lower one.

    A step is :math:`x + c \sigma^2 s(x, \sigma) + \sqrt{2 c}\, \sigma z`. It is not rejected: a score has no density to
    reject by. Without a predictor it is annealed Langevin dynamics. `Score-based generative modeling through stochastic
    differential equations (Song et al., 2021) <https://arxiv.org/abs/2011.13456>`_; their step size is set by the
    ratio of the norms of score and noise, which makes the rows depend on each other, and is :math:`c\,\sigma^2` here.

    Parameters
    ----------
    predictor
        `Heun`, `Multistep`, `Ancestral`, or ``None``.
    steps
        Langevin steps at each level.
    size
        c above.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    ArgumentTypeError
        If the predictor is none.
    """

    predictor: Reverse | None = field(default_factory=Heun)
    steps: int = 1
    size: float = 0.1

    def __post_init__(self) -> None:
        if self.predictor is not None and not isinstance(self.predictor, Reverse):
            raise ArgumentTypeError(f"A predictor is Heun(), Multistep(), Ancestral() or None; got {self.predictor!r}.")
        if self.steps < 1 or not 0.0 < self.size < 1.0:
            raise OptionError(f"A corrector makes 1 or more steps of a size below 1; got {self.steps}, {self.size}.")

    @property
    def draws(self) -> int:
        """The predictor's, and one for each Langevin step."""
        return self.steps + (0 if self.predictor is None else self.predictor.draws)

    def step(
        self, score: Score, x: Tensor, high: float, low: float, noise: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One step of the predictor, and the corrector's; at level 0 there is nothing to correct."""
        first = len(noise) - self.steps
        if self.predictor is not None:
            x, memory = self.predictor.step(score, x, high, low, noise[:first], memory)
        elif low == 0.0:
            x = denoised(score, x, high)
        for z in noise[first:] if low > 0.0 else ():
            x = x + self.size * low**2 * _at(score, x, low) + math.sqrt(2.0 * self.size) * low * z
        return x, memory


@torch.no_grad()
def reverse(
    score: Score | Energy,
    start: Tensor,
    levels: Sequence[float],
    way: Reverse | None = None,
    *,
    rng: Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Walk points down the noise levels along a score.

    Parameters
    ----------
    score
        A `Score` or a noise-conditional energy without other open context; see `score_of` for networks.
    start
        Draws at the first level, ``(n, *event)``: ``levels[0] * torch.randn(...)`` where data are small beside it.
    levels
        Falling noise levels, two or more, such as ``schedule.levels(40)``. The last may be 0: the walk then ends with
        the mean of the clean point given the noisy one, which has no noise and is no draw of any density.
    way
        How to step, `Multistep` when left out.
    rng
        The generator of all noise; needed by ways that draw.
    progress
        Called with 1 after each level.

    Returns
    -------
    Tensor
        Points at the last level, ``(n, *event)``.

    Raises
    ------
    OptionError
        If the levels do not fall, the score has open context, or a way that draws has no generator.
    ArgumentTypeError
        If score or way are something else.
    DivergenceError
        If a point leaves the numbers.
    """
    way = Multistep() if way is None else way
    field, told = readable(score, start), falling(levels)
    if not isinstance(way, Reverse):
        raise ArgumentTypeError(f"A way down is Heun(), Multistep(), Ancestral() or PredictorCorrector(); got {way!r}.")
    if way.draws and rng is None:
        raise OptionError(f"{type(way).__name__} draws noise: pass rng=torch.Generator().manual_seed(0).")
    x, memory = start, ()
    for high, low in pairwise(told):
        noise = [torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device) for _ in range(way.draws)]
        x, memory = way.step(field, x, high, low, noise, memory)
        if not bool(torch.isfinite(x).all()):
            raise DivergenceError(
                f"Points left the numbers between noise levels {high:.4g} and {low:.4g}. Use more levels, a smaller "
                "guidance scale, or a score that was trained at these levels."
            )
        if progress is not None:
            progress(1)
    return x


def denoised(score: Score, x: Tensor, sigma: float) -> Tensor:
    """The mean of the clean point given a noisy one at one level: ``(n, *event)``."""
    return score.denoised(x, x.new_full((len(x),), sigma))


def readable(score: Score | Energy, x: Tensor) -> Score:
    """Read a score whose context is all fixed, for floating-point points.

    Raises
    ------
    ArgumentTypeError
        If it is neither score nor energy, or the points are no floating-point numbers.
    OptionError
        If it has open context.
    """
    if not isinstance(score, (Score, Energy)):
        raise ArgumentTypeError(
            f"A walk needs a score or a noise-conditional energy; got {score!r}. Adopt a network by "
            "score_of(network, schedule, prediction)."
        )
    field = score_of(score)
    if field.context:
        names = ", ".join(field.context)
        raise OptionError(f"This score still asks for {names}; fix it with given({field.context[0]}=...).")
    if not x.is_floating_point():
        raise ArgumentTypeError(f"Noise is added to floating-point numbers; got {x.dtype}.")
    return field


def falling(levels: Sequence[float]) -> tuple[float, ...]:
    """Read noise levels that fall from the noisiest to the cleanest, which may be 0.

    Raises
    ------
    OptionError
        Unless they are two or more finite numbers, each below the one before, none negative.
    """
    told = tuple(float(level) for level in levels)
    falls = all(high > low for high, low in pairwise(told))
    if len(told) < 2 or not falls or not (told[-1] >= 0.0 and told[0] < math.inf):
        raise OptionError(
            f"Noise levels for a walk down are two or more, falling, the last 0 or more; got {told}. "
            "schedule.levels(40) lists some."
        )
    return told


def _at(score: Score, x: Tensor, sigma: float) -> Tensor:
    return score(x, x.new_full((len(x),), sigma))
