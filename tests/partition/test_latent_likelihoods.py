"""Likelihoods of latent models from both sides, and refined posteriors: against a linear model in closed form."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.decoders import Directed, GaussianDecoder
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents, ListedLatents
from gibbsian.energies.variational import lebm, vae
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.partition.latent import (
    evidence_lower_bound,
    latent_log_likelihood,
    latent_schedule,
    mean_of,
    simulated_bracket,
)
from gibbsian.partition.latent_paths import Standardised
from gibbsian.partition.refinement import refine_posterior, refine_proposal

F64 = torch.float64
SIGMA = 0.4


def linear(seed=0, prior=None):
    """X of five numbers and z of two, with a correlated posterior and a crude encoder."""
    torch.manual_seed(seed)
    net, encoder = nn.Linear(2, 5, dtype=F64), nn.Linear(5, 4, dtype=F64)
    with torch.no_grad():
        net.weight.copy_(torch.randn((5, 2), generator=seeded(1), dtype=F64))
        inner = net.weight.T @ net.weight + SIGMA**2 * torch.eye(2, dtype=F64)
        back = torch.linalg.solve(inner, net.weight.T)
        encoder.weight.copy_(torch.cat((0.9 * back, torch.zeros((2, 5), dtype=F64))))
        encoder.bias.copy_(torch.cat((-0.9 * back @ net.bias, torch.full((2,), -1.2, dtype=F64))))
    decoder = GaussianDecoder(net, 5, SIGMA, latent=2).double()
    joint = Directed(gb.Gaussian(loc=torch.zeros(2, dtype=F64)) if prior is None else prior, decoder)
    return LatentEnergy(joint, ImportanceLatents(GaussianProposal(encoder, 2), 32, seeded()))


def law(energy):
    net = energy.energy.likelihood.net
    cov = net.weight @ net.weight.T + SIGMA**2 * torch.eye(5, dtype=F64)
    return MultivariateNormal(net.bias.detach(), cov.detach())


def posterior(energy, x):
    net = energy.energy.likelihood.net
    precision = (net.weight.T @ net.weight / SIGMA**2 + torch.eye(2, dtype=F64)).detach()
    mean = torch.linalg.solve(precision, (net.weight.T @ (x - net.bias).T).detach() / SIGMA**2).T
    return MultivariateNormal(mean, precision_matrix=precision)


def rows(n=24):
    return torch.randn((n, 5), generator=seeded(7), dtype=F64)


# --- both sides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["encoder", "prior"])
def test_annealing_finds_the_likelihood_of_every_row(start):
    energy, x = linear(), rows()
    exact = law(energy).log_prob(x)
    found = latent_log_likelihood(energy, x, rng=seeded(1), chains=32, temperatures=50, start=start)
    z = (found.log_prob - exact) / found.errors
    assert float(z.abs().max()) < 6.0
    assert abs(float(z.mean())) < 1.2
    assert float(found.lower) < float(exact.mean())
    assert float(found.value) > float(exact.mean()) - 5.0 * float(found.stderr) - 0.1
    assert found.chains == 32


@pytest.mark.parametrize("start", ["encoder", "prior"])
def test_simulated_rows_have_their_likelihood_between_both_sides(start):
    energy = linear()
    found = simulated_bracket(energy, 40, rng=seeded(2), chains=16, temperatures=50, start=start)
    exact = law(energy).log_prob(found.x)
    below, above = mean_of(found.below.log_prob - exact), mean_of(found.above - exact)
    assert below.value < 3.0 * below.stderr
    assert above.value > -3.0 * above.stderr
    assert max(abs(below.value), abs(above.value)) < 0.15
    assert float(found.below.lower) < float(exact.mean()) < float(found.upper)
    assert found.gap.value == pytest.approx(above.value - below.value, abs=1e-9)
    assert "between" in str(found)
    # The rows are the model's: whitened by their law they are standard normal.
    white = torch.linalg.solve_triangular(law(energy).scale_tril, (found.x - law(energy).loc).T, upper=False)
    assert float(white.mean(1).abs().max()) < 5.0 / math.sqrt(40)


def test_with_two_temperatures_the_gap_is_wide_and_still_a_bracket():
    """Nothing is hidden by a bad schedule: both sides move apart."""
    energy = linear()
    good, bad = (simulated_bracket(energy, 40, rng=seeded(3), temperatures=t, start="prior") for t in (60, 2))
    exact = law(energy).log_prob(bad.x)
    assert bad.gap.value > 5.0 * max(good.gap.value, 0.01)
    assert float((bad.below.log_prob - exact).mean()) < 0.0 < float((bad.above - exact).mean())


def test_the_volume_of_the_encoders_scale_counts(monkeypatch):
    """The broken twin leaves it out, and is off by the log-scales."""
    energy, x = linear(), rows()
    exact = law(energy).log_prob(x).mean()
    monkeypatch.setattr(Standardised, "forward", lambda self, x: self.posterior(self.mean + self.log_scale.exp() * x))
    wrong = latent_log_likelihood(energy, x, rng=seeded(1), chains=32, temperatures=40)
    assert float(wrong.value - exact) == pytest.approx(2.4, abs=0.3)


def test_a_prior_that_is_an_energy_brings_its_constant():
    prior = 0.5 * gb.Gaussian(loc=torch.zeros(2, dtype=F64)) + 0.5 * gb.Gaussian(loc=torch.zeros(2, dtype=F64))
    energy, x = linear(prior=prior + (lambda z: 1.7 + 0.0 * z.sum(1))), rows()
    found = latent_log_likelihood(energy, x, rng=seeded(1), chains=16, temperatures=40, log_z=-1.7)
    exact = law(energy).log_prob(x)
    assert float(((found.log_prob - exact) / found.errors).abs().max()) < 6.0
    with pytest.raises(OptionError, match="pass its log_z"):
        latent_log_likelihood(energy, x, rng=seeded())
    with pytest.raises(OptionError, match="cannot be simulated"):
        simulated_bracket(energy, 4, rng=seeded())
    with pytest.raises(OptionError, match="pass start='encoder'"):
        latent_log_likelihood(energy, x, rng=seeded(), start="prior", log_z=-1.7)
    model = lebm(5, 2, rng=seeded(), width=4, hidden=(4,))
    told = latent_log_likelihood(model, x.float(), rng=seeded(), chains=4, temperatures=4, log_z=0.0)
    assert bool(told.log_prob.isfinite().all())


def test_a_schedule_serves_other_rows():
    energy = linear()
    schedule = latent_schedule(energy, rows(), rng=seeded(), temperatures=60, start="prior")
    assert len(schedule.betas) == 61
    # From a wide prior to a narrow posterior most stops are near the prior, and steps get smaller.
    assert float(schedule.betas[30]) < 0.25
    assert float(schedule.step_sizes[-10:].mean()) < float(schedule.step_sizes[:10].mean())
    x = rows(40)[24:]
    found = latent_log_likelihood(energy, x, rng=seeded(1), schedule=schedule, start="prior", chains=32)
    assert float(((found.log_prob - law(energy).log_prob(x)) / found.errors).abs().max()) < 6.0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"chains": 1}, OptionError, "chains is 2 or more"),
        ({"confidence": 1.0}, OptionError, "confidence between 0 and 1"),
        ({"temperatures": 1}, OptionError, "2 or more; got 1"),
        ({"start": "data"}, OptionError, "'encoder' or 'prior'; got 'data'"),
        ({"x": torch.zeros(3, 4, dtype=F64)}, ShapeError, r"Expected points of shape \(n, 5\)"),
        ({"energy": gb.Gaussian(5)}, ArgumentTypeError, "such as vae"),
        ({"kernel": gb.ULA(0.1)}, OptionError, "unadjusted"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    options = {"energy": linear(), "x": rows(3), "rng": seeded()} | change
    with pytest.raises(error, match=match):
        latent_log_likelihood(options.pop("energy"), options.pop("x"), **options)


def test_models_without_a_way_are_refused():
    joint = gb.Energy.of(lambda x, z: (x * z).sum(1), (2,), context=("z",))
    own = LatentEnergy(joint, ImportanceLatents(gb.Gaussian(2), 4, seeded()))
    with pytest.raises(ArgumentTypeError, match="those of Directed"):
        latent_log_likelihood(own, torch.zeros(3, 2), rng=seeded())
    listed = LatentEnergy(joint, ListedLatents(states=torch.eye(2)))
    with pytest.raises(ArgumentTypeError, match="with ImportanceLatents"):
        evidence_lower_bound(listed, torch.zeros(3, 2), rng=seeded())
    bits = Directed(gb.Bernoulli(torch.zeros(2)), GaussianDecoder(nn.Linear(2, 5), 5))
    fair = LatentEnergy(bits, ImportanceLatents(gb.Bernoulli(torch.zeros(2)), 4, seeded()))
    with pytest.raises(DomainError, match="sum over it: ListedLatents"):
        latent_log_likelihood(fair, torch.zeros(3, 5), rng=seeded())
    with pytest.raises(OptionError, match="simulate, 2 or more; got 1"):
        simulated_bracket(linear(), 1, rng=seeded())
    with pytest.raises(OptionError, match="draws is 2 or more"):
        evidence_lower_bound(linear(), rows(), rng=seeded(), draws=1)
    wide = Directed(gb.Gaussian(covariance=torch.eye(2)), GaussianDecoder(nn.Linear(2, 5), 5))
    full = LatentEnergy(wide, ImportanceLatents(GaussianProposal(nn.Linear(5, 4), 2), 4, seeded()))
    with pytest.raises(OptionError, match="independent numbers"):
        latent_log_likelihood(full, torch.zeros(3, 5), rng=seeded(), start="prior")


# --- refinement -------------------------------------------------------------------------------------------------------


def test_a_refined_proposal_is_the_best_normal_law_of_each_row():
    """Of independent numbers: its precision is the diagonal of the posterior's, and the gap is known."""
    energy, x = linear(), rows()
    before = {k: v.clone() for k, v in energy.state_dict().items()}
    refined = refine_proposal(energy, x, rng=seeded(1), steps=300, learning_rate=0.05, samples=8)
    best = posterior(energy, x)
    mean, log_scale = refined.latents.proposal.law(x)
    narrow = 1.0 / best.precision_matrix.diagonal(dim1=-2, dim2=-1)
    assert float((mean - best.loc).detach().abs().max()) < 0.06
    assert float((2.0 * log_scale - narrow.log()).detach().abs().max()) < 0.15
    gap = 0.5 * (narrow.log().sum(-1).neg() - torch.logdet(best.precision_matrix)).neg()
    found, first = (evidence_lower_bound(e, x, rng=seeded(2), draws=400) for e in (refined, energy))
    exact = law(energy).log_prob(x)
    assert float((exact - found.values - gap.abs()).mean()) == pytest.approx(0.0, abs=0.03)
    gain = found.gain(first.values)
    assert gain.value > 10.0 * gain.stderr
    assert found.mean.value < float(exact.mean())
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())
    assert refined.energy is energy.energy
    assert all(p.grad is None for p in energy.parameters())
    refined.chunk = 100
    parts = evidence_lower_bound(refined, x, rng=seeded(2), draws=400)
    assert parts.mean.value == pytest.approx(found.mean.value, abs=0.05)
    assert parts.errors.shape == (24,)
    with pytest.raises(OptionError, match="refined for 24 rows and is called for 3"):
        refined(x[:3])


def test_chains_from_the_encoder_reach_the_posterior():
    energy, x = linear(), rows(3)
    run = refine_posterior(energy, x, gb.HMC(0.2, 5), steps=40, rng=seeded(1), chains=1000)
    exact = posterior(energy, x)
    z = run.x.view(3, 1000, 2)
    scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(((z.mean(1) - exact.loc) / scale).abs().max()) < 5.0 / math.sqrt(1000)
    cov = torch.stack([own.T.cov() for own in z])
    assert float((cov - exact.covariance_matrix).abs().max() / exact.covariance_matrix.abs().max()) < 0.25
    start, _ = energy.latents.proposal.law(x)
    assert float(((start - exact.loc) / scale).detach().abs().max()) > 0.19


def test_the_bounds_stand_in_their_order():
    energy, x = linear(), rows(60)
    exact = law(energy).log_prob(x)
    elbo = evidence_lower_bound(energy, x, rng=seeded(1), draws=200)
    refined_model = refine_proposal(energy, x, rng=seeded(2), steps=100, learning_rate=0.05)
    refined = evidence_lower_bound(refined_model, x, rng=seeded(3), draws=200)
    weighted = -energy.estimate(x, seeded(4), 200).value
    annealed = latent_log_likelihood(refined_model, x, rng=seeded(5), temperatures=50).log_prob
    assert elbo.mean.value < refined.mean.value < float(exact.mean())
    assert elbo.mean.value < float(weighted.mean())
    for value in (weighted, annealed):
        assert abs(mean_of(value - exact).value) < 0.05


def test_refinements_refuse_what_does_not_fit():
    with pytest.raises(ArgumentTypeError, match="GaussianProposal, mean and scale"):
        refine_proposal(lebm(5, 2, rng=seeded(), width=4), rows(3).float(), rng=seeded())
    model = vae(5, 2, rng=seeded(), width=4)
    for wrong in ({"steps": 0}, {"samples": 0}, {"learning_rate": 0.0}):
        with pytest.raises(OptionError, match="steps and samples are 1 or more"):
            refine_proposal(model, rows(3).float(), rng=seeded(), **wrong)
    with pytest.raises(OptionError, match="1 or more; got 0"):
        refine_posterior(model, rows(3).float(), gb.MALA(0.1), steps=1, rng=seeded(), chains=0)
