"""Which recipe suits a kind and size of data, and what its settings are unless they are overridden."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gibbsian.errors import unknown_name
from gibbsian.recipes.networks import several_networks
from gibbsian.recipes.recipe import OWN_OBJECTIVE, WITH_LEVELS, DataKind, Recipe
from gibbsian.training.settings import TrainingSettings

_DENSITIES = (
    "ranking-nce",
    "conditional-nce",
    "score-matching",
    "sliced-score-matching",
    "energy-discrepancy",
    "exact-likelihood",
)
"""Objectives that tables may take in the place of noise contrastive estimation, with its network and settings."""


def choose(
    kind: DataKind,
    shape: tuple[int, ...],
    rows: int,
    overrides: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
) -> Recipe:
    """Choose the recipe for a kind and size of data, and override it field by field.

    Images and wide tables get a noise-conditional energy fitted by denoising at many levels; tables of up to five
    columns an mlp fitted by noise contrastive estimation against a Gaussian, which gets the masses of separate modes
    right; zeros and ones a restricted Boltzmann machine, centred, by persistent contrastive divergence.

    Parameters
    ----------
    kind
        Of the data.
    shape
        Of one row.
    rows
        Of the training part.
    overrides
        Fields of `Recipe` or `gibbsian.training.TrainingSettings`, by name.
    class_names
        What the data's classes are called, where they have labels; used with ``conditional``.

    Raises
    ------
    OptionError
        If a name is unknown, or the choice contradicts itself.
    """
    given = dict(overrides or {})
    fields = {f.name for f in dataclasses.fields(Recipe)} - {"training", "kind", "shape", "class_names", "version"}
    settings = {f.name for f in dataclasses.fields(TrainingSettings)}
    for name in given:
        if name not in fields | settings:
            raise unknown_name("option", name, fields | settings)
    d = 1
    for s in shape:
        d *= s
    objective = given.get("objective")
    energy = given.get("energy", "rbm" if kind == "binary" else None)
    conditional = bool(given.get("conditional"))
    if conditional and objective is None and kind != "binary":
        energy = energy or "noise-conditional"
    if objective is None:
        if energy in OWN_OBJECTIVE:
            objective = OWN_OBJECTIVE[energy]
        elif energy is None:
            objective = "noise-contrastive" if kind == "table" and d <= 5 else "multi-level-denoising"
        else:
            objective = "multi-level-denoising" if energy in WITH_LEVELS else "pcd"
    chosen, training = _defaults(objective, kind, d, rows, energy)
    chosen["objective"] = objective
    chosen |= {k: v for k, v in given.items() if k in fields}
    training |= {k: v for k, v in given.items() if k in settings}
    if conditional:
        chosen["class_names"] = tuple(class_names)
    return Recipe(kind=kind, shape=tuple(shape), training=TrainingSettings(**training), **chosen)


def _defaults(
    objective: str, kind: DataKind, d: int, rows: int, energy: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings measured to work (benchmarks/digits.py, densities.py, dependable.py), by objective and kind."""
    if energy == "rbm":
        return _machine(kind, d, rows)
    if energy in OWN_OBJECTIVE:
        return several_networks(energy, kind, d)
    if objective == "multi-level-denoising":
        recipe = {"energy": "noise-conditional", "width": 256, "depth": 3}
        # An epoch more or less does not matter; small sets overfit long before large ones have been seen once.
        steps = 1000 if rows < 5000 else 4000
        training = {"steps": steps, "batch_size": 256, "learning_rate": 2e-3, "betas": (0.9, 0.99), "ema_decay": 0.998}
        training |= {"warmup_steps": 200, "final_learning_rate_factor": 0.0}
        if kind == "image":
            # Grey values come in steps: a density of them means something only with noise well above a step.
            recipe |= {"local": 16 if d <= 256 else 4, "sigma_density": 0.2, "denoise": True}
            # Dropout keeps small sets from being learned by heart, and then more steps pay.
            few = rows < 5000
            if energy == "unet":
                # Width and depth count feature maps and blocks; a step takes about five times as long.
                recipe |= {"width": 32, "depth": 1, "local": 0, "levels": 32}
                return recipe, training | {"steps": 1000 if few else 2500, "batch_size": 128}
            return recipe | {"dropout": 0.25 if few else 0.0}, training | ({"steps": 2000} if few else {})
        narrow = {"frequencies": 2 if d <= 5 else 0, "gain": 0.0 if d <= 5 else 0.5, "sigma_mean": -1.0}
        return recipe | narrow | {"width": 128}, training
    if objective == "noise-contrastive" or (objective in _DENSITIES and kind == "table"):
        recipe = {"energy": "mlp", "width": 128, "depth": 3, "frequencies": 3 if d <= 5 else 0}
        training = {"steps": 2500, "batch_size": 512, "learning_rate": 2e-3, "betas": (0.9, 0.99), "ema_decay": 0.998}
        # Resampled draws of the base are in the right places already; the chains only take copies apart.
        return recipe | {"step_size": 0.05, "sample_steps": 100}, training
    if kind == "image":
        training = {"steps": 2000, "learning_rate": 1e-3, "betas": (0.0, 0.999), "ema_decay": 0.99}
        return _image_pcd(d, energy) if objective == "pcd" else _image_cd(), training
    recipe = {"energy": "mlp", "width": 128, "depth": 3, "step_size": 0.02}
    return recipe, {"steps": 2000, "batch_size": 256, "learning_rate": 1e-3, "ema_decay": 0.995}


def _machine(kind: DataKind, d: int, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A restricted Boltzmann machine, whose chains all move in every step, as many as rows in a batch."""
    batch = 128
    recipe = {"energy": "rbm", "kernel": "gibbs", "width": 500 if d > 256 else 100, "chain_steps": 1, "restart": 0.0}
    recipe |= {"buffer_size": batch, "sample_steps": 200}
    if kind != "binary":
        recipe["base_scale"] = 0.3 if kind == "image" else 0.5
    # Fitted by few steps: larger rates where there are few bits, smaller ones for pictures with hundreds of units.
    rate = 0.02 if d <= 32 else 5e-3 if d <= 256 else 1e-3
    training = {"steps": 5000, "batch_size": batch, "learning_rate": rate, "ema_decay": 0.0, "clip_norm": 0.0}
    return recipe, training | {"final_learning_rate_factor": 0.0}


def _image_pcd(d: int, energy: str | None) -> dict[str, Any]:
    """Images by persistent chains: the data with noise, which draws lose again.

    Noise is what lets plain Langevin chains move from image to image, in steps in proportion to its variance.
    """
    noise = 0.25 if d <= 256 else 0.5
    recipe = {"energy": "mlp", "width": 256, "depth": 3, "kernel": "ula", "step_size": 0.32 * noise**2}
    if energy in ("convolutional", "residual"):
        recipe["width"] = 32
    recipe |= {"data_noise": noise, "base_fitted": True, "denoise": True}
    return recipe | {"chain_steps": 10, "buffer_size": 1024, "restart": 0.01, "sample_steps": 300}


def _image_cd() -> dict[str, Any]:
    recipe = {"energy": "convolutional", "width": 32, "depth": 3, "kernel": "ula", "step_size": 0.01}
    return recipe | {"base_scale": 0.7, "energy_penalty": 0.01}
