"""Collective variables and the energies that restrain them."""

import math

import numpy as np
import pytest
import torch

import gibbsian as gb
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.molecules.dipeptide import PHI, PSI, dipeptide_coordinates
from gibbsian.molecules.restraints import (
    Centred,
    DistanceRestraint,
    OfVariables,
    TorsionRestraint,
    bond_angles,
    pair_distances,
    torsion_angles,
)
from oracles import Z_LIMIT


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    built = [dipeptide_coordinates(phi, psi) for phi, psi in ((-1.4, 1.2), (1.0, -0.6), (3.1, -3.0))]
    return torch.tensor(np.array(built))


def by_planes(x, quad):
    """Torsions from the angle of the two planes' normals, written apart from the package's formula."""
    a, b, c, d = (x[:, i] for i in quad)
    first, second = np.cross(b - a, c - b), np.cross(c - b, d - c)
    cosine = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    return np.sign((first * (d - c)).sum(-1)) * np.arccos(cosine)


def test_variables_are_those_of_the_geometry(x):
    assert torch.allclose(torsion_angles(x, [PHI, PSI])[0], torch.tensor([-1.4, 1.2], dtype=torch.float64))
    for quad in (PHI, PSI, (0, 1, 4, 5), (10, 8, 14, 15)):
        assert torch.allclose(torsion_angles(x, [quad])[:, 0], torch.tensor(by_planes(x.numpy(), quad)))
    assert torch.allclose(pair_distances(x, [(4, 6)]), torch.tensor(0.1335, dtype=torch.float64))
    assert torch.allclose(bond_angles(x, [(1, 4, 6)]), torch.tensor(math.radians(116.6), dtype=torch.float64))


def test_torsions_are_mdtrajs(x):
    mdtraj = pytest.importorskip("mdtraj")
    topology = mdtraj.Topology()
    chain = topology.add_chain()
    residue = topology.add_residue("ALA", chain)
    for _ in range(22):
        topology.add_atom("C", mdtraj.element.carbon, residue)
    trajectory = mdtraj.Trajectory(x.numpy(), topology)
    quads = [PHI, PSI, (5, 4, 6, 7), (9, 8, 10, 12)]
    theirs = mdtraj.compute_dihedrals(trajectory, quads, periodic=False)
    assert np.allclose(np.cos(torsion_angles(x, quads).numpy() - theirs), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    "energy",
    [
        TorsionRestraint(PHI, -60.0, 33.0),
        DistanceRestraint((1, 18), 0.5, 0.05),
        DistanceRestraint((1, 18), 0.1, 0.05, flat=0.02),
        Centred(0.1),
        Centred(0.1, atoms=[1, 8]),
        OfVariables(lambda s: s.square().sum(1), lambda x: torsion_angles(x, [PHI, PSI])),
        OfVariables(lambda s: s.square().sum(1), lambda x: bond_angles(x, [(1, 4, 6)])),
    ],
)
def test_gradients_are_right(energy, x):
    assert torch.autograd.gradcheck(energy, (x[:2].clone().requires_grad_(True),))


def test_values():
    two = torch.zeros(3, 2, 3, dtype=torch.float64)
    two[:, 1, 0] = torch.tensor([0.3, 0.4, 0.52])
    energy = DistanceRestraint((0, 1), 0.3, 0.1, flat=0.1)
    assert torch.allclose(energy(two), torch.tensor([0.0, 0.0, 0.5 * 1.2**2], dtype=torch.float64))
    assert torch.allclose(Centred(0.1)(two)[0], torch.tensor(0.5 * 1.5**2, dtype=torch.float64))


def test_a_restraint_is_a_von_mises_density_and_adds_up(x):
    energy = TorsionRestraint(PHI, 30.0, 4.0)
    expected = 4.0 * (1 - torch.cos(torsion_angles(x, [PHI])[:, 0] - math.pi / 6))
    assert torch.allclose(energy(x), expected)
    both = 2.0 * energy + DistanceRestraint((1, 18), 0.5, 0.05)
    assert repr(both) == "2*TorsionRestraint((4, 6, 8, 14), 30 deg) + DistanceRestraint((1, 18), 0.5 nm)"
    assert torch.allclose(both(x), 2 * expected + DistanceRestraint((1, 18), 0.5, 0.05)(x))


def test_chains_on_a_molecule_stay_where_they_are_held():
    pytest.importorskip("openmm")
    from gibbsian.molecules.physical import MolecularEnergy
    from gibbsian.molecules.systems import alanine_dipeptide

    energy = MolecularEnergy(alanine_dipeptide(phi=60.0, psi=40.0))
    held = energy + TorsionRestraint(PHI, 60.0, 300.0) + Centred(0.05)
    kernel = gb.HMC(0.001, 40, scale=energy.scale(4.0))
    out = gb.sample(held, kernel, energy.start(24), steps=25, warmup=10, thin=5, rng=seeded())
    phi = torsion_angles(out.draws.flatten(0, 1), [PHI])[:, 0]
    # The restraint is far narrower than what the molecule does of its own.
    assert abs(float(phi.mean()) - math.radians(60)) < 0.06
    assert 0.4 < float(phi.std()) * math.sqrt(300) < 1.6


def test_the_centre_of_a_free_atom_is_gaussian():
    out = gb.sample(
        Centred(0.1),
        gb.HMC(0.1, 5, scale=torch.full((1, 3), 0.5)),
        torch.zeros(256, 1, 3),
        steps=20,
        rng=seeded(),
    )
    variance = out.state.x.square().mean((1, 2))
    z = (variance.mean() - 0.01) / (variance.std() / 16)
    assert abs(float(z)) < Z_LIMIT


def test_what_is_refused(x):
    with pytest.raises(OptionError, match="4 different atoms"):
        TorsionRestraint((1, 2, 3, 3), 0.0, 1.0)
    with pytest.raises(OptionError, match="concentration positive"):
        TorsionRestraint(PHI, 0.0, 0.0)
    with pytest.raises(OptionError, match="2 different atoms"):
        DistanceRestraint((0, 1, 2), 0.1, 0.1)
    with pytest.raises(OptionError, match="width positive"):
        DistanceRestraint((0, 1), 0.1, 0.0)
    with pytest.raises(OptionError, match="width is positive"):
        Centred(-1.0)
    with pytest.raises(ArgumentTypeError, match="function of coordinates"):
        OfVariables(Centred(), 3)
    with pytest.raises(ShapeError, match=r"\(n, atoms, 3\)"):
        TorsionRestraint(PHI, 0.0, 1.0)(x.flatten(1))
    with pytest.raises(ShapeError, match="has 4 atoms"):
        torsion_angles(x, [(0, 1, 2)])
