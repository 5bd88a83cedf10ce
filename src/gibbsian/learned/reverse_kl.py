r"""A flow fitted by its own draws: the reverse Kullback-Leibler divergence, simplest and blind to what it leaves out.

.. math:: KL(q \| p) = E_q[\log q(x) + E(x)] + \log Z .

Draws move with the flow's parameters, and the gradient of the energy at them is all that is asked for. A flow that
covers one of several modes has a divergence of no more than the log of that mode's share, and nothing draws it to the
others: take it for energies with one mode, and to compare with `FAB`.

`Boltzmann generators (Noé et al., 2019) <https://doi.org/10.1126/science.aaw1147>`_, "training by energy".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator

from gibbsian.energies.base import Energy
from gibbsian.energies.flows import Flow
from gibbsian.errors import DivergenceError
from gibbsian.kernels.base import evaluate, is_finite, per_chain, row_sum
from gibbsian.learned.base import Optimiser, record, require_counts, require_positive


@dataclass(frozen=True)
class ReverseKL:
    """How `fit_flow` trains by the reverse divergence; each step costs ``batch`` energies and their gradients.

    Parameters
    ----------
    steps
        Optimiser steps.
    batch
        Draws of each.
    learning_rate
        The highest of Adam's rates, which rise and fall.
    clip_norm
        Gradients with a larger norm are scaled down to it.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    steps: int = 2000
    batch: int = 256
    learning_rate: float = 1e-3
    clip_norm: float = 10.0

    def __post_init__(self) -> None:
        require_counts(self, ("steps",))
        require_counts(self, ("batch",), 2)
        require_positive(self, ("learning_rate", "clip_norm"))

    @property
    def length(self) -> int:
        """Steps, for progress."""
        return self.steps

    def train(
        self, energy: Energy, flow: Flow, rng: Generator, report: Callable[[int], object], every: int
    ) -> tuple[list[dict[str, float]], int, int]:
        """Train a flow in place; `fit_flow` checks the arguments and calls this.

        Returns
        -------
        tuple
            Records, the draws that were not finite, and how many draws there were.
        """
        optimiser = Optimiser(flow.parameters(), self.learning_rate, self.steps, self.clip_norm)
        history: list[dict[str, float]] = []
        bad = torch.zeros((), dtype=torch.int64, device=next(flow.parameters()).device)
        for i in range(self.steps):
            x, log_q = flow.rsample_and_log_prob(self.batch, rng)
            value, grad = evaluate(energy, x.detach())
            sound = is_finite(value, grad) & torch.isfinite(log_q.detach())
            # The energy's slope at the draws is all that its gradient in the flow's parameters needs.
            slope = torch.where(per_chain(sound, grad), grad, 0.0)
            loss = torch.where(sound, log_q + row_sum(x * slope), 0.0).sum() / self.batch
            optimiser.step(loss)
            bad += (~sound).sum()
            if i % every == 0 or i == self.steps - 1:
                if not bool(sound.any()):
                    raise DivergenceError(
                        f"At step {i} the energy is not finite at any of {self.batch} draws of the flow. Start from a "
                        "flow that covers the energy's domain, or lower the learning rate."
                    )
                gap = torch.where(sound, (log_q + value).detach(), 0.0).sum() / sound.sum()
                history.append(record(i, torch.where(sound, -(log_q + value).detach(), -torch.inf), loss=gap))
            report(1)
        return history, int(bad), self.steps * self.batch
