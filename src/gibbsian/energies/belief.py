r"""Deep belief networks: a restricted Boltzmann machine on top, and directed layers below it down to the data.

.. math:: p(v, x_1, \ldots, x_{L-1}) = p(v \mid x_1)\, p(x_1 \mid x_2) \cdots p(x_{L-2} \mid x_{L-1})\;
          p_{top}(x_{L-1}),

where :math:`p_{top}` is the law of the top machine's visible layer, and each :math:`p(x_{i-1} \mid x_i)` that of a
restricted machine's visible layer given its hidden one. Trained greedily, each machine on what the ones below make of
the data, the stack bounds the likelihood from below: with :math:`q(x_1, \ldots \mid v) = \prod_i p_i(x_i \mid x_{i-1})`
by the machines' hidden conditionals,

.. math:: \log p(v) \ge \mathbb{E}_q\Bigl[\sum_i \log p(x_{i-1} \mid x_i) - \log q(x_i \mid x_{i-1})
          - F_{top}(x_{L-1})\Bigr] - \log Z_{top} .

A network is no energy, since its data's law has no closed form; its top machine is one. Draws are exact draws down from
chains of the top: ``network.down(sample(network.top, RBMGibbs(), start, steps=1000, rng=rng).x, rng)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.tractable import batch_rows
from gibbsian.energies.units import Units
from gibbsian.errors import ArgumentTypeError, OptionError


class DeepBeliefNetwork(nn.Module):
    """A deep belief network of a stack of restricted Boltzmann machines.

    `A fast learning algorithm for deep belief nets (Hinton, Osindero & Teh, 2006)
    <https://doi.org/10.1162/neco.2006.18.7.1527>`_.

    Parameters
    ----------
    stack
        Two machines or more, from the data up, each over the hidden units of the one below. The last one is the top.

    Raises
    ------
    OptionError
        If there are fewer than two, one is conditional, or two do not fit together.
    ArgumentTypeError
        If something is no RBM.
    """

    def __init__(self, stack: Sequence[RBM]) -> None:
        super().__init__()
        if wrong := [each for each in stack if not isinstance(each, RBM)]:
            raise ArgumentTypeError(f"A deep belief network is a stack of RBMs; got {wrong[0]!r}.")
        if len(stack) < 2 or any(rbm.context for rbm in stack):
            raise OptionError(
                f"A deep belief network is two RBMs or more, without a context; got {list(stack)}. One alone is an RBM."
            )
        for low, high in itertools.pairwise(stack):
            if repr(low.hidden) != repr(high.visible):
                raise OptionError(f"A machine over {high.visible} cannot stand on one with hidden {low.hidden}.")
        self.stack = nn.ModuleList(stack)

    @property
    def machines(self) -> list[RBM]:
        """The stack."""
        return [cast(RBM, rbm) for rbm in self.stack]

    @property
    def top(self) -> RBM:
        """The machine on top, an energy over the highest layer but one."""
        return self.machines[-1]

    @property
    def visible(self) -> Units:
        """Units of the data."""
        return self.machines[0].visible

    @torch.no_grad()
    def down(self, x: Tensor, rng: Generator, *, means: bool = False) -> Tensor:
        """Draw data given states of the top machine's visible layer, layer by layer.

        Parameters
        ----------
        x
            ``(n, *event)`` of the top machine.
        rng
            The generator.
        means
            Whether the data are the means of their last conditional, which look smoother than draws.
        """
        x = batch_rows(x, self.top.visible.event_shape)
        for place, rbm in reversed(list(enumerate(self.machines[:-1]))):
            u = None if means and place == 0 else _uniform(len(x), rbm.visible, rng, x)
            x = rbm.visible_given(x, u=u)
        return x

    @torch.no_grad()
    def up(self, v: Tensor, rng: Generator) -> list[Tensor]:
        """Draw all layers from the data up to the top machine's visible one, by the hidden conditionals.

        These are draws of q, which is what the greedy bound is about, and not of the exact posterior.

        Returns
        -------
        list of Tensor
            The data and what was drawn, ``(n, *event)`` of each layer.
        """
        states = [batch_rows(v, self.visible.event_shape)]
        for rbm in self.machines[:-1]:
            states.append(rbm.hidden_given(states[-1], u=_uniform(len(v), rbm.hidden, rng, states[-1])))
        return states

    def log_joint(self, states: Sequence[Tensor]) -> Tensor:
        r""":math:`\log p(v, x_1, \ldots, x_{L-1}) + \log Z_{top}` of rows of states of the layers, ``(n,)``."""
        total = -self.top(states[-1])
        for rbm, below, above in zip(self.machines, states, states[1:]):
            total = total + log_conditional(rbm.visible, rbm.two_layers(below).visible_field(above), below)
        return total

    def log_up(self, states: Sequence[Tensor]) -> Tensor:
        r""":math:`\log q(x_1, \ldots, x_{L-1} \mid v)`, ``(n,)``."""
        total = states[0].new_zeros(len(states[0]))
        for rbm, below, above in zip(self.machines, states, states[1:]):
            total = total + log_conditional(rbm.hidden, rbm.two_layers(below).hidden_field(below), above)
        return total

    def extra_repr(self) -> str:
        """The layers."""
        return ", ".join(repr(units) for units in (*(rbm.visible for rbm in self.machines), self.top.hidden))


def log_conditional(units: Units, field: Tensor, x: Tensor) -> Tensor:
    """Log-density of states under fields, ``(n,)``."""
    return (field * units.statistic(x)).sum(1) - units.own_energy(x) - units.log_partition(field).sum(1)


def _uniform(n: int, units: Units, rng: Generator, like: Tensor) -> Tensor:
    return torch.rand((n, units.size), generator=rng, dtype=like.dtype, device=like.device)
