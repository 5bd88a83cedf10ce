r"""Free-energy landscapes on two torsions: Ramachandran maps, basins and their differences, each with its error.

A map holds the probability of each cell of a grid over :math:`[-\pi, \pi)^2`, phi along the first axis. Its free energy
is :math:`F = -kT \log p`, up to a constant, in nats (kT) or in kJ/mol. Errors come from a block bootstrap, whose blocks
are several correlation times long: neighbouring frames are no independent witnesses.

`Conformation of polypeptides and proteins (Ramachandran & Sasisekharan, 1968)
<https://doi.org/10.1016/S0065-3233(08)60402-7>`_.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.periodic import TURN
from gibbsian.errors import OptionError, ShapeError
from gibbsian.molecules.reweighting import block_bootstrap, checked_weights, correlation_time

BINS = 36
"""Cells along each axis: of ten degrees."""

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


def cell_of(angles: Tensor, bins: int = BINS) -> Tensor:
    """Number of each row's cell in a flattened grid: ``(n, 2) -> (n,)``."""
    if angles.ndim != 2 or angles.shape[1] != 2:
        raise ShapeError(f"A Ramachandran map is of phi and psi, (n, 2); got {tuple(angles.shape)}.")
    place = ((TURN.wrap(angles).double() + math.pi) * (bins / (2 * math.pi))).long().clamp(0, bins - 1)
    return place[:, 0] * bins + place[:, 1]


def histogram(angles: Tensor, weights: Any = None, bins: int = BINS) -> Tensor:
    """Probability of each cell from weighted rows, ``(bins, bins)`` float64, phi along the first axis."""
    w = checked_weights(weights, len(angles))
    return torch.bincount(cell_of(angles, bins), weights=w, minlength=bins * bins).view(bins, bins)


@torch.no_grad()
def learned_masses(energy: Callable[[Tensor], Tensor], bins: int = BINS, points: int = 4) -> Tensor:
    """Probability of each cell under an energy on two torsions, by the midpoint rule, ``(bins, bins)`` float64.

    Parameters
    ----------
    energy
        ``(n, 2) -> (n,)``, periodic, in nats.
    bins
        Cells along each axis.
    points
        Points along each side of a cell; the rule converges fast for a periodic function.
    """
    fine = bins * points
    axis = (torch.arange(fine, dtype=torch.float64) + 0.5) * (2 * math.pi / fine) - math.pi
    grid = torch.cartesian_prod(axis, axis)
    like = next(iter(energy.parameters()), grid) if isinstance(energy, torch.nn.Module) else torch.empty(())
    value = torch.cat([energy(part.to(like.dtype)).double() for part in grid.split(1 << 14)])
    return torch.softmax(-value, 0).view(bins, points, bins, points).sum((1, 3))


def cell_centres(bins: int = BINS) -> Tensor:
    """Centres of the cells along an axis, in radians, ``(bins,)``."""
    return (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 * math.pi / bins) - math.pi


def free_energy(masses: Tensor, kt: float = 1.0) -> Tensor:
    """Free energies of probabilities, the lowest at 0, infinite where nothing is; in units of ``kt``."""
    value = -masses.log() * kt
    return value - value[value.isfinite()].min()


def divergence(p: Tensor, q: Tensor, pseudocount: float = 0.0) -> float:
    r"""Kullback-Leibler divergence :math:`\sum p \log (p / q)` of two maps in nats.

    Parameters
    ----------
    p, q
        Probabilities of the same cells.
    pseudocount
        A part of q that is spread evenly over all cells: histograms have empty cells where the other one has frames,
        and the divergence would be infinite.
    """
    if p.shape != q.shape:
        raise ShapeError(f"Maps of one grid can be compared; got {tuple(p.shape)} and {tuple(q.shape)}.")
    mixed = (1.0 - pseudocount) * q + pseudocount / q.numel()
    return float((torch.xlogy(p, p) - torch.xlogy(p, mixed)).sum())


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
        too, up to an eighth of the series, and the largest error counts: weights by the last bias of metadynamics drift
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


@dataclass(frozen=True)
class Band:
    """A curve or map with its interval.

    Attributes
    ----------
    value
        The estimate.
    lower, upper
        Ends of the interval, of the same shape; infinite where resamples were never there.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor


def free_energy_band(masses: Tensor, resampled: Tensor, kt: float, level: float = 0.9) -> Band:
    """Free energy of a map or profile with a pointwise interval by percentiles of bootstrapped probabilities.

    Constants are matched where probability is: each resample is measured from minus the logarithm of its mean over the
    estimate, so that the band is about shape and not about whichever cell is lowest.

    Parameters
    ----------
    masses
        Probabilities, of any shape.
    resampled
        Those of resamples, ``(b, *shape)``.
    kt
        Unit of the result.
    level
        Of the interval.

    Raises
    ------
    OptionError
        If the level is not between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise OptionError(f"The level of an interval lies between 0 and 1; got {level}.")
    value = -masses.log() * kt
    shift = value[value.isfinite()].min()
    spread = -resampled.log() * kt
    tail = 0.5 * (1.0 - level)
    ordered = spread.sort(0).values
    low, high = (round(q * (len(ordered) - 1)) for q in (tail, 1.0 - tail))
    return Band(value - shift, ordered[low] - shift, ordered[high] - shift)


def profile(masses: Tensor, axis: int) -> Tensor:
    """Probabilities along phi (0) or psi (1) of a map ``(..., bins, bins)``, or of many."""
    return masses.sum(-1 if axis == 0 else -2)


def resampled_maps(
    angles: Tensor, weights: Any, *, rng: Generator, block: int, resamples: int = 200, bins: int = BINS
) -> Tensor:
    """Histograms of block-bootstrap resamples, ``(resamples, bins, bins)``."""
    w, cells = checked_weights(weights, len(angles)), cell_of(angles, bins)

    def statistic(counts: Tensor) -> Tensor:
        own = counts * w
        return torch.bincount(cells, weights=own / own.sum(), minlength=bins * bins).view(bins, bins)

    return block_bootstrap(statistic, len(angles), block, resamples, rng)
