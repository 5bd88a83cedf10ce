"""Letters and their codes: alphabets, and rows of letters as whole numbers and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gibbsian.errors import DataError, OptionError
from gibbsian.sequences.formats import Entries

PROTEIN = "-ACDEFGHIKLMNPQRSTVWY"
"""The gap, then the amino acids."""

ALPHABETS = {"protein": PROTEIN, "rna": "-ACGU", "dna": "-ACGT"}


def encode(rows: Sequence[str], alphabet: str = PROTEIN) -> Tensor:
    """Turn rows of letters into codes ``(N, L)``.

    Raises
    ------
    DataError
        If rows differ in length, or a letter is unknown.
    """
    check_lengths([(f"row {i}", row) for i, row in enumerate(rows, 1)], "The sequences")
    return codes_of_rows([(f"row {i}", row) for i, row in enumerate(rows, 1)], alphabet, "The sequences")


def decode(codes: Tensor, alphabet: str = PROTEIN) -> list[str]:
    """Turn codes ``(N, L)`` into rows of letters."""
    table = np.frombuffer(alphabet.encode("ascii"), dtype=np.uint8)
    return [bytes(row).decode("ascii") for row in table[codes.numpy()]]


def fasta(names: Sequence[str], codes: Tensor, alphabet: str = PROTEIN) -> str:
    """Write sequences as FASTA, a line each."""
    return "".join(f">{name}\n{row}\n" for name, row in zip(names, decode(codes, alphabet)))


def alphabet_of(name: str) -> str:
    """The letters of an alphabet by its name, or as spelled out, the gap first.

    Raises
    ------
    OptionError
        If they are not two or more different letters.
    """
    found = ALPHABETS.get(name.lower(), name if "-" in name else f"-{name}")
    if not found.startswith("-") or len(set(found)) != len(found) or len(found) < 3 or not found.isascii():
        raise OptionError(
            f"alphabet is {', '.join(ALPHABETS)}, or its letters, two or more and all different, the gap '-' left out "
            f"or first; got {name!r}."
        )
    return found


def check_lengths(entries: Entries, source: str) -> None:
    """Refuse rows that differ in length, or none at all; ``source`` names them in the message.

    Raises
    ------
    DataError
        With the usual length and the first row of another.
    """
    if not entries:
        raise DataError(f"{source}: there is no sequence.")
    counts = Counter(len(row) for _, row in entries)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        name, row = next((name, row) for name, row in entries if len(row) != usual)
        raise DataError(
            f"{source}: rows of an alignment have one length, and {len(entries) - counts[usual]} of {len(entries)} do "
            f"not have {usual} columns as most do; {name} has {len(row)}. Align the sequences first (Clustal Omega, "
            "MAFFT, hmmalign); if lower-case inserts make the difference, read the file as A2M (--format a2m)."
        )


def codes_of_rows(entries: Entries, alphabet: str, source: str, as_gap: bool = False) -> Tensor:
    """Turn rows of one length into codes ``(N, L)``, unknown letters into gaps if asked.

    Raises
    ------
    DataError
        With the letters that are unknown.
    """
    table = np.full(256, 255, dtype=np.uint8)
    for code, letter in enumerate(alphabet):
        table[ord(letter)] = code
    text = "".join(row for _, row in entries).encode("latin-1", errors="replace")
    found = table[np.frombuffer(text, dtype=np.uint8)].reshape(len(entries), -1)
    unknown = found == 255
    if unknown.any() and not as_gap:
        rows, places = np.nonzero(unknown)
        name = entries[rows[0]][0]
        letters = Counter(entries[r][1][p] for r, p in zip(rows, places))
        told = ", ".join(f"{letter!r} {count} times" for letter, count in letters.most_common(6))
        raise DataError(
            f"{source}: letters that are not among {alphabet}: {told}; the first at place {places[0] + 1} of {name}. "
            "Write them as gaps (--unknown gap), leave out their sequences (--unknown drop), or name another alphabet "
            "(--alphabet rna)."
        )
    return torch.from_numpy(np.where(unknown, 0, found).astype(np.int64))
