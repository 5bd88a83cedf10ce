"""Counting what a step keeps and does: bytes for the backward pass, products' operations, calls of kernels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gibbsian.planning.costs import Line, Work
from gibbsian.training.state import optimizer_of, trained_parameters


class _Kept:
    """A tensor that a backward pass keeps, counted for as long as it lives."""

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        self.key = ledger.add(tensor)

    def __del__(self) -> None:
        self.ledger.drop(self.key)


class Ledger:
    """Bytes of storages that backward passes keep: the most at any moment, and the largest single one."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.live = own, dict[int, tuple[int, int]]()
        self.bytes, self.peak, self.largest = 0, 0, 0

    def add(self, tensor: Tensor) -> int:
        """Count a tensor's storage, unless it is one of the module's own or counted already."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.own:
            return 0
        size, uses = self.live.get(key, (size, 0))
        if not uses:
            self.bytes += size
            self.peak, self.largest = max(self.peak, self.bytes), max(self.largest, size)
        self.live[key] = (size, uses + 1)
        return key

    def drop(self, key: int) -> None:
        """Forget one use of a storage."""
        if key not in self.live:
            return
        size, uses = self.live.pop(key)
        if uses > 1:
            self.live[key] = (size, uses - 1)
        else:
            self.bytes -= size


def kept_bytes(run: Callable[[], object], modules: tuple[nn.Module, ...]) -> tuple[int, int]:
    """Count the bytes that graphs keep at most while something runs, and the largest single storage among them.

    Parameters
    ----------
    run
        What to run; what it returns is held until the end.
    modules
        Whose parameters and buffers are there anyway.
    """
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    ledger = Ledger(own)

    def unpack(kept: _Kept) -> Tensor:
        return kept.tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(ledger, t), unpack):
        held = run()
    peak, largest = ledger.peak, ledger.largest
    del held
    return peak, largest


class _Calls(TorchDispatchMode):
    """Counts operations of products and convolutions, and calls of kernels; views compute nothing and are left out.

    Torch's own counter follows modules, too, and that way fails where an objective differentiates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls += not getattr(func, "is_view", False)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def counted(run: Callable[[], object]) -> tuple[float, float]:
    """Count floating-point operations of products and convolutions, and calls of kernels."""
    with _Calls() as calls:
        run()
    return float(calls.flops), float(calls.calls)


def work_of(run: Callable[[], object], rows: int) -> Work:
    """Count a step of so many rows: operations of products go by the row, calls do not."""
    flops, calls = counted(run)
    return Work(flops / rows, calls)


def line_through(points: dict[int, float]) -> Line:
    """Draw a line through bytes at two sizes."""
    (a, low), (b, high) = sorted(points.items())
    slope = max(0.0, (high - low) / (b - a))
    return Line(low - slope * a, slope)


def moment_bytes(energy: nn.Module, objective: nn.Module, settings: Any) -> float:
    """Bytes of the optimiser's state for what is trained, read off an optimiser that made a step of nothing."""
    params: list[Tensor] = list(trained_parameters(energy, objective).values())
    before = [(p.detach().clone(), p.grad) for p in params]
    optimizer = optimizer_of(params, settings)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = sum(size_of(v) for each in optimizer.state.values() for v in each.values() if isinstance(v, Tensor))
    with torch.no_grad():
        for p, (value, grad) in zip(params, before):
            p.copy_(value)
            p.grad = grad
    return float(state)


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def resident() -> float:
    """Bytes of memory that this process has now, where the system tells; else the most that it had."""
    try:
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)


def available() -> float | None:
    """Bytes of the machine's memory that are free to use, where the system tells."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return float(line.split()[1]) * 1024.0
    except (OSError, StopIteration, ValueError):
        return None
