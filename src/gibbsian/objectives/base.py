"""What every objective shares: batches, losses, and the protocol.

An objective is a module, because it may own what a checkpoint must hold: a replay buffer, a learned constant, a
generator network. Its ``forward`` returns a `Loss` of tensors; nothing in it waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.errors import OptionError, ShapeError


@dataclass(frozen=True)
class Batch:
    """Rows of data and what goes with each.

    Attributes
    ----------
    x
        Data, ``(n, *event)``.
    context
        By name, one row per row of ``x``: labels, noise levels.
    """

    x: Tensor
    context: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.context.items():
            if value.shape[:1] != self.x.shape[:1]:
                raise ShapeError(f"{self.x.shape[0]} rows of data came with {name} of shape {tuple(value.shape)}.")

    @staticmethod
    def of(data: Tensor | Batch) -> Batch:
        """Read a bare tensor as a batch without context."""
        return data if isinstance(data, Batch) else Batch(data)

    def rows(self, index: Tensor) -> Batch:
        """Pick rows."""
        return Batch(self.x[index], {k: v[index] for k, v in self.context.items()})

    def __len__(self) -> int:
        return self.x.shape[0]


@dataclass(frozen=True)
class Loss:
    """What an objective returns.

    Attributes
    ----------
    value
        The 0-d tensor to differentiate.
    metrics
        0-d tensors, detached. Names used across objectives: ``energy_data`` and ``energy_samples`` (means, nats),
        ``gap`` (data minus samples), ``acceptance``, ``nonfinite`` (proposals that were not finite), ``buffer_age``
        (mean steps), ``moved`` (root mean square distance moved per coordinate by the round's chains).
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """How an energy is fitted."""

    @abstractmethod
    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Compute the loss of one batch; everything random comes from ``rng``."""


def context_of(energy: Energy, batch: Batch, besides: Sequence[str] = ()) -> dict[str, Tensor]:
    """Pick from a batch what the energy is conditioned on; what the energy does not ask for is left out.

    Parameters
    ----------
    energy
        Names its conditions in ``energy.context``.
    batch
        Brings them.
    besides
        Conditions that the objective brings itself.

    Raises
    ------
    OptionError
        If the batch lacks one.
    """
    wanted = [name for name in energy.context if name not in besides]
    if missing := [name for name in wanted if name not in batch.context]:
        brings = ", ".join(sorted(batch.context)) or "none"
        raise OptionError(
            f"{energy!r} is conditioned on {', '.join(missing)}, which the batch lacks (it brings: {brings}). Pass "
            "Batch(x, {name: values}) with one value per row, or fix the condition with energy.given(name=value)."
        )
    return {name: batch.context[name] for name in wanted}
