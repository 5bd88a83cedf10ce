r"""Parallel tempering whose temperatures are spread over the processes of a job.

Where replicas are large, or their energies slow, each process holds the same number of replicas of every chain. Points
stay where they are: what travels is the temperature. A swap of the levels k and k + 1 between two replicas is the swap
of their points, seen from the points, so that all that processes tell each other at a step is one energy per replica;
who swaps with whom is then computed everywhere, from the same numbers. Points are sent only when draws are kept.

A replica has random numbers of its own, keyed by its number and the step, and those of the swaps are everybody's.
Draws therefore do not depend on how many processes there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Generator, Tensor

from gibbsian.chain_checks import check_energies, check_energy, check_sound, check_start, checked_plan, finite_chains
from gibbsian.chain_lanes import Plan, reporter
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import State, per_chain
from gibbsian.kernels.ladder import Tempered, check_exact, step_inside, with_sizes
from gibbsian.kernels.tempering import ParallelTempering, Replicas, counted, swap_order, swapped
from gibbsian.processes.collectives import agree, gathered
from gibbsian.processes.lanes import Lanes, lane_seed
from gibbsian.processes.work import alike, from_owners, numbers, together
from gibbsian.processes.world import world
from gibbsian.samples import Samples
from gibbsian.sampling import with_tensor_settings
from gibbsian.typing import EnergyFn

SHARED = 8
"""Tensors of a state's memory that every process has: the ladder as `Replicas`, with replicas' numbers for points."""


@torch.no_grad()
def temper(
    energy: EnergyFn,
    kernel: ParallelTempering,
    start: Tensor | State,
    *,
    steps: int,
    rng: Generator,
    warmup: int = 0,
    thin: int | None = None,
    progress: bool | Callable[[int], object] = False,
) -> Samples:
    """Run parallel tempering with its replicas shared by the processes of a job.

    It is the chain of ``sample(energy, kernel, start, ...)`` with other random numbers, and in one process it runs too.
    Chains may instead be shared, with all their replicas: ``sample(..., lanes=...)``, which needs no exchange at all.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    kernel
        A `ParallelTempering` without a base; processes share its K levels equally.
    start
        Positions ``(n, *event)`` on every process, where all replicas of a chain start; or the ``state`` of an earlier
        run in as many processes, to continue exactly.
    steps, warmup, thin, progress
        As in `gibbsian.sample`.
    rng
        The generator, on the chains' device, in the same state on every process.

    Returns
    -------
    Samples
        Of the chains at the target, complete on every process. The ``state`` holds this process's replicas.

    Raises
    ------
    OptionError
        If processes cannot share the levels equally, or the kernel has a base.
    ShapeError, DomainError, ArgumentTypeError
        If an argument does not fit; the message says what does.
    ProcessError
        If processes were given different arguments, or generators in different states.
    """
    began = time.perf_counter()
    plan = checked_plan(Plan(steps, warmup, thin))
    crowd = _begun(energy, kernel, start, rng)
    keys = numbers(rng, steps)
    told = (len(crowd.ladder.time), len(crowd.betas), *plan[:3])
    agree({"random numbers": f"{int(keys[0]):016x}", "chains, levels and steps": str(told)}, "options or generators")
    report, close = reporter(progress and (world().main or callable(progress)), steps, "tempering")
    total, kept = torch.zeros((4, told[0]), dtype=crowd.ladder.energy.dtype, device=crowd.ladder.energy.device), []
    try:
        for made, key in enumerate(keys, start=1):
            step = crowd.step(int(key))
            total = total + step
            if plan.keeps(made):
                kept.append((crowd.target(), crowd.ladder.energy[:, 0], step[0], step[2], step[3]))
            report(1)
    finally:
        close()
    draws, *told_at = map(torch.stack, zip(*kept)) if kept else (None,)
    names = ("energy", "acceptance", *kernel.details)
    return Samples(
        state=crowd.state(),
        draws=draws,
        acceptance=total[0] / steps,
        nonfinite=total[1],
        kernel=kernel,
        steps=steps,
        seconds=time.perf_counter() - began,
        details={name: total[2 + i] / steps for i, name in enumerate(kernel.details)},
        kept=dict(zip(names, told_at)),
    )


class _Crowd:
    """The replicas of one process, one after another for all chains, and the ladder that all processes know.

    ``ladder.x`` has the numbers of the replicas that stand at each level, ``(n, K)``.
    """

    def __init__(self, energy: EnergyFn, kernel: Any, own: range, ladder: Replicas, replicas: list[State]) -> None:
        self.energy, self.kernel, self.own = energy, kernel, own
        self.ladder, self.replicas = ladder, replicas
        self.betas = cast(Tensor, kernel.betas)
        self.rng = Generator(ladder.energy.device)

    def step(self, key: int) -> Tensor:
        """Move all replicas, then let neighbours swap; acceptance, non-finite proposals and details, ``(4, n)``."""
        level = self.ladder.x.argsort(1)  # The inverse of a permutation.
        found = []
        for i, number in enumerate(self.own):
            self.rng.manual_seed(lane_seed(key, number))
            self.replicas[i], info = self._moved(self.replicas[i], level[:, number])
            found.append(torch.stack((self.replicas[i].energy, info.acceptance, info.nonfinite)))
        # From replicas' numbers to levels: (n, K) each.
        energy, acceptance, nonfinite = (t.T.gather(1, self.ladder.x) for t in alike(torch.stack(found)).unbind(1))
        moved = self.ladder._replace(energy=energy, moved=self.ladder.moved + acceptance)
        self.rng.manual_seed(lane_seed(key, len(self.betas)))
        shape = (len(energy), len(self.betas) - 1)
        uniform = torch.rand(shape, generator=self.rng, dtype=energy.dtype, device=energy.device)
        order, swap, tried = swap_order(self.kernel, moved, uniform)
        self.ladder, trips = counted(swapped(moved, order, swap * tried))
        swaps = (swap * tried).sum(1) / tried.sum()
        return torch.stack((acceptance[:, 0], nonfinite.amax(1), swaps, trips.to(swaps.dtype)))

    def target(self) -> Tensor:
        """The points at the target's level, ``(n, *event)``."""
        place = self.ladder.x[:, 0] - self.own.start
        x = self.replicas[0].x.clone()
        for i, replica in enumerate(self.replicas[1:], start=1):
            x = torch.where(per_chain(place == i, x), replica.x, x)
        return from_owners(x, (place >= 0) & (place < len(self.own)))

    def state(self) -> State:
        """What it takes to go on."""
        x, energy = self.target(), self.ladder.energy[:, 0]
        r = self.ladder
        shared = (r.x, r.energy, r.ends, r.time, r.trips, r.swapped, r.moved)
        kept = [torch.stack(each, 1) for each in zip(*(r[:3] for r in self.replicas))]
        momentum = [torch.stack(each, 1) for each in zip(*(r.momentum for r in self.replicas))]
        number = torch.full((len(x),), self.own.start, device=x.device)
        return State(x, energy, x.new_zeros((len(x), 0)), memory=(*shared, number, *kept, *momentum))

    def _moved(self, old: State, level: Tensor) -> tuple[State, Any]:
        """Step a replica of every chain, each at its level; energies outside are those at temperature 1."""
        beta, kernel = self.betas[level], self.kernel.kernel
        if self.kernel.step_sizes is not None:
            kernel = with_sizes(kernel, self.kernel.step_sizes[level])
        before = old._replace(energy=old.energy * beta, grad=old.grad * per_chain(beta, old.grad))
        noise = tuple(z[0] for z in kernel.noise(before, 1, self.rng))
        new, info = step_inside(kernel, Tempered(self.energy, beta), before, noise)
        # What did not move keeps its numbers as they are, and gathers no rounding.
        stayed = (new.x == old.x).flatten(1).all(1)
        energy = torch.where(stayed, old.energy, new.energy / beta)
        grad = torch.where(per_chain(stayed, new.grad), old.grad, new.grad / per_chain(beta, new.grad))
        return new._replace(energy=energy, grad=grad), info


def _begun(energy: EnergyFn, kernel: Any, start: Tensor | State, rng: Generator) -> _Crowd:
    if not isinstance(kernel, ParallelTempering):
        raise ArgumentTypeError(f"What is spread over processes are the levels of a ParallelTempering; got {kernel!r}.")
    if kernel.base is not None:
        raise OptionError(
            "Temperatures that travel need powers of one energy: end the betas above 0 and leave out the base, or "
            "share the chains with all their replicas: sample(..., lanes=...)."
        )
    levels, here = len(cast(Tensor, kernel.betas)), world()
    if levels % here.size:
        near = max(1, round(levels / here.size)) * here.size
        raise OptionError(
            f"A ladder of {levels} levels cannot be shared equally by {here.size} processes; take {max(2, near)}, or "
            f"a number of processes that divides {levels}."
        )
    check_energy(energy, kernel)
    given = start.x if isinstance(start, State) else start
    check_start(given, energy, rng)
    moving, own = with_tensor_settings(kernel, given), Lanes(levels).own
    if isinstance(start, State):
        return _Crowd(energy, moving, own, *_taken_up(start, own, levels))
    with together():
        first = kernel.kernel.init(energy, given.contiguous().clone())
    check_energies(first)
    check_exact(kernel, kernel.kernel, first)
    check_sound(gathered(finite_chains(first))[: len(given)])
    n, count = len(given), {"dtype": torch.int64, "device": given.device}
    numbered, ends = torch.arange(levels, **count).repeat(n, 1), torch.zeros((n, levels), **count)
    ends[:, 0] = 1
    like = first.energy
    ladder = Replicas(
        x=numbered,
        energy=like.unsqueeze(1).repeat(1, levels),
        grad=like.new_zeros((n, levels, 0)),
        ends=ends,
        time=torch.zeros(n, **count),
        trips=torch.zeros(n, **count),
        swapped=like.new_zeros((n, levels - 1)),
        moved=like.new_zeros((n, levels)),
    )
    return _Crowd(energy, moving, own, ladder, [first] * len(own))


def _taken_up(start: State, own: range, levels: int) -> tuple[Replicas, list[State]]:
    """Read what `_Crowd.state` wrote."""
    kept = start.memory
    fits = len(kept) > SHARED + 2 and kept[0].shape[1:] == (levels,) and kept[SHARED].shape[1:2] == (len(own),)
    if not fits or int(kept[SHARED - 1][0]) != own.start:
        raise ArgumentTypeError(
            f"temper() goes on from a state of its own, of {levels} levels in {world().size} process"
            f"{'es' * (world().size > 1)}, each with its own; start from its positions, state.x."
        )
    x, energy, ends, time, trips, swaps, moved = kept[: SHARED - 1]
    ladder = Replicas(x, energy, energy.new_zeros((*energy.shape, 0)), ends, time, trips, swaps, moved)
    own_x, own_energy, own_grad, *momentum = kept[SHARED:]

    def replica(k: int) -> State:
        return State(own_x[:, k], own_energy[:, k], own_grad[:, k], momentum=tuple(v[:, k] for v in momentum))

    return ladder, [replica(k) for k in range(len(own))]
