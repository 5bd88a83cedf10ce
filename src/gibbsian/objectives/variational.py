r"""Variational bounds: a decoder and an encoder of its latents, fitted together and without chains.

With K draws :math:`z_k \sim q(z \mid x)` and :math:`w_k = p(x, z_k) / q(z_k \mid x)`,

.. math:: \mathcal L(x) = \mathbb{E}\Bigl[\frac1K \sum_k \log w_k\Bigr] \;\le\;
          \mathcal L_K(x) = \mathbb{E}\Bigl[\log \frac1K \sum_k w_k\Bigr] \;\le\; \log p(x) .

The gap of the first is the Kullback-Leibler divergence of q from the posterior, whatever K; that of the second goes to
0 as K grows. The draws are functions of the encoder's output and of noise, through which the gradient goes.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.decoders import Directed
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import ImportanceLatents
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective


class VariationalObjective(Objective):
    """What the bounds share: draws of an encoder, and their weights. Abstract."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise OptionError(f"samples counts the encoder's draws for each row, 1 or more; got {samples!r}.")
        self.samples = samples

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """Bounds of rows from their log-weights, ``(n, samples) -> (n,)``."""

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        r"""Minus the mean bound of the batch, in nats.

        Metrics are ``bound``; ``reconstruction``, the mean of :math:`-\log p(x \mid z)`; ``divergence``, that of
        :math:`\log q(z \mid x) - \log p(z)`; both over the encoder's draws, and in nats.

        Raises
        ------
        ArgumentTypeError
            If the energy is no `LatentEnergy` of a `Directed` one with `ImportanceLatents`.
        OptionError
            If the prior is not normalised.
        """
        latents, joint = amortised(energy)
        n, m = len(batch.x), self.samples
        z, minus_log_q = latents.placed(batch.x, latents.fresh((n, m), rng), 1)
        flat = z.reshape(n * m, *latents.event_shape)
        reconstruction = joint.likelihood(batch.x.repeat_interleave(m, 0), z=flat).view(n, m)
        divergence = joint.prior(flat).view(n, m) - minus_log_q
        bound = self.bound(-reconstruction - divergence).mean()
        told = {"bound": bound, "reconstruction": reconstruction.mean(), "divergence": divergence.mean()}
        return Loss(-bound, {name: value.detach() for name, value in told.items()})

    def extra_repr(self) -> str:
        """The number of draws."""
        return f"samples={self.samples}"


class EvidenceLowerBound(VariationalObjective):
    r"""The evidence lower bound (ELBO): the mean of :math:`\log p(x, z) - \log q(z \mid x)` over draws of the encoder.

    `Auto-encoding variational Bayes (Kingma & Welling, 2014) <https://arxiv.org/abs/1312.6114>`_. More samples take
    noise out of the gradient; the bound stays what it is.

    Parameters
    ----------
    samples
        Draws for each row of a batch.

    Raises
    ------
    OptionError
        If there is not at least one.
    """

    def __init__(self, samples: int = 1) -> None:
        super().__init__(samples)

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean log-weight."""
        return log_w.mean(1)


class ImportanceWeightedBound(VariationalObjective):
    r"""The bound of importance weighted autoencoders: the log of the mean weight of K draws.

    `Importance weighted autoencoders (Burda, Grosse & Salakhutdinov, 2016) <https://arxiv.org/abs/1509.00519>`_. It is
    the closer to the likelihood the more draws there are, for as many passes of the decoder. With one draw it is the
    `EvidenceLowerBound`.

    Parameters
    ----------
    samples
        K.

    Raises
    ------
    OptionError
        If there is not at least one.
    """

    def __init__(self, samples: int = 8) -> None:
        super().__init__(samples)

    def bound(self, log_w: Tensor) -> Tensor:
        """Log of the mean weight."""
        return log_w.logsumexp(1) - math.log(log_w.shape[1])


def amortised(energy: Energy) -> tuple[ImportanceLatents, Directed]:
    """Take a model apart for a variational bound.

    Raises
    ------
    ArgumentTypeError
        If it is no `LatentEnergy` of a `Directed` one with `ImportanceLatents`.
    OptionError
        If the prior is not normalised.
    """
    if not isinstance(energy, LatentEnergy) or not isinstance(energy.energy, Directed):
        raise ArgumentTypeError(
            "A variational bound is one of LatentEnergy(Directed(prior, decoder), ImportanceLatents(encoder, ...)), "
            f"such as vae((1, 28, 28)); got {energy!r}."
        )
    if not isinstance(energy.latents, ImportanceLatents):
        raise ArgumentTypeError(
            f"A variational bound takes draws of an encoder, and {energy.latents!r} are listed; the sum over them is "
            "exact, and ExactLikelihood fits it."
        )
    if not isinstance(energy.energy.prior, Tractable):
        raise OptionError(
            f"The prior {energy.energy.prior!r} is an energy that is not normalised, which a variational bound would "
            "push down without end; LatentPriorLikelihood fits it by chains."
        )
    return energy.latents, energy.energy
