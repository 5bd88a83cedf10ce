"""Batches of rows that stay on the disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gibbsian.data.rows import Rows
from gibbsian.data.rows.reading import Reading
from gibbsian.objectives.base import Batch
from gibbsian.training.feed import evenly

LOOKED_AT = 4096
"""Rows of the sample by which data are checked and their scale is measured."""

MIXED = 8
"""Blocks in a window, below which a remark is made."""


def sample_of(rows: Rows) -> Batch:
    """Read some rows from all over the data, with their classes as the context y."""
    x, labels = rows.sample(rows.affordable(LOOKED_AT, megabytes=64))
    return Batch(x, {} if labels is None else {"y": labels})


class StreamFeed:
    """Batches read from the disk in the order of `gibbsian.data.rows.order`, with the classes as the context y.

    Parameters
    ----------
    rows
        What is read, in the model's units.
    sample
        Some of them, on the device and in the precision that batches are to have; see `sample_of`.
    batch_size
        Rows per step; all of them when there are fewer.
    lanes
        Shares of a batch.

    Raises
    ------
    OptionError
        If the lanes do not divide a batch.
    DataError
        If a block does not fit into the memory that is allowed.
    """

    def __init__(self, rows: Rows, sample: Batch, batch_size: int, lanes: int = 1) -> None:
        self.rows, self.lanes, self._sample = rows, lanes, sample
        self.reading = Reading(rows, batch_size, lanes)
        if self.reading.windows_per_epoch > 1 and self.reading.blocks_per_window < MIXED:
            warnings.warn(
                f"A window of rows in memory has about {self.reading.blocks_per_window:.0f} blocks of "
                f"{rows.source.place}; if its rows are sorted, batches will be, too. Write smaller row groups "
                f"(row_group_size=...), or open the data with more than memory={rows.memory} (MiB).",
                stacklevel=3,
            )

    @property
    def n(self) -> int:
        """Rows of data."""
        return len(self.rows)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one row."""
        return torch.Size(self.rows.event_shape)

    @property
    def batch_size(self) -> int:
        """Rows of one step."""
        return self.reading.batch_size

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self._sample.x.device

    def batch(self, step: int, seed: int, lane: int) -> Batch:
        """Rows of one lane at one step.

        Raises
        ------
        DataError
            If rows cannot be read, or one of them cannot be learned from; the message names file and row.
        """
        x, labels = self.reading.batch(step, seed, lane)
        like = self._sample.x
        context = {} if labels is None else {"y": labels.to(like.device, non_blocking=True)}
        return Batch(x.to(like.device, like.dtype, non_blocking=True), context)

    def spread(self, most: int) -> Batch:
        """Rows of the sample."""
        return evenly(self._sample, most)

    def sample(self) -> Tensor:
        """The rows of the sample."""
        return self._sample.x

    def marks(self) -> dict[str, str]:
        """What the files tell of themselves, how they are split and read."""
        return self.rows.marks()

    def close(self) -> None:
        """Stop reading ahead."""
        self.reading.close()


@contextmanager
def closing_feed(feed: object) -> Iterator[None]:
    """Let a feed stop its reading at the end, where it reads."""
    try:
        yield
    finally:
        if isinstance(feed, StreamFeed):
            feed.close()
