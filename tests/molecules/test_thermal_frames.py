"""Bonds that a simulation held fixed come to the temperature that their springs say, and torsions stay."""

import pytest
import torch

pytest.importorskip("openmm")

from gibbsian.errors import OptionError
from gibbsian.molecules.dipeptide import PHI, PSI
from gibbsian.molecules.physical import MolecularEnergy
from gibbsian.molecules.systems import alanine_dipeptide
from gibbsian.molecules.thermal_frames import thermal_frames
from gibbsian.molecules.zmatrix import internal_coordinates

MOLECULE = alanine_dipeptide()
ENERGY = MolecularEnergy(MOLECULE)
INTERNAL = internal_coordinates(MOLECULE)


def test_bonds_tremble_as_their_springs_say():
    x = ENERGY.start(120)
    z = thermal_frames(ENERGY, INTERNAL, x, rng=torch.Generator().manual_seed(0), trajectories=4, leapfrog=8, keep=3)
    assert z.shape == (360, 60)
    pairs = list(zip(INTERNAL.order, INTERNAL.bonded))[1:]
    springs = {}
    force = next(f for f in ENERGY.bridge.system.getForces() if "HarmonicBond" in f.getName())
    for k in range(force.getNumBonds()):
        a, b, length, stiffness = force.getBondParameters(k)
        springs[frozenset((a, b))] = length._value, (ENERGY.kt / stiffness._value) ** 0.5
    length, spread = torch.tensor([springs[frozenset(pair)] for pair in pairs], dtype=torch.float64).T
    found = z[:, :21]
    assert float(((found.std(0) / spread) - 1).abs().max()) < 0.4
    assert float(((found.mean(0) - length) / spread).abs().max()) < 1.2
    moved = INTERNAL.wrap(z - INTERNAL.of(x).repeat(3, 1))[:, [INTERNAL.torsion(PHI), INTERNAL.torsion(PSI)]]
    assert float(moved.abs().max()) < 1.0


def test_bad_input():
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(OptionError, match="1 or more; got 0 and 8"):
        thermal_frames(ENERGY, INTERNAL, ENERGY.start(2), rng=rng, trajectories=0, leapfrog=8)
    with pytest.raises(OptionError, match="1 to 2; got 3"):
        thermal_frames(ENERGY, INTERNAL, ENERGY.start(2), rng=rng, trajectories=2, keep=3)
