"""Neural energies: any shape of image, a bounded slope that stands still while chains walk, and labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gibbsian import MLP, ULA, ConvEnergy, ResidualEnergy, sample
from gibbsian.energies import neural
from gibbsian.errors import OptionError, ShapeError
from oracles import double_precision

IMAGES = [(1, 1, 1), (1, 1, 5), (3, 7, 5), (2, 8, 8), (4, 9, 2), (1, 28, 28)]
SILU_SLOPE = 1.1
"""The largest slope of SiLU, 1.0998."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def built(kind, *args, **options):
    with double_precision(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args, **options)


def points(shape, n=6, seed=1):
    return torch.randn((n, *shape), generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("kind", [ConvEnergy, ResidualEnergy])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_images_of_any_size_have_an_energy_a_score_and_a_second_derivative(shape, kind, spectral_norm):
    energy = built(kind, shape, (4, 6, 8), spectral_norm=spectral_norm)
    x = points(shape).requires_grad_(True)
    value = energy(x)
    assert value.shape == (6,)
    (score,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    # Every pixel matters.
    assert bool((score.abs().amax(0) > 0).all())
    (again,) = torch.autograd.grad(score.square().sum(), next(energy.parameters()))
    assert bool(torch.isfinite(again).all())


ENERGIES = {
    "mlp": lambda **o: built(MLP, 3, (8, 8), **o),
    "mlp with frequencies": lambda **o: built(MLP, 3, (8, 8), frequencies=2, **o),
    "convolutional": lambda **o: built(ConvEnergy, (2, 7, 5), (4, 6), **o),
    "residual": lambda **o: built(ResidualEnergy, (2, 7, 5), (4, 6), **o),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_the_score_is_autograds_and_rows_do_not_see_each_other(name):
    energy = ENERGIES[name]()
    x = points(energy.event_shape).requires_grad_(True)
    assert torch.autograd.gradcheck(energy, x)
    together = energy(x)
    for i in range(6):
        assert torch.allclose(together[i], energy(x[i : i + 1])[0], rtol=0, atol=1e-12)
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    assert not any(isinstance(m, batch_norms) for m in energy.modules())


def test_convolutional_energies_are_extensive():
    """Two far-apart copies of a picture on an empty ground have twice its energy above the ground's."""
    energy = built(ConvEnergy, (1, 16, 64), (4,))
    ground = torch.zeros((1, 1, 16, 64), dtype=torch.float64)
    one, two = ground.clone(), ground.clone()
    spot = points((4, 4), 1, seed=2)
    one[:, :, 6:10, 10:14] = spot
    two[:, :, 6:10, 10:14] = spot
    two[:, :, 6:10, 50:54] = spot
    with torch.no_grad():
        floor, single, double = (float(energy(x)) for x in (ground, one, two))
    assert double - floor == pytest.approx(2 * (single - floor), rel=1e-9)


@pytest.mark.parametrize("name", ENERGIES)
def test_labels_choose_one_of_several_energies(name):
    energy = ENERGIES[name](classes=4)
    assert energy.context == ("y",)
    x = points(energy.event_shape)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    rows = energy.given(y=labels)(x)
    for y in range(4):
        alone = energy.given(y=y)(x)
        assert torch.equal(alone[labels == y], rows[labels == y])
        assert not torch.allclose(alone[labels != y], rows[labels != y])
    with pytest.raises(ShapeError, match="given"):
        energy(x)


# Spectral normalisation.


def normed(energy):
    return [m for m in energy.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def largest(layer):
    return float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))


def slope(energy, n=2000):
    x = (3.0 * points(energy.event_shape, n, seed=3)).requires_grad_(True)
    return float(torch.autograd.grad(energy(x).sum(), x)[0].flatten(1).norm(dim=1).max())


def stretch(energy, factor=20.0):
    """Make the weights large, as training could, and let the power iterations settle."""
    for layer in normed(energy):
        weight = getattr(layer, "parametrizations", None)
        (weight.weight.original if weight else layer.weight).data.mul_(factor)
    x = points(energy.event_shape)
    for _ in range(60):
        for layer in normed(energy):
            if hasattr(layer, "parametrizations"):
                layer.parametrizations.weight.original.data.add_(0.0)
                torch.autograd.graph.increment_version(layer.parametrizations.weight.original)
        energy(x)


def check_bound(energy) -> None:
    stretch(energy)
    assert all(largest(layer) < 1.01 for layer in normed(energy)), "not normalised"
    bound = 1.01 ** len(normed(energy)) * SILU_SLOPE ** (len(normed(energy)) - 1)
    assert slope(energy) < bound, "steeper than its bound"


def test_the_slope_of_a_normalised_mlp_is_bounded():
    check_bound(ENERGIES["mlp"](spectral_norm=True))


def test_a_plain_mlp_breaks_the_bound(monkeypatch):
    """The twins: no normalisation, and one that normalises by the Frobenius norm's inverse square."""
    with pytest.raises(AssertionError, match="not normalised"):
        check_bound(ENERGIES["mlp"](spectral_norm=False))
    monkeypatch.setattr(neural.SpectralNorm, "forward", lambda self, w: w / w.detach().norm().sqrt())
    with pytest.raises(AssertionError, match="not normalised"):
        check_bound(ENERGIES["mlp"](spectral_norm=True))


@pytest.mark.parametrize("name", ["convolutional", "residual"])
def test_the_kernels_of_normalised_images_energies_have_norm_one(name):
    energy = ENERGIES[name](spectral_norm=True)
    stretch(energy)
    assert all(abs(largest(layer) - 1.0) < 0.01 for layer in normed(energy))


@pytest.mark.parametrize("name", ENERGIES)
def test_a_normalised_energy_is_one_function_between_two_updates(name):
    energy = ENERGIES[name](spectral_norm=True)
    x = points(energy.event_shape)
    before = energy(x)
    kept = {k: v.clone() for k, v in energy.state_dict().items()}
    sample(energy, ULA(0.01), x, steps=20, rng=generator())
    assert torch.equal(energy(x), before)
    assert all(torch.equal(kept[k], v) for k, v in energy.state_dict().items())


@pytest.mark.parametrize("name", ENERGIES)
def test_a_normalised_energy_is_the_same_once_loaded(name):
    energy = ENERGIES[name](spectral_norm=True).eval()
    again = ENERGIES[name](spectral_norm=True)
    again.load_state_dict(energy.state_dict())
    x = points(energy.event_shape)
    assert torch.equal(again.eval()(x), energy(x))


def test_the_gradient_flows_through_the_normalisation():
    """The weight over its norm does not change with the weight's size: the gradient has no part along it."""
    energy = ENERGIES["mlp"](spectral_norm=True)
    stretch(energy, 1.0)
    energy.eval()
    energy(points((3,))).sum().backward()
    for layer in normed(energy):
        weight = layer.parametrizations.weight.original.detach()
        grad = layer.parametrizations.weight.original.grad
        along = (weight * grad).sum() / (weight.norm() * grad.norm())
        assert abs(float(along)) < 1e-8


# Compiled, and refused.


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_it_is_one_graph(name, spectral_norm):
    energy = ENERGIES[name](spectral_norm=spectral_norm)
    x = points(energy.event_shape)
    before = energy(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(energy, fullgraph=True, backend="eager")(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENERGIES)
def test_the_compiled_score_is_the_eager_one(name):
    energy = ENERGIES[name](spectral_norm=True)
    x = points(energy.event_shape).requires_grad_(True)
    compiled = torch.compile(energy, fullgraph=True)
    scores = [torch.autograd.grad(e(x).sum(), x)[0] for e in (energy, compiled)]
    assert torch.allclose(*scores, rtol=1e-9, atol=1e-9)


def test_what_makes_no_network_is_refused():
    for wrong in ({"hidden": ()}, {"hidden": (8, 0)}, {"frequencies": -1}):
        with pytest.raises(OptionError):
            MLP(2, **wrong)
    for kind in (ConvEnergy, ResidualEnergy):
        with pytest.raises(OptionError):
            kind((1, 8, 8), ())
        with pytest.raises(ShapeError, match="channels, height, width"):
            kind((8, 8))
        with pytest.raises(ShapeError):
            kind((1, 8, 8))(torch.zeros(3, 1, 8, 7))
    with pytest.raises(ShapeError):
        MLP(2)(torch.zeros(3, 4))


def test_fourier_features_are_those_of_the_formula():
    octaves = MLP(2, frequencies=3).octaves.double()
    x = points((2,))
    found = neural.fourier_features(x, octaves)
    assert found.shape == (6, 14)
    angle = torch.stack([torch.pi / 4 * 2**k * x for k in range(3)], 2).flatten(1)
    assert torch.allclose(found, torch.cat((x, angle.sin(), angle.cos()), 1), atol=1e-6)
