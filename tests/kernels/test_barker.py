"""The Barker proposal: exact, its acceptance by its formula, and at ease where MALA is stuck."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import gibbsian as gb
from contracts import (
    TARGETS,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_reversible,
    assert_state_is_current,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.compilation import wanting
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.barker import Barker
from gibbsian.kernels.base import State, evaluate, metropolis, row_sum
from gibbsian.kernels.normals import MANY
from gibbsian.kernels.random_walk import RandomWalk
from kernels.test_compiled import needs_compiler

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
PLANAR = TARGETS[:2]


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("step_size", [0.6, 1.5])
def test_the_target_is_left_invariant(target, step_size):
    assert_invariant(Barker(step_size), target)
    assert_reversible(Barker(step_size), target)


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
@pytest.mark.parametrize("target", PLANAR, ids=repr)
def test_a_scale_keeps_it_exact(target, scale):
    assert_invariant(Barker(0.8, scale), target)
    assert_reversible(Barker(0.8, scale), target)


@dataclasses.dataclass(frozen=True)
class Twin(Barker):
    """The step written once more, with places for faults; without any, it is the kernel."""

    uphill: bool = False
    ratio: str = "right"
    together: bool = False

    def step(self, energy, state, noise):
        pair, uniform = noise
        w, flip = self.step_size * pair[:, 0], torch.special.ndtr(pair[:, 1])
        if self.together:
            flip = flip[:, :1].expand_as(flip)
        sign = -1.0 if self.uphill else 1.0
        w = torch.where(flip < 1.0 / (1.0 + torch.exp(sign * w * state.grad)), w, -w)
        new = State(state.x + w, *evaluate(energy, state.x + w))
        there, back = logsigmoid(-w * state.grad), logsigmoid(w * new.grad)
        correction = {"right": back - there, "none": 0.0 * w, "swapped": there - back}[self.ratio]
        return metropolis(state, new, state.energy - new.energy + row_sum(correction), uniform)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_twin_without_a_fault_is_the_kernel(target):
    start = target.draw(500, seeded())
    a, b = (gb.sample(target.energy, kernel, start, steps=5, rng=seeded(1)) for kernel in (Barker(0.6), Twin(0.6)))
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize(
    "broken", [Twin(0.6, uphill=True), Twin(0.6, ratio="none"), Twin(0.6, ratio="swapped")], ids=repr
)
def test_broken_twins_are_caught(broken, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(broken, target)


@pytest.mark.parametrize("scale", [None, DIAGONAL, FACTOR], ids=["none", "diagonal", "factor"])
def test_the_acceptance_is_that_of_the_proposals_density(scale):
    """From the definition, one chain and one coordinate at a time, in the coordinates where the target is round."""
    energy, sigma = PLANAR[1].energy, 0.7
    factor = torch.eye(2, dtype=torch.float64) if scale is None else (scale if scale.ndim == 2 else scale.diag())
    kernel = Barker(sigma, scale)
    state = kernel.init(energy, PLANAR[1].draw(40, seeded()))
    pair, _ = noise = tuple(z[0] for z in kernel.noise(state, 1, seeded(1)))
    moved, info = kernel.step(energy, state, (pair, torch.zeros(40, dtype=torch.float64)))  # always accepted

    def log_q(w, g):
        return sum(
            math.log(2.0 / (1.0 + math.exp(a * b))) - a * a / (2 * sigma**2) for a, b in zip(w.tolist(), g.tolist())
        )

    inverse = torch.linalg.inv(factor)
    for i in range(40):
        w = inverse @ (moved.x[i] - state.x[i])
        torch.testing.assert_close(w.abs(), sigma * pair[i, 0].abs(), rtol=0, atol=1e-12)
        log_ratio = float(state.energy[i] - moved.energy[i])
        log_ratio += log_q(-w, moved.grad[i] @ factor) - log_q(w, state.grad[i] @ factor)
        assert abs(float(info.acceptance[i]) - min(1.0, math.exp(log_ratio))) < 1e-12
    assert len(noise) == 2


def assert_turns(kernel, slopes):
    """On a slope, how often steps of one length go right: each coordinate, and both; z of 6, 2 false alarms in 10^9."""
    n, g = 40_000, torch.tensor(slopes, dtype=torch.float64)

    def energy(x):
        return x @ g

    state = kernel.init(energy, torch.zeros(n, 2, dtype=torch.float64))
    pair, uniform = (z[0] for z in kernel.noise(state, 1, seeded()))
    pair = torch.stack((torch.ones_like(pair[:, 0]), pair[:, 1]), 1)
    moved, _ = kernel.step(energy, state, (pair, torch.zeros_like(uniform)))
    right = (moved.x > 0).double()
    due = 1.0 / (1.0 + (kernel.step_size * g).exp())
    for seen, p in ((right[:, 0], due[0]), (right[:, 1], due[1]), (right.prod(1), due.prod())):
        z = float((seen.mean() - p) / (p * (1.0 - p) / n).sqrt())
        assert abs(z) < 6.0, f"z = {z:.1f}"


@pytest.mark.parametrize("slopes", [(-1.5, 4.0), (0.0, 2.0), (3.0, 3.0)])
def test_coordinates_turn_downhill_as_often_as_they_should_each_by_itself(slopes):
    assert_turns(Barker(0.5), slopes)
    for broken in (Twin(0.5, uphill=True), Twin(0.5, together=True)):
        with pytest.raises(AssertionError, match="z = "):
            assert_turns(broken, slopes)


@pytest.mark.parametrize("kernel", [Barker(0.6), Barker(0.6, DIAGONAL), Barker(0.6, FACTOR)], ids=repr)
def test_the_contracts_are_kept(kernel, graphs):
    target = PLANAR[1]
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)
    assert_one_graph(kernel, target.energy, start, graphs)


def test_one_gradient_per_step():
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(1)

    gb.sample(energy, Barker(0.1), torch.zeros(3, 2), steps=20, rng=seeded())
    assert len(calls) == 21


def test_images_move_in_groups_or_together(monkeypatch):
    torch.manual_seed(0)
    energy = gb.ConvEnergy((1, 8, 8), (4, 4)).double()
    start = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=seeded())
    scale = torch.full((1, 8, 8), 0.5, dtype=torch.float64)
    whole = gb.sample(energy, Barker(0.1, scale), start, steps=12, rng=seeded(1))
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(0, 4), slice(4, 6)])
    parted = gb.sample(energy, Barker(0.1, scale), start, steps=12, rng=seeded(1))
    assert whole.x.shape == start.shape
    assert float(whole.acceptance.min()) > 0
    torch.testing.assert_close(parted.x, whole.x)


def test_many_chains_use_the_counters(graphs):
    """Compiled noise is drawn step by step too: two blocks of two are one of four."""
    kernel = Barker(0.5)
    state = kernel.init(lambda x: x.square().sum(1), torch.zeros(MANY // 2, 1))
    with wanting(True):
        rng = seeded()
        parts = [kernel.noise(state, 2, rng) for _ in range(2)]
        whole = kernel.noise(state, 4, seeded())
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    z = whole[0].double()
    assert z.shape == (4, MANY // 2, 2, 1)
    # 4 x 32768 products of the two normals: 6 standard errors.
    assert abs(float((z[:, :, 0] * z[:, :, 1]).mean())) < 6.0 / (4 * MANY / 2) ** 0.5


def acceptances(kernel, energy, start):
    return float(gb.sample(energy, kernel, start, steps=20, rng=seeded(1)).acceptance.mean())


@pytest.mark.parametrize(("kind", "low", "high"), [("walk", 0.05, 0.09), ("barker", 0.08, 0.14), ("mala", 0.0, 0.005)])
def test_a_step_sixteen_times_too_long_leaves_an_acceptance_except_to_mala(kind, low, high):
    """Standard deviations 1 and 0.01, steps of the same size sigma.

    Where the thin coordinate wants 0.012 they are accepted by 0.66, 0.87 and 0.87; at 16 times that by 0.066, 0.101 and
    0.001. The mean of 2000 chains of 20 steps has standard errors of 0.003 at most, five of which fit in the bounds.
    """
    make = {"walk": RandomWalk, "barker": Barker, "mala": lambda s: gb.MALA(s * s / 2.0)}[kind]
    spread = torch.tensor([1.0, 0.01], dtype=torch.float64)
    energy = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=spread)
    start = energy.sample(2000, seeded())
    assert acceptances(make(0.012), energy, start) > 0.6
    assert low <= acceptances(make(16 * 0.012), energy, start) < high


@pytest.mark.parametrize(
    ("kernel", "arrives"), [(RandomWalk(0.5), True), (Barker(0.5), True), (gb.MALA(0.125), False)], ids=repr
)
def test_chains_far_out_on_a_quartic_come_in_except_by_mala(kernel, arrives):
    """At x = 20 the slope of x^4 / 4 is 8000: MALA proposes to be at -980 and is never accepted."""
    energy = gb.Energy.of(lambda x: (x**4).sum(1) / 4, (2,))
    out = gb.sample(energy, kernel, torch.full((100, 2), 20.0, dtype=torch.float64), steps=300, rng=seeded(1))
    assert bool((out.x.abs() < 5.0).all()) == arrives
    assert arrives or bool((out.x == 20.0).all())


def test_huge_gradients_do_not_overflow():
    """exp(w g) is beyond float32 by far, and the chains come in at one step size a step."""
    energy = gb.Energy.of(lambda x: 1e6 * x.square().sum(1), (2,))
    out = gb.sample(energy, Barker(1.0), torch.full((50, 2), 100.0), steps=250, rng=seeded())
    assert int(out.nonfinite.sum()) == 0
    assert bool((out.x.abs() < 1.0).all())


def test_tuning_reaches_the_target():
    energy = gb.Gaussian(loc=torch.zeros(30, dtype=torch.float64))
    tuned = tune(energy, Barker(1.0), energy.sample(100, seeded()), rng=seeded(), steps=300)
    assert abs(tuned.acceptance - 0.57) < 0.01 + 5 * tuned.stderr


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_rejected_and_counted(kind):
    def wall(x):
        return torch.where(x[:, 0] > 1.0, float(kind), 0.5 * x.square().sum(1))

    out = gb.sample(wall, Barker(1.0), torch.zeros(64, 2, dtype=torch.float64), steps=50, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert int(out.nonfinite.sum()) > 100
    assert bool((out.acceptance <= 1.0 - out.nonfinite / 50).all())


def test_chains_may_have_step_sizes_of_their_own():
    energy, start = PLANAR[1].energy, PLANAR[1].draw(4, seeded())
    sizes = torch.tensor([0.1, 0.5, 0.1, 0.5], dtype=torch.float64)
    each, one = (gb.sample(energy, Barker(s), start, steps=5, rng=seeded(1)) for s in (sizes, 0.5))
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_step_sizes_are_refused(bad):
    with pytest.raises(OptionError, match=f"step_size is a positive number; got {bad}"):
        Barker(bad)


def test_bad_scales_and_states_are_refused():
    with pytest.raises(OptionError, match="positive finite standard deviations"):
        Barker(0.1, torch.tensor([1.0, 0.0]))
    with pytest.raises(ShapeError, match=r"points of shape \(3,\)"):
        gb.sample(gb.Gaussian(3), Barker(0.1, torch.ones(2)), torch.zeros(4, 3), steps=1, rng=seeded())
    walk = gb.sample(gb.Gaussian(3), RandomWalk(0.1), torch.zeros(4, 3), steps=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match="Barker needs gradients"):
        gb.sample(gb.Gaussian(3), Barker(0.1), walk.state, steps=1, rng=seeded())


def test_settings_are_told():
    assert repr(Barker(0.5, DIAGONAL)) == "Barker(step_size=0.5, scale=<(2,)>)"


@needs_compiler
@pytest.mark.slow
def test_inductor_gives_the_eager_chains():
    energy, start = PLANAR[0].energy, PLANAR[0].draw(7, seeded())
    a, b = (gb.sample(energy, Barker(0.7, FACTOR), start, steps=20, rng=seeded(1), compile=c) for c in (0, 1))
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)
