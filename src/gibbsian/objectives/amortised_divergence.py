r"""Generators fitted by their divergence from a model: with an energy that learns from data beside them, or alone.

A generator with noise, q, is moved down :math:`KL(q \| p) = \mathbb{E}_q[E(x)] - H(q) + \log Z` along its own draws,

.. math:: \nabla_\phi KL = \mathbb{E}\left[\big(\nabla_x E(x) + \nabla_x \log q(x)\big)^\top
          \frac{\partial x}{\partial \phi}\right],

with the second gradient by importance samples, see `gibbsian.objectives.generator_entropy`. Of the energy it sees only
gradients at points, in which nothing of the energy learns.
"""

from __future__ import annotations

import math

from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import is_real
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.tractable import Uniform
from gibbsian.errors import DomainError, OptionError
from gibbsian.kernels.base import evaluate, row_sum
from gibbsian.objectives.amortised import Drawn, GeneratorObjective
from gibbsian.objectives.base import Batch, Loss, Ramp, energy_and_gradient
from gibbsian.objectives.checks import check_at_least
from gibbsian.objectives.contrast import contrast
from gibbsian.objectives.diversity import diversity
from gibbsian.objectives.generator_entropy import LatentSamples


class DivergenceObjective(GeneratorObjective):
    """What objectives share that fit the generator by its divergence from the model. Abstract."""

    def __init__(
        self,
        generator: GeneratorNetwork,
        scale: float,
        draws: int,
        width: float | None,
        entropy_weight: float | Ramp,
        learning_rate_factor: float,
    ) -> None:
        super().__init__(generator, scale, learning_rate_factor)
        if not 0.0 < scale < math.inf:
            raise OptionError(
                f"scale is the positive standard deviation of the generator's noise, without which it has no entropy; "
                f"got {scale}."
            )
        weights = (entropy_weight.start, entropy_weight.end) if isinstance(entropy_weight, Ramp) else (entropy_weight,)
        check_at_least(*(("entropy_weight", weight, 0) for weight in weights))
        if isinstance(generator.latent, Uniform) or not is_real(generator.latent.support):
            raise DomainError(
                f"Samples around the true latents leave the domain of {generator.latent!r}; build the generator with "
                "normal latents: GeneratorNetwork(net, dim, latent=8)."
            )
        self.samples = LatentSamples(generator, draws, width)
        self.entropy_weight = entropy_weight

    def divergence(self, energy: Energy, drawn: Drawn, rng: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's part of a loss, in which nothing of the energy learns, and its metrics.

        Its value is the mean energy of the draws minus the weighted entropy, and its gradient in the generator that of
        the divergence from the model at the temperature of the weight.
        """
        weight = self.entropy_weight
        weight = weight.at(self.next_call()) if isinstance(weight, Ramp) else weight
        with dropout_paused(energy):
            values, slope = evaluate(energy, drawn.x.detach())
        told = self.samples(self.generator, self.scale, drawn.z, drawn.x.detach(), rng)
        pull = slope + weight * told.score
        moved = row_sum(pull * (drawn.x - drawn.x.detach())).mean()
        value = values.mean() - weight * told.entropy
        metrics = {"energy_generated": values.mean(), "entropy": told.entropy, "entropy_ess": told.ess}
        return value + moved + told.loss, metrics

    def settings(self) -> str:
        """The settings that they share."""
        return (
            f"{self.generator!r}, scale={self.scale}, draws={self.samples.draws}, "
            f"entropy_weight={self.entropy_weight}, learning_rate_factor={self.learning_rate_factor}"
        )


class EntropyRegularised(DivergenceObjective):
    r"""The energy contrasts data with a generator's draws; the generator follows the energy and keeps its entropy.

    .. math:: \overline{E(x)} - \overline{E(g(z) + \sigma \varepsilon)} + \gamma\, \overline{|\nabla E(x)|^2}
              \qquad\text{and}\qquad \overline{E(g(z) + \sigma \varepsilon)} - \lambda \hat H(q)

    for the energy and for the generator. `No MCMC for me: amortized sampling for fast and stable training of
    energy-based models (Grathwohl et al., 2021) <https://arxiv.org/abs/2010.04230>`_, whose :math:`\lambda` is 1 where
    q is to be the model's law, and 1e-4 for images. No chain is run.

    Metrics are ``energy_data``, ``energy_samples``, ``gap``, ``energy_generated``, ``entropy`` (nats, too large on
    average), ``entropy_ess`` (the share of importance samples that count), ``coverage`` and ``entropy_gap``.

    Parameters
    ----------
    generator
        Learns beside the energy, and is kept as ``objective.generator``. Its latents are normal.
    scale
        :math:`\sigma`, in units of x.
    draws
        Importance samples of each latent, for the entropy's gradient.
    entropy_weight
        :math:`\lambda`, or a `Ramp` of it.
    gradient_penalty
        :math:`\gamma`, which keeps the energy smooth at the data.
    energy_penalty
        Weight of the mean squared energies of data and draws.
    width
        ``None`` for samples of linearised posteriors; a number for samples around the true latents, whose standard
        deviations start there and learn, as in the paper.
    learning_rate_factor
        The generator's learning rate over the energy's.

    Raises
    ------
    ArgumentTypeError
        If the generator is none.
    OptionError
        If an option is out of its range.
    DomainError
        If the latents do not live on all of the reals.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        scale: float = 0.1,
        draws: int = 10,
        entropy_weight: float | Ramp = 1.0,
        *,
        gradient_penalty: float = 0.1,
        energy_penalty: float = 0.0,
        width: float | None = None,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__(generator, scale, draws, width, entropy_weight, learning_rate_factor)
        check_at_least(("gradient_penalty", gradient_penalty, 0), ("energy_penalty", energy_penalty, 0))
        self.gradient_penalty, self.energy_penalty = gradient_penalty, energy_penalty

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw as many points as the batch has rows; contrast, and move the generator.

        Raises
        ------
        ShapeError, DomainError, OptionError
            If generator, energy and data do not fit each other.
        """
        self.check(energy, batch)
        drawn = self.draw(len(batch), rng)
        value, metrics = contrast(energy, batch.x, drawn.x, {}, {}, self.energy_penalty)
        if self.gradient_penalty:
            _, slope = energy_and_gradient(energy, batch.x.detach().requires_grad_(True), {}, create_graph=True)
            value = value + self.gradient_penalty * row_sum(slope.square()).mean()
        learned, told = self.divergence(energy, drawn, rng)
        return Loss(value + learned, metrics | told | diversity(drawn.x, batch.x))

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.settings()}, gradient_penalty={self.gradient_penalty}, energy_penalty={self.energy_penalty}"


class GeneratorKL(DivergenceObjective):
    r"""A generator trained by an energy alone, which stays as it is: the reverse divergence.

    .. math:: KL(q \| p) = \mathbb{E}_q[E(x)] - H(q) + \log Z

    Of the batch only its size is used, unless ``compare`` says that it holds data. A reverse divergence leaves out
    modes rather than put mass between them; an ``entropy_weight`` that comes down to 1 from above, a temperature, finds
    more of them: ``Ramp(5.0, 1.0, 1000)``. See `gibbsian.training.generators.fit_generator`, and for what the draws are
    worth `gibbsian.partition.importance.importance_sampling`.

    Metrics are ``energy_generated``, ``entropy`` (nats, too large on average) and ``entropy_ess``; with ``compare``
    also ``coverage`` and ``entropy_gap``.

    Parameters
    ----------
    generator
        Learns, and is kept as ``objective.generator``. Its latents are normal.
    scale
        Standard deviation of its noise, in units of x.
    draws
        Importance samples of each latent, for the entropy's gradient.
    entropy_weight
        Weight of the entropy, or a `Ramp` of it; 1 at the end is the divergence.
    width
        ``None`` for samples of linearised posteriors; a number for samples around the true latents, whose standard
        deviations start there and learn.
    compare
        Whether batches are draws of the energy's density, which the generator's are to be as various as.
    learning_rate_factor
        What the learning rate of ``fit`` is multiplied by.

    Raises
    ------
    ArgumentTypeError
        If the generator is none.
    OptionError
        If an option is out of its range.
    DomainError
        If the latents do not live on all of the reals.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        scale: float = 0.1,
        draws: int = 10,
        entropy_weight: float | Ramp = 1.0,
        *,
        width: float | None = None,
        compare: bool = True,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__(generator, scale, draws, width, entropy_weight, learning_rate_factor)
        self.compare = compare

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw as many points as the batch has rows, and move the generator.

        Raises
        ------
        ShapeError, DomainError, OptionError
            If generator and energy do not fit each other.
        """
        self.check(energy, batch)
        drawn = self.draw(len(batch), rng)
        value, metrics = self.divergence(energy, drawn, rng)
        return Loss(value, metrics | (diversity(drawn.x, batch.x) if self.compare else {}))

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.settings()}, compare={self.compare}"
