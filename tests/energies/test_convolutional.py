"""Convolutional machines against the machine of their weight matrix, and against enumeration of tiny images."""

import copy
import itertools

import pytest
import torch

import gibbsian as gb
from contracts import assert_continues, assert_one_graph, assert_state_is_current, seeded
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.convolutional import ConvolutionalRBM, Filters
from gibbsian.energies.pooled_units import PooledUnits
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch
from gibbsian.objectives.centring import Centred
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.partition.annealed import ais
from gibbsian.partition.boltzmann import exact_log_likelihood, exact_log_z, rbm_path

F64 = torch.float64
SHAPE = (2, 4, 5)
VISIBLE = {"bernoulli": BernoulliUnits(SHAPE), "spin": SpinUnits(SHAPE), "gaussian": GaussianUnits(SHAPE, scale=0.7)}
CASES = {
    "valid": {"size": (2, 3)},
    "circular": {"size": (2, 3), "padding": "circular"},
    "whole": {"size": (4, 5)},
    "torus": {"size": (4, 5), "padding": "circular"},
    "spin-hidden": {"size": 2, "hidden": "spin", "bias": "pixel"},
    "relu-hidden": {"size": 2, "hidden": "relu", "padding": "circular"},
    "gaussian-hidden": {"size": 2, "hidden": "gaussian"},
    "pooled": {"size": (3, 2), "pool": 2},
    "one-pixel": {"size": 1, "bias": "pixel"},
}


def conv(visible=None, filters=3, seed=0, scale=0.4, **options):
    """A machine with random parameters and offsets, in float64."""
    units = VISIBLE["bernoulli"] if visible is None else visible
    energy, rng = ConvolutionalRBM(units, filters, rng=seeded(seed), **options).double(), seeded(seed)
    with torch.no_grad():
        for tensor in (*energy.parameters(), energy.visible_offset, energy.hidden_offset):
            tensor.copy_(scale * torch.randn(tensor.shape, generator=rng, dtype=F64))
        if units.states_of_one is None and options.get("hidden") == "gaussian":
            energy.weight.mul_(0.2)
    return energy


def matrix_by_hand(energy):
    """The weight matrix, entry by entry: unit (k, i, j) sees pixel (c, i + u, j + v) through W[k, c, u, v]."""
    w, (c, h, wide), (k, rows, columns) = energy.weight.detach(), energy.visible.sites, energy.hidden.sites
    out = torch.zeros(c, h, wide, k, rows, columns, dtype=w.dtype)
    for a, b, i, j in itertools.product(range(k), range(c), range(rows), range(columns)):
        for u, v in itertools.product(range(w.shape[2]), range(w.shape[3])):
            out[b, (i + u) % h, (j + v) % wide, a, i, j] += w[a, b, u, v]
    return out.reshape(c * h * wide, -1)


def as_rbm(energy):
    """The restricted Boltzmann machine with that matrix."""
    image, maps = energy.visible.sites, energy.hidden.sites
    rbm = RBM(energy.visible, energy.hidden, rng=seeded()).double()

    def over(t, shape):
        return t.detach().repeat_interleave(shape[1] * shape[2])

    with torch.no_grad():
        rbm.weight.copy_(matrix_by_hand(energy))
        rbm.visible_bias.copy_(energy.visible_bias.expand(image).reshape(-1))
        rbm.hidden_bias.copy_(over(energy.hidden_bias, maps))
        rbm.visible_offset.copy_(over(energy.visible_offset, image))
        rbm.hidden_offset.copy_(over(energy.hidden_offset, maps))
    return rbm


def images(energy, n=6, seed=1):
    x = torch.randn((n, *energy.event_shape), generator=seeded(seed), dtype=F64)
    return x if energy.visible.states_of_one is None else (x > 0).double()


def hidden_states(energy, n=6, seed=2):
    u = torch.rand((n, *energy.hidden.event_shape), generator=seeded(seed), dtype=F64)
    return energy.hidden_given(images(energy, n), u=u)


def close(a, b, tolerance=1e-10):
    gap = float((a - b).detach().abs().max())
    assert gap < tolerance, gap


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_machine_of_its_weight_matrix(visible, case):
    energy = conv(VISIBLE[visible], **CASES[case])
    rbm, v, h = as_rbm(energy), images(energy), hidden_states(energy)
    close(energy.couplings.matrix(), rbm.weight)
    close(energy(v), rbm(v))
    close(energy.joint_energy(v, h), rbm.joint_energy(v, h))
    close(energy.marginal_hidden_energy(h), rbm.marginal_hidden_energy(h))
    close(energy.hidden_given(v), rbm.hidden_given(v))
    close(energy.visible_given(h), rbm.visible_given(h))
    uv, uh = (torch.rand(t.shape, generator=seeded(3), dtype=F64) for t in (v, h))
    close(energy.hidden_given(v, u=uh), rbm.hidden_given(v, u=uh))
    close(energy.visible_given(h, u=uv), rbm.visible_given(h, u=uv))
    base = energy.base()
    close(base(v), rbm.base()(v))


@pytest.mark.parametrize("case", ["valid", "circular", "pooled"])
def test_gradients_are_those_of_the_matrix_gathered_by_filter(case):
    energy = conv(**CASES[case])
    rbm, v = as_rbm(energy), images(energy)
    weights = torch.linspace(-1.0, 1.0, len(v), dtype=F64)
    (own,) = torch.autograd.grad((weights * energy(v)).sum(), energy.weight)
    (theirs,) = torch.autograd.grad((weights * rbm(v)).sum(), rbm.weight)
    again = copy.deepcopy(energy)
    found = torch.zeros_like(own)
    for index in itertools.product(*map(range, own.shape)):
        with torch.no_grad():
            again.weight.zero_()
            again.weight[index] = 1.0
        found[index] = (matrix_by_hand(again) * theirs).sum()
    close(own, found)


@pytest.mark.parametrize("case", ["valid", "circular", "relu-hidden", "pooled"])
def test_gibbs_steps_are_those_of_the_matrix(case):
    energy = conv(**CASES[case])
    rbm, start = as_rbm(energy), images(energy, 40)
    a, b = (gb.sample(e, RBMGibbs(), start, steps=5, rng=seeded(4)) for e in (energy, rbm))
    assert torch.equal(a.x, b.x)
    assert float((a.x != start).double().mean()) > 0.2
    close(a.state.energy, b.state.energy)
    assert_continues(RBMGibbs(), energy, start)
    assert_state_is_current(RBMGibbs(), energy, start)


def test_a_flipped_filter_is_told_apart():
    """The broken twin: convolution in the place of cross-correlation in one of the two directions."""
    energy = conv(**CASES["valid"])
    rbm, v, h = as_rbm(energy), images(energy), hidden_states(energy)
    with torch.no_grad():
        energy.weight.copy_(energy.weight.flip(2, 3))
    with torch.no_grad():
        assert float((energy(v) - rbm(v)).abs().max()) > 1e-2
        assert float((energy.visible_given(h) - rbm.visible_given(h)).abs().max()) > 1e-2


@pytest.mark.slow
def test_steps_compile_to_one_graph(graphs):
    energy = conv(**CASES["pooled"]).float()
    assert_one_graph(RBMGibbs(), energy, images(energy, 4).float(), graphs)


def block_states(shape, pool):
    """All maps of bits with at most one in each block, by sifting."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=torch.Size(shape).numel())), dtype=F64)
    rows = rows.view(-1, *shape)
    sums = torch.nn.functional.avg_pool2d(rows, pool) * pool**2
    return rows[(sums < 1.5).flatten(1).all(1)]


TINY = {
    "bernoulli": (BernoulliUnits((1, 3, 3)), {"size": 2}),
    "spin": (SpinUnits((1, 3, 3)), {"size": 2, "hidden": "spin"}),
    "pooled": (BernoulliUnits((1, 3, 3)), {"size": 2, "pool": 2}),
    "torus": (BernoulliUnits((1, 2, 3)), {"size": 2, "padding": "circular"}),
}


def all_bits(shape):
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=torch.Size(shape).numel())), dtype=F64)
    return rows.view(-1, *shape)


@pytest.mark.parametrize("case", TINY)
def test_tiny_images_against_enumeration_of_both_layers(case):
    units, options = TINY[case]
    energy = conv(units, filters=2 if case != "torus" else 1, scale=0.8, **options)
    v = all_bits(energy.event_shape)
    h = block_states(energy.hidden.sites, 2) if case == "pooled" else all_bits(energy.hidden.sites)
    n, m = len(v), len(h)
    table = energy.joint_energy(v.repeat_interleave(m, 0), h.repeat(n, 1, 1, 1)).view(n, m).detach()
    close(energy(v), -(-table).logsumexp(1))
    close(energy.marginal_hidden_energy(h), -(-table).logsumexp(0))
    close(exact_log_z(energy).value, (-table).flatten().logsumexp(0))
    close(exact_log_likelihood(energy, v).exp().sum(), torch.tensor(1.0, dtype=F64))
    means = ((-table).softmax(1) @ h.flatten(1)).view(n, *h.shape[1:])
    close(energy.hidden_given(v), means)
    close(energy.visible_given(h), ((-table).softmax(0).T @ v.flatten(1)).view(m, *v.shape[1:]))
    if case == "pooled":
        on = (torch.nn.functional.max_pool2d(h, 2)).flatten(1)
        close(energy.pooled_given(v).flatten(1), (-table).softmax(1) @ on)
        # Without the rule of one per block it is another law.
        assert float((energy(v).detach() + (-table[:, : m - 1]).logsumexp(1)).abs().max()) > 1e-3


def test_pooled_draws_have_their_law():
    units, rng, n = PooledUnits((1, 2, 4), 2), seeded(5), 200_000
    field = torch.tensor([0.3, -1.0, 1.5, 0.0, 0.7, 2.0, -0.5, 0.1], dtype=F64)
    law = units.natural(field.expand(n, -1))
    x = units.draw(law, torch.rand((n, 8), generator=rng, dtype=F64))
    units.check(x, "draws")
    states = block_states((1, 2, 4), 2)
    exact = (states.flatten(1) @ field).softmax(0)
    counts = (x.flatten(1)[:, None] == states.flatten(1)[None]).all(2).double().mean(0)
    assert float(((counts - exact) / (exact * (1 - exact) / n).sqrt()).abs().max()) < 5.0
    close(units.log_partition(field).sum(), (states.flatten(1) @ field).logsumexp(0))
    close(units.mean(units.natural(field[None])), (exact @ states.flatten(1)).view(1, 1, 2, 4))
    listed = units.listed(torch.arange(units.count))
    assert sorted(map(tuple, listed.flatten(1).tolist())) == sorted(map(tuple, states.flatten(1).tolist()))
    # Fields are told by the means they have.
    close(units.fitted(states[torch.multinomial(exact, n, True, generator=rng)], 1e-9), field, 0.05)


@pytest.mark.parametrize("case", ["bernoulli", "pooled"])
def test_nothing_is_rejected_along_the_path_of_machines_and_log_z_is_found(case):
    units, options = TINY[case]
    energy = conv(units, filters=2, scale=0.8, **options)
    exact, base = exact_log_z(energy).value, energy.base()
    found = ais(
        energy, base, kernel=RBMGibbs(), chains=400, temperatures=60, path=rbm_path(base, energy), rng=seeded(6)
    )
    assert abs(float(found.value - exact)) < 5.0 * float(found.stderr)
    assert float(found.stderr) < 0.1
    between = rbm_path(base, energy)(torch.tensor(0.4, dtype=F64))
    out = gb.sample(between, RBMGibbs(), images(energy, 20), steps=4, rng=seeded(7))
    assert float(out.acceptance.min()) == 1.0
    # A geometric path has a Metropolis test, and the same answer.
    other = ais(energy, base, kernel=RBMGibbs(), chains=400, temperatures=60, rng=seeded(8))
    assert abs(float(other.value - exact)) < 5.0 * float(other.stderr)


def test_circular_machines_are_equivariant_to_shifts():
    energy = conv(**CASES["circular"])
    v = images(energy)
    close(energy(v.roll((1, 2), (2, 3))), energy(v))
    close(energy.hidden_given(v.roll((1, 2), (2, 3))), energy.hidden_given(v).roll((1, 2), (2, 3)))
    valid = conv(**CASES["valid"]).requires_grad_(False)
    assert float((valid(v.roll((1, 2), (2, 3))) - valid(v)).abs().max()) > 1e-2


@pytest.mark.parametrize("case", ["valid", "circular", "spin-hidden", "pooled"])
def test_offsets_move_without_changing_the_density(case):
    energy = conv(**CASES[case])
    v, before = images(energy), energy(images(energy)).detach()
    offsets = energy.hidden_offset.clone()
    energy.recentre(*energy.means(v), rate=0.7)
    change = energy(v).detach() - before
    close(change, change[:1], 1e-12)
    moved = not torch.equal(offsets, energy.hidden_offset)
    assert moved == (energy.bias == "pixel" or energy.padding == "circular")
    close(energy.recentre(*energy.means(v)) or energy.visible_offset, energy.means(v)[0], 1e-12)


@pytest.mark.parametrize("bias", ["channel", "pixel"])
def test_it_starts_at_the_means_of_the_data(bias):
    energy = ConvolutionalRBM(BernoulliUnits((1, 4, 4)), 3, 3, bias=bias, weight_scale=0.0, rng=seeded()).double()
    data = (torch.rand((500, 1, 4, 4), generator=seeded(9), dtype=F64) < torch.linspace(0.1, 0.9, 4)).double()
    energy.start_at(data, smoothing=1e-6)
    mean = energy.visible_given(torch.zeros(1, 3, 2, 2, dtype=F64))[0]
    close(mean, data.mean(0) if bias == "pixel" else data.mean().expand(1, 4, 4), 1e-3)
    close(energy.visible_offset, data.mean((0, 2, 3)), 1e-12)
    close(energy.base(data)(data), energy.base(data).double()(data))


def test_contrastive_divergence_has_the_gradient_of_the_matrix_machine_and_centring_slides_offsets():
    energy = conv(scale=0.2, **CASES["circular"])
    data, rbm = images(energy, 50), as_rbm(energy)
    objective = ContrastiveDivergence(RBMGibbs(), steps=2)
    own, theirs = (objective(e, Batch(data), seeded(10)) for e in (energy, rbm))
    close(own.value, theirs.value)
    close(
        torch.autograd.grad(own.value, energy.hidden_bias)[0],
        torch.autograd.grad(theirs.value, rbm.hidden_bias)[0].view(3, -1).sum(1),
    )
    base = energy.base().double()
    centred = Centred(PersistentContrastiveDivergence(RBMGibbs(), base, steps=1, buffer_size=50), rate=0.1, chains=0.5)
    for i in range(60):
        centred(energy, Batch(data), seeded(i)).value.backward()
    close(energy.visible_offset, energy.means(data)[0], 0.2)


def test_planted_filters_fit_better_than_none():
    """Bars in two directions: PCD lowers the exact negative log-likelihood by most of what can be had."""
    rng = seeded(11)
    across = torch.randint(0, 2, (400, 1, 3, 1), generator=rng, dtype=F64).expand(400, 1, 3, 3)
    down = torch.randint(0, 2, (400, 1, 1, 3), generator=rng, dtype=F64).expand(400, 1, 3, 3)
    data = torch.where(torch.rand((400, 1, 1, 1), generator=rng) < 0.5, across, down).contiguous()
    energy = ConvolutionalRBM((1, 3, 3), 6, 3, padding="circular", weight_scale=0.1, rng=rng).double()
    energy.start_at(data)
    before = -float(exact_log_likelihood(energy, data).mean())
    base = energy.base().double()
    objective = PersistentContrastiveDivergence(RBMGibbs(), base, steps=10, buffer_size=400, restart=0.0)
    optimiser = torch.optim.Adam(energy.parameters(), lr=0.01)
    for i in range(150):
        optimiser.zero_grad()
        objective(energy, Batch(data[i % 4 :: 4]), rng).value.backward()
        optimiser.step()
    after = -float(exact_log_likelihood(energy, data).mean())
    # Nine free bits are 6.24 nats, and the law of the data is worth about 2.7.
    assert before > 6.0
    assert after < 3.6, (before, after)


def test_bad_input():
    with pytest.raises(OptionError, match=r"stand as \(channels, height, width\)"):
        ConvolutionalRBM((28, 28), 4, 3)
    with pytest.raises(OptionError, match="Bernoulli, spin or Gaussian"):
        ConvolutionalRBM(CategoricalUnits((1, 4, 4), classes=3), 4, 3)
    with pytest.raises(OptionError, match="one scale"):
        ConvolutionalRBM(GaussianUnits((1, 4, 4), scale=torch.ones(1, 4, 4)), 4, 3)
    with pytest.raises(OptionError, match="at most the image's 4 x 4; got 2 of 5 x 3"):
        ConvolutionalRBM((1, 4, 4), 2, (5, 3))
    with pytest.raises(OptionError, match="1 filter or more"):
        ConvolutionalRBM((1, 4, 4), 0, 3)
    with pytest.raises(OptionError, match="padding is one of valid, circular; got 'same'"):
        ConvolutionalRBM((1, 4, 4), 2, 3, padding="same")
    with pytest.raises(OptionError, match="hidden is one of"):
        ConvolutionalRBM((1, 4, 4), 2, 3, hidden="binary")
    with pytest.raises(OptionError, match="bias is one of"):
        ConvolutionalRBM((1, 4, 4), 2, 3, bias="none")
    with pytest.raises(OptionError, match=r"do not fill maps .* of shape \(2, 3, 3\)"):
        ConvolutionalRBM((1, 4, 4), 2, 2, pool=2)
    with pytest.raises(OptionError, match="Bernoulli hidden units"):
        ConvolutionalRBM((1, 4, 4), 2, 3, pool=2, hidden="spin")
    with pytest.raises(OptionError, match="pool is the side"):
        PooledUnits((1, 4, 4), 1)
    with pytest.raises(OptionError, match="weight_scale"):
        ConvolutionalRBM((1, 4, 4), 2, 3, weight_scale=-1.0)
    energy = conv(**CASES["valid"])
    with pytest.raises(ShapeError, match=r"Expected points of shape \(n, 2, 4, 5\); got \(3, 2, 5, 4\)"):
        energy(torch.zeros(3, 2, 5, 4, dtype=F64))
    with pytest.raises(ShapeError, match="Expected points"):
        energy.visible_given(torch.zeros(3, 3, 3, 4, dtype=F64))
    with pytest.raises(DomainError, match="BernoulliUnits have states 0 and 1"):
        energy.check_states(torch.full((1, *SHAPE), 0.3))
    with pytest.raises(OptionError, match="not pooled"):
        energy.pooled_given(images(energy))
    with pytest.raises(OptionError, match="sliding factor"):
        energy.recentre(*energy.means(images(energy)), rate=2.0)
    with pytest.raises(OptionError, match="smoothing"):
        energy.base(images(energy), smoothing=0.0)
    with pytest.raises(DomainError, match="at most one 1 in each block"):
        PooledUnits((1, 2, 2), 2).check(torch.ones(3, 1, 2, 2), "rows")
    with pytest.raises(OptionError, match="rbm_path"):
        exact_log_z(conv(BernoulliUnits((1, 8, 8)), filters=2, size=3))
    with pytest.raises(ArgumentTypeError, match="there is none"):
        Centred(ContrastiveDivergence(RBMGibbs()))(gb.MLP(2), Batch(torch.zeros(2, 2)), seeded())


def test_what_holds_the_parameters_tells_whether_fields_are_shared():
    a, b = conv(**CASES["valid"]), conv(**CASES["valid"])
    x = images(a)
    assert a.two_layers(x).shares_fields((0.5 * a).two_layers(x))
    assert not a.two_layers(x).shares_fields(b.two_layers(x))
    assert isinstance(a.couplings, Filters)
    assert "valid" in repr(a)
