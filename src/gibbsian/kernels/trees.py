r"""Trees of leapfrog steps that double until they turn back: what `gibbsian.NUTS` builds, for all chains together.

Pure functions of tensors, which are compiled one by one: `plant`, `grow`, `check_passed`, `finish_doubling`. The loop
that calls them, and what they mean, is in `gibbsian.kernels.nuts`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.kernels.base import State, choose, evaluate, map_state, per_chain, row_sum
from gibbsian.kernels.normals import uniform, word
from gibbsian.kernels.scales import stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar

DIVERGENCE = 1000.0
"""How far H may rise above the start, in nats, before the trajectory counts as diverging."""


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
    r"""What every chain has built so far.

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
    depth
        Doublings kept, ``(n,)`` of integers.
    """

    back: End
    front: End
    momenta: Tensor
    log_weight: Tensor
    held: State
    depth: Tensor


class Part(NamedTuple):
    """What is being appended: its growing end, signed step sizes ``(n,)``, and as in `Tree`."""

    end: End
    h: Tensor
    momenta: Tensor
    log_weight: Tensor
    held: State


class Pace(NamedTuple):
    r"""How far every chain has come, and what it reports; each ``(n,)``.

    Attributes
    ----------
    start
        :math:`H_0`.
    active
        Chains that are still building, bools.
    leaves
        Leaves made, integers.
    acceptance
        Sum of :math:`\min(1, e^{H_0 - H})` over them.
    diverging, nonfinite
        Whether a leaf was too high or no number, bools.
    """

    start: Tensor
    active: Tensor
    leaves: Tensor
    acceptance: Tensor
    diverging: Tensor
    nonfinite: Tensor


class Leaf(NamedTuple):
    """A point of a part: where it is, what it weighs, ``(n,)``, and what turns are judged by."""

    state: State
    log_weight: Tensor
    corner: Corner


def plant(state: State, v: Tensor, keys: Tensor, step_size: Scalar, scale: Tensor | None) -> tuple[Tree, Pace, Part]:
    """Start a tree of one point; return it with the part begun first."""
    end = End(state.x, v, stretch_gradient(scale, state.grad))
    start = state.energy + 0.5 * row_sum(v * v)
    zero, none = torch.zeros_like(start), torch.zeros_like(keys)
    no = torch.zeros_like(keys, dtype=torch.bool)
    tree = Tree(end, end, v, zero, map_state(torch.clone, state), none)
    pace = Pace(start, ~no, none.clone(), zero.clone(), no, no.clone())
    size = torch.as_tensor(step_size, dtype=start.dtype, device=start.device).expand_as(start)
    return tree, pace, begin(tree, keys, 0, size)


def begin(tree: Tree, keys: Tensor, depth: int | Tensor, size: Tensor) -> Part:
    """Choose a direction, and stand at that end of the tree; with step sizes ``(n,)``."""
    forwards = word(keys, depth) < 0
    wide = per_chain(forwards, tree.momenta)
    end = End(*(torch.where(wide, front, back) for front, back in zip(tree.front, tree.back)))
    h = torch.where(forwards, size, -size)
    held = map_state(torch.clone, tree.held)
    return Part(end, h, torch.zeros_like(end.v), torch.full_like(tree.log_weight, -math.inf), held)


def grow(
    energy: EnergyFn, pace: Pace, part: Part, scale: Tensor | None, keys: Tensor, number: int | Tensor, leaves: int
) -> tuple[Pace, Part, Corner, Corner, Tensor]:
    """Append a block of leaves to a part: integrate, judge all of them, draw one, let it compete with the one held.

    Parameters
    ----------
    energy, scale, keys
        As for the kernel; keys ``(n,)`` of 64 bits.
    pace, part
        So far.
    number
        A number of its own for each block of a step, for its uniform numbers.
    leaves
        A power of two; earlier blocks of the part have as many.

    Returns
    -------
    pace, part, first, last, going
        Corners at the first and the last leaf, with which larger subtrees that begin or end there are judged; and
        whether any chain is still building.
    """
    path, part = integrate(energy, pace.start, part, scale, leaves)
    start, running, made, acceptance, diverging, nonfinite = pace
    for leaf, turned in zip(path, turned_within(path)):
        # A gradient without numbers leaves the momentum, and so H, without one.
        finite = torch.isfinite(leaf.log_weight)
        good = finite & (leaf.log_weight > -DIVERGENCE)
        made = made + running.long()
        acceptance = acceptance + torch.where(running & good, leaf.log_weight.clamp(max=0.0).exp(), 0.0)
        diverging = diverging | (running & ~good)
        nonfinite = nonfinite | (running & ~finite)
        running = running & good if turned is None else running & good & ~turned
    pace = Pace(start, running, made, acceptance, diverging, nonfinite)

    # What follows matters only where the chain is still building, and there every leaf of the block is good.
    weights = torch.stack([leaf.log_weight for leaf in path])
    pick, weight = draw_leaf(weights, uniform(keys, 128 + 2 * number, start))
    drawn = path[0].state
    for i, leaf in enumerate(path[1:], start=1):
        drawn = choose(pick == i, leaf.state, drawn)
    both = torch.logaddexp(part.log_weight, weight)
    held = choose(uniform(keys, 129 + 2 * number, weight) < (weight - both).exp(), drawn, part.held)
    first, last = path[0].corner, path[-1].corner
    if leaves == 1:
        first = Corner(*map(torch.clone, last))  # A graph is made anew when two of its inputs become one tensor.
    return pace, part._replace(log_weight=both, held=held), first, last, running.any()


def integrate(
    energy: EnergyFn, start: Tensor, part: Part, scale: Tensor | None, leaves: int
) -> tuple[list[Leaf], Part]:
    """Make leapfrog steps from the end of a part; return the leaves, and the part with its end and momenta moved on."""
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
        log_weight = start - value - kinetic(v)
        path.append(Leaf(State(x, value, grad), log_weight, Corner(v, momenta - 0.5 * v)))
    return path, part._replace(end=End(x, v, force), momenta=momenta)


def turned_within(path: list[Leaf]) -> list[Tensor | None]:
    """Tell at each leaf whether one of the aligned subtrees that end there turns back; ``None`` where none ends."""
    corners, told = [leaf.corner for leaf in path], []
    for i, last in enumerate(corners):
        turned, size = None, 2
        while (i + 1) % size == 0:
            first, left, right = corners[i + 1 - size], corners[i - size // 2], corners[i + 1 - size // 2]
            now = turns(first, last) if size == 2 else bends(first, left, right, last)
            turned, size = now if turned is None else turned | now, 2 * size
        told.append(turned)
    return told


def draw_leaf(log_weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a leaf of each chain by weight, ``(leaves, n) -> (n,)``; also the log of the sum of the weights."""
    weight = torch.logsumexp(log_weights, 0)
    below = (log_weights - weight).exp().cumsum(0) <= u
    return below.sum(0).clamp(max=len(log_weights) - 1), weight


def check_passed(pace: Pace, first: Corner, left: Corner, right: Corner, last: Corner) -> tuple[Pace, Tensor]:
    """Stop chains whose subtree between these corners turns back; tell whether any is left."""
    active = pace.active & ~bends(first, left, right, last)
    return pace._replace(active=active), active.any()


def finish_doubling(
    tree: Tree, pace: Pace, part: Part, first: Corner, keys: Tensor, depth: int | Tensor
) -> tuple[Tree, Pace, Part, Tensor]:
    """Join a finished part, and its first leaf, to the tree where the chain still builds; begin the next part."""
    accept = pace.active & (uniform(keys, 64 + depth, pace.start) < (part.log_weight - tree.log_weight).exp())
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
    held, kept = choose(accept, part.held, tree.held), tree.depth + pace.active.long()
    tree = Tree(back, front, momenta, torch.logaddexp(tree.log_weight, part.log_weight), held, kept)
    active = pace.active & ~turning
    return tree, pace._replace(active=active), begin(tree, keys, depth + 1, part.h.abs()), active.any()


def turns(a: Corner, b: Corner) -> Tensor:
    """Whether the momentum at either corner points against the way between, ``(n,)``."""
    way = b.middle - a.middle
    return ~((row_sum(a.v * way) > 0) & (row_sum(b.v * way) > 0))


def bends(first: Corner, left: Corner, right: Corner, last: Corner) -> Tensor:
    """Whether a tree turns from end to end, or from an end to where its other half, between left and right, begins."""
    return turns(first, last) | turns(first, right) | turns(left, last)


def kinetic(v: Tensor) -> Tensor:
    """Energy of momenta, ``(n,)``."""
    return 0.5 * row_sum(v * v)
