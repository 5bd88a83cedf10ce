"""Molecular dynamics by OpenMM: plain Langevin dynamics, and well-tempered metadynamics, into a folder."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import DivergenceError, OptionError, TrainingInterrupted, unknown_name
from gibbsian.molecules.dynamics import Dynamics, SimulationResult, steps_in
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.metadynamics import Bias, bias_at, bias_level, bias_table, biased, effective_frames
from gibbsian.molecules.platforms import platform_for
from gibbsian.molecules.recording import SETTINGS, Recording
from gibbsian.molecules.simulation_files import finish, frames_table
from gibbsian.molecules.simulation_page import write_simulation_page
from gibbsian.molecules.systems import MolecularSystem
from gibbsian.sampling import reporter

CHECKPOINT_SECONDS = 15.0
"""Seconds between checkpoints: what an interruption costs at most."""


def simulate(
    molecule: MolecularSystem,
    folder: str | Path,
    dynamics: Dynamics | None = None,
    *,
    bias: Bias | None = None,
    residue: str | None = None,
    resume: bool = False,
    threads: int = 1,
    platform_name: str | None = None,
    progress: bool | Callable[[int], object] = False,
) -> SimulationResult:
    """Run molecular dynamics of a molecule and keep its frames in a folder.

    Parameters
    ----------
    molecule
        From `alanine_dipeptide` or `system_from_pdb`, at its temperature.
    folder
        Where to write; its files are described in `recording`.
    dynamics
        Length, step, frames, seed.
    bias
        Well-tempered metadynamics on phi and psi of one residue, with these settings; ``None`` for none.
    residue
        Whose torsions are recorded and biased, such as ``"ALA2"``; may be left out where only one has both.
    resume
        Go on with an interrupted simulation in the folder, if there is one.
    threads
        Of OpenMM's CPU platform.
    platform_name
        An OpenMM platform; the fastest for this size when left out.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of frames just made.

    Raises
    ------
    OptionError
        If the folder holds another simulation, or a setting does not fit the molecule.
    DivergenceError
        If the simulation blew up.
    StorageError
        If the folder cannot be written.
    TrainingInterrupted
        If the user stopped it; what was done is kept.
    """
    openmm = require_openmm()
    dynamics = dynamics or Dynamics()
    torsions = _torsions(molecule, residue, needed=bias is not None)
    identity = _identity(molecule, dynamics, bias, torsions)
    recording = Recording(Path(folder), molecule.atoms, identity)
    taken_up = recording.load() if resume and not _finished(recording) else recording.begin()
    state, step, table = taken_up or (None, 0, None)

    system = openmm.XmlSerializer.clone(molecule.system)
    metadynamics = None
    if bias is not None and torsions is not None:
        every = steps_in("the interval of Gaussians", bias.every, dynamics.step_fs)
        metadynamics = biased(system, torsions, molecule.temperature, every, bias, table)
    integrator = openmm.LangevinMiddleIntegrator(molecule.temperature, dynamics.friction, dynamics.step_fs * 1e-3)
    # To OpenMM a seed of 0 means one that nobody knows.
    integrator.setRandomNumberSeed(dynamics.seed + 1)
    chosen = platform_for(system, platform_name)
    properties = {"Threads": str(threads)} if chosen.getName() == "CPU" else {}
    simulation = openmm.app.Simulation(molecule.topology, system, integrator, chosen, properties)
    report, close = reporter(progress, dynamics.frames, "simulating", recording.frames)
    began = time.perf_counter() - recording.seconds
    per_frame = steps_in("frame_ps", dynamics.frame_ps, dynamics.step_fs)
    advance = simulation.step if metadynamics is None else lambda n: metadynamics.step(simulation, n)

    def save() -> None:
        now = None if metadynamics is None else bias_table(metadynamics)
        seconds = time.perf_counter() - began
        recording.save(simulation.context.createCheckpoint(), simulation.currentStep, now, seconds)

    try:
        if state is None:
            simulation.context.setPositions(molecule.positions)
            simulation.context.setVelocitiesToTemperature(molecule.temperature, dynamics.seed + 1)
            simulation.step(round(dynamics.equilibration_ps / (1e-3 * dynamics.step_fs)))
            simulation.currentStep = 0
        else:
            simulation.context.loadCheckpoint(state)
            simulation.currentStep = step
        saved = time.perf_counter()
        while recording.frames + len(recording.pending) < dynamics.frames:
            # The Gaussian of this very moment is not part of the bias that the frame was drawn under.
            before = None if metadynamics is None else bias_table(metadynamics)
            advance(per_frame)
            felt = 0.0 if metadynamics is None else _felt(before, metadynamics, simulation, molecule.temperature)
            recording.add(_positions(simulation, dynamics), felt)
            report(1)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.perf_counter()
    except KeyboardInterrupt:
        # A step that was cut off left no frame, so that the last checkpoint is the place to go on from.
        raise TrainingInterrupted(
            f"Stopped after {recording.frames} frames of {dynamics.frames}, kept in {folder}: go on with resume=True, "
            "or --resume."
        ) from None
    except openmm.OpenMMException as error:
        raise _exploded(dynamics, str(error)) from error
    finally:
        close()
    save()
    table = None if metadynamics is None else bias_table(metadynamics)
    return _finished_with(recording, molecule, dynamics, bias, torsions, table, chosen.getName())


def _finished_with(
    recording: Recording,
    molecule: MolecularSystem,
    dynamics: Dynamics,
    bias: Bias | None,
    torsions: Any,
    table: np.ndarray | None,
    platform_name: str,
) -> SimulationResult:
    frames = frames_table(
        recording, torsions, table is not None, molecule.temperature, dynamics.frame_ps, dynamics.discard
    )
    with np.load(recording.partial / "checkpoint.npz") as kept:
        seconds = float(kept["seconds"])
    weight = frames["weight"].to_numpy()
    result = SimulationResult(
        recording.folder, recording.frames, effective_frames(weight), recording.frames * dynamics.frame_ps, seconds
    )
    record = {
        "molecule": molecule.name,
        "atoms": molecule.atoms,
        "temperature_k": molecule.temperature,
        "forcefield": list(molecule.forcefield),
        "constraints": molecule.constraints,
        "settings": asdict(dynamics),
        "metadynamics": None if bias is None else asdict(bias),
        "torsions": None if torsions is None else {"phi": list(torsions[0]), "psi": list(torsions[1])},
        "frames": result.frames,
        "effective_frames": result.effective_frames,
        "picoseconds": result.picoseconds,
        "seconds": result.seconds,
        "platform": platform_name,
        "versions": {name: importlib.metadata.version(name) for name in ("gibbsian", "openmm", "numpy")}
        | {"python": platform.python_version()},
    }
    finish(recording, molecule, table, frames, record)
    write_simulation_page(recording.folder, record, frames)
    return result


def _felt(table: Any, metadynamics: Any, simulation: Any, temperature: float) -> float:
    """The bias of a table at the present frame, less what it has come to on average."""
    phi, psi = (np.array([angle]) for angle in metadynamics.getCollectiveVariables(simulation))
    return float(bias_at(table, phi, psi)[0]) - bias_level(table, temperature, metadynamics.biasFactor)


def _torsions(molecule: MolecularSystem, residue: str | None, needed: bool) -> Any:
    found = {name: (phi, psi) for name, phi, psi in molecule.backbone_torsions()}
    if residue is not None:
        if residue not in found:
            raise unknown_name("residue with both backbone torsions", residue, found)
        return found[residue]
    if len(found) == 1:
        return next(iter(found.values()))
    if needed:
        some = ", ".join(list(found)[:8])
        raise OptionError(
            f"Metadynamics biases phi and psi of one residue; {molecule.name} has {len(found)} with both: name one "
            f"with residue=, or --residue ({some})."
            if found
            else f"{molecule.name} has no residue with both backbone torsions: run it plain."
        )
    return None


def _identity(molecule: MolecularSystem, dynamics: Dynamics, bias: Bias | None, torsions: Any) -> dict[str, Any]:
    """What two sittings of one simulation have in common; its length may change."""
    settings = asdict(dynamics)
    del settings["picoseconds"], settings["discard"]
    return {
        "molecule": molecule.name,
        "atoms": molecule.atoms,
        "temperature": molecule.temperature,
        "forcefield": list(molecule.forcefield),
        "constraints": molecule.constraints,
        "torsions": None if torsions is None else [list(t) for t in torsions],
        "metadynamics": None if bias is None else asdict(bias),
    } | settings


def _finished(recording: Recording) -> bool:
    return (recording.folder / SETTINGS).exists()


def _positions(simulation: Any, dynamics: Dynamics) -> np.ndarray:
    x = np.asarray(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value)
    if not np.isfinite(x).all():
        raise _exploded(dynamics, "coordinates are not finite")
    return x


def _exploded(dynamics: Dynamics, why: str) -> DivergenceError:
    return DivergenceError(
        f"The simulation blew up with steps of {dynamics.step_fs:g} fs ({why}): take shorter ones, 1 fs or less where "
        "bonds to hydrogens are free, and relax the structure first."
    )
