"""Which of OpenMM's platforms computes a system."""

from __future__ import annotations

from typing import Any

from gibbsian.errors import OptionError
from gibbsian.molecules.extras import require_openmm

SMALL = 40
"""Atoms up to which one thread of OpenMM's reference code is faster than its code for many."""


def platform_for(system: Any, name: str | None = None) -> Any:
    """Choose the OpenMM platform: the reference code, in double precision, for few atoms, else the CPU's.

    Parameters
    ----------
    system
        An ``openmm.System``.
    name
        Choose this one: ``"Reference"``, ``"CPU"``, ``"CUDA"``, ``"OpenCL"``.

    Raises
    ------
    OptionError
        If there is no such platform here.
    """
    platforms = require_openmm().Platform
    if name is None:
        name = "Reference" if system.getNumParticles() <= SMALL else "CPU"
    here = [platforms.getPlatform(i).getName() for i in range(platforms.getNumPlatforms())]
    if name not in here:
        raise OptionError(f"OpenMM has no platform {name!r} on this machine; it has {', '.join(here)}.")
    return platforms.getPlatformByName(name)
