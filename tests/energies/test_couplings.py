"""Couplings as parameters: each pair once, gradients as by hand, and graphs against matrices."""

import copy
import itertools

import pytest
import torch

import gibbsian as gb
from contracts import assert_one_graph, assert_state_is_current, seeded
from enumeration import System, assert_keeps_law
from enumeration import binary_system as all_bits
from enumeration import one_hot_system as all_classes
from gibbsian.energies.couplings import Couplings, Lattice
from gibbsian.energies.pairwise import Ising, Potts
from gibbsian.energies.sparse_couplings import SparseCouplings
from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.gibbs import BlockGibbs, SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.partition.lattices import kaufman, transfer_matrix

D, K = 6, 3
EDGES = torch.tensor([[0, 4, 2, 5, 1], [1, 0, 3, 2, 4]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def symmetric(d=D, seed=1):
    j = normal(d, d, seed=seed).triu(1)
    return j + j.T


def between(d=D, seed=2):
    j = normal(d, K, d, K, seed=seed)
    j = j + j.permute(2, 3, 0, 1)
    j[torch.arange(d), :, torch.arange(d)] = 0.0
    return j


def bits(n=20, d=D):
    return torch.randint(0, 2, (n, d), generator=seeded(3)).double()


def classes(n=20, d=D):
    return torch.nn.functional.one_hot(torch.randint(0, K, (n, d), generator=seeded(4)), K).double()


def as_matrix(values, of_classes=False):
    """The matrix of a graph of EDGES, edge by edge."""
    if not of_classes:
        j = torch.zeros(D, D, dtype=torch.float64)
        for a, b, v in zip(*EDGES.tolist(), values):
            j[a, b] = j[b, a] = v
        return j
    j = torch.zeros(D, K, D, K, dtype=torch.float64)
    for a, b, v in zip(*EDGES.tolist(), values):
        j[a, :, b], j[b, :, a] = v, v.T
    return j


def pairs_of(name):
    """A trainable or sparse model, the plain dense one that it is, and states."""
    field, between_field = normal(D, seed=5), normal(D, K, seed=5)
    j, jk = normal(5, seed=6), normal(5, K, K, seed=7)
    of_edges = SparseCouplings(D, *EDGES, j, True)
    return {
        "ising": (Ising(symmetric(), field, True), Ising(symmetric(), field), bits()),
        "potts": (
            Potts(between(), field=between_field, trainable=True),
            Potts(between(), field=between_field),
            classes(),
        ),
        "equal": (Potts(symmetric(), K, between_field, True), Potts(symmetric(), K, between_field), classes()),
        "sparse ising": (Ising(of_edges, field, True), Ising(as_matrix(j), field), bits()),
        "sparse equal": (Potts(of_edges, K, between_field), Potts(as_matrix(j), K, between_field), classes()),
        "sparse potts": (
            Potts(SparseCouplings(D, *EDGES, jk, True), field=between_field),
            Potts(as_matrix(jk, True), field=between_field),
            classes(),
        ),
        "sparse matrix": (Ising(as_matrix(j).to_sparse(), field), Ising(as_matrix(j), field), bits()),
    }[name]


NAMES = ("ising", "potts", "equal", "sparse ising", "sparse equal", "sparse potts", "sparse matrix")


@pytest.mark.parametrize("name", NAMES)
def test_energies_and_conditionals_are_those_of_the_matrix(name):
    energy, plain, x = pairs_of(name)
    torch.testing.assert_close(energy(x), plain(x))
    whole = plain.conditional_logits(x, slice(None))
    torch.testing.assert_close(energy.conditional_logits(x, slice(None)), whole)
    for k in range(D):
        for each in (energy, plain):
            found = each.conditional_logits(x, slice(k, k + 1))
            torch.testing.assert_close(found[:, k], whole[:, k])
    for a, b in zip(torch.autograd.grad(energy(x.requires_grad_()).sum(), x), torch.autograd.grad(plain(x).sum(), x)):
        torch.testing.assert_close(a, b)


def test_gradients_are_products_of_spins_pair_by_pair():
    energy, _, x = pairs_of("ising")
    s = 2 * x - 1
    found = torch.autograd.grad(energy(x).mean(), [energy.interaction.pairs_above, energy.field])
    by_hand = torch.stack([-(s[:, i] * s[:, j]).mean() for i, j in itertools.combinations(range(D), 2)])
    torch.testing.assert_close(found[0], by_hand)
    torch.testing.assert_close(found[1], -s.mean(0))
    energy, _, x = pairs_of("potts")
    (found,) = torch.autograd.grad(energy(x).mean(), [energy.interaction.pairs_above])
    for value, (i, j) in zip(found, itertools.combinations(range(D), 2)):
        torch.testing.assert_close(value, -torch.einsum("na,nb->ab", x[:, i], x[:, j]) / len(x))


@pytest.mark.parametrize("name", ["sparse ising", "sparse equal", "sparse potts"])
def test_gradients_of_edges_are_those_of_the_matrix(name):
    energy, plain, x = pairs_of(name)
    interaction = energy.interaction
    dense = Couplings(plain.interaction.matrix, trainable=True)
    other = Ising(dense, plain.field) if name == "sparse ising" else Potts(dense, K, plain.field)
    weight = normal(len(x), seed=9)
    (found,) = torch.autograd.grad(energy(x) @ weight, [interaction.coupling])
    (full,) = torch.autograd.grad(other(x) @ weight, [dense.pairs_above])
    numbers = {pair: k for k, pair in enumerate(itertools.combinations(range(D), 2))}
    for value, a, b in zip(found, *EDGES.tolist()):
        want = full[numbers[min(a, b), max(a, b)]]
        torch.testing.assert_close(value, want if a < b or value.ndim == 0 else want.T)
    # What differs by a slip of the index, would differ here too.
    (logits,) = torch.autograd.grad((energy.conditional_logits(x, slice(None)) * x).sum(), [interaction.coupling])
    assert bool((logits != 0).any())


@pytest.mark.parametrize("periodic", [True, False])
def test_a_lattice_learns_one_coupling_per_axis(periodic):
    energy = Ising.lattice((2, 4), normal(2), normal(2, 4), periodic, trainable=True)
    assert [n for n, _ in energy.named_parameters()] == ["field", "interaction.coupling"]
    x = torch.randint(0, 2, (9, 2, 4), generator=seeded()).double()
    first, second, j = energy.interaction.pairs()
    graph = Ising.sparse(8, first, second, j.detach(), energy.field.detach().flatten(), trainable=True)
    torch.testing.assert_close(energy(x), graph(x.flatten(1)))
    (found,) = torch.autograd.grad(energy(x).sum(), [energy.interaction.coupling])
    (each,) = torch.autograd.grad(graph(x.flatten(1)).sum(), [graph.interaction.coupling])
    # Two sites around a periodic axis meet twice, in one pair of twice the coupling.
    along = (second - first) % 4 == 0
    scale = 2.0 if periodic else 1.0
    torch.testing.assert_close(found, torch.stack((scale * each[along].sum(), each[~along].sum())))


def test_trainable_couplings_stay_symmetric_and_without_loops():
    energy = Ising.dense(D, torch.float64)
    assert sum(p.numel() for p in energy.parameters()) == D * (D + 1) // 2
    optimiser, rng = torch.optim.AdamW(energy.parameters(), 0.1, weight_decay=0.1), seeded()
    for _ in range(5):
        optimiser.zero_grad()
        (energy(bits()) * torch.randn(20, generator=rng, dtype=torch.float64)).sum().backward()
        optimiser.step()
    j = energy.interaction.dense().detach()
    assert torch.equal(j, j.T)
    assert not bool(j.diagonal().any())
    assert bool(j.triu(1).any())
    k = Potts.dense(4, K).interaction
    torch.nn.init.normal_(k.pairs_above, generator=seeded())
    torch.testing.assert_close(k.dense(), k.dense().permute(2, 3, 0, 1))
    assert repr(energy) == "Ising(6 sites in 6 blocks)"


@pytest.mark.parametrize("name", NAMES)
def test_models_are_saved_and_loaded_whole(name):
    """Into a model of other values, and of another graph: its blocks and neighbours are found anew."""
    energy, plain, x = pairs_of(name)
    other = copy.deepcopy(energy)
    with torch.no_grad():
        for value in (*other.parameters(), other.field):
            value.zero_()
    if isinstance(other.interaction, SparseCouplings):
        j = torch.zeros_like(other.interaction.coupling)
        graph = SparseCouplings(D, [0, 0, 0, 0, 0], [1, 2, 3, 4, 5], j, j.requires_grad)
        other.interaction = graph
    other.load_state_dict(energy.state_dict())
    torch.testing.assert_close(other(x), plain(x))
    assert len(other.blocks) == len(energy.blocks)
    assert all(torch.equal(torch.arange(D)[a], torch.arange(D)[b]) for a, b in zip(other.blocks, energy.blocks))


def test_a_loaded_matrix_brings_its_blocks():
    ring = torch.zeros(4, 4)
    ring[[0, 1, 2, 3], [1, 2, 3, 0]] = ring[[1, 2, 3, 0], [0, 1, 2, 3]] = 1.0
    free, coupled = Ising(torch.zeros(4, 4)), Ising(ring)
    assert (len(free.blocks), len(coupled.blocks)) == (1, 2)
    free.load_state_dict(coupled.state_dict())
    assert len(free.blocks) == 2


def test_blocks_of_a_graph_hold_no_neighbours():
    n = 300
    ends = torch.randint(0, n, (2, 900), generator=seeded())
    ends = ends[:, ends[0] != ends[1]].sort(0).values.unique(dim=1)
    graph = SparseCouplings(n, *ends)
    colour = graph.colours
    assert bool((colour[ends[0]] != colour[ends[1]]).all())
    assert torch.stack(graph.blocks).sum(0).eq(1).all()
    assert graph.count < 9
    ring = SparseCouplings((2, 3), torch.arange(6), torch.arange(1, 7) % 6, 0.5)
    assert [b.shape for b in ring.blocks] == [(2, 3)] * 2
    assert repr(Ising(ring)) == "Ising(6 sites, 6 edges, in 2 blocks)"


def test_a_graph_without_edges_is_independent_sites():
    empty = torch.zeros(0, dtype=torch.int64)
    energy = Ising.sparse(D, empty, empty, torch.zeros(0, dtype=torch.float64), normal(D), trainable=True)
    torch.testing.assert_close(energy(bits()), -(2 * bits() - 1) @ normal(D))
    energy(bits()).sum().backward()
    assert len(energy.blocks) == 1


def system(name) -> System:
    """Four bits or three classes, listed."""
    if name == "dense":
        energy, all_of = Ising(0.5 * symmetric(4), normal(4), True), all_bits((4,))
    elif name == "sparse":
        energy, all_of = Ising.sparse(4, [0, 1, 2], [1, 2, 3], normal(3), normal(4), True), all_bits((4,))
    elif name == "lattice":
        energy, all_of = Ising.lattice((2, 2), normal(2) / 2, normal(2, 2), trainable=True), all_bits((2, 2))
    elif name == "potts":
        energy, all_of = Potts(0.5 * between(3), field=normal(3, K), trainable=True), all_classes()
    else:
        graph = SparseCouplings(3, [0, 1], [2, 0], normal(2, K, K), True)
        energy, all_of = Potts(graph, field=normal(3, K), trainable=True), all_classes()
    return System(name, energy, all_of.states, all_of.hot)


SYSTEMS = ("dense", "sparse", "lattice", "potts", "sparse potts")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *((name, BlockGibbs()) for name in SYSTEMS),
        ("sparse", SingleSiteGibbs(3)),
        ("sparse potts", GibbsWithGradients()),
    ],
    ids=repr,
)
def test_kernels_keep_the_law(name, kernel):
    found = system(name)
    with torch.no_grad():
        assert_keeps_law(kernel, found, chains=10_000)
    assert_state_is_current(kernel, found.energy.requires_grad_(False), found.states[::3])


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("dense", BlockGibbs()), ("sparse", GibbsWithGradients()), ("sparse potts", BlockGibbs())],
    ids=repr,
)
def test_chains_compile_into_one_graph(name, kernel, graphs):
    found = system(name)
    assert_one_graph(kernel, found.energy, found.states[::3], graphs)


@pytest.mark.parametrize("name", ["dense", "sparse potts"])
def test_log_z_is_that_of_the_listing(name):
    found = system(name)
    exact = float((-found.energy(found.states)).logsumexp(0).detach())
    zeros = torch.zeros(found.energy.event_shape, dtype=torch.float64)
    base = gb.Categorical(zeros) if found.hot else gb.Bernoulli(zeros)
    log_z = gb.ais(found.energy, base, chains=400, kernel=BlockGibbs(), temperatures=16, rng=seeded())
    assert float(log_z.stderr) < 0.1
    assert abs(float(log_z.value) - exact) < 6 * float(log_z.stderr)


def test_exact_log_z_of_a_trainable_lattice():
    found = system("lattice")
    exact = float((-found.energy(found.states)).logsumexp(0).detach())
    assert float(transfer_matrix(found.energy).value) == pytest.approx(exact, abs=1e-10)
    torus = Ising.lattice((4, 4), 0.4, trainable=True)
    assert float(kaufman(torus).value) == pytest.approx(float(transfer_matrix(torus).value), abs=1e-6)


def test_sums_of_neighbours_that_slip_are_seen():
    """The twin: an edge that adds to one end only."""
    energy, plain, x = pairs_of("sparse ising")
    graph = energy.interaction
    graph.source = graph.source.clone()
    graph.source[0] = (graph.source[0] + 1) % 5
    assert float((energy(x) - plain(x)).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ising(normal(3, 3), trainable=True), OptionError, r"symmetric, J_ij = J_ji; .* Use \(J \+ J.T\) / 2"),
        (lambda: Ising(normal(3, 3).triu(1).to_sparse()), OptionError, "symmetric"),
        (lambda: Ising(torch.eye(3).to_sparse()), OptionError, "not coupled to itself.* 3 of 3"),
        (lambda: SparseCouplings.of(torch.zeros(3, 4)), ShapeError, r"\(d, d\); got shape \(3, 4\)"),
        (lambda: Ising.sparse(4, [0, 1], [1, 1]), OptionError, "1 of 2 edges"),
        (lambda: Ising.sparse(4, [0, 1], [1, 0]), OptionError, r"one edge; 1 pairs .* as \(0, 1\). Add"),
        (lambda: Ising.sparse(4, [0], [4]), OptionError, "from 0 to 3; edges name 0 to 4"),
        (lambda: Ising.sparse(4, [0.5], [1.0]), OptionError, "whole numbers"),
        (lambda: Ising.sparse(4, [0, 1], [2]), ShapeError, r"one length; got \(2,\) and \(1,\)"),
        (lambda: Ising.sparse(4, [0], [1], torch.zeros(3)), ShapeError, r"1 edges are \(1,\).* got shape \(3,\)"),
        (lambda: Ising.sparse(4, [0], [1], torch.nan), OptionError, "finite; 1 of 1"),
        (lambda: Ising(SparseCouplings(4, [0], [1], torch.zeros(1, 2, 2))), ShapeError, "a Potts model's"),
        (lambda: Potts(SparseCouplings(4, [0], [1], torch.zeros(1, 2, 2)), 3), OptionError, r"couplings \(2\); got 3"),
        (lambda: Potts(Lattice((4,), 0.5, trainable=True)), OptionError, "classes is 2 or more"),
    ],
)
def test_what_is_no_coupling_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
