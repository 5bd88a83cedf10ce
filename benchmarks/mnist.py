"""MNIST on two cores: draws that stay digits for 10,000 steps, and what the energy says of what is no digit.

Three parts, each written to ``results/mnist.json``, ``.md`` and pictures ``mnist-*.png`` when it is done:

* ``main``: a noise-conditional U-Net energy is fitted to MNIST; Frechet distance of short-run, long-run and annealed
  draws, in the features of a classifier of the training rows, and pictures of chains at several ages;
* ``ood``: the same on Fashion-MNIST, and each model's AUROC against the other set;
* ``heldout``: the digits 1, 4, 5, 7, 9 left out of training one at a time, and the AUPRC of finding them.

MNIST and Fashion-MNIST are read from the folder in GIBBSIAN_DATA. ``--runs`` keeps checkpoints: a run that was stopped
goes on where it was.

    GIBBSIAN_DATA=data python benchmarks/mnist.py --threads 2 --runs runs/mnist
    python benchmarks/mnist.py --parts main --budget 0.01
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.annealing import Annealing, anneal
from gibbsian.data import Dataset, load
from gibbsian.diagnostics.detection import auroc
from gibbsian.diagnostics.two_sample import frechet_distance, memorisation
from gibbsian.kernels.base import evaluate, per_chain
from gibbsian.recipes import RelativeWeight

DIGITS = (1, 4, 5, 7, 9)
"""Left out one at a time, as in `Efficient GAN-based anomaly detection (Zenati et al., 2018)
<https://arxiv.org/abs/1802.06222>`_ and the energies judged after it."""

STEPS = {"main": 9000, "fashion": 5000, "heldout": 3000}
"""Training steps of a model."""

SETTINGS: dict[str, Any] = {
    "batch_size": 128,
    "learning_rate": 2e-3,
    "betas": (0.9, 0.99),
    "ema_decay": 0.998,
    "final_learning_rate_factor": 0.0,
}
SIGMA_MIN, SIGMA_MAX, SIGMA = 0.05, 8.0, 0.2
"""Noise levels in model units, where pixels go from -1 to 1; the last is that of the chains at rest."""

CHAINS, DRAWS = 256, 2000
"""Long-run chains; draws by the faster ways."""

SHORT, LONG, FALL = 200, 10_000, 1000
"""Langevin steps of a short-run and of a long-run chain, and how many of the latter go down the levels."""

AGES = (200, 1000, 2000, 5000, 10_000)
"""Steps after which long-run chains are shown."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    budget: float
    seed: int
    threads: int
    runs: Path | None

    def scaled(self, count: int, least: int = 2) -> int:
        """So many, times the budget where it is below 1."""
        return max(least, round(count * min(1.0, self.budget)))


@dataclass(frozen=True)
class Trained:
    """An energy in model units, with what its training took; seconds are of the clock."""

    energy: gb.NoiseConditionalUNet
    dataset: Dataset
    seconds: float
    steps: int

    def rows(self, x: Tensor) -> Tensor:
        """Rows in model units."""
        return self.dataset.scaling().forward(x)


def train(name: str, dataset: Dataset, rows: Tensor, steps: int, options: Options) -> Trained:
    """Fit the energy by denoising at many levels, or take up a run that was stopped."""
    z = dataset.scaling().forward(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        energy = gb.NoiseConditionalUNet(dataset.event_shape).calibrate(z)
    levels = gb.LogNormal(-0.8, 1.3, SIGMA_MIN, SIGMA_MAX)
    objective = gb.MultiLevelDenoising(levels, RelativeWeight(float(energy.scale)), level_weight=0.3)
    steps = options.scaled(steps)
    home = None if options.runs is None else options.runs / name
    settings = SETTINGS | {"steps": steps, "warmup_steps": min(200, steps // 4), "tensorboard": False}
    rng = generator(options.seed)
    done = gb.fit(energy, z, objective, rng=rng, folder=home, resume=home is not None, **settings)
    print(f"{name}: {done}", flush=True)
    return Trained(energy.eval(), dataset, done.seconds, done.steps)


@torch.no_grad()
def denoised(energy: gb.Energy, x: Tensor, sigma: float = SIGMA) -> Tensor:
    """The mean of the clean image given the noisy one: Tweedie's formula."""
    return torch.cat([part - sigma**2 * evaluate(energy.given(sigma=sigma), part)[1] for part in x.split(256)])


def fall(energy: gb.NoiseConditionalUNet, n: int, steps: int, rng: torch.Generator) -> Tensor:
    """Langevin chains from noise down to the level at rest, in so many steps."""
    levels = max(1, min(100, steps // 4))
    way = Annealing(
        SIGMA_MAX, SIGMA, levels, corrector_steps=max(1, steps // levels), corrector_size=0.2, predictor=False
    )
    return anneal(energy, energy.base(SIGMA_MAX).sample(n, rng), way, rng=rng)


def annealed(energy: gb.NoiseConditionalUNet, n: int, rng: torch.Generator) -> Tensor:
    """Draws by the probability-flow equation and a Langevin step at each level, as the recipes make them."""
    way = Annealing(SIGMA_MAX, SIGMA_MIN, levels=64, denoise=True)
    start = energy.base(SIGMA_MAX).sample(n, rng)
    return torch.cat([anneal(energy, part, way, rng=rng) for part in start.split(250)])


@dataclass(frozen=True)
class LongRun:
    """Chains at several ages, with their noise on, and how they moved."""

    ages: dict[int, Tensor]
    acceptance: float
    step_size: float


def long_run(energy: gb.NoiseConditionalUNet, n: int, options: Options, rng: torch.Generator) -> LongRun:
    """Chains from noise: down the levels, then MALA at the level at rest for the other nine tenths of the steps."""
    total, falling = options.scaled(LONG, 20), options.scaled(FALL, 4)
    ages = {}
    x = fall(energy, n, falling, rng)
    density = energy.given(sigma=SIGMA)
    # The few steps that tune the step size are made by chains of their own.
    kernel = gb.tune(density, gb.MALA(0.1 * SIGMA**2), x[:64], rng=rng, steps=50).kernel
    done, accepted = falling, 0.0
    ages[done] = x
    stops = [options.scaled(age, 20) for age in AGES if options.scaled(age, 20) > falling]
    for stop in dict.fromkeys([*stops, total]):
        made = gb.sample(density, kernel, x, steps=stop - done, rng=rng)
        x, accepted = made.x, accepted + float(made.acceptance.mean()) * (stop - done)
        done = stop
        ages[done] = x
        print(f"long-run chains: {done} steps", flush=True)
    return LongRun(ages, accepted / (done - falling), float(kernel.step_size))


class Judge:
    """A small convolutional classifier of the training rows; its last hidden layer gives the features."""

    def __init__(self, dataset: Dataset, options: Options) -> None:
        assert dataset.labels is not None
        assert dataset.held_out_labels is not None
        x, y = self.prepared(dataset.train), dataset.labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            layers = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
            self.body = nn.Sequential(*layers, nn.Linear(64 * 49, 64), nn.ReLU())
            self.head = nn.Linear(64, int(y.max()) + 1)
        weights = [*self.body.parameters(), *self.head.parameters()]
        steps, rng = options.scaled(2000), generator(options.seed, 3)
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            picked = torch.randint(len(x), (128,), generator=rng)
            loss = nn.functional.cross_entropy(self.head(self.body(x[picked])), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = self.classes(dataset.held_out)
        self.accuracy = float((found == dataset.held_out_labels).float().mean())
        self.reference = self.features(dataset.held_out)

    @staticmethod
    def prepared(x: Tensor) -> Tensor:
        """Pixels in [0, 1]."""
        return x.clamp(0.0, 255.0) / 255.0

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Activations ``(n, 64)`` of pixels."""
        return torch.cat([self.body(self.prepared(part)) for part in x.split(1000)])

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """The likeliest class of each row."""
        return self.head(self.features(x)).argmax(1)

    def distance(self, x: Tensor) -> list[float]:
        """Frechet distance to the test rows, with its error."""
        return list(frechet_distance(self.features(x), self.reference))


def gaussian_draws(rows: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw from a Gaussian with the rows' mean and covariance."""
    x = rows.flatten(1).double()
    values, axes = torch.linalg.eigh(x.T.cov())
    noise = torch.randn((n, len(values)), generator=rng, dtype=torch.float64)
    return (x.mean(0) + (noise * values.clamp(min=0.0).sqrt()) @ axes.T).float().view(n, *rows.shape[1:])


def train_main(options: Options) -> Trained:
    """Fit MNIST."""
    dataset = load("mnist")
    return train("main", dataset, dataset.train, STEPS["main"], options)


def run_main(options: Options) -> dict[str, Any]:
    """Train on MNIST, draw in three ways, judge and show."""
    model = train_main(options)
    dataset, scaling, energy = model.dataset, model.dataset.scaling(), model.energy
    chains, draws = options.scaled(CHAINS, 8), options.scaled(DRAWS, 16)
    seconds = {"training": model.seconds}
    made: dict[str, Tensor] = {}
    with Stopwatch() as watch:
        short = torch.cat([fall(energy, n, options.scaled(SHORT, 4), generator(options.seed, 10 + n)) for n in (draws,)])
        made["short-run"] = denoised(energy, short)
    seconds["short-run"] = watch.wall
    with Stopwatch() as watch:
        made["annealed"] = annealed(energy, draws, generator(options.seed, 11))
    seconds["annealed"] = watch.wall
    with Stopwatch() as watch:
        run = long_run(energy, chains, options, generator(options.seed, 12))
    seconds["long-run"] = watch.wall
    clean = {age: scaling.backward(denoised(energy, x)) for age, x in run.ages.items()}
    oldest = max(clean)
    shown = {name: scaling.backward(x) for name, x in made.items()} | {"long-run": clean[oldest]}
    judge = Judge(dataset, options)
    rng = generator(options.seed, 13)
    floor = dataset.train[torch.randperm(len(dataset.train), generator=rng)[:draws]]
    sets = shown | {"training rows (floor)": floor, "Gaussian": gaussian_draws(dataset.train, draws, rng)}
    quality = {name: [judge.distance(x[:chains]), judge.distance(x) if len(x) > chains else None] for name, x in sets.items()}
    ageing = {age: judge.distance(x) for age, x in clean.items()}
    first = judge.classes(clean[min(clean)])
    moved = {age: float((judge.classes(x) != first).float().mean()) for age, x in clean.items()}
    near = memorisation(shown["annealed"].clamp(0, 255).flatten(1)[:500], dataset.train.flatten(1), floor_rows(dataset))
    picture_draws({"test rows": dataset.held_out} | shown)
    picture_ages(run, clean, scaling.backward)
    return {
        "steps": model.steps,
        "parameters": sum(p.numel() for p in energy.parameters()),
        "seconds": seconds,
        "accuracy": judge.accuracy,
        "chains": chains,
        "draws": draws,
        "quality": quality,
        "ages": ageing,
        "moved": moved,
        "acceptance": run.acceptance,
        "step_size": run.step_size,
        "nearest": [near.samples.value, near.held_out.value],
    }
