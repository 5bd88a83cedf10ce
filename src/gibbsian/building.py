"""What a recipe's names stand for: the family of its energy, and what that family builds."""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.families.autoencoders import Autoencoders, CorrectedAutoencoders, LatentPriors
from gibbsian.families.base import Family
from gibbsian.families.flows import Flows, TiltedFlows
from gibbsian.families.generators import Cooperative, Gans
from gibbsian.families.levels import Levels
from gibbsian.families.machines import Machines
from gibbsian.families.networks import Networks
from gibbsian.objectives.base import Objective
from gibbsian.recipes import Recipe

FAMILIES: dict[str, type[Family]] = {
    "noise-conditional": Levels,
    "unet": Levels,
    "mlp": Networks,
    "convolutional": Networks,
    "residual": Networks,
    "rbm": Machines,
    "flow": Flows,
    "tilted-flow": TiltedFlows,
    "cooperative": Cooperative,
    "gan": Gans,
    "vae": Autoencoders,
    "vae-ebm": CorrectedAutoencoders,
    "latent-ebm": LatentPriors,
}
"""Name of an energy in recipes to its family."""


def family_of(recipe: Recipe) -> type[Family]:
    """Find the family of a recipe's energy."""
    return FAMILIES[recipe.energy]


def build_energy(recipe: Recipe, data: Tensor | None = None) -> Energy:
    """Build the untrained energy; without data what depends on them is to be loaded."""
    return family_of(recipe).build(recipe, data)


def build_objective(recipe: Recipe, data: Tensor, energy: Energy) -> Objective:
    """Build the objective.

    Parameters
    ----------
    recipe
        Names it.
    data
        Training rows in model units.
    energy
        What it will fit, of which some objectives train parts of their own.
    """
    return family_of(recipe).objective(recipe, energy, data)


def initial_weights(recipe: Recipe, data: Tensor) -> Energy:
    """Build the energy with weights that depend on the seed alone, and set what it starts from by the data.

    Parameters
    ----------
    recipe
        Names it.
    data
        Training rows in model units.
    """
    family = family_of(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        energy = family.build(recipe, data)
    family.prepare(recipe, energy, data)
    return energy
