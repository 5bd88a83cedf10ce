"""Likelihood training with latents: mean gradients against exact ones, recovery, and a prior learned for digits."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, constraints

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.decoders import BernoulliDecoder, Directed, GaussianDecoder
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import ImportanceLatents, ListedLatents
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.latent import CompleteData, LatentPriorLikelihood, PosteriorObjective
from gibbsian.objectives.starts import Starts
from gibbsian.training.state import TrainingState
from gibbsian.training.verdict import buffers, chain_distance
from machines import OfMachine, randomised

F64 = torch.float64


def gradient(value, energy):
    parameters = [p for p in energy.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads)])


def worst_t(objective, energy, data, exact, replicates=16):
    """Largest t of the mean gradient of repeated rounds; beyond 9 once in 5e6 per parameter, of 16 replicates."""
    found = torch.stack(
        [gradient(objective(energy, Batch(data), seeded(100 + i)).value, energy) for i in range(replicates)]
    )
    error = found.std(0) / replicates**0.5
    return float(((found.mean(0) - exact) / error.clamp(min=1e-12)).abs().max())


# --- complete data ----------------------------------------------------------------------------------------------------


def enumerable(scale=0.8, seed=0):
    return LatentEnergy(OfMachine(randomised(RBM(4, 2, rng=seeded()), seed, scale)), ListedLatents(2))


def data_of(n=1000):
    return (torch.rand((n, 4), generator=seeded(1), dtype=F64) < torch.tensor([0.2, 0.8, 0.5, 0.6])).double()


def fair(d):
    return gb.Bernoulli(torch.zeros(d, dtype=F64))


def test_completed_data_have_the_gradient_of_the_marginal_likelihood():
    """The negative phase is exact here, and the positive one drawn: its mean is Fisher's identity."""
    energy, data = enumerable(), data_of()
    exact = gradient(ExactLikelihood()(energy, Batch(data), seeded()).value, energy)
    assert worst_t(CompleteData(ExactLikelihood()), energy, data, exact) < 9.0
    chains = CompleteData(ExactLikelihood(), gb.GibbsWithGradients(), steps=25, start=fair(2))
    assert worst_t(chains, energy, data, exact) < 9.0
    # Chains of one step from a start that is no posterior, and latents that do not see the data, are told apart.
    short = CompleteData(ExactLikelihood(), gb.GibbsWithGradients(), steps=1, start=fair(2))
    assert worst_t(short, energy, data, exact, replicates=40) > 15.0
    assert worst_t(Blind(ExactLikelihood()), energy, data, exact, replicates=40) > 15.0


class Blind(PosteriorObjective):
    """The broken twin: latents of other rows."""

    def __init__(self, objective):
        super().__init__(objective, None, 1, None)

    def forward(self, energy, batch, rng):
        z, _ = self.latents_of(energy, batch.x, {}, rng)
        return self.objective(energy.joint, Batch(energy.joint.join(batch.x, z.roll(1, 0))), rng)


def test_both_sets_of_chains_have_the_exact_gradient_in_equilibrium():
    energy, data = enumerable(), data_of()
    exact = gradient(ExactLikelihood()(energy, Batch(data), seeded()).value, energy)
    negative = ContrastiveDivergence(gb.GibbsWithGradients(), steps=60, starts=Starts(noise=1.0), base=fair(6))
    objective = CompleteData(negative, gb.GibbsWithGradients(), steps=25, start=fair(2))
    assert worst_t(objective, energy, data, exact) < 9.0
    loss = objective(energy, Batch(data), seeded())
    assert {"gap", "posterior_acceptance", "posterior_moved", "posterior_nonfinite", "acceptance"} <= set(loss.metrics)


def test_a_planted_latent_model_is_found_by_fit():
    """Contrastive training with latents reaches the likelihood of exact training from the same start."""
    truth, n = enumerable(scale=1.5, seed=3), 3000
    states = ((torch.arange(16)[:, None] >> torch.arange(4)) & 1).double()
    law = (-truth(states)).softmax(0).detach()
    data = states[torch.multinomial(law, n, replacement=True, generator=seeded(4))]
    best = float(-(-truth(data) - (-truth(states)).logsumexp(0)).mean().detach())
    energy = enumerable(scale=0.1, seed=5)
    negative = PersistentContrastiveDivergence(gb.GibbsWithGradients(), fair(6), steps=3, buffer_size=500, restart=0.0)
    settings = gb.TrainingSettings(steps=200, batch_size=500, learning_rate=0.05)
    before = float(ExactLikelihood()(energy, Batch(data), seeded()).value.detach())
    gb.fit(energy, data, CompleteData(negative), rng=seeded(6), settings=settings)
    after = float(ExactLikelihood()(energy, Batch(data), seeded()).value.detach())
    assert before > best + 0.2
    assert abs(after - best) < 0.03, (before, after, best)


def test_labels_reach_the_posterior_and_the_chains():
    table = torch.randn((2, 2, 3), generator=seeded(), dtype=F64).requires_grad_(True)

    class Labelled(gb.Energy):
        event_shape, support, context = torch.Size((3,)), constraints.boolean, ("z", "y")

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(table.detach().clone())

        def forward(self, x, z, y):
            return -(torch.einsum("nk,nkd->nd", z, self.table[y]) * x).sum(1)

    energy = LatentEnergy(Labelled(), ListedLatents(2))
    x = (torch.rand((400, 3), generator=seeded(1), dtype=F64) < 0.7).double()
    y = torch.arange(400) % 2
    batch = Batch(x, {"y": y})
    exact = gradient(ExactLikelihood()(energy, batch, seeded()).value, energy)
    rows = [gradient(CompleteData(ExactLikelihood())(energy, batch, seeded(i)).value, energy) for i in range(40)]
    rows = torch.stack(rows)
    assert float(((rows.mean(0) - exact) / (rows.std(0) / 40**0.5)).abs().max()) < 9.0


# --- a prior that is an energy ----------------------------------------------------------------------------------------


class Quadratic(gb.Energy):
    r"""f(z) = |L z|^2 / 2 + b z."""

    def __init__(self, factor, slope):
        super().__init__()
        self.event_shape = torch.Size((2,))
        self.factor, self.slope = nn.Parameter(factor), nn.Parameter(slope)

    def forward(self, x):
        return 0.5 * (x @ self.factor.T).square().sum(1) + x @ self.slope


def standard():
    return gb.Gaussian(loc=torch.zeros(2, dtype=F64))


def linear_gaussian(seed=0, draws=64):
    rng = seeded(seed)
    factor, slope = (0.7 * torch.randn(s, generator=rng, dtype=F64) for s in ((2, 2), (2,)))
    net = nn.Linear(2, 3, dtype=F64)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.8 * torch.randn(p.shape, generator=rng, dtype=F64))
    joint = Directed(
        Quadratic(factor, slope) + standard(), GaussianDecoder(net, 3, 0.6, learn_scale=True, latent=2).double()
    )
    return LatentEnergy(joint, ImportanceLatents(gb.Gaussian(loc=torch.zeros(2, dtype=F64), scale=1.5), draws, rng))


def closed_form(energy):
    """Prior log Z and marginal law, differentiable."""
    prior, net = energy.energy.prior.energies[0], energy.energy.likelihood.net
    precision = torch.eye(2, dtype=F64) + prior.factor.T @ prior.factor
    covariance = torch.linalg.inv(precision)
    mean = -covariance @ prior.slope
    noise = (2.0 * energy.energy.likelihood.log_scale).exp() * torch.eye(3, dtype=F64)
    law = MultivariateNormal(net.weight @ mean + net.bias, net.weight @ covariance @ net.weight.T + noise)
    log_z = 0.5 * (prior.slope @ covariance @ prior.slope) - 0.5 * torch.logdet(precision)
    return log_z, law


def observed(n=800):
    return torch.randn((n, 3), generator=seeded(7), dtype=F64) * 1.3 + 0.4


def short_run(steps=40, h=0.3):
    return ContrastiveDivergence(gb.MALA(h), steps=steps, starts=Starts(noise=1.0), base=standard())


def test_the_marginal_likelihood_is_the_free_energy_and_the_priors_constant():
    energy, x = linear_gaussian(), observed(40)
    log_z, law = closed_form(energy)
    found = energy.estimate(x, seeded(1), draws=4000)
    z = (found.value + log_z.detach() + law.log_prob(x).detach()) / found.stderr
    assert float(z.abs().max()) < 6.0
    assert 0.6 < float(z.std()) < 1.4


def test_the_gradient_of_a_latent_prior_is_that_of_the_closed_form():
    energy, x = linear_gaussian(), observed()
    exact = gradient(-closed_form(energy)[1].log_prob(x).mean(), energy)
    objective = LatentPriorLikelihood(short_run(), gb.MALA(0.06), steps=50, start=standard())
    assert worst_t(objective, energy, x, exact) < 9.0
    for wrong in (
        LatentPriorLikelihood(short_run(steps=1, h=0.01), gb.MALA(0.06), steps=50, start=standard()),
        LatentPriorLikelihood(short_run(), gb.MALA(0.06), steps=2, start=standard()),
        PriorForgotten(short_run(), gb.MALA(0.06), 50, standard()),
    ):
        assert worst_t(wrong, energy, x, exact) > 20.0


class PriorForgotten(PosteriorObjective):
    """The broken twin: posterior chains under the Gaussian alone, without the learned part of the prior."""

    def forward(self, energy, batch, rng):
        likelihood = energy.energy.likelihood
        plain = LatentEnergy(Directed(standard(), likelihood), energy.latents)
        z, _ = self.latents_of(plain, batch.x, {}, rng)
        loss = self.objective(energy.energy.prior, Batch(z), rng)
        return Loss(loss.value + likelihood(batch.x, z=z).mean(), loss.metrics)


def test_the_importance_bound_has_the_gradient_too():
    """Many draws: training on the free energy and the prior's exact log Z is the same likelihood."""
    energy, x = linear_gaussian(draws=20_000), observed(10)
    exact = gradient(-closed_form(energy)[1].log_prob(x).mean(), energy)
    found = gradient(energy(x).mean() + closed_form(energy)[0], energy)
    assert float((found - exact).abs().max()) < 0.06 * float(exact.abs().max())


@pytest.mark.slow
def test_parameters_of_a_linear_model_are_recovered():
    """Prior and generator are known up to a linear map of z; the marginal law is not."""
    truth = linear_gaussian(seed=2)
    law = closed_form(truth)[1]
    noise = torch.randn((4000, 3), generator=seeded(8), dtype=F64)
    x = law.loc.detach() + noise @ law.scale_tril.detach().T
    energy = linear_gaussian(seed=9)
    optimiser = torch.optim.Adam(energy.parameters(), lr=0.03)
    negative = PersistentContrastiveDivergence(gb.MALA(0.3), standard(), steps=5, buffer_size=400, restart=0.02)
    objective = LatentPriorLikelihood(negative, gb.MALA(0.15), steps=20)
    rng = seeded(10)
    before = float(-closed_form(energy)[1].log_prob(x).mean().detach())
    for i in range(400):
        if i == 300:
            optimiser.param_groups[0]["lr"] = 0.005
        optimiser.zero_grad()
        objective(energy, Batch(x[i % 10 :: 10]), rng).value.backward()
        optimiser.step()
    after, best = (float(-closed_form(e)[1].log_prob(x).mean().detach()) for e in (energy, truth))
    assert before > best + 0.5
    assert after < best + 0.02, (before, after, best)


def test_bits_given_latents_and_draws_of_both_decoders():
    torch.manual_seed(0)
    net = nn.Linear(2, 6).double()
    bits, reals = BernoulliDecoder(net, (1, 2, 3), latent=2), GaussianDecoder(net, (1, 2, 3), 0.5).double()
    z = torch.randn((1, 2), generator=seeded(), dtype=F64)
    states = ((torch.arange(64)[:, None] >> torch.arange(6)) & 1).double().view(64, 1, 2, 3)
    # Normalised for each z.
    total = (-bits(states, z=z.expand(64, 2))).logsumexp(0)
    assert abs(float(total.detach())) < 1e-12
    many = z.expand(20_000, 2)
    drawn = bits.sample(many, seeded(1))
    assert float((drawn.mean(0) - bits.mean(z)[0]).abs().max().detach()) < 0.02
    real = reals.sample(many, seeded(2)).detach()
    assert float((real.mean(0) - reals.mean(z)[0]).abs().max().detach()) < 0.02
    assert abs(float(real.std(0).mean()) - 0.5) < 0.01
    exact = torch.distributions.Normal(reals.mean(z), 0.5).log_prob(real[:3]).flatten(1).sum(1)
    assert float((reals(real[:3], z=z.expand(3, 2)) + exact).abs().max().detach()) < 1e-6
    model = Directed(gb.MLP(2).double() + standard(), bits)
    energy = LatentEnergy(model, ImportanceLatents(standard(), 8, seeded()))
    objective = LatentPriorLikelihood(short_run(3), gb.ULA(0.05), steps=3, start=standard())
    loss = objective(energy, Batch(states), seeded())
    loss.value.backward()
    assert "reconstruction" in loss.metrics
    assert net.weight.grad is not None
    assert "Directed" in repr(energy)


def test_a_gaussian_prior_is_left_alone():
    energy = linear_gaussian()
    plain = LatentEnergy(Directed(standard(), energy.energy.likelihood), energy.latents)
    loss = LatentPriorLikelihood(None, gb.MALA(0.1), steps=5)(plain, Batch(observed(20)), seeded())
    assert float((loss.value - loss.metrics["reconstruction"]).detach()) == 0.0
    loss.value.backward()


def test_a_run_is_judged_by_what_its_chains_are_as_data():
    """Chains over (x, z) without their latents; chains over z decoded. Buffers of other shapes stopped fit before."""
    settings = gb.TrainingSettings(steps=3, batch_size=50, learning_rate=1e-3)
    both = PersistentContrastiveDivergence(gb.GibbsWithGradients(), fair(6), steps=1, buffer_size=50)
    prior = PersistentContrastiveDivergence(gb.MALA(0.3), standard(), steps=1, buffer_size=50)
    for energy, data, objective in (
        (enumerable(), data_of(100), CompleteData(both)),
        (linear_gaussian(), observed(100), LatentPriorLikelihood(prior, gb.MALA(0.1), steps=2)),
    ):
        state = TrainingState(energy, objective, Batch(data), settings, seeded())
        objective(energy, Batch(data[:50]), seeded())
        found = chain_distance(state)
        assert found is not None
        assert math.isfinite(found.value)
        ((buffer, noise, as_data),) = buffers(2.0 * objective)
        assert noise == 0.0
        assert as_data(energy, buffer.positions, seeded()).shape == (50, *data.shape[1:])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input():
    energy, x = linear_gaussian(), Batch(observed(5))
    with pytest.raises(ArgumentTypeError, match="fitted by an objective"):
        CompleteData(gb.MALA(0.1))
    with pytest.raises(OptionError, match="they need a kernel"):
        CompleteData(ExactLikelihood(), start=standard())
    with pytest.raises(ArgumentTypeError, match="must be a tractable energy"):
        CompleteData(ExactLikelihood(), gb.MALA(0.1), start=gb.MLP(2))
    with pytest.raises(ArgumentTypeError, match="need a kernel, such as ULA"):
        CompleteData(ExactLikelihood(), gb.MALA)
    with pytest.raises(OptionError, match="A posterior chain takes a whole number of steps"):
        CompleteData(ExactLikelihood(), gb.MALA(0.1), steps=0)
    with pytest.raises(OptionError, match="drawn exactly where they are listed"):
        LatentPriorLikelihood(short_run())(energy, x, seeded())
    with pytest.raises(OptionError, match="no proposal to start"):
        CompleteData(ExactLikelihood(), gb.GibbsWithGradients())(enumerable(), Batch(data_of(5)), seeded())
    with pytest.raises(ShapeError, match=r"start at z of shape \(3,\), and the energy's latents have \(2,\)"):
        LatentPriorLikelihood(short_run(), gb.MALA(0.1), start=gb.Gaussian(3))(energy, x, seeded())
    elsewhere = CompleteData(ExactLikelihood(), gb.GibbsWithGradients(), start=standard())
    with pytest.raises(DomainError, match="start on Real"):
        elsewhere(enumerable(), Batch(data_of(5)), seeded())
    noisy = ContrastiveDivergence(gb.MALA(0.1), data_noise=0.1)
    with pytest.raises(OptionError, match=r"data_noise=0.1 of ContrastiveDivergence would blur"):
        LatentPriorLikelihood(noisy, gb.MALA(0.1))
    with pytest.raises(ArgumentTypeError, match="under a LatentEnergy"):
        CompleteData(ExactLikelihood())(gb.MLP(2), x, seeded())
    with pytest.raises(ArgumentTypeError, match="CompleteData fits any joint energy"):
        LatentPriorLikelihood(short_run())(enumerable(), Batch(data_of(5)), seeded())
    net = nn.Linear(2, 3)
    with pytest.raises(OptionError, match="positive standard deviation"):
        GaussianDecoder(net, 3, 0.0)
    with pytest.raises(ShapeError, match=r"5 rows of z into x of shape \(4,\), 4 numbers each; it gave \(5, 3\)"):
        GaussianDecoder(net, 4)(torch.zeros(5, 4), z=torch.zeros(5, 2))
    decoder = GaussianDecoder(net, 3, latent=2)
    with pytest.raises(ArgumentTypeError, match="prior is an energy"):
        Directed(net, decoder)
    with pytest.raises(ArgumentTypeError, match="likelihood is a Decoder"):
        Directed(gb.Gaussian(2), gb.Gaussian(3))
    with pytest.raises(OptionError, match="conditional on y"):
        Directed(gb.MLP(2, classes=3), decoder)
    with pytest.raises(ShapeError, match="does not tell the shape of z"):
        Directed(gb.Energy.of(lambda z: z.sum(1)), decoder)
    with pytest.raises(ShapeError, match=r"over z of shape \(4,\) and the likelihood takes \(2,\)"):
        Directed(gb.Gaussian(4), decoder)
    assert math.isclose(float(decoder.log_scale), 0.0)
