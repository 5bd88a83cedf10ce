"""Samples beside data: image grids, scatters, corner plots and histograms of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gibbsian.report.canvas import colour, png, series_colour, shorten, svg, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 2500
"""Points of a scatter at most; more would only fill it."""
CORNER = 6
"""Columns of a corner plot at most."""


def spread_rows(x: np.ndarray, most: int) -> np.ndarray:
    """Take at most so many rows, spread evenly over the set: neither random nor chosen."""
    return x if len(x) <= most else x[np.linspace(0, len(x) - 1, most).round().astype(int)]


def as_images(x: np.ndarray, event_shape: Sequence[int]) -> np.ndarray:
    """Read rows as images, ``(n, h, w, 1 or 3)``.

    Parameters
    ----------
    x
        ``(n, *event)`` or flat.
    event_shape
        ``(h, w)``, ``(c, h, w)``, ``(h, w, c)``, or empty for the array's own; of other channel counts the first
        channel is shown.
    """
    shape: tuple[int, ...] = tuple(event_shape) or x.shape[1:]
    if len(shape) < 2:
        size = int(np.prod(shape))
        side = round(size**0.5)
        shape = (side, side) if side * side == size else (1, size)
    x = np.asarray(x, dtype=np.float64).reshape(len(x), *shape)
    if len(shape) == 2:
        return x[..., None]
    if len(shape) > 3:
        return x.reshape(len(x), shape[0], -1, 1)
    if x.shape[1] in (1, 3) or x.shape[-1] not in (1, 3):
        x = np.moveaxis(x, 1, -1)
    return x if x.shape[-1] in (1, 3) else x[..., :1]


def image_grid(images: np.ndarray, low: float, high: float, columns: int) -> str:
    """Tile images into one PNG with clear gaps; what is not finite is magenta.

    Parameters
    ----------
    images
        ``(n, h, w, 1 or 3)``.
    low, high
        The values shown black and white.
    columns
        Of the grid.
    """
    n, h, w, _ = images.shape
    gap = max(1, round(w / 14))
    rows = -(-n // columns)
    sheet = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4), dtype=np.uint8)
    scaled = np.clip((images - low) / max(high - low, 1e-12), 0, 1)
    bad = ~np.isfinite(images).all(axis=-1)
    pixels = np.broadcast_to(np.nan_to_num(scaled) * 255, (n, h, w, 3)).round().astype(np.uint8).copy()
    pixels[bad] = (255, 0, 255)
    for i in range(n):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w, :3] = pixels[i]
        sheet[top : top + h, left : left + w, 3] = 255
    return png(sheet)


def pixel_range(*sets: np.ndarray | None) -> tuple[float, float]:
    """Black and white levels from the first set that has finite pixels."""
    for x in sets:
        if x is not None and len(finite := x[np.isfinite(x)]):
            return float(finite.min()), float(finite.max())
    return 0.0, 1.0


def limits(sets: Sequence[np.ndarray], column: int, tail: float = 0.002) -> tuple[float, float]:
    """Axis limits of one column: all of the first set, and of the others all but their far tails."""
    ends = []
    if is_discrete(sets[0][:, column]):
        values = np.unique(sets[0][np.isfinite(sets[0][:, column]), column])
        step = spacing(values)
        return float(values[0] - 0.6 * step), float(values[-1] + 0.6 * step)
    for i, x in enumerate(sets):
        values = x[:, column][np.isfinite(x[:, column])]
        if len(values):
            ends.append(np.quantile(values, [0.0, 1.0] if i == 0 else [tail, 1 - tail]))
    if not ends:
        return -1.0, 1.0
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    pad = 0.05 * (high - low) or 0.5
    return float(low - pad), float(high + pad)


def scatter(
    name: str,
    label: str,
    x: np.ndarray,
    boxes: Sequence[tuple[float, float]],
    columns: Sequence[str],
    place: int = 0,
) -> str:
    """Draw one set of points in the plane, ``(n, 2)``, on axes that all sets share."""
    shown = spread_rows(x, POINTS)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.scatter(
            shown[:, 0],
            shown[:, 1],
            s=5,
            color=series_colour(label, place),
            alpha=_alpha(shown),
            linewidths=0,
            rasterized=True,
        )
        axes.set_xlim(*boxes[0])
        axes.set_ylim(*boxes[1])
        tidy(axes, columns[0], columns[1], grid="both")

    return svg(name, f"Scatter of {len(shown)} points of {label}: {columns[1]} against {columns[0]}.", paint, 3.3, 3.0)


def _alpha(x: np.ndarray) -> float:
    return 0.75 if len(x) < 500 else 0.45


def is_discrete(x: np.ndarray) -> bool:
    """Whether a column takes few values, as labels and small counts do."""
    values = np.unique(x[np.isfinite(x)])
    return len(values) <= 12 and len(values) < 0.2 * len(x)


def spacing(values: np.ndarray) -> float:
    """Smallest step between sorted distinct values."""
    return float(np.diff(values).min()) if len(values) > 1 else 1.0


def column_histogram(axes: Axes, sets: dict[str, np.ndarray], column: int, box: tuple[float, float]) -> None:
    """Overlay the histograms of one column: data filled, the others as lines."""
    first = next(iter(sets.values()))[:, column]
    if is_discrete(first):
        values = np.unique(first[np.isfinite(first)])
        half = spacing(values) / 2
        edges = np.concatenate([[values[0] - half], (values[1:] + values[:-1]) / 2, [values[-1] + half]])
    else:
        edges = np.linspace(*box, 36)
    for i, (name, x) in enumerate(sets.items()):
        values = x[:, column]
        heights = np.histogram(values[np.isfinite(values)], edges)[0] / max(len(values), 1) / np.diff(edges)
        shade = series_colour(name, i)
        if i == 0:
            axes.stairs(heights, edges, fill=True, color=shade, alpha=0.25)
        axes.stairs(heights, edges, color=shade, linewidth=1.4)
    axes.set_xlim(*box)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def histogram(name: str, sets: dict[str, np.ndarray], column: int, title: str) -> str:
    """Draw the histograms of one column as a figure of its own."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        column_histogram(axes, sets, column, limits(list(sets.values()), column))
        tidy(axes, title, grid="")

    return svg(name, f"Histograms of column {title} for {' and '.join(sets)}.", paint, 3.0, 1.9)


def corner(name: str, sets: dict[str, np.ndarray], columns: Sequence[str]) -> str:
    """Draw every pair of columns: data as points, each set as the curves that hold half and nine tenths of it.

    Parameters
    ----------
    name
        Unique in the page.
    sets
        Name to rows ``(n, d)``, data first; two sets read best.
    columns
        Names of the ``d`` columns, at most `CORNER`.
    """
    d = len(columns)
    boxes = [limits(list(sets.values()), k) for k in range(d)]
    discrete = [is_discrete(next(iter(sets.values()))[:, k]) for k in range(d)]

    def paint(figure: Figure) -> None:
        grid = figure.subplots(d, d, squeeze=False)
        for row in range(d):
            for column in range(d):
                axes = grid[row][column]
                if column > row:
                    axes.set_visible(False)
                    continue
                if row == column:
                    column_histogram(axes, sets, row, boxes[row])
                else:
                    _pair(axes, sets, (column, row), boxes, discrete)
                _corner_axes(axes, columns, row, column, discrete)

    alt = f"Pair plot of {', '.join(columns)} for {' and '.join(sets)}; histograms on the diagonal."
    return svg(name, alt, paint, 1.35 * d + 0.4, 1.3 * d + 0.3)


def _corner_axes(axes: Axes, columns: Sequence[str], row: int, column: int, discrete: Sequence[bool]) -> None:
    from matplotlib.ticker import MaxNLocator

    d = len(columns)
    below, beside = shorten(columns[column]), shorten(columns[row])
    tidy(axes, below if row == d - 1 else "", beside if column == 0 and row else "", grid="")
    axes.xaxis.set_major_locator(MaxNLocator(3, prune="both", integer=discrete[column]))
    if row != column:
        axes.yaxis.set_major_locator(MaxNLocator(3, prune="both", integer=discrete[row]))
    if row < d - 1:
        axes.set_xticklabels([])
    if column > 0 or row == 0:
        axes.set_yticklabels([])


def _pair(
    axes: Axes, sets: dict[str, np.ndarray], pair: tuple[int, int], boxes: list[Any], discrete: list[bool]
) -> None:
    i, j = pair
    jitter = np.random.default_rng(0)  # for the eye only: nothing is estimated from it
    for place, (name, x) in enumerate(sets.items()):
        x = x[np.isfinite(x).all(axis=1)]
        shade = series_colour(name, place)
        rough = discrete[i] or discrete[j]
        if place == 0 or rough or len(x) < 50:
            points = spread_rows(x, 1200)[:, [i, j]].copy()
            for axis, k in enumerate(pair):
                if discrete[k]:
                    step = (boxes[k][1] - boxes[k][0]) / (len(np.unique(points[:, axis])) + 0.2)
                    points[:, axis] += step * (jitter.uniform(-0.13, 0.13, len(points)) + 0.36 * (place - 0.5))
            axes.scatter(*points.T, s=2.5, color=shade, alpha=0.3, linewidths=0, rasterized=True)
        if not rough and len(x) >= 50:
            xs, ys, density, levels = mass_levels(x[:, i], x[:, j], boxes[i], boxes[j])
            if len(levels):
                axes.contour(xs, ys, density, levels=levels, colors=[shade], linewidths=[0.8, 1.4][-len(levels) :])
    axes.set_xlim(*boxes[i])
    axes.set_ylim(*boxes[j])


def mass_levels(
    x: np.ndarray, y: np.ndarray, xbox: tuple[float, float], ybox: tuple[float, float], bins: int = 48
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """Smooth a two-dimensional histogram, with the heights above which nine tenths and half of the mass lie."""
    from scipy.ndimage import gaussian_filter

    counts, xe, ye = np.histogram2d(x, y, bins=bins, range=[xbox, ybox])
    width = bins * max(0.02, 0.1 * len(x) ** (-1 / 6) * 2)
    density = gaussian_filter(counts, width).T
    ordered = np.sort(density, axis=None)[::-1]
    total = np.cumsum(ordered)
    if total[-1] <= 0:
        return xe[:-1], ye[:-1], density, []
    levels = [float(ordered[np.searchsorted(total, share * total[-1])]) for share in (0.9, 0.5)]
    return (xe[1:] + xe[:-1]) / 2, (ye[1:] + ye[:-1]) / 2, density, sorted(set(levels))


def energy_map(
    name: str,
    xs: np.ndarray,
    ys: np.ndarray,
    energy: np.ndarray,
    samples: np.ndarray | None,
    columns: Sequence[str],
    depth: float = 12.0,
) -> str:
    """Shade the energy's lowest ``depth`` nats with a line every 2, the samples on top."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        height = energy - _lowest(energy)
        _shade(axes, xs, ys, np.clip(1 - height / depth, 0, 1) * 0.85, "data")
        finite = np.where(np.isfinite(height), height, depth * 10)
        axes.contour(xs, ys, finite, levels=np.arange(2, depth + 1, 2), colors=[colour("muted")], linewidths=0.6)
        if samples is not None:
            shown = spread_rows(samples, 800)
            axes.scatter(*shown.T, s=3, color=colour("samples"), linewidths=0, alpha=0.8, rasterized=True)
        _map_box(axes, xs, ys, columns)

    over = "" if samples is None else ", with samples over it"
    return svg(name, f"Map of the energy over {columns[0]} and {columns[1]}{over}.", paint, 3.3, 3.0)


def density_map(
    name: str, label: str, xs: np.ndarray, ys: np.ndarray, density: np.ndarray, top: float, columns: Sequence[str]
) -> str:
    """Shade a density, full colour at ``top``."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _shade(axes, xs, ys, np.clip(density / max(top, 1e-300), 0, 1), "data")
        _map_box(axes, xs, ys, columns)

    return svg(name, f"Map of the {label} over {columns[0]} and {columns[1]}.", paint, 3.3, 3.0)


def normalised(xs: np.ndarray, ys: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Scale a density on a grid to integrate to 1 over it."""
    total = np.nansum(density) * np.gradient(xs).mean() * np.gradient(ys).mean()
    return density / total if total > 0 else density


def boltzmann(xs: np.ndarray, ys: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """exp(-E) normalised over the grid; where E is not finite, NaN."""
    weight = np.where(np.isfinite(energy), np.exp(-np.clip(energy - _lowest(energy), 0, 700)), np.nan)
    return normalised(xs, ys, weight)


def _lowest(energy: np.ndarray) -> float:
    finite = energy[np.isfinite(energy)]
    return float(finite.min()) if len(finite) else 0.0


def _shade(axes: Axes, xs: np.ndarray, ys: np.ndarray, amount: np.ndarray, name: str) -> None:
    """Shade by transparency, so that nothing is drawn where there is nothing, on light and dark alike."""
    from matplotlib.colors import to_rgb

    picture = np.zeros((*amount.shape, 4))
    picture[..., :3] = to_rgb(colour(name))
    picture[..., 3] = np.nan_to_num(amount)
    box = (float(xs[0]), float(xs[-1]), float(ys[0]), float(ys[-1]))
    axes.imshow(picture, extent=box, origin="lower", aspect="auto", interpolation="bilinear")


def _map_box(axes: Axes, xs: np.ndarray, ys: np.ndarray, columns: Sequence[str]) -> None:
    tidy(axes, columns[0], columns[1], grid="")
    axes.set_xlim(float(xs[0]), float(xs[-1]))
    axes.set_ylim(float(ys[0]), float(ys[-1]))
    for spine in axes.spines.values():
        spine.set_visible(True)
