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
beforehand; there are no indices per chain, and no recursion. Leaves are made 8 at a time by a pure function, which
judges them together. Between blocks the host asks one question: is any chain still building?

**Noise as data.** A step takes its momenta and one 64-bit key per chain; every direction and every uniform number is
SplitMix64's function of that key and of its place in the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.compilation import compiled, owner_of, wanted
from gibbsian.errors import OptionError
from gibbsian.kernels.base import (
    Info,
    State,
    check_carried,
    choose,
    evaluate,
    map_state,
    per_chain,
    row_sum,
    settings_repr,
)
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals, uniform, word
from gibbsian.kernels.scales import check_scale, stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar

DIVERGENCE = 1000.0
"""How far H may rise above the start, in nats, before the trajectory counts as diverging."""

OPENING = 3
"""Doublings made together at the start; after them, leaves come in blocks of ``2**OPENING``."""

MAX_DEPTH = 24
"""More doublings than that are a mistake: 16 million gradients for one step."""


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
        """One trajectory: the loop over blocks of leaves, on the host."""
        v, keys = noise
        ready: Callable[..., Any] = partial(compiled, owner=owner_of(energy)) if wanted() else _as_it_is
        first, made = min(OPENING, self.max_depth), 0
        tree, part = ready(opening)(energy, state, v, keys, self.step_size, self.scale, first)
        grow_more, passed, next_doubling = ready(grow), ready(check_passed), ready(finish_doubling)
        for depth in range(first, self.max_depth):
            begun: dict[int, Corner] = {}
            ended: dict[int, Corner] = {}
            for block in range(2 ** (depth - OPENING)):
                if not bool(tree.active.any()):
                    return _finished(state, tree)
                number = torch.tensor(made + block, device=keys.device)
                tree, part, begun[0], last = grow_more(energy, tree, part, self.scale, keys, number, 2**OPENING)
                before, ended[0] = ended.get(0), last
                # Of the subtrees larger than a block, those that begin or end with this one.
                for level in range(1, depth - OPENING + 1):
                    if block % 2**level == 0:
                        begun[level] = begun[0]
                    elif (block + 1) % 2**level == 0:
                        tree = passed(tree, begun[level], before, begun[level - 1], last)
                        before, ended[level] = ended.get(level), last
            made += 2 ** (depth - OPENING)
            place = torch.tensor(depth, device=keys.device)
            tree, part = next_doubling(tree, part, begun[depth - OPENING], keys, place, self.step_size)
        return _finished(state, tree)


class End(NamedTuple):
    """An end of a trajectory: position, momentum, and gradient in round coordinates, each ``(n, *event)``."""

    x: Tensor
    v: Tensor
    force: Tensor


class Corner(NamedTuple):
    """Where a subtree begins or ends: a point's momentum, and the trapezoidal sum of momenta up to it."""

    v: Tensor
    middle: Tensor


class Tree(NamedTuple):
    r"""What every chain has built so far, and what it reports.

    Attributes
    ----------
    back, front
        The ends of the trajectory, earlier and later in time.
    momenta
        Sum of the momenta of all its points, ``(n, *event)``.
    log_weight
        log of the sum of :math:`e^{H_0 - H}` over its points, ``(n,)``.
    held
        The state drawn from it.
    start
        :math:`H_0`, ``(n,)``.
    active
        Chains that are still building, ``(n,)`` of bools.
    depth, leaves
        Doublings kept and leaves made, ``(n,)`` of integers.
    acceptance
        Sum of :math:`\min(1, e^{H_0 - H})` over the leaves made, ``(n,)``.
    diverging, nonfinite
        Whether a leaf was too high or no number, ``(n,)`` of bools.
    """

    back: End
    front: End
    momenta: Tensor
    log_weight: Tensor
    held: State
    start: Tensor
    active: Tensor
    depth: Tensor
    leaves: Tensor
    acceptance: Tensor
    diverging: Tensor
    nonfinite: Tensor


class Part(NamedTuple):
    """What is being appended: its growing end, signed step sizes ``(n,)``, and as in `Tree`."""

    end: End
    h: Tensor
    momenta: Tensor
    log_weight: Tensor
    held: State


def opening(
    energy: EnergyFn,
    state: State,
    v: Tensor,
    keys: Tensor,
    step_size: Scalar,
    scale: Tensor | None,
    doublings: int,
) -> tuple[Tree, Part]:
    """Start a tree and double it a few times; return it with the part begun next."""
    end = End(state.x, v, stretch_gradient(scale, state.grad))
    start = state.energy + 0.5 * row_sum(v * v)
    zero, none = torch.zeros_like(start), torch.zeros_like(keys)
    no = torch.zeros_like(keys, dtype=torch.bool)
    tree = Tree(end, end, v, zero, state, start, ~no, none, none, zero, no, no)
    part = begin(tree, keys, 0, step_size)
    for j in range(doublings):
        tree, part, first, _ = grow(energy, tree, part, scale, keys, j - doublings, 2**j)
        tree, part = finish_doubling(tree, part, first, keys, j, step_size)
    return tree, part


def begin(tree: Tree, keys: Tensor, depth: int | Tensor, step_size: Scalar) -> Part:
    """Choose a direction, and stand at that end of the tree."""
    forwards = word(keys, depth) < 0
    wide = per_chain(forwards, tree.momenta)
    end = End(*(torch.where(wide, front, back) for front, back in zip(tree.front, tree.back)))
    size = torch.as_tensor(step_size, dtype=tree.start.dtype, device=tree.start.device)
    h = torch.where(forwards, size, -size)
    # A copy, since a graph is made anew when two of its inputs become one tensor.
    held = map_state(torch.clone, tree.held)
    return Part(end, h, torch.zeros_like(end.v), torch.full_like(tree.start, -math.inf), held)


def grow(
    energy: EnergyFn, tree: Tree, part: Part, scale: Tensor | None, keys: Tensor, number: int | Tensor, leaves: int
) -> tuple[Tree, Part, Corner, Corner]:
    """Append a block of leaves to a part: integrate, judge all of them, draw one, let it compete with the one held.

    Parameters
    ----------
    energy, scale, keys
        As for the kernel; keys ``(n,)`` of 64 bits.
    tree, part
        So far.
    number
        A number of its own for each block of a step, for its uniform numbers.
    leaves
        A power of two; earlier blocks of the part have as many.

    Returns
    -------
    tree, part, first, last
        Corners at the first and the last leaf, with which larger subtrees that begin or end there are judged.
    """
    h = per_chain(part.h, part.end.x)
    x, v, force = part.end
    momenta, path = part.momenta, []
    for _ in range(leaves):
        v = v - 0.5 * h * force
        x = x + stretch(scale, h * v)
        value, grad = evaluate(energy, x)
        force = stretch_gradient(scale, grad)
        v = v - 0.5 * h * force
        momenta = momenta + v
        path.append((x, v, value, grad, momenta))
    xs, vs, values, grads, sums = (torch.stack(each) for each in zip(*path))
    log_weights = tree.start - values - 0.5 * _inner(vs, vs, 2)

    # A gradient without numbers leaves the momentum, and so H, without one.
    finite = torch.isfinite(log_weights)
    good = finite & (log_weights > -DIVERGENCE)
    middle = sums - 0.5 * vs
    # Reasons to stop at each leaf, as numbers: Inductor cannot write to every other row of a tensor of bools.
    stop, size = torch.where(good, 0.0, 1.0), 2
    while size <= leaves:
        first, left, right, last = (
            Corner(vs[i::size], middle[i::size]) for i in (0, size // 2 - 1, size // 2, size - 1)
        )
        stop[size - 1 :: size] += turns(first, last, 2) if size == 2 else bends(first, left, right, last, 2)
        size *= 2
    made = (stop.cumsum(0) == stop) & tree.active
    probability = torch.where(made & good, log_weights.clamp(max=0.0).exp(), 0.0)
    tree = tree._replace(
        active=tree.active & (stop.sum(0) == 0),
        leaves=tree.leaves + made.sum(0),
        acceptance=tree.acceptance + probability.sum(0),
        diverging=tree.diverging | (made & ~good).any(0),
        nonfinite=tree.nonfinite | (made & ~finite).any(0),
    )

    # What follows matters only where the chain is still building, and there every leaf of the block is good.
    pick, weight = draw_leaf(log_weights, uniform(keys, 128 + 2 * number, tree.start))
    row = torch.arange(len(keys), device=keys.device)
    drawn = State(xs[pick, row], values[pick, row], grads[pick, row])
    both = torch.logaddexp(part.log_weight, weight)
    held = choose(uniform(keys, 129 + 2 * number, weight) < (weight - both).exp(), drawn, part.held)
    part = Part(End(x, v, force), part.h, momenta, both, held)
    return tree, part, Corner(vs[0], middle[0]), Corner(vs[-1], middle[-1])


def draw_leaf(log_weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a leaf of each chain by weight, ``(leaves, n) -> (n,)``; also the log of the sum of the weights."""
    weight = torch.logsumexp(log_weights, 0)
    below = (log_weights - weight).exp().cumsum(0) <= u
    return below.sum(0).clamp(max=len(log_weights) - 1), weight


def check_passed(tree: Tree, first: Corner, left: Corner, right: Corner, last: Corner) -> Tree:
    """Stop chains whose subtree between these corners turns back."""
    return tree._replace(active=tree.active & ~bends(first, left, right, last))


def finish_doubling(
    tree: Tree, part: Part, first: Corner, keys: Tensor, depth: int | Tensor, step_size: Scalar
) -> tuple[Tree, Part]:
    """Join a finished part, and its first leaf, to the tree where the chain still builds; begin the next part."""
    accept = tree.active & (uniform(keys, 64 + depth, tree.start) < (part.log_weight - tree.log_weight).exp())
    forwards = per_chain(part.h > 0, part.momenta)
    back = End(*(torch.where(forwards, old, new) for old, new in zip(tree.back, part.end)))
    front = End(*(torch.where(forwards, new, old) for old, new in zip(tree.front, part.end)))
    momenta = tree.momenta + part.momenta
    # In the order of growth: across the tree to the end where the part begins, then across the part.
    far, near = torch.where(forwards, back.v, front.v), torch.where(forwards, tree.front.v, tree.back.v)
    turning = bends(
        Corner(far, 0.5 * far),
        Corner(near, tree.momenta - 0.5 * near),
        Corner(first.v, tree.momenta + first.middle),
        Corner(part.end.v, momenta - 0.5 * part.end.v),
    )
    tree = tree._replace(
        back=back,
        front=front,
        momenta=momenta,
        log_weight=torch.logaddexp(tree.log_weight, part.log_weight),
        held=choose(accept, part.held, tree.held),
        depth=tree.depth + tree.active.long(),
        active=tree.active & ~turning,
    )
    return tree, begin(tree, keys, depth + 1, step_size)


def turns(a: Corner, b: Corner, lead: int = 1) -> Tensor:
    """Whether the momentum at either corner points against the way between, ``(n,)`` or with axes in front."""
    way = b.middle - a.middle
    return ~((_inner(a.v, way, lead) > 0) & (_inner(b.v, way, lead) > 0))


def bends(first: Corner, left: Corner, right: Corner, last: Corner, lead: int = 1) -> Tensor:
    """Whether a tree turns from end to end, or from an end to where its other half, between left and right, begins."""
    return turns(first, last, lead) | turns(first, right, lead) | turns(left, last, lead)


def _inner(a: Tensor, b: Tensor, lead: int = 1) -> Tensor:
    """Sum products over the event's axes, which follow ``lead`` others."""
    return (a * b).sum(tuple(range(lead, a.ndim)))


def _as_it_is(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def _finished(state: State, tree: Tree) -> tuple[State, Info]:
    to = tree.start
    details = {
        "hamiltonian": tree.start,
        "depth": tree.depth.to(to),
        "leapfrog_steps": tree.leaves.to(to),
        "diverging": tree.diverging.to(to),
    }
    return tree.held, Info(tree.acceptance / tree.leaves, tree.nonfinite.to(to), details)
