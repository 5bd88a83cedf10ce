"""Flows as tractable energies: densities that integrate to one, draws that follow them and the generator, refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from contracts import seeded
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, DataError, MissingPackageError, OptionError, ShapeError
from gibbsian.objectives.base import Batch
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE
from gibbsian.partition.exact import quadrature

zuko = pytest.importorskip("zuko")

D = torch.float64


def bent(dim=2, seed=0, **options):
    """A flow off its start: moved and scaled, with weights twice their initial size."""
    torch.manual_seed(seed)
    flow = spline_flow(dim, transforms=2, hidden=(16,), **options).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2.0)
    flow.loc.copy_(torch.linspace(-0.5, 1.0, flow.loc.numel(), dtype=D).view_as(flow.loc))
    flow.scale.copy_(torch.linspace(0.5, 1.5, flow.loc.numel(), dtype=D).view_as(flow.loc))
    return flow


def check_mass(flow) -> None:
    """The density integrates to one, and draws fall into cells as it says.

    Six standard deviations of a count in 64 cells: a false alarm in 1e7.
    """
    grid = quadrature(flow, -9.0, 11.0, 500)
    assert float(grid.log_z.value) == pytest.approx(0.0, abs=1e-3), "missed: mass"
    n = 20_000
    x = flow.sample(n, seeded(1))
    edges = torch.linspace(-2.0, 3.0, 9, dtype=D)
    counts = torch.histogramdd(x, [edges, edges]).hist
    fine = torch.linspace(-2.0, 3.0, 8 * 40 + 1, dtype=D)[:-1] + 5.0 / 640
    density = (-flow(torch.cartesian_prod(fine, fine))).exp().detach().view(8, 40, 8, 40).sum((1, 3)) * (5.0 / 320) ** 2
    spread = (n * density * (1 - density)).sqrt() + 1.0
    assert bool(((counts - n * density).abs() < 6 * spread).all()), "missed: cells"


def test_the_density_is_normalised_and_draws_follow_it():
    check_mass(bent())


@pytest.mark.parametrize("slip", ["scale forgotten", "scale's sign", "scale of draws"])
def test_a_slip_in_the_scaling_is_caught(slip, monkeypatch):
    forward = Flow.forward
    logs = {"scale forgotten": -1.0, "scale's sign": -2.0, "scale of draws": 0.0}[slip]
    monkeypatch.setattr(Flow, "forward", lambda self, x: forward(self, x) + logs * self.scale.log().sum())
    if slip == "scale of draws":
        monkeypatch.setattr(Flow, "_placed", lambda self, z: self.loc + z)
    with pytest.raises(AssertionError, match="missed"):
        check_mass(bent())


@pytest.mark.parametrize("shape", [3, (1, 2, 2)])
def test_draws_come_with_their_log_densities(shape):
    flow = bent(shape)
    x, log_prob = flow.rsample_and_log_prob(7, seeded(2))
    assert x.shape == (7, *flow.event_shape)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.sample(7, seeded(2)), x.detach())
    assert not flow.sample(7, seeded(2)).requires_grad
    assert all(g is not None for g in torch.autograd.grad(x.sum() + log_prob.sum(), list(flow.flow.parameters())))


def test_a_flow_without_a_joint_draw_is_adopted_too():
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([0.3, -0.2], dtype=D))

        def forward(self):
            return torch.distributions.Independent(torch.distributions.Normal(self.loc, 1.0), 1)

    flow = Flow(Line())
    x, log_prob = flow.rsample_and_log_prob(5, seeded())
    torch.testing.assert_close(log_prob, -Gaussian(loc=torch.tensor([0.3, -0.2], dtype=D))(x))
    (slope,) = torch.autograd.grad(x.sum(), flow.flow.loc)
    torch.testing.assert_close(slope, torch.full((2,), 5.0, dtype=D))


def test_draws_follow_the_generator_and_leave_the_global_one_alone():
    flow = bent()
    before = torch.get_rng_state()
    rng = seeded(3)
    a, b = flow.sample(4, rng), flow.sample(4, rng)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, flow.sample(4, seeded(3)))
    assert not torch.equal(a, b)


def test_calibration_brings_the_flow_to_the_data():
    torch.manual_seed(0)
    x = torch.tensor([100.0, -3.0]) + torch.tensor([20.0, 0.1]) * torch.randn((2000, 2), generator=seeded())
    flow = spline_flow(2)
    far = flow(x)
    standard = (x - x.mean(0)) / x.std(0)
    expected = flow(standard) + x.std(0).log().sum()
    near = flow.calibrate(x)(x)
    torch.testing.assert_close(near, expected, rtol=1e-4, atol=1e-4)
    assert float((far - near).mean().detach()) > 100


def test_as_noise_that_does_not_learn_it_gets_no_gradient():
    torch.manual_seed(0)
    energy, flow = MLP(2, hidden=(8,)), spline_flow(2, transforms=1, hidden=(8,))
    x = torch.randn((16, 2), generator=seeded())
    for objective in (NoiseContrastiveEstimation(flow), RankingNCE(flow)):
        objective(energy, Batch(x), seeded()).value.backward()
    assert all(p.grad is None for p in flow.parameters())
    assert all(p.grad is not None for p in energy.net[0].parameters())


def test_the_state_goes_round():
    one, two = bent(seed=0), bent(seed=1)
    two.loc.add_(1.0)
    x = torch.randn((4, 2), generator=seeded(), dtype=D)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    assert "Flow" in repr(one)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ArgumentTypeError, match="zuko flow without context"):
        Flow(Gaussian)
    with pytest.raises(ArgumentTypeError, match="zuko flow without context"):
        Flow(MLP(2))
    with pytest.raises(ArgumentTypeError, match="zuko flow without context"):
        Flow(zuko.flows.NSF(2, context=3))
    with pytest.raises(ShapeError, match=r"\(2,\).*\(1, 2, 2\)"):
        Flow(zuko.flows.NSF(2), (1, 2, 2))
    with pytest.raises(ShapeError, match="Expected points"):
        spline_flow(2)(torch.zeros(3, 4))
    with pytest.raises(DataError, match="1 of 2 coordinates do not vary"):
        spline_flow(2).calibrate(torch.stack((torch.arange(5.0), torch.ones(5)), 1))
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(MissingPackageError, match=r'pip install "gibbsian\[flows\]"'):
        spline_flow(2)


def test_coupling_draws_agree_with_their_density():
    torch.manual_seed(3)
    flow = spline_flow(6, transforms=2, hidden=(16,), passes=2).double()
    x = flow.sample(200, torch.Generator().manual_seed(0))
    assert x.shape == (200, 6)
    # Down to the base and up again: the density is that of the map that draws.
    transform = flow.flow().transform
    torch.testing.assert_close(transform.inv(transform(x)), x, rtol=1e-6, atol=1e-6)
    with pytest.raises(OptionError, match="passes is a whole number from 2, or None for one per coordinate; got 1"):
        spline_flow(6, passes=1)
