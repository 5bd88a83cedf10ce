"""How the models of `diffusion.py` are drawn from, and what their flows say of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from common import Stopwatch, generator
from diffusion_training import SIGMA_MAX, Options, Trained, dequantised
from gibbsian.annealing import Annealing, anneal, annealed_chains
from gibbsian.bridges.flow_likelihood import bits_per_dim, flow_log_prob
from gibbsian.bridges.reverse import Ancestral, Heun, Multistep, PredictorCorrector, Reverse, denoised, reverse
from gibbsian.bridges.scores import score_of
from gibbsian.energies.schedules import rho_levels
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA
from gibbsian.partition.bracket import bracket
from gibbsian.partition.paths import noise_levels

AT_ONCE = 125
"""Images that are walked together: their features fit the processor's caches."""

Walk = Callable[[Trained, Tensor, Tensor], Tensor]

REVERSE: dict[str, tuple[Reverse, int]] = {
    "Heun": (Heun(), 32),
    "Multistep": (Multistep(), 64),
    "Ancestral": (Ancestral(), 64),
    "Multistep and corrector": (PredictorCorrector(Multistep(), size=0.1), 32),
    "Heun and corrector": (PredictorCorrector(Heun(), size=0.1), 22),
}
"""Ways that a plain score has, too, with their noise levels: about 64 evaluations of the network each."""

ANNEALED = 22
"""Noise levels of `anneal`, three gradients each."""

CHAINED = {"MALA chains": 16, "MALA chains, longer": 64}
"""Noise levels of chains with a Metropolis test, four steps each: with so few as the others take, and with enough."""


def walk_down(trained: Trained, name: str, start: Tensor, rng: torch.Generator) -> Tensor:
    """Carry draws of noise to draws of the data in one of the ways, in model units."""
    model, low = trained.model, trained.sigma_min
    if name in REVERSE:
        way, steps = REVERSE[name]
        return reverse(model, start, [*rho_levels(SIGMA_MAX, low, steps, 7.0), 0.0], way, rng=rng)
    assert isinstance(model, gb.Energy)
    if name == "anneal":
        return anneal(model, start, Annealing(SIGMA_MAX, low, ANNEALED, rho=7.0, denoise=True), rng=rng)
    levels = rho_levels(SIGMA_MAX, low, CHAINED[name], 7.0)
    # A step in proportion to the level's variance, as of the correctors; most proposals are then accepted.
    made = annealed_chains(model, start, levels, lambda sigma: MALA(0.1 * sigma**2), steps=4, rounds=1, rng=rng)
    return denoised(score_of(model), made.samples.x, low)


def ways_of(trained: Trained) -> list[str]:
    """Names of the ways a model can be drawn from."""
    return [*REVERSE, *(["anneal", *CHAINED] if trained.name == "energy" else [])]


def draw(trained: Trained, name: str, n: int, options: Options) -> tuple[Tensor, float]:
    """Draws in data units, and the processor seconds they took."""
    rng = generator(options.seed, 10)
    parts = []
    with Stopwatch() as watch:
        for start in trained.base(SIGMA_MAX).sample(n, rng).split(AT_ONCE):
            parts.append(walk_down(trained, name, start, rng))
    return trained.dataset.scaling().backward(torch.cat(parts)), watch.cpu


def likelihood(
    trained: Trained, sigma: float, rows: Tensor, steps: int, probes: int | None, seed: int
) -> dict[str, Any]:
    """Flow likelihood of dequantised held-out rows, in nats per image and bits per dimension; and at half the steps.

    ``log_prob`` and ``bits`` are pairs of mean and standard error, over rows (with the probes' noise in it); ``probes``
    is the part of the error that the probes make, ``halved`` the change of the mean when the steps are halved, with
    the largest change of a row.
    """
    scaling = trained.dataset.scaling()
    x = scaling.forward(dequantised(rows, generator(seed, 30)))
    told, error, change = [], [], []
    with Stopwatch() as watch:
        for i, part in enumerate(x.split(AT_ONCE)):
            # The tolerance only asks for one doubling, from half the steps.
            rest: dict[str, Any] = {"probes": probes, "rng": generator(seed, 31, i)}
            found = flow_log_prob(trained.model, part, sigma, SIGMA_MAX, steps=steps // 2, tolerance=1e9, **rest)
            told.append(found.log_prob.double())
            error.append(found.stderr.double())
            change.append(found.change.double())
    values, errors, moved = (torch.cat(parts) for parts in (told, error, change))
    values = values + scaling.log_det
    n, d = len(values), x[0].numel()
    bits = bits_per_dim(values, d)
    return {
        "rows": n,
        "sigma": sigma,
        "steps": steps,
        "probes": probes,
        "log_prob": [float(values.mean()), float(values.std()) / math.sqrt(n)],
        "bits": [float(bits.mean()), float(bits.std()) / math.sqrt(n)],
        "probe_error": float(errors.square().sum().sqrt()) / n,
        "halved": [float(moved.mean()), float(moved.abs().max())],
        "seconds": watch.cpu,
    }


def gaussian_bits(trained: Trained, rows: Tensor, seed: int) -> list[float]:
    """Bits per dimension of a Gaussian with the dequantised training rows' mean and covariance."""
    train, held = trained.dataset.train.flatten(1).double(), dequantised(rows, generator(seed, 30)).flatten(1).double()
    # The variance of the dequantising noise is known, and keeps the covariance invertible.
    root = torch.linalg.cholesky(train.T.cov() + torch.eye(held.shape[1], dtype=torch.float64) / 12.0)
    law = torch.distributions.MultivariateNormal(train.mean(0), scale_tril=root)
    bits = bits_per_dim(law.log_prob(held), held.shape[1])
    return [float(bits.mean()), float(bits.std()) / math.sqrt(len(bits))]


def own_density(trained: Trained, sigma: float, rows: Tensor, options: Options) -> dict[str, Any]:
    """An energy's own log-density of rows with noise of sigma, minus its bracketed log Z, beside its flow's.

    Both in nats per row, model units; the differences' errors are those over rows.
    """
    energy = trained.model
    assert isinstance(energy, gb.Energy)
    rng = generator(options.seed, 40)
    x = trained.dataset.scaling().forward(dequantised(rows, rng))
    x = x + sigma * torch.randn(x.shape, generator=rng)
    density, base, chains = energy.given(sigma=sigma), trained.base(SIGMA_MAX), 64
    start = reverse(energy, base.sample(chains, rng), rho_levels(SIGMA_MAX, sigma, 32, 7.0), Heun())
    tuned = gb.tune(density, HMC(0.5 * sigma, leapfrog=5), start, rng=rng, steps=options.scaled(40, 20))
    draws = gb.sample(density, tuned.kernel, tuned.state, steps=options.scaled(50, 4), rng=rng).x
    path = noise_levels(energy, [SIGMA_MAX, sigma], base, share=0.02)
    log_z = bracket(density, base, draws, rng=rng, path=path, temperatures=options.scaled(1000, 10))
    with torch.no_grad():
        own = -density(x).double()
    flow = flow_log_prob(energy, x, sigma, SIGMA_MAX, steps=32).log_prob.double()

    def mean(values: Tensor) -> list[float]:
        return [float(values.mean()), float(values.std()) / math.sqrt(len(values))]

    return {
        "sigma": sigma,
        "rows": len(x),
        "log_z": [float(v) for v in log_z[:4]],
        "own": mean(own - float(log_z.value)),
        "flow": mean(flow),
        "difference": mean(own - float(log_z.value) - flow),
    }
