r"""A Potts model between all columns as tables that are read by the letters of a sequence.

A sequence is L letters, and its one-hot state L K numbers of which L are ones: a product with the couplings adds L rows
of a table and multiplies nothing. Looked up by code, the field at all columns costs :math:`L^2 K` additions instead of
:math:`2 L^2 K^2` operations, and at one column :math:`L K`.

On the way from independent columns to a model, and at other temperatures, logits are

.. math:: (1 - \beta)\, b_i(a) + \beta \Bigl( h_i(a) + \sum_j J_{ij}(a, x_j) \Bigr),

with :math:`\beta` one for all chains or one for each, and without the first term where there is no base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.nn.functional import embedding_bag

from gibbsian.energies.base import Energy
from gibbsian.energies.couplings import Couplings
from gibbsian.energies.pairwise import Potts
from gibbsian.energies.tractable import Categorical, batch_rows
from gibbsian.errors import ArgumentTypeError, ShapeError
from gibbsian.kernels.ladder import Tempered

_KEPT: WeakKeyDictionary[Potts, tuple[tuple[int, ...], Tables]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Tables:
    """What a sweep reads.

    Attributes
    ----------
    by_site
        ``(L, L K, K)``: for a column, and each letter at each other column, what it adds to the logits.
    field
        ``(L, K)``.
    beta
        The inverse temperature, 0-d or ``(n, 1)``; ``None`` for 1.
    base
        Logits of independent columns, ``(L, K)``, on the way from these to the model.
    """

    by_site: Tensor
    field: Tensor
    beta: Tensor | None = None
    base: Tensor | None = None

    @property
    def letters(self) -> int:
        """K."""
        return self.field.shape[1]

    def places(self, codes: Tensor) -> Tensor:
        """Rows of the tables for sequences ``(n, L)``."""
        return codes + self.letters * torch.arange(codes.shape[1], device=codes.device)

    def logits(self, places: Tensor, site: int) -> Tensor:
        """Logits of a column's letters given all other columns, ``(n, K)``; see `places`."""
        found = embedding_bag(places, self.by_site[site], mode="sum") + self.field[site]
        if self.beta is None:
            return found
        found = self.beta * found
        return found if self.base is None else found + (1.0 - self.beta) * self.base[site]

    def energy(self, codes: Tensor) -> Tensor:
        """Energies of sequences ``(n, L)``, in nats, ``(n,)``."""
        places, n = self.places(codes), len(codes)
        length = codes.shape[1]
        # The coupling of each pair is met twice, once from either side.
        value = self.field.new_zeros(n)
        for i in range(length):
            value += 0.5 * embedding_bag(places, self.by_site[i], mode="sum").gather(1, codes[:, i : i + 1])[:, 0]
        value = -(value + self.field.flatten()[places].sum(1))
        if self.beta is None:
            return value
        beta = self.beta.flatten()
        value = beta * value
        return value if self.base is None else value - (1.0 - beta) * self.base.flatten()[places].sum(1)


def tables_of(energy: Any) -> Tables:
    """Read the tables of a Potts model, of one at other temperatures, or on the way from independent columns.

    Parameters
    ----------
    energy
        A `Potts` with couplings between all letters; a `Tempered` one; a `PottsOnPath`.

    Raises
    ------
    ArgumentTypeError
        If it is another energy.
    """
    if isinstance(energy, Tempered):
        inner = tables_of(energy.energy)
        beta = torch.as_tensor(energy.beta, dtype=inner.field.dtype)
        if inner.beta is not None:
            raise ArgumentTypeError("A model is at one temperature: this one is tempered twice.")
        return replace(inner, beta=beta[:, None] if beta.ndim else beta)
    if isinstance(energy, PottsOnPath):
        return replace(tables_of(energy.potts), beta=energy.beta, base=energy.base_logits)
    if not isinstance(energy, Potts) or not isinstance(energy.interaction, Couplings) or energy.field.ndim != 2:
        raise ArgumentTypeError(
            f"Tables are read off a Potts model between all letters of a row of columns, as Potts.dense(L, K); got "
            f"{type(energy).__name__}. BlockGibbs draws from other energies."
        )
    # In-place steps of an optimiser leave the tensors what they are and count their versions up.
    found = _KEPT.get(energy)
    own = (energy.interaction.like, energy.field)
    mark = tuple(n for t in own for n in (t.data_ptr(), t._version))
    if found is None or found[0] != mark:
        found = _KEPT[energy] = (mark, _read(energy))
    return found[1]


@torch.no_grad()
def _read(energy: Potts) -> Tables:
    length, letters = energy.field.shape
    dense = cast(Couplings, energy.interaction).dense()
    if dense.ndim == 2:
        # Couplings between equal letters alone.
        dense = torch.einsum("ij,ab->iajb", dense, torch.eye(letters, dtype=dense.dtype, device=dense.device))
    by_site = dense.permute(2, 0, 1, 3).reshape(length, length * letters, letters).contiguous()
    return Tables(by_site, energy.field.detach().clone())


def codes_of(x: Tensor) -> Tensor:
    """Turn one-hot states ``(n, L, K)`` into codes ``(n, L)``."""
    return x.argmax(-1)


def states_of(codes: Tensor, letters: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn codes ``(n, L)`` into one-hot states ``(n, L, K)``."""
    out = torch.zeros((*codes.shape, letters), dtype=dtype, device=codes.device)
    return out.scatter_(2, codes.unsqueeze(2), 1.0)


class PottsOnPath(Energy):
    r"""A Potts model on its way from independent columns, :math:`(1 - \beta) B + \beta E`, as tables can be read off.

    Parameters
    ----------
    base
        Independent columns, a `Categorical` of shape ``(L, K)``.
    potts
        The model.
    beta
        From 0 to 1, 0-d.

    Raises
    ------
    ShapeError
        If base and model differ in columns or letters.
    """

    support = constraints.one_hot

    def __init__(self, base: Categorical, potts: Potts, beta: Tensor) -> None:
        super().__init__()
        if base.event_shape != potts.event_shape:
            raise ShapeError(
                f"A path leads between points of one shape; the base has {base.event_shape} and the model "
                f"{potts.event_shape}."
            )
        self.event_shape = potts.event_shape
        self.potts, self.beta = potts, beta
        self.base_logits = base.logits.detach().log_softmax(-1).to(potts.field.dtype)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, ``(n, L, K) -> (n,)``; read off the tables, it has no gradient."""
        return tables_of(self).energy(codes_of(batch_rows(x, self.base_logits.shape)))


def potts_path(base: Categorical, potts: Potts) -> Any:
    """Build the path from independent columns to a Potts model, along which `SequenceGibbs` moves."""
    return lambda beta: PottsOnPath(base, potts, beta.to(potts.field.dtype))


def profile(one: Tensor) -> Categorical:
    """Independent columns with shares of letters ``(L, K)``, all above 0."""
    return Categorical(probs=one / one.sum(-1, keepdim=True))


def draw_profile(base: Categorical, n: int, rng: Generator) -> Tensor:
    """Draw sequences of independent columns, as codes ``(n, L)``."""
    return codes_of(base.sample(n, rng))
