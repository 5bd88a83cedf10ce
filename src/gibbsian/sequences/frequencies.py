r"""One- and two-point statistics of sequences, and how well those of two sets agree.

With weights w that add to one, :math:`f_i(a) = \sum_n w_n [x_{ni} = a]`, :math:`f_{ij}(a, b)` likewise for pairs, and
the *connected* two-point statistics :math:`c_{ij}(a, b) = f_{ij}(a, b) - f_i(a) f_j(b)`. A model that had learned only
the columns would have :math:`c = 0`: their correlation with the data's, over all pairs of columns and letters, tells
what was learned of couplings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.errors import ShapeError

CELLS = 1 << 20
"""Pairs of letters that are counted at once: 8 MB."""


class Statistics(NamedTuple):
    """One- and two-point statistics.

    Attributes
    ----------
    one
        ``(L, K)``, each row adding to one.
    two
        ``(L (L - 1) / 2, K, K)``, the pairs i < j in the order of `torch.triu_indices`.
    """

    one: Tensor
    two: Tensor

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The columns of each pair."""
        i, j = torch.triu_indices(len(self.one), len(self.one), 1, device=self.one.device)
        return i, j

    @property
    def connected(self) -> Tensor:
        """Two-point statistics less those of independent columns, shaped as ``two``."""
        i, j = self.pairs
        return self.two - self.one[i, :, None] * self.one[j, None, :]

    def smoothed(self, share: float) -> Statistics:
        """Mix with uniform letters: what was never seen then has a small share."""
        k = self.one.shape[1]
        return Statistics((1.0 - share) * self.one + share / k, (1.0 - share) * self.two + share / (k * k))


def statistics(codes: Tensor, letters: int, weights: Tensor | None = None) -> Statistics:
    """Count letters and pairs of letters.

    Parameters
    ----------
    codes
        ``(N, L)``.
    letters
        K.
    weights
        ``(N,)``; equal when left out.
    """
    (n, length), device = codes.shape, codes.device
    w = (
        torch.full((n,), 1.0 / n, dtype=torch.float64, device=device)
        if weights is None
        else weights.double() / weights.double().sum()
    )
    place = torch.arange(length, device=device) * letters
    one = torch.bincount((codes + place).flatten(), w.repeat_interleave(length), minlength=length * letters)
    i, j = torch.triu_indices(length, length, 1, device=device)
    cells = len(i) * letters * letters
    first = torch.arange(len(i), device=device) * letters * letters
    two = torch.zeros(cells, dtype=torch.float64, device=device)
    size = max(1, CELLS // max(len(i), 1))
    for start in range(0, n, size):
        rows, own = codes[start : start + size], w[start : start + size]
        joint = rows[:, i] * letters + rows[:, j] + first
        even = None if weights is None else own.repeat_interleave(len(i))
        counted = torch.bincount(joint.flatten(), even, minlength=cells)
        two += counted.double() / n if weights is None else counted
    return Statistics(one.view(length, letters).float(), two.view(-1, letters, letters).float())


class Agreement(NamedTuple):
    """How well two sets of sequences agree, each as a Pearson correlation over all columns and letters.

    Attributes
    ----------
    one, two, connected
        Of one-point, two-point and connected two-point statistics.
    slope
        Of connected statistics of the second set on those of the first: 1 where couplings are as strong.
    """

    one: float
    two: float
    connected: float
    slope: float


def agreement(family: Statistics, other: Statistics) -> Agreement:
    """Compare two sets of sequences.

    Raises
    ------
    ShapeError
        If they differ in columns or letters.
    """
    if family.one.shape != other.one.shape:
        raise ShapeError(
            f"Statistics of {tuple(family.one.shape)} columns and letters cannot be compared with those of "
            f"{tuple(other.one.shape)}."
        )
    c, d = family.connected.flatten().double(), other.connected.flatten().double()
    slope = float((c - c.mean()) @ (d - d.mean()) / (c - c.mean()).square().sum().clamp(min=1e-30))
    return Agreement(pearson(family.one, other.one), pearson(family.two, other.two), pearson(c, d), slope)


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two tensors of one shape; NaN where one does not vary."""
    x, y = (t.flatten().double() - t.double().mean() for t in (a, b))
    return float(x @ y / (x.norm() * y.norm()))
