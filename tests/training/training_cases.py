"""Small energies and objectives that the tests of training share."""

import math

import torch
from torch import nn

from gibbsian.energies.base import Energy
from gibbsian.objectives.base import Batch, Loss, Objective

QUIET = {"tensorboard": False}


class Bowl(Energy):
    """A diagonal Gaussian's energy with trainable mean and log-precision, float64."""

    def __init__(self, dim=2):
        super().__init__()
        self.event_shape = torch.Size([dim])
        self.mean = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.log_precision = nn.Parameter(torch.zeros(dim, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * ((x - self.mean).square() * self.log_precision.exp()).sum(1)


class ExactLikelihood(Objective):
    """The negative log-likelihood of a Bowl, whose log Z is known."""

    def forward(self, energy, batch, rng):
        log_z = 0.5 * (math.log(2 * math.pi) - energy.log_precision).sum()
        value = energy(batch.x).mean()
        return Loss(value + log_z, {"energy_data": value.detach()})


class Chains(Objective):
    """Persistent chains of unadjusted Langevin steps, a buffer that is made on first use, and a scale of its own.

    With a ``misfortune`` a loss is NaN with that probability, decided by the run's own noise.
    """

    def __init__(self, n=16, misfortune=0.0, dim=2):
        super().__init__()
        self.n, self.misfortune, self.dim = n, misfortune, dim
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("chains", None)
        self.register_buffer("ages", torch.zeros(n, dtype=torch.int64))

    def forward(self, energy, batch, rng):
        if self.chains is None:
            self.chains = torch.randn(self.n, self.dim, generator=rng, dtype=torch.float64)
        x = self.chains.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        noise = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        self.chains = (x - 0.1 * grad + math.sqrt(0.2) * noise).detach()
        self.ages += 1
        data, samples = energy(batch.x).mean(), energy(self.chains).mean()
        value = data - samples + (self.shift - batch.x.mean()).square()
        if torch.rand((), generator=rng) < self.misfortune:
            value = value * math.nan
        moved = (self.chains - x.detach()).square().mean().sqrt()
        return Loss(
            value,
            {
                "energy_data": data.detach(),
                "energy_samples": samples.detach(),
                "gap": (data - samples).detach(),
                "moved": moved,
                "buffer_age": self.ages.double().mean(),
            },
        )


def rows(n=40, dim=2, seed=1):
    """Gaussian data with mean 1 and standard deviation 0.5, float64."""
    rng = torch.Generator().manual_seed(seed)
    return 1.0 + 0.5 * torch.randn(n, dim, generator=rng, dtype=torch.float64)


def labelled(n=40):
    """Data whose label is the first coordinate, so that a row that lost its label shows."""
    x = rows(n)
    return Batch(x, {"y": x[:, 0].clone()})


def same(a, b):
    """Whether two trees of dicts, lists, tensors and numbers are equal to the bit; times are left out."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        keys = a.keys() - TIMES
        return keys == b.keys() - TIMES and all(same(a[k], b[k]) for k in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b or (a != a and b != b)


TIMES = {"seconds", "steps_per_second"}
