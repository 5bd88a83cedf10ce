"""Denoisers: preconditioned as stated, trained by `fit` to the exact score of a mixture, twins caught, given kept."""

from __future__ import annotations

import pytest
import torch

import gibbsian as gb
from diffusions import log_density, noisy
from gibbsian.bridges.denoisers import Denoiser, DenoiserMLP, DenoiserUNet
from gibbsian.bridges.flow_likelihood import flow_log_prob
from gibbsian.energies.score import Score
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, ShapeError
from gibbsian.objectives import denoising
from gibbsian.objectives.base import Batch
from oracles import double_precision

LOW, HIGH = 0.05, 20.0
FALLING = {"final_learning_rate_factor": 0.0, "ema_decay": 0.99}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(shape, n=60):
    return 3.0 + 0.7 * torch.randn((n, *shape), generator=generator(1), dtype=torch.float64)


def made(kind, shape) -> Denoiser:
    """Calibrated, in float64, with every weight moved away from its initial value."""
    with double_precision(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = (DenoiserUNet(shape, 4) if kind == "unet" else DenoiserMLP(shape, 8, 2, 1)).calibrate(data(shape))
        for p in found.parameters():
            p.data.add_(0.05 * torch.randn(p.shape, dtype=torch.float64))
    return found


KINDS = [("unet", (3, 8, 8)), ("mlp", (3,)), ("mlp", (2, 4))]
SIGMA = torch.tensor([0.01, 0.4, 2.0, 50.0], dtype=torch.float64)


def outer(value, x):
    return value.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_the_denoiser_is_edms_formula(kind, shape):
    denoiser, x = made(kind, shape), data(shape, 4)
    z, s2 = x - denoiser.mean, denoiser.scale.square()
    size = (s2 + SIGMA.square()).sqrt()
    phase = SIGMA.log()[:, None] * denoiser.embedding
    out = denoiser.network(z / outer(size, x), torch.cat((phase.sin(), phase.cos()), 1))
    skip, gain = s2 / size.square(), SIGMA * denoiser.scale / size
    expected = denoiser.mean + outer(skip, x) * z + outer(gain, x) * out
    torch.testing.assert_close(denoiser.denoised(x, SIGMA), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_without_the_network_it_is_the_gaussians_score(kind, shape):
    denoiser, x = made(kind, shape), data(shape, 4).requires_grad_(True)
    last = denoiser.unet.leave if isinstance(denoiser, DenoiserUNet) else denoiser.leave
    last.weight.data.zero_()
    last.bias.data.zero_()
    for sigma in SIGMA:
        (grad,) = torch.autograd.grad(denoiser.base(sigma)(x).sum(), x)
        torch.testing.assert_close(denoiser(x, sigma.expand(4)), -grad)


def test_an_energy_with_gain_and_fade_is_preconditioned_alike():
    """The gradient of h in the place of the network; without fade it is not so."""
    with double_precision():
        energies = [gb.NoiseConditionalUNet((1, 8, 8), 4, fade=fade).calibrate(data((1, 8, 8))) for fade in (1.0, 0.0)]
    for energy, same in zip(energies, (True, False)):
        x, s2 = data((1, 8, 8), 4), energy.scale.square()
        z, size = x - energy.mean, (s2 + SIGMA.square()).sqrt()
        u = (z / outer(size, x)).requires_grad_(True)
        phase = SIGMA.log()[:, None] * energy.embedding
        (slope,) = torch.autograd.grad(energy.network(u, torch.cat((phase.sin(), phase.cos()), 1)).sum(), u)
        expected = energy.mean + outer(s2 / size.square(), x) * z + outer(SIGMA * energy.scale / size, x) * slope
        found = gb.score_of(energy).denoised(x, SIGMA)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9) == same


class Wrong:
    """EDM's weight in the units of the clean point, where it belongs to an error that is sigma times as large."""

    def __call__(self, sigma):
        return (1.0 + sigma.square()) / sigma.square()


def check_even(weight) -> None:
    """On Gaussian data an untrained denoiser has the same weighted loss, half the dimension, at every level."""
    d = 64
    rows = torch.randn((4000, d), generator=generator(2), dtype=torch.float64)
    with double_precision():
        denoiser = DenoiserMLP(d, 8, 1)
    denoiser.leave.weight.data.zero_()
    denoiser.leave.bias.data.zero_()
    for sigma in (0.05, 0.5, 5.0):
        objective = gb.MultiLevelDenoising(gb.LogUniform(0.999 * sigma, 1.001 * sigma), weight)
        loss = float(objective(denoiser, Batch(rows), generator(3)).value.detach())
        # Half of chi-squared over d: the mean over rows has a standard error of 0.0014 times half of d.
        assert abs(loss / (0.5 * d) - 1.0) < 0.008, f"uneven at {sigma}: {loss}"


def test_edms_weight_makes_all_levels_alike():
    check_even(gb.EDMWeight(1.0))


@pytest.mark.parametrize("weight", [Wrong(), None])
def test_another_weight_is_caught(weight):
    with pytest.raises(AssertionError, match="uneven"):
        check_even(weight)


def trained(steps=1200) -> DenoiserMLP:
    rows = noisy(0.0).sample(8000, generator(4)).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = DenoiserMLP(2, 64, 2).calibrate(rows)
    objective = gb.MultiLevelDenoising(gb.LogNormal(-0.5, 1.2, LOW, HIGH), gb.EDMWeight(float(denoiser.scale)))
    settings = {"batch_size": 512, "learning_rate": 4e-3, "warmup_steps": 100} | FALLING
    gb.fit(denoiser, rows, objective, rng=generator(5), steps=steps, **settings)
    return denoiser


def excess(score: Score, sigma: float) -> float:
    """Mean squared error of the noise told, per coordinate and in units of what the Gaussian of the data leaves."""
    x, level = noisy(sigma).sample(4000, generator(6)), torch.full((4000,), sigma, dtype=torch.float64)
    y = x.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(log_density(y, level).sum(), y)
    found = score(x.float(), level.float()).double()
    return float((sigma * (found - exact)).square().mean()) * (1.0 + sigma**2)


def check_recovery(denoiser) -> None:
    with torch.no_grad():
        start = DenoiserMLP(2, 64, 2).calibrate(noisy(0.0).sample(8000, generator(4)).float())
        for p in start.leave.parameters():
            p.zero_()
        for sigma in (0.1, 0.3, 1.0, 3.0):
            with torch.enable_grad():
                left, before = excess(denoiser, sigma), excess(start, sigma)
            assert left < 0.02, f"the score at {sigma} is off by {left}"
            assert left < 0.2 * before, f"no better than a Gaussian at {sigma}: {left} against {before}"


@pytest.fixture(scope="module")
def denoiser():
    return trained()


def test_the_score_of_a_mixture_is_recovered(denoiser):
    check_recovery(denoiser)


def test_its_flow_has_the_mixtures_likelihood(denoiser):
    x = noisy(LOW).sample(300, generator(10))
    found = flow_log_prob(denoiser, x.float(), LOW, HIGH, steps=32).log_prob
    off = found.double() - noisy(LOW).log_prob(x)
    assert abs(float(off.mean())) < 0.05


def test_a_score_of_the_wrong_sign_is_caught(monkeypatch):
    def turned(score, x, eps, sigma, context):
        scale = sigma[:, None]
        return (eps - scale * score(x + scale * eps, sigma, **context)).square().sum(1)

    monkeypatch.setattr(denoising, "score_noise_error", turned)
    with pytest.raises(AssertionError, match="the score at"):
        check_recovery(trained(300))


class Labelled(Score):
    """A score with a label: that of one of two Gaussians at the noise level, with means that are learned."""

    context = ("y",)

    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(torch.zeros(2, 3))

    def forward(self, x, sigma, y):
        return (self.means[y] - x) / (1.0 + sigma.square())[:, None]


def test_a_score_keeps_its_labels_in_training():
    y = torch.arange(2000) % 2
    truth = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
    rows = truth[y] + torch.randn((2000, 3), generator=generator(7))
    score = Labelled()
    objective = gb.MultiLevelDenoising(gb.LogUniform(0.1, 3.0))
    assert (2.0 * objective).fits_scores
    settings = {"batch_size": 1000, "learning_rate": 0.05, "warmup_steps": 10} | FALLING
    done = gb.fit(score, Batch(rows, {"y": y}), objective, rng=generator(8), steps=300, **settings)
    assert done.energy is score
    assert "energy_noisy" not in done.history[-1]
    means = torch.stack([rows[y == k].mean(0) for k in (0, 1)])
    assert float((score.means - means).detach().abs().max()) < 0.1
    fixed, ones = gb.score_of(score).given(y=1), torch.ones(5)
    assert fixed.context == ()
    assert torch.equal(fixed(rows[:5], ones), score(rows[:5], ones, y=ones.long()))


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    rows = data((2,)).float()
    objective = gb.MultiLevelDenoising(gb.LogUniform(0.1, 3.0), gb.EDMWeight(0.7))

    def run(folder, steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            denoiser = DenoiserMLP(2, 8, 1, dropout=0.2).calibrate(rows)
        rest = {"warmup_steps": 1, "final_learning_rate_factor": 1.0}
        gb.fit(denoiser, rows, objective, rng=generator(9), folder=folder, resume=True, steps=steps, **rest)
        return denoiser

    whole = run(tmp_path / "a", 20)
    run(tmp_path / "b", 10)
    assert all(torch.equal(p, q) for p, q in zip(run(tmp_path / "b", 20).parameters(), whole.parameters()))


def fitted(score, objective, rows=None):
    rows = torch.randn((20, 2), generator=generator()) if rows is None else rows
    return gb.fit(score, rows, objective, rng=generator(), steps=2, warmup_steps=1)


LEVELS = gb.LogUniform(0.1, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fitted(DenoiserMLP(2, 4), gb.DenoisingScoreMatching(0.1)), OptionError, "is a score, which has none"),
        (
            lambda: fitted(DenoiserMLP(2, 4), gb.MultiLevelDenoising(LEVELS) + gb.ScoreMatching()),
            OptionError,
            "WeightedSum fits energies",
        ),
        (lambda: fitted(DenoiserMLP(2, 4), gb.MultiLevelDenoising(LEVELS, level_weight=0.3)), OptionError, "leave it"),
        (lambda: fitted(Labelled(), gb.MultiLevelDenoising(LEVELS), torch.randn(9, 3)), OptionError, "lacks"),
        (lambda: fitted(DenoiserMLP(3, 4), gb.MultiLevelDenoising(LEVELS)), ShapeError, r"\(3,\)"),
        (
            lambda: gb.MultiLevelDenoising(LEVELS)(DenoiserMLP(2), Batch(torch.ones(3, 2).long()), generator()),
            ArgumentTypeError,
            "floating-point",
        ),
        (lambda: DenoiserMLP(2).calibrate(torch.ones(5, 2)), DataError, "equal"),
        (lambda: DenoiserMLP(2, width=0), OptionError, "width and blocks"),
        (lambda: DenoiserMLP(2, dropout=1.0), OptionError, "dropout"),
        (lambda: DenoiserUNet((1, 8, 6)), ShapeError, "multiples of 4"),
        (lambda: DenoiserUNet((8, 8)), ShapeError, "channels, height, width"),
        (lambda: DenoiserUNet((1, 8, 8), blocks=0), OptionError, "blocks"),
        (lambda: DenoiserUNet((1, 8, 8))(torch.zeros(5, 64), torch.ones(5)), ShapeError, "Expected points"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
