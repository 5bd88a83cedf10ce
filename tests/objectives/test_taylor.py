"""Taylor mode: every rule against reverse differentiation, in values and in the gradients of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gibbsian import MLP, ConvEnergy, Energy, Gaussian, NoiseConditional, ResidualEnergy, matmul, mixture
from gibbsian.objectives import curvature, taylor
from gibbsian.objectives.curvature import goes_by_taylor, slopes_and_curvature
from gibbsian.objectives.taylor import NotPropagated, propagate
from recovery import seeded

F = nn.functional


class Scaled(Energy):
    """A function of a point and of weights ``(3, 4)``."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(torch.linspace(-0.7, 0.9, 12, dtype=torch.float64).view(3, 4))

    def forward(self, x):
        return self.fn(x, self.w)


FUNCTIONS = {
    "silu": lambda x, w: F.silu(x @ w).sum(1),
    "softplus": lambda x, w: F.softplus(x @ w, beta=1.7).sum(1),
    "tanh": lambda x, w: torch.tanh(x @ w).sum(-1),
    "sigmoid": lambda x, w: (x @ w).sigmoid().sum(1),
    "gelu": lambda x, w: F.gelu(x @ w).sum(1),
    "sines": lambda x, w: torch.sin(x @ w).sum(1) + (x @ w).cos().sum(1),
    "exp": lambda x, w: torch.exp(x @ w).sum(1),
    "log": lambda x, w: ((x @ w).square() + 1.0).log().sum(1),
    "square of a square": lambda x, w: (x @ w).square().square().sum(1),
    "third power": lambda x, w: ((x @ w) ** 3).sum(1),
    "square root": lambda x, w: (1 + (x @ w).pow(2)).sqrt().sum(1),
    "fifth power over two": lambda x, w: 0.5 * ((x @ w).pow(5)).sum(1),
    "quotient": lambda x, w: ((x @ w) / (2.0 + (x @ w) ** 2)).sum(1),
    "number over jet": lambda x, w: (3.0 / (2.0 + (x @ w) ** 2)).sum(1),
    "products": lambda x, w: ((x @ w) * torch.sin(x @ w) * w[0]).sum(1),
    "differences": lambda x, w: (w[0] - torch.sin(x @ w) - 2.0 * (1.0 - x @ w) ** 2).mean(1),
    "columns": lambda x, w: w[0, 0] * x[:, 0] * x[:, 1] + x[:, 2].pow(2) * w[1, 1] + x[..., 0].sin(),
    "a cat": lambda x, w: torch.cat((x, torch.sin(x), x[:, :1] * w[0, 0]), 1).square().sum(1),
    "shapes": lambda x, w: (x.reshape(-1, 1, 3).flatten(1).unsqueeze(2) * w).view(len(x), 12).tanh().sum((1,)),
    "squeeze": lambda x, w: F.linear(x, w.T[:1]).squeeze(1).square(),
    "a bias": lambda x, w: F.silu(F.linear(x, w.T, w.sum(0))).sum(1),
    "layers twice": lambda x, w: F.silu(F.silu(x @ w) @ w.T).sum(1),
    "an axis that grows": lambda x, w: (x.sum(1, keepdim=True) + w[0]).sin().sum(1),
    "two that grow": lambda x, w: w[0, 0] * (x.sum(1, keepdim=True) * x.square() + x.sum(1, keepdim=True)).sum(1),
    "no curvature": lambda x, w: x.sum(1) * w[0, 0],
    "eval dropout": lambda x, w: F.dropout(x @ w, 0.5, training=False).square().sum(1),
}


def both_ways(energy, x, directions, context=None):
    """Values, slopes and curvatures with the gradients of a function of all three, by either road."""
    outs = []
    for road in (propagate, slopes_and_curvature):
        curvature._taylor[energy] = False
        value, slopes, curve = road(energy, x, directions, context or {})
        weight = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
        total = (weight * (value.sin() + slopes.square().sum(0) + slopes.sin().sum(0) - curve * (1 + value))).sum()
        grads = torch.autograd.grad(total, list(energy.parameters()), allow_unused=True)
        outs.append([value, slopes, curve, *(torch.zeros(()) if g is None else g for g in grads)])
    curvature._taylor.pop(energy)
    return outs


def check_rule(fn, k=3, own=True) -> None:
    energy, x = Scaled(fn), 0.7 * torch.randn((5, 3), generator=seeded(1), dtype=torch.float64)
    v = torch.randn((k, 5 if own else 1, 3), generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(*both_ways(energy, x, v), rtol=1e-9, atol=1e-10, msg=lambda m: f"missed: {m}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_gives_what_reverse_differentiation_gives(name):
    for k, own in ((3, True), (1, True), (2, False), (1, False)):
        check_rule(FUNCTIONS[name], k, own)


SLIPS = {
    "second derivative": lambda z, order: [z.sin(), z.cos(), z.sin(), -z.cos()][: order + 1],
    "third derivative": lambda z, order: [z.sin(), z.cos(), -z.sin(), z.cos()][: order + 1],
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_a_rule_is_caught(name, monkeypatch):
    monkeypatch.setitem(taylor._RULES, "sin", lambda x: taylor._apply(SLIPS[name], x))
    with pytest.raises(AssertionError, match="missed"):
        check_rule(FUNCTIONS["sines"])


def energies():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "MLP": (MLP((2, 3), hidden=(8, 8)), (2, 3), True),
            "MLP with features and a base": (0.5 * MLP(3, (8,), frequencies=2) + Gaussian(3, scale=2.0), (3,), True),
            "MLP with spectral norms": (MLP(3, (8,), spectral_norm=True), (3,), True),
            "labels": (MLP(3, (8,), classes=4).given(y=torch.tensor([0, 1, 2, 3, 0])), (3,), True),
            "convolutions": (ConvEnergy((2, 5, 5), widths=(3, 4)), (2, 5, 5), True),
            "residual blocks": (ResidualEnergy((1, 6, 6), widths=(3, 4)), (1, 6, 6), True),
            "noise levels": (NoiseConditional(3, width=8, blocks=1).given(sigma=0.4), (3,), False),
            "a mixture": (mixture(MLP(3, (8,)), Gaussian(3)), (3,), False),
        }


@pytest.mark.parametrize("name", energies())
def test_energies_go_the_road_they_can(name):
    energy, shape, quick = energies()[name]
    energy = energy.double()
    x = torch.randn((5, *shape), generator=seeded(1), dtype=torch.float64)
    v = torch.randn((2, 5, *shape), generator=seeded(2), dtype=torch.float64)
    assert goes_by_taylor(energy, x, {}) == quick
    if quick:
        torch.testing.assert_close(*both_ways(energy, x, v), rtol=1e-9, atol=1e-10)
    else:
        with pytest.raises(Exception):  # noqa: B017
            propagate(energy, x, v, {})


REFUSED = {
    "a sum over rows": lambda x, w: x.square().sum(1) + x.sum(0)[0],
    "a sum over all": lambda x, w: x.square().sum() * x[:, 0],
    "a choice of rows": lambda x, w: x[[0, 0, 1, 2, 3]].square().sum(1),
    "a reshape of rows": lambda x, w: x.reshape(3, 5)[0],
    "a function without a rule": lambda x, w: torch.erf(x).sum(1),
    "a comparison": lambda x, w: torch.where(x > 0, x, 2 * x).square().sum(1),
    "a cut": lambda x, w: x.square().sum(1) + x.detach().sum(1),
    "weights that depend on x": lambda x, w: (x @ x.T).sum(1),
    "alpha": lambda x, w: torch.add(x, x, alpha=2.0).square().sum(1),
    "training dropout": lambda x, w: F.dropout(x, 0.5, training=True).square().sum(1),
    "not one number per row": lambda x, w: x.square(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_never_pushed_wrongly(name):
    energy, x = Scaled(REFUSED[name]), torch.randn((5, 3), generator=seeded(1), dtype=torch.float64)
    with pytest.raises((NotPropagated, TypeError)):
        propagate(energy, x, torch.ones(1, 1, 3, dtype=torch.float64), {})


def test_a_road_that_disagrees_is_not_taken(monkeypatch):
    energy, x = Scaled(FUNCTIONS["sines"]), torch.randn((5, 3), generator=seeded(1), dtype=torch.float64)
    monkeypatch.setitem(taylor._RULES, "sin", lambda x: taylor._apply(SLIPS["second derivative"], x))
    assert not goes_by_taylor(energy, x, {})
    monkeypatch.undo()
    assert goes_by_taylor(Scaled(FUNCTIONS["sines"]), x, {})


@pytest.mark.parametrize("quick", [True, False])
def test_large_products_in_single_precision_are_those_of_double(quick, monkeypatch):
    """By whichever library the machine is quicker with."""
    if quick and not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        pytest.skip("This torch has one library only.")
    monkeypatch.setattr(matmul, "is_slow_here", lambda: quick)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = MLP(20, hidden=(64, 48))
    double = copy.deepcopy(single).double()
    x, v = torch.randn((100, 20), generator=seeded(1)), torch.randn((2, 100, 20), generator=seeded(2))
    found = []
    for energy, points, directions in ((single, x, v), (double, x.double(), v.double())):
        parts = propagate(energy, points, directions, {})
        total = parts[0].mean() + parts[1].square().mean() - parts[2].mean()
        found.append([*(p.detach() for p in parts), *torch.autograd.grad(total, list(energy.parameters()))])
    for a, b in zip(*found):
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())
