r"""The sleep phase: a law of latents given points, fitted to a generator's own draws.

.. math:: -\mathbb{E}_{z \sim p,\; x = g(z) + \sigma \varepsilon}[\log \tau(z \mid x)]

is, but for a constant, the mean of :math:`KL(p(z \mid x) \| \tau(z \mid x))`, which covers all of the posterior: what
importance samples of it need. Nothing of it goes to the generator.
"""

from __future__ import annotations

import math

import torch
from torch import Generator

from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.energies.latents import GaussianProposal
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective


class SleepPhase(Objective):
    """Fit the law of a `GeneratorProposal`'s latents given points; energy and data play no part but the batch's size.

    `The wake-sleep algorithm for unsupervised neural networks (Hinton et al., 1995)
    <https://doi.org/10.1126/science.7761831>`_. It may stand in a sum with the generator's own objective, as
    ``EntropyRegularised(generator, 0.1) + SleepPhase(generator, law, 0.1)``.

    Parameters
    ----------
    generator
        Draws; it does not learn here.
    law
        What learns, kept as ``objective.law``.
    scale
        Standard deviation of the generator's noise.

    Raises
    ------
    ArgumentTypeError
        If the generator or the law is none.
    OptionError
        If the scale is not positive.
    """

    def __init__(self, generator: GeneratorNetwork, law: GaussianProposal, scale: float) -> None:
        super().__init__()
        require_fitting(generator, None)
        if not isinstance(law, GaussianProposal):
            raise ArgumentTypeError(f"law is a GaussianProposal(net, dim) over the latents; got {law!r}.")
        if not 0.0 < scale < math.inf:
            raise OptionError(f"scale is the positive standard deviation of the generator's noise; got {scale}.")
        # In a tuple: what owns and trains the generator is another objective.
        self._generator = (generator,)
        self.law, self.scale = law, float(scale)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw as many pairs as the batch has rows."""
        (generator,) = self._generator
        with torch.no_grad():
            z = generator.latent.sample(len(batch), rng)
            mean = generator(z)
            x = mean + self.scale * torch.randn(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device)
        mean, log_scale = self.law.law(x)
        residual = (z - mean) * (-log_scale).exp()
        constant = 0.5 * z[0].numel() * math.log(2.0 * math.pi)
        nll = (0.5 * residual.square() + log_scale).flatten(1).sum(1).mean() + constant
        return Loss(nll, {"latent_nll": nll.detach()})

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.law!r}, scale={self.scale}"
