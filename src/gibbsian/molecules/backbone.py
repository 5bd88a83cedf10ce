"""Torsions of a protein's backbone: which atoms they are of, and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gibbsian.molecules.restraints import torsion_angles


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


def torsion_of(positions: np.ndarray, atoms: Sequence[int]) -> Any:
    """Torsions in radians of four atoms, for coordinates ``(..., atoms, 3)``: one less two axes."""
    x = torch.as_tensor(np.asarray(positions, dtype=np.float64))
    return torsion_angles(x.reshape(-1, *x.shape[-2:]), [tuple(atoms)])[:, 0].reshape(x.shape[:-2]).numpy()
