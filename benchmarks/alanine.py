"""Alanine dipeptide from nothing to landscape, against a long reference run.

    python benchmarks/alanine.py            # simulates all runs first: some two hours of a free core
    python benchmarks/alanine.py --run FOLDER ... --reference FOLDER    # runs that gibbsian protein simulate ala2 made
    ... --rebuild                           # the reference's weights anew from its trajectory, if older than its code
    python benchmarks/alanine.py --quick    # tiny runs, to see that it goes

Runs of some minutes (10 ns of well-tempered metadynamics, three seeds) train a torsion energy each. A run ten times as
long, of another seed, is what they are compared with, by the Kullback-Leibler divergence on a grid of 36 x 36 cells
from the reference's weighted histogram to the learned density. Beside it stands the noise floor, the same divergence
between the two halves of the reference. The left-handed basin is all of phi > 0.

Writes results/alanine.json and .md, and docs/images/alanine.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import common
from gibbsian.diagnostics.estimate import with_error
from gibbsian.molecules.basins import basin_differences
from gibbsian.molecules.conformations import Landscape, landscape_of
from gibbsian.molecules.features import torsions
from gibbsian.molecules.landscape import divergence, free_energy, histogram, learned_masses
from gibbsian.molecules.reweighting import effective_sample_size, normalised_weights
from gibbsian.molecules.sources import read_frames
from gibbsian.molecules.thermal import thermal_energy
from gibbsian.molecules.torsion_settings import TorsionTraining

LEFT = "left-handed - rest"
PSEUDOCOUNT = 1e-6
"""Part of a histogram spread over all cells where it is the second argument of a divergence: some are empty."""

QUICK = TorsionTraining(steps=(150,), members=1, replicates=1, hidden=(32, 32))


def simulated(folder: Path, picoseconds: float, seed: int, quick: bool = False) -> Path:
    """A run of metadynamics in a folder, made unless it is there."""
    if not (folder / "simulation.json").exists():
        from gibbsian.molecules.metadynamics import Bias
        from gibbsian.molecules.simulation import Dynamics, simulate
        from gibbsian.molecules.systems import alanine_dipeptide

        molecule = alanine_dipeptide(300.0, constrain_hydrogens=True)
        print(f"simulating {picoseconds:g} ps into {folder}", flush=True)
        dynamics = Dynamics(picoseconds, seed=seed)
        if quick:
            dynamics = Dynamics(picoseconds, frame_ps=0.1, equilibration_ps=1.0, seed=seed)
        simulate(molecule, folder, dynamics, bias=Bias(), residue="ALA2", resume=(folder / "partial").exists())
    return folder


def rebuilt_weights(folder: Path) -> Any:
    """Weights of a run's frames as `simulate` gives them, from its angles and settings."""
    import numpy as np
    import pandas as pd

    from gibbsian.molecules.metadynamics import Bias, rebuilt_bias, unbiasing_weights

    told, frames = json.loads((folder / "simulation.json").read_text()), pd.read_csv(folder / "frames.csv")
    phi, psi = (np.radians(frames[name].to_numpy()) for name in ("phi_deg", "psi_deg"))
    kelvin, settings = told["temperature_k"], told["settings"]
    felt = rebuilt_bias(phi, psi, kelvin, Bias(**told["metadynamics"]), settings["frame_ps"])
    return unbiasing_weights(felt, kelvin, settings["discard"])


def reference_of(folder: Path, kt: float, rebuild: bool = False) -> dict[str, Any]:
    """The reference's map, its noise floor, and its left-handed basin."""
    frames = read_frames([folder])
    w = normalised_weights(torch.as_tensor(rebuilt_weights(folder)).log()) if rebuild else frames.weights
    angles, w = torsions(frames.trajectory).angles[w > 0], w[w > 0]
    half = len(w) // 2
    halves = [histogram(angles[s], w[s]) for s in (slice(0, half), slice(half, None))]
    floors = [divergence(halves[0], halves[1], PSEUDOCOUNT), divergence(halves[1], halves[0], PSEUDOCOUNT)]
    rng = torch.Generator().manual_seed(0)
    found = basin_differences(angles, w, kt, rng=rng)
    return {
        "map": histogram(angles, w),
        "floor": sum(floors) / 2,
        "floors": floors,
        "left": found.kj_mol[LEFT],
        "frames": len(w),
        "effective_frames": effective_sample_size(w),
    }


def compared(landscape: Landscape, reference: dict[str, Any]) -> dict[str, Any]:
    """Divergences from the reference, and the left-handed basin, against what was asked for."""
    (one,) = landscape.maps
    learned, frames = (d.kj_mol[LEFT] for d in (one.learned_differences, one.frame_differences))
    true = reference["left"]
    kl = divergence(reference["map"], learned_masses(landscape.fit.energy))
    gap = learned.value - true.value
    return {
        "kl": kl,
        "kl_histogram": divergence(reference["map"], one.frames, PSEUDOCOUNT),
        "kl_above_floor": kl - reference["floor"],
        "left_learned_kj_mol": list(learned),
        "left_frames_kj_mol": list(frames),
        "left_gap_kj_mol": gap,
        "left_gap_in_own_errors": gap / learned.stderr,
        "left_gap_in_joint_errors": gap / math.hypot(learned.stderr, true.stderr),
        "run_frames": len(landscape.energies),
        "run_effective_frames": landscape.effective_frames,
        "objective": landscape.fit.objective,
        "steps": landscape.fit.steps,
        "held_out_loss": {str(k): v for k, v in landscape.fit.scores.items()},
    }


def draw_figure(path: Path, landscape: Landscape, reference: dict[str, Any], lengths: tuple[float, float]) -> None:
    """Maps, learned and of the reference, and the profile along phi."""
    from matplotlib.figure import Figure

    from gibbsian.molecules.landscape import Band, profile
    from gibbsian.molecules.landscape_page import profile_bands
    from gibbsian.molecules.ramachandran import paint_map, paint_profile
    from gibbsian.report.canvas import styled

    (one,), kt = landscape.maps, landscape.model.kt
    with styled():
        figure = Figure(figsize=(10.2, 3.3), layout="constrained")
        learned, known, along = figure.subplots(1, 3, width_ratios=[1, 1, 1.35])
        paint_map(learned, free_energy(one.learned, kt))
        learned.set_title(f"learned from {lengths[0] / 1000:.3g} ns", fontsize=9)
        paint_map(known, free_energy(reference["map"], kt))
        known.set_title(f"reference, {lengths[1] / 1000:.3g} ns", fontsize=9)
        line = free_energy(profile(reference["map"], 0), kt)
        paint_profile(along, "φ", *profile_bands(one, 0, kt), reference=Band(line, line, line))
        along.set_title("free energy along φ", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", help="folders of short runs")
    parser.add_argument("--reference", type=Path, help="folder of the long run")
    parser.add_argument("--work", type=Path, default=Path("runs") / "alanine", help="where missing runs are made")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "alanine.png")
    parser.add_argument("--rebuild", action="store_true", help="weigh the reference anew")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lengths, seeds = ((16.0, 24.0), (2,)) if options.quick else ((10_000.0, 100_000.0), (2, 3, 4))
    runs = options.run or [simulated(options.work / f"run-{s}", lengths[0], s, options.quick) for s in seeds]
    long = options.reference or simulated(options.work / "reference", lengths[1], 1, options.quick)
    reference = reference_of(long, thermal_energy(300.0), options.rebuild)
    told = json.loads((long / "simulation.json").read_text())
    found, first = [], None
    for i, run in enumerate(runs):
        one, landscape = learned(run, reference, QUICK if options.quick else TorsionTraining())
        found.append(one)
        print(f"run {i + 1}: {one['kl']:.4f} nat, left-handed {one['left_gap_kj_mol']:.2f} kJ/mol off", flush=True)
        first = first or landscape
    forces = matched_forces(runs[0], options.quick)
    record = common.circumstances([0], 1) | {
        "runs": found,
        "forces": forces,
        "floor": reference["floor"],
        "floors": reference["floors"],
        "left_reference_kj_mol": list(reference["left"]),
        "reference_frames": reference["frames"],
        "reference_effective_frames": reference["effective_frames"],
        "reference_ps": told["picoseconds"],
        "reference_seconds": told["seconds"],
    }
    table = common.table(["", *(f"run {i + 1}" for i in range(len(runs))), "at most"], lines(found, reference))
    times = (
        f"Runs of {found[0]['run_ps'] / 1000:g} ns, of different seeds, in "
        f"{_listed(found, 'run_seconds')} s; training in "
        f"{_listed(found, 'training_cpu_seconds')} s of processor time; reference of "
        f"{told['picoseconds'] / 1000:.3g} ns in {told['seconds']:.0f} s."
    )
    words = (
        f"Forces matched by a message-passing network on {forces['rows']} frames in {forces['cpu_seconds']:.0f} s of "
        f"processor time: root mean square error on held-out frames {forces['relative_error']:.3f} of the forces' own."
    )
    title = "Alanine dipeptide: learned landscapes against a long reference"
    common.write("alanine", title, record, [times, table, words])
    if not options.quick and first is not None:
        draw_figure(options.figure, first, reference, (found[0]["run_ps"], told["picoseconds"]))
    print("\n\n".join((times, table, words)))
    return record


def matched_forces(run: Path, quick: bool) -> dict[str, float]:
    """Fit a network of coordinates to the force field's forces on frames of a run; how far off it is on others."""
    from gibbsian.energies.invariant import InvariantNetwork
    from gibbsian.molecules.physical import MolecularEnergy
    from gibbsian.molecules.systems import alanine_dipeptide
    from gibbsian.objectives.base import Batch
    from gibbsian.objectives.force_matching import ForceMatching
    from gibbsian.training.fit import fit

    frames = read_frames([run], stride=1 if quick else 10).trajectory
    physical = MolecularEnergy(alanine_dipeptide(300.0))
    x = torch.tensor(frames.xyz).double().requires_grad_()
    (slope,) = torch.autograd.grad(physical(x).sum(), x)
    rows, forces = x.detach().float(), -slope.float()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    train, held = order[len(rows) // 10 :], order[: len(rows) // 10]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = InvariantNetwork(range(22), features=32, layers=2, basis=32, cutoff=1.0)
    # In the size of the forces, so that the network's own slopes are of order one.
    energy = float(forces.square().mean().sqrt()) * network
    with common.Stopwatch() as watch:
        rng = torch.Generator().manual_seed(0)
        batch, steps = Batch(rows[train], {"forces": forces[train]}), 10 if quick else 1200
        fit(energy, batch, ForceMatching(), rng=rng, steps=steps, batch_size=16, learning_rate=3e-3, health=False)
    told = ForceMatching()(energy, Batch(rows[held], {"forces": forces[held]}), rng).metrics
    return {
        "relative_error": float(told["force_rms"] / told["force_scale"]),
        "scale_nats_per_nm": float(told["force_scale"]),
        "rows": len(train),
        "steps": steps,
        "cpu_seconds": watch.cpu,
    }


def learned(run: Path, reference: dict[str, Any], settings: TorsionTraining) -> tuple[dict[str, Any], Landscape]:
    """Learn a run's landscape, and compare it with the reference."""
    told = json.loads((run / "simulation.json").read_text())
    began = time.perf_counter()
    with common.Stopwatch() as watch:
        landscape = landscape_of(read_frames([run]), settings, rng=torch.Generator().manual_seed(0))
    found = compared(landscape, reference) | {
        "training_seconds": time.perf_counter() - began,
        "training_cpu_seconds": watch.cpu,
        "run_ps": told["picoseconds"],
        "run_seconds": told["seconds"],
    }
    return found, landscape


def _listed(found: list[dict[str, Any]], name: str) -> str:
    return ", ".join(f"{one[name]:.0f}" for one in found)


def lines(found: list[dict[str, Any]], reference: dict[str, Any]) -> list[list[str]]:
    """The table, a column per run."""

    def line(name: str, tell: Callable[[dict[str, Any]], str], limit: str = "") -> list[str]:
        return [name, *(tell(one) for one in found), limit]

    return [
        line("divergence of the learned density from the reference (nat)", lambda one: f"{one['kl']:.4f}"),
        line("noise floor: between halves of the reference (nat)", lambda one: f"{reference['floor']:.4f}"),
        line("divergence above the floor (nat)", lambda one: f"{one['kl_above_floor']:.4f}", "0.02"),
        line("divergence of the run's histogram (nat)", lambda one: f"{one['kl_histogram']:.4f}"),
        line("left-handed basin, learned (kJ/mol)", lambda one: with_error(*one["left_learned_kj_mol"])),
        line("left-handed basin, reference (kJ/mol)", lambda one: with_error(*reference["left"])),
        line("difference (kJ/mol)", lambda one: f"{one['left_gap_kj_mol']:.2f}", "1"),
        line("difference in stated errors", lambda one: f"{one['left_gap_in_own_errors']:.2f}", "1"),
        line("difference in both errors", lambda one: f"{one['left_gap_in_joint_errors']:.2f}"),
    ]


if __name__ == "__main__":
    main()
