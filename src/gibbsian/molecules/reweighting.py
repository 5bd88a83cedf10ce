r"""Frames of one ensemble weighed to be those of another, and what they are worth then.

A frame drawn with density :math:`q(x)` stands for :math:`w(x) \propto p(x) / q(x)` frames of the density p. Towards
the Boltzmann law of energy U at temperature T,

* from a biased run, :math:`q \propto e^{-(U + V) / kT}`: :math:`\log w = V / kT`;
* from temperature T', :math:`q \propto e^{-U / kT'}`: :math:`\log w = U / kT' - U / kT`;

and both together add up. Kish's effective size :math:`(\sum w)^2 / \sum w^2` says how many equally weighted frames the
weighted ones are worth, were they independent; correlation in time comes on top.

`Survey Sampling (Kish, 1965)`; `Nonphysical sampling distributions in Monte Carlo free-energy estimation (Torrie &
Valleau, 1977) <https://doi.org/10.1016/0021-9991(77)90121-8>`_.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.molecules.thermal import thermal_energy

FEW = 50.0
"""Effective frames below which an estimate from weights is refused."""


def bias_log_weights(bias: Any, temperature: float) -> Tensor:
    """Log-weights that take a bias out: ``(n,)`` biases in kJ/mol to ``(n,)`` nats.

    Parameters
    ----------
    bias
        Of each frame, in kJ/mol. Of metadynamics the bias at its own time, less what it had come to on average by then.
    temperature
        Of the run, in kelvin.
    """
    return torch.as_tensor(bias, dtype=torch.float64) / thermal_energy(temperature)


def temperature_log_weights(energy: Any, temperature: float, to: float) -> Tensor:
    """Log-weights from one temperature to another: ``(n,)`` potential energies in kJ/mol to ``(n,)`` nats.

    Parameters
    ----------
    energy
        Potential energy of each frame, all degrees of freedom included, in kJ/mol.
    temperature, to
        Of the run, and of the ensemble that is asked for, in kelvin.
    """
    u = torch.as_tensor(energy, dtype=torch.float64)
    u = u - u.mean()
    return u / thermal_energy(temperature) - u / thermal_energy(to)


def normalised_weights(log_weights: Any, fewest: float = 0.0) -> Tensor:
    """Weights that sum to one, ``(n,)`` float64; minus infinity is a weight of nothing.

    Parameters
    ----------
    log_weights
        In nats, up to a constant.
    fewest
        Effective frames that the weights must be worth.

    Raises
    ------
    DataError
        If a log-weight is NaN or infinite, all weigh nothing, or they are worth too little.
    """
    log_w = torch.as_tensor(log_weights, dtype=torch.float64)
    if bool(log_w.isnan().any()) or bool((log_w == torch.inf).any()) or not bool(log_w.isfinite().any()):
        raise DataError("Log-weights are numbers or minus infinity, and at least one is a number.")
    w = log_w.softmax(0)
    worth = effective_sample_size(w)
    if worth < fewest:
        raise DataError(
            f"The {len(w)} weighted frames are worth {worth:.1f} frames of equal weight, fewer than {fewest:g}: a few "
            "outweigh the rest, and any estimate would be theirs. The two ensembles overlap too little: simulate "
            "nearer to the one asked for, or in steps between."
        )
    return w


def effective_sample_size(weights: Tensor) -> float:
    """Kish's effective size of weights ``(n,)``."""
    w = weights.double()
    return float(w.sum().square() / w.square().sum())


def checked_weights(weights: Any, n: int) -> Tensor:
    """Read weights of n frames, from outside: not negative, finite, not all zero; they sum to one, ``(n,)`` float64.

    Raises
    ------
    ShapeError
        If there are not n.
    DataError
        If they are no weights.
    """
    w = torch.ones(n, dtype=torch.float64) if weights is None else _read(weights)
    if tuple(w.shape) != (n,):
        raise ShapeError(f"{n} frames have as many weights, ({n},); got {tuple(w.shape)}. Were frames left out?")
    bad = int((~w.isfinite() | (w < 0)).sum())
    if bad or not float(w.sum()) > 0:
        raise DataError(f"Weights are finite, not negative, and not all 0; {bad} of {n} are not so.")
    return w / w.sum()


def _read(values: Any) -> Tensor:
    """As float64 of its own memory: tables are often read-only."""
    return values.detach().double() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)


def resampled_rows(weights: Tensor, rows: int, rng: Generator) -> Tensor:
    """Indices of rows drawn by weight, systematically: each comes as often as its weight says, to within one.

    Objectives take rows of equal weight; drawn several times as many as there are, they are the weighted ones, with no
    noise to speak of. `Comparison of resampling schemes for particle filtering (Douc & Cappé, 2005)
    <https://arxiv.org/abs/cs/0507025>`_.

    Parameters
    ----------
    weights
        Of the rows, ``(n,)``.
    rows
        How many to draw.
    rng
        Of the one random number that shifts the comb.

    Returns
    -------
    Tensor
        ``(rows,)``, ascending.

    Raises
    ------
    OptionError
        If none is to be drawn.
    """
    if rows < 1:
        raise OptionError(f"Rows drawn by weight are 1 or more; got {rows}.")
    edges = (weights.double() / weights.double().sum()).cumsum(0)
    comb = (torch.arange(rows, dtype=torch.float64) + torch.rand((), generator=rng, dtype=torch.float64)) / rows
    return torch.searchsorted(edges, comb.to(edges.device)).clamp(max=len(weights) - 1)


def weighted_average(values: Any, weights: Tensor, blocks: Tensor | None = None) -> Estimate:
    r"""Weighted mean of values, and its standard error by linearisation.

    .. math:: \hat\mu = \sum_i w_i a_i, \qquad \mathrm{Var} \approx \sum_b \Big( \sum_{i \in b} w_i (a_i - \hat\mu)
              \Big)^2,

    summed over blocks of frames that are correlated within.

    Parameters
    ----------
    values
        ``(n,)``.
    weights
        ``(n,)``, of any sum.
    blocks
        The block of each frame, ``(n,)`` whole numbers; each frame its own when left out.
    """
    a = torch.as_tensor(values, dtype=torch.float64)
    w = checked_weights(weights, len(a))
    mean = (w * a).sum()
    parts = w * (a - mean)
    if blocks is not None:
        parts = torch.zeros(int(blocks.max()) + 1, dtype=torch.float64).index_add_(0, blocks, parts)
    return Estimate(float(mean), float(parts.square().sum().sqrt()))


def block_bootstrap(
    statistic: Callable[[Tensor], Tensor], n: int, block: int, resamples: int, rng: Generator
) -> Tensor:
    """Evaluate a statistic on resamples of a series made of stretches of it.

    `The jackknife and the bootstrap for general stationary observations (Künsch, 1989)
    <https://doi.org/10.1214/aos/1176347265>`_; stretches wrap round at the end, so that every frame is equally likely.

    Parameters
    ----------
    statistic
        From how often each frame occurs in a resample, ``(n,)`` float64, to a tensor of any shape.
    n
        Length of the series.
    block
        Length of a stretch: some correlation times.
    resamples
        How many.
    rng
        The generator.

    Returns
    -------
    Tensor
        ``(resamples, ...)``.

    Raises
    ------
    OptionError
        If a number is out of its range.
    """
    if not 1 <= block <= n or resamples < 2:
        raise OptionError(
            f"A block bootstrap takes blocks of 1 to {n} and 2 or more resamples; got {block}, {resamples}."
        )
    return torch.stack([statistic(resample_counts(n, block, rng)) for _ in range(resamples)])


def resample_counts(n: int, block: int, rng: Generator) -> Tensor:
    """How often each frame of a series occurs in one resample of stretches, ``(n,)`` float64."""
    starts = torch.randint(n, (-(-n // block),), generator=rng)
    index = (starts[:, None] + torch.arange(block)).flatten()[:n] % n
    return torch.bincount(index, minlength=n).double()


def correlation_time(series: Tensor) -> float:
    r"""Integrated autocorrelation time of the slowest of some series, in frames: :math:`1 + 2 \sum_t \rho_t`.

    Parameters
    ----------
    series
        ``(n, k)``, one column per observable; constant ones are passed over.

    Returns
    -------
    float
        1 for independent frames, n at most.
    """
    from gibbsian.diagnostics.chains import effective_sample_size as chain_size

    moving = series[:, series.double().std(0) > 0].double()
    if len(moving) < 8 or not moving.shape[1]:
        return 1.0
    worth = chain_size(moving[:, None], ranked=False)
    return float((len(moving) / worth).nan_to_num(1.0).clamp(1.0, len(moving)).max())
