"""Random-walk Metropolis: exact, without a gradient, and tuned where theory says."""

import dataclasses
import math

import pytest
import torch

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
    ks,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import State, energy_only, metropolis
from gibbsian.kernels.random_walk import RandomWalk
from kernels.test_compiled import needs_compiler

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
PLANAR = TARGETS[:2]


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("step_size", [0.7, 2.0])
def test_the_target_is_left_invariant(target, step_size):
    assert_invariant(RandomWalk(step_size), target)
    assert_reversible(RandomWalk(step_size), target)


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
@pytest.mark.parametrize("target", PLANAR, ids=repr)
def test_a_scale_keeps_it_exact(target, scale):
    assert_invariant(RandomWalk(1.0, scale), target)
    assert_reversible(RandomWalk(1.0, scale), target)


@dataclasses.dataclass(frozen=True)
class LongerStepsFarOut(RandomWalk):
    """The proposal depends on where it starts, and its density is left out of the ratio."""

    def step(self, energy, state, noise):
        z, uniform = noise
        new = energy_only(energy, state.x + self.step_size * (0.5 + state.x.abs()) * z)
        return metropolis(state, new, state.energy - new.energy, uniform)


@dataclasses.dataclass(frozen=True)
class AtTwiceTheTemperature(RandomWalk):
    """Half the difference of energies in the ratio."""

    def step(self, energy, state, noise):
        z, uniform = noise
        new = energy_only(energy, state.x + self.step_size * z)
        return metropolis(state, new, 0.5 * (state.energy - new.energy), uniform)


@dataclasses.dataclass(frozen=True)
class AlwaysAccepted(RandomWalk):
    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[0], torch.zeros_like(noise[1])))


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("broken", [LongerStepsFarOut(0.7), AtTwiceTheTemperature(0.7), AlwaysAccepted(0.2)], ids=repr)
def test_broken_twins_are_caught(broken, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(broken, target)


@pytest.mark.parametrize("kernel", [RandomWalk(0.7), RandomWalk(0.7, FACTOR)], ids=repr)
def test_the_contracts_are_kept(kernel, graphs):
    target = PLANAR[1]
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)
    assert_one_graph(kernel, target.energy, start, graphs)


def staircase(x):
    """A standard normal's energy rounded down to whole nats; nothing in it can be differentiated."""
    with torch.no_grad():
        return (0.5 * x.square().sum(tuple(range(1, x.ndim)))).floor()


def test_energies_need_no_gradient(graphs):
    """The chain finds the law of a staircase, which numbers on a grid give exactly."""
    rng = seeded()
    x = torch.randn((20_000, 1), generator=rng, dtype=torch.float64)
    energy = gb.Energy.of(staircase, (1,))
    out = gb.sample(energy, RandomWalk(2.0), x, steps=60, rng=rng)
    grid = torch.linspace(-8.0, 8.0, 400_001, dtype=torch.float64)
    masses = (-staircase(grid[:, None])).exp().cumsum(0)

    def cdf(v):
        return masses[((v + 8.0) / 16.0 * 400_000).round().long().clamp(0, 400_000)] / masses[-1]

    assert ks(out.x[:, 0], cdf) < 3.1
    # The start, a normal law without steps, is told apart.
    assert ks(x[:, 0], cdf) > 3.1
    assert out.state.grad.shape == (20_000, 0)
    assert_one_graph(RandomWalk(0.5), energy, x[:5], graphs)


def test_log_z_is_annealed_without_a_gradient():
    """Each nat of half the squared radius has area 2 pi, so Z is 2 pi times the sum of exp(-k); 6 standard errors."""
    base = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=3.0)
    found = gb.ais(gb.Energy.of(staircase, (2,)), base, kernel=RandomWalk(1.0), chains=512, rng=seeded())
    truth = math.log(2.0 * math.pi / (1.0 - math.exp(-1.0)))
    assert abs(float(found.value) - truth) < 6.0 * float(found.stderr) < 0.3


def test_one_energy_per_step_and_no_backward_pass():
    calls = []

    def energy(x):
        calls.append(x.requires_grad)
        return x.square().sum(1)

    gb.sample(energy, RandomWalk(0.1), torch.zeros(3, 2), steps=20, rng=seeded())
    assert calls == [False] * 21


@pytest.mark.parametrize("make", [lambda: gb.ConvEnergy((1, 8, 8), (4, 4)).double(), lambda: staircase])
def test_images_move_in_groups_or_together(make, monkeypatch):
    torch.manual_seed(0)
    energy, start = make(), torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=seeded())
    scale = torch.full((1, 8, 8), 0.5, dtype=torch.float64)
    whole = gb.sample(energy, RandomWalk(0.1, scale), start, steps=12, rng=seeded(1))
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(0, 4), slice(4, 6)])
    parted = gb.sample(energy, RandomWalk(0.1, scale), start, steps=12, rng=seeded(1))
    assert whole.x.shape == start.shape
    assert float(whole.acceptance.min()) > 0
    torch.testing.assert_close(parted.x, whole.x)


def test_tuning_finds_the_step_size_that_theory_gives():
    """An acceptance of 0.234 belongs to 2.38 over the root of the dimension; at d = 50, within a few per cent."""
    energy = gb.Gaussian(loc=torch.zeros(50, dtype=torch.float64))
    tuned = tune(energy, RandomWalk(1.0), energy.sample(100, seeded()), rng=seeded(), steps=400)
    assert abs(tuned.acceptance - 0.234) < 0.01 + 5 * tuned.stderr
    assert abs(tuned.kernel.step_size * math.sqrt(50) - 2.38) < 0.15


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_rejected_and_counted(kind):
    def wall(x):
        return torch.where(x[:, 0] > 1.0, float(kind), 0.5 * x.square().sum(1))

    out = gb.sample(wall, RandomWalk(1.0), torch.zeros(64, 2, dtype=torch.float64), steps=50, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert int(out.nonfinite.sum()) > 100
    assert bool((out.acceptance <= 1.0 - out.nonfinite / 50).all())


def test_a_state_with_gradients_serves_and_its_gradient_does_not_outlive_a_move():
    energy = PLANAR[0].energy
    first = gb.sample(energy, gb.MALA(0.3), PLANAR[0].draw(6, seeded()), steps=2, rng=seeded())
    out = gb.sample(energy, RandomWalk(0.5), first.state, steps=12, rng=seeded(1))
    fresh = gb.sample(energy, RandomWalk(0.5), first.x, steps=12, rng=seeded(1))
    assert torch.equal(out.x, fresh.x)
    assert out.state.grad.shape == (6, 0)
    assert isinstance(out.state, State)


def test_chains_may_have_step_sizes_of_their_own():
    energy, start = PLANAR[1].energy, PLANAR[1].draw(4, seeded())
    sizes = torch.tensor([0.1, 0.5, 0.1, 0.5], dtype=torch.float64)
    each, one = (gb.sample(energy, RandomWalk(s), start, steps=5, rng=seeded(1)) for s in (sizes, 0.5))
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_step_sizes_are_refused(bad):
    with pytest.raises(OptionError, match=f"step_size is a positive number; got {bad}"):
        RandomWalk(bad)


def test_bad_scales_are_refused():
    with pytest.raises(OptionError, match="positive finite standard deviations"):
        RandomWalk(0.1, torch.tensor([1.0, 0.0]))
    with pytest.raises(ShapeError, match=r"points of shape \(3,\)"):
        gb.sample(gb.Gaussian(3), RandomWalk(0.1, torch.ones(2)), torch.zeros(4, 3), steps=1, rng=seeded())


def test_settings_are_told():
    assert repr(RandomWalk(0.5, DIAGONAL)) == "RandomWalk(step_size=0.5, scale=<(2,)>)"


@needs_compiler
@pytest.mark.slow
def test_inductor_gives_the_eager_chains():
    energy, start = PLANAR[0].energy, PLANAR[0].draw(7, seeded())
    a, b = (gb.sample(energy, RandomWalk(0.7, FACTOR), start, steps=20, rng=seeded(1), compile=c) for c in (0, 1))
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)
