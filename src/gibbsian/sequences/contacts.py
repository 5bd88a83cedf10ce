"""Contacts: pairs of columns that a model couples, beside the distances in a known structure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gibbsian.errors import DataError, OptionError, ShapeError

SEPARATION = 5
"""Columns that a pair of interest lies apart, at least: nearer ones touch in any chain."""

CUTOFF = 8.0
"""Angstroms below which two residues touch."""


@dataclass(frozen=True)
class Structure:
    """Distances between the columns of a family in a structure.

    Attributes
    ----------
    distances
        ``(L, L)`` in angstroms, symmetric; NaN where they are not known, and on the diagonal.
    """

    distances: Tensor

    def __post_init__(self) -> None:
        d = self.distances
        if d.ndim != 2 or d.shape[0] != d.shape[1]:
            raise ShapeError(f"Distances are (L, L); got {tuple(d.shape)}.")


def read_structure(path: str | Path, columns: int) -> Structure:
    """Read distances from a file of lines ``i j value distance``.

    Parameters
    ----------
    path
        Of a text file with numbers between spaces or commas: two columns of the alignment, counted from 1, something
        that is not read, and their distance in angstroms, last. Lines that begin with ``#`` are passed over.
    columns
        L.

    Raises
    ------
    DataError
        If the file cannot be read, a line holds something else, a column does not exist, a distance is not positive,
        or a pair has two.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The structure {path} cannot be read: {error}.") from error
    found = torch.full((columns, columns), math.nan)
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        i, j, distance = _numbers(path, number, words)
        if not (1 <= i <= columns and 1 <= j <= columns):
            raise DataError(
                f"{path}, line {number}: columns {i} and {j} of an alignment of {columns}, counted from 1. The file "
                "is of another alignment, or of one with other columns (--focus)."
            )
        known = float(found[i - 1, j - 1])
        if i == j or (not math.isnan(known) and abs(known - distance) > 1e-3):
            why = "a column and itself" if i == j else f"a pair that was {known:g} angstroms apart before"
            raise DataError(f"{path}, line {number}: {i} and {j} are {why}.")
        found[i - 1, j - 1] = found[j - 1, i - 1] = distance
    if bool(found.isnan().all()):
        raise DataError(f"{path} holds no distance; its lines are 'i j value distance'.")
    return Structure(found)


def _numbers(path: str | Path, number: int, words: list[str]) -> tuple[int, int, float]:
    try:
        if len(words) < 3:
            raise ValueError
        i, j, distance = float(words[0]), float(words[1]), float(words[-1])
        if i != int(i) or j != int(j):
            raise ValueError
    except ValueError:
        raise DataError(
            f"{path}, line {number}: {' '.join(words)[:60]!r} is not 'i j value distance', two columns counted from 1 "
            "and angstroms."
        ) from None
    if not 0.0 < distance < math.inf:
        raise DataError(f"{path}, line {number}: a distance of {distance:g} angstroms; distances are above 0.")
    return int(i), int(j), distance


@dataclass(frozen=True)
class Precision:
    """How many of the pairs with the highest scores are contacts.

    Attributes
    ----------
    curve
        Of the first 1, 2, 3, ... pairs, ``(m,)``.
    contacts
        How many of all pairs are contacts.
    columns
        L.
    separation, cutoff
        Which pairs count, and what is a contact.
    """

    curve: Tensor
    contacts: int
    columns: int
    separation: int
    cutoff: float

    @property
    def base_rate(self) -> float:
        """The precision of pairs taken at random: the share of contacts among all."""
        return self.contacts / len(self.curve)

    def at(self, pairs: int) -> float:
        """Precision of the first so many pairs, or of all where there are fewer."""
        return float(self.curve[min(max(pairs, 1), len(self.curve)) - 1])

    def stderr(self, pairs: int) -> float:
        """Standard error of that, as if pairs were independent; not 0 where all are contacts.

        `Approximate is better than "exact" for interval estimation of binomial proportions (Agresti & Coull, 1998)
        <https://doi.org/10.1080/00031305.1998.10480550>`_: of two contacts and two others more.
        """
        n = min(max(pairs, 1), len(self.curve))
        p = (n * self.at(pairs) + 2.0) / (n + 4.0)
        return math.sqrt(p * (1.0 - p) / (n + 4.0))

    @property
    def marks(self) -> dict[str, int]:
        """The usual numbers of pairs."""
        return {"L/2": self.columns // 2, "L": self.columns, "2L": 2 * self.columns}


def precision(scores: Tensor, structure: Structure, separation: int = SEPARATION, cutoff: float = CUTOFF) -> Precision:
    """Compare scores of pairs with a structure.

    Parameters
    ----------
    scores
        ``(L, L)``, symmetric; the higher, the likelier a contact. See `contact_scores`.
    structure
        Pairs without a known distance are left out.
    separation
        Pairs count whose columns lie at least this far apart.
    cutoff
        Angstroms below which a pair is a contact.

    Raises
    ------
    ShapeError
        If scores and structure are of different columns.
    OptionError
        If no pair is left.
    """
    distances = structure.distances
    if scores.shape != distances.shape:
        raise ShapeError(f"Scores {tuple(scores.shape)} and distances {tuple(distances.shape)} are of other columns.")
    if separation < 1:
        raise OptionError(f"separation is 1 or more; got {separation}.")
    i, j = torch.triu_indices(len(scores), len(scores), separation)
    known = ~distances[i, j].isnan()
    if not bool(known.any()):
        raise OptionError(f"No pair {separation} or more columns apart has a known distance; lower the separation.")
    own, apart = scores[i, j][known], distances[i, j][known]
    hits = (apart[own.argsort(descending=True, stable=True)] < cutoff).double()
    curve = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return Precision(curve, int(hits.sum()), len(scores), separation, cutoff)
