"""Microcanonical kernels: the turn and its Jacobian, exact adjusted chains, the bias of unadjusted ones, and twins."""

import dataclasses
import math
import os
import shutil

import pytest
import torch

import gibbsian as gb
from contracts import (
    ExactTarget,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_reversible,
    assert_state_is_current,
    correlated_gaussian,
    log_exponential,
    normal_cdf,
    seeded,
)
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, evaluate, is_finite, metropolis, row_sum
from gibbsian.kernels.microcanonical import LEAPFROG, MCLMC, MINIMAL_NORM, AdjustedMCLMC, trajectory, turn

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
TARGET = log_exponential()


def unit(v):
    """Rows of length one."""
    return v / row_sum(v * v).sqrt()[:, None]


def two_modes_in_the_plane():
    """Asymmetric and multimodal: 0.3 N((-2, 0), 0.5^2) + 0.7 N((1, 0), 1)."""
    weights, loc, spread = (0.3, 0.7), (-2.0, 1.0), (0.5, 1.0)
    energy = gb.GaussianMixture(
        torch.tensor([[loc[0], 0.0], [loc[1], 0.0]], dtype=torch.float64),
        torch.tensor(spread, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
    )

    def cdf(shift, stretch):
        parts = [(w, shift * m, stretch * s) for w, m, s in zip(weights, loc, spread)]
        return lambda v: sum(w * normal_cdf((v - m) / s) for w, m, s in parts)

    projections = {
        "x0": (lambda x: x[:, 0], cdf(1.0, 1.0)),
        "x1": (lambda x: x[:, 1], cdf(0.0, 1.0)),
        "x0+x1": (lambda x: x.sum(1), cdf(1.0, 2**0.5)),
    }
    return ExactTarget("two_modes_in_the_plane", energy, energy.sample, projections)


PLANAR = (correlated_gaussian(), TARGET, two_modes_in_the_plane())
EXACT = (
    AdjustedMCLMC(0.35, leapfrog=4),
    AdjustedMCLMC(0.9, leapfrog=2),
    AdjustedMCLMC(0.5, leapfrog=3, jitter=0.9),
    AdjustedMCLMC(0.6, leapfrog=3, scale=DIAGONAL),
    AdjustedMCLMC(0.6, leapfrog=3, scale=FACTOR),
)
ALL = (MCLMC(0.3, 1.0, scale=FACTOR), AdjustedMCLMC(0.4, leapfrog=2, jitter=0.5))


@pytest.mark.parametrize("target", PLANAR, ids=repr)
@pytest.mark.parametrize("kernel", EXACT, ids=repr)
def test_adjusted_kernels_leave_the_target_invariant(kernel, target):
    assert_invariant(kernel, target)
    assert_reversible(kernel, target)


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_microcanonical_kernels_keep_the_contracts(kernel, graphs):
    start = TARGET.draw(6, seeded())
    assert_continues(kernel, TARGET.energy, start)
    assert_state_is_current(kernel, TARGET.energy, start)
    assert_leaves_inputs_alone(kernel, TARGET.energy, start)
    assert_flat_memory(kernel, TARGET.energy, start)
    assert_one_graph(kernel, TARGET.energy, start, graphs)


class Twin(AdjustedMCLMC):
    """An adjusted kernel with a fault in one place."""

    def turned(self, u, grad, time):
        return turn(u, grad, time)[0]

    def ratio(self, old, new, kinetic):
        return old.energy - new.energy - kinetic

    def step(self, energy, state, noise):
        h, u, new, kinetic = self.step_size, unit(noise[0]), state, 0.0
        for _ in range(self.leapfrog):
            kinetic, u = kinetic + turn(unit(u), new.grad, 0.5 * h)[1], self.turned(u, new.grad, 0.5 * h)
            x = new.x + h * u
            new = State(x, *evaluate(energy, x))
            kinetic, u = kinetic + turn(unit(u), new.grad, 0.5 * h)[1], self.turned(u, new.grad, 0.5 * h)
        return metropolis(state, new, self.ratio(state, new, kinetic), noise[1])


class WithoutJacobian(Twin):
    """The ratio of target densities alone."""

    def ratio(self, old, new, kinetic):
        return old.energy - new.energy


class WithExponentD(Twin):
    """The denominator to the power d where d - 1 belongs: twice as much in the plane."""

    def ratio(self, old, new, kinetic):
        return old.energy - new.energy - 2.0 * kinetic


class WithJacobianSignFlipped(Twin):
    """Areas grow where they shrink."""

    def ratio(self, old, new, kinetic):
        return old.energy - new.energy + kinetic


class WithoutNormalisation(Twin):
    """Velocities are kicked as in HMC and take any length."""

    def turned(self, u, grad, time):
        return u - time * grad


class WithTurnsOfFirstOrder(Twin):
    """A kick and a normalisation: the length is right, but areas change in another way."""

    def turned(self, u, grad, time):
        return unit(u - time * grad)


@pytest.mark.parametrize("target", PLANAR, ids=repr)
def test_the_twins_have_the_fault_and_nothing_else(target):
    start = target.draw(50, seeded())
    own, twin = (gb.sample(target.energy, k(0.9, 2), start, steps=9, rng=seeded(1)) for k in (AdjustedMCLMC, Twin))
    torch.testing.assert_close(twin.x, own.x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("target", PLANAR, ids=repr)
@pytest.mark.parametrize(
    "twin", [WithoutJacobian, WithExponentD, WithJacobianSignFlipped, WithoutNormalisation, WithTurnsOfFirstOrder]
)
def test_the_invariance_test_catches_broken_twins(twin, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(twin(0.9, leapfrog=2), target)


def directions(n, dim, seed=0):
    return unit(torch.randn((n, dim), generator=seeded(seed), dtype=torch.float64))


def slopes(n, dim, seed=1):
    return 2.0 * torch.randn((n, dim), generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("dim", [2, 3, 11])
def test_turns_keep_the_length_run_back_and_add_up(dim):
    u, g = directions(50, dim), slopes(50, dim)
    there, change = turn(u, g, 0.7)
    torch.testing.assert_close(row_sum(there * there), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-12)
    longer = 1.0 + torch.rand((50, 1), generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(turn(longer * u, g, 0.7), (there, change), rtol=0, atol=1e-12)
    # On the way back rounding grows as the areas do, by up to e^5 here.
    back, unchanged = turn(-there, g, 0.7)
    torch.testing.assert_close(-back, u, rtol=0, atol=1e-11)
    torch.testing.assert_close(-unchanged, change, rtol=0, atol=1e-11)
    half, first = turn(u, g, 0.3)
    rest, second = turn(half, g, 0.4)
    torch.testing.assert_close(rest, there, rtol=0, atol=1e-11)
    torch.testing.assert_close(first + second, change, rtol=0, atol=1e-11)


def test_turns_follow_the_equation_of_motion():
    u, g, h = directions(50, 5), slopes(50, 5), 1e-5
    rate = (turn(u, g, h)[0] - turn(u, g, -h)[0]) / (2 * h)
    torch.testing.assert_close(rate, -(g - u * row_sum(u * g)[:, None]) / 4.0, rtol=0, atol=1e-9)
    # Along the way the kinetic energy takes up what the potential gives: dK/dt = -u . g.
    torch.testing.assert_close((turn(u, g, h)[1] - turn(u, g, -h)[1]) / (2 * h), -row_sum(u * g), rtol=0, atol=1e-9)


def tangent(u):
    """An orthonormal basis ``(d, d - 1)`` of the plane that touches the sphere at ``u``."""
    basis = torch.linalg.qr(torch.cat((u[:, None], torch.eye(len(u), dtype=u.dtype)), 1)).Q
    return basis[:, 1:]


def log_volume(flow, x, u, eps=1e-5):
    """The logarithm of the determinant of a map of (x, u), u on the sphere, by central differences."""
    d = len(u)
    steps = torch.block_diag(torch.eye(len(x), dtype=u.dtype), tangent(u))
    moved = [flow(x + s * steps[: len(x)].T, unit(u + s * steps[len(x) :].T)) for s in (eps, -eps)]
    x_end, u_end = (t[0] for t in flow(x[None], u[None]))
    columns = torch.cat([(a - b) / (2 * eps) for a, b in zip(*moved)], 1).T
    inner = torch.block_diag(torch.eye(len(x_end), dtype=u.dtype), tangent(u_end))
    assert inner.shape == (len(x) + d, len(x) + d - 1)
    return float(torch.linalg.slogdet(inner.T @ columns).logabsdet)


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_the_change_is_the_jacobian_of_a_turn(dim):
    nowhere = torch.zeros(0, dtype=torch.float64)
    for seed in range(5):
        u, g = directions(1, dim, seed)[0], slopes(1, dim, seed + 9)
        change = float(turn(u[None], g, 1.3)[1])
        assert abs(change) > 0.01

        def flow(x, u, g=g):
            return x, turn(u, g.expand_as(u), 1.3)[0]

        assert abs(log_volume(flow, nowhere, u) + change) < 1e-7
        # With the power d, or with none, it is another number.
        assert abs(log_volume(flow, nowhere, u) + change * dim / (dim - 1)) > 1e-4


@pytest.mark.parametrize("turns", [LEAPFROG, MINIMAL_NORM], ids=["leapfrog", "minimal norm"])
def test_trajectories_run_back_and_change_volume_as_they_say(turns):
    def flow(x, u):
        end, u, _ = trajectory(TARGET.energy, State(x, *evaluate(TARGET.energy, x)), u, 0.3, 4, turns, FACTOR)
        return end.x, u

    x, u = TARGET.draw(5, seeded()), directions(5, 2)
    state = State(x, *evaluate(TARGET.energy, x))
    end, turned, kinetic = trajectory(TARGET.energy, state, u, 0.3, 4, turns, FACTOR)
    back, returned, change = trajectory(TARGET.energy, end, -turned, 0.3, 4, turns, FACTOR)
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(-returned, u, rtol=0, atol=1e-12)
    torch.testing.assert_close(change, -kinetic, rtol=0, atol=1e-12)
    for i in range(5):
        assert abs(log_volume(flow, x[i], u[i]) + float(kinetic[i])) < 1e-6


def errors_in_energy(turns, exponent=1.0):
    """Root mean square of W after unit time, at four step sizes that halve."""
    x, u = TARGET.draw(200, seeded(2)), directions(200, 2, 3)
    state, found = State(x, *evaluate(TARGET.energy, x)), []
    for steps in (8, 16, 32, 64):
        end, _, kinetic = trajectory(TARGET.energy, state, u, 1.0 / steps, steps, turns)
        found.append(float((end.energy - state.energy + exponent * kinetic).square().mean().sqrt()))
    return torch.tensor(found)


@pytest.mark.parametrize("turns", [LEAPFROG, MINIMAL_NORM], ids=["leapfrog", "minimal norm"])
def test_the_error_in_energy_is_of_second_order(turns):
    found = errors_in_energy(turns)
    order = (found[:-1] / found[1:]).log2()
    assert bool(((order - 2.0).abs() < 0.2).all()), order
    wrong = errors_in_energy(turns, exponent=2.0)
    assert bool(((wrong[:-1] / wrong[1:]).log2().abs() < 0.1).all())


def test_minimal_norm_pays_for_its_second_gradient():
    """At twice the step its error is smaller than leapfrog's."""
    assert bool((errors_in_energy(MINIMAL_NORM)[:-1] < 0.5 * errors_in_energy(LEAPFROG)[1:]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turns_hold_in_the_extremes(dtype):
    u = unit(torch.tensor([[1.0, 2.0, 2.0]], dtype=dtype))
    sideways = unit(torch.tensor([[2.0, 1.0, -2.0]], dtype=dtype))
    # No gradient, no turn.
    there, change = turn(u, torch.zeros_like(u), 0.5)
    torch.testing.assert_close(there, u)
    assert float(change) == 0.0
    # A small turn keeps its digits: for a slope at right angles the change is 2 log cosh(h / 2).
    for h in (1e-2, 1e-4):
        assert float(turn(u, sideways, h)[1]) == pytest.approx(h * h / 4, rel=1e-4, abs=1e-7 * (dtype != torch.float64))
    # A huge one points downhill, and the change is the angle but for log 2, twice.
    there, change = turn(u, 1e6 * sideways, 1.0)
    torch.testing.assert_close(there, -sideways)
    assert float(change) == pytest.approx(1e6 - 2 * math.log(2.0), rel=1e-6)
    # Straight down and straight up it goes on, and the change is exact.
    torch.testing.assert_close(turn(u, -3.0 * u, 1.0)[0], u)
    assert float(turn(u, -3.0 * u, 1.0)[1]) == pytest.approx(3.0, rel=1e-5)
    assert float(turn(u, 3.0 * u, 1.0)[1]) == pytest.approx(-3.0, rel=1e-5)
    # Where rounding loses a direction, the change says so instead of promising any gain.
    assert not float(turn(u, 1e6 * u, 1.0)[1]) < -1e6 * 1.01


SPREAD = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
GAUSSIAN = gb.Gaussian(loc=torch.zeros(20, dtype=torch.float64), scale=SPREAD)


def bias(kernel, steps, chains=4000, seed=0):
    """How far mean squares are from the variances, in parts, averaged over coordinates; and its standard error."""
    rng = seeded(seed)
    out = gb.sample(GAUSSIAN, kernel, GAUSSIAN.sample(chains, rng), steps=steps, rng=rng, warmup=steps // 10, thin=1)
    each = (out.draws / SPREAD).square().mean((0, 2)) - 1.0
    return float(each.mean()), float(each.std() / chains**0.5)


def assert_small_bias(kernel):
    """Chains are independent: 6 standard errors are a false alarm in 2 of 10^9."""
    value, stderr = bias(kernel, 150)
    assert abs(value) < 0.002 + 6 * stderr, f"relative bias {value:.4f} +- {stderr:.4f}"


def test_unadjusted_chains_have_little_bias_at_a_small_step():
    assert_small_bias(MCLMC(1.0, 4.7))
    assert bias(MCLMC(1.0, 4.7), 150)[1] < 0.001


@dataclasses.dataclass(frozen=True)
class MCLMCWithD(MCLMC):
    """Turns by |g| h / d: the law is flatter by the factor d / (d - 1), 5 % in 20 dimensions."""

    def step(self, energy, state, noise):
        return super().step(lambda x: (19 / 20) * energy(x), state._replace(grad=(19 / 20) * state.grad), noise)


@dataclasses.dataclass(frozen=True)
class MCLMCUphill(MCLMC):
    """Turns uphill."""

    def step(self, energy, state, noise):
        return super().step(lambda x: -energy(x), state, noise)


@dataclasses.dataclass(frozen=True)
class MCLMCWithoutNormalisation(MCLMC):
    """Noise makes the velocity longer from step to step, as nothing brings it back to length one."""

    def step(self, energy, state, noise):
        h = self.step_size
        longer = 0.5 * h * noise[0] / 20**0.5
        new, u, _ = trajectory(energy, state, unit(state.momentum[0]) + longer, h, 1, MINIMAL_NORM)
        zero = torch.zeros_like(new.energy)
        return new._replace(momentum=(u,)), Info(zero, zero, {"energy_change": zero})


@pytest.mark.parametrize("twin", [MCLMCWithD, MCLMCUphill, MCLMCWithoutNormalisation])
def test_the_bias_exposes_broken_twins(twin):
    with pytest.raises(AssertionError, match="relative bias"):
        assert_small_bias(twin(1.0, 4.7))


def test_the_bias_falls_at_least_with_the_square_of_the_step():
    """Minimal norm makes the coefficient of the square small, so that steps of any use see the fourth power too."""
    (fine, low), (coarse, high) = bias(MCLMC(2.0, 4.7), 150), bias(MCLMC(4.0, 4.7), 75)
    assert -coarse > 0.01 + 6 * high
    assert abs(fine) < 0.25 * abs(coarse) + 3 * (low + high)  # measured: -0.0025 and -0.0191, a slope of 2.9
    still_coarser, _ = bias(MCLMC(5.0, 4.7), 60)
    assert math.log(still_coarser / coarse) / math.log(5.0 / 4.0) > 2.0  # measured: 3.2


def test_the_squared_change_of_energy_is_of_sixth_order():
    """What `tune_mclmc` counts on, seen in the first steps of chains in the same directions: 6.05, then 6.15."""
    start, values = GAUSSIAN.sample(2000, seeded(2)), []
    for h in (0.25, 0.5, 1.0):
        out = gb.sample(GAUSSIAN, MCLMC(h, 4.7), start, steps=1, rng=seeded(3))
        values.append(math.log2(float(out.details["energy_change"].square().mean())))
    assert abs(values[1] - values[0] - 6.0) < 0.1
    assert abs(values[2] - values[1] - 6.0) < 0.3


def test_the_first_direction_is_uniform_and_is_forgotten_at_the_rate_it_should():
    flat = gb.Energy.of(lambda x: 0.0 * x.sum(1), (3,))
    start = torch.zeros((20_000, 3), dtype=torch.float64)
    first = gb.sample(flat, MCLMC(0.5, 2.0), start, steps=1, rng=seeded())
    (u,) = first.state.momentum
    torch.testing.assert_close(first.x, 0.5 * u, rtol=0, atol=1e-14)
    # Archimedes: every coordinate of a uniform direction in space is uniform on (-1, 1).
    for i in range(3):
        assert float((u[:, i].sort().values - torch.linspace(-1, 1, 20_000, dtype=u.dtype)).abs().max()) < 0.05
    second = gb.sample(flat, MCLMC(0.5, 2.0), first.state, steps=1, rng=seeded(1))
    kept = float(row_sum(u * second.state.momentum[0]).mean())
    assert abs(kept - math.exp(-0.25)) < 0.06
    far = gb.sample(flat, MCLMC(0.5, 1e-3), first.state, steps=1, rng=seeded(1))
    assert abs(float(row_sum(u * far.state.momentum[0]).mean())) < 6 / 3**0.5 / 20_000**0.5


def wall(x):
    """A Gaussian that is no number where the first coordinate exceeds one."""
    return torch.where(x[:, 0] > 1.0, torch.nan, 0.5 * x.square().sum(1))


def test_unadjusted_chains_restart_in_another_direction_and_are_counted():
    start = torch.linspace(-0.4, 0.4, 128, dtype=torch.float64).reshape(64, 2)
    out = gb.sample(wall, MCLMC(0.4, 1.0), start, steps=50, rng=seeded(), thin=1)
    back = (out.draws == start).all(2)
    assert torch.equal(back.sum(0).double(), out.nonfinite)
    assert int(out.nonfinite.sum()) > 50
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert torch.equal(out.kept["energy_change"].isnan(), back)
    assert torch.equal((out.state.momentum[0] == 0).all(1), back[-1])
    # A chain that always fell off in one direction would never leave.
    assert bool((out.nonfinite < 40).all())


def test_adjusted_chains_reject_and_count():
    start = torch.zeros((64, 2), dtype=torch.float64)
    out = gb.sample(wall, AdjustedMCLMC(0.5, leapfrog=3), start, steps=50, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert bool(is_finite(out.state.energy, out.state.grad).all())
    assert int(out.nonfinite.sum()) > 50
    assert bool((out.acceptance <= 1.0 - out.nonfinite / 50).all())


@pytest.mark.parametrize("kernel", [MCLMC(0.3, 1.0), AdjustedMCLMC(0.4, leapfrog=3)], ids=repr)
@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
def test_a_scale_is_a_change_of_coordinates(kernel, scale):
    factor = scale if scale.ndim == 2 else scale.diag()
    start = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    scaled = dataclasses.replace(kernel, scale=scale)
    there = gb.sample(TARGET.energy, scaled, start @ factor.T, steps=9, rng=seeded(1))
    round_ = gb.sample(gb.Energy.of(lambda y: TARGET.energy(y @ factor.T)), kernel, start, steps=9, rng=seeded(1))
    torch.testing.assert_close(there.x, round_.x @ factor.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [lambda h: MCLMC(h, 1.0), lambda h: AdjustedMCLMC(h, 3)], ids=["MCLMC", "adjusted"])
def test_chains_may_have_step_sizes_of_their_own(make):
    start = torch.randn(6, 2, generator=seeded(), dtype=torch.float64)
    sizes = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3], dtype=torch.float64)
    each = gb.sample(TARGET.energy, make(sizes), start, steps=5, rng=seeded(1))
    one = gb.sample(TARGET.energy, make(0.2), start, steps=5, rng=seeded(1))
    torch.testing.assert_close(each.x[sizes == 0.2], one.x[sizes == 0.2], rtol=0, atol=1e-14)
    assert not torch.equal(each.x[sizes == 0.1], one.x[sizes == 0.1])


@pytest.mark.parametrize("kernel", [MCLMC(0.3, 5.0), AdjustedMCLMC(0.4, leapfrog=3)], ids=repr)
def test_images_are_vectors_of_another_shape(kernel):
    start = torch.randn(5, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    images = gb.sample(lambda x: 0.5 * row_sum(x * x), kernel, start, steps=7, rng=seeded(1))
    vectors = gb.sample(lambda x: 0.5 * row_sum(x * x), kernel, start.flatten(1), steps=7, rng=seeded(1))
    torch.testing.assert_close(images.x.flatten(1), vectors.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "each"), [(MCLMC(0.1, 1.0), 2), (AdjustedMCLMC(0.1, leapfrog=4), 4)], ids=repr)
def test_no_gradient_is_computed_twice(kernel, each):
    calls = []

    def energy(x):
        calls.append(len(x))
        return (x**2).sum(1)

    gb.sample(energy, kernel, torch.zeros(3, 2), steps=5, rng=seeded())
    assert kernel.gradients == each
    assert len(calls) == 1 + each * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MCLMC(0.0, 1.0), "step_size is a positive number; got 0.0"),
        (lambda: MCLMC(0.1, -1.0), "length is a positive number; got -1.0"),
        (lambda: MCLMC(0.1, float("inf")), "length is a positive number; got inf"),
        (lambda: MCLMC(0.1, 1.0, scale=-DIAGONAL), "positive finite standard deviations"),
        (lambda: AdjustedMCLMC(float("nan")), "step_size is a positive number; got nan"),
        (lambda: AdjustedMCLMC(0.1, leapfrog=0), "leapfrog counts the steps"),
        (lambda: AdjustedMCLMC(0.1, jitter=1.5), "jitter is a fraction .* got 1.5"),
        (lambda: AdjustedMCLMC(0.1, scale=2.0), "scale is a tensor"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize("kernel", [MCLMC(0.1, 1.0), AdjustedMCLMC(0.1)], ids=repr)
def test_the_line_is_refused(kernel):
    with pytest.raises(ShapeError, match=r"points of 2 or more coordinates; got shape \(4, 1\)\. On the line use HMC"):
        gb.sample(lambda x: x.square().sum(1), kernel, torch.zeros(4, 1), steps=1, rng=seeded())
    moved = dataclasses.replace(kernel, scale=torch.ones(2))
    with pytest.raises(ShapeError, match=r"A scale for points of shape \(3,\)"):
        gb.sample(lambda x: x.square().sum(1), moved, torch.zeros(4, 3), steps=1, rng=seeded())


def test_another_kernels_state_is_refused():
    energy = gb.Gaussian(2)
    state = gb.sample(energy, gb.ULA(0.1), torch.zeros(4, 2), steps=1, rng=seeded()).state
    with pytest.raises(ArgumentTypeError, match="MCLMC needs momenta"):
        gb.sample(energy, MCLMC(0.1, 1.0), state, steps=1, rng=seeded())
    # The other way round nothing is missing.
    state = gb.sample(energy, MCLMC(0.1, 1.0), torch.zeros(4, 2), steps=1, rng=seeded()).state
    gb.sample(energy, AdjustedMCLMC(0.1), state, steps=1, rng=seeded())


def test_kernels_print_what_is_set():
    assert repr(MCLMC(0.1, torch.tensor(2.0), scale=DIAGONAL)) == "MCLMC(step_size=0.1, length=2, scale=<(2,)>)"
    assert repr(AdjustedMCLMC(0.1)) == "AdjustedMCLMC(step_size=0.1, leapfrog=10)"


def assert_finds_the_neck(kernel, chains, steps, limit):
    """Funnel of ten coordinates, from a start far from equilibrium: the law of v by its exact one.

    The first fifth is left out. Standard errors are those of the exact probabilities with the chains' effective draws.
    """
    energy, rng = gb.Funnel(10).double(), seeded(11)
    start = torch.randn((chains, 10), generator=rng, dtype=torch.float64)
    out = gb.sample(energy, kernel, start, steps=steps, rng=rng, warmup=steps // 5, thin=5)
    for bound in (-6.0, -3.0, 0.0):
        below = (out.draws[..., 0] < bound).double()
        p = float(normal_cdf(torch.tensor(bound / 3.0)))
        ess = float(gb.effective_sample_size(below, ranked=False))
        z = (float(below.mean()) - p) / math.sqrt(p * (1 - p) / ess)
        told = f"P(v < {bound}) = {float(below.mean()):.4f}, exact {p:.4f}, z = {z:.1f}, ess {ess:.0f}"
        assert abs(z) < limit, told
        assert ess > 200, told


def test_adjusted_chains_find_the_neck_of_the_funnel():
    """Jitter over all of the step size brings short steps for the neck and long ones for the mouth.

    Measured: z = -1.3, 1.1 and 1.9 from 1,000 effective draws and more. Such long trajectories are chaotic, so that
    another processor draws others; five standard errors are then a false alarm in 2 of 10^6.
    """
    assert_finds_the_neck(AdjustedMCLMC(0.4, leapfrog=20, jitter=1.0), 150, 600, limit=5.0)


@pytest.mark.slow
def test_adjusted_chains_know_the_mass_of_the_neck_precisely():
    """Measured: P(v < -6) = 0.0226 where 0.0228 is exact, from 7,500 effective draws."""
    assert_finds_the_neck(AdjustedMCLMC(0.3, leapfrog=40, jitter=1.0), 400, 2000, limit=4.0)


@pytest.mark.slow
def test_the_funnel_exposes_a_missing_jacobian():
    with pytest.raises(AssertionError, match=r"P\(v < "):
        assert_finds_the_neck(WithoutJacobian(0.2, leapfrog=20), 150, 600, limit=5.0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("kernel", [MCLMC(0.3, 1.0, scale=FACTOR), AdjustedMCLMC(0.4, leapfrog=3)], ids=repr)
def test_inductor_gives_the_same_chains(kernel):
    start = TARGET.draw(16, seeded())
    eager, compiled = (
        gb.sample(TARGET.energy, kernel, start, steps=10, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.x, eager.x, rtol=0, atol=1e-10)
