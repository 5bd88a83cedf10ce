r"""Hamiltonian Monte Carlo: fresh momentum, a leapfrog trajectory, one accept/reject step.

With the Hamiltonian :math:`H(x, v) = E(x) + |v|^2 / 2`, leapfrog preserves volume and is reversible, so the Metropolis
ratio is :math:`e^{H - H'}`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, metropolis, row_sum, settings_repr
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.kernels.parts import follow
from gibbsian.kernels.scales import check_scale, over_chains, stretch, stretch_gradient
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
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; trajectories then run where the target is round. ``None`` for all 1.
    jitter
        Between 0 and 1: every trajectory of every chain takes a step size drawn uniformly within this fraction of
        ``step_size``, so that no trajectory length stays in resonance. ``None`` for none.

    Raises
    ------
    OptionError
        If a setting is out of its range, or there is no leapfrog step.
    """

    step_size: Scalar
    leapfrog: int = 10
    scale: Tensor | None = None
    jitter: Scalar | None = None

    domain = "real"
    parted = True
    target_acceptance = 0.8
    details = ("hamiltonian",)
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_scale(self.scale)
        if isinstance(self.jitter, (int, float)) and not 0.0 < self.jitter <= 1.0:
            raise OptionError(f"jitter is a fraction of the step size above 0, 1 at most; got {self.jitter}.")
        if self.leapfrog < 1:
            raise OptionError(f"leapfrog counts the steps of a trajectory, 1 or more; got {self.leapfrog}.")

    @property
    def gradients(self) -> int:
        """One per leapfrog step."""
        return self.leapfrog

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_scale(self.scale, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Momenta, then one uniform number per chain, and with jitter another."""
        check_carried(self, state)
        if self.jitter is None:
            return normals_and_uniforms(steps, state.x, rng)
        return normals_and_uniforms(steps, state.x, rng, uniforms=2)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One trajectory."""
        v, uniform = noise[:2]
        h = self.step_size
        if self.jitter is not None:
            h = h * (1.0 + self.jitter * (2.0 * noise[2] - 1.0))
        new, v_end = follow(leapfrog, energy, self, state, v, h, self.scale)
        before = state.energy + 0.5 * row_sum(v * v)
        log_ratio = before - new.energy - 0.5 * row_sum(v_end * v_end)
        return metropolis(state, new, log_ratio, uniform, {"hamiltonian": before})


def leapfrog(
    energy: EnergyFn, state: State, v: Tensor, step_size: Scalar, steps: int, scale: Tensor | None = None
) -> tuple[State, Tensor]:
    """Follow a trajectory: half a kick, then drifts and kicks in turn, and half a kick.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    state
        Where it starts; its gradient is used, so each step costs one.
    v
        Momentum at the start, of the shape of x, in round coordinates.
    step_size, steps
        Length (one, or one per chain) and number of the drifts.
    scale
        The map from round coordinates to those of x.

    Returns
    -------
    state, v
        At the end. Started from there with ``-v``, the trajectory leads back.
    """
    h = over_chains(step_size, v)
    new = state
    v = v - 0.5 * h * stretch_gradient(scale, new.grad)
    for i in range(steps):
        x = new.x + stretch(scale, h * v)
        new = State(x, *evaluate(energy, x))
        # The closing half kick of one step and the opening one of the next are one kick.
        v = v - (h if i < steps - 1 else 0.5 * h) * stretch_gradient(scale, new.grad)
    return new, v
