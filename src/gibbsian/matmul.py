"""Matrix products of compiled energies on a CPU: thin ones written out, and large ones by the quicker library.

The first and the last layer of a network on a few columns are products of thin matrices, which are hardly work: a call
of a library takes longer than they do, and keeps the compiler from joining them with the activations beside them. A
pass over a compiled graph writes them out as products and sums.

Torch multiplies float32 matrices with MKL, which gives AMD processors no AVX-512 code: large products then take twice
the time they need. OneDNN, which torch ships too, has that code, and the pass puts its products in the place of
torch's. Sums are those of float32 either way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 256, 16
"""Smallest products that are worth a call of oneDNN."""

MULTIPLICATIONS = 2**21
"""Of fewer rows, those that take as many multiplications as this."""

THIN = 4
"""Terms, or columns, up to which a product is written out."""


OFTEN = 4
"""Products with one matrix in a graph from which turning it once pays."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _row_by_row(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _shape_row_by_row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@functools.cache
def operators() -> Any:
    """OneDNN's product, and a matrix laid out anew, under names that a compiled graph can call; made when first asked.

    The compiler would not lay a matrix out once, but read it with gaps wherever it is used.
    """
    library = torch.library.Library("gibbsian", "DEF")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("linear", _linear, "CPU")
    library.impl("linear", _shape_of_linear, "Meta")
    library.define("row_by_row(Tensor x) -> Tensor")
    library.impl("row_by_row", _row_by_row, "CPU")
    library.impl("row_by_row", _shape_row_by_row, "Meta")
    return torch.ops.gibbsian, library  # the library takes its operators along when it goes


def has_products(graph: torch.fx.GraphModule) -> bool:
    """Whether a graph as it was traced multiplies matrices."""
    names = (getattr(node.target, "__name__", node.target) for node in graph.graph.nodes if node.op[:5] == "call_")
    return any(name in ("linear", "matmul", "mm", "addmm") for name in names)


@functools.cache
def options() -> dict[str, Any]:
    """Options of ``torch.compile`` for this machine."""
    return {"post_grad_custom_post_pass": products_pass(_slow())}


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


def is_worth_a_call(rows: int, terms: int, columns: int) -> bool:
    """Whether a product is large enough for oneDNN, whose calls take ten microseconds more than torch's."""
    many = rows >= ROWS or (rows >= COLUMNS and rows * terms * columns >= MULTIPLICATIONS)
    return many and min(terms, columns) >= COLUMNS


def replace_products(graph: torch.fx.Graph) -> int:
    """Put oneDNN's products in the place of torch's; return how many."""
    count = 0
    for node, x, weight, bias in _products(graph):
        out, w = node.meta["val"], weight.meta["val"]
        if out.dtype != torch.float32 or not is_worth_a_call(out.shape[0], *w.shape):
            continue
        with graph.inserting_before(node):
            turned = _call(graph, torch.ops.aten.permute.default, weight, [1, 0])
            product = graph.call_function(operators()[0].linear.default, (x, turned, bias))
            product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        count += 1
    return count


def write_out_thin_products(graph: torch.fx.Graph) -> int:
    """Write products of few terms or columns as sums, which the compiler joins with what is around; return how many."""
    aten, count = torch.ops.aten, 0
    laid_out: dict[Any, Any] = {}
    for node, x, weight, bias in _products(graph):
        left, (terms, columns) = x.meta["val"], weight.meta["val"].shape
        if left.dtype not in (torch.float32, torch.float64):
            continue
        with graph.inserting_before(node):
            if terms <= THIN:
                total, weight = None, _with_whole_rows(graph, weight, laid_out)
                for i in range(terms):
                    column = _call(graph, aten.slice.Tensor, x, 1, i, i + 1)
                    row = _call(graph, aten.slice.Tensor, weight, 0, i, i + 1)
                    term = _call(graph, aten.mul.Tensor, column, row)
                    total = term if total is None else _call(graph, aten.add.Tensor, total, term)
            elif columns <= THIN and left.stride(1) == 1:
                turned = _with_whole_rows(graph, _call(graph, aten.permute.default, weight, [1, 0]), laid_out)
                sums = []
                for i in range(columns):
                    row = _call(graph, aten.slice.Tensor, turned, 0, i, i + 1)
                    sums.append(_call(graph, aten.sum.dim_IntList, _call(graph, aten.mul.Tensor, x, row), [1], True))
                total = sums[0] if columns == 1 else _call(graph, aten.cat.default, sums, 1)
            else:
                continue
            if bias is not None:
                total = _call(graph, aten.add.Tensor, total, bias)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        count += 1
    return count


def lay_out_often_used(graph: torch.fx.Graph) -> int:
    """Turn weights once that a block of steps multiplies by again and again in their other direction; return how many.

    A product with the transposed matrix, and one that adds a row, each take a twentieth longer; the compiler adds the
    row where it computes what comes next.
    """
    laid_out: dict[Any, Any] = {}
    turned = [each for each in _products(graph) if each[2].meta["val"].stride(0) == 1 != each[2].meta["val"].stride(1)]
    for node, x, weight, bias in turned:
        if sum(other[2].args == weight.args for other in turned) < OFTEN or len(x.meta["val"]) < COLUMNS:
            continue
        if not _calls(weight, torch.ops.aten.permute.default):
            continue
        with graph.inserting_before(node):
            rows = _with_whole_rows(graph, weight, laid_out)
            product = _call(graph, torch.ops.aten.mm.default, x, rows)
            product = product if bias is None else _call(graph, torch.ops.aten.add.Tensor, product, bias)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return len(laid_out)


def share_exponentials(graph: torch.fx.Graph) -> int:
    """Let x / (1 + exp(-x)) and its derivative have one exponential between them; return how often they do.

    Torch takes the former apart into these steps and the latter into others with a sigmoid, so that the compiler does
    not see that they are the same; the exponentials are most of the time of an activation.
    """
    aten, count = torch.ops.aten, 0
    of: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if _calls(node, aten.sigmoid.default):
            of.setdefault(node.args[0], []).append(node)
    shared: dict[Any, Any] = {}
    for node in list(graph.nodes):
        if not _calls(node, aten.div.Tensor) or node.kwargs or (x := node.args[0]) not in of:
            continue
        below = node.args[1]
        if not _calls(below, aten.add.Tensor) or below.args[1] != 1 or below.kwargs:
            continue
        if not _calls(exp := below.args[0], aten.exp.default) or not _calls(neg := exp.args[0], aten.neg.default):
            continue
        if neg.args[0] is not x:
            continue
        if x not in shared:
            # Right where x is made, which is before anything that uses either form.
            with graph.inserting_before(_after(graph, x)):
                shared[x] = _call(graph, aten.sigmoid.default, x)
            for each in of[x]:
                each.replace_all_uses_with(shared[x])
                graph.erase_node(each)
        with graph.inserting_before(node):
            product = _call(graph, aten.mul.Tensor, x, shared[x])
        node.replace_all_uses_with(product)
        count += 1
    graph.eliminate_dead_code()
    return count


def products_pass(onednn: bool) -> Any:
    """Build the pass, in the form in which the compiler's cache can tell it from others.

    Parameters
    ----------
    onednn
        Whether large products go to oneDNN.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    operators()  # A graph from the compiler's cache on disk calls them without any pass having run.

    class Products(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            share_exponentials(graph)
            write_out_thin_products(graph)
            if onednn:
                replace_products(graph)
            lay_out_often_used(graph)

        def uuid(self) -> str:
            return f"gibbsian.matmul 6{' onednn' if onednn else ''}"

    return Products()


def _products(graph: torch.fx.Graph) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Find the products of matrices on a CPU: the node, its two factors, and the row that is added, or ``None``."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        bias, (x, weight) = (None, node.args) if len(node.args) == 2 else (node.args[0], node.args[1:])
        if node.meta["val"].device.type == "cpu" and (bias is None or bias.meta["val"].ndim == 1):
            yield node, x, weight, bias


def _with_whole_rows(graph: torch.fx.Graph, matrix: Any, laid_out: dict[Any, Any]) -> Any:
    """Lay a matrix out row by row where it is not, right where it is made, and once for all its uses."""
    turned, root = False, matrix
    while _calls(root, torch.ops.aten.permute.default) and root.args[1] == [1, 0]:
        turned, root = not turned, root.args[0]
    if matrix.meta["val"].stride(1) == 1 or matrix.meta["val"].shape[1] == 1:
        return matrix
    if (root, turned) not in laid_out:
        with graph.inserting_before(_after(graph, root)):
            seen = _call(graph, torch.ops.aten.permute.default, root, [1, 0]) if turned else root
            laid_out[root, turned] = _call(graph, operators()[0].row_by_row.default, seen)
    return laid_out[root, turned]


def _after(graph: torch.fx.Graph, node: Any) -> Any:
    """Return the node before which something goes that is to stand right behind another; inputs stay together."""
    return (
        [each for each in graph.nodes if each.op == "placeholder"][-1].next if node.op == "placeholder" else node.next
    )


def _calls(node: Any, operator: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.target == operator


def _call(graph: torch.fx.Graph, operator: Any, *arguments: Any) -> Any:
    """Add a call to a graph, with what the compiler needs to know of its result."""
    from torch._inductor.virtualized import V

    def known(argument: Any) -> Any:
        if isinstance(argument, list):
            return [known(each) for each in argument]
        return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument

    node = graph.call_function(operator, arguments)
    with V.fake_mode:
        node.meta["val"] = operator(*(known(each) for each in arguments))
    return node
