"""Exact likelihood: its value and gradient against closed forms and enumeration, and what it recovers."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

from enumeration import binary_system, one_hot_system
from gibbsian.energies.base import Energy
from gibbsian.energies.directional import VonMises
from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian, Uniform
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.partition.exact import quadrature
from gibbsian.training.fit import fit
from oracles import double_precision
from recovery import CASES, GAUSSIAN, QUARTIC, Quartic, assert_recovered, estimates, flat, minimise, seeded, slope


class Twin(Objective):
    """Exact likelihood with log Z turned round or counted half."""

    def __init__(self, factor):
        super().__init__()
        self.exact, self.factor = ExactLikelihood(), factor

    def forward(self, energy, batch, rng):
        mean = energy(batch.x).mean()
        return Loss(mean + self.factor * (self.exact(energy, batch, rng).value - mean))


class Pairs(Energy):
    """Bits with fields and pairs, one set of fields per class."""

    support = constraints.boolean
    context = ("y",)

    def __init__(self, d=4, classes=2, seed=0):
        super().__init__()
        self.event_shape = torch.Size((d,))
        self.fields = nn.Parameter(torch.randn(classes, d, generator=seeded(seed), dtype=torch.float64))
        self.pairs = nn.Parameter(torch.randn(d, d, generator=seeded(seed + 1), dtype=torch.float64))

    def forward(self, x, y):
        return (x * self.fields[y]).sum(1) + 0.5 * ((x @ self.pairs) * x).sum(1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_recovery(case):
    assert_recovered(estimates(ExactLikelihood, case, 4000), case.truth, 0.4)


def test_the_error_falls_as_the_square_root_of_the_rows():
    found = slope(lambda n: estimates(ExactLikelihood, QUARTIC, n, replicates=16), QUARTIC.truth)
    assert found == pytest.approx(-0.5, abs=0.2)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_log_z_counted_wrongly_is_caught(factor):
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(estimates(lambda: Twin(factor), QUARTIC, 4000), QUARTIC.truth, 2.0)


def test_a_flipped_sign_is_caught():
    energy = QUARTIC.at_truth()
    x = Batch(QUARTIC.rows(1000, seeded()))
    right, wrong = (
        torch.autograd.grad(o(energy, x, seeded()).value, energy.tilt) for o in (ExactLikelihood(), Twin(-1.0))
    )
    assert float(right[0].abs()) < 0.2 < float(wrong[0].abs())


def test_the_estimate_of_a_gaussian_is_the_samples_own():
    """At the sample's mean and covariance the gradient vanishes."""
    data, energy = GAUSSIAN.rows(500, seeded(4)), GAUSSIAN.model()
    factor = torch.linalg.cholesky(torch.linalg.inv(data.T.cov(correction=0))).T
    with torch.no_grad():
        energy.mean.copy_(data.mean(0))
        energy.log_diagonal.copy_(factor.diagonal().log())
        energy.below.copy_(factor[0, 1])
    grad = torch.autograd.grad(ExactLikelihood()(energy, Batch(data), seeded()).value, list(energy.parameters()))
    assert float(torch.cat(grad).abs().max()) < 1e-10


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_log_z_is_the_known_one(case):
    x = case.rows(2000, seeded())
    loss = ExactLikelihood(points=400)(case.at_truth(), Batch(x), seeded())
    assert float(loss.metrics["log_z"]) == pytest.approx(case.log_z, abs=1e-7)
    assert float(loss.metrics["quadrature_error"]) < 1e-6
    assert float(loss.metrics["edge_mass"]) < 1e-7
    assert float(loss.metrics["nll"]) == pytest.approx(float(case.at_truth()(x).mean().detach()) + case.log_z, abs=1e-7)


@pytest.mark.parametrize("make", [binary_system, one_hot_system, lambda: binary_system((2, 3))])
def test_states_are_listed_whole(make):
    system = make()
    rows = system.states[torch.multinomial(system.law, 64, replacement=True, generator=seeded())]
    loss = ExactLikelihood()(system.energy, Batch(rows), seeded())
    expected = torch.logsumexp(-system.energy(system.states), 0)
    assert float(loss.metrics["log_z"]) == pytest.approx(float(expected), abs=1e-12)
    assert loss.metrics.keys() == {"log_z", "nll", "energy_data"}


def bits(n=50, seed=2):
    x = torch.bernoulli(torch.full((n, 4), 0.4, dtype=torch.float64), generator=seeded(seed))
    return Batch(x, {"y": (torch.rand(n, generator=seeded(seed)) < 0.3).long()})


def expected_gradient(energy, batch, labels):
    """Mean gradient of the data's energies minus that under the law of each row's class, by hand."""
    states = binary_system((4,)).states
    total = energy(batch.x, y=batch.context["y"]).sum()
    for y in labels:
        value = energy(states, y=y.expand(len(states)))
        total = total - ((-value).softmax(0).detach() * value).sum()
    return torch.autograd.grad(total / len(batch.x), list(energy.parameters()))


def test_the_gradient_is_that_of_each_class():
    energy, batch = Pairs(), bits()
    got = torch.autograd.grad(ExactLikelihood()(energy, batch, seeded()).value, list(energy.parameters()))
    torch.testing.assert_close(got, expected_gradient(energy, batch, batch.context["y"]), rtol=1e-10, atol=1e-12)
    one_class = expected_gradient(energy, batch, torch.zeros(50, dtype=torch.int64))
    assert not torch.allclose(got[0], one_class[0], atol=1e-2)


def test_conditions_on_a_grid():
    energy = MLP(1, (8,), classes=3).double() + Gaussian(loc=torch.zeros(1, dtype=torch.float64))
    y = torch.tensor([0, 2, 2, 1, 0])
    batch = Batch(torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None], {"y": y, "unused": torch.arange(5)})
    found = ExactLikelihood(-12.0, 12.0)(energy, batch, seeded()).metrics["log_z"]
    each = torch.stack([quadrature(energy.given(y=k), -12.0, 12.0).log_z.value for k in range(3)])
    assert float(found) == pytest.approx(float(each[y].mean()), abs=1e-9)


def test_two_parameters_in_one_newton_step_of_an_exponential_family():
    """The likelihood's Hessian is the covariance of the statistics: autograd's second derivative agrees."""
    energy, batch = QUARTIC.at_truth(), Batch(QUARTIC.rows(200, seeded()))
    value = ExactLikelihood(-6.0, 6.0, points=400)(energy, batch, seeded()).value
    first = torch.autograd.grad(value, (energy.tilt, energy.square), create_graph=True)
    hessian = torch.stack(
        [torch.cat(torch.autograd.grad(g, (energy.tilt, energy.square), retain_graph=True)) for g in first]
    )
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    p = (-energy(x[:, None])).softmax(0).detach()
    statistics = torch.stack((x, x.square()))
    mean = (statistics * p).sum(1, keepdim=True)
    torch.testing.assert_close(hessian, ((statistics - mean) * p) @ (statistics - mean).T, rtol=1e-6, atol=1e-8)


def test_boxes_and_tori_are_integrated_whole():
    with double_precision():
        disc, box = VonMises([0.3], concentration=2.0), Uniform(1, low=-1.0, high=3.0)
    x = disc.sample(100, seeded())
    found = ExactLikelihood()(disc, Batch(x), seeded()).metrics
    assert float(found["log_z"]) == pytest.approx(0.0, abs=1e-9)
    assert "edge_mass" not in found
    inside = Energy.of(lambda x: box(x.clamp(-1.0, 3.0)), (1,), constraints.interval(-1.0, 3.0))
    found = ExactLikelihood()(inside, Batch(box.sample(20, seeded())), seeded()).metrics
    assert float(found["log_z"]) == pytest.approx(0.0, abs=1e-9)


def test_mass_that_is_cut_off_is_told():
    x = QUARTIC.rows(200, seeded())
    flat_energy = Energy.of(lambda x: 0.0 * x.sum(1), (1,))
    assert float(ExactLikelihood()(flat_energy, Batch(x), seeded()).metrics["edge_mass"]) == pytest.approx(
        0.02, abs=0.005
    )
    assert float(ExactLikelihood(points=4)(QUARTIC.at_truth(), Batch(x), seeded()).metrics["quadrature_error"]) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_repetition(dtype):
    energy = Quartic().to(dtype)
    batch = Batch(QUARTIC.rows(50, seeded()).to(dtype))
    first, second = (ExactLikelihood()(energy, batch, seeded()).value for _ in range(2))
    assert first.dtype == dtype
    assert torch.equal(first, second)


def test_a_fit_reaches_the_optimum_and_reports():
    data = QUARTIC.rows(400, seeded())
    energy, best = Quartic(), Quartic()
    minimise(ExactLikelihood(-6.0, 6.0), best, data)
    run = fit(
        energy,
        data,
        ExactLikelihood(-6.0, 6.0),
        rng=seeded(),
        steps=1500,
        batch_size=400,
        learning_rate=0.05,
        ema_decay=0.9,
    )
    torch.testing.assert_close(flat(energy), flat(best), atol=1e-3, rtol=0)
    assert {"log_z", "nll", "edge_mass", "quadrature_error"} <= run.history[-1].keys()
    assert run.history[-1]["nll"] == pytest.approx(run.history[-1]["loss"])


def test_the_box_is_part_of_the_state():
    saved = ExactLikelihood(-2.0, torch.tensor([1.0, 3.0]))
    other = ExactLikelihood(0.0, torch.tensor([1.0, 1.0]))
    other.load_state_dict(saved.state_dict())
    assert other.high.tolist() == [1.0, 3.0]
    assert "high=[1.0, 3.0]" in repr(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "two corners"),
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"low": math.nan, "high": 1.0}, "low < high"),
        ({"margin": 0.0}, "margin"),
        ({"points": 5}, "even"),
        ({"points": 2}, "even"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        ExactLikelihood(**options)


def test_models_that_are_too_large():
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        ExactLikelihood()(Gaussian(3), Batch(torch.zeros(4, 3)), seeded())
    many = Energy.of(lambda x: x.sum(1), (30,), constraints.boolean)
    with pytest.raises(OptionError, match=r"1\.07e\+09 states"):
        ExactLikelihood()(many, Batch(torch.zeros(4, 30)), seeded())
    grid = Energy.of(lambda x, t: x.sum(1) * t, (2,), context=("t",))
    each = Batch(torch.rand(200, 2, generator=seeded()), {"t": torch.arange(200.0)})
    with pytest.raises(OptionError, match="different conditions"):
        ExactLikelihood()(grid, each, seeded())
    with pytest.raises(OptionError, match="conditioned on y"):
        ExactLikelihood()(Pairs(), Batch(bits().x), seeded())


def test_domains_without_a_grid():
    from gibbsian.energies.domains import Sphere

    ball = Energy.of(lambda x: x.sum(1), (2,), Sphere())
    with pytest.raises(DomainError, match="Sphere"):
        ExactLikelihood()(ball, Batch(torch.eye(2)), seeded())
    counts = Energy.of(lambda x: x.sum(1), (2,), constraints.nonnegative_integer)
    with pytest.raises(DomainError, match="cannot be listed"):
        ExactLikelihood()(counts, Batch(torch.eye(2)), seeded())
