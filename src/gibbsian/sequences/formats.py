"""Alignment files as text: FASTA, A2M (and A3M) and Stockholm, packed by gzip or not, to names and rows of letters.

A2M tells columns of the family from inserts by case: upper-case letters and ``-`` are columns, lower-case letters and
``.`` are inserts, which are taken out. Stockholm files say the same by a line ``#=GC RF``, or by case as A2M does, or
not at all; then every column counts and ``.`` is a gap. In FASTA lower case means nothing, and is refused.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal, TypeAlias

from gibbsian.errors import DataError, OptionError

Format: TypeAlias = Literal["fasta", "a2m", "stockholm"]
"""How an alignment is written."""

FORMATS = ("fasta", "a2m", "stockholm")
GAPS = "-.~_"
GZIP = b"\x1f\x8b"

Entries: TypeAlias = list[tuple[str, str]]
"""Names and rows."""


def read_entries(path: Path, format: str | None = None) -> Entries:
    """Read the rows of an alignment, inserts taken out and gaps written ``-``.

    Parameters
    ----------
    path
        Of the file.
    format
        ``"fasta"``, ``"a2m"`` or ``"stockholm"``; told by the first line and the ending when ``None``.

    Raises
    ------
    DataError
        If the file is not there, cannot be unpacked or is no alignment of this format.
    OptionError
        If there is no such format.
    """
    if format is not None and format not in FORMATS:
        raise OptionError(f"format is one of {', '.join(FORMATS)}; got {format!r}.")
    text = _text(path)
    found = format or _format_of(path, text)
    entries = _stockholm(path, text) if found == "stockholm" else _fasta(path, text)
    if not entries:
        raise DataError(f"{path} holds no sequence.")
    if found == "a2m":
        return [(name, without_inserts(row)) for name, row in entries]
    if found == "fasta":
        _refuse_lower_case(path, entries)
    return [(name, as_gaps(row)) for name, row in entries]


def without_inserts(row: str) -> str:
    """Take lower-case letters and dots out of a row of A2M."""
    return "".join(c for c in row if not c.islower() and c != ".")


def as_gaps(row: str) -> str:
    """Write every sign of a gap as ``-``."""
    for sign in GAPS[1:]:
        row = row.replace(sign, "-")
    return row


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"The alignment {path} {why}.") from error
    try:
        content = gzip.decompress(content) if content.startswith(GZIP) else content
        return content.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}. It may be cut short; copy it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text; an alignment is a FASTA, A2M or Stockholm file, or one of .gz.") from error


def _format_of(path: Path, text: str) -> Format:
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.startswith("# STOCKHOLM"):
        return "stockholm"
    if not first.startswith((">", ";")):
        raise DataError(
            f"{path} begins with {first[:40]!r}: neither '>' as FASTA and A2M do, nor '# STOCKHOLM 1.0'. Convert it to "
            "one of these."
        )
    endings = {ending.lower() for ending in path.suffixes}
    return "a2m" if endings & {".a2m", ".a3m"} else "fasta"


def _fasta(path: Path, text: str) -> Entries:
    entries: Entries = []
    rows: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith(">"):
            _close(entries, rows)
            words = line[1:].split()
            entries.append((words[0] if words else f"sequence-{len(entries) + 1}", ""))
        elif line and not line.startswith(";"):
            if not entries:
                raise DataError(f"{path}, line {number}: letters before the first name, a line that begins with '>'.")
            rows.append("".join(line.split()))
    _close(entries, rows)
    empty = [name for name, row in entries if not row]
    if empty:
        raise DataError(f"{path}: {len(empty)} sequences have no letters, {empty[0]} first. Remove their names.")
    return entries


def _close(entries: Entries, rows: list[str]) -> None:
    if entries:
        entries[-1] = (entries[-1][0], "".join(rows))
    rows.clear()


def _stockholm(path: Path, text: str) -> Entries:
    parts: dict[str, list[str]] = {}
    reference: list[str] = []
    ended = False
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if ended:
            raise DataError(f"{path} holds several alignments; the second begins in line {number}. Split the file.")
        if words[0] == "//":
            ended = True
        elif words[:2] == ["#=GC", "RF"] and len(words) == 3:
            reference.append(words[2])
        elif not line.startswith("#"):
            if len(words) != 2:
                raise DataError(f"{path}, line {number}: a line of Stockholm is a name and a row; got {line[:60]!r}.")
            parts.setdefault(words[0], []).append(words[1])
    entries = [(name, "".join(rows)) for name, rows in parts.items()]
    if reference:
        return _by_reference(path, entries, "".join(reference))
    if any(c.islower() for _, row in entries for c in row):
        return [(name, without_inserts(row)) for name, row in entries]
    return entries


def _by_reference(path: Path, entries: Entries, reference: str) -> Entries:
    """Keep the columns that the line ``#=GC RF`` marks."""
    for name, row in entries:
        if len(row) != len(reference):
            raise DataError(
                f"{path}: {name} has {len(row)} columns and the line #=GC RF {len(reference)}; all rows of an "
                "alignment have the same."
            )
    kept = [i for i, c in enumerate(reference) if c not in GAPS]
    return [(name, "".join(row[i] for i in kept).upper()) for name, row in entries]


def _refuse_lower_case(path: Path, entries: Entries) -> None:
    found = [(name, row) for name, row in entries if any(c.islower() for c in row)]
    if found:
        name, row = found[0]
        place = next(i for i, c in enumerate(row, 1) if c.islower())
        raise DataError(
            f"{path}: {len(found)} of {len(entries)} rows have lower-case letters, which FASTA gives no meaning; the "
            f"first is {row[place - 1]!r} at place {place} of {name}. If they are inserts, read the file as A2M "
            "(--format a2m, format='a2m'), which takes them out; if not, write them in upper case."
        )
