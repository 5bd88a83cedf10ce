"""Tilted flows: they start as the flow, have a Z between bounds, exact draws, and learn what the flow cannot."""

from __future__ import annotations

import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.flows import Flow, inverse_autoregressive_flow, spline_flow
from gibbsian.energies.neural import MLP, ConvEnergy
from gibbsian.energies.tilted import Tilted, tilted
from gibbsian.energies.transport import neural_transport
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.partition.exact import quadrature
from gibbsian.partition.importance import importance_sampling
from gibbsian.training.fit import fit

pytest.importorskip("zuko")

D = torch.float64


def model_of(limit=1.5, seed=0, gain=4.0, **options):
    """A tilt of some nats over a flow that is all but the standard normal density."""
    torch.manual_seed(seed)
    flow = spline_flow(2, transforms=1, hidden=(8,), passes=2).double()
    model = tilted(flow, MLP(2, hidden=(16,)).double(), limit, from_zero=False, **options)
    with torch.no_grad():
        for p in model.net.parameters():
            p.mul_(gain)
    return model


def shares(model, edges):
    """Probabilities of square cells by quadrature."""
    grid = quadrature(model, -8.0, 8.0, 640)
    axis, p = grid.axes[0], grid.log_prob.exp() * (16.0 / 640) ** 2
    which = torch.bucketize(axis, edges) - 1
    cells = torch.zeros((len(edges) - 1, len(edges) - 1), dtype=D)
    inside = (which >= 0) & (which < len(edges) - 1)
    rows, columns = torch.meshgrid(which[inside], which[inside], indexing="ij")
    return cells.index_put((rows, columns), p[inside][:, inside], accumulate=True), float(grid.log_z.value)


def check_draws(model, x) -> None:
    """Counts in 36 cells, within six standard deviations and what the grid is off: a false alarm in 1e7."""
    edges = torch.linspace(-3.0, 3.0, 7, dtype=D)
    expected, _ = shares(model, edges)
    n = len(x)
    counts = torch.histogramdd(x, [edges, edges]).hist
    spread = (n * expected * (1 - expected)).sqrt() + 1.0 + 0.02 * n * expected
    worst = float(((counts - n * expected).abs() / spread).max())
    assert worst < 6.0, f"missed: {worst:.1f} deviations"


@pytest.mark.parametrize("limit", [0.01, 5.0, 800.0, None])
def test_it_starts_as_the_flow(limit):
    torch.manual_seed(0)
    flow = spline_flow(2, hidden=(16,)).double()
    model = tilted(flow, MLP(2, hidden=(16,)).double(), limit)
    x = 3.0 * torch.randn((50, 2), generator=seeded(), dtype=D)
    torch.testing.assert_close(model(x), flow(x), rtol=0, atol=1e-9)
    # And learns from the first step: of a network that gives 0, the last layer does.
    (model(x).sum()).backward()
    assert float(model.net.net[-1].weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in model.base.parameters())


def test_pictures_may_have_a_convolutional_correction():
    torch.manual_seed(0)
    flow = spline_flow((1, 4, 4), transforms=1, hidden=(8,), passes=2)
    model = tilted(flow, ConvEnergy((1, 4, 4), (4, 8)))
    x = torch.randn((3, 1, 4, 4), generator=seeded())
    torch.testing.assert_close(model(x), flow(x), rtol=0, atol=1e-5)


def test_the_tilt_is_bounded_below_and_its_log_z_between_bounds():
    for seed in range(3):
        model = model_of(2.0, seed, gain=3.0)
        x = 4.0 * torch.randn((2000, 2), generator=seeded(), dtype=D)
        t = model.tilt(x).detach()
        assert float(t.min()) > -2.0
        assert float(t.max()) > 0.5, "the network tilts too little to test"
        truth = float(quadrature(model, -8.0, 8.0, 400).log_z.value)
        draws = model.sample(2000, seeded(seed))
        found = importance_sampling(model, model.base, draws, rng=seeded(seed + 10), draws=4000)
        assert float(found.lower) < truth < float(found.upper) < 2.0
        assert abs(float(found.value) - truth) < 5 * float(found.stderr) + 1e-3
        assert float(found.upper - found.lower) < 0.3


def test_draws_by_rejection_are_exact():
    model = model_of()
    x = model.sample(8_000, seeded(1))
    assert x.shape == (8_000, 2)
    check_draws(model, x)
    # The broken twins: the flow's own draws, and a test that forgets the sign.
    with pytest.raises(AssertionError, match="missed"):
        check_draws(model, model.base.sample(8_000, seeded(1)))
    plain = model.base.sample(8_000, seeded(2))
    turned = torch.multinomial(model.tilt(plain).detach().softmax(0), 8_000, replacement=True, generator=seeded(3))
    with pytest.raises(AssertionError, match="missed"):
        check_draws(model, plain[turned])


MEANS = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
MODES = gb.GaussianMixture(MEANS, 0.6)


def divergence(model, held):
    log_z = float(quadrature(model, -12.0, 12.0, 300).log_z.value)
    return float(model(held).mean().detach()) + log_z - float(MODES(held).mean())


def untilted():
    """Two modes, and a flow that is one Gaussian of their moments."""
    data = MODES.sample(1500, seeded(0))
    torch.manual_seed(0)
    flow = inverse_autoregressive_flow(2, transforms=1, hidden=(4,))
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()
    flow.calibrate(data)
    return tilted(flow, MLP(2, hidden=(32, 32))), data, MODES.sample(4000, seeded(1))


def in_the_data(model, data):
    return fit(model, data, NoiseContrastiveEstimation(model.base), rng=seeded(2), steps=250, learning_rate=5e-3)


def in_the_noise(model, data):
    moved = neural_transport(model)
    kernel = gb.HMC(0.4, leapfrog=3)
    objective = gb.PCD(kernel, gb.Gaussian(2), 4, buffer_size=512)
    return fit(moved, moved.backward_points(data), objective, rng=seeded(2), steps=250, learning_rate=5e-3)


@pytest.mark.parametrize("train", [in_the_data, pytest.param(in_the_noise, marks=pytest.mark.slow)])
def test_the_tilt_learns_what_the_flow_cannot(train):
    model, data, held = untilted()
    before, kept = divergence(model, held), [p.clone() for p in model.base.parameters()]
    assert before > 0.3
    run = train(model, data)
    assert run.events == []
    after = divergence(model, held)
    assert after < 0.25 * before, f"{before} to {after}"
    assert all(torch.equal(a, b) for a, b in zip(kept, model.base.parameters()))


def test_context_reaches_the_network():
    torch.manual_seed(0)
    flow = spline_flow(2, transforms=1, hidden=(8,), passes=2)
    model = tilted(flow, MLP(2, hidden=(8,), classes=3), from_zero=False)
    assert model.context == ("y",)
    x = model.sample(20, seeded(), y=torch.tensor(1))
    assert model(x, y=torch.ones(20, dtype=torch.int64)).shape == (20,)


def hopeless():
    model = model_of(5.0)
    with torch.no_grad():
        model.net.net[-1].bias.fill_(40.0)
    return model.sample(2, seeded())


FLOW = spline_flow(2, transforms=1, hidden=(8,), passes=2)
REFUSED = {
    "no flow": (lambda: tilted(gb.Gaussian(2), MLP(2)), ArgumentTypeError, "built on a Flow"),
    "a limit below zero": (lambda: tilted(FLOW, MLP(2), -1.0), OptionError, "positive number of nats"),
    "no number": (lambda: tilted(FLOW, MLP(2), math.nan), OptionError, "positive number of nats"),
    "another shape": (lambda: tilted(FLOW, MLP(3)), ShapeError, r"\(3,\) and the flow over \(2,\)"),
    "bits": (lambda: tilted(FLOW, gb.Bernoulli(torch.zeros(2))), DomainError, "over the reals alone"),
    "spectral norm": (lambda: tilted(FLOW, MLP(2, spectral_norm=True)), OptionError, "from_zero=False"),
    "no layer": (lambda: tilted(FLOW, lambda x: x.sum(1)), OptionError, "from_zero=False"),
    "no bound, no draws": (lambda: model_of(None).sample(2, seeded()), OptionError, "bounded tilt"),
    "nothing accepted": (hopeless, DivergenceError, "Run chains instead"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_a_refused_network_is_left_as_it_was():
    torch.manual_seed(0)
    net = MLP(2, hidden=(8,))
    before = net.net[-1].weight.clone()
    with pytest.raises(OptionError, match="does not become zero"):
        tilted(FLOW, net + gb.Gaussian(2))
    assert torch.equal(before, net.net[-1].weight)
    assert isinstance(tilted(FLOW, net), Tilted)
    assert isinstance(tilted(FLOW, net).base, Flow)
