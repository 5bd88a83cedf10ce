"""Molecular systems: atoms, force field and coordinates, of alanine dipeptide and of any PDB file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.backbone import backbone_torsions, torsion_of
from gibbsian.molecules.dipeptide import ATOMS, RESIDUES, dipeptide_bonds, dipeptide_coordinates
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.platforms import platform_for
from gibbsian.molecules.residues import check_complete, is_protein
from gibbsian.molecules.structures import in_nanometres, read_structure
from gibbsian.molecules.thermal import checked_temperature

IMPLICIT = ("amber99sb.xml", "amber99_obc.xml")
"""The AMBER ff99SB force field in the implicit solvent of Onufriev, Bashford and Case, of OpenMM's own files."""


@dataclass(frozen=True)
class MolecularSystem:
    """A molecule with its force field, coordinates and temperature.

    Attributes
    ----------
    system
        The ``openmm.System``: masses and forces.
    topology
        The ``openmm.app.Topology``: names and bonds of atoms, residues, chains.
    positions
        Coordinates in nanometres, ``(atoms, 3)``, where simulations and chains start.
    temperature
        In kelvin.
    name
        For files and messages.
    forcefield
        Names of the force field's files.
    """

    system: Any = field(repr=False)
    topology: Any = field(repr=False)
    positions: np.ndarray = field(repr=False)
    temperature: float
    name: str
    forcefield: tuple[str, ...] = IMPLICIT

    @property
    def atoms(self) -> int:
        """How many atoms there are."""
        return self.system.getNumParticles()

    @property
    def constraints(self) -> int:
        """How many distances are held fixed."""
        return self.system.getNumConstraints()

    @property
    def masses(self) -> np.ndarray:
        """Masses of the atoms in daltons, ``(atoms,)``."""
        return np.array([self.system.getParticleMass(i)._value for i in range(self.atoms)])

    def backbone_torsions(self) -> list[tuple[str, tuple[int, int, int, int], tuple[int, int, int, int]]]:
        """Residues that have both backbone torsions: name, atoms of phi, atoms of psi."""
        return backbone_torsions(self.topology)


def alanine_dipeptide(
    temperature: float = 300.0,
    *,
    phi: float = -80.0,
    psi: float = 80.0,
    constrain_hydrogens: bool = False,
    forcefield: Sequence[str] = IMPLICIT,
) -> MolecularSystem:
    """Alanine dipeptide, ACE-ALA-NME, 22 atoms, in implicit solvent.

    The molecule on which methods for conformations are tried: two backbone torsions with a few basins between which
    barriers of several kT stand. It is built from standard bond lengths and angles, without a file, and relaxed at the
    torsions asked for.

    Parameters
    ----------
    temperature
        In kelvin.
    phi, psi
        Torsions at the start, in degrees.
    constrain_hydrogens
        Hold bonds to hydrogens at their lengths, for molecular dynamics with steps of 2 fs. A system with constraints
        has no density over all coordinates, so that chains on `MolecularEnergy` need it without.
    forcefield
        Files of a force field that OpenMM knows.

    Raises
    ------
    OptionError
        If the temperature is not positive, an angle is not finite, or a force field's file cannot be found.
    MissingPackageError
        If OpenMM is not installed.
    """
    app = require_openmm().app
    if not np.isfinite([phi, psi]).all():
        raise OptionError(f"The torsions at the start are angles in degrees; got phi={phi}, psi={psi}.")
    topology = app.Topology()
    chain = topology.addChain()
    residues = {name: topology.addResidue(name, chain) for name in RESIDUES}
    atoms = [topology.addAtom(a, app.Element.getBySymbol(a[0]), residues[r]) for a, r in ATOMS]
    for first, second in dipeptide_bonds():
        topology.addBond(atoms[first], atoms[second])
    positions = dipeptide_coordinates(np.radians(phi), np.radians(psi))
    torsions = backbone_torsions(topology)[0][1:]
    return _built(
        topology, positions, temperature, "ala2", forcefield, constrain_hydrogens=constrain_hydrogens, held=torsions
    )


def system_from_pdb(
    path: str | Path,
    temperature: float = 300.0,
    *,
    forcefield: Sequence[str] = IMPLICIT,
    protein_only: bool = False,
    add_hydrogens: bool = False,
    constrain_hydrogens: bool = False,
    relax: bool = True,
) -> MolecularSystem:
    """Build a system from a structure in a PDB or PDBx/mmCIF file.

    Parameters
    ----------
    path
        A ``.pdb``, ``.cif`` or ``.mmcif`` file with all heavy atoms. Of several models the first is taken.
    temperature
        In kelvin.
    forcefield
        Files of a force field that OpenMM knows; implicit solvent by default.
    protein_only
        Leave out waters, ions and ligands: all residues that are not amino acids or caps of a chain.
    add_hydrogens
        Add the hydrogens that the file leaves out, as those of crystal structures do, at pH 7.
    constrain_hydrogens
        As for `alanine_dipeptide`.
    relax
        Go to the nearest minimum of the energy, which takes clashes and strain out of an experimental structure.

    Raises
    ------
    OptionError
        If the temperature is not positive or a force field's file cannot be found.
    DataError
        If the file cannot be read, its coordinates are not finite or not in angstroms, or residues are unknown to the
        force field or lack atoms; the message says which and what to do.
    MissingPackageError
        If OpenMM is not installed.
    """
    app = require_openmm().app
    path = Path(path)
    topology, positions = read_structure(path)
    field_ = _forcefield(forcefield)
    if protein_only:
        modeller = app.Modeller(topology, positions)
        modeller.delete([residue for residue in topology.residues() if not is_protein(residue)])
        topology, positions = modeller.topology, in_nanometres(modeller.positions)
        if not len(positions):
            raise DataError(f"There is no amino acid in {path}.")
    check_complete(topology, field_, path, add_hydrogens)
    if add_hydrogens:
        modeller = app.Modeller(topology, positions)
        modeller.addHydrogens(field_)
        topology, positions = modeller.topology, in_nanometres(modeller.positions)
    return _built(
        topology,
        positions,
        temperature,
        path.stem,
        forcefield,
        constrain_hydrogens=constrain_hydrogens,
        relax=relax,
    )


def _forcefield(files: Sequence[str]) -> Any:
    app = require_openmm().app
    try:
        return app.ForceField(*files)
    except Exception as error:
        raise OptionError(
            f"OpenMM has no force field of the files {', '.join(files)}: {error}. Known ones are, for example, "
            f"{', '.join(IMPLICIT)}, or amber14-all.xml, implicit/obc2.xml."
        ) from error


def _built(
    topology: Any,
    positions: np.ndarray,
    temperature: float,
    name: str,
    forcefield: Sequence[str],
    *,
    constrain_hydrogens: bool,
    relax: bool = True,
    held: Sequence[tuple[int, ...]] = (),
) -> MolecularSystem:
    app = require_openmm().app
    temperature = checked_temperature(temperature)
    box = topology.getPeriodicBoxVectors() is not None and not any("obc" in f or "gb" in f for f in forcefield)
    described = _forcefield(forcefield)
    try:
        system = described.createSystem(
            topology,
            nonbondedMethod=app.PME if box else app.NoCutoff,
            constraints=app.HBonds if constrain_hydrogens else None,
            rigidWater=constrain_hydrogens,
        )
    except ValueError as error:
        raise DataError(
            f"The force field {', '.join(forcefield)} does not describe {name}: {error}. Implicit solvents know no "
            "ions: take them out of the file, or let protein_only=True (--protein-only) do it."
        ) from error
    if relax:
        positions = _relaxed(system, positions, held)
    return MolecularSystem(system, topology, positions, temperature, name, tuple(forcefield))


def _relaxed(system: Any, positions: np.ndarray, held: Sequence[tuple[int, ...]] = ()) -> np.ndarray:
    """Coordinates of the nearest minimum, with some torsions held where they are."""
    openmm = require_openmm()
    copy = openmm.XmlSerializer.clone(system)
    hold = openmm.CustomTorsionForce("1000*(1-cos(theta-theta0))")
    hold.addPerTorsionParameter("theta0")
    for atoms in held:
        hold.addTorsion(*atoms, [float(torsion_of(positions, atoms))])
    copy.addForce(hold)
    context = openmm.Context(copy, openmm.VerletIntegrator(0.001), platform_for(system))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=1000)
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)
