r"""Couplings between sites: on a lattice, as a matrix, or along the edges of a graph.

Each is a linear map, the field that all other sites make at each, :math:`f_i = \sum_j J_{ij} s_j`, with each pair once
among its numbers, so that no gradient step leads to couplings that are not symmetric:

==================  ==========================  =================================================
`Lattice`           one J, or one per axis      neighbours by shifting
`Couplings`         d (d - 1) / 2 pairs         one product with a matrix
`SparseCouplings`   one J per edge              a sum over the neighbours of every site
==================  ==========================  =================================================

Between sites of K classes a J may be a matrix ``(K, K)``, whose rows are classes of the first site of the pair; or a
number, between equal classes. Sites that no coupling joins can be drawn at once given the rest: ``blocks`` are the
colours of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.energies.tractable import shape_of
from gibbsian.errors import OptionError, ShapeError


def hold(module: nn.Module, name: str, value: Tensor, trainable: bool) -> None:
    """Keep a copy of a tensor in a module, as a parameter or as a buffer."""
    own = value.detach().clone()
    if trainable:
        module.register_parameter(name, nn.Parameter(own))
    else:
        module.register_buffer(name, own)


class Lattice(nn.Module):
    """Couplings between nearest neighbours of a rectangular lattice of any dimension.

    Parameters
    ----------
    shape
        Sites along each axis, 2 or more.
    coupling
        J, one for all axes or one for each.
    periodic
        Whether the last sites of an axis meet its first: a torus. Two sites around a periodic axis meet twice.
    trainable
        Whether the couplings are a parameter: one number for each axis.

    Raises
    ------
    OptionError
        If an axis is too short, or the couplings are not one, or one per axis.
    """

    coupling: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        coupling: float | Sequence[float] | Tensor,
        periodic: bool = True,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape_of(shape)
        self.periodic = periodic
        if min(self.shape) < 2:
            raise OptionError(f"A lattice has 2 or more sites along each axis; got {tuple(self.shape)}.")
        j = torch.as_tensor(coupling, dtype=None if isinstance(coupling, Tensor) else torch.get_default_dtype())
        if j.ndim > 1 or (j.ndim == 1 and len(j) != len(self.shape)) or not bool(torch.isfinite(j).all()):
            raise OptionError(
                f"coupling is one finite number, or one for each of the {len(self.shape)} axes; got {coupling}."
            )
        hold(self, "coupling", j.expand(len(self.shape)), trainable)
        places = torch.stack(torch.meshgrid(*map(torch.arange, self.shape), indexing="ij"))
        self.register_buffer("even", places.sum(0) % 2 == 0)

    even: Tensor

    @property
    def classes(self) -> int | None:
        """K of couplings between classes; none here."""
        return None

    def forward(self, s: Tensor) -> Tensor:
        """Sum the coupled neighbours of every site: ``(n, *shape)``, or ``(n, *shape, K)``, as it came."""
        total = torch.zeros_like(s)
        for axis, size in enumerate(self.shape, start=1):
            j = self.coupling[axis - 1]
            if self.periodic:
                total = total + j * (s.roll(1, axis) + s.roll(-1, axis))
            else:
                edge = torch.zeros_like(s.narrow(axis, 0, 1))
                before, after = s.narrow(axis, 0, size - 1), s.narrow(axis, 1, size - 1)
                total = total + j * (torch.cat((edge, before), axis) + torch.cat((after, edge), axis))
        return total

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The coupled pairs of sites, numbered in order, and their J, ``(m,)`` each; what meets twice comes once."""
        places = torch.arange(self.shape.numel(), device=self.coupling.device).view(self.shape)
        first, second, j = [], [], []
        for axis, size in enumerate(self.shape):
            twice = self.periodic and size == 2
            reach = size if self.periodic and not twice else size - 1
            here = places.narrow(axis, 0, reach).flatten()
            first.append(here)
            second.append(places.roll(-1, axis).narrow(axis, 0, reach).flatten())
            j.append(((2.0 if twice else 1.0) * self.coupling[axis]).expand(len(here)))
        return torch.cat(first), torch.cat(second), torch.cat(j)

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The two colours of a checkerboard.

        Raises
        ------
        OptionError
            If a periodic axis is odd, where the colours do not close.
        """
        if self.periodic and any(size % 2 for size in self.shape):
            raise OptionError(
                f"A periodic lattice of shape {tuple(self.shape)} is no checkerboard: along an odd axis the first and "
                "the last site have one colour. Take even sizes, an open lattice, or BlockGibbs(blocks=...) of your "
                "own."
            )
        return self.even, ~self.even

    def extra_repr(self) -> str:
        """Shape, couplings, boundary."""
        j = self.coupling.tolist()
        told = f"{j[0]:.6g}" if len(set(j)) == 1 else f"({', '.join(f'{v:.6g}' for v in j)})"
        return f"{tuple(self.shape)}, coupling={told}{'' if self.periodic else ', periodic=False'}"


class Couplings(nn.Module):
    """Couplings between any two sites, as a matrix.

    Parameters
    ----------
    matrix
        J, symmetric with a zero diagonal, ``(d, d)``; or ``(d, K, d, K)`` between classes of d sites.
    trainable
        Whether they are a parameter, ``pairs_above``: all pairs of sites, i < j, in the order of `torch.triu_indices`;
        zeros too.

    Attributes
    ----------
    pairs_above
        When trainable: ``(d (d - 1) / 2,)``, or ``(d (d - 1) / 2, K, K)``. The matrix is made of them at each call.
    matrix
        When not: as given.

    Raises
    ------
    OptionError
        If it is not symmetric, or a site is coupled to itself.
    ShapeError
        If it has another shape.
    """

    colours: Tensor

    def __init__(self, matrix: Tensor, trainable: bool = False) -> None:
        super().__init__()
        meet = _checked(matrix)
        self.shape = torch.Size(matrix.shape[:1])
        self.classes = matrix.shape[1] if matrix.ndim == 4 else None
        self.trainable = trainable
        d = len(matrix)
        if trainable:
            above = torch.triu_indices(d, d, 1, device=matrix.device)
            hold(self, "pairs_above", _by_pair(matrix)[above[0], above[1]], True)
            number = torch.zeros((d, d), dtype=torch.int64, device=matrix.device)
            number[above[0], above[1]] = torch.arange(above.shape[1], device=matrix.device)
            self.register_buffer("above", above, persistent=False)
            self.register_buffer("number", number + number.T, persistent=False)
            found = torch.arange(d)
        else:
            hold(self, "matrix", matrix, False)
            found = colours(neighbour_lists(d, *meet.triu().nonzero().T.tolist()))
        self.register_buffer("colours", found.to(matrix.device))
        self.count = int(found.max()) + 1

    matrix: Tensor
    pairs_above: Tensor
    above: Tensor
    number: Tensor

    def dense(self) -> Tensor:
        """J, ``(d, d)``, or ``(d, K, d, K)``."""
        return self.matrix if not self.trainable else _by_pair(self.columns(slice(None)))

    @property
    def like(self) -> Tensor:
        """What tells dtype and device."""
        return self.pairs_above if self.trainable else self.matrix

    def columns(self, block: slice) -> Tensor:
        """Couplings of all sites to those of a block, ``(d, b)``, or ``(d, b, K, K)`` with the block's classes last."""
        if not self.trainable:
            return _by_pair(self.matrix)[:, block]
        d, pairs = self.shape[0], self.pairs_above
        if len(range(d)[block]) == d:
            half = pairs.new_zeros((d, d, *pairs.shape[1:])).index_put((self.above[0], self.above[1]), pairs)
            return half + (half.T if pairs.ndim == 1 else half.permute(1, 0, 3, 2))
        # Few columns are gathered; all of them are faster scattered, forwards and backwards.
        there, here = torch.arange(d, device=pairs.device)[:, None], torch.arange(d, device=pairs.device)[block]
        if not pairs.shape[0]:
            return pairs.new_zeros((d, len(here), *pairs.shape[1:]))
        found = pairs[self.number[:, block]]
        if pairs.ndim == 3:
            found = torch.where((there < here)[..., None, None], found, found.mT)
        apart = (there != here).to(pairs.dtype)
        return found * (apart if pairs.ndim == 1 else apart[..., None, None])

    def forward(self, s: Tensor, block: slice = slice(None)) -> Tensor:
        """Sum what is coupled to each site of a block: ``(n, b)`` or ``(n, b, K)`` from all sites of s."""
        j = self.columns(block)
        if self.classes is not None:
            flat = j.transpose(1, 2).flatten(2).flatten(0, 1)
            return (s.flatten(1) @ flat).view(len(s), -1, self.classes)
        return s @ j if s.ndim == 2 else (s.mT @ j).mT

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The coupled pairs i < j, ``(m,)`` each, and their J, ``(m,)`` or ``(m, K, K)``."""
        if self.trainable:
            return self.above[0], self.above[1], self.pairs_above
        d = self.shape[0]
        i, j = torch.triu_indices(d, d, 1, device=self.matrix.device)
        found = _by_pair(self.matrix)[i, j]
        meet = (found != 0).reshape(len(found), -1).any(1)
        return i[meet], j[meet], found[meet]

    @property
    def blocks(self) -> tuple[Tensor | slice, ...]:
        """Sites of one colour, no two of which are coupled; slices of one site where all of them are."""
        if self.count == self.shape[0]:
            return tuple(slice(k, k + 1) for k in range(self.count))
        return tuple(self.colours == k for k in range(self.count))

    def extra_repr(self) -> str:
        """Sites and colours."""
        return f"{self.shape[0]} sites in {self.count} blocks"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Load as any module does; another graph has another number of colours."""
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]
        self.count = int(self.colours.max()) + 1


def _by_pair(matrix: Tensor) -> Tensor:
    """Put both sites in front, or back: ``(d, K, d, K)`` to ``(d, d, K, K)``; ``(d, d)`` as it is."""
    return matrix if matrix.ndim == 2 else matrix.transpose(1, 2)


def _checked(matrix: Tensor) -> Tensor:
    """Refuse what is no matrix of couplings; tell who meets whom, ``(d, d)``."""
    if matrix.ndim not in (2, 4) or matrix.shape[: matrix.ndim // 2] != matrix.shape[matrix.ndim // 2 :]:
        raise ShapeError(
            f"Couplings are a matrix (d, d), or (d, K, d, K) between classes; got shape {tuple(matrix.shape)}."
        )
    flat = matrix.detach().reshape(matrix.shape[: matrix.ndim // 2].numel(), -1)
    refuse_asymmetric(float((flat - flat.T).abs().max()), flat)
    meet = matrix.detach() != 0 if matrix.ndim == 2 else (matrix.detach() != 0).any(3).any(1)
    refuse_loops(int(meet.diagonal().sum()), len(meet))
    return meet


def refuse_asymmetric(gap: float, values: Tensor) -> None:
    """Refuse couplings that differ from their transpose by more than rounding.

    Raises
    ------
    OptionError
        With the difference.
    """
    size = float(values.abs().max()) if values.numel() else 0.0
    if not gap <= 1e-6 * size:
        raise OptionError(
            f"Couplings are symmetric, J_ij = J_ji; these differ from their transpose by up to {gap:.3g} (largest "
            f"coupling {size:.3g}). Use (J + J.T) / 2."
        )


def refuse_loops(loops: int, sites: int) -> None:
    """Refuse sites that are coupled to themselves.

    Raises
    ------
    OptionError
        With their number.
    """
    if loops:
        raise OptionError(
            f"A site is not coupled to itself: that is a constant or a field. {loops} of {sites} diagonal entries are "
            "not 0."
        )


def neighbour_lists(sites: int, first: Sequence[int] = (), second: Sequence[int] = ()) -> list[list[int]]:
    """List each site's neighbours from the two ends of the edges."""
    lists: list[list[int]] = [[] for _ in range(sites)]
    for a, b in zip(first, second):
        lists[a].append(b)
        lists[b].append(a)
    return lists


def colours(neighbours: list[list[int]]) -> Tensor:
    """Colour a graph so that no two sites that meet have one colour: greedily, the sites with most neighbours first."""
    found = [-1] * len(neighbours)
    for i in sorted(range(len(neighbours)), key=lambda i: -len(neighbours[i])):
        taken = {found[k] for k in neighbours[i]}
        found[i] = next(k for k in range(len(neighbours)) if k not in taken)
    return torch.tensor(found)
