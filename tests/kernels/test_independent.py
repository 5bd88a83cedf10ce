"""Independent Metropolis-Hastings: the contracts of kernels, exact weights, and proposals of estimated density."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import (
    CHAINS,
    KS_LIMIT,
    ExactTarget,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_reversible,
    assert_state_is_current,
    correlated_gaussian,
    ks,
    seeded,
    two_modes,
)
from gibbsian.energies.generator_proposals import GeneratorProposal
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.errors import ArgumentTypeError, DomainError, ShapeError
from gibbsian.kernels.independent import IndependentMH

D = torch.float64
PROPOSALS = {
    "two_modes": gb.Gaussian(loc=torch.tensor([-0.2], dtype=D), scale=2.0),
    "correlated_gaussian": gb.Gaussian(loc=torch.tensor([0.3, 0.0], dtype=D), scale=1.3),
}
TARGETS = (two_modes(), correlated_gaussian())


def kernel_of(target: ExactTarget, kind: type = IndependentMH) -> IndependentMH:
    return kind(PROPOSALS[target.name])


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_targets_are_left_invariant_and_the_chain_is_reversible(target):
    assert_invariant(kernel_of(target), target)
    assert_reversible(kernel_of(target), target)


def test_a_flow_proposes():
    pytest.importorskip("zuko")
    torch.manual_seed(0)
    target = correlated_gaussian()
    flow = gb.spline_flow(2, transforms=1, hidden=(8,)).double()
    flow.scale.fill_(1.2)
    start = target.draw(20_000, seeded(1))
    out = gb.sample(target.energy, IndependentMH(flow), start, steps=3, rng=seeded(2))
    for name, (project, cdf) in target.projections.items():
        assert ks(project(out.x), cdf) < KS_LIMIT, name


@dataclasses.dataclass(frozen=True)
class WithoutProposalRatio(IndependentMH):
    """Accepts by the target's densities alone."""

    def step(self, energy, state, noise):
        x, cost, uniform = noise
        return super().step(
            energy, state._replace(memory=(torch.zeros_like(cost),)), (x, torch.zeros_like(cost), uniform)
        )


@dataclasses.dataclass(frozen=True)
class WithAStaleDensity(IndependentMH):
    """Keeps the density of where the chain started."""

    def step(self, energy, state, noise):
        kept, info = super().step(energy, state, noise)
        return kept._replace(memory=state.memory), info


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kind", [WithoutProposalRatio, WithAStaleDensity])
def test_broken_twins_are_caught(target, kind):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(kernel_of(target, kind), target)


def test_the_contracts_of_kernels_are_kept():
    target = two_modes()
    start, kernel = target.draw(6, seeded()), kernel_of(target)
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)


def test_compiled_steps_are_one_graph(graphs):
    target = two_modes()
    assert_one_graph(kernel_of(target), target.energy, target.draw(6, seeded()), graphs)


def test_the_acceptance_is_that_of_the_weights():
    """In equilibrium it is E min(1, w'/w) over a draw of the target and one of the proposal: here by quadrature."""
    target, q = two_modes(), PROPOSALS["two_modes"]
    grid = torch.linspace(-8.0, 8.0, 1601, dtype=D)[:, None]
    p, cost = (-target.energy(grid)).exp(), q(grid)
    log_w = -target.energy(grid) + cost
    ratio = (log_w[None, :] - log_w[:, None]).clamp(max=0.0).exp()
    expected = float((p / p.sum()) @ ratio @ ((-cost).exp() / (-cost).exp().sum()))
    out = gb.sample(target.energy, kernel_of(target), target.draw(CHAINS, seeded(3)), steps=1, rng=seeded(4))
    error = float(out.acceptance.std()) / CHAINS**0.5
    assert abs(float(out.acceptance.mean()) - expected) < 5 * error
    assert 0.3 < expected < 0.95


def test_the_target_itself_is_always_accepted_and_bits_are_proposed():
    energy = gb.Gaussian(2).double()
    out = gb.sample(energy, IndependentMH(energy), torch.zeros(50, 2, dtype=D), steps=4, rng=seeded())
    assert torch.equal(out.acceptance, torch.ones(50, dtype=D))
    bits = gb.Bernoulli(probs=torch.tensor([0.8, 0.3], dtype=D))
    fair = gb.Bernoulli(probs=torch.full((2,), 0.5, dtype=D))
    out = gb.sample(bits, IndependentMH(fair), fair.sample(20_000, seeded(1)), steps=12, rng=seeded(2))
    assert torch.allclose(out.x.mean(0), torch.tensor([0.8, 0.3], dtype=D), atol=5 * 0.5 / 20_000**0.5)


def test_proposals_outside_of_the_numbers_are_rejected_and_counted():
    out = gb.sample(
        lambda x: torch.where(x[:, 0] > 1.0, torch.nan, 0.5 * x.square().sum(1)),
        IndependentMH(gb.Gaussian(1).double()),
        torch.zeros(200, 1, dtype=D),
        steps=20,
        rng=seeded(),
    )
    assert bool((out.x <= 1.0).all())
    # The mean count is 20 P(z > 1) = 3.17, with an error of 0.12.
    assert float(out.nonfinite.mean()) == pytest.approx(3.17, abs=0.6)


class Bent(nn.Module):
    """One latent number to one point."""

    def forward(self, z):
        return 1.5 * z + 0.5 * torch.sin(2.0 * z)


def pseudo(kind=GeneratorProposal, draws=3):
    generator = GeneratorNetwork(Bent(), 1, gb.Gaussian(1).double())
    return kind(generator, 0.7, draws, gb.Gaussian(1, scale=1.4).double(), rng=seeded(9))


class WithoutTheTrueLatent(GeneratorProposal):
    """Averages over auxiliary latents alone."""

    def _cost(self, joint, x, noise, true=None):
        return super()._cost(joint, x, noise)


def check_exact_with_estimates(kind):
    """Chains that start as exact draws, each with an estimate of its own, are exact draws after some steps."""
    target, proposal = two_modes(), pseudo(kind)
    start = target.draw(CHAINS, seeded(1))
    kernel = IndependentMH(proposal)
    state = gb.sample(target.energy, kernel, start, steps=1, rng=seeded(2)).state
    # Every chain needs latents of its own, and forward() keeps one noise for all.
    own = proposal._cost(proposal.generator.directed(0.7), start, proposal._fresh(CHAINS, 4, seeded(3)))
    state = state._replace(x=start, energy=target.energy(start), memory=(own,))
    out = gb.sample(target.energy, kernel, state, steps=4, rng=seeded(4))
    assert float((out.x != start).double().mean()) > 0.5
    project, cdf = target.projections["x"]
    distance = ks(project(out.x), cdf)
    assert distance < KS_LIMIT, f"sqrt(n) D = {distance:.2f}"


def test_a_generator_proposes_with_estimates_and_the_chain_is_exact():
    check_exact_with_estimates(GeneratorProposal)


def test_estimates_without_the_true_latent_are_caught():
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        check_exact_with_estimates(WithoutTheTrueLatent)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ArgumentTypeError, match="GeneratorProposal gives it one"):
        IndependentMH(GeneratorNetwork(nn.Linear(1, 1), 1, 1).sample)
    with pytest.raises(ArgumentTypeError, match="draws points"):
        IndependentMH(gb.Gaussian)
    energy = gb.Gaussian(2).double()
    x = torch.zeros(3, 2, dtype=D)
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        gb.sample(energy, IndependentMH(gb.Gaussian(3).double()), x, steps=1, rng=seeded())
    with pytest.raises(DomainError, match="Bernoulli or Categorical"):
        gb.sample(gb.Bernoulli(probs=torch.full((2,), 0.5, dtype=D)), IndependentMH(energy), x, steps=1, rng=seeded())
    with pytest.raises(DomainError, match="3 of 3 chains start where the proposal has no density"):
        gb.sample(energy, IndependentMH(gb.Uniform(2, 1.0, 2.0).double()), x, steps=1, rng=seeded())
    state = gb.sample(energy, gb.MALA(0.1), x, steps=1, rng=seeded()).state
    with pytest.raises(ArgumentTypeError, match="memory"):
        gb.sample(energy, IndependentMH(energy), state, steps=1, rng=seeded())
    assert "Gaussian" in repr(IndependentMH(energy))
    assert math.isfinite(float(gb.sample(energy, IndependentMH(energy), x, steps=1, rng=seeded()).acceptance.mean()))
