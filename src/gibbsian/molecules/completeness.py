"""Whether proteins are complete: backbones of all residues, and chains without gaps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from gibbsian.errors import DataError

BACKBONE = ("N", "CA", "C", "O")
"""Heavy atoms of every residue's backbone."""


TERMINAL = ("OXT", "OT1", "OT2", "O1", "O2", "OC1", "OC2")
"""Names that the last residue's oxygen has instead."""


PEPTIDE = 0.25
"""Longest distance in nm between C of one residue and N of the next that are bonded; the bond has 0.133."""


def check_complete(topology: Any, source: str) -> None:
    """Check that amino acids have their backbones.

    Raises
    ------
    DataError
        With what is missing and what puts it back.
    """
    if missing := missing_atoms(topology):
        shown = "; ".join(f"{residue} lacks {', '.join(names)}" for residue, names in list(missing.items())[:5])
        more = f" and {len(missing) - 5} residues more" if len(missing) > 5 else ""
        raise DataError(f"{source} has missing atoms: {shown}{more}. {_COMPLETE}")


_COMPLETE = (
    "Torsions there would be missing or wrong. Complete the structure (PDBFixer adds what is missing), select what is "
    "complete, such as --atoms 'chainid 0', or pass incomplete=True (--incomplete) to leave these residues out."
)


def check_gaps(trajectory: Any, source: str) -> None:
    """Check that no residues are missing within chains.

    Raises
    ------
    DataError
        With the gaps and what fills them.
    """
    if gaps := chain_gaps(trajectory):
        shown = [f"{b.resSeq - a.resSeq - 1} between {a} and {b} of chain {a.chain.index}" for a, b in gaps[:5]]
        more = "" if len(gaps) <= 5 else f" and {len(gaps) - 5} more"
        raise DataError(f"{source} has chains with gaps, of residues: {', '.join(shown)}{more}. {_COMPLETE}")


def without_gap_bonds(trajectory: Any) -> Any:
    """A copy of the topology without the bonds that readers put across gaps."""
    gaps = {(a.index, b.index) for a, b in chain_gaps(trajectory)}
    topology = trajectory.topology.copy()
    topology._bonds = [
        bond for bond in topology._bonds if tuple(sorted((bond[0].residue.index, bond[1].residue.index))) not in gaps
    ]
    return topology


def missing_atoms(topology: Any) -> dict[str, list[str]]:
    """Names of backbone atoms that amino acids lack, by residue; caps and other molecules have no such backbone."""
    found: dict[str, list[str]] = {}
    for residue in topology.residues:
        if not is_amino_acid(residue):
            continue
        names = {a.name for a in residue.atoms}
        absent = [n for n in BACKBONE if n not in names and not (n == "O" and names & set(TERMINAL))]
        # A trajectory of alpha carbons alone is a choice, and none of its residues is incomplete.
        if absent and names - {"CA"}:
            found[f"{residue} of chain {residue.chain.index}"] = absent
    return found


def chain_gaps(trajectory: Any) -> list[tuple[Any, Any]]:
    """Pairs of residues that follow each other in a chain, but not in their numbers and not in space."""
    gaps = []
    for chain in trajectory.topology.chains:
        acids = [r for r in chain.residues if is_amino_acid(r)]
        for before, after in pairwise(acids):
            ends = [a.index for a in before.atoms if a.name == "C"] + [a.index for a in after.atoms if a.name == "N"]
            if after.resSeq - before.resSeq > 1 and len(ends) == 2:
                apart = np.linalg.norm(trajectory.xyz[0, ends[0]] - trajectory.xyz[0, ends[1]])
                gaps += [(before, after)] if apart > PEPTIDE else []
    return gaps


def is_amino_acid(residue: Any) -> bool:
    """Whether a residue is an amino acid, by its name; caps such as ACE and NME are none."""
    return bool(residue.is_protein) and residue.name not in ("ACE", "NME", "NMA", "NHE", "NH2")
