r"""What a model that was trained with labels says of single classes: their draws, their energies, the class of a row.

The model's own density is that of all classes together (`gibbsian.models.Model.unlabelled`). Guidance moves from it
towards a class, and past it: the scale s is 0 for all classes, 1 for the class, more for rows that are more of the
class than its own (`gibbsian.applications.guidance`).

By Bayes' rule with classes taken as equally likely,

.. math:: p(y \mid x) = \frac{e^{-E(x, y) - c_y}}{\sum_k e^{-E(x, k) - c_k}}, \qquad
          c_y = \log \int e^{-E(x, \sigma_{\max}, y)} \, dx,

as each label has a constant that training does not see. Fitting the energy's change from level to level keeps it the
same at all levels, and at the highest one, where all densities are nearly the same Gaussian, it is found by importance
sampling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from gibbsian.annealing import annealed_chains, denoised
from gibbsian.applications.guidance import guided_by_label
from gibbsian.energies.base import Energy
from gibbsian.energies.labels import check_labels
from gibbsian.energies.schedules import rho_levels
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import OptionError, unknown_name
from gibbsian.kernels.langevin import MALA
from gibbsian.models import ROWS_AT_ONCE, Model

CHAIN_LEVELS, CHAIN_STEPS, CHAIN_RHO = 48, 5, 5.0
"""Noise levels of corrected draws, Metropolis steps in each of the two rounds at a level, and how levels are spaced."""

CONSTANT_DRAWS = 2048
"""Draws by which each label's constant is found."""


def label_codes(model: Model, names: Sequence[str]) -> list[int]:
    """Turn names of classes into labels.

    Raises
    ------
    OptionError
        If the model was trained without labels, or has not seen a class of a name.
    """
    known = model.recipe.class_names
    require_labels(model)
    for name in names:
        if name not in known:
            raise unknown_name("label", name, known)
    return [known.index(name) for name in names]


def require_labels(model: Model) -> None:
    """Refuse a model that was trained without labels.

    Raises
    ------
    OptionError
        Saying how to train one with labels.
    """
    if not model.recipe.conditional:
        raise OptionError(
            "This model was trained without labels, so that it has no classes to choose from. Train one that learns "
            "them: gibbsian train DATA --conditional."
        )


def labelled_energy(model: Model, labels: Tensor | int, guidance: float = 1.0) -> Energy:
    """Return the energy of labels at every noise level, guided by that of all classes.

    Parameters
    ----------
    model
        Trained with labels.
    labels
        One for all rows, or one per row ``(n,)``.
    guidance
        The scale s, 0 or more.

    Raises
    ------
    OptionError
        If the model was trained without labels, a label is none of its classes, or labels were never dropped in
        training and the guidance is not 1.
    """
    require_labels(model)
    recipe = model.recipe
    classes = len(recipe.class_names)
    if guidance == 1.0:
        check_labels(torch.as_tensor(labels), None, classes)
        return model.energy.given(y=labels)
    if not recipe.label_dropping:
        raise OptionError(
            f"Guidance of {guidance:g} needs an unconditional branch to move away from, and this model was trained "
            "with --label-dropping 0, without one. Leave --guidance out, which is 1, or train with "
            "--label-dropping 0.1."
        )
    return guided_by_label(model.energy, labels, guidance, classes=classes)


def of_label(model: Model, label: int) -> Model:
    """Return the model of one class, with scores and draws of its own."""
    recipe = dataclasses.replace(model.recipe, conditional=False)
    return Model(labelled_energy(model, label), recipe, model.scaling)


@torch.no_grad()
def draw_labelled(
    model: Model,
    labels: Tensor,
    rng: Generator,
    guidance: float = 1.0,
    corrected: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw a row of each label, in data units.

    Parameters
    ----------
    model
        Trained with labels.
    labels
        ``(n,)``.
    rng
        The generator.
    guidance
        The scale s.
    corrected
        Run Metropolis chains at every noise level, which draw from the guided density as far as they mix; otherwise
        walk down the levels as the recipe does, which for a scale other than 0 and 1 ends in no density with a formula.
    progress
        Called with 1 after each level.

    Returns
    -------
    Tensor
        ``(n, *event)``.

    Raises
    ------
    OptionError
        As for `labelled_energy`, or if there is no label.
    """
    if len(labels) < 1:
        raise OptionError(f"n counts the draws, 1 or more; got {len(labels)}.")
    recipe, parts = model.recipe, []
    for part in labels.split(ROWS_AT_ONCE):
        energy = labelled_energy(model, part, guidance)
        if not corrected:
            plain = Model(energy, dataclasses.replace(recipe, conditional=False), model.scaling)
            parts.append(plain.draw_scaled(len(part), rng, progress))
            continue
        levels = rho_levels(recipe.sigma_max, recipe.sigma_min, CHAIN_LEVELS, CHAIN_RHO)
        start = model.base.sample(len(part), rng)
        kernel = MALA(recipe.sigma_max**2 * start[0].numel() ** (-1 / 3))
        run = annealed_chains(energy, start, levels, kernel, steps=CHAIN_STEPS, rng=rng, progress=progress)
        x = run.samples.x
        parts.append(denoised(energy.given(sigma=levels[-1]), x, levels[-1]) if recipe.denoise else x)
    return model.scaling.backward(torch.cat(parts))


def in_turn(labels: Sequence[int], n: int) -> Tensor:
    """Labels of n rows, each in turn: ``(n,)``."""
    return torch.tensor([labels[i % len(labels)] for i in range(n)])


@torch.no_grad()
def log_z_at_noise(energy: Energy, base: Tractable) -> Tensor:
    """Log Z of an energy at a high noise level, by importance sampling: 0-d.

    Parameters
    ----------
    energy
        At that level.
    base
        The Gaussian that its density comes close to there.
    """
    x = base.sample(CONSTANT_DRAWS, torch.Generator().manual_seed(0))
    return torch.logsumexp(base(x) - energy(x), 0) - math.log(len(x))


def label_constants(energy: Energy, base: Tractable, sigma: float, classes: int) -> Tensor:
    """Log Z of each label's energy at a high noise level: ``(classes,)``.

    Parameters
    ----------
    energy
        With the context ``sigma`` and ``y``.
    base
        The Gaussian that all labels' densities come close to.
    sigma
        The level, at which they do.
    classes
        How many labels, from 0.
    """
    return torch.stack([log_z_at_noise(energy.given(sigma=sigma, y=label), base) for label in range(classes)])


@torch.no_grad()
def log_class_probs(model: Model, x: Tensor) -> Tensor:
    """Logarithms of the probabilities of classes, equally likely before, given rows in data units: ``(n, classes)``.

    At the noise level ``sigma_density``, as for scores.

    Raises
    ------
    OptionError
        If the model was trained without labels.
    """
    require_labels(model)
    z, sigma = model.scaling.forward(x), model.recipe.sigma_density
    columns = []
    count = len(model.recipe.class_names)
    for label, constant in enumerate(label_constants(model.energy, model.base, model.recipe.sigma_max, count)):
        energy = model.energy.given(sigma=sigma, y=label)
        columns.append(-torch.cat([energy(part) for part in z.split(ROWS_AT_ONCE)]) - constant)
    return torch.log_softmax(torch.stack(columns, 1), 1)


def class_draws(model: Model, each: int, rng: Generator) -> dict[str, Tensor]:
    """Draw so many rows of each class, by name."""
    names = model.recipe.class_names
    rows = draw_labelled(model, torch.arange(len(names)).repeat_interleave(each), rng)
    return dict(zip(names, rows.split(each)))
