r"""When a run is ill: detectors that read the training record.

The gradient of maximum likelihood is a difference of two averages, over data and over chains, so training fails in ways
that a falling loss does not show. Five are looked for, at every record (non-finite numbers as soon as they are seen):

``nonfinite``
    A loss or gradient that is NaN or infinite. The step that made it was not applied.
``gap``
    :math:`|\bar E(\text{data}) - \bar E(\text{samples})|` beyond ``gap_limit`` nats *and* ``gap_ratio`` times its
    usual size. A model that matches the data has a gap near zero; one that runs away has not. Far above zero, the
    chains have found states much deeper than the data; far below, they no longer reach what the energy has dug.
``gradient``
    Gradient norms beyond ``gradient_limit`` *and* ``gradient_ratio`` times their usual size.
``dead``
    Chains that accept almost nothing, or do not move on the scale of the data.
``saturated``
    Chains of a box-bound kernel that sit at its edge with almost all coordinates, unlike the data.

All but the first must last for ``patience`` records in a row. The usual size is the lowest running median so far, so
that neither outliers nor a slow runaway move the yardstick.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gibbsian.training.settings import TrainingSettings

WINDOW = 50
"""Records that a running median looks back on."""

ENOUGH = 5
"""Records before a running median is used."""

_REMEDY = {
    "nonfinite": "Lower learning_rate, keep the energy bounded below (network + Gaussian), or check the data's scale.",
    "gap_high": "The chains have found states far deeper than the data: lower learning_rate, penalise large energies, "
    "or use more chain steps.",
    "gap_low": "The chains no longer reach what the energy has dug: lower learning_rate, penalise large energies, or "
    "use more or longer chain steps.",
    "gradient": "Lower learning_rate or clip_norm, or penalise large energies.",
    "rejecting": "Nearly every proposal is rejected: use a smaller step_size, or tune the kernel.",
    "still": "The chains hardly move: use a larger step_size, more steps, or tune the kernel.",
    "saturated": "The chains are pressed against the box: use a smaller step_size, lower learning_rate, or penalise "
    "large energies.",
}


@dataclass(frozen=True)
class Alarm:
    """What is wrong: the kind of illness, the step and metric that show it, value and limit, and what usually helps."""

    kind: str
    step: int
    metric: str
    value: float
    limit: float
    remedy: str

    def __str__(self) -> str:
        """Say it in one clause."""
        if self.kind == "nonfinite":
            return f"{self.metric} was {self.value} at step {self.step}"
        return f"{self.metric} was {self.value:.4g} at step {self.step} (limit {self.limit:.4g})"

    def event(self, name: str) -> dict[str, Any]:
        """Write it as a record."""
        facts = {"step": self.step, "event": name, "kind": self.kind, "metric": self.metric, "value": self.value}
        return facts if math.isinf(self.limit) else {**facts, "limit": self.limit}


@dataclass(frozen=True)
class DataScale:
    """What the detectors need to know of the data: its spread, and how much of it lies strictly inside its range."""

    deviation: float
    interior: float

    @staticmethod
    def of(x: Tensor) -> DataScale:
        """Measure it: root mean variance per coordinate, and the share of entries off the extreme values."""
        deviation = x.var(0, correction=0).mean().sqrt()
        low, high = torch.aminmax(x)
        return DataScale(float(deviation), float(((x != low) & (x != high)).to(torch.float32).mean()))


class Health:
    """The detectors and their memory, which is plain lists and counts, so that a checkpoint can hold it."""

    def __init__(self, settings: TrainingSettings, data: DataScale) -> None:
        self.settings = settings
        self.data = data
        self.windows: dict[str, list[float]] = {"gap": [], "grad_norm": []}
        self.usual: dict[str, float] = {}
        self.streaks: dict[str, int] = {}

    def check(self, record: Mapping[str, Any]) -> Alarm | None:
        """Read one record; return an alarm if the run is ill."""
        for name in ("loss", "grad_norm", "energy_data", "energy_samples", "gap"):
            if name in record and not math.isfinite(record[name]):
                return nonfinite(record["step"], name, record[name])
        alarm: Alarm | None = None
        for kind, suspicion in self._suspicions(record):
            self.streaks[kind] = self.streaks.get(kind, 0) + 1 if suspicion else 0
            if suspicion and self.streaks[kind] >= self.settings.patience:
                alarm = alarm or suspicion
        for name, window in self.windows.items():
            if name in record:
                window.append(abs(record[name]))
                del window[:-WINDOW]
            if len(window) >= ENOUGH:
                self.usual[name] = min(statistics.median(window), self.usual.get(name, math.inf))
        return alarm

    def _suspicions(self, record: Mapping[str, Any]) -> Iterable[tuple[str, Alarm | None]]:
        yield "gap", self._gap(record)
        yield "gradient", self._gradient(record)
        yield "dead", self._dead(record)
        yield "saturated", self._saturated(record)

    def _gap(self, record: Mapping[str, Any]) -> Alarm | None:
        value = record.get("gap", 0.0)
        limit = max(self.settings.gap_limit, self.settings.gap_ratio * self.usual.get("gap", math.inf))
        remedy = _REMEDY["gap_high" if value > 0 else "gap_low"]
        return Alarm("gap", record["step"], "gap", value, limit, remedy) if abs(value) > limit else None

    def _gradient(self, record: Mapping[str, Any]) -> Alarm | None:
        value = record.get("grad_norm", 0.0)
        limit = max(self.settings.gradient_limit, self.settings.gradient_ratio * self.usual.get("grad_norm", math.inf))
        return (
            Alarm("gradient", record["step"], "grad_norm", value, limit, _REMEDY["gradient"]) if value > limit else None
        )

    def _dead(self, record: Mapping[str, Any]) -> Alarm | None:
        acceptance, moved = record.get("acceptance", 1.0), record.get("moved", math.inf)
        if acceptance < self.settings.acceptance_limit:
            return Alarm(
                "dead", record["step"], "acceptance", acceptance, self.settings.acceptance_limit, _REMEDY["rejecting"]
            )
        limit = self.settings.movement_limit * self.data.deviation
        return Alarm("dead", record["step"], "moved", moved, limit, _REMEDY["still"]) if moved < limit else None

    def _saturated(self, record: Mapping[str, Any]) -> Alarm | None:
        # Of images with much plain background the edge is the natural place, so what counts is the share off the edge.
        value, limit = record.get("saturated", 0.0), 1.0 - self.settings.saturation_limit * self.data.interior
        return (
            Alarm("saturated", record["step"], "saturated", value, limit, _REMEDY["saturated"])
            if value > limit
            else None
        )

    def state_dict(self) -> dict[str, Any]:
        """Copy the memory."""
        windows = {name: list(window) for name, window in self.windows.items()}
        return {"windows": windows, "usual": dict(self.usual), "streaks": dict(self.streaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a memory that `state_dict` copied."""
        self.windows = {k: list(v) for k, v in state["windows"].items()}
        self.usual, self.streaks = dict(state["usual"]), dict(state["streaks"])


def nonfinite(step: int, metric: str, value: float) -> Alarm:
    """Build the alarm of a number that is none."""
    return Alarm("nonfinite", step, metric, value, math.inf, _REMEDY["nonfinite"])
