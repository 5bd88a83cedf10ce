"""Ways from a normal law of each row's z to its posterior, and their temperatures: see `gibbsian.partition.latent`."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.decoders import Directed
from gibbsian.energies.joint_points import Posterior
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError
from gibbsian.kernels.base import Kernel, has_step_size
from gibbsian.kernels.hmc import HMC
from gibbsian.partition.paths import Path, geometric
from gibbsian.partition.population import move
from gibbsian.partition.schedule import PALETTE, Schedule, interpolate
from gibbsian.sampling import with_tensor_settings

PILOT_ROWS, PILOT_CHAINS, PILOT_STOPS = 32, 4, 48
"""Rows, chains of each, and temperatures of the run that finds the schedule."""


class Standardised(Energy):
    """Minus log p(x, z) as an energy of u, z = mean + scale * u, with the volume of the map."""

    mean: Tensor
    log_scale: Tensor

    def __init__(self, posterior: Posterior, mean: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.posterior, self.event_shape = posterior, posterior.event_shape
        self.register_buffer("mean", mean)
        self.register_buffer("log_scale", log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each u with its own row, ``(n, *latent) -> (n,)``."""
        z = self.mean + self.log_scale.exp() * x
        return self.posterior(z) - self.log_scale.flatten(1).sum(1)


class Start(NamedTuple):
    """Where the z of rows start: a normal law for each, standard normal in its own units."""

    energy: LatentEnergy
    proposal: GaussianProposal | Gaussian
    base: Gaussian

    @staticmethod
    def of(energy: LatentEnergy, start: str) -> Start:
        """Read ``"encoder"`` or ``"prior"``."""
        joint, latents = sampled(energy)
        if not isinstance(joint, Directed):
            raise ArgumentTypeError(f"Likelihoods of rows are those of Directed(prior, decoder); got {joint!r}.")
        if joint.latent_support is not None and joint.latent_support.is_discrete:
            raise DomainError(
                f"z lives on {joint.latent_support}, and is annealed over the reals; sum over it: ListedLatents."
            )
        if start not in ("encoder", "prior"):
            raise OptionError(f"start is 'encoder' or 'prior'; got {start!r}.")
        law = latents.proposal if start == "encoder" else joint.prior
        if start == "encoder" and isinstance(law, Gaussian):
            start = "prior"
        if start == "encoder" and not isinstance(law, GaussianProposal):
            raise OptionError(f"The model's proposal is {law!r} and no GaussianProposal; pass start='prior'.")
        if start == "prior" and (not isinstance(law, Gaussian) or law.full):
            raise OptionError(
                f"Chains start at a Gaussian of independent numbers, and the prior is {law!r}; give the model's "
                "latents a GaussianProposal, or a Gaussian, and pass start='encoder'."
            )
        own = cast("GaussianProposal | Gaussian", law)
        like = next((p for p in (*joint.parameters(), *joint.buffers()) if p.is_floating_point()), torch.empty(()))
        return Start(energy, own, Gaussian(loc=like.new_zeros(own.event_shape)))

    @torch.no_grad()
    def law(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-scales of rows, ``(n, *latent)`` each."""
        if isinstance(self.proposal, GaussianProposal):
            return self.proposal.law(x)
        loc, scale = self.proposal.loc, self.proposal.scale
        return loc.expand(len(x), *loc.shape), scale.log().expand(len(x), *loc.shape)

    def path(self, x: Tensor, chains: int, picked: Tensor | None = None) -> Path:
        """From N(0, I) to the posteriors of rows, or of those that are picked; so many chains of each."""
        mean, log_scale = self.law(x)
        index = torch.arange(len(x), device=x.device) if picked is None else picked
        index = index.repeat_interleave(chains)
        return geometric(self.base, Standardised(self.energy.posterior(x[index]), mean[index], log_scale[index]))

    def standard(self, x: Tensor, z: Tensor, chains: int) -> Tensor:
        """Where given z are, in units of the start, ``(n * chains, *latent)``."""
        mean, log_scale = self.law(x)
        return ((z - mean) * (-log_scale).exp()).repeat_interleave(chains, 0)


@torch.no_grad()
def latent_schedule(
    energy: LatentEnergy,
    x: Tensor,
    *,
    rng: Generator,
    temperatures: int = 200,
    start: str = "encoder",
    kernel: Kernel | None = None,
    moves: int = 4,
) -> Schedule:
    r"""Find temperatures and step sizes that suit rows like these, by a few chains of some of them.

    Temperatures are spaced evenly in :math:`\int \sigma(\beta)\, d\beta`, with :math:`\sigma^2` the variance of
    :math:`E_1 - E_0` within rows, averaged over them: equally many nats of spread in each increment. No chain is
    resampled, since rows have nothing in common.

    Parameters
    ----------
    energy, x, rng, temperatures, start, kernel
        As in `latent_log_likelihood`.
    moves
        Kernel steps at each of the pilot's temperatures.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError
        As `latent_log_likelihood`.
    DivergenceError
        If the energy is not finite at the pilot's chains.
    """
    if temperatures < 2:
        raise OptionError(f"temperatures counts increments of beta, 2 or more; got {temperatures}.")
    law = Start.of(energy, start)
    picked = torch.randperm(len(x), generator=rng, device=x.device)[:PILOT_ROWS]
    path = law.path(x, PILOT_CHAINS, picked)
    at = law.base.sample(len(picked) * PILOT_CHAINS, rng)
    moving = with_tensor_settings(kernel or HMC(0.1, leapfrog=5), at)
    adapted = has_step_size(moving)
    log_h = float(moving.step_size.log()) if adapted else 0.0  # pyright: ignore[reportAttributeAccessIssue]
    # From the prior, nearly all happens at small temperatures.
    betas = torch.linspace(0.0, 1.0, PILOT_STOPS, dtype=torch.float64) ** 3
    spread, sizes = [], []
    first, last = path(at.new_zeros(())), path(at.new_ones(()))
    for i, beta in enumerate(betas.to(at).unbind()):
        for gain in (4.0, 1.0) if adapted and not i else (1.0 if adapted else None,):
            at, log_h, _ = move(path(beta), moving, at, log_h, gain, moves, rng)
        difference = (last(at) - first(at)).double().view(-1, PILOT_CHAINS)
        spread.append(difference.var(1).mean().sqrt())
        sizes.append(log_h)
    sigma = torch.stack(spread).cpu()
    if not bool(sigma.isfinite().all()):
        raise DivergenceError(
            "The joint energy is not finite at some chains over z; look for NaN in the decoder, or for scales of the "
            "encoder that overflow."
        )
    length = torch.cat((sigma.new_zeros(1), (0.5 * (sigma[1:] + sigma[:-1]) * betas.diff()).cumsum(0)))
    # A tenth goes to even spacing, so that no stretch is crossed in one leap.
    length = 0.9 * length / length[-1].clamp(min=1e-300) + 0.1 * betas
    length = length / length[-1]
    place = torch.linspace(0.0, 1.0, temperatures + 1, dtype=torch.float64)
    index = torch.searchsorted(length, place).clamp(1, len(length) - 1)
    share = (place - length[index - 1]) / (length[index] - length[index - 1])
    where = index - 1 + share
    fine = interpolate(where, betas).clamp(0.0, 1.0)
    fine[0], fine[-1] = 0.0, 1.0
    if not adapted:
        return Schedule(fine)
    turn = torch.arange(1, temperatures, dtype=torch.float64) * (0.5 * (math.sqrt(5.0) - 1.0)) % 1.0
    logs = interpolate(where[1:-1], torch.tensor(sizes, dtype=torch.float64))
    return Schedule(fine, (logs - math.log(PALETTE) * turn).exp())


def sampled(energy: LatentEnergy) -> tuple[Energy, ImportanceLatents]:
    """Return the joint energy of a model and its importance draws.

    Raises
    ------
    ArgumentTypeError
        If it has none.
    OptionError
        If it has a context.
    """
    if not isinstance(energy, LatentEnergy) or not isinstance(energy.latents, ImportanceLatents):
        raise ArgumentTypeError(
            f"The model is a LatentEnergy with ImportanceLatents, such as vae((1, 28, 28)); got {energy!r}."
        )
    if energy.context:
        raise OptionError(f"The model is conditional on {', '.join(energy.context)}, which rows here do not bring.")
    return energy.energy, energy.latents
