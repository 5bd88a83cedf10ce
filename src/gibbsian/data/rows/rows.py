"""Rows on the disk, in the place of a tensor: which of them are held out, in which units, with which classes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gibbsian.data.checks import check_spread
from gibbsian.data.dataset import Dataset, Kind
from gibbsian.data.raw import count, listed
from gibbsian.data.rows.order import shuffled
from gibbsian.data.rows.source import Source
from gibbsian.data.scaling import Scaling, identity_scaling, range_scaling, standard_scaling
from gibbsian.errors import DataError, OptionError

SAMPLE = 10_000
"""Rows that a sample has where nothing else is said."""

MANY = 200
"""Files from which on marks are one checksum: every checkpoint holds them."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that stay on the disk; `open_rows` makes them, and `gibbsian.training.fit` takes them for data.

    A row is known by its block and its place in it. Of every block the same share is held out, chosen by the seed and
    the block's number, so that both parts are spread over all of the data and nothing has to be read to know them.

    Attributes
    ----------
    source
        Where they are read from.
    kind
        Of the rows, as in `Dataset`.
    share
        The share of rows that is held out.
    seed
        Of the choice of held-out rows.
    part
        Whether these are the rows to train on or those held out.
    classes
        The classes' names where rows have labels, counted from 0; or empty.
    units
        From the data's units to those that rows are given in; ``None`` for the data's own.
    threshold
        The value above which values are read as ones, or ``None``.
    memory
        MiB that windows of rows take in a process, at most, while they are read in a shuffled order.
    value_range
        Lowest and highest value of a pixel.
    notes
        What was decided on opening.
    """

    source: Source
    kind: Kind
    share: float = 0.0
    seed: int = 0
    part: Literal["train", "held_out"] = "train"
    classes: tuple[str, ...] = ()
    units: Scaling | None = None
    threshold: float | None = None
    memory: int = 256
    value_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.block_rows.sum())

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.source.event_shape

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of a table's columns."""
        return self.source.columns

    @property
    def split(self) -> str:
        """How rows were held out, in words."""
        if self.share == 0.0:
            return "no rows held out"
        return f"{self.share:g} of the rows of every block held out at random, seed {self.seed}"

    @cached_property
    def block_rows(self) -> np.ndarray:
        """Rows of this part in every block, int64 ``(blocks,)``."""
        rows = self.source.blocks.rows
        ends = np.floor(np.cumsum(rows) * self.share).astype(np.int64)
        held = np.diff(ends, prepend=0)
        return rows - held if self.part == "train" else held

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.block_rows)

    def places(self, block: int) -> np.ndarray:
        """Which rows of a block belong to this part, in order."""
        n, own = int(self.source.blocks.rows[block]), int(self.block_rows[block])
        if own == n:
            return np.arange(n)
        order = shuffled(n, self.seed, block)
        held = n - own if self.part == "train" else own
        return np.sort(order[held:] if self.part == "train" else order[:held])

    def read(self, block: int, places: np.ndarray, into: np.ndarray) -> np.ndarray | None:
        """Read some rows of a block, as they are kept in memory.

        Parameters
        ----------
        block
            Its number.
        places
            Which rows of it, in rising order.
        into
            ``(len(places), *event)``, of the source's type.

        Returns
        -------
        Their classes, counted from 0, or ``None``.

        Raises
        ------
        DataError
            If they cannot be read, or one of them is not finite or of an unknown class; the message names it.
        """
        low, high = int(places[0]), int(places[-1]) + 1
        with np.errstate(over="ignore"):
            x, labels = self.source.read(block, low, high)
            if high - low == len(places):
                into[:] = x
            else:
                np.take(x.astype(into.dtype, copy=False), places - low, axis=0, out=into, mode="clip")
        if into.dtype.kind == "f":
            self._check_finite(into, block, places)
        if labels is None or not self.classes:
            return None
        return self._codes(labels[places - low], block, places)

    def rows_in_units(self, x: np.ndarray) -> Tensor:
        """Turn rows as they are kept in memory into float32, in the units that are asked for."""
        rows = torch.from_numpy(x).float()
        if self.threshold is not None:
            rows = (rows > self.threshold).float()
        return rows if self.units is None else self.units.forward(rows)

    def take(self, indices: np.ndarray | Tensor) -> tuple[Tensor, Tensor | None]:
        """Read some rows by their number; a block is read for each that one of them lies in.

        Parameters
        ----------
        indices
            Numbers of rows of this part, from 0.

        Returns
        -------
        The rows, float32 ``(n, *event)``, and their classes, int64 ``(n,)``, or ``None``.

        Raises
        ------
        DataError
            If they cannot be read.
        """
        index = np.asarray(indices, dtype=np.int64)
        x = np.empty((len(index), *self.event_shape), self.source.dtype)
        y = np.zeros(len(index), np.int64) if self.classes else None
        blocks = np.searchsorted(self._ends, index, side="right")
        for block in np.unique(blocks):
            at = np.flatnonzero(blocks == block)
            inside = index[at] - (self._ends[block] - self.block_rows[block])
            asked, back = np.unique(inside, return_inverse=True)
            part = np.empty((len(asked), *self.event_shape), self.source.dtype)
            codes = self.read(int(block), self.places(int(block))[asked], part)
            x[at] = part[back]
            if y is not None and codes is not None:
                y[at] = codes[back]
        return self.rows_in_units(x), None if y is None else torch.from_numpy(y)

    def sample(self, most: int = SAMPLE) -> tuple[Tensor, Tensor | None]:
        """Read some rows from all over the data, the same ones at every call: from a few blocks spread evenly."""
        return self.take(self.spread(most))

    def spread(self, most: int) -> np.ndarray:
        """Choose numbers of rows for a sample."""
        n = len(self)
        if n <= most:
            return np.arange(n)
        own = self.block_rows
        wanted = max(self.source.sampled_blocks, int(np.ceil(2 * most * len(own) / n)))
        if wanted >= len(own) or wanted >= most:
            blocks = np.flatnonzero(own) if wanted >= len(own) else None
        else:
            blocks = np.unique(np.searchsorted(self._ends, (np.arange(wanted) + 0.5) * n / wanted, side="right"))
        if blocks is None:
            return np.unique(np.linspace(0, n - 1, most).astype(np.int64))
        # Of the rows of these blocks, put behind each other, evenly many.
        before = np.concatenate(([0], np.cumsum(own[blocks])))
        chosen = np.unique(np.linspace(0, before[-1] - 1, min(most, before[-1])).astype(np.int64))
        block = np.searchsorted(before, chosen, side="right") - 1
        return self._ends[blocks[block]] - own[blocks[block]] + chosen - before[block]

    def held_out(self) -> Rows:
        """The rows that are kept apart."""
        return dataclasses.replace(self, part="held_out")

    def affordable(self, most: int, megabytes: int = 256) -> int:
        """Say how many rows a sample may have: as many as asked for, or as take so much memory, 256 at least."""
        return min(most, max(256, megabytes * 2**20 // (4 * math.prod(self.event_shape))))

    def unlabelled(self) -> Rows:
        """Give rows without their classes."""
        return dataclasses.replace(self, classes=())

    def scaled(self, units: Scaling) -> Rows:
        """Give rows in a model's units.

        Raises
        ------
        OptionError
            If the scaling is for rows of another shape.
        """
        if units.event_shape != self.event_shape:
            raise OptionError(f"The scaling is for rows of shape {units.event_shape}; these have {self.event_shape}.")
        return dataclasses.replace(self, units=units)

    def scaling(self) -> Scaling:
        """Build the way to model units that suits the kind; of a table from a sample of its rows, see `sample`.

        Raises
        ------
        DataError
            If a table's column is constant in the sample.
        """
        if self.kind == "table":
            plain = dataclasses.replace(self, units=None)
            return standard_scaling(plain.sample(self.affordable(SAMPLE))[0], self.columns)
        if self.kind == "image" and self.value_range is not None:
            return range_scaling(*self.value_range, self.event_shape)
        return identity_scaling(self.event_shape)

    def dataset(self, most: int = SAMPLE) -> Dataset:
        """Read a sample of both parts, for what needs rows in memory: first weights, figures, an evaluation.

        Parameters
        ----------
        most
            Rows of each part; fewer of large ones, see `affordable`.

        Raises
        ------
        DataError
            If rows cannot be read, or a column of a table has no spread in the sample.
        """
        plain, most = dataclasses.replace(self, units=None), self.affordable(most)
        train, labels = plain.sample(most)
        held_out, own = train[:0], None if labels is None else labels[:0]
        if self.share > 0.0:
            held_out, own = plain.held_out().sample(most)
        place = f"a sample of {count(len(train), 'row')} from {self.source.place}"
        steps = check_spread(train.numpy(), place, self.kind, self.columns)
        told = (
            f"The data stay on the disk: {len(self)} rows to train on, read in a shuffled order. Scales, figures and "
            f"the evaluation are from samples of {len(train)} of them and of {len(held_out)} held-out rows."
        )
        return Dataset(
            name=self.source.name,
            kind=self.kind,
            train=train,
            held_out=held_out,
            source=str(self.source.path),
            split=self.split,
            labels=labels,
            held_out_labels=own,
            label_names=self.classes,
            columns=self.columns if train.ndim == 2 else (),
            value_range=self.value_range,
            threshold=self.threshold,
            notes=(*self.notes, told, *steps),
        )

    def marks(self) -> dict[str, str]:
        """Describe the rows, for the comparison of runs, without reading all of them."""
        told = {"data.split": self.split if self.part == "train" else f"held out: {self.split}"}
        told |= {"data.units": repr(self.units), "data.threshold": repr(self.threshold)}
        # Windows make the order.
        told |= {"data.classes": listed(list(self.classes), 1000), "data.memory": repr(self.memory)}
        files = self.source.marks()
        if len(self.source.shards) > MANY:
            content = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
            files = {"data": f"{len(self.source.shards)} files, {int(self.source.blocks.rows.sum())} rows #{content}"}
        return files | told

    def __repr__(self) -> str:
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return (
            f"Rows({self.source.name}: {self.kind}, {len(self)} {self.part.replace('_', '-')} rows of "
            f"{self.event_shape}{classes}, in {count(len(self.source.blocks), 'block')} of {self.source.path})"
        )

    def _check_finite(self, x: np.ndarray, block: int, places: np.ndarray) -> None:
        flat = x.reshape(len(x), -1)
        # A sum is finite if all its terms are, except where it runs over; then each is looked at.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(flat.sum(dtype=np.float32)) or np.isfinite(flat).all():
                return
        row, column = (int(i) for i in np.argwhere(~np.isfinite(flat))[0])
        shard, number = self.source.where(block, int(places[row]))
        value = flat[row, column]
        what = "a missing value (NaN)" if np.isnan(value) else "an infinite value, or one beyond single precision,"
        where = f"column {self.columns[column]}" if len(self.columns) == flat.shape[1] else f"place {column + 1}"
        raise DataError(
            f"{shard} has {what} in row {number}, {where}. A density cannot be learned from it; drop or fill such rows "
            "in all shards, as rows were read up to here only. Rows count from 1."
        )

    def _codes(self, labels: np.ndarray, block: int, places: np.ndarray) -> np.ndarray:
        if self.source.classes is not None:
            return labels.astype(np.int64)
        found, back = np.unique(labels, return_inverse=True)
        # The same names as `encode_labels` gives: whole numbers may come as floating-point ones.
        names = np.asarray([str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in found.tolist()])
        order = np.argsort(self.classes)
        known = np.asarray(self.classes)[order]
        at = np.minimum(np.searchsorted(known, names), len(known) - 1)
        other = np.flatnonzero(known[at] != names)
        if len(other):
            shard, number = self.source.where(block, int(places[np.flatnonzero(back == other[0])[0]]))
            raise DataError(
                f"{shard} has the class {str(names[other[0]])!r} in row {number}, which is not among those known "
                f"({listed(list(self.classes), 10)}): they were given, or met in a sample. Name all: classes=[...]."
            )
        return order[at][back]
