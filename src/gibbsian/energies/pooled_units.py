r"""Maps of bits of which at most one is on in each block: probabilistic max pooling.

In a block of :math:`p \times p` bits under fields :math:`f`,

.. math:: A(f) = \log\Bigl(1 + \sum_i e^{f_i}\Bigr), \qquad P(h_i = 1) = \frac{e^{f_i}}{1 + \sum_j e^{f_j}},

one categorical unit of :math:`p^2 + 1` states. The pooled unit of the block, on if any of its bits is, is on with
probability :math:`1 - e^{-A(f)}`. `Convolutional deep belief networks for scalable unsupervised learning of
hierarchical representations (Lee et al., 2009) <https://doi.org/10.1145/1553374.1553453>`_.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from gibbsian.energies.layered import Natural
from gibbsian.energies.units import Alike
from gibbsian.errors import DomainError, OptionError


class PooledSupport(Constraint):
    """Bits ``(*, K, H, W)`` of which at most one is on in each block."""

    is_discrete = True
    event_dim = 3

    def __init__(self, pool: int) -> None:
        self.pool = pool
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each row is such a state."""
        bits = ((value == 0) | (value == 1)).flatten(1).all(1)
        return bits & (blocks_of(value, self.pool).sum(-1) <= 1).flatten(1).all(1)

    def __repr__(self) -> str:
        return f"PooledSupport({self.pool})"


@dataclass(frozen=True, repr=False)
class PooledUnits(Alike):
    """Bits in maps ``(K, H, W)``, at most one of which is on in each block of ``pool`` by ``pool``.

    Hidden units of a `ConvolutionalRBM`.

    Parameters
    ----------
    shape
        ``(K, H, W)``; the pool divides H and W.
    pool
        Side of a block, 2 or more.

    Raises
    ------
    OptionError
        If the blocks do not fill the maps.
    """

    pool: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 2:
            raise OptionError(f"pool is the side of a block, 2 or more; got {self.pool!r}.")
        if len(self.sites) != 3 or self.sites[1] % self.pool or self.sites[2] % self.pool:
            raise OptionError(
                f"Blocks of {self.pool} x {self.pool} do not fill maps (K, H, W) of shape {tuple(self.sites)}: H and W "
                "are to be multiples of the pool. Change the filters' size, the padding or the pool."
            )

    @property
    def support(self) -> Constraint:
        """Bits, at most one in a block."""
        return PooledSupport(self.pool)

    @property
    def pooled_shape(self) -> torch.Size:
        """The shape of the maps of blocks."""
        k, h, w = self.sites
        return torch.Size((k, h // self.pool, w // self.pool))

    @property
    def count(self) -> int:
        """One more state than bits, for each block."""
        return (self.pool**2 + 1) ** self.pooled_shape.numel()

    def listed(self, index: Tensor) -> Tensor:
        """States by their number: digits in base p^2 + 1, one for each block."""
        base = self.pool**2 + 1
        power = base ** torch.arange(self.pooled_shape.numel(), device=index.device)
        digit = (index.unsqueeze(1) // power) % base
        # The last class is that of no bit.
        hot = torch.nn.functional.one_hot(digit, base)[..., :-1].double()
        return self._unblocked(hot.view(-1, *self.pooled_shape, base - 1))

    def log_partition(self, field: Tensor) -> Tensor:
        """Of each block, ``(..., blocks)``."""
        by_block = self._blocks(field)
        off = torch.zeros_like(by_block[..., :1])
        return torch.cat((by_block, off), -1).logsumexp(-1).flatten(-3)

    def mean(self, law: Natural) -> Tensor:
        """Probability of each bit."""
        return self._unblocked(self._probabilities(law)[..., :-1])

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """States, by the inverse distribution function of each block at the uniform number of its first bit."""
        below = self._probabilities(law).cumsum(-1)[..., :-1]
        one = self._blocks(u.reshape(*u.shape[:1], -1))[..., :1]
        index = (one >= below).sum(-1, keepdim=True)
        places = torch.arange(self.pool**2, device=u.device)
        return self._unblocked((places == index).to(u.dtype))

    def pooled(self, law: Natural) -> Tensor:
        """Probability that any bit of a block is on, ``(n, K, H / p, W / p)``."""
        return 1.0 - self._probabilities(law)[..., -1]

    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Logarithms of each bit's frequency over that of none in its block."""
        p = self._blocks(x.flatten(1)).mean(0)
        p = torch.cat((p, 1.0 - p.sum(-1, keepdim=True)), -1)
        log_p = ((1.0 - smoothing) * p + smoothing / (self.pool**2 + 1)).log()
        return self._unblocked((log_p[..., :-1] - log_p[..., -1:])[None]).flatten()

    def check(self, x: Tensor, what: str) -> None:
        """Refuse anything but bits, at most one in a block."""
        self.check_shape(x, what)
        outside = int((~cast(Tensor, self.support.check(x))).sum())
        if outside:
            raise DomainError(
                f"{self} have zeros and at most one 1 in each block of {self.pool} x {self.pool}; {outside} of "
                f"{x.shape[0]} rows of {what} do not."
            )

    def settings(self) -> str:
        """The pool."""
        return f", pool={self.pool}"

    def _blocks(self, flat: Tensor) -> Tensor:
        return blocks_of(flat.unflatten(-1, self.sites), self.pool)

    def _unblocked(self, blocks: Tensor) -> Tensor:
        k, h, w = self.pooled_shape
        each = blocks.view(-1, k, h, w, self.pool, self.pool).permute(0, 1, 2, 4, 3, 5)
        return each.reshape(-1, *self.sites)

    def _probabilities(self, law: Natural) -> Tensor:
        """Of each bit of a block and of none, ``(n, K, H / p, W / p, p^2 + 1)``."""
        by_block = self._blocks(law.linear)
        return torch.cat((by_block, torch.zeros_like(by_block[..., :1])), -1).softmax(-1)


def blocks_of(maps: Tensor, pool: int) -> Tensor:
    """Gather blocks of maps, ``(*, K, H, W) -> (*, K, H / p, W / p, p^2)``."""
    *rest, h, w = maps.shape
    each = maps.reshape(*rest, h // pool, pool, w // pool, pool)
    return each.transpose(-3, -2).reshape(*rest, h // pool, w // pool, pool * pool)
