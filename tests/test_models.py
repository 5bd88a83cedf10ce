"""Saved models: safetensors and JSON only, the same once loaded, and every damage named."""

from __future__ import annotations

import dataclasses
import json
import math
import pickletools
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from gibbsian import Gaussian, Model, fit, load_model, runs, save_model
from gibbsian.building import build_objective, initial_weights
from gibbsian.data.scaling import identity_scaling, range_scaling, standard_scaling
from gibbsian.errors import DivergenceError, GibbsianError, ModelFileError, OptionError
from gibbsian.families.base import resampled
from gibbsian.files import replace_file
from gibbsian.recipes import choose
from oracles import Z_LIMIT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def table(n=200):
    x = torch.randn((n, 2), generator=generator(1))
    return torch.stack((5 + 2 * x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]), 1)


def pictures(n=40):
    return torch.rand((n, 1, 6, 5), generator=generator(2)) * 255


CASES = {
    "noise-contrastive": ("table", {"objective": "noise-contrastive"}),
    "spectral": ("table", {"objective": "noise-contrastive", "spectral_norm": True}),
    "levels": ("table", {"objective": "multi-level-denoising", "levels": 4}),
    "pictures": ("image", {"levels": 4}),
    "convolutional": ("image", {"objective": "cd", "energy": "convolutional", "spectral_norm": True, "chain_steps": 2}),
    "residual": ("image", {"objective": "denoising", "energy": "residual"}),
}


def train(name, steps=4) -> Model:
    kind, options = CASES[name]
    rows = table() if kind == "table" else pictures()
    scaling = standard_scaling(rows) if kind == "table" else range_scaling(0.0, 255.0, (1, 6, 5))
    recipe = choose(kind, tuple(rows.shape[1:]), len(rows), {"width": 8, "steps": steps, "sample_steps": 10, **options})
    x = scaling.forward(rows)
    energy = initial_weights(recipe, x)
    fit(energy, x, build_objective(recipe, x, energy), rng=generator(3), settings=recipe.training)
    return Model(energy, recipe, scaling)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return train(request.param)


@pytest.fixture
def saved(tmp_path):
    return save_model(tmp_path / "model", train("noise-contrastive", steps=1))


def rows_of(model):
    return table() if model.recipe.kind == "table" else pictures()


def test_a_model_is_the_same_once_loaded(model, tmp_path):
    x = rows_of(model)
    again = load_model(save_model(tmp_path, model))
    assert again.recipe == model.recipe
    assert again.scaling == model.scaling
    assert torch.equal(again.energies(x), model.energies(x))
    assert torch.equal(again.draw(5, generator(4)), model.draw(5, generator(4)))
    # And once saved again, to the byte.
    save_model(tmp_path / "again", again)
    for name in ("model.safetensors", "recipe.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_saved_model_is_two_files_without_pickle(model, tmp_path):
    folder = save_model(tmp_path, model)
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "recipe.json"}
    json.loads((folder / "recipe.json").read_text())
    raw = (folder / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + header]).keys() >= model.energy.state_dict().keys()
    assert not zipfile.is_zipfile(folder / "model.safetensors")
    with pytest.raises(ValueError):
        list(pickletools.genops(raw))


def test_densities_are_in_the_datas_units(model):
    """Log p_X(x) = log p_Z(z) - sum of log scales."""
    x = rows_of(model)
    z = model.scaling.forward(x)
    size = math.prod(model.recipe.shape)
    scales = model.scaling.scale * (size if len(model.scaling.scale) == 1 else 1)
    expected = -model.density(z) - sum(math.log(s) for s in scales)
    assert torch.allclose(model.log_density(x), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(model.energies(x), model.density(z))


def test_draws_have_the_datas_shape_and_follow_the_generator(model):
    a, b, c = (model.draw(3, generator(s)) for s in (1, 1, 2))
    assert a.shape == (3, *model.recipe.shape)
    assert bool(torch.isfinite(a).all())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(OptionError, match="1 or more"):
        model.draw(0, generator())


@pytest.mark.parametrize("name", ["noise-contrastive", "levels"])
def test_the_density_integrates_to_one_in_data_units(name):
    model = train(name)
    log_z = float(model.log_z(generator()).value)
    low, high = model.scaling.backward(torch.tensor([[-9.0, -9.0], [9.0, 9.0]]))
    xs, ys = (torch.linspace(float(low[i]), float(high[i]), 400) for i in (0, 1))
    p = (model.log_density(torch.cartesian_prod(xs, ys)).double() - log_z).exp()
    assert float(p.sum() * (xs[1] - xs[0]) * (ys[1] - ys[0])) == pytest.approx(1.0, abs=2e-3)


def test_a_gaussian_model_draws_and_integrates_exactly():
    """With nothing learned an mlp with its base is that Gaussian: draws, chains and log Z are known."""
    recipe = choose("table", (3,), 100, {"objective": "denoising", "width": 4, "base_scale": 0.8, "sample_steps": 60})
    energy = initial_weights(recipe, torch.zeros(2, 3))
    for p in energy.parameters():
        p.data.zero_()
    model = Model(energy, recipe, identity_scaling((3,)))
    x = model.draw(2000, generator(1)).double()
    assert float((x.mean(0) / (0.8 / 2000**0.5)).abs().max()) < Z_LIMIT
    assert float(((x.std(0) / 0.8 - 1) * 4000**0.5).abs().max()) < Z_LIMIT
    z = model.log_z(generator(2), temperatures=5, chains=64)
    assert abs(float(z.value)) < 1e-4
    assert float(z.lower) <= 1e-4
    assert float(z.upper) >= -1e-4


def test_draws_of_noisy_data_lose_the_noise_again():
    """With nothing learned every image is the mean with noise, of which the mean is left."""
    recipe = choose("image", (1, 4, 4), 100, {"objective": "pcd", "width": 4, "sample_steps": 20})
    data = torch.rand(200, 1, 4, 4, generator=generator())
    energy = initial_weights(recipe, data)
    for p in energy.parameters():
        p.data.zero_()
    model = Model(energy, recipe, identity_scaling((1, 4, 4)))
    torch.testing.assert_close(model.draw(50, generator(1)), data.mean(0).expand(50, 1, 4, 4), atol=1e-4, rtol=1e-4)
    noisy = Model(energy, dataclasses.replace(recipe, denoise=False), model.scaling).draw(2000, generator(1))
    assert float((noisy - data.mean(0)).std()) == pytest.approx(recipe.data_noise, rel=0.02)


def test_resampling_finds_modes_in_their_proportions():
    """Draws of a wide base, resampled by their weights, have the masses of two narrow modes."""
    base = Gaussian(dim=1, scale=3.0)

    def energy(x):
        parts = torch.stack((math.log(0.2) - 2 * (x[:, 0] + 3) ** 2, math.log(0.8) - 2 * (x[:, 0] - 2) ** 2))
        return -torch.logsumexp(parts, 0)

    x = resampled(energy, base, 4000, generator(), candidates=32)
    # 4000 draws of 128 000 candidates, of which the effective part is at least a tenth.
    error = (0.2 * 0.8 / 4000 + 0.2 * 0.8 / 12_800) ** 0.5
    assert abs(float((x < 0).double().mean()) - 0.2) < Z_LIMIT * error
    with pytest.raises(DivergenceError, match="not finite"):
        resampled(lambda x: x[:, 0] * math.nan, base, 10, generator())


# What cannot be loaded.


def test_a_missing_file_is_named(saved):
    for name in ("model.safetensors", "recipe.json"):
        kept = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(ModelFileError, match=name):
            load_model(saved)
        (saved / name).write_bytes(kept)
    with pytest.raises(ModelFileError, match="no folder"):
        load_model(saved / "elsewhere")


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
def test_a_file_cut_anywhere_is_named(name, saved):
    """Also where it is cut to nothing, or to its last byte."""
    whole = (saved / name).read_bytes()
    for length in (0, 1, 7, 8, 9, 200, len(whole) // 2, len(whole) - 1):
        (saved / name).write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=name):
            load_model(saved)


def test_other_bytes_are_no_model(saved, tmp_path):
    """A pickle least of all: it is not opened as one."""
    torch.save({"a": torch.zeros(3)}, saved / "model.safetensors")
    with pytest.raises(ModelFileError, match="safetensors"):
        load_model(saved)


def test_weights_that_do_not_fit_are_named(saved):
    weights = load_file(saved / "model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 2)
    for changed, told in (
        ({**weights, name: torch.zeros(2, 2)}, r"\(2, 2\)"),
        ({k: v for k, v in weights.items() if k != name}, "missing"),
        ({**weights, "more": torch.zeros(1)}, "not part"),
    ):
        save_file(changed, saved / "model.safetensors")
        with pytest.raises(ModelFileError, match=told):
            load_model(saved)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("recipe", "version"), 2, "Upgrade"),
        (("recipe", "version"), "new", "version"),
        (("recipe", "width"), "wide", "recipe.json"),
        (("recipe", "shape"), 3, "do not fit"),
        (("recipe", "energy"), "huge", "huge"),
        (("recipe", "training", "steps"), -1, "steps"),
        (("recipe", "training", "invented"), 1, "invented"),
        (("scaling",), {}, "scaling"),
        (("scaling", "scale"), [0.0, 1.0], "scale"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_told_of(path, value, told, saved):
    content = json.loads((saved / "recipe.json").read_text())
    part = content
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    (saved / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=told):
        load_model(saved)


def test_a_failed_replacement_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"gibbsian.files.os.{name}", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="No space"):
                replace_file(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_cannot_be_saved_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GibbsianError, match="could not be saved"):
        save_model(tmp_path / "file", train("noise-contrastive", steps=1))


def test_black_and_white_are_the_datas_own():
    """A picture of draws is not stretched to the draws that happen to be in it."""
    recipe = choose("image", (1, 6, 5), 40, {"width": 4, "depth": 1, "levels": 3})
    model = Model(initial_weights(recipe, range_scaling(0.0, 255.0, (1, 6, 5)).forward(pictures())), recipe,
                  range_scaling(0.0, 255.0, (1, 6, 5)))  # fmt: skip
    assert model.value_range == (0.0, 255.0)
    recipe = choose("table", (2,), 200, {"objective": "noise-contrastive", "width": 4})
    scaling = standard_scaling(table())
    assert Model(initial_weights(recipe, scaling.forward(table())), recipe, scaling).value_range is None
    grey = torch.full((1, 1, 2, 2), 100.0)
    grid = runs._image_grid(grey, (0.0, 255.0))
    assert grid.getpixel((grid.width // 3, grid.height // 3)) == 100
