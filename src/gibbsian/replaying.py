"""Calling a compiled graph again without asking once more whether it still fits.

Before every call of a compiled function Dynamo looks at all that its graph was made for: each attribute of an energy
and of a kernel that the code reads. For chains of a cheap energy that takes three times as long as their trajectory. In
the loop of one run nothing of it changes but tensors that come round again: so two calls are watched, to learn which
tensor of the arguments is which input of the graph and which of its outputs is what of the result; further calls go to
the graph. What cannot be told by the identity of tensors is left to Dynamo, as is whatever happens outside of such a
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WAYS = 16
"""Different calls of one function in one run that are learned; a function that is called otherwise each time is not."""

_PLAIN = (bool, int, float, str)

_loop: ContextVar[dict[Any, Replay] | None] = ContextVar("what the present loop calls again and again", default=None)
_watched: list[list[tuple[Any, ...]]] = []


@contextmanager
def loop(steady: bool = True) -> Iterator[None]:
    """Declare that energies and kernels do not change inside, tensors aside, so that graphs may be called directly.

    Parameters
    ----------
    steady
        ``False`` where they may, as with a user's function that is called in between.
    """
    token = _loop.set({} if steady else None)
    try:
        yield
    finally:
        _loop.reset(token)


def in_loop(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls a compiled function in the present loop; the function itself outside of any."""
    kept = _loop.get()
    if kept is None:
        return run
    if run not in kept:
        kept[run] = Replay(run)
    return kept[run]


def watchable(graph: Any) -> Callable[..., Any]:
    """Let the calls of a graph be watched: what it is given and what it returns."""

    def call(*inputs: Any) -> Any:
        outputs = graph(*inputs)
        if _watched:
            _watched[-1].append((graph, inputs, outputs))
        return outputs

    return call


class Way(NamedTuple):
    """How arguments become the inputs of a graph, and its outputs the result.

    Attributes
    ----------
    graph
        The compiled graph.
    inputs
        For each input its place among the tensors of the arguments, followed by the constants.
    constants
        Inputs that are always the same: weights and settings, and numbers that go with the tensors' sizes.
    sizes
        Shape, strides, type and device of each tensor of the arguments.
    result
        Nested as the result is, with places instead of tensors: of outputs from 0, of arguments' tensors below 0.
    held
        Objects whose identity the way goes by, which must not go away.
    build
        Makes the result.
    """

    graph: Callable[..., Any]
    inputs: tuple[int, ...]
    constants: tuple[Any, ...]
    sizes: tuple[Any, ...]
    result: Any
    held: tuple[Any, ...]
    build: Callable[[Any, list[Tensor]], Any]

    def agrees(self, other: Way) -> bool:
        """Whether two calls were the same but for what the tensors hold."""
        return (
            self.graph is other.graph
            and self.inputs == other.inputs
            and all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(self.constants, other.constants))
            and self.sizes == other.sizes
            and self.result == other.result
        )


class Replay:
    """A compiled function as one loop calls it: watched twice, then called directly.

    Parameters
    ----------
    run
        The function.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.ways: dict[tuple[Any, ...], tuple[Way | None, int]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        tensors: list[Tensor] = []
        shape: list[Any] = [torch.is_grad_enabled()]
        held: list[Any] = []
        _take_apart(arguments, tensors, shape, held)
        key = tuple(shape)
        way, seen = self.ways.get(key, (None, 0))
        if seen == 2 and way is not None and all(map(_fits, tensors, way.sizes)):
            pool = [*tensors, *way.constants]
            outputs = way.graph(*[pool[i] for i in way.inputs])
            return way.build(outputs, tensors)
        if seen < 0 or (seen == 0 and len(self.ways) == _WAYS):
            return self.run(*arguments)
        calls: list[tuple[Any, ...]] = []
        _watched.append(calls)
        try:
            result = self.run(*arguments)
        finally:
            _watched.pop()
        found = _way(calls, tensors, result, tuple(held))
        if found is None:
            # The first call of a run may have the same tensor in two places, as a start that is its own origin.
            self.ways[key] = (None, -1 if seen else 1)
        else:
            self.ways[key] = (found, 2 if way is not None and way.agrees(found) else 1)
        return result


def _take_apart(values: Any, tensors: list[Tensor], shape: list[Any], held: list[Any]) -> None:
    """Sort arguments into tensors and all that a call must have in common with another to be the same."""
    for value in values:
        kind = type(value)
        if isinstance(value, Tensor):
            tensors.append(value)
            shape.append(kind)
        elif kind is tuple or kind is list or hasattr(kind, "_make"):
            shape.append((kind, len(value)))
            _take_apart(value, tensors, shape, held)
        elif value is None or kind in _PLAIN:
            shape.append((kind, value))
        else:
            shape.append(id(value))
            held.append(value)


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device


def _fits(t: Tensor, form: tuple[Any, ...]) -> bool:
    return t.shape == form[0] and t.stride() == form[1] and t.dtype is form[2] and t.device == form[3]


def _way(calls: list[tuple[Any, ...]], tensors: list[Tensor], result: Any, held: tuple[Any, ...]) -> Way | None:
    """Find out the way of a call that was watched; ``None`` where identities do not tell it."""
    places = {id(t): i for i, t in enumerate(tensors)}
    plain = len(places) == len(tensors) and all(type(t) is Tensor and not t.requires_grad for t in tensors)
    if len(calls) != 1 or not plain:
        return None
    graph, inputs, outputs = calls[0]
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(t, Tensor) for t in outputs):
        return None
    if not all(isinstance(t, (Tensor, int)) for t in inputs):
        return None
    made = {id(t): i for i, t in enumerate(outputs)}
    used: set[int] = set()

    def named(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in made:
                used.add(made[id(value)])
                return made[id(value)]
            return -1 - places[id(value)]
        if isinstance(value, (tuple, list)):
            return (type(value), tuple(named(each) for each in value))
        raise KeyError(value)

    try:
        nested = named(result)
    except KeyError:
        return None
    if len(used) != len(outputs):
        return None  # Something was computed that the function keeps elsewhere, as a buffer's new value.
    taken, constants = [], []
    for each in inputs:
        if id(each) not in places:
            constants.append(each)
        taken.append(places.get(id(each), len(tensors) + len(constants) - 1))
    forms = tuple(map(_form, tensors))
    return Way(graph, tuple(taken), tuple(constants), forms, nested, held, _builder(nested))


def _builder(nested: Any) -> Callable[[Any, list[Tensor]], Any]:
    """Write the function that builds a result from outputs o and the arguments' tensors t: one expression is quick."""
    kinds: dict[str, Any] = {}

    def written(part: Any) -> str:
        if isinstance(part, int):
            return f"o[{part}]" if part >= 0 else f"t[{-1 - part}]"
        kind, parts = part
        inside = "".join(f"{written(each)}, " for each in parts)
        if kind is list:
            return f"[{inside}]"
        if kind is tuple:
            return f"({inside})"
        kinds[kind.__name__] = kind
        return f"{kind.__name__}({inside})"

    return eval(f"lambda o, t: {written(nested)}", kinds)
