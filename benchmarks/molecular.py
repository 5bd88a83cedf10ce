"""Alanine dipeptide under Gibbsian's kernels, against OpenMM's own dynamics.

Three questions. Are energies and gradients OpenMM's, and what do they cost beside OpenMM's own loop? Do Hamiltonian
Monte Carlo and parallel tempering agree with OpenMM's Langevin dynamics on torsion marginals and mean
energy? And how often is the rare left-handed basin (0 < phi < 120 degrees) found?

    python benchmarks/molecular.py            about 10 minutes on a free core
    python benchmarks/molecular.py --quick    seconds; for a look at whether it runs
    ... --keep FOLDER                         keeps the draws of each method there, and takes them up again
    ... --reference FOLDER                    metadynamics of ``gibbsian protein simulate ala2``, for the rare basin
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pandas as pd
import torch
from openmm import unit

import common
import gibbsian as gb
from gibbsian.kernels.base import evaluate
from gibbsian.molecules.backbone import torsion_of
from gibbsian.molecules.dipeptide import PHI, PSI
from gibbsian.molecules.physical import MolecularEnergy
from gibbsian.molecules.systems import alanine_dipeptide

TEMPERATURE = 300.0
LADDER = (300.0, 375.0, 470.0, 590.0, 735.0)
HYDROGEN, STEP_PS = 4.0, 0.0025
BIN = 30
LEFT = (0.0, 120.0)
"""Degrees of phi in the left-handed basin."""


@dataclass
class Scale:
    """How much is run: chains, trajectories of how many leapfrog steps, and what OpenMM runs."""

    chains: int = 48
    trajectories: int = 1300
    leapfrog: int = 80
    tempered_chains: int = 16
    tempered: int = 900
    runs: int = 48
    run_ps: float = 110.0
    frame_ps: float = 0.1
    burn: float = 0.2


QUICK = Scale(4, 12, 10, 2, 8, 4, 4.0, 0.1, 0.25)


@dataclass
class Draws:
    """What a method visited: torsions in degrees and energies in kJ/mol, ``(steps, chains)``, after the burn-in."""

    phi: np.ndarray
    psi: np.ndarray
    energy: np.ndarray
    evaluations: int
    seconds: float
    told: dict[str, Any]

    def save(self, path: Path) -> None:
        """Keep them."""
        np.savez(path, **{k: v for k, v in vars(self).items() if k != "told"}, told=np.array(repr(self.told)))


def main(arguments: list[str] | None = None) -> None:
    """Run everything and write ``results/molecular.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, to see whether it runs")
    parser.add_argument("--keep", type=Path, help="folder for the draws of each method")
    parser.add_argument("--reference", type=Path, help="folder of metadynamics to set beside them")
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale = QUICK if told.quick else Scale()
    molecule = alanine_dipeptide(TEMPERATURE)
    energy = MolecularEnergy(molecule)
    record = common.circumstances([0], 1)
    record["versions"]["openmm"] = importlib.metadata.version("openmm")
    record |= {"quick": told.quick, "scale": vars(scale), "ladder_k": LADDER}
    record["agreement"] = agreement(energy)
    record["cost"] = {str(n): cost(energy, n, 5 if told.quick else 60) for n in (1, 8, 64)}
    methods: dict[str, Callable[[], Draws]] = {
        "langevin": lambda: langevin(energy, scale),
        "hmc": lambda: hmc(energy, scale),
        "tempering": lambda: tempering(energy, scale),
    }
    draws = {name: kept(told.keep, name, run) for name, run in methods.items()}
    record["methods"] = {name: summary(d) for name, d in draws.items()}
    record["against_langevin"] = {name: compared(draws[name], draws["langevin"]) for name in ("hmc", "tempering")}
    if told.reference is not None:
        record["reference"] = biased(told.reference)
    figure(draws, common.RESULTS / "molecular.png")
    common.write("molecular", "Alanine dipeptide through the bridge to OpenMM", record, sections(record))
    print("\n\n".join(sections(record)))


def kept(folder: Path | None, name: str, run: Callable[[], Draws]) -> Draws:
    """Draws of a method, taken up where they were kept."""
    path = None if folder is None else folder / f"{name}.npz"
    if path is not None and path.exists():
        with np.load(path) as found:
            numbers = {k: found[k] for k in ("phi", "psi", "energy")}
            told = eval(str(found["told"]), {"__builtins__": {}})  # our own file, of numbers only
            return Draws(**numbers, evaluations=int(found["evaluations"]), seconds=float(found["seconds"]), told=told)
    draws = run()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draws.save(path)
    print(f"{name}: {draws.seconds:.0f} s, {draws.evaluations} evaluations, {draws.told}", flush=True)
    return draws


def agreement(energy: MolecularEnergy, n: int = 64) -> dict[str, float]:
    """Largest relative differences of energies and forces from OpenMM's public interface, over hot configurations."""
    x = hot(energy, n)
    value, grad = evaluate(energy, x)
    single, single_grad = evaluate(energy, x.float())
    context = fresh_context(energy)
    differences: dict[str, list[float]] = {"energy": [], "force": [], "energy_float32": [], "force_float32": []}
    for i in range(n):
        context.setPositions(x[i].numpy() * unit.nanometer)
        state = context.getState(getEnergy=True, getForces=True)
        own = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        force = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        for suffix, v, g in (("", value, grad), ("_float32", single, single_grad)):
            differences["energy" + suffix].append(abs(float(v[i]) * energy.kt - own) / abs(own))
            gap = np.abs(-g[i].double().numpy() * energy.kt - force).max() / np.abs(force).max()
            differences["force" + suffix].append(float(gap))
    return {name: max(values) for name, values in differences.items()}


def cost(energy: MolecularEnergy, n: int, rounds: int) -> dict[str, float]:
    """Microseconds per configuration, ours and OpenMM's own, in turns; medians."""
    x = hot(energy, n)
    context, rows = fresh_context(energy), [row.numpy() for row in x]

    def own() -> None:
        for row in rows:
            context.setPositions(row)
            state = context.getState(energy=True, forces=True)
            state.getPotentialEnergy(), state.getForces(asNumpy=True)

    times: dict[str, list[float]] = {"ours": [], "openmm": []}
    for _ in range(rounds):
        for name, call in (("ours", lambda: evaluate(energy, x)), ("openmm", own)):
            for _ in range(max(1, 64 // n)):
                began = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - began) / n * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"ratio": medians["ours"] / medians["openmm"]}


def hot(energy: MolecularEnergy, n: int) -> torch.Tensor:
    """Configurations of thermal disorder."""
    rng = common.generator(7)
    kernel = gb.HMC(0.001, 10, scale=energy.scale())
    return gb.sample(energy, kernel, energy.start(n), steps=5, rng=rng).state.x


def fresh_context(energy: MolecularEnergy) -> Any:
    """A context of OpenMM's own for the same system."""
    platform = openmm.Platform.getPlatformByName(energy.bridge.platform)
    return openmm.Context(energy.bridge.system, openmm.VerletIntegrator(0.001), platform)


def langevin(energy: MolecularEnergy, scale: Scale) -> Draws:
    """Independent runs of OpenMM's Langevin dynamics with steps of 1 fs, each from the structure."""
    system, every = energy.bridge.system, round(scale.frame_ps / 0.001)
    frames, burn = round(scale.run_ps / scale.frame_ps), round(scale.burn * scale.run_ps / scale.frame_ps)
    x, u, began = np.zeros((frames, scale.runs, 22, 3), np.float32), np.zeros((frames, scale.runs)), time.perf_counter()
    for run in range(scale.runs):
        integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.001)
        integrator.setRandomNumberSeed(run + 1)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(energy.start(1)[0].numpy())
        context.setVelocitiesToTemperature(TEMPERATURE, run + 1)
        for frame in range(frames):
            integrator.step(every)
            state = context.getState(positions=True, energy=True)
            x[frame, run] = state.getPositions(asNumpy=True)._value
            u[frame, run] = state.getPotentialEnergy()._value
    return draws_of(x, u, burn, frames * scale.runs * every, time.perf_counter() - began, {"step_fs": 1.0})


def hmc(energy: MolecularEnergy, scale: Scale) -> Draws:
    """Hamiltonian Monte Carlo from the structure."""
    kernel = gb.HMC(STEP_PS, scale.leapfrog, scale=energy.scale(HYDROGEN), jitter=0.2)
    start = warmed(energy, scale.chains, kernel)
    out = gb.sample(energy, kernel, start, steps=scale.trajectories, rng=common.generator(1), thin=1)
    told = {"acceptance": float(out.acceptance.mean()), "nonfinite": float(out.nonfinite.sum())}
    return of_samples(energy, out, scale, scale.trajectories * scale.leapfrog * scale.chains, told)


def tempering(energy: MolecularEnergy, scale: Scale) -> Draws:
    """Parallel tempering around it."""
    kernel = gb.HMC(STEP_PS, scale.leapfrog, scale=energy.scale(HYDROGEN), jitter=0.2)
    betas = [TEMPERATURE / t for t in LADDER]
    start = warmed(energy, scale.tempered_chains, kernel)
    ladder = gb.ParallelTempering(kernel, betas)
    out = gb.sample(energy, ladder, start, steps=scale.tempered, rng=common.generator(2), thin=1)
    told = {
        "acceptance": float(out.acceptance.mean()),
        "swap_acceptance": float(out.details["swap_acceptance"].mean()),
        "round_trips": float(out.details["round_trips"].sum() * scale.tempered),
        "nonfinite": float(out.nonfinite.sum()),
    }
    count = scale.tempered * scale.leapfrog * scale.tempered_chains * len(LADDER)
    return of_samples(energy, out, scale, count, told)


def warmed(energy: MolecularEnergy, chains: int, kernel: gb.HMC) -> torch.Tensor:
    """The structure with thermal disorder: short trajectories of short steps, since it is a minimum."""
    short = gb.HMC(0.4 * STEP_PS, 10, scale=kernel.scale)
    return gb.sample(energy, short, energy.start(chains), steps=20, rng=common.generator(3)).state.x


def of_samples(energy: MolecularEnergy, out: Any, scale: Scale, evaluations: int, told: dict[str, Any]) -> Draws:
    """Draws of a run of `sample`."""
    burn = round(scale.burn * len(out.draws))
    u = out.kept["energy"].numpy() * energy.kt
    return draws_of(out.draws.numpy(), u, burn, evaluations, out.seconds, told)


def draws_of(x: np.ndarray, u: np.ndarray, burn: int, evaluations: int, seconds: float, told: dict[str, Any]) -> Draws:
    """Torsions and energies after the burn-in."""
    phi, psi = (np.degrees(torsion_of(x[burn:], atoms)) for atoms in (PHI, PSI))
    return Draws(phi, psi, u[burn:], evaluations, seconds, told)


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """A ratio of means over frames with its standard error from independent chains: ``(steps, chains)`` each."""
    a, b = above.mean(0), below.mean(0)
    value = a.mean() / b.mean()
    return float(value), float((a - value * b).std(ddof=1) / b.mean() / math.sqrt(len(a)))


def left(draws: Draws) -> np.ndarray:
    """Frames in the left-handed basin."""
    return (draws.phi > LEFT[0]) & (draws.phi < LEFT[1])


def summary(draws: Draws) -> dict[str, Any]:
    """What a method found, with errors."""
    here, right = left(draws), ~left(draws)
    crossings = int((here[1:] != here[:-1]).sum())
    energy, basin = ratio(draws.energy * right, right), ratio(here, np.ones_like(here))
    return {
        "energy_kj_mol": energy,
        "left_handed": basin,
        "crossings": crossings,
        "frames": int(draws.phi.size),
        "chains": draws.phi.shape[1],
        "evaluations": draws.evaluations,
        "seconds": draws.seconds,
    } | draws.told


def biased(folder: Path, blocks: int = 20) -> dict[str, Any]:
    """The left-handed share by weighted frames of metadynamics, with its error from blocks in time."""
    frames = pd.read_csv(folder / "frames.csv")
    frames = frames[frames.weight > 0]
    here = (frames.phi_deg > LEFT[0]) & (frames.phi_deg < LEFT[1])
    parts = np.array_split(np.stack([frames.weight * here, frames.weight]), blocks, 1)
    share = ratio(*np.stack([p.mean(1) for p in parts], 1)[:, None])
    record = json.loads((folder / "simulation.json").read_text())
    return {"left_handed": share, "picoseconds": record["picoseconds"], "constraints": record["constraints"]}


def compared(draws: Draws, reference: Draws) -> dict[str, Any]:
    """z-scores of torsion marginals and mean energy outside of the left-handed basin, bins of 1 % or more."""
    found: dict[str, Any] = {}
    zs = []
    for name in ("phi", "psi"):
        for low in range(-180, 180, BIN):
            pair = []
            for d in (draws, reference):
                angle, right = getattr(d, name), ~left(d)
                pair.append(ratio((angle >= low) & (angle < low + BIN) & right, right))
            (p, se), (q, se_q) = pair
            if max(p, q) >= 0.01:
                z = (p - q) / max(math.hypot(se, se_q), 1e-12)
                zs.append(z)
                found[f"{name} {low}..{low + BIN}"] = {"ours": (p, se), "langevin": (q, se_q), "z": z}
    (u, se), (v, se_v) = summary(draws)["energy_kj_mol"], summary(reference)["energy_kj_mol"]
    z = np.array(zs)
    return {
        "bins": found,
        "largest": float(np.abs(z).max()),
        "root_mean_square": float(np.sqrt(np.square(z).mean())),
        "beyond_2": int((np.abs(z) > 2).sum()),
        "count": len(zs),
        "energy_z": (u - v) / math.hypot(se, se_v),
        "energy_difference_kj_mol": (u - v, math.hypot(se, se_v)),
    }


def figure(draws: dict[str, Draws], path: Path) -> None:
    """Draw the marginals of the methods over each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = {"langevin": "OpenMM's Langevin dynamics", "hmc": "HMC", "tempering": "parallel tempering"}
    plot, axes = plt.subplots(1, 3, figsize=(10.5, 3.0), layout="constrained")
    colours = {"langevin": "#9aa0a6", "hmc": "#1f77b4", "tempering": "#d95f02"}
    for name, d in draws.items():
        right, shift = ~left(d), {"langevin": 0.0, "hmc": -1.5, "tempering": 1.5}[name]
        for axis, angle in zip(axes, ("phi", "psi")):
            lows = np.arange(-180, 180, 15)
            rows = [ratio((getattr(d, angle) >= low) & (getattr(d, angle) < low + 15) & right, right) for low in lows]
            mean, error = np.array(rows).T / 15
            axis.errorbar(lows + 7.5 + shift, mean, 2 * error, fmt="o-" if name == "langevin" else "o", ms=3,
                          lw=1, color=colours[name], label=names[name])  # fmt: skip
            axis.set(xlabel=f"{angle} (degrees)", xticks=range(-180, 181, 90), ylim=(0, None))
        axes[2].hist(d.energy[right], 60, density=True, histtype="step", color=colours[name], lw=1.3)
    axes[0].set_ylabel("density (per degree)")
    axes[2].set(xlabel="potential energy (kJ/mol)", yticks=[])
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=130, facecolor="white")
    plt.close(plot)


def sections(record: dict[str, Any]) -> list[str]:
    """The page."""
    a = record["agreement"]
    lines = [
        f"Largest relative differences from OpenMM: energies {a['energy']:.1e}, forces {a['force']:.1e}; from single "
        f"precision coordinates {a['energy_float32']:.1e} and {a['force_float32']:.1e}."
    ]
    rows = [(n, f"{c['openmm']:.1f}", f"{c['ours']:.1f}", f"{c['ratio']:.2f}") for n, c in record["cost"].items()]
    lines.append(common.table(("chains per call", "OpenMM (us)", "bridge (us)", "ratio"), rows))
    rows = [
        (
            name,
            f"{m['evaluations'] / 1e6:.2f}",
            f"{m['seconds']:.0f}",
            "{:.2f} ± {:.2f}".format(*m["energy_kj_mol"]),
            "{:.4f} ± {:.4f}".format(*m["left_handed"]),
            m["crossings"],
        )
        for name, m in record["methods"].items()
    ]
    head = ("method", "10^6 evaluations", "seconds", "energy (kJ/mol)", "left-handed", "crossings")
    lines.append(common.table(head, rows))
    rows = [
        (
            name,
            c["count"],
            f"{c['root_mean_square']:.2f}",
            f"{c['largest']:.2f}",
            c["beyond_2"],
            f"{c['energy_z']:.2f}",
        )
        for name, c in record["against_langevin"].items()
    ]
    lines.append(common.table(("against Langevin", "bins", "rms z", "largest |z|", "|z| > 2", "z of energy"), rows))
    if "reference" in record:
        r = record["reference"]
        lines.append(
            "Metadynamics of {:.1f} ns with bonds to hydrogens held: left-handed {:.4f} ± {:.4f}.".format(
                r["picoseconds"] / 1000, *r["left_handed"]
            )
        )
    lines.append("Marginals and energies are those outside of the left-handed basin; errors are over chains.")
    return lines


if __name__ == "__main__":
    main()
