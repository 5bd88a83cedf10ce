r"""Controlled Monte Carlo diffusions: annealed Langevin dynamics that learn to arrive.

Along energies :math:`U_k = (1 - \beta_k) E_0 + \beta_k E` from a base to the target, Langevin steps with controls,

.. math::

    F_k(x_{k+1} | x_k) &= N\bigl(x_k + s_k (g_{k+1}(x_k) + u_k(x_k)),\; s_k^2\bigr), \\
    B_k(x_k | x_{k+1}) &= N\bigl(x_{k+1} + s_k (g_{k+1}(x_{k+1}) - u_{k+1}(x_{k+1}) + r_{k+1}(x_{k+1})),\; s_k^2\bigr),

walk there and back; :math:`g_k(x) = -L \tanh(s_k \nabla U_k(x) / 2 L)` is the Langevin drift, held within L steps of
the noise. A path from the base has the weight

.. math:: \log w = -E(x_K) + E_0(x_0) + \sum_k \log B_k(x_k | x_{k+1}) - \log F_k(x_{k+1} | x_k), \qquad E[w] = Z

for *any* controls, so that log Z has an unbiased Z, a lower bound and an effective size, as annealed importance
sampling has; with all of them 0 it is its unadjusted form. Controls, step sizes and temperatures are trained to make
:math:`\log w` the same for all paths: by the log-variance loss

.. math:: E_\rho\bigl[h(\log w - m)\bigr],

with m the median of a batch, and h half the square up to some nats and linear beyond, for the few paths far out would
outweigh all others. It is zero if and only if the walk ends in p. Its gradient holds the paths fixed, under any law
:math:`\rho` of theirs, so that it needs no derivative of the energy beyond its gradient, paths may be driven by louder
noise than their own, which keeps modes from being forgotten, and each set of paths may be used several times without
asking for the energy again. Learned variances were tried and left out: where a backward step is wider than the forward
one the weights have no variance, and their effective size fell from a third to a hundredth on a pair of modes.

Of the samplers of this kind it was chosen for its weights: iterated denoising energy matching and adjoint sampling have
draws alone, and learn slopes where the base has no mass of the target; path integral samplers and denoising diffusions
start without the annealing, which here is most of the way before anything is learned.

`Transport meets variational inference: controlled Monte Carlo diffusions (Vargas et al., 2024)
<https://arxiv.org/abs/2307.01050>`_ for the walk (there r is 0); `Improved sampling via learned diffusions
(Richter & Berner, 2024) <https://arxiv.org/abs/2307.01198>`_ for the loss; `Improved off-policy training of diffusion
samplers (Sendera et al., 2024) <https://arxiv.org/abs/2402.05098>`_ for louder noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.base import evaluate
from gibbsian.kernels.langevin import MALA
from gibbsian.learned.base import (
    LearnedSampler,
    Optimiser,
    record,
    require_counts,
    require_positive,
    target_over_reals,
    warn_of_nonfinite,
)
from gibbsian.learned.controls import Controls
from gibbsian.partition.paths import geometric
from gibbsian.partition.schedule import Schedule, pilot
from gibbsian.sampling import reporter

FAR = 5.0
"""Nats from the median beyond which a path counts linearly in the loss."""


@dataclass(frozen=True)
class CMCD:
    """How `fit_diffusion` trains a controlled Monte Carlo diffusion.

    A round of paths costs ``batch * (length + 1)`` energies and their gradients.

    Parameters
    ----------
    rounds
        How often paths are drawn.
    batch
        Paths of a round.
    updates
        Optimiser steps with each round's paths.
    length
        Steps of a path.
    hidden
        Widths of the network of controls.
    louder
        By how much the noise of half the paths is louder than their own at the start of training; it falls to 0.
    limit
        L: the most that a drift moves a point, in units of a step's noise.
    learning_rate
        The highest of Adam's rates, which rise and fall.
    clip_norm
        Gradients with a larger norm are scaled down to it.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    rounds: int = 500
    batch: int = 256
    updates: int = 2
    length: int = 64
    hidden: tuple[int, ...] = (128, 128)
    louder: float = 0.2
    limit: float = 3.0
    learning_rate: float = 2e-3
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require_counts(self, ("rounds", "updates"))
        require_counts(self, ("batch", "length"), 2)
        require_positive(self, ("limit", "learning_rate", "clip_norm"))
        if not 0.0 <= self.louder < math.inf:
            raise OptionError(f"louder is what noise is raised by, 0 or more; got {self.louder}.")


class Paths(NamedTuple):
    """Paths of n points, and what was computed along them: K + 1 places, the base's first.

    Attributes
    ----------
    x
        ``(K + 1, n, d)``.
    base_slope, slope
        Gradients of the base's energy and of the target's there, ``(K + 1, n, d)``.
    ends
        The base's energy at the start less the target's at the end, ``(n,)``, float64.
    """

    x: Tensor
    base_slope: Tensor
    slope: Tensor
    ends: Tensor

    @property
    def sound(self) -> Tensor:
        """Paths on which everything is finite, ``(n,)`` of bools."""
        parts = [torch.isfinite(t).all(2).all(0) for t in (self.x, self.base_slope, self.slope)]
        return parts[0] & parts[1] & parts[2] & torch.isfinite(self.ends)

    def only(self, rows: Tensor) -> Paths:
        """Some of the paths."""
        return Paths(self.x[:, rows], self.base_slope[:, rows], self.slope[:, rows], self.ends[rows])


class Diffusion(nn.Module):
    """The walk from a base to an energy: temperatures, step sizes and controls, which are its parameters.

    Parameters
    ----------
    base
        Where paths start.
    schedule
        Temperatures and step sizes, as Langevin steps h, to begin with.
    hidden, limit
        As of `CMCD`.
    rng
        The generator, on the base's device, for the draws that tell the network its units.

    Raises
    ------
    OptionError
        If the schedule has no step sizes.
    """

    def __init__(
        self, base: Tractable, schedule: Schedule, hidden: tuple[int, ...], limit: float, rng: Generator
    ) -> None:
        super().__init__()
        self.base = base
        like = base.sample(1000, rng)
        h = schedule.step_sizes
        if h is None or not h.numel():
            raise OptionError("A diffusion begins with a step size for each temperature: Schedule(betas, step_sizes).")
        self.length, self.limit = schedule.betas.numel() - 1, limit
        self.controls = Controls(base.event_shape.numel(), hidden).to(like)
        self.log_steps = nn.Parameter((2.0 * torch.cat((h, h[-1:]))).log().mul(0.5).to(like))
        self.log_gaps = nn.Parameter(schedule.betas.diff().clamp(min=1e-12).log().to(like))
        self.register_buffer("loc", like.mean(0).flatten())
        self.register_buffer("scale", like.std(0).flatten())

    loc: Tensor
    scale: Tensor

    def betas(self) -> Tensor:
        """Temperatures, ``(K + 1,)``, from 0 to 1."""
        inner = self.log_gaps.softmax(0).cumsum(0)
        return torch.cat((inner.new_zeros(1), inner[:-1], inner.new_ones(1)))

    def drift(self, beta: Tensor, step: Tensor, base_slope: Tensor, slope: Tensor) -> Tensor:
        """The Langevin drift, in units of the noise."""
        return -self.limit * torch.tanh(step * (torch.lerp(base_slope, slope, beta)) * (0.5 / self.limit))

    def steer(self, x: Tensor, slope: Tensor, time: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections at points of time k / K."""
        return self.controls((x - self.loc) / self.scale, torch.tanh(step * slope * (0.5 / self.limit)), time)

    @torch.no_grad()
    def walk(self, energy: Energy, n: int, rng: Generator, louder: float = 0.0) -> Paths:
        """Draw paths; the noise of every other one is raised by ``louder``.

        Parameters
        ----------
        energy
            The target.
        n
            Paths.
        rng
            The generator, on the base's device.
        louder
            0 for paths whose weights are unbiased.
        """
        x0 = self.base.sample(n, rng)
        shape, x = x0.shape, x0.flatten(1)
        betas, steps = self.betas(), self.log_steps.exp()
        loud = 1.0 + louder * (torch.arange(n, device=x.device) % 2).to(x).unsqueeze(1)
        at_base, value, base_slope, slope = self._slopes(energy, x, shape)
        places = [(x, base_slope, slope)]
        for k in range(self.length):
            time = x.new_full((1, 1), k / self.length)
            ahead, _ = self.steer(x, slope, time, steps[k])
            z = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
            pull = self.drift(betas[k + 1], steps[k], base_slope, slope) + ahead
            x = x + steps[k] * (pull + loud * z)
            _, value, base_slope, slope = self._slopes(energy, x, shape)
            places.append((x, base_slope, slope))
        stacked = [torch.stack(each) for each in zip(*places)]
        return Paths(stacked[0], stacked[1], stacked[2], (at_base - value).double())

    def log_weights(self, paths: Paths) -> Tensor:
        """Log-weights of paths under the present parameters, ``(n,)``, in float64, with their graph."""
        x, betas = paths.x, self.betas()
        steps = self.log_steps.exp().reshape(-1, 1, 1)
        times = torch.linspace(0.0, 1.0, self.length + 1, device=x.device, dtype=x.dtype).reshape(-1, 1, 1)
        # A point is the start of one step and the end of another; the step that its slope is bounded by is the former.
        own = torch.cat((steps, steps[-1:]))
        ahead, back = self.steer(x, paths.slope, times, own)
        beta = betas[1:].reshape(-1, 1, 1)
        forth = self.drift(beta, steps, paths.base_slope[:-1], paths.slope[:-1]) + ahead[:-1]
        home = self.drift(beta, steps, paths.base_slope[1:], paths.slope[1:]) - ahead[1:] + back[1:]
        moved = (x[1:] - x[:-1]) / steps
        gained = 0.5 * ((moved - forth).square() - (moved + home).square())
        return paths.ends + gained.sum((0, 2), dtype=torch.float64)

    def _slopes(self, energy: Energy, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        points = x.reshape(shape)
        at_base, base_slope = evaluate(self.base, points)
        value, slope = evaluate(energy, points)
        return at_base, value, base_slope.flatten(1), slope.flatten(1)


@dataclass(frozen=True)
class DiffusionSampler(LearnedSampler):
    """A diffusion that was trained on an energy.

    Attributes
    ----------
    diffusion
        The walk.
    energy, history, nonfinite
        As for every `LearnedSampler`.
    """

    diffusion: Diffusion
    energy: Energy
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    nonfinite: int = 0

    @torch.no_grad()
    def propose(self, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` paths; return where they end, and their log-weights."""
        paths = self.diffusion.walk(self.energy, n, rng)
        log_w = torch.where(paths.sound, self.diffusion.log_weights(paths), -torch.inf)
        return paths.x[-1].reshape(n, *self.diffusion.base.event_shape), log_w


def fit_diffusion(
    energy: Energy | Callable[[Tensor], Tensor],
    base: Tractable,
    method: CMCD,
    *,
    rng: Generator,
    progress: bool | Callable[[int], object] = False,
    record_every: int = 20,
) -> DiffusionSampler:
    """Train a diffusion to draw from an energy, without data.

    Temperatures and step sizes begin with those that a `gibbsian.partition.schedule.pilot` finds for
    Metropolis-adjusted Langevin steps. The network's weights come from torch's global generator: seed it inside
    ``torch.random.fork_rng``.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``, over the reals.
    base
        Where paths start, at least as wide as the energy's density: ``Gaussian(2, scale=3.0)``.
    method
        `CMCD` with its settings.
    rng
        The generator, on the base's device.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of rounds just made.
    record_every
        Rounds between records of the history.

    Returns
    -------
    DiffusionSampler
        With log Z, draws, weights and the training's history.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError, ShapeError
        If an argument does not fit; the message says what does.
    DivergenceError
        If the energy is finite nowhere that paths come.

    Warns
    -----
    RuntimeWarning
        If paths were left out because the energy was not finite on them.
    """
    require_tractable(base, "base")
    if not isinstance(method, CMCD):
        raise ArgumentTypeError(f"The method is CMCD(...), with its settings; got {method!r}.")
    if record_every < 1:
        raise OptionError(f"record_every is 1 or more; got {record_every}.")
    target = target_over_reals(energy, base, "base", rng)
    start = pilot(geometric(base, target), base, MALA(0.1), rng=rng, temperatures=method.length)
    walk = Diffusion(base, start, method.hidden, method.limit, rng)
    report, close = reporter(progress, method.rounds, "training the diffusion")
    try:
        history, bad = train(walk, target, method, rng, report, record_every)
    finally:
        close()
    warn_of_nonfinite(bad, method.rounds * method.batch)
    return DiffusionSampler(walk, target, history, bad)


def train(
    walk: Diffusion, energy: Energy, method: CMCD, rng: Generator, report: Callable[[int], object], every: int
) -> tuple[list[dict[str, float]], int]:
    """Train a walk in place; return the records, and the number of paths on which something was not finite."""
    learned = [*walk.controls.parameters(), walk.log_steps, walk.log_gaps]
    optimiser = Optimiser(learned, method.learning_rate, method.rounds * method.updates, method.clip_norm)
    history, bad = [], 0
    for i in range(method.rounds):
        paths = walk.walk(energy, method.batch, rng, method.louder * (1.0 - i / method.rounds))
        sound = paths.sound
        if not bool(sound.any()):
            raise DivergenceError(
                f"In round {i} the energy or its gradient is infinite or NaN on all {method.batch} paths. Start from a "
                "base that covers the energy's domain."
            )
        bad += method.batch - int(sound.sum())
        paths = paths.only(sound)
        for j in range(method.updates):
            log_w = walk.log_weights(paths)
            if j == 0 and (i % every == 0 or i == method.rounds - 1):
                history.append(record(i, log_w.detach(), loss=log_w.detach().var()))
            optimiser.step(log_variance(log_w))
        report(1)
    return history, bad


def log_variance(log_weights: Tensor) -> Tensor:
    """The log-variance loss of the module's head, 0-d, from the log-weights ``(n,)`` of paths that are held fixed."""
    middle = log_weights.detach().median()
    return nn.functional.huber_loss(log_weights, middle.expand_as(log_weights), delta=FAR)
