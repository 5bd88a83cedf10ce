"""Slopes and curvatures of an energy along directions, and whether an energy has curvature at all.

Taylor mode (`taylor`) does the work where every function in the energy has a rule there; reverse differentiation, two
passes for each direction, does it elsewhere. Which it is, is found out once for each energy, on its first batch, where
the two are compared.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gibbsian.energies.base import Energy
from gibbsian.energies.layers import dropout_paused
from gibbsian.errors import ArgumentTypeError
from gibbsian.kernels.base import row_sum
from gibbsian.objectives.base import energy_and_gradient
from gibbsian.objectives.taylor import NotPropagated, propagate
from gibbsian.typing import Context

KINKED = (
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "hardtanh", "hardsigmoid"),
    *("threshold", "hardshrink", "softshrink"),
    *(f"{kind}max_pool{axes}d" for kind in ("", "adaptive_") for axes in (1, 2, 3)),
)
"""Piecewise linear functions, under the names that torch's functions have."""

_taylor: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_smooth: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_sloped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def slopes_and_curvature(
    energy: Energy, x: Tensor, directions: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Differentiate along directions, twice.

    Parameters
    ----------
    energy
        Called as ``energy(x, **context)``.
    x
        ``(n, *event)``.
    directions
        ``(k, n, *event)``, or ``(k, 1, *event)`` for the same ones at every point.
    context
        What each row is conditioned on.

    Returns
    -------
    tuple
        Energies ``(n,)``, the slopes :math:`v_j \cdot \nabla E`, ``(k, n)``, and :math:`\sum_j v_j^\top \nabla^2 E \,
        v_j`, ``(n,)``; differentiable in the energy's parameters.

    Raises
    ------
    ShapeError, ArgumentTypeError
        If the energy gives anything but one number per row, or does not depend on the points.
    """
    if goes_by_taylor(energy, x, context):
        # What cannot be pushed may show later: a dropout that was off.
        with contextlib.suppress(NotPropagated):
            return propagate(energy, x.detach(), directions, context)
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        value, grad = energy_and_gradient(energy, y, context, True)
        products = hessian_products(grad, y, directions, training)
        curve = sum((row_sum(v * h) for v, h in zip(directions, products)), torch.zeros_like(value))
    slopes = torch.stack([row_sum(v * grad) for v in directions])
    return (value, slopes, curve) if training else (value.detach(), slopes.detach(), curve.detach())


def hessian_products(grad: Tensor, y: Tensor, directions: Tensor, create_graph: bool) -> Iterator[Tensor]:
    """Products of the Hessian with each direction, ``(n, *event)``, one after the other.

    Parameters
    ----------
    grad
        The energy's gradient at ``y``, with a graph behind it.
    y
        Points.
    directions
        ``(k, n, *event)`` or ``(k, 1, *event)``.
    create_graph
        Whether the products are to be differentiated.
    """
    # One by one over a shared graph: on 256 rows of a multilayer energy faster than directions in a batch, by a third.
    for v in directions:
        yield _product(grad, y, v, create_graph)


def _product(grad: Tensor, y: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    if not grad.requires_grad:
        return torch.zeros_like(y)
    (h,) = torch.autograd.grad((grad * v).sum(), y, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(y) if h is None else h


def goes_by_taylor(energy: Energy, x: Tensor, context: Context) -> bool:
    """Whether Taylor mode can push this energy's points, and gives what reverse differentiation gives."""
    if energy not in _taylor:
        with dropout_paused(energy):
            _taylor[energy] = _agrees(energy, x.detach(), context)
    return _taylor[energy]


def _agrees(energy: Energy, x: Tensor, context: Context) -> bool:
    v = _some_direction(x)
    try:
        with torch.no_grad():
            value, slopes, curve = propagate(energy, x, v[None, None], context)
    except Exception:
        # Code that was not written for jets may fail in any way; if it fails on tensors too, the caller will hear.
        return False
    with torch.enable_grad():
        y = x.clone().requires_grad_(True)
        expected, grad = energy_and_gradient(energy, y, context, True)
        bent = row_sum(_product(grad, y, v, False) * v)
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    pairs = ((value, expected), (slopes[0], row_sum(grad * v)), (curve, bent))
    return all(_close(a.detach(), b.detach(), tolerance) for a, b in pairs)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    # Against the largest: one row's curvature may be near zero by cancellation.
    return bool(((a - b).abs().max() <= 10 * tolerance * b.abs().max() + tolerance).item())


def require_curvature(energy: Energy, x: Tensor, context: Context) -> None:
    """Refuse an energy that is made of straight pieces; looked at once.

    Functions with kinks that x runs through are found as they are called. What they were hidden from, by code of
    its own, shows in a Hessian that is zero at every row whatever the parameters, while the gradient is not.

    Raises
    ------
    ArgumentTypeError
        That names the layer.
    """
    if energy in _smooth:
        return
    y = x.detach().clone().requires_grad_(True)
    with dropout_paused(energy), torch.enable_grad():
        with _Kinks(energy) as kinks:
            constants = {name: p.detach() for name, p in energy.named_parameters()}
            torch.func.functional_call(energy, constants, (y,), dict(context))
        found = kinks.found or (_straight(energy, y, context) and "in no layer of a known kind")
    if found:
        raise ArgumentTypeError(
            f"The energy's second derivative vanishes wherever it is defined ({found}): score matching needs it, and "
            "would take a piecewise linear energy for one without curvature. Use a smooth activation (SiLU, softplus, "
            "tanh) and average pooling, or DenoisingScoreMatching, which needs first derivatives only."
        )
    _smooth.add(energy)


def require_slope(energy: Energy, x: Tensor, context: Context) -> None:
    """Refuse an energy that does not depend on the points; looked at once.

    Raises
    ------
    ShapeError, ArgumentTypeError
        If it gives anything but one number per row, or does not depend on them.
    """
    if energy not in _sloped:
        with dropout_paused(energy), torch.enable_grad():
            energy_and_gradient(energy, x.detach().clone().requires_grad_(True), context, False)
        _sloped.add(energy)


def _straight(energy: Energy, y: Tensor, context: Context) -> bool:
    """Whether the Hessian is zero at every row, and so for all parameters, though the gradient is not."""
    _, grad = energy_and_gradient(energy, y, context, True)
    bent = _product(grad, y, _some_direction(y), True)
    if bool((bent != 0).any()) or not bool((grad != 0).any()):
        return False
    parameters = [p for p in energy.parameters() if p.requires_grad]
    if not bent.requires_grad or not parameters:
        return True
    # A parabola whose coefficient stands at zero has no curvature yet.
    slopes = torch.autograd.grad(bent.sum(), parameters, allow_unused=True)
    return all(slope is None or not bool((slope != 0).any()) for slope in slopes)


class _Kinks(TorchFunctionMode):
    """Watches a call of an energy for functions with kinks; the layer they are called in is the innermost entered."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy, self.inside, self.hooks = energy, [""], []
        self.found = ""

    def __enter__(self) -> _Kinks:
        for name, module in self.energy.named_modules():
            label = f"{type(module).__name__}, {name}" if name else type(module).__name__
            self.hooks += [
                module.register_forward_pre_hook(lambda *_, label=label: self.inside.append(label)),
                module.register_forward_hook(lambda *_: (self.inside.pop(), None)[1], always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        # The parameters are constants here, so that what requires a gradient depends on x.
        if name in KINKED and isinstance(args[0], Tensor) and args[0].requires_grad and not self.found:
            self.found = f"{name} in {self.inside[-1]}"
        return func(*args, **(kwargs or {}))


def _some_direction(x: Tensor) -> Tensor:
    """One direction, the same at each look and without random numbers, which would set a resumed run off its course."""
    return torch.cos(torch.arange(x[0].numel(), dtype=x.dtype, device=x.device) + 1.0).view(x.shape[1:])
