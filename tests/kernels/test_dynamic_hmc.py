"""HMC of random path length: exact, the same trajectories as HMC's, one graph for all lengths; and tuned paths."""

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
    assert_reversible,
    assert_state_is_current,
    log_exponential,
    seeded,
)
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError, ShapeError
from gibbsian.kernels import dynamic_hmc
from gibbsian.kernels.base import State, evaluate
from gibbsian.kernels.dynamic_hmc import DynamicHMC, trajectory
from gibbsian.kernels.hmc import leapfrog
from gibbsian.path_adaptation import Climb, halton, harmonic_mean, slope, tune_path
from kernels.test_nonfinite import wall

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", [DynamicHMC(0.2, 3.0), DynamicHMC(0.9, 2.5)], ids=repr)
def test_the_target_stays_invariant(kernel, target):
    assert_invariant(kernel, target)
    assert_reversible(kernel, target)


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
def test_a_scale_keeps_it_exact(scale):
    for target in TARGETS[:2]:
        assert_invariant(DynamicHMC(0.5, 2.0, scale=scale), target)


def test_the_contracts_are_kept():
    target, kernel = log_exponential(), DynamicHMC(0.3, 2.0)
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)


@dataclasses.dataclass(frozen=True)
class LongerWhereSteep(DynamicHMC):
    """The number of steps depends on where the chain stands: reversible no more."""

    def step(self, energy, state, noise):
        h = torch.where(state.x[:, 0] > 0, 2.0 * self.step_size, self.step_size)
        return dataclasses.replace(self, step_size=h).step_of(energy, state, noise)

    def step_of(self, energy, state, noise):
        return DynamicHMC.step(self, energy, state, noise)


@dataclasses.dataclass(frozen=True)
class HotMomenta(DynamicHMC):
    """Momenta of standard deviation 1.3."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (1.3 * noise[0], *noise[1:]))


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", [LongerWhereSteep(0.4, 1.2), HotMomenta(0.35, 1.4)], ids=repr)
def test_the_invariance_test_catches_broken_twins(kernel, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(kernel, target)


def test_a_trajectory_without_the_closing_half_kick_is_caught(monkeypatch):
    real = dynamic_hmc.glide

    def lopsided(energy, state, v, h, scale, left):
        new, v = real(energy, state, v, h, scale, left)
        return new, v - 0.2 * h * new.grad

    monkeypatch.setattr(dynamic_hmc, "glide", lopsided)
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(DynamicHMC(0.7, 2.0), TARGETS[0])


@pytest.mark.parametrize("scale", [None, DIAGONAL, FACTOR], ids=["none", "diagonal", "factor"])
def test_trajectories_are_those_of_leapfrog_whatever_the_blocks(scale):
    target = log_exponential()
    x, v = target.draw(20, seeded()), torch.randn((20, 2), generator=seeded(1), dtype=torch.float64)
    start = State(x, *evaluate(target.energy, x))
    kernel = DynamicHMC(0.1, 2.0, scale=scale)
    for share, steps in ((0.0, 1), (0.04, 1), (0.11, 3), (0.249, 5), (0.26, 6), (0.49, 10), (0.99, 20)):
        end, v_end, made = trajectory(target.energy, kernel, start, v, torch.tensor(share, dtype=torch.float64))
        plain, v_plain = leapfrog(target.energy, start, v, 0.1, steps, scale)
        assert int(made) == steps
        torch.testing.assert_close(end.x, plain.x, rtol=0, atol=1e-12)
        torch.testing.assert_close(end.energy, plain.energy, rtol=0, atol=1e-12)
        torch.testing.assert_close(v_end, v_plain, rtol=0, atol=1e-12)


def test_lengths_are_uniform_and_shared_and_have_an_upper_end():
    energy = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64))
    kept = gb.sample(energy, DynamicHMC(0.1, 1.0), torch.zeros(3, 2).double(), steps=2000, thin=1, rng=seeded()).kept
    counts = kept["leapfrog_steps"]
    assert bool((counts == counts[:, :1]).all())
    # Each of 1 to 10 is due 200 times, with a standard deviation of 13.4; 6 of those are 1 false alarm in 5 * 10^7.
    assert bool((torch.bincount(counts[:, 0].long(), minlength=11)[1:] - 200).abs().max() < 6 * 13.4)
    few = gb.sample(energy, DynamicHMC(0.1, 1e6, max_leapfrog=7), torch.zeros(3, 2).double(), steps=9, rng=seeded())
    assert float(few.details["leapfrog_steps"].max()) <= 7.0


def test_chains_may_have_step_sizes_of_their_own():
    energy = TARGETS[0].energy
    start = torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
    sizes = torch.tensor([0.1, 0.2, 0.3, 0.2], dtype=torch.float64)
    each = gb.sample(energy, DynamicHMC(sizes, 1.5), start, steps=5, rng=seeded(1))
    one = gb.sample(energy, DynamicHMC(0.2, 1.5), start, steps=5, rng=seeded(1))
    torch.testing.assert_close(each.x[sizes == 0.2], one.x[sizes == 0.2], rtol=0, atol=1e-12)
    assert not torch.allclose(each.x[0], one.x[0])


@pytest.mark.parametrize("scale", [None, FACTOR], ids=["none", "factor"])
def test_two_graphs_serve_every_length(scale, graphs):
    energy = gb.Gaussian(covariance=torch.tensor([[1.0, 0.4], [0.4, 0.64]], dtype=torch.float64))
    start = energy.sample(5, seeded())
    kernel = DynamicHMC(0.1, 2.0, scale=scale)
    eager, compiled = (
        gb.sample(energy, kernel, start, steps=9, rng=seeded(1), thin=1, compile=compile) for compile in (False, True)
    )
    # A block of leapfrog steps, and the accept/reject step.
    assert graphs() == 2
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled.acceptance, eager.acceptance, rtol=0, atol=1e-12)
    gb.sample(energy, DynamicHMC(0.07, 5.0, scale=scale), compiled.state, steps=20, rng=seeded(2), compile=True)
    tune_path(energy, DynamicHMC(0.07, 1.0, scale=scale), compiled.state, rng=seeded(2), steps=5, compile=True)
    assert graphs() == 0


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
def test_trajectories_without_numbers_are_rejected_and_counted(kind):
    out = gb.sample(wall(kind), DynamicHMC(0.4, 2.0), torch.zeros(64, 2).double(), steps=40, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert float(out.nonfinite.mean()) > 1.0
    assert bool((out.acceptance <= 1.0 - out.nonfinite / 40).all())


def round_gaussian(dim, spread=1.0):
    return gb.Gaussian(loc=torch.zeros(dim, dtype=torch.float64), scale=torch.full((dim,), spread, dtype=torch.float64))


def test_the_slope_is_the_criterions_derivative():
    """Against central differences along exact trajectories; antithetic pairs make the means over chains exactly 0."""
    half = torch.randn(2, 500, 3, generator=seeded(), dtype=torch.float64)
    y, v = (torch.cat((z, -z)) for z in half)

    def end(t):
        return y * math.cos(t) + v * math.sin(t), v * math.cos(t) - y * math.sin(t)

    def criterion(t):
        return float(0.25 * (end(t)[0].square().sum(1) - y.square().sum(1)).square().mean())

    for t in (0.4, 1.2, 2.0, 2.8):
        numeric = (criterion(t + 1e-5) - criterion(t - 1e-5)) / 2e-5
        assert abs(slope(None, y, *end(t), torch.ones(1000).double()) - numeric) < 1e-7
        stretched = (end(t)[0] * 2.0, end(t)[1])
        scale = 2.0 * torch.eye(3, dtype=torch.float64)
        for given in (scale, scale.diagonal()):
            assert abs(slope(given, 2.0 * y, *stretched, torch.ones(1000).double()) - numeric) < 1e-7
    lost = torch.ones(1000).double()
    lost[7] = 0.0
    broken = end(1.0)[0].index_fill(0, torch.tensor([7]), torch.nan)
    assert math.isfinite(slope(None, y, broken, end(1.0)[1], lost))


@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_the_path_of_a_round_gaussian_is_the_known_one(spread):
    r"""With small steps, u uniform, C is the mean of sin^2(uT / s): highest where tan(2T/s) = 2T/s, T = 2.2467 s."""
    energy = round_gaussian(5, spread)
    tuned = tune_path(
        energy, DynamicHMC(0.1, 0.5 * spread), energy.sample(200, seeded()), rng=seeded(1), steps=300, target=0.97
    )
    assert abs(tuned.kernel.path_length / spread - 2.2467) < 0.35
    assert tuned.acceptance > 0.96


def test_a_scale_makes_the_path_that_of_a_round_target():
    spread = torch.tensor([0.01, 1.0, 30.0, 2.0], dtype=torch.float64)
    energy = gb.Gaussian(loc=torch.zeros(4, dtype=torch.float64), scale=spread)
    start = energy.sample(100, seeded())
    tuned = tune_path(energy, DynamicHMC(0.1, 0.5, scale=spread), start, rng=seeded(1), steps=250, target=0.95)
    assert 1.5 < tuned.kernel.path_length < 3.0
    assert torch.equal(tuned.kernel.scale, spread)


def test_the_acceptance_is_reached_as_a_harmonic_mean():
    energy = round_gaussian(50)
    tuned = tune_path(energy, DynamicHMC(0.01, 1.0), energy.sample(64, seeded()), rng=seeded(1), steps=200)
    chains = energy.sample(2000, seeded(2))
    rng, harmonic = seeded(3), []
    for _ in range(30):
        made = gb.sample(energy, tuned.kernel, chains, steps=1, rng=rng)
        harmonic.append(harmonic_mean(made.acceptance))
    assert abs(sum(harmonic) / 30 - 0.651) < 0.08
    assert tuned.acceptance > 0.651
    assert len(tuned.step_sizes) == 200


def test_parts_of_the_adaptation():
    assert [halton(t) for t in range(1, 8)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert harmonic_mean(torch.tensor([1.0, 0.5])) == pytest.approx(2.0 / 3.0)
    assert 0.0 < harmonic_mean(torch.tensor([1.0, 0.0, torch.nan])) < 0.01
    climb = Climb(0.0)
    climb.update(math.nan)
    assert climb.log_path == 0.0
    for _ in range(300):
        climb.update(2.0 - climb.log_path)
    assert abs(climb.log_path - 2.0) < 0.1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DynamicHMC(0.0, 1.0), OptionError, "step_size is a positive number; got 0.0"),
        (lambda: DynamicHMC(0.1, -1.0), OptionError, "path_length is a positive number; got -1.0"),
        (lambda: DynamicHMC(0.1, 1.0, max_leapfrog=0), OptionError, "max_leapfrog counts .*; got 0"),
        (lambda: tuned_path(gb.HMC(0.1)), ArgumentTypeError, r"tunes DynamicHMC.*; got HMC"),
        (lambda: tuned_path(DynamicHMC(0.1, 1.0), chains=1), ShapeError, "needs 2 or more, better 64; got 1"),
        (lambda: tuned_path(DynamicHMC(0.1, 1.0), target=1.0), OptionError, "strictly between 0 and 1; got 1.0"),
        (lambda: tuned_path(DynamicHMC(0.1, 1.0), steps=0), OptionError, "steps is 1 or more; got 0"),
        (
            lambda: tuned_path(DynamicHMC(0.1, 1.0), energy=lambda x: 0.0 * x.sum(1)),
            DivergenceError,
            "Every step size is accepted",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def tuned_path(kernel, chains=4, energy=None, **options):
    return tune_path(energy or gb.Gaussian(2), kernel, torch.zeros(chains, 2), rng=seeded(), **options)
