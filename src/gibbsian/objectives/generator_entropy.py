r"""The entropy of a generator with noise, and its gradient, from importance samples of the latents behind its draws.

A generator with noise, :math:`x = g(z) + \sigma \varepsilon`, has the density
:math:`q(x) = \int p(z)\, N(x; g(z), \sigma^2)\, dz`. The gradient of its entropy goes through its draws alone, as the
score of a density has mean zero,

.. math:: \nabla_\phi H(q) = -\mathbb{E}\left[\nabla_x \log q(x)^\top \frac{\partial x}{\partial \phi}\right], \qquad
          \nabla_x \log q(x) = \mathbb{E}_{p(z' \mid x)}\left[\frac{g(z') - x}{\sigma^2}\right],

where z' is another draw of the posterior than the z that made x. It is averaged over samples :math:`z_k \sim \xi` with
self-normalised weights :math:`w_k \propto p(z_k)\,N(x; g(z_k), \sigma^2) / \xi(z_k)`, which are right as their number
grows; at any number of them the effective size tells how many count. Two laws :math:`\xi` are known from the true z:

* **Linearised**: with the Jacobian J of g at z, :math:`P = I + J^\top J / \sigma^2` and one Newton step from there,

  .. math:: \xi = N\!\left(z + P^{-1}\left(J^\top \frac{x - g(z)}{\sigma^2} + \nabla \log p(z)\right),\; P^{-1}\right),

  the posterior itself where g is linear and z standard normal. It takes one forward derivative per latent number.
* **Around the true latent**: :math:`\xi = N(z, \eta^2)`, with widths :math:`\eta`, one for each latent number, that
  raise the bound :math:`\mathbb{E}[\log p(x, z_k)] + \sum \log \eta` on log q(x). Cheap, and few samples count: their
  entropy gradient is too weak, and generators come out too narrow.
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


class LatentSamples(nn.Module):
    """Importance samples of the latents behind a generator's draws.

    Around the true latents they are those of `No MCMC for me: amortized sampling for fast and stable training of
    energy-based models (Grathwohl et al., 2021) <https://arxiv.org/abs/2010.04230>`_.

    Parameters
    ----------
    generator
        Tells the shape of its latents; it is not kept.
    draws
        Samples for each point.
    width
        Where the widths around the true latents start, in units of z; ``None`` for linearised posteriors.

    Raises
    ------
    OptionError
        If the count is below 1 or the width not positive.
    """

    log_width: Tensor | None

    def __init__(self, generator: GeneratorNetwork, draws: int, width: float | None = None) -> None:
        super().__init__()
        self.draws = check_count("draws", draws, "importance samples of each latent")
        if width is not None and not 0.0 < width < math.inf:
            raise OptionError(f"width is a positive standard deviation in units of z, or None; got {width}.")
        start = None if width is None else torch.full(tuple(generator.latent_shape), math.log(width))
        self.register_parameter("log_width", None if start is None else nn.Parameter(start))

    def forward(
        self, generator: GeneratorNetwork, scale: float, z: Tensor, x: Tensor, rng: Generator
    ) -> GeneratorScore:
        """Weigh samples of the latents of each point.

        Parameters
        ----------
        generator, scale
            g and the noise's standard deviation.
        z, x
            True latents ``(n, *latent)`` and the points made of them ``(n, *event)``.
        rng
            The generator.
        """
        n, count = len(x), self.draws
        delta = torch.randn((count, *z.shape), generator=rng, dtype=x.dtype, device=x.device)
        places, log_det = self._placed(generator, scale, z.detach(), x.detach(), delta)
        with torch.enable_grad():
            points = x.detach().expand(count, *x.shape).flatten(0, 1).requires_grad_(True)
            latents = places.detach().flatten(0, 1).requires_grad_(True)
            value = generator.directed(scale)(points, z=latents)
            slope_x, slope_z = torch.autograd.grad(value.sum(), (points, latents))
        constant = 0.5 * z[0].numel() * math.log(2.0 * math.pi)
        log_xi = -0.5 * delta.square().flatten(2).sum(2) - log_det.detach() - constant
        log_w = -value.detach().view(count, n) - log_xi
        w = log_w.softmax(0)
        score = -(w.view(count, n, *[1] * (x.ndim - 1)) * slope_x.view(count, *x.shape)).sum(0)
        entropy = -(log_w.logsumexp(0) - math.log(count)).mean()
        ess = (1.0 / w.square().sum(0)).mean() / count
        loss = torch.zeros((), dtype=x.dtype, device=x.device)
        if self.log_width is not None:
            # Worth nothing by itself; its slope in the widths is that of minus the bound.
            moved = (slope_z.view_as(places) * (places - places.detach())).sum() / (count * n)
            loss = moved - (log_det - log_det.detach())
        return GeneratorScore(score, entropy, ess, loss)

    def _placed(
        self, generator: GeneratorNetwork, scale: float, z: Tensor, x: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn standard normals ``(count, n, *latent)`` into samples, with the logarithm of what that stretches by."""
        if self.log_width is not None:
            return z + self.log_width.exp() * delta, self.log_width.sum()
        shift, factor = newton_step(generator, scale, z, x)
        # With P = L L^T the samples are mean + L^-T delta.
        spread = torch.linalg.solve_triangular(factor.mT, delta.flatten(2).unsqueeze(3), upper=True).view_as(delta)
        return z + shift.view_as(z) + spread, -factor.diagonal(dim1=1, dim2=2).log().sum(1)


@torch.no_grad()
def newton_step(generator: GeneratorNetwork, scale: float, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """From latents towards the mode of their posterior, and its precision, with the generator linearised.

    Parameters
    ----------
    generator, scale
        g and the noise's standard deviation.
    z, x
        Latents ``(n, *latent)``, and points made of them ``(n, *event)``.

    Returns
    -------
    tuple
        The step ``(n, d)``, and the lower triangular factor of the precision ``(n, d, d)``, of d latent numbers.
    """
    d = z[0].numel()
    basis = torch.eye(d, dtype=z.dtype, device=z.device).view(d, *z.shape[1:])
    slopes = torch.func.vmap(lambda e: torch.func.jvp(generator, (z,), (e.expand_as(z),))[1])(basis)
    jacobian = slopes.flatten(2).permute(1, 2, 0) / scale
    precision = torch.eye(d, dtype=z.dtype, device=z.device) + jacobian.mT @ jacobian
    with torch.enable_grad():
        y = z.detach().requires_grad_(True)
        (prior,) = torch.autograd.grad(generator.latent(y).sum(), y)
    residual = ((x - generator(z)) / scale).flatten(1).unsqueeze(2)
    factor = torch.linalg.cholesky_ex(precision).L
    downhill = (jacobian.mT @ residual).squeeze(2) - prior.flatten(1)
    return torch.cholesky_solve(downhill.unsqueeze(2), factor).squeeze(2), factor
