"""log Z and likelihoods of deep machines and belief networks against sums over all states; estimates against them."""

import itertools

import pytest
import torch

from contracts import seeded
from deep_machines import LAYERS, deep, joint, listed, summed
from gibbsian.energies.belief import DeepBeliefNetwork
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.units import CategoricalUnits, SpinUnits
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.partition import belief
from gibbsian.partition import deep as deep_module
from gibbsian.partition.annealed import ais
from gibbsian.partition.base import LogZ
from gibbsian.partition.belief import belief_bound, exact_belief_log_likelihood
from gibbsian.partition.boltzmann import exact_log_z, rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.deep import exact_deep_log_likelihood, variational_bound
from gibbsian.partition.enumeration import enumeration
from gibbsian.partition.schedule import Schedule
from gibbsian.sampling import sample
from machines import Products, everywhere, randomised, table

NAMES = list(LAYERS)
BITS = [name for name in NAMES if name != "reals"]


@torch.no_grad()
def by_hand(machine):
    return float(torch.logsumexp(-joint(machine).flatten(), 0))


@pytest.mark.parametrize("name", NAMES)
def test_exact_log_z_from_either_side(name):
    machine = deep(name)
    for energy in (machine, machine.odd_layers):
        assert float(exact_log_z(energy).value) == pytest.approx(by_hand(machine), abs=1e-10)
    assert exact_log_z(machine.float()).value.dtype == torch.float64


def test_layers_of_bits_are_enumerated_as_any_bits():
    for energy in (deep("three"), deep("three").odd_layers):
        assert float(enumeration(energy).value) == pytest.approx(by_hand(deep("three")), abs=1e-10)


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_exact_log_likelihoods(name, chunk, monkeypatch):
    monkeypatch.setattr(deep_module, "CHUNK", chunk)
    machine = deep(name)
    v, log_w = listed(machine)[0][0], listed(machine)[1][0]
    near = v.flatten(1).abs().amax(1) < 4.0
    exact = -summed(joint(machine), (0,)) - log_w - by_hand(machine)
    found = exact_deep_log_likelihood(machine, v[near])
    torch.testing.assert_close(found, exact[near], rtol=0, atol=1e-10)
    if name in BITS:
        assert float(torch.logsumexp(found, 0)) == pytest.approx(0.0, abs=1e-10)


@torch.no_grad()
def test_float32_machines_are_summed_in_float64():
    machine = deep("three").float()
    v = everywhere(machine.visible)[0].float()
    found = exact_deep_log_likelihood(machine, v)
    torch.testing.assert_close(found, exact_deep_log_likelihood(machine.double(), v.double()), rtol=0, atol=1e-10)


def test_either_side_of_the_hidden_layers_is_listed():
    """The wider side is the odd one in one machine and the even one in the other."""
    for hidden in ([5, 2], [2, 5]):
        machine = DeepBoltzmannMachine(3, hidden, weight_scale=0.8, rng=seeded()).double()
        v = everywhere(machine.visible)[0]
        assert float(torch.logsumexp(exact_deep_log_likelihood(machine, v), 0)) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("name", BITS)
def test_the_variational_bound_lies_between_the_ends_of_log_z(name):
    machine = deep(name, scale=1.1)
    v, z = listed(machine)[0][0], exact_log_z(machine)
    exact = exact_deep_log_likelihood(machine, v, z)
    found = variational_bound(machine, v, z, rows=3)
    assert bool((found.value <= exact + 1e-10).all())
    assert float((exact - found.value).max()) > 1e-5
    wide = variational_bound(machine, v, z._replace(lower=z.value - 1.0, upper=z.value + 2.0))
    torch.testing.assert_close(wide.lower, found.value - 2.0)
    torch.testing.assert_close(wide.upper, found.value + 1.0)


@pytest.mark.parametrize("side", ["even", "odd"])
@pytest.mark.parametrize("name", ["two", "three", "spins", "classes"])
def test_annealing_on_either_side(name, side):
    machine = deep(name, scale=1.0)
    energy = machine if side == "even" else machine.odd_layers
    base, rng = energy.base(), seeded(3)
    settings = {"kernel": RBMGibbs(), "path": rbm_path(base, energy), "schedule": Schedule.linear(60)}
    truth = float(exact_log_z(machine).value)
    found = ais(energy, base, rng=rng, chains=1000, **settings)
    assert float(found.lower) < truth
    assert abs(float(found.value) - truth) < 4.5 * float(found.stderr)
    draws = sample(energy, RBMGibbs(), base.sample(1000, rng), steps=100, rng=rng).x
    both = bracket(energy, base, draws, rng=rng, **settings)
    assert float(both.lower) < truth < float(both.upper)
    assert abs(float(both.value) - truth) < 4.5 * float(both.stderr)


def test_the_twin_with_a_weight_counted_twice_is_caught():
    machine = deep("two", scale=1.0)
    truth, rng = float(exact_log_z(machine).value), seeded(3)
    with torch.no_grad():
        machine.weights[1].mul_(2.0)
    settings = {"kernel": RBMGibbs(), "path": rbm_path(machine.base(), machine), "schedule": Schedule.linear(60)}
    found = ais(machine, machine.base(), rng=rng, chains=1000, **settings)
    assert abs(float(found.value) - truth) > 4.5 * float(found.stderr)


def test_a_temperature_of_annealing_takes_one_sweep_of_products():
    """The couplings' identity is what lets fields be carried over; a new tensor at each temperature would lose it."""
    machine = deep("three")
    base, rng = machine.base(), seeded()
    path, counts = rbm_path(base, machine), []
    for temperatures in (10, 30):
        settings = {"kernel": RBMGibbs(), "path": path, "schedule": Schedule.linear(temperatures)}
        with Products() as products:
            ais(machine, base, rng=rng, chains=32, **settings)
        counts.append(products.count)
    # Three couplings, once in each direction; fields are computed anew at the start of each block of temperatures.
    assert (counts[1] - counts[0]) / 20 <= 7.0


# Belief networks ----------------------------------------------------------------------------------------------------


def network(seed=0):
    layers = [SpinUnits(2), CategoricalUnits(1, classes=3), 2, 3]
    stack = [randomised(RBM(a, b), seed=seed + i) for i, (a, b) in enumerate(itertools.pairwise(layers))]
    return DeepBeliefNetwork(stack)


@torch.no_grad()
def law_by_hand(net):
    """Joint log-law of the data and all hidden layers but the highest, ``(v, x_1, x_2)``."""
    tables = [table(rbm, everywhere(rbm.visible)[0], everywhere(rbm.hidden)[0]) for rbm in net.machines]
    down = [(-t).log_softmax(0) for t in tables[:-1]]
    top = torch.logsumexp(-tables[-1], 1).log_softmax(0)
    return down[0][:, :, None] + down[1][None] + top


@torch.no_grad()
def test_exact_log_likelihoods_of_a_belief_network():
    net = network()
    v = everywhere(net.visible)[0]
    exact = torch.logsumexp(law_by_hand(net), (1, 2))
    torch.testing.assert_close(exact_belief_log_likelihood(net, v), exact, rtol=0, atol=1e-10)
    assert float(torch.logsumexp(exact, 0)) == pytest.approx(0.0, abs=1e-10)


@torch.no_grad()
def bound_by_hand(net):
    tables = [table(rbm, everywhere(rbm.visible)[0], everywhere(rbm.hidden)[0]) for rbm in net.machines]
    up = [(-t).log_softmax(1) for t in tables[:-1]]
    log_q = up[0][:, :, None] + up[1][None]
    return (log_q.exp() * (law_by_hand(net) - log_q)).sum((1, 2))


def assert_estimates(found, exact, limit=5.0):
    t = (found.value - exact) / found.stderr
    assert float(t.abs().max()) < limit, f"t = {t.tolist()}"


def test_the_greedy_bound_is_estimated_within_its_error():
    net = network()
    v, z = everywhere(net.visible)[0], exact_log_z(net.top)
    found, exact = belief_bound(net, v, z, rng=seeded(1), draws=500, rows=3), bound_by_hand(net)
    assert_estimates(found, exact)
    assert bool((exact < exact_belief_log_likelihood(net, v, z)).all())
    # A twin whose law of the hidden layers is that of another network's couplings, as of weights not yet copied.
    with pytest.raises(AssertionError, match="t ="):
        assert_estimates(found, bound_by_hand(network(seed=5)))


def test_draws_down_from_exact_draws_of_the_top_have_the_networks_law():
    net, rng, n = network(), seeded(2), 60_000
    states = everywhere(net.top.visible)[0]
    law = (-net.top(states)).softmax(0).detach()
    x = net.down(states[torch.multinomial(law, n, replacement=True, generator=rng)], rng)
    v = everywhere(net.visible)[0]
    counts = (x[:, None] == v[None]).all(2).double().sum(0)
    due = n * exact_belief_log_likelihood(net, v).exp()
    assert float(((counts - due) ** 2 / due).sum()) < 40.0
    means = net.down(states, rng, means=True)
    assert means.shape == (len(states), 2)
    assert float(means.min()) > 0.0
    assert float(means.max()) < 1.0


# What is refused ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit(monkeypatch):
    machine, z = deep("two"), exact_log_z(deep("two"))
    v = everywhere(machine.visible)[0]
    with pytest.raises(DomainError, match=r"for example 0\.3.*Binarise"):
        variational_bound(machine, torch.full((2, 3), 0.3), z)
    with pytest.raises(ArgumentTypeError, match="log_z is a LogZ"):
        variational_bound(machine, v, 3.0)
    with pytest.raises(ArgumentTypeError, match="likelihoods of a DeepBoltzmannMachine"):
        variational_bound(RBM(3, 2), v, z)
    big = DeepBoltzmannMachine(3, [40, 30])
    with pytest.raises(OptionError, match=r"2\^30\.0 states, more than 2\^25; variational_bound"):
        exact_deep_log_likelihood(big, v.float(), z)
    with pytest.raises(OptionError, match=r"more than 2\^25.*rbm_path"):
        exact_log_z(big)
    with pytest.raises(OptionError, match="leads to an RBM"):
        rbm_path(machine.base(), machine + machine.base())


def test_what_does_not_fit_a_belief_network(monkeypatch):
    net = network()
    v, z = everywhere(net.visible)[0], exact_log_z(net.top)
    with pytest.raises(OptionError, match="draws is 2 or more"):
        belief_bound(net, v, z, rng=seeded(), draws=1)
    with pytest.raises(ArgumentTypeError, match=r"LogZ of network\.top"):
        belief_bound(net, v, float(z.value), rng=seeded())
    with pytest.raises(ArgumentTypeError, match="likelihoods of a DeepBeliefNetwork"):
        belief_bound(deep("two"), v, z, rng=seeded())
    with pytest.raises(DomainError, match=r"0\.3"):
        exact_belief_log_likelihood(net, torch.full((2, 2), 0.3))
    monkeypatch.setattr(belief, "MOST_PAIRS", 8)
    with pytest.raises(OptionError, match="belief_bound"):
        exact_belief_log_likelihood(net, v)
    assert isinstance(z, LogZ)
