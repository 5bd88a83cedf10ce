"""Pictures of chains on two-dimensional targets, for docs/gallery.md: what kernels do, and what they do wrongly.

Shades of grey are the smallest regions that hold 30, 50, 70, 90 and 99% of a target's mass.

    python benchmarks/gallery.py                     # all figures, into docs/images
    python benchmarks/gallery.py --only steps many   # some
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from common import circumstances, generator, table, write
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import gibbsian as gb
from gibbsian.kernels.hmc import leapfrog
from gibbsian.report.canvas import colour

GRADIENTS = 200
"""Gradient evaluations of each chain of the first figure."""
MASSES = (0.99, 0.9, 0.7, 0.5, 0.3)
GREYS = ("#f1f3f6", "#e4e7ec", "#d5dae1", "#c5ccd5", "#b3bcc8")
CLOCK = LinearSegmentedColormap.from_list("clock", ["#8fc1f2", "#2f6db3", "#0b2143"])
PAPER = LinearSegmentedColormap.from_list("paper", ["#ffffff", "#cfe0f3", "#7fadde", "#2f6db3", "#0b2143"])
STYLE = {
    "font.size": 9.0,
    "text.color": colour("ink"),
    "text.parse_math": False,
    "axes.edgecolor": "#c9ced6",
    "axes.labelcolor": colour("muted"),
    "axes.linewidth": 0.7,
    "axes.titlesize": 10.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.color": "#c9ced6",
    "ytick.color": "#c9ced6",
    "xtick.labelcolor": colour("muted"),
    "ytick.labelcolor": colour("muted"),
}


@dataclass(frozen=True)
class Scene:
    """A target and how to look at it: its box, the length of its narrow direction, and where a chain starts."""

    name: str
    energy: gb.Energy
    box: tuple[float, float, float, float]
    length: float
    start: tuple[float, float]


BANANA = Scene("Rosenbrock", gb.Rosenbrock(a=0.0, b=6.0, temperature=1.5), (-3.1, 3.1, -1.2, 5.0), 0.24, (-1.4, 2.0))
WIDE = Scene("Rosenbrock", gb.Rosenbrock(a=0.0, b=1.5, temperature=1.5), (-2.9, 2.9, -1.9, 3.9), 0.5, (-1.5, 2.3))
PINWHEEL = Scene("Pinwheel", gb.Pinwheel(across=0.15), (-4.0, 4.0, -4.0, 4.0), 0.2, (1.6, 1.4))
EIGHT = Scene("EightGaussians", gb.EightGaussians(), (-4.2, 4.2, -4.2, 4.2), 0.42, (2.8, 0.0))
SCENES = (
    BANANA,
    Scene("TwoMoons", gb.TwoMoons(), (-1.45, 2.45, -1.7, 2.2), 0.12, (-1.0, 0.1)),
    Scene("Ring", gb.Ring(radius=2.0), (-2.9, 2.9, -2.9, 2.9), 0.25, (2.0, 0.0)),
    PINWHEEL,
    EIGHT,
    Scene("DoubleWell", gb.DoubleWell(a=-0.25, b=-3.0), (-3.1, 3.1, -3.1, 3.1), 0.38, (-1.2, 0.0)),
    Scene("Funnel", gb.Funnel(2, scale=1.2), (-4.4, 4.8, -4.6, 4.6), 0.6, (0.0, 0.0)),
)

# Name, and the kernel for a target whose narrow direction has this length.
KERNELS: list[tuple[str, Callable[[float], gb.Kernel]]] = [
    ("RandomWalk", lambda s: gb.RandomWalk(1.4 * s)),
    ("ULA", lambda s: gb.ULA(0.4 * s * s)),
    ("MALA", lambda s: gb.MALA(0.7 * s * s)),
    ("Barker", lambda s: gb.Barker(1.2 * s)),
    ("Underdamped", lambda s: gb.Underdamped(0.5 * s, friction=0.2 / s)),
    ("HMC", lambda s: gb.HMC(0.55 * s, leapfrog=10)),
]


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


def walk(scene: Scene, kernel: gb.Kernel, steps: int, rng: torch.Generator) -> Iterator[Step]:
    """Step one chain from the scene's start."""
    state = kernel.init(scene.energy, torch.tensor([scene.start]))
    for _ in range(steps):
        noise = tuple(z[0] for z in kernel.noise(state, 1, rng))
        between = [state.x]
        if isinstance(kernel, gb.HMC):
            on, v = state, noise[0]
            for _ in range(kernel.leapfrog):
                on, v = leapfrog(scene.energy, on, v, kernel.step_size, 1)
                between.append(on.x)
        new, info = kernel.step(scene.energy, state, noise)
        if not isinstance(kernel, gb.HMC):
            between.append(new.x)
        moved = not torch.equal(new.x, state.x)
        yield Step(torch.cat(between), state.grad, noise, moved, float(info.acceptance))
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


def one_chain_each(seed: int) -> tuple[Figure, dict[str, Any]]:
    """Draw targets by kernels, a single chain in each, all with the same number of gradient evaluations."""
    rows, columns = len(SCENES), len(KERNELS)
    figure = Figure(figsize=(9.0, 9.0 * (rows + 0.45) / (columns + 0.2)))
    grid = figure.subplots(rows, columns)
    figure.subplots_adjust(left=0.035, right=0.995, top=0.935, bottom=0.005, wspace=0.04, hspace=0.04)
    record: dict[str, Any] = {}
    for i, scene in enumerate(SCENES):
        record[scene.name] = {}
        for j, (name, make) in enumerate(KERNELS):
            axes, kernel = grid[i, j], make(scene.length)
            steps = list(walk(scene, kernel, GRADIENTS // kernel.gradients, generator(seed, i, j)))
            shade(axes, scene)
            draw_path(axes, steps)
            if hasattr(kernel, "target_acceptance"):
                record[scene.name][name] = sum(step.acceptance for step in steps) / len(steps)
                corner(axes, f"{record[scene.name][name]:.2f}")
            if i == 0:
                axes.set_title(name, pad=5)
            if j == 0:
                axes.set_ylabel(scene.name, fontsize=10, color=colour("ink"))
    text = (
        f"One chain, {GRADIENTS} gradient evaluations in every panel. Light to dark: time. "
        "Orange: rejected, larger the longer it stood. Number: acceptance."
    )
    figure.text(0.035, 0.982, text, fontsize=8.5, color=colour("muted"), va="center")
    return figure, {"gradients": GRADIENTS, "acceptance": record}


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


def langevin_steps(axes: Axes, rng: torch.Generator) -> tuple[str, str]:
    """Take MALA's steps apart into the gradient's part and the noise."""
    kernel = gb.MALA(0.16)
    told = False
    for i, step in enumerate(walk(WIDE, kernel, 7, rng)):
        start, z = step.points[0], step.noise[0][0]
        middle = start - kernel.step_size * step.grad[0]
        end = middle + (2.0 * kernel.step_size) ** 0.5 * z
        arrow(axes, start, middle, "samples")
        arrow(axes, middle, end, "data" if step.moved else "noise", 1.1)
        dots(axes, start[None], 16)
        if not step.moved:
            dots(axes, end[None], 30, "bad", marker="x", linewidth=1.6)
            if not told:
                label(axes, end, "rejected", (7, 0), "bad")
            told = True
        if i == 0:
            label(axes, start, "start", (-6, 0))
    dots(axes, step.points[-1:], 16)
    return "MALA", "A step down the gradient (orange), then noise (blue).\nA proposal too unlikely to be undone is rejected."


def hmc_steps(axes: Axes, rng: torch.Generator) -> tuple[str, str]:
    """Show three trajectories, each with its first momentum and its leapfrog points."""
    kernel = gb.HMC(0.2, leapfrog=14)
    for i, step in enumerate(walk(WIDE, kernel, 3, rng)):
        axes.plot(*step.points.T.tolist(), color=colour("data"), linewidth=1.2)
        dots(axes, step.points[1:-1], 14, "data", edgecolor="white", linewidth=0.5)
        dots(axes, step.points[[0, -1]], 34)
        arrow(axes, step.points[0], step.points[0] + 0.55 * step.noise[0][0], "samples")
        if i == 0:
            label(axes, step.points[0], "start", (-8, 0))
    return "HMC", "A random push (orange), then a frictionless glide of 14\nleapfrog steps (blue dots), of which only the end is kept."


def barker_steps(axes: Axes, rng: torch.Generator) -> tuple[str, str]:
    """Show the four signs that one normal draw can take, their probabilities, and many proposals from one place."""
    kernel, crowd = gb.Barker(0.6), 500
    start = torch.tensor([[-1.55, 1.3]])
    state = kernel.init(WIDE.energy, start)
    many = kernel.init(WIDE.energy, start.expand(crowd, 2))
    pair = kernel.noise(many, 1, rng)[0][0]
    w = kernel.step_size * pair[:, 0]
    ends = start + torch.where(torch.special.ndtr(pair[:, 1]) < torch.sigmoid(-w * many.grad), w, -w)
    dots(axes, ends, 5, "data", alpha=0.55, zorder=2)
    size = torch.tensor([0.8, 0.75])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    places = start + signs * size
    chances = torch.sigmoid(-signs * size * state.grad).prod(1)
    for a, b in ((0, 1), (1, 3), (3, 2), (2, 0)):
        axes.plot(*places[[a, b]].T.tolist(), color=colour("samples"), linewidth=0.9, linestyle=(0, (4, 3)))
    for place, chance, sign in zip(places, chances, signs):
        dots(axes, place[None], 20 + 160 * float(chance), "samples", edgecolor="white", linewidth=0.8)
        label(axes, place, f"{float(chance):.0%}", (9 * float(sign[0]), 8 * float(sign[1])), "samples")
    arrow(axes, start[0], start[0] - 0.9 * state.grad[0] / state.grad.norm(), "ink")
    dots(axes, start, 34)
    return "Barker", "Noise gives the lengths, the gradient (black) the odds of\neach sign (orange). Blue: 500 proposals from the one place."


def underdamped_steps(axes: Axes, rng: torch.Generator) -> tuple[str, str]:
    """Show a path with a velocity that lasts."""
    steps = list(walk(WIDE, gb.Underdamped(0.15, friction=0.5), 90, rng))
    draw_path(axes, steps, width=1.4)
    for i, step in enumerate(steps):
        dots(axes, step.points[:1], 34 if i == 0 else 7, zorder=3 if i else 4)
    label(axes, steps[0].points[0], "start", (-8, 0))
    return "Underdamped Langevin", "90 steps of a velocity that friction slowly\nforgets and noise renews. Light to dark: time. Nothing is rejected."


def steps_apart(seed: int) -> tuple[Figure, dict[str, Any]]:
    """Draw what a step of each kind does, on one banana."""
    figure = Figure(figsize=(9.0, 10.15))
    grid = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.93, bottom=0.005, wspace=0.03, hspace=0.17)
    kinds = (langevin_steps, hmc_steps, barker_steps, underdamped_steps)
    for i, (axes, draw) in enumerate(zip(grid.flat, kinds)):
        shade(axes, WIDE)
        name, told = draw(axes, generator(seed, 100, i))
        axes.set_title(name, loc="left", weight="bold", pad=32)
        axes.text(0.0, 1.015, told, transform=axes.transAxes, color=colour("muted"), linespacing=1.35)
    return figure, {}


CROWD = 1000
BUDGETS = (0, 10, 30, 100, 300, 1000)
CROWDS: list[tuple[Scene, tuple[float, float], float, str, gb.Kernel]] = [
    (PINWHEEL, (0.0, 0.0), 0.3, "MALA", gb.MALA(0.02)),
    (PINWHEEL, (0.0, 0.0), 0.3, "HMC", gb.HMC(0.12, leapfrog=10)),
    (PINWHEEL, (0.0, 0.0), 0.3, "SVGD", gb.SVGD(0.2, bandwidth=0.2)),
    (EIGHT, (3.0, -3.0), 0.5, "MALA", gb.MALA(0.12)),
    (EIGHT, (3.0, -3.0), 0.5, "HMC", gb.HMC(0.3, leapfrog=10)),
    (EIGHT, (3.0, -3.0), 0.5, "SVGD", gb.SVGD(0.4, bandwidth=0.4)),
]


def distance(scene: Scene, draws: Tensor, bins: int = 16) -> tuple[float, float]:
    """Total variation of draws to the truth on a grid over the box, and what exact draws would show."""
    left, right, low, high = scene.box
    found = gb.grid_total_variation(draws, scene.energy, (left, low), (right, high), bins=bins, per_bin=8)
    return found.value, found.floor


def many_chains(seed: int) -> tuple[Figure, dict[str, Any]]:
    """Draw a crowd of chains from a wrong start, after ever more gradient evaluations."""
    rows, columns = len(CROWDS), len(BUDGETS)
    figure = Figure(figsize=(9.0, 9.0 * (rows + 0.45) / (columns + 0.2)))
    grid = figure.subplots(rows, columns)
    figure.subplots_adjust(left=0.035, right=0.995, top=0.925, bottom=0.005, wspace=0.04, hspace=0.04)
    record: dict[str, Any] = {}
    for i, (scene, place, spread, name, kernel) in enumerate(CROWDS):
        rng, done = generator(seed, 200, i), 0
        at: Tensor | gb.State = torch.tensor(place) + spread * torch.randn((CROWD, 2), generator=rng)
        told = record.setdefault(scene.name, {}).setdefault(name, [])
        for j, budget in enumerate(BUDGETS):
            axes, count = grid[i, j], budget // kernel.gradients - done
            if count:
                at = gb.sample(scene.energy, kernel, at, steps=count, rng=rng).state
                done += count
            x = at.x if isinstance(at, gb.State) else at
            shade(axes, scene)
            axes.scatter(*x.T.tolist(), s=2.2, color=colour("data"), linewidth=0)
            value, floor = distance(scene, x)
            told.append(value)
            corner(axes, f"{value:.2f}")
            if i == 0:
                axes.set_title("start" if j == 0 else f"{budget} gradients", pad=5)
            if j == 0:
                axes.set_ylabel(f"{name}", fontsize=10, color=colour("ink"))
        record[scene.name]["exact"] = floor
    floors = ", ".join(f"{record[s.name]['exact']:.2f} ({s.name})" for s in (PINWHEEL, EIGHT))
    text = f"{CROWD} chains or particles. Number: total variation to the truth; exact draws would show {floors}."
    figure.text(0.035, 0.98, text, fontsize=8.5, color=colour("muted"), va="center")
    return figure, {"gradients": BUDGETS, "total variation": record}


TITLES = ("too small", "about right", "too large")
SIZES = {gb.ULA: (0.0003, 0.01, 0.05), gb.MALA: (0.0003, 0.04, 0.4)}


def step_sizes(seed: int) -> tuple[Figure, dict[str, Any]]:
    """Draw histograms of ULA and MALA at three step sizes over the truth, and a trace of one of the chains each."""
    chains, steps = 100, 2000
    figure = Figure(figsize=(9.0, 8.6))
    grid = figure.subplots(4, 3, height_ratios=(3.0, 0.9, 3.0, 0.9))
    figure.subplots_adjust(left=0.06, right=0.99, top=0.92, bottom=0.05, wspace=0.04, hspace=0.08)
    left, right, low, high = BANANA.box
    record: dict[str, Any] = {}
    for i, (make, sizes) in enumerate(SIZES.items()):
        for j, size in enumerate(sizes):
            axes, strip, kernel = grid[2 * i, j], grid[2 * i + 1, j], make(size)
            rng = generator(seed, 300, i, j)
            start = torch.tensor([BANANA.start]).expand(chains, 2)
            run = gb.sample(BANANA.energy, kernel, start, steps=steps, thin=1, rng=rng)
            assert run.draws is not None
            x, y = run.draws.flatten(0, 1).T.numpy()
            counts, _, _ = np.histogram2d(x, y, bins=64, range=((left, right), (low, high)))
            peak = 1.3 * (density(BANANA, 64)[2]).max()
            picture = {"cmap": PAPER, "vmin": 0, "vmax": peak, "origin": "lower", "interpolation": "nearest"}
            axes.imshow(counts.T / len(x), extent=(left, right, low, high), **picture)
            shade(axes, BANANA, lines=True)
            value, floor = distance(replace(BANANA, box=(-4.0, 4.0, -2.0, 10.0)), run.draws.flatten(0, 1), bins=48)
            accepted, restarts = float(run.acceptance.mean()), int(run.nonfinite.sum())
            record[f"{make.__name__} {size}"] = {"total variation": value, "acceptance": accepted, "floor": floor}
            corner(axes, f"TV {value:.2f}\n" + (f"acceptance {accepted:.2f}" if i else f"restarts {restarts}"))
            print(make.__name__, size, value, floor, accepted, restarts)
            strip.plot(run.draws[:, 0, 0].numpy(), color=colour("data"), linewidth=0.5)
            strip.set(xlim=(0, steps), ylim=(left, right), yticks=[-2, 0, 2] if j == 0 else [])
            strip.set_xticks([500, 1000, 1500], labels=["500", "step 1000", "1500"] if i else [])
            strip.tick_params(length=0)
            axes.text(0.5, 0.965, f"h = {size:g}", transform=axes.transAxes, ha="center", va="top", fontsize=8.5)
            if i == 0:
                axes.set_title(TITLES[j], pad=6)
            if j == 0:
                axes.set_ylabel(make.__name__, fontsize=11, color=colour("ink"))
                strip.set_ylabel("x₁")
    return figure, {"steps": record}


FIGURES: dict[str, Callable[[int], tuple[Figure, dict[str, Any]]]] = {
    "one-chain": one_chain_each,
    "steps": steps_apart,
    "many": many_chains,
    "step-size": step_sizes,
}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 200 dots per inch in 256 colours, a third of the size and the same to the eye."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    image = Image.open(buffer).convert("RGB")
    image.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(FIGURES), choices=list(FIGURES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        began = time.perf_counter()
        # Also shields the figures from a user's own matplotlibrc, and gives it back afterwards.
        with matplotlib.style.context(["default", STYLE]):
            figure, record = FIGURES[name](options.seed)
            path = options.out / f"gallery-{name}.png"
            save(figure, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.1f} s")
        print(record)


if __name__ == "__main__":
    main()
