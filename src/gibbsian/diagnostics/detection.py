"""Telling in-distribution from out-of-distribution points by their energy.

A point is called foreign when its energy is high. Beware: a density model may give simple foreign points *lower* energy
than its own data (an AUROC below 0.5), which is a property of densities and not a bug.

Do Deep Generative Models Know What They Don't Know? (Nalisnick et al., 2019) <https://arxiv.org/abs/1810.09136>
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator

from gibbsian.diagnostics.estimate import Estimate, bootstrap_stderr, picks
from gibbsian.errors import InputError, OptionError, ShapeError, unknown_name

if TYPE_CHECKING:
    import numpy as np


def auroc(inside: Any, outside: Any, *, rng: Generator, resamples: int = 200) -> Estimate:
    """Probability that a foreign point has the higher energy: 1 separates, 0.5 is chance, ties count half.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)`` of in- and out-of-distribution points; infinite ones rank last.
    rng
        The generator of the bootstrap that gives the error, both sets resampled.
    resamples
        Bootstrap resamples.

    Raises
    ------
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    from sklearn.metrics import roc_auc_score

    low, high = _ranks(inside, outside)

    def area(a: np.ndarray, b: np.ndarray) -> float:
        import numpy as np

        return float(roc_auc_score(np.repeat([0, 1], [len(a), len(b)]), np.concatenate([a, b])))

    def resampled() -> float:
        return area(*(s[picks(len(s), (len(s),), rng).cpu().numpy()] for s in (low, high)))

    return Estimate(area(low, high), bootstrap_stderr(resampled, resamples))


def false_positive_rate(
    inside: Any, outside: Any, *, rng: Generator, detected: float = 0.95, resamples: int = 200
) -> Estimate:
    """Fraction of in-distribution points called foreign when the threshold catches so many foreign ones.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)``; infinite ones rank last.
    rng
        The generator of the bootstrap that gives the error.
    detected
        The fraction of foreign points to catch: 0.95 gives the usual FPR95.
    resamples
        Bootstrap resamples.

    Raises
    ------
    OptionError
        If ``detected`` is not between 0 and 1.
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    import numpy as np

    if not 0 < detected <= 1:
        raise OptionError(f"detected is a fraction above 0 and at most 1; got {detected}.")
    low, high = _ranks(inside, outside)

    def rate(a: np.ndarray, b: np.ndarray) -> float:
        threshold = np.sort(b)[len(b) - int(np.ceil(detected * len(b)))]
        return float((a >= threshold).mean())

    def resampled() -> float:
        return rate(*(s[picks(len(s), (len(s),), rng).cpu().numpy()] for s in (low, high)))

    return Estimate(rate(low, high), bootstrap_stderr(resampled, resamples))


def average_precision(
    inside: Any, outside: Any, *, positive: Literal["inside", "outside"], rng: Generator, resamples: int = 200
) -> Estimate:
    """Area under precision against recall (AUPR) for one of the two kinds: chance is that kind's share of the points.

    Unlike `auroc` it depends on which kind is sought and on the numbers of points, so that the kind must be named. It
    is the sum over thresholds of precision times the recall gained there, without interpolation.

    Parameters
    ----------
    inside, outside
        Energies ``(n,)`` and ``(m,)``; infinite ones rank last.
    positive
        The kind sought: ``"outside"`` by high energies, ``"inside"`` by low ones.
    rng
        The generator of the bootstrap that gives the error, both sets resampled.
    resamples
        Bootstrap resamples.

    Raises
    ------
    OptionError
        If ``positive`` names neither set.
    ShapeError, InputError
        If a set is empty or holds NaN.
    """
    from sklearn.metrics import average_precision_score

    if positive not in ("inside", "outside"):
        raise unknown_name("positive class", str(positive), ("inside", "outside"))
    low, high = _ranks(inside, outside)

    def area(a: np.ndarray, b: np.ndarray) -> float:
        import numpy as np

        sought, other = (b, a) if positive == "outside" else (-a, -b)
        truth = np.repeat([1, 0], [len(sought), len(other)])
        return float(average_precision_score(truth, np.concatenate([sought, other])))

    def resampled() -> float:
        return area(*(s[picks(len(s), (len(s),), rng).cpu().numpy()] for s in (low, high)))

    return Estimate(area(low, high), bootstrap_stderr(resampled, resamples))


def _ranks(inside: Any, outside: Any) -> tuple[np.ndarray, np.ndarray]:
    """Replace energies by their joint ranks, which keeps every order statistic and gives infinity a place."""
    from scipy.stats import rankdata

    sets = [torch.as_tensor(s).detach().to("cpu", torch.float64) for s in (inside, outside)]
    for name, values in zip(("inside", "outside"), sets):
        if values.ndim != 1 or len(values) == 0:
            raise ShapeError(f"{name} holds one energy per point, (n,), n at least 1; got {tuple(values.shape)}.")
        if bad := int(values.isnan().sum()):
            raise InputError(f"{bad} of {len(values)} energies in {name} are NaN and cannot be ranked; find out why.")
    ranks = rankdata(torch.cat(sets).numpy())
    return ranks[: len(sets[0])], ranks[len(sets[0]) :]
