"""Couplings along the edges of a graph; see `gibbsian.energies.couplings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.energies.couplings import colours, hold, neighbour_lists, refuse_asymmetric, refuse_loops
from gibbsian.energies.tractable import shape_of
from gibbsian.errors import OptionError, ShapeError


class SparseCouplings(nn.Module):
    """Couplings along the edges of a graph.

    The field is a sum over each site's neighbours, whose cost goes with the edges: `torch.nn.functional.embedding_bag`,
    with the sites as its rows, a bag for each and J as weights, was several times faster than adding edge by edge.

    Parameters
    ----------
    sites
        How many, or their shape; sites are numbered in its order.
    first, second
        The two sites of each edge, ``(m,)``, different from each other; each pair once, in either order.
    coupling
        J, one for all edges, ``(m,)``, or ``(m, K, K)`` between classes of the first and of the second site.
    trainable
        Whether J is a parameter, ``(m,)`` or ``(m, K, K)``.

    Raises
    ------
    OptionError
        If there is no such site, an edge joins a site to itself or comes twice, or J is not finite.
    ShapeError
        If edges and couplings are not as many.
    """

    coupling: Tensor
    first: Tensor
    second: Tensor
    colours: Tensor
    neighbour: Tensor
    offset: Tensor
    source: Tensor

    def __init__(
        self,
        sites: int | Sequence[int],
        first: Tensor | Sequence[int],
        second: Tensor | Sequence[int],
        coupling: float | Tensor = 0.0,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape_of(sites)
        j = coupling if isinstance(coupling, Tensor) else torch.tensor(float(coupling))
        a, b = (torch.as_tensor(e, dtype=torch.int64 if not len(e) else None, device=j.device) for e in (first, second))
        _check_edges(self.shape, a, b)
        if j.ndim == 0:
            j = j.expand(len(a))
        if j.ndim not in (1, 3) or len(j) != len(a) or (j.ndim == 3 and j.shape[1] != j.shape[2]):
            raise ShapeError(
                f"Couplings of {len(a)} edges are ({len(a)},), or ({len(a)}, K, K) between classes; got shape "
                f"{tuple(j.shape)}."
            )
        if not bool(torch.isfinite(j).all()):
            raise OptionError(f"Couplings are finite; {int((~torch.isfinite(j)).sum())} of {j.numel()} are not.")
        self.classes = j.shape[1] if j.ndim == 3 else None
        hold(self, "coupling", j, trainable)
        self.register_buffer("first", a.long().clone())
        self.register_buffer("second", b.long().clone())
        self._arrange()

    @staticmethod
    def of(matrix: Tensor, trainable: bool = False) -> SparseCouplings:
        """Read a symmetric matrix ``(d, d)`` with a zero diagonal, sparse or dense; its entries become the edges.

        Parameters
        ----------
        matrix
            J.
        trainable
            As above.

        Raises
        ------
        OptionError
            If it is not symmetric, or a site is coupled to itself.
        ShapeError
            If it is not square.
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"Sparse couplings are a matrix (d, d); got shape {tuple(matrix.shape)}.")
        found = matrix.detach().to_sparse_coo().coalesce()
        (i, j), v = found.indices(), found.values()
        refuse_loops(int((i == j)[v != 0].sum()), len(matrix))
        gap = (found - found.T).coalesce().values().abs()
        refuse_asymmetric(float(gap.max()) if len(gap) else 0.0, v)
        above = (i < j) & (v != 0)
        return SparseCouplings(len(matrix), i[above], j[above], v[above], trainable)

    def forward(self, s: Tensor) -> Tensor:
        """Sum the coupled neighbours of every site: ``(n, *shape)``, or ``(n, *shape, K)``, as it came."""
        n, rows = len(s), len(self.offset)
        # Sites, or sites and classes, in front; the rest of a state is carried along.
        table = s.reshape(n, rows, -1).movedim(1, 0).flatten(1)
        weights = self.coupling.flatten().index_select(0, self.source)
        total = nn.functional.embedding_bag(
            self.neighbour, table, self.offset, mode="sum", per_sample_weights=weights.to(table.dtype)
        )
        # In rows, as states are: a transposed one would be another graph to a compiler.
        return total.view(rows, n, -1).movedim(0, 1).reshape(s.shape).contiguous()

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The edges, ``(m,)`` each, and their J, ``(m,)`` or ``(m, K, K)``."""
        return self.first, self.second, self.coupling

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """Sites of one colour, no two of which are coupled."""
        return tuple(self.colours == k for k in range(self.count))

    def extra_repr(self) -> str:
        """Sites, edges and colours."""
        return f"{self.shape.numel()} sites, {len(self.first)} edges, in {self.count} blocks"

    def _arrange(self) -> None:
        """Find who sums what: for each site, or site and class, its neighbours and which J each comes with."""
        a, b, k, d = self.first, self.second, self.classes or 1, self.shape.numel()
        number = torch.arange(len(a) * k * k, device=a.device).view(-1, k, k)
        # J[m, p, q] joins class p of the first site to class q of the second, and each adds to the other.
        p = (a[:, None, None] * k + torch.arange(k, device=a.device)[:, None]).expand_as(number).flatten()
        q = (b[:, None, None] * k + torch.arange(k, device=a.device)).expand_as(number).flatten()
        at, order = torch.cat((p, q)).sort(stable=True)
        degree = torch.bincount(at, minlength=d * k)
        self.register_buffer("neighbour", torch.cat((q, p))[order], persistent=False)
        self.register_buffer("offset", degree.cumsum(0) - degree, persistent=False)
        self.register_buffer("source", number.flatten().repeat(2)[order], persistent=False)
        found = colours(neighbour_lists(d, a.tolist(), b.tolist()))
        self.register_buffer("colours", found.view(self.shape).to(a.device), persistent=False)
        self.count = int(found.max()) + 1

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Load as any module does, then find the neighbours anew: the saved edges may be others."""
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]
        self._arrange()


def _check_edges(shape: torch.Size, a: Tensor, b: Tensor) -> None:
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(f"Edges are two lists of sites of one length; got {tuple(a.shape)} and {tuple(b.shape)}.")
    if any(e.is_floating_point() or e.is_complex() or e.dtype == torch.bool for e in (a, b)):
        raise OptionError(f"Edges are whole numbers, the places of their two sites; got {a.dtype} and {b.dtype}.")
    d, ends = shape.numel(), torch.stack((a, b)).long()
    if ends.numel() and (int(ends.min()) < 0 or int(ends.max()) >= d):
        raise OptionError(f"Sites are numbered from 0 to {d - 1}; edges name {int(ends.min())} to {int(ends.max())}.")
    if bool((a == b).any()):
        raise OptionError(
            f"A site is not coupled to itself: that is a constant or a field. {int((a == b).sum())} of {len(a)} edges "
            "join a site to itself."
        )
    low, high = ends.sort(0).values
    unique, times = (low * d + high).unique(return_counts=True)
    if len(unique) < len(a):
        pair = int(unique[times > 1][0])
        raise OptionError(
            f"Each pair of sites has one edge; {int((times > 1).sum())} pairs come twice or more, as ({pair // d}, "
            f"{pair % d}). Add their couplings."
        )
