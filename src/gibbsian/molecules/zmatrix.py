"""Choosing internal coordinates of a molecule: a Z-matrix from its bonds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from gibbsian.errors import DataError
from gibbsian.molecules.internal import InternalCoordinates


def internal_coordinates(topology: Any) -> InternalCoordinates:
    """Choose internal coordinates of a molecule from its bonds.

    The walk starts at one end of the longest chain of bonds between heavy atoms and takes the larger branch first, so
    that backbone torsions are coordinates. Rings are cut open at a bond.

    Parameters
    ----------
    topology
        An ``openmm.app.Topology``, an mdtraj ``Topology``, or a `MolecularSystem`.

    Raises
    ------
    DataError
        If there are fewer than four atoms, or the bonds do not join all of them.
    """
    graph: Any = getattr(topology, "topology", topology)
    # Methods of OpenMM's topologies, properties of mdtraj's.
    atoms, joined = (list(cast(Any, part() if callable(part) else part)) for part in (graph.atoms, graph.bonds))
    pairs = [(a.index, b.index) for a, b in joined]
    light = [a.element is not None and a.element.symbol == "H" for a in atoms]
    return coordinates_of_bonds(len(atoms), pairs, light)


def coordinates_of_bonds(
    atoms: int, bonds: Iterable[tuple[int, int]], light: Sequence[bool] | None = None
) -> InternalCoordinates:
    """Choose internal coordinates of a graph of bonds: see `internal_coordinates`.

    Parameters
    ----------
    atoms
        How many there are.
    bonds
        Pairs of atoms.
    light
        Which atoms are hydrogens; they come after others. None when left out.

    Raises
    ------
    DataError
        As `internal_coordinates` does.
    """
    near: list[list[int]] = [[] for _ in range(atoms)]
    for a, b in bonds:
        near[a].append(b)
        near[b].append(a)
    hydrogen = [False] * atoms if light is None else list(light)
    if atoms < 4:
        raise DataError(f"Internal coordinates are of molecules of four atoms or more; this has {atoms}.")
    far = _walk(near, next((i for i in range(atoms) if not hydrogen[i]), 0), hydrogen)[0][-1]
    root = _walk(near, far, hydrogen)[0][-1]
    order, parent = _walk(near, root, hydrogen, heavy=False)
    if len(order) < atoms:
        raise DataError(
            f"The bonds join {len(order)} of {atoms} atoms: internal coordinates are of one molecule. Leave out the "
            "others (waters, ions), or give the missing bonds."
        )
    size = [1] * atoms
    for i in reversed(order[1:]):
        size[parent[i]] += size[i]
    ranked = sorted(order, key=lambda j: (-size[j], hydrogen[j], j))
    children = {i: [j for j in ranked if parent[j] == i] for i in order}
    return _rows(root, parent, children)


def _rows(root: int, parent: list[int], children: dict[int, list[int]]) -> InternalCoordinates:
    """Rows of the Z-matrix: root, its largest branch, then breadth first."""
    second = children[root][0]
    third = children[second][0] if children[second] else children[root][1]
    through = parent[third]
    rows = [(root, -1, -1, -1, False), (second, root, -1, -1, False)]
    rows.append((third, through, second if through == root else root, -1, False))
    seen, queue = {root, second, third}, [root]
    for here in queue:
        queue += children[here]
        # The axis: from the atom that was there before to this one; the root's is that of its largest branch.
        before = second if here == root else parent[here]
        beyond = (third if through == second else None) if here == root else parent[before]
        if before == root and here != second:
            beyond = second
        lead = next((j for j in children[here] if j in seen and j != before), None)
        for j in children[here]:
            if j in seen:
                continue
            start = beyond if lead is None else lead
            assert start is not None
            rows.append((j, here, before, start, lead is None))
            lead = j if lead is None else lead
            seen.add(j)
    return InternalCoordinates(*(tuple(column) for column in zip(*rows)))  # pyright: ignore[reportArgumentType]


def _walk(near: list[list[int]], start: int, light: Sequence[bool], heavy: bool = True) -> tuple[list[int], list[int]]:
    """Atoms breadth first from one, over heavy atoms alone or all; and from which each was reached."""
    order, parent = [start], [-1] * len(near)
    seen = {start}
    for here in order:
        for there in near[here]:
            if there not in seen and not (heavy and light[there]):
                seen.add(there)
                parent[there] = here
                order.append(there)
    return order, parent
