"""Signals that ask a run to stop: it saves, says how to go on, and ends with a code that schedulers understand."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from training_cases import QUIET, Bowl, Chains, rows, same

from gibbsian.cli import main
from gibbsian.errors import OptionError, TrainingInterrupted
from gibbsian.training.fit import fit
from gibbsian.training.folder_lock import NAME, FolderLock
from gibbsian.training.interrupts import Interrupts, code_of

RUN = {"steps": 40, "log_every": 7, "checkpoint_every": 15, **QUIET}


class Signalled(Chains):
    """Gets a signal while a step is under way, some times over."""

    def __init__(self, step=0, number=signal.SIGTERM, times=1):
        super().__init__()
        self._step, self._number, self._times, self._calls = step, number, times, 0

    def forward(self, energy, batch, rng):
        self._calls += 1
        for _ in range(self._times * (self._calls == self._step)):
            signal.raise_signal(self._number)
        return super().forward(energy, batch, rng)


def train(objective, folder=None, **changed):
    rng = torch.Generator().manual_seed(3)
    return fit(Bowl(), rows(), objective, rng=rng, folder=folder, **{**RUN, **changed})


@pytest.mark.parametrize("form", ["file", "shared"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_exactly(tmp_path, name, code, form):
    plain = train(Signalled(), tmp_path / "a")
    stopped = Signalled(18, getattr(signal, name))
    with pytest.raises(
        TrainingInterrupted, match=r"after step 18 of 40\. Saved in .*step-0000018.*resume=True"
    ) as told:
        train(stopped, tmp_path / "b", checkpoint_format=form)
    assert told.value.code == code
    assert ("the user" if name == "SIGINT" else name) in str(told.value)
    again = train(Signalled(), tmp_path / "b", resume=True, checkpoint_format=form)
    assert same(plain.energy.state_dict(), again.energy.state_dict())
    assert same(plain.history, again.history)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_scheduler_may_say_it_more_than_once(tmp_path):
    objective = Signalled(5, times=3)
    with pytest.raises(TrainingInterrupted, match="after step 5"):
        train(objective, tmp_path)


def test_an_applications_own_handlers_are_left_alone():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        train(Signalled(2), steps=4)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [1]


def test_codes_are_128_and_the_signal():
    assert [code_of(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [130, 143, 138]


def test_without_a_request_nothing_is_asked():
    with Interrupts() as interrupts:
        assert not interrupts.asked


def reached(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def test_the_command_ends_with_the_code_that_schedulers_know(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n" + "\n".join(f"{i % 7},{i % 5}.5" for i in range(60)))
    words = ["train", "rows.csv", "--steps", "100000", "--log-every", "5", "--no-tensorboard", "--no-evaluation"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gibbsian", *words, "--out", "run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not reached(tmp_path / "run", 10) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, told
    assert "Stopped by SIGTERM" in " ".join(told.split())
    assert "--resume" in told
    assert "Traceback" not in told


# One job at a time.


def holding(folder, release):
    lock = FolderLock(folder)
    lock.acquire()
    os.write(release[1], b"x")
    time.sleep(60)


def test_a_folder_that_another_job_writes_to_is_refused(tmp_path):
    ready = os.pipe()
    child = os.fork()
    if child == 0:
        holding(tmp_path, ready)
    try:
        os.read(ready[0], 1)
        for resume in (True, False):
            with pytest.raises(OptionError, match=rf"Another job is writing to .* \(process {child} on .*\)"):
                train(Signalled(), tmp_path, resume=resume)
        assert sorted(p.name for p in tmp_path.iterdir()) == [NAME]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # What the killed one held is free, and nothing is left behind.
    train(Signalled(), tmp_path)
    assert not (tmp_path / NAME).exists()


def test_the_command_tells_who_is_writing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FolderLock, "_taken", lambda self: "process 7 on elsewhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b\n" + "\n".join(f"{i % 7},{i % 5}.5" for i in range(60)))
    with pytest.raises(SystemExit) as ended:
        main(["train", "rows.csv", "--steps", "5", "--no-evaluation", "--out", "run"])
    assert ended.value.code == 1
    assert "process 7 on elsewhere" in capsys.readouterr().err
