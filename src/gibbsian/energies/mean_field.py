r"""Mean field: the hidden layers of a deep Boltzmann machine given data, as if their units were independent.

With the hidden layers' law :math:`q(x) = \prod_j q_j(x_j)`, each unit's in its exponential family under a field of its
own,

.. math:: \log \sum_{x_1, \ldots, x_L} e^{-E(v, x_1, \ldots, x_L)} \;\ge\; -\mathbb{E}_q[E] + H(q) =: -F_q(v),

the difference being :math:`KL(q \,\|\, p(x \mid v))`. With the means :math:`m_i` of the layers' statistics, in which
the energy is linear layer by layer, and the fields :math:`f_i` of q,

.. math:: -F_q(v) = -g(v) + (s(v) - o_0)\, b_0 + \sum_{i \ge 1} (m_i - o_i)\, b_i
          + \sum_i (m_i - o_i)\, W_i\, (m_{i+1} - o_{i+1}) + \sum_{i \ge 1} A(f_i) - f_i\, m_i .

The bound is largest where every field is the one that the neighbours' means exert. Units of one layer, and of every
second one, do not see each other; so the fields of all odd layers are set at once, then those of all even ones, and no
update lowers the bound. A damped update, :math:`f \leftarrow \delta f + (1 - \delta) f_{new}`, does not either: along
it, :math:`KL(q_f \,\|\, q_{f_{new}})` falls.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.deep import DeepBoltzmannMachine, Posterior
from gibbsian.energies.layered import TwoLayers
from gibbsian.energies.units import Units
from gibbsian.errors import OptionError


class MeanField(NamedTuple):
    """A law of independent hidden units for each row of data.

    Attributes
    ----------
    odd_field, even_field
        Fields on the odd layers, and on the even ones above the data, ``(n, size)``.
    odd, even
        Mean states there, side by side.
    change
        The largest change of a mean in the last iteration, ``(n,)``.
    iterations
        How many were made.
    """

    odd_field: Tensor
    even_field: Tensor
    odd: Tensor
    even: Tensor
    change: Tensor
    iterations: int


@torch.no_grad()
def mean_field(
    machine: DeepBoltzmannMachine,
    v: Tensor,
    *,
    iterations: int = 50,
    damping: float = 0.0,
    tolerance: float | None = None,
    start: Tensor | None = None,
) -> MeanField:
    """Find the best law of independent hidden units for each row of data, a local optimum.

    Parameters
    ----------
    machine
        The machine.
    v
        Data, ``(n, *event)``.
    iterations
        Updates of all hidden layers, at most.
    damping
        The share of the old fields that stays; 0 moves all the way.
    tolerance
        Stop when no mean changed by more, which waits for the device at each iteration; ``None`` never looks.
    start
        Mean states of the even layers above the data, side by side, to begin with; at their own biases when left out.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """
    return solve(machine.posterior(v).machine, iterations, damping, tolerance, start)


def solve(
    posterior: TwoLayers,
    iterations: int,
    damping: float = 0.0,
    tolerance: float | None = None,
    start: Tensor | None = None,
) -> MeanField:
    """Iterate `mean_field` on the machine of the hidden layers."""
    check_settings(iterations, damping, tolerance)
    odd, even = cast(Units, posterior.visible), cast(Units, posterior.hidden)
    n = len(posterior.visible_bias)
    idle = posterior.hidden_bias.expand(n, -1)
    above = even.mean(even.natural(idle)) if start is None else start
    odd_field = posterior.visible_field(above)
    below = odd.mean(odd.natural(odd_field))
    even_field, done, change = idle, 0, odd_field.new_full((n,), torch.inf)
    for done in range(1, iterations + 1):
        new = posterior.hidden_field(below)
        even_field = torch.lerp(new, even_field, damping) if damping and (done > 1 or start is None) else new
        before, above = above, even.mean(even.natural(even_field))
        new = posterior.visible_field(above)
        odd_field = torch.lerp(new, odd_field, damping) if damping else new
        last, below = below, odd.mean(odd.natural(odd_field))
        if tolerance is not None or done == iterations:
            change = torch.maximum(_moved(above, before), _moved(below, last))
        if tolerance is not None and float(change.max()) <= tolerance:
            break
    return MeanField(odd_field, even_field, below, above, change, done)


def variational_free_energy(machine: DeepBoltzmannMachine, v: Tensor, q: MeanField) -> Tensor:
    r""":math:`F_q(v)` of each row, ``(n,)``: at least the free energy of the data. Differentiable with q held fixed."""
    given = machine.posterior(v)
    odd, even = cast(Units, given.machine.visible), cast(Units, given.machine.hidden)
    entropy = _left(odd, q.odd_field, q.odd) + _left(even, q.even_field, q.even)
    return given.energy + coupled_energy(given, q.odd, q.even) - entropy


def coupled_energy(given: Posterior, odd: Tensor, even: Tensor) -> Tensor:
    """Energy of hidden states, or mean energy of independent ones with these means, less the units' own, ``(n,)``."""
    machine = given.machine
    s = machine.visible.statistic(odd) - machine.visible_offset
    t = machine.hidden.statistic(even) - machine.hidden_offset
    return -(s * machine.visible_bias).sum(1) - (machine.hidden_field(odd) * t).sum(1)


class MeanFieldEnergy(Energy):
    r"""The data's energy by mean field, :math:`F_q(v)` at the q found in a fixed number of iterations.

    It is never below the data's free energy, so that :math:`-F_q(v) - \log Z` with the log Z of the deep machine is a
    lower bound of the log-likelihood. It is what `gibbsian.training.fit.fit` and scores of data take, whose points are
    rows of data; the machine itself is an energy of all even layers. Derivatives hold q fixed: at its optimum that is
    exact.

    Parameters
    ----------
    machine
        The machine; its parameters are shared.
    iterations, damping
        As in `mean_field`.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    def __init__(self, machine: DeepBoltzmannMachine, iterations: int = 50, damping: float = 0.0) -> None:
        super().__init__()
        check_settings(iterations, damping, None)
        self.machine, self.iterations, self.damping = machine, iterations, damping
        self.event_shape, self.support = machine.visible.event_shape, machine.visible.support

    def forward(self, x: Tensor) -> Tensor:
        """Variational free energy of each row: ``(n, *event) -> (n,)``, in nats."""
        q = mean_field(self.machine, x, iterations=self.iterations, damping=self.damping)
        return variational_free_energy(self.machine, x, q)

    def extra_repr(self) -> str:
        """The machine and the iterations."""
        return f"{self.machine!r}, iterations={self.iterations}"


def check_settings(iterations: int, damping: float, tolerance: float | None) -> None:
    """Refuse settings of `mean_field` that are out of their range.

    Raises
    ------
    OptionError
        With the value.
    """
    if iterations < 1:
        raise OptionError(f"Mean field takes 1 iteration or more; got {iterations}.")
    if not 0.0 <= damping < 1.0:
        raise OptionError(f"damping is the share of the old fields that stays, from 0 to below 1; got {damping}.")
    if tolerance is not None and not tolerance >= 0.0:
        raise OptionError(f"tolerance is a change of means, 0 or more; got {tolerance}.")


def _left(units: Units, field: Tensor, mean: Tensor) -> Tensor:
    """Entropy less the mean own energy, A(f) - f m, summed over a layer."""
    return units.log_partition(field).sum(1) - (field * units.statistic(mean)).sum(1)


def _moved(now: Tensor, before: Tensor) -> Tensor:
    return (now - before).flatten(1).abs().amax(1)
