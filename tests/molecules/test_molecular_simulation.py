"""Simulations write a folder that others read, go on after an interruption, and refuse what does not fit."""

import json
import math

import numpy as np
import pandas as pd
import pytest

import gibbsian.molecules.simulation as simulation
from gibbsian.errors import DivergenceError, OptionError, StorageError, TrainingInterrupted
from gibbsian.molecules.dynamics import Dynamics, steps_in
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.metadynamics import Bias
from gibbsian.molecules.simulation import simulate
from gibbsian.molecules.systems import alanine_dipeptide
from gibbsian.molecules.thermal import thermal_energy

pytest.importorskip("openmm")
openmm = require_openmm()

SHORT = Dynamics(6.0, frame_ps=0.1, equilibration_ps=1.0, seed=3)


@pytest.fixture(scope="module")
def molecule():
    return alanine_dipeptide(300.0, constrain_hydrogens=True)


@pytest.fixture(scope="module")
def whole(molecule, tmp_path_factory):
    """Simulations that nothing interrupted: plain, and biased."""
    folder = tmp_path_factory.mktemp("whole")
    simulate(molecule, folder / "plain", SHORT)
    simulate(molecule, folder / "biased", SHORT, bias=Bias(every=0.2))
    return folder


class Stop:
    """A progress bar that is stopped by Ctrl-C at some frame."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frames):
        self.left -= frames
        if self.left <= 0:
            raise KeyboardInterrupt


def test_the_folder_is_read_by_mdtraj(whole):
    mdtraj = pytest.importorskip("mdtraj")
    folder = whole / "plain"
    found = {path.name for path in folder.iterdir()}
    assert found == {"topology.pdb", "trajectory.dcd", "frames.csv", "simulation.json", "report.html"}
    trajectory = mdtraj.load(str(folder / "trajectory.dcd"), top=str(folder / "topology.pdb"))
    frames = pd.read_csv(folder / "frames.csv")
    assert list(frames) == ["time_ps", "phi_deg", "psi_deg", "bias_kj_mol", "weight"]
    assert trajectory.n_frames == len(frames) == 60
    for name, compute in (("phi_deg", mdtraj.compute_phi), ("psi_deg", mdtraj.compute_psi)):
        assert np.allclose(np.degrees(compute(trajectory)[1][:, 0]), frames[name], atol=0.02)
    assert (frames.weight == 1).all()
    # Bonds to hydrogens are held at the force field's lengths.
    lengths = mdtraj.compute_distances(trajectory, [(0, 1), (6, 7)])
    assert np.allclose(lengths, [0.109, 0.101], atol=1e-3)


def test_the_record_and_the_page_tell_what_was_done(whole):
    record = json.loads((whole / "biased" / "simulation.json").read_text())
    assert record["temperature_k"] == 300.0
    assert record["settings"]["seed"] == 3
    assert record["metadynamics"]["every"] == 0.2
    assert record["frames"] == 60
    assert record["versions"]["openmm"] == openmm.version.short_version or record["versions"]["openmm"]
    assert (whole / "biased" / "bias.npz").exists()
    page = (whole / "biased" / "report.html").read_text()
    for words in ("Metadynamics of ala2", "Free energy over phi and psi", "amber99_obc.xml", "weigh nothing"):
        assert words in page


def test_an_interrupted_plain_simulation_goes_on_to_the_bit(whole, molecule, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingInterrupted, match=r"24 frames of 60.*--resume"):
        simulate(molecule, tmp_path / "run", SHORT, progress=Stop(25))
    with pytest.raises(OptionError, match=r"interrupted simulation.*--resume"):
        simulate(molecule, tmp_path / "run", SHORT)
    result = simulate(molecule, tmp_path / "run", SHORT, resume=True)
    assert result.frames == 60
    ours, theirs = (pd.read_csv(f / "frames.csv") for f in (tmp_path / "run", whole / "plain"))
    pd.testing.assert_frame_equal(ours, theirs)
    # The head of a trajectory holds the time when it was written.
    one, other = ((f / "trajectory.dcd").read_bytes()[276:] for f in (tmp_path / "run", whole / "plain"))
    assert one == other
    assert not (tmp_path / "run" / "partial").exists()


def test_a_biased_one_goes_on_with_its_bias(whole, molecule, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingInterrupted):
        simulate(molecule, tmp_path / "run", SHORT, bias=Bias(every=0.2), progress=Stop(40))
    simulate(molecule, tmp_path / "run", SHORT, bias=Bias(every=0.2), resume=True)
    ours, theirs = (pd.read_csv(f / "frames.csv") for f in (tmp_path / "run", whole / "biased"))
    assert np.allclose(ours.phi_deg[:39], theirs.phi_deg[:39])
    # The bias comes back but for rounding, which grows as chaos goes.
    assert np.allclose(ours.phi_deg[39:44], theirs.phi_deg[39:44], atol=1e-2)
    heights = [np.load(f / "bias.npz")["bias_kj_mol"].sum() for f in (tmp_path / "run", whole / "biased")]
    assert heights[0] == pytest.approx(heights[1], rel=0.05)


def test_frames_after_the_last_checkpoint_are_made_again(whole, molecule, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingInterrupted):
        simulate(molecule, tmp_path / "run", SHORT, progress=Stop(20))
    # As if the machine had gone off between frames and checkpoint.
    with open(tmp_path / "run" / "partial" / "positions.f32", "ab") as file:
        file.write(b"\x00" * 1000)
    simulate(molecule, tmp_path / "run", SHORT, resume=True)
    ours, theirs = (pd.read_csv(f / "frames.csv") for f in (tmp_path / "run", whole / "plain"))
    pd.testing.assert_frame_equal(ours, theirs)


def test_a_shorter_or_longer_end_may_be_chosen(molecule, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingInterrupted):
        simulate(molecule, tmp_path / "run", SHORT, progress=Stop(20))
    shorter = Dynamics(3.0, frame_ps=0.1, equilibration_ps=1.0, seed=3)
    assert simulate(molecule, tmp_path / "run", shorter, resume=True).frames == 30


def test_resuming_nothing_begins(molecule, tmp_path):
    short = Dynamics(0.4, frame_ps=0.2, equilibration_ps=0.0)
    assert simulate(molecule, tmp_path / "new", short, resume=True).frames == 2


def test_another_simulation_is_not_mixed_in(whole, molecule, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CHECKPOINT_SECONDS", 0.0)
    for resume in (False, True):
        with pytest.raises(OptionError, match="finished simulation"):
            simulate(molecule, whole / "plain", SHORT, resume=resume)
    with pytest.raises(TrainingInterrupted):
        simulate(molecule, tmp_path / "run", SHORT, progress=Stop(5))
    other = Dynamics(6.0, frame_ps=0.1, equilibration_ps=1.0, seed=4)
    with pytest.raises(OptionError, match=r"seed=3.*4"):
        simulate(molecule, tmp_path / "run", other, resume=True)
    with pytest.raises(OptionError, match="metadynamics=None"):
        simulate(molecule, tmp_path / "run", SHORT, bias=Bias(), resume=True)
    (tmp_path / "run" / "partial" / "checkpoint.npz").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="damaged"):
        simulate(molecule, tmp_path / "run", SHORT, resume=True)


def test_seeds_differ_and_repeat(molecule, tmp_path):
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        dynamics = Dynamics(1.0, frame_ps=0.5, equilibration_ps=0.0, seed=seed)
        simulate(molecule, tmp_path / str(i), dynamics)
        ends.append((tmp_path / str(i) / "frames.csv").read_text())
    assert ends[0] == ends[1] != ends[2]


def test_the_temperature_is_the_one_asked_for(tmp_path):
    """Mean square lengths of a spring's deviations: kT / k, at two temperatures."""
    system = openmm.System()
    force = openmm.CustomExternalForce("0.5*500*(x^2+y^2+z^2)")
    topology = openmm.app.Topology()
    residue = topology.addResidue("GLY", topology.addChain())
    for i in range(8):
        system.addParticle(12.0)
        force.addParticle(i, [])
        topology.addAtom(f"C{i}", openmm.app.element.carbon, residue)
    system.addForce(force)
    for temperature in (300.0, 600.0):
        molecule = simulation.MolecularSystem(system, topology, np.zeros((8, 3)), temperature, "wells", ())
        dynamics = Dynamics(400.0, step_fs=5.0, frame_ps=0.5, friction=5.0)
        folder = tmp_path / f"{temperature:g}"
        simulate(molecule, folder, dynamics)
        squares = dcd_squares(folder, 8)
        expected = thermal_energy(temperature) / 500.0
        blocks = squares.reshape(20, -1).mean(1)
        assert abs(blocks.mean() - expected) < 5 * blocks.std(ddof=1) / math.sqrt(20)


def dcd_squares(folder, atoms):
    mdtraj = pytest.importorskip("mdtraj")
    with mdtraj.formats.DCDTrajectoryFile(str(folder / "trajectory.dcd")) as file:
        x = file.read()[0] / 10
    assert x.shape[1:] == (atoms, 3)
    return np.square(x.astype(float)).mean((1, 2))


def test_a_simulation_that_blows_up_says_so(molecule, tmp_path):
    with pytest.raises(DivergenceError, match="blew up with steps of 50 fs"):
        simulate(molecule, tmp_path / "run", Dynamics(10.0, step_fs=50.0, frame_ps=0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"picoseconds": 0.0}, "picoseconds"),
        ({"picoseconds": math.nan}, "picoseconds"),
        ({"step_fs": -1.0}, "step_fs"),
        ({"frame_ps": 0.0033}, "whole number of steps"),
        ({"picoseconds": 0.1}, "has no frame"),
        ({"equilibration_ps": -1.0}, "equilibration_ps"),
        ({"discard": 1.0}, "discard"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_are_none(settings, words):
    with pytest.raises(OptionError, match=words):
        Dynamics(**settings)


def test_steps():
    assert steps_in("frame_ps", 0.5, 2.0) == 250
    with pytest.raises(OptionError, match="whole number"):
        steps_in("frame_ps", 0.0001, 2.0)


def test_residues_are_asked_for(molecule, tmp_path):
    with pytest.raises(OptionError, match=r"'ALA3'.*ALA2"):
        simulate(molecule, tmp_path / "run", SHORT, residue="ALA3")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(molecule, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Nothing can be written"):
        simulate(molecule, tmp_path / "file" / "run", SHORT)
