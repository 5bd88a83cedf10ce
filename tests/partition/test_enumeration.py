"""Enumeration in chunks against closed forms, whatever the chunk; and its refusals."""

import math

import pytest
import torch
from torch.distributions import constraints

from enumeration import binary_system, one_hot_system
from gibbsian.energies.base import Energy
from gibbsian.energies.pairwise import Ising
from gibbsian.energies.tractable import Bernoulli, Categorical, Gaussian
from gibbsian.errors import DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.partition import enumeration as module
from gibbsian.partition.enumeration import enumeration
from gibbsian.partition.lattices import transfer_matrix


@pytest.mark.parametrize("chunk", [1 << 15, 8, 3, 1])
@pytest.mark.parametrize("system", [binary_system((3, 2)), one_hot_system(3, 3), one_hot_system(2, 4)], ids=str)
def test_all_states_once_whatever_the_chunk(system, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    seen = []
    found = enumeration(system.energy, dtype=torch.float64, progress=seen.append)
    truth = torch.logsumexp(-system.energy(system.states), 0)
    assert abs(float(found.value - truth)) < 1e-12
    assert sum(seen) == len(system.states)
    assert float(found.ess) == pytest.approx(float(1.0 / system.law.square().sum()), rel=1e-10)
    assert float(found.lower) == float(found.upper) == float(found.value)


def test_normalised_energies_have_log_z_zero():
    rng = torch.Generator().manual_seed(0)
    for energy in (
        Bernoulli(logits=torch.randn(4, 5, dtype=torch.float64, generator=rng)),
        Categorical(logits=torch.randn(2, 4, 3, dtype=torch.float64, generator=rng)),
    ):
        assert abs(float(enumeration(energy).value)) < 1e-12


def test_states_come_in_the_shape_of_the_event():
    seen = []

    def energy(x):
        seen.append(x.clone())
        return torch.zeros(len(x), dtype=torch.float64)

    found = enumeration(Energy.of(energy, (2, 3), constraints.boolean))
    assert float(found.value) == pytest.approx(6 * math.log(2.0))
    assert seen[0].shape[1:] == (2, 3)
    assert len(torch.unique(torch.cat(seen).flatten(1), dim=0)) == 64


def test_a_lattice_of_18_spins():
    energy = Ising.lattice((6, 3), torch.tensor(0.4, dtype=torch.float64), field=0.1)
    assert float(enumeration(energy).value) == pytest.approx(float(transfer_matrix(energy).value), abs=1e-11)


def test_states_of_no_weight():
    def even(x):
        return torch.where(x.sum(1) % 2 == 0, 0.0, torch.inf)

    found = enumeration(Energy.of(even, (10,), constraints.boolean))
    assert float(found.value) == pytest.approx(9 * math.log(2.0), abs=1e-12)
    assert float(found.ess) == pytest.approx(512.0)


def test_broken_twin_a_state_left_out_is_caught(monkeypatch):
    system = binary_system((3, 2))
    right = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda *args: (x[1:] for x in right(*args)))
    found = enumeration(system.energy, dtype=torch.float64)
    assert abs(float(found.value - torch.logsumexp(-system.energy(system.states), 0))) > 1e-6


def test_refusals():
    with pytest.raises(OptionError, match=r"1\.1e\+12|1\.0\d*e\+12"):
        enumeration(Bernoulli(logits=torch.zeros(40)))
    with pytest.raises(OptionError, match=r"more than the 33554432.*larger layer.*transfer_matrix.*bracket"):
        enumeration(Bernoulli(logits=torch.zeros(26)))
    with pytest.raises(OptionError, match="more than the 8 "):
        enumeration(Bernoulli(logits=torch.zeros(4)), most=8)
    with pytest.raises(DomainError, match="cannot be listed"):
        enumeration(Gaussian(2))
    bits = Energy.of(lambda x: x.sum(1).log(), support=constraints.boolean)
    with pytest.raises(ShapeError, match="shape="):
        enumeration(bits)
    with pytest.raises(ShapeError, match=r"got shape=\(3,\)"):
        enumeration(Bernoulli(logits=torch.zeros(4)), shape=(3,))
    with pytest.raises(DivergenceError, match="minus infinity at 1 of 8"):
        enumeration(bits, shape=(3,))
    with pytest.raises(DivergenceError, match="all 8 states"):
        enumeration(Energy.of(lambda x: x.sum(1) + torch.inf, (3,), constraints.boolean))
    asks = Energy.of(lambda x, y: x.sum(1) * y, (3,), constraints.boolean, context=("y",))
    with pytest.raises(OptionError, match="given"):
        enumeration(asks)
    assert float(enumeration(asks.given(y=torch.tensor(0.0, dtype=torch.float64))).value) == pytest.approx(
        3 * math.log(2.0)
    )
