r"""The prioritised replay buffer of weighted points, whose weights follow the density that they were found with.

A point x that annealing from :math:`q_{old}` brought to :math:`p^2 / q_{old}` carries a weight w. Under a later density
q the weight of the same point towards :math:`p^2 / q` is

.. math:: w \cdot c, \qquad c = \frac{q_{old}(x)}{q(x)} ,

so that points drawn from the buffer in proportion to w, each counted with its *correction* c, give averages over the
present :math:`p^2 / q` up to one constant:

.. math:: E\Bigl[\tfrac1n \sum_{drawn} c\, f(x)\Bigr] = \frac{\sum_i w_i c_i f(x_i)}{\sum_i w_i} .

Afterwards what was looked at is brought up to date: w becomes w c, and :math:`q_{old}` becomes q. Points that the
density has learned thereby lose their priority.

`Flow annealed importance sampling bootstrap (Midgley et al., 2023) <https://arxiv.org/abs/2208.01893>`_, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from gibbsian.errors import DivergenceError, OptionError, ShapeError
from gibbsian.partition.population import systematic


class Drawn(NamedTuple):
    """Points taken out of a prioritised buffer.

    Attributes
    ----------
    index
        The slot of each, ``(n,)``; a heavy point may come more than once.
    x
        Points, ``(n, *event)``.
    log_q
        Log-density under which the weight of each stands, ``(n,)``, float64.
    """

    index: Tensor
    x: Tensor
    log_q: Tensor

    def corrections(self, log_q: Tensor) -> Tensor:
        """What each point counts under the present density: exp(log q_old - log q), ``(n,)``, float64."""
        return (self.log_q - log_q.double()).exp()


class PrioritisedBuffer(nn.Module):
    """The latest weighted points, drawn in proportion to their weights.

    Everything it holds is in its ``state_dict`` and follows ``.to()``. Slots are filled in turn, and an empty slot has
    the weight zero.

    Parameters
    ----------
    event_shape
        Shape of one point.
    size
        How many points are kept.
    dtype
        Of the points; weights are in float64.

    Raises
    ------
    OptionError
        If the size is not a positive whole number.
    """

    x: Tensor
    log_weights: Tensor
    log_q: Tensor
    cursor: Tensor

    def __init__(self, event_shape: Sequence[int], size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise OptionError(f"A prioritised buffer holds 1 point or more; got size={size!r}.")
        self.size = size
        self.register_buffer("x", torch.zeros((size, *event_shape), dtype=dtype))
        self.register_buffer("log_weights", torch.full((size,), -torch.inf, dtype=torch.float64))
        self.register_buffer("log_q", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, x: Tensor, log_weights: Tensor, log_q: Tensor) -> Tensor:
        """Put points into the next slots, over the oldest ones.

        Parameters
        ----------
        x
            Points, ``(n, *event)``, ``size`` at most.
        log_weights
            ``(n,)``. A point whose weight or density is not finite takes a slot and is never drawn.
        log_q
            Log-density under which the weights were found, ``(n,)``.

        Returns
        -------
        Tensor
            How many were not finite, 0-d.

        Raises
        ------
        ShapeError
            If the points do not fit, or are more than there are slots.
        """
        n = x.shape[0]
        if x.shape[1:] != self.x.shape[1:] or not n <= self.size or log_weights.shape != (n,) or log_q.shape != (n,):
            raise ShapeError(
                f"A buffer of {self.size} slots takes up to as many points of shape {tuple(self.x.shape[1:])}, each "
                f"with one weight and one log-density; got shapes {tuple(x.shape)}, {tuple(log_weights.shape)} and "
                f"{tuple(log_q.shape)}."
            )
        sound = torch.isfinite(log_weights) & torch.isfinite(log_q) & torch.isfinite(x).flatten(1).all(1)
        slots = (self.cursor + torch.arange(n, device=x.device)) % self.size
        self.x.index_copy_(0, slots, x.to(self.x.dtype))
        self.log_weights.index_copy_(0, slots, torch.where(sound, log_weights.double(), -torch.inf))
        self.log_q.index_copy_(0, slots, log_q.double())
        self.cursor.copy_((self.cursor + n) % self.size)
        return (~sound).sum()

    @torch.no_grad()
    def draw(self, n: int, rng: Generator) -> Drawn:
        """Draw ``n`` points in proportion to their weights, by systematic resampling.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the buffer's device.

        Raises
        ------
        DivergenceError
            If no point has a finite weight.
        """
        if not bool(torch.isfinite(self.log_weights).any()):
            raise DivergenceError(
                "No point of the prioritised buffer has a finite weight: nothing was added, or the energy is infinite "
                "or NaN wherever chains came. Start from a distribution that covers the energy's domain."
            )
        index = systematic(self.log_weights, rng, n)
        return Drawn(index, self.x[index], self.log_q[index])

    @torch.no_grad()
    def update(self, drawn: Drawn, log_q: Tensor) -> None:
        """Bring the weights of drawn points up to a new density: w becomes w q_old / q.

        Parameters
        ----------
        drawn
            What `draw` returned.
        log_q
            Log-density of each point now, ``(n,)``; where it is not finite, nothing changes.
        """
        # What stands in the slots, not what was drawn: another update may have come between.
        old, new = self.log_q[drawn.index], log_q.detach().double()
        new = torch.where(torch.isfinite(new), new, old)
        # A point that came twice gets the same numbers twice.
        self.log_weights.index_copy_(0, drawn.index, self.log_weights[drawn.index] + old - new)
        self.log_q.index_copy_(0, drawn.index, new)

    def extra_repr(self) -> str:
        """Size."""
        return f"size={self.size}"
