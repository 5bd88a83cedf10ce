"""The order of rows that stay on the disk: each once, well mixed, found again by arithmetic, in little memory."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gibbsian.data.rows import open_rows, stream
from gibbsian.data.rows.order import BlockOrder
from gibbsian.data.rows.reading import Reading
from gibbsian.errors import DataError, OptionError
from gibbsian.processes import Lanes
from spawned import run_in

SIZES = np.array([7, 30, 1, 12, 25, 25, 3, 40, 17, 9, 0, 31])


def rows_of(plan):
    """The rows of a lane, as pairs of block and place, one window after the other."""
    return [(int(b), i) for b, start, stop in zip(plan.block, plan.start, plan.stop) for i in range(start, stop)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 20, 60, 1000])
def test_an_epoch_has_every_row_once(lanes, window):
    order = BlockOrder(SIZES, lanes, window)
    for epoch in range(3):
        plans = [order.plan(5, epoch, lane) for lane in range(lanes)]
        found = [row for plan in plans for row in rows_of(plan)]
        assert len(found) == len(set(found)) == lanes * (200 // lanes)
        assert all(0 <= place < SIZES[block] for block, place in found)
        for plan in plans:
            assert plan.ends[0] == 0
            assert plan.ends[-1] == 200 // lanes
            sizes = np.diff(plan.ends)
            assert (sizes > 0).all()
            assert sizes.max() <= window + 40  # whole blocks, and the largest has 40 rows
            pieces = plan.stop - plan.start
            assert [pieces[a:b].sum() for a, b in zip(plan.pieces, plan.pieces[1:])] == sizes.tolist()
            assert [plan.window_at(row) for row in plan.ends[:-1]] == list(range(len(sizes)))


def test_another_epoch_seed_or_lane_has_another_order():
    order = BlockOrder(SIZES, 2, 60)
    plans = [rows_of(order.plan(*key)) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len({tuple(plan) for plan in plans}) == 4
    assert not np.array_equal(order.within(50, 0, 0, 0, 0), order.within(50, 0, 0, 0, 1))
    assert np.array_equal(order.within(50, 0, 0, 0, 0), order.within(50, 0, 0, 0, 0))


def write_sorted(path, n=20_000, per_group=100, classes=10, width=1):
    """Rows that count up, sorted by class, with ``width`` columns of noise beside."""
    number = np.arange(n, dtype=np.float32)
    noise = np.random.default_rng(0).normal(size=(width, n)).astype(np.float32)
    table = {"n": number} | {f"c{i}": column for i, column in enumerate(noise)}
    pq.write_table(pa.table(table | {"y": number.astype(int) * classes // n}), path, row_group_size=per_group)
    return path


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    return write_sorted(tmp_path_factory.mktemp("rows") / "x.parquet")


@pytest.fixture
def small_windows(monkeypatch):
    """Count 4 KiB for each MiB of memory, so that small files have many windows."""
    monkeypatch.setattr("gibbsian.data.rows.reading.MIB", 2**12)


def numbers(batch):
    return batch[0][:, 0].numpy().astype(int)


def test_batches_are_the_epochs_rows_whatever_the_windows(long_file, small_windows):
    rows = open_rows(long_file, labels="y", held_out=0.1, memory=8)
    with Reading(rows, 125) as reading:
        assert reading.windows_per_epoch > 3
        found = [reading.batch(step, 0, 0) for step in range(2 * reading.steps_per_epoch)]
    first, second = (np.concatenate([numbers(b) for b in found[i * 144 :][:144]]) for i in range(2))
    assert np.array_equal(np.sort(first), np.sort(second))
    assert len(np.unique(first)) == 18_000
    assert not np.array_equal(first, second)
    for batch in found[::20]:
        assert batch[1] is not None
        assert np.array_equal(numbers(batch) * 10 // 20_000, batch[1].numpy())


def test_a_place_is_found_without_what_came_before(long_file, small_windows):
    rows = open_rows(long_file, memory=8)
    with Reading(rows, 130, 2) as reading:
        found = {(step, lane): numbers(reading.batch(step, 7, lane)) for step in range(200) for lane in (0, 1)}
        # Back again, as after a rollback.
        assert np.array_equal(numbers(reading.batch(3, 7, 1)), found[3, 1])
    for step, lane in ((150, 0), (151, 0), (199, 1), (0, 0)):
        with Reading(rows, 130, 2) as reading:
            assert np.array_equal(numbers(reading.batch(step, 7, lane)), found[step, lane])
            assert not np.array_equal(numbers(reading.batch(step, 8, lane)), found[step, lane])


def own_lanes(path):
    rows = open_rows(path, memory=8)
    with Reading(rows, 120, 4) as reading:
        return {(step, lane): numbers(reading.batch(step, 1, lane)) for step in range(160) for lane in Lanes(4).own}


def test_lanes_see_the_same_rows_on_one_and_two_processes(long_file, small_windows):
    alone = own_lanes(long_file)
    both = run_in(2, own_lanes, long_file)
    assert both[0].keys().isdisjoint(both[1])
    together = both[0] | both[1]
    assert together.keys() == alone.keys()
    assert all(np.array_equal(together[key], alone[key]) for key in alone)
    epoch = np.concatenate([alone[step, lane] for step in range(150) for lane in range(4)])
    assert len(np.unique(epoch)) == len(epoch) == 18_000


def class_spread(reading):
    """How much the share of the first class varies from batch to batch, over what it would in random batches."""
    shares = [float((reading.batch(step, 0, 0)[1] == 0).float().mean()) for step in range(reading.steps_per_epoch)]
    return np.std(shares) / np.sqrt(0.09 / reading.share)


def neighbours(reading):
    """How often the row after a row in a batch is the one after it in the file."""
    found = np.concatenate([numbers(reading.batch(step, 0, 0)) for step in range(reading.steps_per_epoch)])
    return float((np.diff(found) == 1).mean())


def test_rows_of_a_sorted_file_are_mixed(long_file, small_windows, monkeypatch):
    rows = open_rows(long_file, labels="y", held_out=0, memory=20)
    with Reading(rows, 100) as reading:
        assert 30 < reading.blocks_per_window < 80
        # Windows of K blocks add a variance of 1 / K to that of the batch, 1 / 100.
        expected = np.sqrt(1 + 100 / reading.blocks_per_window)
        assert class_spread(reading) < 1.3 * expected
        assert neighbours(reading) < 0.01

    # Twins that must fail: one block to a window; and windows whose rows stay in order.
    with Reading(open_rows(long_file, labels="y", held_out=0, memory=1), 100) as reading:
        reading.order.window_rows = 1
        assert class_spread(reading) > 2.5 * expected
    monkeypatch.setattr(BlockOrder, "within", lambda self, rows, *where: np.arange(rows))
    with Reading(rows, 100) as reading:
        assert neighbours(reading) > 0.9


def test_the_disk_is_read_block_by_block_and_once(long_file, small_windows, monkeypatch):
    rows = open_rows(long_file, held_out=0.1, memory=8)
    read, real = [], type(rows.source).read
    monkeypatch.setattr(type(rows.source), "read", lambda *a: read.append(a[1]) or real(*a))
    with Reading(rows, 150, 3) as reading:
        reading.batch(0, 0, 0)
        # The first batch waits for one window of one lane; the next one is on its way.
        assert len(set(read)) <= 2 * (reading.blocks_per_window + 2)
        for step in range(reading.steps_per_epoch):
            for lane in range(3):
                reading.batch(step, 0, lane)
        for lane in reading._lanes:
            for window in lane.windows.values():
                window.wait()
        # Every block once, those at the ends of lanes twice; and the first window of the next epoch.
        assert len(read) <= 200 + 2 * 3 + 3 * (reading.blocks_per_window + 2)


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(make, steps):
    """How far memory rises above its level at the start, and what the loop keeps."""
    before, most, kept = resident(), 0, []
    for step in range(steps):
        kept.append(make(step))
        most = max(most, resident() - before)
    return most


def growths(path):
    """Growth while rows are read and forgotten, and of the twin that keeps what it has read."""
    rows, found = open_rows(path, held_out=0, memory=8), []
    for look in (lambda x: float(x.sum()), lambda x: x):
        with Reading(rows, 500) as reading:
            reading.batch(0, 0, 0)
            found.append(growth(lambda step: look(reading.batch(step, 0, 0)[0]), 160))  # noqa: B023
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not tell a process's memory so")
def test_memory_stays_flat(tmp_path):
    x = np.random.default_rng(0).normal(size=(80_000, 256)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 256)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1000, use_dictionary=False)
    # In a process of its own: one that has run other tests has room to spare, which hides what is kept.
    for name in ("x.npy", "x.parquet"):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            flat, twin = fresh.submit(growths, tmp_path / name).result()
        assert flat < 0.3 * x.nbytes, f"{name}: {flat / 2**20:.0f} MiB of {x.nbytes / 2**20:.0f}"
        assert twin > 0.7 * x.nbytes


def test_more_lanes_than_blocks(tmp_path):
    rows = open_rows(write_sorted(tmp_path / "x.parquet", n=1000, per_group=500), held_out=0)
    with Reading(rows, 80, 8) as reading:
        found = np.concatenate([numbers(reading.batch(s, 0, lane)) for s in range(12) for lane in range(8)])
    assert len(np.unique(found)) == 960


def test_lanes_that_do_not_divide_a_batch(long_file):
    with pytest.raises(
        OptionError, match="batch of 100 rows cannot be divided equally among 3 lanes; take batch_size=99"
    ):
        Reading(open_rows(long_file), 100, 3)


def test_blocks_too_large_for_the_memory(tmp_path):
    x = np.random.default_rng(0).normal(size=(6000, 512)).astype(np.float32)
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 512)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2500, use_dictionary=False)
    with pytest.raises(DataError, match=r"largest block of x\.parquet takes 5 MiB .*row_group_size=.*memory=1\d for"):
        Reading(open_rows(tmp_path / "x.parquet", memory=4), 100)


def test_what_a_reader_finds_is_told_at_the_step_that_needs_it(tmp_path, small_windows):
    path = write_sorted(tmp_path / "x.parquet")
    table = pq.read_table(path)
    spoiled = table.column("c0").to_numpy().copy()
    spoiled[12_345] = np.nan
    pq.write_table(table.set_column(1, "c0", pa.array(spoiled)), path, row_group_size=100)
    rows = open_rows(path, array=None, held_out=0, memory=8)
    with Reading(rows, 100) as reading:
        # It is in a window further on.
        windows = [_blocks(reading, number) for number in range(reading.windows_per_epoch)]
        number = next(i for i, blocks in enumerate(windows) if 123 in blocks)
        assert number > 0
        step = int(reading.order.plan(3, 0, 0).ends[number]) // 100
        for before in range(step):
            reading.batch(before, 3, 0)
        with pytest.raises(DataError, match=r"x\.parquet has a missing value \(NaN\) in row 12346, column c0"):
            reading.batch(step, 3, 0)


def _blocks(reading, window):
    plan = reading.order.plan(3, 0, 0)
    return plan.block[plan.pieces[window] : plan.pieces[window + 1]]


def test_a_stream_goes_through_the_rows_once(long_file):
    rows = open_rows(long_file)
    found = np.concatenate([numbers(batch) for batch in stream(rows, 100, seed=2)])
    assert len(np.unique(found)) == len(found) == 18_000
    held = np.concatenate([numbers(batch) for batch in stream(rows.held_out(), 100)])
    assert len(np.unique(np.concatenate([found, held]))) == 20_000


def test_batches_are_of_single_precision_on_the_host(long_file):
    x, y = next(stream(open_rows(long_file), 64))
    assert x.dtype == torch.float32
    assert x.shape == (64, 3)
    assert y is None
