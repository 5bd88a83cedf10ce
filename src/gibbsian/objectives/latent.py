r"""Maximum likelihood of energies with latents, by chains over what was not seen.

For :math:`p(x) \propto \sum_z e^{-E(x, z)}` the gradient of the negative log-likelihood is

.. math:: \mathbb{E}_{data}\,\mathbb{E}_{p(z \mid x)}[\nabla E(x, z)] - \mathbb{E}_{p(x, z)}[\nabla E(x, z)] :

that of maximum likelihood on complete data (x, z) in which z was drawn given x (Fisher's identity). So the latents of a
batch are drawn by chains of a stated length, the *positive phase*, and the completed batch goes to an objective over
points (x, z), whose chains are the *negative phase*. Both biases add: that of short posterior chains is towards
where they start, and goes away as they get longer; an objective that is not linear in the data's law (score matching,
noise contrastive estimation with a fitted constant) has other fixed points and is none for this use.

For a `Directed` energy the negative phase is one of the prior alone, since the likelihood is normalised.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.decoders import Directed
from gibbsian.energies.domains import same_support
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import ImportanceLatents
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel
from gibbsian.objectives.base import Batch, Loss, Objective, check_steps, context_of
from gibbsian.objectives.contrast import chain_metrics
from gibbsian.objectives.sampler_gradient import run_chains
from gibbsian.typing import Context


class PosteriorObjective(Objective):
    """What objectives that draw latents given data share. Abstract."""

    def __init__(
        self,
        objective: Objective,
        kernel: Kernel | None,
        steps: int,
        start: Tractable | None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"The completed data are fitted by an objective; got {objective!r}.")
        if kernel is None and start is not None:
            raise OptionError(
                f"start={start!r} is where chains over z given x start, and they need a kernel, such as MALA(0.1); "
                "without both, latents that are listed are drawn exactly."
            )
        if start is not None:
            require_tractable(start, "The start of posterior chains")
        if kernel is not None and (isinstance(kernel, type) or not isinstance(kernel, Kernel)):
            raise ArgumentTypeError(f"Chains over z given x need a kernel, such as ULA(0.01); got {kernel!r}.")
        check_steps(steps, "A posterior chain")
        if noisy := next((m for m in objective.modules() if getattr(m, "data_noise", 0.0)), None):
            raise OptionError(
                f"data_noise={noisy.data_noise} of {type(noisy).__name__} would blur drawn latents like data; leave it "
                "0, and add noise to the data themselves."
            )
        self.objective = objective
        self.kernel = kernel
        self.steps = steps
        self.start = start

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.objective!r}, kernel={self.kernel}, steps={self.steps}, start={self.start!r}"

    def latents_of(
        self, energy: LatentEnergy, x: Tensor, context: Context, rng: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw z given each row of x, ``(n, *latent)``, with metrics of the chains."""
        with dropout_paused(energy):
            if self.kernel is None:
                if not energy.latents.exact:
                    raise OptionError(
                        f"Latents are drawn exactly where they are listed, and {energy.latents!r} are samples; pass "
                        "a kernel for chains over z given x."
                    )
                return energy.draw_latents(x, rng, **context), {}
            start = self._starts(energy, x, rng)
            run = run_chains(energy.posterior(x, **context), self.kernel, start, self.steps, rng, False)
        z = run.state.x.detach()
        told = chain_metrics(start, z, run.acceptance, run.nonfinite)
        return z, {f"posterior_{name}": value for name, value in told.items()}

    @torch.no_grad()
    def _starts(self, energy: LatentEnergy, x: Tensor, rng: Generator) -> Tensor:
        latents = energy.latents
        if self.start is None:
            if not isinstance(latents, ImportanceLatents):
                raise OptionError(
                    f"{latents!r} has no proposal to start posterior chains from; pass start=Bernoulli(...), or leave "
                    "out the kernel too, for exact draws."
                )
            return latents.placed(x, latents.fresh((len(x), 1), rng), 1)[0][:, 0]
        if tuple(self.start.event_shape) != tuple(latents.event_shape):
            raise ShapeError(
                f"Posterior chains start at z of shape {tuple(self.start.event_shape)}, and the energy's latents have "
                f"{tuple(latents.event_shape)}; build the start for their shape."
            )
        if latents.support.is_discrete and not same_support(self.start.support, latents.support):
            raise DomainError(
                f"Posterior chains start on {self.start.support} and the latents live on {latents.support}."
            )
        return self.start.sample(len(x), rng)


class CompleteData(PosteriorObjective):
    r"""Fit a `LatentEnergy` by an objective over completed points (x, z), with z drawn given x.

    The inner objective sees `LatentEnergy.joint`, on flat points. With `PersistentContrastiveDivergence` it is maximum
    likelihood by two sets of chains, as for the hidden units of `A learning algorithm for Boltzmann machines (Ackley,
    Hinton & Sejnowski, 1985) <https://doi.org/10.1207/s15516709cog0901_7>`_; `Training restricted Boltzmann machines
    using approximations to the likelihood gradient (Tieleman, 2008) <https://doi.org/10.1145/1390156.1390290>`_ has the
    negative one.

    Metrics are those of the inner objective, and ``posterior_acceptance``, ``posterior_nonfinite`` and
    ``posterior_moved``.

    Parameters
    ----------
    objective
        Over flat points (x, z): `PersistentContrastiveDivergence` with a base over these, `ContrastiveDivergence`, or
        `ExactLikelihood` of few states.
    kernel
        How posterior chains move; ``None`` for exact draws of listed latents.
    steps
        Of each posterior chain.
    start
        Where they start: a `Tractable` over z; the proposal of the energy's `ImportanceLatents` when left out.

    Raises
    ------
    ArgumentTypeError, OptionError
        If an argument is none of these.
    """

    def __init__(
        self,
        objective: Objective,
        kernel: Kernel | None = None,
        steps: int = 20,
        start: Tractable | None = None,
    ) -> None:
        super().__init__(objective, kernel, steps, start)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw the latents, then the loss of the completed batch.

        Raises
        ------
        ArgumentTypeError
            If the energy is no `LatentEnergy`.
        """
        model = _latent(energy)
        context = context_of(model, batch)
        z, told = self.latents_of(model, batch.x.detach(), context, rng)
        loss = self.objective(model.joint, Batch(model.joint.join(batch.x, z), context), rng)
        return Loss(loss.value, told | loss.metrics)

    def as_data(self, energy: Energy, chains: Tensor, rng: Generator) -> Tensor:
        """Chains of the inner objective without their latents."""
        return _latent(energy).joint.split(chains)[0]


class LatentPriorLikelihood(PosteriorObjective):
    r"""Fit a directed energy with an energy-based prior: short chains over z given x, and an objective for the prior.

    .. math:: L = L_{prior}(z^+) - \overline{\log p(x \mid z^+)}, \qquad z^+ \sim p(z \mid x)

    `Learning latent space energy-based prior model (Pang et al., 2020) <https://arxiv.org/abs/2006.08205>`_ has, for
    the prior, `ContrastiveDivergence` with ``starts=Starts(noise=1.0)`` and its Gaussian as base: short-run chains.
    Any objective over z does, persistent chains among them. A prior without parameters, the Gaussian alone, takes
    ``objective=None``: then only the likelihood is fitted, as in `Alternating back-propagation for generator network
    (Han et al., 2017) <https://arxiv.org/abs/1606.08571>`_.

    Metrics are those of the prior's objective; ``reconstruction``, the mean of :math:`-\log p(x \mid z^+)` in nats; and
    ``posterior_acceptance``, ``posterior_nonfinite``, ``posterior_moved``.

    Parameters
    ----------
    objective
        Fits the prior energy to draws of z, or ``None``.
    kernel
        How posterior chains move; ``None`` for exact draws of listed latents.
    steps
        Of each posterior chain.
    start
        Where they start: a `Tractable` over z, the Gaussian of the prior in the paper; the proposal of the energy's
        `ImportanceLatents` when left out.

    Raises
    ------
    ArgumentTypeError, OptionError
        If an argument is none of these.
    """

    def __init__(
        self,
        objective: Objective | None,
        kernel: Kernel | None = None,
        steps: int = 20,
        start: Tractable | None = None,
    ) -> None:
        super().__init__(_Nothing() if objective is None else objective, kernel, steps, start)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw the latents, then both losses.

        Raises
        ------
        ArgumentTypeError
            If the energy is no `LatentEnergy` of a `Directed` one.
        """
        model = _latent(energy)
        if not isinstance(model.energy, Directed):
            raise ArgumentTypeError(
                f"A latent prior is fitted in LatentEnergy(Directed(prior, likelihood), latents); this one's joint "
                f"energy is {model.energy!r}. CompleteData fits any joint energy."
            )
        z, told = self.latents_of(model, batch.x.detach(), {}, rng)
        loss = self.objective(model.energy.prior, Batch(z), rng)
        reconstruction = model.energy.likelihood(batch.x, z=z).mean()
        return Loss(loss.value + reconstruction, told | loss.metrics | {"reconstruction": reconstruction.detach()})

    @torch.no_grad()
    def as_data(self, energy: Energy, chains: Tensor, rng: Generator) -> Tensor:
        """Draws of x given chains of the prior."""
        return cast(Directed, _latent(energy).energy).likelihood.sample(chains, rng)


class _Nothing(Objective):
    """Worth 0: for a prior that is not trained."""

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Zero."""
        return Loss(batch.x.new_zeros(()))


def _latent(energy: Energy) -> LatentEnergy:
    if not isinstance(energy, LatentEnergy):
        raise ArgumentTypeError(f"Latents are drawn under a LatentEnergy(joint, latents); got {energy!r}.")
    return energy
