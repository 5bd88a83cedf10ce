"""All points of a small space: the states of bits and categories, and grids over boxes of one or two dimensions.

The trapezoidal rule on a uniform grid converges faster than any power of the spacing for a smooth density that
vanishes at the edges of its box, and for a periodic one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from gibbsian.energies.domains import kind_of
from gibbsian.errors import DomainError, OptionError


def count_states(shape: Sequence[int], support: Constraint) -> int:
    """Count the states of a boolean or one-hot event.

    Raises
    ------
    DomainError
        If the support is not of that kind.
    """
    kind = kind_of(support)
    if kind == "boolean":
        return 2 ** math.prod(shape)
    if kind == "one_hot":
        return shape[-1] ** math.prod(shape[:-1])
    raise DomainError(f"The states of {support} cannot be listed; boolean and one_hot states can.")


def states(shape: Sequence[int], support: Constraint, like: Tensor, most: int = 1 << 20) -> Tensor:
    """List the states of a boolean or one-hot event, ``(m, *shape)``, of the dtype and device of ``like``.

    Raises
    ------
    DomainError
        If the support is not of that kind.
    OptionError
        If there are more than ``most``.
    """
    m = count_states(shape, support)
    if m > most:
        raise OptionError(
            f"Points of shape {tuple(shape)} on {support} have {m:.3g} states, more than the {most} that are listed; "
            "use fewer sites, or an objective that needs no list, such as PersistentContrastiveDivergence."
        )
    return numbered(shape, support, torch.arange(m, device=like.device), like.dtype)


def numbered(shape: Sequence[int], support: Constraint, index: Tensor, dtype: torch.dtype) -> Tensor:
    """States of a boolean or one-hot event by their numbers ``(m,)``, ``(m, *shape)``; the last site changes fastest.

    Numbers are 64-bit integers: up to 2^62 states.

    Raises
    ------
    DomainError
        If the support is not of that kind.
    """
    count_states(shape, support)
    hot = kind_of(support) == "one_hot"
    sites, base = (math.prod(shape[:-1]), shape[-1]) if hot else (math.prod(shape), 2)
    place = base ** torch.arange(sites - 1, -1, -1, device=index.device)
    digits = index.unsqueeze(1) // place % base
    chosen = torch.nn.functional.one_hot(digits, base) if hot else digits
    return chosen.reshape(-1, *shape).to(dtype)


def log_trapezoid(log_p: Tensor) -> Tensor:
    """Log of the trapezoidal sum over all axes, in units of a cell, 0-d."""
    for axis in range(log_p.ndim):
        weight = torch.zeros(log_p.shape[axis], dtype=log_p.dtype, device=log_p.device)
        weight[0] = weight[-1] = -math.log(2.0)
        log_p = log_p + weight.reshape([-1 if i == axis else 1 for i in range(log_p.ndim)])
    return torch.logsumexp(log_p.flatten(), 0)


def edge_share(log_share: Tensor) -> Tensor:
    """Part of the mass in the outermost hundredth of the box, 0-d.

    Parameters
    ----------
    log_share
        Logarithm of each grid point's part of the mass, one axis per dimension.
    """
    inside = log_share
    for axis in range(log_share.ndim):
        rim = max(1, (log_share.shape[axis] - 1) // 100)
        inside = inside.narrow(axis, rim, log_share.shape[axis] - 2 * rim)
    return (1.0 - inside.exp().sum()).clamp(min=0.0)
