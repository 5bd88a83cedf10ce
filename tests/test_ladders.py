"""Ladders: equal rejections against their closed form, round trips as predicted, and forty modes from one of them."""

import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.tempering import ParallelTempering, replicas_of
from gibbsian.ladders import interpolated, predicted_round_trips, swap_acceptance, tune_ladder
from gibbsian.partition.smc import smc

TARGET = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64))
BETAS = [1.0, 0.9, 0.8, 0.5, 0.01]


@pytest.fixture(scope="module")
def tuned():
    start = TARGET.sample(400, seeded())
    return tune_ladder(TARGET, ParallelTempering(gb.MALA(0.01), BETAS), start, rng=seeded(1), rounds=5)


def test_a_gaussians_ladder_becomes_geometric(tuned):
    """Swaps of planar Gaussians depend on the ratio of their temperatures alone: acceptance 2 a / (1 + a)."""
    logs = tuned.kernel.betas.log()
    torch.testing.assert_close(logs, torch.linspace(0.0, math.log(0.01), 5, dtype=torch.float64), rtol=0, atol=0.15)
    a = 0.01**0.25
    expected = torch.full((4,), 2 * a / (1 + a), dtype=torch.float64)
    torch.testing.assert_close(tuned.swaps, expected, rtol=0, atol=0.03)
    assert tuned.barrier == pytest.approx(4 * (1 - a) / (1 + a), abs=0.08)


def test_every_level_has_the_step_size_of_its_width(tuned):
    """MALA's step is a squared length: in proportion to 1 / beta."""
    assert bool(((tuned.acceptance - 0.574).abs() < 0.06).all())
    sizes = tuned.kernel.step_sizes * tuned.kernel.betas
    assert float(sizes.max() / sizes.min()) < 1.3


def test_round_trips_come_as_predicted(tuned):
    """The prediction takes points of one level for independent in time, which those of good steps nearly are."""
    out = gb.sample(TARGET, tuned.kernel, tuned.state, steps=1000, rng=seeded(2))
    found = float(out.details["round_trips"].mean())
    assert tuned.round_trip_rate == pytest.approx(predicted_round_trips(tuned.swaps))
    assert 0.75 * tuned.round_trip_rate < found < 1.05 * tuned.round_trip_rate


def test_the_prediction_in_closed_form():
    assert predicted_round_trips(torch.ones(5)) == 0.5
    assert predicted_round_trips(torch.full((4,), 0.5)) == pytest.approx(1 / 10)
    assert predicted_round_trips(torch.tensor([0.25])) == pytest.approx(0.25)


def test_mean_acceptance_counts_the_turns_of_each_pair():
    kernel = ParallelTempering(gb.MALA(0.1), [1.0, 0.999999, 0.999998, 0.999997])
    for steps in (1, 2, 3, 10, 11):
        state = gb.sample(TARGET, kernel, TARGET.sample(3, seeded()), steps=steps, rng=seeded()).state
        turns = 1 if steps > 1 else 0
        expected = torch.tensor([1.0, turns, 1.0], dtype=torch.float64)
        torch.testing.assert_close(swap_acceptance(state), expected, rtol=0, atol=1e-4)


def test_a_ladder_is_resized_to_the_barrier():
    wide = gb.Gaussian(loc=torch.zeros(20, dtype=torch.float64))
    start = wide.sample(100, seeded())
    kernel = ParallelTempering(gb.HMC(0.5, leapfrog=3), [1.0, 0.01])
    out = tune_ladder(wide, kernel, start, rng=seeded(1), rounds=5, resize=True)
    assert abs(len(out.kernel.betas) - (2 * out.barrier + 1)) <= 2
    assert bool(((out.swaps - 0.5).abs() < 0.12).all())
    assert replicas_of(out.state).x.shape == (100, len(out.kernel.betas), 20)


def test_a_kernel_without_a_step_size_is_tuned_in_temperature_alone():
    class Frozen:
        gradients, domain = 1, "real"

        def init(self, energy, x):
            return gb.MALA(0.5).init(energy, x)

        def noise(self, state, steps, rng):
            return gb.MALA(0.5).noise(state, steps, rng)

        def step(self, energy, state, noise):
            return gb.MALA(0.5).step(energy, state, noise)

    kernel = ParallelTempering(Frozen(), [1.0, 0.9, 0.2])
    out = tune_ladder(TARGET, kernel, TARGET.sample(100, seeded()), rng=seeded(1), rounds=3)
    assert out.kernel.step_sizes is None
    assert float((out.swaps[0] - out.swaps[1]).abs()) < 0.1


def test_a_table_is_read_linearly():
    knots = torch.tensor([0.0, 1.0, 3.0])
    assert interpolated(torch.tensor([0.0, 0.5, 2.0, 3.0]), knots, knots**2).tolist() == [0.0, 0.5, 5.0, 9.0]


def test_what_cannot_be_tuned_is_refused():
    x = TARGET.sample(3, seeded())
    with pytest.raises(ArgumentTypeError, match=r"tunes ParallelTempering\(kernel, betas\); got MALA"):
        tune_ladder(TARGET, gb.MALA(0.1), x, rng=seeded())
    kernel = ParallelTempering(gb.MALA(0.1), [1.0, 0.5])
    with pytest.raises(OptionError, match="1 or more rounds, the first of 16 or more steps; got 0 and 32"):
        tune_ladder(TARGET, kernel, x, rng=seeded(), rounds=0)
    with pytest.raises(OptionError, match="got 6 and 8"):
        tune_ladder(TARGET, kernel, x, rng=seeded(), steps=8)


def forty_modes():
    """Forty planar Gaussians in [-40, 40]^2 of scale softplus(1), and the shares of points nearest to each centre."""
    locs = (torch.rand(40, 2, generator=seeded(), dtype=torch.float64) - 0.5) * 80.0
    energy = gb.GaussianMixture(locs, math.log1p(math.e))
    many = energy.sample(1_000_000, seeded(5))
    return locs, energy, shares(many, locs).mean(0)


def shares(x, locs):
    return torch.nn.functional.one_hot(torch.cdist(x, locs).argmin(1), len(locs)).double()


def assert_forty_modes(found, errors, exact):
    """Chi-square of 39 degrees of freedom; 110 is exceeded by chance once in 10^7."""
    assert float((40.0 * found).min()) > 0.5
    chi_square = float(((found - exact) / errors).square().sum()) * 39 / 40
    assert chi_square < 110.0, chi_square


@pytest.mark.slow
def test_tempering_finds_forty_modes_from_one():
    """All chains start in one mode; shares per chain are independent, and their spread is the error."""
    locs, energy, exact = forty_modes()
    rng = seeded(1)
    base = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=40.0)
    kernel = ParallelTempering(gb.MALA(1.0), [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0], base=base)
    start = locs[:1] + torch.randn(64, 2, generator=rng, dtype=torch.float64)
    ladder = tune_ladder(energy, kernel, start, rng=rng, resize=True)
    out = gb.sample(energy, ladder.kernel, ladder.state, steps=2000, rng=rng, thin=1)
    each = shares(out.draws.flatten(0, 1), locs).view(2000, 64, 40).mean(0)
    assert_forty_modes(each.mean(0), each.std(0) / 8.0, exact)
    assert float(out.details["round_trips"].mean()) > 0.5 * ladder.round_trip_rate
    # MALA alone stays where it started.
    alone = gb.sample(energy, gb.MALA(ladder.kernel.step_sizes[0]), start, steps=500, rng=rng)
    assert float(shares(alone.x, locs)[:, 0].mean()) > 0.7


@pytest.mark.slow
def test_sequential_monte_carlo_finds_forty_modes():
    """Shares as ratios over 32 populations, with the error of a ratio; log Z is 0."""
    locs, energy, exact = forty_modes()
    base = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=30.0)
    out = smc(energy, base, rng=seeded(1), chains=2**13, populations=32)
    w = out.log_weights.exp().view(32, -1)
    parts, whole = (w[..., None] * shares(out.x, locs).view(32, -1, 40)).sum(1), w.sum(1)
    found = parts.sum(0) / whole.sum()
    errors = (parts - found * whole[:, None]).square().sum(0).mul(32 / 31).sqrt() / whole.sum()
    assert_forty_modes(found, errors, exact)
    assert abs(float(out.log_z.value / out.log_z.stderr)) < 7.0
