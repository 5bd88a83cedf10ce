r"""Pairwise models: Ising on binary states, Potts on one-hot ones.

With spins :math:`s = 2x - 1` for binary states x, each pair counted once,

.. math::

   E_{\text{Ising}}(x) = -\sum_{i<j} J_{ij}\, s_i s_j - \sum_i h_i s_i, \qquad
   E_{\text{Potts}}(x) = -\sum_{i<j} x_i^T J_{ij}\, x_j - \sum_i h_i^T x_i,

in nats: couplings and fields are divided by kT. Both are quadratic forms of one linear map, the field that the other
sites make at each; `gibbsian.energies.couplings` has the maps: a matrix, a lattice, the edges of a graph. A site given
all others has the log-odds :math:`2 (h_i + \sum_j J_{ij} s_j)`, or the logits :math:`h_i + \sum_j J_{ij} x_j`.

The gradient of -E in :math:`J_{ij}` is :math:`s_i s_j`, in :math:`h_i` it is :math:`s_i`: maximum likelihood matches
the means and pair correlations of the data. Of a Potts model some changes of J and h change nothing; see
`gibbsian.energies.gauges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import constraints

from gibbsian.energies.base import Energy
from gibbsian.energies.couplings import Couplings, Lattice, hold
from gibbsian.energies.sparse_couplings import SparseCouplings
from gibbsian.energies.tractable import batch_rows
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

CRITICAL_COUPLING = 0.44068679350977147
"""log(1 + sqrt 2) / 2, where the square-lattice Ising model orders."""


Interaction: TypeAlias = Lattice | Couplings | SparseCouplings
"""What couples the sites of a pairwise model."""


class Ising(Energy):
    r"""Spins :math:`s = 2x - 1` that prefer to agree where J is positive.

    Parameters
    ----------
    interaction
        Couplings J as a symmetric matrix ``(d, d)`` with a zero diagonal, dense or sparse; or a `Lattice`, `Couplings`
        or `SparseCouplings`. See `Ising.lattice`, `Ising.dense` and `Ising.sparse`.
    field
        h, one for all sites or a tensor of the event's shape.
    trainable
        Whether field and couplings are parameters; an interaction that was made before says so of its couplings
        itself.

    Raises
    ------
    OptionError, ShapeError
        If the couplings are not symmetric, or couplings and field do not fit each other.
    """

    support = constraints.boolean
    field: Tensor

    def __init__(self, interaction: Tensor | Interaction, field: float | Tensor = 0.0, trainable: bool = False) -> None:
        super().__init__()
        self.interaction = as_interaction(interaction, trainable)
        if self.interaction.classes is not None:
            raise ShapeError(
                f"Couplings of an Ising model are one number per pair, as a matrix (d, d); got those between "
                f"{self.interaction.classes} classes, a Potts model's."
            )
        self.event_shape = self.interaction.shape
        hold(self, "field", _field(field, self.interaction, self.event_shape), trainable)

    @staticmethod
    def lattice(
        shape: Sequence[int],
        coupling: float | Sequence[float] | Tensor = CRITICAL_COUPLING,
        field: float | Tensor = 0.0,
        periodic: bool = True,
        trainable: bool = False,
    ) -> Ising:
        """Couple nearest neighbours of a lattice; the critical square torus unless told otherwise.

        Parameters
        ----------
        shape, coupling, periodic
            As of `Lattice`.
        field, trainable
            As above.
        """
        return Ising(Lattice(shape, coupling, periodic, trainable), field, trainable)

    @staticmethod
    def dense(sites: int, dtype: torch.dtype | None = None) -> Ising:
        """Couple any two sites; trainable, with couplings and fields of 0 to begin with.

        Parameters
        ----------
        sites
            How many.
        dtype
            Of the parameters.
        """
        return Ising(torch.zeros((sites, sites), dtype=dtype), trainable=True)

    @staticmethod
    def sparse(
        sites: int | Sequence[int],
        first: Tensor | Sequence[int],
        second: Tensor | Sequence[int],
        coupling: float | Tensor = 0.0,
        field: float | Tensor = 0.0,
        trainable: bool = False,
    ) -> Ising:
        """Couple sites along the edges of a graph.

        Parameters
        ----------
        sites, first, second, coupling
            As of `SparseCouplings`.
        field, trainable
            As above.
        """
        return Ising(SparseCouplings(sites, first, second, coupling, trainable), field, trainable)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, ``(n, *event) -> (n,)``."""
        s = 2.0 * batch_rows(x, self.field.shape) - 1.0
        return -(s * (0.5 * self.interaction(s) + self.field)).flatten(1).sum(1)

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """Log-odds of a one at each site given all others, ``(n, *event)``; only a block's where that is less work."""
        s = 2.0 * x - 1.0
        if not _is_part(self.interaction, block):
            return 2.0 * (self.interaction(s) + self.field)
        return _placed(2.0 * (self.interaction(s, block) + self.field[block]), x, block)

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
    def blocks(self) -> tuple[Tensor | slice, ...]:
        """Sites that are independent given the rest."""
        return self.interaction.blocks

    def extra_repr(self) -> str:
        """Interaction."""
        return self.interaction.extra_repr()


class Potts(Energy):
    r"""Sites with one of K classes each, which prefer to agree where J is positive.

    Parameters
    ----------
    interaction
        A `Lattice`, or couplings between equal classes, :math:`-\sum_{i<j} J_{ij} [x_i = x_j]`, as a symmetric matrix
        ``(d, d)``, dense or sparse; or couplings between all classes, ``(d, K, d, K)``. Or a `Couplings` or
        `SparseCouplings`.
    classes
        K; may be left out when couplings or field tell it.
    field
        h, one for all or a tensor that fits ``(*sites, K)``.
    trainable
        As of `Ising`.

    Raises
    ------
    OptionError, ShapeError
        If the couplings are not symmetric, or nothing tells K, or couplings and field do not fit each other.
    """

    support = constraints.one_hot
    field: Tensor

    def __init__(
        self,
        interaction: Tensor | Interaction,
        classes: int | None = None,
        field: float | Tensor = 0.0,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.interaction = as_interaction(interaction, trainable)
        told = self.interaction.classes
        if classes is None:
            classes = told or (field.shape[-1] if isinstance(field, Tensor) and field.ndim else None)
        if classes is None or classes < 2 or (told is not None and told != classes):
            raise OptionError(f"classes is 2 or more, and that of the couplings ({told}); got {classes}.")
        self.event_shape = torch.Size((*self.interaction.shape, classes))
        hold(self, "field", _field(field, self.interaction, self.event_shape), trainable)

    @staticmethod
    def dense(sites: int, classes: int, dtype: torch.dtype | None = None) -> Potts:
        """Couple all classes of any two sites; trainable, with couplings and fields of 0 to begin with.

        Parameters
        ----------
        sites, classes
            How many.
        dtype
            Of the parameters.
        """
        return Potts(torch.zeros((sites, classes, sites, classes), dtype=dtype), trainable=True)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, ``(n, *sites, K) -> (n,)``."""
        x = batch_rows(x, self.field.shape)
        return -(x * (0.5 * self.interaction(x) + self.field)).flatten(1).sum(1)

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """Logits of the classes of each site given all others, ``(n, *sites, K)``; or of a block, as for `Ising`."""
        if not _is_part(self.interaction, block):
            return self.interaction(x) + self.field
        return _placed(self.interaction(x, block) + self.field[block], x, block)

    @property
    def blocks(self) -> tuple[Tensor | slice, ...]:
        """Sites that are independent given the rest."""
        return self.interaction.blocks

    def extra_repr(self) -> str:
        """Interaction and classes."""
        return f"{self.interaction.extra_repr()}, classes={self.field.shape[-1]}"


def as_interaction(given: Tensor | Interaction, trainable: bool) -> Interaction:
    """Read couplings: a matrix, dense or sparse, or an interaction as it is."""
    if not isinstance(given, (Tensor, Lattice, Couplings, SparseCouplings)):
        raise ArgumentTypeError(
            f"An interaction is a Lattice, as Lattice((16, 16)), or a symmetric matrix of couplings; got {given!r}."
        )
    if not isinstance(given, Tensor):
        return given
    return Couplings(given, trainable) if given.layout == torch.strided else SparseCouplings.of(given, trainable)


def _field(field: float | Tensor, interaction: Interaction, shape: torch.Size) -> Tensor:
    like = interaction.like if isinstance(interaction, Couplings) else interaction.coupling
    value = torch.as_tensor(field, dtype=like.dtype, device=like.device)
    if not bool(torch.isfinite(value).all()):
        raise OptionError("A field is finite; this one is not.")
    try:
        return value.expand(shape).clone()
    except RuntimeError:
        raise ShapeError(
            f"A field of shape {tuple(value.shape)} does not fit states of shape {tuple(shape)}."
        ) from None


def _is_part(interaction: Interaction, block: Tensor | slice) -> bool:
    """Whether the field at a block alone is less work than that at all sites."""
    return isinstance(block, slice) and block != slice(None) and isinstance(interaction, Couplings)


def _placed(logits: Tensor, x: Tensor, block: Tensor | slice) -> Tensor:
    out = torch.zeros_like(x)
    out[:, block] = logits.to(out.dtype)
    return out
