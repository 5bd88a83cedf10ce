"""Figures of how chains mix: traces, ranks, autocorrelations.

Each takes the `Samples` of a run, or draws ``(draws, chains, *event)``, and returns a matplotlib figure of its own,
which pyplot does not know: save it with ``figure.savefig``, or let a notebook show it. Of many coordinates the worst
are shown; of many chains a few, over a band that holds nine tenths of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gibbsian.diagnostics.chains import autocorrelation, effective_sample_size, split_chains, split_r_hat
from gibbsian.diagnostics.estimate import plain
from gibbsian.diagnostics.summary import R_HAT_LIMIT, enough
from gibbsian.errors import OptionError, ShapeError
from gibbsian.report.canvas import colour, styled, tidy
from gibbsian.report.curves import curve_limits
from gibbsian.samples import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 6
"""So many chains are drawn one by one; of more, `SHOWN` over a band."""

SHOWN = 3
STYLES = (("data", "-"), ("samples", "-"), ("held", "--"), ("other", "-."), ("rose", "--"), ("noise", "-."))
"""Colour and dash of chains, told apart without colours too."""


class Coordinate(NamedTuple):
    """One panel.

    Attributes
    ----------
    name
        As in a summary: ``x[3]``.
    draws
        ``(draws, chains)``, float64.
    r_hat, ess
        Of these draws.
    """

    name: str
    draws: Tensor
    r_hat: float
    ess: float


def trace_figure(
    samples: Samples | Tensor, coordinates: Sequence[int | tuple[int, ...]] | None = None, *, most: int = 4
) -> Figure:
    """Draw coordinates over the draws, with their histograms: good chains cannot be told apart.

    Parameters
    ----------
    samples
        A run with draws, or draws ``(draws, chains, *event)``.
    coordinates
        Which, as places in the event; the ones with the smallest effective sample sizes when left out.
    most
        Coordinates to show when none are named.

    Raises
    ------
    OptionError, ShapeError
        If there are no draws, fewer than four, or no such coordinate.
    """
    from matplotlib.figure import Figure

    chosen = _chosen(samples, coordinates, most)
    with styled():
        figure = Figure(figsize=(7.4, 0.75 + 1.45 * len(chosen)), layout="constrained")
        rows = figure.subplots(len(chosen), 2, squeeze=False, sharex="col", sharey="row", width_ratios=[5, 1])
        for c, (axes, side) in zip(chosen, rows):
            _trace(axes, side, c)
            _title(axes, c)
        for axes, side in rows[:-1]:
            axes.set_xlabel("")
            side.set_xlabel("")
        _key(figure, rows[0][0])
    return figure


def rank_figure(
    samples: Samples | Tensor,
    coordinates: Sequence[int | tuple[int, ...]] | None = None,
    *,
    most: int = 4,
    bins: int = 20,
) -> Figure:
    """Draw how each chain's draws rank among all: even when the chains agree.

    A chain with more than its share of low ranks sits too low; one with too many at both ends is too wide. The grey
    band is two standard errors of a chain that agrees, given how many independent draws it holds. Of many chains
    those furthest from even are shown: some of many always leave the band. A single chain is compared by its halves.

    Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021)
    <https://doi.org/10.1214/20-BA1221>

    Parameters
    ----------
    samples, coordinates, most
        As in `trace_figure`.
    bins
        Of the histograms, 2 or more.

    Raises
    ------
    OptionError, ShapeError
        If there are no draws, fewer than four, no such coordinate, or too few bins.
    """
    if bins < 2:
        raise OptionError(f"bins is 2 or more; got {bins}.")
    chosen = _chosen(samples, coordinates, most)
    with styled():
        figure, panels = _panels(len(chosen))
        for c, axes in zip(chosen, panels):
            _ranks(axes, c, bins)
            _title(axes, c)
        _key(figure, panels[0])
    return figure


def autocorrelation_figure(
    samples: Samples | Tensor,
    coordinates: Sequence[int | tuple[int, ...]] | None = None,
    *,
    most: int = 4,
    lags: int | None = None,
) -> Figure:
    """Draw how draws remember earlier ones: the sooner at zero, the more each is worth.

    Parameters
    ----------
    samples, coordinates, most
        As in `trace_figure`.
    lags
        Lags to show, below the number of draws; about five times the autocorrelation time when left out.

    Raises
    ------
    OptionError, ShapeError
        If there are no draws, fewer than four, no such coordinate, or no such lag.
    """
    chosen = _chosen(samples, coordinates, most)
    n = len(chosen[0].draws)
    if lags is not None and not 1 <= lags < n:
        raise OptionError(f"lags lies between 1 and {n - 1}, one below the number of draws; got {lags}.")
    with styled():
        figure, panels = _panels(len(chosen))
        for c, axes in zip(chosen, panels):
            _memory(axes, c, lags)
            _title(axes, c)
        _key(figure, panels[0])
    return figure


def _chosen(
    samples: Samples | Tensor, coordinates: Sequence[int | tuple[int, ...]] | None, most: int
) -> list[Coordinate]:
    draws = samples.draws if isinstance(samples, Samples) else samples
    if draws is None:
        raise OptionError("A figure needs draws, and this run kept none; use sample(..., thin=1).")
    if draws.ndim < 2 or len(draws) < 4:
        raise ShapeError(f"A figure needs four draws or more, (draws, chains, *event); got {tuple(draws.shape)}.")
    if most < 1 or (coordinates is not None and not len(coordinates)):
        raise OptionError(f"A figure shows one coordinate or more; got most={most} and coordinates={coordinates}.")
    shape = tuple(draws.shape[2:])
    flat = draws.detach().cpu().reshape(*draws.shape[:2], -1).to(torch.float64)
    places = _worst(flat, most) if coordinates is None else [_place(c, shape) for c in coordinates]
    shown = flat[:, :, places]
    found = []
    for i, (r_hat, ess) in enumerate(zip(split_r_hat(shown).tolist(), effective_sample_size(shown).tolist())):
        where = np.unravel_index(places[i], shape) if shape else ()
        name = f"x[{','.join(str(int(j)) for j in where)}]" if shape else "x"
        found.append(Coordinate(name, shown[:, :, i], r_hat, ess))
    return found


def _worst(flat: Tensor, most: int) -> list[int]:
    if flat.shape[2] <= most:
        return list(range(flat.shape[2]))
    # In parts, as the effective sizes of a large event hold several copies of its draws.
    width = max(1, (1 << 23) // (flat.shape[0] * flat.shape[1]))
    ess = torch.cat([effective_sample_size(part) for part in flat.split(width, dim=2)])
    return sorted(ess.nan_to_num(math.inf).argsort(stable=True)[:most].tolist())


def _place(where: int | tuple[int, ...], shape: tuple[int, ...]) -> int:
    place = (where,) if isinstance(where, int) else tuple(where)
    if len(place) != len(shape) or not all(0 <= i < size for i, size in zip(place, shape)):
        raise OptionError(f"There is no coordinate {list(place)} in events of shape {shape}.")
    return int(np.ravel_multi_index(place, shape)) if shape else 0


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.7 * columns + 0.4 * (columns == 1), 0.6 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for spare in grid.flat[count:]:
        spare.set_axis_off()
    return figure, list(grid.flat[:count])


def _title(axes: Axes, c: Coordinate) -> None:
    r_hat = f"{c.r_hat:.3f}" if c.r_hat < 1000 else plain(c.r_hat, 3)
    ess = plain(round(c.ess) if math.isfinite(c.ess) else c.ess, 4)
    axes.set_title(c.name, loc="left", fontsize=9.5, color=colour("ink"), fontweight="bold")
    bad = not (c.r_hat <= R_HAT_LIMIT and c.ess >= enough(c.draws.shape[1]))
    axes.set_title(f"R-hat {r_hat}   ESS {ess}", loc="right", fontsize=8, color=colour("bad" if bad else "muted"))


def _key(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(handles), frameon=False, handlelength=1.6)


def _few(values: np.ndarray) -> list[int]:
    """All of a few chains; of many, those with the lowest, the middle and the highest value."""
    if len(values) <= FEW:
        return list(range(len(values)))
    order = np.argsort(values, kind="stable")
    return [int(order[i]) for i in (0, len(order) // 2, len(order) - 1)]


def _band(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Shade the middle nine tenths of many curves, ``(points, chains)``."""
    low, high = np.nanquantile(y, [0.05, 0.95], axis=1)
    label = f"nine tenths of {plain(y.shape[1])} chains"
    axes.fill_between(x, low, high, color=colour("noise"), alpha=0.28, linewidth=0, label=label)


def _trace(axes: Axes, side: Axes, c: Coordinate) -> None:
    y = np.where(np.isfinite(c.draws.numpy()), c.draws.numpy(), np.nan)
    # A screen is some thousand points wide.
    stride = max(1, len(y) // 2000)
    x = np.arange(1, len(y) + 1)
    seen = y[np.isfinite(y)]
    if not len(seen):
        _say(axes, "no draw is finite")
        return
    if y.shape[1] > FEW:
        alive = ~np.isnan(y).all(axis=1)
        _band(axes, x[alive][::stride], y[alive][::stride])
    means = np.array([v[np.isfinite(v)].mean() if np.isfinite(v).any() else -np.inf for v in y.T])
    words = ("lowest", "middle", "highest") if y.shape[1] > FEW else ("",) * FEW
    shown = _few(means)
    edges = np.linspace(*_trace_limits(seen, y[:, shown]), int(np.clip(2.5 * len(y) ** (1 / 3), 12, 40)))
    side.hist(seen, edges.tolist(), density=True, orientation="horizontal", color=colour("noise"), alpha=0.28)
    for chain, (shade, dash), word in zip(shown, STYLES, words):
        label = f"{word} mean" if word else f"chain {chain}"
        axes.plot(x[::stride], y[::stride, chain], color=colour(shade), linewidth=0.7, alpha=0.85, label=label)
        own = y[np.isfinite(y[:, chain]), chain]
        if len(own):
            heights = np.histogram(own, edges, density=True)[0]
            look = {"color": colour(shade), "linestyle": dash, "linewidth": 1.0}
            side.stairs(heights, edges, baseline=None, orientation="horizontal", **look)
    axes.set_ylim(edges[0], edges[-1])
    axes.set_xlim(1, len(y))
    tidy(axes, "draw")
    tidy(side, "density", grid="")
    side.set_xticks([])
    side.spines["bottom"].set_visible(False)


def _trace_limits(seen: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
    """Room for the chains shown, but no more than heavy tails leave to the bulk."""
    low, high = np.quantile(seen, [0.05, 0.95])
    width = high - low
    if not width:
        return curve_limits(seen)
    bottom, top = max(np.nanmin(shown), low - 1.5 * width), min(np.nanmax(shown), high + 1.5 * width)
    bottom, top = min(bottom, low), max(top, high)
    return float(bottom - 0.04 * (top - bottom)), float(top + 0.04 * (top - bottom))


def _own_ess(draws: Tensor) -> float:
    """Independent draws in all chains together, each taken by itself: whatever they make of each other."""
    if len(draws) < 4:
        return math.nan
    return float(effective_sample_size(draws - draws.median(dim=0).values))


def _ranks(axes: Axes, c: Coordinate, bins: int) -> None:
    from scipy.stats import rankdata

    tidy(axes, "rank among all draws (0 lowest, 1 highest)", "times the even share")
    if not bool(c.draws.isfinite().all()):
        _say(axes, "draws that are not finite have no rank")
        return
    halved = c.draws.shape[1] == 1
    draws = split_chains(c.draws) if halved else c.draws
    n, chains = draws.shape
    ranks = (rankdata(draws.numpy()).reshape(n, chains) - 0.5) / (n * chains)
    edges = np.linspace(0, 1, bins + 1)
    counts = np.stack([np.histogram(v, edges)[0] for v in ranks.T], axis=1)
    # Tied draws share a middle rank: what is uneven in all chains alike is no chain's fault.
    even = counts.mean(axis=1, keepdims=True)
    heights = np.divide(counts, even, out=np.ones_like(even * counts), where=even > 0)
    own = _own_ess(draws) / chains
    if math.isfinite(own):
        share = np.clip(even[:, 0] / n, 1e-12, 1.0)
        error = 2 * np.sqrt((1 - share) / (share * own) * (1 - 1 / chains))
        axes.stairs(1 + error, edges, baseline=np.maximum(1 - error, 0), fill=True, color=colour("line"), alpha=0.8)
    axes.axhline(1, color=colour("muted"), linewidth=0.8, linestyle=(0, (3, 2)))
    shown = (
        list(range(chains)) if chains <= FEW else np.square(heights - 1).sum(axis=0).argsort()[::-1][:SHOWN].tolist()
    )
    if chains > FEW:
        low, high = (np.quantile(heights, q, axis=1) for q in (0.05, 0.95))
        label = f"nine tenths of {plain(chains)} chains"
        axes.stairs(high, edges, baseline=low, fill=True, color=colour("noise"), alpha=0.4, label=label)
    names = ["first half", "second half"] if halved else [f"chain {chain}" for chain in shown]
    names = names if chains <= FEW else ["furthest from even", "second", "third"]
    for chain, (shade, dash), name in zip(shown, STYLES, names):
        axes.stairs(
            heights[:, chain], edges, baseline=None, color=colour(shade), linestyle=dash, linewidth=1.2, label=name
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(2.0, 1.08 * float(heights[:, shown].max())))


def _memory(axes: Axes, c: Coordinate, lags: int | None) -> None:
    n, chains = c.draws.shape
    tidy(axes, "lag (draws)", "autocorrelation")
    rho = autocorrelation(c.draws).numpy()
    moving = np.isfinite(rho[0])
    if not moving.any():
        _say(axes, "chains that never move, or are not finite")
        return
    if lags is None:
        ess = _own_ess(c.draws[:, torch.as_tensor(moving)])
        tau = n * int(moving.sum()) / ess if math.isfinite(ess) else 10.0
        # Beyond half of the draws there is only noise.
        lags = min(n - 1, max(20, min(math.ceil(5 * tau), n // 2)))
    x, rho = np.arange(lags + 1), rho[: lags + 1]
    error = 2 / math.sqrt(n)
    axes.axhspan(-error, error, color=colour("line"), alpha=0.8, linewidth=0)
    if chains > FEW:
        _band(axes, x, rho[:, moving])
    else:
        for chain, (shade, dash) in zip(range(chains), STYLES):
            axes.plot(x, rho[:, chain], color=colour(shade), linestyle=dash, linewidth=0.9, label=f"chain {chain}")
    if chains > 1:
        axes.plot(x, rho[:, moving].mean(axis=1), color=colour("ink"), linewidth=1.6, label="mean of chains")
    axes.axhline(0, color=colour("muted"), linewidth=0.8)
    axes.set_xlim(0, lags)
    lowest = np.quantile(rho[:, moving], 0.05, axis=1).min() if chains > FEW else rho[:, moving].min()
    axes.set_ylim(min(-0.2, 1.1 * float(lowest)), 1.02)


def _say(axes: Axes, text: str) -> None:
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=colour("bad"), fontsize=8, wrap=True
    )
