r"""Amortised samplers: generator networks that learn to draw from an energy, most of them beside it.

A generator :math:`x = g(z) + \sigma \varepsilon` draws at the cost of one pass. It learns from the energy in two ways.

* **By regression**: a few steps of chains on the energy move its draws x to :math:`\tilde x`, and g learns to make
  :math:`\tilde x` of the z that made x. What chains do in k steps it then does in none, and the next k go on from it.
* **By the divergence**
  :math:`KL(q \| p) = \mathbb{E}_q[E(x)] - H(q) + \log Z`, with the entropy's gradient by importance samples, see
  `gibbsian.objectives.amortised_divergence`. Without the entropy all draws would fall into the deepest minimum.

Energy and generator move at once, by one loss in which each is held fixed where the other learns: the energy's part is
the contrast of data and draws, of which nothing goes into the generator, and the generator's part sees of the energy
but its gradients at points. `fit` has one optimiser, blind to the scale of a gradient: how fast the generator learns
beside the energy is said by ``learning_rate_factor``.

Every objective here tells ``coverage`` and ``entropy_gap`` of its draws, by which `gibbsian.training.health` knows mode
collapse; see `gibbsian.objectives.diversity`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.energies.layers import dropout_paused
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.kernels.base import Kernel, row_sum
from gibbsian.objectives.base import Batch, Counting, Loss, check_steps
from gibbsian.objectives.checks import check_at_least
from gibbsian.objectives.contrast import chain_metrics, contrast
from gibbsian.objectives.diversity import diversity
from gibbsian.objectives.sampler_gradient import run_chains
from gibbsian.short_run import ShortRun


class Drawn(NamedTuple):
    """Draws of a generator: latents, their images without noise, and the points."""

    z: Tensor
    mean: Tensor
    x: Tensor


class GeneratorObjective(Counting):
    """What objectives that own a generator share: its noisy draws and what is checked of it. Abstract.

    Attributes
    ----------
    generator
        The `GeneratorNetwork` that learns.
    scale
        Standard deviation of the noise on its points.
    """

    def __init__(self, generator: GeneratorNetwork, scale: float, learning_rate_factor: float) -> None:
        super().__init__()
        require_fitting(generator, None)
        if not 0.0 < learning_rate_factor < math.inf:
            raise OptionError(f"learning_rate_factor is positive and finite; got {learning_rate_factor}.")
        self.generator = generator
        self.scale = float(scale)
        self.learning_rate_factor = float(learning_rate_factor)
        self.seen = False

    def draw(self, n: int, rng: Generator) -> Drawn:
        """Draw latents and make noisy points of them, with the graph of the generator behind."""
        z = self.generator.latent.sample(n, rng)
        mean = self.generator(z)
        if not self.scale:
            return Drawn(z, mean, mean)
        noise = torch.randn(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device)
        return Drawn(z, mean, mean + self.scale * noise)

    @torch.no_grad()
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points of the generator with its noise, ``(n, *event)``: a start for chains of any kernel."""
        return self.draw(n, rng).x

    def check(self, energy: Energy, batch: Batch) -> None:
        """Check at every call that energy, generator and data are on one space, and once that they share no weights.

        Raises
        ------
        ShapeError
            If the generator makes points of another shape.
        DomainError
            If the energy lives on discrete states.
        OptionError
            If the energy is conditional, or holds the generator's parameters.
        """
        if energy.support.is_discrete:
            raise DomainError(
                f"A generator makes real points, and the energy lives on {energy.support}; discrete states are fitted "
                "by chains (PersistentContrastiveDivergence) or by their single-site ratios."
            )
        require_fitting(self.generator, energy.event_shape)
        require_fitting(self.generator, batch.x.shape[1:], "a row of the data")
        if energy.context:
            raise OptionError(
                f"The energy is conditional on {', '.join(energy.context)}, and the generator draws without labels; "
                "fix them: energy.given(...)."
            )
        if self.seen:
            return
        own = {id(p) for p in self.generator.parameters()}
        if any(id(p) in own for p in energy.parameters()):
            raise OptionError(
                f"{energy!r} contains the generator's parameters, which both would move; give it a copy: "
                "copy.deepcopy(generator)."
            )
        self.seen = True


class CooperativeLearning(GeneratorObjective):
    r"""The generator proposes, chains on the energy refine, and both learn from the refined points.

    .. math:: \overline{E(x)} - \overline{E(\tilde x)} + \tfrac12 \overline{|\tilde x - g(z)|^2}, \qquad
              \tilde x = K^k\big(g(z) + \sigma \varepsilon\big)

    with :math:`\tilde x` held fixed. `Cooperative training of descriptor and generator networks (Xie et al., 2018)
    <https://arxiv.org/abs/1609.09408>`_. The last term is :math:`\sigma^2` times the generator's negative
    log-likelihood of complete data. With ``latent_steps`` chains on :math:`p(z \mid \tilde x)` of the generator with
    noise move z, too, before it learns; the paper leaves them out in its experiments.

    Metrics are those of contrastive divergence, and ``generator_loss``, ``coverage`` and ``entropy_gap``.

    Parameters
    ----------
    generator
        Learns beside the energy, and is kept as ``objective.generator``.
    kernel
        How chains on the energy move.
    steps
        k.
    scale
        :math:`\sigma`, in units of x: of the noise on proposals, and of the generator's likelihood.
    latent_kernel
        How chains on :math:`p(z \mid \tilde x)` move, such as ``MALA(0.01)``.
    latent_steps
        Their steps; 0 keeps z.
    energy_penalty
        Weight of the mean squared energies of data and samples.
    compile
        Compile the chains' steps.
    learning_rate_factor
        The generator's learning rate over the energy's.

    Raises
    ------
    ArgumentTypeError
        If the generator or a kernel is none.
    OptionError
        If an option is out of its range, or latent steps come without a kernel or without noise.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        kernel: Kernel,
        steps: int = 10,
        scale: float = 0.1,
        *,
        latent_kernel: Kernel | None = None,
        latent_steps: int = 0,
        energy_penalty: float = 0.0,
        compile: bool = False,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__(generator, scale, learning_rate_factor)
        for given in (kernel, latent_kernel):
            if given is not None and (isinstance(given, type) or not isinstance(given, Kernel)):
                raise ArgumentTypeError(f"Chains that refine need a kernel, such as ULA(0.01); got {given!r}.")
        check_steps(steps, "A chain that refines")
        check_at_least(("scale", scale, 0), ("latent_steps", latent_steps, 0), ("energy_penalty", energy_penalty, 0))
        if (latent_steps > 0) != (latent_kernel is not None) or (latent_steps and not scale):
            raise OptionError(
                "Latents are refined by a kernel, in one step or more, under a likelihood of positive scale; got "
                f"latent_kernel={latent_kernel}, latent_steps={latent_steps}, scale={scale}."
            )
        self.kernel, self.steps = kernel, steps
        self.latent_kernel, self.latent_steps = latent_kernel, latent_steps
        self.energy_penalty, self.compile_steps = energy_penalty, compile

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Propose and refine as many points as the batch has rows, contrast, and regress.

        Raises
        ------
        ShapeError, DomainError, OptionError
            If generator, energy and data do not fit each other.
        """
        self.check(energy, batch)
        n = len(batch)
        with torch.no_grad():
            z, _, start = self.draw(n, rng)
        with dropout_paused(energy):
            run = run_chains(energy, self.kernel, start, self.steps, rng, self.compile_steps)
        refined = run.state.x.detach()
        value, metrics = contrast(energy, batch.x, refined, {}, {}, self.energy_penalty)
        metrics |= chain_metrics(start, refined, run.acceptance, run.nonfinite)
        if self.latent_kernel is not None:
            joint = self.generator.directed(self.scale)
            z = run_chains(
                Energy.of(lambda z: joint(refined, z=z), event_shape=self.generator.latent_shape),
                self.latent_kernel,
                z,
                self.latent_steps,
                rng,
                False,
            ).state.x.detach()
        learned = 0.5 * row_sum((refined - self.generator(z)).square()).mean()
        metrics |= {"generator_loss": learned.detach()} | diversity(start, batch.x)
        return Loss(value + learned, metrics)

    @property
    def short_run(self) -> ShortRun:
        """Draws as in training: the generator's, refined by the chains of this many steps."""
        return ShortRun(self.kernel, self.steps, self)

    def extra_repr(self) -> str:
        """The settings."""
        latent = f", latent_kernel={self.latent_kernel}, latent_steps={self.latent_steps}" if self.latent_steps else ""
        return (
            f"{self.generator!r}, {self.kernel}, steps={self.steps}, scale={self.scale}{latent}, energy_penalty="
            f"{self.energy_penalty}, learning_rate_factor={self.learning_rate_factor}"
        )
