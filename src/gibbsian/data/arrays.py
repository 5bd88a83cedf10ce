"""NumPy's files: one array (``.npy``) or several by name (``.npz``)."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.data.raw import Raw, count, listed
from gibbsian.errors import DataError, unknown_name

TRAIN_NAMES = ("x_train", "train", "x", "data")
"""The arrays of an ``.npz`` taken for the rows, the first found; capitals do not matter."""

BROKEN = (ValueError, OSError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error, pickle.PickleError)
"""What NumPy raises for files that are cut short or are something else."""


def read_npy(path: Path) -> np.ndarray:
    """Read one array; pickled objects are refused.

    Raises
    ------
    DataError
        If the file is broken or holds objects.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except BROKEN as error:
        raise unreadable(path, error) from error


def read_npz(path: Path, array: str | None = None, labels: str | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an archive under the roles that they play.

    Parameters
    ----------
    path
        The file.
    array, labels
        The names of the arrays with the rows and with their labels; found by the usual names when left out.

    Returns
    -------
    ``x``, and where the file has them ``held_out``, ``valid``, ``labels`` and ``held_out_labels``.

    Raises
    ------
    DataError
        If the file is broken, or it is not clear which array holds the rows.
    OptionError
        If no array has the name asked for.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except BROKEN as error:
        raise unreadable(path, error) from error
    if isinstance(archive, np.ndarray):
        raise DataError(f"{path.name} holds a single array without a name; rename it to {path.stem}.npy.")
    with archive:
        found = {name: _member(archive, name, path) for name in archive.files}
    lower = {name.lower(): name for name in found}
    rows = _rows_name(path, found, lower, array)
    named = _companions(rows.lower())
    roles = {role: found[lower[n]] for role, names in named.items() for n in reversed(names) if n in lower}
    if roles.get("valid") is roles.get("held_out"):
        roles.pop("valid", None)
    if labels is not None:
        if labels not in found:
            raise unknown_name(f"array in {path.name}", labels, found)
        roles["labels"] = found[labels]
    return {"x": found[rows], **roles}


def from_npz(path: Path, array: str | None, labels: Any) -> Raw:
    """Read an archive; a text in ``labels`` names the array that holds them.

    Raises
    ------
    DataError
        If the arrays do not fit together.
    OptionError
        If an array is asked for that is not there.
    """
    roles: dict[str, Any] = read_npz(path, array, labels if isinstance(labels, str) else None)
    for role in ("held_out", "valid"):
        if role in roles and roles[role].shape[1:] != roles["x"].shape[1:]:
            raise DataError(
                f"The rows of {path.name} have different shapes: {roles['x'].shape[1:]} to train on and "
                f"{roles[role].shape[1:]} in its {role.replace('_', '-')} part. They must agree."
            )
    if labels is not None and not isinstance(labels, str):
        roles["labels"] = labels
    if "held_out" in roles and ("labels" in roles) != ("held_out_labels" in roles):
        raise DataError(
            f"{path.name} brings its own held-out rows, and only one of the two parts has labels. Name them y_train "
            "and y_test beside x_train and x_test, or leave them out."
        )
    return Raw(path.stem, path.name, str(path), **roles)


def unreadable(path: Path, error: BaseException) -> DataError:
    """Say what is wrong with an array file: another format, pickled objects, or a part that is missing."""
    with path.open("rb") as file:
        begins = file.read(6)
    if not (begins == b"\x93NUMPY" or begins.startswith(b"PK")):
        return DataError(
            f"{path.name} is not a NumPy file: it begins with {begins!r}. Save arrays with numpy.save (.npy) or "
            "numpy.savez (.npz); tables of text end in .csv."
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    if "allow_pickle" in reason:
        return DataError(
            f"{path.name} holds Python objects, which Gibbsian does not unpickle, as that could run any code. Make one "
            "array of numbers and save it: numpy.save(path, numpy.asarray(rows, dtype=float))."
        )
    return DataError(
        f"{path.name} cannot be read as a NumPy {path.suffix} file ({reason}). It may be truncated; copy or save it "
        "again."
    )


def _member(archive: Any, name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(archive[name])
    except BROKEN as error:
        if "allow_pickle" in str(error):
            # Other arrays of the file may be fine; this one is refused only if it is the one asked for.
            return np.empty(0, dtype=object)
        raise DataError(
            f"Array {name!r} of {path.name} cannot be read ({error}). Copy or save the file again."
        ) from error


def _rows_name(path: Path, found: dict[str, np.ndarray], lower: dict[str, str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in found:
            raise unknown_name(f"array in {path.name}", wanted, found)
        return wanted
    for name in TRAIN_NAMES:
        if name in lower:
            return lower[name]
    usable = [name for name, value in found.items() if value.ndim >= 1 and value.dtype.kind in "biufc" and value.size]
    if len(usable) == 1:
        return usable[0]
    contents = listed([f"{name} {value.shape} {value.dtype}" for name, value in found.items()], 10) or "nothing"
    if not usable:
        raise DataError(f"{path.name} has no array of numbers; it holds {contents}.")
    raise DataError(
        f"{path.name} has {count(len(found), 'array')}, and none is called {', '.join(TRAIN_NAMES)}: {contents}. "
        f"Say which one holds the rows, for example array={usable[0]!r}."
    )


def _companions(rows: str) -> dict[str, tuple[str, ...]]:
    """Name the arrays that belong to the rows: a test part only beside a training part."""
    if rows == "x_train":
        return {
            "held_out": ("x_test", "test", "x_valid"),
            "valid": ("x_valid", "valid", "x_val"),
            "labels": ("y_train", "labels_train"),
            "held_out_labels": ("y_test", "labels_test"),
        }
    if rows == "train":
        return {
            "held_out": ("test", "valid"),
            "valid": ("valid",),
            "labels": ("train_labels", "labels"),
            "held_out_labels": ("test_labels",),
        }
    return {"labels": ("y", "labels", "label", "target")}
