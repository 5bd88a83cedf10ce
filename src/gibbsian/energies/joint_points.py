"""A joint energy of x and z as an energy of one point: of z with x fixed, or of both, flat."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of, same_support
from gibbsian.energies.latents import Latents
from gibbsian.energies.tractable import batch_rows
from gibbsian.errors import DomainError, ShapeError


class Posterior(Energy):
    """E(x, z) as an energy of z, with x fixed: one for each chain, or one row for all.

    Parameters
    ----------
    energy
        The joint energy.
    x
        ``(n, *event)`` for n chains, or ``(1, *event)``.
    latents
        Tell shape and domain of z.

    Raises
    ------
    ShapeError
        If x has another shape than the energy takes.
    """

    x: Tensor

    def __init__(self, energy: Energy, x: Tensor, latents: Latents) -> None:
        super().__init__()
        self.energy = energy
        if energy.event_shape is not None:
            batch_rows(x, energy.event_shape)
        self.register_buffer("x", x, persistent=False)
        self.event_shape, self.support = latents.event_shape, latents.support
        self.context = tuple(name for name in energy.context if name != "z")

    def forward(self, z: Tensor, **context: Tensor) -> Tensor:
        """Joint energy of each row of z with its x."""
        if len(self.x) not in (1, len(z)):
            raise ShapeError(
                f"This posterior holds {len(self.x)} rows of x, one for each chain, and z has {len(z)}; give it one "
                "row, or repeat rows for several chains each: x.repeat_interleave(m, 0)."
            )
        x = self.x if len(self.x) == len(z) else self.x.expand(len(z), *self.x.shape[1:])
        return self.energy(x, z=z, **context)

    def extra_repr(self) -> str:
        """What is fixed."""
        return f"{self.energy!r}, x=<{tuple(self.x.shape)}>"


class JointEvent(Energy):
    """E(x, z) over x and z as one point: numbers of x, then those of z, flat; sites above each other if one-hot.

    Parameters
    ----------
    energy
        The joint energy.
    event_shape
        The shape of one x.
    latents
        Tell shape and domain of z.

    Raises
    ------
    ShapeError
        If the shape of x is not known, or one-hot states have different numbers of classes.
    DomainError
        If x and z live on different kinds of domains.
    """

    def __init__(self, energy: Energy, event_shape: torch.Size | None, latents: Latents) -> None:
        super().__init__()
        if event_shape is None:
            raise ShapeError(f"{energy!r} does not tell the shape of x; pass event_shape to LatentEnergy.")
        kind = kind_of(energy.support)
        if not latents.walkable or not same_support(energy.support, latents.support):
            where = f"on {latents.support}" if latents.walkable else "in a list of values"
            raise DomainError(
                f"x lives on {energy.support} and z {where}, and no kernel walks on both at once. Where z can be "
                "listed, chains on the free energy of x need no z."
            )
        self.energy = energy
        self.x_shape, self.z_shape = event_shape, latents.event_shape
        self.support = energy.support
        if kind == "one_hot" and event_shape[-1] != latents.event_shape[-1]:
            raise ShapeError(
                f"x has one-hot sites of {event_shape[-1]} classes and z of {latents.event_shape[-1]}: they do not fit "
                "into one point."
            )
        tail = (event_shape[-1],) if kind == "one_hot" else ()
        self.event_shape = torch.Size(((self.x_shape.numel() + self.z_shape.numel()) // math.prod(tail), *tail))
        self.context = tuple(name for name in energy.context if name != "z")

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Joint energy of each flat point."""
        own, z = self.split(x)
        return self.energy(own, z=z, **context)

    def join(self, x: Tensor, z: Tensor) -> Tensor:
        """Put ``(n, *event)`` and ``(n, *latent)`` into flat points."""
        flat = torch.cat((batch_rows(x, self.x_shape).flatten(1), batch_rows(z, self.z_shape).flatten(1)), 1)
        return flat.reshape(-1, *cast(torch.Size, self.event_shape))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take flat points apart into x and z."""
        flat = batch_rows(x, cast(torch.Size, self.event_shape)).flatten(1)
        own, z = flat.split((self.x_shape.numel(), self.z_shape.numel()), 1)
        return own.reshape(-1, *self.x_shape), z.reshape(-1, *self.z_shape)

    def extra_repr(self) -> str:
        """Shapes."""
        return f"{self.energy!r}, x={tuple(self.x_shape)}, z={tuple(self.z_shape)}"
