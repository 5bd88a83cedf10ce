"""Figures of landscapes: Ramachandran maps, and free energies along one torsion with their bands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from gibbsian.molecules.landscape import Band, cell_centres
from gibbsian.report.canvas import colour, svg, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPTH = 25.0
"""kJ/mol above the lowest point at which maps end."""

STEP = 5.0
"""kJ/mol between contours."""


def ramachandran_svg(name: str, label: str, free: Tensor, width: float = 3.3) -> str:
    """Draw a free-energy surface in kJ/mol over phi and psi, lowest darkest.

    Parameters
    ----------
    name
        Unique in the page.
    label
        What it is the map of, for readers who do not see it.
    free
        In kJ/mol, ``(bins, bins)``, phi along the first axis, infinite where nothing is.
    width
        In inches.
    """
    return svg(name, f"Ramachandran map of {label}.", lambda f: paint_map(f.add_subplot(), free), width, 0.94 * width)


def paint_map(axes: Axes, free: Tensor) -> None:
    """Draw a free-energy surface into axes, with contours every `STEP` kJ/mol."""
    from matplotlib.colors import to_rgb

    f = free.numpy().T
    depth = np.clip(1.0 - np.where(np.isfinite(f), f, DEPTH) / DEPTH, 0.0, 1.0)
    picture = np.zeros((*depth.shape, 4))
    picture[..., :3] = to_rgb(colour("data"))
    picture[..., 3] = depth
    axes.imshow(picture, extent=(-180, 180, -180, 180), origin="lower", aspect="equal", interpolation="nearest")
    at = np.degrees(cell_centres(len(f)).numpy())
    levels = np.arange(STEP, DEPTH, STEP)
    lines = axes.contour(at, at, np.where(np.isfinite(f), f, 2 * DEPTH), levels, colors=[colour("ink")], linewidths=0.6)
    axes.clabel(lines, levels[::2], fmt="%d", fontsize=6.5)
    axes.axvline(0.0, color=colour("line"), linewidth=0.7)
    tidy(axes, "φ (degrees)", "ψ (degrees)", grid="")
    axes.set_xticks(range(-180, 181, 90))
    axes.set_yticks(range(-180, 181, 90))
    for spine in axes.spines.values():
        spine.set_visible(True)


def profile_svg(
    name: str, torsion: str, learned: Band, frames: Band, width: float = 4.2, reference: Band | None = None
) -> str:
    """Draw free energies in kJ/mol along one torsion: learned, by the frames, and by a reference, with their bands."""

    def paint(figure: Figure) -> None:
        paint_profile(figure.add_subplot(), torsion, learned, frames, reference)

    return svg(name, f"Free energy along {torsion}, learned and by the frames.", paint, width, 0.66 * width)


def paint_profile(axes: Axes, torsion: str, learned: Band, frames: Band, reference: Band | None = None) -> None:
    """Draw profiles into axes."""
    at = np.degrees(cell_centres(len(learned.value)).numpy())
    shown = [("frames", frames, "data"), ("learned", learned, "samples")]
    shown = shown if reference is None else [("reference", reference, "held"), *shown]
    top = 0.0
    for label, band, shade in shown:
        value, low, high = (_shown(v) for v in (band.value, band.lower, band.upper))
        axes.fill_between(at, low, high, color=colour(shade), alpha=0.2, linewidth=0)
        axes.plot(at, value, color=colour(shade), label=label, linewidth=1.6 if label == "learned" else 1.2)
        top = max(top, float(np.nanmax(value)))
    tidy(axes, f"{torsion} (degrees)", "free energy (kJ/mol)")
    axes.set_xlim(-180, 180)
    axes.set_xticks(range(-180, 181, 60))
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.25 * top)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def _shown(values: Tensor) -> np.ndarray:
    """As an array, with NaN where nothing is."""
    array = values.numpy()
    return np.where(np.isfinite(array), array, np.nan)
