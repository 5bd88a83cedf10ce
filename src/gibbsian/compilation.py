"""Compiling what a chain loop repeats, and falling back to eager when the machine cannot.

Dynamo keeps its compiled graphs with a function's code object and gives up after a few; so every energy gets a copy of
the function with a code object of its own, kept for as long as the energy lives.
"""

from __future__ import annotations

import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from gibbsian import matmul
from gibbsian.replaying import in_loop, watchable

_RECOMPILES = 64
_cache: weakref.WeakKeyDictionary[Any, dict[Callable[..., Any], Callable[..., Any]]] = weakref.WeakKeyDictionary()
_said: set[str] = set()
_spent = [0.0]
_trusts = [True]
_wanted: ContextVar[bool] = ContextVar("compilation is wanted", default=False)


def compiled(fn: Callable[..., Any], owner: object) -> Callable[..., Any]:
    """Return ``fn`` compiled as one graph, kept with its owner; where compilation fails it runs as it is, said once.

    Parameters
    ----------
    fn
        A plain function; its tensors enter as arguments.
    owner
        What the graph belongs to, usually the innermost energy (see `owner_of`). An object that takes no weak reference
        gets a graph that is not kept.
    """
    try:
        kept = _cache.setdefault(owner, {})
    except TypeError:
        kept = {}
    if fn not in kept:
        kept[fn] = _build(fn)
    return in_loop(kept[fn])


@contextmanager
def wanting(compilation: bool) -> Iterator[None]:
    """Tell whatever runs inside whether it may compile."""
    token = _wanted.set(compilation)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> bool:
    """Whether compilation is wanted here; not unless somebody said so."""
    return _wanted.get()


def made_ready(fn: Callable[..., Any], energy: object) -> Callable[..., Any]:
    """Return a part of a kernel that compiles its own inner parts: compiled for an energy if that is wanted here."""
    return compiled(fn, owner_of(energy)) if wanted() else fn


def seconds_spent() -> float:
    """Seconds that this process has spent in calls that compiled something, the first run of it included."""
    return _spent[0]


def owner_of(energy: object) -> object:
    """Find the innermost energy: wrappers built anew at each call (``given``, a temperature) share its graphs.

    So does a plain wrapper that says what it stands before in ``lifts``.
    """
    energy = getattr(energy, "lifts", energy)
    while isinstance(energy, nn.Module):
        inner = getattr(energy, "energy", None)
        if inner is None and (several := getattr(energy, "energies", None)) is not None and len(several):
            inner = several[0]
        if not isinstance(inner, nn.Module):
            break
        energy = inner
    return energy


def _build(fn: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo
    import torch._dynamo.exc
    import torch._dynamo.utils
    import torch._inductor.exc

    of_the_compiler = (
        torch._dynamo.exc.BackendCompilerFailed,
        torch._inductor.exc.InductorError,
        torch._inductor.exc.CppCompileError,
        torch._inductor.exc.InvalidCxxCompiler,
    )
    failures = (
        *of_the_compiler,
        torch._dynamo.exc.Unsupported,
        torch._dynamo.exc.FailOnRecompileLimitHit,
        torch._dynamo.exc.TorchRuntimeError,
    )
    graph, trusted = _graph(fn), _trusts[0]
    broken, counters = False, torch._dynamo.utils.counters
    patience: Any = nullcontext()

    def run(*arguments: Any) -> Any:
        nonlocal broken, graph, trusted, patience
        while not broken:
            before, began = counters["stats"]["unique_graphs"], time.perf_counter()
            try:
                with patience:
                    return graph(*arguments)
            except failures as error:
                if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit) and isinstance(patience, nullcontext):
                    # From here on only, since changing a setting of Dynamo's takes as long as a short step.
                    patience = torch._dynamo.config.patch(recompile_limit=_RECOMPILES)
                    continue
                if trusted and isinstance(error, of_the_compiler):
                    _distrust()
                    graph, trusted = _graph(fn), False
                    continue
                broken = True
                _say_eager_once(error)
            finally:
                if counters["stats"]["unique_graphs"] != before:
                    _spent[0] += time.perf_counter() - began
        return fn(*arguments)

    return run


def _graph(fn: Callable[..., Any]) -> Callable[..., Any]:
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    trusted = _trusts[0]

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        from torch import _inductor

        # Dynamo has compared the shapes of arguments already when the compiled code compares them once more.
        options = {"size_asserts": False} | matmul.options()
        if trusted:
            options["cpp.vec_isa_ok"] = True
            # Between products of small matrices, calls from Python would take as long as half of the products.
            options["cpp_wrapper"] = matmul.has_products(graph) and _on_cpu(examples)
        with _granted() if trusted else nullcontext():
            return watchable(_inductor.compile(graph, examples, options))

    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


def _on_cpu(examples: Any) -> bool:
    return all(t.device.type == "cpu" for t in examples if isinstance(t, torch.Tensor))


@contextmanager
def _granted() -> Iterator[None]:
    """Take for granted that the compiler knows the processor's vector instructions, until something does not compile.

    Inductor tries each set of them by compiling and loading a library, which is half of a first compilation. Its option
    for that leaves those out which stand for parts of a set.
    """
    from torch._inductor import cpu_vec_isa

    tried = cpu_vec_isa.VecISA.check_build
    cpu_vec_isa.VecISA.check_build = lambda self, code: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        cpu_vec_isa.VecISA.check_build = tried  # type: ignore[method-assign]


def _distrust() -> None:
    """Let Inductor find out itself which instructions the compiler knows."""
    from torch._inductor import cpu_vec_isa

    _trusts[0] = False
    for isa in cpu_vec_isa.supported_vec_isa_list:
        # What was taken for granted of parts of a set is remembered by the set.
        for granted in [name for name in vars(isa) if name.endswith("_supported")]:
            delattr(isa, granted)
    answers = [type(isa).__bool__ for isa in cpu_vec_isa.supported_vec_isa_list]
    for asked in (*answers, cpu_vec_isa.valid_vec_isa_list):
        if (forget := getattr(asked, "cache_clear", None)) is not None:
            forget()


def _say_eager_once(error: BaseException) -> None:
    if "eager" in _said:
        return
    _said.add("eager")
    reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
    warnings.warn(
        f"Compilation failed ({reason}); running eagerly, which gives the same results more slowly. On a CPU "
        "torch.compile needs a C++ compiler (g++ or clang) on the PATH; compile=False silences this.",
        RuntimeWarning,
        stacklevel=4,
    )
