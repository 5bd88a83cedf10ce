"""The section on a Boltzmann machine: what its hidden units look for, its couplings' spectrum, and pairs of units.

What was learned is seen in the couplings' singular values: those of random weights end where the largest of the start
was, and what was learned stands out above it, one direction at a time. `Spectral dynamics of learning in restricted
Boltzmann machines (Decelle, Fissore & Furtlehner, 2017) <https://arxiv.org/abs/1708.02917>`_.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gibbsian.diagnostics.estimate import plain
from gibbsian.energies.boltzmann import RBM
from gibbsian.report import markup
from gibbsian.report.canvas import colour, png, shorten, svg, tidy
from gibbsian.report.content import MachineSummary, ReportContent
from gibbsian.report.markup import figure, image, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILTERS = 100
"""Hidden units shown at most, those with the strongest couplings."""

IDLE = 0.01
"""A unit that is on, or off, in a smaller part of the rows than this tells next to nothing of a row."""

PAIRS = 1500
"""Pairs of visible units shown at most."""

ROWS = 10_000
"""Rows that activities and covariances are taken over, at most."""

NAMED = 30
"""Columns whose names fit under a heat map."""


@torch.no_grad()
def machine_summary(energy: RBM, first: RBM, train: Tensor, samples: Tensor) -> MachineSummary:
    """Gather what the section shows.

    Parameters
    ----------
    energy, first
        The machine, and as it was before training.
    train, samples
        Rows in model units, ``(n, *event)``.
    """
    rows, drawn = train[:ROWS], samples[:ROWS]
    i, j = torch.triu_indices(energy.visible.size, energy.visible.size, 1)
    chosen = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))[:PAIRS]  # for the eye only
    pairs = [_covariances(x.flatten(1), i[chosen], j[chosen]).numpy() for x in (rows, drawn)]
    return MachineSummary(
        energy.weight.T.numpy(),
        torch.linalg.svdvals(energy.weight.double()).numpy(),
        torch.linalg.svdvals(first.weight.double()).numpy(),
        energy.hidden_given(rows).mean(0).numpy(),
        (pairs[0], pairs[1]),
    )


def _covariances(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Covariances of pairs of columns."""
    z = (x - x.mean(0)).double().T
    return torch.cat([(z[a] * z[b]).mean(1) for a, b in zip(i.split(100), j.split(100))])


def couplings(content: ReportContent) -> str:
    """Show the machine's filters, spectrum and pairs."""
    summary = content.machine
    if summary is None:
        return ""
    activity = summary.activity
    idle = int(((activity < IDLE) | (activity > 1 - IDLE)).sum())
    learned = int((summary.spectrum > summary.first_spectrum.max()).sum())
    facts = {
        "Hidden units": plain(len(activity)),
        "On, of the rows and units": f"{float(activity.mean()):.0%}",
        f"On or off in all but {IDLE:.0%} of the rows": f"{plain(idle)} units",
        "Directions learned": f"{learned} of {len(summary.spectrum)} singular values",
    }
    small = [
        figure(
            "Spectrum of the couplings",
            markup.legend({"trained": "data", "before training": "noise"})
            + spectrum("spectrum", summary.spectrum, summary.first_spectrum),
            f"Singular values of the couplings, by rank. {learned} lie above the largest of the random start: "
            "directions that training found. Bad: none do, or a few tower over all others.",
        ),
        figure(
            "Covariances of pairs of units",
            covariances("pairs", *summary.covariances),
            f"One dot for each of {plain(len(summary.covariances[0]))} pairs, chosen at random. They should lie on the "
            "line: flat is a model that misses what ties the units together.",
        ),
    ]
    return markup.definitions(facts) + _filters(content, summary) + panels(small)


def _filters(content: ReportContent, summary: MachineSummary) -> str:
    """Draw the couplings of the strongest hidden units, as pictures where rows are such, else as a heat map."""
    order = np.argsort(-np.linalg.norm(summary.weight, axis=1), kind="stable")
    words = (
        f"Couplings of the {{}} of {plain(len(order))} hidden units with the strongest ones, strongest first. A unit "
        "is on for rows with ones where it is orange and zeros where it is blue. One scale for all. Bad: noise, or "
        "many alike."
    )
    if content.kind == "image":
        shown = summary.weight[order[:FILTERS]]
        columns = min(len(shown), 20)
        shape = content.event_shape
        tiles = shown.reshape(len(shown), *shape).mean(1)
        picture = image(filter_grid(tiles, columns), f"Couplings of {len(shown)} hidden units as pictures.")
        return figure("Filters", picture, words.format(len(shown)))
    shown = summary.weight[order[: min(FILTERS, 60)]]
    names = content.column_names(shown.shape[1])
    drawn = markup.fitted(lambda size, width: heat_map(f"filters-{size}", shown, names, width))
    return figure("Filters", drawn, words.format(len(shown)), "wide")


def signed(values: np.ndarray, limit: float) -> np.ndarray:
    """Colour signed values by bytes, ``(..., 4)``: orange above zero, blue below, and clear at zero.

    Parameters
    ----------
    values
        Any shape.
    limit
        The magnitude of full colour.
    """
    amount = np.clip(np.abs(values) / max(limit, 1e-12), 0.0, 1.0)
    pixels = np.zeros((*values.shape, 4), dtype=np.uint8)
    for name, where in (("samples", values >= 0), ("data", values < 0)):
        pixels[where, :3] = [int(colour(name)[i : i + 2], 16) for i in (1, 3, 5)]
    pixels[..., 3] = np.round(255 * amount)
    return pixels


def strong(values: np.ndarray) -> float:
    """Full colour's magnitude: what all but a few reach at most."""
    return float(np.quantile(np.abs(values), 0.995))


def filter_grid(tiles: np.ndarray, columns: int) -> str:
    """Tile couplings ``(n, h, w)`` into one PNG, each in a frame."""
    n, h, w = tiles.shape
    rows, limit = -(-n // columns), strong(tiles)
    sheet = np.zeros((rows * (h + 1) + 1, columns * (w + 1) + 1, 4), dtype=np.uint8)
    for i in range(n):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        sheet[top : top + h + 2, left : left + w + 2] = (128, 128, 128, 90)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (h + 1) + 1, i % columns * (w + 1) + 1
        sheet[top : top + h, left : left + w] = signed(tile, limit)
    return png(sheet)


def heat_map(name: str, weight: np.ndarray, columns: Sequence[str], width: float) -> str:
    """Draw couplings, hidden units ``(m, d)`` by columns."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.imshow(signed(weight, strong(weight)), aspect="auto", interpolation="nearest")
        tidy(axes, "" if len(columns) <= NAMED else "column", "hidden unit, by strength", grid="")
        axes.set_yticks([])
        if len(columns) <= NAMED:
            axes.set_xticks(range(len(columns)), [shorten(c, 12) for c in columns], rotation=90)
        for spine in axes.spines.values():
            spine.set_visible(True)

    alt = f"Heat map of the couplings of {len(weight)} hidden units to {len(columns)} columns."
    return svg(name, alt, paint, width, 3.2)


def spectrum(name: str, end: np.ndarray, start: np.ndarray) -> str:
    """Draw singular values by rank, on a logarithmic scale, those of the start beside those of the end."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        rank = np.arange(1, len(end) + 1)
        floor = max(1e-6 * float(end.max()), 1e-12)
        axes.semilogy(rank, np.maximum(end, floor), color=colour("data"), marker="o", markersize=2.2, linewidth=1.0)
        axes.semilogy(rank, np.maximum(start, floor), color=colour("noise"), linewidth=1.2)
        tidy(axes, "rank", "singular value")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    alt = (
        f"Singular values of the couplings by rank, {end.max():.3g} to {end.min():.3g}; {start.max():.3g} at the start."
    )
    return svg(name, alt, paint, 3.3, 2.6)


def covariances(name: str, data: np.ndarray, samples: np.ndarray) -> str:
    """Draw the covariances of pairs in samples against those in the data."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = np.array([min(data.min(), samples.min()), max(data.max(), samples.max())])
        axes.plot(ends, ends, color=colour("muted"), linewidth=0.8)
        axes.scatter(data, samples, s=4, color=colour("samples"), alpha=0.5, linewidths=0, rasterized=True)
        tidy(axes, "in the data", "in the samples", grid="both")

    alt = f"Covariances of {len(data)} pairs of units, in samples against in the data."
    return svg(name, alt, paint, 3.3, 2.6)
