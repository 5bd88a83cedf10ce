"""Chains of many kinds, ``(draws, chains)``, float64, to compare diagnostics on."""

import math

import torch


def ar1(rho, draws, chains, seed=0):
    """Stationary autoregression with unit variance."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, chains, generator=rng, dtype=torch.float64)
    x = noise.clone()
    for t in range(1, draws):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho * rho) * noise[t]
    return x


def _stuck():
    x = ar1(0.5, 100, 4, seed=11)
    x[:, 1] = 2.0
    return x


CASES = {
    "independent, 4 chains": ar1(0.0, 1000, 4, seed=1),
    "independent, one chain": ar1(0.0, 1000, 1, seed=2),
    "independent, 2001 draws": ar1(0.0, 2001, 1, seed=3),
    "correlated": ar1(0.7, 500, 4, seed=4),
    "strongly correlated": ar1(0.97, 400, 4, seed=5),
    "repelling": ar1(-0.6, 500, 4, seed=6),
    "strongly repelling": ar1(-0.95, 300, 2, seed=7),
    "odd": ar1(0.5, 201, 3, seed=8),
    "Cauchy": torch.tan(ar1(0.4, 600, 4, seed=9) * 1.2),
    "lognormal": (3 * ar1(0.6, 301, 4, seed=10)).exp(),
    "ties": ar1(0.5, 400, 4, seed=12).round(),
    "zeros and ones": (ar1(0.8, 400, 4, seed=13) > 0.7).double(),
    "plus and minus one, balanced": torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0] * 10)
    .double()
    .view(-1, 2),
    "rarely one": (ar1(0.8, 400, 4, seed=14) > 2.2).double(),
    "drifting": ar1(0.3, 300, 4, seed=15) + torch.linspace(-2, 2, 300, dtype=torch.float64)[:, None],
    "apart": ar1(0.3, 300, 4, seed=16) + torch.arange(4, dtype=torch.float64),
    "wider": ar1(0.3, 300, 4, seed=17) * torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64),
    "one chain stuck": _stuck(),
    "far from zero": ar1(0.5, 200, 4, seed=18) + 1e6,
    "tiny": ar1(0.5, 200, 4, seed=19) * 1e-6,
    "many chains": ar1(0.5, 40, 64, seed=20),
    **{f"{n} draws": ar1(0.3, n, 3, seed=20 + n) for n in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13)},
}
