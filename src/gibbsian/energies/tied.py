r"""Restricted machines with copies of a layer, as greedy pretraining of deep Boltzmann machines asks for them.

In a deep machine a unit of an inner layer hears the layers below and above; a restricted machine that is trained alone
hears one of them, and would have to make up for the other. `Deep Boltzmann machines (Salakhutdinov & Hinton, 2009)
<https://proceedings.mlr.press/v5/salakhutdinov09a.html>`_ gives it that side twice: two copies of a layer whose
couplings are tied,

.. math:: E(v_1, \ldots, v_k, h_1, \ldots, h_m) = \sum_a \bigl(g(v_a) - (s(v_a) - \mu)\, b\bigr)
          + \sum_b \bigl(g(h_b) - (s(h_b) - \lambda)\, c\bigr)
          - \sum_{a, b} (s(v_a) - \mu)\, W\, (s(h_b) - \lambda) .

The first machine of a stack has two
copies of the data, the last two copies of its hidden layer; those in between have one of each, and their couplings are
halved when the stack becomes a deep machine. With the plain biases (offsets 0) of the machines :math:`i` and
:math:`i + 1` of the stack, an inner unit's fields are :math:`2 x W_i + c_i` as a hidden unit of the one and
:math:`2 y W_{i+1}^T + b_{i+1}` as a visible unit of the next; it gets the mean of both,

.. math:: x W_i + y W_{i+1}^T + \tfrac12 (c_i + b_{i+1}) .
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.deep import DeepBoltzmannMachine, side_by_side
from gibbsian.energies.independent_units import IndependentUnits
from gibbsian.energies.layered import TwoLayers
from gibbsian.energies.tractable import batch_rows
from gibbsian.errors import ArgumentTypeError, OptionError


class TiedRBM(Energy):
    """An RBM whose layers stand there in copies with tied parameters; its energy is the visible copies' free energy.

    Parameters
    ----------
    rbm
        Whose parameters are shared.
    visible_copies, hidden_copies
        How many of each layer. With one of each it is the RBM itself.

    Raises
    ------
    ArgumentTypeError
        If it is given no RBM.
    OptionError
        If the RBM is conditional, or a number is below 1.
    """

    def __init__(self, rbm: RBM, visible_copies: int = 1, hidden_copies: int = 1) -> None:
        super().__init__()
        if not isinstance(rbm, RBM):
            raise ArgumentTypeError(f"Copies are made of the layers of an RBM; got {rbm!r}.")
        if rbm.context or visible_copies < 1 or hidden_copies < 1:
            raise OptionError(
                f"An RBM without a context is copied, 1 time or more; got {rbm!r} with {visible_copies} and "
                f"{hidden_copies} copies."
            )
        self.rbm, self.visible_copies, self.hidden_copies = rbm, visible_copies, hidden_copies
        self.visible = side_by_side([rbm.visible] * visible_copies)
        self.hidden = side_by_side([rbm.hidden] * hidden_copies)
        self.event_shape, self.support = self.visible.event_shape, self.visible.support

    def two_layers(self, x: Tensor) -> TwoLayers:
        """The machine of all copies."""
        rbm, k, m = self.rbm, self.visible_copies, self.hidden_copies
        return TwoLayers(
            self.visible,
            self.hidden,
            rbm.weight.repeat(k, m),
            rbm.visible_bias.repeat(k),
            rbm.hidden_bias.repeat(m),
            rbm.visible_offset.repeat(k),
            rbm.hidden_offset.repeat(m),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Free energy of the visible copies: ``(n, *event) -> (n,)``, in nats."""
        machine = self.two_layers(batch_rows(x, self.visible.event_shape))
        return machine.energy(x, machine.hidden_field(x))[0]

    def copied(self, v: Tensor) -> Tensor:
        """Put copies of visible states of the RBM side by side."""
        return self.visible.shaped(torch.cat([v.flatten(1)] * self.visible_copies, 1))

    def hidden_draws(self, v: Tensor, u: Tensor) -> Tensor:
        """Draw hidden states of one copy, where all visible copies are ``v``, with uniform numbers ``(n, M)``."""
        units = self.rbm.hidden
        field = self.two_layers(v).hidden_field(self.copied(v))[:, : units.size]
        return units.draw(units.natural(field), u)

    def base(self, data: Tensor, smoothing: float = 0.1) -> IndependentUnits:
        """Make the machine without couplings at the means of data of the RBM, from which chains start."""
        field = self.rbm.base(data, smoothing).field
        return IndependentUnits(self.visible, field.repeat(self.visible_copies))

    def extra_repr(self) -> str:
        """The RBM and the copies."""
        return f"{self.rbm!r}, visible_copies={self.visible_copies}, hidden_copies={self.hidden_copies}"


def copies_of(place: int, count: int) -> tuple[int, int]:
    """Visible and hidden copies of a machine of a stack that is to become a deep machine, by its place from 0."""
    return (2 if place == 0 else 1), (2 if place == count - 1 else 1)


@torch.no_grad()
def compose(stack: Sequence[RBM], machine: DeepBoltzmannMachine) -> None:
    """Give a deep machine the couplings and biases of a stack that was trained with copies; see the module.

    Offsets of the deep machine become those of the stack: of inner layers, the mean of both machines'.

    Parameters
    ----------
    stack
        One RBM per hidden layer, from the data up.
    machine
        With the same layers; changed in place.

    Raises
    ------
    OptionError
        If the layers differ.
    """
    found = [*(rbm.visible for rbm in stack), *(rbm.hidden for rbm in stack[-1:])]
    if [repr(units) for units in found] != [repr(units) for units in machine.layers]:
        raise OptionError(f"The stack has the layers {found}, and the deep machine {list(machine.layers)}.")
    last, plain, offsets = len(stack) - 1, [], []
    for i, rbm in enumerate(stack):
        k, m = copies_of(i, len(stack))
        machine.weights[i].copy_(rbm.weight * (0.5 if 0 < i < last else 1.0))
        plain.append(
            (
                rbm.visible_bias - m * (rbm.weight @ rbm.hidden_offset),
                rbm.hidden_bias - k * (rbm.visible_offset @ rbm.weight),
            )
        )
        offsets.append((rbm.visible_offset, rbm.hidden_offset))
    inner = [[0.5 * (low[1] + high[0]) for low, high in itertools.pairwise(pairs)] for pairs in (plain, offsets)]
    biases, centres = ([pairs[0][0], *between, pairs[-1][1]] for pairs, between in zip((plain, offsets), inner))
    machine.even_offset.zero_()
    machine.odd_offset.zero_()
    machine.even_bias.copy_(torch.cat(biases[::2]))
    machine.odd_bias.copy_(torch.cat(biases[1::2]))
    machine.recentre(torch.cat(centres[::2]), torch.cat(centres[1::2]))
