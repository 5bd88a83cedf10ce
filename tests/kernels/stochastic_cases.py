"""Energies that tests of stochastic-gradient kernels share."""

import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.minibatch import MinibatchEnergy

N, M, CHAINS = 12, 3, 50_000
CENTRE = torch.tensor([0.3, -0.6], dtype=torch.float64)


def least_squares(theta, a, y):
    return 0.5 * (theta @ a.T - y).square()


def inputs():
    rng = seeded(11)
    a = torch.randn(N, 2, generator=rng, dtype=torch.float64)
    return a, a @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.randn(N, generator=rng, dtype=torch.float64)


def regression(centre=None, kind=MinibatchEnergy):
    """Linear regression with unit noise and a unit prior."""
    prior = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64))
    return kind(least_squares, inputs(), prior, centre=centre)


def normal_start(seed=0):
    return torch.randn(CHAINS, 2, generator=seeded(seed), dtype=torch.float64)


def rows_of(kernel, energy, start, steps, seed):
    """The rows that a run of these steps draws."""
    return kernel.noise(kernel.init(energy, start), steps, seeded(seed))[1][:, 0]


def round_gaussian(dim=2):
    return gb.Gaussian(loc=torch.zeros(dim, dtype=torch.float64))
