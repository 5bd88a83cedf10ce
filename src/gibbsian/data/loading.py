"""From a name, a path or an array to a `Dataset`, or to a message that says why not."""

from __future__ import annotations

import difflib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gibbsian.data.arrays import from_npz, read_npy
from gibbsian.data.binarise import as_bits, binarised
from gibbsian.data.catalogue import CATALOGUE, DRAWN, standard_name
from gibbsian.data.checks import (
    as_numbers,
    as_rows,
    check_finite,
    check_parts,
    check_rows,
    check_spread,
    kind_of,
    pixel_range,
)
from gibbsian.data.dataset import Dataset, Kind
from gibbsian.data.images import SUFFIXES, read_folder
from gibbsian.data.labels import encode_labels
from gibbsian.data.raw import Raw, listed, named, opening
from gibbsian.data.tables import from_frame, read_parquet, read_table
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, unknown_name

TEXT = (".csv", ".tsv", ".txt", ".dat")

KNOWN = (".npy", ".npz", *TEXT, ".parquet")
"""The kinds of file that hold a whole data set."""

LARGE = 10_000
"""From this many rows on a tenth is held out, below it a fifth."""


def load(
    source: str | Path | Any,
    *,
    held_out: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    array: str | None = None,
    labels: Any = None,
    kind: Kind | None = None,
    binarise: float | None = None,
) -> Dataset:
    """Load a data set by name, from a file or a folder, or from an array.

    Parameters
    ----------
    source
        A name that `datasets` lists; the path of a ``.npy``, ``.npz``, ``.csv`` (or other text table) or ``.parquet``
        file, or of a folder of pictures; or a NumPy array, a tensor, a data frame or a list of rows. A name goes before
        a file of the same name, which ``./name`` reaches.
    held_out
        The share of rows to hold out, from 0 to below 1. When left out: a third of digits, a fifth of other sets below
        10 000 rows and a tenth of larger ones. Not for files that bring their own split.
    seed
        Of the choice of rows, and of the points of generated sets.
    limit
        At most this many rows, chosen at random: in all, or of each part where the file brings its own split.
    array
        Which array of an ``.npz`` holds the rows; by default x_train, train, x, data or the only one.
    labels
        The class of each row: the name of a column (or of an array in an ``.npz``), or one value per row.
    kind
        ``"image"``, ``"table"`` or ``"binary"``; told from the values when left out.
    binarise
        Read values above this part of their range as ones, the others as zeros; see `gibbsian.data.binarise`.

    Returns
    -------
    The rows as float32 in the units of the source.

    Raises
    ------
    DataError
        If the data cannot be learned from as they are: the message says where and why.
    OptionError
        If a name is unknown or an option out of its range.
    ArgumentTypeError
        If the source is none of the above.
    """
    _check_options(held_out, limit, seed)
    raw = _read(source, seed=seed, limit=limit, array=array, labels=labels)
    if binarise is None:
        return _prepare(raw, held_out=held_out, seed=seed, limit=limit, kind=kind)
    kind = None if kind == "binary" else kind
    return binarised(_prepare(raw, held_out=held_out, seed=seed, limit=limit, kind=kind), binarise)


def load_rows(
    source: str | Path | Any,
    *,
    array: str | None = None,
    drop: str | None = None,
    kind: Kind | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """Load all rows in their order, to be scored: one is enough, and nothing has to vary.

    Parameters
    ----------
    source, array, kind
        As in `load`.
    drop
        A column of labels to leave out where there is one.
    threshold
        `Dataset.threshold` of the rows that the model was trained on, at which grey values become bits.

    Returns
    -------
    The rows as float32, those that the file keeps apart as validation or held-out rows last; the names of the columns.

    Raises
    ------
    DataError, OptionError, ArgumentTypeError
        As in `load`.
    """
    try:
        raw = _read(source, seed=0, limit=None, array=array, labels=drop)
    except OptionError:
        if drop is None:
            raise
        raw = _read(source, seed=0, limit=None, array=array, labels=None)
    parts = []
    columns: tuple[str, ...] = ()
    for part in (raw.x, raw.valid, raw.held_out):
        if part is None:
            continue
        x, columns, _ = as_numbers(part, raw.place, raw.columns)
        x = as_rows(x, raw.place)[0]
        check_finite(x, raw.place, columns)
        # Bits need not vary here; whether they are bits the model asks itself.
        kind_of(x, None if kind == "binary" else kind, raw.place)
        parts.append(_tensor(x, raw.place))
    rows = torch.cat(parts) if threshold is None else as_bits(torch.cat(parts), threshold)
    return rows, named(columns, rows.shape[1]) if rows.ndim == 2 else ()


def _check_options(held_out: float | None, limit: int | None, seed: int) -> None:
    if held_out is not None and not 0 <= held_out < 1:
        raise OptionError(f"held_out is a share of the rows, from 0 to below 1; got {held_out}.")
    if limit is not None and limit < 3:
        raise OptionError(f"limit is 3 rows or more; got {limit}.")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed is a whole number from 0 on; got {seed}.")


def _read(source: Any, *, seed: int, limit: int | None, array: str | None, labels: Any) -> Raw:
    if isinstance(source, str) and (name := standard_name(source)) in CATALOGUE:
        if labels is not None or array is not None:
            raise OptionError(f"{name!r} is a built-in data set; leave labels and array out.")
        return CATALOGUE[name].open(name, limit or DRAWN, seed)
    if isinstance(source, (str, Path)):
        return _read_path(source, seed=seed, limit=limit, array=array, labels=labels)
    if array is not None:
        raise OptionError(
            f"array names an array of an .npz file; got array={array!r} beside data in memory. Leave it out."
        )
    if "pandas" in sys.modules and isinstance(source, sys.modules["pandas"].DataFrame):
        return from_frame(source, "frame", "the data frame", "a data frame", labels, [])
    return _from_memory(source, labels)


def _from_memory(source: Any, labels: Any) -> Raw:
    if isinstance(labels, str):
        raise OptionError(f"An array has no column named {labels!r}; give the labels themselves, one per row.")
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        x = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    elif isinstance(source, (list, tuple)) or hasattr(source, "__array__"):
        try:
            x = np.asarray(source)
        except ValueError as error:
            raise DataError(
                f"The rows given do not make one array ({error}). Every row needs the same shape; cut or pad "
                "them first."
            ) from error
    else:
        raise ArgumentTypeError(
            "A data set is a name, a path, an array, a tensor, a data frame or a list of rows; got "
            f"{type(source).__name__}."
        )
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    return Raw("array", "the array", "an array", x, labels=labels)


def _read_path(source: str | Path, *, seed: int, limit: int | None, array: str | None, labels: Any) -> Raw:
    path = Path(source).expanduser()
    if not path.exists():
        raise _no_such(source, path)
    if array is not None and path.suffix.lower() != ".npz":
        raise OptionError(f"array={array!r} picks an array of an .npz file; {path.name} is none. Leave it out.")
    if path.is_dir():
        return read_folder(path, lambda n: _chosen(n, limit, seed), labels)
    _check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return from_npz(path, array, labels)
    if suffix == ".npy":
        if isinstance(labels, str):
            raise OptionError(f"{path.name} has no column named {labels!r}; give the labels themselves, one per row.")
        return Raw(path.stem, path.name, str(path), _plain(read_npy(path), path), labels=labels)
    frame, notes = read_parquet(path) if suffix == ".parquet" else read_table(path)
    return from_frame(frame, path.stem, path.name, str(path), labels, notes)


def _plain(x: np.ndarray, path: Path) -> np.ndarray:
    if x.dtype.names:
        raise DataError(
            f"{path.name} holds records with the fields {listed(list(x.dtype.names))}. Save it as a table: "
            "pandas.DataFrame(records).to_csv('table.csv', index=False)."
        )
    return x


def _check_file(path: Path) -> None:
    """Refuse files of unknown kinds, empty ones, and those that may not be opened."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        raise DataError(f"{path.name} is a single picture. Give the folder with all of them: {path.parent}.")
    if suffix not in KNOWN:
        raise DataError(
            f"{path.name} is of a kind that cannot be read ({suffix or 'no ending'}). Known: {', '.join(KNOWN)}, and "
            "folders of pictures. pandas reads most tables and writes them with frame.to_csv; numpy.save writes arrays."
        )
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}. Check its permissions.") from error
    if empty:
        raise DataError(f"{path.name} is empty (0 bytes). Was it saved or copied to the end?")


def _no_such(source: str | Path, path: Path) -> DataError | OptionError:
    bare = isinstance(source, str) and not path.suffix and len(path.parts) == 1
    if bare:
        error = unknown_name("data set", str(source), CATALOGUE)
        return OptionError(f"{error} Nor is there a file or folder of that name here.")
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"There is no file {path}: the folder {folder} does not exist.")
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "Check the path, which starts from the current folder."
    return DataError(f"There is no file or folder {path}. {hint}")


def _chosen(n: int, limit: int | None, seed: int) -> np.ndarray:
    """Choose at most ``limit`` of ``n`` rows; all of them stay in order."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit].numpy())


def _prepare(raw: Raw, *, held_out: float | None, seed: int, limit: int | None, kind: Kind | None) -> Dataset:
    """Check, convert and split what was read."""
    place = raw.place
    pixels = raw.x.dtype
    x, columns, notes = as_numbers(raw.x, place, raw.columns)
    x, more = as_rows(x, place)
    check_rows(len(x), place)
    check_finite(x, place, columns)
    kind = kind_of(x, kind, place)
    steps = check_spread(x, place, kind, columns)
    parts = {name: _part(getattr(raw, name), place, name, columns) for name in ("held_out", "valid")}
    check_parts(x, parts, kind, place)
    own = parts["held_out"]
    y, y_own, names = _labels(raw, len(x), own)
    value_range, remark = pixel_range(x, pixels, raw.value_range, place) if kind == "image" else (None, [])

    if own is None:
        train, kept, split = _split(len(x), raw.share if held_out is None else held_out, limit, seed)
        rest, y_rest = x[kept], None if y is None else y[kept]
    else:
        if held_out is not None:
            raise OptionError(
                f"{opening(place)} brings its own held-out rows ({len(own)}); leave held_out={held_out} out."
            )
        train, kept = _chosen(len(x), limit, seed), _chosen(len(own), limit, seed)
        rest, y_rest = own[kept], None if y_own is None else y_own[kept]
        split = f"the file's own: {len(x)} training and {len(own)} held-out rows"
        if len(train) < len(x) or len(kept) < len(own):
            split += f", of which {len(train)} and {len(kept)} were drawn with seed {seed}"
    valid = parts["valid"]
    if valid is not None:
        split += f"; its {len(valid)} validation rows stand apart"
    dataset = Dataset(
        name=raw.name,
        kind=kind,
        train=_tensor(x[train], place),
        held_out=_tensor(rest, place),
        source=raw.source,
        split=split,
        labels=None if y is None else torch.from_numpy(y[train]),
        held_out_labels=None if y_rest is None else torch.from_numpy(y_rest),
        label_names=names,
        columns=named(columns, x.shape[1]) if x.ndim == 2 else (),
        value_range=value_range,
        valid=None if valid is None else _tensor(valid[_chosen(len(valid), limit, seed)], place),
        truth=raw.truth,
        notes=(*raw.notes, *notes, *more, *steps, *remark),
    )
    dataset.scaling()  # so that a column that is constant in the training rows is told of now
    return dataset


def _part(x: np.ndarray | None, place: str, name: str, columns: tuple[str, ...]) -> np.ndarray | None:
    if x is None or len(x) == 0:
        return None
    where = f"the {name.replace('_', '-')} part of {place}"
    x, _, _ = as_numbers(x, where, ())
    x, _ = as_rows(x, where)
    check_finite(x, where, columns)
    return x


def _labels(raw: Raw, n: int, own: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    """Count the classes of both parts together, so that one code means one class."""
    if raw.labels is None:
        return None, None, ()
    y, names = encode_labels(raw.labels, n, raw.place)
    if own is None or raw.held_out_labels is None:
        return y, None, names
    y_own, names_own = encode_labels(raw.held_out_labels, len(own), f"the held-out part of {raw.place}")
    if names_own == names:
        return y, y_own, names
    unseen = [name for name in names_own if name not in names]
    if unseen:
        raise DataError(f"The held-out rows of {raw.place} have classes that the training rows lack: {listed(unseen)}.")
    return y, np.array([names.index(name) for name in names_own])[y_own], names


def _split(n: int, share: float | None, limit: int | None, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Shuffle rows into training and held-out indices, and say how."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()[: limit or n]
    share = (0.2 if len(order) < LARGE else 0.1) if share is None else share
    size = 0 if share == 0 else min(max(1, round(share * len(order))), len(order) - 2)
    chosen = f"{len(order)} of {n} rows, of which " if len(order) < n else ""
    split = f"{chosen}{size} of {len(order)} rows held out at random, seed {seed}" if size else "no rows held out"
    return np.sort(order[size:]), np.sort(order[:size]), split


def _tensor(x: np.ndarray, place: str) -> Tensor:
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(x, dtype=np.float32)
    if not math.isfinite(float(rows.sum(dtype=np.float64))) and not np.isfinite(rows).all():
        raise DataError(
            f"{opening(place)} reaches {np.abs(x).max():g}, beyond single precision; divide it by a suitable unit."
        )
    return torch.from_numpy(rows)
