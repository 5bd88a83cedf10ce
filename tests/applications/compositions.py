"""Compositions known at every noise level: mixtures of round Gaussians under noise, integrated on grids.

The check of weighted particles: moments of second order within 6 standard errors over 64 populations, which are
independent but for the settings that they share; a false alarm of Student's law is then 1e-7.
"""

from __future__ import annotations

import functools
import math

import torch

from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.schedules import VarianceExploding
from oracles import moments

LOW, HIGH, POPULATIONS, LIMIT = 0.05, 8.0, 64, 6.0


def gaussians(locs, sizes, masses) -> Energy:
    """A mixture of Gaussians under noise, normalised at every level."""
    locs, sizes, masses = (torch.tensor(each, dtype=torch.float64) for each in (locs, sizes, masses))

    def energy(x, sigma):
        v = sizes**2 + sigma[:, None] ** 2
        parts = masses.log() - ((x[:, None] - locs) ** 2).sum(2) / (2 * v) - 0.5 * x.shape[1] * (2 * math.pi * v).log()
        return -torch.logsumexp(parts, 1)

    return Energy.of(energy, (locs.shape[1],), context=("sigma",))


A = gaussians([[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.4], [0.4, 0.6])
B = gaussians([[-1.2, 0.2], [0.8, 0.3], [0.0, -1.0]], [0.5, 0.5, 0.4], [0.5, 0.3, 0.2])
CASES = {"product": A + B, "negation": A - 0.3 * B, "mixture": mixture(A, B, weights=[0.3, 0.7])}


def levels(count: int, low: float = LOW) -> list[float]:
    """Levels from the highest to the lowest."""
    return VarianceExploding(low, HIGH, rho=4.0).levels(count)


@functools.cache
def exact(energy: Energy, sigma: float = LOW, box: float = 6.0):
    """Log Z, mean and second moments at a level."""
    at = energy.given(sigma=torch.tensor(sigma, dtype=torch.float64))
    mass, first, second = moments(lambda x: -at(x), -box, box, points=240)
    return float(mass.log()), first / mass, second / mass


def deviations(out, energy: Energy, sigma: float = LOW):
    """Errors of means and second moments, and their standard errors over the populations."""
    _, first, second = exact(energy, sigma)
    x = out.x.double()
    truth = torch.cat((first, second[[0, 1, 0], [0, 1, 1]]))
    values = torch.cat((x, x.square(), x[:, :1] * x[:, 1:]), 1).view(POPULATIONS, -1, 5)
    w = (out.log_weights - out.log_weights.max()).exp().view(POPULATIONS, -1, 1)
    above, below = (w * values).sum(1), w.sum(1)
    found = above.sum(0) / below.sum(0)
    stderr = ((above - found * below) / below.mean()).std(0) / math.sqrt(POPULATIONS)
    return found - truth, stderr


def check_moments(out, energy: Energy, bias: float = 0.0, power: float = 0.04) -> None:
    """Moments within their errors and what is stated as the bias of finite levels; the errors are small."""
    error, stderr = deviations(out, energy)
    assert float(stderr.max()) < power, f"no power: {stderr.tolist()}"
    z = (error.abs() - bias).clamp(min=0.0) / stderr
    assert float(z.max()) < LIMIT, f"moments off by {error.tolist()}, {z.tolist()} standard errors"
