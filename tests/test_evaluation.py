"""What is said of a model: numbers that match exact ones, kept as plain JSON, and the report made of them."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

from gibbsian import Model, load
from gibbsian.building import initial_weights
from gibbsian.data.scaling import identity_scaling
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.tractable import Gaussian
from gibbsian.evaluation import (
    Evaluation,
    baselines,
    compare,
    cut,
    detect,
    estimate_log_z,
    evaluate,
    log_likelihood,
    shuffled_columns,
    strangers,
    write_evaluation,
)
from gibbsian.partition.base import LogZ
from gibbsian.recipes import choose
from gibbsian.reporting import build_report


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_model(d=2, scale=1.3):
    """A model that is exactly a Gaussian: the network says nothing."""
    recipe = choose("table", (d,), 100, {"objective": "denoising", "width": 4, "base_scale": scale, "sample_steps": 40})
    energy = initial_weights(recipe, torch.zeros(2, d))
    for p in energy.parameters():
        p.data.zero_()
    return Model(energy, recipe, identity_scaling((d,)))


@pytest.fixture(scope="module")
def model():
    return gaussian_model()


@pytest.fixture(scope="module")
def dataset():
    return load(1.3 * torch.randn((300, 2), generator=generator(1)))


@pytest.fixture(scope="module")
def samples(model):
    return model.draw(256, generator(2))


@pytest.fixture(scope="module")
def evaluation(model, dataset, samples):
    return evaluate(model, dataset, samples, generator(3))


def test_the_likelihood_is_the_exact_one(evaluation, dataset):
    truth = -Gaussian(dim=2, scale=1.3)(dataset.held_out).double()
    found = evaluation.log_likelihood["held-out"]
    assert found.value == pytest.approx(float(truth.mean()), abs=1e-3)
    assert found.stderr == pytest.approx(float(truth.std()) / len(truth) ** 0.5, rel=0.05)


def test_log_z_is_the_exact_one_and_inside_its_bracket(evaluation):
    z = evaluation.log_z
    assert z.value == pytest.approx(0.0, abs=1e-4)
    assert z.lower - 1e-6 <= z.value <= z.upper + 1e-6
    assert z.method == "quadrature"


@pytest.mark.slow
def test_in_more_dimensions_log_z_is_annealed():
    notes = []
    z = estimate_log_z(gaussian_model(4), generator(), notes)
    assert "annealed" in z.method
    assert abs(z.value) < 1e-3


def test_exact_draws_are_as_near_as_the_floor(evaluation):
    """The model is the data's law: its distance is zero within six standard errors, and so is a fitted Gaussian's."""
    for name in ("model", "Gaussian"):
        distance = evaluation.quality[name]["energy distance"]
        assert abs(distance.value) < 6 * distance.stderr, name
        accuracy = evaluation.quality[name]["classifier accuracy"]
        assert abs(accuracy.value - 0.5) < 6 * accuracy.stderr, name


def test_another_law_is_told_apart(model, dataset, monkeypatch):
    monkeypatch.setattr("gibbsian.evaluation.baselines", lambda *_: {})
    off = compare(model, dataset, dataset.held_out, 4 + model.draw(256, generator(2)), generator(3))["model"]
    assert off["energy distance"].value > 6 * off["energy distance"].stderr
    assert off["classifier accuracy"].value > 0.9


def test_chains_from_exact_draws_stand_still(evaluation):
    assert evaluation.chains["r_hat"] < 1.1
    assert evaluation.chains["nonfinite"] == 0
    assert 0 < evaluation.chains["acceptance"] <= 1


def test_the_numbers_survive_json(evaluation):
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def test_they_and_the_report_are_written(evaluation, model, dataset, samples, tmp_path):
    write_evaluation(tmp_path, evaluation, samples)
    assert Evaluation.from_dict(json.loads((tmp_path / "evaluation.json").read_text())) == evaluation
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy", allow_pickle=False), samples.numpy())
    page = build_report(tmp_path, model, dataset, samples, evaluation, [], generator(4), "gibbsian train x")
    text = page.read_text()
    assert "gibbsian train x" in text
    assert "log Z" in text


def test_too_few_held_out_rows_are_noted(model, samples, monkeypatch):
    monkeypatch.setattr("gibbsian.evaluation.baselines", lambda *_: {})
    few = load(torch.randn((40, 2), generator=generator(1)), held_out=0.0)
    found = evaluate(model, few, samples, generator(3))
    assert any("held-out" in note for note in found.notes)


def test_a_log_z_that_fails_is_a_note(dataset):
    model = gaussian_model(4)
    for p in model.energy.parameters():
        p.data.fill_(math.nan)
    notes = []
    assert estimate_log_z(model, generator(), notes) is None
    assert "log Z could not be estimated" in notes[0]


def test_what_estimates_warn_of_is_a_note(model, monkeypatch):
    def crossing(*_):
        warnings.warn("The bounds of log Z cross.", RuntimeWarning, stacklevel=2)
        return LogZ(*torch.tensor([1.0, 0.1, 2.0, 0.0, 50.0]), 100)

    monkeypatch.setattr(Model, "log_z", crossing)
    notes = []
    found = estimate_log_z(model, generator(), notes)
    assert found is not None
    assert "cross" in found.note
    assert notes == ["The bounds of log Z cross."]


def test_likelihoods_carry_the_error_of_log_z(model, dataset, evaluation):
    z = evaluation.log_z
    wide = type(z)(**{**z.__dict__, "stderr": 0.5})
    plain = log_likelihood(model, dataset.held_out, z, generator())
    assert log_likelihood(model, dataset.held_out, wide, generator()).stderr == pytest.approx(
        math.hypot(plain.stderr, 0.5), rel=1e-3
    )


def test_the_baselines_have_the_datas_moments(dataset):
    made = baselines(dataset.train, 4000, generator())
    for name, rows in made.items():
        assert rows.shape == (4000, 2), name
        # Both laws' errors, at five and a half standard errors each.
        assert float((rows.mean(0) - dataset.train.mean(0)).abs().max()) < 5.5 * 1.3 * (1 / 4000) ** 0.5 + 0.02, name
        assert float((rows.std(0) / dataset.train.std(0) - 1).abs().max()) < 0.1, name


def test_strangers_keep_what_they_should():
    rows = torch.randn((50, 3), generator=generator())
    made = strangers(rows, generator(1), image=False)
    assert set(made) == {"uniform noise", "shuffled columns"}
    shuffled = shuffled_columns(rows, generator(1))
    assert torch.equal(shuffled.sort(0).values, rows.sort(0).values)
    assert not torch.equal(shuffled, rows)
    pictures = torch.rand((9, 1, 4, 4), generator=generator())
    made = strangers(pictures, generator(1), image=True)
    mixed = made["shuffled pixels"]
    assert torch.equal(mixed.flatten(1).sort(1).values, pictures.flatten(1).sort(1).values)
    assert all(m.shape == pictures.shape for m in made.values())


def test_uniform_noise_is_detected(model, dataset):
    found = detect(model, dataset.held_out, generator())["uniform noise"]
    assert isinstance(found, Estimate)
    assert found.value > 0.5


def test_rows_are_cut_at_random_without_repeats():
    rows = torch.arange(100.0).unsqueeze(1)
    some = cut(rows, generator(), most=30)
    assert len(some.unique()) == 30
    assert cut(rows, generator(), most=100) is rows
