"""Trees of very many chains, built in groups: the same trees, whatever the groups; and which chains stay together."""

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.targets import Funnel
from gibbsian.kernels import nuts
from gibbsian.kernels.nuts import NUTS

CHAINS, NUMBERS = 211, 6
SCALE = torch.linspace(0.5, 1.5, NUMBERS, dtype=torch.float64)
SIZES = torch.linspace(0.05, 0.6, CHAINS, dtype=torch.float64)


def in_groups_of(monkeypatch, chains):
    """Let groups of float64 vectors of `NUMBERS` hold so many chains."""
    monkeypatch.setattr(nuts, "GROUP", chains * nuts.KEPT * NUMBERS * 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def start():
    return torch.randn(CHAINS, NUMBERS, generator=seeded(), dtype=torch.float64)


def run(kernel, energy, steps=3, **options):
    return gb.sample(energy, kernel, start(), steps=steps, thin=1, rng=seeded(1), **options)


def assert_same(one, other):
    torch.testing.assert_close(one.draws, other.draws, rtol=0, atol=1e-11)
    for name in one.kept:
        torch.testing.assert_close(one.kept[name], other.kept[name], rtol=0, atol=1e-11)
    torch.testing.assert_close(one.acceptance, other.acceptance, rtol=0, atol=1e-11)


@pytest.mark.parametrize("width", [16, 32, 96])
@pytest.mark.parametrize("kernel", [NUTS(0.08), NUTS(0.3, 3, scale=SCALE), NUTS(SIZES)], ids=["one", "scaled", "each"])
def test_trees_built_in_groups_are_those_built_together(monkeypatch, kernel, width):
    energy = Funnel(NUMBERS).double()
    whole, regrouped, real = run(kernel, energy), [], nuts._closed_up

    def closed_up(groups, finished):
        closed = real(groups, finished)
        regrouped.append(len(closed) < len(groups))
        return closed

    monkeypatch.setattr(nuts, "_closed_up", closed_up)
    assert not regrouped
    in_groups_of(monkeypatch, width)
    parted = run(kernel, energy)
    assert_same(parted, whole)
    assert float(whole.kept["depth"].std()) > 0.1
    assert regrouped, "there was one group"
    assert any(regrouped) or width == 96 or kernel.max_depth == 3


def test_a_step_size_in_a_tensor_of_one_is_that_of_all_groups(monkeypatch):
    energy = Funnel(NUMBERS).double()
    whole = run(NUTS(0.1), energy)
    in_groups_of(monkeypatch, 16)
    assert_same(run(NUTS(torch.full((1,), 0.1, dtype=torch.float64)), energy), whole)


def test_repeats_that_fill_a_group_must_not_be_kept(monkeypatch):
    energy = Funnel(NUMBERS).double()
    whole = run(NUTS(0.08), energy)
    in_groups_of(monkeypatch, 16)
    monkeypatch.setattr(nuts, "_without_repeats", lambda groups, n: groups)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(run(NUTS(0.08), energy), whole)


def test_compiled_groups_share_their_graphs(monkeypatch, graphs):
    energy = Funnel(NUMBERS).double()
    whole = run(NUTS(0.08, 5), energy)
    graphs()
    in_groups_of(monkeypatch, 32)
    assert_same(run(NUTS(0.08, 5), energy, compile=True), whole)
    assert graphs() == 5


def test_chains_that_cannot_be_moved_apart_stay_together(monkeypatch):
    widths, real = [], nuts._width

    def width(energy, x):
        widths.append(real(energy, x))
        return widths[-1]

    monkeypatch.setattr(nuts, "_width", width)
    in_groups_of(monkeypatch, 16)
    place = torch.linspace(-1.0, 1.0, CHAINS, dtype=torch.float64)[:, None]
    run(NUTS(0.2), lambda x: 0.5 * (x - place).square().sum(1), steps=1)
    run(NUTS(0.2), lambda x: 0.5 * x.square().sum(1), steps=1)
    assert widths == [CHAINS, 16]


def test_few_chains_and_long_vectors_stay_together():
    energy = gb.Gaussian(100)
    assert nuts._width(energy, torch.zeros(500, 100)) == 500
    many = nuts._width(energy, torch.zeros(100_000, 100))
    assert many * 100 * 4 * nuts.KEPT <= nuts.GROUP * torch.get_num_threads()
    assert many >= 64
