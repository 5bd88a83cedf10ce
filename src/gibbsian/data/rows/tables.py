"""Parquet files and Arrow files, one or many, read one row group or record batch at a time."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.data.raw import listed
from gibbsian.data.rows.columns import Layout, labels_of, layout_of, rows_of
from gibbsian.data.rows.source import Blocks, Chunk, Shard, Source, all_at_once, shard_row, shards_of, without_empty
from gibbsian.errors import DataError, MissingPackageError

KEPT_OPEN = 8
"""Files that a thread keeps open: the footer of one with many groups is not read anew for each."""

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")


class TableSource(Source):
    """Tables that agree in their columns.

    Parameters
    ----------
    path
        The file, or the folder.
    paths
        The files.
    labels, array, shape
        As in `gibbsian.data.rows.open_rows`.

    Raises
    ------
    DataError, OptionError
        If one cannot be read or has other columns than the first, or what is asked for is not there.
    MissingPackageError
        If pyarrow is not installed.
    """

    def __init__(
        self,
        path: Path,
        paths: Sequence[Path],
        labels: str | None = None,
        array: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(
                "Parquet and Arrow files are read by pyarrow, which is not installed: pip install pyarrow."
            ) from error
        self.name, self.place, self.path = path.stem, path.name, path
        self.shards = shards_of(path, paths)
        heads = all_at_once(_head, self.shards)
        first = next((i for i, head in enumerate(heads) if sum(head.rows)), 0)
        for shard, head in zip(self.shards, heads):
            _same_columns(self.shards[first], heads[first].schema, shard, head.schema)
        sizes = [head.rows for head in heads]
        self.notes = without_empty(sizes, self.shards, self.place)
        self.blocks = Blocks.of(sizes)
        self._open = threading.local()
        self._checksums = [head.checksum for head in heads]

        def begin(name: str) -> Any:
            # Only the first rows of the block, though it is read as a whole from an Arrow file.
            return self._table(0, [name], most=32).column(name).combine_chunks()

        self.layout: Layout = layout_of(heads[first].schema, self.place, begin, labels, array, shape)
        self.notes += self.layout.notes
        self.labelled = labels is not None
        self.event_shape, self.dtype = self.layout.event_shape, self.layout.dtype
        if len(self.event_shape) == 1:
            plain = self.layout.form == "columns"
            self.columns = self.layout.names if plain else tuple(f"x{i}" for i in range(self.event_shape[0]))
        if self.layout.form == "pictures":
            self.readers = 4
        # Decoded as its file says or as rows, whichever is more.
        widest = max(head.bytes for head in heads)
        self.block_bytes = max(widest, int(self.blocks.rows.max()) * self.row_bytes)

    def read(self, block: int, start: int, stop: int) -> Chunk:
        """Read a block, and keep some of its rows."""
        table = self._table(block, self.layout.read).slice(start, stop - start)
        where = self.where(block, start)
        return rows_of(table, self.layout, where), labels_of(table, self.layout, where)

    def labels(self, block: int) -> np.ndarray:
        """Labels of a block; no other column is read."""
        assert self.layout.labels is not None
        found = labels_of(self._table(block, [self.layout.labels]), self.layout, self.where(block))
        assert found is not None
        return found

    def where(self, block: int, row: int = 0) -> tuple[str, int]:
        """Name the file of a row, and its number there."""
        return shard_row(self, block, row)

    def marks(self) -> dict[str, str]:
        """Names, sizes and rows of the files, checksums of their footers, and the columns that are read."""
        rows = np.bincount(self.blocks.shard, self.blocks.rows, len(self.shards)).astype(int)
        told = {
            f"data[{shard.name!r}]": f"{n} rows, {shard.size} bytes #{checksum}"
            for shard, n, checksum in zip(self.shards, rows, self._checksums)
        }
        return told | {"data.columns": listed(self.layout.read, 1000)}

    def _table(self, block: int, columns: list[str], most: int | None = None) -> Any:
        import pyarrow as pa

        shard = self.shards[int(self.blocks.shard[block])]
        group, expected = int(self.blocks.group[block]), int(self.blocks.rows[block])
        shard.check()
        try:
            file = self._file(shard)
            if most is not None and is_parquet(shard.path):
                batch = next(iter(file.iter_batches(most, row_groups=[group], columns=columns)))
                return pa.table(batch)
            if is_parquet(shard.path):
                table = file.read_row_group(group, columns=columns, use_threads=False)
            else:
                table = pa.table(file.get_batch(group).select(columns))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"Block {group + 1} of {shard.path} cannot be read ({_brief(error)}). It may be truncated or damaged; "
                "copy or write it again."
            ) from error
        if table.num_rows != expected:
            raise DataError(
                f"Block {group + 1} of {shard.path} has {table.num_rows} rows, where {expected} were expected: its "
                "blocks are of uneven sizes. Write it again, or as Parquet."
            )
        return table if most is None else table.slice(0, most)

    def _file(self, shard: Shard) -> Any:
        """Give the thread's own reader of a file."""
        kept: OrderedDict[Path, Any] = self._open.__dict__.setdefault("kept", OrderedDict())
        if shard.path in kept:
            kept.move_to_end(shard.path)
            return kept[shard.path]
        kept[shard.path] = _reader(shard.path)
        if len(kept) > KEPT_OPEN:
            kept.popitem(last=False)
        return kept[shard.path]


class _Head:
    """What a file tells of itself."""

    def __init__(self, schema: Any, rows: list[int], checksum: str, widest: int) -> None:
        self.schema, self.rows, self.checksum, self.bytes = schema, rows, checksum, widest


def is_parquet(path: Path) -> bool:
    """Whether a file's name says that it is Parquet."""
    return path.suffix.lower() in PARQUET


def _reader(path: Path) -> Any:
    import pyarrow as pa

    if is_parquet(path):
        import pyarrow.parquet as pq

        return pq.ParquetFile(path, pre_buffer=False)
    # Read, not mapped: pages of a mapped file count as resident memory.
    return pa.ipc.open_file(pa.OSFile(str(path)))


def _head(shard: Shard) -> _Head:
    import pyarrow as pa

    path = shard.path
    try:
        return _parquet_head(path) if is_parquet(path) else _arrow_head(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        kind = "Parquet" if is_parquet(path) else "an Arrow file"
        hint = ""
        if not is_parquet(path):
            hint = " (Arrow streams, which have no table of contents, cannot be read in another order: write Parquet)"
        raise DataError(
            f"The shard {path} cannot be read as {kind} ({_brief(error)}). It may be truncated or of another "
            f"format{hint}; copy or export it again."
        ) from error


def _parquet_head(path: Path) -> _Head:
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        file.seek(-min(8, path.stat().st_size), 2)
        tail = file.read(8)
        if tail[4:] != b"PAR1":
            raise ValueError("it does not end as Parquet files do")
        file.seek(-min(8 + int.from_bytes(tail[:4], "little"), path.stat().st_size), 2)
        checksum = hashlib.sha256(file.read()).hexdigest()[:16]
    with pq.ParquetFile(path) as opened:
        told, schema = opened.metadata, opened.schema_arrow
        groups = [told.row_group(i) for i in range(told.num_row_groups)]
        widest = max((group.total_byte_size for group in groups), default=0)
        return _Head(schema, [group.num_rows for group in groups], checksum, widest)


def _arrow_head(path: Path) -> _Head:
    """Count the rows of the batches; where they are compressed, most writers make them equal, and reading checks."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = reader.num_record_batches
        if batches == 0:
            return _Head(reader.schema, [], "", 0)
        first, last = reader.get_batch(0), reader.get_batch(batches - 1)
        rows, widest = [first.num_rows] * (batches - 1) + [last.num_rows], first.nbytes
        # Newer releases of pyarrow count all rows without reading them.
        if hasattr(reader, "count_rows") and reader.count_rows() != sum(rows):
            rows = [reader.get_batch(i).num_rows for i in range(batches)]
        schema = reader.schema
    content = schema.serialize().to_pybytes() + repr(rows).encode()
    return _Head(schema, rows, hashlib.sha256(content).hexdigest()[:16], widest)


def _same_columns(first: Shard, expected: Any, shard: Shard, found: Any) -> None:
    """Refuse a shard with other columns; the order of columns does not matter, as they are read by name."""
    if found.equals(expected, check_metadata=False):
        return
    missing = [n for n in expected.names if n not in found.names]
    new = [n for n in found.names if n not in expected.names]
    both = [n for n in expected.names if n in found.names and expected.names.count(n) == found.names.count(n) == 1]
    changed = [
        f"{n} ({expected.field(n).type} there, {found.field(n).type} here)"
        for n in both
        if expected.field(n).type != found.field(n).type
    ]
    told = [
        f"{what} {listed(names)}"
        for what, names in (("it lacks", missing), ("it has in addition", new), ("it has with another type", changed))
        if names
    ]
    if told:
        raise DataError(
            f"The columns of {shard.path} are not those of {first.name}: {'; '.join(told)}. All shards need the same; "
            "write the odd ones again, or move them out of the folder."
        )


def _brief(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.split("': ")[-1].split(". ")[0][:160].rstrip(".")
