"""Gauges change no density, the zero-sum one has the least couplings, and contacts are read off it."""

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from contracts import seeded
from gibbsian.energies import gauges
from gibbsian.energies.couplings import Lattice
from gibbsian.energies.gauges import (
    average_product_correction,
    contact_scores,
    coupling_norms,
    gauged,
    lattice_gas_gauge,
    pair_couplings,
    zero_sum_gauge,
)
from gibbsian.energies.pairwise import Ising, Potts
from gibbsian.energies.sparse_couplings import SparseCouplings
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

K = 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def between(d, seed=1):
    j = normal(d, K, d, K, seed=seed)
    j = j + j.permute(2, 3, 0, 1)
    j[torch.arange(d), :, torch.arange(d)] = 0.0
    return j


def everywhere(shape):
    d = torch.Size(shape).numel()
    labels = torch.tensor(list(itertools.product(range(K), repeat=d)))
    return one_hot(labels, K).double().view(-1, *shape, K)


MODELS = {
    "dense": lambda: Potts(between(4), field=normal(4, K)),
    "trainable": lambda: Potts(between(4), field=normal(4, K), trainable=True),
    "equal classes": lambda: Potts(between(4)[:, 0, :, 0] + between(4)[:, 0, :, 0].T, K, normal(4, K)),
    "sparse": lambda: Potts(SparseCouplings(4, [0, 2, 1], [1, 0, 3], normal(3, K, K), True), field=normal(4, K)),
    "lattice": lambda: Potts(Lattice((2, 2), normal(2)), K, normal(2, 2, K)),
}
WAYS = {
    "zero-sum": zero_sum_gauge,
    "lattice gas": lattice_gas_gauge,
    "consensus": lambda e: lattice_gas_gauge(e, torch.tensor([0, 2, 1, 1]).view(e.field.shape[:-1])),
    "any": lambda e: gauged(e, normal(*e.field.shape, seed=8).softmax(-1)),
}


def spread(energy, other) -> float:
    """How far from constant the difference of two energies is, over all states."""
    gap = (energy(everywhere(energy.field.shape[:-1])) - other(everywhere(energy.field.shape[:-1]))).detach()
    return float(gap.max() - gap.min())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_gauges_change_no_density(name, way):
    energy = MODELS[name]()
    other = WAYS[way](energy)
    assert spread(energy, other) < 1e-12
    assert other.field.shape == energy.field.shape
    _, _, j = pair_couplings(other)
    if way == "zero-sum":
        assert float(j.detach().sum(1).abs().max()) < 1e-12
        assert float(j.detach().sum(2).abs().max()) < 1e-12
        assert float(other.field.detach().sum(-1).abs().max()) < 1e-12
    if way == "lattice gas":
        gone = torch.cat((j[:, -1].flatten(), j[:, :, -1].flatten(), other.field[..., -1].flatten()))
        assert float(gone.detach().abs().max()) < 1e-12
    # Once there, a model stays as it is.
    again = WAYS[way](other)
    torch.testing.assert_close(again.field, other.field, rtol=0, atol=1e-12)


def test_a_trainable_model_stays_one():
    other = zero_sum_gauge(MODELS["trainable"]())
    assert [name for name, _ in other.named_parameters()] == ["field", "interaction.pairs_above"]
    other = zero_sum_gauge(MODELS["sparse"]())
    assert [name for name, _ in other.named_parameters()] == ["interaction.coupling"]
    assert list(zero_sum_gauge(MODELS["dense"]()).parameters()) == []


def test_the_zero_sum_gauge_has_the_least_couplings():
    """Against fifty others; the least squares over all shifts is found in closed form too."""
    least = zero_sum_gauge(MODELS["dense"]())
    norm = float(pair_couplings(least)[2].square().sum())
    for seed in range(50):
        w = (3.0 * normal(4, K, seed=seed)).softmax(-1)
        assert float(pair_couplings(gauged(least, w))[2].square().sum()) > norm
    # Couplings are moved by adding u_a + v_b; what is left of J after its projection on these is the zero-sum gauge.
    j = pair_couplings(MODELS["dense"]())[2][0]
    ones, eye = torch.ones(K, 1, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    moves = torch.cat((torch.kron(eye, ones), torch.kron(ones, eye)), 1)
    left = j.flatten() - moves @ torch.linalg.lstsq(moves, j.flatten()[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(left.view(K, K), pair_couplings(least)[2][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("twin", ["no fields", "one side only"])
def test_slips_are_seen(twin, monkeypatch):
    real = gauges._rebuilt

    def broken(energy, i, j, couplings, field):
        if twin == "no fields":
            return real(energy, i, j, couplings, energy.field.detach())
        return real(energy, i, j, couplings + couplings.mean(1, keepdim=True), field + 0.1 * field.roll(1, 0))

    monkeypatch.setattr(gauges, "_rebuilt", broken)
    assert spread(MODELS["dense"](), zero_sum_gauge(MODELS["dense"]())) > 0.1


def test_norms_are_of_the_zero_sum_gauge_whatever_the_gauge():
    energy = MODELS["dense"]()
    found = coupling_norms(energy)
    j = pair_couplings(zero_sum_gauge(energy))[2]
    for (a, b), value in zip(itertools.combinations(range(4), 2), j):
        assert float(found[a, b]) == pytest.approx(float(value.square().sum().sqrt()), abs=1e-12)
    torch.testing.assert_close(coupling_norms(lattice_gas_gauge(energy, 0)), found)
    assert not bool(found.diagonal().any())
    torch.testing.assert_close(found, found.T)
    small = coupling_norms(energy, without=0)
    assert float(small[0, 1]) == pytest.approx(float(j[0][1:, 1:].square().sum().sqrt()), abs=1e-12)


def test_an_ising_model_has_the_norms_of_two_classes():
    j = normal(4, 4).triu(1)
    j = j + j.T
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    potts = Potts(torch.einsum("ij,ab->iajb", j, signs))
    torch.testing.assert_close(coupling_norms(Ising(j)), coupling_norms(potts))


def test_the_product_correction_takes_out_what_sites_have_with_all():
    """Scores that are products of sites are taken out but for order 1 / d; a pair beside them stays."""
    d = 40
    site = 1.0 + torch.rand(d, generator=seeded(3), dtype=torch.float64)
    scores = site[:, None] * site
    scores[3, 7] += 2.0
    scores[7, 3] += 2.0
    corrected = average_product_correction(scores)
    assert int(corrected.argmax()) in (3 * d + 7, 7 * d + 3)
    assert float(corrected[3, 7]) == pytest.approx(2.0, abs=0.3)
    rest = corrected.clone()
    rest[[3, 7]], rest[:, [3, 7]] = 0.0, 0.0
    assert float(rest.abs().max()) < 0.15
    assert not bool(average_product_correction(torch.zeros(5, 5)).any())
    three = torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    assert float(average_product_correction(three)[0, 1]) == pytest.approx(1.0 - 1.5 * 2.0 / 2.0, abs=1e-6)


def test_contacts_of_a_planted_chain_stand_out():
    j = torch.zeros(8, K, 8, K, dtype=torch.float64)
    for i in range(7):
        j[i, :, i + 1] = torch.eye(K) + 0.2 * normal(K, K, seed=i)
        j[i + 1, :, i] = j[i, :, i + 1].T
    scores = contact_scores(Potts(j)).triu(1).flatten()
    top = scores.topk(7).indices
    assert sorted((int(k) // 8, int(k) % 8) for k in top) == [(i, i + 1) for i in range(7)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: zero_sum_gauge(Ising(torch.zeros(3, 3))), ArgumentTypeError, "Potts models; got Ising"),
        (lambda: lattice_gas_gauge(MODELS["dense"](), 3), OptionError, "from 0 to 2.*got 3"),
        (lambda: lattice_gas_gauge(MODELS["dense"](), torch.tensor([0, 1])), ShapeError, r"\(4,\) sites; got .*\(2,\)"),
        (lambda: lattice_gas_gauge(MODELS["dense"](), torch.tensor(0.5)), OptionError, "whole number"),
        (lambda: gauged(MODELS["dense"](), torch.ones(4, K)), OptionError, "add to one.* add to 3 to 3"),
        (lambda: gauged(MODELS["dense"](), torch.ones(4, 2)), ShapeError, r"\(4, 3\); got \(4, 2\)"),
        (lambda: coupling_norms(MODELS["dense"](), without=5), OptionError, "left out, from 0 to 2; got 5"),
        (lambda: coupling_norms(torch.zeros(3)), ArgumentTypeError, "got Tensor"),
        (lambda: average_product_correction(torch.zeros(2, 2)), ShapeError, "3 sites or more"),
        (lambda: average_product_correction(torch.arange(9.0).view(3, 3)), OptionError, "symmetric"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
