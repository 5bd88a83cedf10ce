r"""Weights of sequences: relatives that are much alike count together as one.

With :math:`m_i` the number of sequences, itself included, that have the same letter as sequence i at a share of at
least :math:`\theta` of the columns (gaps are letters), sequence i has the weight :math:`1 / m_i`, and the weights add
to the *effective number of sequences*.

`Direct-coupling analysis of residue coevolution captures native contacts across many protein families (Morcos et al.,
2011) <https://doi.org/10.1073/pnas.1111471108>`_.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.errors import OptionError

CELLS = 1 << 24
"""Pairs of sequences that are compared at once: 64 MB."""


def identity_weights(codes: Tensor, letters: int, identity: float = 0.8) -> Tensor:
    """Weigh sequences by how many others are much like them.

    Parameters
    ----------
    codes
        ``(N, L)``, whole numbers below ``letters``.
    letters
        How many letters there are, the gap included.
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
    hot = torch.nn.functional.one_hot(distinct, letters).flatten(1).float()
    n, length = distinct.shape
    # Counts of equal columns are exact in float32; the share of them need not be.
    least = identity * length - 1e-6 * length
    alike = torch.zeros(n)
    number = copies.float()
    rows = max(1, CELLS // n)
    for first in range(0, n, rows):
        # Each pair of different blocks is compared once, and counts for both.
        own = slice(first, min(first + rows, n))
        close = ((hot[own] @ hot[first:].T) >= least).float()
        alike[own] += close @ number[first:]
        alike[own.stop :] += number[own] @ close[:, own.stop - first :]
    return 1.0 / alike[place]
