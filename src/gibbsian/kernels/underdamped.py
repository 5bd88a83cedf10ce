r"""Underdamped Langevin: a velocity that the energy's slope turns, friction damps and noise renews.

The diffusion

.. math:: dx = L v\,dt, \qquad dv = -L^T \nabla E\,dt - \gamma v\,dt + \sqrt{2\gamma}\,dW

leaves :math:`e^{-E(x) - |v|^2 / 2}` invariant. Its parts are each solved exactly: kicks B by the gradient, drifts A of
the position, and the Ornstein-Uhlenbeck process O of the velocity,

.. math:: v' = e^{-\gamma h} v + \sqrt{1 - e^{-2\gamma h}}\, z, \qquad z \sim N(0, I).

In the order B A O A B, halves of B and A on either side of a whole O, the error of averages over positions is of order
:math:`h^2`, nears :math:`h^4` as the friction grows, and vanishes where the energy is quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.kernels.base import (
    Info,
    State,
    check_carried,
    evaluate,
    per_chain,
    restarted,
    settings_repr,
    with_origin,
)
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals
from gibbsian.kernels.scales import check_scale, over_chains, stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class Underdamped:
    r"""Underdamped (kinetic) Langevin by the BAOAB splitting, never rejected; biased by :math:`O(h^2)` in positions.

    Velocity carries a chain on in one direction for a time of about :math:`1 / \gamma`, so that it crosses a target in
    fewer steps than `ULA`, and the bias is smaller at the same cost of one gradient a step. The velocities that a step
    ends with are less exact than the positions: on a quadratic energy of unit scale their variance is
    :math:`1 - h^2 / 4`.

    A chain that has no velocity yet spends the noise of its first step on one: it draws :math:`v \sim N(0, I)` and
    makes that step without friction. A chain whose energy or gradient is no longer finite returns to where it started,
    without the velocity that drove it out, and draws another in its next step; it is counted.

    `Rational construction of stochastic numerical methods for molecular sampling (Leimkuhler & Matthews, 2013)
    <https://arxiv.org/abs/1203.5428>`_.

    Parameters
    ----------
    step_size
        h, a time: in units of x (a pure number when there is a scale), as velocities are of order 1. It is stable below
        twice the narrowest standard deviation. One, or one per chain ``(n,)``.
    friction
        :math:`\gamma`, the inverse of the time in which a velocity is forgotten, in inverse units of ``step_size``;
        one, or one per chain ``(n,)``. On a Gaussian of standard deviation s, about :math:`2 / s` mixes fastest; for
        large values steps become those of Brownian motion, of size :math:`h^2 / 2` in the sense of `ULA`.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; the motion is then that where the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    friction: Scalar
    scale: Tensor | None = None

    gradients = 1
    gradients_together = 5
    domain = "real"
    adjusted = False
    differentiable = True
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("friction", self.friction)
        check_scale(self.scale)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, and remember it as the place to return to; velocities are drawn in the first step."""
        check_scale(self.scale, x)
        state = with_origin(State(x, *evaluate(energy, x)))
        return state._replace(momentum=(torch.zeros_like(x),), memory=(torch.zeros_like(state.energy),))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x.

        Raises
        ------
        ArgumentTypeError
            If the state comes from another kernel.
        """
        check_carried(self, state, origin=3, momentum=1, memory=1)
        return (normals(steps, state.x, rng),)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One step of the splitting: kick, drift, friction and noise, drift, kick."""
        (z,) = noise
        (v,), (moving,) = state.momentum, state.memory
        h = over_chains(self.step_size, z)
        rate = torch.as_tensor(over_chains(self.friction, z) * h, dtype=z.dtype, device=z.device)
        moves = per_chain(moving, z) > 0
        v = torch.where(moves, v, z) - 0.5 * h * stretch_gradient(self.scale, state.grad)
        x = state.x + stretch(self.scale, 0.5 * h * v)
        # Not sqrt(1 - exp(-2 rate)), which loses its digits where friction is weak.
        v = torch.where(moves, (-rate).exp() * v + (-torch.expm1(-2.0 * rate)).sqrt() * z, v)
        x = x + stretch(self.scale, 0.5 * h * v)
        kept, gone = restarted(State(x, *evaluate(energy, x), state.origin))
        v = v - 0.5 * h * stretch_gradient(self.scale, kept.grad)
        kept = kept._replace(
            momentum=(torch.where(per_chain(gone, v), 0.0, v),), memory=((~gone).to(kept.energy.dtype),)
        )
        return kept, Info(torch.ones_like(kept.energy), gone.to(kept.energy.dtype))
