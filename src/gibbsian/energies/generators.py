r"""Generators: points made of latent vectors, :math:`x = g(z)` with z from a tractable prior.

A generator has draws and, where z has fewer numbers than x, no density. With normal noise added it has one, that of the
directed model :math:`p(z)\,N(x;\, g(z), \sigma^2)`: `GeneratorNetwork.directed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.decoders import Directed, GaussianDecoder
from gibbsian.energies.tractable import Gaussian, Tractable, batch_rows, require_tractable, shape_of
from gibbsian.errors import ArgumentTypeError, DomainError, ShapeError


class GeneratorNetwork(nn.Module):
    """A network from latent vectors to points, with the law of the vectors: draws of a density not written down.

    `Generative adversarial nets (Goodfellow et al., 2014) <https://arxiv.org/abs/1406.2661>`_.

    Parameters
    ----------
    net
        From ``(n, *latent)`` to as many numbers as a point has, such as `Dense` or `Upsampling` of
        `gibbsian.energies.networks`.
    dim
        Size or shape of one point.
    latent
        The law of z: a tractable energy over real numbers, or the size or shape of a standard normal z.

    Raises
    ------
    ArgumentTypeError
        If ``net`` is no module, or the law has no exact draws.
    DomainError
        If the law is one of discrete states, through which no gradient goes.
    OptionError
        If a size is not a positive whole number, such as a latent size of 0.
    ShapeError
        If the network gives another number of values than a point has.
    """

    def __init__(self, net: nn.Module, dim: int | Sequence[int], latent: int | Sequence[int] | Tractable) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ArgumentTypeError(f"net is a torch module from z to x, such as Dense(16, 2); got {net!r}.")
        self.net = net
        self.event_shape = shape_of(dim)
        prior = Gaussian(latent) if isinstance(latent, int | Sequence) else latent
        self.latent = require_tractable(prior, "The law of a generator's latent vectors")
        if self.latent.support.is_discrete:
            raise DomainError(
                f"A generator's latent vectors are real numbers, through which gradients go; {self.latent!r} lives on "
                f"{self.latent.support}. Use Gaussian or Uniform."
            )

    @property
    def latent_shape(self) -> torch.Size:
        """The shape of one z."""
        return self.latent.event_shape

    def forward(self, z: Tensor) -> Tensor:
        """Make points, ``(n, *latent) -> (n, *event)``."""
        out = self.net(batch_rows(z, self.latent_shape))
        if len(out) != len(z) or out[:1].numel() != self.event_shape.numel():
            raise ShapeError(
                f"The generator turns {len(z)} rows of z, of shape {tuple(self.latent_shape)}, into points of shape "
                f"{tuple(self.event_shape)}, {self.event_shape.numel()} numbers each; its network gave "
                f"{tuple(out.shape)}."
            )
        return out.reshape(-1, *self.event_shape)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw ``n`` points, ``(n, *event)``; gradients go to the network's weights."""
        return self(self.latent.sample(n, rng))

    def directed(self, scale: float, *, learn_scale: bool = False) -> Directed:
        """Add normal noise of standard deviation ``scale``, which gives x a density: the joint energy of x and z.

        The network is shared, not copied.
        """
        decoder = GaussianDecoder(
            self.net, tuple(self.event_shape), scale, learn_scale=learn_scale, latent=tuple(self.latent_shape)
        )
        return Directed(self.latent, decoder)

    def extra_repr(self) -> str:
        """Both shapes."""
        return f"{tuple(self.latent_shape)} -> {tuple(self.event_shape)}"


def require_fitting(generator: GeneratorNetwork, shape: torch.Size | None, whose: str = "the energy") -> None:
    """Check that a generator makes the points that something else takes.

    Raises
    ------
    ArgumentTypeError
        If it is no generator.
    ShapeError
        If the shapes differ.
    """
    if not isinstance(generator, GeneratorNetwork):
        raise ArgumentTypeError(
            f"generator is a GeneratorNetwork, such as GeneratorNetwork(Dense(8, 2), 2, latent=8); got {generator!r}."
        )
    if shape is not None and tuple(shape) != tuple(generator.event_shape):
        raise ShapeError(
            f"The generator makes points of shape {tuple(generator.event_shape)}, and {whose} takes {tuple(shape)}; "
            "build it with that dim."
        )


class WithGenerator(Energy):
    """An energy with the generator that learned beside it, as one module to train and to save.

    Parameters
    ----------
    energy
        Gives the energies; found again as ``.energy``.
    generator
        Makes points for it; found again as ``.generator``.

    Raises
    ------
    ArgumentTypeError
        If the generator is none.
    ShapeError
        If it makes points of another shape than the energy takes.
    """

    def __init__(self, energy: Energy, generator: GeneratorNetwork) -> None:
        super().__init__()
        require_fitting(generator, energy.event_shape)
        self.energy, self.generator = energy, generator
        self.event_shape, self.support, self.context = energy.event_shape, energy.support, energy.context

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """The energy of each row, ``(n, *event) -> (n,)``."""
        return self.energy(x, **context)

    def extra_repr(self) -> str:
        """Both."""
        return f"{self.energy!r}, {self.generator!r}"
