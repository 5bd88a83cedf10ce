"""Recipes: which energy, objective, sampler and settings suit which kind of data."""

from gibbsian.recipes.defaults import choose
from gibbsian.recipes.recipe import VERSION, WITH_LEVELS, DataKind, EnergyName, KernelName, ObjectiveName, Recipe

__all__ = ["VERSION", "WITH_LEVELS", "DataKind", "EnergyName", "KernelName", "ObjectiveName", "Recipe", "choose"]
