"""Energies in other units: the density of a change of variables, its mass, its noise levels, and what is refused."""

import math

import pytest
import torch

import gibbsian as gb
from gibbsian.energies.rescaled import rescaled
from gibbsian.errors import OptionError, ShapeError

F64 = torch.float64
OFFSET, UNIT = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_gaussian_in_other_units_is_the_gaussian_with_these():
    x = 3.0 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    found = rescaled(gb.Gaussian(2), OFFSET, UNIT)
    expected = gb.Gaussian(loc=OFFSET.double(), scale=UNIT.double(), dim=2)
    torch.testing.assert_close(found(x), expected(x), atol=1e-12, rtol=0)


def test_one_unit_for_all_coordinates_counts_for_each():
    x = torch.randn(20, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    found = rescaled(gb.Gaussian((1, 2, 3)), 0.5, 2.0)
    expected = gb.Gaussian(loc=torch.full((1, 2, 3), 0.5), scale=2.0, dim=(1, 2, 3))
    torch.testing.assert_close(found(x), expected(x), atol=1e-12, rtol=0)


def test_the_mass_does_not_change_but_for_a_twin_without_the_volume():
    energy = gb.Energy.of(lambda z: z.square().sum(1) + 0.3 * z[:, 0].sin() + 2.0, (2,))
    mass = float(gb.quadrature(energy, -8.0, 8.0, 300).log_z.value)
    other = rescaled(energy, OFFSET, UNIT)
    assert float(gb.quadrature(other, -35.0, 35.0, 900).log_z.value) == pytest.approx(mass, abs=1e-6)
    twin = gb.Energy.of(lambda x: energy((x - OFFSET) / UNIT), (2,))
    assert abs(float(gb.quadrature(twin, -35.0, 35.0, 900).log_z.value) - mass) > 0.5


def test_noise_levels_are_in_the_new_units():
    def noisy(z, sigma):
        """Standard normal rows under noise, in the energy's own units."""
        variance = (1.0 + sigma**2)[:, None]
        return (0.5 * z.square() / variance + 0.5 * (2 * math.pi * variance).log()).sum(1)

    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    found = rescaled(gb.Energy.of(noisy, (2,), context=("sigma",)), 1.0, 2.0)
    expected = gb.Gaussian(loc=torch.ones(2), scale=math.sqrt(4.0 + 9.0), dim=2)
    torch.testing.assert_close(found(x, sigma=torch.full((30,), 3.0)), expected(x), atol=1e-12, rtol=0)
    assert found.context == ("sigma",)


@pytest.mark.parametrize("unit", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0])])
def test_units_are_positive(unit):
    with pytest.raises(OptionError, match="above 0"):
        rescaled(gb.Gaussian(2), 0.0, unit)


def test_units_fit_the_points():
    with pytest.raises(ShapeError, match="per coordinate"):
        rescaled(gb.Gaussian(3), 0.0, torch.ones(2))
    with pytest.raises(ShapeError, match="per coordinate"):
        rescaled(gb.Gaussian((1, 4, 4)), torch.zeros(1, 4, 4), 1.0)
