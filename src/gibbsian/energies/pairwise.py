r"""Pairwise models: Ising on binary states, Potts on one-hot ones.

With spins :math:`s = 2x - 1` for binary states x, each pair counted once,

.. math::

   E_{\text{Ising}}(x) = -\sum_{i<j} J_{ij}\, s_i s_j - \sum_i h_i s_i, \qquad
   E_{\text{Potts}}(x) = -\sum_{i<j} x_i^T J_{ij}\, x_j - \sum_i h_i^T x_i,

in nats: couplings and fields are divided by kT. Both are quadratic forms of one linear map, the field that the other
sites make at each, and this map is the interaction: a matrix of couplings, or a lattice, whose neighbours are found by
shifting and need no matrix. A site given all others has the log-odds :math:`2 (h_i + \sum_j J_{ij} s_j)`, or the logits
:math:`h_i + \sum_j J_{ij} x_j`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import batch_rows, shape_of
from gibbsian.errors import OptionError, ShapeError

CRITICAL_COUPLING = 0.44068679350977147
"""log(1 + sqrt 2) / 2, where the square-lattice Ising model orders."""


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

    Raises
    ------
    OptionError
        If an axis is too short, or the couplings are not one, or one per axis.
    """

    coupling: Tensor

    def __init__(self, shape: Sequence[int], coupling: float | Sequence[float] | Tensor, periodic: bool = True) -> None:
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
        self.register_buffer("coupling", j.expand(len(self.shape)).clone())
        places = torch.stack(torch.meshgrid(*map(torch.arange, self.shape), indexing="ij"))
        self.register_buffer("even", places.sum(0) % 2 == 0)

    even: Tensor

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

    Raises
    ------
    OptionError
        If it is not symmetric, or a site is coupled to itself.
    ShapeError
        If it has another shape.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        if matrix.ndim not in (2, 4) or matrix.shape[: matrix.ndim // 2] != matrix.shape[matrix.ndim // 2 :]:
            raise ShapeError(
                f"Couplings are a matrix (d, d), or (d, K, d, K) between classes; got shape {tuple(matrix.shape)}."
            )
        half = tuple(matrix.shape[: matrix.ndim // 2])
        self.shape = torch.Size(half[:1])
        flat = matrix.detach().reshape(torch.Size(half).numel(), -1)
        gap, size = float((flat - flat.T).abs().max()), float(flat.abs().max())
        if not gap <= 1e-6 * size:
            raise OptionError(
                f"Couplings are symmetric, J_ij = J_ji; these differ from their transpose by up to {gap:.3g} (largest "
                f"coupling {size:.3g}). Use (J + J.T) / 2."
            )
        meet = matrix.detach() != 0 if matrix.ndim == 2 else (matrix.detach() != 0).any(3).any(1)
        if bool(meet.diagonal().any()):
            raise OptionError(
                f"A site is not coupled to itself: that is a constant or a field. {int(meet.diagonal().sum())} of "
                f"{len(meet)} diagonal entries are not 0."
            )
        self.register_buffer("matrix", matrix.detach().clone())
        self.register_buffer("colours", _colours(meet))
        self.count = int(self.colours.max()) + 1

    colours: Tensor

    def forward(self, s: Tensor) -> Tensor:
        """Sum the coupled sites: ``(n, d)`` or ``(n, d, K)``, as it came."""
        if self.matrix.ndim == 4:
            return (s.flatten(1) @ self.matrix.flatten(2).flatten(0, 1)).view_as(s)
        return s @ self.matrix if s.ndim == 2 else (s.mT @ self.matrix).mT

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """Sites of one colour, no two of which are coupled."""
        return tuple(self.colours == k for k in range(self.count))

    def extra_repr(self) -> str:
        """Sites and colours."""
        return f"{self.shape[0]} sites in {self.count} blocks"


class Ising(Energy):
    r"""Spins :math:`s = 2x - 1` that prefer to agree where J is positive.

    Parameters
    ----------
    interaction
        Couplings J as a symmetric matrix ``(d, d)`` with a zero diagonal, or a `Lattice`; see `Ising.lattice`.
    field
        h, one for all sites or a tensor of the event's shape.

    Raises
    ------
    OptionError, ShapeError
        If the couplings are not symmetric, or couplings and field do not fit each other.
    """

    support = constraints.boolean
    field: Tensor

    def __init__(self, interaction: Tensor | Lattice | Couplings, field: float | Tensor = 0.0) -> None:
        super().__init__()
        self.interaction = Couplings(interaction) if isinstance(interaction, Tensor) else interaction
        if isinstance(self.interaction, Couplings) and self.interaction.matrix.ndim != 2:
            raise ShapeError(
                f"Couplings of an Ising model are (d, d); got {tuple(self.interaction.matrix.shape)}, a Potts model's."
            )
        self.event_shape = self.interaction.shape
        self.register_buffer("field", _field(field, self.interaction, self.event_shape))

    @staticmethod
    def lattice(
        shape: Sequence[int],
        coupling: float | Sequence[float] | Tensor = CRITICAL_COUPLING,
        field: float | Tensor = 0.0,
        periodic: bool = True,
    ) -> Ising:
        """Couple nearest neighbours of a lattice; the critical square torus unless told otherwise.

        Parameters
        ----------
        shape, coupling, periodic
            As of `Lattice`.
        field
            As above.
        """
        return Ising(Lattice(shape, coupling, periodic), field)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, ``(n, *event) -> (n,)``."""
        s = 2.0 * batch_rows(x, self.field.shape) - 1.0
        return -(s * (0.5 * self.interaction(s) + self.field)).flatten(1).sum(1)

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """Log-odds of a one at each site given all others, ``(n, *event)``."""
        return 2.0 * (self.interaction(2.0 * x - 1.0) + self.field)

    def coupling_and_field(self) -> tuple[Tensor, Tensor]:
        """The one coupling and the one field of a square torus, 0-d each, as `CheckerboardGibbs` asks for them.

        Raises
        ------
        OptionError
            If they are not one each, or the lattice is another.
        """
        j, h = getattr(self.interaction, "coupling", None), self.field.flatten()
        alike = j is not None and bool((j == j[0]).all()) and bool((h == h[0]).all())
        if j is None or not alike or len(self.interaction.shape) != 2 or not self.interaction.periodic:
            raise OptionError(
                f"{self!r} is no torus of two dimensions with one coupling and one field; BlockGibbs sweeps it."
            )
        return j[0], h[0]

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """Masks of sites that are independent given the rest."""
        return self.interaction.blocks

    def extra_repr(self) -> str:
        """Interaction."""
        return self.interaction.extra_repr()


class Potts(Energy):
    r"""Sites with one of K classes each, which prefer to agree where J is positive.

    Parameters
    ----------
    interaction
        A `Lattice` or a symmetric matrix ``(d, d)`` of couplings between equal classes,
        :math:`-\sum_{i<j} J_{ij} [x_i = x_j]`; or couplings between all classes, ``(d, K, d, K)``.
    classes
        K; may be left out when couplings or field tell it.
    field
        h, one for all or a tensor that fits ``(*sites, K)``.

    Raises
    ------
    OptionError, ShapeError
        If the couplings are not symmetric, or nothing tells K, or couplings and field do not fit each other.
    """

    support = constraints.one_hot
    field: Tensor

    def __init__(
        self, interaction: Tensor | Lattice | Couplings, classes: int | None = None, field: float | Tensor = 0.0
    ) -> None:
        super().__init__()
        self.interaction = Couplings(interaction) if isinstance(interaction, Tensor) else interaction
        own = getattr(self.interaction, "matrix", None)
        told = own.shape[1] if own is not None and own.ndim == 4 else None
        if classes is None:
            classes = told or (field.shape[-1] if isinstance(field, Tensor) and field.ndim else None)
        if classes is None or classes < 2 or (told is not None and told != classes):
            raise OptionError(f"classes is 2 or more, and that of the couplings ({told}); got {classes}.")
        self.event_shape = torch.Size((*self.interaction.shape, classes))
        self.register_buffer("field", _field(field, self.interaction, self.event_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, ``(n, *sites, K) -> (n,)``."""
        x = batch_rows(x, self.field.shape)
        return -(x * (0.5 * self.interaction(x) + self.field)).flatten(1).sum(1)

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """Logits of the classes of each site given all others, ``(n, *sites, K)``."""
        return self.interaction(x) + self.field

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """Masks of sites that are independent given the rest."""
        return self.interaction.blocks

    def extra_repr(self) -> str:
        """Interaction and classes."""
        return f"{self.interaction.extra_repr()}, classes={self.field.shape[-1]}"


def _field(field: float | Tensor, interaction: Lattice | Couplings, shape: torch.Size) -> Tensor:
    like = interaction.coupling if isinstance(interaction, Lattice) else interaction.matrix
    value = torch.as_tensor(field, dtype=like.dtype, device=like.device)
    if not bool(torch.isfinite(value).all()):
        raise OptionError("A field is finite; this one is not.")
    try:
        return value.expand(shape).clone()
    except RuntimeError:
        raise ShapeError(
            f"A field of shape {tuple(value.shape)} does not fit states of shape {tuple(shape)}."
        ) from None


def _colours(meet: Tensor) -> Tensor:
    """Colour a graph so that no two sites that meet have one colour: greedily, the sites with most neighbours first."""
    graph = meet.cpu()
    colours = torch.full((len(graph),), -1)
    for i in graph.sum(1).argsort(descending=True, stable=True).tolist():
        taken = set(colours[graph[i]].tolist())
        colours[i] = next(k for k in range(len(graph)) if k not in taken)
    return colours.to(meet.device)
