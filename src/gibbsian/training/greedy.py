"""Greedy training of stacks: one restricted Boltzmann machine after the other, each on what the ones below draw.

A stack becomes a deep belief network as it is. To become a deep Boltzmann machine it is trained with copies of its
outermost layers, `gibbsian.energies.tied`, and then composed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.energies.belief import DeepBeliefNetwork
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.tied import TiedRBM, compose, copies_of
from gibbsian.energies.units import Units
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Objective
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.training.fit import Fit, fit
from gibbsian.training.settings import TrainingSettings, with_overrides

ROWS = 10_000
"""Rows whose hidden states are drawn at once."""

MakeObjective = Callable[[TiedRBM, Tensor], Objective]
"""The objective of one machine of a stack, from it and the rows that it is trained on, copies of them not made yet."""


def pretrain(
    machine: DeepBoltzmannMachine,
    data: Tensor,
    *,
    rng: Generator,
    objective: MakeObjective | None = None,
    settings: TrainingSettings | None = None,
    weight_scale: float = 0.01,
    smoothing: float = 0.1,
    progress: bool = False,
    **overrides: Any,
) -> list[Fit]:
    """Give a deep Boltzmann machine first weights by greedy training of a stack with copies; changes it in place.

    `Deep Boltzmann machines (Salakhutdinov & Hinton, 2009)
    <https://proceedings.mlr.press/v5/salakhutdinov09a.html>`_. The first machine sees the data twice, the last has its
    hidden layer twice, those in between are plain and their couplings halved; see `gibbsian.energies.tied`. Each starts
    centred at the means of its rows, as `RBM.start_at` does.

    Parameters
    ----------
    machine
        The machine.
    data
        Rows of states, ``(n, *event)``.
    rng
        The generator.
    objective
        Makes the objective of each machine; persistent contrastive divergence of one step with as many chains as a
        batch has rows when left out.
    settings, overrides
        Of `gibbsian.training.fit.fit`, for each machine.
    weight_scale
        Standard deviation of the machines' first weights.
    smoothing
        As in `RBM.start_at`, where each machine starts. Where some units are nearly always 0, the default takes long to
        be unlearned.
    progress
        Show each run on the terminal.

    Returns
    -------
    list of Fit
        One per machine, from the data up.

    Raises
    ------
    ArgumentTypeError
        If it is given no deep Boltzmann machine.
    OptionError, DataError, ShapeError, DomainError, DivergenceError
        As `fit` does.
    """
    if not isinstance(machine, DeepBoltzmannMachine):
        raise ArgumentTypeError(f"pretrain gives a DeepBoltzmannMachine its first weights; got {machine!r}.")
    count = len(machine.layers) - 1
    copies = [copies_of(i, count) for i in range(count)]
    made = settings or TrainingSettings(), overrides, objective, weight_scale, smoothing, progress
    stack, fits = _train(machine.layers, copies, data.to(machine.even_bias), rng, *made)
    compose(stack, machine)
    return fits


def train_belief_network(
    visible: int | Sequence[int] | Units,
    hidden: Sequence[int | Sequence[int] | Units],
    data: Tensor,
    *,
    rng: Generator,
    objective: MakeObjective | None = None,
    settings: TrainingSettings | None = None,
    weight_scale: float = 0.01,
    smoothing: float = 0.1,
    progress: bool = False,
    **overrides: Any,
) -> DeepBeliefNetwork:
    """Train a deep belief network greedily.

    `A fast learning algorithm for deep belief nets (Hinton, Osindero & Teh, 2006)
    <https://doi.org/10.1162/neco.2006.18.7.1527>`_.

    Parameters
    ----------
    visible
        Units of the data; a number or a shape for as many Bernoulli units.
    hidden
        Units of two layers or more, from the data up.
    data, rng, objective, settings, weight_scale, smoothing, progress, overrides
        As in `pretrain`.

    Raises
    ------
    OptionError, DataError, ShapeError, DomainError, DivergenceError
        If there are fewer than two layers; and as `fit` does.
    """
    if isinstance(hidden, (int, Units)) or len(hidden) < 2:
        raise OptionError(
            f"A deep belief network has two hidden layers or more; got {hidden!r}. With one it is an RBM."
        )
    first = RBM(visible, hidden[0], weight_scale=0.0)
    layers = [first.visible, first.hidden, *(RBM(1, units, weight_scale=0.0).hidden for units in hidden[1:])]
    made = settings or TrainingSettings(), overrides, objective, weight_scale, smoothing, progress
    stack, _ = _train(layers, [(1, 1)] * len(hidden), data, rng, *made)
    return DeepBeliefNetwork(stack)


def _train(
    layers: Sequence[Units],
    copies: Sequence[tuple[int, int]],
    data: Tensor,
    rng: Generator,
    settings: TrainingSettings,
    overrides: dict[str, Any],
    objective: MakeObjective | None,
    weight_scale: float,
    smoothing: float,
    progress: bool,
) -> tuple[list[RBM], list[Fit]]:
    """Train a stack, one machine after the other."""
    settings = with_overrides(settings, overrides)
    stack, fits, rows = [], [], data
    for below, above, counts in zip(layers, layers[1:], copies):
        rbm = RBM(below, above, weight_scale=weight_scale, rng=rng).to(data)
        rbm.start_at(rows, smoothing)
        tied = TiedRBM(rbm, *counts)
        made = _persistent(tied, rows, settings) if objective is None else objective(tied, rows)
        fits.append(fit(tied, tied.copied(rows), made, rng=rng, settings=settings, progress=progress))
        stack.append(rbm)
        if len(stack) < len(copies):
            rows = hidden_rows(tied, rows, rng)
    return stack, fits


@torch.no_grad()
def hidden_rows(tied: TiedRBM, rows: Tensor, rng: Generator) -> Tensor:
    """Draw the hidden states of each row, which the next machine of a stack is trained on."""
    drawn = []
    for part in rows.split(ROWS):
        u = torch.rand((len(part), tied.rbm.hidden.size), generator=rng, dtype=part.dtype, device=part.device)
        drawn.append(tied.hidden_draws(part, u))
    return torch.cat(drawn)


def _persistent(tied: TiedRBM, rows: Tensor, settings: TrainingSettings) -> Objective:
    chains = min(settings.batch_size, len(rows))
    return PersistentContrastiveDivergence(RBMGibbs(), tied.base(rows), 1, buffer_size=chains, restart=0.0)
