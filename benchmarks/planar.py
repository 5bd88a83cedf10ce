"""Planar targets under chains: their density in greys, the walk of one chain step by step, its path, and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

import gibbsian as gb
from gibbsian.kernels.hmc import leapfrog
from gibbsian.report.canvas import colour

MASSES = (0.99, 0.9, 0.7, 0.5, 0.3)
GREYS = ("#f1f3f6", "#e4e7ec", "#d5dae1", "#c5ccd5", "#b3bcc8")
CLOCK = LinearSegmentedColormap.from_list("clock", ["#8fc1f2", "#2f6db3", "#0b2143"])


@dataclass(frozen=True)
class Scene:
    """A target and how to look at it: its box, the length of its narrow direction, and where a chain starts."""

    name: str
    energy: gb.Energy
    box: tuple[float, float, float, float]
    length: float
    start: tuple[float, float]


def density(scene: Scene, points: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axes and density of a target on its box, summing to 1."""
    left, right, low, high = scene.box
    x, y = torch.linspace(left, right, points), torch.linspace(low, high, points)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    with torch.no_grad():
        logs = -torch.cat([scene.energy(part) for part in grid.split(8192)]).double()
    return x.numpy(), y.numpy(), logs.softmax(0).reshape(points, points).numpy()


def shade(axes: Axes, scene: Scene, lines: bool = False) -> None:
    """Draw the regions of highest density, filled or as outlines, and frame the box."""
    x, y, p = density(scene)
    ranked = np.sort(p, axis=None)[::-1]
    levels = [ranked[np.searchsorted(ranked.cumsum(), mass)] for mass in MASSES]
    if lines:
        axes.contour(x, y, p, levels=[levels[0], levels[1], levels[3]], colors=colour("ink"), linewidths=0.6)
    else:
        axes.contourf(x, y, p, levels=[*levels, p.max() * 1.01], colors=GREYS)
    frame(axes, scene)


def frame(axes: Axes, scene: Scene) -> None:
    """Show exactly the box, both axes at one scale, without ticks."""
    axes.set(xlim=scene.box[:2], ylim=scene.box[2:], xticks=[], yticks=[], aspect="equal")


def corner(axes: Axes, text: str) -> None:
    """Write into the lower right corner, on a ground that keeps it legible."""
    ground = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
    axes.text(0.97, 0.035, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5, bbox=ground)


@dataclass(frozen=True)
class Step:
    """One step of one chain: points from start to end (those of a trajectory between them) and whether it moved."""

    points: Tensor
    grad: Tensor
    noise: tuple[Tensor, ...]
    moved: bool
    acceptance: float


class Counted:
    """An energy that counts its evaluations, whatever kernel asks for them."""

    def __init__(self, energy: gb.Energy) -> None:
        self.energy, self.count = energy, 0

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate, and count the rows."""
        self.count += len(x)
        return self.energy(x)


def walk(scene: Scene, kernel: gb.Kernel, budget: int, rng: torch.Generator) -> Iterator[Step]:
    """Step one chain from the scene's start until so many gradients are spent, the start's not counted."""
    energy = Counted(scene.energy)
    state = kernel.init(energy, torch.tensor([scene.start]))
    while energy.count <= budget:
        noise = tuple(z[0] for z in kernel.noise(state, 1, rng))
        new, info = kernel.step(energy, state, noise)
        places = [state.x, new.x]
        if isinstance(kernel, gb.HMC) and kernel.jitter is None:
            on, v, places = state, noise[0], [state.x]
            for _ in range(kernel.leapfrog):
                on, v = leapfrog(scene.energy, on, v, kernel.step_size, 1, kernel.scale)
                places.append(on.x)
        moved = not torch.equal(new.x, state.x)
        yield Step(torch.cat(places), state.grad, noise, moved, float(info.acceptance))
        state = new


def draw_path(axes: Axes, steps: list[Step], width: float = 0.8) -> None:
    """Draw a chain from light to dark, with a dot where it stood still, the larger the longer."""
    pieces, times = [], []
    stays: dict[tuple[float, ...], int] = {}
    for i, step in enumerate(steps):
        if step.moved:
            places = step.points.numpy()
            pieces += list(np.stack((places[:-1], places[1:]), axis=1))
            times += [i / len(steps)] * (len(places) - 1)
            if len(places) > 2:
                axes.scatter(*places[-1], s=5, color=CLOCK(times[-1]), linewidth=0, zorder=3)
        else:
            place = tuple(step.points[0].tolist())
            stays[place] = stays.get(place, 0) + 1
    path = LineCollection(pieces, colors=CLOCK(times), linewidths=width, capstyle="round", joinstyle="round")
    axes.add_collection(path, autolim=False)
    if stays:
        sizes = [3.0 * count for count in stays.values()]
        axes.scatter(*zip(*stays), s=sizes, color=colour("samples"), edgecolor="white", linewidth=0.25, zorder=3)


def arrow(axes: Axes, start: Tensor, end: Tensor, name: str, width: float = 1.6) -> None:
    """Draw an arrow between two points in a colour of the palette."""
    look = {"arrowstyle": "-|>", "color": colour(name), "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end.tolist(), start.tolist(), arrowprops=look | {"mutation_scale": 9})


def dots(axes: Axes, points: Tensor, size: float, name: str = "ink", **look: Any) -> None:
    """Draw points ``(n, 2)`` in a colour of the palette."""
    axes.scatter(*points.T.tolist(), s=size, color=colour(name), **{"zorder": 4, "linewidth": 0} | look)


def label(axes: Axes, at: Tensor, text: str, shift: tuple[float, float], name: str = "ink") -> None:
    """Write beside a point, ``shift`` points away."""
    side = "left" if shift[0] >= 0 else "right"
    ground = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "boxstyle": "square,pad=0.1"}
    place = {"xytext": shift, "textcoords": "offset points", "ha": side, "va": "center", "bbox": ground}
    axes.annotate(text, at.tolist(), **place, color=colour(name), fontsize=8.5, zorder=6)
