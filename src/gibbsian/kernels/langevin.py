r"""Langevin kernels: a gradient step downhill in energy, and noise.

The overdamped Langevin diffusion :math:`dx = -\nabla E\,dt + \sqrt{2}\,dW` leaves :math:`e^{-E}/Z` invariant. Its Euler
step of size h is

.. math:: x' = x - h \nabla E(x) + \sqrt{2h}\, z, \qquad z \sim N(0, I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import Info, State, choose, evaluate, is_finite, metropolis, row_sum
from gibbsian.kernels.normals import normals, normals_and_uniforms
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
        Standard deviation of the noise of a step; :math:`\sqrt{2h}` when ``None``, which is temperature 1.
    clip_grad
        Largest absolute value of a gradient's coordinate, or ``None``.
    box
        ``(low, high)`` to which every coordinate is clamped after a step, or ``None``.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    noise_scale: Scalar | None = None
    clip_grad: Scalar | None = None
    box: tuple[float, float] | None = None

    gradients = 1
    domain = "real"

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("clip_grad", self.clip_grad)
        if isinstance(self.noise_scale, (int, float)) and self.noise_scale < 0:
            raise OptionError(f"noise_scale is a standard deviation, 0 or more; got {self.noise_scale}.")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise OptionError(f"box is (low, high) with low < high; got {self.box}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, and remember it as the place to return to."""
        value, grad = evaluate(energy, x)
        return State(x, value, grad, (x.clone(), value.clone(), grad.clone()))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x.

        Raises
        ------
        ArgumentTypeError
            If the state comes from another kernel.
        """
        if not state.origin:
            raise ArgumentTypeError(
                "This state comes from a kernel that never restarts a chain, and ULA needs the place to return to; "
                "start from its positions, state.x."
            )
        return (normals(steps, state.x, rng),)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One Euler step."""
        (z,) = noise
        grad = state.grad
        if self.clip_grad is not None:
            limit = torch.as_tensor(self.clip_grad, dtype=grad.dtype, device=grad.device)
            grad = grad.clamp(-limit, limit)
        scale = (2.0 * self.step_size) ** 0.5 if self.noise_scale is None else self.noise_scale
        x = state.x - self.step_size * grad + scale * z
        if self.box is not None:
            x = x.clamp(self.box[0], self.box[1])
        new = State(x, *evaluate(energy, x))
        finite = is_finite(new.energy, new.grad)
        x0, energy0, grad0 = state.origin
        kept = choose(finite, new, State(x0, energy0, grad0, state.origin))
        return kept, Info(torch.ones_like(new.energy), (~finite).to(new.energy.dtype))


@dataclass(frozen=True)
class MALA:
    r"""Metropolis-adjusted Langevin: the Euler step as a proposal, accepted or rejected, hence exact at any step size.

    `Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, 1998)
    <https://doi.org/10.1111/1467-9868.00123>`_; the best acceptance is about 0.574.

    Parameters
    ----------
    step_size
        h, in squared units of x per nat.

    Raises
    ------
    OptionError
        If the step size is not positive.
    """

    step_size: Scalar

    gradients = 1
    domain = "real"
    target_acceptance = 0.574

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, then one uniform number per chain."""
        return normals_and_uniforms(steps, state.x, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Propose, and accept with the ratio of densities and of proposal densities."""
        z, uniform = noise
        h = self.step_size
        x = state.x - h * state.grad + (2.0 * h) ** 0.5 * z
        new = State(x, *evaluate(energy, x))
        # log q(x -> x') = -|x' - x + h grad|^2 / (4h) = -|z|^2 / 2; the way back needs the gradient at x'.
        back = state.x - x + h * new.grad
        log_ratio = state.energy - new.energy + 0.5 * row_sum(z * z) - row_sum(back * back) / (4.0 * h)
        return metropolis(state, new, log_ratio, uniform)


def check_positive(name: str, value: Scalar | None) -> None:
    """Refuse a setting that is not a positive finite number; tensors are not read, which would wait for the device.

    Raises
    ------
    OptionError
        With the name and the value.
    """
    if isinstance(value, (int, float)) and not 0.0 < value < float("inf"):
        raise OptionError(f"{name} is a positive number; got {value}.")
