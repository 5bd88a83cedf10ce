"""Recovery likelihood: its gradient is that of the conditional likelihood, and known families are recovered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import recovery as families
from gibbsian import MALA, ULA, Bernoulli, Energy, Gaussian, NoiseConditional, fit
from gibbsian.energies import recovery
from gibbsian.energies.recovery import RecoveryEnergy
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, row_sum
from gibbsian.objectives import recovery_likelihood as module
from gibbsian.objectives.base import Batch
from gibbsian.objectives.recovery_likelihood import RecoveryLikelihood
from recovery import GAUSSIAN, LAPLACES, QUARTIC, assert_recovered, descend, seeded

LEVELS = (0.3, 0.5, 0.8, 1.3, 2.0)


# ---- the known families under noise -------------------------------------------------------------------------------


class NoisyPlane(families.PlaneGaussian):
    """`recovery.PlaneGaussian` under noise: its covariance grows by sigma squared."""

    context = ("sigma",)

    def forward(self, x, sigma):
        a, b = self.log_diagonal.exp(), self.below[0]
        # The inverse of L L' with L = [[a0, 0], [b, a1]].
        det = (a[0] * a[1]).square()
        c00, c01, c11 = (b * b + a[1] * a[1]) / det, -a[0] * b / det, a[0] * a[0] / det
        v0, v1 = c00 + sigma**2, c11 + sigma**2
        y = x - self.mean
        return 0.5 * (v1 * y[:, 0] ** 2 - 2 * c01 * y[:, 0] * y[:, 1] + v0 * y[:, 1] ** 2) / (v0 * v1 - c01 * c01)


class NoisyLaplaces(families.BlurredLaplaces):
    """`recovery.BlurredLaplaces` under noise: the blur grows."""

    context = ("sigma",)

    def forward(self, x, sigma):
        s, b = (self.blur**2 + sigma**2).sqrt()[:, None], self.log_scale.exp()
        y = x - self.locations
        side = torch.stack((y, -y))
        # Not log_ndtr, which vmap does not know.
        cut = torch.erfc(-(side / s - s / b) / math.sqrt(2)).log()
        logs = torch.logsumexp(s * s / (2 * b * b) - side / b + cut, 0) - self.log_scale
        weights = torch.nn.functional.logsigmoid(torch.cat((-self.odds, self.odds)))
        return -torch.logsumexp(logs + weights, 1)


class NoisyQuartic(families.Quartic):
    """`recovery.Quartic` under noise, by a sum over a grid as fine as the least noise: right to nine digits."""

    context = ("sigma",)

    def forward(self, x, sigma):
        grid = torch.arange(-3.6, 3.7, 0.3, dtype=torch.float64)
        apart = (x - grid) / sigma[:, None]
        return -torch.logsumexp(-0.5 * apart.square() - super().forward(grid[:, None]), 1)


NOISY = {"gaussian": (NoisyPlane, GAUSSIAN), "laplaces": (NoisyLaplaces, LAPLACES), "quartic": (NoisyQuartic, QUARTIC)}


class Replicated(Energy):
    """Copies of a family side by side: each has parameters of its own, and n rows of its own, one copy after another."""

    context = ("sigma",)

    def __init__(self, family, copies, n):
        super().__init__()
        self.inner = [family()]  # In a list, so that only the stacked parameters count as this energy's.
        self.copies, self.n = copies, n
        self.names = [name for name, _ in self.inner[0].named_parameters()]
        for name, p in self.inner[0].named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().expand(copies, *p.shape).clone()))

    def forward(self, x, sigma):
        # Data and samples come one after the other.
        blocks = len(x) // (self.copies * self.n)
        x, sigma = (t.view(blocks, self.copies, self.n, -1).movedim(1, 0).flatten(1, 2) for t in (x, sigma))
        stacked = {name: getattr(self, name) for name in self.names}
        values = torch.vmap(self.one)(stacked, x, sigma.squeeze(2))
        return values.view(self.copies, blocks, self.n).movedim(0, 1).flatten()

    def one(self, params, x, sigma):
        return torch.func.functional_call(self.inner[0], params, (x, sigma))

    def found(self):
        """The parameters of each copy, ``(copies, k)``."""
        return torch.cat([getattr(self, name).detach() for name in self.names], 1)


def found(name, n, copies=families.REPLICATES, steps=100, chain=8):
    """Fit independent data sets of n rows; the estimated parameters, ``(copies, k)``."""
    family, case = NOISY[name]
    energy = Replicated(family, copies, n)
    data = torch.cat([case.rows(n, seeded(seed)) for seed in range(copies)])
    descend(RecoveryLikelihood(LEVELS, MALA(0.4), steps=chain), energy, data, steps=steps, rate=0.1)
    return energy.found()
