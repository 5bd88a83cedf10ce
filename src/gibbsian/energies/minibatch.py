r"""Energies that are sums over data: posteriors, estimated from a few rows at a time.

The posterior of parameters :math:`\theta` given rows :math:`d_1, \dots, d_N` has the energy

.. math:: E(\theta) = E_0(\theta) + \sum_{i=1}^N u(\theta, d_i), \qquad
   \hat E_I(\theta) = E_0(\theta) + \frac{N}{|I|} \sum_{i \in I} u(\theta, d_i),

with :math:`E_0 = -\log p(\theta)` the prior's and :math:`u = -\log p(d \mid \theta)`. Over random sets of rows I the
estimate is right on average, and so is its gradient. Its variance grows with that of the rows; near a centre
:math:`\theta^*` most of it goes away with control variates, which leave to chance only how far each row's term departs
from its tangent there:

.. math:: \hat E_I(\theta) = E_0(\theta) + S + g \cdot \delta + \frac{N}{|I|} \sum_{i \in I}
   \big[u(\theta, d_i) - u(\theta^*, d_i) - \nabla u(\theta^*, d_i) \cdot \delta\big],

with :math:`\delta = \theta - \theta^*`, and S and g value and gradient at the centre of the sum over all rows. Its
gradient is

.. math:: \nabla E_0(\theta) + g + \frac{N}{|I|} \sum_{i \in I}
   \big[\nabla u(\theta, d_i) - \nabla u(\theta^*, d_i)\big].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.checkpoint import checkpoint

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, DataError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.typing import EnergyFn


class MinibatchEnergy(Energy):
    """A prior's energy plus a term for every row of data.

    Called, it is the full energy, for any kernel; ``on(index)`` is its estimate from some rows, for `SGLD` and others.

    `Bayesian learning via stochastic gradient Langevin dynamics (Welling & Teh, 2011)
    <https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf>`_; `Control variates for stochastic gradient
    MCMC (Baker, Fearnhead, Fox & Nemeth, 2019) <https://arxiv.org/abs/1706.05439>`_.

    Parameters
    ----------
    term
        From parameters ``(n, *event)`` and rows ``(m, ...)`` to energies ``(n, m)``, in nats: one for each chain and
        row. With several tensors of data it is called as ``term(theta, a, b)``.
    data
        A tensor whose first axis counts the rows, or several with the same number of rows (inputs and labels).
    prior
        The prior's energy, ``(n, *event) -> (n,)``; flat when ``None``.
    chunk
        Rows at a time in the full energy, so that its memory does not grow with the data. With more than one chunk the
        backward pass computes each again, which `torch.func` does not support; compiled code keeps all of them.
    event_shape
        The shape of one theta; the prior's or the centre's when ``None``.
    centre
        Where control variates are taken, of the event's shape; see `around`.

    Raises
    ------
    ArgumentTypeError, OptionError, ShapeError, DataError, DomainError
        If an argument does not fit; the message says what does.
    """

    centre: Tensor | None
    value: Tensor | None
    slope: Tensor | None

    def __init__(
        self,
        term: Callable[..., Tensor],
        data: Tensor | Sequence[Tensor],
        prior: Energy | Callable[[Tensor], Tensor] | None = None,
        *,
        chunk: int = 4096,
        event_shape: Sequence[int] | None = None,
        centre: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not callable(term):
            raise ArgumentTypeError(f"term is a function from (n, *event) and (m, ...) to (n, m); got {term!r}.")
        if chunk < 1:
            raise OptionError(f"chunk counts rows, 1 or more; got {chunk}.")
        parts = (data,) if isinstance(data, Tensor) else tuple(data)
        self.rows = _count_rows(parts)
        self.term, self.chunk, self._parts = term, chunk, len(parts)
        for i, part in enumerate(parts):
            self.register_buffer(f"data_{i}", part.detach(), persistent=False)
        self.prior = None if prior is None else Energy.of(prior)
        told = next((s for s in (event_shape, getattr(self.prior, "event_shape", None)) if s is not None), None)
        if told is None and centre is not None:
            told = centre.shape
        self.event_shape = None if told is None else torch.Size(told)
        self.support = constraints.real if self.prior is None else self.prior.support
        self._take_centre(centre)

    @property
    def data(self) -> tuple[Tensor, ...]:
        """The tensors of data."""
        return tuple(getattr(self, f"data_{i}") for i in range(self._parts))

    def forward(self, x: Tensor) -> Tensor:
        """Full energy: the prior's, and the terms of all rows, a chunk at a time."""
        total = self._prior(x)
        # The backward pass would keep every chunk's intermediate results; computed again, they take turns.
        again = self.rows > self.chunk and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        for rows in self._chunks():
            if again:
                part = checkpoint(self._sum, x, *rows, use_reentrant=False, preserve_rng_state=False)
                assert isinstance(part, Tensor)
            else:
                part = self._sum(x, *rows)
            total = total + part
        return total

    def on(self, index: Tensor) -> EnergyFn:
        """Estimate the energy from some rows; unbiased over equally likely sets of them.

        Parameters
        ----------
        index
            Rows, ``(m,)`` integers from 0 to ``rows - 1``, none twice; the same for all chains.

        Returns
        -------
        EnergyFn
            From ``(n, *event)`` to ``(n,)``.

        Raises
        ------
        ArgumentTypeError
            If ``index`` does not hold integers.
        ShapeError
            If it is not one row of them, is empty, or has more of them than there are rows.
        """
        self._check_index(index)
        rows = tuple(part[index] for part in self.data)
        weight = self.rows / index.shape[0]
        if self.centre is None or self.value is None or self.slope is None:
            return lambda x: self._prior(x) + weight * self._sum(x, *rows)
        centre, (slope, value) = self.centre, self._at(self.centre, rows)
        value, slope = self.value - weight * value, self.slope - weight * slope

        def estimate(x: Tensor) -> Tensor:
            tangent = value + (slope * (x - centre)).sum(tuple(range(1, x.ndim)))
            return self._prior(x) + tangent + weight * self._sum(x, *rows)

        return estimate

    def around(self, centre: Tensor) -> MinibatchEnergy:
        """Copy with control variates at a centre, best near the mode (see `find_mode`); one pass over the data.

        Each estimate then computes its rows at the centre too, which costs as much as one more chain. Far from the
        centre the tangents are no guide, and estimates may become noisier than without.

        Parameters
        ----------
        centre
            Of the event's shape.

        Raises
        ------
        ShapeError, DomainError
            If it has another shape, or the terms or their gradients are not finite there.
        """
        return MinibatchEnergy(
            self.term, self.data, self.prior, chunk=self.chunk, event_shape=self.event_shape, centre=centre
        )

    def extra_repr(self) -> str:
        """Rows, and whether there are control variates."""
        return f"{self.rows} rows" + ("" if self.centre is None else ", control variates")

    def _prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0]) if self.prior is None else self.prior(x)

    def _chunks(self) -> Iterator[tuple[Tensor, ...]]:
        for i in range(0, self.rows, self.chunk):
            yield tuple(part[i : i + self.chunk] for part in self.data)

    def _sum(self, x: Tensor, *rows: Tensor) -> Tensor:
        terms = self.term(x, *rows)
        n, m = x.shape[0], rows[0].shape[0]
        if tuple(terms.shape) != (n, m):
            raise ShapeError(
                f"term must give one energy for each of {n} chains and {m} rows, shape ({n}, {m}); it returned "
                f"{tuple(terms.shape)}. Broadcast theta[:, None] against rows[None] and sum over the axes behind."
            )
        return terms.sum(1)

    def _at(self, centre: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Gradient and value of the rows' sum at the centre."""

        def total(theta: Tensor) -> Tensor:
            return self._sum(theta[None], *rows).sum()

        if torch.compiler.is_compiling():
            # autograd.grad breaks the graph there; torch.func does not, but takes twice as long eagerly.
            grad, value = torch.func.grad_and_value(total)(centre)
            return grad, value
        with torch.enable_grad():
            at = centre.detach().requires_grad_(True)
            value = total(at)
            (grad,) = torch.autograd.grad(value, at)
        return grad, value.detach()

    def _take_centre(self, centre: Tensor | None) -> None:
        value = slope = None
        if centre is not None:
            expected = self.event_shape
            if not isinstance(centre, Tensor) or not centre.is_floating_point():
                raise ArgumentTypeError(f"A centre is a floating-point tensor of the event's shape; got {centre!r}.")
            if expected is not None and centre.shape != expected:
                raise ShapeError(
                    f"A centre is one point, of shape {tuple(expected)}; got {tuple(centre.shape)}. Of several chains "
                    "take the best or the mean."
                )
            centre = centre.detach().clone()
            each = [self._at(centre, rows) for rows in self._chunks()]
            slope, value = sum((s for s, _ in each[1:]), each[0][0]), sum((v for _, v in each[1:]), each[0][1])
            if not bool(torch.isfinite(value) & torch.isfinite(slope).all()):
                raise DomainError("The sum over the rows or its gradient is not finite at the centre; take another.")
        for name, tensor in (("centre", centre), ("value", value), ("slope", slope)):
            self.register_buffer(name, tensor, persistent=False)

    def _check_index(self, index: Tensor) -> None:
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
            found = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise ArgumentTypeError(f"index holds the numbers of rows, a tensor of int64 (m,); got {found}.")
        if index.ndim != 1 or not 1 <= index.shape[0] <= self.rows:
            raise ShapeError(
                f"A minibatch is a tensor (m,) of 1 to {self.rows} rows of the data; got shape {tuple(index.shape)}."
            )


def find_mode(energy: EnergyFn, start: Tensor, steps: int = 200) -> Tensor:
    """Walk downhill to a minimum of an energy, by L-BFGS with a line search: a centre for control variates.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``; a `MinibatchEnergy` is taken in full, in chunks.
    start
        One point, of the event's shape.
    steps
        At most; fewer where the gradient vanishes. Each takes one full gradient or a few.

    Returns
    -------
    Tensor
        Where it ended, of the event's shape.

    Raises
    ------
    OptionError
        If there is no step to make.
    DivergenceError
        If the search comes to a point where the energy or its gradient is not finite.
    """
    if steps < 1:
        raise OptionError(f"steps is 1 or more; got {steps}.")
    x = start.detach().clone().requires_grad_(True)
    small = torch.finfo(x.dtype).eps
    search = torch.optim.LBFGS(
        [x], max_iter=steps, tolerance_grad=small**0.5, tolerance_change=small, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        value = energy(x[None]).sum()
        (x.grad,) = torch.autograd.grad(value, x)
        if not bool(torch.isfinite(value) & torch.isfinite(x.grad).all()):
            raise DivergenceError(
                f"The search for a mode came to an energy of {float(value.detach()):g}, or to a gradient that is not "
                "finite. Start it elsewhere, and check that the energy is bounded below."
            )
        return value.detach()

    with torch.enable_grad():
        search.step(closure)
    return x.detach()


def _count_rows(parts: tuple[Tensor, ...]) -> int:
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ArgumentTypeError("data is a tensor, or several, whose first axis counts the rows.")
    counts = [part.shape[0] if part.ndim else 0 for part in parts]
    if len(set(counts)) != 1 or counts[0] < 1:
        raise ShapeError(f"The tensors of data have the same number of rows, 1 or more; got {counts}.")
    bad = sum(int((~torch.isfinite(part)).sum()) for part in parts if part.is_floating_point())
    if bad:
        raise DataError(f"The data holds {bad} values that are not finite; leave those rows out or fill them in.")
    return counts[0]
