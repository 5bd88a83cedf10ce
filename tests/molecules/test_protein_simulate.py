"""The command that simulates, as a stranger meets it."""

import contextlib
import io
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from gibbsian.cli import main

SHORT = ("--picoseconds", "2", "--frame-ps", "0.1")


def call(*words):
    """Run the command line in this process: its exit code, and what it printed and complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["protein", "simulate", *map(str, words)])
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, " ".join(out.getvalue().split()), " ".join(err.getvalue().replace("│", " ").split())


@pytest.fixture(autouse=True)
def _openmm():
    pytest.importorskip("openmm")


def test_the_dipeptide_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("ala2", *SHORT)
    assert code == 0, err
    assert "well-tempered metadynamics" in out
    assert "20 frames over 2 ps" in out
    assert (tmp_path / "runs" / "ala2-metadynamics" / "report.html").exists()
    code, out, err = call("ala2", *SHORT, "--plain", "--out", "here", "--temperature", "400")
    assert code == 0, err
    frames = pd.read_csv(tmp_path / "here" / "frames.csv")
    assert (frames.weight == 1).all()
    assert (frames.bias_kj_mol == 0).all()


def test_a_structure_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("ala2", *SHORT, "--plain", "--out", "first")[0] == 0
    code, _, err = call("first/topology.pdb", *SHORT, "--metadynamics", "--residue", "ALA2")
    assert code == 0, err
    assert (tmp_path / "runs" / "topology-metadynamics" / "bias.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ala2", "--plain", "--metadynamics"), "choose one"),
        (("nothing.pdb",), "no file nothing.pdb"),
        (("ala3",), ".pdb, .cif"),
        (("ala2", "--temperature", "-5"), "kelvin"),
        (("ala2", "--picoseconds", "0"), "picoseconds"),
        (("ala2", "--frame-ps", "0.0033"), "whole number of steps"),
        (("ala2", "--bias-factor", "0.5"), "above 1"),
        (("ala2", "--residue", "GLY1"), "ALA2"),
        (("ala2", "--seed", "-1"), "seed"),
    ],
)
def test_mistakes_are_told_in_one_message(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*words)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_without_openmm_it_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmm", None)
    code, _, err = call("ala2", "--out", tmp_path / "run")
    assert code == 1
    assert "pip install 'gibbsian[protein]'" in err


def test_a_finished_folder_is_kept(tmp_path):
    assert call("ala2", *SHORT, "--out", tmp_path / "run")[0] == 0
    for more in ((), ("--resume",)):
        code, _, err = call("ala2", *SHORT, "--out", tmp_path / "run", *more)
        assert code == 1
        assert "finished simulation" in err


def test_interrupted_it_says_how_to_go_on(tmp_path):
    words = [sys.executable, "-m", "gibbsian", "protein", "simulate", "ala2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([*words, "--picoseconds", "100000"], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "run" / "partial").exists():
            break
        time.sleep(0.1)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    code, out, err = call("ala2", *SHORT, "--frame-ps", "0.5", "--out", tmp_path / "run", "--resume")
    assert code == 0, err
    assert "4 frames" in out
