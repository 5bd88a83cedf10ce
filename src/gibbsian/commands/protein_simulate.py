"""The command that simulates a molecule by OpenMM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from gibbsian.commands.console import console_of
from gibbsian.errors import OptionError

_FLAG = tyro.conf.FlagCreatePairsOff


def simulate(
    molecule: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ala2|FILE.pdb")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None,
    metadynamics: Annotated[bool, _FLAG] = False,
    plain: Annotated[bool, _FLAG] = False,
    picoseconds: float = 5000.0,
    temperature: float = 300.0,
    residue: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    frame_ps: float = 0.5,
    step_fs: float = 2.0,
    equilibration_ps: float = 20.0,
    bias_factor: float = 6.0,
    discard: float = 0.1,
    protein_only: Annotated[bool, _FLAG] = False,
    add_hydrogens: Annotated[bool, _FLAG] = False,
    threads: int = 1,
    seed: int = 0,
    resume: Annotated[bool, _FLAG] = False,
) -> None:
    """Simulate a molecule in implicit solvent: plain Langevin dynamics, or well-tempered metadynamics on two torsions.

    Writes a folder with topology.pdb, trajectory.dcd, frames.csv (time, torsions, bias, weight), simulation.json and
    report.html. Needs OpenMM: pip install 'gibbsian[protein]'.

    Parameters
    ----------
    molecule
        ala2 for alanine dipeptide, or a structure: a .pdb or .cif file with all heavy atoms.
    out
        The folder; runs/NAME-metadynamics or runs/NAME-plain by default.
    metadynamics
        Bias phi and psi of one residue, so that barriers are crossed; frames get weights that take the bias out. What
        is done where one residue is named, or only one has both torsions.
    plain
        Without a bias.
    picoseconds
        Length; a minute is worth some 2000 ps of alanine dipeptide on a free core.
    temperature
        In kelvin.
    residue
        Whose torsions are biased and recorded, such as ALA2.
    frame_ps
        Time between frames.
    step_fs
        Step of the integrator in femtoseconds; bonds to hydrogens are held.
    equilibration_ps
        Time before the first frame, unbiased.
    bias_factor
        By which metadynamics lowers barriers in the end.
    discard
        Part of the frames at the start of metadynamics that weighs nothing, as the bias was still growing.
    protein_only
        Leave out waters, ions and ligands of the file.
    add_hydrogens
        Add the hydrogens that the file leaves out.
    threads
        Of OpenMM, for molecules of more than a few dozen atoms.
    seed
        Of velocities and noise.
    resume
        Go on with the interrupted simulation in the folder.
    """
    from gibbsian.molecules.dynamics import Dynamics
    from gibbsian.molecules.metadynamics import Bias
    from gibbsian.molecules.simulation import simulate as run
    from gibbsian.molecules.systems import alanine_dipeptide, system_from_pdb

    if metadynamics and plain:
        raise OptionError("--metadynamics and --plain are two ways to simulate: choose one.")
    dynamics = Dynamics(
        picoseconds, step_fs, frame_ps=frame_ps, equilibration_ps=equilibration_ps, discard=discard, seed=seed
    )
    bias = Bias(bias_factor)
    console = console_of()
    if molecule == "ala2":
        system = alanine_dipeptide(temperature, constrain_hydrogens=True)
    else:
        system = system_from_pdb(
            molecule,
            temperature,
            protein_only=protein_only,
            add_hydrogens=add_hydrogens,
            constrain_hydrogens=True,
        )
    biased = not plain and (metadynamics or residue is not None or len(system.backbone_torsions()) == 1)
    folder = out or Path("runs") / f"{system.name}-{'metadynamics' if biased else 'plain'}"
    way = "well-tempered metadynamics" if biased else "Langevin dynamics"
    console.print(
        f"{system.name}: {system.atoms} atoms at {temperature:g} K, {picoseconds:g} ps of {way}, into {folder}",
        markup=False,
        soft_wrap=True,
    )
    result = run(
        system,
        folder,
        dynamics,
        bias=bias if biased else None,
        residue=residue,
        resume=resume,
        threads=threads,
        progress=True,
    )
    console.print(str(result), markup=False, soft_wrap=True)
    console.print(f"Report: {folder / 'report.html'}", markup=False, soft_wrap=True)
