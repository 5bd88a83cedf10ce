"""Adversarial training: the game's gradients are the exact ones, generators approach the data, logits the log-ratio."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from gibbsian import MLP, fit
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.networks import Dense
from gibbsian.energies.reconstruction import ReconstructionEnergy
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import adversarial
from gibbsian.objectives.adversarial import Adversarial, EnergyBasedGAN, pulling_away
from gibbsian.objectives.base import Batch
from recovery import seeded

D = torch.float64
NODES = torch.linspace(-12.0, 12.0, 4001, dtype=D)[:, None]
STEP = float(NODES[1] - NODES[0])


class Bowl(Energy):
    """A parabola on the line, with its floor: depth, centre and log width."""

    event_shape = torch.Size([1])

    def __init__(self, floor=-0.5, m=0.6, log_s=-0.1) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([floor, m, log_s], dtype=D))

    def forward(self, x):
        return self.theta[0] + 0.5 * ((x[:, 0] - self.theta[1]) / self.theta[2].exp()).square()

    def codes(self, x):
        return torch.stack((x[:, 0], x[:, 0] - 1.0), 1)


def affine(a=0.7, b=-0.2):
    """A generator whose points are normal with mean b and standard deviation a."""
    net = nn.Linear(1, 1, dtype=D)
    with torch.no_grad():
        net.weight.fill_(a)
        net.bias.fill_(b)
    return GeneratorNetwork(net, 1, Gaussian(loc=torch.zeros(1, dtype=D)))


def rows(n, rng):
    return 0.8 + 0.6 * torch.randn((n, 1), generator=rng, dtype=D)


def expectation(values, law):
    return STEP * ((-law(NODES)).exp() * values).sum()


DATA = Gaussian(loc=torch.tensor([0.8], dtype=D), scale=0.6)
LATENT = Gaussian(loc=torch.zeros(1, dtype=D))


def logistic(energy, generator, r1=0.0, r2=0.0):
    """Both losses by quadrature."""
    x = NODES.clone().requires_grad_()
    made = generator(NODES)
    of_data, of_draws = -energy(x), -energy(made)

    def squared_slope(at):
        (slope,) = torch.autograd.grad(-energy(at).sum(), at, create_graph=True)
        return slope[:, 0].square()

    loss = expectation(softplus(-of_data), DATA) + expectation(softplus(of_draws), LATENT)
    loss = loss + 0.5 * r1 * expectation(squared_slope(x), DATA)
    loss = loss + 0.5 * r2 * expectation(squared_slope(made.detach().requires_grad_()), LATENT)
    return loss, expectation(softplus(-of_draws), LATENT)


def paired(energy, generator, r1=0.0, r2=0.0):
    """Both losses of the game over pairs of a row and a draw, by quadrature over both."""
    nodes, weights = NODES[::10], 10 * STEP
    of_data, of_draws = -energy(nodes), -energy(generator(nodes))
    joint = weights**2 * torch.outer((-DATA(nodes)).exp(), (-LATENT(nodes)).exp())
    gap = of_data[:, None] - of_draws[None, :]
    plain, penalised = (logistic(energy, generator, *r)[0] for r in ((0.0, 0.0), (r1, r2)))
    return (joint * softplus(-gap)).sum() + penalised - plain, (joint * softplus(gap)).sum()


def hinged(energy, generator, margin):
    of_draws = energy(generator(NODES))
    loss = expectation(energy(NODES), DATA) + expectation((margin - of_draws).relu(), LATENT)
    return loss, expectation(of_draws, LATENT)


def check_game(make, exact, energy=None) -> None:
    """Each player gets the gradient of its own loss, and the value is the sum of both.

    The mean over 60 batches: a t statistic with 59 degrees of freedom exceeds 6.5 once in 5e7.
    """
    energy, generator = energy or Bowl(), affine()
    objective = make(generator)
    own, other = list(energy.parameters()), list(generator.parameters())
    loss_d, loss_g = exact(energy, generator)
    down = [*torch.autograd.grad(loss_d, own, retain_graph=True), *torch.autograd.grad(loss_g, other)]
    expected = torch.cat([*(g.flatten() for g in down), (loss_d + loss_g).detach().view(1)])
    rng, found = seeded(1), []
    for seed in range(60):
        value = objective(energy, Batch(rows(500, seeded(100 + seed))), rng).value
        grads = torch.autograd.grad(value, own + other, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, own + other)]
        found.append(torch.cat([*(g.flatten() for g in flat), value.detach().view(1)]))
    g = torch.stack(found)
    error = g.std(0).clamp(min=1e-12) / len(g) ** 0.5
    assert bool(((g.mean(0) - expected).abs() < 6.5 * error).all()), f"missed: {(g.mean(0) - expected) / error}"
    # One number may be small by chance; the others are seen at ten errors or more.
    assert float((expected / error).abs().sort().values[1]) > 10, "no power"


@pytest.mark.parametrize("options", [{}, {"r1": 0.3}, {"r1": 0.0, "r2": 0.4}], ids=["default", "r1", "r2"])
def test_the_gradients_are_those_of_the_logistic_game(options):
    check_game(lambda g: Adversarial(g, **options), lambda e, g: logistic(e, g, **({"r1": 0.1} | options)))


def test_the_gradients_are_those_of_the_relativistic_game():
    options = {"r1": 0.3, "r2": 0.2}
    check_game(lambda g: Adversarial(g, **options, relativistic=True), lambda e, g: paired(e, g, **options))
    with pytest.raises(AssertionError, match="missed"):
        check_game(lambda g: Adversarial(g, **options), lambda e, g: paired(e, g, **options))


def test_the_gradients_are_those_of_the_game_with_a_margin():
    check_game(lambda g: EnergyBasedGAN(g, margin=1.5), lambda e, g: hinged(e, g, 1.5), Bowl(0.2))


def test_an_energy_that_learns_for_the_generator_is_caught(monkeypatch):
    """The twin whose generator's loss reaches the energy's weights, too."""
    monkeypatch.setattr(adversarial, "_followed", lambda own, drawn, fake: own)
    with pytest.raises(AssertionError, match="missed"):
        check_game(Adversarial, lambda e, g: logistic(e, g, 0.1))


def test_a_generator_that_learns_from_the_other_loss_is_caught(monkeypatch):
    """The twin whose draws are not cut off: the generator gets the energy's own loss beside its own."""
    real = adversarial._points

    def attached(*args, **options):
        x, _, fake = real(*args, **options)
        return x, fake, fake

    monkeypatch.setattr(adversarial, "_points", attached)
    with pytest.raises(AssertionError, match="missed"):
        check_game(Adversarial, lambda e, g: logistic(e, g, 0.1))


def test_a_penalty_without_its_half_is_caught():
    with pytest.raises(AssertionError, match="missed"):
        check_game(lambda g: Adversarial(g, r1=0.6), lambda e, g: logistic(e, g, r1=0.3))


def test_the_margin_counts():
    with pytest.raises(AssertionError, match="missed"):
        check_game(lambda g: EnergyBasedGAN(g, margin=1.5), lambda e, g: hinged(e, g, 1.2), Bowl(0.2))


def test_pulling_away_is_the_mean_squared_cosine():
    s = torch.randn((4, 3), generator=seeded(), dtype=D)
    cosine = torch.nn.functional.cosine_similarity
    pairs = [cosine(s[i], s[j], dim=0) ** 2 for i in range(4) for j in range(4) if i != j]
    torch.testing.assert_close(pulling_away(s), torch.stack(pairs).mean())
    assert float(pulling_away(s[:1])) == 0.0
    assert float(pulling_away(s[:1].repeat(5, 1))) == pytest.approx(1.0)


def test_pulling_away_moves_the_generator_alone():
    torch.manual_seed(0)
    energy = ReconstructionEnergy(Dense(2, 3, (8,)), Dense(3, 2, (8,)), 2)
    generator = GeneratorNetwork(Dense(2, 2, (8,)), 2, latent=2)
    batch, found = Batch(torch.randn((16, 2), generator=seeded())), {}
    for weight in (0.0, 5.0):
        loss = EnergyBasedGAN(generator, pull_away=weight)(energy, batch, seeded(1))
        params = [*energy.parameters(), *generator.parameters()]
        found[weight] = torch.autograd.grad(loss.value, params)
    own = len(list(energy.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found[0.0][:own], found[5.0][:own]))
    drawn = generator.sample(16, seeded(1))
    for p, a, b in zip(generator.parameters(), found[0.0][own:], found[5.0][own:]):
        (slope,) = torch.autograd.grad(pulling_away(energy.codes(drawn)), p, retain_graph=True)
        torch.testing.assert_close(b - a, 5.0 * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [Adversarial, EnergyBasedGAN])
def test_a_generator_moves_at_its_turn_and_never_when_frozen(make):
    generator, energy = affine(), Bowl(0.2)
    objective, batch = make(generator, every=3), Batch(rows(20, seeded()))
    moved = []
    for _ in range(6):
        energy.zero_grad()
        generator.zero_grad()
        objective(energy, batch, seeded(1)).value.backward()
        moved.append(generator.net.weight.grad is not None)
        assert bool((energy.theta.grad != 0).any())
    assert moved == [True, False, False, True, False, False]
    generator.requires_grad_(False)
    assert not objective(energy, batch, seeded(1)).value.isnan()
    assert objective.state_dict()["_extra_state"] == 7
    still = make(generator.requires_grad_(True), every=None)
    generator.zero_grad()
    still(energy, batch, seeded(1)).value.backward()
    assert generator.net.weight.grad is None


def logit_errors(r1=0.0, half=False):
    """Deviations of a discriminator's three numbers from the exact log-ratio, in standard errors, generator frozen.

    With draws kept the same the loss is that of a logistic regression, and is minimised to the end.
    """
    n, generator = 10_000, affine().requires_grad_(False)
    x = rows(n, seeded(5))

    class Ratio(Energy):
        event_shape = torch.Size([1])

        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(3, dtype=D))

        def forward(self, x):
            return -torch.cat((torch.ones_like(x), x, x * x), 1) @ self.theta

    energy, objective = Ratio(), Adversarial(generator, r1=r1)
    objective.seen = True
    optimizer = torch.optim.LBFGS(energy.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(energy, Batch(x[: n // 2 if half else n]), seeded(6)).value
        loss.backward()
        return loss

    optimizer.step(closure)
    # log N(x; 0.8, 0.6) - log N(x; -0.2, 0.7)
    a, b, s, t = 0.8, -0.2, 0.6, 0.7
    truth = [math.log(t / s) - a * a / (2 * s * s) + b * b / (2 * t * t), a / s**2 - b / t**2, 0.5 / t**2 - 0.5 / s**2]
    points = torch.cat((x, generator.sample(n, seeded(6))))
    design = torch.cat((torch.ones_like(points), points, points * points), 1)
    p = -energy(points).detach()
    weight = p.sigmoid() * (-p).sigmoid()
    errors = torch.linalg.inv(design.T @ (weight[:, None] * design)).diagonal().sqrt()
    return (energy.theta.detach() - torch.tensor(truth, dtype=D)) / errors


def test_the_logit_of_a_frozen_generator_is_the_log_ratio():
    assert float(logit_errors().abs().max()) < 5.5


def test_a_penalised_logit_is_caught():
    """A penalty biases the logit, as the docstring says; the check sees a strong one."""
    assert float(logit_errors(r1=1.0).abs().max()) > 5.5


TARGET = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4)


def learned(make, energy, steps=400, **options):
    """Energy distances from the data of a generator, before and after a short run."""
    rng = seeded(3)
    data, held = TARGET.sample(4000, rng), TARGET.sample(1000, seeded(9))
    generator = GeneratorNetwork(Dense(2, 2, (32, 32)), 2, latent=2)
    before = energy_distance(generator.sample(1000, seeded(4)), held).value
    run = fit(energy, data, make(generator), rng=rng, steps=steps, batch_size=128, betas=(0.5, 0.99), **options)
    assert run.events == []
    assert {"coverage", "entropy_gap", "generator_loss", "discriminator_loss"} <= run.history[-1].keys()
    return before, energy_distance(generator.sample(1000, seeded(4)), held).value


def check_learned(distances):
    """A tenth of the first distance; two sets of 1000 draws of the data are 0.00 apart, with a spread of 0.003."""
    before, after = distances
    assert after < 0.1 * before, f"missed: {before:.3f} to {after:.3f}"


def logistic_run():
    torch.manual_seed(0)
    return learned(lambda g: Adversarial(g, r1=0.05), MLP(2, (32, 32)), learning_rate=3e-3)


def margin_run():
    torch.manual_seed(0)
    energy = ReconstructionEnergy(Dense(2, 4, (32,)), Dense(4, 2, (32,)), 2, scale=0.3)
    return learned(lambda g: EnergyBasedGAN(g, margin=1.0, pull_away=0.1), energy, learning_rate=3e-3)


@pytest.mark.parametrize("run", [logistic_run, margin_run])
def test_generators_learn_the_data(run):
    check_learned(run())


def test_a_generator_that_climbs_is_caught(monkeypatch):
    real = adversarial._followed
    monkeypatch.setattr(adversarial, "_followed", lambda own, drawn, fake: -real(own, drawn, fake))
    with pytest.raises(AssertionError, match="missed"):
        check_learned(logistic_run())


def test_a_broken_off_run_goes_on_exactly(tmp_path):
    x = TARGET.sample(64, seeded(3))
    options = {"steps": 30, "batch_size": 16, "checkpoint_every": 10, "log_every": 5}

    def train(folder, **more):
        torch.manual_seed(0)
        energy, generator = MLP(2, (8,)), GeneratorNetwork(Dense(2, 2, (8,)), 2, latent=2)
        objective = Adversarial(generator, every=3, learning_rate_factor=0.5)
        fit(energy, x, objective, rng=seeded(1), folder=tmp_path / folder, **options, **more)
        return energy, objective

    plain = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 20)])
    again = train("b", resume=True)
    for one, two in zip(plain, again):
        for name, value in one.state_dict().items():
            same = torch.equal(value, two.state_dict()[name]) if isinstance(value, torch.Tensor) else True
            assert same, name


class Probable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Dense(2, 1, (8,))

    def forward(self, x):
        return self.net(x).squeeze(1).sigmoid()


@pytest.mark.parametrize("make", [Adversarial, EnergyBasedGAN])
def test_what_does_not_fit_is_refused(make):
    generator, x = GeneratorNetwork(Dense(2, 2, (8,)), 2, latent=2), torch.randn((16, 2), generator=seeded())
    with pytest.raises(ArgumentTypeError, match="GeneratorNetwork"):
        make(Dense(2, 2))
    for options, message in (
        ({"every": 0}, "1 or more"),
        ({"learning_rate_factor": 0.0}, "positive and finite"),
    ):
        with pytest.raises(OptionError, match=message):
            make(generator, **options)
    with pytest.raises(ShapeError, match=r"makes points of shape \(3,\), and the energy takes \(2,\)"):
        fit(MLP(2), x, make(GeneratorNetwork(Dense(2, 3), 3, latent=2)), rng=seeded())
    objective = make(generator)
    with pytest.raises(OptionError, match="deepcopy"):
        objective(ReconstructionEnergy(generator, Dense(2, 2), 2), Batch(x), seeded())
    objective = make(generator)
    objective(ReconstructionEnergy(copy.deepcopy(generator), Dense(2, 2), 2), Batch(x), seeded())
    with pytest.raises(DomainError, match="discrete states"):
        objective(Bernoulli(probs=torch.full((2,), 0.5)), Batch(x), seeded())
    with pytest.raises(OptionError, match="y"):
        objective(MLP(2, classes=2), Batch(x), seeded())


def test_a_sigmoid_and_energies_below_zero_are_refused():
    generator, x = GeneratorNetwork(Dense(2, 2, (8,)), 2, latent=2), torch.randn((16, 2), generator=seeded())
    with pytest.raises(DomainError, match=r"are probabilities.*take the sigmoid away"):
        fit(Probable(), x, Adversarial(generator), rng=seeded())
    with pytest.raises(DomainError, match=r"0 or more, such as ReconstructionEnergy.*use Adversarial"):
        fit(Energy.of(lambda x: x[:, 0] - 1.0), x, EnergyBasedGAN(generator), rng=seeded())
    with pytest.raises(OptionError, match="codes of a ReconstructionEnergy"):
        EnergyBasedGAN(generator, pull_away=0.1)(Gaussian(2), Batch(x), seeded())
    for options in ({"r1": -1.0}, {"r2": math.nan}):
        with pytest.raises(OptionError, match=r"is 0\.0 or more"):
            Adversarial(generator, **options)
    with pytest.raises(OptionError, match="margin is a positive"):
        EnergyBasedGAN(generator, margin=0.0)
    with pytest.raises(OptionError, match="pull_away"):
        EnergyBasedGAN(generator, pull_away=-1.0)
