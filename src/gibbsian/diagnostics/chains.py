r"""Whether chains have converged, and how many independent draws they are worth.

Chains are compared by split :math:`\hat R` after rank normalisation: near 1 (below 1.01) when every half of every chain
looks alike. The effective sample size divides the number of draws by the autocorrelation time
:math:`\tau = 1 + 2 \sum_t \rho_t`, the sum cut where pairs of :math:`\rho` stop being positive. The standard error of a
mean over the chains is :math:`\sigma / \sqrt{\mathrm{ESS}}`, and likewise for what else is a mean: see `quantiles`.

Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021)
<https://doi.org/10.1214/20-BA1221>

Draws come as ``(draws, chains, *event)``, as `Samples.draws` does; each coordinate is judged on its own. A coordinate
that never moves, or that holds a value which is not finite, gets NaN: nothing is known about it.

The numbers are ArviZ's and those of the R package posterior. ArviZ differs in three places, where we follow posterior,
by the authors of the method: ArviZ counts every draw of a coordinate that never moves as independent, ranks infinite
values like others, and gives no R-hat for one chain, whose halves can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.errors import DomainError, InputError, OptionError, ShapeError
from gibbsian.typing import EnergyFn


def split_r_hat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat: the larger of that for location and that for spread.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.

    Returns
    -------
    Tensor
        ``event``-shaped, float64.

    Raises
    ------
    ShapeError
        If there are too few draws or no chain axis.
    """
    x = coordinates_of(draws)
    halves = split_chains(x)
    # Folding at the median turns a difference of spread into one of location.
    ordered = halves.flatten(0, 1).sort(dim=0).values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    folded = (halves - middle).abs()
    # Two values at equal distance from the median fold into one, whose R-hat is NaN and must not hide the other.
    value = torch.fmax(_r_hat(_rank_normalised(halves)), _r_hat(_rank_normalised(folded)))
    return known_or_nan(value, x, draws)


def effective_sample_size(draws: Tensor, *, ranked: bool = True) -> Tensor:
    """Effective sample size over all chains.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.
    ranked
        Of the rank-normalised draws ("bulk", robust to heavy tails); ``False`` gives that of the mean, the one to
        use in its standard error.

    Returns
    -------
    Tensor
        ``event``-shaped, float64; it may exceed the number of draws when successive ones repel each other.

    Raises
    ------
    ShapeError
        If there are too few draws or no chain axis.
    """
    x = coordinates_of(draws)
    halves = split_chains(x)
    return known_or_nan(ess_of_chains(_rank_normalised(halves) if ranked else halves), x, draws)


def chain_mean(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and chains, and its standard error from the effective sample size.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.

    Returns
    -------
    tuple
        Mean and standard error, ``event``-shaped, float64.
    """
    x = draws.detach().to(torch.float64)
    ess = effective_sample_size(draws, ranked=False)
    return x.mean(dim=(0, 1)), x.flatten(0, 1).std(dim=0) / ess.sqrt()


def chain_sd(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation over draws and chains, and its standard error.

    The variance is the mean of squared deviations, whose standard error follows from their own effective sample size;
    that of its root by the delta method. It needs a finite fourth moment to mean anything.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.

    Returns
    -------
    tuple
        Standard deviation and standard error, ``event``-shaped, float64.

    Raises
    ------
    ShapeError
        If there are too few draws or no chain axis.
    """
    x = coordinates_of(draws)
    squares = (x - x.mean(dim=(0, 1))).square()
    variance = squares.mean(dim=(0, 1))
    # Rounding can leave less than nothing where all squares are equal.
    spread = (squares.square().mean(dim=(0, 1)) - variance.square()).clamp_min(0.0)
    stderr = (spread / ess_of_chains(split_chains(squares)) / variance).sqrt() / 2
    sd = x.flatten(0, 1).std(dim=0)
    return sd.reshape(draws.shape[2:]), known_or_nan(stderr, x, draws)


def autocorrelation(draws: Tensor) -> Tensor:
    """Autocorrelation of each chain at every lag, by fast Fourier transform.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)`` or ``(draws,)``, two draws or more.

    Returns
    -------
    Tensor
        Same shape, lag in place of draw, 1 at lag 0; float64.

    Raises
    ------
    ShapeError
        If there are fewer than two draws.
    """
    if draws.ndim < 1 or draws.shape[0] < 2:
        raise ShapeError(f"An autocorrelation needs 2 or more draws along the first axis; got {tuple(draws.shape)}.")
    covariance = _autocovariance(draws.detach().to(torch.float64))
    return covariance / covariance[:1]


class GridDistance(NamedTuple):
    """Total variation between draws and a density, on a grid.

    Attributes
    ----------
    value
        Between 0 and 1; draws outside the grid count in full.
    stderr
        Its standard error, for independent draws.
    floor
        What as many exact independent draws would show on average: a perfect sampler reads this, not 0.
    """

    value: float
    stderr: float
    floor: float


@torch.no_grad()
def grid_total_variation(
    samples: Tensor, energy: EnergyFn, low: Sequence[float], high: Sequence[float], *, bins: int = 30, per_bin: int = 4
) -> GridDistance:
    r"""Total variation :math:`\frac12 \sum_b |\hat p_b - p_b|` between draws and exp(-E), both binned on a box.

    The box must hold practically all the mass of the density. Finer bins resolve more and raise the floor.

    Parameters
    ----------
    samples
        Independent draws, ``(n, d)``, d at most 3.
    energy
        Batched: ``(n, d) -> (n,)``; its log Z is not needed.
    low, high
        Corners of the box, ``d`` numbers each.
    bins
        Per axis.
    per_bin
        Midpoints per bin and axis at which the density is summed.

    Raises
    ------
    ShapeError, OptionError, DomainError
        If the arguments do not fit, or the density vanishes on the box.
    """
    if samples.ndim != 2 or not 1 <= samples.shape[1] <= 3 or len(samples) < 1:
        raise ShapeError(f"A grid takes samples of shape (n, d) with d at most 3; got {tuple(samples.shape)}.")
    n, d = samples.shape
    corner, far = samples.new_tensor(low), samples.new_tensor(high)
    if corner.shape != (d,) or far.shape != (d,) or not bool((corner < far).all()) or bins < 1 or per_bin < 1:
        raise OptionError(f"Expected {d} numbers with low < high, bins and per_bin positive; got {low} and {high}.")
    fine = bins * per_bin
    axes = [
        corner[k] + (far[k] - corner[k]) * (torch.arange(fine, device=samples.device) + 0.5) / fine for k in range(d)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, d)
    logs = -torch.cat([energy(chunk) for chunk in points.split(65536)]).to(torch.float64)
    if not bool((logs.max() > -math.inf) & ~logs.isnan().any() & (logs.max() < math.inf)):
        raise DomainError("The energy is NaN or -inf somewhere on the grid, or +inf on all of it; check low and high.")
    mass = logs.softmax(dim=0).reshape([bins, per_bin] * d).sum(dim=tuple(range(1, 2 * d, 2))).flatten()
    place = ((samples - corner) / (far - corner) * bins).floor()
    inside = ((place >= 0) & (place < bins)).all(dim=1)
    weights = torch.tensor([bins ** (d - 1 - k) for k in range(d)], device=samples.device)
    counts = (place[inside].long() * weights).sum(dim=1).bincount(minlength=bins**d)
    p_hat, outside = counts.to(torch.float64) / n, 1 - float(inside.sum()) / n
    value = (float((p_hat - mass).abs().sum()) + outside) / 2
    signs = (p_hat - mass).sign()
    spread = float((signs.square() * p_hat).sum()) + outside - (float((signs * p_hat).sum()) + outside) ** 2
    floor = float((mass * (1 - mass)).sqrt().sum()) / math.sqrt(2 * math.pi * n)
    return GridDistance(value, math.sqrt(max(spread, 0.0) / n) / 2, min(floor, 1.0))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of absolute differences of two discrete distributions of one shape.

    Parameters
    ----------
    p, q
        Probabilities or counts of one shape; each is divided by its sum.

    Raises
    ------
    ShapeError
        If the shapes differ.
    InputError
        If an entry is negative or not finite, or all are zero.
    """
    if p.shape != q.shape:
        raise ShapeError(f"The two distributions have shapes {tuple(p.shape)} and {tuple(q.shape)}; they must agree.")
    for name, value in (("p", p), ("q", q)):
        if not bool(value.isfinite().all() & (value >= 0).all() & (value.sum() > 0)):
            raise InputError(f"{name} must hold non-negative finite numbers with a positive sum.")
    p, q = p.to(torch.float64), q.to(torch.float64)
    return (p / p.sum() - q / q.sum()).abs().sum() / 2


def coordinates_of(draws: Tensor) -> Tensor:
    """Float64 ``(draws, chains, coordinates)``."""
    if draws.ndim < 2 or draws.shape[0] < 4 or draws.shape[1] < 1:
        raise ShapeError(f"Draws come as (draws, chains, *event) with 4 or more draws; got {tuple(draws.shape)}.")
    return draws.detach().to(torch.float64).reshape(draws.shape[0], draws.shape[1], -1)


def known_or_nan(value: Tensor, x: Tensor, draws: Tensor) -> Tensor:
    """One number per coordinate in the event's shape, NaN where the coordinate never moves or is not finite."""
    known = x.isfinite().all(dim=(0, 1)) & (x != x[:1, :1]).any(dim=(0, 1))
    return torch.where(known, value, math.nan).reshape(draws.shape[2:])


def split_chains(x: Tensor) -> Tensor:
    """Halve each chain; the middle draw of an odd number is left out."""
    half = x.shape[0] // 2
    return torch.cat([x[:half], x[-half:]], dim=1)


def _rank_normalised(x: Tensor) -> Tensor:
    """Normal scores of the ranks over all draws and chains, ties shared."""
    rows = x.flatten(0, 1).mT.contiguous()
    ordered, order = rows.sort(dim=1)
    places = torch.arange(1, rows.shape[1] + 1, device=x.device).expand_as(rows)
    # The first and the last place of each run of ties.
    new = torch.cat([places[:, :1] == 1, ordered[:, 1:] != ordered[:, :-1]], dim=1)
    first = torch.where(new, places, 0).cummax(dim=1).values
    end = torch.cat([new[:, 1:], new[:, :1]], dim=1)
    last = torch.where(end, places, rows.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    ranks = torch.empty_like(rows).scatter_(1, order, (first + last).to(x.dtype) / 2)
    scores = torch.special.ndtri((ranks - 0.375) / (rows.shape[1] + 0.25))
    return scores.mT.reshape(x.shape)


def _r_hat(x: Tensor) -> Tensor:
    n = x.shape[0]
    within, between = x.var(dim=0).mean(dim=0), x.mean(dim=0).var(dim=0)
    return ((n - 1) / n + between / within).sqrt()


def _autocovariance(x: Tensor) -> Tensor:
    n = x.shape[0]
    centred = x - x.mean(dim=0)
    length = 1 << (2 * n - 1).bit_length()
    power = torch.fft.rfft(centred, n=length, dim=0).abs().square()
    return torch.fft.irfft(power, n=length, dim=0)[:n] / n


def ess_of_chains(x: Tensor) -> Tensor:
    """Effective sample size of chains as they are, ``(draws, chains, coordinates)``: Geyer's monotone sequence."""
    n, m = x.shape[:2]
    covariance = _autocovariance(x).mean(dim=1)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (x.mean(dim=0).var(dim=0) if m > 1 else 0.0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    # The last pair of lags rests on too few products to count in full.
    pairs = rho[: 2 * max(1, (n - 1) // 2)].unflatten(0, (-1, 2))
    positive = (pairs.sum(dim=1) > 0).to(x.dtype).cumprod(dim=0)
    positive[-1] = 0.0
    # The first even lag past the cut still carries information: when it is positive, or when its pair is.
    cut = positive.sum(dim=0).long()[None]
    beyond = pairs[:, 0].gather(0, cut)[0]
    beyond = torch.where(pairs.sum(dim=1).gather(0, cut)[0] >= 0, beyond, beyond.clamp_min(0.0))
    tau = -1 + 2 * (pairs.sum(dim=1).cummin(dim=0).values * positive).sum(dim=0) + beyond
    # What is the same in every draw, an indicator that no draw leaves, is known as well as by independent ones.
    moves = (x != x[:1, :1]).any(dim=0).any(dim=0)
    return torch.where(moves, n * m / tau.clamp_min(1 / math.log10(n * m)), float(n * m))
