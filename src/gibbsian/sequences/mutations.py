r"""Mutation effects: how much the log-probability of a sequence changes when one or two of its letters do.

.. math:: \Delta_i(a) = \log \frac{p(x \text{ with } a \text{ at } i)}{p(x)}, \qquad
          \epsilon_{ij}(a, b) = \Delta_{ij}(a, b) - \Delta_i(a) - \Delta_j(b),

in nats; log Z drops out. The epistasis :math:`\epsilon` of a Potts model is that of its couplings alone. `Mutation
effects predicted from sequence co-variation (Hopf et al., 2017) <https://doi.org/10.1038/nbt.3769>`_.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.buffers import tensors_of
from gibbsian.energies.base import Energy
from gibbsian.energies.couplings import Couplings
from gibbsian.energies.pairwise import Potts
from gibbsian.errors import ShapeError
from gibbsian.sequences.tables import states_of

ROWS = 2048
"""Mutants whose energies are evaluated at once."""


class DoubleMutations(NamedTuple):
    """Effects of all double mutations.

    Attributes
    ----------
    effects
        ``(P, K, K)`` for the pairs i < j in the order of `torch.triu_indices`; an own letter is no mutation.
    epistasis
        What of it two single mutations do not explain, shaped alike.
    """

    effects: Tensor
    epistasis: Tensor


def single_mutations(energy: Energy, sequence: Tensor, letters: int) -> Tensor:
    """Effects of all single mutations of a sequence, ``(L, K)``, in nats; 0 at its own letters.

    Parameters
    ----------
    energy
        On one-hot sequences ``(n, L, K)``.
    sequence
        Codes, ``(L,)``.
    letters
        K.

    Raises
    ------
    ShapeError
        If the energy is of other sequences.
    """
    _check(energy, sequence, letters)
    length = len(sequence)
    site, letter = torch.meshgrid(torch.arange(length), torch.arange(letters), indexing="ij")
    site, letter = site.flatten(), letter.flatten()
    values = _energies(energy, sequence, letters, len(site), lambda part: [(site[part], letter[part])])
    own = _energies(energy, sequence, letters, 1, lambda part: [])
    effects = (own - values).view(length, letters)
    # What is no mutation has no effect, and no rounding either.
    return effects.scatter(1, sequence[:, None], 0.0)


def double_mutations(energy: Energy, sequence: Tensor, letters: int) -> DoubleMutations:
    """Effects of all double mutations of a sequence; arguments and errors as of `single_mutations`."""
    _check(energy, sequence, letters)
    single = single_mutations(energy, sequence, letters)
    if isinstance(energy, Potts) and isinstance(energy.interaction, Couplings) and energy.interaction.classes:
        epistasis = _of_couplings(energy, sequence)
        i, j = torch.triu_indices(len(sequence), len(sequence), 1)
        return DoubleMutations(epistasis + single[i, :, None] + single[j, None, :], epistasis)
    i, j = torch.triu_indices(len(sequence), len(sequence), 1)
    cells = letters * letters

    def changes(part: Tensor) -> list[tuple[Tensor, Tensor]]:
        pair, rest = part // cells, part % cells
        return [(i[pair], rest // letters), (j[pair], rest % letters)]

    values = _energies(energy, sequence, letters, len(i) * cells, changes)
    own = _energies(energy, sequence, letters, 1, lambda part: [])
    effects = (own - values).view(len(i), letters, letters)
    return DoubleMutations(effects, effects - single[i, :, None] - single[j, None, :])


def strongest(found: DoubleMutations, sequence: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The double mutations of largest epistasis, of either sign: columns i < j and their letters, ``(m,)`` each."""
    i, j = torch.triu_indices(len(sequence), len(sequence), 1)
    size = found.epistasis.abs()
    # Where one letter stays, the mutation is single.
    letters = torch.arange(size.shape[1])
    real = (letters != sequence[i, None])[:, :, None] & (letters != sequence[j, None])[:, None, :]
    size = torch.where(real, size, -1.0).flatten()
    place = size.topk(min(count, int(real.sum()))).indices
    cells = found.effects.shape[1] ** 2
    pair, rest = place // cells, place % cells
    return i[pair], j[pair], rest // found.effects.shape[1], rest % found.effects.shape[1]


@torch.no_grad()
def _of_couplings(energy: Potts, sequence: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(sequence), len(sequence), 1)
    between = energy.interaction.dense().double().transpose(1, 2)[i, j]  # type: ignore[union-attr]
    rows = torch.arange(len(i))
    first = between[rows, sequence[i]]
    second = between[rows, :, sequence[j]]
    both = first.gather(1, sequence[j, None])[:, :, None]
    return between - first[:, None, :] - second[:, :, None] + both


@torch.no_grad()
def _energies(
    energy: Energy, sequence: Tensor, letters: int, count: int, changes: Callable[[Tensor], list[tuple[Tensor, Tensor]]]
) -> Tensor:
    """Energies of some mutants, of which ``changes`` tells columns and letters; float64, as differences are wanted."""
    found, like = [], next(tensors_of(energy)).dtype
    for part in torch.arange(count).split(ROWS):
        codes = sequence.expand(len(part), -1).clone()
        for site, letter in changes(part):
            codes[torch.arange(len(part)), site] = letter
        found.append(energy(states_of(codes, letters, like)).double())
    return torch.cat(found)


def _check(energy: Energy, sequence: Tensor, letters: int) -> None:
    shape = (len(sequence), letters)
    if sequence.ndim != 1 or (energy.event_shape is not None and tuple(energy.event_shape) != shape):
        raise ShapeError(
            f"The energy takes sequences {tuple(energy.event_shape or ())} of columns and letters; this one has "
            f"{tuple(sequence.shape)} columns and {letters} letters."
        )
