"""Energies of vector-valued networks."""

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian.energies.fields import FieldEnergy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import evaluate
from gibbsian.objectives.equilibrium import EquilibriumMatching


class Linear(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x, y=1.0):
        return y * (x.flatten(1) @ self.matrix.T).view(x.shape)


def test_energies_and_gradients_of_a_linear_field():
    a, x = (
        torch.randn(s, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for s in ((4, 4), (5, 2, 2))
    )
    v = x.flatten(1)
    for form, value, grad in (
        ("dot", ((v @ a.T) * v).sum(1), v @ (a + a.T)),
        ("square", -0.5 * (v @ a.T).square().sum(1), -v @ a.T @ a),
    ):
        got = evaluate(FieldEnergy(Linear(a), form, (2, 2)), x)
        torch.testing.assert_close(got[0], value)
        torch.testing.assert_close(got[1].flatten(1), grad)


@pytest.mark.parametrize("form", ["dot", "square"])
def test_they_can_be_matched(form):
    rng = torch.Generator().manual_seed(0)
    data = gb.TwoMoons().sample(200, rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2))
    run = gb.fit(
        FieldEnergy(net, form, 2),
        data,
        EquilibriumMatching(gb.Gaussian(2)),
        rng=rng,
        steps=100,
        log_every=10,
        learning_rate=0.01,
    )
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def test_context_reaches_the_field():
    energy = FieldEnergy(Linear(torch.eye(2)), context=("y",))
    x = torch.ones(3, 2)
    assert energy(x, y=torch.full((3, 1), 2.0)).tolist() == [4.0, 4.0, 4.0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ArgumentTypeError, match="module"):
        FieldEnergy(lambda x: x)
    with pytest.raises(OptionError, match="form"):
        FieldEnergy(nn.Identity(), "cubic")
    with pytest.raises(ShapeError, match=r"\(3, 1\)"):
        FieldEnergy(nn.Linear(2, 1))(torch.ones(3, 2))
