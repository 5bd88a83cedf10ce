r"""Langevin kernels: a gradient step downhill in energy, and noise.

The overdamped Langevin diffusion :math:`dx = -\nabla E\,dt + \sqrt{2}\,dW` leaves :math:`e^{-E}/Z` invariant. Its Euler
step of size h is

.. math:: x' = x - h \nabla E(x) + \sqrt{2h}\, z, \qquad z \sim N(0, I).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import (
    Info,
    State,
    check_carried,
    evaluate,
    metropolis,
    restarted,
    row_sum,
    settings_repr,
    with_origin,
)
from gibbsian.kernels.normals import normals, normals_and_uniforms
from gibbsian.kernels.scales import check_scale, over_chains, stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class ULA:
    r"""Unadjusted Langevin: the Euler step, never rejected; biased by O(h).

    With the settings practitioners train images with: a noise scale of its own (short-run chains at a temperature
    other than 1), the gradient clipped by coordinate, positions clamped to a box. A chain whose energy or gradient is
    no longer finite returns to where it started, and is counted.

    `Exponential convergence of Langevin distributions and their discrete approximations (Roberts & Tweedie, 1996)
    <https://doi.org/10.2307/3318418>`_; the practitioners' settings are those of `Implicit generation and modeling
    with energy-based models (Du & Mordatch, 2019) <https://arxiv.org/abs/1903.08689>`_.

    Parameters
    ----------
    step_size
        h, in squared units of x per nat.
    noise_scale
        Standard deviation s of the noise of a step; :math:`\sqrt{2h}` when ``None``, which is temperature 1. Any other
        samples another density, :math:`p^{1/T}` with :math:`T = s^2 / 2h` (up to the bias of O(h)), and an energy that
        is trained with such chains comes out T times that of the data.
    clip_grad
        Largest absolute value of a gradient's coordinate, or ``None``.
    box
        ``(low, high)`` to which every coordinate is clamped after a step, or ``None``.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; the step is then taken where the target is round. ``None`` for all 1.
    autocast
        A lower precision for energies and gradients, as ``torch.bfloat16``, or ``None``; positions keep theirs. The
        rounding is one more bias of an unadjusted chain.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    noise_scale: Scalar | None = None
    clip_grad: Scalar | None = None
    box: tuple[float, float] | None = None
    scale: Tensor | None = None
    autocast: torch.dtype | None = None

    gradients = 1
    domain = "real"
    adjusted = False
    differentiable = True
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_scale(self.scale)
        check_positive("clip_grad", self.clip_grad)
        if isinstance(self.noise_scale, (int, float)) and self.noise_scale < 0:
            raise OptionError(f"noise_scale is a standard deviation, 0 or more; got {self.noise_scale}.")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise OptionError(f"box is (low, high) with low < high; got {self.box}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, and remember it as the place to return to."""
        check_scale(self.scale, x)
        return with_origin(State(x, *self._evaluate(energy, x)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x.

        Raises
        ------
        ArgumentTypeError
            If the state comes from another kernel.
        """
        check_carried(self, state, origin=3)
        return (normals(steps, state.x, rng),)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One Euler step."""
        (z,) = noise
        h = over_chains(self.step_size, z)
        grad = stretch_gradient(self.scale, state.grad)
        if self.clip_grad is not None:
            limit = torch.as_tensor(self.clip_grad, dtype=grad.dtype, device=grad.device)
            grad = grad.clamp(-limit, limit)
        spread = (2.0 * h) ** 0.5 if self.noise_scale is None else over_chains(self.noise_scale, z)
        x = state.x + stretch(self.scale, spread * z - h * grad)
        if self.box is not None:
            x = x.clamp(self.box[0], self.box[1])
        kept, gone = restarted(State(x, *self._evaluate(energy, x), state.origin))
        return kept, Info(torch.ones_like(kept.energy), gone.to(kept.energy.dtype))

    def _evaluate(self, energy: EnergyFn, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.autocast is None:
            return evaluate(energy, x)
        with torch.autocast(x.device.type, dtype=self.autocast):
            value, grad = evaluate(energy, x)
        return value.to(x.dtype), grad


@dataclass(frozen=True)
class MALA:
    r"""Metropolis-adjusted Langevin: the Euler step as a proposal, accepted or rejected, hence exact at any step size.

    `Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, 1998)
    <https://doi.org/10.1111/1467-9868.00123>`_; the best acceptance is about 0.574.

    Parameters
    ----------
    step_size
        h, in squared units of x per nat (a pure number when there is a scale); one, or one per chain ``(n,)``.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; the step is then taken where the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    scale: Tensor | None = None

    gradients = 1
    domain = "real"
    target_acceptance = 0.574
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_scale(self.scale)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_scale(self.scale, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, then one uniform number per chain."""
        check_carried(self, state)
        return normals_and_uniforms(steps, state.x, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Propose, and accept with the ratio of densities and of proposal densities."""
        z, uniform = noise
        h = over_chains(self.step_size, z)
        move = (2.0 * h) ** 0.5 * z - h * stretch_gradient(self.scale, state.grad)
        x = state.x + stretch(self.scale, move)
        new = State(x, *evaluate(energy, x))
        # In round coordinates, log q(x -> x') = -|x' - x + h grad|^2 / (4h) = -|z|^2 / 2; the way back needs grad'.
        back = h * stretch_gradient(self.scale, new.grad) - move
        log_ratio = state.energy - new.energy + 0.5 * row_sum(z * z) - row_sum(back * back) / (4.0 * self.step_size)
        return metropolis(state, new, log_ratio, uniform)


def check_positive(name: str, value: Scalar | None) -> None:
    """Refuse a setting that is not a positive finite number; tensors are not read, which would wait for the device.

    Raises
    ------
    OptionError
        With the name and the value.
    """
    if value is None or isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < value < float("inf"):
        raise OptionError(f"{name} is a positive number; got {value!r}.")
