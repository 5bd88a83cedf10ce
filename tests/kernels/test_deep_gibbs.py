"""Block Gibbs of deep machines against transition matrices from the joint law of all layers, and a broken twin."""

import itertools

import pytest
import torch

from contracts import seeded
from deep_machines import deep, evens, joint, odds, side
from enumeration import System, assert_keeps_law, assert_transitions, imbalance
from gibbsian.kernels.gibbs import SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.sampling import sample
from machines import alternation


@torch.no_grad()
def case(name, which):
    """The even or the odd layers as a system, and the matrix of a step there: to the other layers and back."""
    machine = deep(name, scale=0.9)
    kept, others = (evens(machine), odds(machine)) if which == "even" else (odds(machine), evens(machine))
    energies = joint(machine).permute(*kept, *others).flatten(0, len(kept) - 1).flatten(1)
    energy = (machine if which == "even" else machine.odd_layers).requires_grad_(False)
    return System(f"{name} {which}", energy, side(machine, int(which == "odd")), False), alternation(energies)


CASES = list(itertools.product(("two", "three", "four", "spins"), ("even", "odd")))


@pytest.mark.parametrize(("name", "which"), CASES)
def test_steps_are_the_alternation_of_the_layers(name, which):
    system, theory = case(name, which)
    assert imbalance(theory, system.law) < 1e-14
    assert_transitions(RBMGibbs(), system, theory, chains=2**10)


def test_the_twin_that_forgets_the_top_layer_is_caught():
    system, _ = case("two", "even")
    machine = deep("two", scale=0.9)
    with torch.no_grad():
        machine.weights[1].zero_()
        energies = joint(machine).permute(0, 2, 1).flatten(0, 1)
    with pytest.raises(AssertionError, match="p ="):
        assert_transitions(RBMGibbs(), system, alternation(energies), chains=2**10)


@pytest.mark.parametrize("which", ["even", "odd"])
def test_exact_draws_stay_exact_draws(which):
    system, _ = case("three", which)
    assert_keeps_law(RBMGibbs(), system, chains=40_000)


@pytest.mark.parametrize("kernel", [GibbsWithGradients(), SingleSiteGibbs()], ids=repr)
def test_other_kernels_on_bits_walk_the_even_layers_too(kernel):
    system, _ = case("two", "even")
    assert_keeps_law(kernel, system, chains=20_000)


@pytest.mark.slow
def test_compiled_chains_are_eager_ones():
    machine = deep("three").float()
    x = machine.base().sample(50, seeded())
    eager, compiled = (
        sample(machine, RBMGibbs(), x, steps=30, rng=seeded(1), compile=choice) for choice in (False, True)
    )
    assert float((eager.x == compiled.x).float().mean()) > 0.99
