"""Checkpoints that several processes write at once: whole or not at all, read by any number, without running code."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from test_checkpoints import steps_kept, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training_cases import Bowl, same

from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.processes import Lanes, world
from gibbsian.training import shared_checkpoints
from gibbsian.training.checkpoint_folder import CheckpointFolder, read_checkpoint
from gibbsian.training.checkpoints import load_weights
from gibbsian.training.metrics import read_metrics
from gibbsian.training.shared_checkpoints import MANIFEST, read_manifest, write_shared
from gibbsian.training.state import FORMAT
from gibbsian.training.trees import packed, unpacked
from spawned import run_in

SHARED = {"checkpoint_format": "shared"}
WEIGHTS = torch.arange(1200.0, dtype=torch.float64).reshape(600, 2)


def lane_state(lane):
    rng = torch.Generator().manual_seed(lane)
    return {"rng": rng.get_state(), "objective": {"rows": torch.full((600 + lane, 2), float(lane)), "filled": lane}}


def state_of(lanes, step=40, rollbacks=0):
    """A state such as training captures, with the lanes of this process."""
    return {
        "format": FORMAT,
        "step": step,
        "rollbacks": rollbacks,
        "energy": {"weight": WEIGHTS, "count": torch.tensor(3)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
        "average": {"energy.weight": WEIGHTS + 1},
        "seconds": 1.5 + world().rank,
        "lanes": {lane: lane_state(lane) for lane in lanes},
    }


def test_a_tree_is_the_same_after_it_was_taken_apart():
    tree = {
        "a/b": torch.ones(2),
        "a": {"b": torch.zeros(0, 3), 3: [None, True, 2**70, 0.1, float("inf"), float("-inf"), "é"]},
        "pair": (1, (torch.tensor(1.5, dtype=torch.bfloat16), [])),
        "large": torch.arange(2000.0),
        "kind": torch.float16,
        "sizes": torch.Size([2, 3]),
    }
    tensors = packed(tree, "it")
    assert len(tensors) == 3
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    found = unpacked("it", tensors)
    assert same(found, tree)
    assert list(found["a"]) == ["b", 3]
    assert type(found["a"][3][1]) is bool
    assert type(found["pair"]) is tuple
    assert found["sizes"] == torch.Size([2, 3])


# One process.


def test_a_shared_run_is_the_same_as_one_with_files_and_either_goes_on_with_the_other(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", **SHARED)
    names = sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir())
    assert names == [f"step-00000{step}-0" for step in (40, 50, 60)]
    assert same(read_metrics(tmp_path / "a" / "metrics.jsonl"), read_metrics(tmp_path / "b" / "metrics.jsonl"))
    for folder, first, second in (("c", "file", "shared"), ("d", "shared", "file")):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / folder, checkpoint_format=first, callbacks=[lambda record: 1 / (record["step"] < 35)])
        train(tmp_path / folder, resume=True, checkpoint_format=second)
        assert same(read_metrics(tmp_path / "a" / "metrics.jsonl"), read_metrics(tmp_path / folder / "metrics.jsonl"))
    files = [read_checkpoint(path) for path in CheckpointFolder(tmp_path / "a", 1, 2).paths().values()]
    for folder in "bcd":
        found = [read_checkpoint(path) for path in CheckpointFolder(tmp_path / folder, 1, 2).paths().values()]
        assert same(files[-1], found[-1])


def test_rollbacks_leave_the_same_checkpoints(tmp_path):
    plain, _ = train(tmp_path / "a", misfortune=0.04, max_rollbacks=50)
    train(tmp_path / "b", misfortune=0.04, max_rollbacks=50, **SHARED)
    assert plain.rollbacks > 0
    paths = CheckpointFolder(tmp_path / "b", 1, 2).paths()
    assert list(paths) == steps_kept(tmp_path / "a")
    assert paths[60].name == f"step-0000060-{plain.rollbacks}"
    assert same(read_checkpoint(paths[60]), read_checkpoint(tmp_path / "a" / "checkpoints" / "step-0000060.pt"))


def test_weights_are_loaded_from_a_shared_checkpoint(tmp_path):
    result, _ = train(tmp_path, **SHARED)
    energy = Bowl()
    assert load_weights(energy, tmp_path) == 60
    assert same(energy.state_dict(), result.energy.state_dict())
    load_weights(energy, tmp_path, average=False)
    assert same(energy.state_dict(), read_checkpoint(tmp_path / "checkpoints" / "step-0000060-0")["energy"])
    with pytest.raises(ModelFileError, match="Bowl"):
        load_weights(Bowl(dim=3), tmp_path)


DAMAGES = ("truncated", "flipped", "missing", "no contents", "no manifest", "other manifest")


def damage(path, kind):
    shard, contents, manifest = path / "__0_0.distcp", path / ".metadata", path / MANIFEST
    if kind == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif kind == "flipped":
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
    elif kind == "other manifest":
        manifest.write_text("[1]")
    else:
        {"missing": shard, "no contents": contents, "no manifest": manifest}[kind].unlink()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    train(tmp_path / "a", **SHARED)
    last = CheckpointFolder(tmp_path / "a", 1, 2).paths()[60]
    for kind in DAMAGES:
        folder = tmp_path / kind
        shutil.copytree(tmp_path / "a", folder)
        newest = folder / "checkpoints" / "step-0000060-0"
        damage(newest, kind)
        with pytest.warns(RuntimeWarning, match=r"step-0000060-0 cannot be read \(.*\); using the one before"):
            train(folder, resume=True, **SHARED)
        assert same(read_checkpoint(newest), read_checkpoint(last)), kind
        assert steps_kept_shared(folder) == [40, 50, 60]
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        damage(path, "flipped")
    with pytest.warns(RuntimeWarning), pytest.raises(ModelFileError, match=r"checksum of __0_0\.distcp is wrong"):
        train(tmp_path / "a", resume=True, **SHARED)


def steps_kept_shared(folder):
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert names == {path.name for path in CheckpointFolder(folder, 1, 2).paths().values()}
    return list(CheckpointFolder(folder, 1, 2).paths())


class Bomb:
    """Pickles to a call."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_reading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-0000040-0"
    write_shared(path, state_of(range(2)), None)

    def put(content):
        (path / ".metadata").write_bytes(content)
        manifest = read_manifest(path)
        mark = shared_checkpoints._digest(path / ".metadata")
        manifest["files"][".metadata"] = {"bytes": len(content), "sha256": mark}
        (path / MANIFEST).write_text(json.dumps(manifest))

    good = (path / ".metadata").read_bytes()
    contents = pickle.loads(good)
    put(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match="mkdir, which is no part of a checkpoint"):
        read_checkpoint(path)
    # Entries of bytes are unpickled by torch, without asking what is in them.
    contents.state_dict_metadata["shared"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    put(pickle.dumps(contents))
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata"):
        read_checkpoint(path)
    contents.state_dict_metadata["shared"] = contents
    put(pickle.dumps(contents))
    with pytest.raises(ValueError, match="lacks shared"):
        read_checkpoint(path)
    contents = pickle.loads(good)
    for where in contents.storage_data.values():
        where.relative_path = "../elsewhere"
    put(pickle.dumps(contents))
    with pytest.raises(ValueError, match=r"refers to \.\./elsewhere"):
        read_checkpoint(path)
    put(good)
    assert same(read_checkpoint(path), state_of(range(2)))
    assert not (tmp_path / "exploded").exists()
    # The twin: torch's own reader runs it.
    put(pickle.dumps(Bomb()))
    with pytest.raises(AttributeError):
        torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    assert (tmp_path / "exploded").exists()


LATE = {"os.replace": 12, "torch.save": 20, "os.fsync": 25}
"""Calls after which the disk is full: some checkpoints are there by then."""


@pytest.mark.parametrize("function", list(LATE))
def test_a_full_disk_leaves_the_last_shared_checkpoint_whole(tmp_path, monkeypatch, function):
    owner, name = {"os": os, "torch": torch}[function.split(".")[0]], function.split(".")[1]
    original, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > LATE[function]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(StorageError, match="No space left"):
            train(tmp_path / "b", steps=200, **SHARED)
    assert CheckpointFolder(tmp_path / "b", 1, 2).paths()
    train(tmp_path / "b", steps=200, resume=True, **SHARED)
    train(tmp_path / "a", steps=200, **SHARED)
    assert steps_kept_shared(tmp_path / "a") == steps_kept_shared(tmp_path / "b")
    last = [CheckpointFolder(tmp_path / f, 1, 2).paths()[200] for f in "ab"]
    assert same(*map(read_checkpoint, last))
    assert same(*(read_metrics(tmp_path / f / "metrics.jsonl") for f in "ab"))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    import threading

    seen, reached = [], threading.Event()
    original = shared_checkpoints.write_shared

    def slow(path, state, group):
        if state["step"] == 20:
            seen.append(reached.wait(30))
        original(path, state, group)

    monkeypatch.setattr(shared_checkpoints, "write_shared", slow)
    # The record of step 28 is written before the checkpoint of step 20 is; the one of step 30 waits for it.
    train(tmp_path, callbacks=[lambda record: record["step"] == 28 and reached.set()], **SHARED)
    assert seen == [True]
    assert steps_kept_shared(tmp_path) == [40, 50, 60]


@pytest.mark.parametrize("form", ["file", "shared"])
def test_what_a_kill_left_behind_after_the_last_checkpoint_is_removed(tmp_path, monkeypatch, form):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "tidy", lambda self, step: None)
        train(tmp_path, checkpoint_format=form)
    assert len(CheckpointFolder(tmp_path, 1, 2).paths()) == 7
    train(tmp_path, resume=True, checkpoint_format=form)
    assert list(CheckpointFolder(tmp_path, 1, 2).paths()) == [40, 50, 60]


# Several processes.


def write_and_read(folder, step):
    here = world()
    kept = CheckpointFolder(folder, 10, 2, shared=True)
    own = state_of(Lanes(4).own, step)
    mesh = init_device_mesh("cpu", (here.size,))
    own["energy"]["sharded"] = distribute_tensor(WEIGHTS.clone(), mesh, [Shard(0)])
    own["energy"]["replicated"] = distribute_tensor(WEIGHTS.clone(), mesh, [Replicate()])
    kept.open()
    kept.save(own)
    kept.close()
    again = read_all(folder)
    like = next(kept.read(like=own))["energy"]["sharded"]
    return again, torch.equal(like.to_local(), own["energy"]["sharded"].to_local())


def read_all(folder):
    return next(CheckpointFolder(folder, 10, 2, shared=True).read())


def one_shard_damaged(folder):
    if world().rank == 0:
        damage(folder / "checkpoints" / "step-0000050-0", "truncated" if world().size == 2 else "flipped")
    torch.distributed.barrier()
    kept = CheckpointFolder(folder, 10, 2, shared=True)
    import warnings

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = next(kept.read())["step"]
    return found, [str(each.message) for each in told]


def starved(folder):
    """The second process cannot write, the others could."""
    original = os.fsync
    kept = CheckpointFolder(folder, 10, 2, shared=True)
    kept.open()
    kept.save(state_of(Lanes(4).own, 30))
    kept.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if world().rank == 1:
        os.fsync = full
    try:
        kept.save(state_of(Lanes(4).own, 40))
        kept.wait()
    except StorageError as error:
        return str(error), sorted(kept.paths())
    finally:
        os.fsync = original


def test_two_processes_write_and_one_two_and_four_read(tmp_path):
    both = run_in(2, write_and_read, tmp_path, 50)
    path = tmp_path / "checkpoints" / "step-0000050-0"
    assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", MANIFEST]
    assert read_manifest(path)["lanes"] == [0, 1, 2, 3]
    assert read_manifest(path)["processes"] == 2
    whole = read_all(tmp_path)
    assert torch.equal(whole["energy"].pop("sharded"), WEIGHTS)
    assert torch.equal(whole["energy"].pop("replicated"), WEIGHTS)
    assert whole["seconds"] == 1.5
    assert same(whole, state_of(range(4), 50))
    for rank, (found, shards_are_its_own) in enumerate(both):
        assert shards_are_its_own
        assert list(found["lanes"]) == [2 * rank, 2 * rank + 1]
    for rank, found in enumerate(run_in(4, read_all, tmp_path)):
        assert same(found["lanes"], {rank: lane_state(rank)})
        assert torch.equal(found["energy"]["sharded"], WEIGHTS)


def test_all_fall_back_where_one_finds_damage(tmp_path):
    for step in (40, 50):
        write_shared(tmp_path / "checkpoints" / f"step-00000{step}-0", state_of(range(4), step), None)
    (first, told), (second, quiet) = run_in(2, one_shard_damaged, tmp_path)
    assert (first, second) == (40, 40)
    assert "bytes" in told[0]
    assert not quiet


def test_a_disk_that_is_full_for_one_fails_for_all(tmp_path):
    for message, steps in run_in(2, starved, tmp_path):
        assert "step 40 could not be written" in message
        assert "rank 1: [Errno 28] No space left on device" in message
        assert "last good checkpoint is" in message
        assert steps == [30]
    # What was begun is cleared away by the next one.
    kept = CheckpointFolder(tmp_path, 10, 2, shared=True)
    kept.save(state_of(range(4), 40))
    kept.close()
    assert steps_kept_shared(tmp_path) == [30, 40]


def test_lanes_that_the_processes_cannot_share_are_refused(tmp_path):
    write_shared(tmp_path / "checkpoints" / "step-0000040-0", state_of(range(4)), None)
    for kind, message in run_in(3, read_all, tmp_path, errors=True):
        assert kind == "OptionError"
        assert "has 4 lanes, which 3 processes cannot share equally. Go on with it in 1, 2 or 4 processes" in message


def one_file():
    train(None, checkpoint_format="file")


def test_several_processes_do_not_write_one_file():
    for kind, message in run_in(2, one_file, errors=True):
        assert kind == "OptionError"
        assert "leave it at 'auto'" in message


def test_an_unknown_format_is_refused():
    with pytest.raises(OptionError, match="'auto', 'file' or 'shared'"):
        train(None, checkpoint_format="zip")
