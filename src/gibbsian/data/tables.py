"""Tables: text files with or without a header, Parquet files, and data frames."""

from __future__ import annotations

import csv
import itertools
import re
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.data.raw import Raw, count, listed, opening
from gibbsian.errors import DataError, unknown_name

SEPARATORS = ("\t", ";", "|", ",", None)
"""Tried in this order; ``None`` is white space. The comma comes late because it may be a decimal mark."""

MISSING = {"", "na", "n/a", "#n/a", "nan", "-nan", "null", "none", "<na>"}


def read_table(path: Path) -> tuple[Any, list[str]]:
    """Read a text file of rows into a data frame, and notes on how.

    Parameters
    ----------
    path
        UTF-8 text, separated by tabs, semicolons, bars, commas or white space. The first row is taken for a header when
        it holds text where the second holds numbers, or text throughout.

    Raises
    ------
    DataError
        If it is not text, has no rows, or rows of different lengths.
    """
    import pandas as pd

    skipped, lines = _head(path)
    separator = _separator(lines)
    rows = [_cells(line, separator) for line in lines]
    names, note = _header(rows)
    notes = [note] if note else []
    if names and len(rows) < 2:
        raise DataError(f"{path.name} has a header ({listed(names)}) but no rows below it.")
    try:
        frame = pd.read_csv(
            path,
            sep=r"\s+" if separator is None else separator,
            header=None,
            skiprows=skipped + bool(names),
            skipinitialspace=True,
            low_memory=False,
            encoding="utf-8-sig",
        )
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except (ValueError, OSError) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise DataError(
            f"{path.name} does not read as a table: {reason}. Every line needs as many values as the first, parted by "
            f"{_called(separator)}; text that contains the separator belongs in double quotes."
        ) from error
    if not names:
        frame.columns = [f"x{i}" for i in range(frame.shape[1])]
        return frame, [*notes, f"{path.name} has no header; its columns are called x0, x1, ..."]
    if len(names) != frame.shape[1]:
        raise DataError(
            f"The header of {path.name} names {count(len(names), 'column')} ({listed(names)}) and the rows have "
            f"{count(frame.shape[1], 'value')}. Give every column a name."
        )
    frame.columns = names
    return _without_row_numbers(frame, path.name, notes)


def read_parquet(path: Path) -> tuple[Any, list[str]]:
    """Read a Parquet file into a data frame.

    Raises
    ------
    DataError
        If it is broken or of another format.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (ValueError, OSError, KeyError) as error:
        raise DataError(
            f"{path.name} cannot be read as Parquet ({_brief(error)}). It may be truncated or of another format; copy "
            "or export it again."
        ) from error
    return _without_row_numbers(frame, path.name, [])


def from_frame(frame: Any, name: str, place: str, source: str, labels: Any, notes: list[str]) -> Raw:
    """Turn a data frame into an array of numbers, one column apart as labels when its name is given.

    Parameters
    ----------
    frame
        A `pandas.DataFrame`.
    labels
        The name of a column, labels as such, or ``None``.

    Raises
    ------
    DataError
        If two columns share a name, or one holds text, dates or lists.
    OptionError
        If there is no column of the labels' name.
    """
    names = [str(c) for c in frame.columns]
    twice = sorted({c for c in names if names.count(c) > 1})
    if twice:
        raise DataError(
            f"{opening(place)} has more than one column named {listed([repr(c) for c in twice])}. Rename or "
            "remove the copies."
        )
    frame = frame.set_axis(names, axis=1)
    if isinstance(labels, str):
        if labels not in names:
            raise unknown_name("column", labels, names)
        labels, frame = frame[labels].to_numpy(), frame.drop(columns=labels)
    if frame.shape[0] == 0 or frame.shape[1] == 0:
        raise DataError(
            f"{opening(place)} has {count(frame.shape[0], 'row')} and {count(frame.shape[1], 'column')} of data."
        )
    _check_numeric(frame, place)
    kinds = {getattr(dtype, "kind", "O") for dtype in frame.dtypes}
    x = frame.to_numpy(dtype=np.complex128 if "c" in kinds else np.float64, na_value=np.nan)
    return Raw(name, place, source, x, labels=labels, columns=tuple(frame.columns), notes=tuple(notes))


def _check_numeric(frame: Any, place: str) -> None:
    """Refuse text and dates, naming the columns and the first value of each."""
    found, examples = [], []
    for name, column in frame.items():
        if getattr(column.dtype, "kind", "O") in "biufc":
            continue
        if getattr(column.dtype, "kind", "O") in "Mm":
            found.append(f"{name} (dates or times, the first is {column.iloc[0]})")
            continue
        values = column.astype(object).tolist()
        bad = [i for i, value in enumerate(values) if not _reads_as_number(value)]
        if bad:
            examples.append(str(values[bad[0]]))
            many = "all" if len(bad) == len(values) else f"{len(bad)} of {len(values)} values"
            found.append(f"{name} ({many}; the first is {examples[-1][:40]!r} in row {bad[0] + 1})")
    if not found:
        return
    comma = any(re.fullmatch(r"\s*-?\d+,\d+\s*", e) for e in examples)
    remedy = (
        "If the comma is the decimal mark, write it as a point."
        if comma
        else "If one of them names the class of each row, name it (labels='...', --labels on the command line). "
        "Otherwise remove them, or turn them into numbers: pandas.get_dummies makes a 0/1 column of each category, and "
        "a date becomes a number of seconds. If the text stands for a missing value, decide what to do with those rows."
    )
    raise DataError(
        f"{opening(place)} has {count(len(found), 'column')} of other things than numbers: {listed(found)}. {remedy}"
    )


def _reads_as_number(value: Any) -> bool:
    import pandas as pd

    if isinstance(value, Number) or value is None or value is pd.NA or value is pd.NaT:
        return True
    return isinstance(value, str) and _is_number(value) and value.lower() not in ("true", "false")


def _head(path: Path, most: int = 50) -> tuple[int, list[str]]:
    """Read the first lines with content, and how many lines (blank, or comments behind #) stand before them."""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            lines = [line.rstrip("\n") for line in itertools.islice(file, 10 * most)]
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    skipped = 0
    while skipped < len(lines) and (not lines[skipped].strip() or lines[skipped].startswith("#")):
        skipped += 1
    content = [line for line in lines[skipped:] if line.strip()][:most]
    if not content:
        raise DataError(f"{path.name} has no rows: it holds only blank lines and comments.")
    return skipped, content


def _not_text(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path.name} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}). "
        "Save it again as CSV in UTF-8."
    )


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]


def _separator(lines: list[str]) -> str | None:
    """Find the separator that parts every line into equally many cells, more than one."""
    widths = {s: [len(_cells(line, s)) for line in lines] for s in SEPARATORS}
    for separator, width in widths.items():
        if width[0] > 1 and len(set(width)) == 1:
            return separator
    # None parts all lines alike: take the likeliest, and let the reader say which line is wrong.
    return next((s for s in SEPARATORS if s is not None and max(widths[s]) > 1), ",")


def _called(separator: str | None) -> str:
    return {"\t": "tabs", None: "white space"}.get(separator, f"{separator!r}")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.lower() in ("true", "false")
    return True


def _is_text(cell: str) -> bool:
    return not _is_number(cell) and cell.lower() not in MISSING


def _header(rows: list[list[str]]) -> tuple[list[str], str]:
    """Return the first row if it is a header, else nothing; and a note where that was a guess."""
    first = rows[0]
    second = rows[1] if len(rows) > 1 else []
    if not any(map(_is_text, first)):
        counted = first == [str(i) for i in range(len(first))] or first[1:] == [str(i) for i in range(len(first) - 1)]
        fractions = any(_is_number(c) and not re.fullmatch(r"-?\d+", c) for c in second)
        if counted and (len(first) >= 3 or fractions):
            return first, "Its first line counts the columns and was taken for a header."
        return [], ""
    if not any(map(_is_number, first)):
        return first, ""
    # Names mixed with numbers, such as years: names have letters and stand over numbers; a lone "?" is a value.
    if any(re.search(r"[^\W\d_]", a) and _is_text(a) and _is_number(b) for a, b in zip(first, second)):
        return first, f"Its first line ({listed(first)}) was taken for a header."
    return [], ""


def _without_row_numbers(frame: Any, place: str, notes: list[str]) -> tuple[Any, list[str]]:
    """Leave out what programs write besides the data: a nameless column of row numbers, or one that is empty."""
    if frame.shape[1] < 2:
        return frame, notes
    first, last = frame.iloc[:, 0], frame.iloc[:, -1]
    if str(frame.columns[0]).strip() in ("", "Unnamed: 0", "__index_level_0__") and first.dtype.kind in "iu":
        counted = np.arange(len(first)) + first.iloc[0] if len(first) else np.arange(0)
        if np.array_equal(first.to_numpy(), counted):
            return frame.iloc[:, 1:], [
                *notes,
                f"The nameless first column of {place} counts the rows; it was left out.",
            ]
    if str(frame.columns[-1]).strip() == "" and last.isna().all():
        return frame.iloc[:, :-1], [*notes, f"The last column of {place} is empty and nameless; it was left out."]
    return frame, notes


def _brief(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Arrow's messages open with the whole path, which the reader of ours has just seen.
    return first.split("': ")[-1].split(". ")[0][:120].rstrip(".")
