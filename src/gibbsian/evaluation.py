"""What a trained model is worth: log Z, held-out log-likelihood, sample quality beside baselines, and the report.

Everything here is computed from a `gibbsian.models.Model` and a `gibbsian.data.Dataset`, in the data's own units, and
is kept as plain numbers in ``evaluation.json``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from gibbsian.data.dataset import Dataset
from gibbsian.diagnostics.chains import effective_sample_size, split_r_hat
from gibbsian.diagnostics.detection import auroc
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.diagnostics.strangers import shuffled_columns, strangers
from gibbsian.diagnostics.two_sample import classifier_test, energy_distance, frechet_distance, memorisation
from gibbsian.errors import GibbsianError
from gibbsian.flow_evaluation import FlowSummary, flow_summary
from gibbsian.labelled import log_class_probs
from gibbsian.models import Model, replace_file
from gibbsian.partition.base import LogZ
from gibbsian.report import LogZSummary
from gibbsian.report.content import FLOOR

EVALUATION, SAMPLES, REPORT = "evaluation.json", "samples.npy", "report.html"
ROWS = 2000
"""Rows of each set that distances are computed from, at most."""

CLASS_DRAWS = 10
"""Images of each class in the report; of tables, where they are dots, 20 times as many rows."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Evaluation:
    """Numbers about a model, each with its error.

    Attributes
    ----------
    log_z
        Of the density in model units.
    log_likelihood
        Mean log-density of the training and of the held-out rows, in nats per row in data units.
    quality
        Name of a set of points to measure to estimate.
    detection
        Out-of-distribution set to AUROC.
    memorisation
        Distances to the nearest training row: samples, held-out rows, and their ratio.
    chains
        R-hat, effective size and acceptance of chains started at the samples.
    classification
        Of a model trained with labels: ``accuracy``, the part of the held-out rows that it classifies rightly.
    notes
        What to keep in mind.
    flow
        Likelihood of the held-out rows by the probability flow, of a model with noise levels.
    """

    log_z: LogZSummary | None = None
    log_likelihood: dict[str, Estimate] = field(default_factory=dict)
    quality: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    detection: dict[str, Estimate] = field(default_factory=dict)
    memorisation: dict[str, Estimate] = field(default_factory=dict)
    chains: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classification: dict[str, Estimate] = field(default_factory=dict)
    flow: FlowSummary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON; an estimate is a list of value and standard error."""
        log_z = None if self.log_z is None else {**self.log_z.__dict__}
        flow = None if self.flow is None else self.flow.to_dict()
        return {**self.__dict__, "log_z": log_z, "notes": list(self.notes), "flow": flow}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> Evaluation:
        """Rebuild what `to_dict` gave."""

        def estimates(part: Mapping[str, Any]) -> dict[str, Estimate]:
            return {k: Estimate(*v) for k, v in part.items()}

        return Evaluation(
            None if saved["log_z"] is None else LogZSummary(**saved["log_z"]),
            estimates(saved["log_likelihood"]),
            {k: estimates(v) for k, v in saved["quality"].items()},
            estimates(saved["detection"]),
            estimates(saved["memorisation"]),
            dict(saved["chains"]),
            tuple(saved["notes"]),
            estimates(saved.get("classification", {})),
            # Evaluations of earlier versions have none.
            None if saved.get("flow") is None else FlowSummary.from_dict(saved["flow"]),
        )


def evaluate(model: Model, dataset: Dataset, samples: Tensor, rng: Generator, say: Say = lambda _: None) -> Evaluation:
    """Measure a model against the data set it was trained on.

    Parameters
    ----------
    model
        Trained.
    dataset
        With its held-out rows; without any, the training rows stand in and a note says so.
    samples
        Draws of the model in data units, ``(n, *event)``.
    rng
        The generator.
    say
        Called with a line before each part.
    """
    notes: list[str] = []
    held_out = dataset.held_out
    if len(held_out) < 10:
        notes.append("There are too few held-out rows: the training rows stand in, so nothing here shows overfitting.")
        held_out = dataset.train
    say("log Z")
    log_z = estimate_log_z(model, rng, notes)
    likelihood = {}
    if log_z is not None:
        likelihood = {
            "training": log_likelihood(model, dataset.train, log_z, rng),
            "held-out": log_likelihood(model, held_out, log_z, rng),
        }
    say("likelihood by the probability flow")
    flow = follow(model, held_out, rng, notes)
    say("sample quality beside baselines")
    near = memorisation(*(flat(cut(x, rng)) for x in (samples, dataset.train, held_out)))
    quality = compare(model, dataset, held_out, samples, rng)
    say("out-of-distribution detection and chains")
    return Evaluation(
        log_z,
        likelihood,
        quality,
        detect(model, held_out, rng),
        {"samples": near.samples, "held-out": near.held_out, "ratio": near.ratio},
        chain_summary(model, samples, rng, notes),
        tuple(notes),
        classify(model, dataset),
        flow,
    )


def follow(model: Model, rows: Tensor, rng: Generator, notes: list[str]) -> FlowSummary | None:
    """Find the flow's likelihood of held-out rows; when it cannot be found, a note says why."""
    try:
        return flow_summary(model, rows, rng)
    except GibbsianError as error:
        notes.append(f"The likelihood by the probability flow could not be found: {error}")
        return None


def estimate_log_z(model: Model, rng: Generator, notes: list[str]) -> LogZSummary | None:
    """Estimate log Z; when it cannot be estimated, a note says why."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimate: LogZ = model.log_z(rng)
    except GibbsianError as error:
        notes.append(f"log Z could not be estimated: {error}")
        return None
    notes += [str(w.message) for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
    method, note = model.log_z_told
    if float(estimate.lower) > float(estimate.upper):
        note += " The bounds cross: the draws are not the model's own."
    value, stderr, lower, upper, ess = (float(v) for v in estimate[:5])
    return LogZSummary(value, stderr, lower, upper, ess, method, note)


def log_likelihood(model: Model, rows: Tensor, log_z: LogZSummary, rng: Generator) -> Estimate:
    """Mean log-density of rows in data units; as its density is about them."""
    z, _ = model.family.blurred(model.scaling.forward(rows), rng)
    values = model.log_density(model.scaling.backward(z)).double() - log_z.value
    spread = float(values.std()) / len(values) ** 0.5
    return Estimate(float(values.mean()), float(np.hypot(spread, log_z.stderr)))


def compare(
    model: Model, dataset: Dataset, held_out: Tensor, samples: Tensor, rng: Generator
) -> dict[str, dict[str, Estimate]]:
    """Distances of samples, simple baselines and training rows to the held-out rows; all draws rounded alike."""
    made = {"model": samples, **baselines(dataset.train, len(samples), rng)}
    snap = snapping(dataset)
    if dataset.kind == "binary":
        order = torch.randperm(len(dataset.train), generator=rng)[: len(samples)]
        made["independent bits"] = shuffled_columns(flat(dataset.train[order]), rng).reshape(-1, *dataset.event_shape)
    sets = {**{name: snap(rows) for name, rows in made.items()}, FLOOR: dataset.train}
    reference = flat(cut(held_out, rng))
    features = classifier_features(dataset)
    table = {}
    for name, rows in sets.items():
        points = flat(cut(rows, rng))
        row = {
            "energy distance": energy_distance(points, reference),
            "classifier accuracy": classifier_test(points, reference, rng=rng),
        }
        if features is not None:
            row["Fréchet distance"] = frechet_distance(features(points), features(reference))
        table[name] = row
    return table


def snapping(dataset: Dataset) -> Callable[[Tensor], Tensor]:
    """How to round draws before they are compared: to whole numbers in range where the data's pixels are such, or bits.

    Otherwise a classifier would tell any continuous draw from the data by its digits behind the point alone.
    """
    train = dataset.train
    if dataset.kind == "table" or not bool((train == train.round()).all()):
        return lambda rows: rows
    low, high = dataset.value_range or (float(train.min()), float(train.max()))
    return lambda rows: rows.round().clamp(low, high)


def baselines(train: Tensor, n: int, rng: Generator) -> dict[str, Tensor]:
    """Draws of a Gaussian and of a Gaussian mixture (components by BIC) fitted to the training rows."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    x = flat(cut(train, rng)).double().numpy()
    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    # Full covariances need more rows than columns; beyond that, the leading directions carry the baseline.
    reduce = PCA(min(64, len(x) - 1), random_state=seed).fit(x) if x.shape[1] > 64 else None
    y = x if reduce is None else reduce.transform(x)
    ridge = 1e-3 * float(y.var(0).mean()) + 1e-9
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in (1, 2, 4, 8, 16, 32):
            for shape in ("full", "diag"):
                if k * 3 < len(y):
                    mixture = GaussianMixture(k, covariance_type=shape, reg_covar=ridge, max_iter=50, random_state=seed)
                    fits.append(mixture.fit(y))
    best = min(fits, key=lambda m: m.bic(y))
    chosen = {"Gaussian": fits[0], f"Gaussian mixture ({best.n_components}, {best.covariance_type})": best}
    draws = {}
    for name, mixture in chosen.items():
        rows = mixture.sample(n)[0]
        rows = rows if reduce is None else reduce.inverse_transform(rows)
        draws[name] = torch.as_tensor(rows[np.random.default_rng(seed).permutation(n)], dtype=torch.float32).reshape(
            n, *train.shape[1:]
        )
    return draws


def classifier_features(dataset: Dataset) -> Callable[[Tensor], Tensor] | None:
    """Last hidden layer of a small classifier trained on the labelled training rows, or ``None`` without labels."""
    if dataset.labels is None or len(dataset.event_shape) != 3:
        return None
    from sklearn.neural_network import MLPClassifier

    low, high = dataset.value_range or (float(dataset.train.min()), float(dataset.train.max()))
    x = (flat(dataset.train)[:10000] - low) / (high - low)
    net = MLPClassifier((128, 32), max_iter=200, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.fit(x.numpy(), dataset.labels[:10000].numpy())

    def features(rows: Tensor) -> Tensor:
        h = (rows.numpy() - low) / (high - low)
        for weight, offset in list(zip(net.coefs_, net.intercepts_))[:2]:
            h = np.maximum(h @ weight + offset, 0.0)
        return torch.as_tensor(h)

    return features


def detect(model: Model, held_out: Tensor, rng: Generator) -> dict[str, Estimate]:
    """AUROC of the energy at telling held-out rows from strangers."""
    rows = cut(held_out, rng)
    inside = model.energies(rows)
    return {
        name: auroc(inside, model.energies(other), rng=rng)
        for name, other in strangers(rows, rng, model.recipe.is_image, model.recipe.kind == "binary").items()
    }


def classify(model: Model, dataset: Dataset) -> dict[str, Estimate]:
    """Part of the held-out rows that a model trained with labels classifies rightly, classes equally likely before."""
    if not model.recipe.conditional:
        return {}
    rows, labels = dataset.held_out, dataset.held_out_labels
    if len(rows) < 10:
        rows, labels = dataset.train, dataset.labels
    if labels is None:
        return {}
    right = (log_class_probs(model, rows).argmax(1) == labels).double()
    rate = float(right.mean())
    # With half a row right and half a row wrong added, all right is no certainty.
    smoothed = (float(right.sum()) + 0.5) / (len(right) + 1)
    return {"accuracy": Estimate(rate, (smoothed * (1.0 - smoothed) / len(right)) ** 0.5)}


def chain_summary(model: Model, samples: Tensor, rng: Generator, notes: list[str]) -> dict[str, Any]:
    """Run exact chains from the model's draws: if the energy drifts, the draws were not the model's own.

    Of draws that are exact they would tell nothing.
    """
    if model.family.exact_draws or not model.family.of_rows:
        return {}
    try:
        if model.recipe.noise_conditional:
            made = model.exact_chains(64, rng, steps=200, thin=2)
        else:
            made = model.chains(64, rng, steps=200, thin=2, start=model.scaling.forward(samples[:64]))
    except GibbsianError as error:
        notes.append(f"Chains from the samples could not be run: {error}")
        return {}
    assert made.draws is not None
    with torch.no_grad():
        trace = torch.stack([model.density(x) for x in made.draws])
    return {
        "kernel": re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", str(made.kernel)),
        "acceptance": float(made.acceptance.mean()),
        "nonfinite": int(made.nonfinite.sum()),
        # Draws of a noise-conditional model come from the walk down its levels: its chains need only not drift.
        "r_hat": None if model.recipe.noise_conditional else float(split_r_hat(trace)),
        "ess": None if model.recipe.noise_conditional else float(effective_sample_size(trace)),
        "draws": trace.numel(),
        "energy_trace": trace[:, :16].tolist(),
    }


def cut(rows: Tensor, rng: Generator, most: int = ROWS) -> Tensor:
    """At most so many rows, chosen at random."""
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), generator=rng)[:most]]


def flat(rows: Tensor) -> Tensor:
    """Rows as vectors."""
    return rows.flatten(1)


def write_evaluation(folder: Path, evaluation: Evaluation, samples: Tensor) -> None:
    """Keep the numbers and the samples in the run's folder."""
    replace_file(folder / EVALUATION, json.dumps(evaluation.to_dict(), indent=1).encode())
    from io import BytesIO

    held = BytesIO()
    np.save(held, samples.numpy())
    replace_file(folder / SAMPLES, held.getvalue())
