r"""Direct-coupling analysis by mean field: couplings are minus the inverse of the covariance of letters.

Fast and rough: one inversion of a matrix of L (K - 1) rows, after mixing half a share of uniform letters into the
statistics. It is what pseudo-likelihood and Boltzmann learning are measured by.

`Direct-coupling analysis of residue coevolution captures native contacts across many protein families (Morcos et al.,
2011) <https://doi.org/10.1073/pnas.1111471108>`_.
"""

from __future__ import annotations

import torch

from gibbsian.energies.pairwise import Potts
from gibbsian.errors import OptionError
from gibbsian.sequences.frequencies import Statistics


def mean_field_potts(family: Statistics, pseudocount: float = 0.5) -> Potts:
    """Estimate a Potts model by mean field.

    Parameters
    ----------
    family
        One- and two-point statistics of the family.
    pseudocount
        The share of uniform letters that is mixed in, above 0.

    Returns
    -------
    Potts
        In the gauge in which the last letter has no couplings and no field; not trainable.

    Raises
    ------
    OptionError
        If the share is not between 0 and 1.
    """
    if not 0.0 < pseudocount < 1.0:
        raise OptionError(f"pseudocount is a share of uniform letters, between 0 and 1; got {pseudocount}.")
    mixed = family.smoothed(pseudocount)
    one = mixed.one.double()
    length, k = one.shape
    i, j = mixed.pairs
    joint = torch.zeros((length, length, k, k), dtype=torch.float64)
    joint[i, j] = mixed.two.double()
    joint[j, i] = mixed.two.double().mT
    # One column with itself has one letter: the mixed share of it, and none of two.
    own = torch.arange(length)
    joint[own, own] = torch.diag_embed(one)
    covariance = joint - one[:, None, :, None] * one[None, :, None, :]
    free = covariance[:, :, :-1, :-1].transpose(1, 2).reshape(length * (k - 1), length * (k - 1))
    couplings = torch.zeros((length, k, length, k), dtype=torch.float64)
    couplings[:, :-1, :, :-1] = -torch.linalg.inv(free).view(length, k - 1, length, k - 1)
    couplings[own, :, own, :] = 0.0
    couplings = 0.5 * (couplings + couplings.permute(2, 3, 0, 1))
    field = (one / one[:, -1:]).log() - torch.einsum("iajb,jb->ia", couplings, one)
    return Potts(couplings.float(), field=field.float())
