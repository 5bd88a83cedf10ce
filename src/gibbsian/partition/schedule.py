r"""Schedules: at which temperatures an annealed run stops, and with which step size it moves there.

A pilot run finds both. A small population is carried from the base to the target by sequential Monte Carlo, resampled
at every stage (see `population`), so that temperatures lie dense where the density changes fast, and step sizes follow
the acceptance. The main run then keeps to what was found: with settings that followed its own chains, its weights would
not be exactly unbiased. Along the temperatures, step sizes cycle through a range below the one found: densities with
several scales need small ones too, and no trajectory length stays in resonance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.energies.tractable import Tractable
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel, has_step_size
from gibbsian.partition.paths import Path
from gibbsian.partition.population import walk

PALETTE = 4.0
"""Ratio of the largest to the smallest step size that take turns along the temperatures."""


@dataclass(frozen=True)
class Schedule:
    """The stops of an annealed run.

    Attributes
    ----------
    betas
        ``(K + 1,)``, from 0 to 1, not decreasing.
    step_sizes
        ``(K - 1,)``, at ``betas[1:-1]``; or ``None`` to leave the kernel as it is.

    Raises
    ------
    OptionError
        If the betas do not run from 0 to 1, or the step sizes are not one per inner temperature.
    """

    betas: Tensor
    step_sizes: Tensor | None = None

    def __post_init__(self) -> None:
        b = self.betas
        if b.ndim != 1 or b.numel() < 2 or float(b[0]) != 0.0 or float(b[-1]) != 1.0 or bool((b.diff() < 0).any()):
            raise OptionError(f"A schedule's betas increase from 0 to 1, two or more of them; got {b}.")
        if self.step_sizes is not None and self.step_sizes.shape != (b.numel() - 2,):
            raise OptionError(
                f"{b.numel()} betas take {b.numel() - 2} step sizes, one per inner temperature; got "
                f"{tuple(self.step_sizes.shape)}."
            )

    @staticmethod
    def linear(temperatures: int) -> Schedule:
        """Space ``temperatures`` increments of beta evenly, and leave the kernel's step size as it is."""
        return Schedule(torch.linspace(0.0, 1.0, temperatures + 1))

    def reversed(self) -> tuple[Tensor, Tensor | None]:
        """Betas and step sizes in the order of the way back."""
        return self.betas.flip(0), None if self.step_sizes is None else self.step_sizes.flip(0)


@torch.no_grad()
def pilot(
    path: Path,
    base: Tractable,
    kernel: Kernel,
    *,
    rng: Generator,
    temperatures: int | None = None,
    chains: int = 128,
    moves: int = 5,
) -> Schedule:
    """Find temperatures and step sizes by a pilot run.

    Parameters
    ----------
    path
        From the base to the target.
    base
        Where the population is drawn.
    kernel
        Its ``step_size``, where it has one, is the first guess.
    rng
        The generator, on the base's device.
    temperatures
        How many increments of beta to return. ``None`` for twice J squared, J being the stages that the run needed,
        between 200 and 5000: with perfect mixing the log-weights then have a variance of about a fifth.
    chains
        Size of the population.
    moves
        Kernel steps per stage.

    Raises
    ------
    DivergenceError
        If the target is not reached in 1000 stages, or all energies are infinite.
    OptionError
        If there is not at least one increment.
    """
    if temperatures is not None and temperatures < 1:
        raise OptionError(f"temperatures counts increments of beta, 1 or more; got {temperatures}.")
    found = walk(path, base, kernel, rng, chains=chains, moves=moves)
    stages = len(found.betas) - 1
    count = min(5000, max(200, 2 * stages**2)) if temperatures is None else temperatures
    place = torch.linspace(0.0, stages, count + 1, dtype=torch.float64)
    fine = interpolate(place, torch.tensor(found.betas, dtype=torch.float64))
    fine[0], fine[-1] = 0.0, 1.0
    if not has_step_size(kernel):
        return Schedule(fine)
    logs = interpolate(place[1:-1], torch.tensor(found.log_sizes, dtype=torch.float64))
    # The golden ratio's multiples fill [0, 1) evenly in any stretch of the schedule.
    turn = torch.arange(1, count, dtype=torch.float64) * (0.5 * (math.sqrt(5.0) - 1.0)) % 1.0
    return Schedule(fine, (logs - math.log(PALETTE) * turn).exp())


def interpolate(place: Tensor, values: Tensor) -> Tensor:
    """Read a table at fractional indices, linearly."""
    i = place.floor().long().clamp(0, values.numel() - 2)
    return values[i] + (place - i) * (values[i + 1] - values[i])
