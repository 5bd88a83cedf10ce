"""The couplings of a deep Boltzmann machine, as the one map that a machine of two layers asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCouplings:
    """Couplings between neighbours in a row of layers, as one map between every second layer and those in between.

    Layers stand side by side in one row of numbers: the first, third, ... on the near side, the second, fourth, ... on
    the far side. Products are taken block by block, so that blocks without couplings cost nothing.

    Attributes
    ----------
    weights
        :math:`W_i`, ``(size of layer i, size of layer i + 1)``.
    flipped
        Whether the far side is where the map starts.
    """

    weights: tuple[Tensor, ...]
    flipped: bool = False

    def forth(self, s: Tensor) -> Tensor:
        """Fields on the other side, from rows of statistics ``(..., size of this side)``."""
        return _across(self.weights, s, int(self.flipped))

    def back(self, t: Tensor) -> Tensor:
        """Fields on this side, from rows of statistics ``(..., size of the other side)``."""
        return _across(self.weights, t, 1 - int(self.flipped))

    def double(self) -> LayerCouplings:
        """The same in float64."""
        return replace(self, weights=tuple(w.double() for w in self.weights))


def _across(weights: Sequence[Tensor], rows: Tensor, first: int) -> Tensor:
    """Fields on layers ``1 - first``, ``3 - first``, ... from the layers ``first``, ``first + 2``, ..."""
    sizes = [w.shape[0] for w in weights] + [weights[-1].shape[1]]
    here = dict(zip(range(first, len(sizes), 2), rows.split(sizes[first::2], -1)))
    fields = []
    for i in range(1 - first, len(sizes), 2):
        below, above = here.get(i - 1), here.get(i + 1)
        field = None if below is None else below @ weights[i - 1]
        if above is not None:
            back = above @ weights[i].T
            field = back if field is None else field + back
        fields.append(field)
    return fields[0] if len(fields) == 1 else torch.cat(fields, -1)
