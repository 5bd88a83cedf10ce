"""Bootstrapped flows: the gradient of the alpha-2 divergence against quadrature, log Z, collapse, and refusals."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, constraints

from contracts import seeded
from gibbsian.energies.base import Combination, Energy
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import ULA
from gibbsian.learned import fab as module
from gibbsian.learned.fab import FAB, alpha_two_loss, toward_least_variance
from gibbsian.learned.flow_sampler import fit_flow, missed_mass
from gibbsian.learned.prioritised import Drawn, PrioritisedBuffer
from gibbsian.learned.reverse_kl import ReverseKL
from oracles import Z_LIMIT

D = torch.float64


class Line(nn.Module):
    """A Gaussian on the line as the simplest of flows."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.2], dtype=D))
        self.log_scale = nn.Parameter(torch.tensor([0.3], dtype=D))

    def forward(self):
        return Independent(Normal(self.loc, self.log_scale.exp()), 1)


class Well(Energy):
    event_shape = torch.Size((1,))

    def forward(self, x):
        return (0.5 * x**4 - x**2 - 0.4 * x).sum(1)


def spline(dim=2, seed=0, scale=1.0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = spline_flow(dim, **{"transforms": 2, "hidden": (16,)} | options)
    flow.scale.fill_(scale)
    return flow


def exact_gradient(flow, energy):
    """Of the loss, by the trapezoidal rule: and the log of the constant of p^2 / q."""
    x = torch.linspace(-5.0, 5.0, 4001, dtype=D).unsqueeze(1)
    log_q = flow.log_prob(x)
    log_g = -2.0 * energy(x) - log_q.detach()
    width = float(x[1] - x[0])
    mass = log_g.exp() * width
    grads = torch.autograd.grad(-(mass * log_q).sum() / mass.sum(), list(flow.parameters()))
    return torch.cat(grads), float(mass.sum().log())


def moved(flow):
    with torch.no_grad():
        flow.flow.loc.add_(0.15)
        flow.flow.log_scale.sub_(0.1)


def deviation():
    """Largest deviation of the buffered gradient from the exact one after a move, over the parameters, in errors."""
    energy, method = Well(), FAB(batch=4096, temperatures=3, kernel=HMC(0.3, leapfrog=3))
    flow, told = Flow(Line()), []
    _, before = exact_gradient(flow, energy)
    found = []
    for i in range(30):
        x = flow.sample(4096, seeded(10 + i))
        carried = method.anneal(module.toward_least_variance(flow, energy), x, torch.tensor(0.3).log(), seeded(50 + i))
        buffer = PrioritisedBuffer((1,), 4096, D)
        with torch.no_grad():
            buffer.add(carried.x, carried.log_weights, flow.log_prob(carried.x))
        found.append(buffer)
    moved(flow)
    exact, after = exact_gradient(flow, energy)
    for i, buffer in enumerate(found):
        drawn = buffer.draw(4096, seeded(i))
        loss = alpha_two_loss(flow.log_prob(drawn.x), drawn)
        told.append(torch.cat(torch.autograd.grad(loss, list(flow.parameters()))))
    each = torch.stack(told)
    error = each.std(0) / math.sqrt(len(each))
    return float(((each.mean(0) - exact * math.exp(after - before)) / error).abs().max())


def test_the_gradient_is_that_of_the_divergence():
    """Two parameters and 30 buffers: Student's law with 29 degrees of freedom exceeds 7 once in 10^7."""
    assert deviation() < 7.0


@pytest.mark.parametrize("slip", ["no correction", "toward p", "sign"])
def test_broken_twins_of_the_gradient_are_caught(slip, monkeypatch):
    if slip == "no correction":
        monkeypatch.setattr(Drawn, "corrections", lambda self, log_q: torch.ones_like(log_q))
    elif slip == "toward p":
        monkeypatch.setattr(module, "toward_least_variance", lambda q, p: lambda b: Combination([(1.0 - b, q), (b, p)]))
    else:
        monkeypatch.setattr(Drawn, "corrections", lambda self, log_q: (log_q - self.log_q).exp())
    assert deviation() > 7.0


def test_the_path_leads_from_q_over_p_to_p_squared_by_q():
    flow, energy, x = Flow(Line()), Well(), torch.tensor([[0.3], [-1.0]], dtype=D)
    path = toward_least_variance(flow, energy)
    for beta, expected in ((0.0, flow(x)), (0.5, energy(x)), (1.0, 2.0 * energy(x) - flow(x))):
        torch.testing.assert_close(path(torch.tensor(beta, dtype=D))(x), expected)


GAUSSIAN = Gaussian(loc=torch.tensor([0.5, -1.0]), scale=torch.tensor([0.6, 1.3]))


def shifted(energy, by=3.0):
    return Energy.of(lambda x: energy(x) - by, tuple(energy.event_shape))


@pytest.mark.parametrize(
    "method",
    [
        FAB(rounds=30, batch=64, updates=4, warm=4, learning_rate=5e-3),
        ReverseKL(steps=80, batch=64, learning_rate=1e-2),
    ],
)
def test_log_z_of_a_gaussian_is_within_its_error(method):
    sampler = fit_flow(shifted(GAUSSIAN), spline(), method, rng=seeded(1))
    drawn = sampler.weighted(4000, seeded(2))
    found = drawn.log_z
    assert abs(float(found.value - 3.0) / float(found.stderr)) < Z_LIMIT
    assert float(found.ess) > 1500
    assert float(found.lower) < 3.0
    assert sampler.history[-1]["ess"] > sampler.history[0]["ess"]
    assert sampler.missed < 0.02
    assert (drawn.mean(drawn.x) - GAUSSIAN.loc).abs().max() < 0.15
    assert sampler.refined(64, HMC(0.3), steps=3, rng=seeded(3)).x.shape == (64, 2)


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    method = FAB(rounds=6, batch=16, updates=2, warm=2)
    before, calls = torch.get_rng_state(), []
    flows = [spline() for _ in range(2)]
    for flow in flows:
        fit_flow(shifted(GAUSSIAN), flow, method, rng=seeded(1), progress=calls.append)
    assert torch.equal(before, torch.get_rng_state())
    assert sum(calls) == 12
    assert all(torch.equal(a, b) for a, b in zip(flows[0].parameters(), flows[1].parameters()))


TWO = GaussianMixture(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), 0.5)


def test_a_collapsed_flow_is_reported():
    flow = spline(transforms=1)
    with pytest.warns(RuntimeWarning, match=r"The flow has collapsed: \d+% of the mass"):
        sampler = fit_flow(TWO, flow, ReverseKL(steps=60, batch=64, learning_rate=1e-2), rng=seeded(6))
    assert 0.2 < sampler.missed <= 1.0


def test_degenerate_weights_are_reported():
    narrow = Gaussian(loc=torch.tensor([3.0, 0.0]), scale=0.02)
    sampler = fit_flow(narrow, spline(), ReverseKL(steps=1, batch=8), rng=seeded(), probes=0)
    assert math.isnan(sampler.missed)
    with pytest.warns(RuntimeWarning, match="weights of the learned sampler are dominated by a few"):
        sampler.log_z(500, seeded(1))


def test_mass_is_missed_where_a_flow_does_not_reach():
    one = spline(scale=0.7)
    one.loc.copy_(torch.tensor([-4.0, 0.0]))
    wide = Gaussian(2, scale=4.0)
    assert missed_mass(TWO, one, wide, 512, seeded()) == pytest.approx(0.5, abs=0.15)
    near = GaussianMixture(TWO.locs, 0.6)
    assert missed_mass(TWO, near, wide, 512, seeded()) == 0.0


@pytest.mark.parametrize("method", [FAB(rounds=12, batch=64, updates=2, warm=2), ReverseKL(steps=30, batch=64)])
def test_points_without_a_finite_energy_are_left_out_and_told(method):
    inside = Energy.of(lambda x: torch.where(x[:, 0] > 0, Gaussian(2)(x), torch.inf), (2,))
    with pytest.warns(RuntimeWarning, match=r"At \d+ of \d+ points met in training"):
        sampler = fit_flow(inside, spline(), method, rng=seeded(1))
    assert sampler.nonfinite > 0
    found = sampler.log_z(4000, seeded(2))
    assert found.nonfinite > 0
    assert abs(float(found.value - math.log(0.5)) / float(found.stderr)) < Z_LIMIT
    nowhere = Energy.of(lambda x: torch.full_like(x[:, 0], torch.nan) + 0.0 * x[:, 0], (2,))
    with pytest.raises(DivergenceError, match="infinite or NaN at all 64 points of the flow"):
        fit_flow(nowhere, spline(), method, rng=seeded())


def test_what_does_not_fit_is_refused():
    method, rng = FAB(rounds=12, batch=8), seeded()
    with pytest.raises(DomainError, match="the energy lives on"):
        fit_flow(Bernoulli(logits=torch.zeros(2)), spline(), method, rng=rng)
    with pytest.raises(DomainError, match=r"unconstrain\(energy\)"):
        fit_flow(Energy.of(lambda x: x.sum(1), (2,), constraints.unit_interval), spline(), method, rng=rng)
    with pytest.raises(ShapeError, match=r"shape \(2,\), and the flow draws points of shape \(3,\)"):
        fit_flow(GAUSSIAN, spline(3), method, rng=rng)
    with pytest.raises(ShapeError, match=r"cannot take the flow's points of shape \(n, 3\)"):
        fit_flow(lambda x: (x @ torch.ones(2, 1)).squeeze(1), spline(3), method, rng=rng)
    with pytest.raises(ShapeError, match=r"it returned \(64, 2\)"):
        fit_flow(lambda x: x.square(), spline(), method, rng=rng)
    with pytest.raises(OptionError, match=r"conditional; fix its context before training: energy.given\(t=...\)"):
        fit_flow(Energy.of(lambda x, t: x.sum(1), (2,), context=("t",)), spline(), method, rng=rng)
    with pytest.raises(ArgumentTypeError, match="is tractable, but nothing in it learns"):
        fit_flow(GAUSSIAN, Gaussian(2), method, rng=rng)
    with pytest.raises(ArgumentTypeError, match="has no tractable density"):
        fit_flow(GAUSSIAN, Well(), method, rng=rng)
    with pytest.raises(ArgumentTypeError, match=r"The method is FAB\(...\) or ReverseKL\(...\)"):
        fit_flow(GAUSSIAN, spline(), FAB, rng=rng)
    with pytest.raises(ArgumentTypeError, match="The energy is a function or module"):
        fit_flow(3.0, spline(), method, rng=rng)
    with pytest.raises(OptionError, match="probes an even number from 0; got 1 and 3"):
        fit_flow(GAUSSIAN, spline(), method, rng=rng, record_every=1, probes=3)
    with pytest.raises(OptionError, match="unadjusted"):
        fit_flow(GAUSSIAN, spline(), FAB(rounds=12, kernel=ULA(0.1)), rng=rng)
    still = spline()
    for p in still.parameters():
        p.requires_grad_(False)
    with pytest.raises(OptionError, match="nothing to train"):
        fit_flow(GAUSSIAN, still, ReverseKL(steps=1), rng=rng)
    with pytest.raises(OptionError, match="2 or more draws"):
        fit_flow(GAUSSIAN, spline(), ReverseKL(steps=1), rng=rng, probes=0).weighted(1, rng)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rounds": 0}, "rounds is a whole number from 1; got 0"),
        ({"batch": 1}, "batch is a whole number from 2; got 1"),
        ({"temperatures": 1}, "temperatures is a whole number from 2; got 1"),
        ({"learning_rate": -1.0}, "learning_rate is a positive number; got -1.0"),
        ({"correction": 0.0}, "correction is a positive number; got 0.0"),
        ({"rounds": 5, "warm": 5}, "warm=5 of rounds=5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(OptionError, match=match):
        FAB(**settings)
