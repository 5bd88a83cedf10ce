r"""Whether draws are as various as data: what a generator that has collapsed onto few points loses.

From as many draws y as rows x, and the distance :math:`r_k` of a point from its k-th nearest neighbour in its own set:

* **Coverage**: the share of rows within whose :math:`r_k` a draw lies. Of draws of the data's law it is
  :math:`1 - \prod_{i=0}^{k-1} \frac{n - 1 - i}{2n - 1 - i} \approx 1 - 2^{-k}`; of draws that sit on one of eight modes
  an eighth of that.
* **Entropy gap**: :math:`\overline{\log r_k(y)} - \overline{\log r_k(x)}`, which is the difference of the
  nearest-neighbour entropies over the number of coordinates, in nats: 0 for draws of the data's law, and very negative
  for draws that lie on top of each other.

Either alone has other causes: draws far from the data cover none, and smooth data may be drawn a little too narrowly.
Both together are mode collapse.
"""

from __future__ import annotations

import torch
from torch import Tensor

COMPARED = 256
"""Rows that are looked at, of a batch: all distances between them are taken."""

NEIGHBOURS = 5
"""k: draws of the data's law then cover 0.97 of the rows."""


@torch.no_grad()
def diversity(draws: Tensor, data: Tensor, k: int = NEIGHBOURS) -> dict[str, Tensor]:
    """Coverage and entropy gap, as 0-d metrics of those names; none where there are no k neighbours.

    `Reliable fidelity and diversity metrics for generative models (Naeem et al., 2020)
    <https://arxiv.org/abs/2002.09797>`_ has the first; the second is the difference of two estimates by
    `gibbsian.objectives.entropy.nearest_neighbour_entropy`.

    Parameters
    ----------
    draws, data
        ``(n, *event)`` each; of the longer one the first rows are used.
    k
        Which neighbour.
    """
    n = min(len(draws), len(data))
    if n <= k:
        return {}
    y, x = (points[:n].detach().flatten(1) for points in (draws, data))
    # The nearest of all is the point itself.
    own = [torch.cdist(points, points).topk(k + 1, largest=False).values[:, -1] for points in (y, x)]
    covered = (torch.cdist(x, y) <= own[1].unsqueeze(1)).any(1)
    return {"coverage": covered.to(x.dtype).mean(), "entropy_gap": own[0].log().mean() - own[1].log().mean()}
