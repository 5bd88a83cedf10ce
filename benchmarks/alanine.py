"""Alanine dipeptide from nothing to landscape, against a long reference run.

    python benchmarks/alanine.py                                  # simulates both runs first: about an hour on a free
    core python benchmarks/alanine.py --run FOLDER --reference FOLDER  # runs that gibbsian protein simulate ala2 made
    python benchmarks/alanine.py --quick                          # tiny runs, to see that it goes

A run of some minutes (10 ns of well-tempered metadynamics) trains the torsion energy; a run ten times as long, of
another seed, is what it is compared with, by the Kullback-Leibler divergence on a grid of 36 x 36 cells from the
reference's weighted histogram to the learned density. Beside it stands the noise floor, the same divergence between the
two halves of the reference. The left-handed basin is all of phi > 0.

Writes results/alanine.json and .md, and docs/images/alanine.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import common
from gibbsian.diagnostics.estimate import with_error
from gibbsian.molecules.basins import basin_differences
from gibbsian.molecules.conformations import Landscape, landscape_of
from gibbsian.molecules.features import torsions
from gibbsian.molecules.landscape import divergence, free_energy, histogram, learned_masses
from gibbsian.molecules.reweighting import effective_sample_size
from gibbsian.molecules.sources import read_frames
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


def reference_of(folder: Path, kt: float) -> dict[str, Any]:
    """The reference's map, its noise floor, and its left-handed basin."""
    frames = read_frames([folder])
    w = frames.weights
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
        "floor": reference["floor"],
        "floors": reference["floors"],
        "kl_above_floor": kl - reference["floor"],
        "left_learned_kj_mol": list(learned),
        "left_frames_kj_mol": list(frames),
        "left_reference_kj_mol": list(true),
        "left_gap_kj_mol": gap,
        "left_gap_in_own_errors": gap / learned.stderr,
        "left_gap_in_joint_errors": gap / math.hypot(learned.stderr, true.stderr),
        "run_frames": len(landscape.energies),
        "run_effective_frames": landscape.effective_frames,
        "reference_frames": reference["frames"],
        "reference_effective_frames": reference["effective_frames"],
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
    parser.add_argument("--run", type=Path, help="folder of the short run")
    parser.add_argument("--reference", type=Path, help="folder of the long run")
    parser.add_argument("--work", type=Path, default=Path("runs") / "alanine", help="where missing runs are made")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "alanine.png")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lengths = (16.0, 24.0) if options.quick else (10_000.0, 100_000.0)
    run = options.run or simulated(options.work / "run", lengths[0], 2, options.quick)
    long = options.reference or simulated(options.work / "reference", lengths[1], 1, options.quick)
    with common.Stopwatch() as watch:
        frames = read_frames([run])
        settings = QUICK if options.quick else TorsionTraining()
        rng = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        landscape = landscape_of(frames, settings, rng=rng)
        trained = time.perf_counter() - began
    reference = reference_of(long, landscape.model.kt)
    told = [json.loads((folder / "simulation.json").read_text()) for folder in (run, long)]
    found = compared(landscape, reference) | {
        "training_seconds": trained,
        "training_cpu_seconds": watch.cpu,
        "run_ps": told[0]["picoseconds"],
        "run_seconds": told[0]["seconds"],
        "reference_ps": told[1]["picoseconds"],
        "reference_seconds": told[1]["seconds"],
    }
    record = common.circumstances([0], 1) | found
    rows = [
        ["divergence to the reference, learned (nat)", f"{found['kl']:.4f}", "floor + 0.02"],
        ["noise floor: between halves of the reference (nat)", f"{found['floor']:.4f}", ""],
        ["divergence above the floor (nat)", f"{found['kl_above_floor']:.4f}", "0.02"],
        ["divergence to the reference, histogram of the run (nat)", f"{found['kl_histogram']:.4f}", ""],
        ["left-handed basin, learned (kJ/mol)", with_error(*found["left_learned_kj_mol"]), ""],
        ["left-handed basin, reference (kJ/mol)", with_error(*found["left_reference_kj_mol"]), ""],
        ["difference (kJ/mol)", f"{found['left_gap_kj_mol']:.2f}", "1"],
        ["difference in its own stated errors", f"{found['left_gap_in_own_errors']:.2f}", "1"],
        ["difference in both errors", f"{found['left_gap_in_joint_errors']:.2f}", ""],
    ]
    times = (
        f"Run of {found['run_ps'] / 1000:g} ns in {found['run_seconds']:.0f} s; training in {trained:.0f} s "
        f"({watch.cpu:.0f} s of processor time); reference of {found['reference_ps'] / 1000:g} ns in "
        f"{found['reference_seconds']:.0f} s."
    )
    table = common.table(["", "found", "asked for at most"], rows)
    common.write("alanine", "Alanine dipeptide: learned landscape against a long reference", record, [times, table])
    if not options.quick:
        draw_figure(options.figure, landscape, reference, (found["run_ps"], found["reference_ps"]))
    print(times + "\n\n" + table)
    return record


if __name__ == "__main__":
    main()
