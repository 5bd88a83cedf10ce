"""What rows that stay on the disk are read from: shards, cut into blocks of contiguous rows.

A block is what is read at once: a row group of a Parquet file, a record batch of an Arrow file, a stretch of an array,
some pictures. How many rows each has is known when the source is opened, without reading any row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from gibbsian.data.raw import count, listed
from gibbsian.errors import DataError

T = TypeVar("T")
Chunk = tuple[np.ndarray, np.ndarray | None]
"""Rows ``(n, *event)`` and their labels as they are in the file, or ``None``."""


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    Attributes
    ----------
    path
        Where it is.
    name
        How messages and fingerprints name it: its path from the folder on.
    size
        Bytes, when it was opened; another size later means that it was changed.
    """

    path: Path
    name: str
    size: int

    def check(self) -> None:
        """Refuse a shard that is gone, or was changed since the source was opened.

        Raises
        ------
        DataError
            Naming it.
        """
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(
                f"The shard {self.path} was there when the data were opened and is gone now "
                f"({error.strerror or error}). Put it back; a run that was saved goes on with resume=True."
            ) from error
        if size != self.size:
            raise DataError(
                f"The shard {self.path} had {self.size} bytes when the data were opened and has {size} now. Data must "
                "not change while they are read: put the old file back, or open the data anew and start another run."
            )


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which rows of which shard each block has, as int64 arrays ``(blocks,)``.

    Attributes
    ----------
    shard
        Number of the shard.
    group
        Number of the block within the shard.
    first
        Number of its first row within the shard.
    rows
        How many it has, 1 or more.
    """

    shard: np.ndarray
    group: np.ndarray
    first: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(sizes: Sequence[Sequence[int]]) -> Blocks:
        """Count from the rows of every group of every shard; groups without rows are left out."""
        table = [
            (shard, group, before, rows)
            for shard, groups in enumerate(sizes)
            for group, (before, rows) in enumerate(zip(np.cumsum([0, *groups[:-1]]), groups))
            if rows
        ]
        shard, group, first, rows = np.array(table, dtype=np.int64).reshape(-1, 4).T
        return Blocks(shard, group, first, rows)

    @staticmethod
    def cut(sizes: Sequence[int], per: int) -> Blocks:
        """Cut shards of so many rows into stretches of ``per`` rows."""
        numbers = [np.arange(-(-n // per), dtype=np.int64) for n in sizes]
        shard = np.concatenate([np.full(len(g), i, np.int64) for i, g in enumerate(numbers)])
        group = np.concatenate(numbers)
        first = group * per
        return Blocks(shard, group, first, np.minimum(per, np.asarray(sizes, np.int64)[shard] - first))


class Source(ABC):
    """Rows on the disk, in blocks.

    Attributes
    ----------
    name
        Of the data.
    place
        How messages name it.
    path
        Where it is.
    shards
        The files.
    blocks
        What is read at once.
    event_shape
        Of one row, as models see it.
    dtype
        Of the rows that `read` gives.
    columns
        Names of a table's columns, or empty.
    classes
        The classes' names where the source tells them, else ``None``.
    labelled
        Whether `read` gives labels.
    notes
        What was decided on opening, one sentence each.
    block_bytes
        Bytes of the largest block in memory.
    sampled_blocks
        How many blocks a small sample may come from; few where a block is read as a whole.
    readers
        Threads that read ahead.
    """

    name: str
    place: str
    path: Path
    shards: tuple[Shard, ...]
    blocks: Blocks
    event_shape: tuple[int, ...]
    dtype: np.dtype
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    labelled: bool = False
    notes: tuple[str, ...] = ()
    sampled_blocks: int = 32
    readers: int = 2
    block_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory."""
        return math.prod(self.event_shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, block: int, start: int, stop: int) -> Chunk:
        """Read rows ``start`` to ``stop`` of a block.

        Raises
        ------
        DataError
            If the shard is gone, was changed, or cannot be read; the message names it, and the row.
        """

    @abstractmethod
    def marks(self) -> dict[str, str]:
        """Describe the data, so that a resumed run can tell whether they are the same, without reading all of them."""

    @abstractmethod
    def labels(self, block: int) -> np.ndarray:
        """Read the labels of a block alone, as `read` does."""

    @abstractmethod
    def where(self, block: int, row: int = 0) -> tuple[str, int]:
        """Name the shard of a block, and the number in it, from 1, of a row of the block."""


def shard_row(source: Source, block: int, row: int) -> tuple[str, int]:
    """Find a row in its shard."""
    return source.shards[int(source.blocks.shard[block])].name, int(source.blocks.first[block]) + row + 1


def shards_of(path: Path, paths: Sequence[Path]) -> tuple[Shard, ...]:
    """Look at files; names count from the folder.

    Raises
    ------
    DataError
        If one cannot be opened or is empty.
    """
    found = []
    for each in paths:
        name = str(each.relative_to(path)) if path.is_dir() else each.name
        try:
            size = each.stat().st_size
            with each.open("rb"):
                pass
        except OSError as error:
            raise DataError(f"{each} cannot be opened: {error.strerror or error}. Check its permissions.") from error
        if size == 0:
            raise DataError(f"{each} is empty (0 bytes). Was it saved or copied to the end?")
        found.append(Shard(each, name, size))
    return tuple(found)


def all_at_once(work: Callable[[Shard], T], shards: Sequence[Shard]) -> list[T]:
    """Look into many files at once; what is wrong with the first of them is raised."""
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        return list(pool.map(work, shards))


def without_empty(sizes: Sequence[Sequence[int]], shards: Sequence[Shard], place: str) -> tuple[str, ...]:
    """Remark on shards without rows, which are passed over.

    Raises
    ------
    DataError
        If none has any.
    """
    empty = [shard.name for shard, groups in zip(shards, sizes) if sum(groups) == 0]
    if len(empty) == len(shards):
        raise DataError(f"{place} has no rows: {count(len(shards), 'file')}, all empty. Was it written to the end?")
    if not empty:
        return ()
    return (f"{count(len(empty), 'shard')} without rows passed over: {listed(empty)}.",)


def held_type(dtype: np.dtype) -> np.dtype:
    """Choose the type that rows wait in: small ones as they are, what is wider than single precision as float32."""
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    return dtype if dtype.itemsize <= 2 or dtype == np.float32 else np.dtype(np.float32)
