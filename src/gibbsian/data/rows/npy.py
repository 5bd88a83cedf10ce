"""Arrays in ``.npy`` files, one or several, read in stretches.

They need not fit into memory. They are read rather than mapped into the address space: pages of a mapped file count as
resident memory until the system takes them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.data.arrays import unreadable
from gibbsian.data.checks import as_rows
from gibbsian.data.raw import listed
from gibbsian.data.rows.source import (
    Blocks,
    Chunk,
    Shard,
    Source,
    all_at_once,
    held_type,
    shard_row,
    shards_of,
    without_empty,
)
from gibbsian.errors import DataError, OptionError

STRETCH = 2**20
"""Bytes of a block: long enough to read a disk in order, short enough to have many in a window."""


class NpySource(Source):
    """Arrays ``(n, ...)`` that agree in everything but n.

    Parameters
    ----------
    path
        The file, or the folder.
    paths
        The files.
    labels
        One per row of all files, in the order of their names; the path of an ``.npy`` with them; or ``None``.

    Raises
    ------
    DataError, OptionError
        If one is no array of numbers, or cut short, or differs from the first.
    """

    sampled_blocks = 512

    def __init__(self, path: Path, paths: Sequence[Path], labels: Any = None) -> None:
        self.name, self.place, self.path = path.stem, path.name, path
        self.shards = shards_of(path, paths)
        self._heads = all_at_once(_head, self.shards)
        first = self._heads[0]
        for shard, head in zip(self.shards[1:], self._heads[1:]):
            if head.dtype != first.dtype or head.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"The arrays of {self.place} differ: {self.shards[0].name} has {first.dtype} rows of shape "
                    f"{first.shape[1:]}, {shard.name} {head.dtype} rows of shape {head.shape[1:]}. Save all alike."
                )
        sizes = [head.shape[0] for head in self._heads]
        self.notes = without_empty([[n] for n in sizes], self.shards, self.place)
        self._raw = first.shape[1:] or (1,)
        arranged, notes = as_rows(np.zeros((2, *self._raw), np.uint8), self.place)
        self.notes += tuple(notes)
        self.event_shape, self.dtype = arranged.shape[1:], held_type(first.dtype)
        row = int(np.prod(self._raw)) * first.dtype.itemsize
        self.blocks = Blocks.cut(sizes, max(1, STRETCH // row))
        self.block_bytes = max(STRETCH, row)
        self._before = np.concatenate(([0], np.cumsum(sizes)))
        self._labels = None if labels is None else _labels(labels, int(sum(sizes)), self.place)
        self.labelled = self._labels is not None
        if self.dtype.kind == "f" and len(self.event_shape) == 1:
            self.columns = tuple(f"x{i}" for i in range(self.event_shape[0]))

    def read(self, block: int, start: int, stop: int) -> Chunk:
        """Read rows of a stretch."""
        index = int(self.blocks.shard[block])
        shard, head = self.shards[index], self._heads[index]
        first = int(self.blocks.first[block]) + start
        n, width = stop - start, int(np.prod(self._raw))
        shard.check()
        with shard.path.open("rb", buffering=0) as file:
            x = np.fromfile(file, head.dtype, n * width, offset=head.offset + first * width * head.dtype.itemsize)
        if len(x) < n * width:
            raise DataError(f"{shard.path} ends before row {first + n}. It may be truncated; copy or save it again.")
        rows = as_rows(x.reshape(n, *self._raw), self.place)[0]
        at = int(self._before[index]) + first
        return rows, None if self._labels is None else np.asarray(self._labels[at : at + n])

    def labels(self, block: int) -> np.ndarray:
        """Labels of a stretch."""
        assert self._labels is not None
        at = int(self._before[self.blocks.shard[block]] + self.blocks.first[block])
        return np.asarray(self._labels[at : at + int(self.blocks.rows[block])])

    def where(self, block: int, row: int = 0) -> tuple[str, int]:
        """Name the file of a row, and its number there."""
        return shard_row(self, block, row)

    def marks(self) -> dict[str, str]:
        """Names, sizes, types and shapes."""
        return {
            f"data[{shard.name!r}]": f"{head.dtype}{list(head.shape)}, {shard.size} bytes"
            for shard, head in zip(self.shards, self._heads)
        }


class _Head:
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> None:
        self.shape, self.dtype, self.offset = shape, dtype, offset


def _head(shard: Shard) -> _Head:
    """Read what stands before the numbers, and compare it with the file's length."""
    path = shard.path
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            known = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in known:
                raise ValueError(f"it is of version {version}")
            shape, fortran, dtype = known[version](file)
            offset = file.tell()
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise unreadable(path, error) from error
    if dtype.names:
        raise DataError(
            f"{path.name} holds records with the fields {listed(list(dtype.names))}. Save it as a table: "
            "pandas.DataFrame(records).to_parquet('table.parquet', index=False)."
        )
    if dtype.kind not in "biuf":
        raise DataError(
            f"{path.name} holds values of type {dtype}, and rows that are read piece by piece are real numbers. Save "
            "them as such: numpy.save(path, numpy.asarray(x, dtype=numpy.float32))."
        )
    if len(shape) == 0 or len(shape) > 4:
        raise DataError(
            f"{path.name} has {len(shape)} axes, shape {shape}. Tables have two (rows, columns) and pictures three or "
            "four (rows, channels, height, width); save it with one row per example."
        )
    if fortran and len(shape) > 1 and shape[0] > 1:
        raise DataError(
            f"{path.name} keeps its columns together (Fortran order), so that rows cannot be read one by one. Save it "
            "again with numpy.save(path, numpy.ascontiguousarray(x))."
        )
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if shard.size < expected:
        raise DataError(
            f"{path.name} is truncated: an array of shape {shape} and type {dtype} takes {expected} bytes, and the "
            f"file has {shard.size}. Copy or save it again."
        )
    return _Head(tuple(shape), dtype, offset)


def _labels(labels: Any, n: int, place: str) -> np.ndarray:
    if isinstance(labels, str | Path):
        path = Path(labels).expanduser()
        if path.suffix.lower() != ".npy" or not path.is_file():
            raise OptionError(
                f"An array has no column named {str(labels)!r}; give the labels themselves, one per row, or the path "
                "of an .npy file with them."
            )
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    y = np.asarray(labels)
    if y.shape != (n,):
        raise DataError(f"{place} has {n} rows, and the labels have shape {y.shape}; expected ({n},).")
    return y
