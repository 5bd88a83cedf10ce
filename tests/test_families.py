"""Models of several networks by recipe: trained, saved, drawn from, scored and evaluated like every other."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from gibbsian import Batch, Model, fit, load_model, save_model
from gibbsian.building import build_objective, initial_weights
from gibbsian.cli import main
from gibbsian.data.scaling import identity_scaling, range_scaling, standard_scaling
from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork, WithGenerator
from gibbsian.energies.networks import Dense
from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.families.flows import grey_noise
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.parts import OfPart
from gibbsian.recipes import choose

SMALL = {
    "width": 4,
    "depth": 1,
    "latent": 2,
    "generator_width": 4,
    "chain_steps": 2,
    "buffer_size": 64,
    "batch_size": 32,
    "sample_steps": 5,
    "steps": 4,
}
FAMILIES = ("flow", "tilted-flow", "cooperative", "gan", "vae", "vae-ebm", "latent-ebm")
CASES = [(name, kind) for name in FAMILIES for kind in ("table", "image")] + [
    ("vae", "binary"),
    ("latent-ebm", "binary"),
]


@pytest.fixture(autouse=True)
def flows_need_zuko(request):
    """Skip what builds a flow where its package is not installed."""
    if "flow" in request.node.name:
        pytest.importorskip("zuko")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(kind, n=120):
    if kind == "table":
        x = torch.randn((n, 3), generator=generator(1))
        return torch.stack((5 + 2 * x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1], x[:, 2]), 1)
    if kind == "binary":
        return (torch.rand((n, 6), generator=generator(1)) < 0.3).float()
    x = torch.randint(0, 17, (n, 1, 8, 8), generator=generator(2)).float()
    x[:, :, :, 0] = 0.0  # an edge that is always black
    return x


def train(name, kind, **options) -> Model:
    rows = rows_of(kind)
    scaling = {
        "table": lambda: standard_scaling(rows),
        "image": lambda: range_scaling(0.0, 16.0, (1, 8, 8)),
        "binary": lambda: identity_scaling((6,)),
    }[kind]()
    recipe = choose(kind, tuple(rows.shape[1:]), len(rows), SMALL | {"energy": name} | options)
    x = scaling.forward(rows)
    energy = initial_weights(recipe, x)
    fit(energy, x, build_objective(recipe, x, energy), rng=generator(3), settings=recipe.training)
    return Model(energy, recipe, scaling)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_of_several_networks_is_trained_saved_drawn_from_and_scored(name, kind, tmp_path):
    model = train(name, kind)
    again = load_model(save_model(tmp_path, model))
    rows = rows_of(kind, 20)
    assert torch.equal(again.energies(rows), model.energies(rows))
    x = model.draw(5, generator(4))
    assert x.shape == (5, *rows.shape[1:])
    assert bool(torch.isfinite(x).all())
    assert torch.equal(again.draw(5, generator(4)), x)
    if kind == "binary":
        assert set(x.unique().tolist()) <= {0.0, 1.0}
    if name == "gan":
        with pytest.raises(OptionError, match="no log Z"):
            model.log_z(generator())
        return
    found = model.log_z(generator(5), temperatures=8, chains=16)
    assert math.isfinite(float(found.value))
    assert float(found.lower) <= float(found.value) + 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_both_networks_learn_and_in_turn(name):
    rows = standard_scaling(rows_of("table")).forward(rows_of("table"))
    recipe = choose("table", (3,), 120, SMALL | {"energy": name, "steps": 20, "first_phase": 0.5})
    energy = initial_weights(recipe, rows)
    objective = build_objective(recipe, rows, energy)
    before = {k: p.detach().clone() for k, p in energy.named_parameters()}

    def learned(steps):
        fit(energy, rows, objective, rng=generator(1), settings=dataclasses.replace(recipe.training, steps=steps))
        moved = {k for k, p in energy.named_parameters() if not torch.equal(p, before[k])}
        before.update({k: p.detach().clone() for k, p in energy.named_parameters()})
        return moved

    first = {k.split(".")[0] for k in learned(10)}
    second = {k.split(".")[0] for k in learned(5)}
    parts = {"tilted-flow": ({"base"}, {"net"}), "vae-ebm": ({"vae"}, {"correction"})}
    parts["latent-ebm"] = ({"vae"}, {"vae", "net"})
    parts["gan"] = ({"energy", "generator"}, {"energy"})
    if name in parts:
        assert (first, second) == parts[name]
    else:
        everything = {k.split(".")[0] for k, p in energy.named_parameters()}
        assert first == second == everything


def test_a_flow_of_grey_values_is_one_of_their_cells():
    """With a step of w the noisy values' density times w^d is a probability: uniform ones have log P = -log 17 each."""
    rows = rows_of("image", 400)
    scaling = range_scaling(0.0, 16.0, (1, 8, 8))
    z = scaling.forward(rows)
    assert grey_noise(z).width == pytest.approx(2.0 / 16.0)
    assert grey_noise(torch.randn(50, 1, 8, 8)) is None
    assert grey_noise(torch.zeros(50, 1, 8, 8)) is None
    assert grey_noise(torch.zeros(50, 3)) is None
    model = train("flow", "image")
    blurred, told = model.family.blurred(z, generator())
    assert "uniform noise" in told
    assert float((blurred - z).abs().max()) <= 1.0 / 16.0 + 1e-6
    assert float((blurred - z).std()) == pytest.approx(2.0 / 16.0 / 12**0.5, rel=0.02)


def test_a_cooperative_energy_of_images_is_one_of_rows_with_noise():
    """Its chains and base have the noise that draws lose again, so that the data must have it in training."""
    recipe = choose("image", (1, 8, 8), 400, SMALL | {"energy": "cooperative"})
    assert recipe.data_noise
    x = torch.full((64, 1, 8, 8), 5.0)
    energy = initial_weights(recipe, x)
    seen = []
    energy.energy.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    build_objective(recipe, x, energy)(energy, Batch(x), generator())
    # Rows of data are those about 5; the spread of their 4096 numbers is known to 1%.
    rows = torch.cat([points[points.flatten(1).mean(1) > 4.0] for points in seen])
    assert len(rows) == 64
    assert float(rows.std()) == pytest.approx(recipe.data_noise, rel=0.05)


class Pair(Energy):
    def __init__(self):
        super().__init__()
        self.one, self.two = MLP(2, (4,)), MLP(2, (4,))

    def forward(self, x):
        return self.one(x) + self.two(x) + Gaussian(2)(x)


def test_a_part_learns_and_what_is_held_does_not():
    energy = Pair()
    x = Batch(torch.randn(32, 2, generator=generator()))
    objective = OfPart(ExactLikelihood(-4.0, 4.0), held="one")
    objective(energy, x, generator()).value.backward()
    assert all(p.grad is None for p in energy.one.parameters())
    assert all(p.grad is not None for p in energy.two.parameters())
    assert all(p.requires_grad for p in energy.parameters())
    with pytest.raises(OptionError, match="no part 'three'"):
        OfPart(ExactLikelihood(), "three")(energy, x, generator())
    with pytest.raises(OptionError, match="is no energy"):
        OfPart(ExactLikelihood(), "one.net")(energy, x, generator())
    with pytest.raises(ArgumentTypeError, match="objective"):
        OfPart(energy)


def test_an_energy_with_its_generator_is_that_energy():
    inner = MLP(2, (4,)) + Gaussian(2)
    both = WithGenerator(inner, GeneratorNetwork(Dense(3, 2), 2, 3))
    x = torch.randn(5, 2)
    assert torch.equal(both(x), inner(x))
    with pytest.raises(ShapeError, match="makes points of shape"):
        WithGenerator(inner, GeneratorNetwork(Dense(3, 4), 4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": "flow", "objective": "pcd"}, "fitted by maximum-likelihood, not by pcd"),
        ({"energy": "vae", "latent": 0}, "latent counts numbers, 1 or more; got 0"),
        ({"energy": "tilted-flow", "first_phase": 1.0}, "between 0 and 1"),
        ({"energy": "vae", "decoder_scale": 0.0}, "decoder_scale is positive"),
        ({"energy": "cooperative", "kernel": "gibbs"}, "moves the chains of an rbm"),
    ],
)
def test_recipes_that_fit_nothing_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        choose("table", (3,), 100, options)


def test_bits_are_for_models_of_bits():
    with pytest.raises(OptionError, match="modelled by rbm, vae, latent-ebm, not by flow"):
        choose("binary", (6,), 100, {"energy": "flow"})
    with pytest.raises(OptionError, match="modelled by"):
        choose("binary", (6,), 100, {"energy": "gan"})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_line_trains_and_reports(name, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", "two-moons", "--model", name, "--steps", "20", "--sample-steps", "5", "--out", str(folder)]
    main([*words, "--batch-size", "64", "--chain-steps", "2", "--buffer-size", "128"])
    assert "saved" in capsys.readouterr().out.lower() or (folder / "report.html").exists()
    saved = json.loads((folder / "evaluation.json").read_text())
    assert (saved["log_z"] is None) == (name == "gan")
    assert (folder / "report.html").stat().st_size > 10_000
