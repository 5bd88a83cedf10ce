"""Noise contrastive estimation: a Gaussian's parameters and its log Z are recovered, and its twins are caught."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gibbsian import MLP, Batch, Energy, Gaussian, LogUniform, MultiLevelDenoising, NoiseContrastiveEstimation
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives import denoising, noise_contrastive

REPLICATES = 24
Z = 8.5
"""A t statistic with 23 degrees of freedom exceeds it once in 7e7."""
M, S = 0.8, 0.6
LOG_S = math.log(S)
LOG_Z = 0.5 * math.log(2 * math.pi * S**2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Normal(Energy):
    """An unnormalised normal density; all parameters at their truth unless moved."""

    def __init__(self, m=M, log_s=LOG_S) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(log_s, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * ((x[:, 0] - self.m) / self.log_s.exp()) ** 2


def noise(dim=1):
    return Gaussian(dim=dim, scale=torch.tensor(1.5, dtype=torch.float64))


def rows(n, seed):
    return M + S * torch.randn((n, 1), generator=generator(seed), dtype=torch.float64)


def minimise(objective, energy, batch, seed=2) -> None:
    """With the same noise at every call the loss is smooth and fixed; L-BFGS finds its minimum."""
    params = [p for p in (*energy.parameters(), *objective.parameters()) if p.requires_grad]
    optimiser = torch.optim.LBFGS(params, max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimiser.zero_grad()
        value = objective(energy, batch, generator(1000 + seed)).value
        value.backward()
        return value

    optimiser.step(closure)


def check_mean(name, estimates, truth, least_power) -> None:
    """The replicates' mean is the truth within its standard error, which is small enough to see ``least_power``."""
    estimates = torch.as_tensor(estimates, dtype=torch.float64)
    assert bool(torch.isfinite(estimates).all()), f"missed {name}: not finite"
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert error * Z < least_power, f"no power: {error}"
    assert abs(float(estimates.mean()) - truth) < Z * error, f"missed {name}: {float(estimates.mean())} for {truth}"


def check_recovery(ratio=2, replicates=REPLICATES) -> None:
    found = []
    for seed in range(replicates):
        energy, objective = Normal(0.0, 0.0), NoiseContrastiveEstimation(noise(), ratio).double()
        minimise(objective, energy, Batch(rows(2000, seed)), seed)
        found.append((energy.m.item(), energy.log_s.item(), objective.log_z.item()))
    m, log_s, log_z = torch.tensor(found).T
    check_mean("m", m, M, 0.1)
    check_mean("log s", log_s, math.log(S), 0.1)
    check_mean("log Z", log_z, LOG_Z, 0.1)


@pytest.mark.parametrize("ratio", [1, 3])
def test_a_gaussian_and_its_log_z_are_recovered(ratio):
    check_recovery(ratio)


def check_gradient() -> None:
    """At the truth the gradient's mean is zero, in the energy's parameters and in c."""
    objective = NoiseContrastiveEstimation(noise(), 2).double()
    objective.log_z.data.fill_(LOG_Z)
    energy = Normal()
    params = [energy.m, energy.log_s, objective.log_z]
    rng, grads = generator(5), []
    for seed in range(60):
        loss = objective(energy, Batch(rows(1000, 100 + seed)), rng).value
        grads.append(torch.stack(torch.autograd.grad(loss, params)))
    g = torch.stack(grads)
    z = g.mean(0) / (g.std(0) / len(g) ** 0.5)
    # A t statistic with 59 degrees of freedom exceeds 6.5 once in 5e7.
    assert float(z.abs().max()) < 6.5, f"missed: gradient at the truth {g.mean(0).tolist()}"


def test_the_gradient_vanishes_at_the_truth():
    check_gradient()


TWINS = {
    "ratio forgotten": ("math", SimpleNamespace(log=lambda value: 0.0)),
    "ratio's sign": ("math", SimpleNamespace(log=lambda value: -math.log(value))),
    "loss's sign": ("softplus", lambda odds: -nn.functional.softplus(odds)),
    "odds turned round": ("softplus", lambda odds: nn.functional.softplus(-odds)),
}


@pytest.mark.parametrize("twin", [t for t in TWINS if t != "loss's sign"])
def test_a_slip_moves_the_gradient_at_the_truth(twin, monkeypatch):
    monkeypatch.setattr(noise_contrastive, *TWINS[twin])
    with pytest.raises(AssertionError, match="missed"):
        check_gradient()


@pytest.mark.parametrize("twin", ["ratio forgotten", "ratio's sign", "loss's sign"])
def test_a_slip_misses_the_parameters(twin, monkeypatch):
    monkeypatch.setattr(noise_contrastive, *TWINS[twin])
    with pytest.raises(AssertionError, match=r"missed|no power"):
        check_recovery(3, 8)


def test_noise_whose_density_is_not_normalised_moves_log_z_by_as_much():
    """The twin of a forgotten constant: c answers for it exactly."""
    found = []
    for shift in (0.0, 0.4):
        q = noise()
        q.register_forward_hook(lambda module, inputs, value, shift=shift: value + shift)
        energy, objective = Normal(0.0, 0.0), NoiseContrastiveEstimation(q).double()
        minimise(objective, energy, Batch(rows(2000, 1)))
        found.append(objective.log_z.item())
    assert found[1] - found[0] == pytest.approx(0.4, abs=1e-3)


def test_the_loss_is_that_of_the_formula():
    energy, objective = Normal(), NoiseContrastiveEstimation(noise(), 3).double()
    objective.log_z.data.fill_(0.2)
    x = rows(50, 3)
    loss = objective(energy, Batch(x), generator(4))
    q = noise().double()
    y = q.sample(150, generator(4))

    def posterior(points):
        model = (-energy(points) - 0.2).exp()
        return model / (model + 3 * (-q(points)).exp())

    expected = -posterior(x).log().mean() - 3 * (1 - posterior(y)).log().mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    correct = 0.5 * ((posterior(x) > 0.5).double().mean() + (posterior(y) < 0.5).double().mean())
    assert float(loss.metrics["accuracy"]) == pytest.approx(float(correct), abs=1e-6)
    assert not any(m.requires_grad for m in loss.metrics.values())


def test_without_a_learned_constant_the_energy_normalises_itself():
    class Free(Normal):
        def __init__(self) -> None:
            super().__init__(0.0, 0.0)
            self.c = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return super().forward(x) + self.c

    energy, learned = Free(), NoiseContrastiveEstimation(noise()).double()
    objective = NoiseContrastiveEstimation(noise(), learn_log_z=False).double()
    minimise(objective, energy, Batch(rows(2000, 1)))
    other = Normal(0.0, 0.0)
    minimise(learned, other, Batch(rows(2000, 1)))
    assert float(objective.log_z) == 0.0
    assert float(energy.c) == pytest.approx(float(learned.log_z), abs=1e-5)


def test_labels_go_with_their_rows_and_their_noise():
    seen = []

    def fn(x, y):
        seen.append((x, y))
        return (x[:, 0] - y).square()

    labels = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    x = rows(4, 1)
    NoiseContrastiveEstimation(noise(), 2)(Energy.of(fn, context=("y",)), Batch(x, {"y": labels}), generator())
    (points, y), n = seen[0], 4
    assert torch.equal(points[:n], x)
    assert torch.equal(y, labels.repeat(3))


def test_the_noise_follows_the_generator():
    objective, energy = NoiseContrastiveEstimation(noise()).double(), Normal()
    a, b, c = (float(objective(energy, Batch(rows(20, 1)), generator(s)).value) for s in (1, 1, 2))
    assert a == b
    assert a != c


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="1 or more"):
        NoiseContrastiveEstimation(noise(), 0)
    with pytest.raises(ArgumentTypeError):
        NoiseContrastiveEstimation(MLP(1))
    energy = MLP(1, classes=3).double()
    with pytest.raises(OptionError, match="y"):
        NoiseContrastiveEstimation(noise())(energy, Batch(rows(4, 1)), generator())


# The dual term of multi-level denoising, which gives noise-conditional energies their constants.


class Levels(Energy):
    """N(0, s^2) under noise, in d dimensions, with a constant of each level to be learned."""

    context = ("sigma",)

    def __init__(self, d=1, s=0.7) -> None:
        super().__init__()
        self.d, self.s = d, s
        self.theta = nn.Parameter(torch.tensor([0.3, 0.2], dtype=torch.float64))

    def forward(self, x, sigma):
        variance = self.s**2 + sigma**2
        constant = self.theta[0] * 0.5 * self.d * variance.log() + self.theta[1] * sigma.log()
        return x.square().sum(1) / (2 * variance) + constant


def fitted_levels(level_weight, d) -> torch.Tensor:
    """The two coefficients for each replicate; the normalised energy has (1, 0)."""
    found = []
    for seed in range(REPLICATES):
        energy = Levels(d)
        x = energy.s * torch.randn((3000, d), generator=generator(seed), dtype=torch.float64)
        minimise(MultiLevelDenoising(LogUniform(0.05, 5.0), level_weight=level_weight), energy, Batch(x), seed)
        found.append(energy.theta.detach().clone())
    return torch.stack(found)


def check_levels(d=1) -> None:
    theta = fitted_levels(0.3, d)
    check_mean("the normaliser", theta[:, 0], 1.0, 0.5)
    check_mean("no more than it", theta[:, 1], 0.0, 0.5)


@pytest.mark.parametrize("d", [1, 3])
def test_the_dual_term_recovers_the_constants_of_the_levels(d):
    check_levels(d)


def test_plain_denoising_is_blind_to_them():
    """Without the dual term nothing in the loss depends on the constants: they stay where they were."""
    energy = Levels()
    x = torch.randn((50, 1), generator=generator(), dtype=torch.float64)
    loss = MultiLevelDenoising(LogUniform(0.05, 5.0))(energy, Batch(x), generator()).value
    grad = torch.autograd.grad(loss, energy.theta, allow_unused=True)[0] if loss.requires_grad else None
    assert grad is None or float(grad.abs().max()) == 0.0


@pytest.mark.parametrize("twin", ["sign", "dimension forgotten"])
def test_a_dual_term_with_a_slip_is_caught(twin, monkeypatch):
    real = denoising._dual_error

    def slipped(energy, x, sigma, context, rng):
        if twin == "sign":
            return real(Energy.of(lambda x, sigma: energy(x, sigma=1 / sigma), context=("sigma",)), x, *tail(sigma))
        error, change, value = real(energy, x, sigma, context, rng)
        return error, (change.sqrt() + 1.0).square(), value

    def tail(sigma):
        return sigma, {"sigma": sigma}, generator(2)

    monkeypatch.setattr(denoising, "_dual_error", slipped)
    with pytest.raises(AssertionError, match=r"missed|no power"):
        check_levels()
