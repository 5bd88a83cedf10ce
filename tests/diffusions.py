"""An analytic diffusion for tests: mixtures of round Gaussians, whose noisy energies are known at every level."""

from __future__ import annotations

import math

import torch

from gibbsian.bridges.scores import EnergyScore, Score
from gibbsian.energies.base import Energy
from gibbsian.energies.targets import GaussianMixture
from gibbsian.kernels.base import per_chain

LOCS = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
SIZES = torch.tensor([0.3, 0.5], dtype=torch.float64)
MASSES = torch.tensor([0.4, 0.6], dtype=torch.float64)


def log_density(x, sigma, locs=LOCS, sizes=SIZES, masses=MASSES):
    v = sizes[None] ** 2 + sigma[:, None] ** 2
    d = x.shape[1]
    parts = masses.log() - ((x[:, None] - locs) ** 2).sum(2) / (2 * v) - 0.5 * d * (2 * math.pi * v).log()
    return torch.logsumexp(parts, 1)


MIXTURE = Energy.of(lambda x, sigma: -log_density(x, sigma), (2,), context=("sigma",))


def noisy(sigma: float) -> GaussianMixture:
    """The exact density at a noise level."""
    return GaussianMixture(LOCS, (SIZES**2 + sigma**2).sqrt(), MASSES)


class Network(torch.nn.Module):
    """A diffusion model's network with the exact answer, by Bayes' rule on x_t itself and not through a score."""

    def __init__(self, schedule, prediction, boxed=False):
        super().__init__()
        self.schedule, self.prediction, self.boxed = schedule, prediction, boxed

    def forward(self, x_t, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        v = alpha[:, None] ** 2 * SIZES**2 + sigma[:, None] ** 2
        centred = x_t[:, None] - alpha[:, None, None] * LOCS
        weights = (MASSES.log() - (centred**2).sum(2) / (2 * v) - v.log()).softmax(1)
        means = LOCS + (alpha[:, None] * SIZES**2 / v)[..., None] * centred
        x0 = (weights[..., None] * means).sum(1)
        eps = (x_t - per_chain(alpha, x_t) * x0) / per_chain(sigma, x_t)
        told = {"x0": x0, "eps": eps, "v": per_chain(alpha, x_t) * eps - per_chain(sigma, x_t) * x0}[self.prediction]
        return type("Output", (), {"sample": told})() if self.boxed else told


class Plain(Score):
    """The exact score, without the energy behind it being known."""

    def forward(self, x, sigma):
        return EnergyScore(MIXTURE)(x, sigma)
