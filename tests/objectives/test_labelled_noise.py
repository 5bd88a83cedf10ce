"""Noise-conditional energies with labels: a density for each class and one of all, from one network.

The mixture of three Gaussians in the plane has known classes, of unequal shares, and densities at every noise level.
"""

from __future__ import annotations

import math

import pytest
import torch

import gibbsian as gb
from gibbsian.energies.labels import LabelEmbedding
from gibbsian.energies.noise import NoiseConditionalEnergy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.objectives.base import Batch
from oracles import double_precision

MEANS = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, -1.2]])
SPREADS = torch.tensor([0.5, 0.4, 0.6])
SHARES = torch.tensor([0.5, 0.3, 0.2])
NONE, ROWS, SIGMA, BOX = 3, 4000, 0.3, 6.0


def rows():
    rng = torch.Generator().manual_seed(0)
    y = torch.multinomial(SHARES, ROWS, replacement=True, generator=rng)
    return Batch(MEANS[y] + SPREADS[y][:, None] * torch.randn((ROWS, 2), generator=rng), {"y": y})


def trained(steps=700):
    data, rng = rows(), torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = gb.NoiseConditional(2, width=48, blocks=2, gain=0.0, classes=NONE + 1).calibrate(data.x)
    levels = gb.MultiLevelDenoising(gb.LogNormal(-0.5, 1.0, 0.1, 8.0), level_weight=0.3)
    objective = gb.LabelDropping(levels, none=NONE, probability=0.25)
    gb.fit(energy, data, objective, rng=rng, steps=steps, batch_size=256, learning_rate=4e-3, warmup_steps=50,
           final_learning_rate_factor=0.0, ema_decay=0.98)  # fmt: skip
    return energy


@pytest.fixture(scope="module")
def energy():
    return trained()


def grid_of(energy, label):
    found = gb.quadrature(energy.given(sigma=SIGMA, y=label), -BOX, BOX, 160)
    xs = torch.linspace(-BOX, BOX, 161)
    return xs, found.log_prob.exp(), found.log_z


def check_classes(energy):
    """Means and spreads of each class's density lie within 5 standard errors of its rows', and 0.05 for the fit."""
    y = rows().context["y"]
    for label in range(3):
        xs, p, _ = grid_of(energy, label)
        weight = p / p.sum()
        mean = torch.stack(((weight.sum(1) * xs).sum(), (weight.sum(0) * xs).sum()))
        n, spread = int((y == label).sum()), float((SPREADS[label] ** 2 + SIGMA**2).sqrt())
        off = (mean - MEANS[label]).abs().max()
        assert off < 5 * spread / math.sqrt(n) + 0.05, f"class {label}: the mean is off by {off}"
        across = (weight.sum(1) * (xs - mean[0]).square()).sum().sqrt()
        assert abs(float(across) / spread - 1.0) < 5 / math.sqrt(2 * n) + 0.05, f"class {label}: the spread is off"


def check_none(energy):
    """Given the label for none, the density is the mixture's: 0.06 in total variation."""
    xs, p, _ = grid_of(energy, NONE)
    at = torch.cartesian_prod(xs, xs)
    variance = SPREADS**2 + SIGMA**2
    exponents = -(at[:, None] - MEANS).square().sum(2) / (2 * variance) - (2 * math.pi * variance).log()
    exact = (exponents.exp() * SHARES).sum(1).reshape(p.shape)
    cell = float(xs[1] - xs[0]) ** 2
    distance = 0.5 * float((p - exact).abs().sum()) * cell
    assert distance < 0.06, f"total variation {distance}"


def test_each_class_has_its_own_density(energy):
    check_classes(energy)


def test_the_unconditional_branch_is_the_mixture(energy):
    check_none(energy)


def test_levels_keep_the_constant_of_each_label(energy):
    """Each label has a constant of its own, which the loss does not see; the dual term keeps it from level to level."""
    for label in range(4):
        top = gb.quadrature(energy.given(sigma=8.0, y=label), -50.0, 50.0, 160).log_z.value
        assert abs(float(grid_of(energy, label)[2].value - top)) < 0.25


def test_rows_are_classified_by_their_energies(energy):
    """As often right as Bayes' rule with equal shares, but for 5 standard errors."""
    rng = torch.Generator().manual_seed(5)
    y = torch.multinomial(torch.ones(3), 2000, replacement=True, generator=rng)
    x = MEANS[y] + (SPREADS[y] ** 2 + SIGMA**2).sqrt()[:, None] * torch.randn((2000, 2), generator=rng)
    with torch.no_grad():
        branches = [(energy.given(sigma=SIGMA, y=label), grid_of(energy, label)[2].value) for label in range(3)]
        energies = torch.stack([branch(x) + log_z for branch, log_z in branches], 1)
    variance = SPREADS**2 + SIGMA**2
    exact = (x[:, None] - MEANS).square().sum(2) / (2 * variance) + variance.log()
    right = [float((e.argmin(1) == y).double().mean()) for e in (energies, exact)]
    assert right[1] > 0.9
    assert right[1] - right[0] < 5 * (right[1] * (1 - right[1]) / 2000) ** 0.5


def test_a_twin_that_ignores_labels_is_caught(monkeypatch):
    real = NoiseConditionalEnergy._label
    monkeypatch.setattr(NoiseConditionalEnergy, "_label", lambda self, y: real(self, torch.full_like(y, NONE)))
    energy = trained(300)
    with pytest.raises(AssertionError, match="class 0"):
        check_classes(energy)


def test_a_twin_whose_labels_are_never_dropped_is_caught(monkeypatch):
    monkeypatch.setattr(gb.LabelDropping, "forward", lambda self, *a: self.objective(*a))
    energy = trained(300)
    with pytest.raises(AssertionError, match="total variation"):
        check_none(energy)


@pytest.mark.parametrize("make", [
    lambda **k: gb.NoiseConditional((1, 8, 8), width=12, blocks=2, local=2, **k),
    lambda **k: gb.NoiseConditionalUNet((1, 8, 8), width=8, **k),
])  # fmt: skip
def test_both_networks_take_labels(make):
    with double_precision(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labelled, plain = make(classes=4), make()
    assert (labelled.context, plain.context) == (("sigma", "y"), ("sigma",))
    assert (labelled.classes, plain.classes) == (4, None)
    assert not [name for name in plain.state_dict() if name.startswith("labels")]
    assert "classes=4" in repr(labelled)
    rng = torch.Generator().manual_seed(2)
    x = torch.randn((6, 1, 8, 8), generator=rng, dtype=torch.float64)
    sigma, y = torch.full((6,), 0.3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    together = labelled(x, sigma, y)
    for i in range(6):
        alone = labelled(x[i : i + 1], sigma[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(together[i], labelled.given(y=y[i], sigma=0.3)(x)[i], rtol=1e-6, atol=1e-6)
    again = labelled(x[:1].expand(4, -1, -1, -1), sigma[:4], torch.arange(4))
    assert len(again.unique()) == 4
    # The Gaussian at the top is the same for every label.
    high = torch.full((4,), 1e6, dtype=torch.float64)
    far = 1e6 * torch.randn((1, 1, 8, 8), generator=rng, dtype=torch.float64).expand(4, -1, -1, -1)
    with torch.no_grad():
        last = getattr(labelled, "unet", labelled).leave
        last.weight.zero_()
        last.bias.zero_()
        for p in labelled.terms.parameters() if hasattr(labelled, "terms") else ():
            p.zero_()
    torch.testing.assert_close(labelled(far, high, torch.arange(4)), labelled.base(1e6)(far), rtol=1e-9, atol=1e-9)


def test_an_energy_with_labels_is_one_graph():
    energy = gb.NoiseConditional((3,), width=12, blocks=1, classes=3)
    x, sigma, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.full((6,), 0.3), torch.arange(6)
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, sigma, y % 3), energy(x, sigma, y % 3))


def test_an_energy_without_labels_is_what_it_was():
    """Numbers of the networks as they were before they took labels, at one seed."""
    for make, expected in (
        (lambda: gb.NoiseConditional(3, width=16, blocks=2, frequencies=2, local=3), OLD[0]),
        (lambda: gb.NoiseConditionalUNet((1, 8, 8), width=8), OLD[1]),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            energy = make()
        count = math.prod(energy.shape)
        x = torch.linspace(-1.0, 1.0, 2 * count).reshape(2, *energy.shape)
        found = energy(x, torch.tensor([0.2, 1.5])).tolist()
        assert found == pytest.approx(expected, rel=1e-5)


OLD = ([-0.706324, 3.630758], [72.699455, 100.41214])

ENERGY = gb.NoiseConditional(2, width=8, blocks=1, classes=4)
X, S = torch.zeros(2, 2), torch.ones(2)


def denoise(y):
    levels = gb.MultiLevelDenoising(gb.LogUniform(0.1, 2.0))
    return levels(ENERGY, Batch(X, {} if y is None else {"y": torch.as_tensor(y)}), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ENERGY(X, S, torch.tensor([0, 4])), OptionError, "from 0 to 3; got 4"),
        (lambda: ENERGY(X, S, torch.tensor([-1, 2])), OptionError, "got -1"),
        (lambda: ENERGY(X, S), OptionError, r"given\(y="),
        (lambda: ENERGY(X, S, torch.zeros(2)), ArgumentTypeError, "whole numbers"),
        (lambda: ENERGY(X, S, torch.zeros(2, 4, dtype=torch.long)), ShapeError, "argmax"),
        (lambda: ENERGY.given(y=7)(X, sigma=S), OptionError, "got 7"),
        (lambda: denoise([0, 9]), OptionError, "got 9"),
        (lambda: denoise(None), OptionError, "conditioned on y"),
        (lambda: gb.NoiseConditional(2, classes=1), OptionError, "classes counts"),
        (lambda: gb.NoiseConditionalUNet((1, 8, 8), classes=0), OptionError, "classes counts"),
        (lambda: LabelEmbedding(2.0), OptionError, "2 or more"),
    ],
)
def test_bad_labels_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
