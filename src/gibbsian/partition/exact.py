"""log Z by quadrature, for points of one or two numbers.

The trapezoidal rule converges fast for a smooth density that vanishes at the edges of its box (see
`gibbsian.energies.grids`). The error is judged by leaving out every other point; a density that does not vanish
at the edge is refused, since what lies beyond the box would be missing without a trace.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.grids import edge_share, log_trapezoid
from gibbsian.errors import DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.partition.base import LogZ

CHUNK = 1 << 15
"""Grid points evaluated at once."""


class Grid(NamedTuple):
    """What quadrature found.

    Attributes
    ----------
    log_z
        ``value``, with the change from half the points as ``stderr`` and half-width of the bracket; ``ess`` is the
        effective number of grid points that carry the mass.
    axes
        The coordinates along each axis, ``(points + 1,)`` each.
    log_prob
        Log-density at the grid, ``(points + 1,)`` or ``(points + 1, points + 1)``, float64.
    """

    log_z: LogZ
    axes: tuple[Tensor, ...]
    log_prob: Tensor


@torch.no_grad()
def quadrature(
    energy: Energy,
    low: float | Tensor,
    high: float | Tensor,
    points: int = 400,
    *,
    dim: int | None = None,
    edge: float = 1e-6,
) -> Grid:
    """Integrate exp(-E) over a box by the trapezoidal rule.

    Parameters
    ----------
    energy
        Over points of shape ``(1,)`` or ``(2,)``.
    low, high
        The box: numbers, or one per coordinate.
    points
        Intervals per axis, even.
    dim
        1 or 2, when the energy does not tell its event shape.
    edge
        The largest part of the mass that may lie in the outermost hundredth of the box; 1 for a density that truly
        ends there.

    Raises
    ------
    ShapeError
        If the points have another shape.
    OptionError
        If ``points`` is odd or below 4, or the box is empty.
    DomainError
        If too much mass lies at the edge; the message says how much.
    DivergenceError
        If the energy is NaN or minus infinity at a grid point, or infinite at all.
    """
    energy = Energy.of(energy)
    shape = torch.Size((dim or 0,)) if energy.event_shape is None else energy.event_shape
    if tuple(shape) not in {(1,), (2,)}:
        raise ShapeError(
            f"Quadrature is for points of shape (1,) or (2,); this energy's are {tuple(shape)}. Pass dim=1 or dim=2 "
            "for an energy without an event shape; for more dimensions use ais or bracket."
        )
    if points < 4 or points % 2:
        raise OptionError(f"points counts the intervals per axis, an even number of 4 or more; got {points}.")
    axes = _axes(energy, low, high, points, shape[0])
    log_p = _evaluate(energy, axes)
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    value = log_trapezoid(log_p) + math.log(cell)
    every_other = log_p[(slice(None, None, 2),) * len(axes)]
    half = log_trapezoid(every_other) + math.log(cell * 2.0 ** len(axes))
    _check_edge(log_p - torch.logsumexp(log_p.flatten(), 0), axes, edge)
    error = (value - half).abs()
    share = (log_p - torch.logsumexp(log_p.flatten(), 0)).exp()
    result = LogZ(value, error, value - error, value + error, 1.0 / share.square().sum())
    return Grid(result, axes, log_p - value)


def _axes(energy: Energy, low: float | Tensor, high: float | Tensor, points: int, dim: int) -> tuple[Tensor, ...]:
    like = next((p for p in (*energy.parameters(), *energy.buffers()) if p.is_floating_point()), torch.empty(()))
    ends = [torch.as_tensor(v, dtype=torch.float64).expand(dim).tolist() for v in (low, high)]
    if any(not a < b for a, b in zip(*ends)):
        raise OptionError(f"The box needs low < high; got low={low}, high={high}.")
    return tuple(torch.linspace(a, b, points + 1, dtype=like.dtype, device=like.device) for a, b in zip(*ends))


def _evaluate(energy: Energy, axes: tuple[Tensor, ...]) -> Tensor:
    x = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    value = torch.cat([energy(part) for part in x.split(CHUNK)]).double()
    wrong = value.isnan() | (value == -torch.inf)
    if bool(wrong.any()) or not bool(torch.isfinite(value).any()):
        raise DivergenceError(
            f"The energy is NaN or minus infinity at {int(wrong.sum())} of {x.shape[0]} grid points and infinite at "
            f"{int((value == torch.inf).sum())}; look for a division or a logarithm of zero in it, or move the box."
        )
    return -value.reshape(tuple(a.numel() for a in axes))


def _check_edge(log_share: Tensor, axes: tuple[Tensor, ...], edge: float) -> None:
    outer = float(edge_share(log_share))
    if outer > edge:
        box = " x ".join(f"[{float(a[0]):.4g}, {float(a[-1]):.4g}]" for a in axes)
        raise DomainError(
            f"A part {outer:.2g} of the mass lies at the edge of the box {box}, so more lies outside it. Widen low and "
            f"high until less than {edge:.1g} does; pass edge=1 for a density that truly ends there."
        )
