"""Calling a compiled graph again without asking once more whether it still fits.

Before every call of a compiled function Dynamo looks at all that its graph was made for: each attribute of an energy
and of a kernel that the code reads. For chains of a cheap energy that takes three times as long as their trajectory. In
the loop of one run nothing of it changes but tensors that come round again: so, after some calls, two are watched, to
learn which tensor of the arguments is which input of the graph and which of its outputs is what of the result; further
calls go to the graph. What cannot be told by the identity of tensors is left to Dynamo, as is whatever happens outside
of such a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

_PASSED = 32
"""Calls in one loop before any is watched: learning two takes 1.5 ms, which so many further calls save."""

_WATCHED = 32
"""Calls of one function in one loop that are watched at most: one that is called otherwise each time is not learned."""

_PLAIN = (bool, int, float, str)

_loop: ContextVar[dict[Any, Replay] | None] = ContextVar("what the present loop calls again and again", default=None)
_watched: list[Watch] = []


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


class Call(NamedTuple):
    """A call of a graph that was watched: what is called with a list of inputs, these, and what it returned."""

    graph: Callable[[list[Any]], Any]
    inputs: tuple[Any, ...]
    outputs: Any


class Watch(NamedTuple):
    """Calls of Inductor's code itself, and of all that torch puts around it."""

    inner: list[Call]
    outer: list[Call]


def watchable(graph: Any) -> Callable[..., Any]:
    """Let the calls of a graph be watched: what it is given and what it returns."""

    def listed(inputs: list[Any]) -> Any:
        return graph(*inputs)

    def call(*inputs: Any) -> Any:
        outputs = graph(*inputs)
        if _watched:
            _watched[-1].outer.append(Call(listed, inputs, outputs))
        return outputs

    return call


@contextmanager
def _watching() -> Iterator[Watch]:
    """Watch which graphs are called."""
    from torch._inductor.output_code import CompiledFxGraph

    watch, called = Watch([], []), CompiledFxGraph.__call__

    def call(self: Any, inputs: Any) -> Any:
        given, direct = tuple(inputs), getattr(self, "current_callable", None)
        outputs = called(self, inputs)
        if direct is not None:
            watch.inner.append(Call(direct, given, outputs))
        return outputs

    CompiledFxGraph.__call__ = call  # type: ignore[method-assign]
    _watched.append(watch)
    try:
        yield watch
    finally:
        _watched.pop()
        CompiledFxGraph.__call__ = called  # type: ignore[method-assign]


class Way(NamedTuple):
    """How arguments become the inputs of a graph, and its outputs the result.

    Attributes
    ----------
    graph
        The compiled graph, called with a list of inputs.
    match
        Takes the tensors out of arguments that are like those of the call that was watched; ``None`` of others.
    fits
        Whether tensors are of the type, shape and strides of those that were watched.
    inputs
        For each input its place among these tensors, followed by the constants.
    constants
        Inputs that are always the same: weights and settings, and numbers that go with the tensors' sizes.
    result
        Nested as the result is, with places instead of tensors: of outputs from 0, of arguments' tensors below 0.
    build
        Makes the result.
    """

    graph: Callable[[list[Any]], Any]
    match: Callable[[tuple[Any, ...]], tuple[Tensor, ...] | None]
    fits: Callable[..., bool]
    inputs: tuple[int, ...]
    constants: tuple[Any, ...]
    result: Any
    build: Callable[[Any, tuple[Tensor, ...]], Any]

    def agrees(self, other: Way) -> bool:
        """Whether two calls were the same but for what the tensors hold."""
        return (
            self.graph is other.graph
            and self.inputs == other.inputs
            and all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(self.constants, other.constants))
            and self.result == other.result
        )


class Replay:
    """A compiled function as one loop calls it: after some calls watched twice, then called directly.

    Parameters
    ----------
    run
        The function.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.learned: list[Way] = []
        self.seen_once: list[list[Way]] = []
        self.passed = 0
        self.watched = 0

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        for way in self.learned:
            if (tensors := way.match(arguments)) is not None and way.fits(*tensors):
                pool = (*tensors, *way.constants)
                return way.build(way.graph([pool[i] for i in way.inputs]), tensors)
        if self.passed < _PASSED or self.watched == _WATCHED:
            self.passed += 1
            return self.run(*arguments)
        self.watched += 1
        with _watching() as watch:
            result = self.run(*arguments)
        ways = [_way(calls, arguments, result) for calls in (watch.inner, watch.outer)]
        if found := [way for way in ways if way is not None]:
            self._learn(found, arguments)
        return result

    def _learn(self, found: list[Way], arguments: tuple[Any, ...]) -> None:
        for once in self.seen_once:
            if (tensors := once[0].match(arguments)) is not None and once[0].fits(*tensors):
                self.seen_once.remove(once)
                if agreed := [way for way in found if any(way.agrees(earlier) for earlier in once)]:
                    self.learned.append(agreed[0])
                else:
                    self.seen_once.append(found)
                return
        self.seen_once.append(found)


def _matcher(arguments: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], tuple[Tensor, ...] | None]:
    """Write the function that finds the tensors of arguments like these: written out, it takes a microsecond."""
    known: dict[str, Any] = {"Tensor": Tensor}
    lines, tensors = [], []

    def write(name: str, value: Any) -> None:
        kind = type(value)
        if kind is Tensor:
            lines.append(f"if type({name}) is not Tensor: return None")
            tensors.append(name)
            return
        known[f"value_{name}"], known[f"type_{name}"] = value, kind
        if kind is tuple or kind is list or hasattr(kind, "_make"):
            inside = [f"{name}_{i}" for i in range(len(value))]
            lines.append(f"if type({name}) is not type_{name} or len({name}) != {len(value)}: return None")
            if inside:
                lines.append(f"{', '.join(inside)}, = {name}")
            for each, part in zip(inside, value):
                write(each, part)
        elif kind in _PLAIN:
            lines.append(f"if type({name}) is not type_{name} or {name} != value_{name}: return None")
        else:
            lines.append(f"if {name} is not value_{name}: return None")

    write("a", arguments)
    body = "\n    ".join([*lines, f"return ({''.join(f'{name}, ' for name in tensors)})"])
    exec(f"def match(a):\n    {body}", known)
    return known["match"]


def _checker(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Return what tells whether tensors are like these: Dynamo's own guard, which takes a microsecond for them all."""
    forms = [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]

    def same(*others: Tensor) -> bool:
        return all((t.dtype, t.device, t.shape, t.stride()) == form for t, form in zip(others, forms))

    try:
        from torch._C._dynamo.guards import TensorGuards

        check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check if check(*tensors) else same
    except (ImportError, TypeError):
        return same


def _way(calls: list[Call], arguments: tuple[Any, ...], result: Any) -> Way | None:
    """Find out the way of a call that was watched; ``None`` where identities do not tell it."""
    tensors = (match := _matcher(arguments))(arguments) or ()
    places = {id(t): i for i, t in enumerate(tensors)}
    if len(calls) != 1 or len(places) != len(tensors) or any(t.requires_grad for t in tensors):
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
    if len(used) != len(made):
        return None  # Something was computed that the function keeps elsewhere, as a buffer's new value.
    taken, constants = [], []
    for each in inputs:
        if id(each) not in places:
            constants.append(each)
        taken.append(places.get(id(each), len(tensors) + len(constants) - 1))
    return Way(graph, match, _checker(tensors), tuple(taken), tuple(constants), nested, _builder(nested))


def _builder(nested: Any) -> Callable[[Any, tuple[Tensor, ...]], Any]:
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
