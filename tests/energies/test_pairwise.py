"""Ising and Potts energies against sums over pairs, and what refuses to be one."""

import copy
import itertools

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.pairwise import CRITICAL_COUPLING, Couplings, Ising, Lattice, Potts
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from oracles import double_precision, ising_ups, kaufman_energy, kaufman_log_z, swendsen_wang, z_score


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def symmetric(j):
    return torch.triu(j, 1) + torch.triu(j, 1).T


def lattice_matrix(shape, couplings, periodic):
    """Couplings of a lattice as a matrix, site by site."""
    places = list(itertools.product(*map(range, shape)))
    j = torch.zeros(len(places), len(places), dtype=torch.float64)
    for a, place in enumerate(places):
        for axis, size in enumerate(shape):
            neighbour = list(place)
            neighbour[axis] += 1
            if neighbour[axis] == size and not periodic:
                continue
            neighbour[axis] %= size
            b = places.index(tuple(neighbour))
            j[a, b] += couplings[axis]
            j[b, a] += couplings[axis]
    return j


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (4, 3), (2, 4, 3)])
def test_lattices_are_their_matrices(shape, periodic):
    couplings = normal(len(shape), seed=1)
    field = normal(*shape, seed=2)
    bits = torch.randint(0, 2, (20, *shape), generator=seeded(3)).double()
    rolled = Ising.lattice(shape, couplings, field, periodic)
    matrix = lattice_matrix(shape, couplings, periodic)
    dense = Ising(matrix, field.flatten())
    spins = 2.0 * bits.flatten(1) - 1.0
    by_hand = -sum(matrix[i, j] * spins[:, i] * spins[:, j] for i in range(len(matrix)) for j in range(i))
    torch.testing.assert_close(rolled(bits), by_hand - spins @ field.flatten())
    torch.testing.assert_close(rolled(bits), dense(bits.flatten(1)))
    everything = slice(None)
    torch.testing.assert_close(
        rolled.conditional_logits(bits, everything).flatten(1), dense.conditional_logits(bits.flatten(1), everything)
    )
    classes = torch.nn.functional.one_hot(torch.randint(0, 3, (20, *shape), generator=seeded(4)), 3).double()
    potts = Potts(Lattice(shape, couplings, periodic), 3)
    same = Potts(matrix, 3)
    torch.testing.assert_close(potts(classes), same(classes.flatten(1, -2)))
    labels = classes.argmax(-1).flatten(1)
    pairs = -sum(matrix[i, j] * (labels[:, i] == labels[:, j]) for i in range(len(matrix)) for j in range(i))
    torch.testing.assert_close(potts(classes), pairs.double())


def test_conditionals_are_differences_of_energies():
    for energy in (Ising.lattice((4, 3), normal(2), normal(4, 3)), Ising(symmetric(normal(6, 6)), normal(6))):
        x = torch.randint(0, 2, (10, *energy.event_shape), generator=seeded()).double()
        logits = energy.conditional_logits(x, slice(None))
        for site in itertools.product(*map(range, energy.event_shape)):
            one, zero = x.clone(), x.clone()
            one[(slice(None), *site)], zero[(slice(None), *site)] = 1.0, 0.0
            torch.testing.assert_close(logits[(slice(None), *site)], energy(zero) - energy(one))
    between = normal(4, 3, 4, 3, seed=5)
    between = between + between.permute(2, 3, 0, 1)
    between[torch.arange(4), :, torch.arange(4)] = 0.0
    for energy in (Potts(between, field=normal(4, 3)), Potts(Lattice((4,), 0.5), field=normal(4, 3))):
        x = torch.nn.functional.one_hot(torch.randint(0, 3, (10, 4), generator=seeded()), 3).double()
        logits = energy.conditional_logits(x, slice(None))
        for site, k in itertools.product(range(4), range(3)):
            y, first = x.clone(), x.clone()
            y[:, site], first[:, site] = torch.eye(3)[k].double(), torch.eye(3)[0].double()
            torch.testing.assert_close(logits[:, site, k] - logits[:, site, 0], energy(first) - energy(y))


def test_blocks_hold_no_neighbours():
    ring = symmetric(torch.diag(torch.ones(5), 1) + torch.diag(torch.ones(1), 5)).double()
    grid = lattice_matrix((4, 4), (1.0, 1.0), True)
    for matrix, count in ((ring, 2), (grid, 2), (symmetric(normal(5, 5)), 5), (torch.zeros(4, 4), 1)):
        blocks = Couplings(matrix).blocks
        assert len(blocks) == count
        sites = [torch.arange(len(matrix))[b] for b in blocks]
        assert sorted(torch.cat(sites).tolist()) == list(range(len(matrix)))
        assert all(not bool(matrix[b][:, b].any()) for b in sites)
    torus = Ising.lattice((4, 6))
    assert [int(b.sum()) for b in torus.blocks] == [12, 12]
    assert len(Ising.lattice((3, 3), periodic=False).blocks) == 2


def test_the_oracles_agree_with_each_other():
    """Kaufman's formula, enumeration, transfer matrix and clusters; log Z of larger tori as in the literature."""
    with double_precision():
        torus = Ising.lattice((4, 4))
    x = ((torch.arange(2**16).unsqueeze(1) >> torch.arange(16)) & 1).double().view(-1, 4, 4)
    value = torus(x)
    law = (-value).softmax(0)
    k = torch.tensor(CRITICAL_COUPLING, dtype=torch.float64)
    assert abs(float(torch.logsumexp(-value, 0) - kaufman_log_z(4, 4, k))) < 1e-11
    assert abs(float((law * value).sum()) / (16 * CRITICAL_COUPLING) - kaufman_energy(4, 4, CRITICAL_COUPLING)) < 1e-10
    m = (2 * x - 1).mean((1, 2)).abs()
    exact = float((law * m).sum())
    for size, known in ((4, exact), (8, 0.7773310927868555)):
        ups, log_z = ising_ups(size, size, CRITICAL_COUPLING)
        n = size * size
        assert abs(float((ups * (2 * torch.arange(n + 1) / n - 1).abs()).sum()) - known) < 1e-12
        assert abs(log_z - float(kaufman_log_z(size, size, k))) < 1e-10
    assert abs(z_score(swendsen_wang(4, CRITICAL_COUPLING, 300, 100, 30, seed=0), exact)) < 5.5
    for coupling, log_z in ((0.2, 188.03988796), (CRITICAL_COUPLING, 238.64225664), (0.6, 310.48703859)):
        assert abs(float(kaufman_log_z(16, 16, torch.tensor(coupling, dtype=torch.float64))) - log_z) < 1e-8


def test_energies_move_copy_and_compose():
    torus = Ising.lattice((4, 4), 0.4, 0.1)
    assert repr(torus) == "Ising((4, 4), coupling=0.4)"
    assert repr(0.5 * Ising.lattice((4, 2), (0.4, 0.2), periodic=False)) == (
        "0.5*Ising((4, 2), coupling=(0.4, 0.2), periodic=False)"
    )
    assert repr(Potts(Lattice((4,), 0.4), 3)) == "Potts((4,), coupling=0.4, classes=3)"
    assert repr(Ising(symmetric(normal(5, 5)))) == "Ising(5 sites in 5 blocks)"
    other = copy.deepcopy(torus)
    other.load_state_dict(torus.state_dict())
    bits = torch.randint(0, 2, (5, 4, 4), generator=seeded()).float()
    torch.testing.assert_close((torus + gb.Bernoulli(logits=torch.zeros(4, 4)))(bits), torus(bits) + 16 * 0.6931472)
    assert torus.double()(bits.double()).dtype == torch.float64
    assert torus.blocks[0].dtype == torch.bool


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ising(normal(3, 3)), OptionError, r"symmetric, J_ij = J_ji; .* Use \(J \+ J.T\) / 2"),
        (lambda: Ising(torch.full((3, 3), torch.nan)), OptionError, "by up to nan"),
        (lambda: Ising(torch.eye(3)), OptionError, "not coupled to itself.* 3 of 3 diagonal"),
        (lambda: Ising(torch.zeros(3, 4)), ShapeError, r"got shape \(3, 4\)"),
        (lambda: Ising(torch.zeros(3, 2, 3, 2)), ShapeError, "a Potts model's"),
        (lambda: Ising(torch.zeros(3, 3), torch.zeros(4)), ShapeError, r"field of shape \(4,\) does not fit .* \(3,\)"),
        (lambda: Ising(torch.zeros(3, 3), torch.inf), OptionError, "A field is finite"),
        (lambda: Ising.lattice((4, 1)), OptionError, r"2 or more sites along each axis; got \(4, 1\)"),
        (lambda: Ising.lattice((4, 0)), OptionError, "positive whole sizes"),
        (lambda: Ising.lattice((4, 4), (1.0, 2.0, 3.0)), OptionError, "one for each of the 2 axes"),
        (lambda: Ising.lattice((4, 4), torch.nan), OptionError, "one finite number"),
        (lambda: Ising(5), ArgumentTypeError, "a Lattice, .* or a symmetric matrix of couplings; got 5"),
        (lambda: Potts(Lattice((4,), 1.0)), OptionError, "classes is 2 or more"),
        (lambda: Potts(torch.zeros(3, 2, 3, 2), classes=4), OptionError, r"that of the couplings \(2\); got 4"),
        (lambda: Ising.lattice((4, 4))(torch.zeros(2, 4, 5)), ShapeError, r"\(n, 4, 4\); got \(2, 4, 5\)"),
    ],
)
def test_what_is_no_pairwise_model_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
