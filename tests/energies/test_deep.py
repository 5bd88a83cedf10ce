"""Deep Boltzmann machines, their mean field and stacks against sums over all states, and broken twins."""

import itertools

import pytest
import torch

from contracts import seeded
from deep_machines import LAYERS, deep, evens, joint, listed, odds, side, summed
from gibbsian.energies.belief import DeepBeliefNetwork
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.mean_field import MeanFieldEnergy, mean_field, variational_free_energy
from gibbsian.energies.real_units import GaussianUnits, ReLUUnits
from gibbsian.energies.tied import TiedRBM, compose, copies_of
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from machines import everywhere, randomised, table

NAMES = list(LAYERS)
EXACT = {"rtol": 0.0, "atol": 1e-10}


def flat(machine):
    """All joint states of all layers, one row each, in the order of the axes of `joint`."""
    states, _ = listed(machine)
    index = torch.cartesian_prod(*[torch.arange(len(x)) for x in states])
    return [x[i] for x, i in zip(states, index.T)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_joint_energies(name):
    machine = deep(name)
    log_w = torch.stack([w[i] for w, i in zip(listed(machine)[1], indices(machine))]).sum(0)
    torch.testing.assert_close(machine.joint_energy(flat(machine)) - log_w, joint(machine).flatten(), **EXACT)


def indices(machine):
    return torch.cartesian_prod(*[torch.arange(len(x)) for x in listed(machine)[0]]).T


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_either_side_is_summed_out_exactly(name):
    machine = deep(name)
    even, odd = (summed(joint(machine), kept(machine)).flatten() for kept in (evens, odds))
    x = side(machine, 0)
    found = machine(x)
    if name == "reals":
        # The oracle's free energies hold the weights of a grid; and torch's softplus is linear from 20 on, 2e-9 off.
        near = x[:, 0].abs() < 4.0
        found, even = (found - listed(machine)[1][0].repeat_interleave(4))[near], even[near]
    torch.testing.assert_close(found, even, **EXACT)
    torch.testing.assert_close(machine.odd_layers(side(machine, 1)), odd, **EXACT)


def test_the_twin_without_an_offset_is_caught():
    machine = deep("three")
    exact = summed(joint(machine), evens(machine)).flatten().detach()
    with torch.no_grad():
        machine.odd_offset[-1] = 0.0
    assert float((machine(side(machine, 0)).detach() - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_states_are_packed_and_cut_again(name):
    machine, states = deep(name), flat(deep(name))
    even, odd = machine.packed(states)
    assert even.shape[1:] == machine.event_shape
    assert odd.shape[1:] == machine.odd_layers.event_shape
    for found, x in zip(machine.unpacked(even, odd), states):
        torch.testing.assert_close(found, x, rtol=0, atol=0)
    torch.testing.assert_close(machine.visible_of(even), states[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["two", "classes", "four"])
@torch.no_grad()
def test_recentring_keeps_the_density(name):
    machine = deep(name)
    before = joint(machine).flatten().neg().log_softmax(0)
    even, odd = (torch.randn(u.size, generator=seeded(5), dtype=torch.float64) for u in (machine.even, machine.odd))
    machine.recentre(even, odd, rate=0.7)
    torch.testing.assert_close(joint(machine).flatten().neg().log_softmax(0), before, **EXACT)
    machine.recentre(even, odd)
    torch.testing.assert_close(machine.even_offset, even)
    torch.testing.assert_close(machine.odd_offset, odd)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_data_given_the_odd_layers(name):
    machine, (_, odd) = deep(name), deep(name).packed(flat(deep(name)))
    energies = summed(joint(machine), (0, *odds(machine)))
    law = energies.neg().softmax(0)
    rows = listed(machine)[0][0].flatten(1)
    exact = (law.flatten(1).T[..., None] * rows).sum(1)
    torch.testing.assert_close(machine.visible_given(side(machine, 1)).flatten(1), exact, **EXACT)
    draws = machine.visible_given(odd, u=torch.rand(len(odd), rows.shape[1], generator=seeded(), dtype=odd.dtype))
    machine.check_states(draws)


# Mean field ---------------------------------------------------------------------------------------------------------


def exact_free(machine):
    return summed(joint(machine), (0,))


def free_by_field(machine, v, **settings):
    return variational_free_energy(machine, v, mean_field(machine, v, **settings))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "reals"])
@torch.no_grad()
def test_the_bound_is_the_mean_energy_less_the_entropy(name):
    """By summing over all states under q, before q has settled."""
    machine = deep(name)
    v = listed(machine)[0][0]
    q = mean_field(machine, v, iterations=2, damping=0.3)
    for i in range(len(v)):
        logs = []
        for first, field in ((1, q.odd_field), (2, q.even_field)):
            parts = machine.layers[first::2]
            for units, f in zip(parts, field[i].split([u.size for u in parts])):
                x = everywhere(units)[0]
                logs.append((units.statistic(x) @ f).log_softmax(0))
        log_q = sum(
            p.view([-1 if axis == j else 1 for axis in range(len(order(logs)))]) for j, p in enumerate(order(logs))
        )
        energy = joint(machine)[i]
        by_hand = (log_q.exp() * (energy + log_q)).sum()
        torch.testing.assert_close(variational_free_energy(machine, v, q)[i], by_hand, **EXACT)


def order(logs):
    """From odd layers first and even ones then to the order of the layers."""
    count = len(logs)
    odd = (count + 1) // 2
    found = [None] * count
    found[::2], found[1::2] = logs[:odd], logs[odd:]
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if n != "reals"])
@torch.no_grad()
def test_mean_field_is_a_bound_that_rises_to_a_fixed_point(name):
    machine = deep(name, scale=1.2)
    v, exact = listed(machine)[0][0], exact_free(machine)
    for damping in (0.0, 0.6):
        last = None
        for iterations in (1, 2, 3, 5, 10, 30):
            found = free_by_field(machine, v, iterations=iterations, damping=damping)
            assert bool((found >= exact - 1e-12).all()), "not a bound"
            assert last is None or bool((found <= last + 1e-12).all()), "an iteration made it worse"
            last = found
        q = mean_field(machine, v, iterations=5000, damping=damping, tolerance=1e-13)
        assert q.iterations < 5000
        assert float(q.change.max()) <= 1e-13
        given = machine.posterior(v).machine
        torch.testing.assert_close(given.hidden_field(given.visible.shaped(q.odd)), q.even_field, rtol=0, atol=1e-9)
        torch.testing.assert_close(given.visible_field(given.hidden.shaped(q.even)), q.odd_field, rtol=0, atol=1e-9)
    assert float((last - exact).max()) > 1e-4, "tight everywhere: the test sees nothing"


@pytest.mark.parametrize("name", ["two", "spins", "classes", "three"])
def test_the_bound_is_tight_where_the_posterior_factorises_and_so_are_its_slopes(name):
    machine = deep(name)
    with torch.no_grad():
        for w in list(machine.weights)[1:]:
            w.zero_()
    v, exact = listed(machine)[0][0], exact_free(machine)
    found = MeanFieldEnergy(machine, 30)(v)
    torch.testing.assert_close(found, exact, **EXACT)
    parameters = list(machine.parameters())
    for own, by_hand in zip(
        torch.autograd.grad(found.mean(), parameters), torch.autograd.grad(exact.mean(), parameters)
    ):
        torch.testing.assert_close(own, by_hand, **EXACT)


@torch.no_grad()
def test_the_twin_without_the_entropy_of_a_layer_is_no_bound():
    machine = deep("two")
    v, exact = listed(machine)[0][0], exact_free(machine)
    q = mean_field(machine, v)
    # Twice the entropy of the layer above, which a wrong sign or a layer counted twice would give.
    above = machine.layers[2]
    entropy = (above.log_partition(q.even_field) - q.even_field * above.statistic(q.even)).sum(1)
    twin = variational_free_energy(machine, v, q) - entropy
    assert bool((twin < exact - 1e-3).any())


def test_a_start_is_used():
    machine = deep("two", scale=2.0)
    v = listed(machine)[0][0]
    at_ones = mean_field(machine, v, iterations=1, start=torch.ones(len(v), 3, dtype=torch.float64))
    at_zeros = mean_field(machine, v, iterations=1, start=torch.zeros(len(v), 3, dtype=torch.float64))
    assert float((at_ones.even - at_zeros.even).abs().max()) > 1e-3


# Where it starts ----------------------------------------------------------------------------------------------------


def test_starting_at_data():
    data = torch.bernoulli(torch.full((500, 3), 0.3), generator=seeded(1)).double()
    machine = DeepBoltzmannMachine(3, [2, SpinUnits(2)], rng=seeded()).double()
    machine.start_at(data)
    torch.testing.assert_close(machine.even_offset, torch.cat((data.mean(0), torch.zeros(2, dtype=torch.float64))))
    torch.testing.assert_close(machine.odd_offset, torch.full((2,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        for w in machine.weights:
            w.zero_()
    p = (0.9 * data.mean(0) + 0.05).logit()
    torch.testing.assert_close(machine.even_bias[:3], p)
    torch.testing.assert_close(machine.base(data).field[:3], p)
    # Without couplings the base at its own biases is the machine.
    x = side(machine, 0)
    difference = machine.base()(x) - machine(x)
    torch.testing.assert_close(difference, difference[:1].expand(len(x)))
    machine.start_at(data, centre=False)
    assert float(machine.even_offset.abs().max()) == 0.0


def test_the_odd_base_is_the_machine_without_couplings():
    machine = deep("three")
    exact = machine.odd_layers.base()
    bias = machine.odd_bias - machine.couplings.forth(machine.even_offset)
    torch.testing.assert_close(exact.field, bias.detach())
    assert exact.event_shape == machine.odd_layers.event_shape


# Stacks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [(2, 1), (1, 2), (2, 2)])
@torch.no_grad()
def test_tied_machines_are_machines_of_copies(copies):
    rbm = randomised(RBM(SpinUnits(2), CategoricalUnits(1, classes=3)))
    tied = TiedRBM(rbm, *copies)
    (v, _), (h, _) = everywhere(rbm.visible), everywhere(rbm.hidden)
    k, m = copies
    for rows in itertools.product(range(len(v)), repeat=k):
        total = []
        for others in itertools.product(range(len(h)), repeat=m):
            pairs = sum(pair(rbm, v[i], h[j]) for i in rows for j in others)
            total.append(
                pairs + sum(alone(rbm, v[i], None) for i in rows) + sum(alone(rbm, None, h[j]) for j in others)
            )
        exact = -torch.logsumexp(-torch.stack(total), 0)
        x = torch.cat([v[i].flatten() for i in rows])[None]
        torch.testing.assert_close(tied(tied.visible.shaped(x))[0], exact, **EXACT)


def pair(rbm, v, h):
    s, t = rbm.visible.statistic(v[None]) - rbm.visible_offset, rbm.hidden.statistic(h[None]) - rbm.hidden_offset
    return -(s @ rbm.weight @ t.T)[0, 0]


def alone(rbm, v, h):
    if h is None:
        return -((rbm.visible.statistic(v[None]) - rbm.visible_offset) @ rbm.visible_bias)[0]
    return -((rbm.hidden.statistic(h[None]) - rbm.hidden_offset) @ rbm.hidden_bias)[0]


def test_one_copy_of_each_is_the_machine_itself():
    rbm = randomised(RBM(3, 2))
    v, h = everywhere(rbm.visible)[0], everywhere(rbm.hidden)[0]
    torch.testing.assert_close(TiedRBM(rbm)(v), -torch.logsumexp(-table(rbm, v, h), 1))


@torch.no_grad()
def test_a_deep_machine_hears_the_mean_of_its_stack():
    """Fields on each layer of a machine that was composed, against those in the tied machines on both sides of it."""
    layers = [BernoulliUnits(3), SpinUnits(2), BernoulliUnits(2), BernoulliUnits(3)]
    stack = [randomised(RBM(a, b), seed=i) for i, (a, b) in enumerate(itertools.pairwise(layers))]
    machine = DeepBoltzmannMachine(layers[0], layers[1:]).double()
    compose(stack, machine)
    tied = [TiedRBM(rbm, *copies_of(i, 3)) for i, rbm in enumerate(stack)]
    states = [torch.bernoulli(torch.full((5, u.size), 0.5), generator=seeded(i)).double() for i, u in enumerate(layers)]

    def up(i):
        return tied[i].two_layers(states[i]).hidden_field(tied[i].copied(states[i]))[:, : layers[i + 1].size]

    def down(i):
        above = torch.cat([states[i + 1]] * tied[i].hidden_copies, 1)
        return tied[i].two_layers(states[i]).visible_field(above)[:, : layers[i].size]

    def check():
        even, odd = machine.packed(states)
        whole = machine.two_layers(even)
        on_odd, on_even = whole.hidden_field(even), whole.visible_field(odd)
        torch.testing.assert_close(on_even[:, :3], down(0), **EXACT)
        torch.testing.assert_close(on_odd[:, :2], 0.5 * (up(0) + down(1)), **EXACT)
        torch.testing.assert_close(on_even[:, 3:], 0.5 * (up(1) + down(2)), **EXACT)
        torch.testing.assert_close(on_odd[:, 2:], up(2), **EXACT)

    check()
    machine.weights[1].mul_(2.0)
    with pytest.raises(AssertionError):
        check()


@torch.no_grad()
def test_hidden_draws_hear_all_copies():
    rbm = randomised(RBM(3, 2))
    v = everywhere(rbm.visible)[0]
    p = (rbm.hidden_bias + 2.0 * (v - rbm.visible_offset) @ rbm.weight).sigmoid()
    u = torch.rand((len(v), 2), generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(TiedRBM(rbm, 2, 1).hidden_draws(v, u), (u < p).double())


# What is refused ----------------------------------------------------------------------------------------------------


def test_what_is_no_deep_machine():
    with pytest.raises(OptionError, match=r"two hidden layers or more.*\[5\].*RBM"):
        DeepBoltzmannMachine(3, [5])
    with pytest.raises(OptionError, match="two hidden layers or more"):
        DeepBoltzmannMachine(3, 5)
    with pytest.raises(OptionError, match="ReLU units are hidden"):
        DeepBoltzmannMachine(ReLUUnits(3), [2, 2])
    with pytest.raises(OptionError, match="one scale; divide the data"):
        DeepBoltzmannMachine(GaussianUnits(2, scale=torch.tensor([1.0, 2.0])), [2, 2])
    with pytest.raises(OptionError, match="weight_scale"):
        DeepBoltzmannMachine(3, [2, 2], weight_scale=-1.0)


def test_states_and_settings_that_do_not_fit():
    machine = deep("two")
    with pytest.raises(ShapeError, match="3 layers, the data's included; got states of 2"):
        machine.joint_energy([torch.zeros(1, 3), torch.zeros(1, 2)])
    with pytest.raises(ShapeError, match=r"states of layer 2 have shape \(1, 4\)"):
        machine.joint_energy([torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1, 4)])
    with pytest.raises(ShapeError):
        machine(torch.zeros(1, 3))
    with pytest.raises(ShapeError):
        mean_field(machine, torch.zeros(1, 6))
    with pytest.raises(DomainError, match=r"0\.3"):
        machine.check_states(torch.full((2, 3), 0.3))
    with pytest.raises(OptionError, match="sliding factor"):
        machine.recentre(machine.even_offset, machine.odd_offset, rate=2.0)
    with pytest.raises(OptionError, match="smoothing"):
        machine.base(torch.zeros(2, 3), smoothing=0.0)
    for wrong, said in (
        ({"iterations": 0}, "1 iteration"),
        ({"damping": 1.0}, "share of the old"),
        ({"tolerance": -1.0}, "tolerance"),
    ):
        with pytest.raises(OptionError, match=said):
            mean_field(machine, torch.zeros(1, 3, dtype=torch.float64), **wrong)
    with pytest.raises(OptionError, match="1 iteration"):
        MeanFieldEnergy(machine, 0)


def test_stacks_that_do_not_fit():
    low, high = RBM(3, 2), RBM(2, 4)
    with pytest.raises(OptionError, match=r"the layers.*and the deep machine"):
        compose([low, high], DeepBoltzmannMachine(3, [2, 3]))
    with pytest.raises(ArgumentTypeError, match="layers of an RBM"):
        TiedRBM(deep("two"))
    with pytest.raises(OptionError, match="1 time or more"):
        TiedRBM(low, 0)
    with pytest.raises(OptionError, match="without a context"):
        TiedRBM(RBM(3, 2, condition=2))
    with pytest.raises(OptionError, match="two RBMs or more"):
        DeepBeliefNetwork([low])
    with pytest.raises(OptionError, match="cannot stand on one with hidden BernoulliUnits"):
        DeepBeliefNetwork([low, low])
    with pytest.raises(ArgumentTypeError, match="stack of RBMs"):
        DeepBeliefNetwork([low, deep("two")])
    network = DeepBeliefNetwork([low, high])
    with pytest.raises(ShapeError):
        network.up(torch.zeros(2, 4), seeded())
    with pytest.raises(ShapeError):
        network.down(torch.zeros(2, 3), seeded())
