"""Draws of a family's model, with the evidence that their chains have mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.chains import effective_sample_size, split_r_hat
from gibbsian.energies.pairwise import Potts
from gibbsian.errors import OptionError
from gibbsian.kernels.base import State
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.sampling import sample
from gibbsian.sequences.family import Family
from gibbsian.sequences.gibbs import sweep
from gibbsian.sequences.tables import codes_of, states_of, tables_of

CHAINS = 4000
"""Chains that run at once: their states fit the memory of any machine."""

GROUPS = 8
"""Groups of chains that are compared, half of them of each kind of start."""

WATCHED = 100
"""Chains of each kind of start whose energies are followed."""


@dataclass(frozen=True)
class Draws:
    """Sequences drawn from a family's model.

    Attributes
    ----------
    codes
        ``(n, L)``, the ends of as many chains.
    energies
        Of them, in nats, ``(n,)``.
    r_hat
        R-hat of the energy between groups of chains from two kinds of starts, independent columns and the family's own
        sequences where these are given, at their last sweep: below 1.01 when where they started is forgotten.
    autocorrelation
        Sweeps after which the energy of a chain is as good as new: its integrated autocorrelation time in the second
        half of the chains that are followed.
    sweeps
        Each chain made.
    trace
        Mean energies after each sweep of chains from both kinds of starts, ``(sweeps, 2)``; the second is NaN where
        there is only one.
    """

    codes: Tensor
    energies: Tensor
    r_hat: float
    autocorrelation: float
    sweeps: int
    trace: Tensor

    @property
    def mixed(self) -> bool:
        """Whether starts are forgotten, as far as so many chains can tell: R-hat of m independent draws is 1 + 1/2m."""
        n = min(len(self.codes), CHAINS)
        return self.r_hat <= 1.01 + 1.5 / (n // groups_of(n) // 2)


@torch.no_grad()
def draw_family(
    family: Family,
    n: int,
    rng: Generator,
    *,
    sweeps: int = 200,
    start: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Draws:
    """Draw sequences by Gibbs chains, one for each.

    Parameters
    ----------
    family
        The model.
    n
        How many, 8 or more.
    rng
        The generator.
    sweeps
        Through all columns that each chain makes.
    start
        Sequences of the family, ``(m, L)``, at which every other chain starts; the others start at independent columns,
        and all do where it is left out.
    progress
        Called with the number of sweeps just made, of ``sweeps`` for each batch of chains.

    Raises
    ------
    OptionError
        If there are too few draws or sweeps.
    """
    if n < 8 or sweeps < 8:
        raise OptionError(f"n and sweeps are 8 or more each; got {n} and {sweeps}.")
    parts, traces = [], []
    for first in range(0, n, CHAINS):
        count = min(CHAINS, n - first)
        codes = codes_of(family.base.sample(count, rng))
        if start is not None:
            picked = start[torch.randint(0, len(start), (count // 2,), generator=rng)]
            codes[1 : 2 * len(picked) : 2] = picked
        walk = _walk(family, codes, rng)
        for k in range(sweeps):
            reached, energies = next(walk)
            if not first:
                traces.append(energies.clone())
            if progress is not None:
                progress(1)
            if k == sweeps - 1:
                parts.append((reached, energies))
    codes, energies = (torch.cat(each) for each in zip(*parts))
    seen = torch.stack(traces)
    watched = seen[sweeps // 2 :, : 2 * WATCHED]
    autocorrelation = watched.numel() / float(effective_sample_size(watched))
    kinds = [seen[:, ::2].mean(1), seen[:, 1::2].mean(1)]
    trace = torch.stack([kinds[0], kinds[1] if start is not None else torch.full_like(kinds[1], torch.nan)], 1)
    return Draws(codes, energies, forgotten(seen[-1]), autocorrelation, sweeps, trace)


def forgotten(energies: Tensor) -> float:
    """R-hat between groups of chains by their starts, of which every other chain has the same kind.

    `Nested R-hat: assessing the convergence of Markov chain Monte Carlo when running many short chains (Margossian et
    al., 2024) <https://arxiv.org/abs/2110.13017>`_, with one draw of each chain: the chains of a group take the place
    of the draws of a chain.

    Parameters
    ----------
    energies
        At one sweep, ``(n,)``, of 8 chains or more.
    """
    groups = groups_of(len(energies))
    return float(split_r_hat(energies[: len(energies) // groups * groups].view(-1, groups)))


def groups_of(chains: int) -> int:
    """How many groups chains are parted into: few of few, for each is to have many."""
    return 2 if chains < 50 * GROUPS else GROUPS


def _walk(family: Family, codes: Tensor, rng: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences and their energies after each sweep."""
    if isinstance(family.energy, Potts):
        tables = tables_of(family.energy)
        energies = tables.energy(codes)
        while True:
            u = torch.rand((codes.shape[1], len(codes)), generator=rng)
            energies = energies + sweep(tables, codes, u)
            yield codes, energies
    state: State | Tensor = states_of(codes, family.letters)
    while True:
        state = sample(family.energy, RBMGibbs(), state, steps=1, rng=rng).state
        yield codes_of(state.x), state.energy
