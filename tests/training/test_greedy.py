"""Greedy training of stacks: deep belief networks, and the first weights of deep Boltzmann machines."""

import pytest
import torch

from contracts import seeded
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.units import SpinUnits
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.contrastive import ContrastiveDivergence
from gibbsian.partition.belief import exact_belief_log_likelihood
from gibbsian.partition.deep import exact_deep_log_likelihood
from gibbsian.training.greedy import pretrain, train_belief_network

SETTINGS = {"steps": 200, "batch_size": 100, "learning_rate": 0.02}


def rows():
    rng = seeded(7)
    x = torch.randint(2, (2000, 2), generator=rng).repeat_interleave(3, 1).float()
    return torch.where(torch.rand(x.shape, generator=rng) < 0.08, 1.0 - x, x)


def test_first_weights_of_a_deep_machine():
    x = rows()
    machine = DeepBoltzmannMachine(6, [4, SpinUnits(3), 3], rng=seeded())
    machine.start_at(x)
    start = float(exact_deep_log_likelihood(machine, x[:500]).mean())
    fits = pretrain(machine, x, rng=seeded(1), **SETTINGS)
    found = float(exact_deep_log_likelihood(machine, x[:500]).mean())
    assert [len(done.events) for done in fits] == [0, 0, 0]
    assert start < -4.1
    assert found > -3.4, f"{start:.3f} to {found:.3f}"


def test_a_belief_network_and_an_objective_of_ones_own():
    x, seen = rows(), []

    def objective(tied, data):
        seen.append((tied.visible_copies, tied.hidden_copies, tuple(data.shape[1:])))
        return ContrastiveDivergence(RBMGibbs(), steps=2)

    network = train_belief_network(6, [4, 3], x, rng=seeded(1), objective=objective, **SETTINGS)
    assert seen == [(1, 1, (6,)), (1, 1, (4,))]
    # Six fair coins are at -4.16, the truth at -3.0.
    assert float(exact_belief_log_likelihood(network, x[:500]).mean()) > -3.6
    seen.clear()
    pretrain(DeepBoltzmannMachine(6, [4, 2, 3]), x, rng=seeded(1), objective=objective, **(SETTINGS | {"steps": 2}))
    assert seen == [(2, 1, (6,)), (1, 1, (4,)), (1, 2, (2,))]


def test_what_does_not_fit():
    with pytest.raises(ArgumentTypeError, match="first weights"):
        pretrain(torch.nn.Linear(2, 2), rows(), rng=seeded())
    with pytest.raises(OptionError, match="two hidden layers or more"):
        train_belief_network(6, [4], rows(), rng=seeded())
    with pytest.raises(OptionError, match="no training setting"):
        pretrain(DeepBoltzmannMachine(6, [4, 3]), rows(), rng=seeded(), lerning_rate=1.0)
    with pytest.raises(DomainError, match=r"0\.3.*Binarise"):
        train_belief_network(6, [4, 3], torch.full((5, 6), 0.3), rng=seeded())
