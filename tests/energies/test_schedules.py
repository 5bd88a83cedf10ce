"""Schedules: their closed forms, the way to points that are not shrunk and back, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from gibbsian.annealing import Annealing
from gibbsian.energies.schedules import Cosine, Tabulated, VarianceExploding, VariancePreserving
from gibbsian.errors import OptionError

SCHEDULES = [VarianceExploding(), VariancePreserving(), Cosine(), Tabulated.linear()]


def times(schedule, n=9):
    return torch.linspace(schedule.start, schedule.end, n, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_time_of_a_level_is_the_time(schedule):
    t = times(schedule)
    torch.testing.assert_close(schedule.time(schedule.ratio(t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda s: type(s).__name__)
def test_a_preserving_schedule_keeps_a_variance_of_one(schedule):
    t = times(schedule)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_levels_fall_from_end_to_end_and_points_go_there_and_back(schedule):
    levels = schedule.levels(12)
    assert len(levels) == 13
    assert all(a > b for a, b in pairwise(levels))
    assert levels[0] == pytest.approx(schedule.sigma_max)
    assert levels[-1] == pytest.approx(schedule.sigma_min)
    rng = torch.Generator().manual_seed(0)
    t = times(schedule)
    x_t = torch.randn((9, 2, 3), generator=rng, dtype=torch.float64)
    x, sigma = schedule.explode(x_t, t)
    back, when = schedule.preserve(x, sigma)
    torch.testing.assert_close(back, x_t)
    torch.testing.assert_close(when, t, rtol=1e-9, atol=1e-9)


def test_the_linear_schedule_is_the_integral_of_its_rate():
    schedule = VariancePreserving()
    grid = torch.linspace(0, 0.7, 100_001, dtype=torch.float64)
    total = torch.trapezoid(0.1 + grid * 19.9, grid)
    torch.testing.assert_close(schedule.alpha(grid[-1]), (-0.5 * total).exp())


def test_the_cosine_schedule_is_a_cosine():
    t = torch.tensor(0.3, dtype=torch.float64)
    a, b = (0.5 * math.pi * (v + 0.008) / 1.008 for v in (0.0, 0.3))
    assert float(Cosine().alpha(t)) == pytest.approx(math.cos(b) / math.cos(a))


def test_a_table_tells_its_products_at_whole_times():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    products = (1 - betas).cumprod(0)
    torch.testing.assert_close(Tabulated.of(products).alpha(torch.arange(1000.0).double()) ** 2, products)


def test_edm_levels_are_those_of_annealing():
    assert VarianceExploding(0.01, 10.0, rho=7.0).levels(8) == Annealing(10.0, 0.01, levels=8, rho=7.0).sigmas()


@pytest.mark.parametrize(
    "make",
    [
        lambda: VarianceExploding(0.01, 1.0),
        lambda: VariancePreserving(0.1, 1.0),
        lambda: Cosine(last=0.5),
        lambda: Tabulated((0.99, 0.9, 0.5)),
    ],
)
def test_a_schedule_that_never_reaches_noise_is_refused(make):
    with pytest.raises(OptionError, match="never reaches noise"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VarianceExploding(1.0, 0.5), "0 < sigma_low < sigma_high"),
        (lambda: VarianceExploding(rho=0.0), "positive rho"),
        (lambda: VariancePreserving(5.0, 1.0), "0 < beta_0 < beta_1"),
        (lambda: Cosine(offset=0.0), "offset between 0 and 1"),
        (lambda: Tabulated((0.9, 0.95)), "fall within"),
        (lambda: Tabulated((0.9, 0.0)), "fall within"),
        (lambda: Tabulated(()), "two or more"),
        (lambda: VarianceExploding().levels(0), "1 or more"),
        (lambda: Tabulated.linear(0), "1 or more"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()
