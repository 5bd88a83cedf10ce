"""The order in which rows on the disk are read: shuffled, and known beforehand.

Each epoch puts all blocks into a new order and cuts this sequence of rows into equal shares, one per lane. A lane takes
its share in windows of some whole blocks, and the rows of a window in a random order. So the disk is read a block at a
time and memory holds a window, while rows that lay together come apart. All of it is a function of seed, epoch and
lane: a run that goes on finds its place by arithmetic, and who else reads does not matter.

How well rows are mixed depends on the blocks in a window: the share of a batch's rows that are of one class, in a file
sorted by class, varies as if drawn from so many blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gibbsian.processes.lanes import lane_seed


@dataclass(frozen=True, eq=False)
class LanePlan:
    """What a lane reads in one epoch: pieces of blocks, in windows.

    Attributes
    ----------
    block, start, stop
        int64 ``(pieces,)``: the block of each piece, and which of its rows.
    pieces
        int64 ``(windows + 1,)``: window w has the pieces from ``pieces[w]`` to ``pieces[w + 1]``.
    ends
        int64 ``(windows + 1,)``: rows before each window, and in all.
    """

    block: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pieces: np.ndarray
    ends: np.ndarray

    def window_at(self, row: int) -> int:
        """Say which window has a row of the lane."""
        return int(np.searchsorted(self.ends, row, side="right")) - 1


class BlockOrder:
    """The order of the rows of an epoch.

    Parameters
    ----------
    rows
        Rows of every block, ``(blocks,)``.
    lanes
        Among how many they are shared.
    window_rows
        Rows that a window is to have, about; it is made of whole blocks, one at least.
    """

    def __init__(self, rows: np.ndarray, lanes: int, window_rows: int) -> None:
        self.rows, self.lanes, self.window_rows = rows, lanes, max(window_rows, 1)
        self.share = int(rows.sum()) // lanes
        """Rows of a lane in an epoch; what is left over waits for another epoch."""

    def plan(self, seed: int, epoch: int, lane: int) -> LanePlan:
        """Lay out an epoch of a lane."""
        order = shuffled(len(self.rows), seed, epoch)
        ends = np.cumsum(self.rows[order])
        low, high = lane * self.share, (lane + 1) * self.share
        first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left")
        block = order[first : last + 1]
        before = ends[first : last + 1] - self.rows[block]
        start, stop = np.maximum(low - before, 0), np.minimum(high - before, self.rows[block])
        # Blocks may have no row of this part of the data.
        some = stop > start
        block, start, stop = block[some], start[some], stop[some]
        windows = -(-self.share // self.window_rows)
        # A piece belongs to the window that its middle falls into: whole pieces, and windows of about one size.
        middles = np.cumsum(stop - start) - (stop - start) / 2
        window = np.minimum((middles * windows / self.share).astype(np.int64), windows - 1)
        pieces = np.flatnonzero(np.diff(window, prepend=-1))
        pieces = np.append(pieces, len(block))
        rows = np.concatenate(([0], np.cumsum(stop - start)))
        return LanePlan(block, start, stop, pieces, rows[pieces])

    def within(self, rows: int, seed: int, epoch: int, lane: int, window: int) -> np.ndarray:
        """Order of the rows of a window."""
        return shuffled(rows, seed, epoch, lane + 1, window + 1)


def shuffled(n: int, *seeds: int) -> np.ndarray:
    """Permute ``n`` numbers; another permutation for every sequence of seeds."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed(*seeds))).numpy()


def mixed(first: int, *others: int) -> int:
    """Mix numbers into one seed of 32 bits, which is what the CPU's generator uses."""
    seed = first
    for number in others:
        seed = lane_seed(seed, number)
    return seed % 2**32
