"""Alanine dipeptide by a learned proposal: both sides of the barrier in phi, from a short biased run.

A short run of metadynamics visits both sides: phi < 0, and the left-handed basin at 0 < phi < 120 degrees. A proposal
over internal coordinates is learned from its frames. Then the share of the left-handed basin is found four ways: by
importance weights; by Metropolis chains with independent proposals; by chains that move locally (HMC) and jump, all
started at phi < 0; and by plain Langevin dynamics from there. Long runs of metadynamics are the reference. Energy
evaluations are counted for all, learning included.

    python benchmarks/proposal.py                  about half an hour on a free core
    python benchmarks/proposal.py --quick          a minute, to see that it runs
    ... --run FOLDER --reference FOLDER            runs of ``gibbsian protein simulate ala2`` that are there
    ... --keep FOLDER                              draws of plain dynamics (48 runs of 110 ps, steps of 1 fs), kept
    ... --plain FOLDER                             one plain run of ``gibbsian protein simulate ala2``, steps of 2 fs

Writes results/proposal.json, .md and .png, and docs/images/proposal.png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import common
import gibbsian as gb
import molecular
from alanine import simulated
from gibbsian.diagnostics.chains import effective_sample_size
from gibbsian.diagnostics.estimate import with_error
from gibbsian.kernels.independent import IndependentMH
from gibbsian.kernels.jumps import Jumps
from gibbsian.molecules.boltzmann_draws import WeightedDraws, learn_proposal, weighted_draws
from gibbsian.molecules.dipeptide import PHI, PSI
from gibbsian.molecules.internal import InternalCoordinates
from gibbsian.molecules.internal_energy import InternalEnergy
from gibbsian.molecules.physical import MolecularEnergy
from gibbsian.molecules.proposal import CartesianProposal, InternalProposal
from gibbsian.molecules.proposal_training import ProposalTraining
from gibbsian.molecules.sources import read_frames
from gibbsian.molecules.systems import alanine_dipeptide
from gibbsian.molecules.zmatrix import internal_coordinates

MILLION = 1e6


@dataclass
class Scale:
    """How much is run."""

    run_ps: float = 2000.0
    reference_ps: float = 50_000.0
    frames: int = 20_000
    training: ProposalTraining = ProposalTraining()
    draws: int = 150_000
    chains: int = 64
    independent: int = 1500
    mixed: int = 150
    leapfrog: int = 20
    tries: int = 30


QUICK = Scale(
    16.0, 24.0, 150, ProposalTraining(4, transforms=2, hidden=(16,), steps=20), 400, 4, 10, 4, 5, 2
)  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run everything; returns the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs")
    parser.add_argument("--work", type=Path, default=Path("runs/proposal"), help="where runs are made")
    parser.add_argument("--run", type=Path, help="metadynamics to learn from")
    parser.add_argument("--reference", type=Path, nargs="+", help="metadynamics to compare with; the first is drawn")
    parser.add_argument("--keep", type=Path, help="folder of plain dynamics' draws")
    parser.add_argument("--plain", type=Path, help="folder of a plain run")
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale = QUICK if told.quick else Scale()
    run = told.run or simulated(told.work / "run", scale.run_ps, 3, told.quick)
    references = told.reference or [simulated(told.work / "reference", scale.reference_ps, 1, told.quick)]
    molecule = alanine_dipeptide(300.0)
    energy, internal = MolecularEnergy(molecule), internal_coordinates(molecule)
    record = common.circumstances([0], 1)
    record["versions"] |= {name: importlib.metadata.version(name) for name in ("openmm", "zuko")}
    record |= {"quick": told.quick, "temperature_k": 300.0}
    record["run"], record["references"] = biased(run), [biased(folder) for folder in references]
    proposal, record["learning"] = learned(energy, internal, run, scale)
    methods = {"importance weights": weighed(energy, proposal, scale)}
    draws = methods["importance weights"].pop("draws")
    print(methods, flush=True)
    methods["independent Metropolis"] = independent(energy, proposal, scale)
    methods["HMC with jumps"] = mixed(energy, proposal, scale)
    methods["HMC alone"] = mixed(energy, None, scale)
    plain = molecular.QUICK if told.quick else molecular.Scale()
    methods["Langevin, 1 fs"] = many(molecular.kept(told.keep, "langevin", lambda: molecular.langevin(energy, plain)))
    if told.plain is not None:
        methods["Langevin, 2 fs, one run"] = one(told.plain)
    record["methods"] = methods
    record["learning_evaluations"] = record["run"]["evaluations"] + record["learning"]["evaluations"]
    figure(common.RESULTS / "proposal.png", record, draws, proposal, references[0])
    if not told.quick:
        shutil.copy(common.RESULTS / "proposal.png", common.RESULTS.parents[1] / "docs" / "images" / "proposal.png")
    common.write("proposal", "Alanine dipeptide by a learned proposal", record, sections(record))
    print("\n\n".join(sections(record)))
    return record


def learned(
    energy: MolecularEnergy, internal: InternalCoordinates, run: Path, scale: Scale
) -> tuple[InternalProposal, dict[str, Any]]:
    """A proposal from a run's frames."""
    frames = read_frames([run])
    rng = common.generator(1)
    x = torch.as_tensor(np.array(frames.trajectory.xyz)).double()
    index = torch.randperm(len(x), generator=rng)[: scale.frames]
    with common.Stopwatch() as watch:
        found = learn_proposal(
            energy, internal, x[index], [PHI, PSI], scale.training, rng=rng, weights=frames.weights[index],
            progress=lambda line: print(line, flush=True),
        )  # fmt: skip
    return found.fit.proposal, {
        "frames": len(index),
        "evaluations": found.evaluations,
        "seconds": watch.wall,
        "processor_seconds": watch.cpu,
        "held_out_nats": [found.fit.gaussian, found.fit.validation],
        "training": vars(scale.training),
    }


def phi_of(internal: InternalCoordinates, z: Tensor) -> Tensor:
    """Phi in degrees, from -180 to 180."""
    turn = z[..., internal.torsion(PHI)] / (2 * math.pi)
    return 360.0 * (turn - turn.round())


def weighed(energy: MolecularEnergy, proposal: InternalProposal, scale: Scale) -> dict[str, Any]:
    """Importance weights: one energy each, without forces."""
    with common.Stopwatch() as watch:
        draws = weighted_draws(
            InternalEnergy(energy, proposal.internal), proposal, scale.draws, rng=common.generator(2)
        )
    value = draws.average(rare(phi_of(proposal.internal, draws.z)))
    worth = min(float(scale.draws), value.value * (1 - value.value) / value.stderr**2)
    return {
        "right": tuple(value),
        "ess_fraction": draws.ess,
        "log_z": [float(draws.log_z.value), float(draws.log_z.stderr)],
        "largest_weight": float(draws.weights.max()),
        "proposed_right": float((rare(phi_of(proposal.internal, draws.z))).double().mean()),
        "draws": draws,
        "evaluations": scale.draws,
        "seconds": watch.wall,
        "processor_seconds": watch.cpu,
        "ess_of_the_share": worth,
    }


def rare(phi: Any) -> Any:
    """Where phi is in the left-handed basin, 0 to 120 degrees."""
    return (phi > 0) & (phi < 120)


def started(energy: MolecularEnergy, scale: Scale) -> Tensor:
    """Chains at phi = -80 degrees, with thermal disorder."""
    kernel = gb.HMC(molecular.STEP_PS, scale.leapfrog, scale=energy.scale(molecular.HYDROGEN), jitter=0.2)
    return molecular.warmed(energy, scale.chains, kernel)


def of_chains(phi: Tensor, evaluations: int, watch: common.Stopwatch, told: dict[str, Any]) -> dict[str, Any]:
    """The share of 0 < phi < 120 over chains ``(steps, chains)``, its error from their scatter, and what it cost."""
    right = rare(phi).double()
    means = right.mean(0)
    crossed = (right[1:] != right[:-1]).sum()
    worth = float(effective_sample_size(right, ranked=False)) if float(right.std()) > 0 else 0.0
    # Chains that all stayed agree perfectly, and know nothing.
    error = float(means.std() / math.sqrt(len(means))) if int(crossed) else math.nan
    return {
        "right": (float(right.mean()), error),
        "crossings": int(crossed),
        "chains_that_crossed": int((right.max(0).values > 0).sum()),
        "chains": right.shape[1],
        "evaluations": evaluations,
        "seconds": watch.wall,
        "processor_seconds": watch.cpu,
        "ess_of_the_share": worth,
    } | told


def independent(energy: MolecularEnergy, proposal: InternalProposal, scale: Scale) -> dict[str, Any]:
    """Independent Metropolis in internal coordinates, all chains from phi < 0; the first tenth is left out."""
    internal = proposal.internal
    target, burn = InternalEnergy(energy, internal), scale.independent // 10
    start = internal.of(started(energy, scale))
    with common.Stopwatch() as watch:
        out = gb.sample(
            target,
            IndependentMH(proposal),
            start,
            steps=scale.independent,
            warmup=burn,
            thin=1,
            rng=common.generator(3),
        )
    told = {"acceptance": float(out.acceptance.mean())}
    return of_chains(phi_of(internal, out.draws), scale.chains * scale.independent, watch, told)


def mixed(energy: MolecularEnergy, proposal: InternalProposal | None, scale: Scale) -> dict[str, Any]:
    """Trajectories of HMC with jumps after each, or without; Cartesian, from phi < 0, the first tenth left out."""
    kernel: Any = gb.HMC(molecular.STEP_PS, scale.leapfrog, scale=energy.scale(molecular.HYDROGEN), jitter=0.2)
    if proposal is not None:
        kernel = Jumps(kernel, CartesianProposal(proposal), scale.tries)
    # Without jumps as many evaluations, for the same price.
    steps = scale.mixed * (scale.leapfrog + scale.tries) // kernel.gradients
    with common.Stopwatch() as watch:
        out = gb.sample(
            energy, kernel, started(energy, scale), steps=steps, warmup=steps // 10, thin=1, rng=common.generator(4)
        )
    phi = torch.as_tensor(np.degrees(molecular.torsion_of(out.draws.numpy(), PHI)))
    told = {"acceptance": float(out.acceptance.mean())}
    if proposal is not None:
        told["jump_acceptance"] = float(out.details["jump_acceptance"].mean())
    return of_chains(phi, scale.chains * steps * kernel.gradients, watch, told)


def many(draws: molecular.Draws) -> dict[str, Any]:
    """Independent runs of plain dynamics."""
    watch = common.Stopwatch()
    watch.wall, watch.cpu = draws.seconds, math.nan
    return of_chains(torch.as_tensor(draws.phi), draws.evaluations, watch, draws.told)


def one(folder: Path) -> dict[str, Any]:
    """A plain run of `simulate`, from phi < 0; its error from twenty blocks, where it crossed."""
    told = json.loads((folder / "simulation.json").read_text())
    phi = pd.read_csv(folder / "frames.csv").phi_deg.to_numpy()
    watch = common.Stopwatch()
    watch.wall, watch.cpu = told["seconds"], math.nan
    blocks = torch.as_tensor(phi[: len(phi) // 20 * 20].reshape(20, -1).T.copy())
    crossed = int((rare(phi)[1:] != rare(phi)[:-1]).sum())
    return of_chains(blocks, steps_of(told), watch, {}) | {"chains": 1, "crossings": crossed}


def steps_of(told: dict[str, Any]) -> int:
    """Evaluations of a simulation."""
    settings = told["settings"]
    return round((told["picoseconds"] + settings["equilibration_ps"]) / (1e-3 * settings["step_fs"]))


def biased(folder: Path, blocks: int = 20) -> dict[str, Any]:
    """The share of 0 < phi < 120 by weighted frames of metadynamics, its error from blocks in time."""
    told = json.loads((folder / "simulation.json").read_text())
    frames = pd.read_csv(folder / "frames.csv")
    frames = frames[frames.weight > 0]
    parts = np.array_split(np.stack([frames.weight * rare(frames.phi_deg), frames.weight]), blocks, 1)
    value = molecular.ratio(*np.stack([p.mean(1) for p in parts], 1)[:, None])
    return {
        "right": value,
        "evaluations": steps_of(told),
        "seconds": told["seconds"],
        "picoseconds": told["picoseconds"],
        "constraints": told["constraints"],
        "step_fs": told["settings"]["step_fs"],
    }


def sections(record: dict[str, Any]) -> list[str]:
    """What the Markdown file says."""
    run, learning, by = record["run"], record["learning"], record["methods"]
    weights = by["importance weights"]
    cost = record["learning_evaluations"]
    rows = []
    for name, m in by.items():
        learns = not (name.startswith("Langevin") or name == "HMC alone")
        rows.append(
            [name, with_error(*m["right"]), m.get("crossings", ""), f"{m['evaluations'] / MILLION:.3g}",
             f"{(m['evaluations'] + learns * cost) / MILLION:.3g}", f"{m['seconds']:.0f}",
             f"{m['ess_of_the_share'] / m['evaluations'] * MILLION:,.0f}"]
        )  # fmt: skip
    biased_runs = [("metadynamics learned from", run), *(("metadynamics, reference", m) for m in record["references"])]
    for name, m in biased_runs:
        count, bonds = f"{m['evaluations'] / MILLION:.3g}", "held" if m["constraints"] else "free"
        told = f"{name} ({m['picoseconds'] / 1000:.3g} ns, {m['step_fs']:g} fs, bonds to hydrogens {bonds})"
        rows.append([told, with_error(*m["right"]), "", count, count, f"{m['seconds']:.0f}", ""])
    chains, jumps = by["independent Metropolis"], by["HMC with jumps"]
    return [
        f"Learned from {learning['frames']} frames of {run['picoseconds']:g} ps of metadynamics "
        f"({run['evaluations'] / MILLION:.3g} million evaluations, {run['seconds']:.0f} s), with "
        f"{learning['evaluations'] / MILLION:.3g} million more to set bonds free, in {learning['seconds']:.0f} s "
        f"({learning['processor_seconds']:.0f} s of processor time).",
        f"Effective size of the importance weights {weights['ess_fraction']:.1%}: "
        f"{weights['ess_fraction'] * MILLION:,.0f} draws per million evaluations. Acceptance of independent Metropolis "
        f"{chains['acceptance']:.1%}, of jumps between HMC {jumps['jump_acceptance']:.1%}. The proposal itself draws "
        f"0 < phi < 120 with {weights['proposed_right']:.3f}.",
        common.table(
            (
                "share of 0 < phi < 120",
                "found",
                "crossings",
                "million evaluations",
                "with learning",
                "seconds",
                "effective draws of the share per million",
            ),
            rows,
        ),
        "Chains and plain dynamics start at phi = -80 degrees. With learning are the evaluations of the metadynamics "
        "learned from, and those that set bonds free. Seconds of plain dynamics and of metadynamics are those of runs "
        "made at another time, on the same machine under other loads; a question mark is an error that cannot be told, "
        "as nothing crossed.",
    ]


def figure(
    path: Path, record: dict[str, Any], draws: WeightedDraws, proposal: InternalProposal, reference: Path
) -> None:
    """Draw phi by proposal, weights and reference; and the share of the left-handed basin against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot, (left, right) = plt.subplots(1, 2, figsize=(10.0, 3.4), layout="constrained")
    frames, edges = pd.read_csv(reference / "frames.csv"), np.linspace(-180, 180, 73)
    phi = phi_of(proposal.internal, draws.z).numpy()
    for name, values, w, style in (
        ("reference metadynamics", frames.phi_deg, frames.weight, {"color": "#9aa0a6", "lw": 4.0}),
        ("proposal", phi, None, {"color": "#d95f02", "lw": 1.0, "ls": "--"}),
        ("proposal, weighted", phi, draws.weights.numpy(), {"color": "#1f77b4", "lw": 1.4}),
    ):
        height, _ = np.histogram(values, edges, weights=w, density=True)
        left.stairs(np.where(height > 0, height, np.nan), edges, baseline=None, label=name, **style)
    left.set(yscale="log", xlabel="phi (degrees)", ylabel="density per degree", xlim=(-180, 180), ylim=(1e-9, 1e-1))
    left.set_xticks(range(-180, 181, 60))
    left.legend(frameon=False, fontsize=8)
    cost = record["learning_evaluations"]
    rows = [(n, m, 0 if n.startswith("Langevin") or n == "HMC alone" else cost) for n, m in record["methods"].items()]
    for m, shade in zip(record["references"], (0.45, 0.2)):
        value, error = m["right"]
        right.axvspan(value - 2 * error, value + 2 * error, color="#9aa0a6", alpha=shade, lw=0)
        right.axvline(value, color="#9aa0a6", lw=1.0)
    for i, (_, m, extra) in enumerate(rows):
        share, spread = m["right"]
        known = math.isfinite(spread)
        colour = "#1f77b4" if extra else "#d95f02"
        right.errorbar(share, i, xerr=2 * spread if known else None, fmt="o" if known else "x", color=colour, capsize=3)
        words = f"{(m['evaluations'] + extra) / MILLION:.2g} million evaluations" + ("" if known else ", never crossed")
        right.annotate(words, (share, i), (6, 5), textcoords="offset points", fontsize=8)
    right.set_yticks(range(len(rows)), [name for name, *_ in rows])
    right.set(
        xlabel="share of 0 < phi < 120 degrees, ± 2 standard errors",
        ylim=(len(rows) - 0.4, -0.7),
    )
    right.set_xlim(-0.002, max(0.04, 1.3 * max(m["right"][0] for _, m, _ in rows)))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    plot.savefig(path, dpi=150)
    plt.close(plot)


if __name__ == "__main__":
    main()
