"""Restricted Boltzmann machines from data to report: bits, thresholds, exact numbers, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from gibbsian.building import build_objective, initial_weights
from gibbsian.cli import main
from gibbsian.data import load
from gibbsian.data.binarise import as_bits, binarised
from gibbsian.data.loading import load_rows
from gibbsian.data.scaling import identity_scaling
from gibbsian.energies.boltzmann import RBM
from gibbsian.errors import DataError, DomainError, OptionError
from gibbsian.estimator import EBM
from gibbsian.families import machines
from gibbsian.families.machines import carried
from gibbsian.models import Model, load_model, save_model
from gibbsian.objectives.base import Batch
from gibbsian.objectives.centring import Centred
from gibbsian.partition.boltzmann import exact_log_likelihood, exact_log_z
from gibbsian.recipes import choose
from gibbsian.report.machine import machine_summary, signed

QUICK = ("--steps", "40", "--sample-steps", "20", "--no-tensorboard")


def done(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main([str(word) for word in words])
    return " ".join(out.getvalue().split())


def refused(*words):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 1, err.getvalue()
    return " ".join(err.getvalue().split())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def all_rows(d):
    return np.array(list(itertools.product((0.0, 1.0), repeat=d)))


@pytest.fixture(scope="module")
def bits():
    rng = np.random.default_rng(0)
    x = (rng.random((300, 3)) < 0.4).repeat(2, 1)
    return (x ^ (rng.random(x.shape) < 0.1)).astype(int)


@pytest.fixture(scope="module")
def csv(tmp_path_factory, bits):
    path = tmp_path_factory.mktemp("data") / "answers.csv"
    pd.DataFrame(bits, columns=list("abcdef")).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, csv):
    folder = tmp_path_factory.mktemp("runs") / "answers"
    done("train", csv, "--width", 4, *QUICK, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    said = done("train", "digits", "--limit", 200, "--model", "rbm", "--width", 8, *QUICK, "--out", folder)
    return folder, said


# From a table of bits to a report.


def test_log_z_of_a_trained_machine_is_exact_and_probabilities_sum_to_one(run, tmp_path):
    saved = json.loads((run / "evaluation.json").read_text())
    assert saved["log_z"]["method"] == "the sum over all states of the smaller layer"
    assert saved["log_z"]["stderr"] == 0.0
    pd.DataFrame(all_rows(6).astype(int), columns=list("abcdef")).to_csv(tmp_path / "all.csv", index=False)
    done("score", run, tmp_path / "all.csv", "--out", tmp_path / "scores.csv")
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert np.exp(scores["log_prob"]).sum() == pytest.approx(1.0, abs=1e-4)
    model = load_model(run)
    assert model.scaling == identity_scaling((6,))
    x = torch.tensor(all_rows(6)).float()
    expected = exact_log_likelihood(model.energy, x)
    np.testing.assert_allclose(scores["log_prob"], expected.numpy(), atol=1e-4)


def test_one_row_of_zeros_can_be_scored(run, tmp_path):
    (tmp_path / "one.csv").write_text("a,b,c,d,e,f\n0,0,0,0,0,0\n")
    assert "log_prob" in done("score", run, tmp_path / "one.csv")


def test_draws_are_bits_under_the_columns_names(run, tmp_path):
    done("sample", run, "--n", 5, "--out", tmp_path / "draws.csv")
    frame = pd.read_csv(tmp_path / "draws.csv")
    assert list(frame.columns) == list("abcdef")
    assert set(np.unique(frame)) <= {0.0, 1.0}


def test_the_report_shows_what_the_machine_learned(run):
    page = (run / "report.html").read_text()
    assert '<section id="couplings">' in page
    for words in ("Filters", "Spectrum of the couplings", "Covariances of pairs", "heat map of the couplings"):
        assert words.lower() in page.lower()
    assert re.search(r"Directions learned</dt><dd>\d of 4 singular values", page)
    evaluated = json.loads((run / "evaluation.json").read_text())
    assert {"model", "independent bits"} <= set(evaluated["quality"])
    assert set(evaluated["detection"]) == {"uniform noise", "shuffled columns"}
    done("report", run)
    assert '<section id="couplings">' in (run / "report.html").read_text()


def test_an_evaluation_can_be_made_again(run):
    before = json.loads((run / "evaluation.json").read_text())
    said = done("evaluate", run)
    after = json.loads((run / "evaluation.json").read_text())
    assert "the sum over all states" in said
    assert after["log_z"] == before["log_z"]
    assert after["log_likelihood"] == before["log_likelihood"]


# Pictures become bits, at a threshold that is told and kept.


def test_grey_pictures_are_binarised_and_it_is_said(digits):
    folder, said = digits
    told = "Pixels above 8, 0.5 of the way from 0 to 16, are read as ones, others as zeros."
    assert told in said
    assert told in (folder / "report.html").read_text()
    assert "binary" in said
    kept = json.loads((folder / "run.json").read_text())
    assert kept["threshold"] == 8.0
    assert kept["reading"]["binarise"] == 0.5
    page = (folder / "report.html").read_text()
    assert "hidden units as pictures" in page
    assert "Fréchet distance" in page


def test_grey_rows_are_scored_at_the_same_threshold(digits, tmp_path):
    folder, _ = digits
    grey = np.random.default_rng(0).integers(0, 17, size=(4, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "bits.npy", (grey > 8).astype(np.uint8))
    assert done("score", folder, tmp_path / "grey.npy") == done("score", folder, tmp_path / "bits.npy")
    (folder / "run.json").rename(tmp_path / "run.json")
    try:
        told = refused("score", folder, tmp_path / "grey.npy")
    finally:
        (tmp_path / "run.json").rename(folder / "run.json")
    assert "states 0 and 1" in told


def test_draws_of_pictures_can_be_seen(digits, tmp_path):
    folder, _ = digits
    done("sample", folder, "--n", 4, "--out", tmp_path / "draws.png")
    assert (tmp_path / "draws.png").stat().st_size > 100


def test_a_data_set_is_binarised_in_all_its_parts():
    grey = load("digits")
    dataset = binarised(grey, 0.25)
    assert dataset.kind == "binary"
    assert dataset.threshold == 4.0
    torch.testing.assert_close(dataset.train, (grey.train > 4).float())
    torch.testing.assert_close(dataset.held_out, (grey.held_out > 4).float())
    assert dataset.scaling() == identity_scaling((1, 8, 8))
    assert "bits of 64 never vary" in dataset.notes[-1]
    assert binarised(dataset) is dataset
    assert load("digits", binarise=0.25).threshold == 4.0
    assert load("digits", binarise=0.25, kind="binary").kind == "binary"
    probabilities = load(np.random.default_rng(0).random((50, 3)), binarise=0.5)
    assert probabilities.threshold == 0.5
    x = torch.tensor([[0.0, 1.0]])
    assert as_bits(x, 8.0) is x
    rows, _ = load_rows(np.array([[0.2, 0.9]]), kind="binary", threshold=0.5)
    assert rows.tolist() == [[0.0, 1.0]]


def test_what_cannot_be_binarised_is_refused():
    with pytest.raises(OptionError, match=r"between 0 and 1; got 1\.0"):
        load("digits", binarise=1.0)
    with pytest.raises(DataError, match=r"iris runs from.*between 0 and 1"):
        load("iris", binarise=0.5)
    with pytest.raises(DataError, match="all bits would be alike"):
        load(np.random.default_rng(0).random((50, 3)) * 0.1, binarise=0.5)
    with pytest.raises(OptionError, match=r"--binarise 0\.5"):
        load(np.random.default_rng(0).random((50, 3)), kind="binary")


# Recipes and models.


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("binary", (5,), {}),
        ("binary", (1, 3, 3), {"centred": False}),
        ("binary", (5,), {"objective": "cd"}),
        ("table", (5,), {"energy": "rbm", "visible": "gaussian"}),
        ("image", (1, 3, 3), {"energy": "rbm", "visible": "gaussian", "centred": False}),
    ],
)
def test_machines_are_built_trained_saved_and_drawn_from(kind, shape, options, tmp_path):
    recipe = choose(kind, shape, 200, {"width": 3, "sample_steps": 5, "buffer_size": 64} | options)
    x = torch.rand((64, *shape), generator=generator())
    x = (x < 0.3).float() if kind == "binary" else x
    energy = initial_weights(recipe, x)
    objective = build_objective(recipe, x, energy)
    assert isinstance(objective, Centred) == recipe.centred
    loss = objective(energy, Batch(x), generator(1)).value
    assert any(bool((g != 0).any()) for g in torch.autograd.grad(loss, list(energy.parameters())))
    model = Model(energy, recipe, identity_scaling(shape))
    again = load_model(save_model(tmp_path / "model", model))
    torch.testing.assert_close(again.energies(x), model.energies(x))
    draws = again.draw(7, generator(2))
    assert draws.shape == (7, *shape)
    assert kind != "binary" or set(draws.unique().tolist()) <= {0.0, 1.0}
    # The base of a centred machine has the data's means, of the Gaussian units too.
    if recipe.centred and kind != "binary":
        torch.testing.assert_close(again.base.field, x.flatten(1).mean(0))


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("table", {"energy": "rbm"}, "rows are real numbers.*--binarise 0.5.*--visible gaussian"),
        ("binary", {"visible": "gaussian"}, "zeros and ones, of which the visible units are bernoulli"),
        ("binary", {"kernel": "hmc"}, "kernel gibbs moves the chains of an rbm"),
        ("table", {"energy": "mlp", "kernel": "gibbs"}, "kernel gibbs moves the chains of an rbm"),
        ("binary", {"objective": "score-matching"}, "fitted by pcd or cd"),
        ("binary", {"visible": "bernouli"}, "Did you mean 'bernoulli'"),
    ],
)
def test_a_machine_that_contradicts_itself_is_refused(kind, options, told):
    with pytest.raises(OptionError, match=told):
        choose(kind, (5,), 100, options)


def planted(d=6, m=4, seed=0):
    recipe = choose("binary", (d,), 100, {"width": m, "sample_steps": 20})
    energy = RBM(d, m, weight_scale=1.2, rng=generator(seed))
    return Model(energy.requires_grad_(False), recipe, identity_scaling((d,)))


def test_carried_particles_follow_the_machines_law():
    model = planted()
    x = carried(model.energy, model.energy.base(), 8000, generator(1))
    rows = torch.tensor(all_rows(6)).float()
    p = exact_log_likelihood(model.energy, rows).exp().numpy()
    counts = np.bincount((x.numpy() @ (2 ** np.arange(5, -1, -1))).astype(int), minlength=64)
    # Copies among particles make counts vary more than independent draws would.
    assert np.abs(counts / 8000 - p).sum() < 0.12
    independent = np.exp(-model.energy.base()(rows).double().numpy())
    assert np.abs(independent - p).sum() > 0.3


def test_the_bracket_holds_the_exact_log_z(monkeypatch):
    model = planted()
    exact = float(exact_log_z(model.energy).value)
    assert float(model.log_z(generator()).value) == pytest.approx(exact)
    monkeypatch.setattr(machines, "QUICK_STATES", 8)
    assert not model.family.is_summed
    z = model.log_z(generator(2), chains=128)
    assert float(z.lower) <= exact <= float(z.upper)
    assert abs(float(z.value) - exact) < 5.0 * float(z.stderr) + 1e-3
    assert float(z.upper) - float(z.lower) < 1.0


def test_rows_off_the_domain_are_refused_by_the_model():
    with pytest.raises(DomainError, match=r"hold other values.*Binarise them"):
        planted().energies(torch.full((2, 6), 0.3))


def test_the_estimator_takes_bits_and_refuses_the_rest(bits):
    options = {"width": 4, "sample_steps": 10}
    ebm = EBM(energy="rbm", steps=20, options=options, random_state=0).fit(bits)
    assert np.exp(ebm.log_prob(all_rows(6))).sum() == pytest.approx(1.0, abs=1e-5)
    assert set(np.unique(ebm.sample(20))) <= {0.0, 1.0}
    with pytest.raises(DomainError, match="Binarise"):
        EBM(energy="rbm", steps=5, options=options).fit(bits * 0.3)
    real = EBM(energy="rbm", steps=5, options=options | {"visible": "gaussian"}, random_state=0)
    assert np.isfinite(real.fit(bits + 0.1 * np.arange(300)[:, None]).sample(3)).all()


# The figures.


def test_a_summary_counts_what_it_says():
    first, energy = RBM(3, 2, weight_scale=0.1, rng=generator()), RBM(3, 2, weight_scale=2.0, rng=generator(1))
    x = torch.tensor(all_rows(3)).float()[[0, 3, 3, 7, 1]]
    summary = machine_summary(energy, first, x, x)
    np.testing.assert_allclose(summary.spectrum, np.linalg.svd(energy.weight.detach().numpy())[1], rtol=1e-5)
    assert summary.first_spectrum.max() < summary.spectrum.max()
    expected = np.cov(x.numpy().T, bias=True)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(np.sort(summary.covariances[0]), np.sort(expected), atol=1e-6)
    field = energy.hidden_bias + x @ energy.weight
    np.testing.assert_allclose(summary.activity, field.sigmoid().mean(0).detach().numpy(), rtol=1e-5)


def test_signs_are_told_by_colour_and_size_by_strength():
    pixels = signed(np.array([0.0, 1.0, -1.0, 0.5, -9.0]), 1.0)
    assert pixels[:, 3].tolist() == [0, 255, 255, 128, 255]
    assert pixels[1, 0] > pixels[1, 2]
    assert pixels[2, 0] < pixels[2, 2]


def test_real_tables_and_mistakes_from_the_command_line(tmp_path):
    said = refused("train", "iris", "--model", "rbm", "--out", tmp_path / "a")
    assert "--visible gaussian" in said
    assert "between 0 and 1" in refused("train", "iris", "--binarise", "0.5", "--out", tmp_path / "b")
    out = tmp_path / "c"
    done("train", "iris", "--model", "rbm", "--visible", "gaussian", "--width", 3, *QUICK, "--out", out)
    assert json.loads((out / "recipe.json").read_text())["recipe"]["visible"] == "gaussian"
    assert '<section id="couplings">' in (out / "report.html").read_text()
