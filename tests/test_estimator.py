"""The estimator: scikit-learn's own checks, a density that integrates to one, and a folder that brings it back."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import gibbsian
from gibbsian import EBM
from gibbsian.cli import main
from gibbsian.errors import GibbsianError, ModelFileError, OptionError

SMALL = {"steps": 10, "options": {"width": 8, "depth": 1, "sample_steps": 10}}


ANNEALED = ("check_fit_score_takes_y", "check_pipeline_consistency", "check_readonly_memmap_input")
"""Checks that score tables of several columns, whose log Z is annealed, or fit many times."""


def checks():
    for estimator, check in estimator_checks_generator(EBM(**SMALL, random_state=0)):
        name = getattr(check, "func", check).__name__
        yield pytest.param(estimator, check, id=name, marks=[pytest.mark.slow] if name in ANNEALED else [])


@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_scikit_learns_own_checks_pass(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    return np.column_stack([10 + 3 * x[:, 0], 0.5 * x[:, 0] ** 2 + 0.2 * x[:, 1]])


@pytest.fixture(scope="module")
def fitted(data):
    return EBM(steps=150, options={"width": 32, "sample_steps": 60}, random_state=0).fit(data)


def test_the_density_integrates_to_one_in_the_datas_units(fitted):
    xs, ys = np.linspace(-15, 35, 500), np.linspace(-6, 8, 500)
    grid = np.stack(np.meshgrid(xs, ys, indexing="ij"), -1).reshape(-1, 2)
    mass = np.exp(fitted.log_prob(grid)).sum() * (xs[1] - xs[0]) * (ys[1] - ys[0])
    assert mass == pytest.approx(1.0, abs=2e-3)


def test_the_fit_beats_a_gaussian(fitted, data):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 2))
    fresh = np.column_stack([10 + 3 * x[:, 0], 0.5 * x[:, 0] ** 2 + 0.2 * x[:, 1]])
    mean, covariance = data.mean(0), np.cov(data.T)
    d = fresh - mean
    quadratic = np.einsum("ni,ij,nj->n", d, np.linalg.inv(covariance), d)
    gaussian = -0.5 * quadratic - 0.5 * np.log(np.linalg.det(2 * np.pi * covariance))
    assert fitted.score(fresh) > gaussian.mean() + 0.2
    assert fitted.score(fresh) == pytest.approx(fitted.log_prob(fresh).mean())


def test_scores_decisions_and_labels_agree(fitted, data):
    score = fitted.score_samples(data)
    assert score.shape == (400,)
    np.testing.assert_allclose(fitted.log_prob(data), score - float(fitted.log_z().value))
    np.testing.assert_allclose(fitted.decision_function(data), score - fitted.offset_)
    labels = fitted.predict(data)
    assert set(labels) == {-1, 1}
    assert (labels == -1).mean() == pytest.approx(0.1, abs=0.005)
    assert (fitted.predict([[10.0, 60.0], [300.0, 1.0]]) == -1).all()


def test_log_z_comes_with_its_bracket_once(fitted):
    z = fitted.log_z()
    assert z is fitted.log_z()
    assert float(z.lower) <= float(z.value) <= float(z.upper)


def test_draws_look_like_the_data_and_follow_the_seed(fitted, data):
    a, b, c, d = (fitted.sample(300, random_state=s) for s in (1, 1, 2, np.random.RandomState(1)))
    assert a.shape == (300, 2)
    assert np.array_equal(a, b)
    assert np.array_equal(a, d)
    assert not np.array_equal(a, c)
    assert np.array_equal(fitted.sample(3), fitted.sample(3))
    # The model is rough after so few steps; draws in other units would be further off.
    assert np.abs(a.mean(0) - data.mean(0)).max() < 1.0
    assert np.abs(a.std(0) / data.std(0) - 1).max() < 0.5


def test_the_same_seed_gives_the_same_model(data):
    a, b, c = (EBM(**SMALL, random_state=s).fit(data) for s in (3, 3, 4))
    np.testing.assert_array_equal(a.score_samples(data), b.score_samples(data))
    assert not np.array_equal(a.score_samples(data), c.score_samples(data))
    assert EBM(**SMALL, random_state=np.random.RandomState(3)).fit(data).offset_ == a.offset_


def test_nothing_outside_is_touched(data):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    kept = data.copy()
    EBM(**SMALL, random_state=0).fit(data).sample(3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert np.array_equal(data, kept)


def test_a_saved_estimator_is_the_same_once_loaded(fitted, data, tmp_path):
    again = EBM.load(fitted.save(tmp_path / "model"))
    np.testing.assert_array_equal(again.score_samples(data), fitted.score_samples(data))
    np.testing.assert_array_equal(again.predict(data), fitted.predict(data))
    np.testing.assert_array_equal(again.sample(4), fitted.sample(4))
    assert again.log_z().value == fitted.log_z().value
    assert (again.offset_, again.contamination) == (fitted.offset_, fitted.contamination)
    assert {p.suffix for p in (tmp_path / "model").iterdir()} == {".safetensors", ".json"}
    with pytest.raises(ValueError, match="features"):
        again.predict(np.zeros((3, 5)))


def test_a_damaged_estimator_is_told_of(fitted, tmp_path):
    folder = fitted.save(tmp_path / "model")
    for content in ("{", "[]", "{}", '{"offset": "low", "contamination": 0.1}'):
        (folder / "estimator.json").write_text(content)
        with pytest.raises(ModelFileError, match=r"estimator\.json"):
            EBM.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ModelFileError, match="no folder"):
        EBM.load(folder)


def test_what_the_command_line_trained_can_be_loaded(tmp_path, data):
    np.save(tmp_path / "data.npy", data)
    words = [
        "train",
        tmp_path / "data.npy",
        "--steps",
        "3",
        "--width",
        "8",
        "--no-evaluation",
        "--out",
        tmp_path / "run",
    ]
    main([str(word) for word in words])
    ebm = EBM.load(tmp_path / "run")
    model = gibbsian.load_model(tmp_path / "run")
    np.testing.assert_allclose(
        ebm.score_samples(data), model.log_density(torch.tensor(data).float()).numpy(), rtol=1e-4
    )
    # No rows were called outliers in training, so none are.
    assert (ebm.predict(data) == 1).all()
    assert ebm.sample(2).shape == (2, 2)


def test_flattened_images_are_taken_by_their_shape():
    x = np.random.default_rng(0).random((60, 20)) * 16
    ebm = EBM(image_shape=(1, 4, 5), steps=3, options={"width": 8, "levels": 3}, random_state=0).fit(x)
    assert ebm.model_.recipe.kind == "image"
    assert ebm.model_.recipe.shape == (1, 4, 5)
    assert ebm.sample(3).shape == (3, 20)
    assert ebm.score_samples(x).shape == (60,)
    with pytest.raises(OptionError, match="image_shape"):
        EBM(image_shape=(1, 5, 5), **SMALL).fit(x)
    with pytest.raises(OptionError, match="image_shape"):
        EBM(image_shape=(4, 5), **SMALL).fit(x)


@pytest.mark.parametrize("objective", ["multi-level-denoising", "denoising", "pcd", "cd"])
def test_every_objective_fits(objective, data):
    options = {**SMALL["options"], "chain_steps": 2, "levels": 3}
    ebm = EBM(objective=objective, steps=3, options=options, random_state=0).fit(data)
    assert np.isfinite(ebm.score_samples(data)).all()
    assert np.isfinite(ebm.sample(3)).all()


def test_it_works_in_a_pipeline_a_search_and_as_a_clone(data):
    pipe = make_pipeline(StandardScaler(), EBM(**SMALL, random_state=0)).fit(data)
    assert pipe.predict(data).shape == (400,)
    assert np.isfinite(pipe.score(data))
    copy = clone(EBM(**SMALL, contamination=0.2))
    assert copy.get_params()["contamination"] == 0.2
    assert not hasattr(copy, "model_")
    search = GridSearchCV(EBM(**SMALL, random_state=0), {"learning_rate": [1e-3, 1e-2]}, cv=2).fit(data)
    assert search.best_params_["learning_rate"] in (1e-3, 1e-2)


def test_mistakes_are_told_of(data):
    for wrong, told in (
        ({"contamination": 0.0}, "contamination"),
        ({"contamination": 0.7}, "contamination"),
        ({"objective": "pdc"}, "'pcd'"),
        ({"options": {"widht": 3}}, "'width'"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(OptionError, match=told):
            EBM(**{**SMALL, **wrong}).fit(data)
    constant = np.column_stack([data[:, 0], np.full(400, 3.0)])
    with pytest.raises(GibbsianError, match="Constant"):
        EBM(**SMALL).fit(constant)
    assert json.dumps(EBM(**SMALL).get_params())
