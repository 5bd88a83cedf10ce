"""Transfer matrices and Kaufman's form against enumeration, each other, and published numbers; broken twins."""

import math

import pytest
import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.grids import states
from gibbsian.energies.pairwise import CRITICAL_COUPLING, Ising, Lattice, Potts
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.partition.lattices import kaufman, transfer_matrix

KNOWN = {
    (16, 0.2): 188.03988796,
    (16, CRITICAL_COUPLING): 238.64225664,
    (16, 0.6): 310.48703859,
    (32, 0.2): 752.15955177,
    (32, CRITICAL_COUPLING): 952.64807955,
    (32, 0.6): 1239.86871279,
}


def double(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def listed(energy: Energy) -> float:
    assert energy.event_shape is not None
    x = states(energy.event_shape, energy.support, double(0.0))
    return float(torch.logsumexp(-energy(x), 0))


def agree(found: float, truth: float) -> None:
    assert abs(found - truth) < 1e-11 * max(1.0, abs(truth)), f"missed by {found - truth:.2g}"


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("where", ["none", "uniform", "anywhere"])
@pytest.mark.parametrize(
    ("shape", "coupling"),
    [
        ((3, 4), (0.3, -0.5)),
        ((4, 3), (0.3, 0.7)),
        ((2, 2), (0.4, 0.1)),
        ((2, 5), (-0.3, 0.2)),
        ((7,), (0.3,)),
        ((2, 2, 3), (0.3, 0.2, -0.4)),
    ],
)
def test_ising_against_enumeration(shape, coupling, where, periodic):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = {"none": 0.0, "uniform": 0.3, "anywhere": made}[where]
    energy = Ising(Lattice(shape, double(coupling), periodic), field)
    found = transfer_matrix(energy)
    agree(float(found.value), listed(energy))
    assert float(found.lower) == float(found.value) == float(found.upper)
    assert float(found.stderr) == 0.0


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("where", ["none", "uniform", "anywhere"])
@pytest.mark.parametrize(
    ("shape", "classes", "coupling"), [((2, 4), 3, (0.3, -0.5)), ((3, 2), 4, (0.3, 0.5)), ((3, 2), 5, (0.2, 0.9))]
)
def test_potts_against_enumeration(shape, classes, coupling, where, periodic):
    rng = torch.Generator().manual_seed(2)
    size = {"none": (), "uniform": (classes,), "anywhere": (*shape, classes)}[where]
    field = torch.randn(size, generator=rng, dtype=torch.float64) * (where != "none")
    energy = Potts(Lattice(shape, double(coupling), periodic), classes, field)
    agree(float(transfer_matrix(energy).value), listed(energy))


@pytest.mark.parametrize(
    ("shape", "coupling"), [((3, 4), (0.3, -0.5)), ((4, 3), (0.3, 0.7)), ((2, 5), (0.3, 0.0)), ((3, 3), (0.0, 0.0))]
)
def test_kaufman_against_enumeration(shape, coupling):
    energy = Ising.lattice(shape, double(coupling))
    agree(float(kaufman(energy).value), listed(energy))


@pytest.mark.parametrize("shape", [(11, 9), (8, 12), (10, 10), (30, 5), (12, 12)])
@pytest.mark.parametrize("coupling", [0.05, CRITICAL_COUPLING, (0.7, 0.2)])
def test_the_two_agree(shape, coupling):
    energy = Ising.lattice(shape, double(coupling))
    agree(float(transfer_matrix(energy).value), float(kaufman(energy).value))


@pytest.mark.parametrize(("size", "coupling"), KNOWN)
def test_kaufman_gives_the_known_numbers(size, coupling):
    energy = Ising.lattice((size, size), double(coupling))
    assert abs(float(kaufman(energy).value) - KNOWN[size, coupling]) < 1e-8


def test_the_coupling_as_rounded_in_print_is_another_model():
    """0.44068679 is the critical coupling to eight digits, and log Z of that one differs by 1.3e-6."""
    printed = kaufman(Ising.lattice((16, 16), double(0.44068679)))
    assert 1e-6 < KNOWN[16, CRITICAL_COUPLING] - float(printed.value) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("coupling", [0.2, CRITICAL_COUPLING, 0.6])
def test_transfer_matrix_gives_the_known_numbers(coupling):
    """A quarter of a minute each on one quiet core."""
    seen = []
    found = transfer_matrix(Ising.lattice((16, 16), double(coupling)), progress=seen.append)
    assert abs(float(found.value) - KNOWN[16, coupling]) < 1e-8
    assert sum(seen) == 1162


def test_long_open_strips():
    """Two rows of L sites: the largest eigenvalue of the open strip rules, and the sum is that of 2 x 2 matrices."""
    k = double(0.8)
    strip = transfer_matrix(Ising.lattice((3000, 2), k, periodic=False))
    across = torch.stack([k.exp(), (-k).exp(), (-k).exp(), k.exp()])
    h = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).mul(k).exp()
    t = torch.kron(h, h) * across
    v, log_z = across.clone(), double(0.0)
    for _ in range(2999):
        v = v @ t
        log_z, v = log_z + v.max().log(), v / v.max()
    agree(float(strip.value), float(log_z + v.sum().log()))


def test_large_couplings_do_not_overflow():
    """In the limit log Z is that of two ground states."""
    energy = Ising.lattice((6, 6), double(200.0))
    ground = 72 * 200.0 + math.log(2.0)
    agree(float(transfer_matrix(energy).value), ground)
    open_one = Ising.lattice((6, 6), double(200.0), periodic=False)
    agree(float(transfer_matrix(open_one).value), 60 * 200.0 + math.log(2.0))
    with pytest.raises(DivergenceError, match="ground state"):
        kaufman(Ising.lattice((6, 6), double(800.0)))


@pytest.mark.parametrize("wrong", [(-0.3, 0.7), (0.7, 0.3), (0.3, 0.35)])
def test_broken_twins_of_couplings_are_caught(wrong):
    """Another sign along the axis of three sites, the axes swapped, a bond counted half."""
    truth = listed(Ising.lattice((3, 4), double((0.3, 0.7))))
    found = float(transfer_matrix(Ising.lattice((3, 4), double(wrong))).value)
    with pytest.raises(AssertionError, match="missed"):
        agree(found, truth)


def test_broken_twin_starts_counted_once_are_caught(monkeypatch):
    from gibbsian.partition import lattices

    right = lattices._starts
    monkeypatch.setattr(lattices, "_starts", lambda strip: (right(strip)[0], torch.ones(len(right(strip)[0]))))
    energy = Ising.lattice((4, 4), double(0.3))
    with pytest.raises(AssertionError, match="missed"):
        agree(float(transfer_matrix(energy).value), listed(energy))


def test_a_torus_too_wide_says_its_size_and_names_kaufman():
    with pytest.raises(OptionError, match=r"torus of 32 x 32 .*2\^32 = 4\.29e\+09 states.*kaufman"):
        transfer_matrix(Ising.lattice((32, 32)))
    with pytest.raises(OptionError, match=r"21 x 21 .*2\^21 = 2\.1e\+06 states, and a run.*kaufman"):
        transfer_matrix(Ising.lattice((21, 21)))
    with pytest.raises(OptionError, match=r"2\^16.*kaufman"):
        transfer_matrix(Ising.lattice((16, 16), field=torch.randn(16, 16)))
    with pytest.raises(OptionError, match=r"open lattice of 30 x 30.*2\^30.*bracket"):
        transfer_matrix(Ising.lattice((30, 30), periodic=False))
    with pytest.raises(OptionError, match=r"3\^20"):
        transfer_matrix(Potts(Lattice((20, 20), 0.3), 3))


def test_energies_of_another_kind():
    with pytest.raises(ArgumentTypeError, match=r"Ising or Potts over a Lattice.*enumeration"):
        transfer_matrix(Ising(torch.zeros(3, 3)))
    with pytest.raises(ArgumentTypeError, match=r"0\.5\*Ising.*coupling and field"):
        transfer_matrix(0.5 * Ising.lattice((3, 3)))
    with pytest.raises(ArgumentTypeError, match="Lattice"):
        kaufman(Potts(Lattice((3, 3), 0.3), 2))
    with pytest.raises(OptionError, match="transfer_matrix"):
        kaufman(Ising.lattice((4, 4), field=0.1))
    with pytest.raises(OptionError, match="two axes"):
        kaufman(Ising.lattice((4, 4), periodic=False))
    with pytest.raises(OptionError, match="negative coupling"):
        kaufman(Ising.lattice((4, 3), (0.3, -0.3)))
