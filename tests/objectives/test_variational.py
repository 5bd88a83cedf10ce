"""Variational bounds against the exact likelihood of a linear model, and corrections of an autoencoder by chains."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.decoders import BernoulliDecoder, Directed, GaussianDecoder
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents, ListedLatents
from gibbsian.energies.networks import Dense, Downsampling, Upsampling
from gibbsian.energies.reparametrised import VAEBM
from gibbsian.energies.variational import RowTable, lebm, vae
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss
from gibbsian.objectives.contrastive import ContrastiveDivergence
from gibbsian.objectives.correction import CorrectionLikelihood
from gibbsian.objectives.latent import LatentPriorLikelihood
from gibbsian.objectives.starts import Starts
from gibbsian.objectives.variational import EvidenceLowerBound, ImportanceWeightedBound, VariationalObjective, amortised

F64 = torch.float64
SIGMA = 0.5


def linear(exact=True, draws=16):
    """Probabilistic principal components: columns at right angles, so that the posterior's numbers are independent."""
    rng = seeded(3)
    axes = torch.linalg.qr(torch.randn((4, 4), generator=rng, dtype=F64))[0]
    net, encoder = nn.Linear(2, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)
    with torch.no_grad():
        net.weight.copy_(axes[:, :2] * torch.tensor([1.5, 0.7], dtype=F64))
        net.bias.copy_(torch.tensor([0.5, -1.0, 0.2, 0.0], dtype=F64))
        inner = net.weight.T @ net.weight + SIGMA**2 * torch.eye(2, dtype=F64)
        back = torch.linalg.solve(inner, net.weight.T)
        encoder.weight.copy_(torch.cat((back, torch.zeros((2, 4), dtype=F64))))
        log_scale = 0.5 * (SIGMA**2 / inner.diagonal()).log()
        encoder.bias.copy_(torch.cat((-back @ net.bias, log_scale)))
        if not exact:
            encoder.weight[:2].mul_(0.8)
            encoder.bias[2:].add_(0.4)
    decoder = GaussianDecoder(net, 4, latent=2).double()
    decoder.log_scale.fill_(math.log(SIGMA))
    joint = Directed(gb.Gaussian(loc=torch.zeros(2, dtype=F64)), decoder)
    return LatentEnergy(joint, ImportanceLatents(GaussianProposal(encoder, 2), draws, rng))


def law(energy):
    net = energy.energy.likelihood.net
    return MultivariateNormal(net.bias, net.weight @ net.weight.T + SIGMA**2 * torch.eye(4, dtype=F64))


def rows(n=500):
    return torch.randn((n, 4), generator=seeded(7), dtype=F64) * 1.2


# --- the bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [EvidenceLowerBound(1), EvidenceLowerBound(3), ImportanceWeightedBound(5)])
def test_with_the_exact_posterior_a_bound_is_the_likelihood(objective):
    energy, x = linear(), rows()
    loss = objective(energy, Batch(x), seeded())
    exact = law(energy).log_prob(x).mean()
    assert abs(float((loss.value + exact).detach())) < 1e-10
    assert abs(float(loss.metrics["bound"] - exact.detach())) < 1e-10
    assert abs(float(loss.metrics["reconstruction"] + loss.metrics["divergence"] + loss.metrics["bound"])) < 1e-10
    for twin in (PriorForgotten(1), DensityForgotten(1)):
        assert abs(float((twin(energy, Batch(x), seeded()).value + exact).detach())) > 0.3


class PriorForgotten(EvidenceLowerBound):
    """The broken twin: without log p(z)."""

    def forward(self, energy, batch, rng):
        latents, joint = amortised(energy)
        z, minus_log_q = latents.placed(batch.x, latents.fresh((len(batch.x), 1), rng), 1)
        return Loss((joint.likelihood(batch.x, z=z[:, 0]) - minus_log_q[:, 0]).mean())


class DensityForgotten(EvidenceLowerBound):
    """The broken twin: without log q(z | x)."""

    def forward(self, energy, batch, rng):
        latents, joint = amortised(energy)
        z, _ = latents.placed(batch.x, latents.fresh((len(batch.x), 1), rng), 1)
        return Loss((joint.likelihood(batch.x, z=z[:, 0]) + joint.prior(z[:, 0])).mean())


def test_bounds_rise_with_the_draws_and_stay_below():
    energy, x = linear(exact=False), rows(4000)
    exact = float(law(energy).log_prob(x).mean().detach())
    found = [
        float(objective(energy, Batch(x), seeded(k)).metrics["bound"])
        for k, objective in enumerate([EvidenceLowerBound(16), *(ImportanceWeightedBound(m) for m in (2, 8, 64))])
    ]
    assert found == sorted(found)
    assert all(b - a > 0.001 for a, b in zip(found, [*found[1:], exact]))
    assert exact - found[-1] < 0.05
    # One draw of either is the same bound, and more draws only take noise out of the first.
    one = [
        float(o(energy, Batch(x), seeded(9)).value.detach()) for o in (EvidenceLowerBound(), ImportanceWeightedBound(1))
    ]
    assert one[0] == pytest.approx(one[1], abs=1e-12)
    assert found[0] == pytest.approx(-one[0], abs=0.1)


def test_the_gap_is_the_divergence_from_the_posterior():
    """In closed form, as both laws are normal."""
    energy, x = linear(exact=False), rows(300)
    mean, log_scale = energy.latents.proposal.law(x)
    best, best_scale = linear().latents.proposal.law(x)
    ratio = (2.0 * (log_scale - best_scale)).exp()
    each = 0.5 * (ratio + ((mean - best) / best_scale.exp()).square() - 1.0 - ratio.log()).sum(1)
    bound = float(EvidenceLowerBound(2000)(energy, Batch(x), seeded()).metrics["bound"])
    exact = float((law(energy).log_prob(x) - each).mean().detach())
    assert bound == pytest.approx(exact, abs=0.01)


def gradient(objective, energy, x, rng):
    value = objective(energy, Batch(x), rng).value
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(energy.parameters()))])


def worst_t(objective, energy, x, exact, replicates=60):
    found = torch.stack([gradient(objective, energy, x, seeded(i)) for i in range(replicates)])
    return float(((found.mean(0) - exact) / (found.std(0) / replicates**0.5).clamp(min=1e-9)).abs().max())


def test_at_the_exact_posterior_the_gradient_is_that_of_the_likelihood():
    """And none for the encoder, which cannot be better."""
    energy, x = linear(), rows(200)
    own = list(energy.energy.likelihood.net.parameters())
    slopes = torch.autograd.grad(-law(energy).log_prob(x).mean(), own)
    exact = torch.cat([*(g.flatten() for g in slopes), torch.zeros(20, dtype=F64)])
    assert [p.shape for p in energy.parameters()][:2] == [p.shape for p in own]
    assert worst_t(EvidenceLowerBound(), energy, x, exact) < 6.0
    assert worst_t(ImportanceWeightedBound(4), energy, x, exact) < 6.0
    assert worst_t(PriorForgotten(), energy, x, exact) > 20.0
    assert worst_t(DensityForgotten(), energy, x, exact) > 20.0


def test_fitting_finds_the_principal_components():
    truth = linear()
    x = draws(truth, 3000)
    best = float(MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean())
    torch.manual_seed(1)
    decoder = GaussianDecoder(nn.Linear(2, 4), 4, 1.0, learn_scale=True, latent=2)
    energy = vae(4, 2, rng=seeded(), decoder=decoder, encoder=nn.Linear(4, 4), draws=4)
    gb.fit(energy, x.float(), EvidenceLowerBound(), rng=seeded(2), steps=600, learning_rate=0.02)
    bound = float(EvidenceLowerBound(8)(energy, Batch(x.float()), seeded(4)).metrics["bound"])
    # Isotropic noise has fewer parameters than a full covariance, and the encoder is exact for axes at right angles.
    assert best - 0.03 < bound < best + 0.01
    assert float(decoder.log_scale.detach().exp()) == pytest.approx(SIGMA, rel=0.05)


def draws(energy, n):
    joint = energy.energy
    with torch.no_grad():
        return joint.likelihood.sample(joint.prior.sample(n, seeded(5)), seeded(6))


# --- constructors -----------------------------------------------------------------------------------------------------


def test_shapes_choose_the_networks():
    torch.manual_seed(0)
    images = vae((1, 8, 8), 3, rng=seeded(), width=4)
    assert isinstance(images.energy.likelihood.net, Upsampling)
    assert isinstance(images.latents.proposal.net, Downsampling)
    bits = vae(6, 2, rng=seeded(), width=5, decoder="bernoulli")
    assert isinstance(bits.energy.likelihood, BernoulliDecoder)
    assert isinstance(bits.latents.proposal.net, Dense)
    for model, x in ((images, torch.randn(5, 1, 8, 8)), (bits, (torch.rand(5, 6) < 0.5).float())):
        assert model(x).shape == (5,)
        assert EvidenceLowerBound(2)(model, Batch(x), seeded()).value.isfinite()
    prior = lebm((1, 8, 8), 3, rng=seeded(), width=4, hidden=(8,), learn_scale=True)
    short = ContrastiveDivergence(gb.ULA(0.05), steps=3, starts=Starts(noise=1.0), base=gb.Gaussian(3))
    objective = LatentPriorLikelihood(short, gb.ULA(0.01), steps=3, start=gb.Gaussian(3))
    assert objective(prior, Batch(torch.randn(5, 1, 8, 8)), seeded()).value.isfinite()
    with pytest.raises(OptionError, match=r"not normalised.*push\n?.*down"):
        EvidenceLowerBound()(prior, Batch(torch.randn(5, 1, 8, 8)), seeded())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"latent": 0}, OptionError, "latent counts the numbers of z, 1 or more; got 0"),
        ({"latent": 2.0}, OptionError, "got 2.0"),
        ({"shape": 0}, OptionError, "positive whole sizes"),
        ({"decoder": "gausian"}, OptionError, "Did you mean 'gaussian'"),
        ({"decoder": Dense(2, 4)}, ArgumentTypeError, "needs a likelihood.*Dense has none: wrap the network"),
        ({"decoder": GaussianDecoder(Dense(2, 5), 5)}, OptionError, r"makes x of shape \(5,\) from any z"),
        ({"decoder": GaussianDecoder(Dense(3, 4), 4, latent=3)}, OptionError, r"from z of shape \(3,\)"),
        ({"encoder": 3}, ArgumentTypeError, "from x to 4 numbers"),
        ({"scale": 0.0}, OptionError, "positive standard deviation"),
        ({"draws": 0}, OptionError, "1 or more; got 0"),
    ],
)
@pytest.mark.parametrize("build", [vae, lebm])
def test_what_cannot_be_an_autoencoder_is_refused(build, options, error, match):
    settings = {"shape": 4, "latent": 2, "width": 3, "rng": seeded()} | options
    with pytest.raises(error, match=match):
        build(settings.pop("shape"), settings.pop("latent"), **settings)


def test_an_encoder_of_the_wrong_size_is_named():
    model = vae(4, 2, rng=seeded(), width=3, encoder=Dense(4, 2))
    with pytest.raises(ShapeError, match=r"means and log-scales, \(6, 4\) for 6 rows; it gave \(6, 2\)"):
        EvidenceLowerBound()(model, Batch(torch.randn(6, 4)), seeded())


def test_grey_values_are_no_bits():
    model = vae(4, 2, rng=seeded(), width=3, decoder="bernoulli")
    with pytest.raises(DomainError, match=r"Boolean.*binarise") as told:
        gb.fit(model, torch.rand(20, 4), EvidenceLowerBound(), rng=seeded(), steps=1)
    assert "20 of 20 rows" in str(told.value)


def test_bounds_refuse_what_has_none():
    with pytest.raises(OptionError, match="1 or more; got 0"):
        EvidenceLowerBound(0)
    listed = LatentEnergy(Directed(gb.Gaussian(2), GaussianDecoder(Dense(2, 4), 4)), ListedLatents(states=torch.eye(2)))
    with pytest.raises(ArgumentTypeError, match="ExactLikelihood"):
        ImportanceWeightedBound(4)(listed, Batch(torch.randn(6, 4)), seeded())
    with pytest.raises(ArgumentTypeError, match="such as vae"):
        EvidenceLowerBound()(gb.Gaussian(4), Batch(torch.randn(6, 4)), seeded())
    assert isinstance(EvidenceLowerBound(), VariationalObjective)
    with pytest.raises(OptionError, match="refined for 3 rows and is called for 2"):
        RowTable(torch.zeros(3, 4))(torch.zeros(2, 4))


# --- corrections ------------------------------------------------------------------------------------------------------


class Linear(gb.Energy):
    """f(x) = a |x|^2 / 2 + b x: of a normal law it makes another."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((4,))
        self.a = nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.b = nn.Parameter(torch.linspace(-0.5, 0.5, 4, dtype=F64))

    def forward(self, x):
        return 0.5 * self.a * x.square().sum(1) + x @ self.b


def corrected_law(model):
    """In closed form, differentiable in the correction."""
    own = law(model.vae)
    precision = own.precision_matrix + model.correction.a * torch.eye(4, dtype=F64)
    mean = torch.linalg.solve(precision, own.precision_matrix @ own.loc - model.correction.b)
    return MultivariateNormal(mean, precision_matrix=precision)


def test_the_gradient_of_a_correction_is_that_of_the_likelihood():
    model, x = VAEBM(linear(), Linear()), rows(400)
    parameters = list(model.correction.parameters())
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    slopes = torch.autograd.grad(-corrected_law(model).log_prob(x).mean(), parameters)
    exact = torch.cat([g.flatten() for g in slopes])

    def worst(objective):
        found = []
        for i in range(16):
            value = objective(model, Batch(x), seeded(i)).value
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
        t = torch.stack(found)
        return float(((t.mean(0) - exact) / (t.std(0) / 4.0)).abs().max())

    # Of 16 replicates: beyond 9 once in 5e6.
    fresh = {"buffer_size": 400, "restart": 1.0}
    assert worst(CorrectionLikelihood(gb.HMC(0.4, 4), model.base, steps=15, **fresh)) < 9.0
    assert worst(CorrectionLikelihood(gb.HMC(0.4, 4), gb.Gaussian(loc=torch.ones(6, dtype=F64)), 15, **fresh)) < 9.0
    # Chains that hardly moved are draws of the autoencoder, not of the corrected one.
    assert worst(CorrectionLikelihood(gb.HMC(0.001, 1), model.base, steps=1, **fresh)) > 15.0


def test_fit_trains_the_correction_alone():
    target = VAEBM(linear(), Linear())
    with torch.no_grad():
        target.correction.a.fill_(0.8)
        target.correction.b.mul_(-2.0)
        own = corrected_law(target)
        data = own.loc + torch.randn((3000, 4), generator=seeded(9), dtype=F64) @ own.scale_tril.T
    model = VAEBM(linear(), Linear())
    before = {k: v.clone() for k, v in model.vae.state_dict().items()}
    # Short trajectories: half a turn in the stiffest direction would only change its sign, and never its size.
    objective = CorrectionLikelihood(gb.HMC(0.25, 3), model.base, steps=4, buffer_size=300, restart=0.02)
    loss = objective(model, Batch(data[:100]), seeded())
    assert {"gap", "energy_data", "acceptance", "moved", "buffer_age", "nonfinite"} <= set(loss.metrics)
    settings = gb.TrainingSettings(steps=250, batch_size=300, learning_rate=0.05, ema_decay=0.97)
    gb.fit(model, data, objective, rng=seeded(1), settings=settings)
    found, best = (float(corrected_law(m).log_prob(data).mean().detach()) for m in (model, target))
    assert found > best - 0.02
    assert best > float(law(model.vae).log_prob(data).mean().detach()) + 0.3
    assert all(torch.equal(v, before[k]) for k, v in model.vae.state_dict().items())
    assert objective.as_data(model, objective.buffer.positions, seeded()).shape == (300, 4)


def test_corrections_refuse_what_does_not_fit():
    model = VAEBM(linear(), Linear())
    x = Batch(rows(20))
    with pytest.raises(ArgumentTypeError, match="fits VAEBM"):
        CorrectionLikelihood(gb.MALA(0.1), model.base)(linear(), x, seeded())
    with pytest.raises(ShapeError, match=r"z and noise are \(6,\) numbers; pass base=model.base"):
        CorrectionLikelihood(gb.MALA(0.1), gb.Gaussian(4))(model, x, seeded())
    with pytest.raises(ArgumentTypeError, match="need a kernel"):
        CorrectionLikelihood(gb.MALA, model.base)
    with pytest.raises(OptionError, match="1 or more; got 0"):
        CorrectionLikelihood(gb.MALA(0.1), model.base, steps=0)
    with pytest.raises(OptionError, match="energy_penalty is 0 or more"):
        CorrectionLikelihood(gb.MALA(0.1), model.base, energy_penalty=-1.0)
    assert math.isfinite(float(CorrectionLikelihood(gb.MALA(0.1), model.base)(model, x, seeded()).value.detach()))
