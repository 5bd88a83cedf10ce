"""Paths begin at the base, end at the energy, and do not jump; schedules run from 0 to 1 with usable step sizes."""

import math

import pytest
import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell, Funnel, ManyWell
from gibbsian.energies.tractable import Gaussian, Uniform
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA
from gibbsian.partition.paths import geometric, noise_levels
from gibbsian.partition.schedule import Schedule, pilot


class NoisyGaussian(Energy):
    """A standard Gaussian under noise, without its constant: log Z is log(2 pi (1 + sigma^2)) in the plane."""

    event_shape = torch.Size((2,))
    context = ("sigma",)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x.square().sum(1) / (1.0 + sigma**2)


X = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_geometric_is_the_algebra(beta):
    base, energy = Gaussian(2, scale=2.0), DoubleWell()
    b = torch.tensor(beta)
    torch.testing.assert_close(geometric(base, energy)(b)(X), ((1 - b) * base + b * energy)(X))


def test_noise_levels():
    base, energy = Gaussian(2, scale=10.0), NoisyGaussian()
    path = noise_levels(energy, (8.0, 2.0, 0.5), base)
    torch.testing.assert_close(path(torch.tensor(0.0))(X), base(X))
    for beta, sigma in ((0.5, 8.0), (0.625, 4.0), (0.75, 2.0), (0.875, 1.0), (1.0, 0.5)):
        torch.testing.assert_close(path(torch.tensor(beta))(X), energy.given(sigma=sigma)(X))
    torch.testing.assert_close(path(torch.tensor(0.25))(X), 0.5 * base(X) + 0.5 * energy.given(sigma=8.0)(X))


@pytest.mark.parametrize("sigmas", [(1.0,), (0.5, 1.0), (1.0, 0.0)])
def test_levels_must_decrease(sigmas):
    with pytest.raises(OptionError, match="decrease"):
        noise_levels(NoisyGaussian(), sigmas, Gaussian(2))


def test_noise_levels_refusals():
    with pytest.raises(OptionError, match="sigma"):
        noise_levels(DoubleWell(), (2.0, 1.0), Gaussian(2))
    with pytest.raises(ArgumentTypeError):
        noise_levels(NoisyGaussian(), (2.0, 1.0), DoubleWell())


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.4, 1.0], [1.0]])
def test_impossible_schedules(betas):
    with pytest.raises(OptionError):
        Schedule(torch.tensor(betas))


def test_step_sizes_fit_the_betas():
    with pytest.raises(OptionError, match="3 betas take 1"):
        Schedule(torch.tensor([0.0, 0.5, 1.0]), torch.ones(3))


@pytest.mark.parametrize("guess", [1e-3, 0.1, 30.0])
@pytest.mark.parametrize("make", [lambda h: HMC(h, leapfrog=5), MALA], ids=["hmc", "mala"])
def test_pilot_finds_step_sizes_from_any_guess(guess, make):
    base, energy = Gaussian(2, scale=3.0), Gaussian(2, scale=0.05)
    kernel = make(guess)
    schedule = pilot(geometric(base, energy), base, kernel, rng=torch.Generator().manual_seed(0), temperatures=60)
    assert schedule.betas.shape == (61,)
    assert bool((schedule.betas.diff() > 0).all())
    # The density narrows 60 times: an HMC step does so too, a MALA step by its square.
    assert schedule.step_sizes is not None
    power = 1 if isinstance(kernel, HMC) else 2
    ratio = float(schedule.step_sizes[:15].median() / schedule.step_sizes[-15:].median()) ** (1 / power)
    assert 4.0 < ratio < 120.0
    assert 0.005 < float(schedule.step_sizes[-15:].max()) ** (1 / power) < 0.3


def test_pilot_puts_temperatures_where_the_density_changes():
    base = Gaussian(8, scale=3.0)
    schedule = pilot(geometric(base, ManyWell(8)), base, HMC(0.1, 5), rng=torch.Generator().manual_seed(0))
    assert schedule.betas.numel() > 200
    assert float(schedule.betas[schedule.betas.numel() // 2]) < 0.3


def test_pilot_takes_a_base_partly_outside_the_domain():
    # Half of the base's draws have infinite energy; the stages are judged by the others.
    base = Uniform(2, low=-4.0, high=4.0)
    energy = Energy.of(lambda x: torch.where(x[:, 0] > 0, 0.5 * x.square().sum(1), torch.inf), event_shape=(2,))
    schedule = pilot(geometric(base, energy), base, HMC(0.1, 5), rng=torch.Generator().manual_seed(0))
    assert schedule.betas.numel() == 201


def test_pilot_names_a_hopeless_energy():
    nowhere = Energy.of(lambda x: x.sum(1) * math.nan, event_shape=(2,))
    base = Gaussian(2)
    with pytest.raises(DivergenceError, match="infinite or NaN"):
        pilot(geometric(base, nowhere), base, HMC(0.1, 5), rng=torch.Generator().manual_seed(0))


def test_pilot_refuses_no_temperatures():
    base = Gaussian(3)
    with pytest.raises(OptionError):
        pilot(geometric(base, Funnel(3)), base, HMC(0.1), rng=torch.Generator(), temperatures=0)
