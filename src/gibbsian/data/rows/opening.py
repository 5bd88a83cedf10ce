"""From a path to rows that stay on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.data.checks import kind_of, pixel_range
from gibbsian.data.dataset import Kind
from gibbsian.data.labels import encode_labels
from gibbsian.data.raw import count, listed
from gibbsian.data.rows.npy import NpySource
from gibbsian.data.rows.pictures import PictureSource, more_pictures
from gibbsian.data.rows.rows import Rows
from gibbsian.data.rows.source import Source
from gibbsian.data.rows.tables import ARROW, PARQUET, TableSource
from gibbsian.errors import DataError, OptionError

LOOKED_AT = 10_000
"""Rows by which kind, range and classes are told."""

HELD_OUT = 0.1
MOST_HELD_OUT = 50_000
"""A tenth of the rows is held out where nothing is said, and no more than this many, which tell enough."""

LARGE = 2 * 2**30
"""Bytes of a file from which on the command line leaves its rows on the disk."""

MANY = 200_000
"""Pictures of a folder, likewise."""

FILES = (*PARQUET, *ARROW, ".npy")


def open_rows(
    source: str | Path | Sequence[str | Path],
    *,
    held_out: float | None = None,
    seed: int = 0,
    labels: Any = None,
    classes: Sequence[Any] | None = None,
    array: str | None = None,
    shape: Sequence[int] | None = None,
    kind: Kind | None = None,
    binarise: float | None = None,
    memory: int = 256,
) -> Rows:
    """Open data that need not fit into memory; only tables of contents, and a sample, are read.

    Parameters
    ----------
    source
        A Parquet, Arrow (feather) or ``.npy`` file; a folder, or a pattern such as ``"data/part-*.parquet"``, of such
        files of one kind, whose rows follow each other in the order of their names; a folder of pictures, in which
        folders are classes; or a list of files.
    held_out
        The share of the rows of every block to hold out, from 0 to below 1; a tenth when left out, or 50 000 rows where
        that is less.
    seed
        Of the choice of held-out rows.
    labels
        The column of a table with the class of each row; for arrays one label per row, or the path of an ``.npy`` with
        them.
    classes
        All classes; when left out, those in a sample of rows.
    array
        The column of a table that holds whole rows, as lists of numbers or as pictures, where there are others.
    shape
        Of one row, such as ``(1, 28, 28)``, where a column of lists holds pictures.
    kind
        ``"image"``, ``"table"`` or ``"binary"``; told from a sample when left out.
    binarise
        Read values above this part of their range as ones, the others as zeros.
    memory
        MiB of rows that a process holds at most while they are read in a shuffled order, for all lanes; one of several
        processes holds those of its own lanes. The more, the better rows are mixed. The order depends on it.

    Returns
    -------
    Rows
        To be given to `gibbsian.training.fit` in a model's units: ``rows.scaled(rows.scaling())``.

    Raises
    ------
    DataError
        If the data cannot be learned from as they are, as far as was looked.
    OptionError
        If an option does not fit.
    MissingPackageError
        If pyarrow is missing.
    """
    _check_options(held_out, seed, memory, binarise)
    opened = _source(source, labels, array, None if shape is None else tuple(shape))
    n = int(opened.blocks.rows.sum())
    share = min(HELD_OUT, MOST_HELD_OUT / n) if held_out is None else held_out
    rows = Rows(opened, "table", share, seed, memory=memory)
    if len(rows) < 2:
        raise DataError(f"{opened.place} has {count(n, 'row')}, too few to hold {share:g} of them out and learn.")
    x, _ = rows.sample(rows.affordable(LOOKED_AT, megabytes=64))
    found = x.numpy()
    place = f"the sample of {opened.place}"
    if bool((found == found[:1]).all()):
        raise DataError(f"All rows in {place} are equal; there is no density to learn.")
    told = kind_of(found, None if binarise is not None and kind == "binary" else kind, place)
    notes = opened.notes
    value_range: tuple[float, float] | None = None
    if told == "image":
        value_range, remark = pixel_range(found, opened.dtype, None, place)
        notes += tuple(remark)
    names, more = _classes(rows, classes)
    notes += more
    threshold = None
    if binarise is not None and told != "binary":
        low, high = value_range if value_range is not None else (0.0, 1.0)
        if value_range is None and (found.min() < 0.0 or found.max() > 1.0):
            raise DataError(
                f"{opened.place} runs from {found.min():g} to {found.max():g}; a table is binarised where its values "
                "lie between 0 and 1. Scale or threshold the columns first."
            )
        threshold, told, value_range = low + binarise * (high - low), "binary", (0.0, 1.0)
        notes += (f"Values above {threshold:g} are read as ones, others as zeros.",)
    return Rows(opened, told, share, seed, "train", names, None, threshold, memory, value_range, notes)


def why_stream(source: str | Path) -> str:
    """Say why data had better stay on the disk: large, or in several files; nothing where memory will do."""
    path = Path(source).expanduser()
    if path.is_file():
        size = path.stat().st_size if path.suffix.lower() in FILES else 0
        return f"{path.name} has {size / 2**30:.1f} GiB" if size > LARGE else ""
    files = _files(path)
    if files:
        return f"{source} is of {count(len(files), 'file')}"
    many = path.is_dir() and more_pictures(path, MANY)
    return f"{source} has more than {MANY} pictures" if many else ""


def _check_options(held_out: float | None, seed: int, memory: int, binarise: float | None) -> None:
    if held_out is not None and not 0 <= held_out < 1:
        raise OptionError(f"held_out is a share of the rows, from 0 to below 1; got {held_out}.")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed is a whole number from 0 on; got {seed}.")
    if memory < 1:
        raise OptionError(f"memory is 1 MiB or more; got {memory}.")
    if binarise is not None and not 0.0 < binarise < 1.0:
        raise OptionError(f"binarise is a part of the range of values, between 0 and 1; got {binarise}.")


def _source(source: Any, labels: Any, array: str | None, shape: tuple[int, ...] | None) -> Source:
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        paths = [path] if path.is_file() else _files(path)
        if not paths and path.is_dir() and more_pictures(path, 0):
            return PictureSource(path, labels)
        if any(c in path.name for c in "*?["):
            path = path.parent
    else:
        paths = [Path(each).expanduser() for each in source]
        path = paths[0].parent if len({p.parent for p in paths}) == 1 and len(paths) > 1 else paths[0]
    if not paths:
        what = "is no file or folder" if not path.exists() else "holds none"
        raise DataError(
            f"{source} {what}. Data that stay on the disk are files that end in {', '.join(FILES)}, a folder or a "
            "pattern of such files, or a folder of pictures."
        )
    kinds = {_kind(each) for each in paths}
    if len(kinds) > 1:
        raise DataError(f"{source} has files of several kinds: {', '.join(sorted(kinds))}. Keep those of one.")
    if kinds == {"array"}:
        if array is not None or shape is not None:
            raise OptionError(
                "array and shape are for columns of tables; an .npy file is one array, which has a shape."
            )
        return NpySource(path, paths, labels)
    if labels is not None and not isinstance(labels, str):
        raise OptionError("The labels of a table are one of its columns: labels='name'.")
    return TableSource(path, paths, labels, array, shape)


def _kind(path: Path) -> str:
    ending = path.suffix.lower()
    if ending in PARQUET:
        return "Parquet"
    if ending in ARROW:
        return "Arrow"
    if ending == ".npy":
        return "array"
    raise DataError(
        f"{path} is of a kind that cannot be read piece by piece ({ending or 'no ending'}). Known: {', '.join(FILES)}, "
        "and folders of pictures; gibbsian.load reads other files into memory."
    )


def _files(path: Path) -> list[Path]:
    """Files of a folder and of those inside it, or of a pattern; those that programs keep for themselves left out."""
    if any(c in path.name for c in "*?["):
        found = path.parent.glob(path.name)
    else:
        found = (each for ending in FILES for each in path.rglob(f"*{ending}")) if path.is_dir() else ()
    return sorted(each for each in found if each.is_file() and not each.name.startswith((".", "_")))


def _classes(rows: Rows, classes: Sequence[Any] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the classes: those of the source, those given, or those in a sample."""
    if not rows.source.labelled:
        if classes is not None:
            raise OptionError("classes are those of a column of labels; name it: labels='...'.")
        return (), ()
    if rows.source.classes is not None:
        return rows.source.classes, ()
    if classes is not None:
        return tuple(str(each) for each in classes), ()
    found = []
    own = rows.block_rows
    most = min(len(own), 2 * rows.source.sampled_blocks)
    for block in np.unique(np.linspace(0, len(own) - 1, most).astype(int)):
        labels = np.unique(rows.source.labels(int(block)))
        found.extend(encode_labels(labels, len(labels), rows.source.place)[1])
    names = sorted(set(found), key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))
    return tuple(names), (
        f"{count(len(names), 'class').replace('classs', 'classes')} met in a sample of {count(most, 'block')}: "
        f"{listed(names)}.",
    )
