"""Energies in a flow's noise: closed forms, the same mass, exact draws stay exact, and a missing log det is caught."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, constraints

import gibbsian as gb
from contracts import ExactTarget, assert_invariant, normal_cdf, seeded
from gibbsian.compilation import _said
from gibbsian.energies.base import Energy
from gibbsian.energies.flows import Flow, inverse_autoregressive_flow, spline_flow
from gibbsian.energies.neural import MLP
from gibbsian.energies.targets import Funnel
from gibbsian.energies.tilted import tilted
from gibbsian.energies.toys import Rosenbrock
from gibbsian.energies.transport import neural_transport
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.partition.exact import quadrature

zuko = pytest.importorskip("zuko")

D = torch.float64


class Diagonal(nn.Module):
    """x = b + s u, exactly."""

    def __init__(self, shift, scale):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.tensor(v, dtype=D)) for v in (shift, scale))

    def forward(self):
        to_noise = AffineTransform(-self.shift / self.scale, 1.0 / self.scale, event_dim=1)
        base = zuko.distributions.DiagNormal(
            torch.zeros(len(self.scale), dtype=D), torch.ones(len(self.scale), dtype=D)
        )
        return zuko.distributions.NormalizingFlow(to_noise, base)


def carrying(dim=2, seed=0, gain=2.0, **options):
    """A flow with quick draws, off its start."""
    torch.manual_seed(seed)
    flow = inverse_autoregressive_flow(dim, hidden=(16,), **options).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(gain)
    return flow


class WithoutLogDet(Energy):
    """The broken twin."""

    def __init__(self, moved):
        super().__init__()
        self.moved, self.event_shape = moved, moved.event_shape

    def forward(self, u):
        return self.moved.energy(self.moved.flow.from_latent(u)[0])


def test_an_affine_flow_gives_the_closed_form():
    shift, scale = [0.3, -1.0], [2.0, 0.5]
    flow = Flow(Diagonal(shift, scale))
    flow.loc.copy_(torch.tensor([0.1, 0.2], dtype=D))
    flow.scale.copy_(torch.tensor([1.5, 3.0], dtype=D))
    target = gb.Gaussian(loc=torch.tensor([1.0, 2.0], dtype=D), scale=torch.tensor([0.7, 1.3], dtype=D))
    moved = neural_transport(target, flow)
    u = torch.randn((6, 2), generator=seeded(), dtype=D)
    s = torch.tensor(scale, dtype=D) * flow.scale
    x = flow.loc + flow.scale * torch.tensor(shift, dtype=D) + s * u
    torch.testing.assert_close(moved.forward_points(u), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved.backward_points(x), u, rtol=0, atol=1e-12)
    z = (x - target.loc) / target.scale
    expected = 0.5 * z.square().sum(1) + (target.scale.log() + 0.5 * math.log(2 * math.pi)).sum() - s.log().sum()
    torch.testing.assert_close(moved(u), expected, rtol=0, atol=1e-12)
    # Where the flow is the target, what is left is the noise's own energy.
    rest = neural_transport(flow, flow)
    torch.testing.assert_close(rest(u), 0.5 * u.square().sum(1) + math.log(2 * math.pi), rtol=0, atol=1e-12)
    assert float((WithoutLogDet(moved)(u) - expected).abs().min()) > 0.1


@pytest.mark.parametrize("make", [carrying, lambda: carrying(bins=4), lambda: spline_flow(2, hidden=(16,)).double()])
def test_the_log_det_is_that_of_the_map(make):
    flow = make()
    flow.scale.copy_(torch.tensor([0.5, 2.0], dtype=D))
    moved = neural_transport(Funnel(2).double(), flow)
    u = torch.randn((5, 2), generator=seeded(), dtype=D)
    for row in u:
        full = torch.autograd.functional.jacobian(lambda v: flow.from_latent(v[None])[0][0], row)
        x = moved.forward_points(row[None])
        expected = moved.energy(x) - torch.linalg.slogdet(full).logabsdet
        torch.testing.assert_close(moved(row[None]), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.backward_points(moved.forward_points(u)), u, rtol=0, atol=1e-6)


def test_the_mass_is_that_of_the_energy():
    flow = carrying(gain=1.0)
    flow.scale.copy_(torch.tensor([2.0, 0.8], dtype=D))
    moved = neural_transport(gb.Gaussian(2, scale=1.3).double(), flow)
    assert float(quadrature(moved, -12.0, 12.0, 400).log_z.value) == pytest.approx(0.0, abs=1e-5)
    assert abs(float(quadrature(WithoutLogDet(moved), -12.0, 12.0, 400).log_z.value)) > 0.3


def banana():
    energy = Rosenbrock(b=3.0).double()
    return energy, {
        "x0": (lambda x: x[:, 0], lambda v: normal_cdf((v - 1.0) / math.sqrt(0.5))),
        "off the floor": (lambda x: x[:, 1] - x[:, 0].square(), lambda v: normal_cdf(v * math.sqrt(6.0))),
    }


def funnel():
    energy = Funnel(3, scale=1.0).double()
    return energy, {
        "v": (lambda x: x[:, 0], normal_cdf),
        "x1": (lambda x: x[:, 1] * (-0.5 * x[:, 0]).exp(), normal_cdf),
        "x2": (lambda x: x[:, 2] * (-0.5 * x[:, 0]).exp(), normal_cdf),
    }


@pytest.mark.parametrize("target", [banana, funnel])
def test_exact_draws_stay_exact_in_the_noise(target):
    """50,000 chains from exact draws taken to the noise: KS distances there and back, at 1 false alarm in 1e8."""
    energy, laws = target()
    moved = neural_transport(energy, carrying(energy.event_shape[0]))

    def draw(n, rng):
        return moved.backward_points(energy.sample(n, rng))

    projections = {name: (lambda u, f=f: f(moved.forward_points(u)), cdf) for name, (f, cdf) in laws.items()}
    kernel = gb.HMC(0.35, leapfrog=3)
    assert_invariant(kernel, ExactTarget(target.__name__, moved, draw, projections))
    twin = ExactTarget(target.__name__, WithoutLogDet(moved), draw, projections)
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(kernel, twin)


def test_a_tilted_model_brings_its_own_flow():
    flow = spline_flow(2, hidden=(16,), passes=2).double()
    torch.manual_seed(1)
    model = tilted(flow, MLP(2, hidden=(8,)).double(), from_zero=False)
    short, long = neural_transport(model), neural_transport(model, flow)
    assert short.own
    assert not long.own
    u = torch.randn((7, 2), generator=seeded(), dtype=D)
    torch.testing.assert_close(short(u), long(u), rtol=1e-7, atol=1e-7)
    assert short.flow is model.base
    assert not any(p.requires_grad for p in short.flow.parameters())
    assert all(p.requires_grad for p in short.energy.net.parameters())


def test_pictures_batches_contexts_and_starts():
    flow = carrying(4)
    shaped = Flow(flow.flow, (1, 2, 2))
    energy = Energy.of(lambda x, c: c * x.flatten(1).square().sum(1), (1, 2, 2), context=("c",))
    moved = neural_transport(energy, shaped)
    assert moved.context == ("c",)
    u = moved.start(6, seeded())
    assert u.shape == (6, 4)
    assert moved(u, c=torch.ones(6, dtype=D)).shape == (6,)
    x = moved.forward_points(u.reshape(2, 3, 4))
    assert x.shape == (2, 3, 1, 2, 2)
    torch.testing.assert_close(moved.backward_points(x), u.reshape(2, 3, 4), rtol=0, atol=1e-9)
    out = gb.sample(moved.given(c=2.0), gb.MALA(0.1), u, steps=2, rng=seeded())
    assert out.x.shape == (6, 4)
    assert "Transported" in repr(moved)
    torch.testing.assert_close(
        shaped.sample(5, seeded(3)), shaped.from_latent(shaped.sample_latent(5, seeded(3)))[0], rtol=0, atol=1e-12
    )


def test_the_flow_that_is_kept_does_not_move():
    flow = carrying()
    moved = neural_transport(Rosenbrock().double(), flow)
    u = torch.randn((3, 2), generator=seeded(), dtype=D)
    before = moved(u)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(1.0)
    assert torch.equal(before, moved(u))
    assert all(p.requires_grad for p in flow.parameters())


@pytest.mark.slow
def test_asked_to_compile_the_draws_are_the_same():
    moved = neural_transport(Rosenbrock(b=3.0).double(), carrying())
    u = moved.start(8, seeded())
    eager = gb.sample(moved, gb.HMC(0.3, leapfrog=3), u, steps=6, rng=seeded(1))
    _said.discard("eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled = gb.sample(moved, gb.HMC(0.3, leapfrog=3), u, steps=6, rng=seeded(1), compile=True)
    torch.testing.assert_close(compiled.x, eager.x, rtol=0, atol=1e-9)
    # Dynamo cannot trace zuko's laws today; what it says then is the notice that every such energy gets.
    assert all("running eagerly" in str(w.message) for w in said)


class Uniformly(nn.Module):
    """No map of Gaussian noise."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self):
        return torch.distributions.Independent(torch.distributions.Normal(self.loc, 1.0), 1)


REFUSED = {
    "another shape": (
        lambda: neural_transport(Funnel(3), spline_flow(2)),
        ShapeError,
        r"over points of shape \(3,\) and the flow over \(2,\)",
    ),
    "bits": (
        lambda: neural_transport(gb.Bernoulli(torch.zeros(2)), spline_flow(2)),
        DomainError,
        "over the reals alone",
    ),
    "a box": (
        lambda: neural_transport(Energy.of(lambda x: x.sum(1), (2,), constraints.unit_interval), spline_flow(2)),
        DomainError,
        "unconstrain",
    ),
    "no flow": (lambda: neural_transport(Funnel(2)), OptionError, "no flow of its own"),
    "something else": (lambda: neural_transport(Funnel(2), gb.Gaussian(2)), ArgumentTypeError, "needs a Flow"),
    "no map": (lambda: neural_transport(Funnel(2).double(), Flow(Uniformly())), ArgumentTypeError, "invertible map"),
    "a circle": (
        lambda: neural_transport(Funnel(2), Flow(zuko.flows.NCSF(2))),
        ArgumentTypeError,
        "invertible map",
    ),
    "no rows": (
        lambda: neural_transport(Funnel(2), spline_flow(2)).forward_points(torch.zeros(2)),
        ShapeError,
        "at least one of rows",
    ),
    "other noise": (
        lambda: neural_transport(Funnel(2), spline_flow(2))(torch.zeros(3, 4)),
        ShapeError,
        "Expected points",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()
