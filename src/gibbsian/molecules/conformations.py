"""From frames to a landscape: torsions, a learned energy, a map with its bands, basins, and what is worth a look."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.fourier import FourierTable
from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.backmapping import turnable
from gibbsian.molecules.basins import (
    FEWEST_BLOCKS,
    Differences,
    basin_differences,
    basin_weights,
    block_length,
    differences,
    learned_basins,
)
from gibbsian.molecules.features import Torsions, torsions
from gibbsian.molecules.frames import FrameChecks, check_frames
from gibbsian.molecules.landscape import BINS, histogram, learned_masses, resampled_maps
from gibbsian.molecules.reweighting import effective_sample_size, resampled_rows
from gibbsian.molecules.sources import Frames
from gibbsian.molecules.thermal import thermal_energy
from gibbsian.molecules.torsion_model import TorsionModel
from gibbsian.molecules.torsion_settings import TorsionTraining
from gibbsian.molecules.torsion_training import TorsionFit, fit_torsion_energy

TEMPLATES = 1000
"""Frames kept for conformations to be built upon."""

MARGINAL = 4000
"""Draws from which the map of a pair of torsions is made, where the energy is one of more."""

BIAS_TOLERANCE = 1e-3
"""Nats by which the bias of metadynamics may be off."""

RESAMPLES = 200
"""Of the block bootstrap of the frames."""


@dataclass(frozen=True)
class Map:
    """The Ramachandran map of a residue.

    Attributes
    ----------
    residue
        Its name, such as ``ALA2``.
    frames, learned
        Probabilities by the weighted frames and by the learned energy, ``(36, 36)``, phi along the first axis.
    frames_resampled, learned_resampled
        Those of bootstrap resamples, ``(b, 36, 36)``; the second is empty where none were trained.
    frame_differences
        Basins by the weighted frames.
    learned_differences
        Basins by the learned energy: each with the frames' statistical error and the distance of the two in quadrature.
    """

    residue: str
    frames: Tensor
    learned: Tensor
    frames_resampled: Tensor
    learned_resampled: Tensor
    frame_differences: Differences
    learned_differences: Differences


@dataclass(frozen=True)
class Landscape:
    """What was learned from frames.

    Attributes
    ----------
    model
        The energy, with what it takes to draw from it.
    fit
        How it was trained.
    torsions
        Of all frames.
    frames
        What was read.
    energies
        Learned energy of each frame in nats (kT), the lowest 0, ``(n,)``.
    checks
        Of each frame's geometry.
    maps
        One per residue with phi and psi, the first few.
    block
        Frames in a block of the bootstrap.
    notes
        What a reader must know.
    """

    model: TorsionModel
    fit: TorsionFit
    torsions: Torsions
    frames: Frames
    energies: Tensor
    checks: FrameChecks
    maps: tuple[Map, ...]
    block: int
    notes: tuple[str, ...] = field(default=())

    @property
    def effective_frames(self) -> float:
        """Kish's effective number of the weighted frames."""
        return effective_sample_size(self.frames.weights)


def landscape_of(
    frames: Frames,
    settings: TorsionTraining | None = None,
    *,
    rng: Generator,
    kinds: tuple[str, ...] = ("phi", "psi"),
    residues: tuple[int, ...] | None = None,
    maps: int = 6,
    progress: Callable[[str], object] | None = None,
) -> Landscape:
    """Learn the landscape of a molecule's torsions.

    Parameters
    ----------
    frames
        From `read_frames`.
    settings
        Of the training.
    rng
        Of everything random.
    kinds, residues
        Which torsions, as in `gibbsian.molecules.features.torsions`; those in rings are left out.
    maps
        Residues of which to make a map, at most.
    progress
        Told what is being done.

    Raises
    ------
    DataError
        If there are no such torsions, or too few frames.
    """
    say = progress or (lambda _: None)
    say("checking frames")
    found, notes = _turnable(torsions(frames.trajectory, kinds, residues), frames.trajectory)
    checks = check_frames(frames.trajectory)
    w = frames.weights
    bad = torch.as_tensor(~checks.physical)
    if bool(bad.any()):
        notes.append(f"{checks} They weigh nothing.")
        if bool(bad.all()):
            raise DataError(f"{checks} Nothing can be learned from them; is the topology the right one?")
        w = torch.where(bad, 0.0, w)
        w = w / w.sum()
        frames = replace(frames, weights=w)
    pairs = dict(list(found.pairs().items())[: max(maps, 0)])
    some = list(pairs.values()) or [(0, min(1, len(found) - 1))]
    carries = w > 0
    block = max(block_length(found.angles[carries][:, list(p)], w[carries]) for p in some)
    if block >= int(carries.sum()) // FEWEST_BLOCKS:
        notes.append(
            f"The frames hold fewer than {FEWEST_BLOCKS} independent stretches: errors are too small. Simulate longer."
        )
    x, v = found.angles[carries], w[carries]
    bias = bias_energy(frames, found)
    if len(found) > 2:
        # Maps of more torsions come from draws, whose bands would be those of chains.
        settings = replace(settings or TorsionTraining(), replicates=0)
    fit = fit_torsion_energy(
        x, v if bias is None else _under(bias, x, v), settings, rng=rng, bias=bias, block=block, progress=progress
    )
    index = torch.unique(resampled_rows(w, TEMPLATES, rng)).numpy()
    model = TorsionModel(fit.energy, fit.noise, found.names, found.atoms, frames.temperature, frames.trajectory[index])
    say("drawing maps")
    drawn = model.draw(MARGINAL, rng) if pairs and len(found) > 2 else None
    made = tuple(_map(model, fit, residue, pair, x, v, block, drawn, rng) for residue, pair in pairs.items())
    with torch.no_grad():
        energies = torch.cat([fit.energy(part) for part in found.angles.split(1 << 14)]).double()
    return Landscape(model, fit, found, frames, energies - energies.min(), checks, made, block, tuple(notes))


def _under(bias: FourierTable, x: Tensor, weights: Tensor) -> Tensor:
    """Weights of frames towards the law under a bias, from those towards the one without: nearly equal ones."""
    with torch.no_grad():
        log_w = weights.log() - bias(x.float()).double()
    return torch.softmax(log_w, 0)


def bias_energy(frames: Frames, found: Torsions) -> FourierTable | None:
    """The bias of metadynamics in nats as an energy on the torsions, where it is known and they are among them."""
    if frames.bias is None:
        return None
    at = {tuple(four): i for i, four in enumerate(found.atoms.tolist())}
    columns = (at.get(frames.bias.phi), at.get(frames.bias.psi))
    if columns[0] is None or columns[1] is None:
        return None
    table = torch.as_tensor(frames.bias.table) / thermal_energy(frames.temperature)
    return FourierTable(table, BIAS_TOLERANCE, (columns[0], columns[1]), len(found))


def _turnable(found: Torsions, trajectory: Any) -> tuple[Torsions, list[str]]:
    good = turnable(trajectory.topology, found.atoms)
    if good.all():
        return found, []
    left = [name for name, fine in zip(found.names, good) if not fine]
    if not good.any():
        raise DataError(f"All torsions ({', '.join(left)}) are about bonds in rings, which cannot be turned alone.")
    names = tuple(name for name, fine in zip(found.names, good) if fine)
    kept = Torsions(names, found.atoms[good], found.angles[:, torch.as_tensor(good)])
    return kept, [f"Left out, as their bonds are in rings: {', '.join(left)}."]


def _map(
    model: TorsionModel,
    fit: TorsionFit,
    residue: str,
    pair: tuple[int, int],
    x: Tensor,
    w: Tensor,
    block: int,
    drawn: Tensor | None,
    rng: Generator,
) -> Map:
    own = x[:, list(pair)]
    by_frames = basin_differences(own, w, model.kt, rng=rng, block=block, resamples=RESAMPLES)
    maps = resampled_maps(own, w, rng=rng, block=block, resamples=RESAMPLES)
    if drawn is None:
        learned, populations = learned_masses(fit.energy), learned_basins(fit.energy)
        replicas = [learned_masses(e) for e in fit.replicates]
    else:
        seen = drawn[:, list(pair)]
        learned, populations, replicas = histogram(seen), basin_weights(seen), []
    resampled = torch.stack(replicas) if replicas else torch.empty(0, BINS, BINS, dtype=torch.float64)
    by_model = _with_errors(populations, by_frames, model.kt)
    return Map(residue, histogram(own, w), learned, maps, resampled, by_frames, by_model)


def _with_errors(populations: Tensor, by_frames: Differences, kt: float) -> Differences:
    """The learned basins, each with the frames' error and the distance to the frames' estimate in quadrature."""
    value = differences(populations, kt)
    kj, shares = {}, {}
    for i, (name, frames) in enumerate(by_frames.kj_mol.items()):
        kj[name] = Estimate(float(value[i]), math.hypot(frames.stderr, float(value[i]) - frames.value))
    for i, (name, frames) in enumerate(by_frames.populations.items()):
        shares[name] = Estimate(float(populations[i]), math.hypot(frames.stderr, float(populations[i]) - frames.value))
    return Differences(kj, shares)


def lowest_frames(landscape: Landscape, n: int, apart: float = 20.0) -> np.ndarray:
    """Frames of the lowest learned energy, physical and unlike each other, lowest first.

    Parameters
    ----------
    landscape
        With its frames.
    n
        How many, at most.
    apart
        Degrees by which some torsion of each differs from each of the others.

    Raises
    ------
    OptionError
        If fewer than one is asked for.
    """
    if n < 1:
        raise OptionError(f"Structures of low energy are 1 or more; got {n}.")
    physical = torch.as_tensor(landscape.checks.physical)
    cost = torch.where(physical, landscape.energies, torch.inf)
    angles, chosen = landscape.torsions.angles, []
    free = cost.isfinite()
    while len(chosen) < n and bool(free.any()):
        best = int(torch.where(free, cost, torch.inf).argmin())
        chosen.append(best)
        gap = torch.remainder(angles - angles[best] + math.pi, 2 * math.pi) - math.pi
        free &= gap.abs().amax(1) > math.radians(apart)
    return np.array(chosen, dtype=int)
