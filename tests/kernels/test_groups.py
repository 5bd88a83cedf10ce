"""Chains moved in groups: the same chains, whatever the groups; and which groups."""

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.kernels.groups import _kept_for_backward, row_groups


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
