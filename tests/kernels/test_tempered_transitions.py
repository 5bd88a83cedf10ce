"""Tempered transitions: exact and reversible whatever the ladder, against a twin that forgets half of its ratio."""

import dataclasses

import pytest
import torch

import gibbsian as gb
from contracts import (
    TARGETS,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_reversible,
    assert_state_is_current,
    seeded,
    two_modes,
)
from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import State, metropolis
from gibbsian.kernels.tempered_transitions import TemperedTransitions
from gibbsian.kernels.tempering import ParallelTempering

SHORT = TemperedTransitions(gb.MALA(0.3), [1.0, 0.6, 0.3])
LONG = TemperedTransitions(gb.HMC(0.4, leapfrog=2), [1.0, 0.7, 0.5, 0.3], moves=2, step_sizes=[1.0, 0.5, 0.7, 0.9])


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", [SHORT, LONG], ids=["short", "long"])
def test_it_is_exact_and_reversible(kernel, target):
    assert_invariant(kernel, target, steps=3)
    assert_reversible(kernel, target)


class ByHand(TemperedTransitions):
    """The same step written out for one move at each level."""

    forget = False

    def step(self, energy, state, noise):
        *inner, uniform = noise
        b, levels = self.betas, len(self.betas)
        now, log_ratio = state, 0.0
        for i in range(levels - 1):
            log_ratio = log_ratio + (b[i] - b[i + 1]) * now.energy
            now, _ = self._moved(energy, now, i + 1, [z[:, i : i + 1] for z in inner])
        for i in range(levels - 1, 0, -1):
            j = 2 * (levels - 1) - i
            now, _ = self._moved(energy, now, i, [z[:, j : j + 1] for z in inner])
            before = state.energy if self.forget else now.energy
            log_ratio = log_ratio - (b[i - 1] - b[i]) * before
        return metropolis(state, now, log_ratio, uniform, {"inner_acceptance": torch.zeros_like(uniform)})


class HalfTheRatio(ByHand):
    """The way down counts as if it had led back to the start: half of the terms are forgotten."""

    forget = True


def test_half_the_ratio_is_caught_and_the_whole_is_the_kernels():
    target = TARGETS[1]
    start = target.draw(200, seeded())
    honest, ours = (
        gb.sample(target.energy, k(SHORT.kernel, SHORT.betas), start, steps=5, rng=seeded(1)).x
        for k in (ByHand, TemperedTransitions)
    )
    assert torch.equal(honest, ours)
    with pytest.raises(AssertionError, match="sqrt"):
        assert_invariant(HalfTheRatio(SHORT.kernel, SHORT.betas), target, steps=3)


@pytest.mark.parametrize("kernel", [SHORT, LONG], ids=["short", "long"])
def test_contracts(kernel):
    start = TARGETS[0].draw(5, seeded())
    assert_continues(kernel, TARGETS[0].energy, start)
    assert_state_is_current(kernel, TARGETS[0].energy, start)
    assert_leaves_inputs_alone(kernel, TARGETS[0].energy, start)
    if kernel is SHORT:
        assert_flat_memory(kernel, TARGETS[0].energy, start)


def test_it_compiles_to_one_graph(graphs):
    assert_one_graph(SHORT, TARGETS[0].energy, TARGETS[0].draw(5, seeded()), graphs)


def test_it_crosses_where_the_kernel_alone_stays():
    """Two modes eight deviations apart: from one, both are reached in equal parts, within 5.5 standard errors."""
    locs = torch.tensor([[-4.0], [4.0]], dtype=torch.float64)
    energy = gb.GaussianMixture(locs, 1.0, weights=torch.tensor([0.5, 0.5], dtype=torch.float64))
    start = torch.full((500, 1), -4.0, dtype=torch.float64)
    betas = torch.logspace(0, -1.5, 9, dtype=torch.float64)
    sizes = 0.8 / betas
    out = gb.sample(energy, TemperedTransitions(gb.MALA(0.8), betas, step_sizes=sizes), start, steps=60, rng=seeded())
    alone = gb.sample(energy, gb.MALA(0.8), start, steps=60, rng=seeded())
    assert float((alone.x > 0).double().mean()) < 0.1
    assert abs(float((out.x > 0).double().mean()) - 0.5) < 5.5 * 0.5 / 500**0.5


def test_it_counts_its_gradients():
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(1)

    gb.sample(energy, LONG, torch.zeros(3, 2, dtype=torch.float64), steps=2, rng=seeded())
    assert len(calls) == 1 + 2 * LONG.gradients == 1 + 2 * (2 * 3 * 2 * 2)


@dataclasses.dataclass(frozen=True)
class Persistent:
    """Says of itself that it is not reversible."""

    gradients, domain, reversible = 1, "real", False

    def init(self, energy, x):
        return State(x, *gb.evaluate(energy, x))

    def noise(self, state, steps, rng):
        return ()

    def step(self, energy, state, noise):
        raise AssertionError


def test_what_does_not_fit_is_refused():
    x, energy = torch.zeros(3, 1, dtype=torch.float64), two_modes().energy
    with pytest.raises(OptionError, match=r"moves counts .* got 0"):
        TemperedTransitions(gb.MALA(0.1), [1.0, 0.5], moves=0)
    with pytest.raises(OptionError, match="two or more inverse temperatures"):
        TemperedTransitions(gb.MALA(0.1), [1.0])
    with pytest.raises(OptionError, match="decrease from 1"):
        TemperedTransitions(gb.MALA(0.1), [0.5, 1.0])
    with pytest.raises(OptionError, match="At beta = 0 the density is flat"):
        TemperedTransitions(gb.MALA(0.1), [1.0, 0.0])
    with pytest.raises(ShapeError, match="one for each of 2 levels"):
        TemperedTransitions(gb.MALA(0.1), [1.0, 0.5], step_sizes=[0.1])
    for kernel, message in (
        (gb.ULA(0.1), "TemperedTransitions needs .* ULA is unadjusted"),
        (ParallelTempering(gb.MALA(0.1), [1.0, 0.5]), "carries a memory"),
        (Persistent(), "need a kernel in detailed balance; Persistent"),
    ):
        with pytest.raises(OptionError, match=message):
            gb.sample(energy, TemperedTransitions(kernel, [1.0, 0.5]), x, steps=1, rng=seeded())
