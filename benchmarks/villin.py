"""Villin headpiece: fluctuations at two temperatures, and native frames against decoys under a learned energy.

    python benchmarks/villin.py                    # simulates first: some tens of minutes on a free core
    python benchmarks/villin.py --work FOLDER      # takes up simulations that are there
    python benchmarks/villin.py --quick

The structure is the package OpenMM's own (app/data/test.pdb, without water and ions), in implicit solvent
(amber99_obc). Energies are learned from two runs at 300 K: of backbone torsions, a periodic network, and of distances
of alpha carbons, both by denoising score matching. Their sum ranks, each over its spread among frames of a third run at
300 K, which have drifted elsewhere; native frames are those of a fourth. Decoys are frames of two runs at 500 K, after
10 ps, and native frames whose backbone torsions are turned at random by 5, 10 and 20 degrees.

Writes results/villin.json and .md, and docs/images/villin.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import torch

import common
from gibbsian.diagnostics.estimate import with_error
from gibbsian.energies.base import Energy
from gibbsian.energies.neural import MLP
from gibbsian.energies.periodic import PeriodicMLP
from gibbsian.energies.tractable import Gaussian
from gibbsian.molecules.decoys import perturbed, rank_decoys
from gibbsian.molecules.features import distances, fluctuations, residue_pairs, torsions
from gibbsian.molecules.frames import check_frames
from gibbsian.molecules.sources import read_frames
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.training.fit import fit

RUNS = {
    "300-a": (300.0, 60.0, 0),
    "300-b": (300.0, 60.0, 2),
    "300-c": (300.0, 60.0, 4),
    "300-d": (300.0, 60.0, 6),
    "500-a": (500.0, 40.0, 1),
    "500-b": (500.0, 40.0, 3),
}
"""Name to temperature in kelvin, length in ps, and seed."""

LEARNED, WEIGHED, NATIVE, HEATED = ("300-a", "300-c"), "300-d", "300-b", ("500-a", "500-b")
"""Runs to learn from, to weigh the two energies by, to rank as native, and to take decoys from."""

TURNS = (5.0, 10.0, 20.0)
"""Degrees by which torsions of decoys are turned."""

HEATED_PS = 10.0
"""Time at 500 K after which frames count as decoys."""


def structure() -> Path:
    """The file with villin headpiece that comes with OpenMM."""
    import openmm.app

    return Path(openmm.app.__file__).parent / "data" / "test.pdb"


def simulated(work: Path, quick: bool) -> dict[str, Path]:
    """The folders of all runs, made unless they are there."""
    for name, (kelvin, picoseconds, seed) in RUNS.items():
        if (work / name / "simulation.json").exists():
            continue
        from gibbsian.molecules.simulation import Dynamics, simulate
        from gibbsian.molecules.systems import system_from_pdb

        print(f"simulating {name}", flush=True)
        molecule = system_from_pdb(structure(), kelvin, protein_only=True, constrain_hydrogens=True, relax=True)
        length, frame = (0.4, 0.02) if quick else (picoseconds, 0.2)
        settings = Dynamics(length, frame_ps=frame, equilibration_ps=0.02 if quick else 2.0, seed=seed)
        simulate(molecule, work / name, settings, resume=(work / name / "partial").exists())
    return {name: work / name for name in RUNS}


class TwoViews:
    """Energies of torsions and of distances, learned from frames; called with a trajectory."""

    def __init__(self, train: Any, other: Any, steps: int) -> None:
        self.pairs = residue_pairs(train.topology, 3)
        raw = distances(train, self.pairs)
        self.loc, self.scale = raw.mean(0), raw.std(0).clamp(min=1e-3)
        angles = torsions(train).angles
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.torsions: Energy = PeriodicMLP(angles.shape[1], (128, 128), harmonics=1)
            self.distances: Energy = MLP(len(self.pairs), (128, 128)) + Gaussian(len(self.pairs), scale=3.0)
        rng = torch.Generator().manual_seed(0)
        fit(self.torsions, angles, DenoisingScoreMatching(0.15), rng=rng, steps=steps, learning_rate=3e-3)
        fit(self.distances, (raw - self.loc) / self.scale, DenoisingScoreMatching(0.3), rng=rng, steps=steps)
        self.spreads = {"torsions": 1.0, "distances": 1.0}
        self.spreads = {name: float(values.std()) for name, values in self(other).items() if name != "both"}

    @torch.no_grad()
    def __call__(self, frames: Any) -> dict[str, torch.Tensor]:
        """Energies in nats by view, and their sum."""
        a = self.torsions(torsions(frames).angles)
        b = self.distances((distances(frames, self.pairs) - self.loc) / self.scale)
        return {"torsions": a, "distances": b, "both": a / self.spreads["torsions"] + b / self.spreads["distances"]}


def draw_figure(path: Path, fluctuation: dict[str, np.ndarray], native: Any, decoys: dict[str, Any]) -> None:
    """Fluctuations along the chain at two temperatures, and energies of native frames and decoys."""
    from matplotlib.figure import Figure

    from gibbsian.report.canvas import colour, styled, tidy

    with styled():
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for shade, (name, values) in zip(("data", "samples"), fluctuation.items()):
            left.plot(np.arange(1, len(values) + 1), 10 * values, color=colour(shade), label=name)
        tidy(left, "residue", "fluctuation of the α carbon (Å)")
        left.set_ylim(0, None)
        left.legend(frameon=False)
        kinds = {"native": native} | decoys
        shades = ("data", "samples", "rose", "other", "held")
        low = float(min(v.min() for v in kinds.values()))
        # Energies of torn decoys reach far: the axis is logarithmic above the lowest.
        edges = np.geomspace(1.0, max(float(v.max()) for v in kinds.values()) - low + 2.0, 50)
        for shade, (name, values) in zip(shades, kinds.items()):
            right.hist(
                values.numpy() - low + 1.0, edges, histtype="step", density=False, color=colour(shade), label=name
            )
        right.set_xscale("log")
        powers = [p for p in (1, 10, 100, 1000, 10_000, 100_000) if edges[0] <= p < edges[-1]]
        tidy(right, "learned energy above the lowest, + 1 (spreads of native frames)", "frames")
        right.set_xticks(powers, [f"{p:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") for p in powers])
        right.minorticks_off()
        right.legend(frameon=False, fontsize=7.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, rank, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs") / "villin", help="where the runs are, or are made")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "villin.png")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folders = simulated(options.work, options.quick)
    told = {name: json.loads((folder / "simulation.json").read_text()) for name, folder in folders.items()}
    frames = {name: read_frames([folder]).trajectory for name, folder in folders.items()}
    heated = {}
    for name in HEATED:
        first = 1 if options.quick else int(HEATED_PS / told[name]["settings"]["frame_ps"])
        heated[name] = frames[name][first:]
    with common.Stopwatch() as watch:
        train = md.join([frames[name] for name in LEARNED])
        energy = TwoViews(train, frames[WEIGHED], 40 if options.quick else 800)
    rng = torch.Generator().manual_seed(0)
    native = frames[NATIVE]
    decoys = {"500 K": list(heated.values())}
    decoys |= {f"turned by {turn:g}°": [perturbed(native, turn, rng=rng)] for turn in TURNS}
    scores = {name: [energy(part) for part in parts] for name, parts in decoys.items()}
    areas: dict[str, Any] = {}
    rows = []
    for view in ("torsions", "distances", "both"):
        kinds = {name: torch.cat([part[view] for part in parts]) for name, parts in scores.items()}
        ranking = rank_decoys(energy(native)[view], kinds, rng=rng)
        areas[view] = {name: list(value) for name, value in ranking.areas.items()}
        rows.append([view, *(with_error(*ranking.areas[name]) for name in (*kinds, "all"))])
    rmsf = {
        f"{kelvin} K": torch.stack([fluctuations(frames[name]) for name in names]).mean(0).numpy()
        for kelvin, names in ((300, (*LEARNED, WEIGHED, NATIVE)), (500, HEATED))
    }
    record = common.circumstances([0], 1) | {
        "runs": {
            name: {"ps": r["picoseconds"], "kelvin": r["temperature_k"], "seconds": r["seconds"]}
            for name, r in told.items()
        },
        "native_frames": len(native),
        "decoys": {name: sum(len(p) for p in parts) for name, parts in decoys.items()},
        "physical_decoys": {
            name: int(sum(check_frames(p).physical.sum() for p in parts)) for name, parts in decoys.items()
        },
        "auroc": areas,
        "fluctuation_nm": {name: values.tolist() for name, values in rmsf.items()},
        "spreads": energy.spreads,
        "mean_fluctuation_nm": {name: float(values.mean()) for name, values in rmsf.items()},
        "training_cpu_seconds": watch.cpu,
    }
    table = common.table(["learned energy of", *decoys, "all"], rows)
    words = (
        "Area under the curve of decoys against "
        f"{len(native)} native frames of another run at 300 K than those learned from; at least 0.95 is asked for. "
        "Mean fluctuation of alpha carbons: "
        + ", ".join(f"{10 * v.mean():.2f} Å at {name}" for name, v in rmsf.items())
        + "."
    )
    common.write("villin", "Villin headpiece: native frames against decoys", record, [words, table])
    if not options.quick:
        kinds = {name: torch.cat([part["both"] for part in parts]) for name, parts in scores.items()}
        draw_figure(options.figure, rmsf, energy(native)["both"], kinds)
    print(words + "\n\n" + table)
    return record


if __name__ == "__main__":
    main()
