r"""Directed models with latents: a prior energy of z, and a likelihood of x given z that is normalised.

.. math:: E(x, z) = E_{prior}(z) - \log p(x \mid z), \qquad -\log p(x) = F(x) + \log Z_{prior} .

As the likelihood integrates to 1 for each z, the constant of the whole is that of the prior alone: log Z of a density
of few dimensions. The gradients of log p(x) are

.. math:: \mathbb{E}_{p(z \mid x)}[-\nabla E_{prior}(z)] + \mathbb{E}_{p(z)}[\nabla E_{prior}(z)]
          \quad\text{and}\quad \mathbb{E}_{p(z \mid x)}[\nabla \log p(x \mid z)] .

With :math:`E_{prior} = f + N(0, I)`, a network beside a Gaussian, it is the model of `Learning latent space
energy-based prior model (Pang et al., 2020) <https://arxiv.org/abs/2006.08205>`_; with the Gaussian alone, that of a
variational autoencoder.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import batch_rows, shape_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


class Decoder(Energy):
    """A likelihood energy -log p(x | z), normalised for each z, with draws. Abstract.

    Its context is ``("z",)``: ``decoder(x, z=z)``.

    Attributes
    ----------
    latent_shape
        The shape of one z, where it is known.
    """

    event_shape: torch.Size  # pyright: ignore[reportIncompatibleVariableOverride]
    context: tuple[str, ...] = ("z",)
    latent_shape: torch.Size | None = None
    net: nn.Module

    @abstractmethod
    def mean(self, z: Tensor) -> Tensor:
        """Mean of x given z, ``(n, *event)``."""

    @abstractmethod
    def sample(self, z: Tensor, rng: Generator) -> Tensor:
        """Draw x given each z, ``(n, *event)``."""


class GaussianDecoder(Decoder):
    r"""x is the output of a network, and normal noise: :math:`x = g(z) + \sigma \varepsilon`.

    Parameters
    ----------
    net
        g, from ``(n, *latent)`` to as many numbers as x has.
    dim
        Size or shape of one x.
    scale
        :math:`\sigma`, in the units of x.
    learn_scale
        Whether :math:`\log \sigma` is a parameter; fixed otherwise, as in the paper.
    latent
        Size or shape of one z, for checks.

    Raises
    ------
    OptionError
        If the scale is not positive.
    ShapeError
        At a call, if the network gives another number of values.
    """

    log_scale: Tensor

    def __init__(
        self,
        net: nn.Module,
        dim: int | Sequence[int],
        scale: float = 1.0,
        *,
        learn_scale: bool = False,
        latent: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < scale < math.inf:
            raise OptionError(f"scale is the positive standard deviation of x given z; got {scale}.")
        self.net = net
        self.event_shape = shape_of(dim)
        self.latent_shape = None if latent is None else shape_of(latent)
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def mean(self, z: Tensor) -> Tensor:
        """g(z)."""
        return _decoded(self.net, z, self.event_shape)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Squared distance over twice the variance, and the normaliser, in nats."""
        residual = (batch_rows(x, self.event_shape) - self.mean(z)).flatten(1)
        d = residual.shape[1]
        constant = d * (self.log_scale + 0.5 * math.log(2.0 * math.pi))
        return 0.5 * (residual * (-self.log_scale).exp()).square().sum(1) + constant

    def sample(self, z: Tensor, rng: Generator) -> Tensor:
        """Draw x given each z."""
        mean = self.mean(z)
        noise = torch.randn(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device)
        return mean + self.log_scale.exp() * noise

    def extra_repr(self) -> str:
        """Shape and scale."""
        return f"{tuple(self.event_shape)}, scale={float(self.log_scale.detach().exp()):.4g}"


class BernoulliDecoder(Decoder):
    """Bits that are independent given z, with log-odds by a network.

    Parameters
    ----------
    net
        From ``(n, *latent)`` to as many numbers as x has.
    dim
        Size or shape of one x.
    latent
        Size or shape of one z, for checks.

    Raises
    ------
    ShapeError
        At a call, if the network gives another number of values.
    """

    support: Constraint = constraints.boolean

    def __init__(self, net: nn.Module, dim: int | Sequence[int], *, latent: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.net = net
        self.event_shape = shape_of(dim)
        self.latent_shape = None if latent is None else shape_of(latent)

    def logits(self, z: Tensor) -> Tensor:
        """Log-odds of ones, ``(n, *event)``."""
        return _decoded(self.net, z, self.event_shape)

    def mean(self, z: Tensor) -> Tensor:
        """Probabilities of ones."""
        return self.logits(z).sigmoid()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Cross entropy of the bits, in nats."""
        logits = self.logits(z)
        return (nn.functional.softplus(logits) - batch_rows(x, self.event_shape) * logits).flatten(1).sum(1)

    def sample(self, z: Tensor, rng: Generator) -> Tensor:
        """Draw bits given each z."""
        mean = self.mean(z)
        return (torch.rand(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device) < mean).to(mean.dtype)

    def extra_repr(self) -> str:
        """Shape."""
        return f"{tuple(self.event_shape)}"


class Directed(Energy):
    """Prior energy of z plus likelihood energy of x given z: a joint energy, whose context is ``("z",)``.

    `LatentEnergy` makes it an energy of x, and `LatentEnergy.posterior` is the sum of the two as one of z. Draws of x
    are ``likelihood.sample(z, rng)`` of chains z on ``prior``.

    Parameters
    ----------
    prior
        An energy of z, such as ``MLP(16) + Gaussian(16)``.
    likelihood
        A `GaussianDecoder` or a `BernoulliDecoder`.

    Raises
    ------
    ArgumentTypeError
        If the likelihood is no `Decoder`, or the prior no energy.
    OptionError
        If the prior has a context.
    ShapeError
        If the prior does not tell the shape of z, or the likelihood takes another.
    """

    context: tuple[str, ...] = ("z",)

    def __init__(self, prior: Energy, likelihood: Decoder) -> None:
        super().__init__()
        if not isinstance(prior, Energy):
            raise ArgumentTypeError(f"prior is an energy of z, such as MLP(16) + Gaussian(16); got {prior!r}.")
        if not isinstance(likelihood, Decoder):
            raise ArgumentTypeError(
                f"likelihood is a Decoder, which is normalised given z: GaussianDecoder or BernoulliDecoder; got "
                f"{likelihood!r}."
            )
        if prior.context:
            raise OptionError(f"The prior is conditional on {', '.join(prior.context)}; fix it: prior.given(...).")
        if prior.event_shape is None:
            raise ShapeError(f"{prior!r} does not tell the shape of z; add a base to it, as + Gaussian(16).")
        if likelihood.latent_shape not in (None, prior.event_shape):
            raise ShapeError(
                f"The prior is over z of shape {tuple(prior.event_shape)} and the likelihood takes "
                f"{tuple(cast(torch.Size, likelihood.latent_shape))}."
            )
        self.prior, self.likelihood = prior, likelihood
        self.event_shape, self.support = likelihood.event_shape, likelihood.support
        self.latent_shape, self.latent_support = prior.event_shape, prior.support

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Sum of both energies, ``(n,)``."""
        return self.prior(z) + self.likelihood(x, z=z)

    def extra_repr(self) -> str:
        """Both."""
        return f"{self.prior!r}, {self.likelihood!r}"


def _decoded(net: nn.Module, z: Tensor, shape: torch.Size) -> Tensor:
    out = net(z)
    if out.shape[:1] != z.shape[:1] or out[:1].numel() != shape.numel():
        raise ShapeError(
            f"The network of a decoder turns {len(z)} rows of z into x of shape {tuple(shape)}, {shape.numel()} "
            f"numbers each; it gave {tuple(out.shape)}."
        )
    return out.reshape(-1, *shape)
