r"""Models of usual rows in a space of features, whose distance is a score: through scikit-learn.

======================  ==========================================================================
made by                 score of features :math:`\phi`
======================  ==========================================================================
`mahalanobis`           :math:`\min_c (\phi - \mu_c)^\top \Sigma^{-1} (\phi - \mu_c)`
`gaussian_mixture`      :math:`-\log \sum_j w_j\, \mathcal{N}(\phi; \mu_j, \Sigma_j)`
`nearest_neighbours`    distance to the k-th nearest reference row
======================  ==========================================================================

Features are any function ``(n, *event) -> (n, d)``: `LevelFeatures` of an energy, `LayerFeatures` of a network,
``lambda x: x.flatten(1)``. Rows with an infinite feature score infinity, and rows with NaN score NaN.

A model fits its reference rows better than new ones (the nearest neighbour of a reference row is itself): calibrate a
threshold on others, as `gibbsian.detection.detector.detector_of` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Generator, Tensor

from gibbsian.detection.base import Features, check_finite, check_rows
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, ShapeError, unknown_name

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import NearestNeighbors

Scaling = Literal["unit", "columns", "none"]


@dataclass(frozen=True)
class Columns:
    """Offsets and scales of features, ``(d,)`` each; made from reference rows."""

    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(values: Tensor) -> Columns:
        """Those that give reference features mean 0 and variance 1, where they vary."""
        spread = values.std(0)
        varies = spread > 1e-10 * values.abs().amax(0)
        if not bool(varies.any()):
            raise DataError(
                f"The {values.shape[1]} features are the same at all {len(values)} reference rows; no distance is "
                "usual. Take other features or rows."
            )
        # A column that does not vary has no unit of its own, and is measured in the largest of the others.
        return Columns(values.mean(0), torch.where(varies, spread, spread[varies].max()))

    def __call__(self, values: Tensor) -> Tensor:
        """Standardised features."""
        return (values - self.mean) / self.scale


@dataclass(frozen=True)
class Mahalanobis:
    """Squared Mahalanobis distance to the nearest centre; made by `mahalanobis`.

    Attributes
    ----------
    features
        From rows to ``(n, d)``.
    columns
        Scaling of the features.
    centres, precision
        ``(C, d)`` and ``(d, d)``, of standardised features.
    """

    features: Features
    columns: Columns
    centres: Tensor
    precision: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Squared distances, ``(n, *event) -> (n,)`` float64."""
        return where_finite(self._distances, described(self.features, x))

    def _distances(self, values: Tensor) -> Tensor:
        away = self.columns(values).unsqueeze(1) - self.centres
        return ((away @ self.precision) * away).sum(2).amin(1)


def mahalanobis(features: Features, rows: Tensor, labels: Tensor | None = None, *, shrink: bool = False) -> Mahalanobis:
    """Fit one covariance to the features of reference rows, about their mean or the means of their classes.

    `A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks (Lee et al., 2018)
    <https://arxiv.org/abs/1807.03888>`_.

    Parameters
    ----------
    features
        From rows ``(n, *event)`` to ``(n, d)``.
    rows
        Reference rows, more than there are classes.
    labels
        Classes, ``(n,)`` whole numbers; one centre for all rows when left out.
    shrink
        Shrink the covariance by the rule of Ledoit and Wolf, as few rows in many dimensions need; else it gets a pinch
        of variance, 1e-9 of each column's, which keeps it invertible.

    Raises
    ------
    ShapeError, ArgumentTypeError
        If there are too few rows or not one label each, or labels are no whole numbers.
    DataError, InputError
        If the features do not vary, or are not finite.
    """
    from sklearn.covariance import EmpiricalCovariance, LedoitWolf

    check_rows(rows, 2, "The Mahalanobis distance")
    values = _reference(features, rows)
    columns = Columns.of(values)
    z = columns(values)
    groups = _groups(labels, len(rows)).to(z.device)
    count = int(groups.max()) + 1
    if count >= len(rows):
        raise ShapeError(f"{len(rows)} reference rows in {count} classes leave no spread; give more rows.")
    sizes = torch.bincount(groups, minlength=count).double()
    centres = torch.zeros((count, z.shape[1]), dtype=z.dtype, device=z.device).index_add(0, groups, z) / sizes[:, None]
    estimator = (LedoitWolf if shrink else EmpiricalCovariance)(assume_centered=True, store_precision=False)
    covariance = torch.as_tensor(estimator.fit((z - centres[groups]).cpu().numpy()).covariance_).to(z)
    # The sum of squares is divided by the degrees of freedom; a pinch of variance keeps equal columns invertible.
    covariance = covariance * len(z) / (len(z) - count) + 1e-9 * torch.eye(len(covariance)).to(z)
    return Mahalanobis(features, columns, centres, torch.linalg.inv(covariance))


@dataclass(frozen=True)
class Mixture:
    """Minus the log-density of standardised features under a Gaussian mixture; made by `gaussian_mixture`.

    Attributes
    ----------
    features, columns
        As in `Mahalanobis`.
    model
        scikit-learn's, fitted.
    """

    features: Features
    columns: Columns
    model: GaussianMixture

    def __call__(self, x: Tensor) -> Tensor:
        """Minus log-densities, ``(n, *event) -> (n,)`` float64, nats."""
        return where_finite(self._energies, described(self.features, x))

    def _energies(self, values: Tensor) -> Tensor:
        return torch.as_tensor(-self.model.score_samples(self.columns(values).cpu().numpy())).to(values)


def gaussian_mixture(
    features: Features, rows: Tensor, components: int = 1, *, rng: Generator, restarts: int = 3
) -> Mixture:
    """Fit a Gaussian mixture with full covariances to the features of reference rows.

    Parameters
    ----------
    features
        From rows ``(n, *event)`` to ``(n, d)``.
    rows
        Reference rows.
    components
        Of the mixture; 1 is a Gaussian, whose order is that of `mahalanobis`.
    rng
        Seeds the fit.
    restarts
        Of the fit, of which the best is kept.

    Raises
    ------
    OptionError
        If a number is below 1.
    ShapeError
        If there are fewer than two rows for each component.
    DataError, InputError
        If the features do not vary, or are not finite.
    """
    from sklearn.mixture import GaussianMixture

    if components < 1 or restarts < 1:
        raise OptionError(f"components and restarts are 1 or more; got {components} and {restarts}.")
    check_rows(rows, 2 * components, f"A mixture of {components}")
    values = _reference(features, rows)
    columns = Columns.of(values)
    seed = int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device))
    model = GaussianMixture(components, n_init=restarts, random_state=seed)
    return Mixture(features, columns, model.fit(columns(values).cpu().numpy()))


@dataclass(frozen=True)
class Neighbours:
    """Distance to the k-th nearest reference row; made by `nearest_neighbours`.

    Attributes
    ----------
    features
        From rows to ``(n, d)``.
    prepare
        What is done to features before distances are taken.
    index
        scikit-learn's, fitted.
    """

    features: Features
    prepare: Callable[[Tensor], Tensor]
    index: NearestNeighbors

    def __call__(self, x: Tensor) -> Tensor:
        """Distances, ``(n, *event) -> (n,)`` float64."""
        return where_finite(self._distances, described(self.features, x))

    def _distances(self, values: Tensor) -> Tensor:
        found = self.index.kneighbors(self.prepare(values).cpu().numpy())[0]
        return torch.as_tensor(found[:, -1]).to(values)


def nearest_neighbours(features: Features, rows: Tensor, k: int = 10, *, scaling: Scaling = "unit") -> Neighbours:
    """Keep the features of reference rows, to measure distances to the k-th nearest.

    `Out-of-Distribution Detection with Deep Nearest Neighbors (Sun et al., 2022) <https://arxiv.org/abs/2204.06507>`_.

    Parameters
    ----------
    features
        From rows ``(n, *event)`` to ``(n, d)``.
    rows
        Reference rows, k or more.
    k
        Which neighbour, counted from 1.
    scaling
        ``"unit"`` divides each row's features by their length, as the paper does with a network's last layer;
        ``"columns"`` standardises each feature over the reference rows; ``"none"`` takes them as they are.

    Raises
    ------
    OptionError
        If k is below 1 or the scaling unknown.
    ShapeError, DataError, InputError
        If there are fewer than k rows, or their features do not vary or are not finite.
    """
    from sklearn.neighbors import NearestNeighbors

    if not isinstance(k, int) or k < 1:
        raise OptionError(f"k is the number of a neighbour, 1 or more; got {k!r}.")
    if scaling not in get_args(Scaling):
        raise unknown_name("scaling", scaling, get_args(Scaling))
    check_rows(rows, k, f"The distance to neighbour {k}")
    values = _reference(features, rows)
    prepare = Columns.of(values) if scaling == "columns" else _unit if scaling == "unit" else _plain
    return Neighbours(features, prepare, NearestNeighbors(n_neighbors=k).fit(prepare(values).cpu().numpy()))


def described(features: Features, x: Tensor) -> Tensor:
    """Features of rows in float64, ``(n, d)``.

    Raises
    ------
    ShapeError
        If they are no table with one line per row.
    """
    values = features(x)
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(x) or values.shape[1] < 1:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"Features of {len(x)} rows are a table ({len(x)}, d); got {found}. Flatten them with .flatten(1)."
        )
    return values.detach().double()


def where_finite(fn: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Score the rows whose features are finite; of the others, NaN stays NaN, and infinity is infinitely foreign."""
    score = torch.where(values.isnan().any(1), math.nan, math.inf).to(values)
    good = values.isfinite().all(1)
    if bool(good.any()):
        score[good] = fn(values[good])
    return score


def _reference(features: Features, rows: Tensor) -> Tensor:
    values = described(features, rows)
    check_finite(values, "A feature")
    return values


def _groups(labels: Any, rows: int) -> Tensor:
    """Classes numbered from 0, those without a row left out."""
    if labels is None:
        return torch.zeros(rows, dtype=torch.long)
    y = torch.as_tensor(labels)
    if y.is_floating_point() or y.is_complex():
        raise ArgumentTypeError(f"Labels are whole numbers, one per row; got {y.dtype}. Convert with .long().")
    if tuple(y.shape) != (rows,):
        raise ShapeError(f"{rows} reference rows have one label each, ({rows},); got {tuple(y.shape)}.")
    return y.unique(return_inverse=True)[1]


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=1)


def _plain(values: Tensor) -> Tensor:
    return values
