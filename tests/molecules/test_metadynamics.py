"""Well-tempered metadynamics recovers a law that is known, its weights are right, and what is no setting is refused."""

import math

import numpy as np
import pandas as pd
import pytest

from gibbsian.errors import OptionError
from gibbsian.molecules.dynamics import Dynamics
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.metadynamics import (
    Bias,
    bias_at,
    bias_level,
    bias_table,
    biased,
    effective_frames,
    rebuilt_bias,
    unbiasing_weights,
)
from gibbsian.molecules.simulation import simulate
from gibbsian.molecules.systems import MolecularSystem
from gibbsian.molecules.thermal import thermal_energy

pytest.importorskip("openmm")
openmm = require_openmm()

BARRIER, TILT = 12.0, 2.0
"""kJ/mol: two wells of phi, at 0 and 180 degrees, the second higher by twice the tilt."""


def five_atoms():
    """A backbone of five atoms, C N CA C N, without any interaction but bonds, angles and a torsion.

    The density of its torsions is known: bonds and angles do not depend on them, so that phi has the density exp(-U/kT)
    and psi is uniform.
    """
    app = openmm.app
    topology = app.Topology()
    chain = topology.addChain()
    residues = [topology.addResidue(name, chain) for name in ("ACE", "ALA", "NME")]
    names = [("C", 0), ("N", 1), ("CA", 1), ("C", 1), ("N", 2)]
    atoms = [topology.addAtom(n, app.Element.getBySymbol(n[0]), residues[r]) for n, r in names]
    system = openmm.System()
    bonds, angles, torsion = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i in range(5):
        system.addParticle(14.0)
        if i:
            topology.addBond(atoms[i - 1], atoms[i])
            bonds.addBond(i - 1, i, 0.15, 50_000.0)
        if i > 1:
            angles.addAngle(i - 2, i - 1, i, 1.95, 300.0)
    torsion.addTorsion(0, 1, 2, 3, 2, math.pi, BARRIER / 2)
    torsion.addTorsion(0, 1, 2, 3, 1, math.pi, TILT)
    for force in (bonds, angles, torsion):
        system.addForce(force)
    x = np.array([[0, 0, 0], [0.15, 0, 0], [0.2, 0.14, 0], [0.35, 0.14, 0.02], [0.4, 0.28, 0.05]])
    return MolecularSystem(system, topology, x, 300.0, "five", ())


def share_of_the_first_well():
    """Of |phi| < 90 degrees, by the midpoint rule."""
    phi = (np.arange(3600) + 0.5) * 2 * math.pi / 3600 - math.pi
    u = BARRIER / 2 * (1 + np.cos(2 * phi - math.pi)) + TILT * (1 + np.cos(phi - math.pi))
    mass = np.exp(-u / thermal_energy(300.0))
    return float(mass[np.abs(phi) < math.pi / 2].sum() / mass.sum())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import pandas as pd

    folder = tmp_path_factory.mktemp("biased") / "run"
    dynamics = Dynamics(1200.0, step_fs=2.0, frame_ps=0.2, friction=5.0, seed=1)
    simulate(five_atoms(), folder, dynamics, bias=Bias(factor=6.0, height=0.8))
    return folder, pd.read_csv(folder / "frames.csv")


def shares(phi, weights, blocks=20):
    """The share of the first well and its error from blocks in time."""
    inside = (np.abs(phi) < 90.0).astype(float)
    parts = [(inside[b] @ weights[b], weights[b].sum()) for b in np.array_split(np.arange(len(phi)), blocks)]
    a, b = np.array([p for p in parts if p[1] > 0]).T
    value = a.sum() / b.sum()
    return value, (a - value * b).std(ddof=1) / b.mean() / math.sqrt(len(a))


def test_weights_recover_the_known_law_and_others_do_not(run):
    _, frames = run
    truth = share_of_the_first_well()
    phi, weight = frames.phi_deg.to_numpy(), frames.weight.to_numpy()
    value, error = shares(phi, weight)
    assert abs(value - truth) < 5 * error
    assert error < 0.05
    # Broken twins: no weights, and weights that add the bias once more.
    kept = weight > 0
    plain, plain_error = shares(phi[kept], np.ones(kept.sum()))
    wrong, wrong_error = shares(phi[kept], 1 / weight[kept])
    assert abs(plain - truth) > 5 * plain_error
    assert abs(wrong - truth) > 5 * wrong_error


def test_the_bias_fills_what_the_free_energy_is_deep(run):
    folder, _ = run
    with np.load(folder / "bias.npz") as found:
        phi, bias = np.radians(found["phi_deg"]), found["bias_kj_mol"]
    assert bias.shape == (61, 61)
    profile = bias.mean(1)
    wells = [profile[np.abs(np.cos(phi - centre)).argmax()] for centre in (0.0, math.pi)]
    barrier = profile[np.abs(phi - math.pi / 2).argmin()]
    # Towards -(1 - 1/6) F; the barrier itself is of 12 and 14.
    assert min(wells) - barrier > 4.0


def test_frames_in_time(run):
    _, frames = run
    assert len(frames) == 6000
    assert frames.time_ps.iloc[-1] == pytest.approx(1200.0)
    assert (frames.weight[:600] == 0).all()
    assert (frames.weight[600:] > 0).all()
    assert frames.weight.sum() == pytest.approx(6000.0, rel=1e-4)
    assert frames.phi_deg.between(-180, 180).all()


def test_the_table_between_its_points_is_openmms():
    molecule = five_atoms()
    system = openmm.XmlSerializer.clone(molecule.system)
    for _ in range(system.getNumForces()):
        system.removeForce(0)
    grid = np.linspace(-math.pi, math.pi, 61)
    table = 3 * np.cos(grid)[:, None] + 2 * np.sin(2 * grid)[None, :] + np.cos(grid[:, None] - grid[None, :])
    table[-1], table[:, -1] = table[0], table[:, 0]
    torsions = molecule.backbone_torsions()[0][1:]
    metadynamics = biased(system, torsions, 300.0, 100, Bias(), table)
    assert np.allclose(bias_table(metadynamics), table)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    rng = np.random.default_rng(0)
    for _ in range(5):
        context.setPositions(rng.normal(size=(5, 3)))
        state = context.getState(energy=True)
        phi, psi = metadynamics._force.getCollectiveVariableValues(context)
        energy = state.getPotentialEnergy()._value
        assert bias_at(table, np.array([phi]), np.array([psi]))[0] == pytest.approx(energy, abs=2e-3)


def test_weights_sum_to_their_number_and_count_what_they_are_worth():
    weights = unbiasing_weights(np.array([0.0, 5.0, 5.0, 5.0 + thermal_energy(300.0)]), 300.0, discard=0.25)
    assert weights[0] == 0
    assert weights.sum() == pytest.approx(4.0)
    assert weights[3] / weights[2] == pytest.approx(math.e)
    assert effective_frames(np.ones(7)) == pytest.approx(7.0)
    assert effective_frames(np.array([3.0, 0.0])) == pytest.approx(1.0)
    assert np.isfinite(unbiasing_weights(np.array([0.0, 1e6]), 300.0)).all()


def test_numpys_global_generator_is_left_alone():
    molecule = five_atoms()
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    biased(molecule.system, molecule.backbone_torsions()[0][1:], 300.0, 100, Bias(), None)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factor": 1.0}, "above 1"),
        ({"height": 0.0}, "positive"),
        ({"every": -1.0}, "positive"),
        ({"grid": 10}, "too coarse"),
    ],
)
def test_settings_that_are_none(settings, words):
    with pytest.raises(OptionError, match=words):
        Bias(**settings)


def test_all_frames_cannot_be_discarded():
    with pytest.raises(OptionError, match="discard"):
        unbiasing_weights(np.zeros(3), 300.0, 1.0)


def test_the_level_of_a_bias_is_what_makes_early_and_late_frames_alike():
    """Of a bias that has converged, V - c is the same function whenever it is looked at."""
    rng, factor, kt = np.random.default_rng(0), 6.0, thermal_energy(300.0)
    angle = np.linspace(-math.pi, math.pi, 61)
    free = 4.0 * np.cos(angle)[:, None] + 3.0 * np.sin(2 * angle)[None, :]
    late = -(1.0 - 1.0 / factor) * free
    levels = [bias_level(late + height, 300.0, factor) - height for height in (0.0, 10.0, 2000.0)]
    assert np.allclose(levels, levels[0])
    # With V = -(1 - 1 / gamma) F + h: c = h + kT log of the ratio of the unbiased to the tempered integrals.
    inner = free[:-1, :-1] / kt
    expected = kt * np.log(np.exp(-inner).sum() / np.exp(-inner / factor).sum())
    assert levels[0] == pytest.approx(expected, rel=1e-9)
    flat = rng.uniform(size=1)[0] * np.ones((61, 61))
    assert bias_level(flat, 300.0, factor) == pytest.approx(flat[0, 0])


def test_a_frame_is_weighed_by_the_bias_before_its_own_gaussian(tmp_path):
    """The first frames, all before the first Gaussian, have no bias; later ones what had been there at their time."""
    settings = Dynamics(20.0, step_fs=2.0, frame_ps=0.5, equilibration_ps=0.0, discard=0.0, seed=1)
    simulate(five_atoms(), tmp_path, settings, bias=Bias(every=1.0))
    frames = pd.read_csv(tmp_path / "frames.csv")
    assert np.allclose(frames.bias_kj_mol[:2], 0.0, atol=1e-9)
    assert (frames.bias_kj_mol[2:].abs() > 1e-6).any()
    phi, psi = np.radians(frames.phi_deg.to_numpy()), np.radians(frames.psi_deg.to_numpy())
    found = rebuilt_bias(phi, psi, 300.0, Bias(every=1.0), 0.5)
    assert np.abs(found - frames.bias_kj_mol).max() < 0.03
    higher = rebuilt_bias(phi, psi, 300.0, Bias(every=1.0, height=2.0), 0.5)
    assert np.abs(higher - frames.bias_kj_mol).max() > 0.2
    with pytest.raises(OptionError, match="do not stand at frames"):
        rebuilt_bias(phi, psi, 300.0, Bias(every=1.0), 0.3)
