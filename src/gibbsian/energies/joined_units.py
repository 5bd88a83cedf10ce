"""Layers of several kinds of units side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.layered import Natural
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.units import Units
from gibbsian.errors import OptionError


class JoinedSupport(Constraint):
    """Where joined units live: each part on its own domain, side by side in one row.

    Parameters
    ----------
    parts
        The layers, in order.
    """

    event_dim = 1

    def __init__(self, parts: Sequence[Units]) -> None:
        self.parts = tuple(parts)
        self.is_discrete = any(part.support.is_discrete for part in parts)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each row lies there, ``(n,)`` of bools."""
        pieces = value.split([part.size for part in self.parts], -1)
        inside = [p.support.check(p.shaped(x)).reshape(len(value), -1).all(1) for p, x in zip(self.parts, pieces)]
        return torch.stack(inside).all(0)

    def __repr__(self) -> str:
        return f"Joined({', '.join(f'{part.support} x {part.sites.numel()}' for part in self.parts)})"


@dataclass(frozen=True, repr=False)
class JoinedUnits(Units):
    """Layers of several kinds side by side in one flat row, such as pixels and a one-hot label.

    `Classification using discriminative restricted Boltzmann machines (Larochelle & Bengio, 2008)
    <https://doi.org/10.1145/1390156.1390224>`_.

    Parameters
    ----------
    parts
        The layers, in order; a state is their states, flattened, one after the other.

    Raises
    ------
    OptionError
        If there are fewer than two layers.
    """

    parts: Sequence[Units]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) < 2 or not all(isinstance(part, Units) for part in self.parts):
            raise OptionError(f"Joined units are two or more layers of units; got {self.parts!r}.")
        if any(isinstance(part, GaussianUnits) and isinstance(part.scale, Tensor) for part in self.parts):
            raise OptionError("Gaussian units that are joined to others have one scale; divide the data by theirs.")

    @property
    def sites(self) -> torch.Size:
        """As many as numbers in a row."""
        return torch.Size((sum(part.size for part in self.parts),))

    @property
    def count(self) -> int | None:
        """Product of those of the parts."""
        counts = [part.count for part in self.parts]
        return None if None in counts else math.prod(cast(list[int], counts))

    def listed(self, index: Tensor) -> Tensor:
        """States by their number; the first part changes fastest."""
        found = []
        for part in self.parts:
            found.append(part.listed(index % cast(int, part.count)).flatten(1))
            index = index // cast(int, part.count)
        return torch.cat(found, 1)

    @property
    def support(self) -> Constraint:
        """Each part on its own; plain bits where all parts are bits, for kernels that walk these."""
        if all(isinstance(part.support, type(constraints.boolean)) for part in self.parts):
            return constraints.boolean
        return JoinedSupport(self.parts)

    def statistic(self, x: Tensor) -> Tensor:
        """Of each part."""
        return torch.cat([p.statistic(p.shaped(y)) for p, y in self._each(x)], 1)

    def own_energy(self, x: Tensor) -> Tensor:
        """Sum over the parts."""
        return torch.stack([p.own_energy(p.shaped(y)) for p, y in self._each(x)]).sum(0)

    def natural(self, field: Tensor) -> Natural:
        """Of each part."""
        laws = [p.natural(f) for p, f in self._each(field)]
        precision = [torch.as_tensor(law.precision, dtype=field.dtype, device=field.device) for law in laws]
        spread = [p.expand_as(law.linear) for p, law in zip(precision, laws)]
        return Natural(torch.cat([law.linear for law in laws], -1), torch.cat(spread, -1))

    def log_partition(self, field: Tensor) -> Tensor:
        """Of the units of each part."""
        return torch.cat([p.log_partition(f) for p, f in self._each(field)], -1)

    def mean(self, law: Natural) -> Tensor:
        """Of each part."""
        return torch.cat([p.mean(part).flatten(1) for p, part in self._laws(law)], 1)

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """Of each part."""
        drawn = zip(self._laws(law), self._each(u))
        return torch.cat([p.draw(part, v).flatten(1) for (p, part), (_, v) in drawn], 1)

    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Of each part."""
        return torch.cat([p.fitted(p.shaped(y), smoothing) for p, y in self._each(x)])

    def check(self, x: Tensor, what: str) -> None:
        """Each part on its own."""
        self.check_shape(x, what)
        for part, y in self._each(x):
            part.check(part.shaped(y), what)

    def __repr__(self) -> str:
        return f"JoinedUnits({', '.join(map(repr, self.parts))})"

    def _each(self, flat: Tensor) -> list[tuple[Units, Tensor]]:
        return list(zip(self.parts, flat.split([part.size for part in self.parts], -1)))

    def _laws(self, law: Natural) -> list[tuple[Units, Natural]]:
        precision = torch.as_tensor(law.precision, dtype=law.linear.dtype, device=law.linear.device)
        pairs = zip(self._each(law.linear), self._each(precision.expand_as(law.linear)))
        return [(part, Natural(linear, spread)) for (part, linear), (_, spread) in pairs]
