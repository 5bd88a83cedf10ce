r"""Tempered transitions: one proposal that climbs a ladder of temperatures and comes down again.

From :math:`\hat x_0 = x`, reversible kernels :math:`T_1, \ldots, T_m` lead up through the densities
:math:`p_k \propto e^{-\beta_k E}` and, in the opposite order, down again:

.. math:: \hat x_0 \xrightarrow{T_1} \hat x_1 \ldots \xrightarrow{T_m} \hat x_m = \bar x_m
   \xrightarrow{T_m} \bar x_{m-1} \ldots \xrightarrow{T_1} \bar x_0 .

Each :math:`T_k` is in detailed balance with :math:`p_k`, so the way back from :math:`\bar x_0` has the probability of
the way there but for the ratios of densities where the temperature changes, and :math:`\bar x_0` is accepted with
probability

.. math:: \min\Bigl(1, \prod_{k=1}^{m} \frac{p_k(\hat x_{k-1})}{p_{k-1}(\hat x_{k-1})}\,
   \frac{p_{k-1}(\bar x_{k-1})}{p_k(\bar x_{k-1})}\Bigr)
   = \min\Bigl(1, e^{\sum_k (\beta_{k-1} - \beta_k)(E(\hat x_{k-1}) - E(\bar x_{k-1}))}\Bigr).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, metropolis, settings_repr
from gibbsian.kernels.ladder import Tempered, check_exact, check_kernel, ladder_of, sizes_of, step_inside, with_sizes
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class TemperedTransitions:
    """Tempered transitions around a kernel that is reversible at every temperature, such as MALA, HMC or RandomWalk.

    No replica is kept: memory is that of the chains. A ladder must be finer than one for parallel tempering, since all
    of its changes of temperature are paid in one acceptance.

    `Sampling from multimodal distributions using tempered transitions (Neal, 1996)
    <https://doi.org/10.1007/BF00143556>`_.

    Parameters
    ----------
    kernel
        Each of its steps must be in detailed balance with the density it is given. A kernel that keeps its momentum
        from step to step, or visits coordinates in a fixed order, leaves the density invariant but is not reversible:
        the first is refused, the second is for the caller to know.
    betas
        ``(K,)``, decreasing from 1 to above 0.
    moves
        Steps of the kernel at each of the K - 1 inner levels, on the way up and again on the way down.
    step_sizes
        ``(K,)``, a step size for each level, as `ParallelTempering` has them; the first is not used. ``None`` for the
        kernel's own.

    Raises
    ------
    OptionError, ShapeError
        If the betas are no ladder, the step sizes do not fit it, or there is no move.
    """

    kernel: Any
    betas: Tensor | Sequence[float]
    moves: int = 1
    step_sizes: Tensor | Sequence[float] | None = None

    details = ("inner_acceptance",)
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if self.moves < 1:
            raise OptionError(f"moves counts the kernel's steps at each level, 1 or more; got {self.moves}.")
        object.__setattr__(self, "betas", ladder_of(self.betas))
        object.__setattr__(self, "step_sizes", sizes_of(self.step_sizes, self.betas, self.kernel))

    @property
    def _ladder(self) -> Tensor:
        return cast(Tensor, self.betas)

    @property
    def gradients(self) -> int:
        """Those of every inner step, up and down."""
        return self._inner_steps * self.kernel.gradients

    @property
    def domain(self) -> str | tuple[str, ...]:
        """That of the inner kernel."""
        return self.kernel.domain

    @property
    def dynamic(self) -> bool:
        """Whether the inner kernel's steps differ in length."""
        return bool(getattr(self.kernel, "dynamic", False))

    @property
    def _inner_steps(self) -> int:
        return 2 * (len(self._ladder) - 1) * self.moves

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start.

        Raises
        ------
        OptionError
            If the inner kernel is unadjusted, carries a memory or a momentum, or says that it is not reversible.
        """
        state = self.kernel.init(energy, x)
        check_exact(self, self.kernel, state)
        if state.momentum or not getattr(self.kernel, "reversible", True):
            raise OptionError(
                f"Tempered transitions need a kernel in detailed balance; {type(self.kernel).__name__} goes on in the "
                "direction of its last step. Use MALA, HMC or another reversible kernel."
            )
        return state

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """The inner kernel's for all moves, ``(steps, n, moves, ...)``, then one uniform number per chain."""
        check_carried(self, state, grad=False)
        like, drawn = state.energy, []
        for _ in range(steps):
            inner = self.kernel.noise(state, self._inner_steps, rng)
            u = torch.rand(like.shape, generator=rng, dtype=like.dtype, device=like.device)
            drawn.append((*(z.movedim(0, 1) for z in inner), u))
        return tuple(torch.stack(each) for each in zip(*drawn))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Go up and down, and accept or reject where that led."""
        *inner, uniform = noise
        levels = len(self._ladder)
        path = [*range(1, levels), *range(levels - 1, 0, -1)]
        now, log_ratio, acceptance = state, torch.zeros_like(state.energy), torch.zeros_like(state.energy)
        for i, k in enumerate(path):
            up = i < levels - 1
            gap = self._ladder[k - 1] - self._ladder[k]
            if up:
                log_ratio = log_ratio + gap * now.energy
            now, accepted = self._moved(energy, now, k, [z[:, i * self.moves : (i + 1) * self.moves] for z in inner])
            acceptance = acceptance + accepted
            if not up:
                log_ratio = log_ratio - gap * now.energy
        return metropolis(state, now, log_ratio, uniform, {"inner_acceptance": acceptance / len(path)})

    def _moved(self, energy: EnergyFn, at: State, level: int, noise: list[Tensor]) -> tuple[State, Tensor]:
        """Make the moves of one level; energies and gradients come and go untempered."""
        beta = self._ladder[level]
        kernel = self.kernel
        if self.step_sizes is not None:
            kernel = with_sizes(kernel, cast(Tensor, self.step_sizes)[level].expand(at.x.shape[0]))
        tempered = Tempered(energy, beta)
        state = at._replace(energy=beta * at.energy, grad=beta * at.grad)
        total = torch.zeros_like(at.energy)
        for j in range(self.moves):
            z = tuple(each[:, j] for each in noise)
            state, info = step_inside(kernel, tempered, state, z)
            total = total + info.acceptance
        return state._replace(energy=state.energy / beta, grad=state.grad / beta), total / self.moves
