"""How draws meet each term: shares that are known, errors that hold, and a table that reads."""

from __future__ import annotations

import math

import pytest
import torch

from contracts import seeded
from gibbsian.applications.constraints import constraints, terms_of
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, OptionError

A = Gaussian(loc=torch.zeros(1, dtype=torch.float64))
B = Gaussian(loc=torch.tensor([2.0], dtype=torch.float64))


def inside(shift, scale=1.0):
    """The mass of N(shift, scale^2) between the 2.5 and 97.5 per cent quantiles of N(0, 1)."""
    edge = torch.tensor([-1.959964, 1.959964], dtype=torch.float64)
    return float(torch.special.ndtr((edge - shift) / scale).diff())


def judged(energy, x, seeds=(1, 2), m=4000):
    return constraints(energy, x, [term.sample(m, seeded(s)) for (_, term), s in zip(terms_of(energy), seeds)])


def test_a_product_meets_both_terms_as_it_should():
    """The product of N(0, 1) and N(2, 1) is N(1, 1/2)."""
    x = 1.0 + math.sqrt(0.5) * torch.randn((6000, 1), generator=seeded(), dtype=torch.float64)
    found = judged(A + B, x)
    for term in found.terms:
        truth = inside(1.0, math.sqrt(0.5))
        assert abs(term.met.value - truth) < 5.0 * term.met.stderr
        assert term.met.stderr < 0.01
        assert (term.own, term.weight) == (0.95, 1.0)


def test_a_negated_term_counts_the_draws_outside():
    found = judged(A - 0.5 * B, A.sample(6000, seeded()))
    assert abs(found.terms[0].met.value - 0.95) < 5.0 * found.terms[0].met.stderr
    assert abs(found.terms[1].met.value - (1.0 - inside(2.0))) < 5.0 * found.terms[1].met.stderr
    assert found.terms[1].own == pytest.approx(0.05)
    told = str(found)
    assert "Gaussian" in told
    assert "-0.5" in told
    assert "above" in told.splitlines()[2]
    assert "at most" in told.splitlines()[1]


def test_the_errors_are_those_of_both_samples():
    """Over 300 repeats the deviations have the spread that is told; without the threshold's part it would be 0.77."""
    z = []
    for seed in range(300):
        x, own = A.sample(400, seeded(2 * seed)), A.sample(600, seeded(2 * seed + 1))
        met = constraints(A, x, [own]).terms[0].met
        z.append((met.value - 0.95) / met.stderr)
    assert 0.85 < float(torch.tensor(z).std()) < 1.2


def test_mixtures_noise_levels_and_fixed_labels():
    noisy = Energy.of(lambda x, sigma: 0.5 * (x / sigma[:, None]).square().sum(1), (1,), context=("sigma",))
    labelled = Energy.of(lambda x, y: 0.5 * (x - y[:, None]).square().sum(1), (1,), context=("y",))
    x = A.sample(2000, seeded())
    found = constraints(mixture(noisy, A, weights=[0.25, 0.75]), x, [2.0 * x, x], sigma=2.0, names=["wide", "a"])
    assert [term.name for term in found.terms] == ["wide", "a"]
    assert [term.weight for term in found.terms] == [0.25, 0.75]
    assert found.terms[0].met.value > 0.99
    assert abs(found.terms[1].met.value - 0.95) < 0.001
    fixed = constraints((A + labelled).given(y=torch.tensor(2.0)), x, [x, x + 2.0])
    assert abs(fixed.terms[1].met.value - inside(2.0)) < 0.05
    alone = constraints(A, x, [x])
    assert len(alone.terms) == 1
    never = constraints(A, x + 100.0, [x]).terms[0].met
    assert never.value == 0.0
    assert 0.0 < never.stderr < 0.001


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: constraints(A + B, x, [x]), OptionError, "2 terms, Gaussian"),
        (lambda x: constraints(A + B, x, [x, x], names=["a"]), OptionError, "1 names"),
        (lambda x: constraints(A, x, [x], quantile=1.0), OptionError, "between 0 and 1"),
        (lambda x: constraints(A, x, [x[:1]]), OptionError, "2 or more draws"),
        (lambda x: constraints(Energy.of(lambda x, sigma: x.sum(1), context=("sigma",)), x, [x]), OptionError,
         "open context"),
        (lambda x: constraints(lambda x: x.sum(1), x, [x]), ArgumentTypeError, "energy's terms"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(A.sample(10, seeded()))
