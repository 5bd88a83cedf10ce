"""Log-likelihoods of sequences: log Z of a family's model between bounds, from independent columns and back."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.energies.pairwise import Potts
from gibbsian.energies.tractable import Categorical
from gibbsian.kernels.base import Kernel
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.partition.base import LogZ
from gibbsian.partition.boltzmann import rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.paths import Path
from gibbsian.sequences.family import Family
from gibbsian.sequences.gibbs import SequenceGibbs
from gibbsian.sequences.tables import potts_path, states_of


def family_log_z(
    family: Family, draws: Tensor, rng: Generator, *, chains: int = 400, temperatures: int | None = None
) -> LogZ:
    """Bracket log Z by annealed importance sampling from independent columns, and back from draws of the model.

    Parameters
    ----------
    family
        The model.
    draws
        Sequences drawn from it, ``(n, L)``, of which ``chains`` are annealed back. The upper bound is as good as they
        are.
    rng
        The generator.
    chains
        In each direction.
    temperatures
        On the way; as many as a pilot run finds fit when ``None``.

    Returns
    -------
    LogZ
        In nats, for which ``-energy - log_z`` is the log-likelihood of an aligned sequence, gaps included.
    """
    kernel, path, base = _walk(family)
    back = states_of(draws[torch.randperm(len(draws), generator=rng)[:chains]], family.letters)
    return bracket(
        family.energy, base, back, rng=rng, chains=chains, temperatures=temperatures, kernel=kernel, path=path
    )


def independent_log_prob(family: Family, codes: Tensor) -> Tensor:
    """Log-probabilities of sequences if columns were independent, ``(n,)``: what couplings are to improve on."""
    logs = (family.shares / family.shares.sum(-1, keepdim=True)).log()
    return logs.flatten()[codes + logs.shape[1] * torch.arange(codes.shape[1])].sum(1)


def _walk(family: Family) -> tuple[Kernel, Path, Categorical]:
    base = family.base
    if isinstance(family.energy, Potts):
        return SequenceGibbs(reversible=True), potts_path(base, family.energy), base
    return RBMGibbs(), rbm_path(base, family.energy), base
