"""Free energies of latent energies: against enumeration, closed forms, and the theory of the bias."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, constraints

import gibbsian as gb
from contracts import KS_LIMIT, assert_one_graph, ks, normal_cdf, seeded
from enumeration import fit_p_value
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.decoders import Directed, GaussianDecoder
from gibbsian.energies.latent import FreeEnergy, LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents, Latents, ListedLatents
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.partition.enumeration import enumeration
from machines import OfMachine, randomised

F64 = torch.float64


def machine(hidden=4, visible=5):
    return randomised(RBM(visible, hidden, rng=seeded()), scale=0.8)


def listed(chunk=1 << 14, hidden=4):
    return LatentEnergy(OfMachine(machine(hidden)), ListedLatents(hidden), chunk=chunk)


def bits(n, d, seed=1):
    return (torch.rand((n, d), generator=seeded(seed), dtype=F64) < 0.5).double()


def close(a, b, tolerance=1e-10):
    gap = float((a - b).detach().abs().max())
    assert gap < tolerance, gap


# --- by enumeration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 17, 40, 1 << 14])
def test_the_sum_over_states_is_the_closed_form_with_its_gradients(chunk):
    energy = listed(chunk)
    rbm, x = energy.energy.machine, bits(6, 5)
    weights = torch.linspace(-1.0, 1.0, 6, dtype=F64)
    close(energy(x), rbm(x))
    mine, theirs = (torch.autograd.grad((weights * e(x)).sum(), list(rbm.parameters())) for e in (energy, rbm))
    for a, b in zip(mine, theirs):
        close(a, b)
    y = x.clone().requires_grad_(True)
    mine, theirs = (torch.autograd.grad(e(y).sum(), y, create_graph=True)[0] for e in (energy, rbm))
    close(mine, theirs)
    # Scores are differentiated again by score matching.
    again = [torch.autograd.grad(g.square().sum(), rbm.weight, retain_graph=True)[0] for g in (mine, theirs)]
    close(*again)


def test_one_hot_states_lists_and_contexts():
    table = torch.randn((3, 4, 5), generator=seeded(), dtype=F64, requires_grad=True)  # y, z, x

    def joint(x, z, y):
        return -torch.einsum("nk,nkd,nd->n", z, table[y], x)

    x, y = bits(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 1])
    energy = gb.Energy.of(joint, (5,), constraints.boolean, context=("z", "y"))
    exact = -torch.einsum("nkd,nd->nk", table[y], x).logsumexp(1)
    hot = LatentEnergy(energy, ListedLatents((1, 4), constraints.one_hot))
    assert hot.latents.count == 4
    flat = gb.Energy.of(lambda x, z, y: joint(x, z.flatten(1), y), (5,), constraints.boolean, context=("z", "y"))
    for e, latents in ((flat, hot.latents), (energy, ListedLatents(states=torch.eye(4, dtype=F64)))):
        model = LatentEnergy(e, latents, chunk=10)
        assert model.context == ("y",)
        close(model(x, y=y), exact)
        close(model.given(y=y)(x), exact)
        (slope,) = torch.autograd.grad(model.given(y=y)(x).sum(), table)
        close(slope, torch.autograd.grad(exact.sum(), table, retain_graph=True)[0])
        close(model.estimate(x, y=y).value, exact)
    # Repeated values in a list count twice: a sum over the list, not over a set.
    twice = LatentEnergy(energy, ListedLatents(states=torch.eye(4, dtype=F64).repeat(2, 1)))
    close(twice(x, y=y), exact - math.log(2.0))


def saved_bytes(energy, x):
    total = [0]

    def pack(t):
        total[0] += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        energy(x)
    return total[0]


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_states():
    x = bits(8, 5)
    few, many = (saved_bytes(listed(chunk=64, hidden=h), x) for h in (5, 9))
    # Sixteen times the states: a few numbers per row for each chunk of eight states more.
    assert many - few < 8 * 8 * 8 * (2**9 - 2**5) / 8
    # The twin, in one chunk, keeps every pair.
    assert saved_bytes(listed(chunk=1 << 14, hidden=9), x) > 20 * many


def test_states_of_no_weight_leave_the_gradient_whole():
    def joint(x, z):
        return torch.where(z[:, 0] > 0.5, torch.inf, (x - z).square().sum(1))

    x = torch.randn((3, 2), generator=seeded(), dtype=F64).requires_grad_(True)
    for chunk in (3, 6, 1000):
        energy = LatentEnergy(gb.Energy.of(joint, (2,), context=("z",)), ListedLatents(2), chunk=chunk)
        energy(x).sum().backward()
        assert bool(x.grad.isfinite().all())
    none = LatentEnergy(lambda x, z: x.sum(1) + torch.inf, ListedLatents(2))
    assert bool((none(x) == torch.inf).all())


def test_log_z_of_the_free_energy_is_that_of_both():
    energy = listed()
    whole = enumeration(energy.joint)
    close(enumeration(energy).value, whole.value)
    x = bits(4, 5)
    exact = energy.estimate(x)
    assert exact.draws == 0
    assert float(exact.stderr.max()) == 0.0
    assert "exact" in str(exact)
    p = energy.log_weights(x, *energy.latents.points(x, 0, 16)).softmax(1)
    close(exact.ess, 1.0 / p.square().sum(1))


@pytest.mark.parametrize("chunk", [40, 1 << 20])
def test_latents_are_drawn_from_their_posterior(chunk):
    energy = listed(chunk=chunk)
    x = bits(1, 5)
    exact = energy.log_weights(x, *energy.latents.points(x, 0, 16)).softmax(1)[0].detach()
    n = 4000
    z = torch.cat([energy.draw_latents(x.expand(20, 5), rng) for rng in [seeded(3)] for _ in range(n // 20)])
    place = 2 ** torch.arange(3, -1, -1)
    counts = torch.bincount((z.long() * place).sum(1), minlength=16).double()
    assert fit_p_value(counts, exact) > 1e-6
    assert fit_p_value(counts, exact.flip(0)) < 1e-12


# --- z given x, and both, as energies that kernels walk on ------------------------------------------------------------


def test_chains_over_z_given_x_and_over_both_have_their_laws():
    energy = listed(hidden=3)
    x = bits(2, 5)
    exact = energy.log_weights(x, *energy.latents.points(x, 0, 8)).softmax(1).detach()
    n = 4000
    start = bits(2 * n, 3, 5)
    post = energy.posterior(x.repeat_interleave(n, 0))
    z = gb.sample(post, gb.GibbsWithGradients(), start, steps=30, rng=seeded(6)).x
    place = 2 ** torch.arange(2, -1, -1)
    for i, part in enumerate(z.split(n)):
        counts = torch.bincount((part.long() * place).sum(1), minlength=8).double()
        assert fit_p_value(counts, exact[i]) > 1e-6
        assert fit_p_value(counts, exact[1 - i]) < 1e-12
    # One row of x for all chains is the same energy.
    close(energy.posterior(x[:1])(start[:9]), energy.posterior(x[:1].expand(9, 5))(start[:9]))
    both = gb.sample(energy.joint, gb.GibbsWithGradients(), bits(n, 8, 7), steps=80, rng=seeded(8)).x
    own, _ = energy.joint.split(both)
    counts = torch.bincount((own.long() * 2 ** torch.arange(4, -1, -1)).sum(1), minlength=32).double()
    listed_x = ((torch.arange(32)[:, None] >> torch.arange(4, -1, -1)) & 1).double()
    assert fit_p_value(counts, (-energy(listed_x)).softmax(0).detach()) > 1e-6


def test_points_of_both_are_joined_and_split():
    energy = listed()
    x, z = bits(6, 5), bits(6, 4, 2)
    flat = energy.joint.join(x, z)
    assert flat.shape == (6, 9)
    for a, b in zip(energy.joint.split(flat), (x, z)):
        assert torch.equal(a, b)
    close(energy.joint(flat), energy.energy(x, z=z))
    close(energy.energy.given(z=z)(x), energy.energy(x, z=z))
    hot = gb.Energy.of(lambda x, z: x.flatten(1)[:, 0] * z[:, 1, 2], (3, 4), constraints.one_hot, context=("z",))
    model = LatentEnergy(hot, ListedLatents((2, 4), constraints.one_hot))
    assert model.joint.event_shape == (5, 4)
    x = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2]]), 4).double()
    z = torch.nn.functional.one_hot(torch.tensor([[3, 2]]), 4).double()
    point = model.joint.join(x, z)
    assert torch.equal(point[0], torch.cat((x[0], z[0])))
    assert torch.equal(model.joint.split(point)[1], z)
    close(model.joint(point), torch.ones(1))


def test_it_is_saved_once_and_copied_whole():
    energy = listed()
    names = set(energy.state_dict())
    assert energy.joint is energy.joint
    assert set(energy.state_dict()) == names
    twin = copy.deepcopy(energy)
    with torch.no_grad():
        twin.energy.machine.weight.mul_(2.0)
    x, z = bits(3, 5), bits(3, 4)
    close(twin.joint(twin.joint.join(x, z)), twin.energy(x, z=z))
    assert float((twin(x) - energy(x)).abs().max().detach()) > 1e-3
    assert energy.float().joint(energy.joint.join(x.float(), z.float())).dtype == torch.float32


# --- by importance sampling -------------------------------------------------------------------------------------------


W = torch.tensor([[1.0, 0.2], [-0.5, 0.8], [0.3, -0.6]], dtype=F64)
SIGMA = 0.7


def decoder(net, dim):
    found = GaussianDecoder(net, dim, SIGMA, latent=2).double()
    found.log_scale.fill_(math.log(SIGMA))  # In float64 from the start.
    return found


def linear():
    net = nn.Linear(2, 3, bias=False, dtype=F64)
    with torch.no_grad():
        net.weight.copy_(W)
    prior = gb.Gaussian(loc=torch.zeros(2, dtype=F64))
    return Directed(prior, decoder(net, 3))


def marginal():
    return MultivariateNormal(torch.zeros(3, dtype=F64), W @ W.T + SIGMA**2 * torch.eye(3, dtype=F64))


def posterior_law():
    precision = torch.eye(2, dtype=F64) + W.T @ W / SIGMA**2
    covariance = torch.linalg.inv(precision)
    return lambda x: x @ W @ covariance / SIGMA**2, covariance


def wide(scale=1.0):
    return gb.Gaussian(loc=torch.zeros(2, dtype=F64), scale=scale)


def sampled(draws=64, proposal=None, seed=0):
    return LatentEnergy(linear(), ImportanceLatents(wide(1.2) if proposal is None else proposal, draws, seeded(seed)))


def rows(n, seed=1):
    z = torch.randn((n, 2), generator=seeded(seed), dtype=F64)
    return z @ W.T + SIGMA * torch.randn((n, 3), generator=seeded(seed + 1), dtype=F64)


def test_estimates_lie_within_their_errors_of_the_closed_form():
    energy, x = sampled(), rows(400)
    found, exact = energy.estimate(x, seeded(2), draws=2000), -marginal().log_prob(x)
    assert found.value.dtype == F64
    z = (found.value - exact) / found.stderr
    assert float(z.abs().max()) < 6.0
    assert 0.8 < float(z.std()) < 1.2
    assert float(found.ess.min()) > 10.0
    assert "too large by about" in str(found)


def test_the_bias_is_upwards_and_falls_as_one_over_the_draws():
    energy, x = sampled(), rows(50)
    exact = -marginal().log_prob(x)
    many = x.repeat_interleave(400, 0)
    gaps, errors, predicted = [], [], []
    for i, draws in enumerate((25, 100)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = energy.estimate(many, seeded(3 + i), draws=draws)
        gap = found.value - exact.repeat_interleave(400)
        gaps.append(float(gap.mean()))
        errors.append(float(gap.std() / math.sqrt(len(gap))))
        predicted.append(float(0.5 * found.stderr.square().mean()))
    assert gaps[0] > 10 * errors[0]
    assert gaps[1] > 4 * errors[1]
    assert 3.0 < gaps[0] / gaps[1] < 5.6
    assert 0.7 < predicted[1] / gaps[1] < 1.4


def test_a_proposal_that_is_the_posterior_leaves_no_error():
    spread = torch.tensor([0.6, 0.9], dtype=F64)
    net = nn.Linear(2, 2, bias=False, dtype=F64)
    with torch.no_grad():
        net.weight.copy_(torch.diag(spread))
    joint = Directed(wide(), decoder(net, 2))
    precision = 1.0 + spread.square() / SIGMA**2

    class Exact(nn.Module):
        def forward(self, x):
            log_scale = (-0.5 * precision.log()).expand(len(x), 2)
            return torch.cat((x * spread / SIGMA**2 / precision, log_scale), 1)

    proposal = GaussianProposal(Exact(), 2).double()
    proposal.net.register_parameter("like", nn.Parameter(torch.zeros((), dtype=F64)))
    energy = LatentEnergy(joint, ImportanceLatents(proposal, 5, seeded()))
    x = torch.randn((6, 2), generator=seeded(1), dtype=F64)
    exact = -MultivariateNormal(torch.zeros(2, dtype=F64), torch.diag(spread.square() + SIGMA**2)).log_prob(x)
    close(energy(x), exact)
    with pytest.warns(RuntimeWarning, match="6 of 6 rows"):  # Five draws are few, however equal.
        found = energy.estimate(x)
    close(found.ess, torch.full((6,), 5.0, dtype=F64))
    assert float(found.stderr.max()) < 1e-6


class Unweighed(Latents):
    """The broken twin: draws of a proposal without their density."""

    exact = False

    def __init__(self, inner):
        super().__init__()
        self.inner, self.event_shape, self.support = inner, inner.event_shape, inner.support

    @property
    def count(self):
        return self.inner.count

    def points(self, x, first, last):
        z, log_m = self.inner.points(x, first, last)
        return z, torch.full_like(log_m, -math.log(self.count))


def test_a_proposal_without_its_density_is_told_apart():
    x = rows(50)
    exact = -marginal().log_prob(x)
    right = sampled(4000)
    wrong = LatentEnergy(linear(), Unweighed(right.latents))
    assert float((right(x) - exact).abs().mean().detach()) < 0.1
    assert float((wrong(x) - exact).abs().mean().detach()) > 1.0


def test_the_energy_is_a_function_until_its_noise_is_redrawn():
    energy, x = sampled(), rows(8)
    before = energy(x).detach()
    close(energy(x[2:3]), before[2:3])
    close(energy(x.flip(0)), before.flip(0))
    chunked = LatentEnergy(energy.energy, energy.latents, chunk=24)
    close(chunked(x), before)
    # With the draws that are kept, the estimate is the energy.
    with pytest.warns(RuntimeWarning, match="1 of 8 rows"):
        close(energy.estimate(x).value, before)
    again = sampled(seed=9)
    assert float((again(x) - before).abs().min().detach()) > 1e-6
    again.load_state_dict(energy.state_dict())
    close(again(x), before, 1e-15)
    again.latents.redraw(seeded(10))
    assert float((again(x) - before).abs().min().detach()) > 1e-6


def encoder():
    torch.manual_seed(0)
    return GaussianProposal(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), 2).double()


@pytest.mark.parametrize("chunk", [12, 1 << 14])
def test_gradients_reach_model_data_and_proposal(chunk):
    energy = LatentEnergy(linear(), ImportanceLatents(encoder(), 9, seeded()), chunk=chunk)
    x = rows(3).requires_grad_(True)
    weights = [p for p in energy.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: energy(x), (x, *weights))


def test_training_a_proposal_raises_the_effective_size():
    energy = LatentEnergy(linear().requires_grad_(False), ImportanceLatents(encoder(), 16, seeded()))
    x, rng = rows(200), seeded(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        before = energy.estimate(x, seeded(5), draws=200)
        optimiser = torch.optim.Adam(energy.latents.parameters(), lr=0.02)
        for _ in range(150):
            energy.latents.redraw(rng)
            optimiser.zero_grad()
            energy(x).mean().backward()
            optimiser.step()
        after = energy.estimate(x, seeded(5), draws=200)
    assert float(after.ess.mean()) > 1.3 * float(before.ess.mean())
    assert float(after.value.mean()) < float(before.value.mean()) + 0.02


def test_weights_that_degenerate_are_said():
    energy = sampled(proposal=wide(20.0), draws=200)
    with pytest.warns(RuntimeWarning, match=r"of 20 rows are dominated by a few: ess .* of 200 in the median.*more dr"):
        found = energy.estimate(rows(20))
    assert bool(found.degenerate.any())
    assert "degenerate" in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(draws=500).estimate(rows(20))
    # Draws that all miss the posterior agree with each other: no sample shows that, and the bound is far above.
    x = rows(20)
    narrow = sampled(proposal=wide(0.02), draws=200).estimate(x)
    assert not bool(narrow.degenerate.any())
    assert float(((narrow.value + marginal().log_prob(x)) / narrow.stderr).median()) > 10.0
    assert not bool(FreeEnergy(*[torch.zeros(2)] * 3, 0).degenerate.any())


def test_langevin_on_the_posterior_has_the_normal_law_of_it():
    energy, n = sampled(), 20_000
    x = rows(1)
    mean, covariance = posterior_law()
    out = gb.sample(energy.posterior(x), gb.MALA(0.25), wide().sample(n, seeded(6)), steps=60, rng=seeded(7))
    centred = (out.x - mean(x)) / covariance.diagonal().sqrt()
    for i in range(2):
        assert ks(centred[:, i], normal_cdf) < KS_LIMIT
    resampled = energy.draw_latents(x.expand(2000, 3), seeded(8))
    assert len(resampled.unique(dim=0)) <= 64


@pytest.mark.slow
def test_chains_on_a_free_energy_compile_to_one_graph(graphs):
    assert_one_graph(gb.MALA(0.1), sampled(16), rows(5), graphs)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_latents():
    with pytest.raises(OptionError, match=r"number 2\^30\.0, more than the 1048576 .* ImportanceLatents"):
        ListedLatents(30)
    with pytest.raises(OptionError, match=r"number 2\^5000\.0"):
        ListedLatents(5000)
    with pytest.raises(OptionError, match="one of the two"):
        ListedLatents()
    with pytest.raises(DomainError, match="cannot be listed"):
        ListedLatents(3, constraints.real)
    with pytest.raises(ShapeError, match=r"shape \(m, \*latent\)"):
        ListedLatents(states=torch.zeros(3))
    for draws in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="draws counts the importance samples"):
            ImportanceLatents(wide(), draws, seeded())
    with pytest.raises(ArgumentTypeError, match="tractable energy"):
        ImportanceLatents(gb.MLP(2), 4, seeded())
    with pytest.raises(ShapeError, match=r"means and log-scales, \(3, 4\) for 3 rows; it gave \(3, 3\)"):
        LatentEnergy(linear(), ImportanceLatents(GaussianProposal(nn.Linear(3, 3).double(), 2), 4, seeded()))(rows(3))


def test_bad_latent_energies():
    with pytest.raises(ShapeError, match=r"values of shape \(3,\) and the energy takes \(2,\)"):
        LatentEnergy(linear(), ImportanceLatents(gb.Gaussian(3), 4, seeded()))
    with pytest.raises(OptionError, match="live on Boolean"):
        LatentEnergy(linear(), ListedLatents(2))
    with pytest.raises(ArgumentTypeError, match="context named z"):
        LatentEnergy(gb.MLP(2), ListedLatents(2))
    with pytest.raises(ArgumentTypeError, match="ListedLatents"):
        LatentEnergy(linear(), wide())
    with pytest.raises(OptionError, match="chunk counts pairs"):
        LatentEnergy(linear(), ImportanceLatents(wide(), 4, seeded()), chunk=0)
    with pytest.raises(ShapeError, match=r"takes x of shape \(3,\); got event_shape"):
        LatentEnergy(linear(), ImportanceLatents(wide(), 4, seeded()), event_shape=4)
    energy = sampled()
    with pytest.raises(ShapeError, match=r"Expected points of shape \(n, 3\)"):
        energy(torch.zeros(2, 4, dtype=F64))
    with pytest.raises(ShapeError, match=r"must have shape \(8,\); it returned \(8, 3\)"):
        LatentEnergy(lambda x, z: x, ListedLatents(2))(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="holds 2 rows of x, one for each chain, and z has 3"):
        energy.posterior(rows(2))(torch.zeros(3, 2, dtype=F64))
    with pytest.raises(ShapeError, match="Expected points"):
        energy.posterior(torch.zeros(2, 4))
    with pytest.raises(OptionError, match="need rng"):
        energy.estimate(rows(2), draws=3)
    with pytest.raises(OptionError, match="draws=0"):
        energy.estimate(rows(2), seeded(), draws=0)
    with pytest.raises(OptionError, match="new ones of ImportanceLatents"):
        listed().estimate(bits(2, 5), seeded(), draws=3)
    with pytest.raises(DomainError, match=r"x lives on Real.* and z on Boolean"):
        _ = LatentEnergy(gb.Energy.of(lambda x, z: x[:, 0], (2,), context=("z",)), ListedLatents(2)).joint
    values = LatentEnergy(lambda x, z: x[:, 0], ListedLatents(states=torch.zeros(3, 1)), event_shape=2)
    with pytest.raises(DomainError, match="in a list of values"):
        _ = values.joint
    with pytest.raises(DomainError, match="draw_latents"):
        values.posterior(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match="pass event_shape"):
        _ = LatentEnergy(lambda x, z: x[:, 0], ImportanceLatents(wide(), 4, seeded())).joint
    hot = gb.Energy.of(lambda x, z: x[:, 0, 0], (3, 4), constraints.one_hot, context=("z",))
    with pytest.raises(ShapeError, match="sites of 4 classes and z of 3"):
        _ = LatentEnergy(hot, ListedLatents((1, 3), constraints.one_hot)).joint
