"""Objectives that run chains: known models are recovered, and gradients are those of enumerated likelihoods."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from enumeration import binary_system, one_hot_system
from gibbsian.objectives import contrastive
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.starts import Starts
from recovery import CASES, GAUSSIAN, QUARTIC, REPLICATES, Z, assert_recovered, descend, estimates, flat, seeded, slope

F64 = torch.float64
KERNELS = {"gaussian": gb.HMC(0.5, 3), "laplaces": gb.HMC(0.5, 3), "quartic": gb.HMC(0.25, 4)}
STEPS = {"gaussian": 100, "laplaces": 100, "quartic": 200}
RATES = {"gaussian": 0.1, "laplaces": 0.1, "quartic": 0.4}
POWER = {"gaussian": 0.1, "laplaces": 0.2, "quartic": 0.25}


def persistent(case, n, starts=None):
    """Chains as many as rows, nearly in equilibrium as the parameters move ever more slowly."""
    kernel, base = KERNELS[case.name], gb.Gaussian(case.rows(1, seeded()).shape[1], scale=0.8).double()
    if starts is not None:
        return ContrastiveDivergence(kernel, steps=10, starts=starts, base=base, buffer_size=n)
    return PersistentContrastiveDivergence(kernel, base, steps=1, buffer_size=n, restart=0.0)


def found(case, n, replicates=REPLICATES):
    def solve(*args):
        descend(*args, steps=STEPS[case.name], rate=RATES[case.name])

    return estimates(lambda: persistent(case, n), case, n, replicates, solve)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_persistent_chains_recover_the_parameters(case):
    assert_recovered(found(case, 1000), case.truth, POWER[case.name])


def test_the_error_falls_as_the_square_root_of_the_rows():
    measured = slope(lambda n: found(GAUSSIAN, n, 12), GAUSSIAN.truth, (125, 500, 2000))
    # Of 60 numbers at each end, a scatter is known to a tenth, and the slope over four octaves to a twentieth.
    assert measured == pytest.approx(-0.5, abs=0.2)


def flipped(*args):
    value, metrics = ORIGINAL(*args)
    return -value, metrics


def halved(energy, data, samples, data_context, samples_context, penalty=0.0):
    return energy(data).mean() - 0.5 * energy(samples).mean(), {}


ORIGINAL = contrastive.contrast


@pytest.mark.parametrize("twin", [flipped, halved])
def test_broken_losses_are_caught(monkeypatch, twin):
    monkeypatch.setattr(contrastive, "contrast", twin)
    with pytest.raises(AssertionError, match=r"missed|no power"):
        assert_recovered(found(GAUSSIAN, 200, 8), GAUSSIAN.truth, 1e9)


def gradient_at_truth(kernel, steps, case, off=0.0, n=2000):
    """Gradients of independent data sets, ``(replicates, k)``."""
    rows = []
    for seed in range(REPLICATES):
        energy = case.at_truth()
        with torch.no_grad():
            next(energy.parameters()).add_(off)
        data = case.rows(n, seeded(seed))
        ContrastiveDivergence(kernel, steps=steps)(energy, Batch.of(data), seeded(50 + seed)).value.backward()
        rows.append(torch.cat([p.grad.flatten() for p in energy.parameters()]))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("steps", [1, 5])
def test_short_chains_from_data_have_no_bias_at_the_truth(case, steps):
    """Exact draws are exact draws after any number of exact steps."""
    found = gradient_at_truth(gb.MALA(0.3), steps, case)
    assert_recovered(found, torch.zeros(found.shape[1]), 0.5)


def test_what_is_not_the_truth_or_not_exact_shows_in_that_gradient():
    zero = torch.zeros(3)
    for found in (
        gradient_at_truth(gb.MALA(0.3), 5, QUARTIC, off=0.5),
        gradient_at_truth(gb.ULA(0.1), 5, QUARTIC, n=10_000),
    ):
        with pytest.raises(AssertionError, match="missed"):
            assert_recovered(found, zero, 0.5)


class Tilted(gb.Energy):
    """An enumerated system's energy times a learned number, with a learned field at every state's coordinate."""

    def __init__(self, system) -> None:
        super().__init__()
        self.system = system
        self.event_shape, self.support = system.energy.event_shape, system.energy.support
        d = self.event_shape.numel()
        self.beta = nn.Parameter(torch.tensor(0.8, dtype=F64))
        self.field = nn.Parameter(0.3 * torch.randn(d, generator=seeded(5), dtype=F64))

    def forward(self, x):
        return self.beta * self.system.energy(x) + x.flatten(1) @ self.field

    def features(self, x):
        """Gradient of each row's energy, ``(n, 1 + d)``."""
        return torch.cat((self.system.energy(x)[:, None], x.flatten(1)), 1)


BITS, HOT = binary_system(), one_hot_system()
DISCRETE = {
    "GibbsWithGradients": (BITS, gb.GibbsWithGradients(), 80),
    "DiscreteLangevin": (BITS, gb.DiscreteLangevin(0.5), 80),
    "SingleSiteGibbs": (BITS, gb.SingleSiteGibbs(), 80),
    "PathAuxiliary": (HOT, gb.PathAuxiliary(2), 60),
    "SingleSiteGibbs, one-hot": (HOT, gb.SingleSiteGibbs(), 60),
}


def check_enumerable(name, starts, n=16_000):
    """The gradient of long chains is that of the enumerated likelihood, within Monte-Carlo error.

    The errors are of n independent chains, known exactly; 6 of them over at most 10 numbers: a false alarm in 5e7.
    """
    system, kernel, steps = DISCRETE[name]
    energy, rng = Tilted(system), seeded(7)
    data = system.states[torch.multinomial(system.law, n, replacement=True, generator=rng)]
    shape = system.states.shape[1:]
    uniform = torch.full(shape, 1.0 / shape[-1] if system.hot else 0.5, dtype=F64)
    base = (gb.Categorical if system.hot else gb.Bernoulli)(probs=uniform)
    objective = ContrastiveDivergence(kernel, steps=steps, starts=starts, base=base, buffer_size=n)
    objective(energy, Batch.of(data), rng).value.backward()
    grad = torch.cat([p.grad.flatten() for p in energy.parameters()])

    truth = energy(data).mean() + torch.logsumexp(-energy(system.states), 0)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(truth, list(energy.parameters()))])
    law = (-energy(system.states)).softmax(0).detach()
    features = energy.features(system.states)
    variance = law @ features.square() - (law @ features).square()
    z = (grad - exact) / (variance / n).sqrt()
    assert bool((z.abs() < 6).all()), f"missed: z = {z.tolist()}"
    assert float((exact / (variance / n).sqrt()).abs().max()) > 20, "no power"


MIXED = Starts(data=0.3, noise=0.3, buffer=0.4)


@pytest.mark.parametrize("starts", [Starts(data=1.0), Starts(noise=1.0), MIXED], ids=["data", "noise", "mixed"])
@pytest.mark.parametrize("name", DISCRETE)
def test_long_chains_have_the_enumerated_gradient(name, starts):
    check_enumerable(name, starts)


@pytest.mark.parametrize("twin", [flipped, halved])
def test_broken_gradients_of_enumerable_models_are_caught(monkeypatch, twin):
    monkeypatch.setattr(contrastive, "contrast", twin)
    with pytest.raises(AssertionError, match="missed"):
        check_enumerable("GibbsWithGradients", MIXED)


@pytest.mark.slow
def test_mixed_starts_recover_too():
    """Ten steps of HMC forget where they started, so that any start is maximum likelihood."""

    def solve(*args):
        descend(*args, steps=50, rate=0.2)

    found = estimates(lambda: persistent(GAUSSIAN, 300, MIXED), GAUSSIAN, 300, REPLICATES, solve)
    assert_recovered(found, GAUSSIAN.truth, 0.25)


def short_run_precision(variance, k, h, start):
    """The precision with which k Langevin steps from N(0, start) end with a variance, by bisection."""
    low, high = 0.05, 1.9 / h
    for _ in range(200):
        p = 0.5 * (low + high)
        v = start
        for _ in range(k):
            v = (1 - h * p) ** 2 * v + 2 * h
        low, high = (p, high) if v > variance else (low, p)
    return p


def test_a_short_run_model_is_fitted_as_a_run_and_not_as_a_density():
    """Ten steps from a wide start: the runs have the data's variance, and the precision is the one that makes it so."""
    k, h, start, n = 10, 0.05, 6.0, 4000
    data = torch.randn(n, 1, generator=seeded(3), dtype=F64)
    data = (data - data.mean()) / data.std(correction=0)

    class Bowl(gb.Energy):
        def __init__(self) -> None:
            super().__init__()
            self.precision = nn.Parameter(torch.tensor(1.0, dtype=F64))

        def forward(self, x):
            return 0.5 * self.precision * x.square().sum(1)

    energy, base = Bowl(), gb.Gaussian(1, scale=math.sqrt(start)).double()
    objective = ContrastiveDivergence(gb.ULA(h), steps=k, starts=Starts(noise=1.0), base=base)
    descend(objective, energy, data, steps=300, rate=0.1)
    expected = short_run_precision(1.0, k, h, start)
    # The variance of 4000 runs is known to 0.022 at each of 150 steps, which sets the precision to about 0.005.
    assert expected > 2.0
    assert float(flat(energy)) == pytest.approx(expected, abs=0.05)
    runs = objective.short_run.sample(energy, 50_000, seeded(9)).x
    # Six standard errors of a variance, and the precision's part in it.
    assert abs(float(runs.var()) - 1.0) < 6 * math.sqrt(2 / 50_000) + 0.02


def test_tempered_chains_fit_the_energy_times_the_temperature():
    """Noise of half the standard deviation is a temperature of a quarter: p^4 is fitted to the data."""
    h, n, replicates = 0.01, 1000, 12
    rows = []
    for seed in range(replicates):
        x = 0.7 * torch.randn(n, 1, generator=seeded(seed), dtype=F64)
        theta = nn.Parameter(torch.tensor(0.8, dtype=F64))

        class Bowl(gb.Energy):
            def __init__(self, theta=theta) -> None:
                super().__init__()
                self.theta = theta

            def forward(self, x):
                return 0.5 * self.theta * x.square().sum(1)

        energy, kernel = Bowl(), gb.ULA(4 * h, noise_scale=math.sqrt(2 * h))
        objective = PersistentContrastiveDivergence(
            kernel, gb.Gaussian(1, scale=0.7).double(), steps=10, buffer_size=n, restart=0.0
        )
        descend(objective, energy, x, seed, steps=100, rate=0.05)
        rows.append(flat(energy))
    measured = torch.stack(rows)
    # The unadjusted chain's own variance, T / (p (1 - h p / 2)) with T = 1/4, is the data's 0.49.
    truth = next(p for p in torch.linspace(0.4, 0.6, 200_001).tolist() if 0.25 / (p * (1 - 2 * h * p)) < 0.49)
    error = measured.std() / math.sqrt(replicates)
    assert float(error) * Z < 0.1
    assert abs(float(measured.mean()) - truth) < Z * float(error)
    assert abs(float(measured.mean()) - 1 / 0.49) > 1.0
