"""What the record of a run looks like in health and in illness: the picture of docs/training.md.

Persistent contrastive divergence on three Gaussians of unequal masses, with one network and seed: at a learning rate
that suits it; at one four times larger with health off; and the same with health on, which takes the run back. Two
more runs at that rate, with more chain steps and without momentum, are not drawn. Writes ``results/health.json`` and
``.md`` too.

    python benchmarks/health.py        # docs/images/health.png, some minutes
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import gibbsian as gb
from common import circumstances, generator, table, write
from gallery import STYLE, save
from gibbsian.errors import DivergenceError
from gibbsian.report.canvas import colour
from objectives import unequal

CASES = (
    ("healthy: learning rate 1e-4", 1e-4, True),
    ("ill: 4e-4, with health off", 4e-4, False),
    ("ill: 4e-4, with health on", 4e-4, True),
)
CURES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("ill: 4e-4, health off, four times the chain steps", 4e-4, {"chain_steps": 40}),
    ("ill: 4e-4, health off, Adam without momentum", 4e-4, {"betas": (0.0, 0.99)}),
)
ROWS = (
    ("energy, nats", ("energy_data", "energy_samples"), ("data", "samples")),
    ("gap, nats", ("gap",), ("",)),
    ("gradient norm", ("grad_norm",), ("",)),
)


Record = dict[str, Any]


def history(
    learning_rate: float, health: bool, steps: int, seed: int, chain_steps: int = 10, **more: Any
) -> tuple[list[Record], str]:
    """Train, and return the record and how it ended."""
    torch.manual_seed(seed)
    base = gb.Gaussian(2, scale=2.5)
    energy = gb.MLP(2, (64, 64, 64), frequencies=3) + base
    objective = gb.PCD(gb.MALA(0.02), base, chain_steps, buffer_size=1024)
    told: list[Record] = []
    options: Record = {"learning_rate": learning_rate, "batch_size": 128, "log_every": 10, "checkpoint_every": 50}
    data = unequal().sample(2000, generator(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            gb.fit(
                energy,
                data,
                objective,
                steps=steps,
                rng=generator(1),
                health=health,
                callbacks=[told.append],
                **options | more,
            )
        except DivergenceError:
            return told, "stopped"
    return told, "finished"


def summary(title: str, told: list[Record], end: str) -> Record:
    """How a run went: its end, its returns, and the gap at its last record."""
    gaps = [(record["step"], record["gap"]) for record in told if "gap" in record]
    events = [record for record in told if "event" in record]
    back = sum(record["event"] == "rollback" for record in events)
    return {"run": title, "end": end, "rollbacks": back, "step": gaps[-1][0], "gap": gaps[-1][1], "events": events}


def draw(axes: Axes, told: list[Record], keys: tuple[str, ...], names: tuple[str, ...]) -> None:
    """One panel: lines that break where the run went back, and where it did."""
    for key, name, shade in zip(keys, names, ("data", "samples")):
        x: list[float] = []
        y: list[float] = []
        for record in told:
            if record.get("event") == "rollback":
                x, y = [*x, np.nan], [*y, np.nan]
            elif key in record:
                x, y = [*x, record["step"]], [*y, record[key]]
        axes.plot(x, y, color=colour(shade), lw=1.2, label=name)
    for record in told:
        if record.get("event") in ("rollback", "divergence"):
            axes.axvline(record["step"], color=colour("rose"), lw=0.8, ls=(0, (2, 2)))


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "health.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Record] = []
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained")
        panels = figure.subplots(len(ROWS), len(CASES), sharex=True, squeeze=False)
        for column, (title, rate, health) in enumerate(CASES):
            told, end = history(rate, health, options.steps, options.seed)
            rows.append(summary(title, told, end))
            panels[0, column].set_title(title, loc="left")
            for axes, (label, keys, names) in zip(panels[:, column], ROWS):
                draw(axes, told, keys, names)
                axes.spines[["top", "right"]].set_visible(False)
                if label == "gradient norm":
                    axes.set_yscale("log")
                    axes.yaxis.set_major_locator(LogLocator(numticks=6))
                    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                    axes.yaxis.set_minor_formatter(NullFormatter())
                    axes.set_xlabel("step")
                if column == 0:
                    axes.set_ylabel(label)
        panels[0, 0].legend(frameon=False, loc="lower left")
        save(figure, options.out)
    for title, rate, more in CURES:
        rows.append(summary(title, *history(rate, False, options.steps, options.seed, **more)))
    lines = [[r["run"], r["end"], r["rollbacks"], r["step"], f"{r['gap']:.1f}"] for r in rows]
    found = table(["run", "end", "rollbacks", "last step", "gap there, nats"], lines)
    write("health", "Health and illness", circumstances([options.seed], 1) | {"runs": rows}, [found])
    print(found)


if __name__ == "__main__":
    main()
