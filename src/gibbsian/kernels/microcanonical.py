r"""Microcanonical kernels: velocities of length one, bent by the gradient, that visit x as :math:`e^{-E(x)}`.

The dynamics :math:`\dot x = u`, :math:`\dot u = -(1 - u u^T) \nabla E(x) / (d - 1)` keeps :math:`|u| = 1` and leaves
:math:`e^{-E(x)}` times the uniform law of directions invariant. It is solved in parts: a drift :math:`x + hu`, and a
turn, which for a fixed gradient g, with :math:`e = -g/|g|` and :math:`\delta = h|g| / (d - 1)`, is

.. math:: u' = \frac{u + e\,(\sinh\delta + (e \cdot u)(\cosh\delta - 1))}{\cosh\delta + (e \cdot u)\sinh\delta},

and shrinks areas of the sphere by the denominator to the power d - 1, that is by :math:`e^{\Delta K}`,
:math:`\Delta K = (d - 1) \log(\cosh\delta + (e \cdot u)\sinh\delta)`. Then :math:`W = \Delta E + \sum \Delta K`, the
error in energy of a trajectory, is zero for the exact dynamics, and :math:`e^{-W}` is its Metropolis ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import (
    Info,
    State,
    check_carried,
    evaluate,
    metropolis,
    per_chain,
    restarted,
    row_sum,
    settings_repr,
    with_origin,
)
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals, normals_and_uniforms
from gibbsian.kernels.parts import follow
from gibbsian.kernels.scales import check_scale, over_chains, stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar

LEAPFROG = (0.5, 0.5)
MINIMAL_NORM = (0.1931833275037836, 0.6136333449924328, 0.1931833275037836)
"""Parts of a step that its turns take, with equal drifts between them.

The second makes the leading error of a step least: `On the numerical integration of ordinary differential equations by
symmetric composition methods (McLachlan, 1995) <https://doi.org/10.1137/0916010>`_. It costs two gradients.
"""


@dataclass(frozen=True)
class MCLMC:
    r"""Microcanonical Langevin Monte Carlo: one step of the dynamics, and a direction forgotten bit by bit.

    Nothing is rejected, so the law has a bias of second order in the step size; `tune_mclmc` finds the length, and a
    step size at which the bias is small. The detail ``energy_change`` is W; for a step that leaves the numbers it is
    NaN.

    `Microcanonical Hamiltonian Monte Carlo (Robnik, De Luca, Silverstein & Seljak, 2023)
    <https://arxiv.org/abs/2212.08549>`_; `Fluctuation without dissipation: Microcanonical Langevin Monte Carlo (Robnik
    & Seljak, 2023) <https://arxiv.org/abs/2303.18221>`_.

    Parameters
    ----------
    step_size
        h, in units of x (a pure number when there is a scale), of a minimal-norm step; one, or one per chain ``(n,)``.
    length
        What a chain travels until its direction is forgotten, in the same units: the direction keeps
        :math:`e^{-h/\mathrm{length}}` of itself in a step.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; chains then move where the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    length: Scalar
    scale: Tensor | None = None

    gradients = 2
    gradients_together = 4
    domain = "real"
    adjusted = False
    details = ("energy_change",)
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("length", self.length)
        check_scale(self.scale)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, and remember it as the place to return to; there is no direction yet."""
        check_dim(self, x)
        check_scale(self.scale, x)
        return with_origin(State(x, *evaluate(energy, x), momentum=(torch.zeros_like(x),)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x."""
        check_carried(self, state, origin=3, momentum=1)
        return (normals(steps, state.x, rng),)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Forget some of the direction, then drift and turn."""
        h = self.step_size
        ratio = torch.as_tensor(h / self.length, dtype=state.x.dtype, device=state.x.device)
        spread = (-torch.expm1(-2.0 * ratio) / state.x[0].numel()).sqrt()
        # Without a direction, at the start and after a restart, noise alone gives one: uniform over all.
        u = over_chains((-ratio).exp(), state.x) * state.momentum[0] + over_chains(spread, state.x) * noise[0]
        new, u, kinetic = trajectory(energy, state, u, h, 1, MINIMAL_NORM, self.scale)
        change = new.energy - state.energy + kinetic
        kept, gone = restarted(new)
        kept = kept._replace(momentum=(torch.where(per_chain(gone, u), 0.0, u),))
        return kept, Info(torch.ones_like(change), gone.to(change.dtype), {"energy_change": change})


@dataclass(frozen=True)
class AdjustedMCLMC:
    r"""Metropolis-adjusted microcanonical dynamics: a fresh direction, a leapfrog trajectory, one accept/reject step.

    Accepted with probability :math:`\min(1, e^{-W})`, hence exact at any step size. HMC's momenta have a random length;
    here every trajectory has speed one.

    `Metropolis adjusted microcanonical Hamiltonian Monte Carlo (Robnik, Cohn-Gordon & Seljak, 2025)
    <https://arxiv.org/abs/2503.01707>`_; the best acceptance is about 0.9.

    Parameters
    ----------
    step_size
        Length of a leapfrog step, in units of x (a pure number when there is a scale).
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
    target_acceptance = 0.9
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
        check_dim(self, x)
        check_scale(self.scale, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Normals that point somewhere, then one uniform number per chain, and with jitter another."""
        check_carried(self, state)
        return normals_and_uniforms(steps, state.x, rng, uniforms=1 if self.jitter is None else 2)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One trajectory."""
        h = self.step_size
        if self.jitter is not None:
            h = h * (1.0 + self.jitter * (2.0 * noise[2] - 1.0))
        new, _, kinetic = follow(trajectory, energy, self, state, noise[0], h, LEAPFROG, self.scale)
        return metropolis(state, new, state.energy - new.energy - kinetic, noise[1])


def trajectory(
    energy: EnergyFn,
    state: State,
    u: Tensor,
    step_size: Scalar,
    steps: int,
    turns: tuple[float, ...],
    scale: Tensor | None = None,
) -> tuple[State, Tensor, Tensor]:
    """Follow the dynamics by turns and drifts; as many gradients a step as there are drifts in it.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    state
        Where it starts; its gradient is used.
    u
        Directions of the shape of x, in round coordinates, of any length: the first turn makes it one.
    step_size, steps
        Length (one, or one per chain) and number of the steps.
    turns
        Parts of a step for its turns: ``LEAPFROG`` or ``MINIMAL_NORM``.
    scale
        The map from round coordinates to those of x.

    Returns
    -------
    state, u, kinetic
        At the end, and the sum of the turns' changes, ``(n,)``. Started from there with ``-u``, the trajectory leads
        back and the sum is its negative.
    """
    drift = over_chains(step_size, u) * (1.0 / (len(turns) - 1))
    # The closing turn of one step and the opening one of the next are one turn.
    parts = (*turns[1:-1], turns[-1] + turns[0]) * (steps - 1) + turns[1:]
    new = state
    u, kinetic = turn(u, stretch_gradient(scale, new.grad), turns[0] * step_size)
    for part in parts:
        x = new.x + stretch(scale, drift * u)
        new = State(x, *evaluate(energy, x), state.origin, state.momentum, state.memory)
        u, change = turn(u, stretch_gradient(scale, new.grad), part * step_size)
        kinetic = kinetic + change
    return new, u, kinetic


def turn(u: Tensor, grad: Tensor, time: Scalar) -> tuple[Tensor, Tensor]:
    r"""Bring directions to length one, turn them downhill for a while, and return them with :math:`\Delta K`, ``(n,)``.

    Both are written in :math:`\zeta = e^{-\delta}`, which never overflows; the logarithm keeps its digits for small
    turns. One pass over the coordinates makes three sums, and a second one the new direction.

    Parameters
    ----------
    u, grad
        Directions of any length but zero, and gradients, ``(n, *event)``.
    time
        For how long: one, or one per chain.
    """
    dim = u[0].numel()
    size, length = row_sum(grad * grad).sqrt(), row_sum(u * u).sqrt()
    angle = time * size / (dim - 1)
    size = size.clamp_min(torch.finfo(size.dtype).tiny)
    cosine = (-row_sum(u * grad) / length / size).clamp(-1.0, 1.0)
    zeta, rest = torch.exp(-angle), -torch.expm1(-angle)
    whole = (1.0 + cosine) + zeta * zeta * (1.0 - cosine)
    keep, pull = 2.0 * zeta / (whole * length), rest * (1.0 + zeta + cosine * rest) / (whole * size)
    change = (dim - 1) * (angle + torch.log1p(-0.5 * (1.0 - cosine) * rest * (1.0 + zeta)))
    # Straight uphill and steep, a direction is lost to rounding; then the change is no number, and nothing is accepted.
    return per_chain(keep, u) * u - per_chain(pull, u) * grad, torch.where(change > -torch.inf, change, torch.nan)


def check_dim(kernel: object, x: Tensor) -> None:
    """Refuse points of a single coordinate, where a velocity of length one cannot turn.

    Raises
    ------
    ShapeError
        If there is but one.
    """
    if x.ndim < 2 or x[0].numel() < 2:
        raise ShapeError(
            f"{type(kernel).__name__} turns a velocity of constant length, which takes points of 2 or more "
            f"coordinates; got shape {tuple(x.shape)}. On the line use HMC or MALA."
        )
