"""Guidance in the plane: plain walks, chains at every level and weighted particles against the exact guided density.

Two conditional mixtures of three classes with two parts each, whose noisy energies are known at every level: in one the
classes overlap, in the other the parts lie apart, so that chains seldom pass between them at low noise. The first class
is guided by all classes at the scales 0, 1, 3 and 7, and draws are compared with the guided density on squares of a
grid. Writes ``results/guidance.json``, ``.md`` and ``.png``; about three minutes of one core.

    python benchmarks/guidance.py
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write

SCALES = (0.0, 1.0, 3.0, 7.0)
LOCS = torch.tensor([[[-1.0, 0.0], [0.2, 1.0]], [[1.2, 0.0], [0.0, -1.2]], [[0.3, 1.6], [-0.8, -0.8]]])
SIZES = torch.tensor([[0.8, 0.7], [0.8, 0.7], [0.7, 0.9]])
MASSES = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.7, 0.3]])
CASES = {"overlapping": (1.0, 1.0), "apart": (2.0, 0.5)}
"""How far the places of the parts are stretched, and how much narrower they are."""

LOW, HIGH, LEVELS = 0.02, 16.0, 40
BOX, CELLS, INNER = 5.0, 32, 6
DRAWS, STEPS, LAST = 24_000, 6, 40
"""Draws of every way, steps of the chains at each level, and at the last."""

WAYS = {
    "plain": "the probability flow of the guided scores, by Heun's method",
    "chains": "annealed_chains: MALA at every level",
    "compose": "compose: weighted particles, moved by MALA at every level",
}


def model(stretch: float, narrow: float) -> gb.Energy:
    """Energies of each row's class under noise, or of all classes where the label is 3."""
    locs, sizes = stretch * LOCS, narrow * SIZES

    def energy(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        v = sizes**2 + sigma[:, None, None] ** 2
        parts = MASSES.log() - ((x[:, None, None] - locs) ** 2).sum(3) / (2 * v) - (2 * math.pi * v).log()
        classes = torch.logsumexp(parts, 2)
        everything = torch.logsumexp(classes, 1, keepdim=True) - math.log(3)
        return -torch.cat((classes, everything), 1).gather(1, y[:, None]).squeeze(1)

    return gb.Energy.of(energy, (2,), context=("sigma", "y"))


def masses_of(energy: gb.Energy) -> Tensor:
    """Masses of the squares under the energy at the lowest level, ``(CELLS, CELLS)``."""
    k = CELLS * INNER
    axis = -BOX + 2.0 * BOX * (torch.arange(k) + 0.5) / k
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), 2).reshape(-1, 2)
    p = (-energy.given(sigma=LOW)(x)).double().softmax(0)
    return p.view(CELLS, INNER, CELLS, INNER).sum((1, 3))


def shares(x: Tensor) -> Tensor:
    """Shares of the squares; what lies outside is nowhere."""
    index = ((x + BOX) / (2 * BOX) * CELLS).floor().long()
    inside = ((index >= 0) & (index < CELLS)).all(1)
    flat = index[inside, 0] * CELLS + index[inside, 1]
    return torch.bincount(flat, minlength=CELLS**2).double().view(CELLS, CELLS) / len(x)


def total_variation(share: Tensor, masses: Tensor) -> float:
    """Between shares of draws and exact masses, what lies outside included."""
    return 0.5 * float((share - masses).abs().sum() + 1.0 - share.sum())


def best_possible(masses: Tensor, rng: torch.Generator, repeats: int = 20) -> float:
    """Mean total variation of as many exact draws."""
    found = []
    for _ in range(repeats):
        picks = torch.multinomial(masses.flatten(), DRAWS, replacement=True, generator=rng)
        found.append(total_variation(torch.bincount(picks, minlength=CELLS**2).view(CELLS, CELLS) / DRAWS, masses))
    return sum(found) / repeats


def samplers(energy: gb.Energy, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Return the ways of drawing, by name."""
    levels = gb.VarianceExploding(LOW, HIGH, rho=4.0, sigma_data=1.0).levels(LEVELS)

    def start() -> tuple[Tensor, torch.Generator]:
        rng = generator(seed)
        return HIGH * torch.randn((DRAWS, 2), generator=rng), rng

    def chains() -> Tensor:
        x, rng = start()
        kernel = gb.MALA(0.3 * HIGH**2)
        return gb.annealed_chains(energy, x, levels, kernel, steps=STEPS // 2, rng=rng, last_steps=LAST).samples.x

    def composed() -> Tensor:
        rng = generator(seed)
        return gb.compose(energy, levels, chains=DRAWS, steps=STEPS, last_steps=LAST, rng=rng).draw(DRAWS, rng)

    return {"plain": lambda: gb.reverse(energy, start()[0], levels), "chains": chains, "compose": composed}


def run(case: str, scale: float, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draw in every way at one scale; the row of the table, and the squares of each way."""
    energy = gb.guided_by_label(model(*CASES[case]), 0, scale, classes=3)
    masses = masses_of(energy)
    row: dict[str, Any] = {"case": case, "scale": scale, "best": best_possible(masses, generator(seed, 1)), "ways": {}}
    squares = {"exact": masses}
    for name, way in samplers(energy, seed).items():
        with Stopwatch() as watch:
            squares[name] = shares(way())
        row["ways"][name] = {"distance": total_variation(squares[name], masses), "cpu": watch.cpu}
    told = ", ".join(f"{name} {way['distance']:.3f}" for name, way in row["ways"].items())
    print(f"{case}, scale {scale:g}: best {row['best']:.3f}, {told}", flush=True)
    return row, squares


def picture(squares: dict[tuple[str, float], dict[str, Tensor]]) -> bytes:
    """Each case and scale in a column, exact and drawn."""
    from io import BytesIO

    from matplotlib.figure import Figure

    names = ("exact", *WAYS)
    figure = Figure(figsize=(1.3 * len(squares) + 0.6, 1.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(squares), squeeze=False)
    for line, ((case, scale), drawn) in zip(axes.T, squares.items()):
        high = float(drawn["exact"].max())
        for ax, name in zip(line, names):
            ax.imshow(drawn[name].T.numpy(), origin="lower", vmin=0.0, vmax=high, cmap="magma")
            ax.set_xticks([])
            ax.set_yticks([])
        line[0].set_title(f"{case}, {scale:g}", fontsize="medium")
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(name)
    held = BytesIO()
    figure.savefig(held, format="png", dpi=90)
    return held.getvalue()


def section(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = ("mixture", "scale", "best possible", *WAYS)
    lines = [
        (r["case"], f"{r['scale']:g}", f"{r['best']:.3f}", *(f"{r['ways'][name]['distance']:.3f}" for name in WAYS))
        for r in results["rows"]
    ]
    cpu = {name: sum(r["ways"][name]["cpu"] for r in results["rows"]) for name in WAYS}
    told = "\n".join(f"* {name}: {what}; {cpu[name]:.0f} s CPU in all." for name, what in WAYS.items())
    return (
        f"Total variation on {CELLS} x {CELLS} squares of [-{BOX:g}, {BOX:g}]^2, {DRAWS} draws of every way, at noise "
        f"{LOW}, from {HIGH:g} in {LEVELS} steps. The scale is 0 for all classes, 1 for the class.\n\n{told}\n\n"
        f"{table(head, lines)}\n\n![guided densities](guidance.png)"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    began, rows, squares = time.process_time(), [], {}
    for case in CASES:
        for scale in SCALES:
            row, squares[case, scale] = run(case, scale, options.seed)
            rows.append(row)
    results = circumstances([options.seed], options.threads) | {"cpu": time.process_time() - began, "rows": rows}
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    (common.RESULTS / "guidance.png").write_bytes(picture(squares))
    write("guidance", "Guidance in the plane", results, [section(results)])
    return results


if __name__ == "__main__":
    main()
