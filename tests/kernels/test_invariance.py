"""Every kernel against the contracts, and a broken twin of each against the same."""

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
    assert_reversible,
    assert_state_is_current,
    correlated_gaussian,
    ks,
    log_exponential,
    normal_cdf,
    seeded,
    two_modes,
)
from gibbsian.kernels.base import State, evaluate, metropolis, row_sum
from gibbsian.kernels.hmc import leapfrog

EXACT = (gb.MALA(0.15), gb.MALA(0.6), gb.HMC(0.35, leapfrog=4), gb.HMC(0.9, leapfrog=2))
ALL = (
    gb.ULA(0.05),
    gb.ULA(0.05, noise_scale=0.1, clip_grad=0.5, box=(-1.5, 1.5)),
    gb.MALA(0.3),
    gb.HMC(0.5, leapfrog=3),
)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", EXACT, ids=repr)
def test_exact_kernels_leave_the_target_invariant(kernel, target):
    assert_invariant(kernel, target)
    assert_reversible(kernel, target)


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_every_kernel_keeps_the_contracts(kernel):
    target = log_exponential()
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)


@dataclasses.dataclass(frozen=True)
class MALAWithoutProposalRatio(gb.MALA):
    """The ratio of target densities alone: exact only for symmetric proposals."""

    def step(self, energy, state, noise):
        z, uniform = noise
        h = self.step_size
        x = state.x - h * state.grad + (2.0 * h) ** 0.5 * z
        new = State(x, *evaluate(energy, x))
        return metropolis(state, new, state.energy - new.energy, uniform)


@dataclasses.dataclass(frozen=True)
class HMCWithHotMomenta(gb.HMC):
    """Momenta of standard deviation 1.3 under a kinetic energy that expects 1."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (1.3 * noise[0], noise[1]))


@dataclasses.dataclass(frozen=True)
class HMCWithKineticSignFlipped(gb.HMC):
    """The kinetic energy enters the ratio with the wrong sign."""

    details = ()

    def step(self, energy, state, noise):
        v, uniform = noise
        new, v_end = leapfrog(energy, state, v, self.step_size, self.leapfrog)
        log_ratio = state.energy - new.energy - 0.5 * row_sum(v * v) + 0.5 * row_sum(v_end * v_end)
        return metropolis(state, new, log_ratio, uniform)


@dataclasses.dataclass(frozen=True)
class MALAThatAlwaysAccepts(gb.MALA):
    """The smallest fault tried: at this step size most proposals are accepted anyway."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[0], torch.zeros_like(noise[1])))


BROKEN = (
    MALAWithoutProposalRatio(0.15),
    MALAWithoutProposalRatio(0.6),
    HMCWithHotMomenta(0.35, leapfrog=4),
    HMCWithKineticSignFlipped(0.35, leapfrog=4),
    MALAThatAlwaysAccepts(0.3),
)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", BROKEN, ids=repr)
def test_the_invariance_test_catches_broken_twins(kernel, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(kernel, target)


def test_the_reversibility_test_catches_a_kernel_that_is_invariant_but_not_reversible():
    @dataclasses.dataclass(frozen=True)
    class Shift(gb.HMC):
        """Map cumulative probability u to u + 1/4 modulo 1: keeps the law, turns only one way."""

        details = ()

        def step(self, energy, state, noise):
            u = (normal_cdf(state.x) + 0.25) % 1.0
            x = torch.special.ndtri(u)
            new = State(x, *evaluate(energy, x))
            return metropolis(state, new, torch.full_like(new.energy, torch.inf), noise[1])

    energy = gb.Gaussian(loc=torch.zeros(1, dtype=torch.float64))
    target = dataclasses.replace(two_modes(), energy=energy, draw=energy.sample)
    target.projections["x"] = (lambda x: x[:, 0], normal_cdf)
    assert_invariant(Shift(1.0), target)
    with pytest.raises(AssertionError, match="z = "):
        assert_reversible(Shift(1.0), target)


def ula_spread(h: float, scale: float) -> float:
    """Stationary standard deviation of x' = (1 - h / s^2) x + sqrt(2 h) z."""
    return scale / (1.0 - h / (2.0 * scale**2)) ** 0.5


@dataclasses.dataclass(frozen=True)
class ULAWithHalfTheNoise(gb.ULA):
    """Noise of variance h where 2 h belongs."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[0] / 2**0.5,))


def assert_ula_law(kernel, steps):
    """The chain is a first-order autoregression, so its law on a Gaussian is known at every step."""
    scale, h = 0.8, float(kernel.step_size)
    energy = gb.Gaussian(1, scale=torch.tensor([scale], dtype=torch.float64))
    spread, rng = ula_spread(h, scale), seeded(8)
    stationary = spread * torch.randn((50_000, 1), generator=rng, dtype=torch.float64)
    out = gb.sample(energy, kernel, stationary, steps=steps, rng=rng)
    biased = ks(out.x[:, 0], lambda v: normal_cdf(v / spread))
    assert biased < 3.1, f"sqrt(n) D = {biased:.2f} from the biased law"
    # The test can tell the biased law from the target, else it would show nothing.
    assert ks(out.x[:, 0], lambda v: normal_cdf(v / scale)) > 3.1
    lag = float((out.x * stationary).mean() / stationary.square().mean())
    assert abs(lag - (1.0 - h / scale**2) ** steps) < 6.0 / 50_000**0.5


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("h", [0.15, 0.6])
def test_ula_has_the_bias_that_theory_gives(h, steps):
    assert_ula_law(gb.ULA(h), steps)
    with pytest.raises(AssertionError, match="biased law"):
        assert_ula_law(ULAWithHalfTheNoise(h), steps)


def test_an_explicit_noise_scale_is_the_noise_of_a_step():
    h = 0.3
    energy = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64))
    start = energy.sample(5, seeded())
    default = gb.sample(energy, gb.ULA(h), start, steps=9, rng=seeded(1))
    named = gb.sample(energy, gb.ULA(h, noise_scale=(2 * h) ** 0.5), start, steps=9, rng=seeded(1))
    torch.testing.assert_close(default.x, named.x, rtol=0, atol=1e-13)
    still = gb.sample(energy, gb.ULA(h, noise_scale=0.0), start, steps=9, rng=seeded(1))
    torch.testing.assert_close(still.x, start * (1 - h) ** 9, rtol=0, atol=1e-13)


def tempered_spread(kernel, h, spread, precision=2.0, n=50_000, steps=200):
    """The square root of n times the distance of chains of a Gaussian from their stationary law, for that noise."""
    energy = gb.Gaussian(1, scale=precision**-0.5).double()
    out = gb.sample(energy, kernel, energy.sample(n, seeded()), steps=steps, rng=seeded(1))
    variance = spread**2 / (1.0 - (1.0 - h * precision) ** 2)
    return ks(out.x[:, 0], lambda v: normal_cdf(v / variance**0.5)), variance


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_a_noise_scale_is_a_temperature(temperature):
    """The chain's law is that of p^(1/T) up to O(h): T times the variance, for a Gaussian."""
    h = 0.02
    spread = (2 * h * temperature) ** 0.5
    distance, variance = tempered_spread(gb.ULA(h, noise_scale=spread), h, spread)
    assert distance < 3.1
    assert variance == pytest.approx(temperature / 2.0, rel=0.03)
    # The twin that takes the noise for a variance, and the one that has no temperature.
    assert tempered_spread(gb.ULA(h, noise_scale=spread**2), h, spread)[0] > 3.1
    assert tempered_spread(gb.ULA(h), h, spread)[0] > 3.1


def test_the_targets_draws_and_laws_agree():
    for target in (correlated_gaussian(), log_exponential(), two_modes()):
        x = target.draw(50_000, seeded(9))
        for project, cdf in target.projections.values():
            assert ks(project(x), cdf) < 3.1
