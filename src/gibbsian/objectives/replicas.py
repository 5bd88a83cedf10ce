r"""Parallel-tempering PCD: persistent chains that are replicas at a ladder of temperatures.

A model that has learned deep modes holds the chains of plain PCD in them: the mass that training puts where no chain
gets is never raised again, and that which a mode should gain or lose moves with the few chains that cross. Replicas at
higher temperatures cross, and swaps with exact acceptance bring their points down. Only those at the target,
:math:`\beta = 1`, enter the loss; the others move on from where they stood, too, which is why the replay buffer keeps
all replicas of a chain in its slot.

What is asked for is a kernel that tempers: ``PersistentContrastiveDivergence(ParallelTempering(kernel, betas), base)``;
for RBMs ``PathTempering(RBMGibbs(), betas, MachineRungs(base))``, along machines between the base and the model.

`Tempered Markov chain Monte Carlo for training of restricted Boltzmann machines (Desjardins et al., 2010)
<https://proceedings.mlr.press/v9/desjardins10a.html>`_; `Parallel tempering is efficient for learning restricted
Boltzmann machines (Cho, Raiko & Ilin, 2010) <https://doi.org/10.1109/IJCNN.2010.5596837>`_.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.errors import OptionError
from gibbsian.kernels.ladder import Exchanging
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.objectives.sampler_gradient import Round
from gibbsian.sampling import sample, with_tensor_settings

KEPT = 0.99
"""What is left of the past in the swap rates after a round."""


class Exchange(nn.Module):
    """What persistent replicas keep from round to round, besides their points; part of the objective's ``state_dict``.

    Parameters
    ----------
    kernel
        The tempering kernel; its ladder is copied, and a saved one takes its place.

    Attributes
    ----------
    betas
        The ladder, ``(K,)``, float64: a buffer.
    swapped, turns
        Decaying sums of the acceptance of swaps between neighbours and of their turns, ``(K - 1,)``.
    time
        Steps made so far, by which some kernels choose whose turn it is; a number of the host.
    """

    betas: Tensor
    swapped: Tensor
    turns: Tensor

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.register_buffer("betas", torch.as_tensor(kernel.betas).double().clone())
        for name in ("swapped", "turns"):
            self.register_buffer(name, torch.zeros_like(self.betas[1:]))
        self.time = 0

    @property
    def swap_rates(self) -> Tensor:
        """Acceptance of swaps between neighbours over some hundred rounds, ``(K - 1,)``; 0 before a first turn."""
        return self.swapped / self.turns.clamp(min=torch.finfo(self.turns.dtype).tiny)

    @torch.no_grad()
    def run(
        self, energy: Energy, kernel: Any, points: Tensor, steps: int, rng: Generator, compile: bool, labelled: bool
    ) -> tuple[Round, Tensor, dict[str, Tensor]]:
        """Run a round of replicas ``(n, K, *event)``; return the chains, the other replicas, and metrics.

        The metrics are ``swap_0``, between the target and its neighbour, to the last, and the least as ``swap_min``.

        Raises
        ------
        OptionError
            If chains have labels, one for each row, and all replicas move as one batch of more rows.
        """
        if labelled and isinstance(kernel, ParallelTempering):
            raise OptionError(
                "ParallelTempering moves all replicas as one batch, and there is one label for each chain; take "
                "PathTempering(kernel, betas, path=lambda energy, beta: beta * energy), which walks level by level."
            )
        tempering: Exchanging = dataclasses.replace(kernel, betas=self.betas)
        moving = with_tensor_settings(tempering, points)
        start = moving.init_replicas(energy, points, self.time)
        out = sample(energy, tempering, start, steps=steps, rng=rng, compile=compile)  # type: ignore[arg-type]
        self.swapped = KEPT * self.swapped + moving.swap_sums(out.state).to(self.swapped)
        self.turns = KEPT * self.turns + self.turns.new_tensor(moving.turns(self.time, steps))
        self.time += steps
        rates = self.swap_rates
        told = {f"swap_{k}": rate for k, rate in enumerate(rates)} | {"swap_min": rates.min()}
        return Round(out.state, out.acceptance, out.nonfinite), moving.points(out.state)[:, 1:], told

    def get_extra_state(self) -> int:
        """The time, for ``state_dict``."""
        return self.time

    def set_extra_state(self, state: int) -> None:
        """Take a saved time."""
        self.time = int(state)

    def extra_repr(self) -> str:
        """Levels."""
        return f"{len(self.betas)} levels"
