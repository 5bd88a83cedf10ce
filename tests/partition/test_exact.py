"""Quadrature against closed forms, and its refusals."""

import math

import pytest
import torch

from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell, GaussianMixture
from gibbsian.energies.toys import Checkerboard, Ring, Rosenbrock
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.partition.exact import quadrature
from oracles import double_precision


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (DoubleWell, -7.0, 7.0),
        (Ring, -5.0, 5.0),
        (lambda: Rosenbrock(a=0.5, b=2.0, temperature=0.6), -6.0, 14.0),
        (lambda: Gaussian(covariance=torch.tensor([[1.0, 0.7], [0.7, 2.0]])), -11.0, 11.0),
        (lambda: GaussianMixture(torch.tensor([[-2.0], [1.0]]), 0.4), -6.0, 5.0),
    ],
)
def test_against_closed_forms(make, low, high):
    with double_precision():
        energy = make()
    found = quadrature(energy, low, high)
    error = abs(float(found.log_z.value) - energy.log_z)
    assert error < 1e-7
    assert float(found.log_z.lower) - 1e-7 <= energy.log_z <= float(found.log_z.upper) + 1e-7


def test_the_stated_error_covers_a_coarse_grid():
    with double_precision():
        energy = Ring()
    for points in (20, 40, 60):
        found = quadrature(energy, -5.0, 5.0, points).log_z
        assert abs(float(found.value) - energy.log_z) <= float(found.stderr)
    assert float(found.stderr) > 1e-6


def test_grid_density():
    with double_precision():
        energy = DoubleWell()
    low = torch.tensor([-4.0, -8.0])
    found = quadrature(energy, low, -low, 200)
    at = torch.stack((found.axes[0][70], found.axes[1][110])).unsqueeze(0)
    assert float(found.log_prob[70, 110]) == pytest.approx(float(energy.log_prob(at)), abs=1e-8)


def test_broken_twin_energy_off_by_a_constant_is_caught():
    with double_precision():
        energy = DoubleWell()
    shifted = Energy.of(lambda x: energy(x) + 0.01, event_shape=(2,))
    assert abs(float(quadrature(shifted.double(), -7.0, 7.0).log_z.value) - energy.log_z) > 0.009


def test_a_box_that_cuts_mass_is_refused():
    with pytest.raises(DomainError, match=r"Widen|outside"):
        quadrature(Gaussian(2), -2.0, 2.0)
    with pytest.raises(DomainError):
        quadrature(Gaussian(1), -20.0, 3.0)


def test_a_density_that_ends_at_the_box():
    with double_precision():
        found = quadrature(Checkerboard(), -4.0, 4.0, 800, edge=1.0)
    assert abs(float(found.log_z.value)) < 0.01


def test_function_without_a_shape():
    found = quadrature(Energy.of(lambda x: 0.5 * x.square().sum(1)), -8.0, 8.0, dim=1)
    assert float(found.log_z.value) == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-5)
    with pytest.raises(ShapeError, match="dim=1"):
        quadrature(Energy.of(lambda x: x.sum(1)), -8.0, 8.0)


def test_nan_is_named():
    with pytest.raises(DivergenceError, match="NaN"):
        quadrature(Energy.of(lambda x: x[:, 0].sqrt(), event_shape=(1,)), -1.0, 1.0)


def test_refusals():
    with pytest.raises(OptionError, match="even"):
        quadrature(Gaussian(2), -8.0, 8.0, 7)
    with pytest.raises(OptionError, match="low < high"):
        quadrature(Gaussian(2), 8.0, -8.0)
    with pytest.raises(ShapeError):
        quadrature(Gaussian(3), -8.0, 8.0)
