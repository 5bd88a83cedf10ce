"""Sequential Monte Carlo: log Z within its own error, particles with the target's law, and one walk with the pilot run.

With P populations the error of log Z has P - 1 degrees of freedom; 64 of them, and a limit of 6 standard errors, make a
false alarm of Student's law 1e-7.
"""

import math

import pytest
import torch
from torch.distributions import constraints

import gibbsian as gb
from contracts import seeded
from gibbsian.diagnostics.two_sample import kernel_mmd
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError
from gibbsian.partition.base import effective_size
from gibbsian.partition.population import conditional_size, systematic
from gibbsian.partition.schedule import Schedule
from gibbsian.partition.smc import smc

BASE = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=3.0)
LOCS = torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, -4.0]], dtype=torch.float64)
MODES = gb.GaussianMixture(LOCS, 0.5, weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def shifted(energy, by):
    """An energy whose log Z is off by a constant."""
    return gb.Energy.of(lambda x: energy(x) - by, (2,))


def assert_within_error(log_z, truth, limit=6.0):
    z = float((log_z.value - truth) / log_z.stderr)
    assert abs(z) < limit, f"{log_z} is {z:.1f} standard errors from {truth:.4f}"


def run(energy, seed=0, chains=4096, populations=64, **options):
    return smc(energy, BASE, rng=seeded(seed), chains=chains, populations=populations, **options)


@pytest.mark.parametrize(
    "energy", [MODES, gb.Gaussian(loc=torch.ones(2, dtype=torch.float64), scale=0.1)], ids=["modes", "thin"]
)
def test_log_z_is_within_its_own_error(energy):
    out = run(shifted(energy, 7.5))
    assert_within_error(out.log_z, 7.5)
    assert float(out.log_z.stderr) < 0.1
    assert float(out.log_z.lower) == -math.inf
    assert float(out.log_z.upper) == math.inf


def test_a_given_schedule_is_kept_and_gives_a_bound():
    first = run(shifted(MODES, 7.5), chains=2048)
    again = run(shifted(MODES, 7.5), seed=1, chains=2048, schedule=first.schedule)
    assert again.schedule is first.schedule
    assert len(again.ess) == len(first.ess) == len(first.schedule.betas) - 1
    assert_within_error(again.log_z, 7.5)
    assert 7.5 - 1.0 < float(again.log_z.lower) < 7.5
    plain = run(MODES, chains=256, populations=2, schedule=Schedule.linear(3), kernel=gb.MALA(0.2))
    assert len(plain.acceptance) == 3


def test_many_short_runs_are_unbiased_in_z():
    """The mean of 400 independent estimates of Z from 8 particles each, within 5.5 of its own standard errors.

    A schedule is given, so that no bias is left; the same estimates without half of their weights would be off.
    """
    schedule = Schedule(torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64))
    out = run(MODES, chains=3200, populations=400, schedule=schedule, kernel=gb.MALA(0.3), resample=1.0)
    z = (out.log_weights.view(400, 8).logsumexp(1) - math.log(8)).exp()
    error = float((z.mean() - 1.0) / (z.std() / 20.0))
    assert abs(error) < 5.5, f"{float(z.mean()):.3f} is {error:.1f} standard errors from 1"


def test_particles_have_the_targets_law():
    """Shares of three modes within 6 standard errors over the populations; a two-sample distance of equal draws."""
    out = run(MODES, chains=8192)
    w = out.log_weights.exp().view(64, -1)
    near = torch.cdist(out.x, LOCS).argmin(1).view(64, -1)
    for k, p in enumerate((0.5, 0.3, 0.2)):
        part, whole = (w * (near == k)).sum(1), w.sum(1)
        share = part.sum() / whole.sum()
        stderr = (part - share * whole).std() * 8.0 / whole.sum()
        assert abs(float((share - p) / stderr)) < 6.0, f"share {float(share):.3f} of mode {k}"
    exact = MODES.sample(2000, seeded(2))
    distance, wrong = (kernel_mmd(rows, exact) for rows in (out.draw(2000, seeded(1)), BASE.sample(2000, seeded(3))))
    # Of equal laws the distance is as often below zero as above, with an error of 1 / n; populations that chance has
    # given uneven weights add to it.
    assert distance.value < 0.2 * wrong.value, f"{distance} where the base is at {wrong}"
    assert abs(distance.value) < 5.0 * distance.stderr


@pytest.mark.filterwarnings("ignore:The populations disagree")
def test_forgotten_weights_are_caught(monkeypatch):
    """Twin: what particles gained since they were last resampled is not in the estimate."""
    from gibbsian.partition import population

    honest = population.weigh

    def forgetful(at, gained, resample, rng):
        before = at.log_z
        honest(at, gained, resample, rng)
        at.log_z = torch.where(at.log_w.abs().sum(1) > 0, before, at.log_z)

    monkeypatch.setattr(population, "weigh", forgetful)
    out = run(shifted(MODES, 7.5))
    with pytest.raises(AssertionError, match="standard errors from"):
        assert_within_error(out.log_z, 7.5)


def test_discrete_states_need_and_take_a_discrete_kernel():
    base = gb.Bernoulli(logits=torch.zeros(3, dtype=torch.float64))
    energy = gb.Energy.of(lambda x: -2.0 * x.prod(1) + x.sum(1), (3,), constraints.boolean)
    with pytest.raises(OptionError, match="give a discrete kernel"):
        smc(energy, base, rng=seeded())
    with pytest.raises(DomainError):
        smc(energy, base, rng=seeded(), kernel=gb.MALA(0.1))


def test_energies_that_are_infinite_in_places_lose_their_particles_there():
    def half(x):
        return torch.where(x[:, 0] > 0, BASE(x), torch.inf)

    out = run(gb.Energy.of(half, (2,)), chains=2048)
    assert out.nonfinite > 0
    assert_within_error(out.log_z, math.log(0.5))
    assert bool((out.draw(500, seeded(1))[:, 0] > 0).all())


def test_an_energy_that_is_nowhere_finite_is_refused():
    with pytest.raises(DivergenceError, match="infinite or NaN at all 256 points"):
        run(gb.Energy.of(lambda x: x.sum(1) * math.nan, (2,)), chains=256)


def test_populations_that_disagree_are_told():
    schedule = Schedule.linear(1)
    with pytest.warns(RuntimeWarning, match="The populations disagree"):
        run(gb.Gaussian(loc=torch.full((2,), 8.0, dtype=torch.float64), scale=0.1), schedule=schedule, chains=256)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"populations": 1}, OptionError, "populations, which are 2 or more"),
        ({"chains": 100}, OptionError, "got chains=100 and populations=64"),
        ({"moves": 0}, OptionError, "moves counts .* got 0"),
        ({"spare": 1.0}, OptionError, "spare lies strictly between 0 and 1"),
        ({"resample": 0.0}, OptionError, "resample above 0, 1 at most"),
        ({"kernel": gb.ULA(0.1)}, OptionError, "leaves each density invariant"),
        ({"kernel": gb.MALA}, ArgumentTypeError, "needs init, noise and step|kernel"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(MODES, **options)


def test_the_conditional_size_is_the_effective_size_of_equal_particles():
    gained = torch.randn(50, generator=seeded(), dtype=torch.float64)
    equal = torch.full((50,), -3.0, dtype=torch.float64)
    assert conditional_size(equal, gained) == pytest.approx(float(effective_size(gained)) / 50, rel=1e-12)
    carried = torch.randn(50, generator=seeded(1), dtype=torch.float64)
    w, g = carried.softmax(0), gained.exp()
    slow = float((w * g).sum() ** 2 / (w * g * g).sum())
    assert conditional_size(carried, gained) == pytest.approx(slow, rel=1e-12)


def test_systematic_resampling_keeps_counts_within_one_of_their_mean():
    log_w = torch.randn((3, 40), generator=seeded(), dtype=torch.float64)
    picked = systematic(log_w, seeded(1))
    for row, w in zip(picked, log_w.softmax(1)):
        counts = torch.bincount(row, minlength=40)
        assert bool(((counts - 40 * w).abs() < 1.0).all())
    assert systematic(log_w[0], seeded(1), 7).shape == (7,)
