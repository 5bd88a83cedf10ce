"""Corrected draws of a generator are draws of the data, where generator and discriminator are known in closed form.

The generator is linear, so that its density is Gaussian; the data are a mixture of two; the discriminator is the exact
log-ratio of the two. Draws are compared with the masses of squares by a chi-square test, which fails below a p-value of
1e-7: one false alarm in ten million.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gibbsian import MLP
from gibbsian.bridges import discriminators as checks
from gibbsian.bridges import gans
from gibbsian.bridges.discriminators import calibrate_discriminator
from gibbsian.bridges.gans import ddls, metropolis_hastings, rejection
from gibbsian.energies import discriminators
from gibbsian.energies.base import Energy
from gibbsian.energies.discriminators import Discriminator
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.networks import Dense
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, DataError, DomainError, OptionError, ShapeError
from gibbsian.kernels.langevin import MALA, ULA
from oracles import P_LIMIT, Z_LIMIT, cell_masses, fit_p_value

D = torch.float64
MATRIX, SHIFT = torch.tensor([[1.3, 0.4], [0.0, 1.0]], dtype=D), torch.tensor([0.2, -0.1], dtype=D)
LAW = Gaussian(loc=SHIFT, covariance=MATRIX @ MATRIX.T)
DATA = GaussianMixture(
    torch.tensor([[-1.0, -0.3], [0.9, 0.5]], dtype=D), 0.5, weights=torch.tensor([0.3, 0.7], dtype=D)
)
EXACT = DATA - LAW
"""The energy of the exact discriminator: -log of the data's density over the generator's."""

MASSES = cell_masses(DATA.log_prob, -3.0, 3.0, 12)
N = 4000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear():
    net = nn.Linear(2, 2, dtype=D)
    with torch.no_grad():
        net.weight.copy_(MATRIX)
        net.bias.copy_(SHIFT)
    return GeneratorNetwork(net, 2, Gaussian(loc=torch.zeros(2, dtype=D)))


GENERATOR = linear()


def by_mala(energy, generator=GENERATOR):
    return ddls(energy, generator, N, rng=seeded(1), steps=60, kernel=MALA(0.15), tuning=1)


def by_chains(energy, generator=GENERATOR):
    return metropolis_hastings(energy, generator, N, rng=seeded(2), steps=60)


def by_chains_from_rows(energy, generator=GENERATOR):
    return metropolis_hastings(energy, generator, N, rng=seeded(3), steps=60, start=DATA.sample(500, seeded(4)))


def by_rejection(energy, generator=GENERATOR, **options):
    return rejection(energy, generator, N, rng=seeded(5), **options)


WAYS = [by_mala, by_chains, by_chains_from_rows, by_rejection]


def p_value(draws):
    return fit_p_value(draws.x, MASSES, -3.0, 3.0)


def test_the_generator_alone_is_far_from_the_data():
    assert fit_p_value(GENERATOR.sample(N, seeded()).detach(), MASSES, -3.0, 3.0) < P_LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_corrected_draws_are_draws_of_the_data(way):
    draws = way(EXACT)
    assert draws.x.shape == (N, 2)
    torch.testing.assert_close(draws.x, GENERATOR(draws.z).detach())
    assert p_value(draws) > P_LIMIT
    assert draws.nonfinite == 0
    assert 0.05 < draws.acceptance.value < 0.98
    assert "acceptance" in repr(draws)


@pytest.mark.parametrize("way", WAYS)
def test_the_probability_in_place_of_the_logit_is_caught(way, monkeypatch):
    """It is refused by name; with the check taken out, the draws are wrong."""
    wrong = Energy.of(lambda x: -torch.sigmoid(-EXACT(x)), event_shape=(2,))
    with pytest.raises(DomainError, match="are probabilities"):
        way(wrong)
    monkeypatch.setattr(checks, "check_discriminator", lambda energy, x: None)
    assert p_value(way(wrong)) < P_LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_the_log_probability_in_place_of_the_logit_is_caught(way):
    """The acceptance D(x') / D(x), without the odds."""
    assert p_value(way(Energy.of(lambda x: torch.nn.functional.softplus(EXACT(x)), event_shape=(2,)))) < P_LIMIT


def test_a_latent_energy_without_its_prior_is_caught(monkeypatch):
    def forward(self, z):
        return self.discriminator(self.generator(z))

    monkeypatch.setattr(discriminators.LatentDiscriminator, "forward", forward)
    assert p_value(by_mala(EXACT)) < P_LIMIT


def test_rejection_without_the_odds_of_its_probability_is_caught(monkeypatch):
    """The twin that accepts with the sigmoid of d - M."""
    monkeypatch.setattr(gans, "_odds", lambda d, bound: d - bound)
    assert p_value(by_rejection(EXACT)) < P_LIMIT


def test_a_bound_that_is_raised_late_judges_earlier_draws_again(monkeypatch):
    assert p_value(by_rejection(EXACT, pilot=1)) > P_LIMIT
    # The twin keeps the first bound.
    monkeypatch.setattr(gans, "max", lambda first, later: first, raising=False)
    assert p_value(by_rejection(EXACT, pilot=1)) < P_LIMIT


def test_acceptances_are_the_exact_ones():
    """Rejection accepts exp(-M); chains the mean over pairs of exact draws of data and generator."""
    draws = by_rejection(EXACT)
    assert abs(draws.acceptance.value - math.exp(-draws.log_bound)) < Z_LIMIT * draws.acceptance.stderr
    grid = torch.cartesian_prod(*[torch.linspace(-4.0, 4.0, 400, dtype=D)] * 2)
    assert draws.log_bound == pytest.approx(float((-EXACT(grid)).max()), abs=0.02)
    rng = seeded(8)
    here, there = -EXACT(DATA.sample(100_000, rng)), -EXACT(GENERATOR.sample(100_000, rng)).detach()
    pairs = (there - here).exp().clamp(max=1.0)
    chains = metropolis_hastings(EXACT, GENERATOR, N, rng=seeded(2), steps=60, start=DATA.sample(N, seeded(4)))
    error = math.hypot(chains.acceptance.stderr, float(pairs.std()) / 100_000**0.5)
    assert abs(chains.acceptance.value - float(pairs.mean())) < Z_LIMIT * error


def test_a_shift_accepts_more_and_corrects_less():
    exact, more = (rejection(EXACT, GENERATOR, 1000, rng=seeded(1), **o) for o in ({}, {"gamma": -3.0}))
    quarter = rejection(EXACT, GENERATOR, 1000, rng=seeded(1), quantile=0.75)
    assert more.acceptance.value > exact.acceptance.value
    energies = [float(EXACT(draws.x).mean()) for draws in (exact, more)]
    assert energies[0] < energies[1] < float(EXACT(GENERATOR.sample(1000, seeded())).mean().detach())
    assert 0.2 < quarter.acceptance.value < 0.5


def test_a_tuned_kernel_and_an_unadjusted_one():
    tuned = ddls(EXACT, GENERATOR, N, rng=seeded(1), steps=30)
    assert p_value(tuned) > P_LIMIT
    assert 0.4 < tuned.acceptance.value < 0.75
    assert ddls(EXACT, GENERATOR, 50, rng=seeded(1), steps=5, kernel=ULA(0.01)).acceptance.value == 1.0


def test_draws_repeat_and_chains_never_return_real_rows():
    rows = torch.full((3, 2), 0.9, dtype=D)
    a, b = (metropolis_hastings(EXACT, GENERATOR, 200, rng=seeded(1), steps=3, start=rows) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert not bool((a.x == 0.9).any())
    assert bool(a.z.isfinite().all())


def miscalibrated():
    """Half the logit, and a constant: slope 2 and offset 1.4 mend it."""
    return Energy.of(lambda x: 0.5 * EXACT(x) + 0.7, event_shape=(2,))


def test_calibration_finds_slope_and_offset_and_mends_the_draws():
    rows = DATA.sample(4000, seeded(11))
    found = calibrate_discriminator(miscalibrated(), GENERATOR, rows, rng=seeded(12))
    for estimate, truth in ((found.slope, 2.0), (found.offset, 1.4)):
        assert abs(estimate.value - truth) < Z_LIMIT * estimate.stderr
        assert estimate.stderr < 0.1
    assert found.z > 10
    assert found.loss_after < found.loss_before
    assert p_value(by_mala(miscalibrated())) < P_LIMIT
    good = calibrate_discriminator(EXACT, GENERATOR, rows, rng=seeded(12))
    assert abs(good.z) < Z_LIMIT
    # The error of the slope, 0.03, is nothing to 4000 draws.
    assert p_value(by_rejection(found.energy)) > P_LIMIT


def test_errors_of_the_calibration_are_their_scatter():
    """48 repeats: the variance of z-scores is within five of its errors, 1 +- 5 sqrt(2 / 47)."""
    z = []
    for seed in range(48):
        found = calibrate_discriminator(EXACT, GENERATOR, DATA.sample(500, seeded(seed)), rng=seeded(100 + seed))
        z.append((found.slope.value - 1.0) / found.slope.stderr)
    assert float(torch.tensor(z).var()) < 1.0 + 5.0 * math.sqrt(2.0 / 47)
    assert float(torch.tensor(z).var()) > 0.3


def test_no_acceptance_says_what_to_do():
    far = Energy.of(lambda x: 30.0 * (x - 3.0).square().sum(1), event_shape=(2,))
    with pytest.raises(OptionError, match=r"accepted \d+ of 20000 draws, and 500 were.*gamma below 0.*use ddls"):
        rejection(far, GENERATOR, 500, rng=seeded(), most=20_000)
    rows = torch.full((10, 2), 3.0, dtype=D)
    best = Energy.of(lambda x: 1e4 * (x - 3.0).square().sum(1), event_shape=(2,))
    with pytest.raises(OptionError, match=r"accepted .* of their proposals.*Calibrate it.*ddls"):
        metropolis_hastings(best, GENERATOR, 50, rng=seeded(), steps=50, start=rows)
    with pytest.raises(OptionError, match=r"MALA.* accepted .*smaller step_size"):
        ddls(EXACT, GENERATOR, 50, rng=seeded(), steps=5, kernel=MALA(1e4))


def test_what_does_not_fit_is_refused():
    net = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()).double()
    rows = DATA.sample(100, seeded())
    ways = [
        lambda d, g: rejection(d, g, 10, rng=seeded()),
        lambda d, g: metropolis_hastings(d, g, 10, rng=seeded()),
        lambda d, g: ddls(d, g, 10, rng=seeded()),
        lambda d, g: calibrate_discriminator(d, g, rows, rng=seeded()),
    ]
    for way in ways:
        with pytest.raises(DomainError, match=r"ends in a sigmoid.*probabilities=True"):
            way(net, GENERATOR)
        with pytest.raises(ShapeError, match=r"points of shape \(2,\), and the discriminator takes \(3,\)"):
            way(MLP(3), GENERATOR)
        with pytest.raises(ArgumentTypeError, match="GeneratorNetwork"):
            way(EXACT, Dense(2, 2))
    assert len(rejection(Discriminator(net, probabilities=True), GENERATOR, 10, rng=seeded()).x) == 10
    for options, message in (
        ({"quantile": 1.0}, "between 0 and 1"),
        ({"gamma": math.nan}, "finite"),
        ({"n": 0}, "n is"),
    ):
        with pytest.raises(OptionError, match=message):
            rejection(EXACT, GENERATOR, **({"n": 10, "rng": seeded()} | options))
    with pytest.raises(OptionError, match="steps is a whole number"):
        ddls(EXACT, GENERATOR, 10, rng=seeded(), steps=0)
    with pytest.raises(ArgumentTypeError, match=r"torch\.Generator"):
        rejection(EXACT, GENERATOR, 10, rng=0)
    with pytest.raises(ShapeError, match=r"the chains' start takes \(3,\)"):
        metropolis_hastings(EXACT, GENERATOR, 10, rng=seeded(), start=torch.zeros(4, 3))
    with pytest.raises(OptionError, match="finite logit"):
        rejection(Energy.of(lambda x: x.sum(1) * math.nan), GENERATOR, 10, rng=seeded())


def test_calibration_refuses_what_it_cannot_mend():
    rows = DATA.sample(100, seeded())
    with pytest.raises(DataError, match="10 held-out rows"):
        calibrate_discriminator(EXACT, GENERATOR, rows[:5], rng=seeded())
    with pytest.raises(DataError, match="without error"):
        calibrate_discriminator(Energy.of(lambda x: -x[:, 0]), GENERATOR, rows + 100.0, rng=seeded())
    with pytest.raises(DataError, match="higher at draws"):
        calibrate_discriminator(Energy.of(lambda x: x[:, 0]), GENERATOR, rows + 100.0, rng=seeded())
    with pytest.raises(DataError, match=r"higher at draws.*minus the logit"):
        calibrate_discriminator(-EXACT, GENERATOR, rows, rng=seeded())
    with pytest.raises(ShapeError, match="held-out rows"):
        calibrate_discriminator(EXACT, GENERATOR, torch.zeros(20, 3, dtype=D), rng=seeded())
