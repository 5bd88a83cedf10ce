"""Brackets: Bennett's estimate on weights whose law is known, and brackets that contain the truth."""

import math

import pytest
import torch

from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell, Funnel, ManyWell
from gibbsian.energies.toys import EightGaussians, Ring
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ShapeError
from gibbsian.partition.bracket import acceptance_ratio, between, bracket
from oracles import Z_LIMIT

TRUTH = -4.0


def crooks_pairs(runs: int, forward: int, reverse: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weights that obey Crooks' relation exactly: N(log Z - s^2/2, s^2) ahead, N(log Z + s^2/2, s^2) back."""
    rng = torch.Generator().manual_seed(0)
    f = torch.randn(runs, forward, dtype=torch.float64, generator=rng)
    r = torch.randn(runs, reverse, dtype=torch.float64, generator=rng)
    return TRUTH - 0.5 * spread**2 + spread * f, TRUTH + 0.5 * spread**2 + spread * r


@pytest.mark.parametrize(("n_f", "n_r"), [(200, 200), (400, 100)])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_acceptance_ratio_is_right_and_knows_its_error(n_f, n_r, spread):
    pairs = zip(*crooks_pairs(300, n_f, n_r, spread))
    found = [acceptance_ratio(f, r) for f, r in pairs]
    values, errors = (torch.stack(t) for t in zip(*found))
    # The spread of 300 normal values is known to 4.1%, so 23% is beyond 5.5 of those.
    assert float(values.std() / errors.mean()) == pytest.approx(1.0, abs=0.23)
    assert abs(float(values.mean()) - TRUTH) < Z_LIMIT * float(values.std()) / math.sqrt(300) + 0.1 * float(
        values.std()
    )


def test_acceptance_ratio_beats_one_sided_estimates():
    f, r = crooks_pairs(200, 200, 200, 2.0)
    both = torch.stack([acceptance_ratio(a, b)[0] for a, b in zip(f, r)])
    alone = torch.logsumexp(f, 1) - math.log(200)
    assert float((both - TRUTH).square().mean()) < 0.5 * float((alone - TRUTH).square().mean())


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_bounds_hold_at_their_confidence(spread):
    pairs = zip(*crooks_pairs(250, 100, 100, spread))
    found = [between(f, r, 0.99) for f, r in pairs]
    # At 99%, more than 15 failures in 250 have probability below 1e-7.
    assert sum(not float(b.lower) <= TRUTH <= float(b.upper) for b in found) <= 15


@pytest.mark.parametrize("wrong", [lambda f, r: (-f, -r), lambda f, r: (f + 1.0, r + 1.0), lambda f, r: (r, f)])
def test_broken_twins_of_weights_are_caught(wrong):
    f, r = (w[0] for w in crooks_pairs(1, 300, 300, 0.5))
    b = between(*wrong(f, r))
    # A sign, a forgotten constant, the two runs swapped: outside the bracket, or a bracket turned inside out.
    assert not float(b.lower) <= TRUTH <= float(b.upper)


TARGETS = {
    "eight gaussians": (EightGaussians, 3.0, 100),
    "double well": (DoubleWell, 2.0, None),
    "ring": (Ring, 3.0, None),
    "funnel": (lambda: Funnel(10), 3.0, 400),
    "many well": (lambda: ManyWell(8), 2.0, None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_bracket_contains_the_truth(name):
    make, scale, temperatures = TARGETS[name]
    energy = make()
    rng = torch.Generator().manual_seed(0)
    base = Gaussian(energy.event_shape, scale=scale)
    found = bracket(energy, base, energy.sample(400, rng), rng=rng, temperatures=temperatures)
    assert float(found.lower) <= energy.log_z <= float(found.upper)
    assert float(found.upper - found.lower) < 0.8
    assert abs(float(found.value) - energy.log_z) < Z_LIMIT * float(found.stderr)
    assert float(found.lower) < float(found.value) < float(found.upper)


def test_broken_twin_draws_of_another_model_are_caught():
    rng = torch.Generator().manual_seed(0)
    base, energy = Gaussian(2, scale=2.0), DoubleWell()
    one_well = energy.sample(2000, rng)
    one_well = one_well[one_well[:, 0] < 0][:200]
    # Draws that miss the deeper well: the upper bound is the one of the well they are in, below the truth.
    with pytest.warns(RuntimeWarning, match=r"bounds of log Z cross: at least .* The lower bound stands"):
        missing = bracket(energy, base, one_well, rng=rng, temperatures=150)
    assert float(missing.upper) < float(missing.lower) < energy.log_z


def test_broken_twin_energy_off_by_a_constant_is_caught():
    rng = torch.Generator().manual_seed(0)
    energy = Ring()
    shifted = Energy.of(lambda x: energy(x) + 0.5, event_shape=(2,))
    found = bracket(shifted, Gaussian(2, scale=3.0), energy.sample(256, rng), rng=rng)
    assert not float(found.lower) <= energy.log_z <= float(found.upper)
    assert float(found.lower) <= energy.log_z - 0.5 <= float(found.upper)


def test_draws_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="draws"):
        bracket(DoubleWell(), Gaussian(2), torch.zeros(10, 3), rng=torch.Generator())
