r"""Posteriors better than the encoder's: by chains from its draws, or by fitting mean and scale to each row.

An encoder's :math:`q(z \mid x)` is the same network for all rows, and no row's best normal law. Two refinements, each
with a bound that stays one:

* **Chains** started at the encoder's draws (`refine_posterior`) are draws of the posterior in the end. What they are
  worth as a bound is told by annealing along the same way: `latent_log_likelihood` with ``start="encoder"``.
* **Semi-amortised** (`refine_proposal`): mean and scale of each row go on from the encoder's by gradient steps on the
  row's own bound. The refined q is a proposal as before, so that its bound is computed in the same way, on fresh draws.

`Semi-amortized variational autoencoders (Kim et al., 2018) <https://arxiv.org/abs/1802.02550>`_; `Learning deep latent
Gaussian models with Markov chain Monte Carlo (Hoffman, 2017) <https://proceedings.mlr.press/v70/hoffman17a.html>`_.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents
from gibbsian.energies.variational import RowTable
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import Kernel
from gibbsian.partition.latent_paths import sampled
from gibbsian.samples import Samples
from gibbsian.sampling import sample


def refine_posterior(
    energy: LatentEnergy,
    x: Tensor,
    kernel: Kernel,
    *,
    steps: int,
    rng: Generator,
    chains: int = 1,
    thin: int | None = None,
) -> Samples:
    """Run chains over z given each row, from draws of the model's proposal.

    Parameters
    ----------
    energy
        With `ImportanceLatents`, whose proposal is where the chains start.
    x
        Rows ``(n, *event)``.
    kernel
        How z moves.
    steps
        Of each chain.
    rng
        The generator.
    chains
        Of each row; chains of one row follow each other: ``(n * chains, *latent)``.
    thin
        As in `sample`.

    Raises
    ------
    ArgumentTypeError
        If the energy has no proposal.
    OptionError, DomainError, ShapeError
        As `sample`.
    """
    _, latents = sampled(energy)
    if chains < 1:
        raise OptionError(f"chains counts those of each row, 1 or more; got {chains}.")
    with torch.no_grad():
        z, _ = latents.placed(x, latents.fresh((len(x), chains), rng), 1)
    start = z.reshape(-1, *latents.event_shape)
    return sample(energy.posterior(x.repeat_interleave(chains, 0)), kernel, start, steps=steps, rng=rng, thin=thin)


def refine_proposal(
    energy: LatentEnergy, x: Tensor, *, rng: Generator, steps: int = 50, learning_rate: float = 0.03, samples: int = 4
) -> LatentEnergy:
    r"""Fit mean and scale of q(z | x) to each of some rows, from the encoder's, by gradient steps on the row's bound.

    Parameters
    ----------
    energy
        With a `GaussianProposal`, such as `vae` makes. It is left as it is.
    x
        The rows.
    rng
        The generator.
    steps
        Steps of Adam, with a rate that falls to 0.
    learning_rate
        Of means in units of the encoder's scales, and of log-scales.
    samples
        Draws of each row at each step.

    Returns
    -------
    LatentEnergy
        The same joint energy, sharing its weights, with a proposal for just these rows in their order.
        `evidence_lower_bound` and ``estimate`` of it are the refined bounds.

    Raises
    ------
    ArgumentTypeError
        If the model has no `GaussianProposal`.
    OptionError
        If a number is out of its range.
    """
    _, latents = sampled(energy)
    if not isinstance(latents.proposal, GaussianProposal):
        raise ArgumentTypeError(f"What is refined is a GaussianProposal, mean and scale; got {latents.proposal!r}.")
    if steps < 1 or samples < 1 or not 0.0 < learning_rate < math.inf:
        raise OptionError(
            f"steps and samples are 1 or more, learning_rate is positive; got {steps}, {samples}, {learning_rate}."
        )
    with torch.no_grad():
        mean, log_scale = (t.flatten(1) for t in latents.proposal.law(x))
    shift, stretch = torch.zeros_like(mean), torch.zeros_like(log_scale)
    parameters = [shift.requires_grad_(True), stretch.requires_grad_(True)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        noise = latents.fresh((len(x), samples), rng).flatten(2)
        now = (log_scale + stretch).unsqueeze(1)
        z = (mean + log_scale.exp() * shift).unsqueeze(1) + now.exp() * noise
        # The log-density of q at its own draws is minus the log-scales and a constant.
        log_w = energy.log_weights(x, z.reshape(len(x), samples, *latents.event_shape), now.sum(2))
        slopes = torch.autograd.grad(-log_w.mean(1).sum(), parameters)
        for parameter, slope in zip(parameters, slopes):
            parameter.grad = slope
        optimizer.step()
        falling.step()
    table = torch.cat((mean + log_scale.exp() * shift, log_scale + stretch), 1)
    refined = ImportanceLatents(GaussianProposal(RowTable(table), tuple(latents.event_shape)), latents.count, rng)
    return LatentEnergy(energy.energy, refined, energy.event_shape, energy.chunk)
