"""Underdamped Langevin: exact in positions on a quadratic energy, of the order that theory gives on another.

The order is measured without noise. On a circle the law of position and velocity after a step is a linear map of the
law before, and `KernelOnCircle` holds that map in a basis of Fourier modes and Hermite polynomials, made by the
kernel's own ``step`` from a grid of states and of noise. Its fixed point is the law that endless chains would have.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special

import gibbsian as gb
from contracts import (
    TARGETS,
    assert_continues,
    assert_flat_memory,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_state_is_current,
    ks,
    normal_cdf,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, evaluate
from gibbsian.kernels.hmc import leapfrog
from gibbsian.kernels.underdamped import Underdamped
from kernels.test_compiled import needs_compiler

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
PLANAR = TARGETS[:2]
NORMAL = gb.Gaussian(loc=torch.zeros(1, dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class Split(Underdamped):
    """Any order of the parts, a part that stands twice being halved, and friction with or without a fault."""

    order: str = "BAOAB"
    friction_step: str = "exact"

    def step(self, energy, state, noise):
        (z,), x, grad = noise, state.x, state.grad
        v = state.momentum[0] if float(state.memory[0].max()) else z
        for part in self.order:
            h = self.step_size / self.order.count(part)
            if part == "B":
                grad = evaluate(energy, x)[1]
                v = v - h * grad
            elif part == "A":
                x = x + h * v
            else:
                c = math.exp(-self.friction * h)
                spread = {"exact": (1.0 - c * c) ** 0.5, "full": 1.0, "euler": (2.0 * self.friction * h) ** 0.5}
                v = (1.0 - self.friction * h if self.friction_step == "euler" else c) * v
                v = v + spread[self.friction_step] * z
        value, grad = evaluate(energy, x)
        new = State(x, value, grad, state.origin, (v,), (torch.ones_like(value),))
        return new, Info(torch.ones_like(value), torch.zeros_like(value))


def moving(energy, x, v, kernel=None):
    """A state whose chains have velocities."""
    start = (kernel or Underdamped(1.0, 1.0)).init(energy, x)
    return start._replace(momentum=(v,), memory=(torch.ones_like(start.energy),))


def test_the_twin_without_a_fault_is_the_kernel():
    energy = PLANAR[1].energy
    x, v, z = (torch.randn(50, 2, generator=seeded(i), dtype=torch.float64) for i in range(3))
    state = moving(energy, x, v)
    (a, _), (b, _) = (kind(0.4, 1.3).step(energy, state, (z,)) for kind in (Underdamped, Split))
    for one, other in zip((*a[:3], *a.momentum), (*b[:3], *b.momentum)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# Positions on a quadratic energy.


def assert_exact_positions(kernel):
    """Exact draws, and chains that stood at one point 40 steps ago, have the law of the target: one in 10^8 fails.

    Within 40 steps of these settings a chain forgets its start to 1e-9 or better.
    """
    for start in (NORMAL.sample(50_000, seeded()), torch.ones(50_000, 1, dtype=torch.float64)):
        out = gb.sample(NORMAL, kernel, start, steps=40, rng=seeded(1))
        distance = ks(out.x[:, 0], normal_cdf)
        assert distance < 3.1, f"sqrt(n) D = {distance:.2f}"


@pytest.mark.parametrize("kernel", [Underdamped(1.0, 1.5), Underdamped(0.7, 2.0), Underdamped(1.6, 2.0)], ids=repr)
def test_positions_are_exact_on_a_quadratic_energy_at_any_step_size(kernel):
    assert_exact_positions(kernel)


@pytest.mark.parametrize(
    "broken",
    [
        Split(1.0, 1.5, order="BABO"),  # a leapfrog step, then friction and noise: variance 1 / (1 - h^2 / 4)
        Split(0.5, 1.5, order="BAO"),  # Euler's symplectic step, then friction and noise: variance 0.80
        Split(1.0, 0.3, friction_step="full"),
        Split(0.5, 1.5, friction_step="euler"),
    ],
    ids=lambda k: f"{k.order}-{k.friction_step}",
)
def test_other_orders_and_other_noise_are_caught(broken):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_exact_positions(broken)


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_variances_are_those_of_theory(h):
    """From the linear map of a step, without noise: positions 1, velocities 1 - h^2/4; the other way round for BABO."""

    def variances(kernel):
        unit = torch.eye(3, dtype=torch.float64)  # position, velocity, noise
        new, _ = kernel.step(NORMAL, moving(NORMAL, unit[:, :1], unit[:, 1:2]), (unit[:, 2:],))
        m = torch.cat((new.x, new.momentum[0]), 1).T
        a, b = m[:, :2], m[:, 2:]
        lhs = torch.eye(4, dtype=torch.float64) - torch.kron(a, a)
        return torch.linalg.solve(lhs, (b @ b.T).flatten())[[0, 3]]

    exact = torch.tensor([1.0, 1.0 - h * h / 4.0], dtype=torch.float64)
    torch.testing.assert_close(variances(Underdamped(h, 1.2)), exact, rtol=0, atol=1e-12)
    other = torch.tensor([1.0 / (1.0 - h * h / 4.0), 1.0], dtype=torch.float64)
    torch.testing.assert_close(variances(Split(h, 1.2, order="BABO")), other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
def test_a_scale_is_a_change_of_coordinates(scale):
    factor = scale if scale.ndim == 2 else scale.diag()
    target = PLANAR[1].energy
    start = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    scaled = gb.sample(target, Underdamped(0.3, 1.0, scale), start @ factor.T, steps=9, rng=seeded(1))
    round_one = gb.Energy.of(lambda y: target(y @ factor.T))
    plain = gb.sample(round_one, Underdamped(0.3, 1.0), start, steps=9, rng=seeded(1))
    torch.testing.assert_close(scaled.x, plain.x @ factor.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(scaled.state.momentum[0], plain.state.momentum[0], rtol=0, atol=1e-10)


def test_a_scale_makes_a_thin_target_round():
    """Exact positions along either axis where a step ten times the thin one is taken."""
    energy = gb.Gaussian(covariance=FACTOR @ FACTOR.T)
    out = gb.sample(energy, Underdamped(1.0, 1.5, FACTOR), energy.sample(50_000, seeded()), steps=40, rng=seeded(1))
    for i, spread in enumerate((FACTOR @ FACTOR.T).diagonal().sqrt()):
        assert ks(out.x[:, i], lambda v, s=spread: normal_cdf(v / s)) < 3.1


# The order of the bias elsewhere.


class KernelOnCircle:
    """The map that a kernel's step makes of laws on a circle, with the energy cos x; see the head of this file."""

    modes, degree, noises = 6, 20, 20

    def __init__(self, kernel):
        nodes, _ = np.polynomial.hermite_e.hermegauss(self.degree + 1)
        z, weights = np.polynomial.hermite_e.hermegauss(self.noises)
        count = 2 * self.modes + 1
        angles = 2.0 * math.pi * torch.arange(count, dtype=torch.float64) / count
        x, v = torch.cartesian_prod(angles, torch.from_numpy(nodes)).split(1, 1)
        state = moving(self.energy, x, v)
        after = torch.zeros(len(x), len(x), dtype=torch.float64)
        for value, weight in zip(z, weights / weights.sum()):
            new, _ = kernel.step(self.energy, state, (torch.full_like(x, value),))
            after += weight * self.basis(new.x, new.momentum[0])
        self.map = torch.linalg.solve(self.basis(x, v), after)

    @staticmethod
    def energy(x):
        return x.cos().sum(1)

    def basis(self, x, v):
        m = torch.arange(1, self.modes + 1, dtype=x.dtype)
        fourier = torch.cat((torch.ones_like(x), (m * x).cos(), (m * x).sin()), 1)
        hermite = [torch.ones_like(v), v]
        for k in range(2, self.degree + 1):
            hermite.append((v * hermite[-1] - (k - 1) ** 0.5 * hermite[-2]) / k**0.5)
        return (fourier[:, :, None] * torch.cat(hermite, 1)[:, None, :]).flatten(1)

    def bias(self):
        """Mean of cos x under the law that the map leaves as it is, less its mean under the target."""
        one = torch.eye(len(self.map), dtype=torch.float64)
        equations = torch.cat(((self.map - one).T, one[:1]))
        right = torch.zeros(len(equations), 1, dtype=torch.float64)
        right[-1] = 1.0
        means = torch.linalg.lstsq(equations, right, driver="gelsd").solution[:, 0]
        return float(means[self.degree + 1]) + float(special.iv(1, 1.0) / special.iv(0, 1.0))


def orders(kernel, sizes=(0.8, 0.4, 0.2, 0.1)):
    biases = [abs(KernelOnCircle(dataclasses.replace(kernel, step_size=h)).bias()) for h in sizes]
    return [math.log2(a / b) for a, b in itertools.pairwise(biases)]


def test_the_bias_in_positions_is_of_second_order():
    """Measured 2.16, 2.03, 2.01 as the step size is halved from 0.8 to 0.1."""
    seen = orders(Underdamped(1.0, 1.0))
    assert abs(seen[-1] - 2.0) < 0.05
    assert all(order > 1.95 for order in seen)


def test_the_bias_is_of_fourth_order_where_friction_is_strong():
    """Measured 4.05, 3.90 at friction 20 from 0.8 to 0.2; beyond, friction is not strong within a step."""
    assert all(abs(order - 4.0) < 0.2 for order in orders(Underdamped(1.0, 20.0), (0.8, 0.4, 0.2)))


def test_the_order_exposes_a_lopsided_step_eulers_friction_and_too_much_noise():
    for lower in (Split(1.0, 1.0, order="BAO"), Split(1.0, 1.0, friction_step="euler")):
        assert abs(orders(lower, (0.1, 0.05))[0] - 1.0) < 0.1
    assert orders(Split(1.0, 1.0, friction_step="full"))[-1] < 0.7


def test_strong_friction_is_brownian_motion_with_noise_of_two_steps():
    """Velocities forgotten at once, what is left is the same authors' scheme with (z + z') / 2 for its noise."""
    energy, h = PLANAR[1].energy, 0.3
    x = PLANAR[1].draw(20, seeded())
    kernel = Underdamped(h, 1e4)
    state = gb.sample(energy, kernel, x, steps=1, rng=seeded(1)).state
    z = torch.randn(4, 20, 2, generator=seeded(2), dtype=torch.float64)
    places = []
    for each in z:
        state, _ = kernel.step(energy, state, (each,))
        places.append(state.x)
    for i in range(1, 4):
        due = places[i - 1] - 0.5 * h * h * gb.evaluate(energy, places[i - 1])[1] + 0.5 * h * (z[i - 1] + z[i])
        torch.testing.assert_close(places[i], due, rtol=0, atol=1e-12)


# Velocities: where they come from, and what a restart does.


def test_the_first_step_draws_a_velocity_and_goes_without_friction():
    energy, x = PLANAR[1].energy, PLANAR[1].draw(30, seeded())
    kernel = Underdamped(0.4, 2.0)
    state = kernel.init(energy, x)
    (z,) = (noise[0] for noise in kernel.noise(state, 1, seeded(1)))
    new, _ = kernel.step(energy, state, (z,))
    end, v = leapfrog(energy, state, z, 0.4, 1)
    torch.testing.assert_close(new.x, end.x, rtol=0, atol=1e-13)
    torch.testing.assert_close(new.momentum[0], v, rtol=0, atol=1e-13)
    assert bool((new.memory[0] == 1.0).all())


def wall(x):
    return torch.where(x[:, 0] > 1.0, torch.nan, 0.5 * x.square().sum(1))


def test_a_chain_that_leaves_the_numbers_returns_and_draws_another_velocity():
    start = torch.linspace(-0.4, 0.4, 128, dtype=torch.float64).reshape(64, 2)
    kernel = Underdamped(0.8, 1.0)
    state, z = kernel.init(wall, start), torch.randn(30, 64, 2, generator=seeded(), dtype=torch.float64)
    gone = torch.zeros(64, dtype=torch.float64)
    returns = 0
    for each in z:
        before = state
        state, info = kernel.step(wall, state, (each,))
        fresh, _ = leapfrog(wall, kernel.init(wall, start), each, 0.8, 1)
        again = (gone > 0) & (info.nonfinite == 0)
        torch.testing.assert_close(state.x[again], fresh.x[again], rtol=0, atol=1e-13)
        gone = info.nonfinite
        back = gone > 0
        returns += int(back.sum())
        assert torch.equal(state.x[back], start[back])
        assert bool((state.momentum[0][back] == 0.0).all())
        assert torch.equal(state.memory[0], 1.0 - gone)
        assert bool((state.x[~back] != before.x[~back]).any(1).all())
    assert returns > 50
    assert all(bool(torch.isfinite(t).all()) for t in (state.x, state.energy, state.grad, *state.momentum))


def test_restarts_are_counted_by_sample():
    start = torch.linspace(-0.4, 0.4, 128, dtype=torch.float64).reshape(64, 2)
    out = gb.sample(wall, Underdamped(0.8, 1.0), start, steps=30, rng=seeded(), thin=1)
    assert torch.equal((out.draws == start).all(2).sum(0).double(), out.nonfinite)
    assert int(out.nonfinite.sum()) > 50
    assert bool((out.acceptance == 1.0).all())


# What every kernel keeps.


@pytest.mark.parametrize("kernel", [Underdamped(0.3, 1.0), Underdamped(0.3, 1.0, FACTOR)], ids=repr)
def test_the_contracts_are_kept(kernel, graphs):
    target = PLANAR[1]
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)
    assert_one_graph(kernel, target.energy, start, graphs)


def test_restarts_continue_and_compile_too(graphs):
    energy, start = gb.Energy.of(wall, (2,)), torch.zeros(6, 2, dtype=torch.float64)
    assert_continues(Underdamped(0.8, 1.0), energy, start)
    assert_one_graph(Underdamped(0.8, 1.0), energy, start, graphs)


def test_one_gradient_per_step():
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(1)

    gb.sample(energy, Underdamped(0.1, 1.0), torch.zeros(3, 2), steps=20, rng=seeded())
    assert len(calls) == 21


def test_images_move_in_groups_or_together(monkeypatch):
    torch.manual_seed(0)
    energy = gb.ConvEnergy((1, 8, 8), (4, 4)).double()
    start = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=seeded())
    kernel = Underdamped(0.1, 1.0, torch.full((1, 8, 8), 0.5, dtype=torch.float64))
    whole = gb.sample(energy, kernel, start, steps=12, rng=seeded(1))
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(0, 4), slice(4, 6)])
    parted = gb.sample(energy, kernel, start, steps=12, rng=seeded(1))
    assert whole.x.shape == start.shape
    torch.testing.assert_close(parted.x, whole.x)
    torch.testing.assert_close(parted.state.momentum[0], whole.state.momentum[0])


def test_chains_may_have_settings_of_their_own():
    energy, start = PLANAR[1].energy, PLANAR[1].draw(4, seeded())
    sizes = torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64)
    one = gb.sample(energy, Underdamped(0.3, 1.0), start, steps=5, rng=seeded(1))
    each = gb.sample(energy, Underdamped(sizes, 1.0), start, steps=5, rng=seeded(1))
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])
    frictions = torch.tensor([0.5, 1.0, 0.5, 1.0], dtype=torch.float64)
    each = gb.sample(energy, Underdamped(0.3, frictions), start, steps=5, rng=seeded(1))
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_settings_are_refused(bad):
    with pytest.raises(OptionError, match=f"step_size is a positive number; got {bad}"):
        Underdamped(bad, 1.0)
    with pytest.raises(OptionError, match=f"friction is a positive number; got {bad}"):
        Underdamped(0.1, bad)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="positive finite standard deviations"):
        Underdamped(0.1, 1.0, torch.tensor([1.0, 0.0]))
    with pytest.raises(ShapeError, match=r"points of shape \(3,\)"):
        gb.sample(gb.Gaussian(3), Underdamped(0.1, 1.0, torch.ones(2)), torch.zeros(4, 3), steps=1, rng=seeded())
    other = gb.sample(gb.Gaussian(3), gb.ULA(0.1), torch.zeros(4, 3), steps=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match=r"Underdamped needs momenta \(momentum\) and a memory"):
        gb.sample(gb.Gaussian(3), Underdamped(0.1, 1.0), other.state, steps=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match="Underdamped accepts every step"):
        tune(gb.Gaussian(3), Underdamped(0.1, 1.0), torch.zeros(4, 3), rng=seeded())


def test_settings_are_told():
    assert repr(Underdamped(0.5, 1.0, DIAGONAL)) == "Underdamped(step_size=0.5, friction=1.0, scale=<(2,)>)"


@needs_compiler
@pytest.mark.slow
def test_inductor_gives_the_eager_chains():
    energy, start = PLANAR[0].energy, PLANAR[0].draw(7, seeded())
    a, b = (gb.sample(energy, Underdamped(0.3, 1.0, FACTOR), start, steps=20, rng=seeded(1), compile=c) for c in (0, 1))
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)
