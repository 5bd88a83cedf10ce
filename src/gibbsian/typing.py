"""The names of the types that travel between the rooms.

Shapes are written in docstrings as ``(n, *event)``: ``n`` chains or rows in front, the event's own axes behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

EnergyFn: TypeAlias = Callable[[Tensor], Tensor]
"""One energy, in nats, per chain or row: ``(n, *event) -> (n,)``."""

Scalar: TypeAlias = float | Tensor
"""A number that may change without recompiling when it is a 0-d tensor."""

Context: TypeAlias = Mapping[str, Tensor]
"""What a conditional energy is conditioned on, by name; one row per row of the batch."""
