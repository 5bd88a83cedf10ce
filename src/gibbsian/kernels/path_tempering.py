r"""Parallel tempering along any path of energies, with kernels that carry what they computed from step to step.

On the levels :math:`1 = \beta_0 > \ldots > \beta_{K-1}` of a path stand energies :math:`U_k`, the target's first, and a
replica of each chain at each. After all have moved, neighbours exchange their points with probability

.. math:: \min\bigl(1, e^{U_k(x_k) + U_{k+1}(x_{k+1}) - U_k(x_{k+1}) - U_{k+1}(x_k)}\bigr),

first the pairs of even k, then those of odd k, so that in every step each pair has its turn. Nothing is asked of the
path but its energies. For Boltzmann machines that is what tempering needs: of a power of a machine the hidden units
cannot be summed out, and of the machines in between (`gibbsian.partition.boltzmann.rbm_path`) alternating Gibbs
sampling draws without a rejection.

Levels are walked one after the other, each as a batch of its chains. A swap asks for the energy of two points at each
other's level: from `RBMGibbs`, which keeps the hidden fields of its points, at the cost of the softplus alone, without
a product with the couplings; from kernels that keep nothing, by evaluating it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, ShapeError
from gibbsian.kernels.base import Info, State, check_carried, per_chain, settings_repr
from gibbsian.kernels.ladder import check_exact, check_kernel, ladder_of, step_inside
from gibbsian.typing import EnergyFn

Rungs: TypeAlias = Callable[[EnergyFn, Tensor], EnergyFn]
"""From the target and a 0-d beta to the energy there: the target itself at 1."""


@dataclass(frozen=True)
class PathTempering:
    """Parallel tempering along a path; the chains that `sample` sees are those at the target.

    `Tempered Markov chain Monte Carlo for training of restricted Boltzmann machines (Desjardins et al., 2010)
    <https://proceedings.mlr.press/v9/desjardins10a.html>`_; `Parallel tempering is efficient for learning restricted
    Boltzmann machines (Cho, Raiko & Ilin, 2010) <https://doi.org/10.1109/IJCNN.2010.5596837>`_. Powers of one energy,
    and step sizes of their own for each level, are `ParallelTempering`'s, at no evaluation for a swap.

    Parameters
    ----------
    kernel
        How replicas move: one that leaves densities invariant. One with a memory must tell how it arrives at another
        energy, as `RBMGibbs` does.
    betas
        ``(K,)``, decreasing from 1, two or more; they may end in 0, where the path does.
    path
        The energy at a level, from the target and beta: `gibbsian.partition.boltzmann.MachineRungs` for RBMs.

    Raises
    ------
    OptionError
        If the betas are no ladder; at the start, if the kernel is unadjusted or has a memory that cannot move.
    ArgumentTypeError
        If there is no kernel, or the path is no function.
    """

    kernel: Any
    betas: Tensor | Sequence[float]
    path: Rungs

    details = ("swap_acceptance",)
    dynamic = True  # The levels are objects made anew, and the loop over them stays eager.
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if not callable(self.path):
            raise ArgumentTypeError(f"The path leads from (energy, beta) to the energy at beta; got {self.path!r}.")
        on_host = not isinstance(self.betas, Tensor) or self.betas.device.type == "cpu"
        zero = on_host and len(self.betas) > 0 and float(self.betas[-1]) == 0.0
        object.__setattr__(self, "betas", ladder_of(self.betas, ends_in_zero=zero))

    @property
    def gradients(self) -> int:
        """Those of the inner kernel, each for K times as many rows."""
        return self.kernel.gradients

    @property
    def domain(self) -> str | tuple[str, ...]:
        """That of the inner kernel."""
        return self.kernel.domain

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Start all replicas of a chain at its point."""
        return self.init_replicas(energy, x.unsqueeze(1).expand(-1, len(self.betas), *x.shape[1:]))

    def init_replicas(self, energy: EnergyFn, x: Tensor, time: int = 0) -> State:
        """Start replicas at points of their own.

        Parameters
        ----------
        energy
            The target.
        x
            ``(n, K, *event)``.
        time
            Not needed: every pair has its turn in every step.

        Raises
        ------
        OptionError
            If the inner kernel is unadjusted, or carries a memory and does not tell how it arrives elsewhere.
        ShapeError
            If there are not K points per chain.
        """
        n, levels = x.shape[:2]
        if levels != len(self.betas):
            raise ShapeError(f"The ladder has {len(self.betas)} levels; got points for {levels} of them.")
        rungs = self._rungs(energy)
        states = [self.kernel.init(rung, x[:, k].contiguous()) for k, rung in enumerate(rungs)]
        moves = hasattr(self.kernel, "arrive")
        check_exact(self, self.kernel, states[0]._replace(memory=()) if moves else states[0])
        like = states[0].energy
        return _joined(states, like.new_zeros((n, levels - 1)), like.new_zeros((n, levels)))

    def points(self, state: State) -> Tensor:
        """Where all replicas stand, the target's first, ``(n, K, *event)``."""
        return state.memory[2]

    def swap_sums(self, state: State) -> Tensor:
        """Acceptance of the swaps of neighbours, summed over the steps since `init`, mean over chains: ``(K - 1,)``."""
        return state.memory[0].mean(0)

    def turns(self, time: int, steps: int) -> list[int]:
        """How often each pair of neighbours has its turn in some steps: in each."""
        return [steps] * (len(self.betas) - 1)

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """The inner kernel's at every level, then a uniform number for every pair of neighbours."""
        states, like = self._split(state), state.energy
        drawn = []
        for _ in range(steps):
            levels = zip(*(self.kernel.noise(each, 1, rng) for each in states))
            shape = (1, len(like), len(states) - 1)
            u = torch.rand(shape, generator=rng, dtype=like.dtype, device=like.device)
            # Levels behind steps, and not behind chains, of which a kernel's noise need not have an axis.
            drawn.append((*(torch.stack(z, 1) for z in levels), u))
        return tuple(torch.cat(each) for each in zip(*drawn))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Move all replicas, then let neighbours swap."""
        rungs, states = self._rungs(energy), self._split(state)
        accepted, lost = [], []
        for k, rung in enumerate(rungs):
            states[k], info = step_inside(self.kernel, rung, states[k], tuple(z[k] for z in noise[:-1]))
            accepted.append(info.acceptance)
            lost.append(info.nonfinite)
        swaps = [torch.zeros_like(state.energy)] * (len(rungs) - 1)
        for k in (*range(0, len(swaps), 2), *range(1, len(swaps), 2)):
            pair = states[k], states[k + 1]
            states[k], states[k + 1], swaps[k] = self._exchanged(rungs[k], rungs[k + 1], *pair, noise[-1][:, k])
        swapped, moved = torch.stack(swaps, 1), torch.stack(accepted, 1)
        new = _joined(states, state.memory[0] + swapped, state.memory[1] + moved)
        return new, Info(accepted[0], torch.stack(lost, 1).amax(1), {"swap_acceptance": swapped.mean(1)})

    def _exchanged(
        self, cold: EnergyFn, hot: EnergyFn, low: State, high: State, uniform: Tensor
    ) -> tuple[State, State, Tensor]:
        """Let two neighbours swap; also the probability that they do."""
        down, up = self._arrived(cold, high, hot), self._arrived(hot, low, cold)
        log_ratio = low.energy + high.energy - down.energy - up.energy
        probability = torch.where(log_ratio.isnan(), 0.0, log_ratio.clamp(max=0.0).exp())
        swap = uniform < probability
        return _either(swap, down, low), _either(swap, up, high), probability

    def _arrived(self, energy: EnergyFn, state: State, before: EnergyFn) -> State:
        if hasattr(self.kernel, "arrive"):
            return self.kernel.arrive(energy, state, before)
        return self.kernel.init(energy, state.x)

    def _rungs(self, energy: EnergyFn) -> list[EnergyFn]:
        return [self.path(energy, beta) for beta in cast(Tensor, self.betas)]

    def _split(self, state: State) -> list[State]:
        """The state of the inner kernel at every level."""
        if len(state.memory) < 5:
            check_carried(self, state, grad=False, memory=5)
        kept = list(state.memory)
        x, energy, grad, memory = kept[2], kept[3], kept[4], kept[5:]
        if x.shape[1] != len(self.betas):
            raise ShapeError(f"The state holds {x.shape[1]} replicas per chain, and the ladder has {len(self.betas)}.")

        def level(k: int) -> State:
            momentum, carried = (tuple(t[:, k] for t in each) for each in (state.momentum, memory))
            return State(x[:, k], energy[:, k], grad[:, k], (), momentum, carried)

        return [level(k) for k in range(x.shape[1])]


def _either(swap: Tensor, new: State, old: State) -> State:
    """Take points, and what is known of them, where they swap; momenta belong to levels."""

    def taken(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(per_chain(swap, a), a, b)

    x, energy, grad = (taken(a, b) for a, b in zip(new[:3], old[:3]))
    return old._replace(x=x, energy=energy, grad=grad, memory=tuple(map(taken, new.memory, old.memory)))


def _joined(states: Sequence[State], swapped: Tensor, moved: Tensor) -> State:
    """The state whose chains are the replicas at the target."""
    x, energy, grad = (torch.stack(t, 1) for t in zip(*(s[:3] for s in states)))
    momentum, memory = (
        tuple(torch.stack(t, 1) for t in zip(*carried))
        for carried in ([s.momentum for s in states], [s.memory for s in states])
    )
    return State(*states[0][:3], (), momentum, (swapped, moved, x, energy, grad, *memory))
