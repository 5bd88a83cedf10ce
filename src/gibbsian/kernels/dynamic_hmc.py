r"""Hamiltonian Monte Carlo with trajectories of random length, the same for all chains of a step.

A trajectory of one fixed length may be in resonance with some direction of the target and never mix there. With u
uniform on [0, 1), drawn with the noise, a step makes

.. math:: L = \lceil u\, T / h \rceil

leapfrog steps (at least one) of size h: lengths spread evenly up to T. As L depends on neither position nor momentum,
every step is an ordinary Hamiltonian step, exact and reversible.

Leapfrog steps are made a few at a time by a pure function. Those beyond L have size 0, which leaves position and
momentum where they are, so that one compiled graph serves every L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.compilation import made_ready
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, metropolis, row_sum, settings_repr
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.kernels.scales import check_scale, over_chains, stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar

TOGETHER = 5
"""Leapfrog steps of a block: on average half a block is made in vain."""


@dataclass(frozen=True)
class DynamicHMC:
    """Hamiltonian Monte Carlo with a random number of leapfrog steps, which all chains share.

    The kernel of `An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo (Hoffman, Radul &
    Sountsov, 2021) <https://proceedings.mlr.press/v130/hoffman21a.html>`_; `tune_path` finds both of its lengths.
    Unlike in NUTS no chain waits for another, and every gradient made is used.

    Parameters
    ----------
    step_size
        Length of a leapfrog step, in units of x (a pure number when there is a scale); one, or one per chain ``(n,)``.
    path_length
        The longest trajectory, in the same units; the average is half of it.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; trajectories then run where the target is round. ``None`` for all 1.
    max_leapfrog
        No trajectory has more steps, whatever the two lengths.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    path_length: Scalar
    scale: Tensor | None = None
    max_leapfrog: int = 1000

    gradients = 16
    domain = "real"
    dynamic = True
    target_acceptance = 0.651
    details = ("hamiltonian", "leapfrog_steps")
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("path_length", self.path_length)
        check_scale(self.scale)
        if self.max_leapfrog < 1:
            raise OptionError(f"max_leapfrog counts the steps of a trajectory, 1 or more; got {self.max_leapfrog}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_scale(self.scale, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Momenta, a uniform number per chain, and one for all chains of a step, ``(steps,)``."""
        check_carried(self, state)
        drawn = []
        for _ in range(steps):
            z, uniform = normals_and_uniforms(1, state.x, rng)
            share = torch.rand(1, generator=rng, dtype=state.x.dtype, device=state.x.device)
            drawn.append((z, uniform, share))
        z, uniform, share = (torch.cat(each) for each in zip(*drawn))
        return z, uniform, share

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One trajectory."""
        v, uniform, share = noise
        new, v_end, leapfrogs = trajectory(energy, self, state, v, share)
        state, probability, nonfinite, before = made_ready(settle, energy)(state, new, v, v_end, uniform)
        details = {"hamiltonian": before, "leapfrog_steps": leapfrogs.to(before).expand_as(before)}
        return state, Info(probability, nonfinite, details)


def trajectory(
    energy: EnergyFn, kernel: DynamicHMC, state: State, v: Tensor, share: Tensor
) -> tuple[State, Tensor, Tensor]:
    """Follow a trajectory of ``share`` of the path length, not yet accepted.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        Its settings.
    state, v
        Where it starts; v in round coordinates.
    share
        u, a 0-d tensor.

    Returns
    -------
    state, v, leapfrogs
        At the end, and the number of steps, 0-d (``(n,)`` when every chain has a step size of its own).
    """
    h = torch.as_tensor(kernel.step_size, dtype=v.dtype, device=v.device)
    leapfrogs = (share * kernel.path_length / h).ceil().clamp(1, kernel.max_leapfrog).long()
    ready = made_ready(glide, energy)
    new = state
    for done in range(0, int(leapfrogs.max()), TOGETHER):
        new, v = ready(energy, new, v, h, kernel.scale, leapfrogs - done)
    return new, v, leapfrogs


def glide(
    energy: EnergyFn, state: State, v: Tensor, h: Tensor, scale: Tensor | None, left: Tensor
) -> tuple[State, Tensor]:
    """Make the next few leapfrog steps, of which ``left`` at most have a size other than 0."""
    sizes = [over_chains(torch.where(left > i, h, 0.0), v) for i in range(TOGETHER)]
    new = state
    v = v - 0.5 * sizes[0] * stretch_gradient(scale, new.grad)
    for i in range(TOGETHER):
        x = new.x + stretch(scale, sizes[i] * v)
        new = State(x, *evaluate(energy, x), state.origin, state.momentum, state.memory)
        # The closing half kick of one step and the opening one of the next are one kick.
        kick = sizes[i] + sizes[i + 1] if i + 1 < TOGETHER else sizes[i]
        v = v - 0.5 * kick * stretch_gradient(scale, new.grad)
    return new, v


def settle(state: State, new: State, v: Tensor, v_end: Tensor, uniform: Tensor) -> tuple[State, Tensor, Tensor, Tensor]:
    """Accept or reject; also the acceptance, what was not finite, and the Hamiltonian at the start, each ``(n,)``."""
    before = state.energy + 0.5 * row_sum(v * v)
    log_ratio = before - new.energy - 0.5 * row_sum(v_end * v_end)
    kept, info = metropolis(state, new, log_ratio, uniform)
    return kept, info.acceptance, info.nonfinite, before
