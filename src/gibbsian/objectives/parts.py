"""Objectives for parts of an energy: the rest of a model holds still, or does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

from torch import Generator, nn

from gibbsian.energies.base import Energy, formula
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective


class OfPart(Objective):
    """Another objective, for a part of the energy that is fitted, or with a part of it held fixed.

    Models that are made of several networks are one module to train and to save, of which an objective often takes one:
    the flow of a tilted flow, the discriminator beside a generator.

    Parameters
    ----------
    objective
        What fits the part.
    part
        Where the part is in the energy, names with dots between them; the whole energy when left out.
    held
        Another part, whose parameters get no gradient meanwhile.

    Raises
    ------
    ArgumentTypeError
        If the first argument is no objective.
    """

    def __init__(self, objective: Objective, part: str = "", held: str | None = None) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"A part is fitted by an objective; got {objective!r}.")
        self.objective, self.part, self.held = objective, part, held

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """The inner objective's loss of the part.

        Raises
        ------
        OptionError
            If the energy has no such part.
        """
        with frozen(part_of(energy, self.held) if self.held else None):
            return self.objective(part_of(energy, self.part), batch, rng)

    def extra_repr(self) -> str:
        """The part, and what fits it."""
        held = f", held={self.held!r}" if self.held else ""
        return f"{formula(self.objective)}, part={self.part!r}{held}"


def part_of(energy: nn.Module, name: str) -> Energy:
    """Find a part of an energy by its name.

    Raises
    ------
    OptionError
        If there is none, or it is no energy.
    """
    try:
        found = attrgetter(name)(energy) if name else energy
    except AttributeError as error:
        raise OptionError(f"{energy!r} has no part {name!r}: {error}") from error
    if not isinstance(found, Energy):
        raise OptionError(f"Part {name!r} is no energy, which an objective fits, but {type(found).__name__}.")
    return found


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Ask for no gradients of a module's parameters meanwhile."""
    asked = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
