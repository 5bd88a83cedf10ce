"""Flows trained on energies alone: bounds, gradients that stick, chains that come back as points; flows end to end."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.bridges.transport import _reverse_divergence, fit_transport, sample_transported
from gibbsian.energies.base import Energy
from gibbsian.energies.flows import inverse_autoregressive_flow, spline_flow
from gibbsian.energies.neural import MLP
from gibbsian.energies.targets import Funnel
from gibbsian.energies.tilted import tilted
from gibbsian.energies.toys import TwoMoons
from gibbsian.energies.transport import neural_transport
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.objectives.flow_contrastive import FlowContrastiveEstimation
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.partition.annealed import ais
from gibbsian.partition.bracket import bracket
from gibbsian.partition.exact import quadrature
from gibbsian.partition.importance import importance_sampling
from gibbsian.partition.smc import smc
from gibbsian.training.fit import fit

pytest.importorskip("zuko")

D = torch.float64
MEAN, SCALE = torch.tensor([1.0, -2.0], dtype=D), torch.tensor([0.5, 2.0], dtype=D)
TARGET = Energy.of(lambda x: 0.5 * ((x - MEAN) / SCALE).square().sum(1), (2,))
LOG_Z = math.log(2 * math.pi)


def affine(seed=0):
    """A flow that can be the target exactly."""
    torch.manual_seed(seed)
    return inverse_autoregressive_flow(2, transforms=1, hidden=(4,)).double()


def at_the_target():
    flow = affine()
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()
    flow.loc.copy_(MEAN)
    flow.scale.copy_(SCALE)
    return flow


def gradient(flow, n, seed, sticking):
    loss = _reverse_divergence(TARGET, flow, n, seeded(seed), sticking)
    found = torch.autograd.grad(loss, [p for p in flow.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_the_gradient_vanishes_where_the_flow_is_the_target():
    flow = at_the_target()
    assert float(gradient(flow, 50, 0, True).abs().max()) < 1e-12
    # The other gradient does so on average only.
    assert float(gradient(flow, 50, 0, False).abs().max()) > 0.01


def test_both_gradients_have_one_mean():
    flow = affine(1)
    pairs = torch.stack([gradient(flow, 400, s, True) - gradient(flow, 400, s, False) for s in range(40)])
    z = pairs.mean(0) / (pairs.std(0) / math.sqrt(40) + 1e-12)
    assert float(z.abs().max()) < 6.0
    with_points_alone = torch.stack([gradient(flow, 400, s, True) for s in range(40)]).mean(0)
    # The broken twin, a gradient by which log q does not move at all, is another one.
    twin = []
    for s in range(40):
        x, _ = flow.rsample_and_log_prob(400, seeded(s))
        found = torch.autograd.grad(TARGET(x).mean(), list(flow.parameters()), allow_unused=True)
        twin.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert float((torch.stack(twin).mean(0) - with_points_alone).abs().max()) > 0.1


def test_a_flow_finds_a_gaussian_and_its_log_z():
    flow = affine(2)
    made = fit_transport(TARGET, flow, rng=seeded(), steps=300, batch_size=64, learning_rate=3e-2)
    assert made.flow is flow
    assert made.gradients == 300 * 64
    assert made.elbo.value <= LOG_Z + 6 * made.elbo.stderr + 1e-9
    assert made.elbo.value == pytest.approx(LOG_Z, abs=0.01)
    assert [record["step"] for record in made.history] == [50, 100, 150, 200, 250, 300]
    x = flow.sample(20_000, seeded(1))
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.1)
    torch.testing.assert_close(x.std(0), SCALE, rtol=0, atol=0.1)
    assert "gradients of the energy" in repr(made)
    again = affine(2)
    same = fit_transport(TARGET, again, rng=seeded(), steps=300, batch_size=64, learning_rate=3e-2)
    assert same.elbo.value == made.elbo.value


def test_chains_come_back_as_points():
    moved = neural_transport(Funnel(3, scale=1.0).double(), affine_of(3))
    u = moved.start(64, seeded())
    tuned = gb.tune(moved, gb.HMC(0.3, leapfrog=4), u, rng=seeded(1), steps=40)
    made = sample_transported(moved, tuned.kernel, tuned.state, steps=60, rng=seeded(2), warmup=10, thin=5)
    raw = gb.sample(moved, tuned.kernel, tuned.state, steps=60, rng=seeded(2), warmup=10, thin=5)
    assert torch.equal(made.x, moved.forward_points(raw.x))
    assert torch.equal(made.draws, moved.forward_points(raw.draws))
    assert made.draws.shape == (10, 64, 3)
    value, grad = gb.evaluate(moved.energy, made.x)
    assert torch.equal(made.state.energy, value)
    assert torch.equal(made.state.grad, grad)
    assert torch.equal(made.acceptance, raw.acceptance)
    assert made.summary().chains == 64
    # The state goes on as any of the energy's own.
    gb.sample(moved.energy, gb.MALA(0.01), made.state, steps=2, rng=seeded(3))
    assert sample_transported(moved, tuned.kernel, u, steps=2, rng=seeded(4)).draws is None


def affine_of(dim):
    torch.manual_seed(0)
    return inverse_autoregressive_flow(dim, transforms=1, hidden=(8,)).double()


@pytest.mark.slow
def test_a_tilted_model_has_one_log_z_in_both_spaces():
    torch.manual_seed(0)
    flow = spline_flow(2, transforms=1, hidden=(8,), passes=2).double()
    model = tilted(flow, MLP(2, hidden=(8,)).double(), 2.0, from_zero=False)
    with torch.no_grad():
        for p in model.net.parameters():
            p.mul_(3.0)
    truth = float(quadrature(model, -8.0, 8.0, 300).log_z.value)
    moved = neural_transport(model)
    assert float(quadrature(moved, -8.0, 8.0, 300).log_z.value) == pytest.approx(truth, abs=2e-3)
    draws = model.sample(200, seeded())
    for found in (
        ais(model, model.base, rng=seeded(1), chains=200, temperatures=5),
        ais(moved, gb.Gaussian(2).double(), rng=seeded(2), chains=200, temperatures=5),
        bracket(model, model.base, draws, rng=seeded(3), temperatures=5),
        smc(model, model.base, rng=seeded(4), chains=256).log_z,
        importance_sampling(model, model.base, rng=seeded(4), draws=400),
    ):
        assert abs(float(found.value) - truth) < 6 * float(found.stderr) + 2e-3
        assert float(found.lower) < truth < float(found.upper)


def test_chains_of_training_start_at_a_flow():
    torch.manual_seed(0)
    flow = spline_flow(2, transforms=1, hidden=(8,), passes=2)
    energy = MLP(2, hidden=(8,)) + flow
    objective = gb.PCD(gb.MALA(0.01), copy.deepcopy(flow), 2, buffer_size=64)
    x = torch.randn((64, 2), generator=seeded())
    fit(energy, x, objective, rng=seeded(), steps=3, batch_size=16)
    assert objective.buffer.positions.shape == (64, 2)


MOONS = TwoMoons()


@pytest.mark.slow
def test_flow_contrastive_estimation_end_to_end():
    """Likelihood of held-out moons between bounds, above that of the flow by likelihood, by more than the bracket."""
    data, held = MOONS.sample(2000, seeded(0)), MOONS.sample(4000, seeded(1))
    torch.manual_seed(0)
    flow = spline_flow(2, transforms=1, hidden=(16,), passes=2).calibrate(data)
    fit(flow, data, MaximumLikelihood(), rng=seeded(2), steps=300, learning_rate=1e-2)
    alone = float(flow.log_prob(held).mean().detach())
    # The energy starts at the flow, which then goes on learning as its adversary.
    energy = tilted(flow, MLP(2, hidden=(64, 64), frequencies=2))
    objective = FlowContrastiveEstimation(copy.deepcopy(flow), lead=0.52)
    run = fit(energy, data, objective, rng=seeded(3), steps=700, batch_size=256, learning_rate=1e-2)
    assert run.events == []
    learned = objective.flow
    moved = neural_transport(energy, learned)
    chains = gb.tune(moved, gb.HMC(0.3, leapfrog=5), moved.start(400, seeded(4)), rng=seeded(5), steps=100)
    draws = sample_transported(moved, chains.kernel, chains.state, steps=100, rng=seeded(6)).x
    found = bracket(energy, learned, draws, rng=seeded(7), chains=400, temperatures=20)
    truth = float(quadrature(energy, -9.0, 10.0, 400).log_z.value)
    assert float(found.lower) < truth < float(found.upper)
    mean = -float(energy(held).mean().detach())
    assert mean - float(found.upper) > alone + float(found.upper - found.lower)


FLOW = spline_flow(2, transforms=1, hidden=(8,))
REFUSED = {
    "no flow": (lambda: fit_transport(TARGET, gb.Gaussian(2), rng=seeded()), ArgumentTypeError, "Flow with parameters"),
    "nothing learns": (
        lambda: fit_transport(TARGET, copy.deepcopy(FLOW).requires_grad_(False), rng=seeded()),
        ArgumentTypeError,
        "Flow with parameters",
    ),
    "another shape": (lambda: fit_transport(Funnel(3), FLOW, rng=seeded()), ShapeError, r"\(3,\) and the flow over"),
    "bits": (
        lambda: fit_transport(gb.Bernoulli(torch.zeros(2)), FLOW, rng=seeded()),
        DomainError,
        "over the reals alone",
    ),
    "open context": (lambda: fit_transport(MLP(2, classes=2), FLOW, rng=seeded()), OptionError, "open context"),
    "no steps": (lambda: fit_transport(TARGET, FLOW, rng=seeded(), steps=0), OptionError, "steps is a whole number"),
    "no rate": (
        lambda: fit_transport(TARGET, FLOW, rng=seeded(), learning_rate=0.0),
        OptionError,
        "learning_rate is a positive",
    ),
    "not transported": (
        lambda: sample_transported(TARGET, gb.MALA(0.1), torch.zeros(2, 2), steps=1, rng=seeded()),
        ArgumentTypeError,
        "neural_transport",
    ),
    "not finite": (
        lambda: fit_transport(lambda x: x.sum(1).log(), copy.deepcopy(FLOW), rng=seeded(), steps=3, log_every=3),
        DivergenceError,
        "not finite at step 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_a_flow_that_diverges_keeps_its_weights():
    flow = copy.deepcopy(FLOW)
    before = [p.clone() for p in flow.parameters()]
    with pytest.raises(DivergenceError):
        fit_transport(lambda x: x.sum(1) * math.nan, flow, rng=seeded(), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters()))
