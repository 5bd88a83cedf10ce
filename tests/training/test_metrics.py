"""Records, their file, and what the terminal shows."""

import json
import math
import sys

import pytest
import torch
from training_cases import QUIET, Bowl, Chains, rows

from gibbsian.training import metrics
from gibbsian.training.fit import fit
from gibbsian.training.metrics import Display, Recorder, clock, mean_metrics, read_metrics
from gibbsian.training.settings import TrainingSettings

RECORD = {"step": 50, "loss": 1.25, "gap": -0.5, "steps_per_second": 25.0, "seconds": 2.0}


def test_means_are_over_the_steps_that_report():
    steps = [{"a": torch.tensor(1.0), "b": 2}, {"a": torch.tensor(2.0, dtype=torch.float64)}, {"b": torch.tensor(5)}]
    assert mean_metrics(steps, torch.zeros(())) == {"a": 1.5, "b": 3.5}
    assert mean_metrics([], torch.zeros(())) == {}


def test_numbers_that_are_none_survive_the_file(tmp_path):
    recorder = Recorder(TrainingSettings(**QUIET), tmp_path, progress=False)
    recorder.open(0, 0)
    with recorder:
        recorder.write({"step": 1, "event": "rollback", "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    line = (tmp_path / "metrics.jsonl").read_text()
    # Strict JSON, which has no such numbers.
    assert json.loads(line, parse_constant=pytest.fail)["b"] == "Infinity"
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record.pop("a"))
    assert record == {"step": 1, "event": "rollback", "b": math.inf, "c": -math.inf, "d": 0.1}


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    recorder = Recorder(TrainingSettings(**QUIET), tmp_path, progress=False)
    recorder.open(2, 2)
    with recorder:
        recorder.write({"step": 3, "again": 1})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1}]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]


def test_the_file_has_the_history(tmp_path):
    result = fit(
        Bowl(), rows(), Chains(), rng=torch.Generator(), steps=30, log_every=10, folder=tmp_path, callbacks=[], **QUIET
    )
    assert read_metrics(tmp_path / "metrics.jsonl") == result.history
    wanted = {"step", "loss", "gap", "buffer_age", "grad_norm", "learning_rate", "seconds", "steps_per_second"}
    assert wanted <= result.history[0].keys()


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(Bowl(), rows(), Chains(), rng=torch.Generator(), steps=5)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_files_are_written_when_it_is_there(tmp_path):
    pytest.importorskip("tensorboard")
    fit(Bowl(), rows(), Chains(), rng=torch.Generator(), steps=5, folder=tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fit(Bowl(), rows(), Chains(), rng=torch.Generator(), steps=5, folder=tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_where_nothing_can_be_redrawn_lines_come_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    display = Display(100)
    for step, seconds in ((50, 0.0), (60, 1.0), (70, 11.0), (100, 12.0)):
        now[0] = seconds
        display.show({**RECORD, "step": step})
    display.show({"step": 70, "event": "rollback", "metric": "loss", "value": math.nan, "to_step": 50})
    display.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["step 50 of 100", "step 70 of 100", "step 100 of 100"]
    assert "gap -0.5" in lines[0]
    assert "time left 0:00:02" in lines[0]
    assert lines[3] == "step 70: loss was nan; rollback, back to step 50"


def test_on_a_terminal_a_table_redraws_itself_and_goes(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    display = Display(100)
    assert display.live is not None
    display.show(RECORD)
    display.close()
    shown = capsys.readouterr().err
    assert "time left" in shown
    assert "\x1b[2K" in shown


def test_progress_shows_the_run(capsys):
    fit(Bowl(), rows(), Chains(), rng=torch.Generator(), steps=5, progress=True)
    assert "step 5 of 5" in capsys.readouterr().err


def test_durations_read_as_clocks():
    assert [clock(s) for s in (0.4, 61, 3725, math.nan, math.inf)] == ["0:00:00", "0:01:01", "1:02:05"] + [
        "unknown"
    ] * 2
