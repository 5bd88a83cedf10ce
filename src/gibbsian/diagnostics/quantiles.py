r"""Quantiles of chains, their errors, and how well the tails are explored.

The share of draws below a level is the mean of an indicator, which has an effective sample size of its own. With
:math:`S` of them behind the indicator of a quantile :math:`p`, the share follows
:math:`\mathrm{Beta}(S p + 1, S (1 - p) + 1)`, and the draws between which the middle two thirds of that law lie are one
standard error away on either side.

Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021)
<https://doi.org/10.1214/20-BA1221>

No moment has to exist: a quantile of a Cauchy law has an error, its mean has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.diagnostics.chains import coordinates_of, ess_of_chains, known_or_nan, split_chains
from gibbsian.errors import OptionError

ONE_SIGMA = (0.1586553, 0.8413447)
"""The probabilities one standard deviation below and above the mean of a normal law."""


def quantile_effective_sample_size(draws: Tensor, probability: float = 0.5) -> Tensor:
    """Effective sample size of a quantile; by default, of the median.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.
    probability
        Between 0 and 1.

    Returns
    -------
    Tensor
        ``event``-shaped, float64.

    Raises
    ------
    ShapeError
        If there are too few draws or no chain axis.
    OptionError
        If the probability is not inside (0, 1).
    """
    x = coordinates_of(draws)
    return known_or_nan(_ess_below(x, quantile_of(ordered_draws(x), probability)), x, draws)


def tail_effective_sample_size(draws: Tensor, probability: float = 0.05) -> Tensor:
    """Effective sample size in the tails: the smaller of those of two opposite quantiles, 5 and 95 per cent.

    Where a quantile is the largest value, as in a coordinate of zeros and ones, no draw lies beyond, and the other
    tail decides.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.
    probability
        Of the lower tail; the upper one mirrors it.

    Returns
    -------
    Tensor
        ``event``-shaped, float64.

    Raises
    ------
    ShapeError
        If there are too few draws or no chain axis.
    OptionError
        If the probability is not inside (0, 1).
    """
    x = coordinates_of(draws)
    ordered = ordered_draws(x)
    low, high = (_ess_below(x, quantile_of(ordered, p)) for p in (probability, 1 - probability))
    return known_or_nan(torch.minimum(low, high), x, draws)


def chain_quantile(draws: Tensor, probability: float = 0.5) -> tuple[Tensor, Tensor]:
    """Quantile over draws and chains, and its standard error; by default, the median.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.
    probability
        Between 0 and 1.

    Returns
    -------
    tuple
        Quantile (neighbouring draws interpolated linearly) and standard error, ``event``-shaped, float64.

    Raises
    ------
    ShapeError
        If there are too few draws or no chain axis.
    OptionError
        If the probability is not inside (0, 1).
    """
    from scipy.special import betaincinv

    x = coordinates_of(draws)
    ordered = ordered_draws(x)
    value = quantile_of(ordered, probability)
    ess = _ess_below(x, value).cpu().numpy()
    size = len(ordered)
    ends = []
    for p, last in zip(ONE_SIGMA, (torch.floor, torch.ceil)):
        share = torch.as_tensor(betaincinv(ess * probability + 1, ess * (1 - probability) + 1, p))
        place = last((share * size - 1).clamp(0, size - 1)).nan_to_num(0.0).long().to(x.device)
        ends.append(ordered.gather(0, place[None])[0])
    return value.reshape(draws.shape[2:]), known_or_nan((ends[1] - ends[0]) / 2, x, draws)


def ordered_draws(x: Tensor) -> Tensor:
    """All draws of each coordinate, ``(draws, chains, coordinates)``, in order; NaN for one that is not finite."""
    ordered = x.flatten(0, 1).sort(dim=0).values
    return torch.where(x.isfinite().all(dim=0).all(dim=0), ordered, torch.nan)


def quantile_of(ordered: Tensor, probability: float) -> Tensor:
    """Quantile of each column of ordered draws, by linear interpolation (type 7 of Hyndman and Fan)."""
    if not 0.0 < probability < 1.0:
        raise OptionError(f"A quantile's probability lies between 0 and 1; got {probability}.")
    n = len(ordered)
    # Written so that it rounds as R and ArviZ do: a quantile that falls on a draw must not fall short of it.
    place = n * probability + (1.0 - probability)
    below = min(max(int(place), 1), n - 1)
    weight = min(max(place - below, 0.0), 1.0)
    return (1.0 - weight) * ordered[below - 1] + weight * ordered[below]


def _ess_below(x: Tensor, level: Tensor) -> Tensor:
    """Effective sample size of the share of draws at or below a level for each coordinate."""
    return ess_of_chains(split_chains((x <= level).to(x.dtype)))
