"""Alternating Gibbs sampling against transition matrices from the joint law of both layers, and broken twins."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import constraints

import gibbsian as gb
from contracts import (
    ExactTarget,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_reversible,
    assert_state_is_current,
    normal_cdf,
    seeded,
)
from enumeration import adjusted, assert_keeps_law, assert_transitions, block_update, imbalance, matrix_of
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.pairwise import Ising
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.errors import ArgumentTypeError, DomainError
from gibbsian.kernels.discrete_langevin import DiscreteLangevin
from gibbsian.kernels.gibbs import BlockGibbs, SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.partition.boltzmann import IntermediateRBM, rbm_path
from machines import Products, alternation, everywhere, machine, randomised, system_of, table, told

DISCRETE = [
    (v, h)
    for v in ("bernoulli", "spin", "categorical")
    for h in ("bernoulli", "spin", "categorical", "relu", "gaussian")
]


def of(visible, hidden, scale=1.0):
    return system_of(f"{visible}-{hidden}", machine(visible, hidden, scale=scale))


@torch.no_grad()
def joint(energy):
    """Joint energies of all visible and hidden states, with the weights of the hidden ones."""
    h, log_w = everywhere(energy.hidden)
    return table(energy, everywhere(energy.visible)[0], h) - log_w


@pytest.mark.parametrize("pair", DISCRETE, ids="-".join)
def test_steps_are_the_alternation_of_conditionals(pair):
    system = of(*pair)
    theory = alternation(joint(system.energy))
    # Sums over ten thousand points of a grid, of real hidden units, round to a few 1e-15.
    assert imbalance(theory, system.law.detach()) < 1e-14
    assert_transitions(RBMGibbs(), system, theory, chains=2**12)


@pytest.mark.parametrize("pair", [("bernoulli", "bernoulli"), ("spin", "spin")], ids="-".join)
def test_the_matrix_of_a_step_is_in_detailed_balance(pair):
    system = of(*pair)
    own = matrix_of(RBMGibbs(), system, points=2**16, decides=False)
    assert float((own - alternation(joint(system.energy))).abs().max()) < 1e-3
    assert imbalance(own, system.law.detach()) < 1e-3


@torch.no_grad()
def tempered_joint(energy, beta, beside=0.0):
    """Joint energies at a temperature, hidden units' own energies aside, plus ``beside`` of each visible state."""
    v, (h, log_w) = everywhere(energy.visible)[0], everywhere(energy.hidden)
    own = told(energy.hidden, h)[1]
    return (
        beta * (table(energy, v, h) - own)
        + own
        - log_w
        + (beside[:, None] if isinstance(beside, torch.Tensor) else beside)
    )


@pytest.mark.parametrize("pair", [("bernoulli", "bernoulli"), ("spin", "relu"), ("categorical", "spin")], ids="-".join)
@pytest.mark.parametrize("beta", [0.4, torch.tensor(1.7, dtype=torch.float64)])
def test_temperatures_and_sums_are_met_by_a_test(pair, beta):
    """The target is beta F plus a base plus a pair coupling; the tempered machine and the base propose."""
    system = of(*pair)
    energy, v = system.energy, system.states
    base = randomised(RBM(energy.visible, 1), seed=5).base()
    other = gb.Energy.of(lambda x: 0.3 * x.flatten(1)[:, 0] * x.flatten(1)[:, -1], energy.event_shape, energy.support)
    for extra, beside in ((None, 0.0), (0.6 * base, (0.6 * base)(v))):
        proposal = alternation(tempered_joint(energy, float(beta), beside))
        target = beta * energy if extra is None else beta * energy + extra + other
        mixed = dataclasses.replace(system, energy=target)
        assert_transitions(RBMGibbs(), mixed, adjusted(proposal, mixed.law), chains=2**12)


def test_terms_that_are_not_independent_sites_are_in_the_test_alone():
    system = of("spin", "bernoulli")
    j = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, -0.4], [0.0, -0.4, 0.0]], dtype=torch.float64)
    mixed = dataclasses.replace(system, energy=system.energy + Ising(j))
    assert_transitions(RBMGibbs(), mixed, adjusted(alternation(joint(system.energy)), mixed.law), chains=2**12)


@pytest.mark.parametrize(
    "pair", [("bernoulli", "bernoulli"), ("spin", "gaussian"), ("categorical", "relu")], ids="-".join
)
def test_nothing_is_rejected_along_the_path_of_machines(pair):
    system = of(*pair)
    base = randomised(RBM(system.energy.visible, 1), seed=5).base()
    path = rbm_path(base, system.energy)
    for beta in (0.0, 0.35, 1.0):
        energy = path(torch.tensor(beta, dtype=torch.float64))
        assert isinstance(energy, IntermediateRBM)
        here = dataclasses.replace(system, energy=energy)
        exact = tempered_joint(system.energy, beta, (1.0 - beta) * base(system.states))
        assert_transitions(RBMGibbs(), here, alternation(exact), chains=2**12)
        out = gb.sample(energy, RBMGibbs(), system.states, steps=3, rng=seeded())
        assert bool((out.acceptance == 1.0).all())
    torch.testing.assert_close(path(torch.tensor(0.0))(system.states), base(system.states))
    torch.testing.assert_close(path(torch.tensor(1.0))(system.states), system.energy(system.states))


def gaussian_target(hidden):
    """Two real units and bits: a mixture of Gaussians, whose projections are known."""
    energy = machine("scaled", hidden, scale=1.5)
    h, _ = everywhere(energy.hidden)
    with torch.no_grad():
        weights = (-energy.marginal_hidden_energy(h)).softmax(0)
        centres = energy.visible_given(h)
    scale = energy.visible.scale

    def draw(n, rng):
        which = torch.multinomial(weights, n, replacement=True, generator=rng)
        return centres[which] + scale * torch.randn((n, 2), generator=rng, dtype=torch.float64)

    projections = {}
    for direction in ((1.0, 0.0), (0.0, 1.0), (1.0, -1.0)):
        a = torch.tensor(direction, dtype=torch.float64)
        spread, places = float(((a * scale) ** 2).sum().sqrt()), centres @ a
        projections[f"x.{direction}"] = (
            lambda x, a=a: x @ a,
            lambda y, p=places, s=spread: (weights * normal_cdf((y[:, None] - p) / s)).sum(1),
        )
    return ExactTarget(f"gaussian-{hidden}", energy, draw, projections)


@pytest.mark.parametrize("hidden", ["bernoulli", "spin"])
def test_real_units_keep_their_law(hidden):
    target = gaussian_target(hidden)
    assert_invariant(RBMGibbs(), target)
    assert_reversible(RBMGibbs(), target)


def test_a_gaussian_base_beside_real_units():
    """One bit: 0.5 F + 0.5 E_0 is met by the test, and its law is known by quadrature."""
    energy = randomised(RBM(GaussianUnits(1, scale=1.3), 1), scale=1.5)
    mixed = 0.5 * energy + 0.5 * gb.Gaussian(loc=torch.tensor([0.4], dtype=torch.float64), scale=2.0)
    grid = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)
    with torch.no_grad():
        mass = torch.cumulative_trapezoid((-mixed(grid[:, None])).exp(), grid)
    cdf = torch.cat((mass.new_zeros(1), mass / mass[-1]))

    def at(y):
        i = torch.searchsorted(grid, y).clamp(1, len(grid) - 1)
        part = (y - grid[i - 1]) / (grid[i] - grid[i - 1])
        return cdf[i - 1] + part * (cdf[i] - cdf[i - 1])

    def draw(n, rng):
        u = torch.rand(n, generator=rng, dtype=torch.float64)
        i = torch.searchsorted(cdf, u).clamp(1, len(grid) - 1)
        return (grid[i - 1] + (u - cdf[i - 1]) / (cdf[i] - cdf[i - 1]) * (grid[i] - grid[i - 1]))[:, None]

    target = ExactTarget("half and half", mixed, draw, {"x": (lambda x: x[:, 0], at)})
    assert_invariant(RBMGibbs(), target)
    assert_reversible(RBMGibbs(), target)


@dataclasses.dataclass(frozen=True)
class MeansForDraws(RBMGibbs):
    """Feeds the means of the hidden units on, as is often done."""

    def step(self, energy, state, noise):
        new, info = super().step(energy, state, noise)
        x = energy.visible_given(energy.hidden_given(state.x), u=noise[1]).detach()
        return new._replace(
            x=x, energy=energy(x).detach(), memory=(energy.two_layers(x).hidden_field(x).detach(),)
        ), info


@dataclasses.dataclass(frozen=True)
class OneNoise(RBMGibbs):
    """Draws both layers with the same numbers."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[1][:, :2], noise[1]))


@dataclasses.dataclass(frozen=True)
class Untested(RBMGibbs):
    """Accepts every proposal at a temperature."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (*noise[:2], torch.zeros_like(noise[2])))


def correlated():
    """Strong couplings around the middle, so that hidden units matter and chains move."""
    energy = RBM(3, 2).double()
    with torch.no_grad():
        energy.weight.copy_(torch.tensor([[2.0, -1.0], [-2.0, 1.5], [1.0, 2.0]]))
        energy.visible_offset.fill_(0.5)
        energy.hidden_offset.fill_(0.5)
    return system_of("correlated", energy)


@pytest.mark.parametrize("twin", [MeansForDraws(), OneNoise()], ids=lambda k: type(k).__name__)
def test_broken_twins_are_caught(twin):
    with pytest.raises(AssertionError, match="p = "):
        assert_keeps_law(twin, correlated())


def test_a_temperature_without_its_test_is_caught():
    system = correlated()
    mixed = dataclasses.replace(system, energy=0.3 * system.energy)
    assert_keeps_law(RBMGibbs(), mixed)
    with pytest.raises(AssertionError, match="p = "):
        assert_keeps_law(Untested(), mixed)


@pytest.mark.parametrize(
    "pair",
    [("bernoulli", "bernoulli"), ("categorical", "relu"), ("scaled", "gaussian"), ("joined", "spin")],
    ids="-".join,
)
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_it_keeps_the_contracts(pair, beta, graphs):
    inner = machine(*pair)
    energy = inner if beta == 1.0 else beta * inner + 0.5 * inner.base()
    start = inner.base().sample(6, seeded())
    assert_continues(RBMGibbs(), energy, start)
    assert_state_is_current(RBMGibbs(), energy, start)
    assert_leaves_inputs_alone(RBMGibbs(), energy, start)
    # Tracing takes seconds each.
    if (pair[0], beta) in {("bernoulli", 1.0), ("scaled", 0.5)}:
        assert_one_graph(RBMGibbs(), energy, start, graphs)
    if (pair[0], beta) == ("bernoulli", 1.0):
        assert_flat_memory(RBMGibbs(), energy, start)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Compilation failed:RuntimeWarning")
@pytest.mark.parametrize(
    "pair", [("bernoulli", "bernoulli"), ("scaled", "relu"), ("categorical", "spin")], ids="-".join
)
def test_compiled_chains_are_the_eager_ones(pair, monkeypatch):
    """Through Inductor itself, without falling back."""
    monkeypatch.setattr("gibbsian.compilation._said", set())
    energy = machine(*pair)
    start = energy.base().sample(100, seeded())
    eager, compiled = (gb.sample(energy, RBMGibbs(), start, steps=10, rng=seeded(), compile=c) for c in (False, True))
    torch.testing.assert_close(compiled.x, eager.x, rtol=0, atol=1e-9)


def test_no_derivative_is_taken(monkeypatch):
    energy = machine("bernoulli", "relu")
    start = energy.base().sample(6, seeded())

    def forbidden(*_, **__):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    moved = gb.sample(0.5 * energy, RBMGibbs(), start, steps=5, rng=seeded())
    assert int(moved.nonfinite.sum()) == 0
    with pytest.raises(AssertionError, match="autograd was called"):
        gb.sample(0.5 * energy, gb.GibbsWithGradients(), start, steps=1, rng=seeded())


def test_a_step_takes_two_products(monkeypatch):
    energy = machine("bernoulli", "bernoulli")
    state = gb.sample(energy, RBMGibbs(), energy.base().sample(6, seeded()), steps=1, rng=seeded()).state

    with Products() as products:
        gb.sample(energy, RBMGibbs(), state, steps=10, rng=seeded())
    assert products.count == 20


def test_a_fixed_context_is_passed_on():
    conditional = randomised(RBM(3, 2, condition=2), scale=1.0)
    v = everywhere(conditional.visible)[0]
    for label in (0, 1):
        system = dataclasses.replace(of("bernoulli", "bernoulli"), energy=conditional.given(y=label))
        h, _ = everywhere(conditional.hidden)
        plain = randomised(RBM(3, 2), scale=1.0)
        with torch.no_grad():
            plain.load_state_dict({k: t for k, t in conditional.state_dict().items() if "slope" not in k})
            plain.visible_bias += conditional.visible_slope[label]
            plain.hidden_bias += conditional.hidden_slope[label]
            theory = alternation(table(plain, v, h))
        assert_transitions(RBMGibbs(), system, theory, chains=2**12)
    labels = torch.tensor([0, 1]).repeat(4)
    mixed = 0.5 * conditional.given(y=labels) + 0.5 * gb.Bernoulli(logits=torch.zeros(3, dtype=torch.float64))
    assert gb.sample(mixed, RBMGibbs(), v, steps=3, rng=seeded()).x.shape == (8, 3)


@pytest.mark.parametrize(
    "kernel", [BlockGibbs(), GibbsWithGradients(), DiscreteLangevin(0.4), SingleSiteGibbs()], ids=repr
)
@pytest.mark.parametrize(
    "pair", [("bernoulli", "bernoulli"), ("spin", "relu"), ("categorical", "gaussian")], ids="-".join
)
def test_other_discrete_kernels_serve_machines(kernel, pair):
    system = of(*pair)
    assert_keeps_law(kernel, system, chains=60_000, steps=2)
    if isinstance(kernel, BlockGibbs):
        theory = torch.eye(len(system.states), dtype=torch.float64)
        for i in range(system.sites):
            theory = theory @ block_update(system, [i])
        assert_transitions(kernel, system, theory, chains=2**12)


def test_chains_that_leave_the_numbers_stay_where_they_were():
    energy = RBM(4, 3, rng=seeded())
    start = energy.base().sample(5, seeded())
    state = gb.sample(energy, RBMGibbs(), start, steps=1, rng=seeded()).state
    with torch.no_grad():
        energy.weight.fill_(math.nan)
    out = gb.sample(energy, RBMGibbs(), state, steps=3, rng=seeded())
    assert torch.equal(out.x, state.x)
    assert out.nonfinite.tolist() == [3.0] * 5


def test_what_does_not_fit_is_refused():
    bits = gb.Energy.of(lambda x: x.sum(1), (3,), constraints.boolean)
    rbm = RBM(3, 2)
    cases = {
        r"does not tell any\. It serves RBM": lambda: run(bits),
        "there are 2 among": lambda: run(rbm + RBM(3, 2)),
        "there are 0 among": lambda: run(bits + bits),
        "is at a temperature, or part of a sum, already": lambda: run(
            0.5 * rbm_path(rbm.base(), rbm)(torch.tensor(0.5)) + rbm.base()
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ArgumentTypeError, match=message):
            call()
    with pytest.raises(DomainError, match=r"Discrete chains stand on zeros and ones.*0\.3"):
        gb.sample(rbm, RBMGibbs(), torch.full((2, 3), 0.3), steps=1, rng=seeded())
    joined = machine("joined", "spin").float()
    with pytest.raises(DomainError, match="2 of 2 chains start outside the energy's domain, Joined"):
        gb.sample(joined, RBMGibbs(), torch.ones(2, 5), steps=1, rng=seeded())
    other = gb.sample(rbm, SingleSiteGibbs(), torch.zeros(2, 3), steps=1, rng=seeded()).state
    with pytest.raises(ArgumentTypeError, match="RBMGibbs needs a memory of earlier steps"):
        gb.sample(rbm, RBMGibbs(), other, steps=1, rng=seeded())
    assert repr(RBMGibbs()) == "RBMGibbs()"


def run(energy):
    gb.sample(energy, RBMGibbs(), torch.zeros(2, 3), steps=1, rng=seeded())
