"""Networks between vectors and points, and generators made of them."""

import math

import pytest
import torch

from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.energies.networks import Dense, Downsampling, NoisyNetwork, Upsampling, network
from gibbsian.energies.tractable import Bernoulli, Gaussian, Uniform
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (2, 5, 7)])
def test_images_are_made_and_read_at_any_size(shape):
    up, down = Upsampling(6, shape, width=3), Downsampling(shape, (2, 2), width=3)
    x = up(torch.randn(4, 6))
    assert x.shape == (4, *shape)
    assert down(x).shape == (4, 2, 2)


@pytest.mark.parametrize(
    "net",
    [Dense((3, 2), 5, (7,)), Upsampling(6, (1, 8, 8), 4), Downsampling((1, 8, 8), 3, 4)],
    ids=lambda n: repr(type(n)),
)
def test_rows_do_not_mix(net):
    x = torch.randn(5, *net.inputs)
    assert torch.allclose(net(x)[2:3], net(x[2:3]), atol=1e-6)
    assert str(tuple(net.outputs)) in repr(net)


def test_the_shapes_choose_the_network():
    assert isinstance(network(4, (1, 8, 8), 4), Upsampling)
    assert isinstance(network((1, 8, 8), 4, 4), Downsampling)
    assert isinstance(network(4, 2, 4), Dense)


def test_a_linear_generator_with_noise_has_the_density_it_should():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 3).double()
    generator = GeneratorNetwork(net, 3, Gaussian(2).double())
    joint = generator.directed(0.5).double()
    x, grid = torch.randn(4, 3, dtype=torch.double), torch.linspace(-8, 8, 321, dtype=torch.double)
    z = torch.cartesian_prod(grid, grid)
    mass = torch.stack([(-joint(row.expand(len(z), 3), z=z)).exp().sum() for row in x]) * (grid[1] - grid[0]) ** 2
    covariance = net.weight @ net.weight.T + 0.25 * torch.eye(3, dtype=torch.double)
    truth = torch.distributions.MultivariateNormal(net.bias, covariance).log_prob(x)
    assert torch.allclose(mass.log(), truth, atol=1e-10)
    rng = torch.Generator().manual_seed(1)
    draws = generator.sample(20_000, rng)
    error = (draws.detach().T.cov() - net.weight @ net.weight.T).abs().max()
    assert float(error.detach()) < 6 * math.sqrt(2 / 20_000)
    assert joint.likelihood.net is net


def test_the_law_of_z_may_be_another():
    generator = GeneratorNetwork(Dense(2, 3), 3, Uniform(2, -1.0, 1.0))
    assert generator.sample(5, torch.Generator().manual_seed(0)).shape == (5, 3)


def test_bad_generators_are_refused():
    with pytest.raises(OptionError, match="positive whole sizes; got 0"):
        GeneratorNetwork(Dense(2, 3), 3, 0)
    with pytest.raises(ArgumentTypeError, match="torch module"):
        GeneratorNetwork(lambda z: z, 3, 2)
    with pytest.raises(DomainError, match="real numbers"):
        GeneratorNetwork(Dense(2, 3), 3, Bernoulli(logits=torch.zeros(2)))
    with pytest.raises(ShapeError, match=r"4 numbers each.*gave \(5, 3\)"):
        GeneratorNetwork(Dense(2, 3), 4, 2).sample(5, torch.Generator().manual_seed(0))
    with pytest.raises(ShapeError, match=r"makes points of shape \(3,\), and the energy takes \(2,\)"):
        require_fitting(GeneratorNetwork(Dense(2, 3), 3, 2), torch.Size([2]))
    with pytest.raises(ArgumentTypeError, match="GeneratorNetwork"):
        require_fitting(Dense(2, 3), None)
    with pytest.raises(OptionError, match="feature maps"):
        Upsampling(2, (1, 8, 8), 0)


def test_noise_of_a_noisy_network_is_the_rest_of_its_latents():
    torch.manual_seed(0)
    net = NoisyNetwork(Dense(3, (1, 2, 2)), 3, 0.3)
    z = torch.randn((5, 7), generator=torch.Generator().manual_seed(1))
    expected = net.net(z[:, :3]) + 0.3 * z[:, 3:].reshape(5, 1, 2, 2)
    assert torch.equal(net(z), expected)
    assert torch.equal(net.clean(z), net.net(z[:, :3]))
    drawn = GeneratorNetwork(net, (1, 2, 2), latent=7).sample(4000, torch.Generator().manual_seed(2))
    clean = GeneratorNetwork(net.net, (1, 2, 2), latent=3).sample(4000, torch.Generator().manual_seed(3))
    gained = (drawn.var(0) - clean.var(0)).detach()
    assert bool((gained - 0.09).abs().max() < 0.02)
    for scale in (0.0, math.inf):
        with pytest.raises(OptionError, match="positive standard deviation"):
            NoisyNetwork(Dense(3, 2), 3, scale)
    with pytest.raises(OptionError, match="positive whole"):
        NoisyNetwork(Dense(3, 2), 0, 0.3)
