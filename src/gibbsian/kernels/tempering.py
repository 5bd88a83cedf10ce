r"""Parallel tempering: replicas at several temperatures, of which neighbours swap places.

Along inverse temperatures :math:`1 = \beta_0 > \beta_1 > \ldots > \beta_{K-1}` the energies are

.. math:: U_k = \beta_k E \qquad\text{or, with a base,}\qquad U_k = (1 - \beta_k) B + \beta_k E .

K replicas, one at each level, have the joint density :math:`\prod_k e^{-U_k(x_k)}`. A kernel that leaves every
:math:`e^{-U_k}` invariant moves them; then levels k and k + 1 exchange their points with probability

.. math:: \min\bigl(1, e^{(\beta_k - \beta_{k+1}) (D(x_k) - D(x_{k+1}))}\bigr), \qquad D = E \;\text{or}\; E - B,

for even k in one step and odd k in the next. Under this alternation a replica that moves up tends to go on upwards, and
the rate at which points travel to the hottest level and back stays finite however many levels there are; with pairs
chosen at random it falls as 1 / K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, ShapeError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, per_chain, settings_repr
from gibbsian.kernels.ladder import Tempered, check_exact, check_kernel, ladder_of, sizes_of, step_inside, with_sizes
from gibbsian.typing import EnergyFn


class Replicas(NamedTuple):
    """What parallel tempering carries in the memory of a state: for each chain K levels, the target's first.

    Attributes
    ----------
    x
        Points, ``(n, K, *event)``.
    energy, grad
        The energy E there and its gradient, at temperature 1: ``(n, K)`` and ``(n, K, *event)``, or ``(n, K, 0)`` for
        kernels that use none.
    ends
        For round trips, ``(n, K)``: 0 while a replica has not been at the target's level, then 1 if it was there last,
        2 if it has been at the hottest level since.
    time
        Steps made, ``(n,)``.
    trips
        Round trips completed by all replicas of a chain, ``(n,)``.
    swapped
        Sums over the steps of the acceptance probabilities of swaps between neighbours, ``(n, K - 1)``.
    moved
        Sums over the steps of the acceptance probabilities of the inner kernel, ``(n, K)``.
    base
        With a base, its energies and gradients, shaped as those of E; empty otherwise.
    """

    x: Tensor
    energy: Tensor
    grad: Tensor
    ends: Tensor
    time: Tensor
    trips: Tensor
    swapped: Tensor
    moved: Tensor
    base: tuple[Tensor, ...] = ()


def replicas_of(state: State) -> Replicas:
    """Read the replicas out of a state of `ParallelTempering`."""
    return Replicas(*state.memory[:8], base=state.memory[8:])


@dataclass(frozen=True)
class ParallelTempering:
    """Parallel tempering around a kernel; the chains that `sample` sees are those at the target.

    All replicas move as one batch of n K rows. Energies and gradients travel with the points, untempered, so that a
    swap costs no evaluation.

    `Exchange Monte Carlo method and application to spin glass simulations (Hukushima & Nemoto, 1996)
    <https://doi.org/10.1143/JPSJ.65.1604>`_; `Non-reversible parallel tempering: a scalable highly parallel MCMC scheme
    (Syed, Bouchard-Côté, Deligiannidis & Doucet, 2022) <https://arxiv.org/abs/1905.02939>`_ for the order of the swaps.

    Parameters
    ----------
    kernel
        How replicas move: any kernel that leaves a density invariant and carries no memory of its own between steps.
    betas
        ``(K,)``, decreasing from 1, two or more. `tune_ladder` finds good ones.
    base
        A density that the kernel crosses easily, for the path from it to the target; ``betas`` then end in 0. In single
        precision E is found again from a mixture with the base, to about the precision of the base's energy over beta.
    step_sizes
        ``(K,)``, a step size of the inner kernel for each level; ``None`` for its own at all of them.

    Raises
    ------
    OptionError
        If the betas are no ladder, or the kernel has no step size where some are given.
    ShapeError
        If there is not one step size per level.
    ArgumentTypeError
        If the base is not a function.
    """

    kernel: Any
    betas: Tensor | Sequence[float]
    base: EnergyFn | None = None
    step_sizes: Tensor | Sequence[float] | None = None

    details = ("swap_acceptance", "round_trips")
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if self.base is not None and not callable(self.base):
            raise ArgumentTypeError(f"The base is an energy, from (n, *event) to (n,); got {self.base!r}.")
        object.__setattr__(self, "betas", ladder_of(self.betas, ends_in_zero=self.base is not None))
        object.__setattr__(self, "step_sizes", sizes_of(self.step_sizes, self.betas, self.kernel))

    @property
    def _ladder(self) -> Tensor:
        return cast(Tensor, self.betas)

    @property
    def gradients(self) -> int:
        """Those of the inner kernel, each for K times as many rows."""
        return self.kernel.gradients

    @property
    def domain(self) -> str | tuple[str, ...]:
        """That of the inner kernel."""
        return self.kernel.domain

    @property
    def dynamic(self) -> bool:
        """Whether the inner kernel's steps differ in length."""
        return bool(getattr(self.kernel, "dynamic", False))

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Start all replicas of a chain at its point."""
        levels = len(self._ladder)
        return self.init_replicas(energy, x.unsqueeze(1).expand(-1, levels, *x.shape[1:]).contiguous())

    def init_replicas(self, energy: EnergyFn, x: Tensor, time: int = 0) -> State:
        """Start replicas at points of their own.

        Parameters
        ----------
        energy
            The target.
        x
            ``(n, K, *event)``.
        time
            Steps that they have made before; whose turn it is to swap goes by it.

        Raises
        ------
        OptionError
            If the inner kernel is unadjusted or carries a memory.
        ShapeError
            If there are not K points per chain, or the base takes points of another shape.
        """
        n, levels = x.shape[:2]
        if levels != len(self._ladder):
            raise ShapeError(f"The ladder has {len(self._ladder)} levels; got points for {levels} of them.")
        shape = getattr(self.base, "event_shape", None)
        if shape is not None and tuple(shape) != tuple(x.shape[2:]):
            raise ShapeError(f"The base takes points of shape {tuple(shape)}; the chains are at {tuple(x.shape[2:])}.")
        rows = self.kernel.init(energy, x.flatten(0, 1))
        check_exact(self, self.kernel, rows)
        count = {"dtype": torch.int64, "device": x.device}
        ends = torch.zeros((n, levels), **count)
        ends[:, 0] = 1
        replicas = Replicas(
            *(t.unflatten(0, (n, levels)) for t in rows[:3]),
            ends=ends,
            time=torch.full((n,), time, **count),
            trips=torch.zeros(n, **count),
            swapped=rows.energy.new_zeros((n, levels - 1)),
            moved=rows.energy.new_zeros((n, levels)),
            base=self._at_base(rows),
        )
        return _told(replicas, tuple(v.unflatten(0, (n, levels)) for v in rows.momentum))

    def points(self, state: State) -> Tensor:
        """Where all replicas stand, the target's first, ``(n, K, *event)``."""
        return replicas_of(state).x

    def swap_sums(self, state: State) -> Tensor:
        """Acceptance of the swaps of neighbours, summed over the steps since `init`, mean over chains: ``(K - 1,)``."""
        return replicas_of(state).swapped.mean(0)

    def turns(self, time: int, steps: int) -> list[int]:
        """How often each pair of neighbours has its turn in some steps from a time on."""
        pairs = len(self._ladder) - 1
        return [steps if pairs == 1 else (steps + (time - k + 1) % 2) // 2 for k in range(pairs)]

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """The inner kernel's for all replicas, then a uniform number for every pair of neighbours."""
        check_carried(self, state, grad=False, memory=8 if self.base is None else 10)
        n, levels = replicas_of(state).energy.shape
        if levels != len(self._ladder):
            raise ShapeError(f"The state holds {levels} replicas per chain, and the ladder has {len(self._ladder)}.")
        rows, like = self._rows(state), state.energy
        drawn = []
        for _ in range(steps):
            inner = self.kernel.noise(rows, 1, rng)
            u = torch.rand((1, n, levels - 1), generator=rng, dtype=like.dtype, device=like.device)
            drawn.append((*inner, u))
        return tuple(torch.cat(each) for each in zip(*drawn))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Move all replicas, then swap every other pair of neighbours."""
        old, rows = replicas_of(state), self._rows(state)
        n, levels = old.energy.shape
        kernel = self.kernel
        if self.step_sizes is not None:
            kernel = with_sizes(kernel, cast(Tensor, self.step_sizes).expand(n, levels).reshape(-1))
        new, info = step_inside(kernel, self._tempered(energy, n), rows, noise[:-1])
        acceptance = info.acceptance.unflatten(0, (n, levels))
        moved = self._untempered(energy, old, rows, new)._replace(moved=old.moved + acceptance)
        order, swap, tried = self._order(moved, noise[-1])
        momentum = tuple(v.unflatten(0, (n, levels)) for v in new.momentum)
        there, trips = counted(swapped(moved, order, swap * tried))
        told = {"swap_acceptance": (swap * tried).sum(1) / tried.sum(), "round_trips": trips.to(swap.dtype)}
        nonfinite = info.nonfinite.unflatten(0, (n, levels)).amax(1)
        return _told(there, momentum), Info(acceptance[:, 0], nonfinite, told)

    def _order(self, r: Replicas, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whose point each level takes, ``(n, K)``; the acceptance of each pair; and whether it was its turn."""
        difference = r.energy if self.base is None else r.energy - r.base[0]
        gaps = self._ladder[:-1] - self._ladder[1:]
        log_ratio = gaps * (difference[:, :-1] - difference[:, 1:])
        probability = torch.where(log_ratio.isnan(), 0.0, log_ratio.clamp(max=0.0).exp())
        pair = torch.arange(gaps.shape[0], device=gaps.device)
        # Two replicas have one pair, whose turn is always.
        tried = (pair % 2 == r.time[0] % 2) | (gaps.shape[0] == 1)
        up = ((uniform < probability) & tried).to(torch.int64)
        shift = torch.nn.functional.pad(up, (0, 1)) - torch.nn.functional.pad(up, (1, 0))
        return torch.arange(len(self._ladder), device=gaps.device) + shift, probability, tried.to(probability.dtype)

    def _tempered(self, energy: EnergyFn, n: int) -> Callable[[Tensor], Tensor]:
        """The energy of all replicas as one batch, each row at its level."""
        base = self.base
        if base is None:
            return Tempered(energy, self._ladder.expand(n, -1).reshape(-1))

        def tempered(x: Tensor) -> Tensor:
            points = x.unflatten(0, (n, -1))
            # Neither the base at the target's level nor the target at the base's: it may be infinite there.
            own, other = (
                fn(each.flatten(0, 1)).unflatten(0, (n, -1))
                for fn, each in ((energy, points[:, :-1]), (base, points[:, 1:]))
            )
            return self._mixed(own, other).reshape(-1)

        return tempered

    def _mixed(self, own: Tensor, base: Tensor) -> Tensor:
        """Along the path, from E at all levels but the last and B at all but the first, or their gradients."""
        b = self._inner_betas(own)
        return torch.cat((own[:, :1], (1.0 - b) * base[:, :-1] + b * own[:, 1:], base[:, -1:]), 1)

    def _inner_betas(self, like: Tensor) -> Tensor:
        return per_chain(self._ladder[1:-1], like[0])

    def _rows(self, state: State) -> State:
        """The state of the inner kernel."""
        r = replicas_of(state)
        if self.base is None:
            own = (r.energy * self._ladder, r.grad * per_chain(self._ladder, r.grad[0]))
        else:
            own = tuple(self._mixed(e[:, :-1], b[:, 1:]) for e, b in zip((r.energy, r.grad), r.base))
        x, energy, grad = (t.flatten(0, 1) for t in (r.x, *own))
        return State(x, energy, grad, momentum=tuple(v.flatten(0, 1) for v in state.momentum))

    def _untempered(self, energy: EnergyFn, old: Replicas, before: State, new: State) -> Replicas:
        """Take the temperature out of the energies and gradients that the inner kernel came back with."""
        n, levels = old.energy.shape
        value, grad = (t.unflatten(0, (n, levels)) for t in (new.energy, new.grad))
        base = self._at_base(new)
        if self.base is None:
            pair = value / self._ladder, grad / per_chain(self._ladder, grad[0])
        else:
            hot = _evaluated(energy, new.x.unflatten(0, (n, levels))[:, -1], bool(new.grad.numel()))
            parts = []
            for mixed, at_base, at_hot in zip((value, grad), base, hot):
                b = self._inner_betas(mixed)
                inner = (mixed[:, 1:-1] - (1.0 - b) * at_base[:, 1:-1]) / b
                parts.append(torch.cat((mixed[:, :1], inner, at_hot.unsqueeze(1)), 1))
            pair = tuple(parts)
        # What did not move keeps its numbers as they are, and gathers no rounding.
        stayed = (new.x == before.x).flatten(1).all(1).unflatten(0, (n, levels))
        kept = torch.where(stayed, old.energy, pair[0])
        kept_grad = torch.where(stayed.reshape(n, levels, *([1] * (grad.ndim - 2))), old.grad, pair[1])
        return old._replace(x=new.x.unflatten(0, (n, levels)), energy=kept, grad=kept_grad, base=base)

    def _at_base(self, rows: State) -> tuple[Tensor, ...]:
        if self.base is None:
            return ()
        found = _evaluated(self.base, rows.x, bool(rows.grad.numel()))
        return tuple(t.unflatten(0, (-1, len(self._ladder))) for t in found)


def _evaluated(energy: EnergyFn, x: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return evaluate(energy, x) if with_gradient else (energy(x).detach(), x.new_zeros((x.shape[0], 0)))


def swap_order(kernel: ParallelTempering, r: Replicas, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whose point each level takes, ``(n, K)``; the acceptance of each pair; and whether it was its turn.

    Only energies and the time are looked at.
    """
    return kernel._order(r, uniform)


def swapped(r: Replicas, order: Tensor, swap: Tensor) -> Replicas:
    """Let every level take the point, and what is known of it, that ``order`` names."""

    def taken(t: Tensor) -> Tensor:
        return t.gather(1, order.reshape(*order.shape, *([1] * (t.ndim - 2))).expand(t.shape))

    x, energy, grad, ends = (taken(t) for t in (r.x, r.energy, r.grad, r.ends))
    base = tuple(taken(t) for t in r.base)
    return r._replace(x=x, energy=energy, grad=grad, ends=ends, base=base, swapped=r.swapped + swap)


def counted(r: Replicas) -> tuple[Replicas, Tensor]:
    """Take note of who is at an end; also the round trips that this completes."""
    trips = (r.ends[:, 0] == 2).to(torch.int64)
    last = torch.where(r.ends[:, -1:] == 1, 2, r.ends[:, -1:])
    ends = torch.cat((torch.ones_like(last), r.ends[:, 1:-1], last), 1)
    return r._replace(ends=ends, time=r.time + 1, trips=r.trips + trips), trips


def _told(r: Replicas, momentum: tuple[Tensor, ...]) -> State:
    """The state whose chains are the replicas at the target; momenta belong to levels, not to points."""
    x, energy, grad = (t[:, 0].contiguous() for t in r[:3])
    return State(x, energy, grad, momentum=momentum, memory=(*r[:8], *r.base))
