"""What a run did over time: the learning curves and how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gibbsian.diagnostics.estimate import plain
from gibbsian.report.canvas import colour, spread, svg, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS = 120
"""Points of a curve at most; longer runs are shown as the median and the range of each block of steps."""


@dataclass(frozen=True)
class Panel:
    """One set of curves and how to read it."""

    keys: tuple[str, ...]
    title: str
    caption: str
    log: bool = False


PANELS = (
    Panel(
        ("loss", "validation_loss"),
        "Loss",
        "What is minimised. For contrastive objectives it is a difference that hovers near zero and its level means "
        "little: look for jumps and drift, not for descent.",
    ),
    Panel(
        ("energy_data", "energy_samples"),
        "Energy of data and of samples",
        "The two should stay together. Bad: they drift apart, or both run away to large magnitudes.",
    ),
    Panel(
        ("gap",),
        "Gap: energy of data minus samples",
        "Should hover around zero. Bad: it keeps growing in either direction, which comes before divergence.",
    ),
    Panel(
        ("denoising_error",), "Denoising error", "Lower is better until it levels off. Bad: it rises again.", log=True
    ),
    Panel(
        ("level_error",),
        "Change from level to level",
        "Squared error of the energy's change with the noise level, nats squared; it falls to the noise's own floor.",
        log=True,
    ),
    Panel(("accuracy",), "Data told from noise", "Part of rows classified rightly; it settles. Bad: it reaches 1."),
    Panel(("log_z",), "Learned log Z", "The constant learned beside the energy, in nats; it settles near log Z."),
    Panel(("energy_noise",), "Energy of noise", "Higher than that of the data, in nats, and steady in the end."),
    Panel(("energy_noisy",), "Energy of noisy data", "In nats, over all noise levels; it settles."),
    Panel(("grad_norm",), "Gradient norm", "Should settle to a steady band. Bad: spikes that grow.", log=True),
    Panel(
        ("acceptance",),
        "Acceptance of the training chains",
        "Bad: near 0 (steps too large, chains stand still) or near 1 for long (steps too small).",
    ),
    Panel(
        ("buffer_age",),
        "Age of the buffer's chains (steps)",
        "Longer-lived chains have mixed further. Bad: it stays near one round, so that every chain is fresh.",
    ),
    Panel(
        ("moved",),
        "Distance moved per coordinate and round",
        "How far the chains travel between updates. Bad: it falls to zero.",
    ),
    Panel(("nonfinite",), "Chains that left the numbers", "Restarted or rejected, by step. Bad: anything but 0."),
    Panel(("learning_rate",), "Learning rate", "The schedule, with any cut after a rollback."),
    Panel(("steps_per_second",), "Steps per second", "Bad: it falls steadily, which means that memory or chains grow."),
)


def panels_of(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """List the panels that the metrics can fill; unknown numeric keys get one each."""
    keys = {k for row in metrics for k, v in row.items() if k != "step" and number(v) is not None}
    known = [
        Panel(tuple(k for k in p.keys if k in keys), p.title, p.caption, p.log) for p in PANELS if keys & {*p.keys}
    ]
    rest = sorted(keys - {k for p in PANELS for k in p.keys} - {"seconds"})
    return known + [Panel((k,), k.replace("_", " "), "Recorded by the run; no reading is known for it.") for k in rest]


def number(value: object) -> float | None:
    """Read a number, the string of one that JSON cannot hold included; anything else is ``None``."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key; rows without it are left out, values that are not finite stay."""
    pairs = [(number(row.get("step", i)), number(row.get(key))) for i, row in enumerate(metrics)]
    kept = [(s, v) for s, v in pairs if s is not None and np.isfinite(s) and v is not None]
    return np.array([s for s, _ in kept], dtype=float), np.array([v for _, v in kept], dtype=float)


def nonfinite_counts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many values of each key are not finite, for the keys that have any."""
    keys = dict.fromkeys(k for row in metrics for k in row)
    counts = {k: int((~np.isfinite(series(metrics, k)[1])).sum()) for k in keys if k != "step"}
    return {k: n for k, n in counts.items() if n}


def learning_curve(
    name: str, metrics: Sequence[Mapping[str, Any]], panel: Panel, events: Sequence[Mapping[str, Any]]
) -> str:
    """Draw one panel; what is not finite is a gap in the line and a cross at the bottom."""
    lines = {k: series(metrics, k) for k in panel.keys}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends: list[tuple[float, str, str]] = []
        for i, (key, (steps, values)) in enumerate(lines.items()):
            shade = _line_colour(key, i)
            _line(axes, steps, values, shade)
            finite = values[np.isfinite(values)]
            if len(finite):
                ends.append((float(np.median(finite[-max(1, len(finite) // 50) :])), key.replace("_", " "), shade))
            bad = steps[~np.isfinite(values)]
            if len(bad):
                axes.plot(
                    bad,
                    np.full(len(bad), 0.02),
                    "x",
                    color=colour("rose"),
                    markersize=5,
                    transform=axes.get_xaxis_transform(),
                    clip_on=False,
                )
        finite = np.concatenate([v[np.isfinite(v)] for _, v in lines.values()])
        if panel.log and len(finite) and finite.min() > 0 and finite.max() / finite.min() > 10:
            axes.set_yscale("log")
            _plain_log_ticks(axes)
        elif len(finite):
            axes.set_ylim(*curve_limits(finite))
        _mark_events(axes, events)
        tidy(axes, "step")
        if len(ends) > 1:
            _label_ends(axes, ends)

    first, last = _ends_of(lines)
    return svg(name, f"{panel.title} over the steps of the run, from {first} to {last}.", paint, 3.3, 2.3)


def _ends_of(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[str, str]:
    values = next(iter(lines.values()))[1]
    finite = values[np.isfinite(values)]
    return (plain(float(finite[0]), 3), plain(float(finite[-1]), 3)) if len(finite) else ("nothing finite", "the end")


def _line_colour(key: str, place: int) -> str:
    if "sample" in key:
        return colour("samples")
    return colour("data" if place == 0 else "held")


def curve_limits(values: np.ndarray) -> tuple[float, float]:
    """Give the bulk the room: the far tails of a spiky curve may leave the frame."""
    low, high = np.quantile(values, [0.0, 1.0]) if len(values) < 50 else np.quantile(values, [0.004, 0.996])
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low - pad), float(high + pad)


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, shade: str) -> None:
    # A rollback goes back to an earlier step: lift the pen.
    back = np.flatnonzero(np.diff(steps) < 0) + 1
    steps, values = np.insert(steps, back, steps[back]), np.insert(values, back, np.nan)
    if len(steps) > BLOCKS:
        parts = np.array_split(np.arange(len(steps)), BLOCKS)
        rows = [(steps[p].mean(), *_block(values[p])) for p in parts]
        steps, low, values, high = map(np.array, zip(*rows))
        axes.fill_between(steps, low, high, color=shade, alpha=0.25, linewidth=0)
    good = np.isfinite(values)
    alone = good & ~np.concatenate([[False], good[:-1]]) & ~np.concatenate([good[1:], [False]])
    axes.plot(steps, np.where(good, values, np.nan), color=shade)
    axes.plot(steps[alone], values[alone], ".", color=shade, markersize=5)


def _block(values: np.ndarray) -> tuple[float, float, float]:
    """Tenth, half and nine tenths of a block; NaN where it has nothing finite, so that the line breaks."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.nan, np.nan, np.nan
    low, middle, high = np.quantile(finite, [0.1, 0.5, 0.9])
    return float(low), float(middle), float(high)


def _mark_events(axes: Axes, events: Sequence[Mapping[str, Any]]) -> None:
    low, high = axes.get_xlim()
    for event in events:
        step = number(event.get("step"))
        if step is not None and low <= step <= high:
            axes.axvline(step, color=colour("rose"), linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_xlim(low, high)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each curve at its right end, moved apart where they meet."""
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    low, high = (np.log(low), np.log(high)) if logarithmic else (low, high)
    at = [(np.log(v) if logarithmic else v) for v, _, _ in ends]
    places = spread([float((v - low) / (high - low)) for v in at], 0.1, 0.05, 0.97)
    for place, (_, text, shade) in zip(places, ends):
        axes.text(1.015, place, text, transform=axes.transAxes, color=shade, va="center", fontsize=8)


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v, 2)))
    axes.yaxis.set_minor_formatter(NullFormatter())
