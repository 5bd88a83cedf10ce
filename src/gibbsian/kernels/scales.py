r"""Settings that vary over coordinates or chains: the scale of a target, and step sizes.

A scale is a linear map L under which the target is round: standard deviations of the coordinates, or the lower
triangular factor of a covariance, :math:`L L^T = \Sigma`. A kernel then moves in the coordinates
:math:`y = L^{-1} x`, whose gradient is :math:`L^T \nabla E`, and noise and momenta are standard normal there. It is the
same as a mass matrix :math:`M = (L L^T)^{-1}`, and needs neither an inverse nor a determinant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import per_chain
from gibbsian.typing import Scalar


def stretch(scale: Tensor | None, z: Tensor) -> Tensor:
    """Take a displacement from round coordinates to those of the target: L z for each row of ``(n, *event)``."""
    if scale is None:
        return z
    return z @ scale.mT if is_dense(scale, z) else z * scale


def stretch_gradient(scale: Tensor | None, grad: Tensor) -> Tensor:
    """Take a gradient to round coordinates: the transpose of L times each row of ``(n, *event)``."""
    if scale is None:
        return grad
    return grad @ scale if is_dense(scale, grad) else grad * scale


def is_dense(scale: Tensor, x: Tensor) -> bool:
    """Whether a scale is a triangular factor ``(d, d)`` for vectors ``(n, d)``, not a standard deviation each."""
    return scale.ndim == 2 and x.ndim == 2


def over_chains(value: Scalar, x: Tensor) -> Scalar:
    """Give a setting with one value for each chain, ``(n,)``, the axes of ``(n, *event)``; leave a number as it is."""
    return per_chain(value, x) if isinstance(value, Tensor) and value.ndim == 1 else value


def check_scale(scale: Tensor | None, x: Tensor | None = None) -> None:
    """Refuse a scale that is none.

    Parameters
    ----------
    scale
        The setting of a kernel.
    x
        Positions ``(n, *event)`` that it must fit, when there are any.

    Raises
    ------
    OptionError
        If an entry that must be positive is not, or the factor is not triangular.
    ShapeError
        If it does not fit the positions.
    """
    if scale is None:
        return
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        raise OptionError(
            f"scale is a tensor of standard deviations, or a lower triangular factor (d, d); got {scale!r}."
        )
    if x is not None:
        event = tuple(x.shape[1:])
        dense = (event[0], event[0]) if len(event) == 1 else None
        if tuple(scale.shape) not in (event, dense):
            also = f", or a factor {dense}" if dense else ""
            raise ShapeError(f"A scale for points of shape {event} has that shape{also}; got {tuple(scale.shape)}.")
        return
    if scale.device.type != "cpu":
        return  # Looking at numbers on a device would wait for it.
    square = scale.ndim == 2 and scale.shape[0] == scale.shape[1]
    factor = square and bool((scale.triu(1) == 0).all())
    if not bool(torch.isfinite(scale).all()) or not bool(((scale.diagonal() if factor else scale) > 0).all()):
        raise OptionError(
            f"scale holds positive finite standard deviations, or is a lower triangular factor with a positive "
            f"diagonal (torch.linalg.cholesky of a covariance); got {settings_of(scale)}."
        )


def settings_of(scale: Tensor) -> str:
    """Describe a scale in a message."""
    return f"shape {tuple(scale.shape)}, smallest {float(scale.min()):.4g}, largest {float(scale.max()):.4g}"
