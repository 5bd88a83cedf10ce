"""Basins of the Ramachandran plane: their populations and free-energy differences, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.molecules.landscape import cell_centres, learned_masses
from gibbsian.molecules.reweighting import block_bootstrap, checked_weights, correlation_time

BLOCK_TIMES = 5.0
"""Correlation times in a block of the bootstrap."""


FEWEST_BLOCKS = 8
"""Blocks at least: with fewer, a bootstrap of them knows no error."""


@dataclass(frozen=True)
class Basin:
    """A part of the Ramachandran plane.

    Attributes
    ----------
    name
        What it is called.
    holds
        From torsions in radians ``(n, 2)`` to which of them are inside, ``(n,)``.
    """

    name: str
    holds: Callable[[Tensor], Tensor]


def in_range(angle: Tensor, low: float, high: float) -> Tensor:
    """Whether angles in radians lie in a range of degrees, which may lead across 180."""
    turns = torch.remainder(torch.rad2deg(angle) - low, 360.0)
    return turns < (high - low) % 360.0


BASINS = (
    Basin("beta", lambda x: (x[:, 0] < 0) & ~in_range(x[:, 1], -120.0, 50.0)),
    Basin("right-handed", lambda x: (x[:, 0] < 0) & in_range(x[:, 1], -120.0, 50.0)),
    Basin("left-handed", lambda x: x[:, 0] >= 0),
)
"""Extended conformations; right-handed helices; and all of phi > 0. Together they fill the plane."""


@dataclass(frozen=True)
class Differences:
    """Free-energy differences between basins.

    Attributes
    ----------
    kj_mol
        By the pair's name, such as ``"left-handed - rest"``: the difference in kJ/mol with its standard error, NaN
        where a basin was never visited.
    populations
        By the basin's name, probability with standard error.
    """

    kj_mol: dict[str, Estimate]
    populations: dict[str, Estimate]


def basin_weights(angles: Tensor, weights: Any = None, basins: tuple[Basin, ...] = BASINS) -> Tensor:
    """Probability of each basin from weighted rows ``(n, 2)``, ``(len(basins),)``."""
    w = checked_weights(weights, len(angles))
    return torch.stack([(w * basin.holds(angles)).sum() for basin in basins])


@torch.no_grad()
def learned_basins(energy: Callable[[Tensor], Tensor], basins: tuple[Basin, ...] = BASINS, points: int = 240) -> Tensor:
    """Probability of each basin under an energy on two torsions, ``(len(basins),)``."""
    masses = learned_masses(energy, points, 1).flatten()
    axis = cell_centres(points)
    grid = torch.cartesian_prod(axis, axis)
    return torch.stack([(masses * basin.holds(grid)).sum() for basin in basins])


def differences(populations: Tensor, kt: float) -> Tensor:
    """Free energy of each basin against all the rest, in units of ``kt``: ``(..., b) -> (..., b)``."""
    p = populations / populations.sum(-1, keepdim=True)
    return -kt * torch.log(p / (1.0 - p))


def block_length(angles: Tensor, weights: Tensor, basins: tuple[Basin, ...] = BASINS) -> int:
    """Length of the bootstrap's blocks, in frames: some times the slowest correlation time of torsions and basins."""
    inside = torch.stack([basin.holds(angles).double() for basin in basins], 1)
    share = (weights[:, None] * inside) if len(basins) else inside
    series = torch.cat((angles.cos().double(), angles.sin().double(), inside, share), 1)
    block = math.ceil(BLOCK_TIMES * correlation_time(series))
    return max(1, min(block, len(angles) // FEWEST_BLOCKS))


def basin_differences(
    angles: Tensor,
    weights: Any,
    kt: float,
    *,
    rng: Generator,
    basins: tuple[Basin, ...] = BASINS,
    block: int | None = None,
    resamples: int = 200,
) -> Differences:
    """Free energy of each basin against the rest of the plane, from weighted frames.

    Parameters
    ----------
    angles
        phi and psi of frames in order of time, in radians, ``(n, 2)``.
    weights
        ``(n,)``, or ``None``.
    kt
        In kJ/mol.
    rng
        Of the bootstrap.
    basins
        Parts of the plane.
    block
        Frames in a block at least; by `block_length` when left out. Blocks of twice, four times ... as many are tried
        too, up to an eighth of the series, and the largest error counts: the weights of metadynamics drift
        more slowly than torsions do.
    resamples
        Of the bootstrap.

    Notes
    -----
    Growing blocks until the error grows no more: `Error estimates on averages of correlated data (Flyvbjerg & Petersen,
    1989) <https://doi.org/10.1063/1.457480>`_.
    """
    w = checked_weights(weights, len(angles))
    block = block_length(angles, w, basins) if block is None else block
    inside = torch.stack([basin.holds(angles) for basin in basins]).double()
    found = inside @ w

    def statistic(counts: Tensor) -> Tensor:
        own = counts * w
        return (inside @ own) / own.sum()

    lengths = [block]
    while 2 * lengths[-1] <= len(angles) // FEWEST_BLOCKS:
        lengths.append(2 * lengths[-1])
    drawn = [block_bootstrap(statistic, len(angles), length, resamples, rng) for length in lengths]
    value = differences(found, kt)
    spread = _worst([_spread(differences(d, kt)) for d in drawn])
    shares = _worst([d.std(0) for d in drawn])
    return Differences(
        {
            f"{basin.name} - rest": Estimate(float(v) if v.isfinite() else math.nan, float(s))
            for basin, v, s in zip(basins, value, spread)
        },
        {basin.name: Estimate(float(p), float(s)) for basin, p, s in zip(basins, found, shares)},
    )


def _spread(values: Tensor) -> Tensor:
    """Standard deviations over resamples ``(b, k)``; NaN where more than a tenth of them never visited a basin."""
    good = values.isfinite()
    kept = torch.where(good, values, 0.0)
    count = good.sum(0)
    mean = kept.sum(0) / count
    spread = (torch.where(good, values - mean, 0.0).square().sum(0) / (count - 1)).sqrt()
    return torch.where(count >= 0.9 * len(values), spread, torch.nan)


def _worst(errors: list[Tensor]) -> Tensor:
    """The largest of some errors; NaN where one is unknown."""
    return torch.stack(errors).amax(0)
