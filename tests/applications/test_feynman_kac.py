"""Feynman-Kac weights of scores: moments against grids, the rate against exact weights, twins that are caught."""

from __future__ import annotations

import pytest
import torch
from compositions import POPULATIONS, A, B, check_moments, levels

from contracts import seeded
from gibbsian.applications import feynman_kac
from gibbsian.applications.feynman_kac import Step, compose_scores
from gibbsian.applications.guidance import guided
from gibbsian.applications.terms import SummedScore, windowed
from gibbsian.bridges.reverse import Heun, reverse
from gibbsian.bridges.scores import EnergyScore
from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, OptionError

TERMS = (EnergyScore(A), EnergyScore(B))
WEIGHTS = {"product": (1.0, 1.0), "negation": (1.0, -0.3), "guidance": (2.0, -1.0), "one": (1.0, 0.0)}
BIAS = 0.03
"""Of moments of order 1, by 80 levels."""


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def energy_of(name) -> Energy:
    return WEIGHTS[name][0] * A + WEIGHTS[name][1] * B


def run(name, count=80, **options):
    options = {"chains": 4096, "shape": (2,), "populations": POPULATIONS} | options
    return compose_scores(SummedScore(TERMS, WEIGHTS[name]), levels(count), rng=seeded(), **options)


@pytest.mark.parametrize("noise", [1.0, 0.5])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weighted_walks_have_the_compositions_moments(name, noise):
    out = run(name, noise=noise)
    check_moments(out, energy_of(name), BIAS)
    assert out.correction == "weights"
    assert out.log_z is None
    assert out.draw(10, seeded()).shape == (10, 2)
    assert "corrected by weights" in repr(out)


@pytest.mark.parametrize("name", ["product", "negation", "guidance"])
def test_walks_without_weights_have_not(name):
    out = run(name, weights=False)
    assert out.correction == "none"
    with pytest.raises(AssertionError, match="moments off"):
        check_moments(out, energy_of(name), BIAS)


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_a_factor_in_the_rate_is_caught(factor, monkeypatch):
    real = feynman_kac.weigh
    monkeypatch.setattr(feynman_kac, "weigh", lambda at, gained, *rest: real(at, factor * gained, *rest))
    with pytest.raises(AssertionError, match=r"off|power"):
        check_moments(run("guidance"), energy_of("guidance"), BIAS)


def test_the_rate_is_the_limit_of_the_exact_weights():
    """At one point, with a step so short that the mean of the exact weights is 1 + rate * step within its error."""
    x, high, n = torch.tensor([[0.4, -0.3]]), 0.8, 200_000
    low = (high**2 - 2e-3) ** 0.5
    energy = energy_of("guidance")
    taken = Step(energy, x.expand(n, 2), high, low, torch.zeros(n)).take(1.0, seeded())[1].exp()
    parts = torch.stack([s(x, torch.tensor([high])) for s in TERMS])
    w = torch.tensor(WEIGHTS["guidance"])
    total = (w[:, None, None] * parts).sum(0)
    rate = 0.5 * float(total.square().sum() - (w * parts.square().sum((1, 2))).sum())
    error = float(taken.std()) / n**0.5
    assert abs(float(taken.mean()) - 1.0 - 2e-3 * rate) < 6.0 * error + 0.03 * 2e-3 * abs(rate)
    assert error < 0.03 * 2e-3 * abs(rate)


def test_sums_of_scores_are_scores_of_sums():
    x, sigma = torch.randn((6, 2), generator=seeded()), torch.linspace(0.2, 3.0, 6)
    summed = SummedScore(TERMS, (1.5, -0.5))
    torch.testing.assert_close(summed(x, sigma), EnergyScore(1.5 * A - 0.5 * B)(x, sigma))
    torch.testing.assert_close(summed(x, sigma), guided(TERMS[0], TERMS[1], 1.5)(x, sigma))
    torch.testing.assert_close(SummedScore(TERMS)(x, sigma), EnergyScore(A + B)(x, sigma))
    assert reverse(summed, 8.0 * x, levels(10), Heun()).shape == (6, 2)
    assert "1.5" in repr(summed)


def test_windows_of_scores_and_energies_agree_and_end_where_they_say():
    x, sigma = torch.randn((5, 2), generator=seeded()), torch.tensor([0.4, 0.5, 1.0, 2.0, 2.1])
    energy, score = windowed(B, 0.5, 2.0), windowed(TERMS[1], 0.5, 2.0)
    inside = torch.tensor([False, True, True, True, False])
    torch.testing.assert_close(score(x, sigma), EnergyScore(energy)(x, sigma))
    torch.testing.assert_close(energy(x, sigma=sigma), torch.where(inside, B(x, sigma=sigma), 0.0))
    assert energy.context == ("sigma",)
    assert bool((score(x, sigma)[~inside] == 0.0).all())
    plain = windowed(Gaussian(2), low=1.0)
    assert plain.context == ("sigma",)
    torch.testing.assert_close(plain(x, sigma=sigma)[2:], Gaussian(2)(x)[2:])
    assert "0.5 to 2" in repr(A + energy)
    assert "0.5 to 2" in repr(score)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: windowed(A, 2.0, 1.0), OptionError, "low < high"),
        (lambda: windowed(3.0, 1.0, 2.0), ArgumentTypeError, "energy or a score"),
        (lambda: SummedScore(TERMS, (1.0,)), OptionError, "2 finite weights"),
        (lambda: SummedScore(TERMS, (1.0, float("nan"))), OptionError, "finite weights"),
        (lambda: SummedScore(()), OptionError, "0 scores"),
        (lambda: SummedScore((A, B)), ArgumentTypeError, "score_of"),
        (lambda: compose_scores(TERMS[0], levels(4), rng=seeded()), ArgumentTypeError, "know the terms"),
        (lambda: compose_scores(SummedScore(TERMS), levels(4), rng=seeded()), OptionError, "shape of a point"),
        (lambda: run("one", count=4, chains=10), OptionError, "multiple"),
        (lambda: run("one", count=4, noise=2.0), OptionError, "between 0 and 1"),
        (lambda: compose_scores(SummedScore(TERMS), [1.0, 2.0], rng=seeded(), shape=(2,)), OptionError, "falling"),
        (lambda: compose_scores(SummedScore(TERMS), [2.0, 0.0], rng=seeded(), shape=(2,)), OptionError, "above 0"),
        (lambda: compose_scores(SummedScore(TERMS), [0.3, 0.1], rng=seeded(), shape=(2,)), OptionError, "reach noise"),
        (lambda: compose_scores(SummedScore((windowed(TERMS[0], 1.0, 2.0),)), levels(4), rng=seeded(), shape=(2,)),
         OptionError, "end of its window"),
        (lambda: compose_scores(SummedScore((EnergyScore(Energy.of(lambda x, sigma, y: x.sum(1), (2,),
                                                                   context=("sigma", "y"))),)), levels(4),
                                rng=seeded(), shape=(2,)), OptionError, "still asks for y"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
