r"""The No-U-Turn sampler: trajectories that double until they turn back, and a state drawn from all they visited.

With the Hamiltonian :math:`H(x, v) = E(x) + |v|^2 / 2`, a trajectory of one point doubles again and again, forwards or
backwards in time at random: doubling j appends :math:`2^j` leapfrog steps, the leaves of a binary tree. It ends when

* the whole tree, or any aligned subtree of the part just appended, turns back: with v and v' the momenta at its two
  ends and :math:`\rho` the sum of its momenta,

  .. math:: v \cdot s \le 0 \quad\text{or}\quad v' \cdot s \le 0, \qquad s = \rho - (v + v') / 2,

  where s is the trapezoidal rule for the way from end to end. The sum alone, without the halves, is half a step too
  long at either end and misses turns of trajectories that go round in few steps. The same is asked of the way from
  each end to the first point of the other half: else a tree whose halves are just short of half a period, and which
  is itself just longer than a whole one, would go round for ever (as in Stan);
* a leaf has H more than 1000 nats above the start, or no number: the trajectory diverges.

A part that turns or diverges within is thrown away, and the tree is what it was before. Within a new part a leaf is
drawn with weight :math:`e^{-H}`; it replaces the one held so far with probability :math:`\min(1, W' / W)`, the weights
of the new part and of the old tree (biased progressive sampling, which favours the far end and leaves the target
invariant all the same).

**Chains together.** Parts have 1, 2, 4, ... leaves whatever the chain, so all chains that are still building stand at
the same leaf of the same doubling, and differ only in direction. Which subtrees end at a leaf is therefore known
beforehand; there are no indices per chain, and no recursion. Leaves are made 4 at a time by a pure function, which
judges them together. Between blocks the host asks one question: is any chain still building? Very many chains build in
groups that fit a processor's cache, and when half of the groups could hold those still building, they close up.

**Noise as data.** A step takes its momenta and one 64-bit key per chain; every direction and every uniform number is
SplitMix64's function of that key and of its place in the tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.compilation import made_ready
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, map_state, settings_repr
from gibbsian.kernels.groups import stands_alone
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals
from gibbsian.kernels.scales import check_scale
from gibbsian.kernels.trees import Pace, Part, Tree, check_passed, finish_doubling, grow, plant
from gibbsian.typing import EnergyFn, Scalar

BLOCK = 2
"""Doublings after which leaves come in blocks of ``2**BLOCK``; before, one by one. Larger blocks compile for longer. Of
images, whose gradients hide a call, all come one by one."""

MAX_DEPTH = 24
"""More doublings than that are a mistake: 16 million gradients for one step."""

GROUP = 4 * 2**20
"""Bytes that a group of chains keeps while a block of leaves is made; half and double are as fast."""

KEPT = 32
"""Tensors like the positions that a block of leaves keeps."""


@dataclass(frozen=True)
class NUTS:
    r"""Hamiltonian Monte Carlo that finds the length of every trajectory by itself.

    `The No-U-Turn Sampler (Hoffman & Gelman, 2014) <https://jmlr.org/papers/v15/hoffman14a.html>`_ in the form of
    `A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017) <https://arxiv.org/abs/1701.02434>`_, made
    iterative as in `Composable effects for flexible and accelerated probabilistic programming in NumPyro (Phan et al.,
    2019) <https://arxiv.org/abs/1912.11554>`_.

    Chains wait for the one with the longest trajectory. The acceptance reported is the mean of
    :math:`\min(1, e^{H_0 - H})` over the leaves made, which is what step sizes are tuned by.

    Parameters
    ----------
    step_size
        Length of a leapfrog step, in units of x (a pure number when there is a scale); one, or one per chain ``(n,)``.
    max_depth
        Doublings at most; a step costs up to ``2**max_depth - 1`` gradients.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; trajectories then run, and turn, where the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    max_depth: int = 10
    scale: Tensor | None = None

    domain = "real"
    dynamic = True
    target_acceptance = 0.8
    details = ("hamiltonian", "depth", "leapfrog_steps", "diverging")
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_scale(self.scale)
        if not 1 <= self.max_depth <= MAX_DEPTH:
            raise OptionError(
                f"max_depth counts the doublings of a trajectory, 1 to {MAX_DEPTH} (10 is usual); got {self.max_depth}."
            )

    @property
    def gradients(self) -> int:
        """An estimate, as the trajectory decides: enough that a block of the chain loop is one step."""
        return 2 ** max(5, self.max_depth // 2)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_scale(self.scale, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Momenta, and a 64-bit key per chain."""
        check_carried(self, state)
        z, keys = [], []
        for _ in range(steps):
            z.append(normals(1, state.x, rng))
            low, high, n = -(2**63), 2**63 - 1, state.x.shape[0]
            keys.append(torch.randint(low, high, (1, n), generator=rng, device=state.x.device))
        return torch.cat(z), torch.cat(keys)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One trajectory of every chain: the loop over doublings, on the host."""
        v, keys = noise
        builder = _Builder(energy, self.scale, BLOCK if state.x.ndim < 4 else 0)
        groups, finished, made = builder.planted(state, v, keys, self.step_size), [], 0
        for depth in range(self.max_depth):
            doubled = [builder.doubled(group, depth, made) for group in groups]
            made += builder.blocks(depth)
            finished += [group for group, going in doubled if not going]
            groups = [group for group, going in doubled if going]
            if len(groups) > 1:
                groups = _closed_up(groups, finished)
        group = _in_order(finished + groups)
        tree, pace = group.tree, group.pace
        to = pace.start
        details = {
            "hamiltonian": pace.start,
            "depth": tree.depth.to(to),
            "leapfrog_steps": pace.leaves.to(to),
            "diverging": pace.diverging.to(to),
        }
        held = tree.held._replace(origin=state.origin, momentum=state.momentum, memory=state.memory)
        return held, Info(pace.acceptance / pace.leaves, pace.nonfinite.to(to), details)


class Group(NamedTuple):
    """Chains that build together: the place of each among all, -1 for one that fills up; and what they have built."""

    rows: Tensor
    keys: Tensor
    tree: Tree
    pace: Pace
    part: Part


class _Builder:
    """Calls the pure functions of one step, compiled or not."""

    def __init__(self, energy: EnergyFn, scale: Tensor | None, block: int) -> None:
        self.energy, self.scale, self.block = energy, scale, block
        parts = (plant, grow, check_passed, finish_doubling)
        self.plant, self.grow, self.check, self.finish = (made_ready(each, energy) for each in parts)

    def planted(self, state: State, v: Tensor, keys: Tensor, step_size: Scalar) -> list[Group]:
        """Start a tree for every chain; many chains of few numbers in groups of equal size."""
        n, rows = len(keys), torch.arange(len(keys), device=keys.device)
        width = _width(self.energy, state.x)
        if width == n:
            return [Group(rows, keys, *self._begun(state, v, keys, step_size))]
        groups = []
        for own in _filled_up(rows, width):
            size = step_size[own] if isinstance(step_size, Tensor) and step_size.numel() > 1 else step_size
            begun = self._begun(map_state(lambda t, own=own: t[own], state), v[own], keys[own], size)
            groups.append(Group(own, keys[own], *begun))
        return _without_repeats(groups, n)

    def _begun(self, state: State, v: Tensor, keys: Tensor, step_size: Scalar) -> tuple[Tree, Pace, Part]:
        tree, pace, part = self.plant(state, v, keys, step_size, self.scale)
        # A graph is made anew when two of its inputs become one tensor, or are it at first.
        front, momenta = _each(torch.clone, (tree.front, tree.momenta))
        return tree._replace(front=front, momenta=momenta), pace, part

    def blocks(self, depth: int) -> int:
        """Blocks of leaves that a doubling is made in."""
        return 2 ** (depth - self.block if depth >= self.block else depth)

    def doubled(self, group: Group, depth: int, made: int) -> tuple[Group, bool]:
        """Double the trajectories of a group, of which so many blocks were made; tell whether any chain goes on."""
        rows, keys, tree, pace, part = group
        leaves = 2**self.block if depth >= self.block else 1
        blocks, begun, ended = self.blocks(depth), {}, {}
        for block in range(blocks):
            number = _number(made + block, keys.device)
            pace, part, begun[0], last, going = self.grow(self.energy, pace, part, self.scale, keys, number, leaves)
            before, ended[0] = ended.get(0), last
            # Of the subtrees larger than a block, those that begin or end with this one.
            for level in range(1, blocks.bit_length()):
                if block % 2**level == 0:
                    begun[level] = begun[0]
                elif (block + 1) % 2**level == 0:
                    pace, going = self.check(pace, begun[level], before, begun[level - 1], last)
                    before, ended[level] = ended.get(level), last
            if not bool(going):
                return Group(rows, keys, tree, pace, part), False
        first = begun[blocks.bit_length() - 1]
        tree, pace, part, going = self.finish(tree, pace, part, first, keys, _number(depth, keys.device))
        return Group(rows, keys, tree, pace, part), bool(going)


@lru_cache(maxsize=2048)
def _number(value: int, device: torch.device) -> Tensor:
    """Return a number as a tensor, which no graph is made anew for."""
    return torch.tensor(value, device=device)


def _width(energy: EnergyFn, x: Tensor) -> int:
    """Chains in a group: all, if they are few, or of many numbers each, or cannot be moved apart."""
    n, row = len(x), x[:1].numel() * x.element_size()
    width = max(16, GROUP // (KEPT * max(1, row)) // 16 * 16) * torch.get_num_threads()
    if x.device.type != "cpu" or x.ndim != 2 or n < 2 * width or not stands_alone(energy, x):
        return n
    return width


def _filled_up(rows: Tensor, width: int) -> list[Tensor]:
    """Part rows into equal groups; the first row fills up the last of them."""
    missing = -len(rows) % width
    return list(torch.cat((rows, rows[:1].expand(missing))).split(width))


def _without_repeats(groups: list[Group], n: int) -> list[Group]:
    """Mark rows beyond the n-th, which only fill up the last group, so that they neither go on nor count."""
    *whole, last = groups
    if (used := n - sum(len(group.rows) for group in whole)) == len(last.rows):
        return groups
    used_rows = torch.arange(len(last.rows), device=last.rows.device) < used
    pace = last.pace._replace(active=last.pace.active & used_rows)
    return [*whole, last._replace(rows=torch.where(used_rows, last.rows, -1), pace=pace)]


def _closed_up(groups: list[Group], finished: list[Group]) -> list[Group]:
    """Put the chains that still build into fewer groups, if that halves them; the others are finished."""
    width = len(groups[0].rows)
    going = int(sum(group.pace.active.sum() for group in groups))
    if 2 * -(-going // width) > len(groups):
        return groups
    whole = _each(lambda *parts: torch.cat(parts), *groups)
    active = whole.pace.active
    finished.append(_each(lambda t: t[~active], whole))
    chosen = _filled_up(active.nonzero().flatten(), width)
    return _without_repeats([_each(lambda t, own=own: t[own], whole) for own in chosen], going)


def _in_order(groups: list[Group]) -> Group:
    """Put the chains of several groups into their order."""
    if len(groups) == 1:
        return groups[0]
    whole = _each(lambda *parts: torch.cat(parts), *groups)
    places = whole.rows.argsort()[int((whole.rows < 0).sum()) :]
    return _each(lambda t: t[places], whole)


def _each(fn: Callable[..., Tensor], *nested: Any) -> Any:
    """Apply a function to every tensor in nested tuples, or to the corresponding tensors of several."""
    if isinstance(nested[0], Tensor):
        return fn(*nested)
    parts, kind = [_each(fn, *each) for each in zip(*nested)], type(nested[0])
    return kind(*parts) if hasattr(kind, "_make") else tuple(parts)
