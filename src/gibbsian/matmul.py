"""Matrix products of compiled energies on processors that torch's own library is slow on.

Torch multiplies float32 matrices on a CPU with MKL, which gives AMD processors no AVX-512 code: the products of a
network's layers then take twice the time they need. OneDNN, which torch ships too, has that code. A pass over a
compiled graph puts its products in the place of torch's; sums are those of float32 either way.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 256, 16
"""Smallest products that are worth the call."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@functools.cache
def linear() -> Any:
    """OneDNN's product under a name that a compiled graph can call; made when first asked for."""
    library = torch.library.Library("gibbsian", "DEF")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("linear", _linear, "CPU")
    library.impl("linear", _shape_of_linear, "Meta")
    return torch.ops.gibbsian.linear.default, library  # the library takes its operators along when it goes


@functools.cache
def options() -> dict[str, Any]:
    """Options of ``torch.compile`` that this machine profits from; none on most."""
    return {"post_grad_custom_post_pass": onednn_products()} if _slow() else {}


@functools.cache
def is_slow_here() -> bool:
    """Whether torch's products are slow on this processor, asked once."""
    return _slow()


def _slow() -> bool:
    """Whether this processor is one that MKL has no code for and oneDNN has."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        processor = ""
    fit = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return fit and "AuthenticAMD" in processor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of matrices, by the quicker library, for code that writes its gradients itself."""
    rows, sizes = x.shape[0], weight.shape
    if rows >= ROWS // 4 and sizes[0] >= COLUMNS and sizes[1] >= COLUMNS and is_slow_here():
        plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
        # Repeated rows without memory of their own (strides of zero) are left to torch.
        if plain and 0 not in x.stride() and 0 not in weight.stride():
            return _linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def replace_products(graph: torch.fx.Graph) -> int:
    """Put oneDNN's products in the place of torch's; return how many."""
    aten, count = torch.ops.aten, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        bias, (x, weight) = (None, node.args) if len(node.args) == 2 else (node.args[0], node.args[1:])
        out, w = node.meta["val"], weight.meta["val"]
        vector = bias is None or bias.meta["val"].ndim == 1
        if not vector or out.dtype != torch.float32 or out.device.type != "cpu":
            continue
        if out.shape[0] < ROWS or min(w.shape) < COLUMNS:
            continue
        with graph.inserting_before(node):
            turned = graph.call_function(aten.permute.default, (weight, [1, 0]))
            turned.meta["val"] = w.permute(1, 0)
            product = graph.call_function(linear()[0], (x, turned, bias))
            product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        count += 1
    return count


def onednn_products() -> Any:
    """Build the pass, in the form in which the compiler's cache can tell it from others."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    linear()  # A graph from the compiler's cache on disk calls it without any pass having run.

    class OneDnnProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            replace_products(graph)

        def uuid(self) -> str:
            return "gibbsian.matmul 1"

    return OneDnnProducts()
