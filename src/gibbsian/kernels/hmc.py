r"""Hamiltonian Monte Carlo: fresh momentum, a leapfrog trajectory, one accept/reject step.

With the Hamiltonian :math:`H(x, v) = E(x) + |v|^2 / 2`, leapfrog preserves volume and is reversible, so the Metropolis
ratio is :math:`e^{H - H'}`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, evaluate, metropolis, row_sum
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    `MCMC using Hamiltonian dynamics (Neal, 2011) <https://arxiv.org/abs/1206.1901>`_; an acceptance near 0.65 is
    best in theory, 0.8 a robust aim.

    Parameters
    ----------
    step_size
        Length of a leapfrog step, in units of x.
    leapfrog
        Leapfrog steps per trajectory; each costs one gradient.

    Raises
    ------
    OptionError
        If the step size is not positive or there is no leapfrog step.
    """

    step_size: Scalar
    leapfrog: int = 10

    domain = "real"
    target_acceptance = 0.8

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        if self.leapfrog < 1:
            raise OptionError(f"leapfrog counts the steps of a trajectory, 1 or more; got {self.leapfrog}.")

    @property
    def gradients(self) -> int:
        """One per leapfrog step."""
        return self.leapfrog

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Momenta, then one uniform number per chain."""
        return normals_and_uniforms(steps, state.x, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One trajectory."""
        v, uniform = noise
        new, v_end = leapfrog(energy, state, v, self.step_size, self.leapfrog)
        log_ratio = state.energy + 0.5 * row_sum(v * v) - new.energy - 0.5 * row_sum(v_end * v_end)
        return metropolis(state, new, log_ratio, uniform)


def leapfrog(energy: EnergyFn, state: State, v: Tensor, step_size: Scalar, steps: int) -> tuple[State, Tensor]:
    """Follow a trajectory: half a kick, then drifts and kicks in turn, and half a kick.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    state
        Where it starts; its gradient is used, so each step costs one.
    v
        Momentum at the start, of the shape of x.
    step_size, steps
        Length and number of the drifts.

    Returns
    -------
    state, v
        At the end. Started from there with ``-v``, the trajectory leads back.
    """
    h = step_size
    new = state
    v = v - 0.5 * h * new.grad
    for i in range(steps):
        x = new.x + h * v
        new = State(x, *evaluate(energy, x))
        # The closing half kick of one step and the opening one of the next are one kick.
        v = v - (h if i < steps - 1 else 0.5 * h) * new.grad
    return new, v
