"""Internal coordinates against geometry, autograd's Jacobian, and a twin with a wrong volume element."""

import math

import numpy
import pytest
import torch

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, ShapeError
from gibbsian.kernels.hmc import HMC
from gibbsian.molecules.backbone import torsion_of
from gibbsian.molecules.dipeptide import ATOMS, PHI, PSI, dipeptide_bonds, dipeptide_coordinates
from gibbsian.molecules.internal_energy import InternalEnergy
from gibbsian.molecules.zmatrix import coordinates_of_bonds, internal_coordinates
from gibbsian.sampling import sample


def dipeptide():
    return coordinates_of_bonds(22, dipeptide_bonds(), [name.startswith("H") for name, _ in ATOMS])


def shaken(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.tensor(dipeptide_coordinates(-1.2, 1.1))
    return x + 0.008 * torch.randn((n, 22, 3), generator=rng, dtype=torch.float64)


def test_there_and_back():
    internal, x = dipeptide(), shaken(50)
    z = internal.of(x)
    y = internal.cartesian(z)
    assert z.shape == (50, 60)
    assert float((internal.of(y) - z).abs().max()) < 1e-8
    # The same molecule, chirality included, somewhere else.
    assert float((torch.cdist(x, x) - torch.cdist(y, y)).abs().max()) < 1e-8
    back, there = y - y.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    u, _, v = torch.linalg.svd(back.mT @ there)
    assert bool((torch.linalg.det(u @ v) > 0).all())
    assert float((back @ u @ v - there).abs().max()) < 1e-8


def test_moving_the_molecule_changes_nothing():
    internal, x = dipeptide(), shaken(3)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    turn = turn * torch.linalg.det(turn)
    assert torch.allclose(internal.of(x @ turn + 0.7), internal.of(x), atol=1e-10)


@pytest.mark.parametrize("atoms", [PHI, PSI])
def test_backbone_torsions_are_coordinates(atoms):
    internal, x = dipeptide(), shaken(5)
    at = internal.torsion(atoms)
    assert internal.torsion(atoms[::-1]) == at
    assert numpy.allclose(internal.of(x)[:, at], torsion_of(x.numpy(), atoms))


def test_one_coordinate_turns_the_bond():
    """Turning psi moves the oxygen with the nitrogen: rigid halves stay as they are."""
    internal, x = dipeptide(), shaken(1)
    z = internal.of(x)
    turned = z.clone()
    turned[:, internal.torsion(PSI)] += 0.6
    y, halves = internal.cartesian(turned), ([*range(15)], [8, 14, 15, 16, 17, 18, 19, 20, 21])
    for half in halves:
        assert torch.allclose(torch.cdist(y[:, half], y[:, half]), torch.cdist(x[:, half], x[:, half]), atol=1e-10)
    assert torsion_of(y.numpy(), (6, 8, 14, 15)) - torsion_of(x.numpy(), (6, 8, 14, 15)) == pytest.approx(0.6)


def volume(internal, z):
    """Log-determinant of all Cartesian coordinates in internal ones, places and directions."""
    x = internal.cartesian(z[None])[0]
    jacobian = torch.autograd.functional.jacobian(lambda v: internal.cartesian(v[None])[0].flatten(), z)
    unit = torch.eye(3, dtype=torch.float64)
    turns = torch.stack([torch.linalg.cross(axis.expand_as(x), x).flatten() for axis in unit], 1)
    return float(torch.linalg.slogdet(torch.cat((jacobian, unit.repeat(len(x), 1), turns), 1))[1])


BRANCHED = [(0, 1), (1, 2), (1, 3), (3, 4), (1, 5)]


@pytest.mark.parametrize("bonds", [BRANCHED, [(0, 1), (0, 2), (0, 3), (0, 4)], [(0, 1), (1, 2), (2, 3), (3, 0)]])
def test_the_volume_element_is_autograd_s(bonds):
    """Of a branched molecule, a star, and a ring."""
    atoms = 1 + max(max(pair) for pair in bonds)
    internal = coordinates_of_bonds(atoms, bonds)
    x = torch.randn((4, atoms, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = internal.of(x)
    assert float((internal.of(internal.cartesian(z)) - z).abs().max()) < 1e-8
    for row in z:
        exact = volume(internal, row)
        assert float(internal.log_det(row[None])) == pytest.approx(exact, abs=1e-8)
        # A twin that forgets the sines is caught.
        lengths, _, _ = internal.split(row[None])
        assert abs(float(2 * lengths.log().sum()) - exact) > 1e-3


def test_gradients_are_those_of_differences():
    internal = dipeptide()
    z = internal.of(shaken(1)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: internal.cartesian(v)[:, -1], (z,))


def springs(x):
    """Water-like: two bonds and an angle of four atoms in a chain, in nats."""
    a, b = x[:, 1:] - x[:, :-1], x[:, 2:] - x[:, :-2]
    return 40 * ((a.norm(dim=2) - 1.0) ** 2).sum(1) + 4 * ((b.norm(dim=2) - 1.3) ** 2).sum(1)


def test_sampling_internal_coordinates_is_sampling_cartesian_ones():
    """The mean energy of chains in either is one; without the volume element it is another."""
    internal = coordinates_of_bonds(4, [(0, 1), (1, 2), (2, 3)])
    rng = torch.Generator().manual_seed(3)
    start = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1.2, 1, 0], [2.1, 1.2, 0.4]], dtype=torch.float64)
    start = start.expand(400, -1, -1).clone()

    def energies(energy, x, step):
        out = sample(energy, HMC(step, 8, jitter=0.3), x, steps=150, warmup=50, thin=10, rng=rng)
        assert float(out.acceptance.mean()) > 0.6
        return out.draws

    reference = torch.stack([springs(x) for x in energies(springs, start, 0.1)])
    energy = InternalEnergy(springs, internal)
    ours = torch.stack([springs(internal.cartesian(z)) for z in energies(energy, internal.of(start), 0.08)])
    error = math.hypot(reference.mean(0).std() / 20, ours.mean(0).std() / 20)
    assert abs(float(ours.mean() - reference.mean())) < 4 * error
    flat = torch.stack(
        [
            springs(internal.cartesian(z))
            for z in energies(lambda z: springs(internal.cartesian(z)), internal.of(start), 0.08)
        ]
    )
    assert abs(float(flat.mean() - reference.mean())) > 6 * error


def test_points_without_a_molecule_have_infinite_energy_and_a_gradient():
    internal = coordinates_of_bonds(4, [(0, 1), (1, 2), (2, 3)])
    z = torch.tensor([[1.0, 1, 1, 2, 2, 0], [-0.1, 1, 1, 2, 2, 0], [1, 1, 1, 3.5, 2, 0]], requires_grad=True)
    value = InternalEnergy(springs, internal)(z)
    assert value.isfinite().tolist() == [True, False, False]
    (grad,) = torch.autograd.grad(value[value.isfinite()].sum(), z)
    assert bool(grad.isfinite().all())


def test_a_topology_gives_its_coordinates():
    pytest.importorskip("openmm")
    from gibbsian.molecules.systems import alanine_dipeptide

    internal = internal_coordinates(alanine_dipeptide())
    assert internal.dim == 60
    assert {internal.torsion(PHI), internal.torsion(PSI)} < set(range(41, 60))


def test_bad_input():
    with pytest.raises(DataError, match="four atoms or more; this has 3"):
        coordinates_of_bonds(3, [(0, 1), (1, 2)])
    with pytest.raises(DataError, match="join 3 of 5 atoms"):
        coordinates_of_bonds(5, [(0, 1), (1, 2), (3, 4)])
    internal = coordinates_of_bonds(4, [(0, 1), (1, 2), (2, 3)])
    with pytest.raises(ShapeError, match="6 internal coordinates"):
        internal.cartesian(torch.zeros(2, 7))
    with pytest.raises(ShapeError, match="4 atoms are"):
        internal.of(torch.zeros(2, 5, 3))
    with pytest.raises(OptionError, match="none of the internal coordinates"):
        internal.torsion((0, 2, 1, 3))
    with pytest.raises(ArgumentTypeError, match="internal_coordinates"):
        InternalEnergy(springs, "phi")
    with pytest.raises(ShapeError, match="of 4 atoms"):
        InternalEnergy(Energy.of(springs, (5, 3)), internal)
