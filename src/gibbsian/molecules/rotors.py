"""Torsions that turn freely, such as those of methyl groups, and the symmetry of the latter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gibbsian.molecules.internal import InternalCoordinates

FREE = 0.7
"""A leading torsion whose mean resultant length is below this turns freely; stiff ones stay near 1."""


def free_rotors(internal: InternalCoordinates, z: Tensor, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
    """Find leading torsions that turn freely, besides chosen ones, in frames ``(n, 3 * atoms - 6)``.

    Returns
    -------
    Their coordinates; and 3 for those of three atoms that end there, as in methyl groups, which always count, else 1.
    """
    found, folds, first = [], [], 2 * internal.atoms - 3
    ends = set(internal.order) - set(internal.bonded) - set(internal.second[:3])
    for i in range(3, internal.atoms):
        at = first + i - 3
        if not internal.leads[i] or at in chosen:
            continue
        members = _members(internal, i)
        methyl = len(members) == 3 and all(internal.order[j] in ends for j in members)
        r = torch.polar(torch.ones_like(z[:, at]), z[:, at]).mean().abs()
        if methyl or float(r) < FREE:
            found.append(at)
            folds.append(3 if methyl else 1)
    return found, folds


def _members(internal: InternalCoordinates, lead: int) -> list[int]:
    """Rows of the atoms on one end of a bond: the first, and those placed from it."""
    return [j for j in range(lead, internal.atoms) if internal.bonded[j] == internal.bonded[lead]]


def relabelled(
    internal: InternalCoordinates, z: Tensor, rotors: Sequence[int], folds: Sequence[int], rng: Generator
) -> Tensor:
    """Name the hydrogens of each methyl group anew, at random and in cyclic order: equal molecules, equal energies.

    Parameters
    ----------
    internal, z
        Frames in the coordinates.
    rotors, folds
        From `free_rotors`.
    rng
        Of the order.
    """
    if not any(fold == 3 for fold in folds):
        return z
    x = internal.cartesian(z)
    for at, fold in zip(rotors, folds):
        if fold != 3:
            continue
        three = [internal.order[j] for j in _members(internal, at - (2 * internal.atoms - 3) + 3)]
        by = torch.randint(3, (len(z), 1), generator=rng)
        index = torch.tensor(three)[(torch.arange(3) + by) % 3]
        x[:, three] = x.gather(1, index.unsqueeze(2).expand(-1, -1, 3))
    return internal.of(x)
