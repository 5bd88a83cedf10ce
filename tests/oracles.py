"""Exact answers that tests compare with: integrals on grids in float64, and the tests of fit against them.

False-alarm rates are stated where they are chosen; every seed is fixed besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from scipy import stats
from torch import Tensor

P_LIMIT = 1e-7
"""Tests of fit fail below this p-value: one false alarm in ten million."""

Z_LIMIT = 5.5
"""Normal deviations fail beyond this: 4 false alarms in 10^8."""


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Build energies in float64 inside this context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def midpoints(low: float, high: float, cells: int) -> Tensor:
    """Centres of ``cells`` equal cells."""
    step = (high - low) / cells
    return low + step * (torch.arange(cells, dtype=torch.float64) + 0.5)


def cell_masses(
    log_prob: Callable[[Tensor], Tensor], low: float, high: float, cells: int, inner: int = 10, chunk: int = 2_000
) -> Tensor:
    """Mass of each of ``cells`` x ``cells`` squares of a box, by the midpoint rule with ``inner``^2 points in each."""
    x = midpoints(low, high, cells * inner)
    area = ((high - low) / (cells * inner)) ** 2
    points = torch.cartesian_prod(x, x)
    with torch.no_grad():
        p = torch.cat([log_prob(part).exp() for part in points.split(chunk)]) * area
    return p.reshape(cells, inner, cells, inner).sum((1, 3))


def moments(
    log_prob: Callable[[Tensor], Tensor], low: float, high: float, points: int = 400
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, mean and second moments of a density in the plane by the midpoint rule."""
    x = midpoints(low, high, points)
    grid = torch.cartesian_prod(x, x)
    with torch.no_grad():
        p = torch.cat([log_prob(part).exp() for part in grid.split(2_000)]) * ((high - low) / points) ** 2
    return p.sum(), p @ grid, (grid * p.unsqueeze(1)).T @ grid


def fit_p_value(x: Tensor, masses: Tensor, low: float, high: float) -> float:
    """Chi-square p-value of points in the plane against the masses of the squares of a box.

    Squares that expect fewer than 10 points, and all that lies outside, form one cell.
    """
    cells = masses.shape[0]
    index = ((x.double() - low) / (high - low) * cells).floor().long()
    inside = ((index >= 0) & (index < cells)).all(1)
    flat = index[inside, 0] * cells + index[inside, 1]
    counts = torch.bincount(flat, minlength=cells * cells).double()
    expected = masses.flatten() * x.shape[0]
    large = expected >= 10.0
    seen = torch.cat((counts[large], (x.shape[0] - counts[large].sum()).reshape(1)))
    due = torch.cat((expected[large], (x.shape[0] - expected[large].sum()).clamp(min=1e-9).reshape(1)))
    if float(due[-1]) < 10.0:
        # Too few are due there for a cell of its own: they join the largest one.
        seen[0], due[0] = seen[0] + seen[-1], due[0] + due[-1]
        seen, due = seen[:-1], due[:-1]
    statistic = float(((seen - due) ** 2 / due).sum())
    return float(stats.chi2.sf(statistic, due.numel() - 1))


def ks_p_value(x: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov-Smirnov p-value of numbers against a distribution function."""
    return float(stats.kstest(cdf(x.double().flatten()).numpy(), "uniform").pvalue)


def standard_normal_cdf(x: Tensor) -> Tensor:
    """Distribution function of N(0, 1)."""
    return torch.special.ndtr(x.double())


def z_score(values: Tensor, truth: float) -> float:
    """Deviation of a sample's mean from the truth, in its standard errors."""
    v = values.double()
    return float((v.mean() - truth) / (v.std() / v.numel() ** 0.5))
