"""Runs of several processes that are killed, stopped or starved go on exactly, in however many processes."""

import errno
import functools
import os
import random
import shutil
import signal
import time

import pytest
import torch

import gibbsian as gb
from gibbsian.errors import ProcessError, StorageError, TrainingInterrupted
from gibbsian.processes import world
from gibbsian.training.checkpoint_folder import CheckpointFolder, read_checkpoint
from gibbsian.training.checkpoints import load_weights
from gibbsian.training.metrics import read_metrics
from spawned import run_in

RUN = {"batch_size": 16, "log_every": 5, "checkpoint_every": 10, "tensorboard": False, "lanes": 4, "decay": "constant"}
TIMES = {"seconds", "steps_per_second"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (gb.MLP(2, (16, 40)) + gb.Gaussian(2)).double()


class Disturbed(gb.PCD):
    """Persistent chains, and something that happens to one process in one step of it."""

    def __init__(self, step=0, rank=1, act=lambda: None):
        super().__init__(gb.MALA(0.1), gb.Gaussian(2).double(), steps=2, buffer_size=64)
        self._step, self._rank, self._act, self._calls = step, rank, act, 0

    def forward(self, energy, batch, rng):
        self._calls += 1
        # Every lane has an objective of its own, which counts its calls.
        if world().rank == self._rank and self._calls == self._step:
            self._act()
        return super().forward(energy, batch, rng)


def train(folder, steps=30, resume=False, disturbed=(), **settings):
    energy = model()
    data = 0.5 + torch.randn(64, 2, generator=seeded(1), dtype=torch.float64)
    objective = Disturbed(*disturbed)
    options = RUN | {"unlike_limit": 1e9} | settings
    gb.fit(energy, data, objective, rng=seeded(2), folder=folder, resume=resume, steps=steps, **options)
    return [p.detach() for p in energy.parameters()]


def outcome(folder):
    """Everything that a run leaves behind, without times, as a string of bytes for tensors."""

    def plain(tree):
        if isinstance(tree, torch.Tensor):
            return str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()
        if isinstance(tree, dict):
            return {k: plain(v) for k, v in tree.items() if k not in TIMES}
        return [plain(part) for part in tree] if isinstance(tree, (list, tuple)) else tree

    paths = CheckpointFolder(folder, 1, 2).paths()
    state = read_checkpoint(list(paths.values())[-1])
    return plain(state), plain(read_metrics(folder / "metrics.jsonl")), list(paths)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the undisturbed run of two processes leaves behind."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_in(2, train, folder)
    return outcome(folder)


def killed_in_turn(folder, kills):
    """Sessions of two processes, each killed after a random time."""
    import multiprocessing
    from datetime import timedelta

    import torch.distributed as dist

    def work(rank, meeting):
        torch.set_num_threads(1)
        timeout = timedelta(seconds=20)
        try:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timeout)
            train(folder, resume=True)
        except (ProcessError, RuntimeError):
            os._exit(3)
        os._exit(0)

    luck, fork = random.Random(0), multiprocessing.get_context("fork")
    folder.mkdir()
    for session in range(kills):
        meeting = folder / f"meeting{session}"
        both = [fork.Process(target=work, args=(rank, meeting)) for rank in range(2)]
        for process in both:
            process.start()
        time.sleep(luck.uniform(0.2, 1.5))
        # Both at once, or one, and the other has to end by itself.
        for process in both if session % 3 else both[:1]:
            process.kill()
        for process in both:
            process.join(60)
            assert process.exitcode is not None, "A process goes on without the other."
    run_in(2, train, folder, 30, True)


def test_two_processes_killed_at_random_moments_go_on_exactly(tmp_path, plain):
    killed_in_turn(tmp_path / "run", 5)
    assert outcome(tmp_path / "run") == plain


@pytest.mark.slow
def test_two_processes_killed_twenty_times_go_on_exactly(tmp_path, plain):
    killed_in_turn(tmp_path / "run", 20)
    assert outcome(tmp_path / "run") == plain


def stopped(folder):
    told = {}
    for name in ("SIGTERM", "SIGUSR1"):
        act = functools.partial(signal.raise_signal, getattr(signal, name))
        try:
            train(folder, resume=True, disturbed=(13 if name == "SIGTERM" else 4, 1, act))
        except TrainingInterrupted as error:
            told[name] = (str(error), error.code)
    return told


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path, plain):
    first, second = run_in(2, stopped, tmp_path)
    assert first == second
    (message, code), (later, usr) = first["SIGTERM"], first["SIGUSR1"]
    assert (code, usr) == (143, 138)
    assert message.startswith("Stopped by SIGTERM after step 14 of 30. Saved in")
    assert later.startswith("Stopped by SIGUSR1 after step 19 of 30.")
    # Saved by two, and finished by one process, by two and by four: the same order of the data, and all chains.
    weights = None
    for size in (2, 1, 4):
        folder = tmp_path.parent / f"{tmp_path.name} in {size}"
        shutil.copytree(tmp_path, folder)
        run_in(size, train, folder, 30, True)
        found = read_checkpoint(folder / "checkpoints" / "step-0000030-0")
        weights = found if weights is None else weights
        assert list(found["lanes"]) == [0, 1, 2, 3]
        assert size != 2 or outcome(folder) == plain
        # Between other numbers of processes the sums of gradients are rounded otherwise.
        assert close(found["energy"], weights["energy"])
        assert close(found["lanes"], weights["lanes"])
        assert torch.equal(found["lanes"][3]["rng"], weights["lanes"][3]["rng"])
    # The twin: a lane with another's chains is told apart.
    assert not close(found["lanes"][1], weights["lanes"][2])


def close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a if k != "pending")
    return a is b or torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-10)


def starved(folder):
    original = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def act():
        os.fsync = full

    try:
        train(folder, disturbed=(15, 1, act))
    except StorageError as error:
        return str(error)
    finally:
        os.fsync = original


def test_a_disk_that_is_full_for_one_process_ends_all(tmp_path, plain):
    for message in run_in(2, starved, tmp_path):
        assert "The checkpoint of step 20 could not be written" in message
        assert "rank 1: [Errno 28] No space left on device" in message
        assert "The last good checkpoint is" in message
        assert "step-0000010-0" in message
    run_in(2, train, tmp_path, 30, True)
    assert outcome(tmp_path) == plain


def sharded(folder, steps, resume=False):
    return train(folder, steps, resume, sharding="full")


def test_shards_of_two_processes_are_read_by_one_two_and_four(tmp_path):
    whole = sharded(tmp_path / "whole", 20)
    run_in(2, sharded, tmp_path / "two", 10)
    energy = model()
    assert load_weights(energy, tmp_path / "two", average=False) == 10
    state = read_checkpoint(tmp_path / "two" / "checkpoints" / "step-0000010-0")
    assert all(torch.equal(state["energy"][name], p) for name, p in energy.named_parameters())
    assert state["energy"]["energies.0.net.2.weight"].shape == (40, 16)
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        shutil.copytree(tmp_path / "two", folder)
        for found in run_in(size, sharded, folder, 20, True):
            for a, b in zip(whole, found):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
