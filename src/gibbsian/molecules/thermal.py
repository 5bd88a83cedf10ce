"""Temperatures of molecules, and the energy kT that turns kJ/mol into nats."""

from __future__ import annotations

import math

from gibbsian.errors import OptionError

GAS_CONSTANT = 0.00831446261815324
"""In kJ/mol/K: Boltzmann's constant times Avogadro's, exact since the units were redefined in 2019."""


def thermal_energy(temperature: float) -> float:
    """Return kT in kJ/mol: divide an energy in kJ/mol by it to have nats.

    Parameters
    ----------
    temperature
        In kelvin.

    Raises
    ------
    OptionError
        If the temperature is not a positive finite number.
    """
    return GAS_CONSTANT * checked_temperature(temperature)


def checked_temperature(temperature: float) -> float:
    """Refuse what is no temperature in kelvin.

    Raises
    ------
    OptionError
        If it is not a positive finite number.
    """
    if not isinstance(temperature, (int, float)) or not math.isfinite(temperature) or temperature <= 0:
        raise OptionError(f"A temperature is a positive number of kelvin, such as 300; got {temperature!r}.")
    return float(temperature)
