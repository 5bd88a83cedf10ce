"""Importance sampling: closed forms, bounds that hold, and weights that are dominated by a few, said."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.base import Energy
from gibbsian.energies.flows import spline_flow
from gibbsian.energies.neural import MLP
from gibbsian.energies.tilted import tilted
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.partition.importance import importance_sampling

D = torch.float64
BASE = gb.Gaussian(3, scale=1.4).double()


def narrow(x):
    """A Gaussian of scale 1 about 0.3, without its constant; log Z = 1.5 log 2 pi."""
    return 0.5 * (x - 0.3).square().sum(1)


TARGET = Energy.of(narrow, (3,))
TRUTH = 1.5 * math.log(2 * math.pi)


def check(energy) -> None:
    inside = 0
    for seed in range(20):
        rng = seeded(seed)
        draws = 0.3 + torch.randn((500, 3), generator=rng, dtype=D)
        found = importance_sampling(energy, BASE, draws, rng=rng, draws=1000, confidence=0.9)
        assert abs(float(found.value) - TRUTH) < 6 * float(found.stderr), "missed: value"
        inside += bool(found.lower < TRUTH) and bool(found.upper > TRUTH)
        alone = importance_sampling(energy, BASE, rng=seeded(seed), draws=1000)
        assert float(alone.upper) == math.inf
        assert abs(float(alone.value) - TRUTH) < 6 * float(alone.stderr)
    # The bounds hold with a probability of 0.9 or more: 13 of 20 or fewer would be one chance in ten thousand.
    assert inside > 13


def test_value_and_bounds_are_right():
    check(TARGET)
    with pytest.raises(AssertionError, match="missed: value"):
        check(TARGET + Energy.of(lambda x: x.new_full((len(x),), 0.4)))


def test_many_draws_go_in_parts(monkeypatch):
    whole = importance_sampling(BASE, BASE, rng=seeded(), draws=50)
    assert float(whole.value) == pytest.approx(0.0, abs=1e-12)
    assert float(whole.ess) == pytest.approx(50.0)
    monkeypatch.setattr("gibbsian.partition.importance.CHUNK", 16)
    assert importance_sampling(BASE, BASE, rng=seeded(), draws=50).chains == 50


def test_bits_have_weights_too():
    base = gb.Bernoulli(probs=torch.full((4,), 0.5))
    target = gb.Bernoulli(probs=torch.tensor([0.3, 0.6, 0.5, 0.4]))
    found = importance_sampling(target, base, rng=seeded(), draws=4000)
    assert abs(float(found.value)) < 5 * float(found.stderr)


def test_a_tilt_whose_weights_degenerate_is_said():
    pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = spline_flow(2, transforms=1, hidden=(8,), passes=2)
    steep = tilted(flow, Energy.of(lambda x: 60.0 * (x - 3.0).square().sum(1), (2,)), None, from_zero=False)
    with pytest.warns(RuntimeWarning, match=r"importance weights are dominated by a few: ess .* of 2000"):
        found = importance_sampling(steep, steep.base, rng=seeded(), draws=2000)
    assert float(found.ess) < 40
    mild = tilted(flow, MLP(2, hidden=(8,)), from_zero=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importance_sampling(mild, mild.base, rng=seeded(), draws=2000)


REFUSED = {
    "no base": ({"proposal": MLP(3)}, ArgumentTypeError, "tractable"),
    "another shape": ({"proposal": gb.Gaussian(2)}, ShapeError, r"\(2,\)"),
    "another domain": ({"proposal": gb.Bernoulli(torch.zeros(3))}, DomainError, "of its kind"),
    "one draw": ({"draws": 1}, OptionError, "2 or more"),
    "no confidence": ({"confidence": 1.0}, OptionError, "confidence"),
    "other draws": ({"model_draws": torch.zeros(5, 2)}, ShapeError, "draws holds"),
    "no weight": ({"energy": Energy.of(lambda x: x.sum(1) * math.nan, (3,))}, DivergenceError, "None of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    change, error, message = REFUSED[case]
    told = {"energy": TARGET, "proposal": gb.Gaussian(3), "rng": seeded(), "draws": 100} | change
    with pytest.raises(error, match=message):
        importance_sampling(**told)
