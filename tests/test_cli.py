"""The command line as a stranger meets it: the happy path, and one clear message for everything that goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gibbsian import datasets
from gibbsian.cli import main
from gibbsian.recipes import Recipe
from gibbsian.training.settings import TrainingSettings

MOONS = ("train", "two-moons", "--limit", "120", "--width", "16", "--depth", "2", "--no-tensorboard")
QUIET = ("--no-evaluation",)
STEPS = ("--steps", "240", "--checkpoint-every", "20", "--log-every", "10")
"""A run long enough to be interrupted, with checkpoints to come back to."""


def call(*words):
    """Run the command line in this process: its exit code, what it printed, and what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), " ".join(err.getvalue().replace("│", " ").split())


def done(*words):
    code, out, err = call(*words)
    assert code == 0, err
    return out


def refused(*words, code=1):
    """The message of a command that must fail with one clear message on one screen."""
    found, out, err = call(*words)
    assert found == code, f"exit code {found}; {out}{err}"
    assert err
    assert "Traceback" not in err
    assert len(err) < 1600
    return err


def start(*words):
    """Run the command line in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "200"}
    command = [sys.executable, "-m", "gibbsian", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(process, condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def table():
    """Rows of two columns with structure."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    return np.column_stack([x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]])


@pytest.fixture(scope="module")
def csv(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("data") / "good.csv"
    pd.DataFrame(table, columns=["length", "width"]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, csv):
    """A trained and evaluated run; copy it to change it."""
    folder = tmp_path_factory.mktemp("runs") / "good"
    done("train", csv, "--steps", 20, "--width", 16, "--sample-steps", 40, "--out", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done(*MOONS, *STEPS, *QUIET, "--out", folder)
    return folder


# What goes well.


def test_training_writes_a_model_its_numbers_and_a_report(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"model.safetensors", "recipe.json", "run.json", "evaluation.json", "samples.npy", "report.html"}
    assert names >= {"metrics.jsonl", "checkpoints"}
    assert "<html" in (finished / "report.html").read_text().lower()
    saved = json.loads((finished / "evaluation.json").read_text())
    assert saved["log_z"]["method"] == "quadrature"
    assert np.load(finished / "samples.npy", allow_pickle=False).shape[1:] == (2,)
    assert not list(finished.rglob("*.pkl"))


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv", ".parquet"])
def test_draws_can_be_written_as(ending, run, tmp_path):
    path = tmp_path / "deep" / f"draws{ending}"
    done("sample", run, "--n", 3, "--out", path)
    if ending == ".npy":
        rows = np.load(path, allow_pickle=False)
    elif ending == ".npz":
        rows = np.load(path, allow_pickle=False)["x"]
    else:
        frame = pd.read_csv(path) if ending == ".csv" else pd.read_parquet(path)
        assert list(frame.columns) == ["length", "width"]
        rows = frame.to_numpy()
    assert rows.shape == (3, 2)
    assert np.isfinite(rows).all()


def test_draws_follow_the_seed(run, tmp_path):
    made = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, seed in zip(made, (1, 1, 2)):
        done("sample", run, "--n", 5, "--seed", seed, "--out", path)
    a, b, c = (np.load(path) for path in made)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_scores_go_to_a_file_or_to_the_terminal(run, csv, tmp_path, table):
    out = done("score", run, csv)
    shown = pd.read_csv(io.StringIO(out), index_col="row")
    assert len(shown) == len(table)
    told = done("score", run, csv, "--out", tmp_path / "scores.csv")
    assert "60 scores" in told
    kept = pd.read_csv(tmp_path / "scores.csv", index_col="row")
    pd.testing.assert_frame_equal(shown, kept)
    log_z = json.loads((run / "evaluation.json").read_text())["log_z"]["value"]
    np.testing.assert_allclose(kept["log_prob"], kept["score"] - log_z, rtol=0, atol=1e-6)
    # In data units: minus the energy, minus the logarithms of the scales.
    scale = json.loads((run / "recipe.json").read_text())["scaling"]["scale"]
    np.testing.assert_allclose(kept["score"], -kept["energy"] - np.log(scale).sum(), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """New rows of the kind that the run was trained on."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 2))
    path = tmp_path_factory.mktemp("usual") / "usual.csv"
    rows = np.column_stack([x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]])
    pd.DataFrame(rows, columns=["length", "width"]).to_csv(path, index=False)
    return path


def call_score(*words):
    """A table of scores as it comes through a pipe, and what is said beside it."""
    code, out, err = call("score", *words)
    assert code == 0, err
    return pd.read_csv(io.StringIO(out), index_col="row"), err


def test_rows_are_held_against_a_reference(run, csv, usual, tmp_path):
    rows = write(tmp_path / "new.csv", "length,width\n0.1,0.2\n40,-40\n")
    plain, said = call_score(run, rows)
    assert said == ""
    table, said = call_score(run, rows, "--reference", usual)
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    assert table["p_value"][1] == pytest.approx(1 / 121)
    assert table["foreign"].tolist() == [False, True]
    assert "1 of 2 rows are foreign by energy" in said
    # 121 times 0.95 is 114.95.
    assert "number 115 of 120 reference scores" in said
    assert "at most 0.05 of rows" in said
    told = done("score", run, rows, "--reference", usual, "--out", tmp_path / "scores.csv")
    assert "2 scores" in told
    assert "1 of 2 rows are foreign" in told
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv", index_col="row"), table)
    _, said = call_score(run, rows, "--reference", usual, "--false-positive-rate", 0.25)
    assert "at most 0.25 of rows" in said


@pytest.mark.parametrize("by", ["energy", "typicality"])
def test_the_rate_is_asked_for_with_a_confidence(run, usual, tmp_path, by):
    rows = write(tmp_path / "new.csv", "length,width\n0.1,0.2\n40,-40\n")
    words = (run, rows, "--reference", usual, "--by", by, "--false-positive-rate", 0.1)
    (_, plain), (table, said) = call_score(*words), call_score(*words, "--confidence", 0.9)
    assert "on average" in plain
    assert "with confidence 0.9" in said
    ranks = [int(re.search(r"number (\d+) of", text)[1]) for text in (plain, said)]
    assert ranks[1] > ranks[0]
    assert table["foreign"].tolist() == [False, True]
    # 0.95^58 is the last power above 1/20, so that 59 rows are needed; typicality takes 60 of the 120 for itself.
    assert "59 are needed" in refused(
        "score",
        run,
        rows,
        "--reference",
        write(tmp_path / "few.csv", "length,width\n" + "1,2\n" * 58),
        "--confidence",
        0.95,
    )
    assert "between 0 and 1" in refused("score", *words, "--confidence", 1)
    assert "add --reference" in refused("score", run, rows, "--confidence", 0.9)


@pytest.mark.parametrize("by", ["typicality", "gradient"])
def test_other_scores_of_foreign_rows(run, usual, tmp_path, by):
    rows = write(tmp_path / "new.csv", "length,width\n0.1,0.2\n40,-40\n")
    table, said = call_score(run, rows, "--reference", usual, "--by", by)
    assert f"foreign by {by}" in said
    assert ("of 60 reference" if by == "typicality" else "of 120 reference") in said
    assert table["foreign"][1]
    assert table[by][1] > table[by][0]


def test_levels_of_a_model_that_has_them(tmp_path, csv, usual):
    folder = tmp_path / "run"
    words = ("--objective", "multi-level-denoising", "--steps", 3, "--width", 8, *QUIET)
    done("train", csv, *words, "--out", folder)
    rows = write(tmp_path / "new.csv", "length,width\n40,-40\n")
    table, _ = call_score(folder, rows, "--reference", usual, "--by", "levels")
    assert table["foreign"].tolist() == [True]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A barely trained model of images with noise levels."""
    folder = tmp_path_factory.mktemp("pictures") / "run"
    words = ("--objective", "multi-level-denoising", "--steps", 3, "--width", 8, "--limit", 400, *QUIET)
    done("train", "digits", *words, "--out", folder)
    return folder


def test_images_are_told_by_levels_unless_said_otherwise(pictures, tmp_path):
    rows = np.concatenate([np.zeros((1, 1, 8, 8)), np.full((1, 1, 8, 8), 16.0)])
    np.save(tmp_path / "new.npy", rows.astype(np.float32))
    words = (pictures, tmp_path / "new.npy", "--reference", "digits")
    table, said = call_score(*words)
    assert "foreign by levels" in said
    named, _ = call_score(*words, "--by", "levels")
    pd.testing.assert_frame_equal(table, named)
    assert table["levels"].dtype == float
    assert table["foreign"][1]
    plain, said = call_score(*words, "--by", "energy")
    assert "foreign by energy" in said
    assert "levels" not in plain
    # Without a reference there is nothing to tell rows from.
    bare, said = call_score(*words[:2])
    assert list(bare) == ["energy", "score"]
    assert said == ""


def test_held_out_rows_of_the_run_are_a_reference(run, csv):
    _, said = call_score(run, csv, "--reference", "held-out", "--false-positive-rate", 0.4)
    assert "at most 0.4 of rows" in said
    assert re.search(
        r"held-out|reference rows cannot hold.*: 19 are needed", refused("score", run, csv, "--reference", "held-out")
    )


def test_what_is_wrong_with_a_reference_is_said(run, csv, usual, tmp_path):
    few = write(tmp_path / "few.csv", "length,width\n" + "1,2\n" * 10)
    assert "10 reference rows cannot hold" in refused("score", run, csv, "--reference", few)
    assert "19 are needed" in refused("score", run, csv, "--reference", few)
    assert "--reference" in refused("score", run, csv, "--by", "typicality")
    assert "noise levels" in refused("score", run, csv, "--reference", usual, "--by", "levels")
    other = write(tmp_path / "other.csv", "length,height\n" + "1,2\n" * 30)
    assert "columns length, height" in refused("score", run, csv, "--reference", other)
    assert "between 0 and 1" in refused("score", run, csv, "--reference", usual, "--false-positive-rate", 5)
    assert "none.csv" in refused("score", run, csv, "--reference", tmp_path / "none.csv")
    _, said = call_score(run, csv, "--reference", csv)
    assert "is what the model was trained on" in said


def test_scores_come_in_the_rows_order_for_any_number_of_rows(run, csv, tmp_path, table):
    whole = pd.read_csv(io.StringIO(done("score", run, csv)))
    for rows in ([7], [3, 3, 3], [9, 1]):
        path = tmp_path / "few.csv"
        pd.DataFrame(table[rows], columns=["length", "width"]).to_csv(path, index=False)
        few = pd.read_csv(io.StringIO(done("score", run, path)))
        np.testing.assert_allclose(few["score"], whole["score"].iloc[rows], rtol=0, atol=1e-4)


def test_rows_without_names_are_scored_by_a_model_with_names(run, tmp_path, table):
    np.save(tmp_path / "rows.npy", table)
    assert len(done("score", run, tmp_path / "rows.npy").splitlines()) == 61


def test_a_labelled_table_is_trained_on_and_scored_alike(tmp_path, table):
    path = tmp_path / "labelled.csv"
    frame = pd.DataFrame(table, columns=["length", "width"]).assign(species=["a", "b"] * 30)
    frame.to_csv(path, index=False)
    folder = tmp_path / "run"
    done("train", path, "--labels", "species", "--steps", 2, "--width", 8, *QUIET, "--out", folder)
    assert len(done("score", folder, path).splitlines()) == 61
    frame.drop(columns="species").to_csv(path, index=False)
    assert len(done("score", folder, path).splitlines()) == 61


def test_a_run_is_evaluated_and_reported_again_from_any_folder(run, monkeypatch, tmp_path):
    before = json.loads((run / "evaluation.json").read_text())
    for name in ("evaluation.json", "samples.npy", "report.html"):
        (run / name).unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gibbsian.evaluation.baselines", lambda *_: {})
    out = done("evaluate", run)
    assert "log Z" in out
    again = json.loads((run / "evaluation.json").read_text())
    assert again["log_z"]["value"] == pytest.approx(before["log_z"]["value"], abs=1e-6)
    (run / "report.html").unlink()
    assert "report.html" in done("report", run).replace("\n", "")
    assert (run / "report.html").exists()


def test_the_data_sets_are_listed():
    out = done("datasets")
    assert all(info.name in out for info in datasets())


def test_help_tells_of_every_command_and_of_every_field_of_the_recipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = done("--help")
    assert all(name in out for name in ("train", "sample", "score", "evaluate", "report", "datasets"))
    out = done("train", "--help")
    options = re.findall(r"--[a-z-]+", out)
    for kind in (Recipe, TrainingSettings):
        for field in dataclasses.fields(kind):
            if field.name not in ("training", "shape", "class_names", "version"):
                assert f"--{field.name.replace('_', '-')}" in options
                assert field.metadata.get("help") or field.name == "seed"
    assert "None" not in out


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
def test_a_table_can_be_trained_on_from(ending, tmp_path, table):
    path = tmp_path / f"data.{ending}"
    if ending == "npy":
        np.save(path, table.astype("f4"))
    elif ending == "npz":
        np.savez(path, other=np.zeros(3), rows=table)
    else:
        pd.DataFrame(table, columns=["a", "b"]).to_parquet(path)
    more = ("--array", "rows") if ending == "npz" else ()
    done("train", path, *more, "--steps", 2, "--width", 8, *QUIET, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_folder_of_pictures_can_be_trained_on_and_drawn(tmp_path):
    rng = np.random.default_rng(1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(24):
        Image.fromarray((rng.random((7, 6, 3)) * 255).astype("u1")).save(folder / f"{i}.png")
    run = tmp_path / "run"
    done("train", folder, "--steps", 2, "--width", 8, "--levels", 3, *QUIET, "--out", run)
    done("sample", run, "--n", 5, "--out", tmp_path / "draws.png")
    with Image.open(tmp_path / "draws.png") as image:
        assert image.mode == "RGB"
    assert len(done("score", run, folder).splitlines()) == 25
    message = refused("score", run, tmp_path / "draws.png")
    assert "single picture" in message


OBJECTIVES = [
    ("multi-level-denoising", ()),
    ("denoising", ()),
    ("noise-contrastive", ()),
    ("pcd", ("--kernel", "mala")),
    ("pcd", ("--kernel", "hmc", "--spectral-norm")),
    ("cd", ("--kernel", "ula", "--energy-penalty", "0.01")),
]


@pytest.mark.parametrize(("objective", "more"), OBJECTIVES)
def test_every_objective_trains_on_a_table(objective, more, tmp_path):
    short = ("--steps", 3, "--chain-steps", 2, "--buffer-size", 128, "--sample-steps", 5, "--levels", 3)
    done(*MOONS, "--objective", objective, *more, *short, *QUIET, "--out", tmp_path / "run")
    done("sample", tmp_path / "run", "--n", 4, "--out", tmp_path / "draws.npy")
    assert np.isfinite(np.load(tmp_path / "draws.npy")).all()
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert recipe["objective"] == objective
    assert recipe["spectral_norm"] == ("--spectral-norm" in more)


@pytest.mark.parametrize(
    ("objective", "energy"),
    [
        ("multi-level-denoising", "noise-conditional"),
        ("multi-level-denoising", "unet"),
        ("pcd", "convolutional"),
        ("pcd", "residual"),
    ],
)
def test_digits_are_trained_on(objective, energy, tmp_path):
    short = ("--steps", 2, "--width", 8, "--chain-steps", 2, "--buffer-size", 64, "--sample-steps", 5, "--levels", 3)
    words = ("train", "digits", "--limit", 90, "--objective", objective, "--energy", energy, "--batch-size", 32)
    done(*words, *short, *QUIET, "--out", tmp_path / "run")
    done("sample", tmp_path / "run", "--n", 4, "--out", tmp_path / "draws.png")
    with Image.open(tmp_path / "draws.png") as image:
        assert image.mode == "L"


@pytest.mark.parametrize(("given", "expected"), [(("--denoise",), True), (("--no-denoise",), False), ((), True)])
def test_switches_override_the_recipe_both_ways(given, expected, tmp_path):
    """The recipe of images switches denoising on, against the dataclass's default."""
    words = ("train", "digits", "--limit", 60, "--steps", 1, "--width", 8, *QUIET, "--out", tmp_path / "run")
    done(*words, *given)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["denoise"] is expected


# Data that cannot be learned from.


def write(path, text):
    path.write_text(text)
    return path


def numbers(n, last="1.5"):
    return "\n".join(f"{0.1 * i},{last if i == 4 else 0.3 * i * i}" for i in range(n)) + "\n"


BAD_TABLES = {
    "empty": ("", ["empty"]),
    "text": ("a,b\n0.1,red\n0.4,blue\n0.9,red\n", ["b", "red", "numbers"]),
    "missing": ("a,b\n" + numbers(30, ""), ["1 missing value", "row 5, column b"]),
    "infinite": ("a,b\n" + numbers(30, "inf"), ["1 infinite value", "row 5, column b"]),
    "one_row": ("a,b\n1,2\n", ["1 row"]),
    "constant": ("a,b\n" + "".join(f"{i},3\n" for i in range(20)), ["b (always 3)", "drop"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_told_of(name, tmp_path):
    text, expected = BAD_TABLES[name]
    message = refused("train", write(tmp_path / f"{name}.csv", text), "--out", tmp_path / "run")
    assert f"{name}.csv" in message
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_pictures_of_unequal_size_are_told_of(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8 + i % 2), 9 * i, "u1")).save(folder / f"{i}.png")
    message = refused("train", folder)
    assert "different sizes" in message
    assert "8 x 8" in message


def test_unknown_names_suggest_the_nearest(tmp_path):
    assert "'two-moons'" in refused("train", "two-moon")
    assert "Did you mean 'pcd'" in refused(*MOONS, "--objective", "pdc", "--out", tmp_path / "run")
    assert "Did you mean 'residual'" in refused(*MOONS, "--energy", "residul", "--out", tmp_path / "run")
    assert "image, table and binary" in refused(*MOONS, "--kind", "picture", "--out", tmp_path / "run")
    assert "--objective" in refused(*MOONS, "--objectve", "pcd", code=2)
    assert "sample" in refused("sampel", code=2)
    assert "gibbsian datasets" in refused("train", code=2)
    write(tmp_path / "measured.csv", "a\n1\n")
    assert "measured.csv" in refused("train", tmp_path / "mesured.csv")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps", "many"), "expected a whole number, got 'many'"),
        (("--learning-rate", "fast"), "expected a number, got 'fast'"),
        (("--betas", "0.9", "x"), "expected two numbers, got '0.9 x'"),
        (("--betas", "0.9"), "Expected 2 values"),
        (("--limit", "3.5"), "expected a whole number, got '3.5'"),
    ],
)
def test_a_value_that_does_not_parse_is_told_of(words, expected):
    assert expected in refused(*MOONS, *words, code=2)


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", 0),
        ("--width", 0),
        ("--batch-size", 0),
        ("--noise-ratio", 0),
        ("--base-scale", 0),
        ("--limit", 2),
        ("--held-out", 2),
        ("--split-seed", -1),
        ("--learning-rate", "nan"),
        ("--betas", 0.9, 2),
        ("--decay", "slow"),
        ("--objective", "pcd", "--chain-steps", 0),
        ("--objective", "pcd", "--buffer-size", 0),
        ("--objective", "pcd", "--restart", 2),
        ("--objective", "cd", "--step-size", -1),
        ("--objective", "denoising", "--sigma-min", 0),
        ("--objective", "multi-level-denoising", "--levels", 0),
        ("--objective", "multi-level-denoising", "--corrector-steps", -1),
        ("--objective", "multi-level-denoising", "--sigma-density", 9),
        ("--objective", "multi-level-denoising", "--energy", "mlp"),
        ("--energy", "convolutional"),
        ("--width", 10**12),
    ],
)
def test_an_option_out_of_range_is_told_of_before_anything_is_written(words, tmp_path):
    refused(*MOONS, *words, *QUIET, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Folders that are not what they should be.


def test_a_run_is_not_overwritten_by_accident(run, csv):
    before = (run / "model.safetensors").read_bytes()
    message = refused("train", csv, "--out", run)
    assert all(way in message for way in ("--resume", "--overwrite", "--out"))
    assert "one of them" in refused("train", csv, "--out", run, "--resume", "--overwrite")
    assert (run / "model.safetensors").read_bytes() == before


def test_overwriting_leaves_nothing_of_the_old_run(run, csv):
    write(run / "notes.txt", "mine")
    done("train", csv, "--steps", 3, "--width", 8, *QUIET, "--out", run, "--overwrite")
    names = {path.name for path in run.iterdir()}
    assert not names & {"evaluation.json", "samples.npy", "report.html"}
    assert "notes.txt" in names
    assert "log_prob" not in done("score", run, csv)


def test_going_on_makes_the_old_evaluation_void(run, csv):
    words = ("train", csv, "--width", 16, "--sample-steps", 40, "--out", run, "--resume", *QUIET)
    done(*words, "--steps", 25)
    assert not (run / "evaluation.json").exists()
    assert "more than steps=22" in refused(*words, "--steps", 22)


def test_going_on_with_another_recipe_is_refused(run, csv):
    message = refused("train", csv, "--width", 32, "--steps", 30, "--out", run, "--resume")
    assert "was 16, now 32" in message


def test_going_on_with_nothing_is_refused(tmp_path):
    assert "no run" in refused(*MOONS, *QUIET, "--resume", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate", "report", "score"])
def test_a_folder_that_is_missing_is_told_of(command, tmp_path, csv):
    message = refused(command, tmp_path / "none", *([csv] if command == "score" else []))
    assert "no folder" in message
    assert "gibbsian train" in message


def damage(run, name):
    path = run / name
    if name == "model.safetensors":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text(path.read_text()[:-40])


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
def test_a_missing_or_truncated_part_of_a_model_is_told_of(name, run):
    damage(run, name)
    message = refused("sample", run)
    assert name in message
    assert "damaged" in message
    (run / name).unlink()
    message = refused("sample", run)
    assert name in message
    assert "No such file" in message


def change_recipe(run, **changes):
    saved = json.loads((run / "recipe.json").read_text())
    saved["recipe"] |= changes
    (run / "recipe.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 99}, "Upgrade Gibbsian"),
        ({"width": 24}, "do not fit"),
        ({"depth": 1}, "do not fit"),
        ({"energy": "transformer"}, "transformer"),
        ({"width": "wide"}, "recipe.json"),
        ({"width": -3}, "recipe.json"),
        ({"shape": None}, "recipe.json"),
        ({"invented": 1}, "invented"),
        ({"training": 7}, "recipe"),
    ],
)
def test_a_recipe_that_does_not_fit_is_told_of(changes, expected, run):
    change_recipe(run, **changes)
    assert expected in refused("sample", run)


@pytest.mark.parametrize("content", ["[]", "7", '{"recipe": []}', '{"recipe": {"version": 1}}', "\x00\x01"])
def test_a_recipe_that_is_something_else_is_told_of(content, run):
    write(run / "recipe.json", content)
    assert "recipe" in refused("sample", run)


def test_weights_of_another_shape_are_told_of(run):
    kept = weights(run)
    name = next(name for name, value in kept.items() if value.ndim == 2)
    save_file({**kept, name: torch.zeros(3, 3)}, run / "model.safetensors")
    message = refused("sample", run)
    assert name in message
    assert "(3, 3)" in message


@pytest.mark.parametrize("content", [None, "{", "[]", '{"data": "digits"}', '{"data": "x", "reading": {"colour": 1}}'])
def test_a_run_without_its_note_cannot_be_evaluated_but_sampled_and_scored(content, run, csv):
    if content is None:
        (run / "run.json").unlink()
    else:
        write(run / "run.json", content)
    assert "run.json" in refused("evaluate", run)
    done("sample", run, "--n", 2, "--out", run / "draws.csv")
    done("score", run, csv)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"log_z": null, "quality": []}'])
def test_a_report_without_an_evaluation_names_the_way_to_one(content, run):
    if content is None:
        (run / "evaluation.json").unlink()
    else:
        write(run / "evaluation.json", content)
    assert "gibbsian evaluate" in refused("report", run)


def test_data_that_moved_are_told_of(run):
    saved = json.loads((run / "run.json").read_text())
    write(run / "run.json", json.dumps({**saved, "data": str(run / "gone.csv")}))
    assert "gone.csv" in refused("evaluate", run)


def test_rows_of_other_columns_are_not_scored(run, tmp_path, table):
    path = tmp_path / "other.csv"
    pd.DataFrame(table, columns=["width", "length"]).to_csv(path, index=False)
    message = refused("score", run, path)
    assert "width, length" in message
    assert "length, width" in message
    pd.DataFrame(np.column_stack([table, table[:, 0]])).to_csv(path, index=False)
    assert "(3,)" in refused("score", run, path)
    assert "infinite" in refused("score", run, write(path, "length,width\n1,inf\n"))


def test_an_unknown_ending_is_told_of_before_work_is_done(run, csv, tmp_path):
    message = refused("sample", run, "--out", tmp_path / "draws.xyz")
    assert ".npy, .npz, .csv, .parquet, .png" in message
    assert ".csv" in refused("score", run, csv, "--out", tmp_path / "scores.npy")
    assert "images" in refused("sample", run, "--n", 2, "--out", tmp_path / "draws.png")
    assert "1 or more" in refused("sample", run, "--n", 0)
    assert list(tmp_path.glob("draws*")) == []


# The disk, and the user's Ctrl-C.


def fail(error, when=lambda *args: True):
    """A function that raises; wrap the real one to let some calls through."""

    def raising(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    def wrap(real):
        return lambda *args, **kwargs: (raising if when(*args) else real)(*args, **kwargs)

    return wrap


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_told_of(error, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", fail(error)(os.replace))
    message = refused(*MOONS, "--steps", 3, *QUIET, "--out", tmp_path / "run")
    assert os.strerror(error) in message
    assert "--out" in message


def test_a_file_in_the_folders_place_is_told_of(tmp_path):
    write(tmp_path / "run", "a file")
    assert "--out" in refused(*MOONS, "--steps", 3, *QUIET, "--out", tmp_path / "run")


@pytest.mark.parametrize("where", ["os.fsync", "torch.save"])
def test_a_full_disk_in_training_leaves_the_last_checkpoint_and_the_run_can_go_on(
    where, tmp_path, monkeypatch, undisturbed
):
    owner, name = (os, "fsync") if where == "os.fsync" else (torch, "save")
    calls = iter(range(10**6))
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, fail(errno.ENOSPC, lambda *_: next(calls) >= 6)(real))
    message = refused(*MOONS, *STEPS, *QUIET, "--out", tmp_path / "run")
    assert "No space left" in message
    assert "--resume" in message
    last = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert torch.load(last, weights_only=True)["step"] > 0
    monkeypatch.undo()
    done(*MOONS, *STEPS, *QUIET, "--out", tmp_path / "run", "--resume")
    assert_same_weights(tmp_path / "run", undisturbed)


def test_a_full_disk_while_the_model_is_saved_leaves_the_old_model(run, csv, monkeypatch):
    before = weights(run)
    full = fail(errno.ENOSPC, lambda _, path: str(path).endswith("model.safetensors"))
    monkeypatch.setattr(os, "replace", full(os.replace))
    words = ("train", csv, "--width", 16, "--sample-steps", 40, "--steps", 24, *QUIET, "--out", run, "--resume")
    assert "No space left" in refused(*words)
    assert all(torch.equal(before[name], value) for name, value in weights(run).items())
    monkeypatch.undo()
    done("sample", run, "--n", 2)
    assert not list(run.glob(".*part"))


def test_a_full_disk_in_evaluation_is_told_of(run, monkeypatch):
    monkeypatch.setattr("gibbsian.evaluation.baselines", lambda *_: {})
    full = fail(errno.ENOSPC, lambda _, path: str(path).endswith("evaluation.json"))
    monkeypatch.setattr(os, "replace", full(os.replace))
    message = refused("evaluate", run)
    assert "No space left" in message
    assert "gibbsian evaluate" in message


@pytest.mark.parametrize("command", ["sample", "score"])
def test_a_full_disk_while_rows_are_written_is_told_of(command, run, csv, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC)(os.fsync))
    words = ("sample", run, "--n", 2) if command == "sample" else ("score", run, csv)
    message = refused(*words, "--out", tmp_path / "rows.csv")
    assert "rows.csv" in message
    assert "No space left" in message
    assert not list(tmp_path.glob(".*part"))


def reached(folder, step):
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step}' in path.read_text().replace('":', '": ').replace("  ", " ")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, undisturbed):
    folder = tmp_path / "my run"
    process = start(*MOONS, *STEPS, *QUIET, "--out", folder)
    wait_for(process, reached(folder, 30))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Saved in" in " ".join(err.split())
    # The command that goes on is printed such that a shell understands it.
    assert f"--out '{folder}' --resume" in " ".join(err.split()), err
    assert not (folder / "model.safetensors").exists()
    done(*MOONS, *STEPS, *QUIET, "--out", folder, "--resume")
    assert_same_weights(folder, undisturbed)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, undisturbed):
    folder = tmp_path / "run"
    process = start(*MOONS, *STEPS, *QUIET, "--out", folder)
    wait_for(process, (folder / "checkpoints" / "step-0000040.pt").exists)
    process.kill()
    process.communicate()
    done(*MOONS, *STEPS, *QUIET, "--out", folder, "--resume")
    assert_same_weights(folder, undisturbed)


def test_the_module_is_the_command_line(tmp_path):
    process = start("train", write(tmp_path / "empty.csv", ""))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("error:")
    assert "Traceback" not in err
