"""Walking down noise levels: exact for analytic energies, of second order in the levels, and its twins are caught."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from gibbsian import MALA, Annealing, Bernoulli, Energy, Gaussian, anneal
from gibbsian import annealing as module
from gibbsian.annealing import ancestral_sample
from gibbsian.energies.recovery import RecoveryEnergy, tether
from gibbsian.errors import DivergenceError, DomainError, OptionError
from oracles import P_LIMIT, Z_LIMIT, ks_p_value

N = 12_000
HIGH, LOW = 10.0, 0.05
MEAN = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
SPREAD = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
MODES, SIZES, MASSES = (-2.0, 1.5), (0.4, 0.6), (0.3, 0.7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(x, sigma):
    return ((x - MEAN) ** 2 / (2 * (SPREAD**2 + sigma[:, None] ** 2))).sum(1)


def mixture(x, sigma):
    parts = []
    for m, s, w in zip(MODES, SIZES, MASSES):
        v = s**2 + sigma**2
        parts.append(math.log(w) - (x[:, 0] - m) ** 2 / (2 * v) - 0.5 * v.log())
    return -torch.logsumexp(torch.stack(parts), 0)


GAUSSIAN, MIXTURE = (Energy.of(fn, (d,), context=("sigma",)) for fn, d in ((gaussian, 3), (mixture, 1)))


def variance_law(annealing: Annealing) -> torch.Tensor:
    """The exact variance of the walk's last points: every step is linear for a Gaussian energy."""
    variance = SPREAD**2 + HIGH**2
    for high, low in pairwise(annealing.sigmas()):
        above, below = SPREAD**2 + high**2, SPREAD**2 + low**2
        if annealing.predictor:
            slope = high / above
            factor = 1 + 0.5 * (low - high) * (slope + low / below * (1 + (low - high) * slope))
            variance = factor**2 * variance
        h = annealing.corrector_size * low**2
        for _ in range(annealing.corrector_steps):
            variance = (1 - h / below) ** 2 * variance + 2 * h
    return variance


WAYS = {
    "predictor": Annealing(HIGH, LOW, levels=30, corrector_steps=0),
    "corrector": Annealing(HIGH, LOW, levels=40, corrector_steps=10, corrector_size=0.3, predictor=False),
    "both": Annealing(HIGH, LOW, levels=24, corrector_steps=1),
}
BIAS = {"predictor": 0.02, "corrector": 0.25, "both": 0.06}
"""Of the last variance, by the finite levels alone; ten Langevin steps do not forget the level before."""


def check_gaussian(way: str) -> None:
    """The moments are those of the exact recursion within their standard errors, and near the density's own."""
    annealing = WAYS[way]
    rng = generator(1)
    start = MEAN + (SPREAD**2 + HIGH**2).sqrt() * torch.randn((N, 3), generator=rng, dtype=torch.float64)
    x = anneal(GAUSSIAN, start, annealing, rng=rng)
    variance, truth = variance_law(annealing), SPREAD**2 + LOW**2
    z = (x.mean(0) - MEAN) / (variance / N).sqrt()
    assert float(z.abs().max()) < Z_LIMIT, f"mean off: {z}"
    z = (x.var(0) / variance - 1) / math.sqrt(2 / N)
    assert float(z.abs().max()) < Z_LIMIT, f"variance off: {z}"
    bias = float((variance / truth - 1).abs().max())
    assert bias < BIAS[way], f"bias of the levels: {bias}"


@pytest.mark.parametrize("way", WAYS)
def test_a_gaussian_has_the_exact_moments(way):
    check_gaussian(way)


def check_mixture(way: str, tolerance: float) -> None:
    """Weights, and the law within each mode, from draws of the Gaussian that the highest level nearly is."""
    rng = generator(2)
    mean = sum(w * m for w, m in zip(MASSES, MODES))
    spread = sum(w * (s**2 + (m - mean) ** 2) for w, m, s in zip(MASSES, MODES, SIZES))
    start = mean + math.sqrt(spread + HIGH**2) * torch.randn((N, 1), generator=rng, dtype=torch.float64)
    x = anneal(MIXTURE, start, WAYS[way], rng=rng)
    edge = -0.5

    def cdf(v):
        sizes = [math.sqrt(s**2 + LOW**2) for s in SIZES]
        return sum(w * torch.special.ndtr((v - m) / s) for w, m, s in zip(MASSES, MODES, sizes))

    left = float(cdf(torch.tensor(edge, dtype=torch.float64)))
    found = float((x < edge).double().mean())
    assert abs(found - left) < Z_LIMIT * math.sqrt(left * (1 - left) / N) + tolerance, f"weight {found} for {left}"
    if way != "corrector":
        # One row in six: the test then sees deviations of the law of a few per cent, not the levels' bias.
        assert ks_p_value(x[::6], cdf) > P_LIMIT, "law off"


@pytest.mark.parametrize(("way", "tolerance"), [("predictor", 0.003), ("corrector", 0.02), ("both", 0.003)])
def test_a_mixture_has_the_exact_weights(way, tolerance):
    check_mixture(way, tolerance)


TWINS = {
    "sign": lambda value, grad: (value, -grad),
    "slope": lambda value, grad: (value, 1.1 * grad),
    "sigma forgotten": lambda value, grad: (value, 0.5 * grad),
}


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("way", ["predictor", "both"])
def test_a_predictor_with_a_slip_is_caught(twin, way, monkeypatch):
    real = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda energy, x: TWINS[twin](*real(energy, x)))
    with pytest.raises(AssertionError, match="off"):
        check_gaussian(way)


@pytest.mark.parametrize("way", ["corrector", "both"])
def test_a_corrector_with_a_slip_is_caught(way, monkeypatch):
    """Noise of variance h instead of 2h."""
    real = module.ULA
    monkeypatch.setattr(module, "ULA", lambda step_size: real(step_size, noise_scale=step_size**0.5))
    with pytest.raises(AssertionError, match="off"):
        check_gaussian(way)


def deviation(levels: int) -> float:
    """How far the predictor is from the flow, which shrinks a Gaussian coordinate by the ratio of deviations."""
    start = torch.ones((1, 3), dtype=torch.float64) + MEAN
    x = anneal(GAUSSIAN, start, Annealing(HIGH, LOW, levels, corrector_steps=0), rng=generator())
    exact = MEAN + ((SPREAD**2 + LOW**2) / (SPREAD**2 + HIGH**2)).sqrt()
    return float((x - exact).abs().max())


def check_order() -> None:
    errors = [deviation(levels) for levels in (64, 128, 256)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(rate - 2.0) < 0.1 for rate in rates), f"order {rates}"


def test_the_predictor_is_of_second_order():
    check_order()


def test_euler_steps_are_caught(monkeypatch):
    """A second slope that is a copy of the first, scaled as the first was, makes Heun's step Euler's."""
    real, kept = module.evaluate, []

    def first_only(energy, x):
        value, grad = real(energy, x)
        if kept:
            sigma, before = kept.pop()
            return value, before * sigma / energy.fixed_sigma
        kept.append((energy.fixed_sigma, grad))
        return value, grad

    monkeypatch.setattr(module, "evaluate", first_only)
    with pytest.raises(AssertionError, match="order"):
        check_order()


def test_denoising_ends_with_the_mean_given_the_noisy_point():
    start = MEAN + torch.randn((50, 3), generator=generator(3), dtype=torch.float64)
    plain, clean = (
        anneal(GAUSSIAN, start, Annealing(1.0, 0.5, 4, denoise=denoise), rng=generator(4)) for denoise in (False, True)
    )
    shrunk = MEAN + SPREAD**2 / (SPREAD**2 + 0.5**2) * (plain - MEAN)
    assert torch.allclose(clean, shrunk, rtol=0, atol=1e-12)


def test_the_levels_fall_from_end_to_end_and_progress_is_told():
    annealing = Annealing(8.0, 0.05, levels=16)
    sigmas = annealing.sigmas()
    assert len(sigmas) == 17
    assert sigmas[0] == pytest.approx(8.0)
    assert sigmas[-1] == pytest.approx(0.05)
    assert all(a > b for a, b in pairwise(sigmas))
    told = []
    anneal(GAUSSIAN, MEAN.expand(2, 3), annealing, rng=generator(), progress=told.append)
    assert told == [1] * 16


def test_the_start_is_left_alone_and_the_draws_follow_the_generator():
    start = MEAN + torch.zeros((5, 3), dtype=torch.float64)
    kept = start.clone()
    a, b, c = (anneal(GAUSSIAN, start, WAYS["both"], rng=generator(s)) for s in (1, 1, 2))
    assert torch.equal(start, kept)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("way", WAYS)
def test_points_that_leave_the_numbers_are_told_of(way):
    def falls(x, sigma):
        return torch.where(sigma < 1.0, x[:, 0] * math.nan, 0.5 * x[:, 0] ** 2 / sigma**2)

    energy = Energy.of(falls, (1,), context=("sigma",))
    start = torch.randn((8, 1), generator=generator(), dtype=torch.float64)
    with pytest.raises(DomainError if way == "corrector" else DivergenceError):
        anneal(energy, start, WAYS[way], rng=generator())


def test_an_energy_without_levels_is_refused():
    with pytest.raises(OptionError, match="sigma"):
        anneal(Gaussian(dim=2), torch.zeros(3, 2), WAYS["both"], rng=generator())


@pytest.mark.parametrize(
    "options",
    [
        {"sigma_max": 0.01},
        {"sigma_min": 0.0},
        {"levels": 0},
        {"corrector_steps": -1},
        {"corrector_size": 0.0},
        {"rho": 0.0},
        {"predictor": False, "corrector_steps": 0},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(OptionError):
        Annealing(**{"sigma_max": 8.0, "sigma_min": 0.05, **options})


# ---- each level given the one above --------------------------------------------------------------------------------

LEVELS = [HIGH * (LOW / HIGH) ** (i / 14) for i in range(14, -1, -1)]


def descended(energy, start, rng, levels=LEVELS, **options):
    return ancestral_sample(energy, start, levels, MALA(0.4), steps=20, rng=rng, **options)


def check_ancestral() -> None:
    """The moments at the lowest level are exact, of draws that started as noise."""
    rng = generator(5)
    start = MEAN + (SPREAD**2 + HIGH**2).sqrt() * torch.randn((N, 3), generator=rng, dtype=torch.float64)
    x, variance = descended(GAUSSIAN, start, rng), SPREAD**2 + LOW**2
    z = (x.mean(0) - MEAN) / (variance / N).sqrt()
    assert float(z.abs().max()) < Z_LIMIT, f"mean off: {z}"
    z = (x.var(0) / variance - 1) / math.sqrt(2 / N)
    assert float(z.abs().max()) < Z_LIMIT, f"variance off: {z}"


def test_ancestral_draws_of_a_gaussian_have_its_moments():
    check_ancestral()


def test_ancestral_draws_of_a_mixture_have_its_weights():
    rng = generator(6)
    left = torch.rand(N, generator=rng) < MASSES[0]
    place = torch.where(left, MODES[0], MODES[1]).double()
    size = torch.where(left, SIZES[0], SIZES[1]).double()
    start = place + (size**2 + HIGH**2).sqrt() * torch.randn(N, generator=rng, dtype=torch.float64)
    x = descended(MIXTURE, start[:, None], rng)

    def cdf(v):
        sizes = [math.sqrt(s**2 + LOW**2) for s in SIZES]
        return sum(w * torch.special.ndtr((v - m) / s) for w, m, s in zip(MASSES, MODES, sizes))

    assert ks_p_value(x[::6], cdf) > P_LIMIT, "law off"
    share = float(cdf(torch.tensor(-0.5, dtype=torch.float64)))
    assert abs(float((x < -0.5).double().mean()) - share) < Z_LIMIT * math.sqrt(share * (1 - share) / N)


class Untethered(RecoveryEnergy):
    """The tether is not divided by s squared."""

    def forward(self, u):
        return self.energy(self.points(u)) + tether(self.spread * u)


class Flipped(RecoveryEnergy):
    """The energy has the other sign; a weak one, so that chains do not run away."""

    def forward(self, u):
        return -0.2 * self.energy(self.points(u)) + tether(u)


ANCESTRAL_TWINS = {
    "no 1/s^2": Untethered,
    "sign": Flipped,
    "another spread": lambda energy, noisy, spread: RecoveryEnergy(energy, noisy, 1.5 * spread),
    "another level": lambda energy, noisy, spread: RecoveryEnergy(
        energy.energy.given(sigma=(energy.fixed_sigma**2 + spread**2).sqrt()), noisy, spread
    ),
}


@pytest.mark.parametrize("twin", ANCESTRAL_TWINS)
def test_a_wrong_conditional_is_caught(twin, monkeypatch):
    monkeypatch.setattr(module, "RecoveryEnergy", ANCESTRAL_TWINS[twin])
    with pytest.raises(AssertionError, match="off"):
        check_ancestral()


def test_ancestral_draws_follow_the_generator_and_the_labels():
    start, told = torch.zeros((4, 3), dtype=torch.float64), []
    kept = start.clone()
    a, b, c = (descended(GAUSSIAN, start, generator(s), progress=told.append) for s in (1, 1, 2))
    assert torch.equal(start, kept)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert told == [1] * 14 * 3

    def labelled(x, sigma, y):
        return gaussian(x - 10.0 * y[:, None], sigma)

    energy = Energy.of(labelled, (3,), context=("sigma", "y"))
    y = torch.tensor([0, 1, 1, 0])
    x = descended(
        energy.given(y=y), HIGH * torch.randn((4, 3), generator=generator(3), dtype=torch.float64), generator(4)
    )
    # Ten apart with deviations of 2 at most: the wrong side is 2.5 deviations off in every coordinate.
    assert torch.equal(((x - MEAN).mean(1) > 5).long(), y)
    with pytest.raises(OptionError, match="y"):
        descended(energy, start, generator())


def test_ancestral_sampling_refuses_what_does_not_fit():
    with pytest.raises(OptionError, match="sigma"):
        descended(Gaussian(dim=3), torch.zeros(2, 3), generator())
    with pytest.raises(OptionError, match=r"rising.*\[::-1\]"):
        descended(GAUSSIAN, torch.zeros(2, 3), generator(), levels=LEVELS[::-1])
    with pytest.raises(DomainError, match="Boolean"):
        descended(Bernoulli(probs=torch.full((3,), 0.5)), torch.zeros(2, 3), generator())
