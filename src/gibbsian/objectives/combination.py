"""Schedules: objectives that take over from one another.

Published recipes are sums and sequences of simpler objectives: a warm-up by denoising and then persistent chains, a
regression term that fades out. Sums with weights, constant or ramped, are `gibbsian.objectives.base.WeightedSum`, which
the operators of every objective make; here are sequences. ::

    Phases([(2000, DenoisingScoreMatching(0.3)), (None, pcd + Ramp(1.0, 0.0, 1000) * DenoisingScoreMatching(0.3))])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Generator, nn

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Counting, Loss, Objective, check_steps, formula


class Phase(nn.Module):
    """An objective in a sequence, and for how many training calls it is used."""

    def __init__(self, steps: int | None, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"A phase uses an objective; got {objective!r}.")
        if steps is not None:
            check_steps(steps, "A phase")
        self.steps = steps
        self.objective = objective


class Phases(Counting):
    """Objectives one after the other; each is used for its number of training calls, the last for all that follow.

    A call counts when gradients are on and the module is in training mode. The count is part of the ``state_dict``: a
    resumed run goes on in its phase, and a rollback takes the count back with the weights. Every phase's parameters
    and buffers are part of the objective from the start. One objective may serve several phases, and then goes on with
    the state that it has.

    The metric ``phase`` is the number of the present one, from 0; a change of it makes training forget what gaps and
    gradient norms were usual.

    Parameters
    ----------
    phases
        Pairs of a number of steps and an objective. The last number may be ``None``; the last phase has no end.

    Raises
    ------
    OptionError
        If there is no phase, a number is below 1, or one that is not the last is ``None``.
    ArgumentTypeError
        If something is not a pair, or not an objective.
    """

    def __init__(self, phases: Iterable[tuple[int | None, Objective]]) -> None:
        super().__init__()
        made = []
        for pair in phases:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ArgumentTypeError(f"A phase is a pair (steps, objective); got {pair!r}.")
            made.append(Phase(*pair))
        if not made:
            raise OptionError("A sequence of objectives has one phase or more; got none.")
        if any(phase.steps is None for phase in made[:-1]):
            raise OptionError("Only the last phase may go on without end (None); say how many steps the others take.")
        self.phases = nn.ModuleList(made)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Compute the loss of the present phase."""
        number = self.number_at(self.next_call())
        loss: Loss = cast(Phase, self.phases[number]).objective(energy, batch, rng)
        inner = {("Phases.phase" if name == "phase" else name): value for name, value in loss.metrics.items()}
        return Loss(loss.value, {**inner, "phase": loss.value.detach().new_full((), number)})

    def number_at(self, call: int) -> int:
        """Number of the phase in which a call falls; both are counted from 0."""
        for number, phase in enumerate(self.phases):
            call -= cast(int, phase.steps or 0)
            if call < 0:
                return number
        return len(self.phases) - 1

    def extra_repr(self) -> str:
        """The phases."""
        return ", ".join(f"({p.steps}, {formula(cast(nn.Module, p.objective))})" for p in self.phases)
