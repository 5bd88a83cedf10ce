"""From matplotlib to inline SVG that follows the page's colours.

Figures are drawn in the light palette; each colour in the SVG is then replaced by a CSS variable, so that one figure
serves light, dark and print. matplotlib's global settings are left as they were.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "ink": ("#1d2430", "#e8ebf0"),
    "muted": ("#5c6675", "#a2acba"),
    "line": ("#e3e6ea", "#303742"),
    "card": ("#fefefe", "#1a1e25"),
    "data": ("#2f6db3", "#74aeee"),
    "samples": ("#d26a1e", "#f39a55"),
    "held": ("#2a8c7b", "#5cc4b0"),
    "noise": ("#868e9b", "#8f98a6"),
    "other": ("#8257ab", "#b896dd"),
    "rose": ("#b3446c", "#e58aa8"),
    "good": ("#23754a", "#6fcf97"),
    "caution": ("#8f5b00", "#f0b452"),
    "bad": ("#b3261e", "#ff8a80"),
    "page": ("#f6f7f8", "#12151a"),
}
"""Name to the colour in light and in dark."""

_SERIES = {
    "data": "data",
    "training": "data",
    "train": "data",
    "held-out": "held",
    "held-out data": "held",
    "held_out": "held",
    "samples": "samples",
    "noise": "noise",
}


def colour(name: str) -> str:
    """Return the light colour of a palette name."""
    return PALETTE[name][0]


def series_colour(name: str, place: int = 0) -> str:
    """Return the colour of a set by its name; unknown names take turns."""
    return colour(_SERIES.get(name, ("other", "rose", "noise", "held")[(place - 2) % 4]))


@contextmanager
def styled(name: str = "gibbsian") -> Iterator[None]:
    """Draw in the report's style, whatever a user's own matplotlibrc says, and give that back afterwards.

    Parameters
    ----------
    name
        Salts the ids of an SVG.
    """
    import matplotlib.style

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 8.5,
        "text.color": colour("ink"),
        "axes.labelcolor": colour("muted"),
        "axes.edgecolor": colour("line"),
        "axes.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "xtick.color": colour("line"),
        "ytick.color": colour("line"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
        "xtick.major.pad": 5.5,
        "ytick.major.pad": 4.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "lines.linewidth": 1.5,
        "figure.dpi": 160,
    }
    with matplotlib.style.context(["default", settings]):
        yield


def svg(name: str, alt: str, paint: Callable[[Figure], None], width: float = 4.2, height: float = 2.9) -> str:
    """Draw one figure and return it as an ``<svg>`` element.

    Parameters
    ----------
    name
        Unique in the page; prefixes every id.
    alt
        What a reader who cannot see it should know.
    paint
        Draws into an empty figure.
    width, height
        In inches of 96 pixels at scale 1.
    """
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with styled(name), warnings.catch_warnings():
        # The browser draws the text, with fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata=nothing)
    return _inline(buffer.getvalue(), name, alt)


def _inline(text: str, name: str, alt: str) -> str:
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', body)
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(alt)}">'
    body = head + body[body.index(">") + 1 :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"font: ([^;\"]*?)([\d.]+px)[^;\"]*", r"font-size: \2", body)
    body = re.sub(r"font-family:[^;\"]*;?", "", body)
    for variable, (light, _) in PALETTE.items():
        body = body.replace(f": {light}", f": var(--{variable})")
    return re.sub(r">\s+<", "><", body)


def png(pixels: np.ndarray) -> str:
    """Encode ``(h, w, 4)`` bytes as a data address.

    Parameters
    ----------
    pixels
        RGBA, uint8.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def tidy(axes: Axes, xlabel: str = "", ylabel: str = "", grid: str = "y") -> None:
    """Give axes the report's look."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=colour("line"), linewidth=0.7)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def shorten(name: str, most: int = 17) -> str:
    """Cut a long name for an axis."""
    return name if len(name) <= most else name[: most - 1] + "…"


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart to at least ``gap``, keeping their order, within ``low`` and ``high`` where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    ceiling = high
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    floor = low
    for i in order:
        moved[i] = max(moved[i], floor)
        floor = moved[i] + gap
    return moved
