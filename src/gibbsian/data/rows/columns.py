"""From Arrow's columns to rows of numbers.

A row is a column for each coordinate; or a value of one column: a list of numbers, a tensor of a fixed shape, as many
bytes as each row has pixels, or the file of a picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gibbsian.data.checks import as_rows
from gibbsian.data.raw import count, listed
from gibbsian.data.rows.pictures import Style, opened
from gibbsian.data.rows.source import held_type
from gibbsian.errors import DataError, OptionError, unknown_name

Form = Literal["columns", "lists", "pictures"]


@dataclass(frozen=True, eq=False)
class Layout:
    """How rows stand in a table.

    Attributes
    ----------
    form
        A column of numbers for each coordinate, or one column of lists of numbers, or of picture files.
    names
        The columns that make a row.
    labels
        The column of the classes, or ``None``.
    shape
        Of one row as it is stored.
    event_shape
        Of one row as it is handed on.
    dtype
        Of rows in memory.
    style
        Of pictures.
    notes
        What was decided.
    """

    form: Form
    names: tuple[str, ...]
    labels: str | None
    shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    dtype: np.dtype
    style: Style | None = None
    notes: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """The columns to be read."""
        return [*self.names, *([self.labels] if self.labels is not None else [])]


def layout_of(
    schema: Any,
    place: str,
    first: Callable[[str], Any],
    labels: str | None,
    array: str | None,
    shape: tuple[int, ...] | None,
) -> Layout:
    """Find out how rows stand in a table.

    Parameters
    ----------
    schema
        A `pyarrow.Schema`.
    place
        How messages name the table.
    first
        Gives the first rows of a column, a `pyarrow.Array`.
    labels
        The column of classes.
    array
        The column that holds whole rows, where others are to be passed over.
    shape
        Of one row, for columns of lists.

    Raises
    ------
    DataError
        If columns share a name, or hold other things than numbers.
    OptionError
        If there is no column of a name asked for, or lists do not have the shape asked for.
    """
    names = list(schema.names)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"{place} has more than one column named {listed([repr(n) for n in twice])}. Rename them.")
    for wanted in (labels, array):
        if wanted is not None and wanted not in names:
            raise unknown_name("column", wanted, names)
    notes = []
    if array is not None:
        kept = [array]
    else:
        kept = [n for n in names if n not in (labels, "__index_level_0__")]
        if "__index_level_0__" in names:
            notes.append(f"The nameless column of {place} that numbers the rows was left out.")
    forms = {n: _form(schema.field(n).type) for n in kept}
    wrong = [f"{n} ({schema.field(n).type})" for n, form in forms.items() if form is None]
    if wrong:
        raise DataError(
            f"{place} has {count(len(wrong), 'column')} of other things than numbers: {listed(wrong)}. If one of them "
            "names the class of each row, name it (labels='...', --labels on the command line); if one column holds "
            "the whole rows, name that (array='...', --array). Otherwise leave them out or turn them into numbers."
        )
    if not kept:
        raise DataError(f"{place} has no column of data.")
    whole = [n for n, form in forms.items() if form != "columns"]
    if whole and len(kept) > 1:
        raise DataError(
            f"{place} has {count(len(whole), 'column')} of whole rows, {listed(whole)}, among {len(kept)} columns "
            f"({listed(kept)}). Say which one holds the rows: array={whole[0]!r} (--array {whole[0]}), and labels=... "
            "for the classes."
        )
    if not whole:
        if shape not in (None, (len(kept),)):
            raise OptionError(f"{place} is a table of {len(kept)} columns; shape={shape} is for a column of lists.")
        dtype = np.result_type(*(schema.field(n).type.to_pandas_dtype() for n in kept))
        width = (len(kept),)
        return Layout("columns", tuple(kept), labels, width, width, held_type(np.dtype(dtype)), notes=tuple(notes))
    name = whole[0]
    if forms[name] == "pictures":
        return _pictures(name, labels, first(name), place, tuple(notes))
    return _lists(schema.field(name), labels, first(name), place, shape, tuple(notes))


def _form(kind: Any) -> Form | None:
    import pyarrow.types as t

    kind = _storage(kind)
    if _is_number(kind):
        return "columns"
    if t.is_fixed_size_list(kind) or t.is_list(kind) or t.is_large_list(kind):
        return "lists" if _is_number(_storage(kind.value_type)) else None
    if t.is_fixed_size_binary(kind):
        return "lists"
    if t.is_binary(kind) or t.is_large_binary(kind) or _bytes_field(kind):
        return "pictures"
    return None


def _is_number(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_integer(kind) or t.is_floating(kind) or t.is_boolean(kind)


def _bytes_field(kind: Any) -> bool:
    """Tell pictures as some data sets keep them: a struct of bytes and a path."""
    import pyarrow.types as t

    return t.is_struct(kind) and kind.get_field_index("bytes") >= 0 and t.is_binary(kind.field("bytes").type)


def _storage(kind: Any) -> Any:
    return getattr(kind, "storage_type", kind)


def _lists(
    field: Any, labels: str | None, first: Any, place: str, shape: tuple[int, ...] | None, notes: tuple[str, ...]
) -> Layout:
    import pyarrow.types as t

    kind = field.type
    stored = _storage(kind)
    told = tuple(kind.shape) if hasattr(kind, "shape") else None
    if getattr(kind, "permutation", None) not in (None, list(range(len(told or ())))):
        raise DataError(f"Column {field.name} of {place} keeps its axes in another order; write it in plain order.")
    if t.is_fixed_size_list(stored):
        length = stored.list_size
    elif t.is_fixed_size_binary(stored):
        length = stored.byte_width
    else:
        length = 0 if len(first) == 0 or not first[0].is_valid else len(first[0])
    if length == 0:
        raise DataError(f"The first row of column {field.name} of {place} is empty.")
    if shape is not None and int(np.prod(shape)) != length:
        raise OptionError(f"Rows of {place} have {length} numbers, which do not fill shape={shape}.")
    shape = shape or told or (length,)
    arranged, more = as_rows(np.zeros((2, *shape), np.uint8), place)
    of_bytes = t.is_fixed_size_binary(stored)
    dtype = np.dtype(np.uint8) if of_bytes else held_type(np.dtype(stored.value_type.to_pandas_dtype()))
    event_shape = arranged.shape[1:]
    return Layout("lists", (field.name,), labels, shape, event_shape, dtype, notes=(*notes, *more))


def _pictures(name: str, labels: str | None, first: Any, place: str, notes: tuple[str, ...]) -> Layout:
    pictures = [_picture(value, f"{i + 1}", place) for i, value in enumerate(first.slice(0, 32))]
    style = Style.of(pictures, place)
    return Layout("pictures", (name,), labels, style.shape, style.shape, style.dtype, style, notes)


def _picture(value: Any, called: str, place: str) -> np.ndarray:
    found = value.as_py()
    content = found.get("bytes") if isinstance(found, dict) else found
    if content is None:
        raise DataError(f"{place} has no picture in row {called}.")
    return opened(io.BytesIO(content), f"of row {called}", Path(place))


def rows_of(table: Any, layout: Layout, where: tuple[str, int]) -> np.ndarray:
    """Turn a table into rows ``(n, *event)``.

    Parameters
    ----------
    table
        A `pyarrow.Table` with the columns of the layout.
    layout
        Of the whole data set.
    where
        The name of the shard, and the number, from 1, of the table's first row in it.

    Raises
    ------
    DataError
        Naming the row that has a gap, or a list of another length.
    """
    if layout.form == "columns":
        # One column after the other, then turned as a whole: writing with a stride is several times slower.
        x = np.empty((len(layout.names), table.num_rows), layout.dtype)
        for i, name in enumerate(layout.names):
            _fill(x[i], table.column(name), name, where)
        return np.ascontiguousarray(x.T)
    name = layout.names[0]
    column = table.column(name)
    parts = [_storage_array(chunk) for chunk in column.chunks if len(chunk)]
    if layout.form == "pictures":
        assert layout.style is not None
        style, file, row = layout.style, *where
        values = [value for part in parts for value in part]
        return np.stack(
            [style.fit(_picture(v, str(row + i), file), f"of row {row + i}", file) for i, v in enumerate(values)]
        )
    _check_whole(column, name, where)
    x = np.empty((table.num_rows, *layout.shape), layout.dtype)
    at = 0
    for part in parts:
        numbers = _numbers(part, int(np.prod(layout.shape)), name, (where[0], where[1] + at))
        x[at : at + len(part)] = numbers.reshape(len(part), *layout.shape)
        at += len(part)
    return as_rows(x, where[0])[0]


def labels_of(table: Any, layout: Layout, where: tuple[str, int]) -> np.ndarray | None:
    """Take the labels out of a table."""
    if layout.labels is None:
        return None
    column = table.column(layout.labels)
    _check_whole(column, layout.labels, where)
    return np.asarray(column.to_numpy())


def _fill(x: np.ndarray, column: Any, name: str, where: tuple[str, int]) -> None:
    _check_whole(column, name, where)
    at = 0
    for chunk in column.chunks:
        x[at : at + len(chunk)] = chunk.to_numpy(zero_copy_only=False)
        at += len(chunk)


def _check_whole(column: Any, name: str, where: tuple[str, int]) -> None:
    if column.null_count:
        raise _gap(name, where, int(np.flatnonzero(np.asarray(column.is_null()))[0]))


def _numbers(part: Any, length: int, name: str, where: tuple[str, int]) -> np.ndarray:
    """Put the lists of an array, or its bytes, behind one another."""
    import pyarrow.types as t

    if t.is_fixed_size_binary(part.type):
        content = part.buffers()[1]
        return np.frombuffer(content, np.uint8, len(part) * length, part.offset * length)
    if not t.is_fixed_size_list(part.type):
        lengths = np.diff(part.offsets.to_numpy())
        other = np.flatnonzero(lengths != length)
        if len(other):
            raise DataError(
                f"{where[0]}: the list in column {name} of row {where[1] + int(other[0])} has {lengths[other[0]]} "
                f"numbers and those before it {length}. Rows need one length; cut or pad them."
            )
    numbers = part.flatten()
    if numbers.null_count:
        raise _gap(name, where, int(np.flatnonzero(np.asarray(numbers.is_null()))[0]) // length)
    return numbers.to_numpy(zero_copy_only=False)


def _gap(name: str, where: tuple[str, int], row: int) -> DataError:
    return DataError(
        f"{where[0]} has a missing value in row {where[1] + row}, column {name}. A density cannot be learned from it; "
        "drop or fill such rows and write the file again. Rows count from 1."
    )


def _storage_array(chunk: Any) -> Any:
    return getattr(chunk, "storage", chunk)
