"""Walks along a score: orders of convergence, exact laws, agreement of schedules, and twins that are caught."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from diffusions import MIXTURE, Network, noisy
from gibbsian.bridges import reverse as module
from gibbsian.bridges.reverse import Ancestral, Heun, Multistep, PredictorCorrector, reverse
from gibbsian.bridges.scores import score_of
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.energies.base import Energy
from gibbsian.energies.schedules import VarianceExploding, VariancePreserving
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError

EXPLODING = VarianceExploding(0.05, 10.0, sigma_data=1.0)
PRESERVING = VariancePreserving(first=0.02)
PLACE, SIZE = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.3, 1.0], dtype=torch.float64)
GAUSSIAN = Energy.of(
    lambda x, sigma: ((x - PLACE) ** 2 / (2 * (SIZE**2 + sigma[:, None] ** 2))).sum(1), (2,), context=("sigma",)
)
"""Its flow is known: a coordinate shrinks by the ratio of the standard deviations."""


def noise(n, sigma, seed=0):
    return sigma * torch.randn((n, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_error(way, schedule, steps) -> float:
    levels = schedule.levels(steps)
    start = PLACE + noise(50, levels[0])
    exact = PLACE + (start - PLACE) * ((SIZE**2 + levels[-1] ** 2) / (SIZE**2 + levels[0] ** 2)).sqrt()
    return float((reverse(GAUSSIAN, start, levels, way) - exact).abs().mean())


def mixture_error(way, schedule, steps) -> float:
    start = noise(50, schedule.sigma_max)
    exact = reverse(MIXTURE, start, schedule.levels(960), Heun())
    return float((reverse(MIXTURE, start, schedule.levels(steps), way) - exact).abs().mean())


def check_order(error, way, schedule, order, slack=0.2) -> None:
    errors = [error(way, schedule, steps) for steps in (40, 80, 160)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(rate - order) < slack for rate in rates), f"order {rates}"


@pytest.mark.parametrize("error", [gaussian_error, mixture_error])
@pytest.mark.parametrize(("way", "order"), [(Heun(), 2), (Multistep(), 2), (Ancestral(0.0), 1)], ids=str)
@pytest.mark.parametrize("schedule", [EXPLODING, PRESERVING], ids=lambda s: type(s).__name__)
def test_errors_fall_with_the_steps_as_they_should(error, way, order, schedule):
    check_order(error, way, schedule, order)


@dataclass(frozen=True)
class Forgetful(Multistep):
    """Never remembers the step before: of first order."""

    def step(self, score, x, high, low, noise, memory):
        return super().step(score, x, high, low, noise, ())


@dataclass(frozen=True)
class Overshooting(Multistep):
    """Extrapolates with the steps' ratio upside down."""

    def step(self, score, x, high, low, noise, memory):
        if memory:
            h = math.log(high / low)
            memory = (memory[0], h * h / memory[1] * 2.0)
        return super().step(score, x, high, low, noise, memory)


@pytest.mark.parametrize("twin", [Forgetful(), Overshooting()], ids=lambda t: type(t).__name__)
def test_a_multistep_method_with_a_slip_is_caught(twin):
    with pytest.raises(AssertionError, match="order"):
        check_order(gaussian_error, twin, PRESERVING, 2)


WAYS = {
    "heun": (Heun(), 30),
    "multistep": (Multistep(), 40),
    "ancestral": (Ancestral(), 120),
    "corrected": (PredictorCorrector(), 30),
    "corrected ancestral": (PredictorCorrector(Ancestral(), steps=2, size=0.05), 60),
    "langevin": (PredictorCorrector(None, steps=8, size=0.2), 60),
}
LIMIT = 0.0025
"""Squared energy distance of 3,000 draws: exact ones have up to 0.0008, the twins 0.0044 or more."""


def check_law(way, steps, score=MIXTURE, during=lambda: None) -> None:
    levels = EXPLODING.levels(steps)
    rng = torch.Generator().manual_seed(3)
    start, exact = noise(3000, levels[0]), noisy(levels[-1]).sample(3000, torch.Generator().manual_seed(4))
    during()
    x = reverse(score, start, levels, way, rng=rng)
    found = energy_distance(x, exact).value
    assert found < LIMIT, f"law off: {found}"


@pytest.mark.parametrize("name", WAYS)
def test_draws_are_those_of_the_exact_density(name):
    check_law(*WAYS[name])


@pytest.mark.parametrize("name", WAYS)
def test_a_score_of_the_wrong_size_is_caught(name):
    # Langevin steps alone forget how they came; at a wrong temperature it takes more to be seen.
    factor = 3.0 if name == "langevin" else 1.3
    with pytest.raises(AssertionError, match="law off"):
        check_law(*WAYS[name], score=factor * MIXTURE)


def test_ancestral_noise_that_is_too_small_is_caught(monkeypatch):
    real = torch.randn

    def shrink() -> None:
        monkeypatch.setattr(module.torch, "randn", lambda *a, **k: 0.7 * real(*a, **k))

    with pytest.raises(AssertionError, match="law off"):
        check_law(*WAYS["ancestral"], during=shrink)


def test_a_network_is_walked_as_its_energy():
    """Over the levels of a variance-preserving schedule."""
    levels = PRESERVING.levels(20)
    start = noise(20, levels[0])
    for kind in ("eps", "v", "x0"):
        score = score_of(Network(PRESERVING, kind, boxed=True), PRESERVING, kind)
        torch.testing.assert_close(reverse(score, start, levels), reverse(MIXTURE, start, levels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WAYS)
def test_a_walk_is_a_function_of_its_noise_and_may_end_without_any(name):
    way, _ = WAYS[name]
    levels = [*EXPLODING.levels(6), 0.0]
    start = noise(10, 10.0)
    runs = [reverse(MIXTURE, start, levels, way, rng=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*runs)
    assert bool(torch.isfinite(runs[0]).all())


def test_global_random_numbers_are_left_alone_and_progress_is_told():
    before, told = torch.get_rng_state(), []
    reverse(MIXTURE, noise(4, 10.0), [10.0, 1.0, 0.1], Ancestral(), rng=torch.Generator(), progress=told.append)
    assert torch.equal(before, torch.get_rng_state())
    assert told == [1, 1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: reverse(MIXTURE, x, [1.0, 2.0]), OptionError, "falling"),
        (lambda x: reverse(MIXTURE, x, [1.0]), OptionError, "two or more"),
        (lambda x: reverse(MIXTURE, x, [1.0, -0.1]), OptionError, "0 or more"),
        (lambda x: reverse(MIXTURE, x, [2.0, 1.0], Ancestral()), OptionError, "pass rng"),
        (lambda x: reverse(MIXTURE, x, [2.0, 1.0], "heun"), ArgumentTypeError, "way down"),
        (lambda x: reverse(lambda x, t: x, x, [2.0, 1.0]), ArgumentTypeError, "score_of"),
        (lambda x: reverse(Energy.of(lambda x: x.sum(1)), x, [2.0, 1.0]), OptionError, "context sigma"),
        (
            lambda x: reverse(Energy.of(lambda x, sigma, y: x.sum(1), context=("sigma", "y")), x, [2.0, 1.0]),
            OptionError,
            "still asks for y",
        ),
        (lambda x: reverse(MIXTURE, x.long(), [2.0, 1.0]), ArgumentTypeError, "floating-point"),
        (lambda x: reverse(MIXTURE, x * math.nan, [2.0, 1.0]), DivergenceError, "between noise levels 2 and 1"),
        (lambda x: Ancestral(2.0), OptionError, "eta"),
        (lambda x: PredictorCorrector(steps=0), OptionError, "1 or more"),
        (lambda x: PredictorCorrector("heun"), ArgumentTypeError, "predictor"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(noise(3, 2.0))
