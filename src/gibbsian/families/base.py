"""What every family of models can do, whatever its energy is made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.energies.base import Energy
from gibbsian.energies.neural import MLP, ConvEnergy
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DivergenceError
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.base import Objective
from gibbsian.partition.base import LogZ
from gibbsian.partition.bracket import bracket
from gibbsian.partition.exact import quadrature
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample

ROWS_AT_ONCE = 8192

SMALL_IMAGE = 256
"""Pixels up to which networks are dense."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Walk:
    """How chains of a family are run; see `gibbsian.models.Model.chains`.

    Attributes
    ----------
    steps
        After tuning; the recipe's when ``None``.
    thin
        Keep every ``thin``-th position.
    start
        Positions in model units; the family's own when ``None``.
    progress
        Called with the number of steps made.
    """

    steps: int | None = None
    thin: int | None = None
    start: Tensor | None = None
    progress: Progress | None = None


USUAL = Walk()
"""As the recipe says."""


ANNEALED = "annealed importance sampling, forward and reverse"
OWN_DRAWS = "The upper bound takes the model's own draws for exact ones."


class Family(ABC):
    """A fitted energy in model units with the recipe that made it, and how that kind is made. Abstract.

    Parameters
    ----------
    energy
        As it was trained; conditional on ``sigma`` where it has noise levels.
    recipe
        How it was made.
    """

    exact_draws = False
    """Whether draws are independent and exactly the density's, so that chains tell nothing."""
    of_rows = True
    """Whether `density` is one of rows, over which chains walk and which has a log Z."""

    def __init__(self, energy: Energy, recipe: Recipe) -> None:
        self.energy, self.recipe = energy, recipe

    @classmethod
    @abstractmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the untrained energy by torch's global generator; without data its weights are to be loaded."""

    @classmethod
    @abstractmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Set what training starts from by the data, ``(n, *event)`` in model units."""

    @classmethod
    @abstractmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Build what the energy is fitted by."""

    @property
    @abstractmethod
    def unlabelled(self) -> Energy:
        """The energy of rows of all classes together."""

    @property
    @abstractmethod
    def density(self) -> Energy:
        """The energy of rows in model units, of which scores and log Z are."""

    @property
    @abstractmethod
    def base(self) -> Tractable:
        """The tractable density where sampling and annealing start, in model units."""

    @abstractmethod
    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Rows of data as `density` is about them, and what was done to them in words, or nothing."""

    @abstractmethod
    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Draw ``n`` rows: of the density at the noise level ``sigma``, or of the data when ``None``."""

    @abstractmethod
    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Run chains on `density`, which end as its draws."""

    @abstractmethod
    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """Run chains that leave `density` invariant, from the model's own draws.

        ``steps`` counts those after the draws, where these are not the ends of chains already.
        """

    @abstractmethod
    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """Estimate log Z of `density`; see `gibbsian.models.Model.log_z`."""

    @property
    @abstractmethod
    def log_z_told(self) -> tuple[str, str]:
        """How `log_z` is found, and what to keep in mind of it."""


class PlainFamily(Family):
    """What families share whose rows have neither labels nor noise levels. Abstract."""

    @property
    def unlabelled(self) -> Energy:
        """The energy of rows."""
        return self.density

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Rows as they are."""
        return x, ""

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """As `chains`, whose ends are the draws."""
        return self.chains(n, rng, Walk(thin=thin))


def annealed_log_z(
    family: Family, rng: Generator, temperatures: int | None, chains: int | None, steps: int | None = None
) -> LogZ:
    """Find log Z of a family's density on a grid, or by annealing from its base and back from its chains.

    The chains make the recipe's steps, or the number told: those back must have forgotten where they started.
    """
    if is_plane(family.recipe):
        return grid_of(family.density).log_z
    draws = family.chains(chains or 256, rng, Walk(steps=steps)).x
    return bracket(family.density, family.base, draws, rng=rng, temperatures=temperatures)


def annealed_told(recipe: Recipe) -> tuple[str, str]:
    """Tell how `annealed_log_z` finds it."""
    return ("quadrature", "") if is_plane(recipe) else (ANNEALED, OWN_DRAWS)


def walked(energy: Energy, start: Tensor, recipe: Recipe, rng: Generator, walk: Walk, tuned: int = 512) -> Samples:
    """Run MALA from points that are close to the density, with a step size that the first of them tune."""
    kernel = tune(energy, MALA(recipe.step_size), start[:tuned], rng=rng, steps=100).kernel
    steps = recipe.sample_steps if walk.steps is None else walk.steps
    return sample(energy, kernel, start, steps=steps, thin=walk.thin, rng=rng, progress=walk.progress or False)


def plain_network(recipe: Recipe) -> Energy:
    """Build the network of an energy that stands beside others: dense on tables and small images."""
    if is_large_image(recipe):
        return ConvEnergy(recipe.shape, (recipe.width, 2 * recipe.width))
    return MLP(recipe.shape, (recipe.width,) * recipe.depth, recipe.frequencies)


def is_plane(recipe: Recipe) -> bool:
    """Whether rows are one or two real numbers, over which an integral is a sum over a grid."""
    return recipe.shape in ((1,), (2,)) and recipe.kind != "binary"


def is_large_image(recipe: Recipe) -> bool:
    """Whether rows are pictures of so many pixels that convolutions pay; on small ones they take ten times as long."""
    return len(recipe.shape) == 3 and torch.Size(recipe.shape).numel() > SMALL_IMAGE


def grid_of(density: Energy, points: int = 400):  # noqa: ANN201
    """Integrate a density of one or two dimensions over a box that holds it; see `gibbsian.quadrature`."""
    reach = 2.0
    while True:
        try:
            return quadrature(density, -reach, reach, points)
        except ValueError:
            if reach > 40.0:
                raise
            reach *= 1.25


@torch.no_grad()
def resampled(energy: Energy, base: Tractable, n: int, rng: Generator, candidates: int = 32) -> Tensor:
    """Draw from a base and resample by importance weights: starting points in the right proportions where it covers.

    Parameters
    ----------
    energy
        The density sought.
    base
        The proposal.
    n
        Points wanted.
    candidates
        Proposals per point; fewer, with replacement, in many dimensions would be copies, so none are resampled there.
    rng
        The generator.
    """
    if base.event_shape.numel() > 10:
        return base.sample(n, rng)
    x = base.sample(candidates * n, rng)
    log_w = torch.cat([base(part) - energy(part) for part in x.split(ROWS_AT_ONCE)])
    log_w = torch.where(torch.isfinite(log_w), log_w, -math.inf)
    if not bool(torch.isfinite(log_w).any()):
        raise DivergenceError("The energy is not finite at any draw of its base; the model is broken. Train it again.")
    chosen = torch.multinomial((log_w - log_w.max()).double().exp(), n, replacement=True, generator=rng)
    return x[chosen]


def first_steps(recipe: Recipe) -> int:
    """Steps of the first phase of training."""
    return max(1, round(recipe.first_phase * recipe.training.steps))
