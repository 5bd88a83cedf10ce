"""Commands about proteins, by name: each lives in a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Callable

PROTEIN_COMMANDS: dict[str, Callable[..., None]] = {}
"""What ``gibbsian protein`` offers."""
