"""Whether the energy rises far away: Gaussians where the answer is known, walls, and what is no number."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from contracts import seeded
from gibbsian.applications.normalisable import check_normalisable, has_negative_weight
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.tractable import Gaussian, Uniform
from gibbsian.errors import OptionError

NARROW, WIDE, BASE = Gaussian(2), Gaussian(2, scale=2.0), Gaussian(2, scale=3.0)


def look(energy, base=BASE, **options):
    return check_normalisable(energy, base, rng=seeded(), **options)


@pytest.mark.parametrize(
    ("energy", "fine"),
    [
        (NARROW, True),
        # Precisions 1 and 1/4: of a - w b it is 1 - w / 4.
        (NARROW - 2.0 * WIDE, True),
        (NARROW - 3.9 * WIDE, True),
        (NARROW - 4.0 * WIDE, False),
        (NARROW - 4.1 * WIDE, False),
        (WIDE - 2.0 * NARROW, False),
        (WIDE - 2.0 * NARROW + Gaussian(2, scale=0.7), True),
        # Heavy tails: r^-a is integrable in the plane for a above 2.
        (Energy.of(lambda x: 1.2 * torch.log1p(x.square().sum(1)), (2,)), True),
        (Energy.of(lambda x: 0.9 * torch.log1p(x.square().sum(1)), (2,)), False),
        (Energy.of(lambda x: x.square()[:, 0] - 0.1 * x[:, 1], (2,)), False),
        (Uniform(2, low=-5.0, high=5.0), True),
        (Energy.of(lambda x: x.sum(1) * math.nan, (2,)), False),
    ],
)
def test_what_is_known_is_found(energy, fine):
    if fine:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = look(energy)
    else:
        with pytest.warns(RuntimeWarning, match="probably not normalisable"):
            found = look(energy)
    assert found.normalisable is fine
    assert (found.failing == 0.0) is fine


def test_the_warning_tells_what_was_found():
    """Of minus half the squared norm the slope at r is -r, and the growth -r^2, between radii a and b on average."""
    energy = Energy.of(lambda x: -0.5 * x.square().sum(1), (2,))
    with pytest.warns(RuntimeWarning, match=r"100% of the rays have less.*add a wide base, such as Gaussian\(2"):
        found = look(energy, Gaussian(2, scale=1.0), radii=(1.0, 3.0))
    # One standard deviation in the plane is sqrt(2) long.
    assert abs(found.slope + 2.0 * math.sqrt(2.0)) < 1e-4
    assert abs(found.growth[0] + 8.0 / math.log(3.0)) < 1e-3
    assert abs(found.distance - 3.0 * math.sqrt(2.0)) < 1e-5
    assert found.dim == 2


def test_one_bad_direction_among_many_is_found_where_rays_meet_it():
    bad = Energy.of(lambda x: x.square().sum(1) - 5.0 * x[:, 0].clamp(min=0.0) ** 2, (2,))
    assert 0.3 < look(bad, warn=False).failing < 0.5


def test_full_covariances_and_shapes():
    base = Gaussian(covariance=torch.tensor([[4.0, 1.0], [1.0, 2.0]]))
    assert look(NARROW, base).normalisable
    assert check_normalisable(Gaussian((1, 3, 3)), Gaussian((1, 3, 3)), rng=seeded()).dim == 9


def test_differences_are_seen_wherever_they_are():
    a, b = NARROW, WIDE
    assert not has_negative_weight(a + 2.0 * b)
    assert has_negative_weight(a - b)
    assert has_negative_weight(mixture(a, a - 0.1 * b))
    labelled = Energy.of(lambda x, y: x.sum(1), (2,), context=("y",))
    assert has_negative_weight((a - labelled).given(y=1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: look(NARROW, radii=(2.0, 1.0)),
        lambda: look(NARROW, rays=0),
        lambda: look(Energy.of(lambda x, sigma: x.sum(1), (2,), context=("sigma",))),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(OptionError):
        call()
