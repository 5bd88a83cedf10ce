r"""When a run is ill: detectors that read the training record.

The gradient of maximum likelihood is a difference of two averages, over data and over chains, so training fails in ways
that a falling loss does not show; other objectives have no such difference, and fail in silence. These are looked for,
at every record (non-finite numbers as soon as they are seen):

``nonfinite``
    A loss or gradient that is NaN or infinite. The step that made it was not applied.
``gap``
    :math:`|\bar E(\text{data}) - \bar E(\text{samples})|` beyond ``gap_limit`` nats per coordinate *and* either
    ``gap_ratio`` times its usual size or larger than ever before. A model that matches the data has a gap near zero;
    one that runs away has not, whatever was usual. Far above zero, the chains have found states much deeper than the
    data; far below, they no longer reach what the energy has dug. Energies are sums over coordinates, and so is the
    limit: healthy runs were seen below 1 nat per coordinate in 2, 64 and 784 dimensions. A run that ends before a
    runaway has lasted long enough to be stopped is told of it.
``gradient``
    Gradient norms beyond ``gradient_limit`` *and* ``gradient_ratio`` times their usual size.
``dead``
    Chains that accept almost nothing, or do not move on the scale of the data.
``saturated``
    Chains of a box-bound kernel that sit at its edge with almost all coordinates, unlike the data.
``flat``
    An energy that has one value at all data: a network whose units have died, or whose base is everything.
``stalled``
    Gradients that have been zero ever since the run (or its phase) began: nothing is learned.
``edge``
    Exact likelihood whose model has mass at the edge of its box, and more beyond it.
``collapsed``
    A generator, or a replay buffer of real states, whose draws cover less than ``coverage_limit`` of the data *and* lie
    closer together than these, by more than ``entropy_limit`` nats per coordinate: mode collapse. Draws of a generator
    that has not learned yet are such, too, so that it counts from when they once were not; at the end of a run it is
    told in any case.
``unlike``
    A run whose chains, at its end, are farther from the data than a Gaussian would be: it was useless. This is
    not a stop but a verdict, see `gibbsian.training.verdict`.

All but the first and last must last for ``patience`` records in a row. The usual size is the lowest running median so
far, so that neither outliers nor a slow runaway move the yardstick; where `gibbsian.objectives.combination.Phases` goes
on to another objective, it is found anew. Of a sum of objectives every part's metrics are watched.
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

NO_GRADIENT = 1e-10
"""Gradient norms below this, far below AdamW's epsilon of 1e-8, move nothing."""

FINITE = ("loss", "grad_norm", "energy_data", "energy_samples", "gap")
"""Metrics that must be finite, of the whole and of every part."""

_REMEDY = {
    "nonfinite": "Lower learning_rate, keep the energy bounded below (network + Gaussian), or check the data's scale.",
    "gap_high": "The chains have found states far deeper than the data: lower learning_rate, penalise large energies, "
    "or use more chain steps.",
    "gap_low": "The chains no longer reach what the energy has dug: lower learning_rate, penalise large energies, or "
    "use more or longer chain steps.",
    "gradient": "Lower learning_rate or clip_norm, or penalise large energies.",
    "rejecting": "Nearly every proposal is rejected: use a smaller step_size, or tune the kernel.",
    "still": "The chains hardly move: use a larger step_size, more steps, or tune the kernel.",
    "flat": "The energy tells no points apart: use other initial weights or a smooth activation (SiLU), lower "
    "learning_rate, or a smaller weight_decay or penalty.",
    "stalled": "No gradient reaches the weights: check that the objective fits the energy (a piecewise-linear network "
    "has no second derivative to match, noise far from the data teaches nothing) and that nothing is detached.",
    "edge": "Widen low and high (or margin), or add a Gaussian to the energy so that its mass stays inside.",
    "collapsed": "The generator's draws fell onto few points (mode collapse): lower its learning_rate_factor, raise "
    "its scale or entropy_weight, refine by more or longer chain steps, or give its network more latents.",
    "collapsed_buffer": "The buffer's chains fell onto few points (mode collapse): restart more of them, run more or "
    "longer chain steps, lower learning_rate, or use a kernel that crosses between modes, such as ParallelTempering.",
    "unlike": "Train for more steps, raise learning_rate, or use more chain steps or another step_size.",
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
    """What the detectors need to know of the data: its spread, how much of it is inside its range, and coordinates."""

    deviation: float
    interior: float
    coordinates: int

    @staticmethod
    def of(x: Tensor) -> DataScale:
        """Measure it: root mean variance, the share of entries off the extreme values, and the size of a row."""
        deviation = x.var(0, correction=0).mean().sqrt()
        low, high = torch.aminmax(x)
        interior = ((x != low) & (x != high)).to(torch.float32).mean()
        return DataScale(float(deviation), float(interior), x[0].numel())


class Health:
    """The detectors and their memory, which is plain lists and counts, so that a checkpoint can hold it."""

    def __init__(self, settings: TrainingSettings, data: DataScale) -> None:
        self.settings = settings
        self.data = data
        self.phases: dict[str, float] = {}
        self.forget()

    def forget(self) -> None:
        """Start anew: nothing is usual yet."""
        self.windows: dict[str, list[float]] = {}
        self.usual: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.streaks: dict[str, int] = {}
        self.moved = False
        self.covered: set[str] = set()
        self.suspected: list[Alarm] = []

    def check(self, record: Mapping[str, Any]) -> Alarm | None:
        """Read one record; return an alarm if the run is ill."""
        for name, value in record.items():
            if last_part(name) in FINITE and not math.isfinite(value):
                return nonfinite(record["step"], name, value)
        phases = {name: value for name, value in record.items() if last_part(name) == "phase"}
        if phases != self.phases:
            self.forget()
            self.phases = phases
        self.moved = self.moved or record.get("grad_norm", math.inf) >= NO_GRADIENT
        alarm: Alarm | None = None
        self.suspected = []
        for kind, suspicion in self._suspicions(record):
            counts = suspicion and (suspicion.kind != "collapsed" or kind in self.covered)
            self.streaks[kind] = self.streaks.get(kind, 0) + 1 if counts else 0
            if suspicion:
                self.suspected.append(suspicion)
                if self.streaks[kind] >= self.settings.patience:
                    alarm = alarm or suspicion
        for name, value in record.items():
            if last_part(name) in ("gap", "grad_norm"):
                window = self.windows.setdefault(name, [])
                window.append(abs(value))
                self.largest[name] = max(abs(value), self.largest.get(name, 0.0))
                del window[:-WINDOW]
                if len(window) >= ENOUGH:
                    self.usual[name] = min(statistics.median(window), self.usual.get(name, math.inf))
        return alarm

    def _suspicions(self, record: Mapping[str, Any]) -> Iterable[tuple[str, Alarm | None]]:
        detectors = {
            "gap": self._gap,
            "grad_norm": self._gradient,
            "acceptance": self._rejecting,
            "moved": self._still,
            "saturated": self._saturated,
            "energy_std": self._flat,
            "edge_mass": self._edge,
        }
        # First, for an energy without gradients may be flat as well, and then no earlier state helps.
        yield "stalled", self._stalled(record)
        for name, value in record.items():
            detect = detectors.get(last_part(name))
            if detect is not None:
                yield name, detect(record["step"], name, value)
            elif last_part(name) == "coverage":
                yield name, self._collapsed(record, name, value)

    def _gap(self, step: int, name: str, value: float) -> Alarm | None:
        floor = self.settings.gap_limit * self.data.coordinates
        limit = max(floor, self.settings.gap_ratio * self.usual.get(name, math.inf))
        if abs(value) > self.largest.get(name, math.inf):
            # Where nothing is usual yet, or a runaway has become so, growth without end is the sign.
            limit = floor
        remedy = _REMEDY["gap_high" if value > 0 else "gap_low"]
        return Alarm("gap", step, name, value, limit, remedy) if abs(value) > limit else None

    def _gradient(self, step: int, name: str, value: float) -> Alarm | None:
        limit = max(self.settings.gradient_limit, self.settings.gradient_ratio * self.usual.get(name, math.inf))
        return Alarm("gradient", step, name, value, limit, _REMEDY["gradient"]) if value > limit else None

    def _rejecting(self, step: int, name: str, value: float) -> Alarm | None:
        limit = self.settings.acceptance_limit
        return Alarm("dead", step, name, value, limit, _REMEDY["rejecting"]) if value < limit else None

    def _still(self, step: int, name: str, value: float) -> Alarm | None:
        limit = self.settings.movement_limit * self.data.deviation
        return Alarm("dead", step, name, value, limit, _REMEDY["still"]) if value < limit else None

    def _saturated(self, step: int, name: str, value: float) -> Alarm | None:
        # Of images with much plain background the edge is the natural place, so what counts is the share off the edge.
        limit = 1.0 - self.settings.saturation_limit * self.data.interior
        return Alarm("saturated", step, name, value, limit, _REMEDY["saturated"]) if value > limit else None

    def _flat(self, step: int, name: str, value: float) -> Alarm | None:
        limit = self.settings.flat_limit
        return Alarm("flat", step, name, value, limit, _REMEDY["flat"]) if value < limit else None

    def _edge(self, step: int, name: str, value: float) -> Alarm | None:
        limit = self.settings.edge_limit
        return Alarm("edge", step, name, value, limit, _REMEDY["edge"]) if value > limit else None

    def _collapsed(self, record: Mapping[str, Any], name: str, value: float) -> Alarm | None:
        limit, closer = self.settings.coverage_limit, -self.settings.entropy_limit
        if value >= limit:
            self.covered.add(name)
            return None
        whose = name.removesuffix("coverage")
        if not record.get(f"{whose}entropy_gap", math.nan) < closer:
            return None
        remedy = _REMEDY["collapsed_buffer" if whose.startswith("buffer") else "collapsed"]
        return Alarm("collapsed", record["step"], name, value, limit, remedy)

    def _stalled(self, record: Mapping[str, Any]) -> Alarm | None:
        if self.moved:
            return None
        value = record.get("grad_norm", 0.0)
        return Alarm("stalled", record["step"], "grad_norm", value, NO_GRADIENT, _REMEDY["stalled"])

    def state_dict(self) -> dict[str, Any]:
        """Copy the memory."""
        windows = {name: list(window) for name, window in self.windows.items()}
        memory = {"windows": windows, "usual": dict(self.usual), "streaks": dict(self.streaks)}
        memory |= {"largest": dict(self.largest), "covered": sorted(self.covered)}
        return memory | {"phases": dict(self.phases), "moved": self.moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a memory that `state_dict` copied."""
        self.windows = {k: list(v) for k, v in state["windows"].items()}
        self.usual, self.streaks = dict(state["usual"]), dict(state["streaks"])
        self.largest = dict(state.get("largest", {}))
        self.covered = set(state.get("covered", ()))
        self.phases, self.moved = dict(state.get("phases", {})), bool(state.get("moved", True))


def last_part(name: str) -> str:
    """The metric's own name, without that of the part of a sum which reports it."""
    return name.rpartition(".")[2]


def nonfinite(step: int, metric: str, value: float) -> Alarm:
    """Build the alarm of a number that is none."""
    return Alarm("nonfinite", step, metric, value, math.inf, _REMEDY["nonfinite"])


def unlike(step: int, value: float, limit: float) -> Alarm:
    """Build the verdict on a run whose chains ended far from the data."""
    return Alarm("unlike", step, "chain_distance", value, limit, _REMEDY["unlike"])
