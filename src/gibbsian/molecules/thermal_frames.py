"""Frames of a simulation that held bonds fixed, with these bonds set free and brought to their temperature.

Bonds to hydrogens are held in most simulations, and a density over all coordinates needs their lengths. They are drawn
from their springs of the force field, and everything is then moved a little by Hamiltonian Monte Carlo under the whole
energy: a few hundredths of a picosecond, in which bonds and angles find their equilibrium and torsions hardly move.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.hmc import HMC
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.internal import InternalCoordinates
from gibbsian.molecules.physical import MolecularEnergy
from gibbsian.sampling import sample

STEP_PS = 0.001
"""Of the trajectories, with hydrogens as they are."""


@torch.no_grad()
def thermal_frames(
    energy: MolecularEnergy,
    internal: InternalCoordinates,
    x: Tensor,
    *,
    rng: Generator,
    trajectories: int = 4,
    leapfrog: int = 10,
    keep: int = 1,
    chunk: int = 256,
) -> Tensor:
    """Set bonds free and let frames equilibrate shortly.

    Parameters
    ----------
    energy
        Without constraints.
    internal
        Of the molecule.
    x
        Frames in nanometres, ``(n, atoms, 3)``.
    rng
        Of lengths and momenta.
    trajectories, leapfrog
        Trajectories for each frame, and their steps of 1 fs; the cost is their product per frame, in evaluations.
    keep
        Ends of trajectories that are returned, the last so many: bonds and angles are new in each, torsions are not.
    chunk
        Frames moved at once.

    Returns
    -------
    Tensor
        Internal coordinates, ``(keep * n, 3 * atoms - 6)`` float64: all frames, and all again.

    Raises
    ------
    OptionError
        If there is no trajectory, or fewer are made than are to be kept.
    """
    if trajectories < 1 or leapfrog < 1:
        raise OptionError(f"trajectories and leapfrog are 1 or more; got {trajectories} and {leapfrog}.")
    if not 1 <= keep <= trajectories:
        raise OptionError(f"keep counts ends of trajectories, 1 to {trajectories}; got {keep}.")
    z = internal.of(x.double())
    free, length, spread = _springs(energy, internal)
    still = z[:, free].std(0) < 0.1 * spread if len(z) > 1 else torch.ones(len(free), dtype=torch.bool)
    drawn = length + spread * torch.randn((len(z), len(free)), generator=rng, dtype=z.dtype)
    z[:, free] = torch.where(still, drawn, z[:, free])
    kernel = HMC(STEP_PS, leapfrog, scale=energy.scale(), jitter=0.3)
    moved = []
    for part in internal.cartesian(z).split(chunk):
        ends = sample(energy, kernel, part, steps=trajectories, warmup=trajectories - keep, thin=1, rng=rng).draws
        assert ends is not None
        moved.append(internal.of(ends.flatten(0, 1)).unflatten(0, (keep, len(part))))
    return torch.cat(moved, 1).flatten(0, 1)


def _springs(energy: MolecularEnergy, internal: InternalCoordinates) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates that are bonds of the force field, their lengths at rest and standard deviations in nm."""
    openmm = require_openmm()
    at = {frozenset(pair): i for i, pair in enumerate(list(zip(internal.order, internal.bonded))[1:])}
    found: dict[int, tuple[float, float]] = {}
    for force in energy.bridge.system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for k in range(force.getNumBonds()):
                a, b, length, stiffness = force.getBondParameters(k)
                if (i := at.get(frozenset((a, b)))) is not None and stiffness._value > 0:
                    found[i] = (length._value, float(np.sqrt(energy.kt / stiffness._value)))
    numbers = torch.tensor([found[i] for i in sorted(found)], dtype=torch.float64).reshape(-1, 2)
    return torch.tensor(sorted(found), dtype=torch.int64), numbers[:, 0], numbers[:, 1]
