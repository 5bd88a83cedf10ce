r"""What kernels on discrete states share: the two kinds of state, first-order changes, and draws from uniforms.

States are floating-point tensors, so that an energy written for them can be differentiated: binary, ``(n, *event)`` of
zeros and ones, or one-hot, ``(n, *sites, K)`` with a single one along the last axis. The energy's ``support`` says
which, ``constraints.boolean`` or ``constraints.one_hot``.

A gradient at a state tells, to first order, how much every single change would raise the log-density. With
:math:`g = \nabla E(x)`,

.. math:: d_i(x) = -g_i\,(1 - 2 x_i), \qquad d_{sk}(x) = \sum_l g_{sl} x_{sl} - g_{sk},

for flipping bit i, and for putting site s into class k. One gradient thus ranks all neighbours of a state, where
evaluating them would take an energy for each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.compilation import compiled
from gibbsian.errors import DomainError, ShapeError
from gibbsian.kernels.base import per_chain
from gibbsian.kernels.normals import any_number, come_from_counters, draw_key, streams, uniforms_from_counters
from gibbsian.typing import EnergyFn

DISCRETE = ("boolean", "one_hot")
"""The domains of these kernels."""

_BOOLEAN, _ONE_HOT = type(constraints.boolean), type(constraints.one_hot)


class Change(NamedTuple):
    """One change of one site in each chain: indices of the site, of its class before and of its class after, ``(n,)``.

    On binary states the classes are both 0.
    """

    site: Tensor
    before: Tensor
    after: Tensor


def is_one_hot(energy: EnergyFn) -> bool:
    """Whether an energy's states are one-hot (or binary, otherwise).

    Raises
    ------
    DomainError
        If it does not say, or says neither.
    """
    support: Constraint | None = getattr(energy, "support", None)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, _ONE_HOT):
        return True
    if isinstance(support, _BOOLEAN):
        return False
    raise DomainError(
        f"A discrete kernel must know what the states are, and this energy's support is {support}. Declare it: "
        "Energy.of(fn, support=constraints.boolean) (or constraints.one_hot), or add a base such as Bernoulli."
    )


def check_states(energy: EnergyFn, x: Tensor, what: str = "chains") -> bool:
    """Refuse chains, or rows of data, that do not stand on states; return whether these are one-hot.

    Inside a compiled graph, which could not wait for the answer, only the shape is looked at.

    Raises
    ------
    DomainError
        If a number is neither 0 nor 1, or a site has not a single one.
    ShapeError
        If one-hot states have no axis of two classes or more.
    """
    hot = is_one_hot(energy)
    if hot and (x.ndim < 2 or x.shape[-1] < 2):
        raise ShapeError(f"One-hot states (n, *sites, K) have K of 2 classes or more; got shape {tuple(x.shape)}.")
    if torch.compiler.is_compiling():
        return hot
    inside = (x == 0) | (x == 1)
    if not bool(inside.all()):
        found = x[~inside]
        raise DomainError(
            f"Discrete {what} stand on zeros and ones; {int((~inside).flatten(1).any(1).sum())} of {x.shape[0]} {what} "
            f"do not (for example {float(found[0]):.4g}). Spins s of -1 and 1 are (s + 1) / 2; probabilities p become "
            "states by torch.bernoulli(p)."
        )
    if hot and not bool((x.sum(-1) == 1).all()):
        wrong = (x.sum(-1) != 1).flatten(1).any(1)
        raise DomainError(
            f"One-hot states have a single one along the last axis; {int(wrong.sum())} of {x.shape[0]} {what} do not. "
            "torch.nn.functional.one_hot(labels, K).to(dtype) makes them."
        )
    return hot


def uniforms(steps: int, rng: Generator, like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Draw uniform numbers step by step: one tensor ``(steps, *shape)`` for each shape, of the type of ``like``.

    Of a compiled run on a CPU, many come from counters; see `gibbsian.kernels.normals`.
    """
    many = [come_from_counters(math.prod(shape), like) for shape in shapes]
    own = {"dtype": like.dtype, "device": like.device}
    keys = torch.empty((steps, len(shapes), 2), dtype=torch.int64)
    if all(many):
        # The same keys as step by step, in one call.
        draw_key(rng, keys)
    drawn = [torch.empty(0 if m else steps, *shape, **own) for m, shape in zip(many, shapes)]
    for i in range(0 if all(many) else steps):
        for k, shape in enumerate(shapes):
            if many[k]:
                draw_key(rng, keys[i, k])
            else:
                torch.rand(shape, generator=rng, out=drawn[k][i], **own)
    for k, shape in enumerate(shapes):
        if many[k]:
            parts, *rows = any_number([math.prod(shape)], *streams(keys[:, k]))
            made = compiled(uniforms_from_counters, uniforms_from_counters)(*rows, math.prod(shape) // parts)
            drawn[k] = made[: parts * steps].view(steps, *shape)
    return tuple(drawn)


def gumbel(u: Tensor) -> Tensor:
    """Turn uniforms into Gumbel noise: the largest of logits plus noise is a draw from their softmax."""
    return -(-u.log()).log()


def pick(weights: Tensor, u: Tensor) -> Tensor:
    """Draw an index for each row of unnormalised weights ``(n, m)`` with a uniform number ``(n,)``."""
    cumulative = weights.cumsum(1)
    # Below the last sum even after rounding, so that no index of weight zero can come out.
    return torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)


def hot_at(index: Tensor, like: Tensor) -> Tensor:
    """Make one-hot rows ``(*index.shape, K)`` of K, the last axis, and the type of ``like``."""
    return (torch.arange(like.shape[-1], device=like.device) == index.unsqueeze(-1)).to(like.dtype)


def gains(x: Tensor, grad: Tensor, hot: bool) -> Tensor:
    """First-order change of the log-density for each change of a state, d above, of the shape of x.

    For one-hot states the entry of the class that a site has is 0.
    """
    return (grad * x).sum(-1, keepdim=True) - grad if hot else grad * (2.0 * x - 1.0)


def change_logits(x: Tensor, grad: Tensor, hot: bool) -> Tensor:
    """Return d/2 for every change, which is the locally balanced weight's logarithm; minus infinity for no change."""
    half = 0.5 * gains(x, grad, hot)
    return torch.where(x == 1, -torch.inf, half) if hot else half


def change_at(x: Tensor, index: Tensor, hot: bool) -> Change:
    """Read an index into the flattened event as a change."""
    if not hot:
        zero = torch.zeros_like(index)
        return Change(index, zero, zero)
    classes = x.shape[-1]
    site = index // classes
    rows = torch.arange(x.shape[0], device=x.device)
    return Change(site, x.reshape(x.shape[0], -1, classes)[rows, site].argmax(1), index % classes)


def index_back(x: Tensor, change: Change, hot: bool) -> Tensor:
    """Index, into the flattened event, of the change that undoes one."""
    return change.site * x.shape[-1] + change.before if hot else change.site


def changed(x: Tensor, change: Change, hot: bool) -> Tensor:
    """Make one change in each chain."""
    shape = x.shape[:-1] if hot else x.shape
    sites = torch.arange(shape[1:].numel(), device=x.device).reshape(1, *shape[1:])
    here = sites == per_chain(change.site, sites)
    if not hot:
        return torch.where(here, 1.0 - x, x)
    new = hot_at(change.after, x)
    return torch.where(here.unsqueeze(-1), new.reshape(-1, *([1] * (x.ndim - 2)), x.shape[-1]), x)
