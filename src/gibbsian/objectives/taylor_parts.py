"""The arithmetic of Taylor mode: elementwise functions with three derivatives, and linear layers on all parts at once.

Gradients are written out, and once only: composed of single operations they would take three times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gibbsian.matmul import product


class NotPropagated(Exception):
    """A function without a rule here."""


class Elementwise(torch.autograd.Function):
    """The rule of an elementwise function, with its gradient written out and few arrays made on the way.

    Composed of single operations, it would take three times as long, most of it spent on getting memory.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, slopes: Tensor, curve: Tensor | None, derivatives: Callable[[Tensor, int], list[Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Push all parts."""
        ctx.set_materialize_grads(False)
        ctx.derivatives = derivatives
        ctx.save_for_backward(z, slopes, curve)
        f, f1, f2 = derivatives(z, 2)
        bent = _times_squares(f2, slopes)
        if curve is not None:
            bent.addcmul_(f1, curve)
        return f, f1.mul_(slopes[0])[None] if slopes.shape[0] == 1 else f1 * slopes, bent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_slopes: Tensor | None, g_curve: Tensor | None) -> Any:
        """Gradients of all parts."""
        z, slopes, curve = ctx.saved_tensors
        # The first is not needed again, so that its memory is.
        spare, f1, f2, f3 = ctx.derivatives(z, 3)
        of_z = torch.zeros_like(z) if g_curve is None else _times_squares(f3, slopes)
        of_slopes = of_curve = None
        if g_curve is not None:
            if curve is not None:
                of_z.addcmul_(f2, curve)
            of_z.mul_(g_curve)
        if g_slopes is not None:
            of_z.addcmul_(_sum_of_products(g_slopes, slopes, spare), f2)
            of_slopes = g_slopes * f1
        if g_curve is not None:
            twice = f2.mul_(g_curve).mul_(2.0)
            of_slopes = twice * slopes if of_slopes is None else of_slopes.addcmul_(twice, slopes)
        if g is not None:
            of_z.addcmul_(g, f1)
        if g_curve is not None and curve is not None:
            of_curve = f1.mul_(g_curve)
        if of_slopes is not None and slopes.shape[1] != of_slopes.shape[1]:
            of_slopes = of_slopes.sum(1, keepdim=True)
        return of_z, of_slopes, of_curve, None


class Affine(torch.autograd.Function):
    """A linear layer on all three parts, with its gradient written out for the quicker products."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, slopes: Tensor, curve: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Push all parts."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, slopes, curve, weight)
        ctx.sizes = slopes.shape[:2]
        pushed = product(slopes.flatten(0, 1), weight).unflatten(0, ctx.sizes)
        return product(value, weight, bias), pushed, None if curve is None else product(curve, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_slopes: Tensor | None, g_curve: Tensor | None) -> Any:
        """Gradients of all parts."""
        value, slopes, curve, weight = ctx.saved_tensors
        needs, turned = ctx.needs_input_grad, weight.T
        of_value = product(g, turned) if g is not None and needs[0] else None
        of_slopes = of_curve = of_weight = None
        pairs = [] if g is None else [(g, value)]
        if g_slopes is not None:
            pairs.append((g_slopes.flatten(0, 1), slopes.flatten(0, 1)))
            if needs[1]:
                of_slopes = product(pairs[-1][0], turned).unflatten(0, ctx.sizes)
        if g_curve is not None:
            pairs.append((g_curve, curve))
            of_curve = product(g_curve, turned) if needs[2] else None
        if needs[3]:
            for a, b in pairs:
                part = product(a.T, b.T)
                of_weight = part if of_weight is None else of_weight.add_(part)
        of_bias = g.sum(0) if g is not None and needs[4] else None
        return of_value, of_slopes, of_curve, of_weight, of_bias


def _sum_of_products(a: Tensor, b: Tensor, into: Tensor) -> Tensor:
    return torch.mul(a[0], b[0], out=into) if a.shape[0] == 1 else torch.sum(a * b, 0, out=into)


def _times_squares(into: Tensor, slopes: Tensor) -> Tensor:
    return into.mul_(slopes[0]).mul_(slopes[0]) if slopes.shape[0] == 1 else into.mul_((slopes * slopes).sum(0))


# Each of these returns new arrays, a function and as many of its derivatives as are asked for: two or three.


def silu(z: Tensor, order: int) -> list[Tensor]:
    """``z / (1 + exp(-z))``."""
    s = torch.sigmoid(z)
    f = z * s
    f1 = torch.addcmul(s, f, s, value=-1.0).add_(f)
    # In terms of w = 2 f' - f, the second derivative is (1 - s) w, and the third (1 - s) (2 f'' - f' - s w).
    w = torch.add(f1, f1).sub_(f)
    if order == 2:
        return [f, f1, s.neg_().add_(1.0).mul_(w)]
    f2 = torch.addcmul(w, w, s, value=-1.0)
    third = w.mul_(s).add_(f1).sub_(f2, alpha=2.0)
    return [f, f1, f2, third.mul_(s.sub_(1.0))]


def softplus(z: Tensor, order: int, beta: float = 1.0, threshold: float = 20.0) -> list[Tensor]:
    """``log(1 + exp(beta z)) / beta``."""
    s = torch.sigmoid(beta * z)
    u = s - s * s
    return [torch.nn.functional.softplus(z, beta, threshold), s, beta * u, beta * beta * u * (1 - 2 * s)][: order + 1]


def tanh(z: Tensor, order: int) -> list[Tensor]:
    """The hyperbolic tangent."""
    t = torch.tanh(z)
    u = 1 - t * t
    return [t, u, -2 * t * u, u * (4 - 6 * u)][: order + 1]


def sigmoid(z: Tensor, order: int) -> list[Tensor]:
    """The logistic function."""
    s = torch.sigmoid(z)
    u = s - s * s
    return [s, u, u * (1 - 2 * s), u * (1 - 6 * u)][: order + 1]


def gelu(z: Tensor, order: int, approximate: str = "none") -> list[Tensor]:
    """The point times the normal distribution function, not its approximation by tanh."""
    if approximate != "none":
        raise NotPropagated("gelu by tanh")
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    phi = torch.special.ndtr(z)
    return [z * phi, phi + z * density, (2 - z * z) * density, (z * z - 4) * z * density][: order + 1]


def sin(z: Tensor, order: int) -> list[Tensor]:
    """The sine."""
    s, c = torch.sin(z), torch.cos(z)
    return [s, c, -s, -c][: order + 1]


def cos(z: Tensor, order: int) -> list[Tensor]:
    """The cosine."""
    s, c = torch.sin(z), torch.cos(z)
    return [c, -s, -c, s][: order + 1]


def exp(z: Tensor, order: int) -> list[Tensor]:
    """The exponential."""
    return [torch.exp(z) for _ in range(order + 1)]


def log(z: Tensor, order: int) -> list[Tensor]:
    """The natural logarithm."""
    r = 1 / z
    return [torch.log(z), r, -r * r, 2 * r * r * r][: order + 1]


def power(z: Tensor, order: int, p: float) -> list[Tensor]:
    """``z ** p``."""
    factors = (1.0, p, p * (p - 1), p * (p - 1) * (p - 2))[: order + 1]
    # A vanished factor stays zero where the negative power that goes with it is infinite.
    return [f * z ** (p - i) if f else torch.zeros_like(z) for i, f in enumerate(factors)]
