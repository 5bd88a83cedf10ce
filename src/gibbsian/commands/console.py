"""What commands share: where they write, and where their randomness comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def generator(seed: int) -> Any:
    """A generator of a seed."""
    import torch

    return torch.Generator().manual_seed(seed)


def console_of(stderr: bool = False) -> Console:
    """The terminal, or what its output is led to."""
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)
