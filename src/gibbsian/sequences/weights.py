r"""Weights of sequences: relatives that are much alike count together as one.

With :math:`m_i` the number of sequences, itself included, that have the same letter as sequence i at a share of at
least :math:`\theta` of the columns (gaps are letters), sequence i has the weight :math:`1 / m_i`, and the weights add
to the *effective number of sequences*.

`Direct-coupling analysis of residue coevolution captures native contacts across many protein families (Morcos et al.,
2011) <https://doi.org/10.1073/pnas.1111471108>`_.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gibbsian.errors import OptionError

ROWS, COLUMNS = 256, 4096
"""Sequences that are compared with sequences at once, in bytes: a megabyte, which stays in the cache."""


def identity_weights(codes: Tensor, identity: float = 0.8) -> Tensor:
    """Weigh sequences by how many others are much like them.

    Parameters
    ----------
    codes
        ``(N, L)``, whole numbers below 256.
    identity
        The share of equal columns from which on two sequences count as one; 1 weighs copies only.

    Returns
    -------
    Tensor
        ``(N,)``, above 0 and up to 1.

    Raises
    ------
    OptionError
        If the share is not above 0, up to 1.
    """
    if not 0.0 < identity <= 1.0:
        raise OptionError(f"identity is a share of the columns, above 0, up to 1; got {identity}.")
    distinct, place, copies = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    n, length = distinct.shape
    least = math.ceil(identity * length - 1e-6 * length)
    number, alike = copies.float(), torch.zeros(n)
    by_column = distinct.T.to(torch.uint8).contiguous()
    for first in range(0, n, ROWS):
        rows = slice(first, min(first + ROWS, n))
        for second in range(first, n, COLUMNS):
            others = slice(second, min(second + COLUMNS, n))
            close = (_equal_columns(by_column[:, rows], by_column[:, others]) >= least).float()
            # Each pair of different sequences is compared once, and counts for both.
            alike[rows] += close @ number[others]
            after = max(rows.stop, second)
            alike[after : others.stop] += number[rows] @ close[:, max(after - second, 0) :]
    return 1.0 / alike[place]


def _equal_columns(a: Tensor, b: Tensor) -> Tensor:
    """In how many columns sequences ``(L, n)`` equal others ``(L, m)``, ``(n, m)``."""
    count = torch.zeros((a.shape[1], b.shape[1]), dtype=torch.uint8 if len(a) < 256 else torch.int16)
    equal = torch.empty(count.shape, dtype=torch.bool)
    for x, y in zip(a, b):
        torch.eq(x[:, None], y, out=equal)
        count += equal
    return count
