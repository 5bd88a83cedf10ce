"""Exact answers that tests compare with: integrals on grids in float64, and the tests of fit against them.

False-alarm rates are stated where they are chosen; every seed is fixed besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import sparse, stats
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


def kaufman_log_z(rows: int, columns: int, coupling: Tensor) -> Tensor:
    r"""Log Z of the Ising model on a ``rows`` x ``columns`` torus, differentiable in the coupling K (float64, 0-d).

    With :math:`\cosh \gamma_l = \cosh 2K \coth 2K - \cos(l \pi / n)` and :math:`\gamma_0 = 2K + \log \tanh K`, Z is
    half of :math:`(2 \sinh 2K)^{mn/2}` times the sum of four products over n: of :math:`2 \cosh` and of
    :math:`2 \sinh` of :math:`m \gamma_l / 2`, for odd l and for even l.

    `Crystal statistics II (Kaufman, 1949) <https://doi.org/10.1103/PhysRev.76.1232>`_.
    """
    m, n = rows, columns
    angles = torch.arange(2 * n, dtype=torch.float64) * torch.pi / n
    gamma = torch.acosh((2 * coupling).cosh() / (2 * coupling).tanh() - angles[1:].cos())
    first = 2 * coupling + coupling.tanh().log()
    odd, even = 0.5 * m * gamma[0::2], 0.5 * m * gamma[1::2]

    def log_cosh(v: Tensor) -> Tensor:
        return torch.logaddexp(v, -v)

    def log_sinh(v: Tensor) -> Tensor:
        return v + torch.log1p(-(-2 * v).exp())

    zero = 0.5 * m * first
    logs = torch.stack((log_cosh(odd).sum(), log_sinh(odd).sum(), log_cosh(even).sum() + log_cosh(zero)))
    # The last product changes sign at the critical coupling, so it has no logarithm.
    largest = logs.max().detach()
    total = (logs - largest).exp().sum() + 2 * zero.sinh() * (log_sinh(even).sum() - largest).exp()
    return 0.5 * m * n * (2 * (2 * coupling).sinh()).log() + largest + (0.5 * total).log()


def kaufman_energy(rows: int, columns: int, coupling: float) -> float:
    """Mean energy per spin in units of the coupling, -(1 / N) d log Z / dK."""
    k = torch.tensor(coupling, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kaufman_log_z(rows, columns, k), k)
    return -float(slope) / (rows * columns)


def ising_ups(rows: int, columns: int, coupling: float) -> tuple[Tensor, float]:
    """Law of the number of up spins on an Ising torus, ``(rows * columns + 1,)``, and log Z, by transfer matrix.

    Rows are added to each possible first row in turn, and the number of up spins is carried along; first rows that turn
    into each other by shifting, mirroring or flipping have one law (mirrored in the number of ups when flipped). All
    terms are positive, so nothing cancels. The work grows more than as 4^columns: 8 takes a tenth of a second, 16 would
    take hours.
    """
    size = 2**columns
    states = torch.arange(size)
    bits = (states.unsqueeze(1) >> torch.arange(columns)) & 1
    spins, ups = (2 * bits - 1).double(), bits.sum(1)
    along = (coupling * (spins * spins.roll(1, 1)).sum(1)).exp()
    half = columns // 2
    small = spins[: 2**half, :half]
    upper = spins[: 2 ** (columns - half), : columns - half]
    mix, mix_upper = (coupling * small @ small.T).exp(), (coupling * upper @ upper.T).exp()
    counts = torch.arange(rows * columns + 1)
    source = counts.unsqueeze(0) - ups.unsqueeze(1)
    inside = (source >= 0).double() * along.unsqueeze(1)
    source = source.clamp(min=0)
    law, log_scale = torch.zeros(len(counts), dtype=torch.float64), None
    for first, weight, flipped in _first_rows(columns):
        v = torch.zeros((size, len(counts)), dtype=torch.float64)
        v[first, ups[first]] = along[first]
        logs = 0.0
        for row in range(rows):
            v = v.view(len(upper), len(small), -1)
            v = torch.einsum("ab,cd,bdm->acm", mix_upper, mix, v).reshape(size, -1)
            if row < rows - 1:
                v = v.gather(1, source) * inside
                top = float(v.max())
                v, logs = v / top, logs + float(torch.tensor(top, dtype=torch.float64).log())
        log_scale = logs if log_scale is None else log_scale
        own = v[first] * float(torch.tensor(logs - log_scale, dtype=torch.float64).exp())
        law += weight * own + flipped * own.flip(0)
    total = law.sum()
    return law / total, float(total.log()) + float(log_scale or 0.0)


def swendsen_wang(size: int, coupling: float, replicas: int, sweeps: int, skip: int, seed: int) -> Tensor:
    """Mean of the absolute magnetisation per spin in each of many Ising tori, ``(replicas,)``, by cluster updates.

    Bonds between equal neighbours are kept with probability 1 - exp(-2K), and every cluster of kept bonds gets a spin
    anew. `Nonuniversal critical dynamics in Monte Carlo simulations (Swendsen & Wang, 1987)
    <https://doi.org/10.1103/PhysRevLett.58.86>`_. It shares nothing with the package's kernels, and at the critical
    coupling it decorrelates within a few sweeps.
    """
    rng, n = np.random.default_rng(seed), replicas * size * size
    site = np.arange(n).reshape(replicas, size, size)
    pairs = [(site.ravel(), np.roll(site, -1, axis).ravel()) for axis in (1, 2)]
    start, end = (np.concatenate(ends) for ends in zip(*pairs))
    spin, total = rng.integers(0, 2, n, dtype=np.int8), np.zeros(replicas)
    keep = 1.0 - np.exp(-2.0 * coupling)
    for sweep in range(skip + sweeps):
        kept = (spin[start] == spin[end]) & (rng.random(len(start)) < keep)
        bonds = sparse.coo_array((np.ones(kept.sum(), dtype=np.int8), (start[kept], end[kept])), shape=(n, n))
        count, cluster = sparse.csgraph.connected_components(bonds, directed=False)
        spin = rng.integers(0, 2, count, dtype=np.int8)[cluster]
        if sweep >= skip:
            total += np.abs(2.0 * spin.reshape(replicas, -1).mean(1) - 1.0)
    return torch.from_numpy(total / sweeps)


def _first_rows(columns: int) -> list[tuple[int, int, int]]:
    """Rows up to shifts, mirrors and flips: one of each kind, how many equal it, and how many equal its flip only."""
    full, found = 2**columns - 1, []
    seen = bytearray(2**columns)
    for row in range(2**columns):
        if seen[row]:
            continue
        same = _turned(row, columns)
        flips = {full ^ r for r in same} - same
        for r in same | flips:
            seen[r] = 1
        found.append((row, len(same), len(flips)))
    return found


def _turned(row: int, columns: int) -> set[int]:
    full, out = 2**columns - 1, set()
    for r in (row, int(format(row, f"0{columns}b")[::-1], 2)):
        out |= {((r << k) | (r >> (columns - k))) & full for k in range(columns)}
    return out
