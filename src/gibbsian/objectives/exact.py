r"""Exact maximum likelihood, for models small enough that Z can be computed: the yardstick of all other objectives.

.. math:: \mathbb{E}_{data}[E_\theta(x)] + \log Z_\theta, \qquad
          Z_\theta = \sum_{x} e^{-E_\theta(x)} \quad \text{or} \quad \int e^{-E_\theta(x)} \, dx,

the sum over all states of bits and categories, the integral over a box of one or two dimensions by the trapezoidal
rule. Both are differentiated as they stand, so that the gradient is exact to rounding and to the grid. A conditional
energy has one Z for every value of its condition.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import Torus, kind_of
from gibbsian.energies.grids import edge_share, log_trapezoid, states
from gibbsian.errors import DataError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of

MOST = 1 << 22
"""Points at which an energy is evaluated at once, all conditions together."""


class ExactLikelihood(Objective):
    r"""The mean negative log-likelihood, with log Z by enumeration or quadrature.

    `On the mathematical foundations of theoretical statistics (Fisher, 1922)
    <https://doi.org/10.1098/rsta.1922.0009>`_. Boolean and one-hot states are enumerated. Real points ``(n, 1)`` and
    ``(n, 2)`` are integrated over a box; on an interval or a torus it is the domain itself.

    Metrics are ``log_z`` (mean over the batch's conditions), ``nll`` (nats per row), ``energy_data``, and, of a box,
    ``quadrature_error`` (change of log Z when every other point is left out) and ``edge_mass``, the model's mass in
    the outermost hundredth of a box in open space. A mass that is not small there is cut off from Z: training stops
    with a named cause where it stays above its limit.

    Parameters
    ----------
    low, high
        The box: numbers, or tensors of one number per coordinate. Left out, it is the range of the batch at hand,
        widened by ``margin``.
    margin
        Part of the batch's range by which the box reaches beyond it, on every side.
    points
        Intervals per axis, even.

    Raises
    ------
    OptionError
        If an option is out of its range, or only one of ``low`` and ``high`` is given.
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        margin: float = 1.0,
        points: int = 200,
    ) -> None:
        super().__init__()
        if (low is None) != (high is None):
            raise OptionError(f"A box has two corners; got low={low} and high={high}. Give both, or neither.")
        if not 0.0 < margin < math.inf:
            raise OptionError(f"margin is a positive part of the data's range; got {margin}.")
        if points < 4 or points % 2:
            raise OptionError(f"points counts the intervals per axis, an even number of 4 or more; got {points}.")
        ends = [None if v is None else torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in (low, high)]
        if ends[0] is not None and not bool((ends[0] < cast(Tensor, ends[1])).all()):
            raise OptionError(f"The box needs low < high in every coordinate; got low={low}, high={high}.")
        self.register_buffer("low", ends[0])
        self.register_buffer("high", ends[1])
        self.margin, self.points = margin, points

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Mean energy of the rows plus the mean of log Z over their conditions; nothing is random.

        Raises
        ------
        ShapeError
            If real points have more than two coordinates.
        DomainError
            If the energy lives on a sphere.
        DataError
            If the box is to be taken from one row.
        OptionError
            If there are too many states, or too many different conditions.
        """
        context = context_of(energy, batch)
        which, distinct = _distinct(context, len(batch))
        points, shape, cell = self._points(energy, batch.x)
        count = next((len(v) for v in distinct.values()), 1)
        if count * len(points) > MOST:
            raise OptionError(
                f"The batch has {count} different conditions of {len(points)} points each, more than {MOST} in all; "
                "use fewer classes, a smaller batch or fewer points. Continuous conditions need another objective."
            )
        spread = {name: value.repeat_interleave(len(points), 0) for name, value in distinct.items()}
        log_p = -energy(points.repeat(count, *[1] * (points.ndim - 1)), **spread).reshape(count, *shape)
        each = torch.stack([log_trapezoid(p) if cell else torch.logsumexp(p, 0) for p in log_p])
        log_z = each + cell[0] if cell else each
        metrics = {}
        if cell:
            metrics = self._judge(log_p.detach(), log_z.detach(), cell[0], kind_of(energy.support))
        mean_energy = energy(batch.x, **context).mean()
        mean_log_z = log_z.mean() if which is None else log_z[which].mean()
        value = mean_energy + mean_log_z
        metrics |= {"log_z": mean_log_z.detach(), "nll": value.detach(), "energy_data": mean_energy.detach()}
        return Loss(value, metrics)

    def extra_repr(self) -> str:
        """The settings."""
        box = "" if self.low is None else f"low={self.low.tolist()}, high={cast(Tensor, self.high).tolist()}, "
        return f"{box}margin={self.margin}, points={self.points}"

    def _points(self, energy: Energy, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[Tensor, ...]]:
        """All points ``(m, *event)``, how they lie in a grid, and the log-volume of a cell, of a box alone."""
        if energy.support.is_discrete:
            listed = states(x.shape[1:], energy.support, x)
            return listed, (len(listed),), ()
        if tuple(x.shape[1:]) not in {(1,), (2,)}:
            raise ShapeError(
                f"Exact likelihood is for real points of shape (1,) or (2,), or states that can be listed; these have "
                f"shape {tuple(x.shape[1:])}. Use score matching, noise contrastive estimation or chains."
            )
        low, high = (end.to(x).expand(x.shape[1]) for end in self._box(energy, x))
        # By fractions of the box, as linspace between tensors would wait for the device.
        parts = torch.linspace(0.0, 1.0, self.points + 1, dtype=x.dtype, device=x.device)
        axes = (low + parts.unsqueeze(1) * (high - low)).unbind(1)
        grid = torch.cartesian_prod(*axes).reshape(-1, x.shape[1])
        cell = ((high - low) / self.points).log().sum()
        return grid, (self.points + 1,) * x.shape[1], (cell,)

    def _box(self, energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
        support: Any = energy.support
        kind = kind_of(support)
        if kind not in ("real", "box", "torus"):
            raise DomainError(f"Exact likelihood has no grid over {support}; it knows reals, boxes and tori.")
        if self.low is not None:
            return self.low, cast(Tensor, self.high)
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if isinstance(support, Torus):
            return x.new_tensor(support.low), x.new_tensor(support.low + support.period)
        if kind == "box":
            ends = (torch.as_tensor(end, dtype=x.dtype) for end in (support.lower_bound, support.upper_bound))
            return cast(tuple[Tensor, Tensor], tuple(ends))
        if len(x) < 2:
            raise DataError("A box cannot be taken from a batch of one row; give low and high.")
        low, high = x.detach().amin(0), x.detach().amax(0)
        reach = self.margin * (high - low)
        return low - reach, high + reach

    def _judge(self, log_p: Tensor, log_z: Tensor, cell: Tensor, kind: str) -> dict[str, Tensor]:
        """How far the grid is to be trusted: the worst over conditions."""
        d = log_p.ndim - 1
        coarse = log_p[(slice(None), *[slice(None, None, 2)] * d)]
        half = torch.stack([log_trapezoid(p) for p in coarse]) + cell
        found = {"quadrature_error": (half + d * math.log(2.0) - log_z).abs().max()}
        if kind == "real":
            found["edge_mass"] = torch.stack(
                [edge_share(p.flatten().log_softmax(0).view(p.shape)) for p in log_p]
            ).max()
        return found


def _distinct(context: dict[str, Tensor], n: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The different values of the conditions, one row each, and which of them every row of the batch has."""
    if not context:
        return None, {}
    joint = torch.cat([value.reshape(n, -1).double() for value in context.values()], 1)
    kinds, which = torch.unique(joint, dim=0, return_inverse=True)
    first = torch.empty(len(kinds), dtype=torch.int64, device=joint.device)
    first[which] = torch.arange(n, device=joint.device)
    return which, {name: value[first] for name, value in context.items()}
