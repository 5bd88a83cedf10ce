"""Dropped labels: the share is right, the rest of the batch stays, and labels that are no classes are refused."""

from __future__ import annotations

import pytest
import torch

from gibbsian.energies.base import Energy
from gibbsian.energies.neural import MLP
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.objectives.label_dropping import LabelDropping


class Spy(Objective):
    """Keeps the batch that it sees."""

    def forward(self, energy, batch, rng):
        self.batch = batch
        return Loss(batch.x.mean(), {"seen": batch.x.mean()})


ENERGY = Energy.of(lambda x, y: x.sum(1), (2,), context=("y",))


def batch(n=4000, high=3):
    rng = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn((n, 2), generator=rng), {"y": torch.randint(0, high, (n,), generator=rng), "z": torch.arange(n)}
    )


def test_labels_are_dropped_with_their_probability_and_nothing_else_changes():
    spy, rows = Spy(), batch()
    dropping = LabelDropping(spy, none=3, probability=0.2)
    loss = dropping(ENERGY, rows, torch.Generator().manual_seed(1))
    told = spy.batch.context["y"]
    gone = told == 3
    assert abs(float(gone.double().mean()) - 0.2) < 5.5 * (0.2 * 0.8 / 4000) ** 0.5
    assert float(loss.metrics["dropped"]) == pytest.approx(float(gone.double().mean()))
    assert torch.equal(told[~gone], rows.context["y"][~gone])
    assert torch.equal(spy.batch.x, rows.x)
    assert torch.equal(spy.batch.context["z"], rows.context["z"])
    assert "seen" in loss.metrics
    again = LabelDropping(Spy(), none=3, probability=0.2)
    again(ENERGY, rows, torch.Generator().manual_seed(1))
    assert torch.equal(again.objective.batch.context["y"], told)


def test_an_evaluation_drops_none():
    spy, rows = Spy(), batch(50)
    LabelDropping(spy, none=3, probability=1.0).eval()(ENERGY, rows, torch.Generator())
    assert torch.equal(spy.batch.context["y"], rows.context["y"])


def test_it_trains_an_energy_that_is_conditional_and_unconditional_at_once():
    """Two classes at -1 and 1: given none, both are there, and the energy's slope at 0 vanishes."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    energy = MLP(1, hidden=(32,), classes=3)
    dropping = LabelDropping(DenoisingScoreMatching(0.5), none=2, probability=0.3)
    optimizer = torch.optim.Adam(energy.parameters(), 1e-2)
    for _ in range(250):
        y = torch.randint(0, 2, (256,), generator=rng)
        loss = dropping(energy, Batch((2.0 * y - 1.0)[:, None], {"y": y}), rng).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def slope(label):
        x = torch.zeros((1, 1), requires_grad=True)
        return float(torch.autograd.grad(energy.given(y=label)(x).sum(), x)[0])

    assert slope(0) == pytest.approx(4.0, abs=0.8)
    assert slope(1) == pytest.approx(-4.0, abs=0.8)
    assert slope(2) == pytest.approx(0.0, abs=0.8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LabelDropping(lambda: 0, 3), ArgumentTypeError, "objective"),
        (lambda: LabelDropping(Spy(), 3, probability=1.5), OptionError, "probability"),
        (lambda: LabelDropping(Spy(), 0), OptionError, "outside the classes"),
        (lambda: LabelDropping(Spy(), 1, classes=3), OptionError, "outside the classes"),
        (lambda: LabelDropping(Spy(), 3)(ENERGY, Batch(torch.zeros(2, 2)), torch.Generator()), OptionError, "to drop"),
        (lambda: LabelDropping(Spy(), 2)(ENERGY, batch(high=6), torch.Generator()), OptionError, "got 3, 4, 5"),
        (
            lambda: LabelDropping(Spy(), 2)(ENERGY, Batch(torch.zeros(2, 2), {"y": torch.zeros(2)}), torch.Generator()),
            ArgumentTypeError,
            "whole numbers",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
