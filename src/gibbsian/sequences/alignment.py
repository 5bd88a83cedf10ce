"""Alignments: sequences of one length over one alphabet, as codes, with a weight for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.sequences.formats import Entries, read_entries
from gibbsian.sequences.letters import alphabet_of, check_lengths, codes_of_rows, decode, encode
from gibbsian.sequences.weights import identity_weights

LEAST = 10.0
"""Effective sequences below which nothing can be fitted."""


@dataclass(frozen=True)
class Alignment:
    """A family of aligned sequences.

    Parameters
    ----------
    alphabet
        The letters in the order of their codes, the gap ``-`` first.
    names
        Of the sequences.
    codes
        ``(N, L)``, int64.
    weights
        ``(N,)``, above 0 and up to 1; see `identity_weights`.
    focus
        The name of the sequence whose columns were kept, if any.

    Raises
    ------
    ShapeError
        If names, codes and weights do not fit each other.
    """

    alphabet: str
    names: tuple[str, ...]
    codes: Tensor
    weights: Tensor
    focus: str | None = None

    def __post_init__(self) -> None:
        n = len(self.codes)
        if self.codes.ndim != 2 or len(self.names) != n or self.weights.shape != (n,):
            raise ShapeError(
                f"An alignment of N sequences has codes (N, L), N names and N weights; got {tuple(self.codes.shape)}, "
                f"{len(self.names)} and {tuple(self.weights.shape)}."
            )

    @property
    def length(self) -> int:
        """Columns, L."""
        return self.codes.shape[1]

    @property
    def letters(self) -> int:
        """How many letters there are, K, the gap included."""
        return len(self.alphabet)

    @property
    def effective(self) -> float:
        """The effective number of sequences: the sum of the weights."""
        return float(self.weights.sum())

    @property
    def distinct(self) -> int:
        """How many sequences differ from all others."""
        return len(torch.unique(self.codes, dim=0))

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        focus = "" if self.focus is None else f", columns of {self.focus}"
        return (
            f"Alignment({len(self)} sequences of {self.length} columns, {self.letters} letters, "
            f"{self.effective:.1f} effective{focus})"
        )

    def one_hot(self) -> Tensor:
        """Sequences as states of a Potts model, ``(N, L, K)``, float32."""
        return torch.nn.functional.one_hot(self.codes, self.letters).float()

    def text(self, index: int) -> str:
        """A sequence as letters."""
        return decode(self.codes[index : index + 1], self.alphabet)[0]

    def row_of(self, name: str) -> int:
        """The number of the sequence of a name.

        Raises
        ------
        OptionError
            If there is none, or several; a name may be given without what follows a slash.
        """
        return _row_of(self.names, name)

    def check_enough(self, least: float = LEAST) -> None:
        """Refuse to learn from too few sequences.

        Raises
        ------
        DataError
            If the effective number is below ``least``.
        """
        if self.effective < least:
            raise DataError(
                f"Too few sequences: {len(self)}, of which {self.distinct} differ, count as {self.effective:.1f} "
                f"effective ones, and {least:g} are the least that a model is fitted to. Search a larger data base, or "
                "weigh close relatives less strictly (--identity, identity=1.0 weighs only copies)."
            )


def read_alignment(
    path: str | Path,
    *,
    format: str | None = None,
    alphabet: str = "protein",
    focus: str | None = None,
    unknown: str = "refuse",
    identity: float = 0.8,
    max_gaps: float = 1.0,
) -> Alignment:
    """Read an alignment: FASTA, A2M or Stockholm, also packed by gzip.

    Parameters
    ----------
    path
        Of the file.
    format
        ``"fasta"``, ``"a2m"`` or ``"stockholm"``; told by the file itself when ``None``.
    alphabet
        ``"protein"``, ``"rna"``, ``"dna"``, or the letters themselves; the gap ``-`` has the first code.
    focus
        A sequence whose columns alone are kept, those in which it has a letter.
    unknown
        What becomes of letters that are not in the alphabet (X, B, Z, ...): ``"refuse"``, ``"gap"`` to write gaps, or
        ``"drop"`` to leave out their sequences.
    identity
        See `identity_weights`.
    max_gaps
        Sequences with more than this share of gaps are left out.

    Raises
    ------
    DataError
        If the file cannot be read, lengths differ, a letter is unknown, or a column has nothing but gaps.
    OptionError
        If an option is out of its range, or there is no focus of this name.
    """
    path = Path(path)
    letters = alphabet_of(alphabet)
    if not 0.0 < max_gaps <= 1.0:
        raise OptionError(f"max_gaps is a share of the columns, above 0, up to 1; got {max_gaps}.")
    entries = _known_entries(path, format, letters, unknown)
    codes = codes_of_rows(entries, letters, str(path), as_gap=unknown == "gap")
    names = tuple(name for name, _ in entries)
    if focus is not None:
        own = codes[_row_of(names, focus)]
        codes = codes[:, own != 0]
        if not codes.shape[1]:
            raise DataError(f"{path}: {focus} has nothing but gaps, so that no column is left.")
    kept = (codes == 0).float().mean(1) <= max_gaps
    if not bool(kept.any()):
        raise DataError(f"{path}: every sequence has more than {max_gaps:.0%} gaps; raise max_gaps.")
    codes, names = codes[kept], tuple(name for name, k in zip(names, kept.tolist()) if k)
    _check_columns(codes, str(path))
    return Alignment(letters, names, codes, identity_weights(codes, identity), focus)


def read_sequences(
    path: str | Path, *, format: str | None = None, alphabet: str = "protein", unknown: str = "refuse"
) -> tuple[list[str], Tensor]:
    """Read sequences that are aligned to a family, one or more: names and codes; arguments as of `read_alignment`."""
    found = _known_entries(Path(path), format, alphabet_of(alphabet), unknown)
    return [name for name, _ in found], codes_of_rows(found, alphabet_of(alphabet), str(path), as_gap=unknown == "gap")


def alignment_of(rows: Sequence[str], alphabet: str = "protein", identity: float = 0.8) -> Alignment:
    """Make an alignment of rows of letters; the errors are those of `read_alignment`."""
    letters = alphabet_of(alphabet)
    codes = encode(rows, letters)
    _check_columns(codes, "The sequences")
    names = tuple(f"sequence-{i}" for i in range(1, len(rows) + 1))
    return Alignment(letters, names, codes, identity_weights(codes, identity))


def _known_entries(path: Path, format: str | None, letters: str, unknown: str) -> Entries:
    if unknown not in ("refuse", "gap", "drop"):
        raise OptionError(f"unknown is 'refuse', 'gap' or 'drop'; got {unknown!r}.")
    entries = read_entries(path, format)
    check_lengths(entries, str(path))
    if unknown == "drop":
        entries = [(name, row) for name, row in entries if not set(row) - set(letters)]
        if not entries:
            raise DataError(f"{path}: every sequence has a letter that is not among {letters}.")
    return entries


def _check_columns(codes: Tensor, source: str) -> None:
    empty = (codes == 0).all(0).nonzero().flatten() + 1
    if len(empty):
        told = ", ".join(map(str, empty[:8].tolist())) + (", ..." if len(empty) > 8 else "")
        raise DataError(
            f"{source}: {len(empty)} of {codes.shape[1]} columns have nothing but gaps ({told}), of which nothing can "
            "be learned. Remove them, or keep the columns of one sequence (--focus NAME)."
        )


def _row_of(names: Sequence[str], name: str) -> int:
    found = [i for i, n in enumerate(names) if n == name] or [i for i, n in enumerate(names) if n.split("/")[0] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise OptionError(
            f"{len(found)} sequences are named {name}; the focus is one: {', '.join(names[i] for i in found[:4])}."
        )
    import difflib

    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"The first is {names[0]}."
    raise OptionError(f"No sequence is named {name}. {hint}")
