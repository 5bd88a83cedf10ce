"""Scores of energies and networks: predictions turn into each other exactly, and agree with the energy's gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from diffusions import MIXTURE, Network, log_density
from gibbsian.bridges.scores import EnergyScore, PredictedScore, convert, score_of
from gibbsian.energies.base import Energy
from gibbsian.energies.schedules import Cosine, Tabulated, VarianceExploding, VariancePreserving
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

KINDS = ("eps", "v", "x0")
SCHEDULES = [VarianceExploding(), VariancePreserving(), Cosine(), Tabulated.linear()]


def points(n=64):
    rng = torch.Generator().manual_seed(0)
    sigma = torch.exp(torch.empty(n, dtype=torch.float64).uniform_(-2.0, 2.0, generator=rng))
    x = torch.randn((n, 2), generator=rng, dtype=torch.float64)
    return x * (1 + sigma[:, None]), sigma


@pytest.mark.parametrize(("schedule", "kind", "boxed"), list(product(SCHEDULES, KINDS, (False, True))))
def test_every_network_of_an_analytic_mixture_tells_the_energys_score(schedule, kind, boxed):
    x, sigma = points()
    score = score_of(Network(schedule, kind, boxed), schedule, kind)
    expected = score_of(MIXTURE)(x, sigma)
    torch.testing.assert_close(score(x, sigma), expected, rtol=0, atol=1e-10)
    with torch.enable_grad():
        y = x.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(log_density(y, sigma).sum(), y)
    torch.testing.assert_close(expected, grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), list(product(KINDS, KINDS)))
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_predictions_turn_into_each_other(source, target, alpha):
    """Also where the squares of alpha and sigma do not add up to one."""
    rng = torch.Generator().manual_seed(1)
    x0, eps = torch.randn((2, 5, 3, 2), generator=rng, dtype=torch.float64)
    a, s = torch.full((5,), alpha, dtype=torch.float64), torch.linspace(0.2, 3.0, 5, dtype=torch.float64)
    wide = s[:, None, None]
    told = {"x0": x0, "eps": eps, "v": alpha * eps - wide * x0}
    found = convert(told[source], alpha * x0 + wide * eps, a, s, source, target)
    torch.testing.assert_close(found, told[target], rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrong", ["v", "x0"])
def test_a_prediction_under_a_wrong_name_is_caught(wrong):
    x, sigma = points()
    score = score_of(Network(VariancePreserving(), "eps"), VariancePreserving(), wrong)
    assert float((score(x, sigma) - score_of(MIXTURE)(x, sigma)).abs().max()) > 0.1


def test_denoised_points_are_the_posterior_mean():
    x, sigma = points()
    schedule = VarianceExploding()
    torch.testing.assert_close(score_of(MIXTURE).denoised(x, sigma), Network(schedule, "x0")(x, sigma))


def test_context_is_passed_on_and_can_be_fixed():
    def network(x, t, class_labels):
        return x * class_labels[:, None]

    score = score_of(network, VariancePreserving(), "eps", ("class_labels",))
    assert score.context == ("class_labels",)
    x, sigma = points(4)
    labels = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(score.given(class_labels=labels)(x, sigma), score(x, sigma, class_labels=labels))
    same = score.given(class_labels=2)
    assert same.context == ()
    torch.testing.assert_close(same(x, sigma), score(x, sigma, class_labels=torch.full((4,), 2)))
    with pytest.raises(ShapeError, match="4 rows and x has 3"):
        score.given(class_labels=labels)(x[:3], sigma[:3])
    with pytest.raises(OptionError, match="takes: class_labels"):
        score.given(y=1)


def test_a_score_is_adopted_as_it_is():
    score = EnergyScore(MIXTURE)
    assert score_of(score) is score
    assert not isinstance(score_of(Network(Cosine(), "v"), Cosine(), "v"), Energy)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: score_of(lambda x, t: x), ArgumentTypeError, "without the schedule"),
        (lambda: score_of(lambda x, t: x, VariancePreserving()), OptionError, "'eps'"),
        (lambda: score_of(lambda x, t: x, VariancePreserving(), "noise"), OptionError, "'noise'"),
        (lambda: score_of(3, VariancePreserving(), "eps"), ArgumentTypeError, "network"),
        (lambda: score_of(MIXTURE, VariancePreserving()), OptionError, "its own score"),
        (lambda: score_of(Energy.of(lambda x: x.sum(1))), OptionError, "context sigma"),
        (
            lambda: score_of(Energy.of(lambda x, sigma: x, (2,), torch.distributions.constraints.boolean, ("sigma",))),
            DomainError,
            "Gaussian noise",
        ),
    ],
)
def test_what_cannot_be_a_score_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_networks_answer_is_checked():
    x, sigma = points(4)
    with pytest.raises(ShapeError, match=r"\(4, 4\)"):
        PredictedScore(lambda x, t: torch.cat((x, x), 1), VariancePreserving(), "eps")(x, sigma)
    with pytest.raises(ArgumentTypeError, match="tuple"):
        PredictedScore(lambda x, t: (x,), VariancePreserving(), "eps")(x, sigma)
