"""A generator fitted to a given energy, without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.errors import OptionError
from gibbsian.objectives.amortised_divergence import GeneratorKL
from gibbsian.objectives.base import Ramp
from gibbsian.training.fit import Fit, fit
from gibbsian.training.settings import TrainingSettings, with_overrides

TARGET_SETTINGS = TrainingSettings(batch_size=256, learning_rate=2e-3)
"""The settings that are used when none are given."""


def fit_generator(
    energy: Energy,
    generator: GeneratorNetwork,
    *,
    rng: Generator,
    scale: float = 0.1,
    draws: int = 10,
    entropy_weight: float | Ramp = 1.0,
    settings: TrainingSettings | None = None,
    progress: bool = False,
    callbacks: tuple[Callable[[dict[str, Any]], object], ...] = (),
    **overrides: Any,
) -> Fit:
    """Train a generator to draw from an energy that is given and stays as it is, by the reverse divergence.

    What its draws are worth is told by `gibbsian.partition.importance.importance_sampling` with a `GeneratorProposal`
    of the same scale: log Z, its lower bound, and the effective size of the weights.

    Parameters
    ----------
    energy
        The target; its parameters get no gradient.
    generator
        Trained in place, and left with its averaged weights.
    rng
        The generator of everything random.
    scale, draws, entropy_weight
        As in `gibbsian.objectives.amortised_divergence.GeneratorKL`.
    settings, progress, callbacks, overrides
        As in `fit`; ``batch_size`` is the draws per step.

    Returns
    -------
    Fit
        Of the run; its ``energy`` is the one given.

    Raises
    ------
    OptionError, ShapeError, DomainError, ArgumentTypeError, DivergenceError
        As in `fit`.
    """
    require_fitting(generator, getattr(energy, "event_shape", None))
    settings = with_overrides(settings or TARGET_SETTINGS, overrides)
    if settings.batch_size < 2:
        raise OptionError(f"batch_size counts the draws per step, 2 or more; got {settings.batch_size}.")
    objective = GeneratorKL(generator, scale, draws, entropy_weight, compare=False)
    # Rows that say how many draws a step makes, and where to look at the energy.
    with torch.no_grad():
        rows = objective.sample(settings.batch_size, rng)
    asked = [p for p in energy.parameters() if p.requires_grad] if isinstance(energy, nn.Module) else []
    try:
        for p in asked:
            p.requires_grad_(False)
        return fit(energy, rows, objective, rng=rng, settings=settings, progress=progress, callbacks=callbacks)
    finally:
        for p in asked:
            p.requires_grad_(True)
