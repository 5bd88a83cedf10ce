r"""Well-tempered metadynamics on the torsions of a residue, and the weights that take its bias out again.

Gaussians are added, as the simulation goes, to a bias V on the torsions phi and psi where it has been, each lower by
:math:`e^{-V / (k \Delta T)}` than the first, with :math:`\Delta T = (\gamma - 1) T`; V then tends to
:math:`-(1 - 1/\gamma) F` up to a constant, F being the free energy, and barriers of F are lower by the factor
:math:`\gamma`. A frame's weight towards the unbiased law is :math:`e^{(V(s, t) - c(t)) / kT}` with the bias at its own
time, and what the growing bias has added on average,

.. math:: c(t) = kT \log \frac{\int e^{\frac{\gamma}{\gamma - 1} V(s, t) / kT} ds}
                            {\int e^{\frac{1}{\gamma - 1} V(s, t) / kT} ds} .

Weights by the bias of the end alone would make of early frames what they were not drawn from.

`Well-tempered metadynamics: a smoothly converging and tunable free-energy method (Barducci, Bussi & Parrinello, 2008)
<https://arxiv.org/abs/0803.3861>`_; `A time-independent free energy estimator for metadynamics (Tiwary & Parrinello,
2015) <https://doi.org/10.1021/jp504920s>`_ for the weights.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gibbsian.errors import OptionError
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.reweighting import effective_sample_size
from gibbsian.molecules.thermal import thermal_energy


@dataclass(frozen=True)
class Bias:
    """Settings of well-tempered metadynamics on phi and psi.

    Parameters
    ----------
    factor
        The bias factor gamma, above 1: barriers of the free energy are divided by it.
    height
        Of the first Gaussians, in kJ/mol.
    width
        Their standard deviation in both torsions, in radians.
    every
        Picoseconds between two of them.
    grid
        Intervals of each torsion in the table of the bias.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    factor: float = 6.0
    height: float = 1.0
    width: float = 0.35
    every: float = 1.0
    grid: int = 60

    def __post_init__(self) -> None:
        if not self.factor > 1.0:
            raise OptionError(f"The bias factor is above 1, usually 5 to 15; got {self.factor}.")
        if not (self.height > 0 and self.width > 0 and self.every > 0):
            raise OptionError(
                "Height (kJ/mol), width (radians) and interval (ps) of the Gaussians are positive; got "
                f"{self.height}, {self.width}, {self.every}."
            )
        if not self.grid >= 5 * 2 * math.pi / self.width / 2:
            raise OptionError(
                f"A grid of {self.grid} is too coarse for Gaussians of {self.width} radians: take "
                f"{math.ceil(5 * math.pi / self.width)} or more."
            )


def biased(
    system: Any, torsions: Sequence[Sequence[int]], temperature: float, steps: int, bias: Bias, table: np.ndarray | None
) -> Any:
    """Add the bias to an OpenMM system, in place.

    Parameters
    ----------
    system
        The ``openmm.System``.
    torsions
        The atoms of phi, and of psi.
    temperature
        In kelvin.
    steps
        Steps of the integrator between two Gaussians.
    bias
        The settings.
    table
        A bias to go on from, as `bias_table` gives it.

    Returns
    -------
    The ``openmm.app.metadynamics.Metadynamics`` that steps a simulation.
    """
    openmm = require_openmm()
    from openmm.app.metadynamics import BiasVariable, Metadynamics

    variables = []
    for atoms in torsions:
        force = openmm.CustomTorsionForce("theta")
        force.addTorsion(*atoms, [])
        variables.append(BiasVariable(force, -math.pi, math.pi, bias.width, True, gridWidth=bias.grid + 1))
    with tempfile.TemporaryDirectory() as folder:
        # OpenMM takes up what other walkers have left in a folder: here, this run before it was interrupted.
        shared: dict[str, Any] = {}
        if table is not None:
            np.save(Path(folder) / "bias_0_1.npy", table)
            shared = {"saveFrequency": steps * 2**40, "biasDir": folder}
        kept = np.random.get_state()  # noqa: NPY002 - it names itself by the global generator, which is not ours
        try:
            return Metadynamics(system, variables, temperature, bias.factor, bias.height, steps, **shared)
        finally:
            np.random.set_state(kept)  # noqa: NPY002


def bias_table(metadynamics: Any) -> np.ndarray:
    """The bias in kJ/mol on its grid, psi along the first axis and phi along the second, both from -180 to 180."""
    free = np.asarray(metadynamics.getFreeEnergy()._value)
    return -free * (1.0 - 1.0 / metadynamics.biasFactor)


def bias_at(table: np.ndarray, phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """The bias in kJ/mol at torsions in radians, by periodic cubic splines.

    Parameters
    ----------
    table
        As `bias_table` gives it.
    phi, psi
        Of one shape, which is the result's.
    """
    from scipy.ndimage import map_coordinates

    cells = len(table) - 1
    where = [(np.asarray(angle) + math.pi) / (2 * math.pi) * cells for angle in (psi, phi)]
    # The last row and column are the first again.
    return map_coordinates(table[:-1, :-1], where, order=3, mode="grid-wrap")


def bias_level(table: np.ndarray, temperature: float, factor: float) -> float:
    """c(t) of a bias in kJ/mol: what it has come to on average.

    Parameters
    ----------
    table
        As `bias_table` gives it.
    temperature
        In kelvin.
    factor
        The bias factor, above 1.
    """
    from scipy.special import logsumexp

    kt = thermal_energy(temperature)
    v = table[:-1, :-1] / kt / (factor - 1.0)
    return kt * (float(np.asarray(logsumexp(factor * v))) - float(np.asarray(logsumexp(v))))


def rebuilt_bias(phi: np.ndarray, psi: np.ndarray, temperature: float, bias: Bias, frame_ps: float) -> np.ndarray:
    """The bias at each frame less its `bias_level`, in kJ/mol, from the trajectory alone: `simulate` keeps the same.

    Parameters
    ----------
    phi, psi
        Of all frames in radians, ``(n,)``.
    temperature
        In kelvin.
    bias
        The settings of the run.
    frame_ps
        Time between frames; a whole number of them goes between two Gaussians, so that each stands at a frame.

    Raises
    ------
    OptionError
        If Gaussians do not stand at frames.
    """
    apart = round(bias.every / frame_ps)
    if apart < 1 or abs(apart * frame_ps - bias.every) > 1e-6 * frame_ps:
        raise OptionError(
            f"Gaussians every {bias.every:g} ps do not stand at frames every {frame_ps:g} ps; where they were is lost."
        )
    axis, table = np.linspace(-math.pi, math.pi, bias.grid + 1), np.zeros((bias.grid + 1,) * 2)
    found, warmth = np.zeros(len(phi)), (bias.factor - 1.0) * thermal_energy(temperature)
    for first in range(0, len(phi), apart):
        part = slice(first, first + apart)
        felt = bias_at(table, phi[part], psi[part])
        found[part] = felt - bias_level(table, temperature, bias.factor)
        if len(felt) == apart:
            rows, columns = (
                np.exp(-0.5 * ((np.mod(axis - a[part][-1] + math.pi, 2 * math.pi) - math.pi) / bias.width) ** 2)
                for a in (psi, phi)
            )
            table += bias.height * math.exp(-felt[-1] / warmth) * np.outer(rows, columns)
    return found


def unbiasing_weights(bias: np.ndarray, temperature: float, discard: float = 0.1) -> np.ndarray:
    """Weights of frames towards the unbiased law, which sum to their number.

    Parameters
    ----------
    bias
        The bias at each frame less its `bias_level`, in kJ/mol, in order of time.
    temperature
        In kelvin.
    discard
        Part of the frames at the start that weighs nothing: there the bias grew fast, and its level is not settled.

    Raises
    ------
    OptionError
        If the part is not from 0 to below 1.
    """
    if not 0.0 <= discard < 1.0:
        raise OptionError(f"The part of frames to discard lies from 0 to below 1; got {discard}.")
    weight = np.exp((bias - bias.max(initial=-math.inf)) / thermal_energy(temperature))
    weight[: int(discard * len(weight))] = 0.0
    return weight * (len(weight) / weight.sum())


def effective_frames(weights: np.ndarray) -> float:
    """Kish's effective number of weighted frames, for as far as they are independent: (sum w)^2 / sum w^2."""
    return effective_sample_size(torch.tensor(weights)) if len(weights) else 0.0
