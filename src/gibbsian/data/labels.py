"""Classes of rows: whole numbers, text or one-hot rows, counted from 0."""

from __future__ import annotations

from typing import Any

import numpy as np

from gibbsian.data.raw import count, opening
from gibbsian.errors import DataError


def encode_labels(labels: Any, n: int, place: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Count classes from 0, in the order of their sorted names.

    Parameters
    ----------
    labels
        One per row: whole numbers or text, ``(n,)`` or ``(n, 1)``; or one-hot, ``(n, classes)``.
    n
        How many rows there are.
    place
        How messages name the data.

    Returns
    -------
    Class of each row, int64 ``(n,)``, and what each class is called.

    Raises
    ------
    DataError
        If there are not ``n`` of them, or they are no classes.
    """
    y = np.asarray(labels)
    if y.ndim > 2 or y.ndim == 0:
        raise DataError(f"Labels of {place} have shape {y.shape}; expected one per row, ({n},), or one-hot rows.")
    if len(y) != n:
        raise DataError(
            f"{opening(place)} has {count(n, 'row')} but {count(len(y), 'label')}. Each row needs exactly one; were "
            "rows dropped from one of the two only?"
        )
    if y.ndim == 2:
        y = _from_columns(y, place)
    if y.dtype.kind == "O":
        y = _plain(y, place)
    if y.dtype.kind not in "biufUST":
        raise DataError(f"Labels of {place} are of type {y.dtype}; expected whole numbers or text.")
    if y.dtype.kind == "f":
        bad = np.flatnonzero(y != np.round(y))
        if len(bad):
            raise DataError(
                f"Labels of {place} must name classes; the one of row {bad[0] + 1} is {y[bad[0]]}. "
                "If it is a measured quantity, leave it among the columns of the table; if it is missing, fill it in."
            )
        y = y.astype(np.int64)
    names, codes = np.unique(y, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), tuple(str(name) for name in names)


def _from_columns(y: np.ndarray, place: str) -> np.ndarray:
    if y.shape[1] == 1:
        return y[:, 0]
    one_hot = y.dtype.kind in "biuf" and bool((((y == 0) | (y == 1)).all(1) & (y.sum(1) == 1)).all())
    if not one_hot:
        raise DataError(
            f"Labels of {place} have shape {y.shape} and are not one-hot (a single 1 in each row). Expected one class "
            f"per row, ({len(y)},); pick one column."
        )
    return y.argmax(1)


def _plain(y: np.ndarray, place: str) -> np.ndarray:
    """Turn Python objects into an array of numbers or text."""
    for i, value in enumerate(y):
        if value is None or value != value:
            raise DataError(f"Labels of {place}: row {i + 1} has none. Give it one, or drop the row.")
    if all(isinstance(value, (int, float, np.number, np.bool_)) for value in y):
        return y.astype(np.float64)
    return np.array([str(value) for value in y])
