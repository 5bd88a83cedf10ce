r"""The likelihood of a score: the density that its probability flow carries to a Gaussian.

The flow :math:`dx / d\sigma = -\sigma\, s(x, \sigma)` is a map that can be undone, from points at the lowest noise
level to points at the highest, where their density is known. Along it

.. math:: \log p_{\min}(x_{\min}) = \log p_{\max}(x_{\max}) - \int_{\sigma_{\min}}^{\sigma_{\max}} \sigma\,
          (\nabla \cdot s)(x_\sigma, \sigma)\, d\sigma .

It is integrated in :math:`\log \sigma` by the classical Runge-Kutta method of fourth order. For an exact score it is
the log-density of the data with noise of :math:`\sigma_{\min}` added; for any score it is exactly the density of the
points that its flow makes from noise. A learned energy has another answer, too, its own :math:`-E - \log Z`, and the
two differ by as much as the energy's levels fail to be each other's under the flow.

`Score-based generative modeling through stochastic differential equations (Song et al., 2021)
<https://arxiv.org/abs/2011.13456>`_; the divergence by random probes, `FFJORD (Grathwohl et al., 2019)
<https://arxiv.org/abs/1810.01367>`_.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.bridges.reverse import readable
from gibbsian.bridges.scores import EnergyScore
from gibbsian.energies.base import Energy, Given
from gibbsian.energies.score import GivenScore, Score
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.errors import DivergenceError, OptionError, ShapeError
from gibbsian.kernels.base import row_sum
from gibbsian.objectives.curvature import slopes_and_curvature

EXACT_DIM = 64
"""Numbers in a point up to which the divergence is computed exactly when nothing is said."""


class FlowLikelihood(NamedTuple):
    """What the probability flow says of rows.

    Attributes
    ----------
    log_prob
        Log-density of each row, nats, ``(n,)``.
    stderr
        Standard error of each from the random probes, ``(n,)``; 0 where the divergence is exact.
    change
        How much each changed when the steps were last doubled, ``(n,)``: a bound on what finer steps would still move,
        in practice, as the error falls by 16. NaN where they were not doubled.
    steps
        Steps of the last integration.
    end
        Where the flow carried the rows, ``(n, *event)``: draws of the prior, if the score is right.
    """

    log_prob: Tensor
    stderr: Tensor
    change: Tensor
    steps: int
    end: Tensor


@torch.no_grad()
def flow_log_prob(
    score: Score | Energy,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    prior: Tractable | None = None,
    steps: int = 64,
    tolerance: float | None = None,
    most_steps: int = 1024,
    probes: int | None = None,
    rng: Generator | None = None,
) -> FlowLikelihood:
    r"""Log-density of rows at the lowest noise level, by the probability flow.

    Parameters
    ----------
    score
        A `Score` or a noise-conditional energy without other open context. It is differentiated.
    x
        Points at ``sigma_min``, ``(n, *event)``: add noise of that size to clean data, or they count as a little less
        likely than they are.
    sigma_min, sigma_max
        The ends.
    prior
        The density at ``sigma_max``. When left out it is the model's own, ``base(sigma_max)``, of a noise-conditional
        energy or a denoiser, also with labels fixed; of anything else, which does not tell where its data are, a
        Gaussian around 0 with that standard deviation. That is off by the data's own mean and spread: per coordinate by
        about :math:`(\mu^2 + s^2) / 2 \sigma_{\max}^2` nats.
    steps
        Of the Runge-Kutta method, four scores each.
    tolerance
        Double the steps until no row's log-density changes by more than this, in nats.
    most_steps
        Where the doubling gives up.
    probes
        Random directions for the divergence, 2 or more, each followed along the whole flow. ``None`` is the exact
        divergence, with as many directions as a point has numbers, for points of up to 64 numbers.
    rng
        The generator of the probes; needed with them.

    Raises
    ------
    OptionError
        If an argument is out of its range, or points are too large for the exact divergence and no probes are asked
        for.
    ShapeError
        If the prior is over other points.
    DivergenceError
        If the flow leaves the numbers, or the tolerance is not met.
    """
    field = readable(score, x)
    _check(x, sigma_min, sigma_max, steps, tolerance, most_steps, probes, rng)
    law = far_law(field, x, sigma_max) if prior is None else prior
    if tuple(law.event_shape) != tuple(x.shape[1:]):
        raise ShapeError(f"The prior is over points of shape {tuple(law.event_shape)}; these are {tuple(x.shape[1:])}.")
    directions = None
    if probes is not None:
        signs = torch.randint(0, 2, (probes, *x.shape), generator=rng, device=x.device)
        directions = 2.0 * signs.to(x.dtype) - 1.0

    def run(count: int) -> tuple[Tensor, Tensor]:
        end, change = _integrate(_slope(field, directions), x, sigma_min, sigma_max, count)
        told = law.log_prob(end) + change
        if not bool(torch.isfinite(told).all()):
            raise DivergenceError(
                f"The flow left the numbers for {int((~torch.isfinite(told)).any(0).sum())} of {len(x)} rows. Take "
                f"more "
                "steps, or a larger sigma_min."
            )
        return end, told

    end, told = run(steps)
    difference = torch.full_like(told[0], math.nan)
    while tolerance is not None and not bool((difference.abs() <= tolerance).all()):
        if 2 * steps > most_steps:
            raise DivergenceError(
                f"After {steps} steps a log-density still changed by {float(difference.abs().max()):.2g} nats, more "
                f"than "
                f"the tolerance of {tolerance:.2g}. Raise most_steps or sigma_min."
            )
        before, steps = told.mean(0), 2 * steps
        end, told = run(steps)
        difference = told.mean(0) - before
    stderr = torch.zeros_like(told[0]) if probes is None else told.std(0) / math.sqrt(probes)
    return FlowLikelihood(told.mean(0), stderr, difference, steps, end)


def bits_per_dim(log_prob: Tensor, dim: int, width: float = 1.0) -> Tensor:
    r"""Turn log-densities in nats into bits per number of a point: ``(n,) -> (n,)``.

    Parameters
    ----------
    log_prob
        Log-densities, nats.
    dim
        Numbers in a point.
    width
        Distance between neighbouring values of the data, in the units of the density: 1/255 for grey values that were
        divided by 255. The bits are then those of the values themselves, up to the variation of the density within a
        step.

    Raises
    ------
    OptionError
        If the dimension or the width is not positive.
    """
    if dim < 1 or not 0.0 < width < math.inf:
        raise OptionError(f"dim is 1 or more and width positive; got {dim}, {width}.")
    return -(log_prob / dim + math.log(width)) / math.log(2.0)


def far_law(score: Score | Energy, x: Tensor, sigma: float) -> Tractable:
    """Find what a model takes its data for at a high noise level: its own base, or a Gaussian of that size around 0.

    Parameters
    ----------
    score
        Its base is looked for through labels that were fixed.
    x
        Points, for their shape, type and device.
    sigma
        The level.
    """
    part: object = score
    while isinstance(part, (EnergyScore, GivenScore, Given)):
        part = part.score if isinstance(part, GivenScore) else part.energy
    base = getattr(part, "base", None)
    law = Gaussian(x.shape[1:], scale=sigma) if base is None else base(sigma)
    return law.to(x.device, x.dtype)


Slope = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def _slope(field: Score, directions: Tensor | None) -> Slope:
    r"""Derivatives in log sigma of the points, :math:`-\sigma^2 s`, and of the log-density's integral, ``(k, n)``.

    The second is :math:`-\sigma^2 \nabla \cdot s`, for each probe or exact (k = 1).
    """

    def at(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        level = x.new_full((len(x),), sigma)
        if directions is None:
            s, trace = _exact(field, x, level)
        else:
            s, products = _products(field, x, level, directions)
            trace = torch.stack([row_sum(v * p) for v, p in zip(directions, products)])
        return -(sigma**2) * s, -(sigma**2) * trace

    return at


def _exact(field: Score, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Score and divergence, ``(1, n)``."""
    size = x[0].numel()
    axes = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    if isinstance(field, EnergyScore):
        # Slopes along all axes are the gradient, and come with the curvature in one pass.
        _, slopes, curve = slopes_and_curvature(field.energy, x, axes, {"sigma": level})
        return -slopes.T.reshape(x.shape), -curve.unsqueeze(0)
    s, products = _products(field, x, level, axes)
    return s, torch.stack([row_sum(v * p) for v, p in zip(axes, products)]).sum(0, keepdim=True)


def _products(field: Score, x: Tensor, level: Tensor, directions: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Score, and the products of directions with its Jacobian."""
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        s = field(y, level)
        last = len(directions) - 1
        products = [torch.autograd.grad((s * v).sum(), y, retain_graph=i < last)[0] for i, v in enumerate(directions)]
    return s.detach(), products


def _integrate(slope: Slope, x: Tensor, sigma_min: float, sigma_max: float, steps: int) -> tuple[Tensor, Tensor]:
    """The classical Runge-Kutta method in log sigma."""
    low, h = math.log(sigma_min), math.log(sigma_max / sigma_min) / steps
    total: Tensor | float = 0.0
    for i in range(steps):
        sigmas = [math.exp(low + (i + part) * h) for part in (0.0, 0.5, 1.0)]
        k1, l1 = slope(x, sigmas[0])
        k2, l2 = slope(x + 0.5 * h * k1, sigmas[1])
        k3, l3 = slope(x + 0.5 * h * k2, sigmas[1])
        k4, l4 = slope(x + h * k3, sigmas[2])
        x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        total = total + h / 6.0 * (l1 + 2.0 * l2 + 2.0 * l3 + l4)
    assert isinstance(total, Tensor)
    return x, total


def _check(
    x: Tensor,
    low: float,
    high: float,
    steps: int,
    tolerance: float | None,
    most: int,
    probes: int | None,
    rng: Generator | None,
) -> None:
    if not 0.0 < low < high < math.inf:
        raise OptionError(f"Noise levels need 0 < sigma_min < sigma_max; got {low}, {high}.")
    if not 1 <= steps <= most or (tolerance is not None and not tolerance > 0.0):
        raise OptionError(
            f"steps lies between 1 and most_steps, tolerance is positive or None; got {steps}, {most}, {tolerance}."
        )
    size = x[0].numel()
    if probes is None and size > EXACT_DIM:
        raise OptionError(
            f"Points of {size} numbers would need as many derivatives of the score at every step; pass probes=8 and "
            f"rng "
            f"for an estimate with its error. The exact divergence is for up to {EXACT_DIM}."
        )
    if probes is not None and (probes < 2 or rng is None):
        raise OptionError(
            f"The divergence by probes needs 2 or more of them, for an error, and rng; got {probes}, {rng}."
        )
