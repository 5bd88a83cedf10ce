"""``torchrun -m gibbsian train``: one voice, one folder, and an exit code that tells."""

import os
import subprocess
import sys

import pytest


def torchrun(*words, size=2):
    """Run the command line in processes; its code, and what it wrote on both streams."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [*command, "-m", "gibbsian", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_processes_train_together_and_one_speaks(tmp_path):
    settings = ("--steps", 30, "--limit", 400, "--batch-size", 64)
    code, out, err = torchrun("train", "two-moons", "--out", tmp_path / "run", *settings, "--no-evaluation")
    assert code == 0, err
    assert out.count("Saved in") == 1
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"model.safetensors", "metrics.jsonl", "run.json"}
    assert "torchrun --nproc-per-node 2 -m gibbsian train two-moons" in (tmp_path / "run" / "run.json").read_text()
    code, out, err = torchrun("train", "two-moons", "--out", tmp_path / "run", *settings)
    assert code != 0
    assert err.count("A run is already saved in") == 1
    code, out, err = torchrun("train", "two-moons", "--out", tmp_path / "odd", *settings[:-1], 63)
    assert code != 0
    assert err.count("cannot be divided equally among 2 lanes") == 1
    code, out, err = torchrun("evaluate", tmp_path / "run")
    assert code == 0, err
    assert out.count("bracket [") == 1
