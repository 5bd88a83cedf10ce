r"""What samplers learned from an energy have in common: weighted draws, log Z from them, and what they refuse.

A learned sampler draws points x with log-weights of mean Z,

.. math:: E[w] = Z, \qquad E[w f(x)] = Z\, E_p[f],

whatever it has learned: a poor one costs variance, never bias. What no weight tells is mass where the sampler never
draws: a mode that it has lost is missing from the draws, from log Z and from the effective size alike, as long as it
draws too few points to meet it. `FlowSampler.missed` looks for such mass from elsewhere.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import is_real
from gibbsian.energies.layers import check_function
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel, evaluate
from gibbsian.partition.base import LogZ, effective_size, from_log_weights, warn_if_degenerate
from gibbsian.partition.population import systematic
from gibbsian.samples import Samples
from gibbsian.sampling import sample

REMEDY = (
    "The sampler has not learned the energy, or has collapsed to a part of it: train longer, or from a wider start."
)


class WeightedDraws(NamedTuple):
    """Draws of a learned sampler with their weights.

    Attributes
    ----------
    x
        Points, ``(n, *event)``.
    log_weights
        ``(n,)``, float64; the mean of their exponentials is the estimate of Z. Minus infinity where the energy was not
        finite.
    log_z
        The estimate of log Z, whose ``ess`` judges the weights.
    """

    x: Tensor
    log_weights: Tensor
    log_z: LogZ

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points of equal weight, ``(n, *event)``, by systematic resampling; some may occur repeatedly.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the points' device.
        """
        return self.x[systematic(self.log_weights, rng, n)]

    def mean(self, values: Tensor) -> Tensor:
        """Average values of the points, ``(n, ...)``, over the energy's density: ``(...)``, float64."""
        shares = self.log_weights.softmax(0).reshape(-1, *([1] * (values.ndim - 1)))
        return (shares * values.double()).sum(0)


class LearnedSampler(ABC):
    """A sampler that was trained on an energy.

    Attributes
    ----------
    energy
        What it draws from.
    history
        Records of the training, in order: ``step``, ``ess`` (the effective share of draws, 0 to 1), ``log_z``, and what
        else the method tells.
    nonfinite
        Points met in training whose energy was not finite. They were left out.
    """

    energy: Energy
    history: list[dict[str, float]]
    nonfinite: int

    @abstractmethod
    def propose(self, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` points and their log-weights, ``(n, *event)`` and ``(n,)`` in float64."""

    def weighted(self, n: int, rng: Generator, *, batch: int = 4096, confidence: float = 0.99) -> WeightedDraws:
        """Draw points with weights.

        Parameters
        ----------
        n
            How many, 2 or more.
        rng
            The generator, on the sampler's device.
        batch
            Points that are drawn at once, which bounds the memory.
        confidence
            Probability with which ``log_z.lower`` is below log Z.

        Raises
        ------
        DivergenceError
            If the energy is finite at none of them.
        OptionError
            If there are fewer than two.
        """
        if n < 2 or batch < 1:
            raise OptionError(f"An estimate takes 2 or more draws, in batches of 1 or more; got n={n}, batch={batch}.")
        parts = [self.propose(min(batch, n - i), rng) for i in range(0, n, batch)]
        x, log_w = (torch.cat(each) for each in zip(*parts))
        log_w = torch.where(torch.isfinite(log_w), log_w, -torch.inf)
        found = from_log_weights(log_w, confidence)
        warn_if_degenerate(found, "weights of the learned sampler", REMEDY)
        return WeightedDraws(x, log_w, found)

    def log_z(self, n: int, rng: Generator, *, confidence: float = 0.99) -> LogZ:
        """Estimate log Z from ``n`` draws; ``lower`` holds at the confidence, and ``upper`` is infinite."""
        return self.weighted(n, rng, confidence=confidence).log_z

    def sample(self, n: int, rng: Generator, *, pool: int = 4) -> Tensor:
        """Draw ``n`` points of equal weight, ``(n, *event)``, resampled from ``pool`` times as many weighted ones."""
        return self.weighted(pool * n, rng).draw(n, rng)

    def refined(self, n: int, kernel: Kernel, *, steps: int, rng: Generator, **options: Any) -> Samples:
        """Resample ``n`` points and move them by a kernel: what is left of the resampling's repetitions comes apart.

        Parameters
        ----------
        n
            Chains.
        kernel
            One that leaves the energy's density invariant, as HMC or MALA.
        steps, rng, options
            As for `gibbsian.sample`.
        """
        return sample(self.energy, kernel, self.sample(n, rng), steps=steps, rng=rng, **options)


def target_over_reals(energy: object, proposal: Tractable, what: str, rng: Generator) -> Energy:
    """Check that a sampler over the reals can be trained on an energy, and adopt it.

    Parameters
    ----------
    energy
        The energy as it was given.
    proposal
        The tractable energy that the sampler starts from: the flow, or a diffusion's base.
    what
        What that is, for messages.
    rng
        For the points of the first evaluation.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError, ShapeError
        If the energy is none, is conditional, does not live on the reals, or is over points of another shape.
    DivergenceError
        If it is finite at no point of the proposal.
    """
    if not callable(energy):
        raise ArgumentTypeError(f"The energy is a function or module from (n, *event) to (n,); got {energy!r}.")
    target = Energy.of(cast(Any, energy))
    if target.context:
        missing = ", ".join(f"{name}=..." for name in target.context)
        raise OptionError(f"The energy is conditional; fix its context before training: energy.given({missing}).")
    check_function(target)
    for place, support in (("energy", target.support), (what, proposal.support)):
        if not is_real(support):
            raise DomainError(
                f"A learned sampler carries Gaussian noise over the reals, but the {place} lives on {support}. "
                "Discrete states have kernels of their own (BlockGibbs, GibbsWithGradients); a box is mapped to the "
                "reals by unconstrain(energy)."
            )
    if target.event_shape is not None and target.event_shape != proposal.event_shape:
        raise ShapeError(
            f"The energy takes points of shape {tuple(target.event_shape)}, and the {what} draws points of shape "
            f"{tuple(proposal.event_shape)}; build it for the energy's shape."
        )
    x = proposal.sample(64, rng)
    try:
        value, _ = evaluate(target, x)
    except RuntimeError as error:
        raise ShapeError(
            f"The energy cannot take the {what}'s points of shape (n, {', '.join(map(str, x.shape[1:]))}): {error}"
        ) from error
    if tuple(value.shape) != (len(x),):
        raise ShapeError(f"The energy of {len(x)} points has shape ({len(x)},); it returned {tuple(value.shape)}.")
    if not bool(torch.isfinite(value).any()):
        raise DivergenceError(
            f"The energy is infinite or NaN at all {len(x)} points of the {what}: there is nothing to learn from. "
            "Start from a distribution that covers the energy's domain, or look for NaN in the energy."
        )
    return target


def record(step: int, log_w: Tensor, **told: Tensor | float) -> dict[str, float]:
    """Describe a batch of log-weights for the history: effective share and log Z; weights that are not finite are 0."""
    log_w = torch.where(torch.isfinite(log_w), log_w.double(), -torch.inf)
    n = log_w.numel()
    alive = bool(torch.isfinite(log_w).any())
    share = float(effective_size(log_w)) / n if alive else 0.0
    value = float(torch.logsumexp(log_w, 0)) - math.log(n) if alive else -math.inf
    return {"step": float(step), "ess": share, "log_z": value} | {k: float(v) for k, v in told.items()}


def warn_of_nonfinite(count: int, total: int) -> None:
    """Say how many points were left out of the training because their energy was not finite, if any were."""
    if count:
        warnings.warn(
            f"At {count} of {total} points met in training the energy or its gradient was not finite; they were left "
            "out. Is the domain of the energy smaller than all of the reals?",
            RuntimeWarning,
            stacklevel=3,
        )


def require_counts(settings: object, names: tuple[str, ...], least: int = 1) -> None:
    """Refuse settings that are no whole numbers from ``least``.

    Raises
    ------
    OptionError
        With the setting's name and value.
    """
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name} is a whole number from {least}; got {value!r}.")


def require_positive(settings: object, names: tuple[str, ...]) -> None:
    """Refuse settings that are no positive finite numbers.

    Raises
    ------
    OptionError
        With the setting's name and value.
    """
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < math.inf:
            raise OptionError(f"{name} is a positive number; got {value!r}.")


class Optimiser:
    """Adam under a warmed-up cosine rate and a bound on the gradient's norm; a step that is not finite is left out.

    Parameters
    ----------
    parameters
        What is trained.
    learning_rate
        The highest rate.
    steps
        Steps in all, of which the first twentieth warms up.
    clip_norm
        Gradients with a larger norm are scaled down to it.
    """

    def __init__(self, parameters: Any, learning_rate: float, steps: int, clip_norm: float) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise OptionError("There is nothing to train: no parameter of the sampler asks for gradients.")
        self.clip_norm = clip_norm
        self.adam = torch.optim.Adam(self.parameters, lr=learning_rate)
        warm = max(1, steps // 20)

        def rate(t: int) -> float:
            return min(1.0, (t + 1) / warm) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * min(t / steps, 1.0))))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, rate)

    def step(self, loss: Tensor) -> Tensor:
        """Follow a loss by one step; return the norm of its gradient, 0-d."""
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        # The whole step is left out: only Adam's averages carry the weights on.
        sound = torch.isfinite(norm)
        factor = torch.where(sound, (self.clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0), 0.0)
        for p, g in zip(self.parameters, grads):
            p.grad = None if g is None else torch.where(sound, g * factor, torch.zeros_like(g))
        self.adam.step()
        self.schedule.step()
        return norm
