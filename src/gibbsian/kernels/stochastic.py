r"""Stochastic-gradient kernels: unadjusted steps on an energy that is estimated from a few rows of data at a time.

With :math:`\hat g_t` an unbiased estimate of :math:`\nabla E` from rows drawn anew for each step, the Langevin step is

.. math:: x' = x - h\,\hat g_t(x) + \sqrt{2h}\, z, \qquad z \sim N(0, I).

The variance V of the estimate adds :math:`h^2 V` to the :math:`2h` of the noise. It is not corrected for: the chain is
too warm by a share of :math:`h V / 2`, besides the discretisation's bias, and both vanish with h.

The rows are part of a step's noise: drawn without replacement, independently for each step, and the same for all
chains, so that a term is computed for a block of chains and rows at once. Chains of one run therefore share the errors
of their estimates, and are not independent: their spread at one time does not show it, only time does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
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

FEW = 4096
"""Rows up to which a whole permutation is as fast as drawing until there are no repeats."""


@dataclass(frozen=True)
class SGLD:
    r"""Stochastic-gradient Langevin dynamics: the Euler step on estimated gradients, at a constant step size.

    The first step uses the full gradient at the start; each step then estimates energy and gradient where it arrives,
    and the state holds those estimates. A chain that leaves the numbers returns to where it started, and is counted. To
    decrease the step size, as the paper does, continue from a returned state with a smaller one.

    `Bayesian learning via stochastic gradient Langevin dynamics (Welling & Teh, 2011)
    <https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf>`_; with the estimates of
    ``energy.around(centre)`` it is the SGLD-CV of `Control variates for stochastic gradient MCMC (Baker, Fearnhead, Fox
    & Nemeth, 2019) <https://arxiv.org/abs/1706.05439>`_.

    Parameters
    ----------
    step_size
        h, in squared units of x per nat; half the paper's.
    rows
        Rows of the energy's data, ``energy.rows``.
    batch_size
        Rows of an estimate.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; the step is then taken where the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    rows: int
    batch_size: int
    scale: Tensor | None = None

    gradients = 1
    domain = "real"
    adjusted = False
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_rows(self.rows, self.batch_size)
        check_scale(self.scale)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the full energy at the start, and remember it as the place to return to."""
        check_scale(self.scale, x)
        check_energy(self, energy)
        return with_origin(State(x, *evaluate(energy, x)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, and the numbers of rows, ``(steps, 1, batch_size)``."""
        check_carried(self, state, origin=3)
        return normals_and_rows(self, state, steps, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One Euler step, and an estimate where it leads."""
        h = over_chains(self.step_size, state.x)
        x = euler_step(state, h, (2.0 * h) ** 0.5 * noise[0], self.scale)
        kept, gone = restarted(State(x, *evaluate(estimated(self, energy, noise), x), state.origin))
        return kept, unadjusted(kept, gone)


@dataclass(frozen=True)
class SGHMC:
    r"""Stochastic-gradient Hamiltonian Monte Carlo: momentum with friction, which damps the noise of the estimates.

    .. math:: x' = x + h v, \qquad
       v' = (1 - h\gamma)\, v - h\,\hat g(x') + \sqrt{2h(\gamma - \hat B)}\, z.

    Estimates of variance V bring noise of variance :math:`h^2 V` into a step's velocity, which is that of a friction
    :math:`B = h V / 2`; where an estimate :math:`\hat B` of it is given, so much less noise is added. Without one
    (:math:`\hat B = 0`) chains are too warm by about a share of :math:`B / \gamma`. Unadjusted: no trajectory is ever
    refused. Velocities start from zero; a chain that leaves the numbers returns to where it started, at rest.

    `Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin, 2014) <https://arxiv.org/abs/1402.4102>`_.

    Parameters
    ----------
    step_size
        h, in units of x.
    friction
        :math:`\gamma`, per unit of h: velocities are forgotten in :math:`1 / (h \gamma)` steps.
    rows, batch_size
        As for `SGLD`; ``None`` both for whole gradients, of any energy.
    gradient_noise
        :math:`\hat B`, a number or one per coordinate, ``friction`` at most (in round coordinates, with a scale);
        ``None`` for 0.
    scale
        As for `SGLD`.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    friction: Scalar
    rows: int | None = None
    batch_size: int | None = None
    gradient_noise: Scalar | None = None
    scale: Tensor | None = None

    gradients = 1
    domain = "real"
    adjusted = False
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("friction", self.friction)
        check_rows(self.rows, self.batch_size)
        check_scale(self.scale)
        h, friction, known = self.step_size, self.friction, self.gradient_noise
        if isinstance(h, (int, float)) and isinstance(friction, (int, float)) and h * friction > 1.0:
            raise OptionError(
                f"step_size times friction is the share of a velocity that a step forgets, 1 at most; got {h:g} times "
                f"{friction:g}."
            )
        if isinstance(known, (int, float)) and isinstance(friction, (int, float)) and not 0.0 <= known <= friction:
            raise OptionError(
                f"gradient_noise is a part of the friction, between 0 and {friction:g}; got {known}. Where the "
                "estimates are noisier than that, take larger minibatches, control variates or a smaller step."
            )

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the full energy at the start; velocities are zero."""
        check_scale(self.scale, x)
        check_energy(self, energy)
        return with_origin(State(x, *evaluate(energy, x), momentum=(torch.zeros_like(x),)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, and the numbers of rows, ``(steps, 1, batch_size)``."""
        check_carried(self, state, origin=3, momentum=1)
        return normals_and_rows(self, state, steps, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Drift, estimate, kick."""
        (v,), h = state.momentum, over_chains(self.step_size, state.x)
        x = state.x + stretch(self.scale, h * v)
        kept, gone = restarted(State(x, *evaluate(estimated(self, energy, noise), x), state.origin))
        friction = over_chains(self.friction, x)
        added = friction if self.gradient_noise is None else friction - self.gradient_noise
        kick = (2.0 * h * added) ** 0.5 * noise[0] - h * stretch_gradient(self.scale, kept.grad)
        v = torch.where(per_chain(gone, v), 0.0, (1.0 - h * friction) * v + kick)
        return kept._replace(momentum=(v,)), unadjusted(kept, gone)


@dataclass(frozen=True)
class CyclicalSGLD:
    r"""Langevin steps that start each cycle long and end it short: they leave a mode, find another, then sample it.

    Step k of a cycle of K steps, counted from 0, has the size

    .. math:: h_k = \frac{h_0}{2} \Big[1 + \cos \frac{\pi k}{K}\Big],

    and while :math:`k / K` is below ``exploration`` it adds no noise: plain descent on estimates, which a long step
    throws from mode to mode. The steps behind sample, and only their positions are draws: with ``thin`` set, they are
    where ``samples.kept["sampling"]`` is 1. How often each mode is visited follows from the dynamics, not from its
    mass. Each chain counts its own steps in ``state.memory``, so that a returned state goes on in mid-cycle.

    `Cyclical stochastic gradient MCMC for Bayesian deep learning (Zhang et al., 2020)
    <https://arxiv.org/abs/1902.03932>`_.

    Parameters
    ----------
    step_size
        :math:`h_0`, the longest, in squared units of x per nat; the paper's :math:`\alpha_0`.
    cycle
        K, steps of a cycle.
    rows, batch_size
        As for `SGLD`; ``None`` both for whole gradients, of any energy.
    exploration
        The share of a cycle that explores, from 0 to below 1.
    scale
        As for `SGLD`.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    cycle: int
    rows: int | None = None
    batch_size: int | None = None
    exploration: Scalar = 0.25
    scale: Tensor | None = None

    gradients = 1
    domain = "real"
    adjusted = False
    details = ("step_size", "sampling")
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_rows(self.rows, self.batch_size)
        check_scale(self.scale)
        if self.cycle < 1:
            raise OptionError(f"cycle counts the steps of a cycle, 1 or more; got {self.cycle}.")
        if isinstance(self.exploration, (int, float)) and not 0.0 <= self.exploration < 1.0:
            raise OptionError(f"exploration is a share of a cycle, from 0 to below 1; got {self.exploration}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the full energy at the start; all chains begin a cycle."""
        check_scale(self.scale, x)
        check_energy(self, energy)
        begun = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return with_origin(State(x, *evaluate(energy, x), memory=(begun,)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, and the numbers of rows, ``(steps, 1, batch_size)``."""
        check_carried(self, state, origin=3, memory=1)
        return normals_and_rows(self, state, steps, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One Euler step of the size that the cycle has come to, and an estimate where it leads."""
        (k,) = state.memory
        share = k.to(state.energy.dtype) / self.cycle
        h = 0.5 * self.step_size * (1.0 + (math.pi * share).cos())
        sampling = (share >= self.exploration).to(h.dtype)
        wide = per_chain(h, state.x)
        x = euler_step(state, wide, per_chain(sampling * (2.0 * h) ** 0.5, state.x) * noise[0], self.scale)
        kept, gone = restarted(State(x, *evaluate(estimated(self, energy, noise), x), state.origin))
        kept = kept._replace(memory=((k + 1) % self.cycle,))
        return kept, unadjusted(kept, gone)._replace(details={"step_size": h, "sampling": sampling})


def euler_step(state: State, h: Scalar, noise: Tensor, scale: Tensor | None) -> Tensor:
    """Where a step of size h downhill and some noise, both in round coordinates, lead from a state."""
    return state.x + stretch(scale, noise - h * stretch_gradient(scale, state.grad))


def unadjusted(kept: State, gone: Tensor) -> Info:
    """What a step that is never refused reports: which chains had to restart."""
    return Info(torch.ones_like(kept.energy), gone.to(kept.energy.dtype))


def estimated(kernel: Any, energy: Any, noise: tuple[Tensor, ...]) -> EnergyFn:
    """The energy as a step sees it: estimated from the rows of its noise, or whole where there are none."""
    if kernel.batch_size is None:
        return energy
    check_energy(kernel, energy)
    return energy.on(noise[1][0])


def normals_and_rows(kernel: Any, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
    """Draw normals of the shape of x, and without replacement the rows of each step, step by step.

    Rows have the shape ``(steps, 1, batch_size)``: one row of noise, for all chains, cannot be taken for noise that
    has a part for each.
    """
    if kernel.batch_size is None:
        return (normals(steps, state.x, rng),)
    z, index = [], []
    for _ in range(steps):
        z.append(normals(1, state.x, rng))
        index.append(draw_rows(kernel.rows, kernel.batch_size, rng, state.x.device))
    return torch.cat(z), torch.stack(index)[:, None]


def draw_rows(rows: int, count: int, rng: Generator, device: torch.device) -> Tensor:
    """Draw a set of rows, all sets equally likely: ``(count,)`` of int64.

    Parameters
    ----------
    rows
        From how many.
    count
        How many.
    rng
        The generator.
    device
        Its device, and the chains'.
    """
    if rows <= max(FEW, 8 * count) or device.type != "cpu":
        return torch.randperm(rows, generator=rng, device=device)[:count].clone()
    # The first distinct values of a sequence of draws are a set without replacement; never more are drawn than lack.
    chosen = torch.randint(rows, (count,), generator=rng).unique()
    while len(chosen) < count:
        chosen = torch.cat((chosen, torch.randint(rows, (count - len(chosen),), generator=rng))).unique()
    return chosen


def check_rows(rows: int | None, batch_size: int | None) -> None:
    """Refuse minibatches that the data cannot give.

    Raises
    ------
    OptionError
        With the numbers.
    """
    if (rows is None) != (batch_size is None):
        raise OptionError(
            f"Minibatches need rows (energy.rows) and batch_size, and whole gradients neither; got rows={rows} and "
            f"batch_size={batch_size}."
        )
    if rows is not None and batch_size is not None and not 1 <= batch_size <= rows:
        raise OptionError(f"batch_size lies between 1 and the rows of the data, {rows}; got {batch_size}.")


def check_energy(kernel: Any, energy: Any) -> None:
    """Refuse an energy that cannot be estimated from rows, or that has another number of them than the kernel says.

    Raises
    ------
    ArgumentTypeError, ShapeError
        With what fits.
    """
    if kernel.batch_size is None:
        return
    name, rows = type(kernel).__name__, getattr(energy, "rows", None)
    if rows is None or getattr(energy, "on", None) is None:
        raise ArgumentTypeError(
            f"{name} with minibatches needs an energy with on(index) and rows, as MinibatchEnergy; got {energy!r}. A "
            "sum or multiple of one is none: give a prior to MinibatchEnergy itself. ULA follows the whole gradient of "
            "any energy."
        )
    if rows != kernel.rows:
        raise ShapeError(f"{name} draws from rows={kernel.rows} rows, and the energy has {rows}; pass energy.rows.")
