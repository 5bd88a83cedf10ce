r"""The density of a generator with noise at its own draws, by an estimate that keeps weights exact.

:math:`q(x) = \int p(z)\, N(x; g(z), \sigma^2)\, dz` is an integral. Together with the z that made x take K more latents
from a law :math:`\tau(z \mid x)`, and average over all of them,

.. math:: \hat q = \frac{1}{K + 1} \sum_{k=0}^{K} \frac{p(z_k)\, N(x; g(z_k), \sigma^2)}{\tau(z_k \mid x)},
          \qquad z_0 \sim p(z \mid x), \quad z_1, \ldots, z_K \sim \tau(z \mid x).

As the true latent is among them, :math:`E[1 / \hat q \mid x] = 1 / q(x)` for every K and every :math:`\tau` with mass
wherever the posterior has some: changing the law of one of K + 1 exchangeable latents from :math:`\tau` to the
posterior multiplies their density by :math:`\hat q / q`. So :math:`e^{-E(x)} / \hat q` has mean Z, its logarithm is a
lower bound on log Z on average, and Metropolis-Hastings with it is exact. Without the true latent both would be wrong.

`Importance weighted hierarchical variational inference (Sobolev & Vetrov, 2019) <https://arxiv.org/abs/1905.03290>`_.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.decoders import Directed
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.energies.latents import GaussianProposal
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

PAIRS = 1 << 16
"""Pairs of a point and a latent at which the generator is evaluated at once."""


class GeneratorProposal(nn.Module):
    """A generator with noise as a proposal: for `IndependentMH` and for importance sampling.

    Parameters
    ----------
    generator
        g, with the law p of its latents.
    scale
        Standard deviation of the noise, in units of x.
    draws
        K, the latents beside the true one.
    auxiliary
        The law of these: a `GaussianProposal`, which sees x and can be trained by
        `gibbsian.objectives.sleep.SleepPhase`, or a `Tractable` over z; the generator's own law p when left out, which
        is enough for few latents and a large scale.
    rng
        Draws the noise that is kept for `forward`.

    Raises
    ------
    ArgumentTypeError
        If the generator, or the law, is none.
    OptionError
        If a number is out of its range.
    ShapeError
        If the law is over latents of another shape.
    """

    noise: Tensor
    support: Constraint = constraints.real

    def __init__(
        self,
        generator: GeneratorNetwork,
        scale: float,
        draws: int = 64,
        auxiliary: GaussianProposal | Tractable | None = None,
        *,
        rng: Generator,
    ) -> None:
        super().__init__()
        require_fitting(generator, None)
        if not 0.0 < scale < math.inf:
            raise OptionError(f"scale is the positive standard deviation of the generator's noise; got {scale}.")
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise OptionError(f"draws counts the latents beside the true one, 1 or more; got {draws!r}.")
        law = generator.latent if auxiliary is None else auxiliary
        if not isinstance(law, GaussianProposal | Tractable):
            raise ArgumentTypeError(
                "auxiliary is a law of latents: a GaussianProposal(net, dim), which sees x, or a tractable energy; got "
                f"{auxiliary!r}."
            )
        if tuple(law.event_shape) != tuple(generator.latent_shape):
            raise ShapeError(
                f"The generator's latents have shape {tuple(generator.latent_shape)}, and the auxiliary law is over "
                f"{tuple(law.event_shape)}; build it for these."
            )
        self.generator, self.scale, self.draws = generator, float(scale), draws
        self.own_law = auxiliary
        self.event_shape = generator.event_shape
        self.register_buffer("noise", self._fresh(1, draws + 1, rng)[0])

    @property
    def law(self) -> GaussianProposal | Tractable:
        """The law of the latents beside the true one."""
        return self.generator.latent if self.own_law is None else self.own_law

    @torch.no_grad()
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points with their noise, ``(n, *event)``."""
        return self._drawn(n, rng)[1]

    @torch.no_grad()
    def propose(self, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` points, each with its estimate of -log q, ``(n,)``."""
        parts = []
        joint = self.generator.directed(self.scale)
        for size in self._sizes(n):
            z, x = self._drawn(size, rng)
            parts.append((x, self._cost(joint, x, self._fresh(size, self.draws, rng), z)))
        return torch.cat([x for x, _ in parts]), torch.cat([cost for _, cost in parts])

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Estimate -log q at any points, by K + 1 latents whose noise is kept, ``(n, *event) -> (n,)``.

        For points of the target it has the law that the estimate has along a chain of `IndependentMH`, which starts
        with it. It is no energy: by Jensen's inequality it is too large on average.
        """
        x = batch_rows(x, self.event_shape)
        joint = self.generator.directed(self.scale)
        parts = [self._cost(joint, part, self.noise.expand(len(part), *self.noise.shape)) for part in self._split(x)]
        return torch.cat(parts)

    def _drawn(self, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
        z = self.generator.latent.sample(n, rng)
        mean = self.generator(z)
        noise = torch.randn(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device)
        return z, mean + self.scale * noise

    @torch.no_grad()
    def _fresh(self, n: int, count: int, rng: Generator) -> Tensor:
        """Noise of ``count`` latents for each of ``n`` points."""
        if isinstance(self.law, GaussianProposal):
            return self.law.noise((n, count), rng)
        return self.law.sample(n * count, rng).reshape(n, count, *self.law.event_shape)

    def _cost(self, joint: Directed, x: Tensor, noise: Tensor, true: Tensor | None = None) -> Tensor:
        """Minus the logarithm of the average over latents by their noise, and the true one."""
        law, n = self.law, len(x)
        if isinstance(law, GaussianProposal):
            if true is not None:
                mean, log_scale = law.law(x)
                noise = torch.cat(((((true - mean) / log_scale.exp()).unsqueeze(1)), noise), 1)
            z, log_tau = law.place(x, noise)
        else:
            z = noise if true is None else torch.cat((true.unsqueeze(1), noise), 1)
            log_tau = -law(z.flatten(0, 1)).view(n, -1)
        count = z.shape[1]
        value = joint(x.repeat_interleave(count, 0), z=z.flatten(0, 1)).view(n, count)
        return math.log(count) - (-value - log_tau).logsumexp(1)

    def _sizes(self, n: int) -> list[int]:
        most = max(1, PAIRS // (self.draws + 1))
        return [min(most, n - i) for i in range(0, n, most)]

    def _split(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self._sizes(len(x)))) if len(x) else [x]

    def __repr__(self) -> str:
        """In one line, as part of a kernel's."""
        shapes = f"{tuple(self.generator.latent_shape)} -> {tuple(self.event_shape)}"
        return f"{type(self).__name__}({shapes}, scale={self.scale}, draws={self.draws})"
