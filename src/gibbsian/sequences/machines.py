r"""Restricted Boltzmann machines of families: hidden units that read whole sequences, in the place of pairs.

`Learning protein constitutive motifs from sequence data (Tubiana, Cocco & Monasson, 2019)
<https://doi.org/10.7554/eLife.39397>`_. The hidden units summed out, a machine couples any number of columns at once.
Its pairs, to second order around the family's own sequences, are

.. math:: J_{ij}(a, b) \approx \sum_\mu W_{ia,\mu} W_{jb,\mu} \, \overline{\mathrm{Var}(h_\mu \mid x)},

which is what contacts are read off.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.independent_units import IndependentUnits
from gibbsian.energies.pairwise import Potts
from gibbsian.energies.units import CategoricalUnits
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Objective
from gibbsian.objectives.centring import Centred
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.sequences.tables import states_of

SMOOTHING = 0.01
"""Weight of uniform letters in what the biases begin with."""


def machine_of(length: int, letters: int, hidden: int, rng: Generator | None = None) -> RBM:
    """Build a machine with a unit of K letters for each column, and hidden units of two states."""
    return RBM(CategoricalUnits((length,), letters), hidden, rng=rng)


def weighted_rows(codes: Tensor, weights: Tensor, n: int, rng: Generator) -> Tensor:
    """Draw sequences in proportion to their weights, evenly: each comes its expected number of times, rounded.

    Parameters
    ----------
    codes, weights
        ``(N, L)`` and ``(N,)``.
    n
        How many.
    rng
        The generator.
    """
    ends = weights.double().cumsum(0)
    marks = (torch.arange(n) + torch.rand((), generator=rng, dtype=torch.float64)) / n * ends[-1]
    place = torch.searchsorted(ends, marks).clamp(max=len(codes) - 1)
    return codes[place[torch.randperm(n, generator=rng)]]


def machine_objective(machine: RBM, rows: Tensor, chains: int, steps: int) -> Objective:
    """Persistent contrastive divergence with centring; sets the machine's biases by one-hot rows first."""
    machine.start_at(rows, SMOOTHING)
    units = machine.visible
    base = IndependentUnits(units, units.fitted(rows, SMOOTHING))
    chain = PersistentContrastiveDivergence(RBMGibbs(), base, steps=steps, buffer_size=chains, restart=0.0)
    return Centred(chain)


@torch.no_grad()
def effective_couplings(machine: RBM, codes: Tensor, weights: Tensor, rows: int = 4000) -> Potts:
    """Read the couplings of pairs off a machine, to second order; see the module.

    Parameters
    ----------
    machine
        With hidden units of two states.
    codes, weights
        The family's sequences, of which the first ``rows`` are looked at.
    rows
        See above.
    """
    length, letters = machine.visible.event_shape
    x, w = states_of(codes[:rows], letters), weights[:rows] / weights[:rows].sum()
    mean = machine.hidden_given(x)
    spread = (w[:, None] * mean * (1.0 - mean)).sum(0)
    couplings = ((machine.weight * spread) @ machine.weight.T).view(length, letters, length, letters)
    own = torch.arange(length)
    couplings[own, :, own, :] = 0.0
    couplings = 0.5 * (couplings + couplings.permute(2, 3, 0, 1))
    return Potts(couplings.contiguous(), field=machine.visible_bias.view(length, letters))
