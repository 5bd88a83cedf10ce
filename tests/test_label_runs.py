"""Runs that learn classes by their labels: from data to draws, scores and report, and what goes wrong.

What is exact is checked on Gaussian classes, whose energies at every noise level, guided densities and class
probabilities have a closed form.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import gibbsian as gb
from gibbsian import evaluation, labelled
from gibbsian.building import build_energy
from gibbsian.data.scaling import identity_scaling
from gibbsian.energies.base import Energy
from gibbsian.errors import OptionError
from gibbsian.labelled import draw_labelled, in_turn, label_codes, labelled_energy, log_class_probs, of_label
from gibbsian.models import Model, load_model, save_model
from gibbsian.recipes import Recipe, choose
from test_cli import done, refused

QUICK = ("--conditional", "--steps", "30", "--width", "16", "--depth", "1", "--levels", "4", "--no-tensorboard")
FAST = ("--warmup-steps", "20", "--learning-rate", "5e-3", "--ema-decay", "0.98")
QUIET = ("--no-evaluation",)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    """Two species in two columns, apart by ten times their width."""
    rng = np.random.default_rng(0)
    species = np.array(["owl", "tit"])[rng.integers(2, size=160)]
    x = rng.normal(size=(160, 2)) + np.where(species == "owl", 5.0, -5.0)[:, None]
    path = tmp_path_factory.mktemp("data") / "birds.csv"
    pd.DataFrame(x, columns=["length", "width"]).assign(species=species).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, csv):
    folder = tmp_path_factory.mktemp("runs") / "birds"
    words = ("train", csv, "--labels", "species", *QUICK, "--width", 32, "--steps", 250, "--label-dropping", 0.2, *FAST)
    out = done(*words, "--out", folder)
    assert "accuracy" in out
    return folder


@pytest.fixture(scope="module")
def certain(tmp_path_factory, csv):
    """A run that never drops a label."""
    folder = tmp_path_factory.mktemp("runs") / "certain"
    done("train", csv, "--labels", "species", *QUICK, *QUIET, "--label-dropping", 0, "--out", folder)
    return folder


# What goes well.


def test_a_unet_learns_classes_too():
    recipe = choose("image", (1, 8, 8), 100, {"energy": "unet", "width": 4, "conditional": True}, ("a", "b"))
    energy = build_energy(recipe)
    assert energy.context == ("sigma", "y")
    assert energy.classes == 3
    assert "classes=3" in repr(energy)
    with pytest.raises(OptionError, match="energy of noise levels, noise-conditional or unet, not with mlp"):
        choose("image", (1, 8, 8), 100, {"energy": "mlp", "conditional": True}, ("a", "b"))


def test_classes_and_their_names_are_kept_with_the_model(run):
    recipe = json.loads((run / "recipe.json").read_text())["recipe"]
    assert recipe["class_names"] == ["owl", "tit"]
    assert (recipe["conditional"], recipe["label_dropping"]) == (True, 0.2)
    model = load_model(run)
    assert model.recipe.class_names == ("owl", "tit")
    assert model.energy.context == ("sigma", "y")
    assert model.energy.classes == 3
    assert not list(run.rglob("*.pkl"))


def test_draws_are_of_the_labels_in_turn(run, tmp_path):
    done("sample", run, "--n", 40, "--label", "owl", "tit", "--out", tmp_path / "d.csv")
    frame = pd.read_csv(tmp_path / "d.csv")
    assert list(frame.columns) == ["length", "width", "species"]
    assert frame["species"].tolist() == ["owl", "tit"] * 20
    means = frame.groupby("species")["length"].mean()
    assert means["owl"] > 2.0 > -2.0 > means["tit"]
    for more in ((), ("--guidance", 2), ("--guidance", 1.5, "--corrected")):
        done("sample", run, "--n", 20, "--label", "tit", *more, "--out", tmp_path / "d.npz")
        held = np.load(tmp_path / "d.npz")
        assert held["species"].tolist() == ["tit"] * 20
        assert held["x"].mean() < -2.0


def test_draws_without_a_label_are_of_all_classes(run, tmp_path):
    done("sample", run, "--n", 60, "--out", tmp_path / "d.csv")
    frame = pd.read_csv(tmp_path / "d.csv")
    assert list(frame.columns) == ["length", "width"]
    # Of 60, half each: fewer than 10 of one would be 5 standard errors off.
    assert 10 < (frame["length"] > 0).sum() < 50
    done("sample", run, "--n", 60, "--label", "tit", "--guidance", 0, "--out", tmp_path / "d.csv")
    assert 10 < (pd.read_csv(tmp_path / "d.csv")["length"] > 0).sum() < 50


def test_rows_are_scored_and_classified(run, csv):
    table = pd.read_csv(io.StringIO(done("score", run, csv)))
    truth = pd.read_csv(csv)["species"]
    assert {"energy", "score", "log_prob", "label", "label_prob"} <= set(table.columns)
    assert (table["label"] == truth).mean() > 0.95
    assert ((table["label_prob"] >= 0.5) & (table["label_prob"] <= 1.0 + 1e-6)).all()
    owl, tit = (pd.read_csv(io.StringIO(done("score", run, csv, "--label", name))) for name in ("owl", "tit"))
    assert list(owl.columns) == ["row", "energy", "score"]
    assert ((owl["energy"] < tit["energy"]) == (truth == "owl")).mean() > 0.95
    assert "of class owl" in done("score", run, csv, "--label", "owl", "--out", run.parent / "s.csv")


def test_rows_are_foreign_to_a_class(run, csv, tmp_path):
    frame = pd.read_csv(csv)
    frame[frame["species"] == "owl"].drop(columns="species").to_csv(tmp_path / "owls.csv", index=False)
    (tmp_path / "new.csv").write_text("length,width\n5,5\n-5,-5\n")
    out = done("score", run, tmp_path / "new.csv", "--label", "owl", "--reference", tmp_path / "owls.csv")
    assert pd.read_csv(io.StringIO(out))["foreign"].tolist() == [False, True]
    done("score", run, tmp_path / "new.csv", "--reference", csv, "--by", "levels")


def test_an_evaluation_tells_of_classes(run, csv):
    saved = json.loads((run / "evaluation.json").read_text())
    value, error = saved["classification"]["accuracy"]
    assert value > 0.9
    assert 0.0 < error < 0.1
    assert saved["log_z"]["method"] == "quadrature"
    page = (run / "report.html").read_text()
    assert "Class owl" in page
    assert "are classified rightly" in page
    (run / "report.html").unlink()
    done("report", run)
    assert "Class tit" in (run / "report.html").read_text()
    del saved["classification"]
    assert evaluation.Evaluation.from_dict(saved).classification == {}


def test_a_run_without_an_unconditional_branch_is_the_mixture_of_its_classes(certain, csv, tmp_path):
    model = load_model(certain)
    assert model.energy.classes == 2
    x = torch.tensor([[5.0, 5.0], [0.0, 1.0]])
    z, sigma = model.scaling.forward(x), model.recipe.sigma_density
    parts = torch.stack([model.energy.given(sigma=sigma, y=label)(z) for label in range(2)])
    expected = -torch.logsumexp(-parts, 0) + math.log(2)
    torch.testing.assert_close(model.energies(x), expected.detach())
    done("sample", certain, "--n", 4, "--label", "owl", "--out", tmp_path / "d.csv")
    done("sample", certain, "--n", 4, "--out", tmp_path / "d.csv")
    assert "label" in done("score", certain, csv)


def test_digits_are_drawn_by_label_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "estimate_log_z", lambda *_: None)
    monkeypatch.setattr(evaluation, "baselines", lambda *_: {})
    monkeypatch.setattr(evaluation, "CLASS_DRAWS", 3)
    folder = tmp_path / "digits"
    done("train", "digits", "--limit", 300, *QUICK, "--steps", 3, "--local", 2, "--out", folder)
    assert "Draws of each class" in (folder / "report.html").read_text()
    done("sample", folder, "--n", 6, "--label", 3, 8, "--guidance", 2.0, "--out", tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 200


def test_a_run_goes_on_exactly(csv, tmp_path):
    words = ("train", csv, "--labels", "species", *QUICK, *QUIET)
    done(*words, "--out", tmp_path / "whole")
    done(*words, "--checkpoint-every", 10, "--out", tmp_path / "part")
    for name in sorted((tmp_path / "part" / "checkpoints").iterdir())[2:]:
        name.unlink()
    done(*words, "--checkpoint-every", 10, "--resume", "--out", tmp_path / "part")
    a, b = (load_model(tmp_path / name).energy.state_dict() for name in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# What goes wrong.


def test_labels_that_cannot_be_used_are_refused(run, certain, csv, tmp_path):
    plain = tmp_path / "plain"
    done("train", csv, "--labels", "species", "--steps", 2, "--width", 8, *QUIET, "--out", plain)
    out = tmp_path / "d.csv"
    assert "without labels" in refused("sample", plain, "--label", "owl", "--out", out)
    assert "without labels" in refused("score", plain, csv, "--label", "owl")
    assert "no label named 'emu'" in refused("sample", run, "--label", "emu", "--out", out)
    assert "Known: owl, tit" in refused("score", run, csv, "--label", "emu")
    assert "unconditional branch" in refused("sample", certain, "--label", "owl", "--guidance", 2, "--out", out)
    assert "name it with --label" in refused("sample", run, "--guidance", 2, "--out", out)
    assert "name it with --label" in refused("sample", run, "--corrected", "--out", out)
    assert "guidance scale" in refused("sample", run, "--label", "owl", "--guidance", -1, "--out", out)
    assert "1 or more" in refused("sample", run, "--n", 0, "--label", "owl", "--out", out)


def test_data_whose_classes_cannot_be_learned_are_refused(csv, tmp_path):
    frame = pd.read_csv(csv)
    bare = tmp_path / "bare.csv"
    frame.drop(columns="species").to_csv(bare, index=False)
    words = (*QUICK, *QUIET, "--out", tmp_path / "run")
    assert "--labels NAME" in refused("train", bare, *words)
    assert "--labels NAME" in refused("train", "two-moons", *words)
    frame[frame["species"] == "owl"].to_csv(bare, index=False)
    assert "one class, owl" in refused("train", bare, "--labels", "species", *words)
    assert "not with mlp" in refused("train", csv, "--labels", "species", "--energy", "mlp", *words)
    assert "Leave out --energy" in refused("train", csv, "--labels", "species", "--objective", "pcd", *words)
    assert "not with rbm" in refused("train", csv, "--labels", "species", "--energy", "rbm", *words)
    assert "0 to below 1" in refused("train", csv, "--labels", "species", "--label-dropping", 1, *words)


def test_a_class_that_only_held_out_rows_have_is_refused():
    from gibbsian.errors import DataError
    from gibbsian.runs import training_labels

    rows = np.random.default_rng(0).normal(size=(40, 2))
    data = gb.data.load(rows, labels=np.array([0, 1] * 20), held_out=0.25)
    assert training_labels(data)["y"].shape == (30,)
    lacking = dataclasses.replace(data, labels=torch.zeros(30, dtype=torch.long), label_names=("a", "b"))
    with pytest.raises(DataError, match="No training row is of class b"):
        training_labels(lacking)


def test_recipes_with_labels():
    recipe = choose("image", (1, 8, 8), 1000, {"conditional": True}, ("a", "b"))
    assert (recipe.energy, recipe.labels) == ("noise-conditional", 3)
    assert choose("image", (1, 8, 8), 1000, {"conditional": True, "label_dropping": 0.0}, ("a", "b")).labels == 2
    table = choose("table", (2,), 1000, {"conditional": True}, ("a", "b"))
    assert (table.energy, table.objective) == ("noise-conditional", "multi-level-denoising")
    assert choose("table", (2,), 1000, {}, ("a", "b")) == choose("table", (2,), 1000)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    old = {k: v for k, v in Recipe().to_dict().items() if k not in ("conditional", "label_dropping", "class_names")}
    assert Recipe.from_dict(old) == Recipe()
    with pytest.raises(OptionError, match="not with rbm"):
        choose("binary", (4,), 100, {"conditional": True}, ("a", "b"))


# What is exact.

CENTRES, NARROW, WIDE, LOW, HIGH = torch.tensor([[1.0, 0.0], [-0.5, 1.0]]), 0.5, 1.2, 0.1, 10.0


class Gaussians(Energy):
    """Two Gaussian classes, and a wider Gaussian as their union, under noise; each label with a constant of its own."""

    context = ("sigma", "y")

    def __init__(self, dim):
        super().__init__()
        rows = WIDE * torch.randn((4000, dim), generator=torch.Generator().manual_seed(0))
        self.event_shape = torch.Size((dim,))
        self.walked_from = gb.NoiseConditional(dim, width=4, blocks=1).calibrate(rows)

    def forward(self, x, sigma, y):
        d = x.shape[1]
        centres = torch.nn.functional.pad(CENTRES, (0, d - 2, 0, 1))
        variance = torch.tensor([NARROW, NARROW, WIDE])[y] ** 2 + sigma**2
        constants = torch.tensor([3.0, -2.0, 1.0])
        return (x - centres[y]).square().sum(1) / (2 * variance) + d / 2 * (2 * math.pi * variance).log() + constants[y]


def gaussians(dim):
    told = {"sigma_min": LOW, "sigma_density": LOW, "sigma_max": HIGH, "levels": 24}
    recipe = choose("table", (dim,), 1000, {"conditional": True, **told}, ("a", "b"))
    return Model(Gaussians(dim), recipe, identity_scaling((dim,)))


@pytest.fixture(scope="module")
def exact():
    return gaussians(2)


def guided_moments(label, s):
    """Mean and variance of the guided density at the lowest level."""
    narrow, wide = NARROW**2 + LOW**2, WIDE**2 + LOW**2
    precision = (1 - s) / wide + s / narrow
    return s * CENTRES[label] / narrow / precision, 1 / precision


def off(x, label, s):
    """How many standard errors the draws' moments are off, at most."""
    mean, variance = guided_moments(label, s)
    a = (x.mean(0) - mean).abs() / (variance / len(x)) ** 0.5
    b = (x.var(0) / variance - 1).abs() / (2 / len(x)) ** 0.5
    return float(torch.cat((a, b)).max())


@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_corrected_draws_are_of_the_guided_density(exact, s):
    labels = in_turn((0, 1), 3000)
    x = draw_labelled(exact, labels, torch.Generator().manual_seed(1), s, corrected=True)
    assert max(off(x[labels == label], label, s) for label in (0, 1)) < 5.5


def test_plain_draws_are_of_the_class_but_not_of_a_guided_density(exact):
    labels = torch.zeros(3000, dtype=torch.long)
    assert off(draw_labelled(exact, labels, torch.Generator().manual_seed(1)), 0, 1.0) < 6.5
    assert off(draw_labelled(exact, labels, torch.Generator().manual_seed(1), 3.0), 0, 3.0) > 10


def test_labels_that_go_to_other_rows_are_caught(exact, monkeypatch):
    real = labelled.labelled_energy
    monkeypatch.setattr(labelled, "labelled_energy", lambda model, labels, s: real(model, labels.flip(0), s))
    labels = in_turn((0, 1), 3000)
    x = draw_labelled(exact, labels, torch.Generator().manual_seed(1), 1.0, corrected=True)
    assert off(x[labels == 0], 0, 1.0) > 20


def test_many_rows_are_drawn_in_parts(exact, monkeypatch):
    monkeypatch.setattr(labelled, "ROWS_AT_ONCE", 40)
    labels = in_turn((0, 1), 90)
    x = draw_labelled(exact, labels, torch.Generator().manual_seed(1))
    assert x.shape == (90, 2)
    assert float(x[labels == 0, 0].mean()) > 0.6
    assert float(x[labels == 1, 0].mean()) < -0.2


def check_probs(model):
    x = torch.randn((200, 2), generator=torch.Generator().manual_seed(3))
    variance = NARROW**2 + LOW**2
    expected = torch.log_softmax(-(x[:, None] - CENTRES).square().sum(2) / (2 * variance), 1)
    found = log_class_probs(model, x)
    # The constants come from 2048 weights, which differ by a tenth or so: 5.5 standard errors.
    assert float((found - expected).abs().max()) < 0.03, "not Bayes' rule"


def test_class_probabilities_are_bayes_rule_whatever_the_constants(exact):
    check_probs(exact)


def test_constants_that_are_left_in_are_caught(exact, monkeypatch):
    monkeypatch.setattr(labelled, "label_constants", lambda *_: torch.zeros(2))
    with pytest.raises(AssertionError, match="Bayes"):
        check_probs(exact)


def test_the_model_of_a_label_scores_and_draws_as_one_class(exact):
    model = of_label(exact, 1)
    x = torch.randn((50, 2), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(model.energies(x), exact.energy.given(sigma=LOW, y=1)(x))
    assert off(model.draw(3000, torch.Generator().manual_seed(5)), 1, 1.0) < 6.5
    assert float(model.log_z(torch.Generator()).value) == pytest.approx(2.0, abs=0.01)  # minus its constant


def test_log_z_by_annealing_is_that_of_all_classes_or_of_one():
    """In three columns there is no quadrature; the exact values are minus the constants."""
    for model, constant in ((gaussians(3), 1.0), (of_label(gaussians(3), 0), 3.0)):
        z = model.log_z(torch.Generator().manual_seed(6), temperatures=150, chains=64)
        assert abs(float(z.value) + constant) < 5.5 * float(z.stderr) + 1e-3
        assert float(z.stderr) < 0.2
        assert float(z.lower) <= -constant <= float(z.upper)


def test_bad_arguments_are_refused(exact):
    plain = Model(gb.NoiseConditional(2), Recipe(), identity_scaling((2,)))
    for call_it in (
        lambda: label_codes(plain, ["a"]),
        lambda: labelled_energy(plain, 0),
        lambda: log_class_probs(plain, torch.zeros(2, 2)),
    ):
        with pytest.raises(OptionError, match="without labels"):
            call_it()
    with pytest.raises(OptionError, match="got 2"):
        labelled_energy(exact, 2)
    with pytest.raises(OptionError, match="got 5"):
        labelled_energy(exact, torch.tensor([0, 5]), 3.0)


def test_a_model_with_labels_comes_back_as_it_was(tmp_path):
    recipe = choose("table", (3,), 1000, {"conditional": True, "width": 8}, ("a", "b"))
    model = Model(gb.building.build_energy(recipe), recipe, identity_scaling((3,)))
    again = load_model(save_model(tmp_path, model))
    x, y = torch.randn((5, 3), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(model.energy.given(sigma=0.2, y=y)(x), again.energy.given(sigma=0.2, y=y)(x))
