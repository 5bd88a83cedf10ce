"""Energies of coordinates: unchanged by motions and mirrors, with forces that turn along, and smooth at the cutoff."""

import math

import pytest
import torch

from gibbsian.energies.base import Energy
from gibbsian.energies.invariant import DistanceEnergy, InvariantNetwork
from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import OptionError, ShapeError

F64 = torch.float64
KINDS = (0, 1, 1, 2, 0, 1)
PAIRS = [[0, 1], [0, 4], [2, 3], [1, 5]]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return InvariantNetwork(KINDS, features=16, layers=2, basis=12, cutoff=0.9)


def distances():
    torch.manual_seed(0)
    return DistanceEnergy(6, PAIRS, MLP(4, (16,)))


def forces(energy, x):
    x = x.detach().requires_grad_()
    return -torch.autograd.grad(energy(x).sum(), x)[0]


def motions(n, dtype, reflect):
    q, _ = torch.linalg.qr(torch.randn(n, 3, 3, generator=rng(1), dtype=F64))
    q = q * torch.linalg.det(q).sign()[:, None, None] * (-1 if reflect else 1)
    return q.to(dtype), torch.randn(n, 1, 3, generator=rng(2), dtype=F64).to(dtype)


@pytest.mark.parametrize("build", [network, distances])
@pytest.mark.parametrize("reflect", [False, True])
def test_energies_stay_and_forces_turn(build, reflect):
    energy = build()
    x = 0.3 * torch.randn(8, 6, 3, generator=rng())
    turn, shift = motions(8, x.dtype, reflect)
    moved = x @ turn + shift
    torch.testing.assert_close(energy(moved), energy(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forces(energy, moved), forces(energy, x) @ turn, rtol=1e-5, atol=1e-5)
    assert float(forces(energy, x).sum(1).abs().max()) < 1e-5  # no net force


def test_a_network_of_coordinates_is_seen_not_to_be_invariant():
    """The broken twin."""
    torch.manual_seed(0)
    twin = MLP((6, 3), (16,))
    x = 0.3 * torch.randn(8, 6, 3, generator=rng())
    turn, shift = motions(8, x.dtype, False)
    assert float((twin(x @ turn + shift) - twin(x)).abs().max()) > 1e-2


def test_atoms_of_one_kind_can_be_exchanged_and_others_not():
    energy = network()
    x = 0.3 * torch.randn(8, 6, 3, generator=rng())
    same, other = x[:, [4, 1, 2, 3, 0, 5]], x[:, [1, 0, 2, 3, 4, 5]]
    torch.testing.assert_close(energy(same), energy(x), rtol=1e-5, atol=1e-5)
    assert float((energy(other) - energy(x)).abs().max()) > 1e-4


def test_forces_are_smooth_at_the_cutoff_and_vanish_beyond():
    energy = network().double()
    x = torch.zeros(3, 6, 3, dtype=F64)
    x[:, :, 0] = 10.0 * torch.arange(6)
    x[:, 1, 0] = torch.tensor([0.9 - 1e-7, 0.9 + 1e-7, 0.5])
    found = forces(energy, x)
    assert float(found[:2].abs().max()) < 1e-5
    assert float(found[2].abs().max()) > 1e-4


def test_second_derivatives_are_those_of_differences():
    energy = network().double()
    x = 0.3 * torch.randn(2, 6, 3, generator=rng(), dtype=F64)
    assert torch.autograd.gradgradcheck(lambda y: energy(y).sum(), x.requires_grad_())


def test_distances_are_standardised():
    energy = distances()
    x = torch.randn(500, 6, 3, generator=rng())
    z = energy.calibrate(x).features(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0), torch.ones(4), rtol=0, atol=1e-5)
    still = DistanceEnergy(2, [[0, 1]], Gaussian(1)).calibrate(torch.tensor([[[0.0, 0, 0], [1, 0, 0]]]).expand(3, 2, 3))
    assert float(still.scale) == 1.0
    assert float(still(torch.tensor([[[0.0, 0, 0], [2, 0, 0]]]))) == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: InvariantNetwork([0]), OptionError, "two atoms or more"),
        (lambda: InvariantNetwork([0, -1]), OptionError, "from 0"),
        (lambda: InvariantNetwork([0, 1], cutoff=0.0), OptionError, "positive cutoff"),
        (lambda: DistanceEnergy(3, [0, 1], Gaussian(1)), ShapeError, r"\(k, 2\)"),
        (lambda: DistanceEnergy(3, [[0, 3]], Gaussian(1)), OptionError, "two different atoms of 3"),
        (lambda: DistanceEnergy(3, [[0, 1]], Gaussian(2)), ShapeError, "there are 1 distances"),
        (lambda: network()(torch.zeros(2, 5, 3)), ShapeError, r"\(n, 6, 3\)"),
    ],
)
def test_bad_input_is_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_they_are_energies_of_the_algebra():
    both = network() + 0.5 * distances() + Gaussian((6, 3))
    assert isinstance(both, Energy)
    assert both(torch.zeros(2, 6, 3) + torch.arange(6.0)[:, None] * torch.eye(3)[0]).shape == (2,)
