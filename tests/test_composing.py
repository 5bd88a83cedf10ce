"""Formulas of trained models: the density that is meant, in common units, its draws, and the command."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

import gibbsian as gb
from gibbsian.composing import Composite, composite, draw
from gibbsian.data.scaling import Scaling, identity_scaling
from gibbsian.energies.generators import WithGenerator
from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.expressions import parse
from gibbsian.models import Model
from gibbsian.recipes import Recipe
from test_cli import call, done, refused

F64 = torch.float64
LOCS = {"a": torch.tensor([1.0, 0.0], dtype=F64), "b": torch.tensor([-1.0, 2.0], dtype=F64)}
SCALES = {"a": torch.tensor([1.0, 2.0], dtype=F64), "b": torch.tensor([2.0, 1.5], dtype=F64)}
UNITS = {"a": Scaling((0.5, -1.0), (2.0, 0.5), (2,)), "b": Scaling((-0.3, 0.0), (1.0, 3.0), (2,))}
EXTRA = {"a": 4.0, "b": -2.0}
"""Constants that the energies carry, and that log Z takes back."""


def gaussian(name):
    """A model of a known Gaussian in data units, in model units of its own."""
    scaling = UNITS[name]
    offset, unit = (torch.tensor(v, dtype=F64) for v in (scaling.offset, scaling.scale))
    inside = gb.Gaussian(loc=(LOCS[name] - offset) / unit, scale=SCALES[name] / unit)
    energy = gb.Energy.of(lambda z: inside(z) - EXTRA[name], (2,))
    return Model(energy, Recipe(energy="mlp", objective="noise-contrastive"), scaling)


def of(formula, log_z=EXTRA):
    return Composite(parse(formula), {name: gaussian(name) for name in ("a", "b")}, log_z)


def data_energy(found, x):
    """The composed energy over data units, up to a constant."""
    return found.energy(found.first.scaling.forward(x))


POINTS = 3.0 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
A, B = (gb.Gaussian(loc=LOCS[name], scale=SCALES[name]) for name in ("a", "b"))
ASKED = {
    "a * b": A + B,
    "b * a": A + B,
    "a * not b^0.2": A - 0.2 * B,
    "a^2 * b": 2.0 * A + B,
    "0.3*a + 0.7*b": gb.mixture(A, B, weights=torch.tensor([0.3, 0.7], dtype=F64)),
    "(a + b) * a": gb.mixture(A, B, weights=torch.tensor([0.5, 0.5], dtype=F64)) + A,
    "(a + b)^0.5": 0.5 * gb.mixture(A, B, weights=torch.tensor([0.5, 0.5], dtype=F64)),
    "2*(a + b) + 2*a": gb.mixture(A, B, weights=torch.tensor([0.75, 0.25], dtype=F64)),
}


def spread(found, x):
    """How far two energies are from differing by a constant."""
    return float((found - x).std())


@pytest.mark.parametrize("formula", [*ASKED])
def test_a_formula_stands_for_its_density_in_common_units(formula):
    assert spread(data_energy(of(formula), POINTS), ASKED[formula](POINTS)) < 2e-6


def test_twins_without_common_units_or_log_z_are_caught():
    bare = of("a * b")
    twin = bare.models["a"].energy(UNITS["a"].forward(POINTS)) + bare.models["b"].energy(UNITS["a"].forward(POINTS))
    assert spread(twin, ASKED["a * b"](POINTS)) > 0.5
    heavy = of("0.3*a + 0.7*b", {"a": 0.0, "b": 0.0})
    assert spread(data_energy(heavy, POINTS), ASKED["0.3*a + 0.7*b"](POINTS)) > 0.5


def test_draws_of_a_product_are_those_of_the_product():
    drawn = draw(of("a * b"), 800, torch.Generator().manual_seed(0), particles=1600, steps=3)
    precision = SCALES["a"] ** -2 + SCALES["b"] ** -2
    mean = (LOCS["a"] / SCALES["a"] ** 2 + LOCS["b"] / SCALES["b"] ** 2) / precision
    # Six standard errors of independent draws; particles that share an ancestor have somewhat more.
    error = precision.rsqrt() / math.sqrt(800)
    assert ((drawn.rows.mean(0) - mean).abs() < 6 * error).all()
    assert ((drawn.rows.std(0) / precision.rsqrt() - 1.0).abs() < 6 / math.sqrt(1600)).all()
    assert [term.name for term in drawn.met.terms] == ["a", "b"]
    assert all(0.3 < term.met.value <= 1.0 for term in drawn.met.terms)
    assert "temperatures" in str(drawn)


def test_draws_of_a_negation_avoid_what_is_divided_by():
    plain = draw(of("a"), 500, torch.Generator().manual_seed(0), particles=1008)
    away = draw(of("a * not b^0.5"), 500, torch.Generator().manual_seed(0), particles=1008)
    own = gaussian("b")
    assert float(own.energies(away.rows).mean()) > float(own.energies(plain.rows).mean()) + 1.0
    assert away.met.terms[1].weight == -1.0


def test_a_mixture_asks_for_masses():
    with pytest.raises(OptionError, match="gibbsian evaluate b"):
        of("a + b", {"a": 0.0, "b": None}).energy  # noqa: B018
    with pytest.raises(OptionError, match="Mix models themselves"):
        of("a*b + a").energy  # noqa: B018
    of("a*b", {"a": None, "b": None}).energy  # noqa: B018


def test_counts_are_checked():
    with pytest.raises(OptionError, match="particles n or more"):
        draw(of("a"), 20, torch.Generator(), particles=10)
    with pytest.raises(OptionError, match="1 or more"):
        draw(of("a"), 0, torch.Generator())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs with noise levels, one without, one on bits, and one on other rows."""
    home = tmp_path_factory.mktemp("composed")
    rng = np.random.default_rng(0)
    quick = ("--steps", 30, "--width", 16, "--depth", 1, "--no-tensorboard", "--no-evaluation")
    for name, shift in (("left", -1.0), ("right", 1.0)):
        rows = rng.normal([shift, 0.0], 1.0, size=(200, 2))
        pd.DataFrame(rows, columns=["u", "v"]).to_csv(home / f"{name}.csv", index=False)
        long = ("--steps", 250, "--energy", "noise-conditional")
        done("train", home / f"{name}.csv", *quick[2:], *long, "--out", home / name)
    done("train", home / "left.csv", "--objective", "noise-contrastive", *quick, "--out", home / "plain")
    pd.DataFrame(rng.normal(size=(50, 3)), columns=["u", "v", "w"]).to_csv(home / "three.csv", index=False)
    done("train", home / "three.csv", *quick, "--out", home / "three")
    pd.DataFrame(rng.normal(size=(50, 2)), columns=["p", "q"]).to_csv(home / "named.csv", index=False)
    done("train", home / "named.csv", *quick, "--out", home / "named")
    rows = np.concatenate([rng.normal([shift, 0.0], 0.5, size=(100, 2)) for shift in (-2.0, 2.0)])
    colours = np.repeat(["red", "blue"], 100)
    pd.DataFrame(rows, columns=["u", "v"]).assign(colour=colours).to_csv(home / "classes.csv", index=False)
    asked = ("--conditional", "--labels", "colour", "--steps", 400)
    done("train", home / "classes.csv", *quick[2:], *asked, "--out", home / "classes")
    for name in ("bits", "pieces"):
        np.save(home / f"{name}.npy", (rng.uniform(size=(100, 6)) < 0.4).astype(np.int64))
        done("train", home / f"{name}.npy", *quick[:2], "--width", 4, *quick[6:], "--out", home / name)
    return home


SMALL = ("--n", 12, "--particles", 64, "--levels", 6, "--steps", 1)


def test_the_command_draws_a_product_down_the_levels(runs, tmp_path):
    out = done("compose", f"{runs}/left * {runs}/right", *SMALL, "--out", tmp_path / "draws.csv")
    assert "6 noise levels" in out
    assert "acceptance" in out
    assert f"{runs}/left" in out
    assert "12 draws of shape (2,)" in out
    table = pd.read_csv(tmp_path / "draws.csv")
    assert list(table.columns) == ["u", "v"]
    assert len(table) == 12
    again = tmp_path / "again.csv"
    done("compose", f"{runs}/left * {runs}/right", *SMALL, "--out", again)
    pd.testing.assert_frame_equal(pd.read_csv(again), table)


def test_the_command_mixes_negates_and_opens_windows(runs):
    for formula in (
        "0.5*{0}/left + 0.5*{0}/right",
        "{0}/left * not {0}/right^0.2",
        "{0}/left * {0}/right[sigma=0.5..]",
    ):
        assert "noise levels" in done("compose", formula.format(runs), *SMALL)


def test_particles_may_go_without_weights(runs):
    out = done("compose", f"{runs}/left * {runs}/right", *SMALL, "--weights", "no")
    assert "6 noise levels from" in out
    assert "particles effective" not in out
    assert "particles effective" in done("compose", f"{runs}/left * {runs}/right", *SMALL, "--weights", "yes")


def test_labels_are_composed(runs, tmp_path):
    # One class, both in equal shares, and all but one.
    more = ("--n", 200, "--particles", 400, "--levels", 12, "--steps", 2)
    for formula, low, high in (
        ("{0}/classes[y=blue]", 0.75, 1.0),
        ("0.5*{0}/classes[y=red] + 0.5*{0}/classes[y=blue]", 0.35, 0.65),
        ("{0}/classes * not {0}/classes[y=blue]^0.7", 0.0, 0.3),
    ):
        done("compose", formula.format(runs), *more, "--out", tmp_path / "draws.csv")
        right = float((pd.read_csv(tmp_path / "draws.csv")["u"] > 0.0).mean())
        assert low <= right <= high, (formula, right)


def test_a_model_without_levels_leads_along_temperatures(runs):
    assert "temperatures" in done("compose", f"{runs}/left * {runs}/plain", *SMALL)


def test_bits_are_composed(runs, tmp_path):
    done("compose", f"{runs}/bits * {runs}/pieces", *SMALL, "--out", tmp_path / "bits.npy")
    assert set(np.unique(np.load(tmp_path / "bits.npy"))) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("formula", "told"),
    [
        ("{0}/left * {0}/three", "of one kind of row"),
        ("{0}/left * {0}/bits", "of one kind of row"),
        ("{0}/left * {0}/named", "columns"),
        ("{0}/left * {0}/nowhere", "nowhere"),
        ("{0}/left ** {0}/right", "Cannot read the formula"),
        ("{0}/left[y=3]", "without labels"),
        ("{0}/classes[y=green]", "green"),
        ("{0}/plain[sigma=1..2]", "not every model"),
    ],
)
def test_what_cannot_be_composed_is_told(runs, formula, told):
    assert told in refused("compose", formula.format(runs), *SMALL)


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_negation_that_is_not_normalisable_is_told(runs):
    # It is warned of, whether or not the walk then comes to an end.
    told = call("compose", f"{runs}/left * not {runs}/right^1.5", *SMALL)[2]
    assert "warning:" in told
    assert "not normalisable" in told


def test_endings_are_checked_before_anything_is_drawn(runs, tmp_path):
    assert ".csv" in refused("compose", f"{runs}/left", *SMALL, "--out", tmp_path / "draws.txt")


def test_models_are_loaded_once_and_in_order(runs):
    found = composite(f"{runs}/left * {runs}/right * {runs}/left^0.5")
    assert [*found.models] == [f"{runs}/left", f"{runs}/right"]
    with pytest.raises(DataError, match="columns"):
        composite(f"{runs}/left * {runs}/named")
    with pytest.raises(ShapeError, match="one kind"):
        composite(f"{runs}/left * {runs}/three")


def test_units_of_one_model_are_its_own():
    assert of("a").unit(gaussian("a")) == pytest.approx(1.0)
    assert of("a").unit(Model(gb.Gaussian(2), Recipe(energy="mlp", objective="pcd"), identity_scaling((2,)))) == (
        pytest.approx(1.0)
    )


def test_a_discriminator_is_no_density_to_compose():
    generator = gb.GeneratorNetwork(gb.Dense(2, 2, (4,)), 2, 2)
    gan = Model(WithGenerator(gb.MLP(2, (4,)), generator), Recipe(energy="gan", objective="adversarial"), UNITS["a"])
    found = Composite(parse("a * b"), {"a": gaussian("a"), "b": gan}, EXTRA)
    with pytest.raises(OptionError, match="b is a gan, whose discriminator is no density"):
        data_energy(found, POINTS)
