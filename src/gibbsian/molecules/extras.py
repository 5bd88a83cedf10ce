"""Packages that proteins need beyond Gibbsian's own: OpenMM and mdtraj, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gibbsian.errors import MissingPackageError

INSTALL = "pip install 'gibbsian[protein]'"
"""The one line that installs what this room needs."""


def require_openmm() -> Any:
    """Import OpenMM with its application layer.

    Returns
    -------
    The module ``openmm``; ``openmm.app`` and ``openmm.unit`` are imported with it.

    Raises
    ------
    MissingPackageError
        If it is not installed; the message says how to install it.
    """
    module = _required("openmm", "OpenMM", "computes physical energies and runs molecular dynamics")
    importlib.import_module("openmm.app")
    importlib.import_module("openmm.unit")
    return module


def require_mdtraj() -> Any:
    """Import mdtraj.

    Returns
    -------
    The module ``mdtraj``.

    Raises
    ------
    MissingPackageError
        If it is not installed; the message says how to install it.
    """
    return _required("mdtraj", "mdtraj", "reads and writes structures and trajectories")


def _required(module: str, name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{name} {purpose}, and is not installed: {INSTALL}") from error
