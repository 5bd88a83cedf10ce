"""Molecular systems: atoms, force field and coordinates, of alanine dipeptide and of any PDB file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.dipeptide import ATOMS, RESIDUES, dipeptide_bonds, dipeptide_coordinates
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.residues import check_complete, is_protein
from gibbsian.molecules.thermal import checked_temperature

IMPLICIT = ("amber99sb.xml", "amber99_obc.xml")
"""The AMBER ff99SB force field in the implicit solvent of Onufriev, Bashford and Case, of OpenMM's own files."""

LONGEST_BOND = 0.3
"""Nanometres; bonds of proteins are 0.21 at most, between sulphurs."""


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
    topology, positions = _read(path)
    field_ = _forcefield(forcefield)
    if protein_only:
        modeller = app.Modeller(topology, positions)
        modeller.delete([residue for residue in topology.residues() if not is_protein(residue)])
        topology, positions = modeller.topology, _numbers(modeller.positions)
        if not len(positions):
            raise DataError(f"There is no amino acid in {path}.")
    check_complete(topology, field_, path, add_hydrogens)
    if add_hydrogens:
        modeller = app.Modeller(topology, positions)
        modeller.addHydrogens(field_)
        topology, positions = modeller.topology, _numbers(modeller.positions)
    return _built(
        topology,
        positions,
        temperature,
        path.stem,
        forcefield,
        constrain_hydrogens=constrain_hydrogens,
        relax=relax,
    )


def backbone_torsions(topology: Any) -> list[tuple[str, tuple[int, int, int, int], tuple[int, int, int, int]]]:
    """Find the backbone torsions of an OpenMM topology.

    Returns
    -------
    For each residue that is bonded to one before and one after it: its name with its number, the atoms of phi, and the
    atoms of psi.
    """
    named = {residue: {atom.name: atom.index for atom in residue.atoms()} for residue in topology.residues()}
    joined: dict[Any, dict[str, Any]] = {residue: {} for residue in named}
    for first, second in topology.bonds():
        for a, b in ((first, second), (second, first)):
            if a.name == "C" and b.name == "N" and a.residue is not b.residue:
                joined[a.residue]["next"], joined[b.residue]["previous"] = b, a
    found = []
    for residue, names in named.items():
        ends = joined[residue]
        if len(ends) == 2 and {"N", "CA", "C"} <= names.keys():
            n, ca, c = names["N"], names["CA"], names["C"]
            label = f"{residue.name}{residue.id}"
            found.append((label, (ends["previous"].index, n, ca, c), (n, ca, c, ends["next"].index)))
    return found


def _numbers(positions: Any) -> np.ndarray:
    """Quantities of vectors as numbers, in nanometres."""
    unit = require_openmm().unit
    return np.array(positions.value_in_unit(unit.nanometer), dtype=np.float64).reshape(-1, 3)


def _read(path: Path) -> tuple[Any, np.ndarray]:
    app = require_openmm().app
    if not path.is_file():
        raise DataError(f"There is no file {path}. A structure is a .pdb, .cif or .mmcif file.")
    kinds = {".pdb": app.PDBFile, ".ent": app.PDBFile, ".cif": app.PDBxFile, ".mmcif": app.PDBxFile}
    if path.suffix.lower() not in kinds:
        raise DataError(f"A structure is a .pdb, .cif or .mmcif file; got {path}.")
    try:
        file = kinds[path.suffix.lower()](str(path))
        topology, positions = file.topology, _numbers(file.positions)
    except Exception as error:
        raise DataError(f"{path} cannot be read as a structure: {error}") from error
    if not len(positions):
        raise DataError(f"{path} holds no atoms.")
    if (bad := int((~np.isfinite(positions)).any(1).sum())) > 0:
        raise DataError(f"{bad} of {len(positions)} atoms in {path} have coordinates that are not finite.")
    _check_bonds(topology, positions, path)
    return topology, positions


def _check_bonds(topology: Any, positions: np.ndarray, path: Path) -> None:
    """Refuse lengths of bonds that tell of another unit, or of a molecule in pieces."""
    bonds = list(topology.bonds())
    ends = np.array([(a.index, b.index) for a, b in bonds], dtype=int).reshape(-1, 2)
    lengths = np.linalg.norm(positions[ends[:, 0]] - positions[ends[:, 1]], axis=1)
    if len(lengths) and not 0.06 < float(np.median(lengths)) < 0.3:
        raise DataError(
            f"Bonds in {path} have a median length of {10 * float(np.median(lengths)):.3g} angstroms, and 1 to 1.5 is "
            "usual: the coordinates are in another unit. PDB files are in angstroms, ten to a nanometre."
        )
    if (torn := lengths > LONGEST_BOND).any():
        (a, b), length = bonds[int(torn.argmax())], 10 * float(lengths[torn.argmax()])
        raise DataError(
            f"{int(torn.sum())} bonds in {path} are longer than {10 * LONGEST_BOND:g} angstroms, such as {length:.1f} "
            f"between {a.residue.name}{a.residue.id} {a.name} and {b.residue.name}{b.residue.id} {b.name}: a periodic "
            "box splits the molecule (make it whole, for example with mdtraj's image_molecules), or residues are "
            "missing in between (model them, or end the chain there with TER)."
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
        hold.addTorsion(*atoms, [torsion_of(positions, atoms)])
    copy.addForce(hold)
    context = openmm.Context(copy, openmm.VerletIntegrator(0.001), platform_for(system))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=1000)
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def torsion_of(positions: np.ndarray, atoms: Sequence[int]) -> Any:
    """Torsions in radians of four atoms, for coordinates ``(..., atoms, 3)``: one less two axes."""
    a, b, c, d = (positions[..., i, :] for i in atoms)
    axis = (c - b) / np.linalg.norm(c - b, axis=-1, keepdims=True)
    first, second = np.cross(b - a, axis), np.cross(axis, d - c)
    sine = (np.cross(first, second) * axis).sum(-1)
    return np.arctan2(sine, (first * second).sum(-1))


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
