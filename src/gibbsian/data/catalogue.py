"""The data sets known by name.

Some come with scikit-learn, some are drawn from densities in closed form, and the larger ones are read from the folder
that the environment variable ``GIBBSIAN_DATA`` names.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gibbsian.data.arrays import read_npz
from gibbsian.data.dataset import Kind
from gibbsian.data.raw import Raw, count, listed
from gibbsian.errors import DataError

FOLDER = "GIBBSIAN_DATA"
"""The environment variable with the folder of the larger data sets."""

DRAWN = 10_000
"""Points drawn of a generated set, unless a limit says otherwise."""


@dataclass(frozen=True)
class DatasetInfo:
    """One line of the table of known data sets.

    Attributes
    ----------
    name, kind, shape
        What to call it, what it is, and the shape of one row.
    size
        Rows in all, training and held out.
    source
        Where it comes from.
    available
        Whether it can be loaded now.
    remedy
        What to do when it cannot, else empty.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    size: int
    source: str
    available: bool = True
    remedy: str = ""


@dataclass(frozen=True)
class Entry:
    """How a named data set is listed and opened; ``open`` takes the number of points to draw and a seed."""

    kind: Kind
    shape: tuple[int, ...]
    size: int
    source: str
    open: Callable[[str, int, int], Raw]
    missing: Callable[[str], str] = lambda name: ""


def datasets() -> tuple[DatasetInfo, ...]:
    """List the data sets known by name, and whether each can be loaded now."""
    table = []
    for name, entry in CATALOGUE.items():
        missing = entry.missing(name)
        table.append(DatasetInfo(name, entry.kind, entry.shape, entry.size, entry.source, not missing, missing))
    return tuple(table)


def standard_name(name: str) -> str:
    """Write a data set's name as the catalogue does: ``Two_Moons`` is ``two-moons``."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _open_digits(name: str, n: int, seed: int) -> Raw:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    source = "scikit-learn (UCI optical recognition of handwritten digits, test part)"
    return Raw(name, name, source, x.reshape(-1, 8, 8), labels=y, value_range=(0.0, 16.0), share=1 / 3)


def _open_table(name: str, n: int, seed: int) -> Raw:
    import sklearn.datasets

    found = getattr(sklearn.datasets, "load_" + name.replace("-", "_"))()
    names = np.asarray(found.target_names)[found.target]
    return Raw(name, name, "scikit-learn", found.data, labels=names, columns=tuple(map(str, found.feature_names)))


def _open_diabetes(name: str, n: int, seed: int) -> Raw:
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes(scaled=False)
    x = np.column_stack([found.data, found.target])
    return Raw(name, name, "scikit-learn", x, columns=(*map(str, found.feature_names), "progression"))


def _open_target(name: str, n: int, seed: int) -> Raw:
    module, target, dim = TARGETS[name]
    truth = getattr(importlib.import_module(f"gibbsian.energies.{module}"), target)()
    x = truth.sample(n, torch.Generator().manual_seed(seed)).float().numpy()
    source = f"{n} exact draws from {target}, seed {seed}"
    return Raw(name, name, source, x, columns=tuple(f"x{i}" for i in range(dim)), truth=truth)


def _open_file(name: str, n: int, seed: int) -> Raw:
    problem = _missing_file(name)
    if problem:
        raise DataError(problem)
    path = _find_file(name)
    assert path is not None
    roles: dict[str, Any] = read_npz(path)
    _, arrays, shape = FILES[name]
    lacking = [role for role, array in arrays.items() if role not in roles]
    if lacking or roles["x"].shape[1:] != shape:
        raise DataError(
            f"{path} is not the file expected for {name!r}: it should hold {_expected(name)}; its rows have shape "
            f"{roles['x'].shape[1:]}" + (f" and it lacks {listed([arrays[r] for r in lacking])}." if lacking else ".")
        )
    value_range = (0.0, 255.0) if len(shape) == 2 else None
    return Raw(name, name, str(path), **roles, value_range=value_range)


def _find_file(name: str) -> Path | None:
    folder = os.environ.get(FOLDER, "").strip()
    names = (f"{name.replace('-', '_')}.npz", f"{name}.npz")
    return next((p for n in names if folder and (p := Path(folder).expanduser() / n).is_file()), None)


def _missing_file(name: str) -> str:
    """Say what to do so that a data set can be read from its file; empty when it can."""
    if _find_file(name) is not None:
        return ""
    folder = os.environ.get(FOLDER, "").strip()
    file = f"{name.replace('-', '_')}.npz"
    if not folder:
        return (
            f"{name!r} is read from a file: put {file}, holding {_expected(name)}, into a folder and set the "
            f"environment variable {FOLDER} to that folder, for example export {FOLDER}=$HOME/data."
        )
    if not Path(folder).expanduser().is_dir():
        return f"{name!r} is read from the folder in {FOLDER}, which is {folder!r}; there is no such folder."
    return (
        f"{name!r} is read from {file} in the folder {folder} ({FOLDER}); it is not there. It holds {_expected(name)}."
    )


def _expected(name: str) -> str:
    _, arrays, shape = FILES[name]
    names = listed(list(arrays.values()))
    if len(shape) == 2:
        return f"uint8 arrays {names} with pictures of {shape[0]} x {shape[1]}, as Keras saves them"
    return f"arrays {names} of zeros and ones with {count(shape[0], 'column')}"


TARGETS = {
    "two-moons": ("toys", "TwoMoons", 2),
    "eight-gaussians": ("toys", "EightGaussians", 2),
    "checkerboard": ("toys", "Checkerboard", 2),
    "pinwheel": ("toys", "Pinwheel", 2),
    "ring": ("toys", "Ring", 2),
    "banana": ("toys", "Rosenbrock", 2),
    "double-well": ("targets", "DoubleWell", 2),
    "funnel": ("targets", "Funnel", 10),
    "many-well": ("targets", "ManyWell", 32),
}
"""Densities in closed form that can be drawn from exactly: their module, class and dimension."""

_PICTURES = {"x": "x_train", "labels": "y_train", "held_out": "x_test", "held_out_labels": "y_test"}
_PARTS = {"x": "train", "valid": "valid", "held_out": "test"}

FILES: dict[str, tuple[int, dict[str, str], tuple[int, ...]]] = {
    "mnist": (70_000, _PICTURES, (28, 28)),
    "fashion-mnist": (70_000, _PICTURES, (28, 28)),
    "nltcs": (21_574, _PARTS, (16,)),
    "plants": (23_215, _PARTS, (69,)),
}
"""What is read from the user's folder: rows in all, the arrays that the file holds, the shape of one row in it."""


def _entries() -> dict[str, Entry]:
    entries = {
        "digits": Entry("image", (1, 8, 8), 1797, "scikit-learn", _open_digits),
        "iris": Entry("table", (4,), 150, "scikit-learn", _open_table),
        "wine": Entry("table", (13,), 178, "scikit-learn", _open_table),
        "breast-cancer": Entry("table", (30,), 569, "scikit-learn", _open_table),
        "diabetes": Entry("table", (11,), 442, "scikit-learn", _open_diabetes),
    }
    for name, (_, _, dim) in TARGETS.items():
        entries[name] = Entry("table", (dim,), DRAWN, "drawn from a known density", _open_target)
    for name, (size, _, shape) in FILES.items():
        kind: Kind = "image" if len(shape) == 2 else "binary"
        event = (1, *shape) if kind == "image" else shape
        entries[name] = Entry(kind, event, size, f"{name.replace('-', '_')}.npz in {FOLDER}", _open_file, _missing_file)
    return entries


CATALOGUE = _entries()
"""Every data set known by name."""
