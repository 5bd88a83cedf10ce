"""The U-Net energy: its Gaussian part is exact, its learned part as stated, bounded, smooth, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian import NoiseConditionalUNet
from gibbsian.errors import OptionError, ShapeError
from gibbsian.objectives.base import Batch
from oracles import double_precision

SHAPES = [(1, 4, 8), (3, 8, 8)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(shape, n=60):
    return 3.0 + 0.7 * torch.randn((n, *shape), generator=generator(1), dtype=torch.float64)


def made(shape, **options) -> NoiseConditionalUNet:
    """Calibrated, in float64, with every weight moved away from its initial value."""
    with double_precision(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = NoiseConditionalUNet(shape, width=4, **options).calibrate(data(shape))
        for p in energy.parameters():
            p.data.add_(0.05 * torch.randn(p.shape, dtype=torch.float64))
    return energy


@pytest.mark.parametrize("shape", SHAPES)
def test_without_the_network_it_is_the_normalised_gaussian(shape):
    energy = made(shape)
    energy.unet.leave.weight.data.zero_()
    energy.unet.leave.bias.data.zero_()
    x = data(shape)
    for sigma in (0.01, 0.7, 30.0):
        value = energy.given(sigma=torch.tensor(sigma, dtype=torch.float64))(x)
        assert torch.allclose(value, energy.base(sigma)(x), rtol=0, atol=1e-9)


def test_the_learned_part_is_the_inner_product_and_a_sum():
    """With constant images F = 2 and G = 3 at every pixel, h = sum (2 u + 3)."""
    energy = made((3, 8, 8))
    energy.unet.leave.weight.data.zero_()
    # Channels are the sub-pixels of an image's channels: the first half belongs to F.
    energy.unet.leave.bias.data.copy_(torch.tensor([2.0] * 12 + [3.0] * 12))
    u, level = data((3, 8, 8), 5), torch.randn(5, 32, dtype=torch.float64, generator=generator(2))
    assert torch.allclose(energy.network(u, level), (2.0 * u + 3.0).sum((1, 2, 3)), rtol=1e-12)


def check_normalisable(energy):
    """Far out the learned part, of whatever weights, vanishes beside the Gaussian's square, so that Z is finite."""
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(3.0)
        away = 1e8 * torch.randn((20, *energy.shape), generator=generator(3), dtype=torch.float64)
        for sigma in (0.05, 8.0):
            ratio = energy.given(sigma=torch.tensor(sigma, dtype=torch.float64))(away) / energy.base(sigma)(away)
            assert float((ratio - 1.0).abs().max()) < 0.1, "the learned part grows as fast as the Gaussian"


def test_the_energy_grows_like_the_gaussian_far_out():
    check_normalisable(made((1, 4, 8)))


def test_a_network_that_sees_images_of_any_length_is_caught(monkeypatch):
    monkeypatch.setattr("gibbsian.energies.unet.REACH", 1e12)
    with pytest.raises(AssertionError, match="grows as fast"):
        check_normalisable(made((1, 4, 8)))


def test_both_derivatives_are_autograds():
    energy = made((1, 4, 8), blocks=2)
    x = data((1, 4, 8), 3).requires_grad_(True)
    sigma = torch.tensor([0.05, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: energy(x, s), (x, sigma), atol=1e-5)
    score = torch.autograd.grad(energy(x, sigma).sum(), x, create_graph=True)[0]
    score.square().sum().backward()
    reached = [name for name, p in energy.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert len(reached) == len(list(energy.parameters()))


def test_rows_do_not_see_each_other():
    energy = made((3, 8, 8))
    x, sigma = data((3, 8, 8), 4), torch.tensor([0.05, 0.3, 1.0, 8.0], dtype=torch.float64)
    together = energy(x, sigma)
    for i in range(4):
        assert torch.allclose(together[i], energy(x[i : i + 1], sigma[i : i + 1])[0], rtol=0, atol=1e-9)


def test_it_is_one_graph():
    energy = made((1, 4, 8))
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    x, sigma = data((1, 4, 8), 6), torch.full((6,), 0.3, dtype=torch.float64)
    assert torch.allclose(compiled(x, sigma), energy(x, sigma), rtol=0, atol=1e-12)


def test_it_learns_the_noise_of_stripes():
    """Two images, 50 steps: the denoising error falls far below that of the Gaussian it starts from."""
    rng = generator(5)
    stripes = torch.zeros(2, 1, 8, 8)
    stripes[0, :, ::2], stripes[1, :, :, ::2] = 1.0, 1.0
    rows = stripes[torch.randint(2, (256,), generator=rng)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = NoiseConditionalUNet((1, 8, 8), width=8).calibrate(rows)
    objective = gb.MultiLevelDenoising(gb.LogNormal(-1.0, 1.0, 0.1, 5.0))

    def error():
        return float(objective(energy, Batch(rows), generator(6)).metrics["denoising_error"])

    before = error()
    gb.fit(energy, rows, objective, steps=50, batch_size=64, learning_rate=5e-3, warmup_steps=5, rng=rng, ema_decay=0.9)
    assert error() < 0.5 * before


def test_convolutions_are_laid_out_for_speed():
    layers = [
        m for m in NoiseConditionalUNet((1, 8, 8)).modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3
    ]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in layers)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="multiples of 4"):
        NoiseConditionalUNet((1, 8, 6))
    with pytest.raises(ShapeError, match="channels, height, width"):
        NoiseConditionalUNet((8, 8))
    for wrong in ({"width": 0}, {"blocks": 0}, {"gain": 1.5}, {"fade": -0.5}):
        with pytest.raises(OptionError):
            NoiseConditionalUNet((1, 8, 8), **wrong)
    with pytest.raises(ShapeError):
        NoiseConditionalUNet((1, 8, 8))(torch.zeros(5, 64), torch.ones(5))
