"""Restricted Boltzmann machines."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.independent_units import IndependentUnits
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.tractable import Tractable
from gibbsian.energies.units import BernoulliUnits, Units
from gibbsian.families.base import USUAL, PlainFamily, Progress, Walk, annealed_told, grid_of, is_plane
from gibbsian.families.networks import persistent
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Objective
from gibbsian.objectives.centring import Centred
from gibbsian.objectives.contrastive import ContrastiveDivergence
from gibbsian.partition.base import LogZ
from gibbsian.partition.boltzmann import exact_log_z, rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.smc import smc
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample

FIRST_SMOOTHING = 0.01
"""Weight of the uniform law in the means that an RBM's biases begin with."""

QUICK_STATES = 1 << 20
"""States of a machine's smaller layer up to which log Z is a sum over them: some seconds."""

PARTICLES = 256
"""Particles at least that are carried to a machine, from which draws are taken."""


class Machines(PlainFamily):
    """``rbm``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the machine, with as many hidden units as the recipe's width."""
        return RBM(visible_units(recipe), recipe.width)

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Set biases and offsets by the data's means."""
        cast(RBM, energy).start_at(data, FIRST_SMOOTHING, centre=recipe.centred)

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Contrastive divergence, persistent or not, with centring."""
        if recipe.objective == "cd":
            chains: Objective = ContrastiveDivergence(
                RBMGibbs(), recipe.chain_steps, energy_penalty=recipe.energy_penalty
            )
        else:
            units = visible_units(recipe)
            chains = persistent(recipe, RBMGibbs(), IndependentUnits(units, units.fitted(data, FIRST_SMOOTHING)))
        return Centred(chains) if recipe.centred else chains

    @property
    def machine(self) -> RBM:
        """The energy."""
        return cast(RBM, self.energy)

    @property
    def density(self) -> Energy:
        """The machine."""
        return self.energy

    @property
    def base(self) -> Tractable:
        """Independent units with the data's means, which a centred machine keeps."""
        return machine_base(self.recipe, self.machine)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Where chains end."""
        return self.chains(n, rng, Walk(progress=progress)).x

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Gibbs chains from particles that were carried to the machine from its base."""
        start = carried(self.machine, self.base, n, rng) if walk.start is None else walk.start
        steps = self.recipe.sample_steps if walk.steps is None else walk.steps
        progress = walk.progress or False
        return sample(self.energy, RBMGibbs(), start, steps=steps, thin=walk.thin, rng=rng, progress=progress)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """A sum over the smaller layer, an integral, or annealing along machines."""
        if self.is_summed:
            return exact_log_z(self.energy)
        if is_plane(self.recipe):
            return grid_of(self.density).log_z
        # The base is made of other draws than those that are annealed to it.
        draws = self.chains(2 * (chains or 256), rng).x
        base, draws = self.machine.base(draws[::2]), draws[1::2]
        along = rbm_path(base, self.machine)
        return bracket(self.energy, base, draws, rng=rng, path=along, kernel=RBMGibbs(), temperatures=temperatures)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """A sum, quadrature, or annealing."""
        if self.is_summed:
            return "the sum over all states of the smaller layer", ""
        return annealed_told(self.recipe)

    @property
    def is_summed(self) -> bool:
        """Whether the smaller layer has few enough states to be summed out."""
        counts = [units.count for units in (self.machine.visible, self.machine.hidden)]
        return min((count for count in counts if count is not None), default=math.inf) <= QUICK_STATES


def visible_units(recipe: Recipe) -> Units:
    """Build the units of the data of a restricted Boltzmann machine."""
    return (
        BernoulliUnits(recipe.shape)
        if recipe.visible == "bernoulli"
        else GaussianUnits(recipe.shape, recipe.base_scale)
    )


def machine_base(recipe: Recipe, energy: RBM) -> IndependentUnits:
    """Build the independent units where chains of a machine start: with the data's means, which a centred one keeps."""
    if not recipe.centred:
        return energy.base()
    # What offsets are means of is the statistic, for Gaussian units the value over the variance.
    means = energy.visible_offset if recipe.visible == "bernoulli" else energy.visible_offset * recipe.base_scale**2
    return energy.base(energy.visible.shaped(means))


def carried(energy: RBM, base: Tractable, n: int, rng: Generator) -> Tensor:
    """Draw from a machine by sequential Monte Carlo along the machines between its base and it.

    Chains that start at the base find some of the modes and stay there; particles come to all of them in proportion.

    Parameters
    ----------
    energy, base
        The machine, and independent units of its kind.
    n
        Points wanted; of some there may be copies, which part as chains go on from them.
    rng
        The generator.
    """
    chains = max(PARTICLES, 2 * -(-n // 2))
    path = rbm_path(base, energy)
    found = smc(energy, base, rng=rng, kernel=RBMGibbs(), chains=chains, populations=2, moves=2, path=path)
    x = found.draw(n, rng)
    return x[torch.randperm(n, generator=rng)]
