"""An amortised sampler beside chains: draws of a generator, refined by a few steps, and chains from noise.

An energy and a generator are trained together by `EntropyRegularised`, in the plane on three densities and on the 8 x 8
digits. In the plane that energy is right where the generator comes and has mass elsewhere, too, so that chains walk on
another one, which is fitted to the same rows by noise contrastive estimation. Then as many points are drawn in three
ways: by the generator alone, by the generator and k steps of a kernel on the energy, and by k steps of the same kernel
from noise, of which five times as many are made as well. Processor and wall time are those of all draws together. In
the plane the distance is the root of the energy distance, in units of the standardised data, to exact draws of the
fitted energy (by its grid) and to draws of the true density; of digits it is the Frechet distance to held-out rows in a
classifier's features.

Asked is, for each k: chains of the same number of steps are at least five times as far, or chains of five times as many
are no closer. Settings were chosen on seeds 11 and 100, after a look at another design on seed 0 of the pinwheel.
Writes ``results/amortised.json``, ``.md`` and ``.png``.

    python benchmarks/amortised.py
    python benchmarks/amortised.py --parts pinwheel --budget 0.01
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, over_seeds, table, write
from gibbsian.data import load
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.networks import Dense
from gibbsian.kernels.base import Kernel
from gibbsian.objectives.amortised import GeneratorObjective
from gibbsian.objectives.amortised_divergence import EntropyRegularised
from gibbsian.partition.exact import Grid, quadrature
from judging import Judge

PLANAR = {"eight-gaussians": gb.EightGaussians, "two-moons": gb.TwoMoons, "pinwheel": gb.Pinwheel}
PARTS = (*PLANAR, "digits")
STEPS = (5, 20, 100)
TIMES = 5
"""What is asked: closer by this factor, or sooner."""
SETTINGS: dict[str, Any] = {"batch_size": 256, "betas": (0.5, 0.99), "ema_decay": 0.998, "tensorboard": False}
DIGIT_SETTINGS: dict[str, Any] = SETTINGS | {"batch_size": 128, "ema_decay": 0.998}
SCALE, BOX = 0.1, 4.0
"""Noise of the generator and half the box of the grid, in units of the standardised data."""

Measure = Callable[[Tensor], dict[str, tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A trained pair, how its chains move, where they start without the generator, and how draws are judged."""

    energy: gb.Energy
    objective: GeneratorObjective
    kernel: Kernel
    noise: gb.Gaussian
    measure: Measure
    floor: dict[str, tuple[float, float]]
    training: Stopwatch
    draws: int


def scaled(count: int, budget: float, least: int) -> int:
    """A part of a count."""
    return max(least, round(count * min(1.0, budget)))


def root(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Root of the energy distance, 0 where chance makes it negative, and its standard error."""
    found = energy_distance(a, b)
    distance = math.sqrt(max(found.value, 0.0))
    return distance, found.stderr / (2.0 * max(distance, math.sqrt(found.stderr)))


def from_grid(grid: Grid, n: int, rng: torch.Generator) -> Tensor:
    """Draw from a density on a grid, uniformly within cells around its nodes."""
    first, second = grid.axes
    picked = torch.multinomial(grid.log_prob.flatten().softmax(0), n, replacement=True, generator=rng)
    nodes = torch.stack((first[picked // len(second)], second[picked % len(second)]), 1)
    return (nodes + (torch.rand((n, 2), generator=rng) - 0.5) * (first[1] - first[0])).float()


def planar(name: str, budget: float, seed: int) -> Case:
    """Train on a density in the plane."""
    truth, draws = PLANAR[name](), scaled(2000, budget, 64)
    data = truth.sample(10_000, generator(seed, 1))
    loc, spread = data.mean(0), data.std(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = GeneratorNetwork(Dense(2, 2, (64, 64)), 2, latent=2)
        energy = gb.MLP(2, hidden=(128, 128), frequencies=2) + gb.Gaussian(2, scale=2.0)
    z, steps = (data - loc) / spread, scaled(1200, budget, 3)
    objective = EntropyRegularised(network, SCALE, draws=4, gradient_penalty=0.01)
    contrast = gb.NoiseContrastiveEstimation(gb.Gaussian(2, scale=2.0), ratio=4)
    with Stopwatch() as watch:
        adversary = copy.deepcopy(energy)
        done = gb.fit(adversary, z, objective, rng=generator(seed, 2), steps=steps, learning_rate=1e-3, **SETTINGS)
        fitted = gb.fit(energy, z, contrast, rng=generator(seed, 7), steps=steps, learning_rate=5e-3, **SETTINGS)
    print(f"{name}: {done}; {fitted}, {watch.cpu:.0f} core-seconds", flush=True)
    fresh, other = ((truth.sample(draws, generator(seed, i)) - loc) / spread for i in (3, 4))
    own, again = (from_grid(quadrature(energy, -BOX, BOX, 200, edge=1.0), draws, generator(seed, i)) for i in (5, 6))

    def measure(x: Tensor) -> dict[str, tuple[float, float]]:
        return {"energy": root(x, own), "truth": root(x, fresh)}

    floor = {"energy": root(again, own), "truth": root(other, fresh)}
    noise = gb.Gaussian(2, scale=2.0)
    return Case(energy, objective, gb.MALA(0.02), noise, measure, floor, watch, draws)


def enlarged(x: Tensor) -> Tensor:
    """Digits at the size and range of the judge's pixels."""
    return torch.nn.functional.interpolate(x * (255 / 16), size=(28, 28))


def digits(budget: float, seed: int) -> Case:
    """Train on digits, in units from -1 to 1."""
    dataset, draws = load("digits"), scaled(1000, budget, 64)
    large = dataclasses.replace(
        dataset, train=enlarged(dataset.train), held_out=enlarged(dataset.held_out), value_range=(0.0, 255.0)
    )
    judge, scaling = Judge(large, scaled(600, budget, 3), seed), dataset.scaling()
    rows = scaling.forward(dataset.train)
    data = rows + 0.05 * torch.randn(rows.shape, generator=generator(seed, 1))
    shape = tuple(rows.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = GeneratorNetwork(Dense(16, shape, (256, 256)), shape, latent=16)
        noise = gb.Gaussian(loc=data.mean(0), scale=data.std(0))
        energy = gb.MLP(shape, hidden=(256, 256)) + gb.Gaussian(shape, scale=1.0)
    objective = EntropyRegularised(network, SCALE, draws=4, gradient_penalty=0.01)
    steps = scaled(1500, budget, 3)
    with Stopwatch() as watch:
        done = gb.fit(
            energy, data, objective, rng=generator(seed, 2), steps=steps, learning_rate=1e-3, **DIGIT_SETTINGS
        )
    print(f"digits: {done}, {watch.cpu:.0f} core-seconds", flush=True)

    def measure(x: Tensor) -> dict[str, tuple[float, float]]:
        value, error = judge.distance(enlarged(scaling.backward(x)))
        return {"truth": (value, error)}

    floor = measure(data[torch.randperm(len(data), generator=generator(seed, 3))[:draws]])
    return Case(energy, objective, gb.MALA(0.004), noise, measure, floor, watch, draws)


def ways(case: Case, seed: int) -> list[dict[str, Any]]:
    """Draw in every way, and judge."""
    found = []
    rest = {"energy": case.energy, "kernel": case.kernel}

    def note(way: str, steps: int, draw: Callable[[torch.Generator], Tensor]) -> None:
        with Stopwatch() as watch:
            x = draw(generator(seed, 10, steps))
        told = {"way": way, "steps": steps, "cpu": watch.cpu, "wall": watch.wall, "distances": case.measure(x)}
        found.append(told)
        print(f"  {way}, {steps} steps: {told['distances']}", flush=True)

    note("generator", 0, lambda rng: case.objective.sample(case.draws, rng))
    for k in STEPS:
        note(
            "refined",
            k,
            lambda rng, k=k: gb.sample(start=case.objective.sample(case.draws, rng), steps=k, rng=rng, **rest).x,
        )
    for k in sorted({k * m for k in STEPS for m in (1, TIMES)}):
        note(
            "chains",
            k,
            lambda rng, k=k: gb.sample(start=case.noise.sample(case.draws, rng), steps=k, rng=rng, **rest).x,
        )
    return found


def verdicts(rows: Sequence[dict[str, Any]], to: str) -> list[dict[str, Any]]:
    """For each number of steps: how many times as far chains are, and whether five times as many are closer."""
    at = {(row["way"], row["steps"]): row["distances"][to][0] for row in rows}
    found = []
    for k in STEPS:
        refined, chains, longer = at["refined", k], at["chains", k], at["chains", TIMES * k]
        ratio = chains / refined if refined > 0 else math.inf
        found.append({"steps": k, "times": ratio, "longer": longer, "met": ratio >= TIMES or longer >= refined})
    return found


def run(name: str, budget: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Train and draw once per seed."""
    runs = []
    for seed in seeds:
        case = digits(budget, seed) if name == "digits" else planar(name, budget, seed)
        rows = ways(case, seed)
        spent = {"cpu": case.training.cpu, "wall": case.training.wall}
        runs.append({"seed": seed, "training": spent, "draws": case.draws, "floor": case.floor, "rows": rows})
    return {"runs": runs, "verdicts": {to: [verdicts(r["rows"], to) for r in runs] for to in runs[0]["floor"]}}


def mean_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the runs with distances and seconds averaged over them; with one run, its own errors."""
    rows = []
    for each in zip(*(r["rows"] for r in found["runs"])):
        distances = {}
        for to in each[0]["distances"]:
            mean = over_seeds(row["distances"][to][0] for row in each)
            distances[to] = (mean.value, each[0]["distances"][to][1] if len(each) == 1 else mean.stderr)
        spent = {unit: sum(row[unit] for row in each) / len(each) for unit in ("cpu", "wall")}
        rows.append({"way": each[0]["way"], "steps": each[0]["steps"], **spent, "distances": distances})
    return rows


COLOURS = {"generator": "data", "refined": "data", "chains": "samples"}
LABELS = {"energy": "fitted energy", "truth": "truth"}


def paint(parts: dict[str, Any]) -> None:
    """Distance against processor time: one panel for each set, chains beside the refined generator."""
    from matplotlib.figure import Figure

    from gibbsian.report.canvas import colour

    figure = Figure(figsize=(3.1 * len(parts), 3.1), layout="constrained")
    for i, (axes, (name, found)) in enumerate(zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items())):
        rows, to = mean_rows(found), "truth" if name == "digits" else "energy"
        floor = sum(r["floor"][to][0] for r in found["runs"]) / len(found["runs"])
        for label, chosen, tint, marker in (
            ("generator, then chains", ("generator", "refined"), "data", "o"),
            ("chains from noise", ("chains",), "samples", "s"),
        ):
            line = [row for row in rows if row["way"] in chosen]
            x, y = [row["cpu"] for row in line], [row["distances"][to][0] for row in line]
            axes.plot(x, y, marker=marker, markersize=4, color=colour(tint), label=label)
            for row, a, b in zip(line, x, y):
                axes.annotate(str(row["steps"]), (a, b), xytext=(3, 4), textcoords="offset points", fontsize=7)
        if floor > 0:
            axes.axhline(floor, color=colour("ink"), linestyle=":", linewidth=0.8, label="other exact draws")
        axes.set(xscale="log", yscale="log", title=name, xlabel="processor seconds of all draws")
        if i == 0 or name == "digits":
            axes.set_ylabel(
                "Fréchet distance to held-out rows" if name == "digits" else "distance to the fitted energy"
            )
        if i == 0:
            axes.legend(fontsize=7, loc="best")
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(common.RESULTS / "amortised.png", dpi=110)


def section(name: str, found: dict[str, Any]) -> str:
    """One set as Markdown."""
    to = list(found["runs"][0]["floor"])
    header = ["draws by", "steps", "processor s", "wall s", *(f"distance to {LABELS[each]}" for each in to)]
    cells = []
    for row in mean_rows(found):
        told = [str(gb.Estimate(*row["distances"][each])) for each in to]
        cells.append([row["way"], row["steps"], f"{row['cpu']:.3f}", f"{row['wall']:.3f}", *told])
    floor = [str(gb.Estimate(*found["runs"][0]["floor"][each])) for each in to]
    cells.append(["other exact draws" if len(to) > 1 else "training rows", "", "", "", *floor])
    lines = []
    for each in to:
        for k in range(len(STEPS)):
            runs = [run[k] for run in found["verdicts"][each]]
            times = " and ".join(f"{run['times']:.1f}" for run in runs)
            met = "met" if all(run["met"] for run in runs) else "**not met**"
            words = f"chains of as many are {times} times as far, and of {TIMES} times as many at "
            words += " and ".join(f"{run['longer']:.3g}" for run in runs)
            lines.append(f"* {LABELS[each]}, {STEPS[k]} steps: {words}: {met}")
    spent = sum(run["training"]["cpu"] for run in found["runs"]) / len(found["runs"])
    head = f"Trained in {spent:.0f} core-seconds; {found['runs'][0]['draws']} draws."
    return f"## {name}\n\n{head}\n\n{table(header, cells)}\n\n" + "\n".join(lines)


NOTES = """Distances in the plane are roots of the energy distance in units of the standardised data; of digits, Frechet
distances in a classifier's features. Errors are those of one run's draws, or over seeds where there are several.
Refined draws and chains move by the same kernel (MALA) on the same energy. "Met": chains of the same number of steps
are five times as far or more, or chains of five times as many steps are no closer."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts, and keep what was found before of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--budget", type=float, default=1.0, help="of steps and draws, up to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1, help="seeds, one after the other")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    seeds = [options.seed + i for i in range(options.runs)]
    record = circumstances(seeds, options.threads) | {"budget": options.budget, "parts": {}}
    path = common.RESULTS / "amortised.json"
    if path.exists():
        before = json.loads(path.read_text())
        if (before["budget"], before["seeds"]) == (options.budget, seeds):
            record["parts"] = before["parts"]
    for name in options.parts:
        record["parts"][name] = run(name, options.budget, seeds)
        record["parts"] = {each: record["parts"][each] for each in PARTS if each in record["parts"]}
        write(
            "amortised",
            "Amortised samplers",
            record,
            [NOTES.replace("\n", " "), *(section(*part) for part in record["parts"].items())],
        )
        paint(record["parts"])
    return record["parts"]


if __name__ == "__main__":
    main()
