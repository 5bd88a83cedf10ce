"""Recipes: chosen from the data, overridden by name, and the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
import torch

from gibbsian import (
    MALA,
    ULA,
    Gaussian,
    Model,
    NoiseConditional,
    Recipe,
    TrainingSettings,
    fit,
    load,
    quadrature,
    sample,
)
from gibbsian.building import build_energy, build_objective, family_of, initial_weights
from gibbsian.energies.unet import NoiseConditionalUNet
from gibbsian.errors import GibbsianError, ModelFileError, OptionError
from gibbsian.families.levels import build_annealing
from gibbsian.families.networks import TAIL, build_base, build_kernel, build_noise, exact_noise
from gibbsian.objectives.base import Batch
from gibbsian.recipes import VERSION, ObjectiveName, choose

DATA = [("table", (1,), 50), ("table", (3,), 6000), ("table", (12,), 500), ("image", (1, 8, 8), 1000)]
OBJECTIVES = [name for name in get_args(ObjectiveName) if name != "exact-likelihood"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kind", "shape", "rows"), DATA)
@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_every_choice_can_be_built_and_gives_a_loss_with_gradients(kind, shape, rows, objective):
    small = {"width": 8, "chain_steps": 2, "buffer_size": 64}
    recipe = choose(kind, shape, rows, small | ({} if objective is None else {"objective": objective}))
    x = torch.randn((16, *shape), generator=generator())
    energy = initial_weights(recipe, x)
    assert tuple(energy.event_shape) == shape
    loss = build_objective(recipe, x, energy)(energy, Batch(x), generator(1)).value
    assert bool(torch.isfinite(loss))
    grads = torch.autograd.grad(loss, list(energy.parameters()), allow_unused=True)
    assert any(g is not None and bool((g != 0).any()) for g in grads)


@pytest.mark.parametrize(("kind", "shape", "rows"), DATA)
@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_a_recipe_is_the_same_after_a_trip_through_json(kind, shape, rows, objective):
    recipe = choose(kind, shape, rows, {"seed": 7} | ({} if objective is None else {"objective": objective}))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_exact_likelihood_is_for_one_or_two_columns():
    x = torch.randn((16, 2), generator=generator())
    recipe = choose("table", (2,), 100, {"objective": "exact-likelihood", "width": 8})
    energy = initial_weights(recipe, x)
    assert bool(torch.isfinite(build_objective(recipe, x, energy)(energy, Batch(x), generator(1)).value))
    with pytest.raises(OptionError, match="exact-likelihood is for tables of one or two columns"):
        choose("table", (3,), 100, {"objective": "exact-likelihood"})


def test_every_field_says_what_it_is():
    for kind in (Recipe, TrainingSettings):
        for field in dataclasses.fields(kind):
            assert field.name in ("training", "version") or field.metadata.get("help"), field.name


def test_small_tables_are_contrasted_with_noise_and_the_rest_is_denoised():
    assert choose("table", (2,), 100).objective == "noise-contrastive"
    assert choose("table", (20,), 100).objective == "multi-level-denoising"
    assert choose("image", (1, 8, 8), 100).objective == "multi-level-denoising"
    assert choose("image", (1, 8, 8), 100, {"energy": "residual"}).objective == "pcd"
    assert choose("table", (2,), 100, {"energy": "noise-conditional"}).objective == "multi-level-denoising"
    assert choose("image", (1, 8, 8), 100, {"energy": "unet"}).objective == "multi-level-denoising"


def test_a_unet_is_for_images_that_can_be_halved_twice():
    recipe = choose("image", (1, 28, 28), 60_000, {"energy": "unet"})
    energy = initial_weights(recipe, torch.randn((9, 1, 28, 28), generator=generator()))
    assert isinstance(energy, NoiseConditionalUNet)
    assert (energy.width, energy.gain, energy.fade) == (32, 1.0, 1.0)
    assert float(energy.scale) != 1.0, "not calibrated"
    for kind, shape in (("image", (1, 10, 8)), ("table", (16,))):
        with pytest.raises(OptionError, match="multiples of 4"):
            choose(kind, shape, 100, {"energy": "unet"})


def test_the_noise_of_tables_has_a_wide_part_and_stays_normalised():
    recipe = choose("table", (2,), 1000, {})
    noise = build_noise(recipe)
    x = noise.sample(100_000, generator())
    expected = recipe.base_scale**2 * (1.0 + recipe.noise_tail * (TAIL**2 - 1.0))
    assert float(x.var(0).mean()) == pytest.approx(expected, rel=0.03)
    assert float(quadrature(noise, -25.0, 25.0, points=200).log_z.value) == pytest.approx(0.0, abs=1e-4)
    assert isinstance(build_noise(dataclasses.replace(recipe, noise_tail=0.0)), Gaussian)
    assert isinstance(build_noise(choose("image", (1, 8, 8), 1000, {"objective": "noise-contrastive"})), Gaussian)
    with pytest.raises(OptionError, match=r"noise_tail is a part.*got 1\.0"):
        choose("table", (2,), 1000, {"noise_tail": 1.0})


def distance_to_truth(name, **overrides):
    """Total variation between the density that the recipe fits to a toy set and the set's own, by quadrature."""
    dataset = load(name)
    z = dataset.scaling().forward(dataset.train)
    recipe = choose(dataset.kind, dataset.event_shape, len(z), overrides)
    energy = initial_weights(recipe, z)
    fit(energy, z, build_objective(recipe, z, energy), rng=generator(), settings=recipe.training)
    model = Model(energy, recipe, dataset.scaling())
    grid = model.grid()
    x = model.scaling.backward(torch.cartesian_prod(*grid.axes).float())
    truth = -dataset.truth(x) - getattr(dataset.truth, "log_z", 0.0) - model.scaling.log_det
    cell = float(torch.stack([axis[1] - axis[0] for axis in grid.axes]).prod())
    return 0.5 * cell * float((grid.log_prob.exp().flatten() - truth.exp()).abs().sum())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("two-moons", 0.1), ("eight-gaussians", 0.1), ("banana", 0.25)])
def test_the_default_recipe_fits_densities_in_the_plane(name, limit):
    assert distance_to_truth(name) < limit


@pytest.mark.slow
def test_noise_without_a_wide_part_loses_the_bananas_tails():
    assert distance_to_truth("banana", noise_tail=0.0) > 0.5


def test_the_base_of_images_by_persistent_chains_is_their_mean_with_noise():
    recipe = choose("image", (1, 8, 8), 1000, {"objective": "pcd", "width": 4})
    data = torch.rand(300, 1, 8, 8, generator=generator())
    base = build_base(recipe, data)
    torch.testing.assert_close(base.loc, data.mean(0))
    assert bool((base.scale == recipe.data_noise).all())
    energy, empty = initial_weights(recipe, data), build_energy(recipe)
    objective = build_objective(recipe, data, energy)
    torch.testing.assert_close(objective.base.loc, data.mean(0))
    # An energy is built without data to load a saved one into it.
    empty.load_state_dict(energy.state_dict())
    torch.testing.assert_close(family_of(recipe)(empty, recipe).base.loc, data.mean(0))
    assert choose("image", (1, 8, 8), 1000, {"objective": "pcd", "energy": "residual"}).width == 32
    with pytest.raises(OptionError, match="set data_noise, or base_fitted=False"):
        choose("image", (1, 8, 8), 1000, {"objective": "pcd", "data_noise": 0.0})


@pytest.mark.parametrize("part", [0.1, 0.5, 1.9])
def test_the_noise_of_a_langevin_step_keeps_a_gaussian_as_it_is(part):
    sigma = 0.5
    kernel = ULA(part * sigma**2, exact_noise(part * sigma**2, sigma))
    x = sigma * torch.randn(400, 50, generator=generator(1))
    moved = sample(Gaussian(50, scale=sigma), kernel, x, steps=50, rng=generator(2)).x
    # 20,000 numbers know their variance to 1 per cent.
    assert float(moved.var()) == pytest.approx(sigma**2, rel=0.04)
    plain = sample(Gaussian(50, scale=sigma), ULA(part * sigma**2), x, steps=50, rng=generator(2)).x
    assert float(plain.var()) > sigma**2 * (1.0 + 0.3 * part)
    assert exact_noise(0.1, 0.0) is None
    with pytest.raises(OptionError, match=r"twice the square of data_noise, 0\.5; got 0\.5"):
        exact_noise(0.5, 0.5)


def test_overrides_win_wherever_they_live():
    recipe = choose("table", (2,), 100, {"width": 7, "steps": 11, "betas": (0.5, 0.6), "seed": 3, "kernel": "ula"})
    assert (recipe.width, recipe.training.steps, recipe.training.betas, recipe.seed) == (7, 11, (0.5, 0.6), 3)
    assert isinstance(build_kernel(recipe), ULA)
    assert isinstance(build_kernel(dataclasses.replace(recipe, kernel="mala", step_size=0.3)), MALA)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"objective": "pdc"}, "'pcd'"),
        ({"energy": "mpl"}, "'mlp'"),
        ({"kernel": "hmcc"}, "'hmc'"),
        ({"widht": 3}, "'width'"),
        ({"stepss": 3}, "'steps'"),
        ({"energy": "mlp", "objective": "multi-level-denoising"}, "fitted by"),
        ({"energy": "convolutional"}, "images"),
        ({"objective": "multi-level-denoising", "sigma_density": 0.01}, "sigma_min"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(options, told):
    with pytest.raises(OptionError, match=told):
        choose("table", (2,), 100, options)


def test_bits_get_a_restricted_boltzmann_machine():
    recipe = choose("binary", (5,), 100)
    assert (recipe.energy, recipe.objective, recipe.kernel, recipe.visible) == ("rbm", "pcd", "gibbs", "bernoulli")
    with pytest.raises(OptionError, match=r"fitted by an rbm, not by the mlp energy.*--kind table"):
        choose("binary", (5,), 100, {"energy": "mlp"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": VERSION + 1}, "Upgrade"),
        ({"version": None}, "version"),
        ({"invented": 1}, "invented"),
        ({"training": {"invented": 1}}, "invented"),
        ({"training": None}, "recipe"),
    ],
)
def test_a_saved_recipe_that_is_not_ours_is_refused(changes, told):
    with pytest.raises(ModelFileError, match=told):
        Recipe.from_dict(choose("table", (2,), 100).to_dict() | changes)


def test_weights_come_from_the_seed_alone():
    x = torch.randn((20, 2), generator=generator())
    state = torch.get_rng_state()
    made = [initial_weights(choose("table", (2,), 100, {"seed": s}), x).state_dict() for s in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(made[0].values(), made[1].values()))
    assert any(not torch.equal(a, b) for a, b in zip(made[0].values(), made[2].values()))


def test_the_energy_contains_the_base_where_it_has_no_levels():
    recipe = choose("table", (2,), 100, {"base_scale": 0.7})
    energy = build_energy(recipe)
    x = torch.randn((9, 2), generator=generator())
    net, base = (term for _, term in energy.terms)
    assert torch.allclose(energy(x), net(x) + build_base(recipe)(x))
    assert float(base.sample(20_000, generator(1)).std()) == pytest.approx(0.7, rel=0.03)


def test_a_noise_conditional_energy_is_calibrated_to_the_data():
    x = 4 + 0.1 * torch.randn((50, 12), generator=generator())
    energy = initial_weights(choose("table", (12,), 50), x)
    assert isinstance(energy, NoiseConditional)
    assert torch.allclose(energy.mean, x.mean(0))


def test_the_walk_down_goes_from_level_to_level_of_the_recipe():
    recipe = choose("image", (1, 8, 8), 100, {"levels": 5, "corrector_steps": 3, "sigma_max": 6.0})
    annealing = build_annealing(recipe)
    assert (annealing.levels, annealing.corrector_steps) == (5, 3)
    assert annealing.sigmas()[0] == pytest.approx(6.0)
    assert annealing.sigmas()[-1] == pytest.approx(recipe.sigma_min)


def test_messages_are_the_librarys_own():
    with pytest.raises(GibbsianError):
        Recipe(objective="x")  # pyright: ignore
