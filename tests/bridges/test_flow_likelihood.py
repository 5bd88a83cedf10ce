"""Likelihood by the probability flow: exact on analytic mixtures, with probes within their errors, twins caught."""

from __future__ import annotations

import math

import pytest
import torch

from diffusions import LOCS, MASSES, MIXTURE, SIZES, Network, Plain, log_density, noisy
from gibbsian.bridges import flow_likelihood as module
from gibbsian.bridges.flow_likelihood import bits_per_dim, flow_log_prob
from gibbsian.bridges.scores import score_of
from gibbsian.energies.base import Energy
from gibbsian.energies.schedules import VariancePreserving
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import DivergenceError, OptionError, ShapeError

LOW, HIGH = 0.02, 80.0
MEAN = MASSES @ LOCS
PRIOR = Gaussian(loc=MEAN, scale=(MASSES @ (SIZES[:, None] ** 2 + (LOCS - MEAN) ** 2) + HIGH**2).sqrt(), dim=2)
SOURCES = {
    "energy": MIXTURE,
    "score": Plain(),
    "network": score_of(Network(VariancePreserving(), "v"), VariancePreserving(), "v"),
}


def rows(n=40):
    return noisy(LOW).sample(n, torch.Generator().manual_seed(0))


def check_exact(source, limit=0.01, **options) -> None:
    x = rows()
    found = flow_log_prob(source, x, LOW, HIGH, prior=PRIOR, **options)
    off = float((found.log_prob - noisy(LOW).log_prob(x)).abs().max())
    assert off < limit, f"off by {off} nats"
    assert float(found.stderr.max()) == 0.0


@pytest.mark.parametrize("name", SOURCES)
def test_the_likelihood_of_a_mixture_is_exact(name):
    check_exact(SOURCES[name], limit=1e-3, steps=48)


def test_without_a_prior_the_datas_own_spread_costs_little():
    x = rows()
    found = flow_log_prob(MIXTURE, x, LOW, HIGH, steps=48)
    assert float((found.log_prob - noisy(LOW).log_prob(x)).abs().max()) < 0.01


class Wide(Energy):
    """A mixture as wide as ten, which tells its own base; labels change nothing."""

    context = ("sigma", "y")
    event_shape = torch.Size((2,))

    def forward(self, x, sigma, y):
        return -log_density(x, sigma, 10.0 * LOCS, 10.0 * SIZES, MASSES)

    def base(self, sigma):
        spread = (MASSES @ (SIZES[:, None] ** 2 + (LOCS - MEAN) ** 2)).mean()
        return Gaussian(loc=10.0 * MEAN, scale=(100.0 * spread + sigma**2).sqrt(), dim=2)


class Hidden(Wide):
    """Without it."""

    base = None


def check_default_prior(energy) -> None:
    x = GaussianMixture(10.0 * LOCS, 10.0 * SIZES, MASSES).sample(40, generator())
    for source in (energy.given(y=0), score_of(energy).given(y=0)):
        found = flow_log_prob(source, x, LOW, 250.0, steps=48).log_prob
        exact = log_density(x, torch.full((40,), LOW, dtype=x.dtype), 10.0 * LOCS, 10.0 * SIZES, MASSES)
        off = float((found - exact).abs().max())
        assert off < 0.01, f"off by {off} nats"


def test_the_prior_is_the_models_own_base():
    check_default_prior(Wide())
    with pytest.raises(AssertionError, match="nats"):
        check_default_prior(Hidden())


def test_the_method_is_of_fourth_order():
    x = rows(20)
    exact = flow_log_prob(MIXTURE, x, LOW, HIGH, prior=PRIOR, steps=256).log_prob
    first, second = (
        float((flow_log_prob(MIXTURE, x, LOW, HIGH, prior=PRIOR, steps=n).log_prob - exact).abs().mean())
        for n in (32, 64)
    )
    assert abs(math.log2(first / second) - 4.0) < 0.7


def test_steps_are_doubled_to_a_tolerance():
    x = rows(20)
    found = flow_log_prob(MIXTURE, x, LOW, HIGH, prior=PRIOR, steps=8, tolerance=1e-3)
    assert found.steps > 8
    assert float(found.change.abs().max()) <= 1e-3
    assert float((found.log_prob - noisy(LOW).log_prob(x)).abs().max()) < 2e-3
    with pytest.raises(DivergenceError, match="Raise most_steps"):
        flow_log_prob(MIXTURE, x, LOW, HIGH, steps=8, most_steps=16, tolerance=1e-9)


def check_probes(probes=12) -> None:
    x = rows(100)
    found = flow_log_prob(
        MIXTURE, x, LOW, HIGH, prior=PRIOR, steps=32, probes=probes, rng=torch.Generator().manual_seed(1)
    )
    z = (found.log_prob - noisy(LOW).log_prob(x)) / found.stderr
    assert float(found.stderr.min()) > 0.0
    # Student's t with 11 degrees of freedom has a standard deviation of 1.1.
    assert 0.8 < float(z.std()) < 1.4, f"errors off: {float(z.std())}"
    assert abs(float(z.mean())) < 0.45, f"mean off: {float(z.mean())}"


def test_probes_are_within_their_standard_errors():
    check_probes()


TWINS = {
    "sign of the divergence": lambda real: lambda *a: (real(*a)[0], -real(*a)[1]),
    "half of it": lambda real: lambda *a: (real(*a)[0], 0.5 * real(*a)[1]),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_divergence_with_a_slip_is_caught(twin, monkeypatch):
    monkeypatch.setattr(module, "_exact", TWINS[twin](module._exact))
    with pytest.raises(AssertionError, match="nats"):
        check_exact(MIXTURE, steps=24)


def test_bits_per_dim_of_uniform_grey_values_are_eight():
    """A density of 1 on [0, 1], in steps of 1/256."""
    torch.testing.assert_close(bits_per_dim(torch.zeros(3), 784, 1 / 256), torch.full((3,), 8.0))
    torch.testing.assert_close(bits_per_dim(torch.tensor([-2.0 * math.log(2.0)]), 2), torch.ones(1))


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: flow_log_prob(MIXTURE, x, 1.0, 0.5), OptionError, "0 < sigma_min < sigma_max"),
        (lambda x: flow_log_prob(MIXTURE, x, 0.1, 5.0, steps=0), OptionError, "steps lies"),
        (lambda x: flow_log_prob(MIXTURE, x, 0.1, 5.0, tolerance=0.0), OptionError, "tolerance"),
        (lambda x: flow_log_prob(MIXTURE, x, 0.1, 5.0, probes=1, rng=generator()), OptionError, "2 or more"),
        (lambda x: flow_log_prob(MIXTURE, x, 0.1, 5.0, probes=4), OptionError, "rng"),
        (lambda x: flow_log_prob(MIXTURE, x, 0.1, 5.0, prior=Gaussian(3)), ShapeError, r"\(3,\)"),
        (lambda x: flow_log_prob(MIXTURE, x * math.nan, 0.1, 5.0, steps=2), DivergenceError, "left the numbers"),
        (
            lambda x: flow_log_prob(
                Energy.of(lambda x, sigma: x.sum(1), context=("sigma",)), x.repeat(1, 33), 0.1, 5.0
            ),
            OptionError,
            "pass probes",
        ),
        (lambda x: bits_per_dim(x, 0), OptionError, "dim is 1"),
        (lambda x: bits_per_dim(x, 2, 0.0), OptionError, "width"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(rows(3))
