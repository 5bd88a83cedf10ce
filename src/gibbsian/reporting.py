"""The report of a trained model: what was evaluated, the data, the draws and the training, put together to be drawn."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from gibbsian.building import initial_weights
from gibbsian.data.dataset import Dataset
from gibbsian.diagnostics.strangers import strangers
from gibbsian.energies.boltzmann import RBM
from gibbsian.evaluation import CLASS_DRAWS, REPORT, Evaluation, cut
from gibbsian.labelled import class_draws
from gibbsian.models import Model
from gibbsian.report import ChainSummary, LikelihoodSummary, QualityTable, ReportContent, write_report
from gibbsian.report.content import MachineSummary
from gibbsian.report.machine import machine_summary


def build_report(
    folder: Path,
    model: Model,
    dataset: Dataset,
    samples: Tensor,
    evaluation: Evaluation,
    metrics: Sequence[Mapping[str, Any]],
    rng: Generator,
    command: str = "",
    seconds: float | None = None,
) -> Path:
    """Write ``report.html`` into a run's folder."""
    chains = evaluation.chains
    unit = "nats per row" if model.recipe.kind == "binary" else "nats per row, data units"
    blur = model.family.blurred(model.scaling.forward(dataset.train[:2]), rng)[1]
    if blur:
        unit += f", {blur}"
    content = ReportContent(
        title=f"{dataset.name}: an energy-based model",
        kind="image" if model.recipe.is_image else "table",
        event_shape=model.recipe.shape,
        columns=dataset.columns,
        data_name=dataset.name,
        recipe=model.recipe.to_dict(),
        command=command,
        versions=versions(),
        seed=model.recipe.seed,
        seconds=seconds,
        train=dataset.train.numpy(),
        held_out=dataset.held_out.numpy(),
        samples=samples.numpy(),
        metrics=metrics,
        events=[m for m in metrics if "event" in m] if model.recipe.training.health else None,
        energies=energy_sets(model, dataset, samples, rng),
        **energy_map(model, dataset),
        machine=machine_of(model, dataset, samples),
        chains=None
        if not chains
        else ChainSummary(
            np.asarray(chains["energy_trace"]),
            chains["acceptance"],
            chains["r_hat"],
            chains["ess"],
            chains["kernel"],
            chains["nonfinite"],
        ),
        log_z=() if evaluation.log_z is None else evaluation.log_z,
        log_likelihood=likelihood_summary(evaluation, unit),
        quality=QualityTable(evaluation.quality, {"classifier accuracy": 0.5}),
        detection={k: {"AUROC": v} for k, v in evaluation.detection.items()},
        class_samples=class_sets(model, rng),
        class_accuracy=evaluation.classification.get("accuracy"),
        notes=[*dataset.notes, *evaluation.notes],
    )
    return write_report(folder / REPORT, content)


def likelihood_summary(evaluation: Evaluation, unit: str = "nats per row") -> LikelihoodSummary | None:
    """Sum up log-likelihoods, with what the bracket of log Z leaves open of the held-out rows'."""
    z, found, flow = evaluation.log_z, evaluation.log_likelihood, evaluation.flow
    by_flow = {} if flow is None else {"flow": flow.log_prob, "bits_per_dimension": flow.bits}
    if z is None or not found:
        return LikelihoodSummary(unit=unit, **by_flow) if by_flow else None
    held_out = found["held-out"]
    low, high = (held_out.value + z.value - bound for bound in (z.upper, z.lower))
    bounds = (low, high) if low < high and np.isfinite([low, high]).all() else None
    return LikelihoodSummary(found["training"], held_out, unit, bounds=bounds, **by_flow)


def machine_of(model: Model, dataset: Dataset, samples: Tensor) -> MachineSummary | None:
    """What a restricted Boltzmann machine learned, beside how it began."""
    if not isinstance(model.energy, RBM):
        return None
    train, drawn = (model.scaling.forward(rows) for rows in (dataset.train, samples))
    first = initial_weights(model.recipe, train)
    assert isinstance(first, RBM)
    return machine_summary(model.energy, first, train, drawn)


def energy_sets(model: Model, dataset: Dataset, samples: Tensor, rng: Generator) -> dict[str, np.ndarray]:
    """Energies of training rows, held-out rows, samples and uniform noise, for the histogram."""
    bits = model.recipe.kind == "binary"
    noise = strangers(cut(dataset.train, rng), rng, model.recipe.is_image, bits)["uniform noise"]
    sets = {"training": dataset.train, "held-out": dataset.held_out, "samples": samples, "noise": noise}
    return {name: model.energies(cut(rows, rng)).numpy() for name, rows in sets.items() if len(rows)}


def class_sets(model: Model, rng: Generator) -> dict[str, np.ndarray]:
    """Draws of each class of a model trained with labels, for the report."""
    if not model.recipe.conditional:
        return {}
    each = CLASS_DRAWS if model.recipe.is_image else 20 * CLASS_DRAWS
    return {name: rows.numpy() for name, rows in class_draws(model, each, rng).items()}


def energy_map(model: Model, dataset: Dataset, points: int = 160) -> dict[str, Any]:
    """The energy on a grid over two-dimensional data, and the true density where it is known."""
    if model.recipe.shape != (2,) or model.recipe.kind == "binary":
        return {}
    low, high = dataset.train.amin(0), dataset.train.amax(0)
    margin = 0.15 * (high - low)
    xs, ys = (torch.linspace(float(low[i] - margin[i]), float(high[i] + margin[i]), points) for i in (0, 1))
    grid = torch.cartesian_prod(xs, ys)
    values = model.energies(grid).reshape(points, points).T
    made: dict[str, Any] = {"energy_map": (xs.numpy(), ys.numpy(), values.numpy())}
    if dataset.truth is not None:
        with torch.no_grad():
            made["true_density"] = (-dataset.truth(grid)).exp().reshape(points, points).T.numpy()
    return made


def versions() -> dict[str, str]:
    """Versions of what ran."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("gibbsian")
    except PackageNotFoundError:
        ours = "not installed"
    return {
        "gibbsian": ours,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
