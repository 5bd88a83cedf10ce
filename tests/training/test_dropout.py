"""Dropout in training: seeded by the run, resumed exactly, and off wherever an energy is used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gibbsian.energies.base import Energy
from gibbsian.energies.noise import NoiseConditional
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import InputError
from gibbsian.kernels.langevin import ULA
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.objectives.denoising import LogNormal, MultiLevelDenoising
from gibbsian.partition.annealed import ais
from gibbsian.sampling import sample
from gibbsian.training.fit import fit
from gibbsian.training.state import TrainingState


def energy() -> NoiseConditional:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NoiseConditional(3, width=16, blocks=1, local=2, dropout=0.3)


def trained(around: int, **options: object) -> torch.Tensor:
    """Train with the global generator in a state of its own; return the averaged weights."""
    rng = torch.Generator().manual_seed(1)
    data = torch.randn(40, 3, generator=rng)
    net = energy()
    options = {"steps": 12, "checkpoint_every": 4} | options
    with torch.random.fork_rng():
        torch.manual_seed(around)
        fit(net, data, MultiLevelDenoising(LogNormal(-0.5, 1.0, 0.1, 3.0)), rng=rng, batch_size=16, **options)
        assert torch.initial_seed() == around  # fit must leave the global generator alone
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_the_run_seeds_dropout() -> None:
    assert torch.equal(trained(1), trained(2))


def test_without_the_seeds_runs_differ(monkeypatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(TrainingState, "seeded", lambda self: nullcontext())
    assert not torch.equal(trained(1), trained(2))


def test_a_resumed_run_drops_the_same_units(tmp_path) -> None:
    whole = trained(1, decay="constant")
    trained(1, decay="constant", steps=8, folder=tmp_path, tensorboard=False)
    assert torch.equal(whole, trained(2, decay="constant", folder=tmp_path, resume=True, tensorboard=False))


def test_dropout_is_on_in_training_alone() -> None:
    seen = []
    net = energy()
    net.dropout.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    first = net(x, sigma=torch.ones(40))
    assert torch.equal(first, net(x, sigma=torch.ones(40)))
    levels = LogNormal(-0.5, 1.0, 0.1, 3.0)
    fit(net, x, MultiLevelDenoising(levels), rng=torch.Generator().manual_seed(3), steps=3)
    net(x, sigma=torch.ones(40))
    assert seen == [False, False, True, True, True, False]
    assert not any(m.training for m in net.modules() if isinstance(m, nn.Dropout))


def test_chains_see_no_dropout_and_the_loss_does() -> None:
    seen = []
    net = Energy.of(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0)), (3,))
    base = Gaussian(3)
    next(m for m in net.modules() if isinstance(m, nn.Dropout)).register_forward_pre_hook(
        lambda module, _: seen.append(module.training)
    )
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    objective = PersistentContrastiveDivergence(ULA(0.01), base, steps=2, buffer_size=64)
    fit(net + base, x, objective, rng=torch.Generator().manual_seed(3), steps=2, batch_size=16)
    # The last is the look at the energy's spread for the record.
    assert seen == [*2 * [False, False, False, True], False]
    with pytest.raises(InputError, match="dropout in training mode"):
        sample((net + base).train(), ULA(0.01), x, steps=2, rng=torch.Generator())
    with pytest.raises(InputError, match="dropout in training mode"):
        ais((net + base).train(), base, rng=torch.Generator())
