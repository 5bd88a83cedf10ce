r"""Second derivatives along directions, in one forward pass.

Along a direction v an energy has the value :math:`E(x)`, the slope :math:`v \cdot \nabla E` and the curvature
:math:`v^\top \nabla^2 E \, v`. All three can be pushed through a network layer by layer, like the first terms of a
Taylor series. A linear layer maps each of them alone, and an elementwise function f turns :math:`(z, \dot z, \ddot z)`
into

.. math:: \bigl(f(z), \; f'(z) \, \dot z, \; f''(z) \, \dot z^2 + f'(z) \, \ddot z\bigr).

Only the sum of the curvatures over directions is ever asked for (the Laplacian, or an estimate of it), and as the rule
is linear in :math:`\ddot z` the sum is pushed instead of its terms: k directions cost k + 2 passes forward, where a
product of Hessian and vector by reverse differentiation costs two for each direction besides two more.

`Forward Laplacian: a new computational framework for neural network-based variational Monte Carlo (Li et al., 2023)
<https://arxiv.org/abs/2307.08214>`_.

An energy takes a `Jet` in the place of its points. What it does to it must be among the rules below; where it is not,
`NotPropagated` is raised and the caller takes the general road, reverse differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gibbsian.objectives import taylor_parts as arithmetic
from gibbsian.objectives.taylor_parts import NotPropagated


class Jet:
    """Values at points with their slopes along k directions and the sum of their curvatures.

    Attributes
    ----------
    value
        ``(n, *shape)``.
    slopes
        ``(k, n, *shape)``, or ``(k, 1, *shape)`` where they are the same for all rows.
    curve
        Summed over directions, ``(n, *shape)``; ``None`` for zero.
    """

    def __init__(self, value: Tensor, slopes: Tensor, curve: Tensor | None = None) -> None:
        self.value, self.slopes, self.curve = value, slopes, curve

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Apply the rule of a function; methods and operators of tensors share the function's."""
        name = func.__name__
        name = name.strip("_") if name.startswith("__") else name
        rule = _RULES.get(name)
        if rule is None:
            raise NotPropagated(name)
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dtype", "device", "size", "dim"):
            return getattr(self.value, name)
        if name not in _RULES:
            raise NotPropagated(name)
        return partial(_RULES[name], self)

    def __len__(self) -> int:
        return len(self.value)

    def __add__(self, other: Any) -> Jet:
        return _add(self, other)

    def __sub__(self, other: Any) -> Jet:
        return _sub(self, other)

    def __mul__(self, other: Any) -> Jet:
        return _mul(self, other)

    def __truediv__(self, other: Any) -> Jet:
        return _div(self, other)

    def __rsub__(self, other: Any) -> Jet:
        return _sub(other, self)

    def __rtruediv__(self, other: Any) -> Jet:
        return _div(other, self)

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Jet:
        return _mul(self, -1.0)

    def __pow__(self, power: Any) -> Jet:
        return _pow(self, power)

    def __matmul__(self, weight: Any) -> Jet:
        return _matmul(self, weight)

    def __getitem__(self, index: Any) -> Jet:
        return _getitem(self, index)


def propagate(
    energy: Callable[..., Any], x: Tensor, directions: Tensor, context: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Push points and directions through an energy.

    Parameters
    ----------
    energy
        Called once, with a `Jet` for ``x``.
    x
        ``(n, *event)``.
    directions
        ``(k, n, *event)``, or ``(k, 1, *event)`` for the same ones at every point.
    context
        What each row is conditioned on.

    Returns
    -------
    tuple
        Energies ``(n,)``, slopes ``(k, n)`` and the sum of curvatures ``(n,)``; differentiable in the parameters, once.

    Raises
    ------
    NotPropagated
        If the energy uses a function that has no rule.
    """
    out = energy(Jet(x, directions), **context)
    if not isinstance(out, Jet) or out.value.shape != x.shape[:1]:
        raise NotPropagated("an energy that is not one number per row")
    curve = torch.zeros_like(out.value) if out.curve is None else out.curve
    return out.value, out.slopes.expand(-1, x.shape[0]), curve


def _apply(derivatives: Callable[..., list[Tensor]], x: Jet, *args: Any, inplace: bool = False, **options: Any) -> Jet:
    if inplace:
        raise NotPropagated("an operation in place")
    names = derivatives.__code__.co_varnames[2 : derivatives.__code__.co_argcount]
    options |= dict(zip(names, args))
    return Jet(*arithmetic.Elementwise.apply(x.value, x.slopes, x.curve, partial(derivatives, **options)))


def _map(op: Callable[[Tensor], Tensor], x: Jet, on_value: Callable[[Tensor], Tensor] | None = None) -> Jet:
    """Map all three parts by an operation that is linear and leaves the rows where they are."""
    k, m = x.slopes.shape[:2]
    value = (on_value or op)(x.value)
    slopes = op(x.slopes.flatten(0, 1))
    if value.shape[:1] != x.value.shape[:1] or slopes.shape[0] != k * m:
        raise NotPropagated("an operation that mixes rows")
    return Jet(value, slopes.unflatten(0, (k, m)), None if x.curve is None else op(x.curve))


def _linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    _require_constant(weight, bias)
    if x.value.ndim != 2:
        linear = torch.nn.functional.linear
        return _map(lambda a: linear(a, weight), x, lambda a: linear(a, weight, bias))
    return Jet(*arithmetic.Affine.apply(x.value, x.slopes, x.curve, weight, bias))


def _matmul(x: Jet, weight: Tensor) -> Jet:
    _require_constant(weight)
    if not isinstance(x, Jet) or weight.ndim > 2 or x.value.ndim < 2:
        raise NotPropagated("a product of matrices that depend on rows")
    return _map(lambda a: a @ weight, x)


def _conv2d(x: Jet, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> Jet:
    _require_constant(weight, bias)
    conv = torch.nn.functional.conv2d
    return _map(lambda a: conv(a, weight, None, *args, **options), x, lambda a: conv(a, weight, bias, *args, **options))


def _mapped(name: str) -> Callable[..., Jet]:
    def rule(x: Jet, *args: Any, **options: Any) -> Jet:
        _require_constant(*args, *options.values())
        function = getattr(Tensor, name, None) or getattr(torch.nn.functional, name)
        return _map(lambda a: function(a, *args, **options), x)

    return rule


def _along(name: str) -> Callable[..., Jet]:
    """Sums and the like, along axes that are named and not the rows'."""

    def rule(x: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
        dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
        if not dims or any(d % x.value.ndim == 0 for d in dims):
            raise NotPropagated(f"{name} over rows")
        return _map(lambda a: getattr(a, name)(dims, keepdim), x)

    return rule


def _axis(name: str, grows: bool = False) -> Callable[..., Jet]:
    """An operation at one axis behind that of the rows."""

    def rule(x: Jet, dim: int | None = None) -> Jet:
        if dim is None or dim % (x.value.ndim + grows) == 0:
            raise NotPropagated(f"{name} of the rows")
        return _map(lambda a: getattr(a, name)(dim), x)

    return rule


def _flatten(x: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    if start_dim % x.value.ndim == 0:
        raise NotPropagated("flatten of the rows")
    return _map(lambda a: a.flatten(start_dim, end_dim), x)


def _reshape(x: Jet, *shape: Any) -> Jet:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    told = x.value.reshape(sizes).shape
    if told[0] != x.value.shape[0]:
        raise NotPropagated("reshape of the rows")
    return _map(lambda a: a.reshape(a.shape[0], *told[1:]), x)


def _getitem(x: Jet, index: Any) -> Jet:
    at = index if isinstance(index, tuple) else (index,)
    rows_kept = (at[0] is Ellipsis and len(at) <= x.value.ndim) or at[0] == slice(None)
    if not rows_kept or any(isinstance(i, (Tensor, Jet)) for i in at):
        raise NotPropagated("a choice of rows")
    return _map(lambda a: a[at], x)


def _gather(x: Jet, dim: int, index: Tensor) -> Jet:
    if dim % x.value.ndim == 0 or index.shape[0] != x.value.shape[0]:
        raise NotPropagated("gather of rows")
    k, n = len(x.slopes), len(index)
    many = index.expand(k, *index.shape).flatten(0, 1)
    slopes = x.slopes.expand(k, n, *x.slopes.shape[2:]).flatten(0, 1).gather(dim, many).unflatten(0, (k, n))
    return Jet(x.value.gather(dim, index), slopes, None if x.curve is None else x.curve.gather(dim, index))


def _cat(parts: Sequence[Any], dim: int = 0) -> Jet:
    if not all(isinstance(part, Jet) for part in parts) or dim % parts[0].value.ndim == 0:
        raise NotPropagated("cat of rows")
    rows = max(part.slopes.shape[1] for part in parts)
    slopes = [part.slopes.expand(-1, rows, *part.slopes.shape[2:]).flatten(0, 1) for part in parts]
    curves = [torch.zeros_like(part.value) if part.curve is None else part.curve for part in parts]
    flat = any(part.curve is not None for part in parts)
    joined = torch.cat(slopes, dim).unflatten(0, (len(parts[0].slopes), rows))
    return Jet(torch.cat([part.value for part in parts], dim), joined, torch.cat(curves, dim) if flat else None)


def _add(a: Any, b: Any, *, alpha: float = 1.0) -> Jet:
    if alpha != 1.0:
        raise NotPropagated("add with alpha")
    if not isinstance(a, Jet):
        a, b = b, a
    if isinstance(b, Jet):
        if a.value.ndim != b.value.ndim:
            raise NotPropagated("a sum over different axes")
        curve = a.curve if b.curve is None else b.curve if a.curve is None else a.curve + b.curve
        return _fitted(a.value + b.value, a.slopes + b.slopes, curve)
    return _fitted(a.value + b, a.slopes, a.curve)


def _fitted(value: Tensor, slopes: Tensor, curve: Tensor | None) -> Jet:
    """Spread slopes and curvatures over axes along which only the value has grown."""
    if value.ndim != slopes.ndim - 1:
        raise NotPropagated("a sum that adds axes")
    wide = slopes if slopes.shape[2:] == value.shape[1:] else slopes.expand(*slopes.shape[:2], *value.shape[1:])
    return Jet(value, wide, None if curve is None else curve.expand(value.shape))


def _sub(a: Any, b: Any) -> Jet:
    return _add(a, _mul(b, -1.0) if isinstance(b, Jet) else -b)


def _mul(a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        value = a.value * b
        if value.ndim != a.value.ndim:
            raise NotPropagated("a product that adds axes")
        return Jet(value, a.slopes * b, None if a.curve is None else a.curve * b)
    if a.value.ndim != b.value.ndim:
        raise NotPropagated("a product over different axes")
    curve = 2 * (a.slopes * b.slopes).sum(0)
    for this, other in ((a, b), (b, a)):
        curve = curve if this.curve is None else curve + this.curve * other.value
    value = a.value * b.value
    return Jet(value, a.slopes * b.value + a.value * b.slopes, curve.expand(value.shape))


def _div(a: Any, b: Any) -> Jet:
    return _mul(a, _apply(arithmetic.power, b, -1.0) if isinstance(b, Jet) else 1 / b)


def _pow(x: Any, power: Any) -> Jet:
    if not isinstance(x, Jet) or not isinstance(power, (int, float)):
        raise NotPropagated("a power that is not a number")
    return _apply(arithmetic.power, x, float(power))


def _dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training and p > 0:
        raise NotPropagated("dropout")
    return x


def _require_constant(*values: Any) -> None:
    if any(isinstance(value, Jet) for value in values):
        raise NotPropagated("a weight that depends on x")


_SMOOTH = ("silu", "softplus", "tanh", "sigmoid", "gelu", "sin", "cos", "exp", "log")
_RULES: dict[str, Callable[..., Any]] = {
    **{name: partial(_apply, getattr(arithmetic, name)) for name in _SMOOTH},
    **{f.__name__.strip("_"): f for f in (_linear, _matmul, _conv2d, _flatten, _reshape, _getitem, _gather, _cat)},
    **{f.__name__.strip("_"): f for f in (_add, _sub, _mul, _div, _pow, _dropout)},
    "squeeze": _axis("squeeze"),
    "unsqueeze": _axis("unsqueeze", grows=True),
    **{name: _along(name) for name in ("sum", "mean")},
    **{name: _mapped(name) for name in ("avg_pool2d", "contiguous")},
    "view": _reshape,
    "truediv": _div,
    "radd": _add,
    "rmul": _mul,
    "rsub": lambda a, b: _sub(b, a),
    "rtruediv": lambda a, b: _div(b, a),
    "neg": lambda x: _mul(x, -1.0),
    "square": lambda x: _apply(arithmetic.power, x, 2.0),
    "reciprocal": lambda x: _apply(arithmetic.power, x, -1.0),
    "sqrt": lambda x: _apply(arithmetic.power, x, 0.5),
}
