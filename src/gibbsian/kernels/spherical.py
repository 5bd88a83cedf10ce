r"""Hamiltonian Monte Carlo on the unit sphere, along great circles.

The density :math:`e^{-E(x)}` is taken against the area of the sphere :math:`|x| = 1`. Without a force, a point with a
tangent velocity v moves along its great circle,

.. math:: x(t) = x \cos |v| t + \frac{v}{|v|} \sin |v| t, \qquad v(t) = v \cos |v| t - x\,|v| \sin |v| t,

which preserves the area of positions and velocities together; a kick takes the tangent part of the gradient,
:math:`v \leftarrow v - t\,(I - x x^T) \nabla E(x)`, and leaves positions. Kick, arc and kick in turn are reversible, so
the Metropolis ratio of the Hamiltonian :math:`E(x) + |v|^2 / 2` makes the kernel exact, as over the reals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, metropolis, per_chain, row_sum, settings_repr
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.kernels.scales import over_chains
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class SphericalHMC:
    """Geodesic Hamiltonian Monte Carlo on the unit sphere of ``d`` dimensions, for points ``(n, d)``.

    `Geodesic Monte Carlo on embedded manifolds (Byrne & Girolami, 2013) <https://doi.org/10.1111/sjos.12036>`_.

    Parameters
    ----------
    step_size
        Time between kicks; a velocity has length near the square root of d - 1, in radians per unit of time. One, or
        one per chain ``(n,)``.
    leapfrog
        Arcs per trajectory; each costs one gradient.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    ShapeError, DomainError
        In ``init``, if the chains are not vectors of two or more coordinates, or not of unit length.
    """

    step_size: Scalar
    leapfrog: int = 10

    domain = "sphere"
    target_acceptance = 0.8
    details = ("hamiltonian",)
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        if self.leapfrog < 1:
            raise OptionError(f"leapfrog counts the steps of a trajectory, 1 or more; got {self.leapfrog}.")

    @property
    def gradients(self) -> int:
        """One per arc."""
        return self.leapfrog

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, which must lie on the sphere; what precision it lacks is made up."""
        if x.ndim != 2 or x.shape[1] < 2:
            raise ShapeError(f"Points on a sphere are vectors (n, d) with d of 2 or more; got shape {tuple(x.shape)}.")
        length = torch.linalg.vector_norm(x, dim=1)
        off = ~((length - 1.0).abs() < 100.0 * torch.finfo(x.dtype).eps)
        if bool(off.any()):
            raise DomainError(
                f"{int(off.sum())} of {len(x)} chains start off the unit sphere, with lengths from "
                f"{float(length.min()):.6g} to {float(length.max()):.6g}; divide each row by its length."
            )
        x = normalised(x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Normals of the shape of x, whose tangent part is the velocity, then one uniform number per chain."""
        check_carried(self, state)
        return normals_and_uniforms(steps, state.x, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One trajectory."""
        z, uniform = noise
        v = tangent(state.x, z)
        before = state.energy + 0.5 * row_sum(v * v)
        new, v = geodesic_leapfrog(energy, state, v, self.step_size, self.leapfrog)
        log_ratio = before - new.energy - 0.5 * row_sum(v * v)
        return metropolis(state, new, log_ratio, uniform, {"hamiltonian": before})


def geodesic_leapfrog(energy: EnergyFn, state: State, v: Tensor, step_size: Scalar, steps: int) -> tuple[State, Tensor]:
    """Follow a trajectory: half a kick, then arcs and kicks in turn, and half a kick.

    Parameters
    ----------
    energy
        Batched: ``(n, d) -> (n,)``; its gradient may point off the sphere.
    state
        Where it starts; its gradient is used, so each arc costs one.
    v
        Velocity at the start, tangent, ``(n, d)``.
    step_size, steps
        Time (one, or one per chain) and number of the arcs.

    Returns
    -------
    state, v
        At the end. Started from there with ``-v``, the trajectory leads back.
    """
    h = over_chains(step_size, v)
    new = state
    v = v - 0.5 * h * tangent(new.x, new.grad)
    for i in range(steps):
        x, v = arc(new.x, v, h)
        new = State(x, *evaluate(energy, x))
        v = v - (h if i < steps - 1 else 0.5 * h) * tangent(x, new.grad)
    return new, v


def arc(x: Tensor, v: Tensor, t: Scalar) -> tuple[Tensor, Tensor]:
    """Move along the great circle of a tangent velocity for a time; rounding is taken out of both at the end."""
    speed = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    angle = speed * t
    cos, sin = angle.cos(), angle.sin()
    # sinc(a / pi) = sin a / a is smooth at rest, where v / |v| is not.
    end = normalised(x * cos + v * (t * torch.sinc(angle / torch.pi)))
    return end, tangent(end, v * cos - x * (speed * sin))


def tangent(x: Tensor, v: Tensor) -> Tensor:
    """Take from vectors ``(n, d)`` what points along the unit vectors x."""
    return v - per_chain(row_sum(x * v), v) * x


def normalised(x: Tensor) -> Tensor:
    """Bring vectors ``(n, d)`` to unit length."""
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
