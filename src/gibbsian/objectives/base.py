"""What every objective shares: batches, losses, and the protocol.

An objective is a module, because it may own what a checkpoint must hold: a replay buffer, a learned constant, a
generator network. Its ``forward`` returns a `Loss` of tensors; nothing in it waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.typing import Context


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


def check_one_per_row(value: Tensor, rows: int) -> Tensor:
    """Check that an energy gave one number per row, and return it.

    Raises
    ------
    ShapeError
        If it did not.
    """
    if tuple(value.shape) != (rows,):
        raise ShapeError(
            f"The energy of {rows} points must have shape ({rows},); it returned {tuple(value.shape)}. "
            "Sum over the event's axes, or drop a trailing axis with .squeeze(-1)."
        )
    return value


def energy_and_gradient(energy: Energy, y: Tensor, context: Context, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Energies and their gradients in the points, ``(n,)`` and ``(n, *event)``, to be differentiated further.

    Parameters
    ----------
    energy
        Called as ``energy(y, **context)``.
    y
        Points that require gradients, ``(n, *event)``.
    context
        What each row is conditioned on.
    create_graph
        Whether the gradients are to be differentiated.

    Raises
    ------
    ShapeError
        If the energy gives anything but one number per row.
    ArgumentTypeError
        If it does not depend on the points.
    """
    value = check_one_per_row(energy(y, **context), len(y))
    grad = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value.sum(), y, create_graph=create_graph, allow_unused=True)
    if grad is None:
        raise ArgumentTypeError(
            f"{energy!r} does not depend on x through differentiable operations, so that it has no score. Rounding, "
            ".item(), .detach() and torch.no_grad() inside of it cut the dependence."
        )
    return value, grad
