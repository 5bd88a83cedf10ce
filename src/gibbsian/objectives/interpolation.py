r"""What matching objectives share: points between noise and data, and least squares of gradients there.

With noise :math:`x_0` from a tractable energy and a row :math:`x_1` of the data, the points between them are
:math:`x_t = (1 - t)\,x_0 + t\,x_1` for t uniform in [0, 1]. Least squares in :math:`\nabla E(x_t)` leaves, at every
point, the mean of the target over all lines that pass there.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DomainError
from gibbsian.kernels.base import per_chain, row_sum
from gibbsian.objectives.base import energy_and_gradient
from gibbsian.objectives.checks import check_device, check_draws, check_floating
from gibbsian.typing import Context


def check_matching(method: str, energy: Energy, noise: Tractable, x: Tensor) -> None:
    """Refuse what has no straight lines from noise to data.

    Parameters
    ----------
    method
        Its name, for messages.
    energy, noise, x
        The energy being fitted, where the noise comes from, and the data ``(n, *event)``.

    Raises
    ------
    DomainError
        If energy or noise do not live on the reals.
    ShapeError
        If the noise has another shape than the data.
    ArgumentTypeError
        If the data are not floating-point numbers.
    OptionError
        If noise and data are on different devices.
    """
    for what, support in (("energy", energy.support), ("noise", noise.support)):
        if kind_of(support) not in ("real", "box"):
            raise DomainError(
                f"{method} follows gradients along straight lines from noise to data, and the {what} lives on "
                f"{support}. Fit discrete states with EnergyDiscrepancy or PersistentContrastiveDivergence."
            )
    check_floating(method, x)
    check_draws("noise", noise, x)
    check_device("noise", noise, x)


def draw_noise(noise: Tractable, n: int, like: Tensor, rng: Generator) -> Tensor:
    """Draw ``n`` points of the noise in the data's precision."""
    return noise.sample(n, rng).to(like.dtype)


def between(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """Points :math:`(1 - t) x_0 + t x_1`, ``(n, *event)``, for times ``(n,)``."""
    part = per_chain(t, data)
    return (1.0 - part) * noise + part * data


def gradient_error(
    energy: Energy, x: Tensor, target: Tensor, context: Context, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Squared distance of a multiple of an energy's gradient from a target.

    Parameters
    ----------
    energy
        Called as ``energy(x, **context)``.
    x
        Points, ``(n, *event)``.
    target
        What the gradient is to be, like ``x``.
    context
        What each row is conditioned on.
    factor
        The gradient is multiplied by this.

    Returns
    -------
    tuple
        :math:`\|f \nabla E(x) - u\|^2`, summed over the event's axes and differentiable in the energy's parameters,
        and the energies, detached; ``(n,)`` each.

    Raises
    ------
    ShapeError
        If the energy does not return one number per row.
    """
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        value, grad = energy_and_gradient(energy, x.detach().requires_grad_(True), context, training)
    return row_sum((factor * grad - target).square()), value.detach()


def uniform_times(n: int, like: Tensor, rng: Generator) -> Tensor:
    """Draw ``n`` times, uniform in [0, 1)."""
    return torch.rand(n, generator=rng, dtype=like.dtype, device=like.device)
