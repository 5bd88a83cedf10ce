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

from gibbsian.energies.periodic import TURN
from gibbsian.errors import OptionError, ShapeError
from gibbsian.molecules.reweighting import block_bootstrap, checked_weights

BINS = 36
"""Cells along each axis: of ten degrees."""


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
