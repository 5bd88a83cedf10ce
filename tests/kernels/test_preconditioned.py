r"""pSGLD: its recursion, the law that the omitted term leaves it with, and the limit in which that is the right one.

A standard normal has :math:`|E'| = |x|`. With ``decay`` 0 the preconditioner is :math:`1 / (\epsilon + |x|)`, and small
steps have the density :math:`e^{-x^2/2} (\epsilon + |x|)` up to a constant, two humps where one should be.
"""

import dataclasses
import math

import pytest
import torch

import gibbsian as gb
from contracts import KS_LIMIT, ks, normal_cdf, seeded
from gibbsian.errors import OptionError
from gibbsian.kernels.preconditioned import PSGLD

EPS = 0.5


def normal(*scales):
    spread = torch.tensor(scales, dtype=torch.float64)
    return gb.Gaussian(loc=torch.zeros_like(spread), scale=spread)


def two_humps(v):
    """Distribution function of the density above."""
    root = math.sqrt(2.0 * math.pi)
    part = EPS * root * (torch.special.ndtr(v.abs()) - 0.5) - torch.expm1(-0.5 * v * v)
    return 0.5 + v.sign() * part / (EPS * root + 2.0)


def assert_two_humps(kernel, steps=500):
    energy = normal(1.0)
    out = gb.sample(energy, kernel, energy.sample(50_000, seeded()), steps=steps, rng=seeded(1))
    distance = ks(out.x[:, 0], two_humps)
    assert distance < KS_LIMIT, f"sqrt(n) D = {distance:.2f} from the law without the term"
    assert ks(out.x[:, 0], normal_cdf) > 5.0 * KS_LIMIT


@dataclasses.dataclass(frozen=True)
class WithoutTheRoot(PSGLD):
    """Divides by eps + V."""

    def step(self, energy, state, noise):
        return super().step(energy, state._replace(memory=(state.memory[0] ** 2,)), noise)


@dataclasses.dataclass(frozen=True)
class WithPlainNoise(PSGLD):
    """The preconditioner in the drift alone."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[0] * (self.eps + state.memory[0].sqrt()).sqrt(),))


def test_small_steps_with_a_short_average_have_the_law_of_the_omitted_term():
    assert_two_humps(PSGLD(0.01, decay=0.0, eps=EPS))
    # The twins are that far off after fewer steps, which the right kernel needs to get there at all.
    for twin in (WithoutTheRoot, WithPlainNoise):
        with pytest.raises(AssertionError, match="without the term"):
            assert_two_humps(twin(0.01, decay=0.0, eps=EPS), steps=200)


@pytest.mark.parametrize(("decay", "h", "variance"), [(0.99, 0.05, 1.12), (0.999, 0.05, 1.035), (0.99, 0.01, 1.33)])
def test_the_bias_is_what_the_docstring_says(decay, h, variance):
    """Measured; the standard errors of these variances are below 0.01, and 1 / (1 - h / 2) is a constant G's."""
    energy = normal(1.0)
    warmup = int(20 / h) if decay < 0.999 else 4000
    out = gb.sample(
        energy, PSGLD(h, decay=decay), energy.sample(2000, seeded()), steps=warmup + 4000, warmup=warmup, thin=50,
        rng=seeded(1),
    )  # fmt: skip
    assert abs(float(out.draws.var()) - variance) < 0.02
    assert str(variance) in " ".join(PSGLD.__doc__.split())


def test_the_recursion_is_the_papers():
    energy, kernel = normal(0.5, 2.0), PSGLD(0.1, decay=0.8, eps=0.3)
    start = torch.tensor([[0.2, 1.0], [-0.4, 0.5]], dtype=torch.float64)
    out = gb.sample(energy, kernel, start, steps=6, thin=1, rng=seeded(1))
    z = kernel.noise(kernel.init(energy, start), 6, seeded(1))[0]
    precision = torch.tensor([4.0, 0.25], dtype=torch.float64)
    x, v = start, (start * precision).square().mean(0) + (0.1 * precision).square()
    for i in range(6):
        g = precision * x
        v = v if i == 0 else 0.8 * v + 0.2 * g * g
        x = x - 0.1 / (0.3 + v.sqrt()) * g + (0.2 / (0.3 + v.sqrt())).sqrt() * z[i]
        torch.testing.assert_close(out.draws[i], x, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.state.memory[0], 0.8 * v + 0.2 * (precision * x) ** 2, rtol=0, atol=1e-12)


def test_scales_are_evened_out_by_half():
    """Scales of 1 and 0.01: what plain steps take 10,000 of, 500 do."""
    energy, start = normal(1.0, 0.01), torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(200, 2)
    plain = gb.sample(energy, gb.ULA(1e-4), start, steps=2000, rng=seeded(1)).x
    fitted = gb.sample(energy, PSGLD(0.002), start, steps=2000, rng=seeded(1)).x
    assert float(plain[:, 0].mean()) > 2.3
    assert abs(float(fitted[:, 0].mean())) < 0.5
    assert abs(float(fitted[:, 1].std()) / 0.01 - 1.0) < 6 * 0.05 + 0.1


def test_chains_may_start_at_a_mode_or_next_to_a_wall():
    """Where the gradient vanishes eps alone would let the first step go 1e5 times too far."""
    energy, start = normal(1.0, 0.01), torch.zeros(200, 2, dtype=torch.float64)
    out = gb.sample(energy, PSGLD(0.002), start, steps=300, thin=1, rng=seeded(1))
    spread = out.draws / torch.tensor([1.0, 0.01], dtype=torch.float64)
    assert float(spread.abs().max()) < 7.0
    walled = gb.Energy.of(lambda x: torch.where(x > 0.0, torch.inf, 0.5 * x * x).sum(1))
    assert bool(torch.isfinite(gb.sample(walled, PSGLD(0.05), start, steps=20, rng=seeded(1)).x).all())


def test_squares_that_overflow_restart_a_chain():
    """Gradients of 1e30 are numbers in single precision, and their squares are none."""

    def energy(x):
        return torch.where(x > 1.0, 1e30 * (x - 1.0), 0.5 * x * x).sum(1)

    start = torch.linspace(-0.5, 0.5, 32)[:, None]
    out = gb.sample(energy, PSGLD(0.3), start, steps=50, thin=1, rng=seeded(1))
    assert torch.equal((out.draws == start).all(2).sum(0).float(), out.nonfinite)
    assert int(out.nonfinite.sum()) > 20
    assert bool(torch.isfinite(out.state.memory[0]).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PSGLD(0.0), "step_size is a positive number; got 0.0"),
        (lambda: PSGLD(0.1, eps=0.0), "eps is a positive number; got 0.0"),
        (lambda: PSGLD(0.1, decay=1.0), "from 0 to below 1; got 1.0"),
        (lambda: PSGLD(0.1, rows=5, batch_size=6), "5; got 6"),
        (lambda: PSGLD(0.1, rows=5), "got rows=5 and batch_size=None"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()
