"""Training from rows on the disk in one process and in two: the same rows, and so the same weights."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gibbsian.data.rows import open_rows
from gibbsian.energies.neural import MLP
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.training.fit import fit
from gibbsian.training.stream_feed import StreamFeed
from spawned import run_in


def train(folder, lanes=4, out=None, steps=40, resume=False):
    torch.set_num_threads(1)
    rows = open_rows(folder, memory=16)
    torch.manual_seed(0)
    done = fit(
        MLP(3, hidden=(8,)).double(),
        rows.scaled(rows.scaling()),
        DenoisingScoreMatching(0.3),
        rng=torch.Generator().manual_seed(1),
        folder=out,
        resume=resume,
        steps=steps,
        batch_size=80,
        lanes=lanes,
        checkpoint_every=20,
        tensorboard=False,
        decay="constant",
    )
    return torch.cat([p.detach().flatten() for p in done.energy.parameters()])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("gibbsian.data.rows.reading.MIB", 2**12)
    (tmp_path / "d").mkdir()
    for i in range(2):
        x = np.random.default_rng(i).normal(size=(1000, 3))
        table = pa.table({name: x[:, j] for j, name in enumerate("abc")})
        pq.write_table(table, tmp_path / "d" / f"part-{i}.parquet", row_group_size=50)
    return tmp_path / "d"


def test_the_number_of_processes_does_not_matter(folder, tmp_path, monkeypatch):
    alone = train(folder)
    both = run_in(2, train, folder, 4, tmp_path / "run", 25)
    assert torch.equal(*both)
    # Begun by two processes, gone on with by one, in the middle of an epoch of 22 steps.
    again = train(folder, out=tmp_path / "run", resume=True)
    assert torch.allclose(again, alone, rtol=1e-9, atol=1e-12)

    # The twin whose lanes all read the first one's rows.
    real = StreamFeed.batch
    monkeypatch.setattr(StreamFeed, "batch", lambda self, step, seed, lane: real(self, step, seed, 0))
    assert not torch.allclose(train(folder), alone, rtol=1e-3)
