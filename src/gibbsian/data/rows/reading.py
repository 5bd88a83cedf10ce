"""Reading rows in their shuffled order: a window of each lane in memory, and the next one on its way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from gibbsian.data.rows.order import BlockOrder, LanePlan
from gibbsian.data.rows.rows import Rows
from gibbsian.errors import DataError, OptionError

MIB = 2**20

Key = tuple[int, int, int]
"""Seed, epoch and number of a window."""


class Reading:
    """Batches of rows, each a pure function of step, seed and lane.

    Nothing has to be kept of a position but the step: the plan of an epoch is computed, and a lane that is asked for
    another place reads the window around it. Threads read ahead; Arrow, NumPy and Pillow let go of Python's lock while
    they work, so that processes, with memory of their own, would gain nothing.

    Parameters
    ----------
    rows
        What is read.
    batch_size
        Rows of a step, of all lanes together; all of them when there are fewer.
    lanes
        Among how many these are shared.

    Raises
    ------
    OptionError
        If the lanes do not divide a batch.
    DataError
        If a block does not fit into the memory that is allowed.
    """

    def __init__(self, rows: Rows, batch_size: int, lanes: int = 1) -> None:
        n = len(rows)
        self.rows, self.lanes = rows, lanes
        self.batch_size = min(batch_size, n)
        if self.batch_size % lanes:
            whole = max(1, self.batch_size // lanes) * lanes
            raise OptionError(
                f"A batch of {self.batch_size} rows cannot be divided equally among {lanes} lanes; take "
                f"batch_size={whole}, or lanes that divide it."
            )
        self.share = self.batch_size // lanes
        # The window that is used and the one that is read, of every lane: one process may have them all.
        window_bytes = rows.memory * MIB // (2 * lanes)
        least = 2 * lanes * min(rows.source.block_bytes, -(-n // lanes) * rows.source.row_bytes)
        if max(least, rows.source.block_bytes) > rows.memory * MIB:
            raise DataError(
                f"The largest block of {rows.source.place} takes {rows.source.block_bytes / MIB:.0f} MiB in memory, "
                f"and windows of rows may take {rows.memory} in all, two for each of {lanes} lane{'s' * (lanes != 1)}. "
                "Write smaller row groups, which also mix better "
                "(pyarrow.parquet.write_table(table, path, row_group_size=...)), or allow more when opening: "
                f"memory={-(-max(least, rows.source.block_bytes) // MIB)} for one block in a window, and a multiple "
                "of that for several."
            )
        self.order = BlockOrder(rows.block_rows, lanes, window_bytes // rows.source.row_bytes)
        self.steps_per_epoch = self.order.share // self.share
        self._lanes = [_Lane(self, lane) for lane in range(lanes)]
        self._pool: ThreadPoolExecutor | None = None

    @property
    def windows_per_epoch(self) -> int:
        """Windows of a lane in an epoch, about."""
        return -(-self.order.share // self.order.window_rows)

    @property
    def blocks_per_window(self) -> float:
        """Blocks in a window, about: rows of one batch come from so many places in each lane."""
        return max(1.0, len(self.order.rows) / (self.windows_per_epoch * self.lanes))

    def batch(self, step: int, seed: int, lane: int) -> tuple[Tensor, Tensor | None]:
        """Give the rows of a lane at a step, float32 ``(batch_size / lanes, *event)``, and their classes.

        Raises
        ------
        DataError
            If rows cannot be read, or cannot be learned from.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._lanes[lane].rows(seed, epoch, place * self.share)

    def pool(self) -> ThreadPoolExecutor:
        """Threads that read."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.rows.source.readers, thread_name_prefix="gibbsian-rows")
        return self._pool

    def close(self) -> None:
        """Stop reading ahead, and let go of what was read."""
        for lane in self._lanes:
            while lane.windows:
                lane.windows.popitem()[1].drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def stream(rows: Rows, batch_size: int = 128, seed: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Go through rows once, in a shuffled order, batch by batch; `gibbsian.training.fit` reads its epochs likewise.

    Parameters
    ----------
    rows
        What is read.
    batch_size
        Rows per batch; rows left over at the end are left out.
    seed
        Of the order.

    Raises
    ------
    DataError
        If rows cannot be read, or cannot be learned from.
    """
    with Reading(rows, batch_size) as reading:
        for step in range(reading.steps_per_epoch):
            yield reading.batch(step, seed, 0)


class _Lane:
    """Where one lane stands."""

    def __init__(self, reading: Reading, number: int) -> None:
        self.reading, self.number = reading, number
        self.plans: dict[tuple[int, int], LanePlan] = {}
        self.windows: dict[Key, _Window] = {}

    def plan(self, seed: int, epoch: int) -> LanePlan:
        if (seed, epoch) not in self.plans:
            # This epoch's and the next one's.
            self.plans = dict(list(self.plans.items())[-1:])
            self.plans[seed, epoch] = self.reading.order.plan(seed, epoch, self.number)
        return self.plans[seed, epoch]

    def rows(self, seed: int, epoch: int, first: int) -> tuple[Tensor, Tensor | None]:
        plan, last = self.plan(seed, epoch), first + self.reading.share
        parts, labels = [], []
        number = plan.window_at(first)
        while first < last:
            low, high = plan.ends[number], plan.ends[number + 1]
            x, y = self.window(seed, epoch, number).rows(first - low, min(last, high) - low)
            parts.append(x)
            labels.append(y)
            first, number = min(last, high), number + 1
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        y = None if labels[0] is None else torch.from_numpy(np.concatenate(labels))
        return self.reading.rows.rows_in_units(x), y

    def window(self, seed: int, epoch: int, number: int) -> _Window:
        """Give a window, and have the one after it read meanwhile."""
        key = (seed, epoch, number)
        after = self.after(seed, epoch, number)
        if key in self.windows and after in self.windows:
            return self.windows[key]
        # What is neither needed now nor next is let go before the next is read.
        for each in [k for k in self.windows if k not in (key, after)]:
            self.windows.pop(each).drop()
        for each in (key, after):
            if each not in self.windows:
                self.windows[each] = _Window(self, *each)
        return self.windows[key]

    def after(self, seed: int, epoch: int, number: int) -> Key:
        last = number + 2 == len(self.plan(seed, epoch).ends)
        return (seed, epoch + 1, 0) if last else (seed, epoch, number + 1)


class _Window:
    """Some blocks' rows, being read by threads from the moment it is made."""

    def __init__(self, lane: _Lane, seed: int, epoch: int, number: int) -> None:
        reading, plan = lane.reading, lane.plan(seed, epoch)
        n = int(plan.ends[number + 1] - plan.ends[number])
        source = reading.rows.source
        self.x = np.empty((n, *source.event_shape), source.dtype)
        self.y = np.zeros(n, np.int64) if reading.rows.classes else None
        self.order = reading.order.within(n, seed, epoch, lane.number, number)
        self.parts: list[Future[None]] = []
        at = 0
        for i in range(int(plan.pieces[number]), int(plan.pieces[number + 1])):
            start, stop = int(plan.start[i]), int(plan.stop[i])
            self.parts.append(reading.pool().submit(self.fill, reading.rows, int(plan.block[i]), start, stop, at))
            at += stop - start

    def fill(self, rows: Rows, block: int, start: int, stop: int, at: int) -> None:
        part = slice(at, at + stop - start)
        codes = rows.read(block, rows.places(block)[start:stop], self.x[part])
        if self.y is not None and codes is not None:
            self.y[part] = codes

    def drop(self) -> None:
        for part in self.parts:
            part.cancel()

    def wait(self) -> None:
        for part in self.parts:
            part.result()
        self.parts.clear()

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        self.wait()
        chosen = self.order[start:stop]
        return self.x[chosen], None if self.y is None else self.y[chosen]
