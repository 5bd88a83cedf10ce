"""``gibbsian protein family`` and ``score-sequences`` from end to end on a small generated alignment."""

import contextlib
import io
import json
import signal

import pandas as pd
import pytest
import torch

from gibbsian.cli import main
from gibbsian.sequences.alignment import read_alignment
from gibbsian.sequences.family import load_family
from gibbsian.sequences.letters import fasta
from protein_families import alignment, small_potts

QUICK = ("--draws", "60", "--sweeps", "10", "--steps", "6", "--chains", "100", "--hidden", "4", "--alphabet", "AC")


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["protein", *map(str, words)])
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, " ".join(out.getvalue().split()), " ".join(err.getvalue().split())


def done(*words):
    code, out, err = call(*words)
    assert code == 0, err
    return out


def refused(*words):
    code, out, err = call(*words)
    assert code == 1, out
    assert "Traceback" not in err
    return err


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = alignment(small_potts(8), 300)
    path = tmp_path / "toy.fasta"
    path.write_text(fasta(found.names, found.codes, found.alphabet))
    lines = [f"{i} {j} 0 {4.0 if (i + j) % 3 else 12.0}" for i in range(1, 9) for j in range(i + 1, 9)]
    (tmp_path / "structure.dat").write_text("\n".join(lines))
    return path


@pytest.fixture
def plain(monkeypatch):
    """No figures and no page, which take most of the time of a small family."""
    monkeypatch.setattr("gibbsian.sequences.outputs.PICTURES", ())
    monkeypatch.setattr("gibbsian.sequences.page.write_page", lambda path, *_, **__: path)


@pytest.mark.parametrize("by", ["pseudo-likelihood", "boltzmann", "rbm"])
def test_a_family_from_alignment_to_report(source, tmp_path, by):
    out = done("family", source, "--by", by, "--structure", "structure.dat", "--out", "run", *QUICK)
    folder = tmp_path / "run"
    assert "MB of memory" in out
    assert f"precision of contacts by {by}: L/2" in out
    assert "at random" in out
    assert "bracket [" in out
    contacts = pd.read_csv(folder / "contacts.csv")
    assert list(contacts.columns) == ["i", "j", "score", "distance"]
    assert len(contacts) == 28
    assert contacts.score.is_monotonic_decreasing
    mutations = pd.read_csv(folder / "mutations.csv")
    assert len(mutations) == 8 * 2
    first = mutations.iloc[0]
    assert first.mutation == f"{first['from']}{first.column}{first['to']}"
    double = pd.read_csv(folder / "double_mutations.csv")
    assert len(double) == 28 * 4
    assert double.epistasis.abs().is_monotonic_decreasing
    assert len(read_alignment(folder / "samples.fasta", alphabet="-AC")) == 60
    for name in ("contacts", "mutations", "double_mutations"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()
    page = (folder / "report.html").read_text()
    for words in ("Contacts", "at random", "Mutation effects", "R-hat", "log Z is", "Connected pairs", "Profile"):
        assert words in page
    numbers = json.loads((folder / "evaluation.json").read_text())
    assert numbers["precision"][by]["base rate"] == numbers["precision"]["mean field"]["base rate"]
    assert load_family(folder).info.by == by
    table = tmp_path / "scores.csv"
    done("score-sequences", folder, source, "--out", table)
    scores = pd.read_csv(table)
    assert len(scores) == 300
    z = numbers["log_z"]["value"]
    assert (scores.log_prob + scores.energy + z).abs().max() < 1e-3
    assert (scores.log_prob_lower <= scores.log_prob).all()
    printed = done("score-sequences", folder, source)
    assert "log_prob_independent" in printed


def test_a_focus_and_a_reference(source, tmp_path, plain):
    done("family", source, "--focus", "s3", "--reference", "s5", "--out", "run", *QUICK)
    family = load_family(tmp_path / "run")
    found = read_alignment(source, alphabet="-AC", focus="s3")
    assert family.info.columns == found.length
    assert family.info.reference == found.text(5)
    assert family.info.reference_name == "s5"


def test_runs_are_neither_lost_nor_mixed(source, tmp_path, plain):
    words = ("family", source, "--out", "run", *QUICK)
    done(*words)
    assert "--overwrite to replace it" in refused(*words)
    assert "give one of them" in refused(*words, "--resume", "--overwrite")
    assert "There is no run in other" in refused("family", source, "--out", "other", *QUICK, "--resume")
    assert "by pseudo-likelihood, now rbm" in refused(*words, "--resume", "--by", "rbm")
    before = load_family(tmp_path / "run")
    done(*words, "--resume")
    after = load_family(tmp_path / "run")
    assert float((before.contacts() - after.contacts()).abs().max()) < 0.02
    done(*words, "--overwrite", "--by", "rbm")
    assert load_family(tmp_path / "run").info.by == "rbm"


def test_an_interrupted_run_goes_on(source, tmp_path, monkeypatch, plain):
    from gibbsian.sequences import boltzmann

    forward, calls = boltzmann.BoltzmannLearning.forward, []

    def interrupted(self, *arguments):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments)

    words = ("family", source, "--by", "boltzmann", "--out", "run", *QUICK)
    monkeypatch.setattr(boltzmann.BoltzmannLearning, "forward", interrupted)
    code, _, err = call(*words)
    assert code == 130, err
    assert "Give the command again with --resume" in err
    monkeypatch.setattr(boltzmann.BoltzmannLearning, "forward", forward)
    done(*words, "--resume")
    done(*words[: -len(QUICK) - 1], "whole", *QUICK)
    assert torch.equal(load_family(tmp_path / "run").contacts(), load_family(tmp_path / "whole").contacts())


def test_what_is_wrong_is_told(source, tmp_path, monkeypatch):
    (tmp_path / "bad.fasta").write_text(">a\nACXA\n>b\nACCA\n")
    assert "--unknown gap" in refused("family", "bad.fasta")
    assert "effective ones" in refused("family", "bad.fasta", "--unknown", "gap")
    assert "is not there" in refused("family", "none.fasta")
    assert "No sequence is named s999" in refused("family", source, "--reference", "s999", *QUICK)
    (tmp_path / "wrong.dat").write_text("1 99 0 5\n")
    assert "counted from 1" in refused("family", source, "--structure", "wrong.dat", *QUICK)
    assert "8 or more" in refused("family", source, *QUICK, "--draws", "2")
    monkeypatch.setattr("gibbsian.sequences.memory.memory_available", lambda: 10_000_000)
    assert "MB are free" in refused("family", source, *QUICK)
    assert not (tmp_path / "runs").exists()
    assert "is not there" in refused("score-sequences", "nowhere", source)


def test_scores_ask_for_the_columns_of_the_family(source, tmp_path, plain):
    done("family", source, "--out", "run", *QUICK)
    (tmp_path / "short.fasta").write_text(">a\nACA\n")
    assert "8 aligned columns; these sequences have 3" in refused("score-sequences", "run", "short.fasta")
    (tmp_path / "one.fasta").write_text(">a\nACAACA-A\n")
    (tmp_path / "run" / "evaluation.json").unlink()
    table = done("score-sequences", "run", "one.fasta")
    assert "log_prob," not in table
    assert "energy" in table
