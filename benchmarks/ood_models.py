"""The networks of `ood.py`, and every score that is made of them.

Networks learn from the training rows of a set; scores that compare rows with usual ones do so with rows kept back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gibbsian as gb
from common import generator
from gibbsian.detection.base import Score
from gibbsian.detection.classifiers import JointEnergy, LayerFeatures
from gibbsian.detection.levels import COMPONENTS, level_ladder, level_score
from mnist import SIGMA_MAX, SIGMA_MIN, Judge, Options, Trained, train
from ood_sets import Usual, strangers

STEPS = {"energy": 1500, "classifier": 800, "bounded": 400, "joint": 800}
"""Training steps of each network."""

UNET: dict[str, Any] = {"width": 24, "batch_size": 64}
MEMBERS = 4
"""Classifiers of the ensemble."""

NEAR, FAR = 0.2, 1.0
"""Noise levels of single energies in model units, where pixels go from -1 to 1: that of the recipes, and a high one."""

NOISE = 0.3
"""Of the joint model's denoising, in model units."""


DEFAULT = "energies, slopes and maps at levels (default)"
"""What the library calls `level_score`."""

NEIGHBOUR = 5
"""Of score norms, as in the paper that proposes them; the library's default elsewhere."""


class Pixels(nn.Module):
    """Takes pixels from 0 to 255 to those from 0 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale them."""
        return x / 255.0


@dataclasses.dataclass(frozen=True)
class Models:
    """What was trained on one set; classifiers take pixels from 0 to 255."""

    energy: Trained
    ensemble: tuple[nn.Module, ...]
    accuracy: float
    bounded: gb.ClassifierEnergy
    joint: gb.Energy
    facts: dict[str, float]


def trained(name: str, rows: Usual, options: Options) -> Models:
    """Train everything, or take up what ``--runs`` keeps."""
    energy = train(name, rows.dataset, rows.dataset.train, STEPS["energy"], options, **UNET)
    steps = options.scaled(STEPS["classifier"])
    judges = [Judge(rows.dataset, steps, options.seed + i) for i in range(MEMBERS)]
    ensemble = tuple(nn.Sequential(Pixels(), judge.body, judge.head).eval() for judge in judges)
    facts = {"energy steps": energy.steps, "energy minutes": energy.seconds / 60.0}
    bounded, done = bounded_of(ensemble[0], rows, options, options.runs / f"{name}-bounded")
    facts |= {"bounded accuracy": right(bounded, rows), "bounded minutes": done.seconds / 60.0}
    joint, done = joint_of(rows, options, options.runs / f"{name}-joint")
    facts |= {"joint accuracy": right(joint, rows), "joint minutes": done.seconds / 60.0}
    print(f"{name}: {facts}", flush=True)
    return Models(energy, ensemble, judges[0].accuracy, bounded, joint, facts)


@torch.no_grad()
def right(energy: gb.Energy, rows: Usual) -> float:
    """Share of test rows whose class is found."""
    classifier = next(part for part in energy.modules() if isinstance(part, gb.ClassifierEnergy))
    found = torch.cat([classifier.logits(x).argmax(1) for x in rows.dataset.held_out.split(1000)])
    return float((found == rows.dataset.held_out_labels).float().mean())


def labelled(rows: Usual) -> gb.Batch:
    """Training rows with their classes."""
    assert rows.dataset.labels is not None
    return gb.Batch(rows.dataset.train, {"y": rows.dataset.labels})


def settings(steps: int, options: Options) -> dict[str, Any]:
    """Those of the classifiers' fits."""
    steps = options.scaled(steps)
    return {"steps": steps, "warmup_steps": steps // 10, "batch_size": 128, "learning_rate": 1e-3, "tensorboard": False}


def bounded_of(net: nn.Module, rows: Usual, options: Options, folder: Path) -> tuple[gb.ClassifierEnergy, Any]:
    """A copy of a classifier, tuned by the strangers that are never judged, to bounds about the energies it has."""
    energy = gb.ClassifierEnergy(copy.deepcopy(net), 10)
    outside = torch.cat(list(strangers(rows.reference, generator(options.seed, 31)).values()))
    inner, outer = (gb.LogSumExp(net)(x) for x in (rows.reference, outside))
    high = float(torch.maximum(outer.mean(), inner.mean()) + 2.0 * inner.std())
    objective = gb.EnergyBounded(outside, float(inner.mean()), high)
    done = gb.fit(
        energy,
        labelled(rows),
        objective,
        rng=generator(options.seed, 32),
        folder=folder,
        resume=True,
        **settings(STEPS["bounded"], options),
    )
    return energy.eval(), done


def joint_of(rows: Usual, options: Options, folder: Path) -> tuple[gb.Energy, Any]:
    """A joint energy model whose density is fitted by denoising; chains would take hours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        layers = [nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Flatten()]
        net = nn.Sequential(Pixels(), *layers, nn.Linear(64 * 49, 64), nn.SiLU(), nn.Linear(64, 10))
    energy = gb.ClassifierEnergy(net, 10) + gb.Gaussian(rows.dataset.event_shape, scale=255.0)
    objective = gb.JointEnergyModel(gb.DenoisingScoreMatching(NOISE * 127.5), weight=0.01)
    done = gb.fit(
        energy,
        labelled(rows),
        objective,
        rng=generator(options.seed, 33),
        folder=folder,
        resume=True,
        **settings(STEPS["joint"], options),
    )
    return energy.eval(), done


def scores(models: Models, rows: Usual, rng: torch.Generator) -> dict[str, Score]:
    """Every score by name, of pixels from 0 to 255; fitted to the rows kept back."""
    usual, labels = rows.reference, rows.labels
    net, features = models.ensemble[0], LayerFeatures(models.ensemble[0], "1")
    near, far = (in_pixels(models, models.energy.energy.given(sigma=s)) for s in (NEAR, FAR))
    slope = in_pixels(models, gb.GradientNorm(models.energy.energy.given(sigma=NEAR)))
    pixels: Callable[[Tensor], Tensor] = lambda x: x.flatten(1) / 255.0  # noqa: E731
    levels = level_ladder(SIGMA_MIN, SIGMA_MAX)
    default = level_score(models.energy.energy, models.energy.rows(usual), levels, rng=rng)
    kept = Kept(in_pixels(models, default.features))
    energies: Callable[[Tensor], Tensor] = lambda x: kept(x)[:, : len(levels)]  # noqa: E731
    lengths: Callable[[Tensor], Tensor] = lambda x: kept(x)[:, len(levels) : 2 * len(levels)].exp()  # noqa: E731
    return {
        f"energy at {NEAR:g}": gb.EnergyScore(near),
        f"energy at {FAR:g}": gb.EnergyScore(far),
        f"gradient norm at {NEAR:g}": slope,
        f"typicality at {NEAR:g}": gb.typicality(near, usual),
        "energies at levels, Mahalanobis": gb.mahalanobis(energies, usual),
        "slopes at levels, mixture": gb.gaussian_mixture(lengths, usual, COMPONENTS, rng=rng),
        "slopes at levels, neighbours": gb.nearest_neighbours(lengths, usual, NEIGHBOUR, scaling="columns"),
        DEFAULT: dataclasses.replace(default, features=kept),
        "joint model, energy": gb.EnergyScore(models.joint),
        "joint model, gradient norm": gb.GradientNorm(models.joint),
        "joint model, JointEnergy": JointEnergy(models.joint),
        "classifier, max probability": gb.MaxProbability(net),
        "classifier, log-sum-exp": gb.LogSumExp(net),
        "classifier, log-sum-exp, T = 10": gb.LogSumExp(net, 10.0),
        "classifier, energy-bounded": gb.LogSumExp(models.bounded),
        "ensemble, disagreement": gb.disagreement([gb.LogSumExp(each) for each in models.ensemble], usual),
        "Mahalanobis, pixels": gb.mahalanobis(pixels, usual),
        "Mahalanobis, pixels by class": gb.mahalanobis(pixels, usual, labels),
        "Mahalanobis, classifier's features": gb.mahalanobis(features, usual, labels),
        "nearest neighbours, pixels": gb.nearest_neighbours(pixels, usual, scaling="none"),
        "nearest neighbours, classifier's features": gb.nearest_neighbours(features, usual),
    }


class Kept:
    """Features of pixels that are computed once for several scores."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self.features = features
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Look the rows up, or describe them."""
        if id(x) not in self.known:
            self.known[id(x)] = x, self.features(x)
        return self.known[id(x)][1]


def in_pixels(models: Models, score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of rows in model units, as one of pixels."""
    return lambda x: score(models.energy.rows(x))
