r"""Centring: offsets of Boltzmann machines that follow the means of their units while they are trained.

Before each loss the offsets slide by a factor :math:`\nu` towards the means of a batch,
:math:`\mu \leftarrow (1 - \nu) \mu + \nu \langle s(v) \rangle`, :math:`\lambda` likewise, and the biases move so that
the density stays what it was. The gradient that the objective then has is that of covariances; see
`gibbsian.energies.boltzmann`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.convolutional import ConvolutionalRBM
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective, Settling
from gibbsian.typing import Context


class Centred(Settling):
    """Fit restricted Boltzmann machines by another objective, with offsets that follow the means of both layers.

    `How to center deep Boltzmann machines (Melchior et al., 2016) <https://jmlr.org/papers/v17/14-237.html>`_. Offsets
    move in training only, with gradients on; they are part of the energy's ``state_dict``.

    Parameters
    ----------
    objective
        What is minimised, such as `PersistentContrastiveDivergence`.
    rate
        The sliding factor.
    chains
        The share of the model's means in the means that the offsets follow, from as many chains of the objective's
        replay buffer as the batch has rows: 0 for data alone, 0.5 for the enhanced gradient.

    Raises
    ------
    OptionError
        If a setting is not between 0 and 1, or chains are asked for and the objective keeps none.
    ArgumentTypeError
        If it is given no objective; at the first loss, if there is no `RBM` in the energy.
    """

    def __init__(self, objective: Objective, rate: float = 0.01, chains: float = 0.0) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"Centred wraps an objective; got {objective!r}.")
        for name, value in (("rate", rate), ("chains", chains)):
            if not 0.0 <= value <= 1.0:
                raise OptionError(f"{name} lies between 0 and 1; got {value}.")
        self.objective, self.rate, self.chains = objective, rate, chains
        if chains and self._buffer() is None:
            raise OptionError(
                f"chains={chains} of the means are those of chains in a replay buffer, and {objective!r} keeps none; "
                "take PersistentContrastiveDivergence, or chains=0."
            )

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Slide the offsets, then compute the objective's loss."""
        machines = _machines(energy)
        if not self.in_lanes and self.training and torch.is_grad_enabled():
            for machine in machines:
                machine.recentre(*self._means(machine, batch), rate=self.rate)
        return self.objective(energy, batch, rng)

    @property
    def moves(self) -> bool:
        """Whether offsets slide at all."""
        return self.rate > 0

    def statistics(self, energy: Energy, batch: Batch) -> list[Tensor]:
        """Means of both layers of every machine, in turn."""
        return [mean for machine in _machines(energy) for mean in self._means(machine, batch)] if self.training else []

    def settle(self, energy: Energy, means: Sequence[Tensor]) -> None:
        """Slide the offsets of every machine."""
        for machine, visible, hidden in zip(_machines(energy), means[::2], means[1::2]):
            machine.recentre(visible, hidden, rate=self.rate)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.objective!r}, rate={self.rate}, chains={self.chains}"

    def _buffer(self) -> ReplayBuffer | None:
        return next((part for part in self.objective.modules() if isinstance(part, ReplayBuffer)), None)

    def _means(self, machine: RBM | ConvolutionalRBM, batch: Batch) -> tuple[Tensor, Tensor]:
        means = _means(machine, batch.x, batch.context)
        buffer = self._buffer()
        if self.chains and buffer is not None and buffer.filled:
            n = len(batch)
            model = _means(machine, buffer.positions[:n], {k: v[:n] for k, v in buffer.context.items()})
            return torch.lerp(means[0], model[0], self.chains), torch.lerp(means[1], model[1], self.chains)
        return means


def _machines(energy: Energy) -> list[RBM | ConvolutionalRBM]:
    machines = [part for part in energy.modules() if isinstance(part, (RBM, ConvolutionalRBM))]
    if not machines:
        raise ArgumentTypeError(f"Centring moves the offsets of an RBM, and there is none in {energy!r}.")
    return machines


def _means(machine: RBM | ConvolutionalRBM, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    if isinstance(machine, RBM) and machine.condition is not None:
        return machine.means(x.detach(), context.get("y"))
    return machine.means(x.detach())
