"""The settings of a training run: one frozen dataclass, where every default lives and every name is explained once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gibbsian.errors import OptionError, unknown_name


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingSettings:
    r"""How `fit` trains: the optimiser, a warmed-up and decaying learning rate, averages, and when to step in.

    At step :math:`t` of :math:`T` the learning rate is

    .. math::

        \eta_t = \eta\, \min(1, \tfrac{t + 1}{w})\, \big(f + (1 - f)\, \tfrac12 (1 + \cos \pi \tfrac{t}{T})\big)\, r^k,

    with ``learning_rate`` :math:`\eta`, ``warmup_steps`` :math:`w`, ``final_learning_rate_factor`` :math:`f`, and
    ``rollback_learning_rate_factor`` :math:`r` after :math:`k` rollbacks; ``decay="constant"`` leaves the cosine out.
    It depends on ``steps``: a run that is resumed with more of them follows the curve of the longer run from there on,
    so its learning rate rises again where the shorter run had already brought it down.

    Each field's ``metadata["help"]`` says what it means, in one line; the command line prints it.

    Raises
    ------
    OptionError
        If a value is out of its range.
    """

    steps: int = _setting(2000, "Optimiser steps in all.")
    batch_size: int = _setting(128, "Rows of data per step; all of them when there are fewer.")
    lanes: int = _setting(
        1,
        "Equal shares of a batch, each with random numbers and chains of its own, computed one after the other in each "
        "process; a multiple of the number of processes, which is what 1 stands for where there are several.",
    )
    precision: str = _setting(
        "float32", "'float32' computes as the weights are kept; 'bfloat16' computes losses in less, by autocast."
    )
    sharding: str = _setting(
        "none", "'full' divides weights, gradients and the optimiser's state among processes; 'none' copies them."
    )
    optimizer: str = _setting(
        "adamw", "'adamw' scales each weight's step by its gradients' size; 'sgd' follows the gradient itself."
    )
    learning_rate: float = _setting(1e-3, "Learning rate after the warm-up.")
    betas: tuple[float, float] = _setting((0.9, 0.999), "AdamW's decay rates of the first and second moment.")
    momentum: float = _setting(0.0, "SGD's momentum: what is left of the last step in the next one.")
    warmup_steps: int = _setting(100, "Steps over which the learning rate rises linearly from zero.")
    decay: str = _setting(
        "cosine", "'cosine' lowers the learning rate to its floor over all steps; 'constant' keeps it."
    )
    final_learning_rate_factor: float = _setting(0.1, "The cosine's floor, as a fraction of learning_rate.")
    weight_decay: float = _setting(0.0, "Weight decay per step and unit of learning rate; AdamW's is decoupled.")
    clip_norm: float = _setting(1.0, "Gradients with a larger L2 norm are scaled down to it; 0 turns clipping off.")
    ema_decay: float = _setting(
        0.999, "Decay per step of the averaged weights that the fit returns; 0 returns the last weights themselves."
    )
    log_every: int = _setting(50, "Steps between records; a record holds means over these steps.")
    checkpoint_every: int = _setting(500, "Steps between checkpoints, on disk when there is a folder, else in memory.")
    keep_checkpoints: int = _setting(3, "Checkpoints kept on disk, 2 or more.")
    checkpoint_format: str = _setting(
        "auto",
        "'file' is one file each; 'shared' a folder that all processes write, in the background; 'auto' takes the "
        "second with several processes or lanes.",
    )
    tensorboard: bool = _setting(True, "Write TensorBoard files into the folder too, when TensorBoard is installed.")
    health: bool = _setting(
        True, "Watch the run, roll back when it falls ill and stop with a named cause; without, it goes on as it is."
    )
    max_rollbacks: int = _setting(3, "Returns to the last good checkpoint before training gives up.")
    rollback_learning_rate_factor: float = _setting(0.5, "The learning rate is multiplied by this at every rollback.")
    patience: int = _setting(3, "Records in a row that must look ill before it counts (non-finite numbers: at once).")
    gap_limit: float = _setting(
        4.0, "Energy gap between data and samples, in nats per coordinate of a row, below which none is a runaway."
    )
    gap_ratio: float = _setting(
        20.0,
        "A runaway gap is also this many times its usual size, the lowest running median so far, or it keeps growing.",
    )
    gradient_limit: float = _setting(1000.0, "Gradient norm, in nats per unit of weight, below which none explodes.")
    gradient_ratio: float = _setting(100.0, "An exploding gradient norm is also this many times its usual size.")
    acceptance_limit: float = _setting(0.005, "Chains that accept less than this fraction of proposals are dead.")
    movement_limit: float = _setting(
        1e-4, "Chains that move less per round than this many standard deviations of the data are dead."
    )
    saturation_limit: float = _setting(
        0.1,
        "Chains are saturated when their share of coordinates off the box's edge is below this fraction of the data's.",
    )
    flat_limit: float = _setting(
        1e-5, "An energy whose values at the data have a smaller standard deviation than this, in nats, is flat."
    )
    edge_limit: float = _setting(
        1e-3, "Exact likelihood's box is too small when more than this part of the mass lies at its edge."
    )
    coverage_limit: float = _setting(
        0.3, "A generator has collapsed when its draws cover less than this part of the data and lie closer together."
    )
    entropy_limit: float = _setting(
        0.25, "How much closer together draws of a collapsed generator lie than data, in nats per coordinate."
    )
    unlike_limit: float = _setting(
        1.0,
        "Chains that end a run at more than this many times a Gaussian's distance from the data are unlike them.",
    )

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            _require(
                self, name, _whole(getattr(self, name)) and getattr(self, name) >= low, f"a whole number from {low}"
            )
        for name in ("learning_rate", "gap_ratio", "gradient_ratio"):
            _require(self, name, _number(getattr(self, name)) and getattr(self, name) > 0, "a positive number")
        for name in (
            "weight_decay",
            "clip_norm",
            "gap_limit",
            "gradient_limit",
            "flat_limit",
            "unlike_limit",
            "entropy_limit",
        ):
            _require(self, name, _number(getattr(self, name)) and getattr(self, name) >= 0, "zero or a positive number")
        for name in (
            "final_learning_rate_factor",
            "acceptance_limit",
            "movement_limit",
            "saturation_limit",
            "edge_limit",
            "coverage_limit",
        ):
            _require(self, name, _number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, "between 0 and 1")
        factor = self.rollback_learning_rate_factor
        _require(self, "rollback_learning_rate_factor", _number(factor) and 0 < factor <= 1, "above 0, up to 1")
        _require(self, "ema_decay", _number(self.ema_decay) and 0 <= self.ema_decay < 1, "from 0 to below 1")
        _require(self, "optimizer", self.optimizer in ("adamw", "sgd"), "'adamw' or 'sgd'")
        _require(self, "precision", self.precision in ("float32", "bfloat16"), "'float32' or 'bfloat16'")
        _require(self, "sharding", self.sharding in ("none", "full"), "'none' or 'full'")
        _require(self, "momentum", _number(self.momentum) and 0 <= self.momentum < 1, "from 0 to below 1")
        fits = self.optimizer == "sgd" or self.momentum == 0
        _require(self, "momentum", fits, "0 with optimizer='adamw', whose betas do its work")
        _require(self, "health", isinstance(self.health, bool), "True or False")
        good = len(self.betas) == 2 and all(_number(b) and 0 <= b < 1 for b in self.betas)
        _require(self, "betas", good, "two numbers from 0 to below 1")
        known = ("auto", "file", "shared")
        _require(self, "checkpoint_format", self.checkpoint_format in known, "'auto', 'file' or 'shared'")
        _require(self, "decay", self.decay in ("cosine", "constant"), "'cosine' or 'constant'")

    def learning_rate_at(self, step: int, rollbacks: int = 0) -> float:
        """Learning rate of a step, counted from 0, after some rollbacks."""
        rate = self.learning_rate * self.rollback_learning_rate_factor**rollbacks
        if self.decay == "cosine":
            floor = self.final_learning_rate_factor
            rate *= floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "lanes": 1,
    "warmup_steps": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "max_rollbacks": 0,
    "patience": 1,
}


def with_overrides(settings: TrainingSettings, overrides: Mapping[str, Any]) -> TrainingSettings:
    """Replace some settings by name.

    Raises
    ------
    OptionError
        If there is no setting of that name, or its value is out of range.
    """
    known = [f.name for f in dataclasses.fields(TrainingSettings)]
    for name in overrides:
        if name not in known:
            raise unknown_name("training setting", name, known)
    return dataclasses.replace(settings, **overrides)


def _require(settings: TrainingSettings, name: str, good: bool, expected: str) -> None:
    if not good:
        raise OptionError(f"{name} must be {expected}; got {getattr(settings, name)!r}.")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
