"""Pictures of chains on two-dimensional targets, for docs/gallery.md: what kernels do, and what they do wrongly.

Shades of grey are the smallest regions that hold 30, 50, 70, 90 and 99% of a target's mass.

    python benchmarks/gallery.py                     # all figures, into docs/images
    python benchmarks/gallery.py --only steps many   # some
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import gibbsian as gb
from common import circumstances, generator, table, write
from gibbsian.report.canvas import colour
from planar import Scene, arrow, corner, density, dots, draw_path, label, shade, walk

GRADIENTS = 200
"""Gradient evaluations (of RandomWalk: energy evaluations) of each chain of the first figure."""
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


Drawn = tuple[Figure, dict[str, Any], str]
"""A figure, its numbers, and their table."""


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


def one_chain_each(seed: int) -> Drawn:
    """Draw targets by kernels, a single chain in each, all with the same number of gradient evaluations."""
    rows, columns = len(SCENES), len(KERNELS)
    figure = Figure(figsize=(9.0, 9.0 * (rows + 0.33) / (columns + 0.2)))
    grid = figure.subplots(rows, columns)
    figure.subplots_adjust(left=0.035, right=0.995, top=0.948, bottom=0.005, wspace=0.04, hspace=0.04)
    record: dict[str, Any] = {}
    for i, scene in enumerate(SCENES):
        record[scene.name] = {}
        for j, (name, make) in enumerate(KERNELS):
            axes, kernel = grid[i, j], make(scene.length)
            steps = list(walk(scene, kernel, GRADIENTS, generator(seed, i, j)))
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
    figure.text(0.035, 0.987, text, fontsize=8.5, color=colour("muted"), va="center")
    names = list(record[SCENES[0].name])
    lines = [(target, *(f"{row[name]:.3f}" for name in names)) for target, row in record.items()]
    section = f"Acceptance of one chain, {GRADIENTS} gradients.\n\n{table(('target', *names), lines)}"
    return figure, {"gradients": GRADIENTS, "acceptance": record}, section


def langevin_steps(axes: Axes, rng: torch.Generator) -> None:
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


def hmc_steps(axes: Axes, rng: torch.Generator) -> None:
    """Show three trajectories, each with its first momentum and its leapfrog points."""
    kernel = gb.HMC(0.15, leapfrog=16)
    for i, step in enumerate(walk(replace(WIDE, start=(-1.1, 0.4)), kernel, 3 * kernel.leapfrog, rng)):
        axes.plot(*step.points.T.tolist(), color=colour("data"), linewidth=1.2)
        dots(axes, step.points[1:-1], 14, "data", edgecolor="white", linewidth=0.5)
        dots(axes, step.points[[0, -1]], 34)
        arrow(axes, step.points[0], step.points[0] + 0.55 * step.noise[0][0], "samples")
        if i == 0:
            label(axes, step.points[0], "start", (-2, 12))


def barker_steps(axes: Axes, rng: torch.Generator) -> None:
    """Show the four signs that one normal draw can take, their probabilities, and many proposals from one place."""
    kernel, crowd = gb.Barker(0.6), 500
    start = torch.tensor([[-1.2, 0.9]])
    state = kernel.init(WIDE.energy, start)
    many = kernel.init(WIDE.energy, start.expand(crowd, 2))
    pair = kernel.noise(many, 1, rng)[0][0]
    w = kernel.step_size * pair[:, 0]
    ends = start + torch.where(torch.special.ndtr(pair[:, 1]) < torch.sigmoid(-w * many.grad), w, -w)
    dots(axes, ends, 5, "data", alpha=0.55, zorder=2)
    size = torch.tensor([0.7, 0.7])
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


def underdamped_steps(axes: Axes, rng: torch.Generator) -> None:
    """Show a path with a velocity that lasts."""
    steps = list(walk(WIDE, gb.Underdamped(0.15, friction=0.5), 90, rng))
    draw_path(axes, steps, width=1.4)
    for i, step in enumerate(steps):
        dots(axes, step.points[:1], 34 if i == 0 else 7, zorder=3 if i else 4)
    label(axes, steps[0].points[0], "start", (-8, 0))


STEPS = (
    (
        "MALA",
        "A step down the gradient (orange), then noise (blue).",
        "A rejected proposal (red) leaves the chain where it was.",
        langevin_steps,
        100,
    ),
    (
        "HMC",
        "A random push (orange), then a frictionless glide of 16",
        "leapfrog steps (blue dots), whose end is accepted or not.",
        hmc_steps,
        141,
    ),
    (
        "Barker",
        "Noise gives the lengths, the gradient (black) the odds of",
        "each sign (orange). Blue: 500 proposals from the one place.",
        barker_steps,
        102,
    ),
    (
        "Underdamped Langevin",
        "90 steps of a velocity that friction slowly forgets and",
        "noise renews. Light to dark: time. Nothing is rejected.",
        underdamped_steps,
        100,
    ),
)
"""Kind of step, two lines about it, who draws it, and a seed of its own that shows it well."""


def steps_apart(seed: int) -> Drawn:
    """Draw what a step of each kind does, on one banana."""
    figure = Figure(figsize=(9.0, 10.15))
    grid = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.93, bottom=0.005, wspace=0.03, hspace=0.17)
    for i, (axes, (name, first, second, draw, own)) in enumerate(zip(grid.flat, STEPS)):
        shade(axes, WIDE)
        draw(axes, generator(seed, own, i))
        axes.set_title(name, loc="left", weight="bold", pad=32)
        told = f"{first}\n{second}"
        axes.text(0.0, 1.015, told, transform=axes.transAxes, color=colour("muted"), linespacing=1.35)
    return figure, {}, ""


CROWD = 1000
BUDGETS = (0, 10, 30, 100, 300, 1000)
CROWDS: list[tuple[Scene, tuple[float, float], float, str, gb.Kernel]] = [
    (PINWHEEL, (0.0, 0.0), 0.3, "MALA", gb.MALA(0.02)),
    (PINWHEEL, (0.0, 0.0), 0.3, "HMC", gb.HMC(0.12, leapfrog=10)),
    (PINWHEEL, (0.0, 0.0), 0.3, "SVGD", gb.SVGD(0.2, bandwidth=0.2)),
    (EIGHT, (-3.0, -3.0), 0.5, "MALA", gb.MALA(0.12)),
    (EIGHT, (-3.0, -3.0), 0.5, "HMC", gb.HMC(0.3, leapfrog=10)),
    (EIGHT, (-3.0, -3.0), 0.5, "SVGD", gb.SVGD(0.4, bandwidth=0.4)),
]


def distance(scene: Scene, draws: Tensor, bins: int = 16) -> tuple[float, float]:
    """Total variation of draws to the truth on a grid over the box, and what exact draws would show."""
    left, right, low, high = scene.box
    found = gb.grid_total_variation(draws, scene.energy, (left, low), (right, high), bins=bins, per_bin=8)
    return found.value, found.floor


def many_chains(seed: int) -> Drawn:
    """Draw a crowd of chains from a wrong start, after ever more gradient evaluations."""
    rows, columns = len(CROWDS), len(BUDGETS)
    figure = Figure(figsize=(9.0, 9.0 * (rows + 0.33) / (columns + 0.2)))
    grid = figure.subplots(rows, columns)
    figure.subplots_adjust(left=0.035, right=0.995, top=0.94, bottom=0.005, wspace=0.04, hspace=0.04)
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
    floors = "exact draws would show " + ", ".join(
        f"{record[s.name]['exact']:.2f} ({s.name})" for s in (PINWHEEL, EIGHT)
    )
    text = f"{CROWD} chains or particles. Number: total variation to the truth; {floors}."
    figure.text(0.035, 0.985, text, fontsize=8.5, color=colour("muted"), va="center")
    lines = [
        (f"{scene}, {name}", *(f"{v:.3f}" for v in values))
        for scene, kinds in record.items()
        for name, values in kinds.items()
        if name != "exact"
    ]
    section = f"Total variation of {CROWD} chains by gradients spent; {floors}.\n\n"
    return figure, {"gradients": BUDGETS} | record, section + table(("chains", *map(str, BUDGETS)), lines)


TITLES = ("too small", "about right", "too large")
SIZES = {gb.ULA: (0.0003, 0.01, 0.05), gb.MALA: (0.0003, 0.04, 0.4)}


def step_sizes(seed: int) -> Drawn:
    """Draw histograms of ULA and MALA at three step sizes over the truth, and a trace of one of the chains each."""
    chains, steps = 100, 2000
    figure = Figure(figsize=(9.0, 8.55))
    grid = figure.subplots(4, 3, height_ratios=(3.0, 0.9, 3.0, 0.9))
    figure.subplots_adjust(left=0.06, right=0.99, top=0.92, bottom=0.05, wspace=0.04, hspace=0.08)
    left, right, low, high = BANANA.box
    rows: list[tuple[Any, ...]] = []
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
            rows.append((make.__name__, size, value, accepted, restarts))
            corner(axes, f"TV {value:.2f}\n" + (f"acceptance {accepted:.2f}" if i else f"restarts {restarts}"))
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
    text = (
        f"{chains} chains from one place on the left, {steps} steps each; below, x₁ of one of them. "
        f"Outlines: 99, 90 and 50% of the truth.\n"
        f"TV: total variation of the draws to the truth; as many exact draws would show {floor:.2f}."
    )
    figure.text(0.06, 0.995, text, fontsize=8.5, color=colour("muted"), va="top", linespacing=1.35)
    names = ("kernel", "h", "total variation", "acceptance", "restarts")
    record = {"floor": floor, "rows": [dict(zip(names, row)) for row in rows]}
    lines = [(k, f"{h:g}", f"{v:.3f}", f"{a:.3f}", r) for k, h, v, a, r in rows]
    return figure, record, f"{chains} chains, {steps} steps; exact draws: {floor:.3f}.\n\n{table(names, lines)}"


FIGURES: dict[str, Callable[[int], Drawn]] = {
    "one-chain": one_chain_each,
    "steps": steps_apart,
    "many": many_chains,
    "step-size": step_sizes,
}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 200 dots per inch in 160 colours, a third of the size and the same to the eye."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    image = Image.open(buffer).convert("RGB")
    image.quantize(160, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


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
    records, sections = {}, []
    for name in options.only:
        began = time.perf_counter()
        # Also shields the figures from a user's own matplotlibrc, and gives it back afterwards.
        with matplotlib.style.context(["default", STYLE]):
            figure, records[name], section = FIGURES[name](options.seed)
            path = options.out / f"gallery-{name}.png"
            save(figure, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.1f} s")
        if section:
            print(section, end="\n\n")
            sections.append(f"## {name}\n\n{section}")
    if set(options.only) == set(FIGURES):
        record = circumstances([options.seed], options.threads) | records
        write("gallery", "What the gallery's chains did", record, sections)


if __name__ == "__main__":
    main()
