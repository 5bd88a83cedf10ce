"""What residues of a structure lack for a force field, said in words."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gibbsian.errors import DataError
from gibbsian.molecules.extras import require_openmm

_WATER = {"HOH", "WAT", "H2O", "TIP3", "SOL"}
_CAPS = {"ACE", "NME", "NH2", "NMA", "FOR"}
_PROTEIN = {
    "ALA", "ARG", "ASN", "ASP", "ASH", "CYS", "CYX", "CYM", "GLN", "GLU", "GLH", "GLY", "HIS", "HID", "HIE", "HIP",
    "ILE", "LEU", "LYS", "LYN", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL",
}  # fmt: skip
_SHOWN = 5


def is_protein(residue: Any) -> bool:
    """Whether an OpenMM residue is an amino acid, or a cap at the end of a chain."""
    return residue.name in _PROTEIN or residue.name in _CAPS


def check_complete(topology: Any, forcefield: Any, path: Path, add_hydrogens: bool = False) -> None:
    """Refuse a structure that a force field cannot describe.

    Parameters
    ----------
    topology
        The ``openmm.app.Topology`` read from the file.
    forcefield
        An ``openmm.app.ForceField``.
    path
        For messages.
    add_hydrogens
        Hydrogens will be added, so that only what else is missing counts.

    Raises
    ------
    DataError
        With the residues, what each lacks, and what to do.
    """
    residues = topology.residues() if add_hydrogens else forcefield.getUnmatchedResidues(topology)
    unknown, waters, heavy, hydrogens = [], [], [], []
    for residue in residues:
        label = f"{residue.name}{residue.id} of chain {residue.chain.id}"
        names = {atom.name for atom in residue.atoms()}
        expected = standard_atoms().get(residue.name)
        if residue.name in _WATER:
            if not add_hydrogens:
                waters.append(label)
        elif expected is None:
            unknown.append(label)
        elif missing := sorted(expected - names - _terminal(residue)):
            heavy.append(f"{label} lacks {', '.join(missing)}")
        elif not any(atom.element is not None and atom.element.symbol == "H" for atom in residue.atoms()):
            hydrogens.append(label)
        elif not add_hydrogens:
            heavy.append(f"{label} has other atoms or bonds than the force field's {residue.name}")
    if heavy:
        raise DataError(
            f"Residues in {path} are not complete: {_listed(heavy)}. Add missing atoms with PDBFixer "
            "(pip install pdbfixer) or a modelling program, and take out alternative or foreign ones."
        )
    if unknown:
        raise DataError(
            f"The force field does not know {_listed(unknown)} in {path}. Take ligands, ions and modified residues out "
            "of the file (protein_only=True, or --protein-only, does it), or give force field files that describe them."
        )
    if waters:
        raise DataError(
            f"{path} holds {len(waters)} waters, which the force field does not describe: take them out for implicit "
            "solvent (protein_only=True, or --protein-only, does it), or give files with water, such as "
            "amber14-all.xml, amber14/tip3p.xml."
        )
    if hydrogens and not add_hydrogens:
        raise DataError(
            f"Hydrogens are missing in {path}: {_listed(hydrogens)}. Let them be added: add_hydrogens=True, or "
            "--add-hydrogens."
        )


@cache
def standard_atoms() -> dict[str, frozenset[str]]:
    """Names of the heavy atoms of each standard residue, from the table of bonds that OpenMM comes with."""
    table = Path(require_openmm().app.__file__).parent / "data" / "residues.xml"
    atoms: dict[str, frozenset[str]] = {}
    for residue in ElementTree.parse(table).getroot().iter("Residue"):
        ends = {bond.get(end, "") for bond in residue.iter("Bond") for end in ("from", "to")}
        heavy = {name for name in ends if name[:1] not in ("H", "-", "+", "") and not name[:1].isdigit()}
        atoms[residue.get("name", "")] = frozenset(heavy)
    return atoms


def _terminal(residue: Any) -> set[str]:
    """Atoms that only the last residue of a chain has."""
    last = list(residue.chain.residues())[-1]
    return set() if residue is last else {"OXT"}


def _listed(items: Iterable[str]) -> str:
    """The first few of a list, and how many more."""
    found = list(items)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
