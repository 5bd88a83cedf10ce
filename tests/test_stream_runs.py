"""The command line on data that stay on the disk: trained, evaluated and reported from a sample, or refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from test_cli import QUIET, done, refused

FAST = ("--steps", "12", "--width", "8", "--depth", "1", "--no-tensorboard", "--batch-size", "50", *QUIET)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "d").mkdir()
    for i in range(2):
        kind = np.arange(600) % 2
        x = rng.normal(size=(600, 2)) + 3 * kind[:, None]
        table = pa.table({"a": x[:, 0], "b": x[:, 1], "kind": np.where(kind, "up", "down")})
        pq.write_table(table, tmp_path / "d" / f"part-{i}.parquet", row_group_size=60)
    return tmp_path / "d"


def test_a_folder_of_shards_is_trained_on(folder, tmp_path):
    out = tmp_path / "run"
    told = " ".join(done("train", folder, "--labels", "kind", *FAST, "--out", out).split())
    assert "rows stay on the disk" in told
    assert "1080 rows to train on" in told
    assert (out / "model.safetensors").exists()
    assert json.loads((out / "run.json").read_text())["columns"] == ["a", "b"]
    refusal = refused(
        "train", folder, "--labels", "kind", *FAST, "--steps", "24", "--split-seed", "1", "--resume", "--out", out
    )
    assert "cannot go on with something else" in refusal
    done("train", folder, "--labels", "kind", *FAST, "--steps", "24", "--resume", "--out", out)


def test_classes_of_shards_are_learned(folder, tmp_path):
    done("train", folder, "--labels", "kind", "--conditional", *FAST, "--out", tmp_path / "run")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert "down" in json.dumps(recipe)
    assert "up" in json.dumps(recipe)


def test_a_file_stays_on_the_disk_when_asked(folder, tmp_path):
    path = folder / "part-0.parquet"
    told = done("train", path, "--labels", "kind", "--stream", *FAST, "--out", tmp_path / "a")
    assert "as it was asked for" in " ".join(told.split())
    told = done("train", path, "--labels", "kind", "--no-stream", *FAST, "--out", tmp_path / "b")
    assert "stay on the disk" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "100"), "--limit chooses rows to be held in memory"),
        (("--labels", "town"), "no column named 'town'"),
        ((), "1 column of other things than numbers: kind"),
        (("--shape", "1xsix"), "--shape is whole numbers joined by x"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, folder, tmp_path):
    assert message in refused("train", folder, *words, *FAST, "--out", tmp_path / "run")


def test_a_kind_of_file_that_cannot_stay_on_the_disk(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n5,7\n")
    assert "cannot be read piece by piece" in refused("train", tmp_path / "x.csv", "--stream", *FAST)
    assert "--shape is for tables that stay on the disk" in refused("train", tmp_path / "x.csv", "--shape", "2", *FAST)


@pytest.mark.slow
def test_the_evaluation_is_of_a_sample(folder, tmp_path):
    out = tmp_path / "run"
    done("train", folder, "--labels", "kind", *[w for w in FAST if w not in QUIET], "--out", out)
    assert (out / "report.html").exists()
    done("evaluate", out)
