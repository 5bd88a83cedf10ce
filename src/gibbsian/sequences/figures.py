"""Figures of families: the profile, contacts, mutation effects, and draws beside the family."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gibbsian.report.canvas import colour, styled, tidy
from gibbsian.report.machine import signed, strong
from gibbsian.sequences.contacts import Precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    "AVLIMCFWY": "data",
    "KRH": "rose",
    "DE": "other",
    "STNQGP": "held",
}
"""Letters of amino acids by what they are like: without water, positive, negative, polar and small."""

SMALL = 0.04
"""Letters of a profile that are lower than this, in bits, are not drawn."""


def save_figure(path: Path, paint: Callable[[Figure], None], width: float, height: float) -> bytes:
    """Draw a figure as the ending of a path says, .png or .svg, and return the file's content."""
    from matplotlib.figure import Figure

    buffer, ending = io.BytesIO(), path.suffix.removeprefix(".")
    with styled(path.stem):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=colour("card"))
        paint(figure)
        metadata = {"Date": None} if ending == "svg" else {"Software": None}
        figure.savefig(buffer, format=ending, dpi=200, metadata=metadata)
    return buffer.getvalue()


def profile_logo(figure: Figure, shares: np.ndarray, alphabet: str) -> None:
    """Draw each column's letters, together as high as the column is informative, in bits.

    `Sequence logos: a new way to display consensus sequences (Schneider & Stephens, 1990)
    <https://doi.org/10.1093/nar/18.20.6097>`_.

    Parameters
    ----------
    figure
        Empty.
    shares
        ``(L, K)``, the gap first.
    alphabet
        The letters.
    """
    length = len(shares)
    lines = max(1, -(-length // 70))
    rows = figure.subplots(lines, 1, squeeze=False)[:, 0]
    heights = logo_heights(shares)
    top = max(float(heights.sum(1).max()), 0.5)
    each = -(-length // lines)
    for k, axes in enumerate(rows):
        for i in range(k * each, min((k + 1) * each, length)):
            _stack(axes, i + 1, heights[i], alphabet)
        axes.set_xlim(k * each + 0.4, (k + 1) * each + 0.6)
        axes.set_ylim(0, 1.03 * top)
        tidy(axes, "column" if k == lines - 1 else "", "bits")


def logo_heights(shares: np.ndarray) -> np.ndarray:
    """Heights of letters in a logo, ``(L, K)``, in bits: shares times their column's information; gaps have none."""
    letters = shares[:, 1:] / np.maximum(shares[:, 1:].sum(1, keepdims=True), 1e-12)
    logs = np.log2(np.maximum(letters, 1e-12))
    information = np.log2(letters.shape[1]) + (letters * logs).sum(1)
    # A column that is mostly gaps tells little, whatever its few letters.
    heights = letters * (information * shares[:, 1:].sum(1))[:, None]
    return np.concatenate((np.zeros((len(shares), 1)), heights), 1)


def _stack(axes: Axes, place: int, heights: np.ndarray, alphabet: str) -> None:
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    font, bottom = FontProperties(family="DejaVu Sans", weight="bold"), 0.0
    for code in np.argsort(heights):
        height = float(heights[code])
        if height < SMALL:
            bottom += max(height, 0.0)
            continue
        letter = TextPath((0, 0), alphabet[code], size=1, prop=font)
        box = letter.get_extents()
        move = Affine2D().translate(-box.x0, -box.y0).scale(0.92 / box.width, height / box.height)
        shape = letter.transformed(move + Affine2D().translate(place - 0.46, bottom))
        axes.add_patch(PathPatch(shape, facecolor=colour(_kind(alphabet[code])), linewidth=0))
        bottom += height


def _kind(letter: str) -> str:
    return next((name for letters, name in KINDS.items() if letter in letters), "noise")


def contact_map(
    figure: Figure, scores: np.ndarray, distances: np.ndarray | None, pairs: int, separation: int, cutoff: float
) -> None:
    """Draw the strongest pairs above the diagonal; below it the contacts of a structure, or all scores without one."""
    axes = figure.add_subplot()
    length = len(scores)
    i, j = np.triu_indices(length, separation)
    best = np.argsort(-scores[i, j], kind="stable")[:pairs]
    a, b = i[best] + 1, j[best] + 1
    size = max(2.0, 640.0 / length)
    if distances is None:
        lower = np.where(np.tri(length, k=-1, dtype=bool), scores, 0.0)
        axes.imshow(
            signed(lower, strong(scores[i, j])), extent=(0.5, length + 0.5, length + 0.5, 0.5), interpolation="nearest"
        )
        axes.scatter(b, a, s=size, color=colour("data"), linewidths=0)
        told = {"data": f"the first {len(best)} pairs (below: all scores)"}
    else:
        known = ~np.isnan(distances) & (distances < cutoff) & np.tri(length, k=-1, dtype=bool)
        y, x = np.nonzero(known)
        axes.scatter(x + 1, y + 1, s=size, color=colour("noise"), alpha=0.55, linewidths=0, marker="s")
        d = distances[a - 1, b - 1]
        told = {}
        for name, where, words in (
            ("held", d < cutoff, "in contact"),
            ("bad", d >= cutoff, "not in contact"),
            ("other", np.isnan(d), "distance not known"),
        ):
            if where.any():
                axes.scatter(b[where], a[where], s=size, color=colour(name), linewidths=0)
                told[name] = f"{where.sum()} {words}"
        told["noise"] = f"contacts below {cutoff:g} Å"
    axes.plot([0.5, length + 0.5], [0.5, length + 0.5], color=colour("muted"), linewidth=0.7)
    axes.set_xlim(0.5, length + 0.5)
    axes.set_ylim(length + 0.5, 0.5)
    axes.set_aspect("equal")
    tidy(axes, "column", "column", grid="")
    for place, (name, words) in enumerate(told.items()):
        axes.annotate(
            f"■ {words}",
            (0.0, 1.0),
            xycoords="axes fraction",
            xytext=(0, 4 + 11 * (len(told) - 1 - place)),
            textcoords="offset points",
            color=colour(name),
            fontsize=8,
        )
    for spine in axes.spines.values():
        spine.set_visible(True)


def precision_curve(figure: Figure, found: Mapping[str, Precision]) -> None:
    """Draw the precision of the first n pairs against n, beside that of pairs taken at random."""
    axes = figure.add_subplot()
    shades = ("data", "samples", "held", "other", "rose")
    ends: list[tuple[float, str, str]] = []
    first = next(iter(found.values()))
    for (name, each), shade in zip(found.items(), shades):
        n = np.arange(1, len(each.curve) + 1)
        axes.semilogx(n, each.curve.numpy(), color=colour(shade), linewidth=1.5)
        ends.append((each.at(first.marks["2L"]), name, shade))
    axes.axhline(first.base_rate, color=colour("noise"), linewidth=1.0, linestyle="--")
    axes.annotate(
        f"at random {first.base_rate:.3f}",
        (1.1, first.base_rate),
        xytext=(0, 3),
        textcoords="offset points",
        color=colour("muted"),
        fontsize=8,
    )
    for mark, n in first.marks.items():
        axes.axvline(n, color=colour("line"), linewidth=0.8, zorder=0)
        axes.annotate(mark, (n, 1.04), ha="center", fontsize=8, color=colour("muted"), annotation_clip=False)
    for k, (_, name, shade) in enumerate(ends):
        axes.annotate(
            name,
            (0.03, 0.08 + 0.09 * (len(ends) - 1 - k)),
            xycoords="axes fraction",
            color=colour(shade),
            fontsize=8,
        )
    axes.set_ylim(0.0, 1.03)
    axes.set_xlim(1, len(first.curve))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    tidy(axes, "pairs, strongest first", "precision")


def mutation_map(figure: Figure, effects: np.ndarray, alphabet: str, reference: str) -> None:
    """Draw the effects of single mutations: columns from left to right, letters from above, a dot at the own letter."""
    length = len(effects)
    limit = float(np.quantile(np.abs(effects), 0.98)) or 1.0
    picture = signed(effects.T, limit)
    lines = max(1, -(-length // 90))
    each = -(-length // lines)
    rows = figure.subplots(lines, 1, squeeze=False)[:, 0]
    for k, axes in enumerate(rows):
        low, high = k * each, min((k + 1) * each, length)
        box = (low + 0.5, high + 0.5, len(alphabet) - 0.5, -0.5)
        axes.imshow(picture[:, low:high], extent=box, aspect="auto", interpolation="nearest")
        own = [alphabet.index(c) for c in reference[low:high]]
        axes.scatter(np.arange(low, high) + 1, own, s=3.0, color=colour("ink"), linewidths=0)
        axes.set_xlim(low + 0.5, low + each + 0.5)
        axes.set_yticks(range(len(alphabet)), list(alphabet), fontsize=5.5)
        tidy(axes, "column" if k == lines - 1 else "", "", grid="")
        for spine in axes.spines.values():
            spine.set_visible(True)
    _signed_bar(figure, list(rows), limit, "change of log-probability (nats)")


def _signed_bar(figure: Figure, axes: list[Axes], limit: float, words: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = signed(np.linspace(-limit, limit, 201), limit) / 255.0
    scale = ScalarMappable(Normalize(-limit, limit), ListedColormap(shades))
    bar = figure.colorbar(scale, ax=axes, shrink=0.8, aspect=25, pad=0.015)
    bar.set_label(words, color=colour("muted"), fontsize=8)
    bar.outline.set_edgecolor(colour("line"))  # type: ignore[operator]
    bar.ax.tick_params(length=0)


def epistasis_map(figure: Figure, strongest: np.ndarray) -> None:
    """Draw for each pair of columns the epistasis of largest magnitude of any two mutations, ``(L, L)``."""
    axes = figure.add_subplot()
    length = len(strongest)
    limit = float(np.quantile(np.abs(strongest), 0.995)) or 1.0
    box = (0.5, length + 0.5, length + 0.5, 0.5)
    axes.imshow(signed(strongest, limit), extent=box, interpolation="nearest")
    tidy(axes, "column", "column", grid="")
    for spine in axes.spines.values():
        spine.set_visible(True)
    _signed_bar(figure, [axes], limit, "epistasis (nats)")


def agreement_map(figure: Figure, family: np.ndarray, drawn: np.ndarray, words: str) -> None:
    """Draw statistics of drawn sequences against the family's, as the density of points, dark where there are many."""
    axes = figure.add_subplot()
    low, high = float(min(family.min(), drawn.min())), float(max(family.max(), drawn.max()))
    pad = 0.03 * (high - low) or 0.01
    edges = np.linspace(low - pad, high + pad, 121)
    counts = np.histogram2d(drawn, family, [edges, edges])[0]
    amount = np.where(counts > 0, 0.4 + 0.6 * np.log1p(counts) / np.log1p(counts.max()), 0.0)
    box = (edges[0], edges[-1], edges[0], edges[-1])
    axes.plot(edges[[0, -1]], edges[[0, -1]], color=colour("muted"), linewidth=0.8, zorder=0)
    axes.imshow(signed(amount, 1.0), extent=box, origin="lower", interpolation="nearest", aspect="equal")
    tidy(axes, f"{words}, family", "drawn sequences", grid="both")


def energy_traces(figure: Figure, trace: np.ndarray, family: float | None) -> None:
    """Draw mean energies of chains from two kinds of starts over their sweeps."""
    axes = figure.add_subplot()
    sweeps = np.arange(1, len(trace) + 1)
    for k, (shade, words) in enumerate((("samples", "from independent columns"), ("data", "from the family"))):
        if np.isnan(trace[:, k]).all():
            continue
        axes.plot(sweeps, trace[:, k], color=colour(shade), linewidth=1.2)
        axes.annotate(
            words, (0.97, 0.93 - 0.09 * k), xycoords="axes fraction", ha="right", color=colour(shade), fontsize=8
        )
    if family is not None:
        axes.axhline(family, color=colour("held"), linewidth=0.9, linestyle="--")
        axes.annotate(
            "mean of the family", (0.97, 0.75), xycoords="axes fraction", ha="right", color=colour("held"), fontsize=8
        )
    axes.set_xlim(1, len(trace))
    tidy(axes, "sweep", "mean energy (nats)")
