"""``gibbsian protein landscape``: from a trajectory to the free-energy landscape of its torsions, and a page of it."""

from __future__ import annotations

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gibbsian.commands.console import console_of, generator
from gibbsian.errors import OptionError
from gibbsian.molecules.torsion_settings import TorsionTraining


def landscape(
    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TOP TRAJ ...|FOLDER|ala2", help_behavior_hint="")
    ],
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None,
    weights: Annotated[Path | None, tyro.conf.arg(metavar="CSV", help_behavior_hint="")] = None,
    temperature: Annotated[float | None, tyro.conf.arg(metavar="K", help_behavior_hint="")] = None,
    reweight_to: Annotated[float | None, tyro.conf.arg(metavar="K", help_behavior_hint="")] = None,
    torsions: tuple[Literal["phi", "psi", "omega", "chi1", "chi2", "chi3", "chi4"], ...] = ("phi", "psi"),
    residues: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...", help_behavior_hint="")] = (),
    atoms: Annotated[str | None, tyro.conf.arg(metavar="SELECTION", help_behavior_hint="")] = None,
    stride: int = 1,
    unit: Literal["nanometre", "angstrom"] = "nanometre",
    incomplete: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    objective: Literal["auto", "exact", "nce", "denoising", "score", "pcd"] = "auto",
    steps: tuple[int, ...] = TorsionTraining.steps,
    replicates: int = TorsionTraining.replicates,
    structures: int = 10,
    samples: int = 100,
    decoys: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="")] = (),
    picoseconds: float = 10_000.0,
    seed: int = 0,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Learn the free-energy landscape of a molecule's torsions from a trajectory, and write a report.

    Parameters
    ----------
    files
        ala2, which simulates alanine dipeptide first; the folder of a simulation (gibbsian protein simulate); or a
        topology (.pdb, .cif, .gro, .prmtop, .psf, .top) and trajectories (.dcd, .xtc, .trr, .nc, .pdb); or one .pdb or
        .cif of several models.
    out
        The landscape's folder; runs/NAME-landscape by default.
    weights
        A table with a line per frame and a column weight, log_weight (nats) or bias_kj_mol (the bias that acted, less
        what it had come to on average); a simulation's own when left out.
    temperature
        Of the run, in kelvin; the simulation's, or 300, when left out.
    reweight_to
        Another temperature to weigh the frames to, in kelvin; takes --weights with a column potential_kj_mol.
    torsions
        Which ones to learn.
    residues
        Numbers of the residues, as in the file; all when left out.
    atoms
        Atoms to keep, in mdtraj's language: "protein", "chainid 0".
    stride
        Keep every so-manieth frame.
    unit
        Of the coordinates, where the file's writer did not convert them.
    incomplete
        Take residues with missing atoms and chains with gaps as they are.
    objective
        How to train; auto is exact likelihood for two torsions, noise contrastive estimation up to eight, denoising for
        more.
    steps
        Numbers of training steps to choose from by held-out stretches of the trajectory; one number is taken as it is.
    replicates
        Networks trained on resamples, for the bands of the learned profiles.
    structures
        Frames of low energy to write.
    samples
        Conformations to draw and write.
    decoys
        Structures of the same atoms to rank against the frames by the learned energy, into decoys.csv.
    picoseconds
        Length of the metadynamics of ala2, a minute of which is worth some 2000 on a free core.
    seed
        Of everything random.
    overwrite
        Replace the landscape in the folder.
    """
    from gibbsian.diagnostics.estimate import with_error
    from gibbsian.molecules.conformations import landscape_of
    from gibbsian.molecules.landscape_files import REPORT, prepare_folder, write_decoys, write_landscape
    from gibbsian.molecules.landscape_page import landscape_page
    from gibbsian.molecules.sources import read_frames
    from gibbsian.report.shell import save_page

    if not files:
        raise OptionError("Give a simulation's folder, or a topology and a trajectory: top.pdb traj.dcd.")
    console, began, rng = console_of(), time.perf_counter(), generator(seed)
    settings = TorsionTraining(objective=objective, steps=steps, replicates=replicates)
    folder = out or Path("runs") / f"{files[-1].resolve().stem}-landscape"
    prepare_folder(folder, overwrite)
    if files == (Path("ala2"),) and not files[0].exists():
        files = (_simulated(folder / "simulation", picoseconds, 300.0 if temperature is None else temperature, seed),)
    with console.status("reading frames") as status:
        frames = read_frames(
            files, weights, temperature, reweight_to, atoms=atoms, stride=stride, unit=unit, incomplete=incomplete
        )
        found = landscape_of(
            frames,
            settings,
            rng=rng,
            kinds=tuple(torsions),
            residues=tuple(residues) or None,
            progress=lambda words: status.update(words),
        )
        status.update("drawing conformations")
        record = write_landscape(folder, found, rng=rng, structures=structures, samples=samples)
        areas = write_decoys(folder, found, decoys, rng=rng) if decoys else None
        command = shlex.join(["gibbsian", *sys.argv[1:]])
        save_page(folder / REPORT, landscape_page(found, record, command, time.perf_counter() - began))
    console.print(
        f"[bold]{frames.name}[/]: {len(found.energies)} frames worth {found.effective_frames:.0f}, "
        f"{len(found.torsions)} torsions at {frames.temperature:g} K, {found.fit.objective}, {found.fit.steps} steps"
    )
    for note in found.notes:
        console.print(f"  {note}", markup=False)
    for one in found.maps:
        for pair, value in one.learned_differences.kj_mol.items():
            frame = one.frame_differences.kj_mol[pair]
            told = f"{with_error(*value)} kJ/mol (frames alone: {with_error(*frame)})"
            told = told if math.isfinite(frame.value) else "unknown, as frames are only there, or never"
            console.print(f"  {one.residue} {pair}: {told}", markup=False, soft_wrap=True)
    if areas is not None:
        told = f"decoys above frames with probability {with_error(*areas)} (1 parts them, 0.5 is chance)"
        console.print(f"  {told}: {folder / 'decoys.csv'}", markup=False, soft_wrap=True)
    console.print(f"Report, tables, structures and model in {folder}: open {folder / REPORT}", soft_wrap=True)


def _simulated(folder: Path, picoseconds: float, temperature: float, seed: int) -> Path:
    """Metadynamics of alanine dipeptide in a folder: made, gone on with, or as it is there."""
    from gibbsian.molecules.metadynamics import Bias
    from gibbsian.molecules.simulation import Dynamics, simulate
    from gibbsian.molecules.systems import alanine_dipeptide

    if (folder / "simulation.json").exists():
        console_of().print(f"taking the simulation that is in {folder}", markup=False, soft_wrap=True)
    else:
        molecule = alanine_dipeptide(temperature, constrain_hydrogens=True)
        console_of().print(
            f"ala2: {picoseconds:g} ps of well-tempered metadynamics at {temperature:g} K, into {folder}"
        )
        going = (folder / "partial").exists()
        simulate(molecule, folder, Dynamics(picoseconds, seed=seed), bias=Bias(), resume=going, progress=True)
    return folder
