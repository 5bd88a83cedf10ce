r"""Boltzmann learning of families: chains of the model are brought to the family's one- and two-point statistics.

The gradient of the negative log-likelihood of a Potts model is :math:`f^{model} - f^{data}`, for fields and couplings.
The second is counted once, with all sequences and their weights; the first over persistent chains, which sweep a few
times before each step. With a penalty the optimum is

.. math:: f^{model}_{ij}(a, b) = f^{data}_{ij}(a, b) - 2 \lambda_J J_{ij}(a, b).

`A learning algorithm for Boltzmann machines (Ackley, Hinton & Sejnowski, 1985)
<https://doi.org/10.1207/s15516709cog0901_7>`_; for families `How pairwise coevolutionary models capture the collective
residue variability in proteins? (Figliuzzi, Barrat-Charlaix & Weigt, 2018) <https://doi.org/10.1093/molbev/msy007>`_.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.energies.pairwise import Potts
from gibbsian.energies.tractable import Categorical
from gibbsian.errors import ArgumentTypeError
from gibbsian.kernels.base import Kernel
from gibbsian.kernels.ladder import levels_of
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.checks import check_at_least
from gibbsian.objectives.replicas import Exchange
from gibbsian.sampling import sample
from gibbsian.sequences.frequencies import Statistics, agreement, statistics
from gibbsian.sequences.gibbs import SequenceGibbs
from gibbsian.sequences.tables import codes_of

KEPT = 0.9
"""What is left of the past in the chains' statistics that are compared with the family's."""


class BoltzmannLearning(Objective):
    """Match the statistics of a family by persistent chains.

    Metrics: ``energy_data`` and ``energy_samples`` (mean energies of both, nats), ``gap``, ``connected`` (the Pearson
    correlation of connected two-point statistics of chains, averaged over some ten steps, and family), ``buffer_age``
    in steps of the kernel, and of a tempering kernel ``swap_min``.

    Parameters
    ----------
    target
        One- and two-point statistics of the family, as `statistics` with its weights.
    base
        Where chains start: independent columns.
    kernel
        How they move: `SequenceGibbs`, or `ParallelTempering` around it.
    chains
        How many; all move at each step.
    steps
        Of the kernel, between two steps of the optimiser.
    coupling_penalty, field_penalty
        The lambdas.

    Raises
    ------
    OptionError
        If a number is out of its range.
    """

    one: Tensor
    two: Tensor
    seen_one: Tensor
    seen_two: Tensor

    def __init__(
        self,
        target: Statistics,
        base: Categorical,
        kernel: Kernel | None = None,
        *,
        chains: int = 2000,
        steps: int = 1,
        coupling_penalty: float = 0.0,
        field_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(("chains", chains, 2), ("steps", steps, 1))
        check_at_least(("coupling_penalty", coupling_penalty, 0), ("field_penalty", field_penalty, 0))
        self.kernel: Any = SequenceGibbs() if kernel is None else kernel
        self.chains, self.steps = chains, steps
        self.coupling_penalty, self.field_penalty = coupling_penalty, field_penalty
        self.buffer = ReplayBuffer(base, chains, 0.0, levels_of(self.kernel))
        self.exchange = None if self.buffer.replicas == 1 else Exchange(self.kernel)
        for name, value in (("one", target.one), ("two", target.two)):
            # Known from the family, and no part of what is learned.
            self.register_buffer(name, value.clone(), persistent=False)
            self.register_buffer(f"seen_{name}", value.new_zeros(0))

    @property
    def target(self) -> Statistics:
        """The family's statistics."""
        return Statistics(self.one, self.two)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Move all chains, and compare their statistics with the family's; the batch is not read.

        Raises
        ------
        ArgumentTypeError
            If the energy is no trainable `Potts` between all letters.
        """
        if not isinstance(energy, Potts) or not hasattr(energy.interaction, "pairs_above"):
            raise ArgumentTypeError(
                f"Boltzmann learning of families fits Potts.dense(L, K); got {type(energy).__name__}. Other energies "
                "learn by PersistentContrastiveDivergence."
            )
        x, told = self._moved(energy, rng)
        model = statistics(codes_of(x), energy.field.shape[1])
        field, pairs = energy.field, cast(Tensor, energy.interaction.pairs_above)
        energies = [-((field * s.one).sum() + (pairs * s.two).sum()) for s in (self.target, model)]
        penalty = self.coupling_penalty * pairs.square().sum() + self.field_penalty * field.square().sum()
        gap = energies[0] - energies[1]
        metrics = {"energy_data": energies[0].detach(), "energy_samples": energies[1].detach(), "gap": gap.detach()}
        metrics |= {"connected": self._compared(model), "buffer_age": self.buffer.mean_age} | told
        return Loss(gap + penalty, metrics)

    @torch.no_grad()
    def _moved(self, energy: Potts, rng: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # In lanes each has a part of the chains.
        slots = self.buffer.draw(self.buffer.size, rng)
        if self.exchange is None or slots.hot is None:
            x, hot, told = sample(energy, self.kernel, slots.x, steps=self.steps, rng=rng).state.x, None, {}
        else:
            points = torch.cat((slots.x.unsqueeze(1), slots.hot), 1)
            run, hot, told = self.exchange.run(energy, self.kernel, points, self.steps, rng, False, False)
            x, told = run.state.x, {"swap_min": told["swap_min"]}
        self.buffer.write(slots, x, self.steps, hot)
        return x, told

    @torch.no_grad()
    def _compared(self, model: Statistics) -> Tensor:
        if self.seen_one.numel():
            model = Statistics(torch.lerp(model.one, self.seen_one, KEPT), torch.lerp(model.two, self.seen_two, KEPT))
        self.seen_one, self.seen_two = model.one, model.two
        return model.one.new_tensor(agreement(self.target, model).connected)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.kernel}, chains={self.chains}, steps={self.steps}, coupling_penalty={self.coupling_penalty}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Make room for saved statistics of chains."""
        for name in ("seen_one", "seen_two"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.zeros_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)
