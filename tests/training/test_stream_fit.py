"""Training from rows that stay on the disk: resumed to the bit, in another order after a rollback, faults named."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gibbsian.data.rows import Rows, open_rows
from gibbsian.data.rows.reading import Reading
from gibbsian.energies.neural import MLP
from gibbsian.energies.noise import NoiseConditional
from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.objectives.base import Batch
from gibbsian.objectives.denoising import DenoisingScoreMatching, LogUniform, MultiLevelDenoising
from gibbsian.training.fit import fit
from gibbsian.training.stream_feed import StreamFeed, sample_of

N = 6000


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Count 4 KiB for each MiB of memory, so that small files have many windows."""
    monkeypatch.setattr("gibbsian.data.rows.reading.MIB", 2**12)


def write(folder, spoil=None):
    folder.mkdir(exist_ok=True)
    x = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    if spoil is not None:
        x[spoil, 1] = np.nan
    for i in range(3):
        part = x[2000 * i : 2000 * i + 2000]
        table = pa.table({name: part[:, j] for j, name in enumerate("abc")} | {"y": np.arange(2000) % 2})
        pq.write_table(table, folder / f"part-{i}.parquet", row_group_size=50)
    return folder


def opened(folder, **options):
    rows = open_rows(folder, **{"labels": "y", "held_out": 0.1, "memory": 16} | options)
    return rows.scaled(rows.scaling())


def run(rows, folder=None, steps=120, **options):
    """A short run; an epoch has 54 steps, in four windows or so."""
    torch.manual_seed(0)
    return fit(
        MLP(3, hidden=(8,)),
        rows,
        DenoisingScoreMatching(0.3),
        rng=torch.Generator().manual_seed(1),
        folder=folder,
        **{
            "steps": steps,
            "batch_size": 100,
            "checkpoint_every": 50,
            "log_every": 10,
            "tensorboard": False,
            "decay": "constant",
        }
        | options,
    )


def weights(done):
    return torch.cat([p.detach().flatten() for p in done.energy.parameters()])


class Crash(Exception):
    pass


def crash_at(step):
    def call(record):
        if record.get("step") == step:
            raise Crash

    return call


def test_a_run_that_is_resumed_within_an_epoch_is_the_same_to_the_bit(tmp_path, monkeypatch):
    rows = opened(write(tmp_path / "d"))
    whole = run(rows, tmp_path / "whole")
    with pytest.raises(Crash):
        run(rows, tmp_path / "broken", callbacks=[crash_at(80)])
    # Opened anew, as in another process.
    again = run(opened(tmp_path / "d"), tmp_path / "broken", resume=True)
    assert torch.equal(weights(whole), weights(again))
    assert [r["loss"] for r in whole.history if "loss" in r] == [r["loss"] for r in again.history if "loss" in r]
    # Stopped at its end, and given more steps.
    run(rows, tmp_path / "short", steps=73)
    assert torch.equal(weights(whole), weights(run(rows, tmp_path / "short", resume=True)))

    # The twin whose place is how often it was asked, not the step.
    real = Reading.batch

    def counted(self, step, seed, lane):
        self.asked = getattr(self, "asked", -1) + 1
        return real(self, self.asked, seed, lane)

    monkeypatch.setattr(Reading, "batch", counted)
    assert torch.equal(weights(whole), weights(run(rows, tmp_path / "counted")))
    run(rows, tmp_path / "counted short", steps=73)
    assert not torch.equal(weights(whole), weights(run(rows, tmp_path / "counted short", resume=True)))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import gibbsian.data.rows.reading as reading
reading.MIB = 2**12
from test_stream_fit import opened, run

def kill(record):
    if record.get("step") == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

run(opened({data!r}), {folder!r}, callbacks=[kill])
"""


def test_a_run_that_is_killed_goes_on(tmp_path):
    rows = opened(write(tmp_path / "d"))
    code = KILLED.format(
        tests=os.path.dirname(__file__), step=90, data=str(tmp_path / "d"), folder=str(tmp_path / "killed")
    )
    # As many threads as here, or sums round otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.equal(weights(run(rows)), weights(run(rows, tmp_path / "killed", resume=True)))


def test_a_rollback_changes_the_order(tmp_path, monkeypatch):
    seeds, real = [], StreamFeed.batch

    def watched(self, step, seed, lane):
        seeds.append((step, seed))
        batch = real(self, step, seed, lane)
        return Batch(batch.x * torch.nan, batch.context) if step == 70 and len(seeds) == 71 else batch

    monkeypatch.setattr(StreamFeed, "batch", watched)
    done = run(opened(write(tmp_path / "d")))
    assert done.rollbacks == 1
    first, second = (dict(part) for part in (seeds[:71], seeds[71:]))
    assert first[60] != second[60]
    assert done.steps == 120


def test_what_a_run_is_of_is_compared(tmp_path):
    folder = write(tmp_path / "d")
    run(opened(folder), tmp_path / "run", steps=10)
    for other in (opened(folder, seed=1), opened(folder, memory=32)):
        with pytest.raises(OptionError, match="cannot go on with something else"):
            run(other, tmp_path / "run", resume=True)
    shutil.copy(folder / "part-0.parquet", folder / "part-3.parquet")
    with pytest.raises(OptionError, match=r"data\['part-3.parquet'\] was absent, now 2000 rows"):
        run(opened(folder), tmp_path / "run", resume=True)


def test_a_bad_row_ends_a_run_with_its_place(tmp_path, monkeypatch):
    # The sample by which rows are looked at does not have it.
    monkeypatch.setattr(Rows, "spread", lambda self, most: np.arange(min(most, 500)))
    folder = write(tmp_path / "d", spoil=3456)
    with pytest.raises(DataError, match=r"part-1\.parquet has a missing value \(NaN\) in row 1457, column b"):
        run(opened(folder), tmp_path / "run")
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_shard_that_disappears_ends_a_run_that_can_go_on(tmp_path):
    folder = write(tmp_path / "d")

    def take_away(record):
        if record.get("step") == 60:
            (folder / "part-1.parquet").rename(folder / "part-1.gone")

    with pytest.raises(DataError, match=r"part-1\.parquet was there .* and is gone now"):
        run(opened(folder), tmp_path / "run", callbacks=[take_away])
    (folder / "part-1.gone").rename(folder / "part-1.parquet")
    again = run(opened(folder), tmp_path / "run", resume=True)
    assert torch.equal(weights(again), weights(run(opened(folder))))


def test_rows_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ShapeError, match="energy is over points of shape"):
        fit(MLP(5), opened(write(tmp_path / "d")), DenoisingScoreMatching(0.3), rng=torch.Generator().manual_seed(0))


def test_large_blocks_are_remarked_upon(tmp_path):
    rows = opened(write(tmp_path / "d"), memory=2)
    with pytest.warns(UserWarning, match=r"about \d blocks of d; if its rows are sorted"):
        StreamFeed(rows, sample_of(rows), 100)


def test_a_feed_gives_what_the_energy_needs(tmp_path):
    rows = opened(write(tmp_path / "d"))
    sample = sample_of(rows)
    feed = StreamFeed(rows, Batch(sample.x.double(), sample.context), 100, lanes=4)
    batch = feed.batch(0, 0, 3)
    assert (batch.x.shape, batch.x.dtype) == ((25, 3), torch.float64)
    assert set(batch.context) == {"y"}
    assert (feed.n, feed.event_shape, feed.batch_size, feed.lanes) == (5400, (3,), 100, 4)
    assert len(feed.spread(50)) == 50
    assert torch.equal(feed.spread(50).x, feed.spread(50).x)
    feed.close()


def test_classes_are_learned_from_the_disk(tmp_path):
    rows = opened(write(tmp_path / "d"))
    energy = NoiseConditional(3, width=16, blocks=1, classes=2)
    done = fit(
        energy,
        rows,
        MultiLevelDenoising(LogUniform(0.1, 4.0)),
        rng=torch.Generator().manual_seed(0),
        steps=5,
        batch_size=50,
    )
    assert done.steps == 5
