"""Discriminators as energies: the sign, the latent energy's formula, and what is no discriminator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gibbsian import MLP
from gibbsian.energies.base import Energy
from gibbsian.energies.discriminators import (
    CalibratedDiscriminator,
    Discriminator,
    check_discriminator,
    discriminator_of,
    latent_energy,
)
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.networks import Dense, Downsampling, Upsampling
from gibbsian.energies.reconstruction import ReconstructionEnergy
from gibbsian.energies.tractable import Gaussian, Uniform
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(last=None, hidden=16):
    torch.manual_seed(0)
    layers = [nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 1)]
    return nn.Sequential(*layers, *([] if last is None else [last]))


class Squashed(nn.Module):
    """A discriminator whose sigmoid is hidden in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x).sigmoid()


def test_the_energy_is_minus_the_logit_whatever_the_output():
    net, x = network(), torch.randn((7, 2), generator=seeded())
    torch.testing.assert_close(Discriminator(net, 2)(x), -net(x).squeeze(1))
    torch.testing.assert_close(Discriminator(lambda x: net(x).squeeze(1))(x), -net(x).squeeze(1))
    undone = Discriminator(network(nn.Sigmoid()), 2, probabilities=True)
    torch.testing.assert_close(undone(x), -net(x).squeeze(1))
    assert repr(undone) == "Discriminator(Sequential, probabilities=True)"
    energy = MLP(2)
    assert discriminator_of(energy) is energy


def test_the_latent_energy_is_that_of_the_formula():
    torch.manual_seed(0)
    generator, energy = GeneratorNetwork(Dense(3, 2), 2, latent=3), MLP(2)
    latent, z = latent_energy(energy, generator), torch.randn((5, 3), generator=seeded())
    expected = 0.5 * z.square().sum(1) + 1.5 * math.log(2 * math.pi) + energy(generator(z))
    torch.testing.assert_close(latent(z), expected)
    assert latent.event_shape == (3,)
    stacked = torch.stack((z, 2 * z))
    torch.testing.assert_close(latent.points(stacked), torch.stack((generator(z), generator(2 * z))).detach())
    box = latent_energy(network(), GeneratorNetwork(Dense(3, 2), 2, Uniform(3, -1.0, 1.0)))
    assert bool(box(2.0 + z.abs()).isinf().all())


def test_a_calibrated_discriminator_is_affine_in_the_logit():
    energy, x = MLP(2), torch.randn((5, 2), generator=seeded())
    torch.testing.assert_close(-CalibratedDiscriminator(energy, 2.0, 0.5)(x), -2.0 * energy(x) + 0.5)


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Sequential(nn.Flatten(), nn.Sigmoid())], ids=["plain", "nested"])
def test_a_sigmoid_at_the_end_is_named(last):
    generator = GeneratorNetwork(Dense(2, 2), 2, latent=2)
    for build in (Discriminator, lambda net: latent_energy(net, generator)):
        with pytest.raises(DomainError, match=r"ends in a sigmoid.*probabilities=True"):
            build(network(last))


@pytest.mark.parametrize("build", [Discriminator, Energy.of], ids=["adopted", "taken for an energy"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_a_sigmoid_inside_is_seen_by_its_values(build, spread):
    x = spread * torch.randn((64, 2), generator=seeded())
    with pytest.raises(DomainError, match=r"outputs lie between .* are probabilities.*take the sigmoid away"):
        check_discriminator(build(Squashed()), x)


@pytest.mark.parametrize("shift", [0.0, 0.3, 5.0])
def test_logits_are_let_through_however_small(shift):
    """Among them those of a network that has not learned, all between 0 and 1 at the data."""
    x = 0.1 * torch.randn((64, 2), generator=seeded())
    net = network()
    nn.init.constant_(net[-1].bias, shift)
    check_discriminator(Discriminator(net), x)
    check_discriminator(MLP(2, hidden=(8,)), x)
    check_discriminator(Discriminator(Squashed(), probabilities=True), x)
    check_discriminator(MLP(2) + Gaussian(2), x)


def test_what_does_not_fit_is_refused():
    generator = GeneratorNetwork(Dense(2, 3), 3, latent=2)
    with pytest.raises(ShapeError, match=r"points of shape \(3,\), and the discriminator takes \(2,\)"):
        latent_energy(MLP(2), generator)
    with pytest.raises(ArgumentTypeError, match="GeneratorNetwork"):
        latent_energy(MLP(2), Dense(2, 2))
    with pytest.raises(OptionError, match=r"conditional on y.*given\(y="):
        latent_energy(MLP(3, classes=2), generator)
    with pytest.raises(ArgumentTypeError, match="module from"):
        Discriminator(3)
    with pytest.raises(ShapeError, match=r"one logit per row.*gave \(4, 3\)"):
        Discriminator(nn.Linear(2, 3))(torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="gave tuple"):
        Discriminator(lambda x: (x, x))(torch.zeros(4, 2))


def test_reconstruction_is_half_the_squared_error():
    torch.manual_seed(0)
    encoder, decoder = Downsampling((1, 8, 8), 6, 4), Upsampling(6, (1, 8, 8), 4)
    energy, x = ReconstructionEnergy(encoder, decoder, (1, 8, 8), scale=0.5), torch.randn((3, 1, 8, 8))
    expected = (x - decoder(encoder(x))).square().sum((1, 2, 3)) / (2 * 0.25)
    torch.testing.assert_close(energy(x), expected)
    assert energy.codes(x).shape == (3, 6)
    assert "scale=0.5" in repr(energy)


def test_bad_autoencoders_are_refused():
    with pytest.raises(ArgumentTypeError, match="encoder is a torch module"):
        ReconstructionEnergy(lambda x: x, Dense(2, 2), 2)
    with pytest.raises(ArgumentTypeError, match="decoder is a torch module"):
        ReconstructionEnergy(Dense(2, 2), None, 2)
    with pytest.raises(OptionError, match="scale is the positive"):
        ReconstructionEnergy(Dense(2, 2), Dense(2, 2), 2, scale=0.0)
    with pytest.raises(ShapeError, match=r"2 numbers each; it gave \(4, 3\)"):
        ReconstructionEnergy(Dense(2, 2), Dense(2, 3), 2)(torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="Expected points"):
        ReconstructionEnergy(Dense(2, 2), Dense(2, 2), 2)(torch.zeros(4, 3))
