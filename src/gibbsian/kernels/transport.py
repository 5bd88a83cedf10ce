r"""Langevin dynamics that starts without noise: first along the gradient from noise to data, then in equilibrium.

Energy matching learns a potential :math:`V = \varepsilon E` whose gradient carries noise to data in a time of about 1,
and whose Boltzmann density at temperature :math:`\varepsilon` is the data's. Its chains follow

.. math:: dx = -\nabla V\,dt + \sqrt{2\,\varepsilon(t)}\,dW, \qquad
   \varepsilon(t) = \varepsilon \cdot \min\Big(1, \max\Big(0, \frac{t - \tau}{1 - \tau}\Big)\Big).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
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
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class TransportLangevin:
    r"""Unadjusted Langevin of a model fitted by energy matching, each chain with a clock of its own.

    .. math:: x' = x - h\,\varepsilon\,\nabla E(x) + \sqrt{2 h\,\varepsilon(t)}\, z, \qquad t' = t + h

    `Energy matching: unifying flow matching and energy-based models for generative modeling (Balcerak et al., 2025)
    <https://arxiv.org/abs/2504.10612>`_. Clocks start at 0, where the noise is; a time T takes T / h steps. From time 1
    on a step is one of `ULA` with step size :math:`h\,\varepsilon`, whose equilibrium is :math:`e^{-E}`. A chain whose
    energy or gradient is no longer finite returns to where it started, with its clock, and is counted.

    Parameters
    ----------
    step_size
        h, a time; from noise to data is a time of 1.
    temperature
        :math:`\varepsilon`, in squared units of x per unit of time and nat: the one that the model was fitted with.
    onset
        :math:`\tau`, the time from which noise is added, from 0 to 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar = 0.01
    temperature: Scalar = 0.1
    onset: Scalar = 0.8

    gradients = 1
    domain = "real"
    adjusted = False
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("temperature", self.temperature)
        check_onset(self.onset)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, remember it as the place to return to, and set the clocks to 0."""
        return self.init_at(energy, x, x.new_zeros(x.shape[0]))

    def init_at(self, energy: EnergyFn, x: Tensor, times: Tensor) -> State:
        """Start with clocks that show other times, ``(n,)``: 1 for chains that start from data."""
        state = with_origin(State(x, *evaluate(energy, x)))
        times = times.to(state.energy.dtype)
        # One tensor twice would be another graph than two, when compiled.
        return state._replace(memory=(times, times.clone()))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x.

        Raises
        ------
        ArgumentTypeError
            If the state comes from another kernel.
        """
        check_carried(self, state, origin=3, memory=2)
        return (normals(steps, state.x, rng),)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One Euler step, and the clock's."""
        (z,), (time, began) = noise, state.memory
        h = self.step_size * self.temperature
        spread = (2.0 * h * heat(time, self.onset)).sqrt()
        x = state.x + (per_chain(spread.to(z.dtype), z) * z - h * state.grad)
        kept, gone = restarted(State(x, *evaluate(energy, x), state.origin))
        time = torch.where(gone, began, time + self.step_size)
        return kept._replace(memory=(time, began)), Info(torch.ones_like(kept.energy), gone.to(kept.energy.dtype))


def heat(time: Tensor, onset: Scalar) -> Tensor:
    """Part of the temperature that is reached at a time: 0 before the onset, 1 from time 1 on."""
    rising = ((time - onset) / (1.0 - onset)).clamp(0.0, 1.0)
    # With an onset of 1 the ramp is a step, and divides by zero at it.
    return torch.where(time >= 1.0, torch.ones_like(time), rising)


def check_onset(onset: Scalar) -> None:
    """Refuse an onset of noise that does not lie between 0 and 1; tensors are not read.

    Raises
    ------
    OptionError
        With the value.
    """
    if isinstance(onset, (int, float)) and not 0.0 <= onset <= 1.0:
        raise OptionError(f"onset is the time from which noise is added, from 0 (noise) to 1 (data); got {onset}.")
