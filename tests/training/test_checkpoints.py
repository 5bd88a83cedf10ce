"""Runs that are killed, starved of disk space, or damaged on disk go on exactly, or say why not."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from training_cases import QUIET, Bowl, Chains, ExactLikelihood, rows, same

from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.augment import HorizontalFlip, InTurn, Shift
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.training.checkpoints import fingerprint, load_weights
from gibbsian.training.fit import fit
from gibbsian.training.metrics import read_metrics
from gibbsian.training.settings import TrainingSettings
from gibbsian.training.state import TrainingState, restore_module

RUN = {"steps": 60, "log_every": 7, "checkpoint_every": 10, "batch_size": 8, **QUIET}


def train(folder, resume=False, misfortune=0.0, **changed):
    rng = torch.Generator().manual_seed(3)
    objective = Chains(misfortune=misfortune)
    result = fit(Bowl(), rows(), objective, rng=rng, folder=folder, resume=resume, **{**RUN, **changed})
    return result, objective


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step:07d}.pt", weights_only=True)


def steps_kept(folder):
    return sorted(int(p.stem[5:]) for p in (folder / "checkpoints").glob("*.pt"))


def assert_same_run(a, b, step=60):
    assert same(checkpoint(a, step), checkpoint(b, step))
    assert same(read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl"))
    assert steps_kept(a) == steps_kept(b)


# Killing. A child is forked, trains, and is killed; it starts in milliseconds, and one thread keeps the fork safe.


@pytest.fixture(scope="module", autouse=True)
def _warm():
    # What torch imports on an optimiser's first step would otherwise be imported anew in every child.
    train(None, steps=1)


def in_child(work):
    """Run ``work`` in a forked process on one thread; return the process."""

    def body():
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def finish(process, killed=False):
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if killed else 0)


def kill_at_call(name, number):
    """Make the ``number``-th call of a function of ``os`` kill the process before it does anything."""
    original, calls = getattr(os, name), []

    def killing(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, killing)


@pytest.mark.parametrize("misfortune", [0.0, 0.04])
@pytest.mark.parametrize(("name", "number"), [("replace", 1), ("fsync", 2), ("replace", 4), ("fsync", 8)])
def test_a_run_killed_while_it_saves_goes_on_exactly(tmp_path, name, number, misfortune):
    def killed():
        kill_at_call(name, number)
        train(tmp_path / "b", misfortune=misfortune, max_rollbacks=50)

    finish(in_child(lambda: train(tmp_path / "a", misfortune=misfortune, max_rollbacks=50)))
    finish(in_child(killed), killed=True)
    finish(in_child(lambda: train(tmp_path / "b", resume=True, misfortune=misfortune, max_rollbacks=50)))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    events = [r for r in read_metrics(tmp_path / "a" / "metrics.jsonl") if "event" in r]
    assert bool(events) == (misfortune > 0)


def test_a_run_killed_at_random_moments_goes_on_exactly(tmp_path):
    def work(folder):
        return train(folder, resume=True, misfortune=0.01, max_rollbacks=50, steps=120)

    began = time.perf_counter()
    finish(in_child(lambda: work(tmp_path / "a")))
    longest = time.perf_counter() - began
    generator = random.Random(0)
    for _ in range(6):
        process = in_child(lambda: work(tmp_path / "b"))
        time.sleep(generator.uniform(0.0, 0.6 * longest))
        process.kill()
        process.join()
    finish(in_child(lambda: work(tmp_path / "b")))
    assert_same_run(tmp_path / "a", tmp_path / "b", step=120)


@pytest.mark.slow
def test_a_program_killed_twenty_times_goes_on_exactly(tmp_path):
    program = (
        "import sys, time, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]);"
        "import test_checkpoints as t; t.train(None, steps=1); print('ready', flush=True);"
        "t.train(t.Path(sys.argv[2]), resume=True, misfortune=0.002, max_rollbacks=90, steps=6000, checkpoint_every=40,"
        "callbacks=[lambda record: time.sleep(0.01)])"
    )

    def start(folder):
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    first = start(tmp_path / "a")
    generator = random.Random(0)
    for _ in range(20):
        process = start(tmp_path / "b")
        time.sleep(generator.uniform(0.0, 0.6))
        assert process.poll() is None
        process.kill()
        process.wait()
    assert start(tmp_path / "b").wait() == 0
    assert first.wait() == 0
    assert_same_run(tmp_path / "a", tmp_path / "b", step=6000)


def test_a_state_that_forgets_the_generator_is_told_apart(tmp_path, monkeypatch):
    """The broken twin: resumption without the generator's state must not pass for exact."""
    train(tmp_path / "a")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "b", callbacks=[lambda record: 1 / (record["step"] < 35)])
    monkeypatch.setattr(TrainingState, "restore", lambda self, state: self.restore_model(state))
    train(tmp_path / "b", resume=True)
    assert not same(checkpoint(tmp_path / "a", 60)["energy"], checkpoint(tmp_path / "b", 60)["energy"])


def test_a_run_that_broke_off_with_an_error_goes_on_exactly(tmp_path):
    plain, objective = train(tmp_path / "a")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "b", callbacks=[lambda record: 1 / (record["step"] < 35)])
    again, resumed = train(tmp_path / "b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert same(plain.energy.state_dict(), again.energy.state_dict())
    assert same(objective.state_dict(), resumed.state_dict())
    assert same(plain.history, again.history)


def test_a_checkpoint_holds_what_it_says_and_needs_no_pickle(tmp_path):
    train(tmp_path)
    state = checkpoint(tmp_path, 60)
    assert {"energy", "objective", "optimizer", "average", "rng", "health", "fingerprint"} <= state.keys()
    assert "chains" in state["objective"]


def test_the_last_few_checkpoints_are_kept_and_nothing_else(tmp_path):
    train(tmp_path, steps=55, keep_checkpoints=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000040.pt",
        "step-0000050.pt",
        "step-0000055.pt",
    ]


def test_a_finished_run_is_returned_as_it_was(tmp_path):
    first, _ = train(tmp_path)
    second, _ = train(tmp_path, resume=True)
    assert same(first.energy.state_dict(), second.energy.state_dict())
    assert same(first.history, second.history)
    assert second.steps == 60


def test_more_steps_at_a_constant_rate_are_the_longer_run(tmp_path):
    train(tmp_path / "a", steps=60, decay="constant")
    train(tmp_path / "b", steps=35, decay="constant")
    train(tmp_path / "b", steps=60, decay="constant", resume=True)
    a, b = checkpoint(tmp_path / "a", 60), checkpoint(tmp_path / "b", 60)
    assert all(same(a[k], b[k]) for k in ("energy", "average", "objective", "optimizer", "rng"))


def test_more_steps_follow_the_longer_cosine(tmp_path):
    train(tmp_path, steps=35)
    longer, _ = train(tmp_path, steps=70, resume=True)
    rate = {r["step"]: r["learning_rate"] for r in longer.history}
    assert rate[35] == pytest.approx(1e-4 * 0.35, rel=0.2)
    assert rate[42] > 3 * rate[35]


def test_fewer_steps_than_were_done_are_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(OptionError, match="60 steps"):
        train(tmp_path, steps=30, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    train(tmp_path / "a")
    train(tmp_path / "b")
    newest = tmp_path / "b" / "checkpoints" / "step-0000060.pt"
    raw = bytearray(newest.read_bytes())
    if damage == "other":
        torch.save({"weights": torch.zeros(1)}, newest)
    else:
        middle = raw.index(checkpoint(tmp_path / "b", 60)["energy"]["mean"].numpy().tobytes())
        raw[middle] ^= 1
        newest.write_bytes({"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=r"step-0000060\.pt cannot be read"):
        train(tmp_path / "b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_without_one_whole_checkpoint_resuming_fails(tmp_path):
    train(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    with pytest.warns(RuntimeWarning), pytest.raises(ModelFileError, match=r"step-0000040\.pt"):
        train(tmp_path, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    train(tmp_path)
    with pytest.raises(OptionError, match="resume=True"):
        train(tmp_path)


def test_resuming_needs_a_folder_and_starts_in_an_empty_one(tmp_path):
    with pytest.raises(OptionError, match="folder"):
        train(None, resume=True)
    result, _ = train(tmp_path / "new", resume=True)
    assert result.steps == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate was 0\.001, now 0\.5"),
        ({"misfortune": 0.25}, r"objective\.misfortune was 0\.0, now 0\.25"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, message):
    train(tmp_path)
    with pytest.raises(OptionError, match=message):
        train(tmp_path, resume=True, **change)


def test_other_data_and_another_objective_are_refused_by_name(tmp_path):
    train(tmp_path)
    data = rows()
    data[3, 1] += 1e-12
    rng = torch.Generator().manual_seed(3)
    with pytest.raises(OptionError, match=r"data was float64\[40, 2\]"):
        fit(Bowl(), data, Chains(), rng=rng, folder=tmp_path, resume=True, **RUN)
    with pytest.raises(OptionError, match="objective was Chains, now ExactLikelihood"):
        fit(Bowl(), rows(), ExactLikelihood(), rng=rng, folder=tmp_path, resume=True, **RUN)
    with pytest.raises(OptionError, match=r"data\.context\['y'\] was absent"):
        fit(Bowl(), Batch(rows(), {"y": rows()[:, 0]}), Chains(), rng=rng, folder=tmp_path, resume=True, **RUN)


def test_other_moves_within_moves_are_seen():
    data, settings = Batch(rows()), TrainingSettings(steps=1)

    def marks(pixels):
        moves = InTurn((HorizontalFlip(0.5), Shift(pixels)))
        objective = PersistentContrastiveDivergence(MALA(0.1), Gaussian(2), augment=moves)
        return fingerprint(data, Bowl(), objective, settings)

    one, two = marks(1), marks(2)
    assert one == marks(1)
    assert {name for name in one if one[name] != two[name]} == {"objective.augment"}


@pytest.mark.parametrize("function", ["os.replace", "torch.save", "os.fsync"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, function):
    owner, name = {"os": os, "torch": torch}[function.split(".")[0]], function.split(".")[1]
    original, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(StorageError, match="No space left"):
            train(tmp_path / "b", steps=200)
    kept = steps_kept(tmp_path / "b")
    assert not list((tmp_path / "b" / "checkpoints").glob("*.partial"))
    train(tmp_path / "b", steps=200, resume=True)
    train(tmp_path / "a", steps=200)
    assert kept
    assert_same_run(tmp_path / "a", tmp_path / "b", step=200)


def test_a_file_that_may_not_grow_is_reported_with_the_last_checkpoint(tmp_path):
    """The system itself refuses the write, in the middle of a file."""

    def limited():
        import resource

        def limit(record):
            if record["step"] >= 35:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(StorageError, match=r"step 40 .*last good checkpoint is .*step-0000030\.pt"):
            train(tmp_path, callbacks=[limit])

    finish(in_child(limited))
    assert checkpoint(tmp_path, 30)["step"] == 30


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        train(blocked / "run")


def test_weights_are_loaded_into_a_new_energy(tmp_path):
    result, _ = train(tmp_path)
    energy = Bowl()
    assert load_weights(energy, tmp_path) == 60
    assert same(energy.state_dict(), result.energy.state_dict())
    load_weights(energy, tmp_path, average=False)
    assert same(energy.state_dict(), checkpoint(tmp_path, 60)["energy"])
    with pytest.raises(ModelFileError, match="Bowl"):
        load_weights(Bowl(dim=3), tmp_path)
    with pytest.raises(ModelFileError, match="no checkpoint"):
        load_weights(Bowl(), tmp_path / "elsewhere")


def test_weights_of_an_adopted_module_are_loaded(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()

    trained = network()

    class Square(ExactLikelihood):
        def forward(self, energy, batch, rng):
            return type(super().forward(Bowl(), batch, rng))(energy(batch.x).square().mean())

    fit(trained, rows(), Square(), rng=torch.Generator(), folder=tmp_path, **RUN)
    fresh = network()
    load_weights(fresh, tmp_path)
    assert same(trained.state_dict(), fresh.state_dict())


def test_buffers_made_in_use_are_restored_filled_and_empty():
    full, empty = Chains(), Chains()
    full(Bowl(), Batch(rows()), torch.Generator())
    blank = {k: v.clone() for k, v in empty.state_dict().items()}
    restore_module(empty, full.state_dict())
    assert torch.equal(empty.chains, full.chains)
    assert empty.chains is not full.chains
    restore_module(full, blank)
    assert full.chains is None


def test_records_lost_from_the_history_are_missed_aloud(tmp_path):
    train(tmp_path, steps=30)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(RuntimeWarning, match="hole"):
        train(tmp_path, steps=60, resume=True)
