"""Objectives that train generators: their gradients are the exact ones, and generators become like their targets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.latents import GaussianProposal
from gibbsian.energies.networks import Dense
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import amortised_divergence
from gibbsian.objectives.amortised import CooperativeLearning
from gibbsian.objectives.amortised_divergence import EntropyRegularised, GeneratorKL
from gibbsian.objectives.base import Batch, Ramp
from gibbsian.objectives.contrastive import ContrastiveDivergence
from gibbsian.objectives.sleep import SleepPhase
from gibbsian.objectives.starts import Starts
from gibbsian.training.generators import fit_generator

D = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def affine(inputs=1, outputs=2):
    """A linear generator, whose density with noise is a Gaussian."""
    torch.manual_seed(1)
    net = nn.Linear(inputs, outputs).double()
    return GeneratorNetwork(net, outputs, gb.Gaussian(inputs).double())


class Bowl(Energy):
    """A Gaussian's energy with a mean that learns."""

    def __init__(self, dim=2):
        super().__init__()
        self.event_shape = torch.Size([dim])
        self.mean = nn.Parameter(torch.linspace(-0.5, 1.0, dim, dtype=D))

    def forward(self, x):
        return 0.8 * (x - self.mean).square().sum(1)


def exact_divergence(energy, generator, scale, weight=1.0):
    """E_q[E] - weight H(q) for a linear generator and a `Bowl`, with the graph of the generator."""
    w, b = generator.net.weight, generator.net.bias
    covariance = w @ w.T + scale**2 * torch.eye(len(b), dtype=D)
    mean_energy = 0.8 * ((b - energy.mean.detach()).square().sum() + covariance.trace())
    return mean_energy - weight * 0.5 * torch.logdet(2 * math.pi * math.e * covariance)


def check_gradient(weight=1.0, scale=0.6, width=None, draws=16, batches=60, n=256):
    """The generator's mean gradient over batches against the exact one; the energy gets none.

    A t statistic with 59 degrees of freedom exceeds 6.5 once in 5e7. Self-normalised weights are biased by O(1/K), and
    a hundredth of the gradient is allowed for it; linearised posteriors are exact here.
    """
    energy, generator = Bowl(), affine()
    objective = GeneratorKL(generator, scale, draws, weight, width=width).double()
    params = list(generator.net.parameters())
    exact = torch.autograd.grad(exact_divergence(energy, generator, scale, weight), params)
    expected = torch.cat([g.flatten() for g in exact])
    rng, found = seeded(2), []
    for _ in range(batches):
        loss = objective(energy, Batch(torch.zeros(n, 2, dtype=D)), rng)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss.value, params, retain_graph=True)]))
        assert torch.autograd.grad(loss.value, energy.mean, allow_unused=True)[0] is None
    g = torch.stack(found)
    error = g.std(0) / len(g) ** 0.5
    missed = ((g.mean(0) - expected).abs() - 0.01 * expected.norm()).clamp(min=0.0) / error
    assert float(missed.max()) < 6.5, f"missed: {missed}"
    assert float((expected / error).abs().max()) > 20, "no power"
    assert float(loss.metrics["entropy_ess"]) > (0.3 if width else 0.999)


@pytest.mark.parametrize("options", [{}, {"weight": 0.3}, {"width": 0.6, "draws": 256}], ids=repr)
def test_the_gradient_is_that_of_the_divergence(options):
    check_gradient(**options)


def test_a_gradient_without_the_entropy_is_caught(monkeypatch):
    forward = amortised_divergence.LatentSamples.forward
    monkeypatch.setattr(amortised_divergence.LatentSamples, "forward", no_score(forward))
    with pytest.raises(AssertionError, match="missed"):
        check_gradient()


def no_score(forward):
    def twin(self, *args):
        told = forward(self, *args)
        return told._replace(score=torch.zeros_like(told.score))

    return twin


def test_a_score_by_the_true_latent_alone_is_caught(monkeypatch):
    """The twin that takes the latent which made x for a draw of the posterior: its score is -noise / scale."""

    def twin(self, generator, scale, z, x, rng):
        told = real(self, generator, scale, z, x, rng)
        return told._replace(score=(generator(z).detach() - x) / scale**2)

    real = amortised_divergence.LatentSamples.forward
    monkeypatch.setattr(amortised_divergence.LatentSamples, "forward", twin)
    with pytest.raises(AssertionError, match="missed"):
        check_gradient()


@pytest.mark.parametrize(("width", "draws", "slack"), [(None, 8, 1e-6), (1.0, 4096, 0.1)])
def test_entropy_and_score_are_those_of_a_gaussian(width, draws, slack):
    generator, scale = affine(2, 3), 1.0
    w = generator.net.weight.detach()
    covariance = w @ w.T + scale**2 * torch.eye(3, dtype=D)
    samples = amortised_divergence.LatentSamples(generator, draws, width).double()
    z = torch.randn(64, 2, dtype=D, generator=seeded(3))
    x = generator(z).detach() + scale * torch.randn(64, 3, dtype=D, generator=seeded(4))
    told = samples(generator, scale, z, x, seeded(5))
    exact = -torch.linalg.solve(covariance, (x - generator.net.bias.detach()).T).T
    if width is None:
        # Each sample is one of the exact posterior, whose mean they scatter around.
        told = samples(generator, scale, *(t.repeat(500, 1) for t in (z, x)), seeded(5))
        score = told.score.view(500, 64, 3)
        assert float(((score.mean(0) - exact) / (score.std(0) / 500**0.5)).abs().max()) < 6
    else:
        assert float((told.score - exact).square().mean().sqrt()) < slack * float(exact.square().mean().sqrt())
    law = torch.distributions.MultivariateNormal(generator.net.bias.detach(), covariance)
    # Of the same points, so that only the weights' error is left.
    assert float(told.entropy) == pytest.approx(float(-law.log_prob(x).mean()), abs=slack)
    assert not any(t.requires_grad for t in told[:3])


def test_widths_learn_the_posterior():
    """The bound is highest where the width is the posterior's standard deviation: 1 / sqrt(1 + |w|^2 / scale^2)."""
    generator, scale = affine(1, 2), 0.5
    widths = amortised_divergence.LatentSamples(generator, 20, 1.0).double()
    best = (1.0 + generator.net.weight.square().sum() / scale**2).rsqrt()
    optimiser, rng = torch.optim.Adam(widths.parameters(), lr=0.05), seeded(6)
    for _ in range(100):
        z = torch.randn(100, 1, dtype=D, generator=rng)
        x = generator(z).detach() + scale * torch.randn(100, 2, dtype=D, generator=rng)
        optimiser.zero_grad()
        widths(generator, scale, z, x, rng).loss.backward()
        optimiser.step()
    assert float(widths.log_width.detach().exp()) == pytest.approx(float(best.detach()), rel=0.05)


@pytest.mark.parametrize("name", ["cooperative", "entropy"])
def test_the_energy_gets_the_contrastive_gradient_and_the_generator_its_own(name):
    energy, generator = Bowl(), affine()
    x = torch.randn(64, 2, dtype=D, generator=seeded(1))
    if name == "cooperative":
        objective = CooperativeLearning(generator, gb.ULA(0.05), 3, 0.2)
        rng = seeded(2)
        z, _, start = objective.draw(64, rng)
        refined = gb.sample(energy, gb.ULA(0.05), start.detach(), steps=3, rng=rng).x
        own = 0.5 * (refined - generator(z)).square().sum(1).mean()
    else:
        objective = EntropyRegularised(generator, 0.3, gradient_penalty=0.2).double()
        refined = objective.draw(64, seeded(2)).x.detach()
        own = None
    loss = objective(energy, Batch(x), seeded(2))
    down = torch.autograd.grad(loss.value, [energy.mean, *generator.net.parameters()])
    value = energy(x).mean() - energy(refined).mean()
    if name == "entropy":
        value = value + 0.2 * (1.6 * (x - energy.mean)).square().sum(1).mean()
    torch.testing.assert_close(down[0], torch.autograd.grad(value, energy.mean)[0])
    if own is not None:
        for a, b in zip(down[1:], torch.autograd.grad(own, list(generator.net.parameters()))):
            torch.testing.assert_close(a, b)
    assert {"gap", "energy_data", "energy_samples", "coverage", "entropy_gap"} <= loss.metrics.keys()
    assert not any(m.requires_grad for m in loss.metrics.values())


def test_latents_are_refined_towards_what_was_refined():
    generator = affine()
    plain, moved = (
        CooperativeLearning(generator, gb.ULA(0.05), 20, 0.2, **options)
        for options in ({}, {"latent_kernel": gb.MALA(0.02), "latent_steps": 40})
    )
    batch = Batch(torch.randn(512, 2, dtype=D, generator=seeded(1)))
    before, after = (float(o(Bowl(), batch, seeded(2)).metrics["generator_loss"]) for o in (plain, moved))
    assert after < 0.8 * before


TARGET = gb.Gaussian(loc=torch.tensor([1.0, -1.0]), covariance=torch.tensor([[1.0, 0.6], [0.6, 0.8]]))


def network(seed=0):
    torch.manual_seed(seed)
    return GeneratorNetwork(Dense(2, 2, (32,)), 2, 2)


def moments_of(draws):
    return torch.cat((draws.mean(0), draws.T.cov().flatten()))


MOMENTS = torch.cat((TARGET.loc, torch.tensor([1.0, 0.6, 0.6, 0.8])))


def test_a_generator_learns_a_given_energy():
    generator = network()
    done = fit_generator(
        TARGET, generator, rng=seeded(), scale=0.2, steps=400, learning_rate=1e-2, batch_size=128, tensorboard=False
    )
    draws = generator.sample(20_000, seeded(1)).detach()
    draws = draws + 0.2 * torch.randn(draws.shape, generator=seeded(2))
    assert torch.allclose(moments_of(draws), MOMENTS, atol=0.12), moments_of(draws)
    assert "coverage" not in done.history[-1]
    assert done.events == []


def test_parameters_of_a_given_energy_stay_as_they_are():
    energy = gb.MLP(2, hidden=(8,)) + TARGET
    before = copy.deepcopy(energy.state_dict())
    fit_generator(energy, network(), rng=seeded(), steps=3, batch_size=16, weight_decay=0.1)
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())
    assert all(p.requires_grad for p in energy.parameters())


def trained(make, steps=300, **options):
    """Fit a Gaussian's energy and a generator to draws of a Gaussian; the energy's mean and the generator's moments."""
    data = TARGET.sample(2000, seeded(3))
    torch.manual_seed(0)
    energy = gb.Energy.of(Tilted())
    objective = make(network())
    done = gb.fit(energy, data, objective, rng=seeded(4), steps=steps, batch_size=128, **options)
    return energy, objective, done


class Tilted(Energy):
    """x A x / 2 - b x, with A = L L^T + 0.1."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size([2])
        self.factor, self.tilt = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))

    @property
    def precision(self):
        return self.factor @ self.factor.T + 0.1 * torch.eye(2)

    def forward(self, x):
        return 0.5 * (x @ self.precision * x).sum(1) - x @ self.tilt


MAKE = {
    "cooperative": lambda g: CooperativeLearning(g, gb.MALA(0.3), 5, 0.3, latent_kernel=gb.MALA(0.05), latent_steps=5),
    "entropy": lambda g: EntropyRegularised(g, 0.2, 10, gradient_penalty=0.0),
}


@pytest.mark.parametrize("name", list(MAKE))
def test_energy_and_generator_both_learn_the_data(name):
    energy, objective, done = trained(MAKE[name], learning_rate=3e-2, warmup_steps=20, ema_decay=0.98)
    covariance = energy.precision.detach().inverse()
    found = torch.cat((covariance @ energy.tilt.detach(), covariance.flatten()))
    # The data's own error is 0.03; the rest is what 300 steps leave.
    assert torch.allclose(found, MOMENTS, atol=0.2), f"energy: {found}"
    draws = objective.sample(20_000, seeded(5))
    assert torch.allclose(moments_of(draws), MOMENTS, atol=0.3), f"generator: {moments_of(draws)}"
    assert done.events == []
    assert done.history[-1]["coverage"] > 0.8


def test_the_sampler_is_a_start_for_every_kernel():
    energy, objective = Bowl(), CooperativeLearning(affine(), gb.MALA(0.2), 4, 0.1)
    run = objective.short_run
    draws = run.sample(energy, 50, seeded(1))
    again = gb.sample(energy, gb.MALA(0.2), objective.sample(50, rng := seeded(1)), steps=4, rng=rng)
    assert torch.equal(draws.x, again.x)
    for kernel in (gb.ULA(0.1), gb.HMC(0.3, leapfrog=2), gb.RandomWalk(0.3)):
        bare = gb.ShortRun(kernel, 3, objective.generator).sample(energy, 8, seeded(2))
        from_network = gb.sample(energy, kernel, objective.generator.sample(8, seeded(3)), steps=3, rng=seeded(4))
        for found in (bare, from_network):
            assert not any(
                t.requires_grad for t in (found.x, found.state.energy, found.state.grad, *found.state.origin)
            )


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_generators_learning_rate_is_a_multiple(factor):
    """The first step of AdamW is its learning rate, whatever the gradient."""
    energy, generator = Bowl(), affine()
    objective = CooperativeLearning(generator, gb.ULA(0.05), 2, 0.2, learning_rate_factor=factor)
    both = objective + 0.5 * ContrastiveDivergence(gb.ULA(0.05), starts=Starts(data=1.0))
    before = [p.detach().clone() for p in (energy.mean, generator.net.bias)]
    data = torch.randn(32, 2, dtype=D, generator=seeded())
    gb.fit(energy, data, both, rng=seeded(1), steps=1, warmup_steps=0, ema_decay=0.0, learning_rate=1e-3)
    moved = [float((p.detach() - b).abs().max()) for p, b in zip((energy.mean, generator.net.bias), before)]
    assert moved == pytest.approx([1e-3, factor * 1e-3], rel=1e-3)


def test_a_broken_off_run_goes_on_exactly(tmp_path):
    x = TARGET.sample(64, seeded(3))
    options = {"steps": 20, "batch_size": 16, "checkpoint_every": 5, "log_every": 5, "tensorboard": False}

    def train(folder, **more):
        torch.manual_seed(0)
        energy = gb.MLP(2, hidden=(8,)) + gb.Gaussian(2)
        objective = EntropyRegularised(network(), 0.2, 4, Ramp(2.0, 1.0, 10), learning_rate_factor=0.5)
        gb.fit(energy, x, objective, rng=seeded(1), folder=tmp_path / folder, **options, **more)
        return energy, objective

    plain = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 10)])
    again = train("b", resume=True)
    for one, two in zip(plain, again):
        for name, value in one.state_dict().items():
            assert (
                value == two.state_dict()[name]
                if isinstance(value, int)
                else torch.equal(value, two.state_dict()[name])
            )
    assert plain[1].calls == 20


def test_the_law_of_latents_learns_in_its_sleep():
    generator, scale = affine(1, 2), 0.5
    law = GaussianProposal(nn.Linear(2, 2).double(), 1)
    objective, rng = SleepPhase(generator, law, scale), seeded(1)
    optimiser = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        objective(Bowl(), Batch(torch.zeros(256, 2)), rng).value.backward()
        optimiser.step()
    assert not any("net.weight" in name and "law" not in name for name, _ in objective.named_parameters())
    w = generator.net.weight.detach()[:, 0]
    precision = 1.0 + w.square().sum() / scale**2
    x = torch.randn(5, 2, dtype=D, generator=seeded(2))
    mean, log_scale = law.law(x)
    exact = (x - generator.net.bias) @ w / scale**2 / precision
    assert torch.allclose(mean[:, 0], exact, atol=0.15)
    assert torch.allclose(log_scale.exp(), precision.rsqrt().expand(5, 1), rtol=0.15)


def test_what_does_not_fit_is_refused():
    generator = affine()
    with pytest.raises(ArgumentTypeError, match="GeneratorNetwork"):
        CooperativeLearning(nn.Linear(2, 2), gb.ULA(0.1))
    with pytest.raises(ArgumentTypeError, match="need a kernel"):
        CooperativeLearning(generator, gb.ULA)
    with pytest.raises(OptionError, match="positive whole"):
        GeneratorNetwork(Dense(1, 2), 2, latent=0)
    for options, message in (
        ({"steps": 0}, "1 or more"),
        ({"steps": -3}, "1 or more"),
        ({"scale": -0.1}, "scale is 0 or more"),
        ({"latent_steps": -1}, "latent_steps is 0 or more"),
        ({"latent_steps": 2}, "refined by a kernel"),
        ({"latent_steps": 2, "latent_kernel": gb.MALA(0.1), "scale": 0.0}, "positive scale"),
        ({"energy_penalty": -1.0}, "energy_penalty"),
        ({"learning_rate_factor": 0.0}, "learning_rate_factor is positive"),
    ):
        with pytest.raises(OptionError, match=message):
            CooperativeLearning(generator, gb.ULA(0.1), **options)
    for options, message in (
        ({"scale": 0.0}, "no entropy"),
        ({"scale": -1.0}, "no entropy"),
        ({"draws": 0}, "1 or more"),
        ({"width": 0.0}, "width is a positive"),
        ({"entropy_weight": -1.0}, "entropy_weight is 0 or more"),
        ({"entropy_weight": Ramp(1.0, -1.0, 5)}, "entropy_weight is 0 or more"),
    ):
        for kind in (GeneratorKL, EntropyRegularised):
            with pytest.raises(OptionError, match=message):
                kind(generator, **options)
    with pytest.raises(OptionError, match="gradient_penalty"):
        EntropyRegularised(generator, gradient_penalty=-1.0)
    with pytest.raises(DomainError, match="normal latents"):
        GeneratorKL(GeneratorNetwork(nn.Linear(2, 2), 2, gb.Uniform(2)))
    x = torch.randn(8, 2, dtype=D)
    for objective in (
        CooperativeLearning(generator, gb.ULA(0.1)),
        EntropyRegularised(generator),
        GeneratorKL(generator),
    ):
        objective.double()
        with pytest.raises(ShapeError, match=r"makes points of shape \(2,\), and the energy takes \(3,\)"):
            objective(Bowl(3), Batch(torch.randn(8, 3, dtype=D)), seeded())
        with pytest.raises(ShapeError, match="a row of the data takes"):
            objective(Energy.of(lambda x: x.square().sum(1)), Batch(torch.randn(8, 3, dtype=D)), seeded())
        with pytest.raises(DomainError, match="real points"):
            objective(gb.Bernoulli(probs=torch.full((2,), 0.5, dtype=D)), Batch(x.sign().clamp(min=0)), seeded())
        with pytest.raises(OptionError, match="conditional on y"):
            objective(gb.MLP(2, classes=2).double(), Batch(x, {"y": torch.zeros(8).long()}), seeded())
        with pytest.raises(OptionError, match="deepcopy"):
            objective(Holding(generator), Batch(x), seeded())
        assert "scale" in repr(objective)
    with pytest.raises(ShapeError, match="makes points"):
        fit_generator(gb.Gaussian(3), network(), rng=seeded())
    with pytest.raises(OptionError, match="2 or more"):
        fit_generator(TARGET, network(), rng=seeded(), batch_size=1)
    with pytest.raises(ArgumentTypeError, match="GaussianProposal"):
        SleepPhase(generator, nn.Linear(2, 2), 0.1)
    with pytest.raises(OptionError, match="positive standard"):
        SleepPhase(generator, GaussianProposal(nn.Linear(2, 2), 1), 0.0)


class Holding(Energy):
    """An energy with a generator inside."""

    event_shape = torch.Size([2])

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return x.square().sum(1)
