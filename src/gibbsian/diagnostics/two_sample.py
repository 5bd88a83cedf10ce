r"""Whether two sets of points are draws from one distribution.

Two families. *Kernel distances*, the squared maximum mean discrepancy and the energy distance, are U-statistics

.. math:: D^2 = \mathbb{E}\,k(x, x') + \mathbb{E}\,k(y, y') - 2\,\mathbb{E}\,k(x, y)

(the energy distance has :math:`k(x, y) = -|x - y|`): unbiased, so slightly negative as often as positive when the two
distributions agree. *Fitted distances*, Fréchet and sliced Wasserstein, are biased upwards by the finite samples; read
them beside the same distance between held-out and training data of the same sizes, the floor.

Rows count as independent: thin correlated chains first, or the errors are too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate, bootstrap_stderr, picks, rows_of, two_rows_of
from gibbsian.errors import OptionError

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

_CHUNK = 1024


def energy_distance(a: Any, b: Any) -> Estimate:
    r"""Energy distance, squared: :math:`2\,\mathbb{E}|x-y| - \mathbb{E}|x-x'| - \mathbb{E}|y-y'|`.

    Zero exactly when the distributions agree. Scales with the data's unit: standardise columns of different units.
    The error is the jackknife's: exact to first order when the distributions differ, and up to 1.4 times too large
    when they agree.

    Energy statistics: A class of statistics based on distances (Székely and Rizzo, 2013)
    <https://doi.org/10.1016/j.jspi.2013.03.018>

    Parameters
    ----------
    a, b
        Samples, ``(n, *event)`` and ``(m, *event)``, three rows or more.

    Raises
    ------
    ShapeError, InputError
        If the samples do not fit together or are not finite.
    """
    x, y = two_rows_of(a, b, fewest=3)
    return _u_statistic(x, y, lambda s, t: -torch.cdist(s, t))


def kernel_mmd(a: Any, b: Any, bandwidth: float | None = None) -> Estimate:
    r"""Squared maximum mean discrepancy with the kernel :math:`e^{-|x-y|^2 / 2h^2}`, unbiased.

    The error is the jackknife's, as in `energy_distance`.

    A Kernel Two-Sample Test (Gretton et al., 2012) <https://jmlr.org/papers/v13/gretton12a.html>

    Parameters
    ----------
    a, b
        Samples, ``(n, *event)`` and ``(m, *event)``, three rows or more.
    bandwidth
        ``h``, in the data's unit; the median distance of the pooled sample when left out.

    Raises
    ------
    OptionError
        If the bandwidth is not positive.
    ShapeError, InputError
        If the samples do not fit together or are not finite.
    """
    x, y = two_rows_of(a, b, fewest=3)
    h = median_distance(x, y) if bandwidth is None else float(bandwidth)
    if not (h > 0 and math.isfinite(h)):
        cause = "the points coincide" if bandwidth is None else "it is given so"
        raise OptionError(f"The kernel's bandwidth must be positive and finite; it is {h} ({cause}). Pass bandwidth=.")
    return _u_statistic(x, y, lambda s, t: (torch.cdist(s, t).square() / (-2 * h * h)).exp())


def median_distance(a: Any, b: Any, rows: int = 1000) -> float:
    """Median distance between distinct points of the pooled sample: the usual kernel bandwidth.

    Parameters
    ----------
    a, b
        Samples, ``(n, *event)`` and ``(m, *event)``.
    rows
        At most so many rows of each are used, evenly spread over the sample.
    """
    pooled = torch.cat([x[torch.linspace(0, len(x) - 1, min(len(x), rows)).long()] for x in two_rows_of(a, b)])
    return float(torch.pdist(pooled).median())


def _u_statistic(x: Tensor, y: Tensor, k: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    """Value and two-sample jackknife error from the row sums of the kernel, in memory linear in the rows."""
    n, m = len(x), len(y)
    xx, _ = _sums(x, x, k)
    yy, _ = _sums(y, y, k)
    xy, yx = _sums(x, y, k)
    within_x, within_y, across = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.sum() / (n * m)
    value = within_x + within_y - 2 * across
    # The statistic without one row follows from the row's own sum.
    less_x = (xx.sum() - 2 * xx) / ((n - 1) * (n - 2)) - 2 * (xy.sum() - xy) / ((n - 1) * m)
    less_y = (yy.sum() - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (yx.sum() - yx) / ((m - 1) * n)
    variance = (n - 1) * less_x.var(correction=0) + (m - 1) * less_y.var(correction=0)
    return Estimate(float(value), float(variance.sqrt()))


def _sums(x: Tensor, y: Tensor, k: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Row and column sums of ``k(x, y)``; a point's pair with itself is left out when ``x is y``."""
    rows, columns = x.new_zeros(len(x)), y.new_zeros(len(y))
    for start in range(0, len(x), _CHUNK):
        block = k(x[start : start + _CHUNK], y)
        if x is y:
            block.diagonal(offset=start).zero_()
        rows[start : start + _CHUNK] = block.sum(dim=1)
        columns += block.sum(dim=0)
    return rows, columns


def sliced_wasserstein(
    a: Any, b: Any, *, rng: Generator, p: float = 2.0, projections: int = 128, resamples: int = 50
) -> Estimate:
    r"""Sliced Wasserstein distance: :math:`(\mathbb{E}_\theta W_p^p(\theta \cdot x, \theta \cdot y))^{1/p}`.

    In one dimension optimal transport joins equal quantiles, which is exact for samples of any two sizes. The error
    is a bootstrap's, over rows and directions together.

    Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015)
    <https://doi.org/10.1007/s10851-014-0506-3>

    Parameters
    ----------
    a, b
        Samples, ``(n, *event)`` and ``(m, *event)``.
    rng
        The generator of directions and resamples.
    p
        Order, 1 or more.
    projections
        Directions drawn uniformly; in one dimension all are the same.
    resamples
        Bootstrap resamples.

    Raises
    ------
    OptionError
        If ``p < 1`` or a count is too small.
    ShapeError, InputError
        If the samples do not fit together or are not finite.
    """
    x, y = two_rows_of(a, b)
    if p < 1 or projections < 1:
        raise OptionError(f"p and projections are 1 or more; got p={p} and projections={projections}.")
    directions = torch.randn(x.shape[1], projections, dtype=x.dtype, generator=rng, device=rng.device).to(x.device)
    directions = directions / directions.norm(dim=0)
    u, v = x @ directions, y @ directions

    def resampled() -> float:
        rows = [s[picks(len(s), (len(s),), rng, s.device)] for s in (u, v)]
        costs = _quantile_costs(rows[0], rows[1], p)
        return float(costs[picks(projections, (projections,), rng, costs.device)].mean() ** (1 / p))

    value = float(_quantile_costs(u, v, p).mean() ** (1 / p))
    return Estimate(value, bootstrap_stderr(resampled, resamples))


def _quantile_costs(u: Tensor, v: Tensor, p: float) -> Tensor:
    """``W_p^p`` of each column of ``(n, k)`` and ``(m, k)``, by the quantile functions' common refinement."""
    u, v = u.sort(dim=0).values, v.sort(dim=0).values
    n, m = len(u), len(v)
    if n == m:
        return (u - v).abs().pow(p).mean(dim=0)
    # Whole numbers in units of 1 / (n m), so that coinciding levels coincide exactly.
    levels = torch.cat([torch.arange(1, n + 1, device=u.device) * m, torch.arange(1, m + 1, device=u.device) * n])
    levels = levels.sort().values
    widths = levels.diff(prepend=levels.new_zeros(1)).to(u.dtype) / (n * m)
    i, j = (levels - 1) // m, (levels - 1) // n
    return ((u[i] - v[j]).abs().pow(p) * widths[:, None]).sum(dim=0)


def frechet_distance(a: Any, b: Any) -> Estimate:
    r"""Fréchet distance, squared, between Gaussians fitted to two sets of features.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2})

    The last trace is the sum of singular values of :math:`\Sigma_a^{1/2} \Sigma_b^{1/2}`, which stays accurate for
    singular covariances. Finite samples bias it upwards, about quadratically in the dimension: compare at equal sizes.
    The error is the delta method's, from the gradient of the distance in the moments.

    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017)
    <https://arxiv.org/abs/1706.08500>

    Parameters
    ----------
    a, b
        Features, ``(n, *event)`` and ``(m, *event)``; with a classifier's activations this is the FID.

    Raises
    ------
    ShapeError, InputError
        If the samples do not fit together or are not finite.
    """
    x, y = two_rows_of(a, b)
    shift = x.mean(dim=0) - y.mean(dim=0)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    root_x, inverse_x = _covariance_root(x)
    root_y, inverse_y = _covariance_root(y)
    left, singular, right = torch.linalg.svd(root_x @ root_y)
    spread = x.square().sum() / (len(x) - 1) + y.square().sum() / (len(y) - 1)
    value = shift.square().sum() + spread - 2 * singular.sum()

    def influence_variance(rows: Tensor, sign: int, inverse: Tensor, vectors: Tensor) -> Tensor:
        factor = inverse @ vectors * singular.sqrt()
        influence = 2 * sign * rows @ shift + rows.square().sum(dim=1) - (rows @ factor).square().sum(dim=1)
        return influence.var() / len(rows)

    variance = influence_variance(x, 1, inverse_x, left) + influence_variance(y, -1, inverse_y, right.mT)
    return Estimate(max(float(value), 0.0), float(variance.sqrt()))


def _covariance_root(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of the covariance and its pseudo-inverse, ``(d, d)`` each."""
    values, vectors = torch.linalg.eigh(centred.mT @ centred / (len(centred) - 1))
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > floor, values, 0.0).sqrt()
    inverses = torch.where(roots > 0, 1 / roots.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return (vectors * roots) @ vectors.mT, (vectors * inverses) @ vectors.mT


def classifier_test(
    a: Any, b: Any, *, rng: Generator, classifier: ClassifierMixin | None = None, folds: int = 5, rows: int = 5000
) -> Estimate:
    """Classifier two-sample test: cross-validated accuracy at telling the samples apart; 0.5 is indistinguishable.

    The samples are cut to equal sizes by random choice. The error is binomial over the held-out predictions. Repeated
    rows (chains that have not moved) leak between folds and raise the accuracy: it then says so rightly.

    Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017) <https://arxiv.org/abs/1610.06545>

    Parameters
    ----------
    a, b
        Samples, ``(n, *event)`` and ``(m, *event)``.
    rng
        The generator of the choice of rows, the folds and the classifier's own randomness.
    classifier
        Any scikit-learn classifier; gradient-boosted trees when left out.
    folds
        Of the cross-validation, 2 or more.
    rows
        Of each sample at most.

    Raises
    ------
    OptionError
        If a fold would be empty.
    ShapeError, InputError
        If the samples do not fit together or are not finite.
    """
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    x, y = two_rows_of(a, b)
    n = min(len(x), len(y), rows)
    if not 2 <= folds <= n:
        raise OptionError(f"folds lies between 2 and the rows of the smaller sample, {n}; got {folds}.")
    chosen = [s[torch.randperm(len(s), generator=rng, device=rng.device)[:n].to(s.device)].cpu() for s in (x, y)]
    features, labels = torch.cat(chosen).numpy(), np.repeat([0, 1], n)
    seeds = torch.randint(2**31 - 1, (2,), generator=rng, device=rng.device).tolist()
    model = HistGradientBoostingClassifier(random_state=seeds[0]) if classifier is None else classifier
    splits = StratifiedKFold(folds, shuffle=True, random_state=seeds[1])
    hits = sum(
        score * len(test)
        for score, (_, test) in zip(
            cross_val_score(model, features, labels, cv=splits, scoring="accuracy"), splits.split(features, labels)
        )
    )
    accuracy = float(hits) / (2 * n)
    # Half a count is added to each side, so that a perfect score keeps an honest error.
    smoothed = (float(hits) + 0.5) / (2 * n + 1)
    return Estimate(accuracy, math.sqrt(smoothed * (1 - smoothed) / (2 * n)))


class Memorisation(NamedTuple):
    """How near samples lie to the training rows, beside held-out rows.

    Attributes
    ----------
    samples, held_out
        Mean distance to the nearest training row, in the data's unit.
    ratio
        Their ratio: near 1 is as it should be, near 0 is copying, far above 1 is missing the data.
    z
        The rank test's score: below about -3, samples lie nearer to the training rows than fresh data do.
    """

    samples: Estimate
    held_out: Estimate
    ratio: Estimate
    z: float


def memorisation(samples: Any, train: Any, held_out: Any) -> Memorisation:
    """Compare the samples' distances to their nearest training rows with those of held-out rows.

    A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan et al., 2020)
    <https://arxiv.org/abs/2004.05675>

    Parameters
    ----------
    samples, train, held_out
        ``(n, *event)``, ``(m, *event)`` and ``(k, *event)``. Held-out rows must not be among the training rows. The
        errors are those of the samples and held-out rows, given the training rows.

    Raises
    ------
    ShapeError, InputError
        If the sets do not fit together or are not finite.
    """
    near, usual = nearest(samples, train)[0], nearest(held_out, train)[0]
    a, b = _mean(near), _mean(usual)
    ratio = a.value / b.value if b.value > 0 else math.nan
    error = math.hypot(a.stderr, ratio * b.stderr) / b.value if b.value > 0 else math.nan
    return Memorisation(a, b, Estimate(ratio, error), _rank_score(near, usual))


def nearest(x: Any, reference: Any) -> tuple[Tensor, Tensor]:
    """Find each row's nearest reference row.

    Parameters
    ----------
    x, reference
        ``(n, *event)`` and ``(m, *event)``.

    Returns
    -------
    tuple
        Distances ``(n,)`` in float64, exactly 0 for a copy, and row numbers ``(n,)``.
    """
    rows, others = rows_of(x, "the sample", 1), rows_of(reference, "the reference", 1)
    rows, others = two_rows_of(rows, others, fewest=1)
    index = torch.cat([torch.cdist(chunk, others).argmin(dim=1) for chunk in rows.split(_CHUNK)])
    # The matrix product inside cdist loses small distances; the winner's is computed again.
    return (rows - others[index]).norm(dim=1), index


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def _rank_score(a: Tensor, b: Tensor) -> float:
    """Mann-Whitney statistic in standard deviations, ties shared; negative when ``a`` is the smaller."""
    n, m = len(a), len(b)
    pooled = torch.cat([a, b])
    ordered = pooled.sort().values
    below, upto = torch.searchsorted(ordered, pooled), torch.searchsorted(ordered, pooled, right=True)
    ranks = (below + upto + 1).to(torch.float64) / 2
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    variance = n * m * float(ranks.var()) / (n + m)
    return (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
