r"""The entropy of a cloud of points, from the distances to near neighbours.

If the k-th nearest of m points of the density q lies at the distance r from x, the ball of that radius holds the mass
:math:`q(x) V_d r^d`, whose logarithm is :math:`\psi(k) - \psi(m + 1)` on average. The mean over points x of the same
density is the estimate

.. math:: \hat H = d\, \overline{\log r_k(x)} + \log V_d + \psi(m + 1) - \psi(k), \qquad
          V_d = \frac{\pi^{d/2}}{\Gamma(d/2 + 1)},

in nats, with d the number of coordinates. It is biased by what q changes over a distance r, which in high dimension is
much: its gradient still pushes points off their neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import row_sum


def nearest_neighbour_entropy(x: Tensor, reference: Tensor, k: int = 1, same: Tensor | None = None) -> Tensor:
    """Entropy of the density that ``x`` and ``reference`` are draws of, a 0-d tensor, in nats.

    `Estimating mutual information (Kraskov, Stögbauer & Grassberger, 2004)
    <https://doi.org/10.1103/PhysRevE.69.066138>`_ derives this form for every k; k = 1 is Kozachenko and Leonenko's
    of 1987. Differentiable in ``x``, and in ``reference`` where that asks for it. With the reference held fixed, the
    gradient in a row of x estimates minus the score of q there (over n), rightly where the density hardly bends over a
    distance r, and too weakly for the outermost points, whose neighbours all lie to one side.

    Parameters
    ----------
    x
        Points, ``(n, *event)``, all different from those they are compared with.
    reference
        Points among which neighbours are sought, ``(m, *event)``.
    k
        Which neighbour: few for little bias, many for little variance.
    same
        ``(n, m)`` of bools, at most one true in a row: a reference that is the point itself, or the chain's own past,
        and no neighbour.

    Raises
    ------
    OptionError
        If there are no k neighbours.
    ShapeError
        If the two are not of one shape.
    """
    if x.shape[1:] != reference.shape[1:]:
        raise ShapeError(
            f"Points of shape {tuple(x.shape[1:])} have no distance to points of shape {tuple(reference.shape[1:])}."
        )
    others = len(reference) - (same is not None)
    if not 1 <= k <= others:
        raise OptionError(
            f"The {k}. nearest neighbour was asked for among {others} points; take k between 1 and that, "
            "or more chains."
        )
    with torch.no_grad():
        # Only to choose: the distance itself comes from differences, exact for close points and lean to differentiate.
        distance = torch.cdist(x.flatten(1), reference.flatten(1))
        count = torch.full((len(x),), len(reference), device=x.device)
        if same is not None:
            distance, count = distance.masked_fill(same, torch.inf), count - same.sum(1)
        nearest = distance.topk(k, dim=1, largest=False).indices[:, -1]
    d = x[0].numel()
    log_radius = 0.5 * row_sum((x - reference[nearest]).square()).log()
    log_unit_ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1.0)
    mass = torch.digamma(count.to(x.dtype) + 1.0) - torch.digamma(torch.as_tensor(float(k), dtype=x.dtype))
    return d * log_radius.mean() + log_unit_ball + mass.mean()
