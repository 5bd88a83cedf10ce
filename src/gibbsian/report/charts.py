"""What energies, chains and estimates look like: histograms, traces, and the log Z bracket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gibbsian.diagnostics.estimate import plain, with_error
from gibbsian.report.canvas import colour, series_colour, shorten, svg, tidy
from gibbsian.report.content import LogZSummary
from gibbsian.report.curves import curve_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def energy_histograms(name: str, energies: Mapping[str, np.ndarray], width: float) -> str:
    """Draw the distributions of energy, each named beside its median and its middle nine tenths."""
    finite = {k: np.asarray(v, dtype=float).ravel() for k, v in energies.items()}
    finite = {k: v[np.isfinite(v)] for k, v in finite.items()}
    finite = {k: v for k, v in finite.items() if len(v)}
    low, high, far = _energy_range(finite)

    def paint(figure: Figure) -> None:
        top, axes = figure.subplots(2, 1, sharex=True, height_ratios=[0.24 * len(finite) + 0.1, 1.7])
        fewest = min(len(v) for k, v in finite.items() if k not in far)
        edges = np.linspace(low, high, int(np.clip(4 * fewest ** (1 / 3), 15, 60)) + 1)
        for i, (key, values) in enumerate(finite.items()):
            shade = series_colour(key, i)
            y = len(finite) - i
            if key in far:
                right = np.median(values) > high
                text = f"{key}, median {plain(float(np.median(values)), 3)}" + (" →" if right else "")
                top.text(
                    0.99 if right else 0.01,
                    y,
                    text if right else "← " + text,
                    color=shade,
                    va="center",
                    ha="right" if right else "left",
                    fontsize=8,
                    transform=top.get_yaxis_transform(),
                )
                continue
            a, middle, b = np.quantile(values, [0.05, 0.5, 0.95])
            top.plot([a, b], [y, y], color=shade, linewidth=2.2, solid_capstyle="round")
            top.plot(middle, y, "o", color=shade, markersize=4.5)
            _beside(top, (a, b), y, f"{key} {plain(float(middle), 3)}", shade, (low, high))
            heights = np.histogram(values, edges)[0] / len(values)
            if i == 0:
                axes.stairs(heights, edges, fill=True, color=shade, alpha=0.2)
            axes.stairs(heights, edges, color=shade, linewidth=1.3)
        top.set_ylim(0.4, len(finite) + 0.6)
        top.set_axis_off()
        axes.set_xlim(low, high)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        tidy(axes, "energy (nats)", grid="x")

    words = "; ".join(f"{k}: median {plain(float(np.median(v)), 3)}" for k, v in finite.items())
    return svg(name, f"Histograms of energy in nats. {words}.", paint, width, 1.9 + 0.06 * width + 0.24 * len(finite))


def _beside(
    axes: Axes, interval: tuple[float, float], y: float, text: str, shade: str, box: tuple[float, float]
) -> None:
    """Write beside an interval, on the side that has more room."""
    right = box[1] - interval[1] >= interval[0] - box[0]
    axes.annotate(
        text,
        (min(interval[1], box[1]) if right else max(interval[0], box[0]), y),
        va="center",
        color=shade,
        xytext=(6 if right else -6, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=8,
        annotation_clip=False,
    )


def _energy_range(energies: Mapping[str, np.ndarray]) -> tuple[float, float, set[str]]:
    """Limits of the axis, and the sets so far from the first that showing them would flatten it."""
    ends = {k: np.quantile(v, [0.005, 0.995]) for k, v in energies.items()}
    first = next(iter(ends.values()))
    width = max(float(first[1] - first[0]), 1e-9)
    far = {k for k, v in energies.items() if not first[0] - 4 * width <= np.median(v) <= first[1] + 4 * width}
    near = [e for k, e in ends.items() if k not in far]
    low = max(min(float(e[0]) for e in near), float(first[0]) - 6 * width)
    high = min(max(float(e[1]) for e in near), float(first[1]) + 6 * width)
    pad = 0.03 * (high - low) or 0.5
    return low - pad, high + pad, far


def energy_trace(name: str, trace: np.ndarray) -> str:
    """Draw the energy of some chains over the draws, and the middle of all."""
    shown = trace[:, np.linspace(0, trace.shape[1] - 1, min(trace.shape[1], 5)).round().astype(int)]
    stride = max(1, len(trace) // 200)
    steps = np.arange(0, len(trace), stride)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for chain in shown.T:
            axes.plot(
                steps,
                np.where(np.isfinite(chain), chain, np.nan)[::stride],
                color=colour("samples"),
                alpha=0.4,
                linewidth=0.8,
            )
        finite = np.where(np.isfinite(trace), trace, np.nan)[::stride]
        alive = ~np.isnan(finite).all(axis=1)
        axes.plot(steps[alive], np.nanmedian(finite[alive], axis=1), color=colour("ink"), linewidth=1.4)
        values = trace[np.isfinite(trace)]
        if len(values):
            axes.set_ylim(*curve_limits(values))
        tidy(axes, "draw", "energy (nats)")

    return svg(name, f"Energy of {shown.shape[1]} of {trace.shape[1]} chains over {len(trace)} draws.", paint, 3.3, 2.3)


def diagnostic_histogram(name: str, values: np.ndarray, label: str, threshold: float, words: str) -> str:
    """Draw a diagnostic over coordinates or chains, with the threshold to compare with."""
    values = values[np.isfinite(values)]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.hist(values, bins=min(30, max(5, len(values) // 3)), color=colour("data"), alpha=0.6)
        axes.axvline(threshold, color=colour("rose"), linewidth=1.0, linestyle=(0, (3, 2)))
        low, high = axes.get_xlim()
        right = threshold < (low + high) / 2
        axes.annotate(
            words,
            (threshold, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4 if right else -4, 4),
            textcoords="offset points",
            ha="left" if right else "right",
            color=colour("rose"),
            fontsize=8,
        )
        tidy(axes, label, "count")

    alt = f"Histogram of {label}, from {plain(float(values.min()), 4)} to {plain(float(values.max()), 4)}; {words}."
    return svg(name, alt, paint, 3.3, 2.3)


def log_z_brackets(name: str, estimates: Sequence[LogZSummary], width: float) -> str:
    """Draw each estimate as a point with two standard errors inside its bracket."""
    numbers = [
        v for e in estimates for v in (e.value, e.lower, e.upper, e.value - 2 * e.stderr, e.value + 2 * e.stderr)
    ]
    numbers += [e.exact for e in estimates if e.exact is not None]
    finite = [v for v in numbers if np.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    pad = 0.12 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, e in enumerate(estimates):
            y = len(estimates) - 1 - i
            _bracket(axes, e, y, low, high)
            value = f":  {with_error(e.value, e.stderr)} nats"
            words = shorten(e.method, max(12, int(14 * width) - len(value))) + value
            behind = {"facecolor": colour("card"), "edgecolor": "none", "pad": 1.0}
            across = axes.get_yaxis_transform()
            axes.text(
                0.0, y + 0.36, words, transform=across, color=colour("ink"), fontsize=8.5, bbox=behind
            ).set_in_layout(False)
        exact = [e.exact for e in estimates if e.exact is not None]
        if exact:
            axes.axvline(exact[0], color=colour("held"), linewidth=1.2, zorder=1)
            axes.annotate(
                f"exact {plain(exact[0], 5)}",
                (exact[0], 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=colour("held"),
                fontsize=8,
            )
        axes.set_xlim(low, high)
        axes.set_ylim(-0.45, len(estimates) - 0.25)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        tidy(axes, "log Z (nats)", grid="x")

    alt = "; ".join(
        f"{e.method}: {with_error(e.value, e.stderr)}, between {plain(e.lower)} and {plain(e.upper)}" for e in estimates
    )
    return svg(name, f"Brackets of log Z in nats. {alt}.", paint, width, 0.75 + 0.62 * len(estimates))


def _bracket(axes: Axes, e: LogZSummary, y: float, low: float, high: float) -> None:
    left = e.lower if np.isfinite(e.lower) else low
    right = e.upper if np.isfinite(e.upper) else high
    axes.plot([left, right], [y, y], color=colour("data"), linewidth=7, alpha=0.3, solid_capstyle="butt")
    for end, known in ((left, np.isfinite(e.lower)), (right, np.isfinite(e.upper))):
        mark = "|" if known else ("<" if end == left else ">")
        axes.plot(end, y, mark, color=colour("data"), markersize=11 if known else 6, markeredgewidth=1.6, clip_on=False)
    if np.isfinite(e.value):
        if np.isfinite(e.stderr):
            axes.plot([e.value - 2 * e.stderr, e.value + 2 * e.stderr], [y, y], color=colour("data"), linewidth=2.4)
        axes.plot(e.value, y, "o", color=colour("data"), markersize=6)
