r"""Discriminators read as energies, over points and over a generator's latent vectors.

A discriminator that tells data from draws of a generator, by the logistic loss and as well as can be, has the logit

.. math:: d(x) = \log \frac{p_{data}(x)}{p_g(x)}, \qquad p_{data}(x) = p_g(x)\, e^{d(x)} .

Its energy is :math:`E(x) = -d(x)`, a correction to the generator's density, and no density of its own. Where the
generator is :math:`x = G(z)` with :math:`z \sim p(z)`, the corrected draws are those of

.. math:: E(z) = -\log p(z) - d(G(z)),

whatever the number of dimensions of x and z, and although :math:`p_g` may have no density at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gibbsian.energies.base import Energy, formula
from gibbsian.energies.classifier import SIGMOID_ROWS
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.energies.tractable import shape_of
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

FAR = 100.0
"""Points are blown up so many times about their mean to see whether a discriminator's outputs stay bounded there."""

VARIED = 0.25
"""Probabilities differ by more than this between points and far outside; a network that is 0 everywhere does not."""

LOOKED_AT = 256
"""Rows at which a discriminator is looked at."""


class Discriminator(Energy):
    r"""Any PyTorch discriminator as an energy: :math:`E(x) = -d(x)` with its logit d, high where it sees data.

    Parameters
    ----------
    net
        From points ``(n, *event)`` to logits ``(n,)`` or ``(n, 1)``.
    event_shape
        Size or shape of one point; any when left out.
    probabilities
        The outputs are probabilities of being data, D = 1 / (1 + exp(-d)); their logits are taken.

    Raises
    ------
    ArgumentTypeError
        If ``net`` cannot be called.
    DomainError
        If ``net`` ends in a sigmoid, and ``probabilities`` does not say so.
    """

    def __init__(
        self,
        net: nn.Module | Callable[[Tensor], Tensor],
        event_shape: int | Sequence[int] | None = None,
        *,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise ArgumentTypeError(f"A discriminator is a module from (n, *event) to logits (n,); got {net!r}.")
        if not probabilities and ends_in_sigmoid(net):
            raise DomainError(f"The discriminator ends in a sigmoid: {_last(net)!r}. {_WITHOUT_SIGMOID}")
        self.net = net
        self.event_shape = None if event_shape is None else shape_of(event_shape)
        self.probabilities = probabilities

    def logits(self, x: Tensor) -> Tensor:
        """The discriminator's log-odds of data, ``(n, *event) -> (n,)``.

        Raises
        ------
        ShapeError
            If its output is of another shape than ``(n,)`` or ``(n, 1)``.
        """
        out = self.net(x)
        if not isinstance(out, Tensor) or tuple(out.shape) not in ((len(x),), (len(x), 1)):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(
                f"A discriminator gives one logit per row, shape ({len(x)},) or ({len(x)}, 1) for {len(x)} rows; it "
                f"gave {found}. Average a map of logits over its pixels, and give labels by a wrapper."
            )
        out = out.reshape(-1)
        return torch.logit(out) if self.probabilities else out

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, minus its logit: ``(n, *event) -> (n,)``."""
        return -self.logits(x)

    def extra_repr(self) -> str:
        """The network's kind."""
        return type(self.net).__name__ + (", probabilities=True" if self.probabilities else "")


class CalibratedDiscriminator(Energy):
    r"""A discriminator whose logit is stretched and shifted, :math:`a\, d(x) + b`, to be the log-odds that it claims.

    Made by `gibbsian.bridges.discriminators.calibrate_discriminator`, which fits both numbers.

    Parameters
    ----------
    energy
        The discriminator's, minus the logit.
    slope, offset
        a, and b in nats.
    """

    slope: Tensor
    offset: Tensor

    def __init__(self, energy: Energy, slope: float, offset: float) -> None:
        super().__init__()
        self.energy = energy
        self.event_shape, self.support = energy.event_shape, energy.support
        self.register_buffer("slope", torch.tensor(float(slope)))
        self.register_buffer("offset", torch.tensor(float(offset)))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row: ``(n, *event) -> (n,)``."""
        return self.slope * self.energy(x) - self.offset

    def extra_repr(self) -> str:
        """The energy and both numbers."""
        return f"{formula(self.energy)}, slope={float(self.slope):.4g}, offset={float(self.offset):.4g}"


class LatentDiscriminator(Energy):
    """The energy of a generator's latent vectors under a discriminator: see `latent_energy`."""

    def __init__(self, discriminator: Energy, generator: GeneratorNetwork) -> None:
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        self.event_shape, self.support = generator.latent_shape, generator.latent.support

    def forward(self, z: Tensor) -> Tensor:
        """Energy of each z, ``(n, *latent) -> (n,)``."""
        return self.generator.latent(z) + self.discriminator(self.generator(z))

    @torch.no_grad()
    def points(self, z: Tensor) -> Tensor:
        """Make points of draws: ``(..., *latent) -> (..., *event)``."""
        own, event = self.generator.latent_shape, self.generator.event_shape
        rows = z.reshape(-1, *own)
        return self.generator(rows).reshape(*z.shape[: z.ndim - len(own)], *event)

    def extra_repr(self) -> str:
        """Both parts."""
        return f"{formula(self.discriminator)}, {tuple(self.generator.latent_shape)}"


def latent_energy(
    discriminator: Energy | nn.Module | Callable[[Tensor], Tensor], generator: GeneratorNetwork
) -> LatentDiscriminator:
    r"""Give a generator's latent vectors the energy under which its points have the data's density.

    :math:`E(z) = -\log p(z) - d(G(z))`, which every kernel over the reals walks; ``.points(z)`` are the draws.
    `Your GAN is secretly an energy-based model and you should use discriminator driven latent sampling (Che et al.,
    2020) <https://arxiv.org/abs/2003.06060>`_. Both networks are shared, not copied.

    Parameters
    ----------
    discriminator
        Its energy, minus the logit, as what ``fit`` trained with `Adversarial`, or a module that gives logits.
    generator
        Makes the points.

    Raises
    ------
    ArgumentTypeError
        If one is not what it should be.
    ShapeError
        If the generator makes points of another shape than the discriminator takes.
    DomainError
        If the discriminator ends in a sigmoid.
    OptionError
        If it is conditional.
    """
    energy = discriminator_of(discriminator)
    require_fitting(generator, energy.event_shape, "the discriminator")
    return LatentDiscriminator(energy, generator)


def discriminator_of(net: Energy | nn.Module | Callable[[Tensor], Tensor]) -> Energy:
    """Take an energy as it is, minus the logit; adopt anything else as what gives logits.

    Raises
    ------
    ArgumentTypeError, DomainError
        As `Discriminator`.
    OptionError
        If it is conditional.
    """
    energy = net if isinstance(net, Energy) else Discriminator(net)
    if energy.context:
        raise OptionError(
            f"The discriminator is conditional on {', '.join(energy.context)}, and the generator's points have no such "
            f"condition; fix it: discriminator.given({energy.context[0]}=...)."
        )
    return energy


@torch.no_grad()
def check_discriminator(energy: Energy, x: Tensor) -> None:
    """Refuse a discriminator whose outputs are probabilities, by its values at points and far outside of them.

    A network may have small logits at some points; logits that vary and yet lie between 0 and 1 everywhere, also at a
    hundred times the points' spread, are those of a sigmoid.

    Parameters
    ----------
    energy
        The discriminator's.
    x
        Data or draws, ``(n, *event)``; the first 256 are looked at.

    Raises
    ------
    DomainError
        If it is one.
    """
    x = x[:LOOKED_AT].detach()
    centre = x.mean(0, keepdim=True)
    values = energy(torch.cat((x, centre + FAR * (x - centre)))).detach()
    # A module that was given for an energy shows its outputs with their own sign.
    size = values.abs()
    one_sign = bool((values >= 0).all()) or bool((values <= 0).all())
    if len(size) >= SIGMOID_ROWS and one_sign and bool((size <= 1).all()) and size.max() - size.min() > VARIED:
        raise DomainError(
            f"The discriminator's outputs lie between {float(size.min()):.3g} and {float(size.max()):.3g} "
            f"at {len(x)} points and at {FAR:g} times their spread: they are probabilities. {_WITHOUT_SIGMOID}"
        )


_WITHOUT_SIGMOID = (
    "The density needs its logit: take the sigmoid away, or pass Discriminator(net, probabilities=True), which undoes "
    "it."
)


def ends_in_sigmoid(net: Any) -> bool:
    """Whether a module is a sigmoid, or a sequence that ends in one."""
    return isinstance(_last(net), nn.Sigmoid)


def _last(net: Any) -> Any:
    while isinstance(net, nn.Sequential) and len(net):
        net = cast(nn.Module, net[-1])
    return net
