"""Alanine dipeptide (acetyl-alanine-N-methylamide) from its internal geometry: atoms, bonds, coordinates.

Coordinates are built atom by atom: each stands at a distance from a first atom, at an angle with a second, and at a
torsion around the bond of these two from a third. Lengths and angles are those of the standard peptide geometry, so
that a minimiser has little to do. Atoms stand in the order that the literature on this molecule uses, where phi is of
atoms 4, 6, 8, 14 and psi of 6, 8, 14, 16.
"""

from __future__ import annotations

import math

import numpy as np

RESIDUES = ("ACE", "ALA", "NME")

ATOMS = (
    ("H1", "ACE"), ("CH3", "ACE"), ("H2", "ACE"), ("H3", "ACE"), ("C", "ACE"), ("O", "ACE"),
    ("N", "ALA"), ("H", "ALA"), ("CA", "ALA"), ("HA", "ALA"), ("CB", "ALA"), ("HB1", "ALA"), ("HB2", "ALA"),
    ("HB3", "ALA"), ("C", "ALA"), ("O", "ALA"),
    ("N", "NME"), ("H", "NME"), ("C", "NME"), ("H1", "NME"), ("H2", "NME"), ("H3", "NME"),
)  # fmt: skip
"""Name and residue of each atom; the first letter of a name is its element."""

PHI = (4, 6, 8, 14)
PSI = (6, 8, 14, 16)

_CH, _NH, _CC, _CN, _NC, _CO = 0.109, 0.101, 0.1522, 0.1335, 0.1449, 0.1229
"""Bond lengths in nanometres."""


def dipeptide_bonds() -> list[tuple[int, int]]:
    """List the pairs of bonded atoms: each atom with the one it was placed from."""
    return [(1, 4), (4, 6)] + [(row[1], row[0]) for row in _placements(0.0, 0.0)]


def dipeptide_coordinates(phi: float, psi: float) -> np.ndarray:
    """Coordinates in nanometres, ``(22, 3)``, with planar trans peptide bonds and an L-alanine.

    Parameters
    ----------
    phi, psi
        Torsions of the backbone in radians.
    """
    x = np.zeros((len(ATOMS), 3))
    x[4] = (_CC, 0.0, 0.0)
    angle = math.radians(116.6)
    x[6] = x[4] + _CN * np.array([-math.cos(angle), math.sin(angle), 0.0])
    for atom, bonded, second, third, length, degrees, torsion in _placements(phi, psi):
        x[atom] = placed(x[bonded], x[second], x[third], length, math.radians(degrees), torsion)
    return x - x.mean(0)


def placed(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, torsion: float) -> np.ndarray:
    """Place an atom d at a distance from a, with the angle d-a-b and the torsion d-a-b-c.

    Parameters
    ----------
    a, b, c
        Points ``(3,)``, not in line.
    length
        Of the bond d-a.
    angle, torsion
        In radians.
    """
    along = (b - a) / np.linalg.norm(b - a)
    normal = np.cross(along, c - b)
    normal /= np.linalg.norm(normal)
    across = np.cross(normal, along)
    # At torsion 0 the atom lies on the side of c, which is that of across.
    aside = across * math.cos(torsion) - normal * math.sin(torsion)
    return a + length * (along * math.cos(angle) + aside * math.sin(angle))


def _placements(phi: float, psi: float) -> list[tuple[int, int, int, int, float, float, float]]:
    """Atom, the one it is bonded to, the second, the third, length, angle in degrees, torsion in radians."""
    trans, third = math.pi, 2.0 * math.pi / 3.0
    return [
        (5, 4, 6, 1, _CO, 122.9, trans),
        (0, 1, 4, 6, _CH, 109.5, trans),
        (2, 1, 4, 6, _CH, 109.5, trans + third),
        (3, 1, 4, 6, _CH, 109.5, trans - third),
        (8, 6, 4, 1, _NC, 121.9, trans),
        (7, 6, 4, 1, _NH, 119.8, 0.0),
        (14, 8, 6, 4, _CC, 110.1, phi),
        (10, 8, 6, 4, 0.1526, 109.7, phi - third),
        (9, 8, 6, 4, _CH, 109.5, phi + third),
        (11, 10, 8, 6, _CH, 109.5, trans),
        (12, 10, 8, 6, _CH, 109.5, trans + third),
        (13, 10, 8, 6, _CH, 109.5, trans - third),
        (16, 14, 8, 6, _CN, 116.6, psi),
        (15, 14, 8, 6, _CO, 120.4, psi + trans),
        (18, 16, 14, 8, _NC, 121.9, trans),
        (17, 16, 14, 8, _NH, 119.8, 0.0),
        (19, 18, 16, 14, _CH, 109.5, trans),
        (20, 18, 16, 14, _CH, 109.5, trans + third),
        (21, 18, 16, 14, _CH, 109.5, trans - third),
    ]
