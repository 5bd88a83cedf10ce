"""Energy-bounded fine-tuning: the loss by hand, and energies that part while the classes stay."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gibbsian import MLP, Batch, Gaussian
from gibbsian.detection.classifiers import LogSumExp
from gibbsian.energies.classifier import ClassifierEnergy
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.energy_bounded import EnergyBounded


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=200):
    y = torch.arange(n) % 2
    return Batch(0.3 * torch.randn((n, 2), generator=seeded()).double() + 2.0 * y[:, None], {"y": y})


def foreign(n=100):
    """A ring of rows around both classes."""
    angle = 2 * torch.pi * torch.rand(n, generator=seeded(1), dtype=torch.float64)
    return 1.0 + 5.0 * torch.stack([angle.cos(), angle.sin()], 1)


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassifierEnergy(MLP(2, hidden=(32, 32), classes=2).double(), 2)


def test_the_loss_is_cross_entropy_and_two_squared_hinges():
    energy, batch = classifier(), data(40)
    for outside, inner, outer in ((foreign(1), -0.9, -0.5), (foreign(1), 30.0, 31.0), (foreign(1), -31.0, -30.0)):
        found = EnergyBounded(outside, inner, outer, weight=0.3)(energy, batch, seeded())
        e_in, e_out = energy(batch.x), energy(outside.expand(40, 2))
        hinges = torch.where(e_in > inner, e_in - inner, 0) ** 2, torch.where(e_out < outer, outer - e_out, 0) ** 2
        wanted = cross_entropy(energy.logits(batch.x), batch.context["y"]) + 0.3 * sum(h.mean() for h in hinges)
        torch.testing.assert_close(found.value, wanted)
        torch.testing.assert_close(found.metrics["energy_outside"], e_out.mean().detach())
        beyond = sum(float((h > 0).double().mean()) for h in hinges) / 2
        assert float(found.metrics["outside_bounds"]) == pytest.approx(beyond)


def test_foreign_rows_are_drawn_anew_from_the_generator():
    objective, energy = EnergyBounded(foreign(), -3.0, 3.0), classifier()
    a, b, c = (objective(energy, data(20), seeded(s)).value for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert "outside" not in objective.state_dict()


def test_rows_within_their_bounds_have_no_gradient_of_energy():
    energy, batch = classifier(), data(20)
    plain, bounded = (
        torch.autograd.grad(value, list(energy.parameters()))
        for value in (
            cross_entropy(energy.logits(batch.x), batch.context["y"]),
            EnergyBounded(foreign() + 1e3, 1e9 - 1, 1e9, weight=0.0)(energy, batch, seeded()).value,
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, bounded))


def trained(objective, steps=150):
    energy, batch, rng = classifier(), data(), seeded(3)
    optimiser = torch.optim.Adam(energy.parameters(), 5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        objective(energy, batch, rng).value.backward()
        optimiser.step()
    inside, outside = LogSumExp(energy)(batch.x), LogSumExp(energy)(foreign(60) * 1.1)
    accuracy = float((energy.logits(batch.x).argmax(1) == batch.context["y"]).double().mean())
    return float((outside[:, None] > inside).double().mean()), accuracy, inside, outside


def test_fine_tuning_parts_the_energies_and_keeps_the_classes():
    area, accuracy, inside, outside = trained(EnergyBounded(foreign(), -8.0, -2.0, weight=0.1))
    assert area > 0.99
    assert accuracy == 1.0
    assert float(inside.mean()) < -6.0 < -4.0 < float(outside.mean())
    # The twin without the hinges learns the classes, and its energy tells nothing of the kind.
    plain, accuracy, *_ = trained(EnergyBounded(foreign(), -8.0, -2.0, weight=0.0))
    assert accuracy == 1.0
    assert plain < 0.9


def test_other_terms_of_a_sum_count_in_the_energy():
    energy = classifier() + Gaussian(dim=2).double()
    found = EnergyBounded(foreign(), -8.0, -2.0)(energy, data(20), seeded())
    torch.testing.assert_close(found.metrics["energy_data"], energy(data(20).x).mean().detach())


def call(objective, energy=None, batch=None):
    return objective(energy or classifier(), batch or data(20), seeded())


BAD = {
    "no tensor": (lambda: EnergyBounded([[0.0, 1.0]], -1.0, 1.0), ArgumentTypeError, "list"),
    "no rows": (lambda: EnergyBounded(torch.zeros(0, 2), -1.0, 1.0), ShapeError, r"\(0, 2\)"),
    "bounds": (lambda: EnergyBounded(foreign(), 1.0, -1.0), OptionError, "the larger; got 1.0 and -1.0"),
    "weight": (lambda: EnergyBounded(foreign(), -1.0, 1.0, -0.1), OptionError, "got -0.1"),
    "no classifier": (lambda: call(EnergyBounded(foreign(), -1.0, 1.0), MLP(2).double()), ArgumentTypeError, "Classif"),
    "no labels": (lambda: call(EnergyBounded(foreign(), -1.0, 1.0), batch=Batch(data().x)), OptionError, "labels, y"),
    "shapes": (lambda: call(EnergyBounded(torch.ones(4, 3), -1.0, 1.0)), ShapeError, r"\(2,\); got \(3,\)"),
    "probabilities": (
        lambda: call(
            EnergyBounded(foreign(), -1.0, 1.0),
            ClassifierEnergy(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)).double(), 2),
        ),
        DomainError,
        "without its softmax",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
