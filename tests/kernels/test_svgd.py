"""Stein variational gradient descent: its formula, the Gaussian it finds, and particles that move together.

Nothing here is random but the starts, which are fixed: there are no false alarms.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

import gibbsian as gb
from contracts import (
    assert_continues,
    assert_flat_memory,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_state_is_current,
    log_exponential,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import Info, State, evaluate
from gibbsian.kernels.svgd import FEW, MOST, SVGD, median_of_pairs, stein_direction
from kernels.test_compiled import needs_compiler

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.64]], dtype=torch.float64)
GAUSSIAN = gb.Gaussian(loc=MEAN, covariance=COVARIANCE)


def start(n=100, seed=0):
    return 0.3 * torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64)


def by_loops(x, grad, b):
    """The formula, one pair at a time."""
    n = len(x)
    way = torch.zeros_like(x)
    for i in range(n):
        for j in range(n):
            k = math.exp(-float((x[i] - x[j]).square().sum()) / (2.0 * b * b))
            way[i] += (-k * grad[j] + k * (x[i] - x[j]) / b**2) / n
    return way


def lower_median(x):
    pairs = sorted(float((x[i] - x[j]).square().sum()) for i in range(len(x)) for j in range(i))
    return pairs[(len(pairs) - 1) // 2]


@pytest.mark.parametrize("bandwidth", [0.7, None])
@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_a_step_is_the_formula(n, bandwidth):
    energy, x = log_exponential().energy, 2.0 * start(n)
    b = (lower_median(x) / (2.0 * math.log(n + 1))) ** 0.5 if bandwidth is None else bandwidth
    out = gb.sample(energy, SVGD(0.3, bandwidth), x, steps=1, rng=seeded())
    torch.testing.assert_close(out.x, x + 0.3 * by_loops(x, gb.evaluate(energy, x)[1], b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [FEW, FEW + 1, 100])
def test_distances_in_many_coordinates_come_from_products_and_are_the_same(d):
    x, grad = (torch.randn(20, d, generator=seeded(i), dtype=torch.float64) for i in range(2))
    for bandwidth, b in ((4.0, 4.0), (None, (lower_median(x) / (2.0 * math.log(21))) ** 0.5)):
        torch.testing.assert_close(stein_direction(x, grad, bandwidth), by_loops(x, grad, b), rtol=0, atol=1e-12)


def test_the_repulsion_is_the_gradient_of_the_kernel():
    x = start(6).requires_grad_(True)
    y = x.detach().clone()
    k = (-(x[:, None] - y[None]).square().sum(2) / (2.0 * 0.8**2)).exp()
    (repulsion,) = torch.autograd.grad(k.sum(), x)  # sum over i of the gradient in x_j: minus the push on each
    torch.testing.assert_close(stein_direction(y, torch.zeros_like(y), 0.8), -repulsion / 6, rtol=0, atol=1e-12)


def test_one_particle_descends_and_with_a_wide_kernel_all_descend_as_one():
    energy, x = log_exponential().energy, start(5)
    for bandwidth in (None, 0.5):
        alone = gb.sample(energy, SVGD(0.1, bandwidth), x[:1], steps=9, rng=seeded())
        down = x[:1]
        for _ in range(9):
            down = down - 0.1 * gb.evaluate(energy, down)[1]
        torch.testing.assert_close(alone.x, down, rtol=0, atol=1e-13)
    out = gb.sample(energy, SVGD(0.1, 1e8), x, steps=1, rng=seeded())
    torch.testing.assert_close(out.x, x - 0.1 * gb.evaluate(energy, x)[1].mean(0), rtol=0, atol=1e-12)


def assert_finds_the_gaussian(kernel):
    """From a narrow cloud elsewhere to the mean within 0.01 and the covariance within a tenth.

    Measured at 100 particles: the mean within 0.002; the covariance, which a finite set of particles has too little of,
    within 0.083 of its largest eigenvalue by the median heuristic, and 0.024 with a bandwidth of 1.
    """
    out = gb.sample(GAUSSIAN, kernel, start(), steps=500, rng=seeded())
    off = float((out.x.mean(0) - MEAN).abs().max())
    assert off < 0.01, f"the mean is off by {off:.3g}"
    change = torch.linalg.matrix_norm(out.x.T.cov(correction=0) - COVARIANCE, 2)
    ratio = float(change / torch.linalg.matrix_norm(COVARIANCE, 2))
    assert ratio < 0.1, f"the covariance is off by a fraction {ratio:.3g}"
    assert int(out.nonfinite.sum()) == 0


@dataclasses.dataclass(frozen=True)
class Twin(SVGD):
    """The step with another factor in front of the repulsion."""

    repulsion: int = 1

    def step(self, energy, state, noise):
        b = self.bandwidth
        push = stein_direction(state.x, torch.zeros_like(state.grad), b)
        way = stein_direction(state.x, state.grad, b) + (self.repulsion - 1) * push
        x = state.x + self.step_size * way
        value, grad = evaluate(energy, x)
        return State(x, value, grad, state.origin), Info(torch.ones_like(value), torch.zeros_like(value))


@pytest.mark.parametrize("kernel", [SVGD(0.5), SVGD(0.5, 1.0), Twin(0.5)], ids=repr)
def test_particles_find_a_gaussian(kernel):
    assert_finds_the_gaussian(kernel)


@pytest.mark.parametrize("bandwidth", [None, 1.0])
@pytest.mark.parametrize("repulsion", [-1, 0])
def test_particles_that_attract_or_ignore_each_other_gather_in_the_mode_and_are_caught(repulsion, bandwidth):
    broken = Twin(0.5, bandwidth, repulsion)
    with pytest.raises(AssertionError, match="is off by"):
        assert_finds_the_gaussian(broken)
    x = gb.sample(GAUSSIAN, broken, start(), steps=500, rng=seeded()).x
    assert float(x.T.cov(correction=0).trace() / COVARIANCE.trace()) < 0.3  # 0.05 and 0.12 on two processors


def test_more_particles_stand_for_the_target_better():
    def missing(n):
        out = gb.sample(GAUSSIAN, SVGD(0.5), start(n), steps=500, rng=seeded())
        return 1.0 - float(out.x.T.cov(correction=0).trace() / COVARIANCE.trace())

    few, many = missing(25), missing(200)
    assert 0.0 < many < 0.6 * few


def test_the_median_is_over_pairs_of_different_particles():
    for n in (2, 3, 4, 5, 8):
        x = start(n, seed=n)
        squares = torch.cdist(x, x).square()
        assert abs(float(median_of_pairs(squares)) - lower_median(x)) < 1e-12
        off = squares[~torch.eye(n, dtype=torch.bool)].numpy()
        if n * (n - 1) // 2 % 2:  # an odd number of pairs has one median
            assert abs(float(median_of_pairs(squares)) - float(np.median(off))) < 1e-12
    assert float(median_of_pairs(torch.zeros(1, 1))) == 1.0
    assert float(median_of_pairs(torch.zeros(4, 4))) == 1.0


def test_particles_at_one_place_stay_finite_and_together():
    out = gb.sample(GAUSSIAN, SVGD(0.2), torch.zeros(5, 2, dtype=torch.float64), steps=50, rng=seeded())
    assert int(out.nonfinite.sum()) == 0
    assert bool((out.x == out.x[0]).all())
    torch.testing.assert_close(out.x[0], MEAN, rtol=0, atol=1e-2)


def test_far_from_zero_single_precision_keeps_distances():
    """A thousand lengths away the direction is still that of double precision, moved along."""
    x, grad = start(50).float(), start(50, seed=1).float()
    far = x + 1024.0
    there = stein_direction(far, grad)
    exact = stein_direction(far.double(), grad.double())
    torch.testing.assert_close(there.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [SVGD(0.3), SVGD(0.3, 0.7)], ids=repr)
def test_the_contracts_are_kept(kernel, graphs):
    target = log_exponential()
    x = target.draw(6, seeded())
    assert_continues(kernel, target.energy, x)
    assert_state_is_current(kernel, target.energy, x)
    assert_leaves_inputs_alone(kernel, target.energy, x)
    assert_flat_memory(kernel, target.energy, x)
    assert_one_graph(kernel, target.energy, x, graphs)


def test_one_gradient_per_step_and_no_random_numbers():
    calls, rng = [], seeded()

    def energy(x):
        calls.append(len(x))
        return x.square().sum(1)

    gb.sample(energy, SVGD(0.1), start(4), steps=20, rng=rng)
    assert len(calls) == 21
    assert torch.equal(rng.get_state(), seeded().get_state())


@dataclasses.dataclass(frozen=True)
class WithRowsOfNoise(SVGD):
    """Noise with a row for each chain, which lets groups of images part."""

    def noise(self, state, steps, rng):
        return (state.x.new_zeros(steps, state.x.shape[0]),)


def test_images_move_together_whatever_the_groups(monkeypatch):
    torch.manual_seed(0)
    energy = gb.ConvEnergy((1, 8, 8), (4, 4)).double()
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=seeded())
    whole = gb.sample(energy, SVGD(0.1), x, steps=12, rng=seeded())
    flat = gb.Energy.of(lambda y: energy(y.reshape(-1, 1, 8, 8)))
    torch.testing.assert_close(gb.sample(flat, SVGD(0.1), x.flatten(1), steps=12, rng=seeded()).x, whole.x.flatten(1))
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(0, 4), slice(4, 6)])
    assert torch.equal(gb.sample(energy, SVGD(0.1), x, steps=12, rng=seeded()).x, whole.x)
    assert not torch.allclose(gb.sample(energy, WithRowsOfNoise(0.1), x, steps=12, rng=seeded()).x, whole.x)


def test_a_particle_that_leaves_the_numbers_returns_and_the_others_stay_finite():
    def wall(x):
        return torch.where(x[:, 0] > 0.8, torch.nan, 0.5 * (x - 0.5).square().sum(1))

    x = start(40)
    out = gb.sample(wall, SVGD(0.5), x, steps=50, rng=seeded(), thin=1)
    assert torch.equal((out.draws == x).all(2).sum(0).double(), out.nonfinite)
    assert int(out.nonfinite.sum()) > 20
    assert bool(torch.isfinite(out.draws).all())
    assert bool((out.draws[..., 0] <= 0.8).all())


def test_particles_may_have_step_sizes_of_their_own():
    sizes = torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64)
    x = start(4)
    each, one = (gb.sample(GAUSSIAN, SVGD(s), x, steps=1, rng=seeded()) for s in (sizes, 0.3))
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_settings_are_refused(bad):
    with pytest.raises(OptionError, match=f"step_size is a positive number; got {bad}"):
        SVGD(bad)
    with pytest.raises(OptionError, match=f"bandwidth is a positive number; got {bad}"):
        SVGD(0.1, bad)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match=r"bandwidth is one number for all pairs; got shape \(3,\)"):
        SVGD(0.1, torch.ones(3))
    with pytest.raises(OptionError, match=r"at most 10000 particles.* got 10001"):
        gb.sample(gb.Gaussian(2), SVGD(0.1), torch.zeros(MOST + 1, 2), steps=1, rng=seeded())
    other = gb.sample(gb.Gaussian(2), gb.MALA(0.1), torch.zeros(4, 2), steps=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match=r"SVGD needs the place to return to \(origin\)"):
        gb.sample(gb.Gaussian(2), SVGD(0.1), other.state, steps=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match="SVGD accepts every step"):
        tune(gb.Gaussian(2), SVGD(0.1), torch.zeros(4, 2), rng=seeded())


def test_settings_are_told():
    assert repr(SVGD(0.5)) == "SVGD(step_size=0.5)"
    assert repr(SVGD(0.5, 2.0)) == "SVGD(step_size=0.5, bandwidth=2.0)"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bandwidth", [None, 0.5])
def test_inductor_gives_the_eager_particles(bandwidth):
    energy, x = gb.Gaussian(loc=MEAN, covariance=COVARIANCE), start(7)
    a, b = (gb.sample(energy, SVGD(0.3, bandwidth), x, steps=20, rng=seeded(1), compile=c) for c in (0, 1))
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)
