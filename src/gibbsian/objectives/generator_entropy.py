r"""The entropy of a generator with noise, and its gradient, from importance samples around the true latents.

A generator with noise, :math:`x = g(z) + \sigma \varepsilon`, has the density
:math:`q(x) = \int p(z)\, N(x; g(z), \sigma^2)\, dz`. The gradient of its entropy goes through its draws alone, as the
score of a density has mean zero,

.. math:: \nabla_\phi H(q) = -\mathbb{E}\left[\nabla_x \log q(x)^\top \frac{\partial x}{\partial \phi}\right], \qquad
          \nabla_x \log q(x) = \mathbb{E}_{p(z' \mid x)}\left[\frac{g(z') - x}{\sigma^2}\right],

where z' is another draw of the posterior than the z that made x. It is averaged over :math:`z_k = z + \eta \delta_k`
with self-normalised weights :math:`w_k \propto p(z_k)\,N(x; g(z_k), \sigma^2) / N(z_k; z, \eta^2)`. The width
:math:`\eta`, one for each latent number, raises the bound
:math:`\mathbb{E}[\log p(x, z_k)] + \sum \log \eta` on log q(x). The weights are right as their number grows; at any
number of them the effective size tells how many count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.errors import OptionError
from gibbsian.objectives.checks import check_count


class GeneratorScore(NamedTuple):
    """What importance samples say of a generator's density at its own draws; nothing of it has a graph but ``loss``.

    Attributes
    ----------
    score
        Estimates of the gradients of log q at the points, ``(n, *event)``.
    entropy
        Estimate of the entropy in nats, 0-d, by minus the mean of the logarithms of the weights' means: by Jensen's
        inequality too large on average.
    ess
        Mean effective number of the weights, as a share of all, 0-d.
    loss
        Of the widths, 0-d.
    """

    score: Tensor
    entropy: Tensor
    ess: Tensor
    loss: Tensor


class LatentWidths(nn.Module):
    """Widths of the importance samples around the true latents, which learn.

    `No MCMC for me: amortized sampling for fast and stable training of energy-based models (Grathwohl et al., 2021)
    <https://arxiv.org/abs/2010.04230>`_.

    Parameters
    ----------
    generator
        Tells the shape of its latents; it is not kept.
    draws
        Samples for each point.
    width
        Where every width starts, in units of z.

    Raises
    ------
    OptionError
        If the count is below 1 or the width not positive.
    """

    def __init__(self, generator: GeneratorNetwork, draws: int, width: float) -> None:
        super().__init__()
        self.draws = check_count("draws", draws, "importance samples around each latent")
        if not 0.0 < width < math.inf:
            raise OptionError(f"width is a positive standard deviation in units of z; got {width}.")
        self.log_width = nn.Parameter(torch.full(tuple(generator.latent_shape), math.log(width)))

    def forward(
        self, generator: GeneratorNetwork, scale: float, z: Tensor, x: Tensor, rng: Generator
    ) -> GeneratorScore:
        """Weigh samples around each z.

        Parameters
        ----------
        generator, scale
            g and the noise's standard deviation.
        z, x
            True latents ``(n, *latent)`` and the points made of them ``(n, *event)``.
        rng
            The generator.
        """
        n, count, latent = len(x), self.draws, tuple(z.shape[1:])
        delta = torch.randn((count, n, *latent), generator=rng, dtype=x.dtype, device=x.device)
        around = z.detach() + self.log_width.exp() * delta
        with torch.enable_grad():
            points = x.detach().expand(count, *x.shape).flatten(0, 1).requires_grad_(True)
            places = around.detach().flatten(0, 1).requires_grad_(True)
            value = generator.directed(scale)(points, z=places)
            slope_x, slope_z = torch.autograd.grad(value.sum(), (points, places))
        log_width = self.log_width.sum()
        constant = 0.5 * self.log_width.numel() * math.log(2.0 * math.pi)
        log_xi = -0.5 * delta.square().flatten(2).sum(2) - log_width.detach() - constant
        log_w = -value.detach().view(count, n) - log_xi
        w = log_w.softmax(0)
        score = -(w.view(count, n, *[1] * (x.ndim - 1)) * slope_x.view(count, *x.shape)).sum(0)
        entropy = -(log_w.logsumexp(0) - math.log(count)).mean()
        # Worth nothing by itself; its slope in the widths is that of minus the bound.
        moved = (slope_z.view_as(around) * (around - around.detach())).sum() / (count * n)
        return GeneratorScore(
            score, entropy, (1.0 / w.square().sum(0)).mean() / count, moved - log_width + log_width.detach()
        )
