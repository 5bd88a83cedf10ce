"""What a reader hands over: arrays as they were in the file, before anything is checked or converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gibbsian.energies.base import Energy


@dataclass(frozen=True, eq=False)
class Raw:
    """Arrays and what is known of them.

    Attributes
    ----------
    name
        What the data set will be called.
    place
        How messages name it, for example ``"iris.csv"``.
    source
        Where it came from, for `Dataset.source`.
    x
        Rows, of any numeric dtype.
    held_out, valid
        Rows that the file itself keeps apart, or ``None``.
    labels, held_out_labels
        Class of each row as found, or ``None``.
    columns
        Names of the columns of a table, or empty.
    value_range
        Lowest and highest value of a pixel, where the format says so.
    share
        The share of rows to hold out unless the caller says otherwise.
    """

    name: str
    place: str
    source: str
    x: np.ndarray
    held_out: np.ndarray | None = None
    valid: np.ndarray | None = None
    labels: Any = None
    held_out_labels: Any = None
    columns: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    share: float | None = None
    truth: Energy | None = None
    notes: tuple[str, ...] = ()


def listed(items: list[str], most: int = 5) -> str:
    """Join the first few items for a message, and count the rest."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def count(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural where it must be: ``1 row``, ``2 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def named(columns: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Give the columns of a table names where they have none: x0, x1, ..."""
    return columns or tuple(f"x{i}" for i in range(size))


def opening(place: str) -> str:
    """Write the name of a place as the first word of a sentence; file names stay as they are."""
    return place[0].upper() + place[1:] if place.startswith("the ") else place
