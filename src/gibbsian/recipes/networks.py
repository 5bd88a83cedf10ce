"""Settings of models of several networks, by model and kind of data."""

from __future__ import annotations

from typing import Any

from gibbsian.recipes.recipe import DataKind


def several_networks(energy: str, kind: DataKind, d: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the recipe and of the training settings, for rows of d numbers."""
    training: dict[str, Any] = {"steps": 3000, "batch_size": 256, "learning_rate": 1e-3, "ema_decay": 0.995}
    recipe: dict[str, Any] = {"energy": energy, "denoise": kind == "image"}
    large = kind == "image" and d > 256  # networks are convolutional, and width counts feature maps
    if energy in ("flow", "tilted-flow"):
        recipe |= {"width": 32 if large else 128, "depth": 2}
        recipe |= {"sample_steps": 100, "step_size": 0.02, "denoise": False}
        return recipe, training | {"final_learning_rate_factor": 0.0}
    if energy == "cooperative":
        return recipe | _cooperative(kind, d), training
    if energy == "gan":
        recipe |= {"width": 32 if large else 128, "depth": 2, "generator_width": 32 if large else 128}
        recipe |= {"sample_steps": 100, "first_phase": 0.85, "slope_penalty": 0.2 if kind == "image" else 0.05}
        if kind == "image":
            recipe |= {"data_noise": 0.3, "width": 32 if large else 256, "generator_width": 32 if large else 256}
        return recipe, training | {"betas": (0.5, 0.99), "ema_decay": 0.99, "steps": 6000, "batch_size": 64}
    recipe |= {"width": 128 if d <= 64 else 256, "depth": 2, "latent": 16 if d > 16 else max(2, d // 2)}
    recipe |= {"sample_steps": 100, "decoder_scale": 0.5, "chain_steps": 10, "buffer_size": 1000}
    training |= {"batch_size": 128, "ema_decay": 0.99}
    if energy == "vae-ebm":
        recipe |= {"step_size": 0.2, "chain_steps": 2, "first_phase": 0.7}
    if energy == "latent-ebm":
        recipe |= {"step_size": 0.01, "first_phase": 0.8}
    return recipe, training


def _cooperative(kind: DataKind, d: int) -> dict[str, Any]:
    recipe = {"width": 128, "depth": 2, "generator_width": 128, "chain_steps": 10, "sample_steps": 100}
    if kind == "image":
        noise = 0.25 if d <= 256 else 0.5
        if d > 256:
            recipe |= {"width": 32, "generator_width": 32}
        recipe |= {"kernel": "ula", "step_size": 0.32 * noise**2}
        # Draws are short runs, as in training: what chains of ten steps have learned is not what long ones tend to.
        recipe |= {"data_noise": noise, "base_fitted": True, "denoise": True, "sample_steps": recipe["chain_steps"]}
        return recipe
    return recipe | {"latent": max(4, d), "step_size": 0.02}
