"""Importance sampling, with exact densities of proposals and with estimates: log Z, bounds, and when to distrust."""

import math
import warnings

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian.energies.base import Energy
from gibbsian.energies.generator_proposals import GeneratorProposal
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.latents import GaussianProposal
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.partition.base import from_log_weights
from gibbsian.partition.importance import importance_sampling, log_importance_weights, reverse_kl_bound

D = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Quartic(Energy):
    """x^4 / 4 - x, on the line."""

    event_shape = torch.Size([1])

    def forward(self, x):
        return (0.25 * x**4 - x).sum(1)


NODES = torch.linspace(-8.0, 8.0, 8001, dtype=D)[:, None]
STEP = 0.002
TRUTH = float((-Quartic()(NODES)).logsumexp(0)) + math.log(STEP)
WIDE = gb.Gaussian(loc=torch.tensor([0.7], dtype=D), scale=1.2)


def z_of(estimate, truth=TRUTH):
    return float((estimate.value - truth) / estimate.stderr)


def test_a_gaussian_proposes():
    found = importance_sampling(Quartic(), WIDE, draws=20_000, rng=seeded())
    assert abs(z_of(found)) < 5
    assert float(found.stderr) < 0.01
    assert TRUTH - 0.2 < float(found.lower) < TRUTH
    assert math.isinf(float(found.upper))
    assert found.chains == 20_000


def test_the_stated_error_is_that_of_repetitions():
    runs = [importance_sampling(Quartic(), WIDE, draws=400, rng=seeded(s)) for s in range(200)]
    values = torch.tensor([z_of(run) for run in runs])
    # The spread of 200 normal numbers is known to 5%.
    assert float(values.std()) == pytest.approx(1.0, abs=0.25)
    assert sum(float(run.lower) > TRUTH for run in runs) <= 8


def test_a_weight_without_the_proposals_density_is_caught():
    log_w = log_importance_weights(Quartic(), WIDE, 20_000, rng=seeded())
    broken = log_w - WIDE(WIDE.sample(20_000, seeded()))
    assert abs(z_of(from_log_weights(log_w))) < 5
    assert abs(z_of(from_log_weights(broken))) > 5


def test_the_bound_is_below_by_the_divergence():
    found = reverse_kl_bound(Quartic(), WIDE, draws=20_000, rng=seeded())
    cost = WIDE(NODES)
    exact = float(((-cost).exp() * (cost - Quartic()(NODES))).sum()) * STEP
    assert abs(found.value - exact) < 5 * found.stderr
    assert exact < TRUTH


def test_bits_and_exact_proposals():
    bits = gb.Bernoulli(probs=torch.tensor([0.8, 0.3, 0.5], dtype=D))
    fair = gb.Bernoulli(probs=torch.full((3,), 0.5, dtype=D))
    shifted = Energy.of(lambda x: bits(x) + 2.0, event_shape=(3,), support=bits.support)
    assert abs(z_of(importance_sampling(shifted, fair, draws=20_000, rng=seeded()), -2.0)) < 5
    same = importance_sampling(bits, bits, draws=10, rng=seeded())
    assert float(same.value) == pytest.approx(0.0, abs=1e-12)


def test_weights_of_a_few_are_told():
    far = gb.Gaussian(loc=torch.full((6,), 3.0, dtype=D))
    with pytest.warns(RuntimeWarning, match="importance weights are dominated by a few"):
        importance_sampling(gb.Gaussian(6).double(), far, draws=500, rng=seeded())


class Bent(nn.Module):
    def forward(self, z):
        return 0.7 + z + 0.3 * torch.sin(2.0 * z)


class WithoutTheTrueLatent(GeneratorProposal):
    def _cost(self, joint, x, noise, true=None):
        return super()._cost(joint, x, noise)


def proposal(kind=GeneratorProposal, draws=2, auxiliary=None):
    return kind(GeneratorNetwork(Bent(), 1, gb.Gaussian(1).double()), 0.6, draws, auxiliary, rng=seeded(9))


def law():
    torch.manual_seed(0)
    net = nn.Linear(1, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.6], [0.0]]))
        net.bias.copy_(torch.tensor([-0.4, -0.4]))
    return GaussianProposal(net, 1)


@pytest.mark.parametrize("draws", [1, 5])
@pytest.mark.parametrize("auxiliary", [None, law(), gb.Gaussian(1, scale=1.5).double()], ids=["own", "law", "wide"])
def test_estimates_of_a_generators_density_leave_weights_exact(draws, auxiliary):
    found = importance_sampling(Quartic(), proposal(draws=draws, auxiliary=auxiliary), draws=40_000, rng=seeded(draws))
    assert abs(z_of(found)) < 5
    # With one latent more the weights have heavy tails.
    assert float(found.stderr) < (0.3 if draws == 1 else 0.02)
    bound = reverse_kl_bound(Quartic(), proposal(draws=draws, auxiliary=auxiliary), draws=10_000, rng=seeded(1))
    assert bound.value + 3 * bound.stderr < TRUTH


def test_estimates_without_the_true_latent_are_caught():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = importance_sampling(Quartic(), proposal(WithoutTheTrueLatent), draws=40_000, rng=seeded(1))
    assert z_of(found) > 5


def test_with_many_latents_the_density_is_that_of_quadrature():
    many = proposal(draws=20_000)
    x = torch.tensor([[-0.5], [0.4], [2.0]], dtype=D)
    mean = Bent()(NODES)
    log_joint = -0.5 * ((x[:, 0] - mean) / 0.6) ** 2 - 0.5 * NODES**2 - math.log(2 * math.pi * 0.6)
    exact = -(log_joint.logsumexp(0) + math.log(STEP))
    assert torch.allclose(many(x), exact, atol=0.05)
    drawn, cost = many.propose(50, seeded(2))
    log_joint = -0.5 * ((drawn[:, 0] - mean) / 0.6) ** 2 - 0.5 * NODES**2 - math.log(2 * math.pi * 0.6)
    assert torch.allclose(cost, -(log_joint.logsumexp(0) + math.log(STEP)), atol=0.1)
    assert many.sample(4, seeded()).shape == (4, 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="2 or more"):
        importance_sampling(Quartic(), WIDE, draws=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match="GeneratorProposal"):
        importance_sampling(Quartic(), GeneratorNetwork(Bent(), 1, 1), rng=seeded())
    with pytest.raises(ShapeError):
        importance_sampling(Quartic(), gb.Gaussian(2), rng=seeded())
    with pytest.raises(DomainError, match="of its kind"):
        importance_sampling(gb.Bernoulli(probs=torch.full((1,), 0.5, dtype=D)), WIDE, rng=seeded())
    with pytest.raises(OptionError, match="given"):
        importance_sampling(gb.MLP(1, classes=2), WIDE, rng=seeded())
    with pytest.raises(DivergenceError, match="None of 10"):
        importance_sampling(Energy.of(lambda x: x.sum(1) * math.nan), WIDE, draws=10, rng=seeded())
    with pytest.raises(DivergenceError, match="bounds nothing"):
        reverse_kl_bound(gb.Uniform(1).double(), WIDE, draws=100, rng=seeded())
    generator = GeneratorNetwork(Bent(), 1, 1)
    with pytest.raises(ArgumentTypeError, match="GeneratorNetwork"):
        GeneratorProposal(Bent(), 0.1, rng=seeded())
    with pytest.raises(OptionError, match="positive standard"):
        GeneratorProposal(generator, -0.1, rng=seeded())
    with pytest.raises(OptionError, match="1 or more"):
        GeneratorProposal(generator, 0.1, 0, rng=seeded())
    with pytest.raises(ArgumentTypeError, match="a law of latents"):
        GeneratorProposal(generator, 0.1, auxiliary=nn.Linear(1, 1), rng=seeded())
    with pytest.raises(ShapeError, match="auxiliary law is over"):
        GeneratorProposal(generator, 0.1, auxiliary=gb.Gaussian(2), rng=seeded())
