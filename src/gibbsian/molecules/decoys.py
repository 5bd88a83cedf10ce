"""Native states against decoys: which conformations a learned energy takes for the molecule's own.

A decoy should have the higher energy. How well a score parts the two is the area under the curve of the receiver's
operating characteristic: the probability that a decoy lies above a native frame, 1 for perfect, 0.5 for chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.detection import auroc
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.backmapping import turnable, with_torsions
from gibbsian.molecules.features import torsions


@dataclass(frozen=True)
class DecoyRanking:
    """How native frames and decoys rank.

    Attributes
    ----------
    native
        Energies of native frames, ``(n,)``.
    decoys
        Those of decoys, by kind.
    areas
        Area under the curve of each kind against the native frames, with its bootstrap error; ``all`` pools them.
    """

    native: Tensor
    decoys: dict[str, Tensor]
    areas: dict[str, Estimate]

    def table(self) -> Any:
        """A pandas ``DataFrame``: kind, number within it, energy, and rank among all, the lowest energy first."""
        import pandas as pd

        parts = {"native": self.native} | self.decoys
        kinds = [kind for kind, values in parts.items() for _ in values]
        numbers = [i for values in parts.values() for i in range(len(values))]
        energy = torch.cat([v.double() for v in parts.values()])
        table = pd.DataFrame({"kind": kinds, "number": numbers, "energy_kt": energy.numpy()})
        table["rank"] = table["energy_kt"].rank(method="min").astype(int)
        return table.sort_values("rank", kind="stable")


def rank_decoys(native: Tensor, decoys: Mapping[str, Tensor], *, rng: Generator) -> DecoyRanking:
    """Rank native frames and decoys by their energies.

    Parameters
    ----------
    native
        Energies of native frames that the energy was not fitted to, ``(n,)``.
    decoys
        Energies of decoys by kind.
    rng
        Of the bootstrap.

    Raises
    ------
    DataError
        If there are no native frames or no decoys.
    """
    kinds = {name: values.detach().double() for name, values in decoys.items() if len(values)}
    if not len(native) or not kinds:
        raise DataError("Ranking takes native frames and decoys; one of them is empty.")
    if "native" in kinds or "all" in kinds:
        raise OptionError("A kind of decoys may not be called 'native' or 'all'.")
    inside = native.detach().double()
    areas = {name: auroc(inside, values, rng=rng) for name, values in kinds.items()}
    areas["all"] = auroc(inside, torch.cat(list(kinds.values())), rng=rng)
    return DecoyRanking(inside, kinds, areas)


def perturbed(trajectory: Any, degrees: float, *, rng: Generator) -> Any:
    """Decoys by turning every backbone torsion of frames at random, with bonds and angles as they were.

    Parameters
    ----------
    trajectory
        An mdtraj ``Trajectory``.
    degrees
        Standard deviation of the turns.
    rng
        The generator.

    Returns
    -------
    mdtraj.Trajectory
        One decoy per frame.

    Raises
    ------
    OptionError
        If ``degrees`` is not positive.
    """
    if not 0.0 < degrees < math.inf:
        raise OptionError(f"degrees is the positive standard deviation of turns; got {degrees}.")
    found = torsions(trajectory)
    good = turnable(trajectory.topology, found.atoms)
    angles = found.angles[:, torch.as_tensor(good)]
    turns = math.radians(degrees) * torch.randn(angles.shape, generator=rng)
    return with_torsions(trajectory, found.atoms[good], angles + turns)
