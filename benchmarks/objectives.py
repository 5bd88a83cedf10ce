"""Every objective on eight densities in the plane, beside ebmkit and torchebm.

Each objective fits the same network to the same standardised rows for the same processor time (``--budget``), and the
exact divergence from the true density to the fitted one, KL(true || fitted) in nats, is summed on a grid.  Objectives
that fit the density with noise on it pay for that here.  The peers train with the settings of their documentation, in
an environment of their own, and their densities, which have no tails of their own, are normalised on the grid.  What
Gibbsian's default reaches in the time that the best method of each peer took stands beside it.

    python benchmarks/objectives.py
    python benchmarks/objectives.py --densities two-moons ring --methods NCE PCD --no-peers
    python benchmarks/objectives.py --methods PCD --no-peers --keep   # anew, beside what is on record
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gibbsian as gb
from chains import default_folder, make_environments
from common import circumstances, generator, over_seeds, table, write
from gibbsian.data import load
from gibbsian.errors import DivergenceError
from gibbsian.objectives.base import Objective

HERE = Path(__file__).resolve().parent
PEERS = ("ebmkit", "torchebm")
POINTS, BOX, ROWS = 400, 4.5, 8192
MASSES = (0.6, 0.3, 0.1)
BASE_SCALE, SIGMA = 1.3, 0.1
SETTINGS = {"batch_size": 256, "learning_rate": 2e-3, "betas": (0.9, 0.99), "ema_decay": 0.998, "warmup_steps": 100}


@dataclass(frozen=True)
class Plane:
    """A density in standardised units: rows to learn from, and its logarithm on the grid, summing to 1."""

    name: str
    rows: Tensor
    grid: Tensor
    log_mass: Tensor


def unequal() -> gb.Tractable:
    """Three separate Gaussians of unequal masses, which methods that look at scores alone confuse."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [1.0, -2.5]])
    return gb.GaussianMixture(means, torch.tensor([0.35, 0.35, 0.35]), torch.tensor(MASSES))


def plane(name: str, seed: int) -> Plane:
    """Draw a density's rows and tabulate its logarithm."""
    if name == "unequal-gaussians":
        truth, rows = unequal(), unequal().sample(ROWS, generator(seed, 5))
    else:
        dataset = load(name, seed=seed)
        truth, rows = dataset.truth, dataset.train[:ROWS]
    mean, scale = rows.mean(0), rows.std(0)
    axis = torch.linspace(-BOX, BOX, POINTS)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        logs = -torch.cat([truth(part * scale + mean) for part in grid.split(20_000)]).double()
    return Plane(name, ((rows - mean) / scale).float(), grid, logs.log_softmax(0))


DENSITIES = (
    "two-moons",
    "eight-gaussians",
    "checkerboard",
    "pinwheel",
    "ring",
    "banana",
    "double-well",
    "unequal-gaussians",
)


def divergence(truth: Plane, energies: Tensor) -> float:
    """KL(true || fitted) in nats, both normalised on the grid."""
    logs, fitted = truth.log_mass, (-energies.double()).log_softmax(0)
    kept = logs > -100.0
    return float((logs[kept].exp() * (logs[kept] - fitted[kept])).sum())


def base() -> gb.Gaussian:
    """The Gaussian that every energy contains."""
    return gb.Gaussian(2, scale=BASE_SCALE)


def noise() -> gb.Tractable:
    """What the contrastive objectives tell data from: the base, and a tenth of it three times wider."""
    scales = torch.tensor([1.0, 3.0]) * BASE_SCALE
    return gb.GaussianMixture(torch.zeros(2, 2), scales, torch.tensor([0.9, 0.1]))


def network() -> gb.Energy:
    """The energy of most methods."""
    return gb.MLP(2, (128, 128, 128), frequencies=3) + base()


def levels() -> gb.Energy:
    """The energy at every noise level, for those that learn it there; rows come standardised."""
    return gb.NoiseConditional(2, width=128, blocks=3, frequencies=2, gain=0.0)


def bridged() -> gb.Energy:
    """Four density ratios between the noise and the data."""
    bridges = gb.MLP(2, (128, 128, 128), frequencies=3, classes=4)
    return gb.Telescope(bridges, noise(), gb.geometric_alphas(4, 0.3))


def at_lowest(energy: gb.Energy) -> gb.Energy:
    """The energy at the lowest of its levels."""
    return energy.given(sigma=torch.tensor(SIGMAS[0]))


@dataclass(frozen=True)
class Method:
    """An objective, built from rows and the number of steps; the energy that it fits, and how that is read."""

    objective: Callable[[Tensor, int], Objective]
    energy: Callable[[], gb.Energy] = network
    read: Callable[[gb.Energy], gb.Energy] = lambda energy: energy
    settings: tuple[tuple[str, Any], ...] = ()


SIGMAS = tuple(0.05 * 1.5**i for i in range(13))
CALM = (("learning_rate", 3e-4), ("betas", (0.0, 0.99)))
"""For objectives with chains, whose gradients are noisy."""


def walker() -> gb.Kernel:
    """How chains of training move."""
    return gb.MALA(0.02)


def then_pcd(steps: int) -> Objective:
    """Scores for half of the steps, which are cheap and blind to masses, then chains."""
    return gb.Phases(
        [(max(1, steps // 2), gb.DenoisingScoreMatching(SIGMA)), (None, gb.PCD(walker(), base(), 20, buffer_size=4096))]
    )


def flow(rows: Tensor) -> gb.Flow:
    """A spline flow that starts at the rows' moments."""
    return gb.spline_flow(2).calibrate(rows)


METHODS: dict[str, Method] = {
    "NCE": Method(lambda x, n: gb.NoiseContrastiveEstimation(noise())),
    "ranking NCE": Method(lambda x, n: gb.RankingNCE(noise(), 8)),
    "conditional NCE": Method(lambda x, n: gb.ConditionalNCE(0.5, 4)),
    "flow contrastive": Method(lambda x, n: gb.FlowContrastiveEstimation(flow(x))),
    "telescoping": Method(lambda x, n: gb.TelescopingRatios(), bridged),
    "exact score matching": Method(lambda x, n: gb.ScoreMatching()),
    "sliced": Method(lambda x, n: gb.SlicedScoreMatching()),
    "sliced, reduced variance": Method(lambda x, n: gb.SlicedScoreMatching(variance_reduction=True)),
    "finite differences": Method(lambda x, n: gb.FiniteDifferenceScoreMatching()),
    "denoising": Method(lambda x, n: gb.DenoisingScoreMatching(SIGMA)),
    "denoising, many levels": Method(
        lambda x, n: gb.MultiLevelDenoising(gb.LogNormal(-1.0, 1.3, SIGMAS[0], 8.0), level_weight=0.3),
        levels,
        at_lowest,
    ),
    "recovery likelihood": Method(
        lambda x, n: gb.RecoveryLikelihood(SIGMAS, gb.MALA(0.35), 10), levels, at_lowest, CALM
    ),
    "CD-20": Method(lambda x, n: gb.CD(walker(), 20), settings=CALM),
    "PCD": Method(lambda x, n: gb.PCD(walker(), base(), 20, buffer_size=4096), settings=CALM),
    "short runs": Method(lambda x, n: gb.CD(walker(), 20, starts=gb.Starts(noise=1.0), base=base()), settings=CALM),
    "denoising, then PCD": Method(lambda x, n: then_pcd(n), settings=CALM),
    "energy discrepancy": Method(lambda x, n: gb.EnergyDiscrepancy(0.25, 16)),
    "energy matching": Method(lambda x, n: gb.EnergyMatching(gb.Gaussian(2), 0.1, warmup=n // 2), settings=CALM),
    "exact likelihood": Method(lambda x, n: gb.ExactLikelihood(-2 * BOX, 2 * BOX, points=150)),
}
"""The first is the default of recipes for few columns; the last is the yardstick, which only few dimensions allow."""


def trained(method: Method, rows: Tensor, seconds: float, seed: int) -> tuple[gb.Energy, dict[str, float]]:
    """Fit for about so many seconds of this process: a few steps tell how many there is time for."""
    torch.manual_seed(seed)
    settings = SETTINGS | dict(method.settings)

    def run(energy: gb.Energy, steps: int, tag: int) -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        own = settings | {"warmup_steps": min(settings["warmup_steps"], steps // 10)}
        gb.fit(energy, rows, method.objective(rows, steps), steps=steps, rng=generator(seed, tag), **own)
        return time.perf_counter() - began, time.process_time() - cpu

    run(method.energy(), 5, 0)
    step = run(method.energy(), 25, 0)[1] / 25
    steps = max(20, round(seconds / step))
    torch.manual_seed(seed)
    energy = method.energy()
    wall, cpu = run(energy, steps, 1)
    return method.read(energy), {"steps": steps, "seconds": wall, "cpu": cpu}


def ours(name: str, method: Method, truth: Plane, seconds: float, seed: int) -> dict[str, Any]:
    """Fit one method and judge it; a run that is given up is a result too."""
    told: dict[str, Any] = {"library": "gibbsian", "method": name, "density": truth.name, "seed": seed}
    try:
        energy, facts = trained(method, truth.rows, seconds, seed)
    except DivergenceError as error:
        return told | {"error": str(error)}
    with torch.no_grad():
        values = torch.cat([energy(part) for part in truth.grid.split(20_000)])
    return told | facts | {"kl": divergence(truth, values)}


def theirs(library: str, python: Path, truth: Plane, seed: int) -> list[dict[str, Any]]:
    """Train every method of a peer in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data.npz"
        np.savez(source, rows=truth.rows.numpy(), grid=truth.grid.numpy())
        command = [python, "-W", "ignore", HERE / "peers" / f"density_{library}.py", source, folder, str(seed)]
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rows = []
        for line in done.stdout.strip().splitlines():
            told = json.loads(line) | {"density": truth.name, "seed": seed}
            if "file" in told:
                told["kl"] = divergence(truth, torch.as_tensor(np.load(told.pop("file"))))
            rows.append(told)
        return rows


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the lowest divergence."""
    sound = [row for row in rows if np.isfinite(row.get("kl", np.nan))]
    return min(sound, key=lambda row: row["kl"]) if sound else None


def duel(default: Method, truth: Plane, peers: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Give the default as much processor time as the best method of each peer took, less a tenth."""
    found = []
    for library in dict.fromkeys(row["library"] for row in peers):
        top = best([row for row in peers if row["library"] == library])
        if top is not None:
            mine = ours("default", default, truth, 0.9 * top["cpu"], seed)
            won = bool(mine.get("kl", np.inf) < top["kl"] and mine.get("cpu", np.inf) <= top["cpu"])
            found.append({"against": top, "default": mine, "won": won})
    return found


def methods_table(rows: list[dict[str, Any]], densities: list[str]) -> str:
    """Divergence by method and density, means over seeds; the winner of each density in bold."""
    lines, cells = [], {}
    names = list(dict.fromkeys((row["library"], row["method"]) for row in rows))
    for key in names:
        for density in densities:
            own = [r for r in rows if (r["library"], r["method"]) == key and r["density"] == density]
            values = [r["kl"] for r in own if "kl" in r]
            cells[key, density] = over_seeds(values) if len(values) == len(own) > 0 else None
    for key in names:
        line = [f"{key[0]}, {key[1]}" if key[0] != "gibbsian" else key[1]]
        for density in densities:
            found = cells[key, density]
            lowest = min((c.value for c in (cells[k, density] for k in names) if c is not None), default=np.nan)
            text = "failed" if found is None else f"{found.value:.3f}"
            line.append(f"**{text}**" if found is not None and found.value == lowest else text)
        own = [r for r in rows if (r["library"], r["method"]) == key and "cpu" in r]
        line.append(f"{over_seeds(r['cpu'] for r in own).value:.0f}" if own else "")
        lines.append(line)
    return table(["objective", *densities, "s CPU"], lines)


def duels_table(duels: list[dict[str, Any]]) -> str:
    """What the default reaches in the time of each peer's best method."""
    lines = [
        [
            d["default"]["density"],
            f"{d['against']['library']}, {d['against']['method']}",
            f"{d['against']['kl']:.3f} in {d['against']['cpu']:.1f}",
            f"{d['default'].get('kl', np.nan):.3f} in {d['default'].get('cpu', np.nan):.1f}",
            "yes" if d["won"] else "no",
        ]
        for d in duels
    ]
    return table(["density", "peer's best", "its KL, in s CPU", "the default's", "lower in less time"], lines)


def report(rows: list[dict[str, Any]], duels: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what there is so far."""
    record = circumstances(options.seeds, 1) | {"budget": options.budget, "rows": rows, "duels": duels}
    densities = [d for d in options.densities if any(r["density"] == d for r in rows)]
    note = (
        f"KL(true || fitted) in nats on a grid of {POINTS} x {POINTS} points; each objective of Gibbsian trained for "
    )
    note += f"{options.budget:g} s of processor time, the peers with the settings of their documentation."
    sections = [note, methods_table(rows, densities)]
    if duels:
        sections += ["The default in the time of each peer's best method:", duels_table(duels)]
    write("objectives", "Objectives on densities in the plane", record, sections)


def kept(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the record, less the methods that are to be run; their places are taken by the new ones."""
    record = json.loads((HERE / "results" / "objectives.json").read_text())
    if record["budget"] != options.budget or record["seeds"] != options.seeds:
        raise SystemExit("--keep needs the record's own --budget and --seeds.")
    anew = {("gibbsian", name) for name in options.methods}
    return [row for row in record["rows"] if (row["library"], row["method"]) not in anew], record["duels"]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Methods in the order of `METHODS`, peers behind them."""
    places = {name: i for i, name in enumerate(METHODS)}
    return sorted(rows, key=lambda row: places.get(row["method"], 0) if row["library"] == "gibbsian" else len(places))


def main() -> None:
    """Run everything, and write after each density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", nargs="+", default=list(DENSITIES), choices=DENSITIES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of processor time per fit")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--env-dir", type=Path, default=default_folder(), help="where the peers' environments are")
    parser.add_argument("--keep", action="store_true", help="keep from results/objectives.json what is not run anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pythons = {} if options.no_peers else make_environments(options.env_dir, list(PEERS), [])
    rows, duels = kept(options) if options.keep else ([], [])
    for density in options.densities:
        for seed in options.seeds:
            truth = plane(density, seed)
            for name in options.methods:
                rows.append(ours(name, METHODS[name], truth, options.budget, seed))
                print({k: rows[-1].get(k) for k in ("density", "method", "kl", "cpu", "error")}, file=sys.stderr)
            peers = [row for library, python in pythons.items() for row in theirs(library, python, truth, seed)]
            rows += peers
            duels += duel(METHODS[options.methods[0]], truth, peers, seed) if peers else []
            report(in_order(rows), duels, options)
    print((HERE / "results" / "objectives.md").read_text())


if __name__ == "__main__":
    main()
