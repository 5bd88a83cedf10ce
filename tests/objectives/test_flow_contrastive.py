"""Flow contrastive estimation: the game's gradients are the exact ones, and energy and flow both approach the data."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from gibbsian import MLP, TwoMoons, fit
from gibbsian.energies.base import Energy
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import flow_contrastive
from gibbsian.objectives.base import Batch
from gibbsian.objectives.flow_contrastive import FlowContrastiveEstimation
from gibbsian.partition.exact import quadrature
from recovery import GAUSSIAN, LAPLACES, QUARTIC, REPLICATES, assert_recovered, descend, estimates, seeded, slope

pytest.importorskip("zuko")

D = torch.float64
NODES = torch.linspace(-12.0, 12.0, 4001, dtype=D)[:, None]
STEP = float(NODES[1] - NODES[0])


class Line(nn.Module):
    """A Gaussian as a flow on the line: mean and log width."""

    def __init__(self, loc=0.3, log_scale=0.2) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([loc, log_scale], dtype=D))

    def forward(self):
        return torch.distributions.Independent(
            torch.distributions.Normal(self.theta[:1], self.theta[1:].exp(), validate_args=False), 1
        )


class Normal(Energy):
    event_shape = torch.Size([1])

    def __init__(self, m=0.6, log_s=-0.1) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([m, log_s], dtype=D))

    def forward(self, x):
        return 0.5 * ((x[:, 0] - self.theta[0]) / self.theta[1].exp()).square()


def rows(n, rng):
    return 0.8 + 0.6 * torch.randn((n, 1), generator=rng, dtype=D)


def exact(energy, flow, c, ratio):
    """The loss by quadrature: a function of the energy's and of the flow's parameters."""
    p = (-Gaussian(loc=torch.tensor([0.8], dtype=D), scale=0.6)(NODES)).exp()
    cost = flow(NODES)
    odds = cost - energy(NODES) - c - math.log(ratio)
    return STEP * (p * softplus(-odds) + ratio * (-cost).exp() * softplus(odds)).sum(), STEP * (p * cost).sum()


def check_game(options, ratio=2) -> None:
    """The energy gets the loss's gradient, the flow its opposite and that of its likelihood.

    The mean over 60 batches: a t statistic with 59 degrees of freedom exceeds 6.5 once in 5e7.
    """
    energy, objective = Normal(), FlowContrastiveEstimation(Flow(Line()), ratio, lead=0.0, log_z=0.4, **options)
    objective = objective.double()
    params = [energy.theta, objective.log_z, objective.flow.flow.theta]
    game, nll = exact(energy, objective.flow, objective.log_z, ratio)
    down = torch.autograd.grad(game, params, retain_graph=True)
    likelihood = torch.autograd.grad(nll, params[2])[0]
    weight, w = options.get("adversary", 1.0), options.get("likelihood", 0.0)
    expected = torch.cat((down[0], down[1].view(1), -weight * down[2] + w * likelihood))
    rng, found = seeded(1), []
    for seed in range(60):
        value = objective(energy, Batch(rows(500, seeded(100 + seed))), rng).value
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, params)]))
    g = torch.stack(found)
    error = g.std(0) / len(g) ** 0.5
    assert bool(((g.mean(0) - expected).abs() < 6.5 * error).all()), f"missed: {(g.mean(0) - expected) / error}"
    assert float((expected / error).abs().min()) > 10, "no power"


@pytest.mark.parametrize(
    "options", [{}, {"adversary": 0.5}, {"likelihood": 0.3}], ids=["game", "half", "with likelihood"]
)
def test_the_gradients_are_those_of_the_game(options):
    check_game(options)


def test_without_reversal_the_gradient_is_caught(monkeypatch):
    monkeypatch.setattr(flow_contrastive, "scaled_gradient", lambda value, factor: value)
    with pytest.raises(AssertionError, match="missed"):
        check_game({})


def test_a_density_that_forgets_the_flow_is_caught(monkeypatch):
    """The twin whose reversal reaches the draws and leaves out the log-densities."""
    real = flow_contrastive.scaled_gradient
    monkeypatch.setattr(
        flow_contrastive,
        "scaled_gradient",
        lambda value, factor: value.detach() if value.ndim == 1 else real(value, factor),
    )
    with pytest.raises(AssertionError, match="missed"):
        check_game({})


def test_the_loss_is_that_of_the_formula():
    energy, objective = Normal(), FlowContrastiveEstimation(Flow(Line()), 3, likelihood=0.5, log_z=0.2).double()
    x = rows(50, seeded(3))
    loss = objective(energy, Batch(x), seeded(4))
    y = objective.flow.sample(150, seeded(4))

    def posterior(points):
        model = (-energy(points) - 0.2).exp()
        return model / (model + 3 * (-objective.flow(points)).exp())

    nll = objective.flow(x).mean()
    expected = -posterior(x).log().mean() - 3 * (1 - posterior(y)).log().mean() + 0.5 * nll
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=1e-6)
    assert float(loss.metrics["flow_nll"]) == pytest.approx(float(nll.detach()))
    assert {"accuracy", "log_z", "energy_data", "energy_noise", "flow_nll"} == loss.metrics.keys()
    assert not any(m.requires_grad for m in loss.metrics.values())


@pytest.mark.parametrize("lead", [0.0, 0.99])
def test_the_flow_waits_for_the_energy_to_lead(lead):
    objective = FlowContrastiveEstimation(Flow(Line()), likelihood=0.5, lead=lead).double()
    energy = Normal()
    objective(energy, Batch(rows(100, seeded(1))), seeded(2)).value.backward()
    assert bool((objective.flow.flow.theta.grad != 0).all()) == (lead == 0.0)
    assert bool((energy.theta.grad != 0).all())


class Affine(nn.Module):
    """An affine map of a Gaussian as a flow, in d dimensions."""

    def __init__(self, d) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(d, dtype=D))
        self.log_scale = nn.Parameter(torch.full((d,), 0.4, dtype=D))

    def forward(self):
        normal = torch.distributions.Normal(self.loc, self.log_scale.exp(), validate_args=False)
        return torch.distributions.Independent(normal, 1)


CASES = [
    pytest.param(GAUSSIAN, id="gaussian"),
    pytest.param(LAPLACES, id="laplaces", marks=pytest.mark.slow),
    pytest.param(QUARTIC, id="quartic", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
def test_known_models_are_recovered_while_the_flow_moves(case):
    kept = []

    def make():
        kept.append(FlowContrastiveEstimation(Flow(Affine(case.rows(1, seeded()).shape[1])), 2))
        return kept[-1]

    found = estimates(make, case, 500, solve=lambda *a: descend(*a, steps=300, rate=0.15))
    assert_recovered(found, case.truth, 0.35)
    assert_recovered(torch.stack([o.log_z.detach().view(1) for o in kept]), (case.log_z,), 0.35)
    assert len(kept) == REPLICATES
    assert all(float(o.flow.flow.log_scale.max().detach()) < 0.35 for o in kept), "missed: the flow stayed"


@pytest.mark.slow
def test_the_error_falls_as_the_square_root_of_the_rows():
    def scatter(n):
        solve = lambda *a: descend(*a, steps=300, rate=0.15)  # noqa: E731
        return estimates(lambda: FlowContrastiveEstimation(Flow(Affine(2)), 2), GAUSSIAN, n, 12, solve)

    assert slope(scatter, GAUSSIAN.truth, (125, 500, 2000)) == pytest.approx(-0.5, abs=0.2)


MOONS = TwoMoons()


def moons_run(steps=350, **options):
    """Held-out divergences from the truth, of energy and flow, before and after a short run."""
    rng = seeded(0)
    data, held = MOONS.sample(2000, rng), MOONS.sample(4000, seeded(1))
    torch.manual_seed(0)
    energy = MLP(2, hidden=(64, 64), frequencies=2) + Gaussian(loc=data.mean(0), scale=1.5 * data.std(0))
    objective = FlowContrastiveEstimation(spline_flow(2, transforms=2, hidden=(32, 32)).calibrate(data), **options)

    @torch.no_grad()
    def divergences():
        log_z = float(quadrature(energy, -9.0, 10.0, 400).log_z.value)
        entropy = float(MOONS(held).mean())
        return float(energy(held).mean()) + log_z - entropy, float(objective.flow(held).mean()) - entropy

    before = divergences()
    run = fit(energy, data, objective, rng=rng, steps=steps, batch_size=256, learning_rate=5e-3)
    assert run.events == []
    return before, divergences()


def check_moons(outcome) -> None:
    """Both end at a fraction of the divergence at which they start, about one nat."""
    (energy, flow), (energy_after, flow_after) = outcome
    assert flow_after < 0.4 * flow, f"missed: flow {flow} to {flow_after}"
    assert energy_after < 0.3 * energy, f"missed: energy {energy} to {energy_after}"


def test_energy_and_flow_both_learn_the_moons():
    check_moons(moons_run(lead=0.52))


def test_without_reversal_the_flow_does_not_learn(monkeypatch):
    monkeypatch.setattr(flow_contrastive, "scaled_gradient", lambda value, factor: value)
    with pytest.raises(AssertionError, match="missed: flow"):
        check_moons(moons_run(150))


def small(objective=None):
    torch.manual_seed(0)
    energy = MLP(2, hidden=(8,)) + Gaussian(2, scale=2.0)
    return energy, objective or FlowContrastiveEstimation(spline_flow(2, transforms=1, hidden=(8,)))


def test_a_broken_off_run_goes_on_exactly(tmp_path):
    x = MOONS.sample(64, seeded(3))
    options = {"steps": 30, "batch_size": 16, "checkpoint_every": 10, "log_every": 5}

    def train(folder, **more):
        energy, objective = small()
        fit(energy, x, objective, rng=seeded(1), folder=tmp_path / folder, **options, **more)
        return energy, objective

    plain = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 20)])
    again = train("b", resume=True)
    for one, two in zip(plain, again):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name


def test_the_state_goes_round():
    energy, objective = small()
    other = FlowContrastiveEstimation(spline_flow(2, transforms=1, hidden=(8,)), log_z=1.5)
    other.load_state_dict(objective.state_dict())
    batch = Batch(torch.randn((4, 2), generator=seeded()))
    assert torch.equal(objective(energy, batch, seeded(1)).value, other(energy, batch, seeded(1)).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pictures_labels_and_one_row(dtype):
    seen = []

    def fn(x, y):
        seen.append((x, y))
        return 0.5 * x.flatten(1).square().sum(1) + y

    torch.manual_seed(0)
    objective = FlowContrastiveEstimation(spline_flow((1, 2, 2), transforms=1, hidden=(8,)), 2).to(dtype)
    x, y = torch.randn((1, 1, 2, 2), generator=seeded(), dtype=dtype), torch.ones(1, dtype=dtype)
    energy = Energy.of(fn, context=("y",))
    a, b, c = (objective(energy, Batch(x, {"y": y}), seeded(s)).value for s in (1, 1, 2))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    points, labels = seen[0]
    assert torch.equal(points[:1], x)
    assert points.shape == (3, 1, 2, 2)
    assert torch.equal(labels, y.repeat(3))


def test_what_does_not_fit_is_refused():
    flow = spline_flow(2, transforms=1, hidden=(8,))
    with pytest.raises(ArgumentTypeError, match="spline_flow"):
        FlowContrastiveEstimation(Gaussian(2))
    for options, message in (
        ({"ratio": 0}, "1 or more"),
        ({"adversary": -1.0}, "adversary is a weight"),
        ({"likelihood": math.inf}, "likelihood is a weight"),
        ({"adversary": 0.0}, "would not learn"),
        ({"lead": 1.0}, "share of right answers"),
        ({"log_z": math.nan}, "finite number of nats"),
    ):
        with pytest.raises(OptionError, match=message):
            FlowContrastiveEstimation(flow, **options)
    objective, x = FlowContrastiveEstimation(flow), torch.randn((8, 2), generator=seeded())
    with pytest.raises(OptionError, match="deepcopy"):
        objective(MLP(2) + flow, Batch(x), seeded())
    with pytest.raises(OptionError, match=r"flow\.calibrate"):
        objective(MLP(2), Batch(x + 1000.0), seeded())
    objective(MLP(2) + copy.deepcopy(flow), Batch(x), seeded())
    with pytest.raises(ShapeError, match="points of shape"):
        objective(MLP(3), Batch(torch.randn(4, 3)), seeded())
    with pytest.raises(ArgumentTypeError, match="floating-point"):
        objective(MLP(2), Batch(x.long()), seeded())
    with pytest.raises(DomainError, match="Bernoulli"):
        objective(Bernoulli(probs=torch.full((2,), 0.5)), Batch(x), seeded())
    with pytest.raises(OptionError, match="y"):
        objective(MLP(2, classes=2), Batch(x), seeded())
