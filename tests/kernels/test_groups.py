"""Chains moved in groups: the same chains, whatever the groups; and which groups."""

import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.kernels.groups import _kept_for_backward, row_groups, split


def quadratic(x):
    return 0.5 * x.square().sum(1)


def images(shape=(2, 10, 10)):
    torch.manual_seed(0)
    return gb.ConvEnergy(shape, (4, 4)).double()


@pytest.mark.parametrize("kernel", [gb.ULA(0.01), gb.MALA(0.05), gb.HMC(0.05, 3)], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("rows", [1, 4, 5, 12])
def test_images_moved_in_groups_go_where_they_go_together(kernel, rows, monkeypatch):
    energy, start = images(), torch.randn(12, 2, 10, 10, dtype=torch.float64, generator=seeded())
    whole = gb.sample(energy, kernel, start, steps=7, thin=2, rng=seeded())
    groups = [slice(i, min(i + rows, 12)) for i in range(0, 12, rows)]
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: groups)
    parted = gb.sample(energy, kernel, start, steps=7, thin=2, rng=seeded())
    torch.testing.assert_close(parted.draws, whole.draws)
    torch.testing.assert_close(tuple(parted.state[:3]), tuple(whole.state[:3]))
    torch.testing.assert_close(parted.acceptance, whole.acceptance)
    for one, other in zip(parted.state.origin, whole.state.origin):
        assert torch.equal(one, other)


def test_groups_hold_as_many_chains_as_the_cache_does(monkeypatch):
    energy, start = images(), torch.zeros(12, 2, 10, 10, dtype=torch.float64)
    kept = _kept_for_backward(energy, start[:1])
    assert 4 * 8 * 100 <= kept <= 16 * 8 * 100  # channels times bytes times pixels, and what each layer keeps of them
    weights = sum(p.numel() * p.element_size() for p in energy.parameters())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def sizes(cache):
        monkeypatch.setattr("gibbsian.kernels.groups.CACHE", cache)
        return [len(range(*group.indices(12))) for group in row_groups(energy, start)]

    assert sizes(1e9) == [12]
    assert sizes(4.5 * kept) == [4, 4, 4]
    assert sizes(5.5 * kept) == [4, 4, 4]  # an even parting is one compiled graph
    assert sizes(11.5 * kept) == [6, 6]
    assert sizes(0) == [max(1, weights // kept)] * 12  # the weights are read again for every group
    assert row_groups(quadratic, torch.zeros(10_000, 2000)) == [slice(0, 10_000)]


def test_vectors_under_a_network_move_in_groups_and_others_together(monkeypatch):
    energy, start = gb.MLP(3, (8, 8)).double(), torch.randn(12, 3, dtype=torch.float64, generator=seeded())
    whole = gb.sample(energy, gb.MALA(0.01), start, steps=7, thin=2, rng=seeded())
    assert row_groups(energy, start, start) == [slice(0, 12)]
    monkeypatch.setattr("gibbsian.kernels.groups.FEW", 4)
    assert row_groups(energy, start, start) == [slice(0, 12)]
    monkeypatch.setattr("gibbsian.kernels.groups.CACHE_OF_NETWORKS", 0)
    monkeypatch.setattr("gibbsian.kernels.groups._kept_for_backward", lambda *_: 10**6)
    assert row_groups(energy, start, start) == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert row_groups(energy, start, torch.zeros(12, 0)) == [slice(0, 12)]
    assert row_groups(quadratic, start, start) == [slice(0, 12)]
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(0, 5), slice(5, 12)])
    parted = gb.sample(energy, gb.MALA(0.01), start, steps=7, thin=2, rng=seeded())
    torch.testing.assert_close(parted.draws, whole.draws)
    torch.testing.assert_close(parted.acceptance, whole.acceptance)


@pytest.mark.parametrize("classes", [3, 1], ids=["indexed", "broadcast"])
def test_chains_that_carry_labels_of_their_own_stay_together(classes, monkeypatch):
    torch.manual_seed(0)
    start, y = torch.randn(12, 1, 6, 6, generator=seeded()), torch.arange(12) % 3
    if classes == 3:
        energy = gb.ConvEnergy((1, 6, 6), (4,), classes=3).given(y=y)
    else:
        energy = gb.Energy.of(lambda x: (0.5 + y) * x.square().sum((1, 2, 3)))
    monkeypatch.setattr("gibbsian.kernels.groups.CACHE", 0)
    assert row_groups(energy, start) == [slice(0, 12)]
    assert gb.sample(energy, gb.ULA(0.01), start, steps=10, rng=seeded()).x.shape == start.shape


@pytest.fixture
def small_batches(monkeypatch):
    """Vectors of 3 numbers in float64 count as very many from the 8th on, and move in fours."""
    monkeypatch.setattr("gibbsian.kernels.groups.LARGE", 7 * 24)
    monkeypatch.setattr("gibbsian.kernels.groups.VECTORS", 4 * 24)


def vectors(n=12):
    return torch.randn(n, 3, dtype=torch.float64, generator=seeded())


def batch_sizes(energy, kernel, x):
    return [len(part.x) for part in split(energy, kernel, kernel.init(energy, x))]


def test_very_many_vectors_move_in_even_batches(small_batches):
    sizes = [batch_sizes(quadratic, gb.MALA(0.1), vectors(n)) for n in (7, 8, 9, 11, 12)]
    assert sizes == [[7], [4, 4], [3, 3, 3], [4, 4, 3], [4, 4, 4]]


def test_batches_can_be_told_from_one(small_batches):
    seen = []
    gb.sample(lambda x: seen.append(len(x)) or quadratic(x), gb.ULA(0.1), vectors(), steps=2, rng=seeded())
    assert seen == [12, 1, *[4] * 6]


@pytest.mark.parametrize(
    "kernel",
    [
        gb.ULA(0.1),
        gb.MALA(0.3),
        gb.HMC(0.3, 3),
        gb.NUTS(0.3),
        gb.Underdamped(0.2, 1.0),
        gb.Wrapped(gb.MALA(0.1), 2 * math.pi),
    ],
    ids=lambda k: type(k).__name__,
)
def test_runs_in_batches_go_on_exactly(kernel, small_batches):
    energy = gb.VonMises(torch.zeros(3).double(), 1.0) if isinstance(kernel, gb.Wrapped) else quadratic
    whole = gb.sample(energy, kernel, vectors(), steps=7, thin=1, rng=seeded())
    rng = seeded()
    first = gb.sample(energy, kernel, vectors(), steps=3, thin=1, rng=rng)
    second = gb.sample(energy, kernel, first.state, steps=4, thin=1, rng=rng)
    assert torch.equal(torch.cat((first.draws, second.draws)), whole.draws)
    assert torch.equal(second.x, whole.x)
    assert whole.acceptance.shape == (12,)
    assert whole.draws.shape == (7, 12, 3)


def test_batches_of_exact_draws_stay_exact(small_batches):
    """Mean square of 4,000 chains of MALA from exact draws: 1 within 5 standard errors, false alarm 6e-7."""
    x = torch.randn(4000, 3, dtype=torch.float64, generator=seeded())
    out = gb.sample(quadratic, gb.MALA(0.5), x, steps=3, rng=seeded(1))
    assert abs(out.x.square().mean() - 1) < 5 * (2 / 12_000) ** 0.5
    assert (out.x != x).any(1).double().mean() > 0.9


def test_chains_that_are_tied_move_in_one_batch(small_batches):
    x, sizes = vectors(), torch.full((12,), 0.1, dtype=torch.float64)
    assert batch_sizes(quadratic, gb.SVGD(0.1), x) == [12]
    assert batch_sizes(quadratic, gb.MALA(sizes), x) == [12]
    y = torch.arange(12) % 3
    torch.manual_seed(0)
    assert batch_sizes(gb.MLP(3, (8,), classes=3).double().given(y=y), gb.MALA(0.1), x) == [12]
    assert batch_sizes(lambda x: (1.0 + y) * x.square().sum(1), gb.MALA(0.1), x) == [12]
