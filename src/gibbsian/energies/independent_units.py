"""Units without couplings: what chains of a Boltzmann machine, and annealing to it, start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gibbsian.energies.layered import Natural
from gibbsian.energies.real_units import ReLUUnits, keep_scale, with_kept_scale
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.energies.units import Units, as_units
from gibbsian.errors import OptionError, ShapeError


class IndependentUnits(Tractable):
    """A machine without couplings: units that are independent, each under its own field, with exact draws.

    What chains of a machine start from, and annealing too; see `RBM.base`.

    Parameters
    ----------
    units
        The units; ReLU units are no visible ones.
    field
        The field on each, flat ``(size,)``; 0 when left out.

    Raises
    ------
    OptionError, ShapeError
        If the units cannot be visible, or the field does not fit them.
    """

    field: Tensor

    def __init__(self, units: int | Sequence[int] | Units, field: Tensor | None = None) -> None:
        super().__init__()
        self._units = keep_scale(self, "scale", as_visible(units))
        self.event_shape = self.units.event_shape
        self.support = self.units.support
        field = torch.zeros(self.units.size) if field is None else field.detach().clone()
        if tuple(field.shape) != (self.units.size,):
            raise ShapeError(f"The field on {self.units} has shape ({self.units.size},); got {tuple(field.shape)}.")
        self.register_buffer("field", field)
        self.register_buffer("log_normalizer", self.units.log_partition(field).sum())

    log_normalizer: Tensor

    @property
    def units(self) -> Units:
        """The units."""
        return with_kept_scale(self, "scale", self._units)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, normalised: ``(n, *event) -> (n,)``."""
        x = batch_rows(x, self.event_shape)
        own = self.units.own_energy(x) - self.units.statistic(x) @ self.field
        return own + self.log_normalizer

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` states."""
        u = torch.rand((n, self.units.size), generator=rng, dtype=self.field.dtype, device=self.field.device)
        return self.units.draw(self.units.natural(self.field.expand(n, -1)), u)

    @property
    def natural(self) -> Natural:
        """The law of each number."""
        return self.units.natural(self.field)

    @property
    def blocks(self) -> tuple[slice] | None:
        """One block of all sites, on bits or one-hot states."""
        return (slice(None),) if self.units.states_of_one else None

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """The logits, whatever the other sites are."""
        return self.units.shaped(self.units.natural(self.field).linear).expand_as(x)

    def extra_repr(self) -> str:
        """The units."""
        return repr(self.units)


def fitted_field(units: Units, data: Tensor, smoothing: float, like: Tensor) -> Tensor:
    """Fields under which units have the data's means, mixed with the uniform law's; of the type of ``like``.

    Raises
    ------
    OptionError
        If the smoothing is not between 0 and 1.
    """
    if not 0.0 < smoothing < 1.0:
        raise OptionError(f"smoothing lies between 0 and 1; got {smoothing}.")
    return units.fitted(data.to(like), smoothing)


def check_sliding_factor(rate: float) -> None:
    """Refuse shares of the way from offsets to means that are none.

    Raises
    ------
    OptionError
        If the rate is not between 0 and 1.
    """
    if not 0.0 <= rate <= 1.0:
        raise OptionError(f"The sliding factor lies between 0 and 1; got {rate}.")


def as_visible(units: int | Sequence[int] | Units) -> Units:
    """Read units of the data: a number or a shape stands for Bernoulli units.

    Raises
    ------
    OptionError
        If they are ReLU units.
    """
    units = as_units(units)
    if isinstance(units, ReLUUnits):
        raise OptionError(
            "ReLU units are hidden units; take Bernoulli, spin, categorical or Gaussian ones for the data."
        )
    return units
