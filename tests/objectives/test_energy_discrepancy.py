"""Energy discrepancy: stabilised it is consistent at every M, and limits and bias are where theory has them."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import gibbsian as gb
from enumeration import binary_system, one_hot_system
from gibbsian import Energy
from gibbsian.energies.neural import MLP
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import energy_discrepancy
from gibbsian.objectives.base import Batch
from gibbsian.objectives.energy_discrepancy import EnergyDiscrepancy, diffused, log_mean
from recovery import CASES, QUARTIC, assert_recovered, estimates, seeded, slope

SPREAD = 0.7


class Bell(Energy):
    """N(0, 1 / precision), without its constant."""

    def __init__(self, precision=1.0) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.precision * x.flatten(1).square().sum(1)


def bell_rows(n, seed):
    return SPREAD * torch.randn((n, 1), generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_parameters_are_recovered_with_few_negatives(case):
    found = estimates(lambda: EnergyDiscrepancy(1.0, negatives=4), case, 2000)
    assert_recovered(found, case.truth, 0.35)


def test_one_negative_is_enough_to_be_right():
    assert_recovered(estimates(lambda: EnergyDiscrepancy(1.0, negatives=1), QUARTIC, 2000), QUARTIC.truth, 0.5)


def test_the_error_falls_with_the_square_root_of_the_rows():
    def scatter(n):
        return estimates(lambda: EnergyDiscrepancy(1.0, negatives=4), QUARTIC, n, replicates=16)

    assert slope(scatter, QUARTIC.truth) == pytest.approx(-0.5, abs=0.2)


# Of N(0, 1 / precision) and data of variance v everything is known: with y = x + sqrt(t) xi,
# log E exp(-E(x')) = -log(1 + precision t) / 2 - precision y^2 / (2 (1 + precision t)).


def exact_slope(precision, t, v=SPREAD**2):
    """Derivative of the discrepancy in the precision."""
    wide = 1 + precision * t
    return 0.5 * v - 0.5 * t / wide - 0.5 * (v + t) / wide**2


def slopes(objective, precision, rows=2000, repeats=30):
    """Gradients in the precision, and the variance of the data of each."""
    energy, rng, found, variances = Bell(precision), seeded(5), [], []
    for seed in range(repeats):
        x = bell_rows(rows, 100 + seed)
        loss = objective(energy, Batch(x), rng).value
        found.append(float(torch.autograd.grad(loss, energy.precision)[0]))
        variances.append(float(x.square().mean()))
    return torch.tensor(found, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def gaps(t, precision, rows, negatives, want):
    """Mean of the gradient less what it is to be, and its standard error; given the data only noise is random."""
    found, variances = slopes(EnergyDiscrepancy(t, negatives, stabilisation=0.0), precision, rows)
    off = found - want(variances)
    return float(off.mean()), float(off.std()) / len(off) ** 0.5


def check_slope(t, precision, rows=1000, negatives=256, power=0.03) -> None:
    """The bias of order 1 / M is taken out by half as many negatives; 7 standard errors, below 1e-8 with 58 degrees."""
    few, few_error = gaps(t, precision, rows, negatives // 2, lambda v: exact_slope(precision, t, v))
    many, many_error = gaps(t, precision, rows, negatives, lambda v: exact_slope(precision, t, v))
    gap, error = 2 * many - few, math.hypot(2 * many_error, few_error)
    assert 7 * error < power, f"no power: {error}"
    assert abs(gap) < 7 * error, f"missed: off by {gap}, z = {gap / error}"


def test_the_gradient_is_the_closed_one():
    for precision in (1.0, 1 / SPREAD**2, 4.0):
        check_slope(0.5, precision)


def test_a_short_time_is_score_matching():
    """Divided by t, the loss is E[(1 - 1 / M) |E'|^2 / 2 - E''] and its gradient (1 - 1 / M) precision v - 1."""
    t, precision, m = 0.002, 4.0, 16
    matching = precision * SPREAD**2 - 1
    assert exact_slope(precision, t) / t == pytest.approx(matching, abs=0.02)
    gap, error = gaps(t, precision, 10_000, m, lambda v: t * ((1 - 1 / m) * precision * v - 1))
    assert 8 * error < 0.3 * t * matching, "no power"
    assert abs(gap) < 8 * error, f"off by {gap}, z = {gap / error}"


def test_a_long_time_is_maximum_likelihood():
    """The gradient of the negative log-likelihood is (v - 1 / precision) / 2."""
    t, precision = 300.0, 4.0
    assert exact_slope(precision, t) == pytest.approx(0.5 * (SPREAD**2 - 1 / precision), abs=1e-3)
    check_slope(t, precision, rows=200, negatives=4096, power=0.1)


def broken(monkeypatch, twin) -> None:
    real = energy_discrepancy.diffused
    if twin == "t for its root":
        monkeypatch.setattr(energy_discrepancy, "diffused", lambda x, s, t, rng: real(x, s, t * t, rng))
    elif twin == "one diffusion only":
        calls = iter(range(10**6))
        monkeypatch.setattr(
            energy_discrepancy, "diffused", lambda x, s, t, rng: x if next(calls) % 2 == 0 else real(x, s, t, rng)
        )
    elif twin == "sign":
        monkeypatch.setattr(energy_discrepancy, "log_mean", lambda logits, w: -log_mean(logits, w))
    elif twin == "stabilisation not over M":
        monkeypatch.setattr(energy_discrepancy, "log_mean", lambda logits, w: log_mean(logits, w * logits.shape[1]))
    elif twin == "no stabilisation":
        monkeypatch.setattr(energy_discrepancy, "log_mean", lambda logits, w: log_mean(logits, 0.0))
    elif twin == "data and negatives swapped":
        monkeypatch.setattr(energy_discrepancy, "log_mean", lambda logits, w: log_mean(-logits, w))


@pytest.mark.parametrize("twin", ["t for its root", "one diffusion only", "sign"])
def test_a_slip_moves_the_gradient(twin, monkeypatch):
    broken(monkeypatch, twin)
    with pytest.raises(AssertionError, match="missed"):
        check_slope(0.5, 1.0, power=1.0)


def check_vanishes(objective, rows=2000) -> None:
    """The gradient at the truth has mean zero."""
    found, _ = slopes(objective, 1 / SPREAD**2, rows)
    error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean())) < 8 * error, f"missed: {float(found.mean())}, z = {float(found.mean()) / error}"


def test_stabilised_the_gradient_vanishes_at_the_truth_for_every_number():
    for negatives in (1, 2, 16):
        check_vanishes(EnergyDiscrepancy(1.0, negatives))


@pytest.mark.parametrize("twin", ["stabilisation not over M", "no stabilisation"])
def test_a_slip_of_the_stabilisation_moves_the_gradient_at_the_truth(twin, monkeypatch):
    broken(monkeypatch, twin)
    with pytest.raises(AssertionError, match="missed"):
        check_vanishes(EnergyDiscrepancy(1.0, 4))


def test_without_stabilisation_the_bias_falls_as_one_over_their_number():
    """At the truth the gradient is nothing but bias; from 8 to 64 negatives it falls eightfold, within a third."""
    bias = {}
    for negatives, rows in ((8, 4000), (64, 8000)):
        found, _ = slopes(EnergyDiscrepancy(1.0, negatives, stabilisation=0.0), 1 / SPREAD**2, rows)
        bias[negatives] = float(found.mean())
        assert abs(bias[negatives]) > 8 * float(found.std()) / 30**0.5, "no power"
    assert bias[8] / bias[64] == pytest.approx(8.0, rel=0.34)


def test_the_loss_is_that_of_the_formula():
    x = bell_rows(50, 1)
    energy = Bell(2.0)
    rng = seeded(3)
    y = x + 0.5 * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    noise = torch.randn((150, 1), generator=rng, dtype=torch.float64)
    around = y.repeat_interleave(3, 0) + 0.5 * noise
    for w in (0.0, 1.0, 0.3):
        ratios = (energy(x)[:, None] - energy(around).view(50, 3)).exp().mean(1)
        want = float((w / 3 + ratios).log().mean().detach())
        loss = EnergyDiscrepancy(0.25, 3, w)(energy, Batch(x), seeded(3))
        assert float(loss.value.detach()) == pytest.approx(want, rel=1e-12)
        assert not any(m.requires_grad for m in loss.metrics.values())
        assert 1.0 <= float(loss.metrics["effective_negatives"]) <= 3.0


# Discrete states: heat kernels, and systems small enough to list.


class Scaled(Energy):
    """A listed system whose energy is multiplied by a parameter, with a field of its own."""

    def __init__(self, system) -> None:
        super().__init__()
        self.system, self.support, self.event_shape = system, system.energy.support, system.states.shape[1:]
        self.theta = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.field = nn.Parameter(torch.zeros(self.event_shape, dtype=torch.float64))

    def forward(self, x):
        return self.theta * self.system.energy(x) + (self.field * x).flatten(1).sum(1)


SYSTEMS = {"binary": binary_system(), "one-hot": one_hot_system()}


def check_discrete(system, objective, repeats=60, rows=1000) -> None:
    """The gradient at the truth is zero; a t statistic with 59 degrees of freedom exceeds 6.8 once in 1e8."""
    energy, rng, found = Scaled(system), seeded(7), []
    for _ in range(repeats):
        x = system.states[torch.multinomial(system.law, rows, replacement=True, generator=rng)]
        loss = objective(energy, Batch(x), rng).value
        grads = torch.autograd.grad(loss, [energy.theta, energy.field])
        found.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(found)
    error = g.std(0) / repeats**0.5
    assert float(error.max()) < 0.01, "no power"
    z = g.mean(0) / error
    assert float(z.abs().max()) < 6.8, f"missed: z = {z.tolist()}"


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("t", [0.2, 2.0])
def test_on_listed_systems_the_gradient_vanishes_at_the_truth(name, t):
    check_discrete(SYSTEMS[name], EnergyDiscrepancy(t, 4))


@pytest.mark.parametrize("twin", ["stabilisation not over M", "no stabilisation", "data and negatives swapped"])
def test_on_listed_systems_slips_are_seen(twin, monkeypatch):
    broken(monkeypatch, twin)
    with pytest.raises(AssertionError, match="missed"):
        check_discrete(SYSTEMS["binary"], EnergyDiscrepancy(2.0, 4))


def heat_kernel(system, t):
    """Transition matrix by the exponential of its generator: every site is drawn anew at rate 1."""
    x, classes = system.by_site(), system.states.shape[-1] if system.hot else 2
    apart = (x.unsqueeze(1) != x.unsqueeze(0)).any(3).sum(2)
    rates = torch.where(apart == 1, 1.0 / classes, 0.0).double()
    return torch.matrix_exp(t * (rates - rates.sum(1).diag()))


@pytest.mark.parametrize("name", SYSTEMS)
def test_discrete_diffusion_is_the_heat_equations(name):
    """Counts from every state; chi-square below 1e-8 is a false alarm once in 1e8 for each of the rows."""
    from enumeration import counts_of, fit_p_value

    system, t = SYSTEMS[name], 0.4
    matrix, rng = heat_kernel(system, t), seeded(2)
    for state, law in zip(system.states[:8], matrix):
        out = diffused(state.unsqueeze(0).repeat_interleave(4000, 0), system.energy.support, t, rng)
        assert bool(system.energy.support.check(out).all())
        assert fit_p_value(counts_of(system, out), law) > 1e-8


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_discrepancy_itself_is_that_of_the_sums_over_states(name):
    """With 512 negatives and no stabilisation its value is the exact one, within 8 standard errors."""
    system, t = SYSTEMS[name], 0.7
    matrix, e = heat_kernel(system, t), system.energy(system.states)
    exact = float(system.law @ (e + matrix @ (matrix @ (-e).exp()).log()))
    rng, found = seeded(4), []
    for _ in range(30):
        x = system.states[torch.multinomial(system.law, 200, replacement=True, generator=rng)]
        found.append(float(EnergyDiscrepancy(t, 512, 0.0)(system.energy, Batch(x), rng).value))
    found = torch.tensor(found)
    error = float(found.std()) / 30**0.5
    assert abs(float(found.mean()) - exact) < 8 * error, f"{float(found.mean())} for {exact}, {error}"


def test_on_a_torus_noise_is_wrapped():
    support = gb.Torus(2.0)
    out = diffused(torch.zeros(5000, 1), support, 4.0, seeded())
    assert bool(support.check(out).all())
    assert float(out.abs().mean()) == pytest.approx(0.5, abs=0.05)


# Plumbing.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_any_shape_and_precision_and_the_same_numbers_for_a_seed(shape, dtype):
    x = torch.randn((6, *shape), generator=seeded(1), dtype=dtype)
    objective, energy = EnergyDiscrepancy(0.5, 5), MLP(shape, hidden=(8,)).to(dtype)
    a, b, c = (objective(energy, Batch(x), seeded(s)).value for s in (1, 1, 2))
    assert a.dtype == dtype
    assert a.shape == ()
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    a.backward()


def test_labels_go_with_rows_and_their_negatives():
    seen = []

    def fn(x, y):
        seen.append((x, y))
        return (x[:, 0] - y).square()

    x, y = bell_rows(4, 1), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    EnergyDiscrepancy(1e-6, 2)(Energy.of(fn, context=("y",)), Batch(x + 10 * y[:, None], {"y": y}), seeded())
    points, labels = seen[0]
    assert torch.equal(labels, torch.tensor([0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3], dtype=torch.float64))
    assert torch.equal((points[:, 0] / 10).round(), labels)
    with pytest.raises(OptionError, match="y"):
        EnergyDiscrepancy(1.0)(Energy.of(fn, context=("y",)), Batch(x), seeded())


def test_a_batch_of_one_and_duplicates_are_fine():
    for x in (bell_rows(1, 1), bell_rows(1, 1).repeat(5, 1)):
        loss = EnergyDiscrepancy(1.0, 3)(Bell(), Batch(x), seeded())
        assert bool(torch.isfinite(loss.value))


def test_fit_runs_and_lowers_it():
    data = gb.TwoMoons().sample(500, seeded())
    objective = EnergyDiscrepancy(0.3, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(2, hidden=(32,))
    run = gb.fit(energy, data, objective, rng=seeded(), steps=150, batch_size=128, learning_rate=0.01, log_every=10)
    assert run.events == []
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"t": 0.0}, "positive time"),
        ({"t": -1.0}, "positive time"),
        ({"t": math.nan}, "positive time"),
        ({"t": 1.0, "negatives": 0}, "1 or more"),
        ({"t": 1.0, "negatives": 2.5}, "1 or more"),
        ({"t": 1.0, "stabilisation": -0.1}, "0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        EnergyDiscrepancy(**options)


def test_what_does_not_fit_is_refused():
    objective = EnergyDiscrepancy(1.0, 2)
    x = bell_rows(4, 1)
    with pytest.raises(DomainError, match="Sphere"):
        objective(Energy.of(lambda x: x[:, 0], support=gb.Sphere()), Batch(x), seeded())
    with pytest.raises(ArgumentTypeError, match="int64"):
        objective(Bell(), Batch(torch.ones(4, 1, dtype=torch.int64)), seeded())
    with pytest.raises(ShapeError, match="squeeze"):
        objective(Energy.of(lambda x: x), Batch(x), seeded())
    binary = MLP(1, hidden=(4,)) + Energy.of(lambda x: 0 * x[:, 0], support=constraints.boolean)
    with pytest.raises(DomainError, match="outside the energy's domain"):
        gb.fit(binary, x, objective, rng=seeded(), steps=1)
