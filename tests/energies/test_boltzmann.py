"""Restricted Boltzmann machines of every pair of units against enumeration and quadrature, to 1e-10."""

import copy
import math

import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.distributions import constraints

from contracts import seeded
from gibbsian.energies.boltzmann import RBM, label_log_probs
from gibbsian.energies.domains import kind_of
from gibbsian.energies.independent_units import IndependentUnits
from gibbsian.energies.joined_units import JoinedUnits
from gibbsian.energies.layered import Natural
from gibbsian.energies.real_units import GaussianUnits, ReLUUnits
from gibbsian.energies.tractable import Bernoulli, require_support
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits
from gibbsian.errors import DomainError, OptionError, ShapeError
from machines import HIDDEN, PAIRS, VISIBLE, everywhere, machine, randomised, table

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def some_states(energy, count=9):
    """A few visible states: all of a small layer, or random reals."""
    if energy.visible.count is None:
        return 1.5 * torch.randn((count, *energy.event_shape), generator=seeded(3), dtype=torch.float64)
    return everywhere(energy.visible)[0][:count]


def free_energy(energy, v):
    """By the sum over all hidden states."""
    h, log_w = everywhere(energy.hidden)
    return -torch.logsumexp(log_w - table(energy, v, h), 1)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_free_energies_and_gradients_are_sums_over_hidden_states(pair):
    energy = machine(*pair)
    v = some_states(energy).requires_grad_(True)
    assert_free_energy(energy, v)


def assert_free_energy(energy, v):
    found, exact = energy(v), free_energy(energy, v)
    torch.testing.assert_close(found, exact, **CLOSE)
    weights = torch.randn(len(v), generator=seeded(4), dtype=torch.float64)
    params = [*energy.parameters(), v]
    for a, b in zip(*(torch.autograd.grad((weights * e).sum(), params) for e in (found, exact))):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@torch.no_grad()
def test_joint_energies_and_conditionals(pair):
    energy = machine(*pair)
    v, h = some_states(energy), some_states_of(energy.hidden)
    for i in range(len(h)):
        hs = h[i].expand(len(v), *h.shape[1:])
        torch.testing.assert_close(energy.joint_energy(v, hs), table(energy, v, h)[:, i], **CLOSE)
    for given, at, units, energies in (
        (energy.hidden_given, v, energy.hidden, lambda x: table(energy, v, x)),
        (energy.visible_given, h, energy.visible, lambda x: table(energy, x, h).T),
    ):
        x, log_w = everywhere(units)
        law = (log_w - energies(x)).softmax(1)
        mean = (law @ x.flatten(1)).view(len(at), *units.event_shape)
        torch.testing.assert_close(given(at), mean, **CLOSE)
    x, log_w = everywhere(energy.visible)
    torch.testing.assert_close(
        energy.marginal_hidden_energy(h), -torch.logsumexp(log_w[:, None] - table(energy, x, h), 0), **CLOSE
    )


def some_states_of(units, count=5):
    if units.count is not None:
        return everywhere(units)[0][-count:]
    return torch.randn((count, *units.event_shape), generator=seeded(5), dtype=torch.float64).abs()


@pytest.mark.parametrize("units", [*VISIBLE.values(), *HIDDEN.values()], ids=repr)
def test_draws_follow_their_law(units):
    """Means of draws from 40,000 uniform numbers; z beyond 6 is a false alarm in 2 of 1e9."""
    field = torch.randn(units.size, generator=seeded(6), dtype=torch.float64)
    law = units.natural(field.expand(40_000, -1))
    u = torch.rand((40_000, *units.event_shape), generator=seeded(7), dtype=torch.float64)
    x = units.draw(law, u)
    units.check(x, "draws")
    z = (x - units.mean(law)).mean(0) / (x.std(0) / 200.0)
    assert float(z.abs().max()) < 6.0


@pytest.mark.parametrize("a", [-60.0, -12.0, -2.0001, -1.9999, -1.0, 0.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relu_units_in_both_tails(a, dtype):
    units, u = ReLUUnits(199), torch.linspace(0.005, 0.995, 199, dtype=dtype)[None]
    field = torch.full((1, 199), a, dtype=dtype)
    h = units.draw(Natural(field, 1.0), u).double()
    log_above = torch.special.log_ndtr(a - h) - special.log_ndtr(a)
    near = 1e-9 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(log_above.exp(), u.double(), rtol=near, atol=near)
    exact = stats.norm.logcdf(a) + 0.5 * a * a + 0.5 * math.log(2 * math.pi)
    assert float(units.log_partition(field)[0, 0]) == pytest.approx(
        exact, rel=1e-11 if dtype == torch.float64 else 1e-5
    )
    mean = (
        stats.truncnorm.mean(-a, math.inf, loc=a)
        if a > -6
        else -a * (special.erfcx(-a / 2**0.5) ** -1 * (2 / math.pi) ** 0.5 / -a - 1)
    )
    assert float(units.mean(Natural(field, 1.0))[0, 0]) == pytest.approx(
        mean, rel=1e-9 if dtype == torch.float64 else 1e-3
    )


def test_uniform_numbers_of_zero_draw_finite_states():
    for units in (*VISIBLE.values(), *HIDDEN.values()):
        for u in (0.0, 1.0 - 2.0**-24):
            x = units.draw(units.natural(torch.full((1, units.size), 9.0)), torch.full((1, units.size), u))
            assert bool(torch.isfinite(x).all()), units


class ForgetsOffsets(RBM):
    """A twin whose free energy lacks the term of the hidden offsets."""

    def forward(self, x):
        machine = self.two_layers(x)
        return super().forward(x) - machine.hidden_field(x) @ self.hidden_offset


class ReluAsSoftplus(RBM):
    """A twin that takes the log-partition function of a ReLU for a softplus."""

    def forward(self, x):
        a = self.two_layers(x).hidden_field(x)
        return super().forward(x) + (self.hidden.log_partition(a) - nn.functional.softplus(a)).sum(1)


@pytest.mark.parametrize("twin", [ForgetsOffsets, ReluAsSoftplus])
def test_broken_twins_are_caught(twin):
    energy = randomised(twin(BernoulliUnits(3), ReLUUnits(2)))
    with pytest.raises(AssertionError):
        assert_free_energy(energy, some_states(energy).requires_grad_(True))


@pytest.mark.parametrize("visible", ["bernoulli", "spin", "categorical"])
@pytest.mark.parametrize("hidden", HIDDEN)
@torch.no_grad()
def test_conditional_logits_are_differences_of_free_energies(visible, hidden):
    energy = machine(visible, hidden)
    v, _ = everywhere(energy.visible)
    f = energy(v)
    whole = energy.conditional_logits(v, slice(None))
    for i, block in enumerate(energy.blocks):
        logits = energy.conditional_logits(v, block)
        torch.testing.assert_close(logits[:, i], whole[:, i], **CLOSE)
        values = torch.eye(3, dtype=torch.float64) if visible == "categorical" else torch.tensor([0.0, 1.0])
        energies = []
        for value in values:
            x = v.clone()
            x[:, i] = value
            energies.append(energy(x))
        exact = (-torch.stack(energies, 1)).log_softmax(1)
        own = (
            logits[:, i].log_softmax(1)
            if visible == "categorical"
            else exact[:, :1] + torch.stack((0 * f, logits[:, i]), 1)
        )
        torch.testing.assert_close(own, exact, **CLOSE)


def test_images_have_masks_for_blocks():
    energy = randomised(RBM((2, 2), 3))
    x = torch.bernoulli(torch.full((5, 2, 2), 0.5), generator=seeded()).double()
    flat = randomised(RBM(4, 3))
    whole = torch.stack([energy.conditional_logits(x, b)[:, b][:, 0] for b in energy.blocks], 1)
    torch.testing.assert_close(whole, flat.conditional_logits(x.flatten(1), slice(None)))


def test_supports():
    kinds = {name: kind_of(RBM(units, 2).support) for name, units in VISIBLE.items()}
    assert kinds == {
        "bernoulli": "boolean",
        "spin": "boolean",
        "categorical": "one_hot",
        "gaussian": "real",
        "scaled": "real",
        "joined": "discrete",
    }
    joined = RBM(VISIBLE["joined"], 2).support
    rows = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0], [0.3, 1.0, 0.0, 0.0, 1.0]])
    assert joined.check(rows).tolist() == [True, False, False]
    assert repr(joined) == "Joined(Boolean() x 2, OneHot() x 1)"


@pytest.mark.parametrize(
    "pair", [("bernoulli", "bernoulli"), ("spin", "relu"), ("categorical", "spin"), ("scaled", "spin")], ids="-".join
)
def test_centring_leaves_the_density_and_centres_the_gradient(pair):
    energy = machine(*pair)
    v, log_w = everywhere(energy.visible) if energy.visible.count else (some_states(energy, 40), torch.zeros(40))
    before = (log_w - energy(v)).log_softmax(0).detach()
    plain = copy.deepcopy(energy)
    means = energy.means(v[::2])
    with torch.no_grad():
        halfway = energy.visible_offset + 0.5 * (means[0] - energy.visible_offset)
        energy.recentre(*means, rate=0.5)
        torch.testing.assert_close(energy.visible_offset, halfway)
        energy.recentre(*means)
    torch.testing.assert_close(energy.visible_offset, means[0])
    torch.testing.assert_close(energy.hidden_offset, means[1])
    torch.testing.assert_close((log_w - energy(v)).log_softmax(0), before, **CLOSE)
    assert_centred(energy, v, means)
    # Without offsets the gradient is another, and the check sees it.
    with pytest.raises(AssertionError):
        assert_centred(plain, v, means)


def assert_centred(energy, v, means):
    """The gradient of the energy gap in W is the gap of covariances around the means."""
    data, model = v[::3], v[1::3]
    (found,) = torch.autograd.grad(energy(model).mean() - energy(data).mean(), energy.weight)
    parts = []
    for x in (data, model):
        s = energy.visible.statistic(x) - means[0]
        t = energy.hidden.statistic(energy.hidden_given(x)) - means[1]
        parts.append(s.T @ t / len(x))
    torch.testing.assert_close(found, (parts[0] - parts[1]).detach(), **CLOSE)


def test_flipped_bits_make_the_same_machine_when_centred():
    """With offsets at the means the gradient of flipped data is the flipped gradient."""
    data = torch.bernoulli(torch.tensor([0.1, 0.3, 0.2, 0.8]).expand(50, 4), generator=seeded(1)).double()
    grads = []
    for x in (data, 1 - data):
        energy = RBM(4, 3, weight_scale=0.0).double()
        energy.start_at(x)
        with torch.no_grad():
            w = torch.randn((4, 3), generator=seeded(2), dtype=torch.float64)
            energy.weight.copy_(w if x is data else -w)
        (g,) = torch.autograd.grad(energy(x[:20]).mean() - energy(x[20:]).mean(), energy.weight)
        grads.append(g)
    torch.testing.assert_close(grads[0], -grads[1], **CLOSE)


@torch.no_grad()
def test_the_base_has_the_datas_means_and_is_normalised():
    for name, units in VISIBLE.items():
        energy = machine(name, "bernoulli")
        v, log_w = everywhere(units)
        data = energy.base().sample(500, seeded(8))
        for base in (energy.base(), energy.base(data, smoothing=1e-9)):
            assert float(torch.logsumexp(log_w - base(v), 0)) == pytest.approx(0.0, abs=1e-10)
        mean = ((log_w - base(v)).exp() @ v.flatten(1)).view(units.event_shape)
        torch.testing.assert_close(mean, data.mean(0), rtol=1e-6, atol=1e-6)
        draws = base.sample(40_000, seeded(9))
        z = (draws.mean(0) - mean) / (draws.std(0) / 200.0).clamp(min=1e-12)
        assert float(z.abs().max()) < 6.0
        uncoupled = copy.deepcopy(energy)
        uncoupled.weight.zero_()
        uncoupled.start_at(data)
        gap = uncoupled(v) - energy.base(data)(v)
        torch.testing.assert_close(gap - gap[0], torch.zeros_like(gap), **CLOSE)


def test_labels_of_a_joined_machine():
    energy = machine("joined", "spin")
    x, _ = everywhere(BernoulliUnits(2))
    labels = torch.eye(3, dtype=torch.float64)
    energies = torch.stack([energy(torch.cat((x, k.expand(4, 3)), 1)) for k in labels], 1)
    torch.testing.assert_close(label_log_probs(energy, x), (-energies).log_softmax(1), **CLOSE)
    with pytest.raises(ShapeError, match=r"shape \(n, 2\); got \(4, 5\)"):
        label_log_probs(energy, torch.zeros(4, 5))
    with pytest.raises(OptionError, match="Labels are told by a machine over JoinedUnits"):
        label_log_probs(machine("bernoulli", "spin"), x)


@torch.no_grad()
def test_a_context_shifts_the_biases():
    energy = randomised(RBM(3, 2, condition=4))
    x, _ = everywhere(BernoulliUnits(3))
    y = torch.randint(0, 4, (8,), generator=seeded())
    for i in range(8):
        shifted = RBM(3, 2).double()
        for name in ("weight", "visible_offset", "hidden_offset"):
            getattr(shifted, name).copy_(getattr(energy, name))
        shifted.visible_bias.copy_(energy.visible_bias + energy.visible_slope[y[i]])
        shifted.hidden_bias.copy_(energy.hidden_bias + energy.hidden_slope[y[i]])
        alone = shifted(x[i : i + 1])
        torch.testing.assert_close(energy(x, y)[i : i + 1], alone, **CLOSE)
        torch.testing.assert_close(energy.given(y=y)(x)[i : i + 1], alone, **CLOSE)
    torch.testing.assert_close(energy(x, torch.nn.functional.one_hot(y, 4).double()), energy(x, y))
    for wrong in (None, torch.zeros(8, 3)):
        with pytest.raises(ShapeError, match=r"takes a context y of shape \(n, 4\)"):
            energy(x, wrong)


def test_everything_it_holds_is_saved_and_moves():
    energy = machine("scaled", "relu")
    other = RBM(VISIBLE["scaled"], HIDDEN["relu"]).double()
    other.load_state_dict(energy.state_dict())
    x = some_states(energy)
    assert torch.equal(energy(x), other(x))
    single = copy.deepcopy(energy).float()
    assert single.visible.scale.dtype == torch.float32
    torch.testing.assert_close(single(x.float()).double(), energy(x), rtol=1e-5, atol=1e-5)
    assert repr(energy) == "RBM(GaussianUnits(2, scale=<(2,)>), ReLUUnits(2))"
    assert repr(RBM((1, 2), CategoricalUnits(2, 3), condition=2)) == (
        "RBM(BernoulliUnits((1, 2)), CategoricalUnits(2, classes=3), condition=2)"
    )


def test_data_off_the_units_domain_are_refused_with_a_remedy():
    rows = torch.tensor([[0.3, 1.0, 0.0], [0.0, 1.0, 1.0]])
    cases = {
        r"1 of 2 rows of the data .* \(for example 0.3\). Binarise them.*torch.bernoulli.*GaussianUnits": (
            RBM(3, 2),
            rows,
        ),
        r"spins of -1 and 1: pass \(x \+ 1\) / 2": (RBM(SpinUnits(3), 2), 2.0 * rows.round() - 1.0),
        "Counts and reals need other units": (RBM(3, 2), 3.0 * rows),
        r"1 of 2 rows .*a site that sums to 1.3.*alignment": (
            RBM(CategoricalUnits(1, 3), 2),
            rows[:1, None].expand(2, 1, 3) * torch.tensor([[[1.0]], [[0.0]]])
            + torch.tensor([[[0.0]], [[1.0]]]) * torch.eye(3)[:1],
        ),
        r"not finite; drop or fill": (RBM(GaussianUnits(3), 2), rows / 0.0),
    }
    for message, (energy, x) in cases.items():
        with pytest.raises(DomainError, match=message):
            energy.check_states(x)
        with pytest.raises(DomainError, match=message):
            require_support(x, energy, "the data")
    with pytest.raises(ShapeError, match=r"have 4 categories and the units 3; pass classes=4"):
        RBM(CategoricalUnits(2, 3), 2).check_states(torch.eye(4)[:2].expand(5, 2, 4))
    with pytest.raises(ShapeError, match=r"one_hot\(labels, 3\)"):
        RBM(CategoricalUnits(2, 3), 2).check_states(torch.zeros(5, 2))
    with pytest.raises(ShapeError, match=r"have states \(n, 3\); the data have shape \(2, 4\)"):
        RBM(3, 2).check_states(torch.zeros(2, 4))
    joined = RBM(JoinedUnits((BernoulliUnits(2), CategoricalUnits(1, 3))), 2)
    with pytest.raises(DomainError, match=r"for example 0\.3"):
        joined.check_states(torch.tensor([[0.3, 1.0, 1.0, 0.0, 0.0]]))
    with pytest.raises(DomainError, match="sums to 2"):
        joined.check_states(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))
    with pytest.raises(DomainError, match="go down to -1"):
        ReLUUnits(2).check(-torch.ones(1, 2), "h")


def test_settings_that_do_not_fit_are_refused():
    cases = {
        "ReLU units are hidden units": lambda: RBM(ReLUUnits(3), 2),
        "classes is 2 or more; got 1": lambda: CategoricalUnits(3, classes=1),
        "scale is a positive, finite standard deviation": lambda: GaussianUnits(3, scale=0.0),
        "positive whole sizes": lambda: RBM(0, 2),
        "size of the context, 1 or more; got 0": lambda: RBM(3, 2, condition=0),
        "weight_scale is a standard deviation": lambda: RBM(3, 2, weight_scale=-1.0),
        "sliding factor lies between 0 and 1; got 2": lambda: RBM(3, 2).recentre(torch.zeros(3), torch.zeros(2), 2.0),
        "two or more layers": lambda: JoinedUnits((BernoulliUnits(2),)),
        "have one scale": lambda: JoinedUnits((BernoulliUnits(2), GaussianUnits(2, scale=torch.ones(2)))),
        "smoothing lies between 0 and 1": lambda: RBM(3, 2).base(torch.zeros(4, 3), smoothing=1.0),
    }
    for message, call in cases.items():
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(ShapeError, match=r"does not fit units of shape \(3,\)"):
        GaussianUnits(3, scale=torch.ones(2))
    with pytest.raises(ShapeError, match=r"has shape \(3,\); got \(2,\)"):
        IndependentUnits(3, torch.zeros(2))
    with pytest.raises(DomainError, match="RBMGibbs draws them"):
        machine("gaussian", "spin").conditional_logits(torch.zeros(1, 2).double(), slice(None))
    assert constraints.boolean.check(RBM(3, 2).base().sample(4, seeded())).all()
    assert isinstance(RBM(3, 2) + Bernoulli(logits=torch.zeros(3)), torch.nn.Module)
