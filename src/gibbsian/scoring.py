"""What ``gibbsian score`` computes: the rows' scores, and with a reference which of them are foreign to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gibbsian.errors import DataError, OptionError
from gibbsian.options import By
from gibbsian.runs import (
    columns_of,
    known_settings,
    lasting,
    reading_of,
    reload_data,
    require_same_columns,
    threshold_of,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Generator, Tensor

    from gibbsian.detection.base import Score
    from gibbsian.detection.detector import Detector
    from gibbsian.models import Model

HELD_OUT = "held-out"
"""The reference that is the run's own held-out rows."""


def model_rows(run: Path, model: Model, data: str, array: str | None) -> Tensor:
    """Read rows of the kind that a model was trained on.

    Raises
    ------
    DataError
        If they have another shape or other columns.
    """
    from gibbsian.data.loading import load_rows

    rows, columns = load_rows(
        data,
        array=array,
        drop=reading_of(run).get("labels"),
        kind=model.recipe.kind,
        threshold=threshold_of(run),  # type: ignore[arg-type]
    )
    if tuple(rows.shape[1:]) != tuple(model.recipe.shape):
        raise DataError(f"{data} has rows of shape {tuple(rows.shape[1:])}; the model scores {model.recipe.shape}.")
    require_same_columns(columns_of(run), columns, data)
    return rows


def reference_rows(run: Path, model: Model, reference: str, array: str | None) -> Tensor:
    """Read the rows that a threshold is calibrated on; warns where the model was trained on them.

    Raises
    ------
    DataError
        If they do not fit the model.
    OptionError, InputError
        If the run's own held-out rows are asked for, and there are none, or it is not known what it was trained on.
    """
    if reference == HELD_OUT:
        rows = reload_data(run).held_out
        if len(rows) == 0:
            raise OptionError(f"{run} was trained without held-out rows. Give others: --reference FILE.")
        return rows
    rows = model_rows(run, model, reference, array)
    if known_settings(run).get("data") == lasting(reference):
        warnings.warn(
            f"The reference {reference} is what the model was trained on. Such rows have lower energies than new ones, "
            "so that more of those are called foreign than is guaranteed. Use other rows, or --reference held-out.",
            stacklevel=2,
        )
    return rows


def detector_for(
    model: Model, reference: Tensor, by: By, false_positive_rate: float, rng: Generator, confidence: float | None = None
) -> Detector:
    """Calibrate a detector on reference rows in data units; one that is fitted to rows takes half of them for that.

    The rate holds for this very reference with the confidence, or on average over references without one.

    Raises
    ------
    OptionError
        If the model has no such score, or the reference is too small for the rate.
    """
    from gibbsian.detection.detector import Detector, detector_of
    from gibbsian.detection.levels import level_ladder, level_score
    from gibbsian.detection.scores import GradientNorm, typicality

    limits: Any = {"false_positive_rate": false_positive_rate, "confidence": confidence}
    if by == "energy":
        return Detector(model.energies, **limits).fit(reference)
    if by == "gradient":
        if model.recipe.kind == "binary":
            raise OptionError("--by gradient needs real numbers, and bits have no gradient: use --by energy.")
        return Detector(scaled(model, GradientNorm(model.density)), **limits).fit(reference)
    if by == "typicality":
        return detector_of(lambda rows: typicality(model.energies, rows), reference, rng=rng, **limits)
    if not model.recipe.noise_conditional:
        raise OptionError(
            f"--by levels needs an energy with noise levels, and this model's objective was {model.recipe.objective}. "
            "Use --by energy, typicality or gradient."
        )
    ladder = level_ladder(model.recipe.sigma_min, model.recipe.sigma_max)
    return detector_of(
        lambda rows: scaled(model, level_score(model.unlabelled, model.scaling.forward(rows), ladder, rng=rng)),
        reference,
        rng=rng,
        **limits,
    )


def scaled(model: Model, score: Score) -> Score:
    """A score of rows in model units, as one of rows in data units."""
    return lambda x: score(model.scaling.forward(x))


def usual_by(model: Model) -> By:
    """The score that foreign rows are told by unless another is asked for: the one that was measured to be best.

    It was measured on images; rows of tables with noise levels keep to their energy.
    """
    return "levels" if model.recipe.noise_conditional and model.recipe.kind == "image" else "energy"


def score_table(model: Model, rows: Tensor, log_z: float | None, detector: Detector | None, by: By) -> pd.DataFrame:
    """Energy, score and log-density where log Z is known; with a detector also p-values, and which rows are foreign.

    Of a model that was trained with labels also the most probable class and its probability, classes being equally
    likely before.
    """
    import pandas as pd

    from gibbsian.labelled import log_class_probs

    energy = model.energies(rows).double()
    table = pd.DataFrame({"energy": energy.numpy(), "score": (model.scaling.log_det - energy).numpy()})
    if log_z is not None:
        table["log_prob"] = table["score"] - log_z
    if model.recipe.conditional:
        probs, label = log_class_probs(model, rows).exp().max(1)
        table["label"] = [model.recipe.class_names[i] for i in label.tolist()]
        table["label_prob"] = probs.numpy()
    if detector is not None:
        if by != "energy":
            table[by] = -detector.score_samples(rows)
        table["p_value"] = detector.p_values(rows)
        table["foreign"] = detector.predict(rows) < 0
    return table


def verdict(table: pd.DataFrame, detector: Detector, by: By) -> str:
    """Say how many rows are foreign, by what threshold, and what that guarantees."""
    return f"{table['foreign'].to_numpy().sum()} of {len(table)} rows are foreign by {by}: {detector.calibration_}."
