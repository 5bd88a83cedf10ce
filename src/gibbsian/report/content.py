"""What a report may hold: plain arrays and numbers, every part optional.

The report draws what it is given and leaves out the rest; it computes no estimate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.errors import OptionError, ShapeError

Number: TypeAlias = Estimate | tuple[float, float] | float
"""A value with its standard error; a bare float is shown with its error unknown."""

FLOOR = "held-out vs training: the floor"
"""The name of the reference row of a quality table: two sets of true data, compared like samples and data."""


def estimate(number: Number) -> Estimate:
    """Read a number with its error; a bare float's is NaN."""
    if isinstance(number, tuple):
        return Estimate(float(number[0]), float(number[1]))
    return Estimate(float(number), float("nan"))


@dataclass(frozen=True)
class ChainSummary:
    """How the chains that drew the samples behaved.

    Attributes
    ----------
    energy_trace
        Energy at each kept step, ``(draws, chains)``, in nats.
    acceptance
        Mean acceptance probability, one number or one per chain.
    r_hat, ess
        Split R-hat and effective sample size, one number or one per coordinate.
    kernel
        The kernel in words.
    nonfinite
        Proposals that were not finite.
    """

    energy_trace: np.ndarray | None = None
    acceptance: np.ndarray | float | None = None
    r_hat: np.ndarray | float | None = None
    ess: np.ndarray | float | None = None
    kernel: str = ""
    nonfinite: int | None = None


@dataclass(frozen=True)
class LogZSummary:
    """One estimate of log Z, in nats.

    Attributes
    ----------
    value, stderr
        The estimate and its standard error.
    lower, upper
        The bracket.
    ess
        Effective number of annealed chains, when known.
    method, note
        How it was made, and what to know about it.
    exact
        The true value where there is one.
    """

    value: float
    stderr: float
    lower: float
    upper: float
    ess: float | None = None
    method: str = "log Z"
    note: str = ""
    exact: float | None = None


@dataclass(frozen=True)
class LikelihoodSummary:
    """Mean log-likelihood per row.

    Attributes
    ----------
    train, held_out
        Means with standard errors.
    unit
        In what.
    bits_per_dimension
        Of the held-out rows, when it makes sense.
    bounds
        Of the held-out rows' mean, from the bracket of log Z.
    flow
        Of some held-out rows by the probability flow, in the same unit.
    """

    train: Number | None = None
    held_out: Number | None = None
    unit: str = "nats in model units"
    bits_per_dimension: Number | None = None
    bounds: tuple[float, float] | None = None
    flow: Number | None = None


@dataclass(frozen=True)
class MachineSummary:
    """What a restricted Boltzmann machine learned.

    Attributes
    ----------
    weight
        Couplings, ``(hidden, visible)``.
    spectrum, first_spectrum
        Their singular values, descending, and those before training.
    activity
        Part of the training rows in which each hidden unit is on, ``(hidden,)``.
    covariances
        Of some pairs of visible units: in the training rows, and in the samples.
    """

    weight: np.ndarray
    spectrum: np.ndarray
    first_spectrum: np.ndarray
    activity: np.ndarray
    covariances: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class QualityTable:
    """Distances between sets of points and the data, by name.

    Attributes
    ----------
    rows
        Name to column to value; the first row besides the floor is the model's, the others are baselines.
    better
        Column to ``"lower"``, ``"higher"`` or the number to come near to (0.5 for a classifier's accuracy).
    floor
        The name of the row that compares true data with true data.
    """

    rows: Mapping[str, Mapping[str, Number]]
    better: Mapping[str, str | float] = field(default_factory=dict)
    floor: str = FLOOR

    @property
    def columns(self) -> list[str]:
        """Every column that a row names, in order of first appearance."""
        return list(dict.fromkeys(c for row in self.rows.values() for c in row))

    @property
    def model(self) -> str | None:
        """The model's row."""
        return next((name for name in self.rows if name != self.floor), None)

    def loss(self, column: str, value: float) -> float:
        """Turn a value into one of which less is better."""
        better = self.better.get(column, "lower")
        if isinstance(better, (int, float)):
            return abs(value - better)
        return -value if better == "higher" else value


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report can show.

    Attributes
    ----------
    title, data_name, command, seed, seconds
        Of the run; ``seconds`` is its wall time, ``command`` what reproduces it.
    kind
        Whether rows are images or rows of a table.
    event_shape, columns
        Shape of one row, and the names of a table's columns.
    recipe, versions
        Settings (may be nested) and the versions of what ran.
    train, held_out, samples
        Rows in the data's own unit, ``(n, *event)``.
    other_samples
        Further sets to show beside them, by name: unadjusted chains, a baseline.
    metrics
        One mapping per logged step: ``step`` and any numeric keys.
    events
        Health events: ``step``, ``kind``, ``action`` (or ``event``) and any numbers. ``None`` when health was not
        watched; metrics that carry the key ``event`` count as events too.
    energies
        Set name to energies ``(n,)``, in nats: training, held-out, samples, noise.
    energy_map
        For two-dimensional data: ``xs`` (k,), ``ys`` (m,), energies ``(m, k)``.
    true_density
        The known density on the same grid, ``(m, k)``; any scale.
    chains, log_z, log_likelihood, quality
        Summaries; ``log_z`` may hold several estimates.
    detection
        Out-of-distribution set to column (``AUROC``, ...) to value.
    machine
        Of a restricted Boltzmann machine: what it learned.
    class_samples
        Class to draws of it, ``(n, *event)``, of a model that was trained with labels.
    class_accuracy
        Part of the held-out rows that it classifies rightly.
    notes
        Warnings and remarks, shown first.
    """

    title: str = "Energy-based model"
    kind: Literal["image", "table"] = "table"
    event_shape: tuple[int, ...] = ()
    columns: Sequence[str] = ()
    data_name: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    seconds: float | None = None
    train: np.ndarray | None = None
    held_out: np.ndarray | None = None
    samples: np.ndarray | None = None
    other_samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] | None = None
    energies: Mapping[str, np.ndarray] = field(default_factory=dict)
    energy_map: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    true_density: np.ndarray | None = None
    chains: ChainSummary | None = None
    log_z: LogZSummary | Sequence[LogZSummary] = ()
    log_likelihood: LikelihoodSummary | None = None
    quality: QualityTable | None = None
    detection: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    machine: MachineSummary | None = None
    class_samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    class_accuracy: Number | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("image", "table"):
            raise OptionError(f"A report is about an 'image' or a 'table'; got kind={self.kind!r}.")
        widths = {name: rows.shape[1:] for name, rows in self.sets.items()}
        if len({int(np.prod(w)) for w in widths.values()}) > 1:
            raise ShapeError(f"The sets of a report hold rows of one shape; got {widths}.")
        if self.energy_map is not None:
            xs, ys, grid = self.energy_map
            for name, values in (("energy_map", grid), ("true_density", self.true_density)):
                if values is not None and np.shape(values) != (len(ys), len(xs)):
                    raise ShapeError(f"{name} needs shape {(len(ys), len(xs))}, ys by xs; got {np.shape(values)}.")

    @property
    def sets(self) -> dict[str, np.ndarray]:
        """The sets of rows that are there, by the name they are shown under."""
        named = {"data": self.train, "held-out data": self.held_out, "samples": self.samples, **self.other_samples}
        return {name: np.asarray(rows) for name, rows in named.items() if rows is not None and len(rows)}

    def column_names(self, d: int) -> list[str]:
        """Return the names of ``d`` columns, made up where none fit."""
        return [str(c) for c in self.columns] if len(self.columns) == d else [f"x{k + 1}" for k in range(d)]

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The metrics without the events among them."""
        return [row for row in self.metrics if "event" not in row]

    @property
    def health_events(self) -> list[Mapping[str, Any]] | None:
        """The health events, wherever they were given."""
        among = [row for row in self.metrics if "event" in row]
        return (among or None) if self.events is None else list(self.events)

    @property
    def log_z_estimates(self) -> list[LogZSummary]:
        """The estimates of log Z as a list."""
        return [self.log_z] if isinstance(self.log_z, LogZSummary) else list(self.log_z)
