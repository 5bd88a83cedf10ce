"""Tempering along a path leaves the law of every level as it is, with kernels that remember too."""

import pytest
import torch

import gibbsian as gb
from contracts import assert_continues, assert_leaves_inputs_alone, assert_state_is_current, seeded
from enumeration import binary_system, counts_of, fit_p_value
from gibbsian.energies.pairwise import Ising
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels import path_tempering
from gibbsian.kernels.base import State
from gibbsian.kernels.gibbs import SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.kernels.path_tempering import PathTempering
from gibbsian.partition.boltzmann import MachineRungs
from machines import machine, system_of

BETAS = (1.0, 0.6, 0.25, 0.0)


def tempered(energy, beta):
    return beta * energy


def cases():
    rbm = system_of("rbm", machine("bernoulli", "bernoulli", scale=1.5))
    base = rbm.energy.base()
    bits = binary_system((4,))
    yield "machines", rbm, PathTempering(RBMGibbs(), BETAS, MachineRungs(base))
    yield "powers of a machine", rbm, PathTempering(RBMGibbs(), BETAS[:3], tempered)
    yield "single sites", bits, PathTempering(SingleSiteGibbs(2), BETAS[:3], tempered)
    yield "gradients", bits, PathTempering(GibbsWithGradients(), BETAS[:3], tempered)


CASES = {name: (system, kernel) for name, system, kernel in cases()}


def law_p_values(system, kernel, chains=12_000, steps=2):
    """Exact draws of every level, some steps, and the fit of every level: p-values; and the swap rates."""
    rng = seeded(3)
    with torch.no_grad():
        laws = [(-kernel.path(system.energy, b)(system.states)).softmax(0) for b in kernel.betas]
    start = [system.states[torch.multinomial(p, chains, replacement=True, generator=rng)] for p in laws]
    state = kernel.init_replicas(system.energy, torch.stack(start, 1))
    out = gb.sample(system.energy, kernel, state, steps=steps, rng=rng)
    points = kernel.points(out.state)
    assert torch.equal(points[:, 0], out.x)
    found = [fit_p_value(counts_of(system, points[:, k]), p) for k, p in enumerate(laws)]
    return found, kernel.swap_sums(out.state) / torch.tensor(kernel.turns(0, steps))


@pytest.mark.parametrize("name", CASES)
def test_every_level_keeps_its_law(name):
    """A false alarm in one of 1e8 levels."""
    found, rates = law_p_values(*CASES[name])
    assert min(found) > 1e-8, found
    assert 0.05 < float(rates.min()) < float(rates.max()) < 0.999


@pytest.mark.parametrize("twin", ["no energies at the other's level", "upside down", "points without their fields"])
def test_slips_are_seen(twin, monkeypatch):
    system, kernel = CASES["machines"]
    real, either = PathTempering._arrived, path_tempering._either

    def arrived(self, energy, state, before):
        there = real(self, energy, state, before)
        if twin == "no energies at the other's level":
            return there._replace(energy=state.energy - 0.3 * (state.energy - there.energy))
        return there._replace(energy=2 * state.energy - there.energy)

    if twin == "points without their fields":
        # The next step would draw from where the other point was.
        monkeypatch.setattr(
            path_tempering, "_either", lambda swap, new, old: either(swap, new, old)._replace(memory=old.memory)
        )
    else:
        monkeypatch.setattr(PathTempering, "_arrived", arrived)
    assert min(law_p_values(system, kernel)[0]) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_it_keeps_the_contracts(name):
    system, kernel = CASES[name]
    start = system.states[::3]
    assert_continues(kernel, system.energy, start)
    assert_leaves_inputs_alone(kernel, system.energy, start)
    if name != "gradients":
        assert_state_is_current(kernel, system.energy, start)


def test_it_reaches_modes_that_plain_chains_do_not():
    """A ferromagnet of ten spins, from all up: half of the mass is down, behind a barrier of 20 nats."""
    d = 10
    energy = Ising(0.4 * (torch.ones(d, d) - torch.eye(d)).double())
    start = torch.ones(30, d, dtype=torch.float64)
    betas = [1.0, 0.7, 0.5, 0.35, 0.2, 0.08]
    kernel = PathTempering(gb.BlockGibbs(), betas, tempered)
    out = gb.sample(energy, kernel, start, steps=120, rng=seeded(), warmup=40, thin=1)
    up = (out.draws.mean(2) > 0.5).double().mean()
    assert 0.3 < float(up) < 0.7
    plain = gb.sample(energy, gb.BlockGibbs(), start, steps=50, rng=seeded())
    assert float(plain.x.mean()) > 0.9
    assert "PathTempering(kernel=BlockGibbs(), betas=<(6,)>" in repr(kernel)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PathTempering(RBMGibbs, BETAS, tempered), ArgumentTypeError, "needs init, noise and step"),
        (lambda: PathTempering(RBMGibbs(), BETAS, None), ArgumentTypeError, r"from \(energy, beta\)"),
        (lambda: PathTempering(RBMGibbs(), (1.0,), tempered), OptionError, "two or more"),
        (lambda: PathTempering(RBMGibbs(), (0.9, 0.1), tempered), OptionError, "decrease from 1"),
        (lambda: PathTempering(RBMGibbs(), (1.0, 0.5, 0.7), tempered), OptionError, "decrease from 1"),
        (lambda: PathTempering(RBMGibbs(), (1.0, -0.5), tempered), OptionError, "flat and has no normaliser"),
    ],
)
def test_what_is_no_ladder_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_does_not_fit_is_refused_at_the_start():
    x, gaussian = torch.zeros(4, 2), gb.Gaussian(2)
    with pytest.raises(OptionError, match="ULA is unadjusted"):
        gb.sample(gaussian, PathTempering(gb.ULA(0.1), (1.0, 0.5), tempered), x, steps=1, rng=seeded())
    inner = gb.ParallelTempering(gb.MALA(0.1), (1.0, 0.5))
    with pytest.raises(OptionError, match="carries a memory"):
        gb.sample(gaussian, PathTempering(inner, (1.0, 0.5), tempered), x, steps=1, rng=seeded())
    kernel = PathTempering(gb.MALA(0.1), torch.tensor([1.0, 0.5]), tempered)
    with pytest.raises(ShapeError, match="has 2 levels; got points for 3"):
        kernel.init_replicas(gaussian, torch.zeros(4, 3, 2))
    with pytest.raises(ArgumentTypeError, match="another kernel"):
        gb.sample(gaussian, kernel, State(x, gaussian(x), torch.zeros_like(x)), steps=1, rng=seeded())
    longer = PathTempering(gb.MALA(0.1), torch.tensor([1.0, 0.7, 0.5]), tempered)
    with pytest.raises(ShapeError, match="holds 2 replicas per chain, and the ladder has 3"):
        gb.sample(gaussian, longer, kernel.init(gaussian, x), steps=1, rng=seeded())
    with pytest.raises(OptionError, match="leads to an RBM"):
        MachineRungs(gb.Bernoulli(torch.zeros(3)))(gaussian, torch.tensor(0.5))
