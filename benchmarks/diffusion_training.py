"""What `diffusion.py` trains: an energy and a plain score with the same backbone, in the same processor time."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from common import generator
from gibbsian.bridges.denoisers import DenoiserMLP, DenoiserUNet
from gibbsian.data import Dataset
from gibbsian.energies.score import Score
from gibbsian.training.metrics import Record

SIGMA_MIN, SIGMA_MAX = {"mnist": 0.005, "digits": 0.03}, 8.0
"""Noise levels in model units, where values go from -1 to 1; the lowest are about two thirds of a step between them,
or a quarter of one."""

LAW = {"mnist": (-1.0, 1.5), "digits": (-0.8, 1.3)}
"""Mean and standard deviation of the logarithm of the noise level in training."""

STEPS = {"mnist": {"energy": 2400, "score": 7600}, "digits": {"energy": 1600, "score": 4800}}
"""Training steps; those of both models took the same processor time."""

SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {"batch_size": 128, "learning_rate": 2e-3, "checkpoint_every": 100},
    "digits": {"batch_size": 256, "learning_rate": 2e-3},
}
COMMON = {"betas": (0.9, 0.99), "ema_decay": 0.998, "final_learning_rate_factor": 0.0, "tensorboard": False}

DROPOUT = 0.25
"""Of the networks for digits, whose rows are few."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    budget: float
    seed: int
    threads: int
    runs: Path
    training: float = 1.0

    def scaled(self, count: int, least: int = 2) -> int:
        """So many, times the budget where it is below 1."""
        return max(least, round(count * min(1.0, self.budget)))


@dataclass(frozen=True)
class Trained:
    """A model in model units, with what its training took."""

    name: str
    model: gb.Energy | Score
    dataset: Dataset
    steps: int
    processor: float
    wall: float

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def sigma_min(self) -> float:
        """The lowest level it was trained at."""
        return SIGMA_MIN[self.dataset.name]

    def base(self, sigma: float) -> gb.Gaussian:
        """The data's Gaussian at a high noise level."""
        return self.model.base(sigma)  # type: ignore[operator]


def dequantised(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Add uniform noise of one step to whole numbers: the density of what comes out bounds the numbers' mass."""
    return rows + torch.rand(rows.shape, generator=rng, dtype=rows.dtype) - 0.5


def build(name: str, kind: str, data: Tensor, seed: int) -> Any:
    """Build an untrained model, calibrated to data in model units."""
    shape = tuple(data.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mnist":
            model = gb.NoiseConditionalUNet(shape, fade=1.0) if kind == "energy" else DenoiserUNet(shape)
        elif kind == "energy":
            model = gb.NoiseConditional(shape, local=16, dropout=DROPOUT)
        else:
            model = DenoiserMLP(shape, dropout=DROPOUT)
    return model.calibrate(data)


def train(name: str, kind: str, dataset: Dataset, options: Options) -> Trained:
    """Fit one model by denoising at many levels, or take up a run that was stopped."""
    data = dataset.scaling().forward(dequantised(dataset.train, generator(options.seed, 1)))
    model = build(name, kind, data, options.seed)
    levels = gb.LogNormal(*LAW[name], SIGMA_MIN[name], SIGMA_MAX)
    objective = gb.MultiLevelDenoising(
        levels, gb.EDMWeight(float(model.scale)), level_weight=0.3 if kind == "energy" else 0.0
    )
    steps = options.scaled(round(options.training * STEPS[name][kind]))
    settings = COMMON | SETTINGS[name] | {"steps": steps, "warmup_steps": min(200, steps // 4)}
    folder = options.runs / f"{name}-{kind}"
    clock = Clock(folder / "processor.json")
    done = gb.fit(
        model,
        data,
        objective,
        rng=generator(options.seed, 2),
        folder=folder,
        resume=True,
        callbacks=[clock],
        **settings,
    )
    print(f"{name}, {kind}: {done}, {clock.seconds:.0f} s of the processor", flush=True)
    return Trained(kind, model.eval(), dataset, done.steps, clock.seconds, done.seconds)


class Clock:
    """Processor seconds of a run over all its sessions, kept beside its checkpoints at every record.

    What a session did after its last checkpoint is done again by the next, and counts twice.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds = self._before = float(json.loads(file.read_text())) if file.exists() else 0.0
        self._began = time.process_time()

    def __call__(self, record: Record) -> None:
        """Write down what was spent until this record."""
        self.seconds = self._before + time.process_time() - self._began
        self.file.write_text(json.dumps(self.seconds))
