"""Generators times a correction, in the space of z and noise: against quadrature, in one dimension of each."""

import copy
import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.decoders import BernoulliDecoder, Directed, GaussianDecoder
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import ImportanceLatents
from gibbsian.energies.networks import Dense
from gibbsian.energies.reparametrised import VAEBM, reparametrised
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

F64 = torch.float64
SIGMA = 0.4


class Bend(nn.Module):
    """g(z) = 2 sin z + z / 2."""

    def forward(self, z):
        return 2.0 * z.sin() + 0.5 * z


def correction(x):
    return (1.5 * x).cos().sum(1) + 0.3 * x.square().sum(1)


def directed():
    decoder = GaussianDecoder(Bend(), 1, SIGMA, latent=1).double()
    return Directed(gb.Gaussian(loc=torch.full((1,), 0.3, dtype=F64), scale=1.2), decoder)


def grid(half=9.0, points=1201):
    t = torch.linspace(-half, half, points, dtype=F64)
    return t, float(t[1] - t[0])


def density_of_x(x):
    """p_g(x) by quadrature over z."""
    z, dz = grid()
    joint = directed()
    pairs = torch.cartesian_prod(x, z)
    return (-joint(pairs[:, :1], z=pairs[:, 1:])).exp().view(len(x), len(z)).sum(1).mul(dz).detach()


def truth():
    """Log Z_f, mean and second moment of x, by quadrature over x."""
    x, dx = grid(8.0, 801)
    mass = density_of_x(x) * (-correction(x[:, None])).exp()
    total = mass.sum() * dx
    moments = [float((mass * x**k).sum() * dx / total) for k in (1, 2)]
    return float(total.log()), moments


def test_log_z_and_moments_are_those_of_x():
    """Two quadratures of one density: over z and noise, and over x."""
    energy = reparametrised(directed(), correction)
    assert energy.event_shape == (2,)
    t, dt = grid(8.0, 801)
    u = torch.cartesian_prod(t, t)
    log_z, moments = truth()

    def found(value):
        mass = (-value).exp().detach()
        x = energy.points(u).detach()[:, 0]
        return float((mass.sum() * dt**2).log()), [float((mass * x**k).sum() / mass.sum()) for k in (1, 2)]

    mine, own = found(energy(u))
    assert mine == pytest.approx(log_z, abs=1e-6)
    assert own == pytest.approx(moments, abs=1e-6)
    # The broken twins: without the energy of z, and of the noise, in units in which both are normalised on the grid.
    for axis in (0, 1):
        wrong, other = found(energy(u) - 0.5 * u[:, axis].square())
        assert abs(wrong - log_z) > 0.3
        assert max(abs(a - b) for a, b in zip(other, moments)) > 0.05


def test_the_energy_of_x_is_the_correction_and_the_models_own():
    model = directed()
    proposal = gb.Gaussian(loc=torch.zeros(1, dtype=F64), scale=2.0)
    latent = LatentEnergy(model, ImportanceLatents(proposal, 50_000, seeded()))
    energy = VAEBM(latent, gb.Energy.of(correction))
    x = torch.linspace(-3.0, 3.0, 9, dtype=F64)
    exact = correction(x[:, None]) - density_of_x(x).log()
    error = latent.estimate(x[:, None]).stderr
    assert float(((energy(x[:, None]) - exact) / error).detach().abs().max()) < 5.0
    assert float(error.max()) < 0.05
    assert energy.reparametrised is energy.reparametrised
    twin = copy.deepcopy(energy)
    assert twin.reparametrised.correction is twin.correction
    assert twin.reparametrised.model is twin.vae.energy
    assert set(twin.state_dict()) == {"vae.latents.proposal." + n for n in ("loc", "scale", "log_normalizer")} | {
        *("base." + n for n in ("loc", "scale", "log_normalizer")),
        *("vae.energy.prior." + n for n in ("loc", "scale", "log_normalizer")),
        "vae.energy.likelihood.log_scale",
        "vae.latents.noise",
    }


def test_any_kernel_draws_it_and_annealing_bounds_its_constant():
    energy = reparametrised(directed(), correction)
    log_z, moments = truth()
    n = 4000
    run = gb.sample(energy, gb.HMC(0.5, 5), energy.base.sample(n, seeded()), steps=60, rng=seeded(1))
    x = energy.points(run.x).detach()[:, 0]
    for k, moment in enumerate(moments, start=1):
        assert abs(float((x**k).mean()) - moment) < 5.0 * float((x**k).std()) / math.sqrt(n)
    plain = energy.points(energy.base.sample(n, seeded(2))).detach()[:, 0]
    assert abs(float(plain.square().mean()) - moments[1]) > 10.0 * float(plain.square().std()) / math.sqrt(n)
    found = gb.bracket(energy, energy.base, run.x[:500], rng=seeded(3), temperatures=50)
    assert float(found.lower) < log_z < float(found.upper)
    assert abs(float(found.value) - log_z) < 5.0 * float(found.stderr)
    assert float(found.upper - found.lower) < 0.1
    weights = -correction(energy.points(energy.base.sample(20_000, seeded(4)))).detach()
    mean = float(weights.exp().mean())
    assert abs(mean - math.exp(log_z)) < 5.0 * float(weights.exp().std()) / math.sqrt(len(weights))


def test_a_generator_without_noise_is_walked_in_its_latents():
    torch.manual_seed(0)
    net = GeneratorNetwork(Dense(3, 2, (4,)), 2, gb.Gaussian(loc=torch.tensor([1.0, 0.0, -1.0]), scale=0.5))
    energy = reparametrised(net, lambda x: x.square().sum(1))
    u = torch.randn(5, 3)
    z = energy.latents(u)
    assert torch.allclose(z, net.latent.loc + 0.5 * u)
    assert torch.equal(energy.points(u), net(z))
    assert torch.allclose(energy(u), net(z).square().sum(1) + gb.Gaussian(3)(u))
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    full = GeneratorNetwork(nn.Identity(), 2, gb.Gaussian(covariance=covariance))
    points = reparametrised(full, lambda x: x.sum(1)).points(torch.randn(20_000, 2, generator=seeded()))
    assert float((points.T.cov() - covariance).abs().max()) < 0.1


def test_images_go_in_and_out():
    torch.manual_seed(0)
    decoder = GaussianDecoder(Dense(3, (1, 4, 4)), (1, 4, 4), 0.2)
    energy = reparametrised(Directed(gb.Gaussian(3), decoder), gb.ConvEnergy((1, 4, 4), widths=(4,)))
    u = energy.base.sample(5, seeded())
    assert u.shape == (5, 19)
    assert energy.points(u).shape == (5, 1, 4, 4)
    noise = (energy.points(u) - energy.means(u)) / 0.2
    assert torch.allclose(noise.flatten(1), u[:, 3:], atol=1e-5)
    assert energy(u).shape == (5,)


def test_what_cannot_be_reparametrised_is_refused():
    bits = Directed(gb.Gaussian(2), BernoulliDecoder(Dense(2, 4), 4))
    with pytest.raises(DomainError, match=r"BernoulliDecoder draws x on Boolean.*take a GaussianDecoder"):
        reparametrised(bits, lambda x: x.sum(1))
    decoder = GaussianDecoder(Dense(2, 4), 4)
    with pytest.raises(OptionError, match="function of standard normal numbers"):
        reparametrised(Directed(gb.MLP(2) + gb.Gaussian(2), decoder), lambda x: x.sum(1))
    with pytest.raises(ShapeError, match=r"points of shape \(3,\) and the model makes \(4,\)"):
        reparametrised(Directed(gb.Gaussian(2), decoder), gb.Gaussian(3))
    with pytest.raises(OptionError, match="conditional on y"):
        reparametrised(Directed(gb.Gaussian(2), decoder), gb.MLP(4, classes=3))
    with pytest.raises(ArgumentTypeError, match="What is reparametrised is"):
        reparametrised(Dense(2, 4), lambda x: x.sum(1))
    with pytest.raises(ArgumentTypeError, match="corrects a LatentEnergy"):
        VAEBM(gb.Gaussian(4), gb.Gaussian(4))
