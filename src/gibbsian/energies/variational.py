r"""Variational autoencoders and their kin, built of a decoder with a likelihood, a prior, and an encoder.

=================  ==============================================  ===========================================
constructor        model                                           fitted by
=================  ==============================================  ===========================================
`vae`              normal z, decoder, encoder q(z | x)             `EvidenceLowerBound`, `ImportanceWeightedBound`
`lebm`             z with an energy of its own, decoder            `LatentPriorLikelihood`, chains over z
`VAEBM`            a trained `vae` times :math:`e^{-f(x)}`         `CorrectionLikelihood`, chains over z and noise
=================  ==============================================  ===========================================

The first two are `LatentEnergy` values: energies of x, :math:`-\log p(x)` by importance sampling with the encoder, from
which ``posterior(x)``, ``estimate`` and ``draw_latents`` follow. `VAEBM` is in `gibbsian.energies.reparametrised`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.decoders import BernoulliDecoder, Decoder, Directed, GaussianDecoder
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents
from gibbsian.energies.networks import network
from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian, shape_of
from gibbsian.errors import ArgumentTypeError, OptionError, unknown_name

DECODERS = ("gaussian", "bernoulli")
"""Names of likelihoods: normal noise around the decoder's output, or bits with log-odds."""


def vae(
    shape: int | Sequence[int],
    latent: int = 16,
    *,
    rng: Generator,
    width: int = 64,
    decoder: str | Decoder = "gaussian",
    scale: float = 0.3,
    learn_scale: bool = False,
    encoder: nn.Module | None = None,
    draws: int = 64,
) -> LatentEnergy:
    r"""Build a variational autoencoder: :math:`z \sim N(0, I)`, a decoder :math:`p(x \mid z)`, an encoder of z.

    `Auto-encoding variational Bayes (Kingma & Welling, 2014) <https://arxiv.org/abs/1312.6114>`_. Images
    ``(channels, height, width)`` get convolutional networks, everything else dense ones. Initial weights come from
    torch's global generator: seed it inside ``torch.random.fork_rng``.

    Parameters
    ----------
    shape
        Size or shape of one x.
    latent
        Numbers of one z.
    rng
        Draws the noise with which the energy of x is estimated: `ImportanceLatents`.
    width
        Feature maps at the images' full size, or hidden units.
    decoder
        ``"gaussian"``; ``"bernoulli"`` for bits; or a `Decoder` of z of that size, with a network of its own.
    scale, learn_scale
        Of a Gaussian decoder: the standard deviation of x given z, in the units of x, and whether it is trained.
    encoder
        A module from x to ``2 * latent`` numbers, means and logarithms of standard deviations; one like the decoder's
        when left out.
    draws
        Importance samples of each row when the model is called as an energy.

    Raises
    ------
    OptionError
        If a size is not positive, or the decoder's name is unknown.
    ArgumentTypeError
        If the decoder is a bare network, which has no likelihood, or the encoder no module.
    ShapeError
        If a decoder of your own makes other points; at the first call, if the encoder gives another number of values.
    """
    size = _latent_size(latent)
    likelihood = likelihood_of(shape, size, decoder, width, scale, learn_scale)
    proposal = proposal_of(network(shape, 2 * size, width) if encoder is None else encoder, size)
    return LatentEnergy(Directed(Gaussian(size), likelihood), ImportanceLatents(proposal, draws, rng))


def lebm(
    shape: int | Sequence[int],
    latent: int = 16,
    *,
    rng: Generator,
    width: int = 64,
    hidden: Sequence[int] = (128, 128),
    decoder: str | Decoder = "gaussian",
    scale: float = 0.3,
    learn_scale: bool = False,
    encoder: nn.Module | None = None,
    draws: int = 64,
) -> LatentEnergy:
    r"""Build a decoder whose prior is an energy: :math:`p(z) \propto e^{-f(z)} N(z; 0, I)`, with f a network.

    `Learning latent space energy-based prior model (Pang et al., 2020) <https://arxiv.org/abs/2006.08205>`_. It needs
    no encoder: `LatentPriorLikelihood` runs chains over z given x, and x is drawn from chains on the prior,
    ``model.energy.prior``. The decoder and the encoder of a trained `vae` are a good start, with shorter chains.

    Parameters
    ----------
    shape, latent, rng, width, decoder, scale, learn_scale, draws
        As in `vae`.
    hidden
        Widths of the network of the prior.
    encoder
        Where chains over z given x start, as in `vae`; at the normal part of the prior when left out.

    Raises
    ------
    OptionError, ArgumentTypeError, ShapeError
        As in `vae`.
    """
    size = _latent_size(latent)
    likelihood = likelihood_of(shape, size, decoder, width, scale, learn_scale)
    prior = MLP(size, hidden) + Gaussian(size)
    proposal = Gaussian(size) if encoder is None else proposal_of(encoder, size)
    return LatentEnergy(Directed(prior, likelihood), ImportanceLatents(proposal, draws, rng))


def proposal_of(encoder: nn.Module, latent: int) -> GaussianProposal:
    """Return the law of z given x that an encoder tells.

    Raises
    ------
    ArgumentTypeError
        If it is no module.
    """
    if not isinstance(encoder, nn.Module):
        raise ArgumentTypeError(
            f"encoder is a torch module from x to {2 * latent} numbers, means and log-scales of z; got {encoder!r}."
        )
    return GaussianProposal(encoder, latent)


def likelihood_of(
    shape: int | Sequence[int], latent: int, decoder: str | Decoder, width: int, scale: float, learn_scale: bool
) -> Decoder:
    """Return the decoder that a name stands for, or check one.

    Raises
    ------
    OptionError, ArgumentTypeError, ShapeError
        As in `vae`.
    """
    event = shape_of(shape)
    if isinstance(decoder, str):
        if decoder not in DECODERS:
            raise unknown_name("decoder", decoder, DECODERS)
        net = network(latent, tuple(event), width)
        if decoder == "bernoulli":
            return BernoulliDecoder(net, tuple(event), latent=latent)
        return GaussianDecoder(net, tuple(event), scale, learn_scale=learn_scale, latent=latent)
    if not isinstance(decoder, Decoder):
        raise ArgumentTypeError(
            f"A decoder needs a likelihood, -log p(x | z), and {type(decoder).__name__} has none: wrap the network, as "
            f"GaussianDecoder(net, {tuple(event)}, scale=0.3) or, for bits, BernoulliDecoder(net, {tuple(event)})."
        )
    return fitting(decoder, event, latent)


def fitting(decoder: Decoder, event: torch.Size, latent: int) -> Decoder:
    """Check the shapes of a decoder.

    Raises
    ------
    OptionError
        With both shapes.
    """
    if decoder.event_shape != event or decoder.latent_shape not in (None, torch.Size((latent,))):
        takes = "any z" if decoder.latent_shape is None else f"z of shape {tuple(decoder.latent_shape)}"
        raise OptionError(
            f"The model is to make x of shape {tuple(event)} from z of shape ({latent},); {type(decoder).__name__} "
            f"makes x of shape {tuple(decoder.event_shape)} from {takes}."
        )
    return decoder


class RowTable(nn.Module):
    """A network that has learned its rows by heart: means and log-scales of z for each, whatever the row is.

    Under a `GaussianProposal` it is q(z | x) of fixed rows, each with its own mean and scale.

    Parameters
    ----------
    table
        ``(n, 2 * latent)``.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The table.

        Raises
        ------
        OptionError
            If there are more or fewer rows than in it.
        """
        if len(x) != len(self.table):
            raise OptionError(
                f"This proposal was refined for {len(self.table)} rows and is called for {len(x)}; call it for those "
                "rows, all of them and in their order."
            )
        return self.table

    def extra_repr(self) -> str:
        """How many rows."""
        return f"{len(self.table)} rows"


def _latent_size(latent: object) -> int:
    if not isinstance(latent, int) or isinstance(latent, bool) or latent < 1:
        raise OptionError(
            f"latent counts the numbers of z, 1 or more; got {latent!r}. Without a latent there is no autoencoder: "
            "take an energy of x, such as MLP or ConvEnergy."
        )
    return latent
