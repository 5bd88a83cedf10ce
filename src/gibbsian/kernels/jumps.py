r"""Local moves between jumps: a kernel of small steps, and independent proposals from a density, in turn.

Local moves explore where a chain stands and cannot cross barriers; a learned density proposes from anywhere and is
wrong in details. Each step makes one of the local kernel's and then tries several proposals, each accepted with the
ratio of importance weights, as in `IndependentMH`. Both leave the target as it is, and so does their composition.

`Adaptive Monte Carlo augmented with normalizing flows (Gabrié, Rotskoff & Vanden-Eijnden, 2022)
<https://arxiv.org/abs/2105.12603>`_.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import Info, Kernel, State, evaluate, is_adjusted, metropolis, settings_repr
from gibbsian.kernels.independent import IndependentMH, proposed
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class Jumps:
    """A local kernel with jumps to proposals of a density of their own.

    Parameters
    ----------
    kernel
        Of local moves with gradients, such as ``HMC``; one that carries nothing but these from step to step.
    proposal
        As for `IndependentMH`: draws by ``sample(n, rng)``, and -log q when called.
    tries
        Proposals after each local step; each costs one evaluation with its gradient.

    Raises
    ------
    ArgumentTypeError
        If the kernel is none or leaves its target biased, or the proposal has no draws or no density.
    OptionError
        If there is no try.
    """

    kernel: Any
    proposal: Any
    tries: int = 1

    domain = ("real", "box", "torus", "sphere")
    details = ("jump_acceptance",)
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        IndependentMH(self.proposal)
        if not isinstance(self.kernel, Kernel) or not is_adjusted(self.kernel):
            raise ArgumentTypeError(
                f"Jumps takes a local kernel that leaves the target as it is, such as HMC or MALA; got {self.kernel!r}."
            )
        if isinstance(self.tries, bool) or not isinstance(self.tries, int) or self.tries < 1:
            raise OptionError(f"tries counts the proposals after each local step, 1 or more; got {self.tries!r}.")

    @property
    def gradients(self) -> int:
        """Those of the local kernel, and one of each proposal."""
        return self.kernel.gradients + self.tries

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start.

        Raises
        ------
        ArgumentTypeError
            If the local kernel carries more than positions, energies and gradients.
        ShapeError, DomainError
            As `IndependentMH` does.
        """
        IndependentMH(self.proposal).init(energy, x)
        state = self.kernel.init(energy, x)
        if state.grad.shape != x.shape or state.origin or state.momentum or state.memory:
            raise ArgumentTypeError(
                f"{type(self.kernel).__name__} carries more from step to step than positions, energies and gradients, "
                "or has no gradients, and a jump would leave that behind: take HMC or MALA."
            )
        return state

    @torch.no_grad()
    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """The proposals, their -log q, a uniform number for each, and then the local kernel's noise, step by step."""
        x, n = state.x, len(state.x)
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(steps):
            points, costs = (t.to(x.dtype) for t in proposed(self.proposal, self.tries * n, rng))
            uniform = torch.rand((self.tries, n), generator=rng, dtype=x.dtype, device=x.device)
            inner = self.kernel.noise(state, 1, rng)
            tries = points.unflatten(0, (self.tries, n)), costs.unflatten(0, (self.tries, n)), uniform
            rows.append((*tries, *(t[0] for t in inner)))
        return tuple(torch.stack(column) for column in zip(*rows))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One local step, then the jumps."""
        points, costs, uniforms, *inner = noise
        state, info = self.kernel.step(energy, state, tuple(inner))
        accepted, lost = torch.zeros_like(info.acceptance), info.nonfinite
        cost = self.proposal(state.x).detach().to(state.energy.dtype)
        for x, new_cost, uniform in zip(points, costs, uniforms):
            new = State(x, *evaluate(energy, x))
            log_ratio = (state.energy - cost) - (new.energy - new_cost)
            state, jump = metropolis(state, new, log_ratio, uniform)
            cost = torch.where(uniform < jump.acceptance, new_cost, cost)
            accepted, lost = accepted + jump.acceptance / self.tries, lost + jump.nonfinite
        return state, Info(info.acceptance, lost, {"jump_acceptance": accepted})
