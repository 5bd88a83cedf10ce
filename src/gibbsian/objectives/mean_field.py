r"""Joint training of deep Boltzmann machines: mean field for the data, persistent chains for the model.

The gradient of the variational bound :math:`-F_q(v) - \log Z` at the q that mean field finds is that of mean energies,

.. math:: \nabla \bigl(F_q(v) + \log Z\bigr) = \mathbb{E}_{q}[\nabla E(v, x_1, \ldots, x_L)] -
          \mathbb{E}_{model}[\nabla E(x_0, \ldots, x_L)] ,

since the bound is flat in q there. The first mean is one of products of means, as units are independent under q. The
second is over chains of block Gibbs on the even layers, kept from step to step, with the mean of the odd layers given
these in the place of a draw, which has less variance and the same mean.

The loss is the difference of the two mean energies, less the units' own, in which there is nothing to learn. The second
mean cannot be one of mean field too: it enters with the other sign, so that the difference between the law of
independent units and the model's would be made larger instead of smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.independent_units import check_sliding_factor
from gibbsian.energies.mean_field import MeanFieldEnergy, check_settings, mean_field
from gibbsian.errors import ArgumentTypeError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch, Loss, Settling
from gibbsian.objectives.checks import check_at_least
from gibbsian.objectives.contrast import chain_metrics
from gibbsian.objectives.sampler_gradient import run_chains


class MeanFieldPCD(Settling):
    """Fit all layers of a deep Boltzmann machine together: see `gibbsian.objectives.mean_field`.

    `Deep Boltzmann machines (Salakhutdinov & Hinton, 2009)
    <https://proceedings.mlr.press/v5/salakhutdinov09a.html>`_; with a ``rate``, centred as in `Deep Boltzmann machines
    and the centering trick (Montavon & Müller, 2012) <https://doi.org/10.1007/978-3-642-35289-8_33>`_, which trains
    machines that were not pretrained, too.

    It takes a `MeanFieldEnergy`, whose points are the data, or the machine itself outside of `fit`.

    Parameters
    ----------
    machine
        Whose chains it keeps; they start at its independent units, `DeepBoltzmannMachine.base`.
    data
        Rows whose means these have; biases alone when left out.
    steps
        Steps of block Gibbs of each chain per call.
    buffer_size
        Chains kept; at least the batch's size.
    iterations, damping
        Of mean field, as in `gibbsian.energies.mean_field.mean_field`.
    rate
        The sliding factor of the offsets towards the means of data and mean field; 0 leaves them. They move in training
        only, with gradients on.
    restart
        The fraction of drawn chains that start anew.
    compile
        Compile the chains' steps (some seconds at the first call).

    Attributes
    ----------
    chains
        The `ReplayBuffer` of even layers; part of this module's ``state_dict``.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    ArgumentTypeError
        If it is given no deep machine; at the first loss, if there is none in the energy.
    """

    def __init__(
        self,
        machine: DeepBoltzmannMachine,
        data: Tensor | None = None,
        *,
        steps: int = 5,
        buffer_size: int = 100,
        iterations: int = 10,
        damping: float = 0.0,
        rate: float = 0.0,
        restart: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(machine, DeepBoltzmannMachine):
            raise ArgumentTypeError(f"Mean-field PCD trains a DeepBoltzmannMachine; got {machine!r}.")
        check_at_least(("steps", steps, 1))
        check_settings(iterations, damping, None)
        check_sliding_factor(rate)
        # Not named buffer, as what `fit` compares with the data at the end: these chains are of more than the data.
        self.chains = ReplayBuffer(machine.base(data), buffer_size, restart)
        self.kernel = RBMGibbs()
        self.steps, self.iterations, self.damping, self.rate = steps, iterations, damping, rate
        self.compile_steps = compile

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Find the data's mean field, run as many chains as the batch has rows, and contrast them.

        Raises
        ------
        ArgumentTypeError, ShapeError, OptionError
            If there is no deep machine in the energy, data are of another shape, or there are fewer chains than rows.
        """
        machine = deep_machine(energy)
        v = batch.x
        data, change = self._data(machine, v)
        if self.rate and not self.in_lanes and self.training and torch.is_grad_enabled():
            machine.recentre(*(side.mean(0) for side in data), rate=self.rate)
        slots = self.chains.draw(len(v), rng)
        run = run_chains(machine, self.kernel, slots.x, self.steps, rng, self.compile_steps)
        self.chains.write(slots, run.state.x, self.steps)
        # The kernel keeps the field on the odd layers where the chains stand.
        odd = machine.odd.mean(machine.odd.natural(run.state.memory[0]))
        samples = machine.even.statistic(run.state.x), machine.odd.statistic(odd)
        value, metrics = _contrast(machine, data, samples)
        metrics |= chain_metrics(slots.x, run.state.x, run.acceptance, run.nonfinite)
        metrics |= {"buffer_age": self.chains.mean_age, "mean_field_change": change}
        return Loss(value, metrics)

    @property
    def moves(self) -> bool:
        """Whether offsets slide at all."""
        return self.rate > 0

    @torch.no_grad()
    def statistics(self, energy: Energy, batch: Batch) -> list[Tensor]:
        """Means of the even and of the odd layers, given the data; empty where offsets stay."""
        if not (self.moves and self.training):
            return []
        return [side.mean(0) for side in self._data(deep_machine(energy), batch.x)[0]]

    def settle(self, energy: Energy, means: Sequence[Tensor]) -> None:
        """Slide the offsets."""
        deep_machine(energy).recentre(*means, rate=self.rate)

    def _data(self, machine: DeepBoltzmannMachine, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Statistics of the even and the odd layers in the mean field of the data, and how far it still moves."""
        q = mean_field(machine, v, iterations=self.iterations, damping=self.damping)
        even = torch.cat((machine.visible.statistic(v), _statistic(machine, 2, q.even)), 1)
        return (even, machine.odd.statistic(q.odd)), q.change.max()

    def extra_repr(self) -> str:
        """The settings."""
        return f"steps={self.steps}, iterations={self.iterations}, rate={self.rate}"


def deep_machine(energy: Energy) -> DeepBoltzmannMachine:
    """Find the one deep machine in an energy.

    Raises
    ------
    ArgumentTypeError
        If there is none, or the energy is not the machine or its mean field alone.
    """
    found = energy.machine if isinstance(energy, MeanFieldEnergy) else energy
    if not isinstance(found, DeepBoltzmannMachine):
        raise ArgumentTypeError(
            f"Mean-field PCD fits a DeepBoltzmannMachine, as MeanFieldEnergy(machine); got {energy!r}."
        )
    return found


def _statistic(machine: DeepBoltzmannMachine, first: int, means: Tensor) -> Tensor:
    """Statistics of layers ``first``, ``first + 2``, ... from their mean states."""
    parts = machine.layers[first::2]
    pieces = means.flatten(1).split([units.size for units in parts], 1)
    return torch.cat([units.statistic(units.shaped(x)) for units, x in zip(parts, pieces)], 1)


def _contrast(
    machine: DeepBoltzmannMachine, data: tuple[Tensor, Tensor], samples: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean energy of the data's statistics less that of the samples', in one pass over both."""
    s, t = (torch.cat(pair) for pair in zip(data, samples))
    s, t = s - machine.even_offset, t - machine.odd_offset
    energy = -(s @ machine.even_bias) - (t * (machine.odd_bias + machine.couplings.forth(s))).sum(1)
    positive, negative = (part.mean() for part in energy.split((len(data[0]), len(samples[0]))))
    means = {"energy_data": positive, "energy_samples": negative, "gap": positive - negative}
    return positive - negative, {name: mean.detach() for name, mean in means.items()}
