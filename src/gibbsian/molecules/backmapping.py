"""From torsions back to coordinates: a frame of the simulation, with its torsions turned to the values asked for.

The frame is the nearest one on the torus, so that the bonds, angles and the torsions that are not modelled come from a
real conformation, and little has to be turned. Turning a bond moves all atoms on one side of it as a rigid body, which
changes no bond, no angle, and no other torsion; what it can do is to bring distant atoms into each other's place, which
`gibbsian.molecules.frames.check_frames` finds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gibbsian.energies.periodic import TURN
from gibbsian.errors import DataError, ShapeError
from gibbsian.molecules.extras import require_mdtraj
from gibbsian.molecules.features import torsion_angles
from gibbsian.molecules.geometry import bond_indices

CHUNK = 512
"""Draws whose nearest frames are sought at once."""


def with_torsions(frames: Any, atoms: np.ndarray, angles: Tensor) -> Any:
    """Turn torsions of frames to given values.

    Parameters
    ----------
    frames
        An mdtraj ``Trajectory`` of n frames.
    atoms
        Four atoms of each torsion, ``(d, 4)``.
    angles
        The values in radians, ``(n, d)``.

    Returns
    -------
    mdtraj.Trajectory
        With all other internal coordinates as they were.

    Raises
    ------
    ShapeError
        If there are not n rows of d angles.
    DataError
        If a torsion is about a bond in a ring, which cannot be turned, such as phi of proline.
    """
    if tuple(angles.shape) != (len(frames), len(atoms)):
        raise ShapeError(
            f"{len(frames)} frames of {len(atoms)} torsions take as many angles; got {tuple(angles.shape)}."
        )
    sides = [moving_side(frames.topology, four) for four in atoms]
    xyz = torch.as_tensor(np.array(frames.xyz)).double()
    for i, side in enumerate(sides):
        here = torsion_angles(xyz, atoms[i : i + 1])[:, 0]
        _turn(xyz, int(atoms[i, 1]), int(atoms[i, 2]), torch.as_tensor(side), angles[:, i].double() - here)
    built = require_mdtraj().Trajectory(xyz.float().numpy(), frames.topology)
    built.unitcell_vectors = frames.unitcell_vectors
    return built


def moving_side(topology: Any, four: np.ndarray) -> np.ndarray:
    """Atoms that turn with the last atom of a torsion about its middle bond.

    Raises
    ------
    DataError
        If the bond is in a ring.
    """
    near: dict[int, list[int]] = {}
    for a, b in bond_indices(topology).tolist():
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    before, after = int(four[1]), int(four[2])
    seen, queue = {after}, [after]
    for here in queue:
        for there in near.get(here, ()):
            if here == after and there == before:
                continue
            if there == before:
                a, b = topology.atom(before), topology.atom(after)
                raise DataError(
                    f"The bond {a}-{b} is in a ring and cannot be turned by itself: leave this torsion out of the "
                    "model, for example by naming residues without it."
                )
            if there not in seen:
                seen.add(there)
                queue.append(there)
    return np.array(sorted(seen - {after}), dtype=int)


def turnable(topology: Any, atoms: np.ndarray) -> np.ndarray:
    """Which torsions are about bonds that can be turned, ``(d,)``: all but those in rings."""
    good = []
    for four in atoms:
        try:
            moving_side(topology, four)
            good.append(True)
        except DataError:
            good.append(False)
    return np.array(good, dtype=bool)


def nearest_frames(angles: Tensor, known: Tensor) -> Tensor:
    r"""The frame nearest to each row on the torus, by :math:`\sum_i 1 - \cos(x_i - y_i)`.

    Parameters
    ----------
    angles
        Rows ``(n, d)``, in radians.
    known
        Frames ``(m, d)``.

    Returns
    -------
    Tensor
        Indices into the frames, ``(n,)``.
    """
    waves = torch.cat((known.cos(), known.sin()), 1)
    parts = [(torch.cat((x.cos(), x.sin()), 1) @ waves.T).argmax(1) for x in TURN.wrap(angles).split(CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def build_conformations(templates: Any, atoms: np.ndarray, angles: Tensor) -> Any:
    """Make coordinates of rows of torsions: each from the nearest template, with its torsions turned.

    Parameters
    ----------
    templates
        An mdtraj ``Trajectory`` of frames to start from.
    atoms, angles
        As in `with_torsions`.

    Returns
    -------
    mdtraj.Trajectory
        One frame per row; times count them.
    """
    index = nearest_frames(angles.float(), torsion_angles(templates.xyz, atoms))
    built = with_torsions(templates[index.numpy()], atoms, angles)
    built.time = np.arange(len(built), dtype=np.float32)
    return built


def _turn(xyz: Tensor, start: int, end: int, moving: Tensor, by: Tensor) -> None:
    """Rotate atoms of each frame about the bond from start to end, in place (Rodrigues' formula)."""
    if not len(moving):
        return
    origin = xyz[:, end : end + 1]
    axis = torch.nn.functional.normalize(origin - xyz[:, start : start + 1], dim=2)
    arm = xyz[:, moving] - origin
    c, s = by.cos().view(-1, 1, 1), by.sin().view(-1, 1, 1)
    along = axis * (axis * arm).sum(2, keepdim=True)
    xyz[:, moving] = origin + along + c * (arm - along) + s * torch.linalg.cross(axis.expand_as(arm), arm)
