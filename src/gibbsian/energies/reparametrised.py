r"""Generators times a correction, as energies of the noise that they are made from.

A decoder with normal noise makes points of standard normal numbers, :math:`x(z, \varepsilon) = g(z) + \sigma
\varepsilon`, and its density times :math:`e^{-f(x)}`,

.. math:: p(x) = \frac1{Z_f}\, e^{-f(x)}\, p_g(x), \qquad Z_f = \mathbb{E}_{p_g}[e^{-f(x)}],

is the law of x(z, ε) where z and ε have the energy

.. math:: E(z, \varepsilon) = f(g(z) + \sigma \varepsilon) + \tfrac12 |z|^2 + \tfrac12 |\varepsilon|^2
          + \tfrac12 (d_z + d_x) \log 2\pi .

In x the density lies along a thin sheet; in (z, ε) it is a standard normal one, tilted. Any kernel walks there, and the
base of annealing is exact: with the constant, log Z of this energy is :math:`\log Z_f`. `VAEBM: A symbiosis between
variational autoencoders and energy-based models (Xiao et al., 2021) <https://arxiv.org/abs/2010.00654>`_.

Without noise, of a `GeneratorNetwork`, it is the latent-space energy of `Your GAN is secretly an energy-based model and
you should use discriminator driven latent sampling (Che et al., 2020) <https://arxiv.org/abs/2003.06060>`_.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.decoders import Directed, GaussianDecoder
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.tractable import Gaussian, batch_rows
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError


class Reparametrised(Energy):
    """A correction of a generator's points as an energy of flat standard normal numbers, those of z, then of the noise.

    See `reparametrised`, which builds it.

    Attributes
    ----------
    base
        The standard normal energy of both: without a correction, this energy is it.
    """

    def __init__(self, model: Directed | GeneratorNetwork, correction: Energy) -> None:
        super().__init__()
        self.model, self.correction = model, correction
        prior = _prior(model)
        self.z_shape, self.x_shape = prior.event_shape, model.event_shape
        own = self.z_shape.numel()
        if isinstance(model, Directed):
            own += cast(torch.Size, self.x_shape).numel()
        self.base = Gaussian(loc=prior.loc.new_zeros(own))
        self.event_shape = self.base.event_shape

    def forward(self, u: Tensor) -> Tensor:
        """Correction of the point that u makes, and the energy of u itself, ``(n, d) -> (n,)``."""
        return self.correction(self.points(u)) + self.base(u)

    def latents(self, u: Tensor) -> Tensor:
        """The z of flat points, ``(n, *latent)``."""
        z = batch_rows(u, self.base.event_shape)[:, : self.z_shape.numel()].reshape(-1, *self.z_shape)
        prior = _prior(self.model)
        return prior.loc + (z @ prior.scale.T if prior.full else z * prior.scale)

    def means(self, u: Tensor) -> Tensor:
        """What the generator makes of z, without noise, ``(n, *event)``."""
        z = self.latents(u)
        return self.model.likelihood.mean(z) if isinstance(self.model, Directed) else self.model(z)

    def points(self, u: Tensor) -> Tensor:
        """What flat points ``(n, d)`` stand for: x with its noise, ``(n, *event)``."""
        mean = self.means(u)
        if not isinstance(self.model, Directed):
            return mean
        noise = u[:, self.z_shape.numel() :].reshape(mean.shape)
        return mean + cast(GaussianDecoder, self.model.likelihood).log_scale.exp() * noise

    def extra_repr(self) -> str:
        """Correction and shapes."""
        return f"{self.correction!r}, x={tuple(self.x_shape or ())}, z={tuple(self.z_shape)}"


def reparametrised(
    model: Directed | LatentEnergy | GeneratorNetwork, correction: Energy | Callable[[Tensor], Tensor]
) -> Reparametrised:
    """Build the energy of z and noise of a generator's density times ``exp(-correction)``.

    Sample it with any kernel over the reals, from ``energy.base.sample(n, rng)``, and take the draws to x with
    ``energy.points``. ``ais(energy, energy.base, rng=rng)`` is the log of the correction's normaliser under the
    generator, and ``bracket`` bounds it from both sides.

    Parameters
    ----------
    model
        `Directed` with a normal prior and a `GaussianDecoder`, the `LatentEnergy` of one, such as `vae` makes, or a
        `GeneratorNetwork` with a normal z.
    correction
        f, an energy of x.

    Raises
    ------
    ArgumentTypeError
        If the model is none of these.
    DomainError
        If x is of bits, which are no smooth function of noise.
    OptionError
        If the prior is not normal, or the correction has a context.
    ShapeError
        If the correction takes other points.
    """
    inner = model.energy if isinstance(model, LatentEnergy) else model
    if not isinstance(inner, Directed | GeneratorNetwork):
        raise ArgumentTypeError(
            "What is reparametrised is Directed(prior, decoder), its LatentEnergy such as vae(...), or a "
            f"GeneratorNetwork; got {model!r}."
        )
    if isinstance(inner, Directed) and not isinstance(inner.likelihood, GaussianDecoder):
        raise DomainError(
            f"{type(inner.likelihood).__name__} draws x on {inner.support}, which is no smooth function of noise; "
            "take a GaussianDecoder, or run chains on x itself, whose energy is correction + model."
        )
    prior = inner.prior if isinstance(inner, Directed) else inner.latent
    if not isinstance(prior, Gaussian):
        raise OptionError(
            f"z must be a function of standard normal numbers, as that of a Gaussian prior is; got {prior!r}. With an "
            "energy of z as prior, add it to the chains' energy instead: see LatentEnergy.joint."
        )
    energy = Energy.of(correction, event_shape=inner.event_shape)
    if energy.context:
        raise OptionError(f"The correction is conditional on {', '.join(energy.context)}; fix it: given(...).")
    if energy.event_shape not in (None, inner.event_shape):
        raise ShapeError(
            f"The correction takes points of shape {tuple(energy.event_shape or ())} and the model makes "
            f"{tuple(inner.event_shape or ())}; build it for these."
        )
    return Reparametrised(inner, energy)


class VAEBM(Energy):
    r"""A variational autoencoder times a correction: :math:`E(x) = f(x) - \log p_{vae}(x)`, the autoencoder frozen.

    As an energy of x it is estimated like the autoencoder's; chains walk on ``model.reparametrised``, in the space of z
    and noise, and `CorrectionLikelihood` fits f by them. Its log Z is that of ``model.reparametrised``.

    Parameters
    ----------
    vae
        A trained `vae` with a Gaussian decoder. From here on its parameters ask for no gradients.
    correction
        f, an energy of x, such as ``ConvEnergy``.

    Raises
    ------
    ArgumentTypeError
        If the first is no `LatentEnergy`.
    DomainError, OptionError, ShapeError
        As in `reparametrised`.
    """

    def __init__(self, vae: LatentEnergy, correction: Energy) -> None:
        super().__init__()
        if not isinstance(vae, LatentEnergy):
            raise ArgumentTypeError(f"A VAEBM corrects a LatentEnergy, such as vae((1, 28, 28)); got {vae!r}.")
        walked = reparametrised(vae, correction)
        self.vae, self.correction = vae.requires_grad_(False), walked.correction
        self.event_shape, self.support = vae.event_shape, vae.support
        # Its parts are held here; in a tuple, for a module held twice would be saved twice.
        self.base = walked.base
        self._walked = (walked,)

    @property
    def reparametrised(self) -> Reparametrised:
        """The same density as an energy of z and noise, flat."""
        return self._walked[0]

    def forward(self, x: Tensor) -> Tensor:
        """Correction and minus the autoencoder's log-density, ``(n,)``; too large on average, as `LatentEnergy` is."""
        return self.correction(x) + self.vae(x)

    def extra_repr(self) -> str:
        """Both."""
        return f"{self.correction!r}, {self.vae!r}"


def _prior(model: Directed | GeneratorNetwork) -> Gaussian:
    return cast(Gaussian, model.prior if isinstance(model, Directed) else model.latent)
