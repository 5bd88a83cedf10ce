"""Block Gibbs against products of conditionals in closed form, its protocol, and the critical Ising torus."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import gibbsian as gb
from contracts import (
    assert_continues,
    assert_flat_memory,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_state_is_current,
    seeded,
)
from enumeration import System, assert_keeps_law, assert_transitions, block_update, imbalance, matrix_of
from enumeration import binary_system as all_bits
from enumeration import one_hot_system as all_classes
from gibbsian.energies.pairwise import CRITICAL_COUPLING, Ising, Lattice, Potts
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.discrete_langevin import DiscreteLangevin
from gibbsian.kernels.gibbs import BlockGibbs, SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from oracles import double_precision, kaufman_energy, swendsen_wang, z_score

MAGNETISATION, MAGNETISATION_ERROR = 0.71333, 0.00023
"""Mean |m| of the critical 16 x 16 torus: ``swendsen_wang(16, CRITICAL_COUPLING, 1000, 4000, 100, seed=2)``.

Four minutes; seed 1 with 1000 sweeps gave 0.71306 +- 0.00047. No closed form is known, and the transfer matrix of
16 x 16 would take hours.
"""


def symmetric(d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    j = scale * torch.randn(d, d, generator=seeded(seed), dtype=torch.float64)
    return torch.triu(j, 1) + torch.triu(j, 1).T


def ising() -> System:
    """A square lattice of four bits with a field of its own at each."""
    with double_precision():
        field = torch.randn(2, 2, generator=seeded(1), dtype=torch.float64)
        return dataclasses.replace(all_bits(), name="ising2x2", energy=Ising.lattice((2, 2), 0.35, field))


def dense() -> System:
    """Four sites coupled to each other: every block is a single site."""
    energy = Ising(symmetric(4, 2, 0.5), torch.randn(4, generator=seeded(3), dtype=torch.float64))
    return dataclasses.replace(all_bits((4,)), name="dense4", energy=energy)


def potts() -> System:
    """Three sites in an open row, three classes."""
    with double_precision():
        field = torch.randn(3, 3, generator=seeded(4), dtype=torch.float64)
        energy = Potts(Lattice((3,), 0.7, periodic=False), field=field)
    return dataclasses.replace(all_classes(), name="potts3", energy=energy)


class Machine(gb.Energy):
    """A Boltzmann machine over (visible, hidden), whose blocks are slices; only what is asked for is computed."""

    support = constraints.boolean
    blocks = (slice(0, 2), slice(2, None))

    def __init__(self):
        super().__init__()
        rng = seeded(7)
        self.register_buffer("weight", torch.randn(2, 2, generator=rng, dtype=torch.float64))
        self.register_buffer("bias", torch.randn(4, generator=rng, dtype=torch.float64))
        self.event_shape = torch.Size((4,))

    def forward(self, x):
        v, h = x[:, :2], x[:, 2:]
        return -((v @ self.weight) * h).sum(1) - x @ self.bias

    def conditional_logits(self, x, block):
        v, h = x[:, :2], x[:, 2:]
        unread = torch.full_like(v, 3.0)
        if block == self.blocks[0]:
            return torch.cat((h @ self.weight.T + self.bias[:2], unread), 1)
        return torch.cat((unread, v @ self.weight + self.bias[2:]), 1)


def machine() -> System:
    return dataclasses.replace(all_bits((4,)), name="machine2+2", energy=Machine())


def sites_of(system: System) -> list[list[int]]:
    """The energy's blocks as numbers of sites."""
    shape = system.states.shape[1:-1] if system.hot else system.states.shape[1:]
    numbers = torch.arange(system.sites).view(shape)
    return [numbers[block].flatten().tolist() for block in system.energy.blocks]


def sweep(system: System) -> torch.Tensor:
    """Transition matrix of one sweep."""
    matrix = torch.eye(len(system.states), dtype=torch.float64)
    for sites in sites_of(system):
        matrix = matrix @ block_update(system, sites)
    return matrix


SYSTEMS = (ising(), dense(), potts(), machine())


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_sweeps_are_products_of_the_blocks_conditionals(system):
    law = system.law
    for sites in sites_of(system):
        assert imbalance(block_update(system, sites), law) < 1e-16
    theory = sweep(system)
    torch.testing.assert_close(law @ theory, law, rtol=0, atol=1e-15)
    own = matrix_of(BlockGibbs(), system, points=2**15, decides=False)
    # Bits read one number each, classes the largest of several, whose integral converges more slowly.
    assert float((own - theory).abs().max()) < (4e-3 if system.hot else 5e-4)
    assert_transitions(BlockGibbs(), system, theory)
    assert_keeps_law(BlockGibbs(), system)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_conditionals_are_differences_of_energies(system):
    law = system.law
    for block, sites in zip(system.energy.blocks, sites_of(system)):
        logits = system.energy.conditional_logits(system.states, block).view(len(law), system.sites, -1)
        for s in sites:
            line = block_update(system, [s])
            for i in range(len(law)):
                mates = line[i].nonzero().flatten()
                values = system.by_site()[mates, s]
                classes = values.argmax(1) if system.hot else values[:, 0].long()
                p = logits[i, s].softmax(0) if system.hot else torch.sigmoid(torch.cat((-logits[i, s], logits[i, s])))
                torch.testing.assert_close(line[i, mates], p[classes], rtol=0, atol=1e-12)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_block_gibbs_keeps_the_contracts(system, graphs):
    start = system.states[::3]
    assert_continues(BlockGibbs(), system.energy, start)
    assert_state_is_current(BlockGibbs(), system.energy, start)
    assert_leaves_inputs_alone(BlockGibbs(), system.energy, start)
    assert_one_graph(BlockGibbs(), system.energy, start, graphs)
    if system is SYSTEMS[0]:
        assert_flat_memory(BlockGibbs(), system.energy, start)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Compilation failed:RuntimeWarning")
@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_compiled_chains_are_the_eager_ones(system, monkeypatch):
    """Through Inductor itself, without falling back."""
    monkeypatch.setattr("gibbsian.compilation._said", set())
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 2)
    start = system.states.repeat(20, *[1] * (system.states.ndim - 1))
    eager, compiled = (
        gb.sample(system.energy, BlockGibbs(), start, steps=20, rng=seeded(), compile=compile)
        for compile in (False, True)
    )
    assert torch.equal(compiled.x, eager.x)


@pytest.mark.parametrize("make", [gb.Bernoulli, gb.Categorical])
def test_independent_sites_are_drawn_exactly_in_one_sweep(make):
    energy = make(logits=torch.randn(3, 3, generator=seeded(5), dtype=torch.float64))
    system = dataclasses.replace(all_bits((3, 3)) if make is gb.Bernoulli else all_classes(), energy=energy)
    assert_transitions(BlockGibbs(), system, system.law.expand(len(system.states), -1), chains=256)


@dataclasses.dataclass(frozen=True)
class AllAtOnce(BlockGibbs):
    """Neighbours updated from each other's old values."""

    def step(self, energy, state, noise):
        x = (noise[0] < energy.conditional_logits(state.x, slice(None)).sigmoid()).to(state.x.dtype)
        new, info = super().step(energy, state, noise)
        return new._replace(x=x, energy=energy(x)), info


@dataclasses.dataclass(frozen=True)
class SignFlipped(BlockGibbs):
    """Draws a zero where a one belongs."""

    def step(self, energy, state, noise):
        return super().step(-1.0 * energy, state, noise)


@pytest.mark.parametrize("twin", [AllAtOnce(), SignFlipped()], ids=lambda k: type(k).__name__)
def test_broken_twins_are_caught(twin):
    with pytest.raises(AssertionError, match="p = "):
        assert_keeps_law(twin, ising())


def test_blocks_of_ones_own_serve_any_partition():
    system = dense()
    masks = torch.eye(4, dtype=torch.bool)[[2, 0, 3, 1]]
    theory = torch.eye(16, dtype=torch.float64)
    for i in (2, 0, 3, 1):
        theory = theory @ block_update(system, [i])
    assert_transitions(BlockGibbs(masks), system, theory)


def test_sums_and_temperatures_keep_the_protocol(graphs):
    """The logits of a sum are the sum of the logits, so that annealed paths can be swept."""
    system, base = ising(), gb.Bernoulli(logits=torch.randn(2, 2, generator=seeded(6), dtype=torch.float64))
    mixed = dataclasses.replace(system, energy=0.6 * system.energy + 0.4 * base)
    assert [b.tolist() for b in mixed.energy.blocks] == [b.tolist() for b in system.energy.blocks]
    assert_transitions(BlockGibbs(), mixed, sweep(mixed))
    assert_one_graph(BlockGibbs(), mixed.energy, mixed.states, graphs)
    assert (gb.Bernoulli(logits=torch.zeros(2)) + gb.Bernoulli(logits=torch.ones(2))).blocks == (slice(None),)

    class Tilted(gb.Energy):
        support, context, blocks = constraints.boolean, ("t",), (slice(None),)

        def forward(self, x, t):
            return -t * x.sum(1)

        def conditional_logits(self, x, block, t):
            return t.unsqueeze(1).expand_as(x)

    given = Tilted().given(t=2.0) + gb.Bernoulli(logits=torch.zeros(3))
    out = gb.sample(given, BlockGibbs(), torch.zeros(20_000, 3), steps=1, rng=seeded())
    assert abs(z_score(out.x.flatten(), 1.0 / (1.0 + torch.tensor(-2.0).exp().item()))) < 5.5


def test_annealing_with_block_gibbs_and_gradients_finds_log_z():
    """The law of small Ising tori is listed; the estimate's own error and bound must hold."""
    with double_precision():
        energy = Ising.lattice((4, 4), 0.3)
        base = gb.Bernoulli(logits=torch.zeros(4, 4))
    x = ((torch.arange(2**16).unsqueeze(1) >> torch.arange(16)) & 1).double().view(-1, 4, 4)
    exact = float(torch.logsumexp(-energy(x), 0))
    with pytest.raises(OptionError, match="leaves each density invariant"):
        gb.ais(energy, base, kernel=DiscreteLangevin(0.3, adjusted=False), rng=seeded())
    for kernel in (BlockGibbs(), GibbsWithGradients(flips=4), DiscreteLangevin(0.3)):
        found = gb.ais(energy, base, kernel=kernel, rng=seeded(), chains=512)
        assert abs(float(found.value) - exact) < 5.0 * float(found.stderr)
        assert float(found.lower) < exact


def critical_chains(size, steps, chains, warmup, thin):
    """Energies per spin and magnetisations of checkerboard sweeps, each ``(draws, chains)``."""
    torus = Ising.lattice((size, size))
    start = torch.randint(0, 2, (chains, size, size), generator=seeded(8)).float()
    out = gb.sample(torus, BlockGibbs(), start, steps=steps, warmup=warmup, thin=thin, rng=seeded(9))
    return out.kept["energy"] / (CRITICAL_COUPLING * size**2), (2.0 * out.draws - 1.0).mean((2, 3)).abs()


def test_small_critical_torus_agrees_with_kaufman_and_the_transfer_matrix():
    """8 x 8: -1.4915891 per spin by Kaufman's formula, |m| 0.7773311 by transfer matrix; within 4 standard errors."""
    energy, m = critical_chains(8, 700, 500, 300, 10)
    # Chains are independent, so their means tell the error, whatever the autocorrelation.
    assert abs(z_score(energy.mean(0), kaufman_energy(8, 8, CRITICAL_COUPLING))) < 4.0
    assert abs(z_score(m.mean(0), 0.7773310927868555)) < 4.0


@pytest.mark.slow
def test_critical_torus_of_the_literature():
    """16 x 16 at 0.44068679: energy per spin by Kaufman's formula, |m| by cluster updates, within 3 standard errors."""
    energy, m = critical_chains(16, 9000, 256, 3000, 20)
    exact = kaufman_energy(16, 16, CRITICAL_COUPLING)
    e_mean, e_error = float(energy.mean()), float(energy.mean(0).std() / 256**0.5)
    m_mean, m_error = float(m.mean()), float(m.mean(0).std() / 256**0.5)
    print(f"energy {e_mean:.5f} +- {e_error:.5f} ({exact:.5f}), |m| {m_mean:.5f} +- {m_error:.5f} ({MAGNETISATION})")
    assert e_error < 0.002
    assert m_error < 0.01
    assert abs(e_mean - exact) < 3.0 * e_error
    assert abs(m_mean - MAGNETISATION) < 3.0 * (m_error**2 + MAGNETISATION_ERROR**2) ** 0.5
    again = swendsen_wang(16, CRITICAL_COUPLING, 300, 300, 50, seed=3)
    assert abs(float(again.mean()) - MAGNETISATION) < 4.0 * (float(again.var()) / 300 + MAGNETISATION_ERROR**2) ** 0.5


def test_nan_conditionals_and_infinite_energies_undo_the_sweep():
    class Holed(gb.Energy):
        support, blocks = constraints.boolean, (slice(None),)

        def forward(self, x):
            return torch.where(x.sum(1) == 3, torch.inf, 0.0 * x.sum(1))

        def conditional_logits(self, x, block):
            return torch.where(x[:, :1] * x[:, 1:2] > 0, torch.nan, 0.0 * x)

    out = gb.sample(Holed(), BlockGibbs(), torch.zeros(500, 3), steps=40, rng=seeded(), thin=1)
    assert bool((out.draws.sum(2) < 3).all())
    stuck = (out.draws[:, :, 0] * out.draws[:, :, 1]) > 0
    assert bool(stuck[-1].any())
    assert bool((stuck[1:] >= stuck[:-1]).all()), "a chain at a NaN stays there"
    assert bool((out.nonfinite > 0).any())
    torch.testing.assert_close(out.acceptance, 1.0 - out.nonfinite / 40)


def test_a_gradient_of_another_kernel_is_not_kept():
    system = ising()
    state = gb.sample(system.energy, GibbsWithGradients(), system.states, steps=1, rng=seeded()).state
    assert gb.sample(system.energy, BlockGibbs(), state, steps=1, rng=seeded()).state.grad.numel() == 0


def run(energy, kernel, shape=(4, 4)):
    gb.sample(energy, kernel, torch.zeros(3, *shape), steps=1, rng=seeded())


def test_energies_without_conditionals_are_told_what_to_write():
    net = gb.Energy.of(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), support=constraints.boolean)
    with pytest.raises(ArgumentTypeError, match=r"conditional_logits\(x, block\).*GibbsWithGradients.*SingleSiteGibbs"):
        run(net, BlockGibbs(), (4,))
    for energy in (net + gb.Bernoulli(logits=torch.zeros(4)), 2.0 * net):
        with pytest.raises(ArgumentTypeError, match="every term of an energy, and Sequential has none"):
            run(energy, BlockGibbs(), (4,))
    run(net, SingleSiteGibbs(), (4,))


def test_blocks_that_do_not_fit_are_refused():
    torus = Ising.lattice((4, 4))
    even, odd = torus.blocks
    cases = {
        "one or more": lambda: BlockGibbs(()),
        "boolean masks or slices": lambda: BlockGibbs((0, 1)),
        "Of 16 sites, 8 are in none and 0 in several": lambda: run(torus, BlockGibbs((even,))),
        "0 are in none and 8 in several": lambda: run(torus, BlockGibbs((even, odd, even))),
        r"of shape \(4, 4\), or a slice .* got torch.int64": lambda: run(torus, BlockGibbs((even.long(), odd.long()))),
        "sites of block 0 depend on each other": lambda: run(torus, BlockGibbs((slice(0, 2), slice(2, 4)))),
        "is no checkerboard": lambda: run(Ising.lattice((3, 4)), BlockGibbs(), (3, 4)),
    }
    for message, call in cases.items():
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(ArgumentTypeError, match="does not say which sites are independent"):
        run(torus + Ising.lattice((4, 4)), BlockGibbs())
    run(torus + Ising.lattice((4, 4)), BlockGibbs(torus.blocks))


def test_logits_of_another_shape_are_refused():
    class Short(gb.Energy):
        support, blocks = constraints.boolean, (slice(None),)

        def forward(self, x):
            return x.sum(1)

        def conditional_logits(self, x, block):
            return x[:, :2]

    with pytest.raises(ShapeError, match=r"have their shape; Short returned \(3, 2\)"):
        run(Short(), BlockGibbs(), (4,))


def test_it_prints_its_blocks():
    assert repr(BlockGibbs()) == "BlockGibbs()"
    assert repr(BlockGibbs((slice(0, 2), slice(2, None)))) == "BlockGibbs(<2 blocks>)"
