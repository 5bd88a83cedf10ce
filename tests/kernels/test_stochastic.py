r"""Chains on minibatches against their exact laws.

On a linear regression a chain of `SGLD` or `SGHMC` is linear in its state, so given the rows of every step (they are
noise, and can be drawn again) its law is a Gaussian known exactly: Kolmogorov-Smirnov over independent chains, with
false alarms below 1e-8. Over random rows the first two moments are known too, from the mean over all minibatches.
Chains share their rows, so that averages over time are compared, with errors from the means of 100 blocks of steps: six
of them are a false alarm below 1e-7.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from stochastic_cases import CENTRE, M, N, inputs, normal_start, regression, round_gaussian, rows_of

import gibbsian as gb
from contracts import KS_LIMIT, Z_LIMIT, assert_continues, ks, normal_cdf, seeded
from gibbsian.energies.minibatch import MinibatchEnergy, find_mode
from gibbsian.kernels.stochastic import SGHMC, SGLD, CyclicalSGLD

DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


def slope(index=None, centre=None):
    """The gradient's estimate as a linear function H theta - b, from the formulas."""
    a, y = inputs()
    hessian, b = a.T @ a, a.T @ y
    if index is None:
        return EYE + hessian, b
    part, w = a[index], N / len(index)
    if centre is None:
        return EYE + w * part.T @ part, w * part.T @ y[index]
    return EYE + w * part.T @ part, w * part.T @ part @ centre - (hessian @ centre - b)


def assert_gaussian(x, mean, covariance, what):
    for direction in DIRECTIONS:
        centre, spread = direction @ mean, (direction @ covariance @ direction).sqrt()
        distance = ks(x @ direction, lambda v, c=centre, s=spread: normal_cdf((v - c) / s))
        assert distance < KS_LIMIT, f"sqrt(n) D = {distance:.2f} from the exact law of {what}"


def assert_sgld_law(kernel, energy, centre=None, steps=6):
    """Start from standard normals, follow mean and covariance along the rows drawn, and compare."""
    start, h = normal_start(), float(kernel.step_size)
    out = gb.sample(energy, kernel, start, steps=steps, rng=seeded(1))
    mean, covariance = torch.zeros(2, dtype=torch.float64), EYE
    drawn = rows_of(kernel, energy, start, steps, 1)
    # The first step has the full gradient, and the rows of the last have not moved anything yet.
    for index in (None, *drawn[:-1]):
        hessian, b = slope(index, centre)
        shrink = EYE - h * hessian
        mean, covariance = shrink @ mean + h * b, shrink @ covariance @ shrink.T + 2.0 * h * EYE
    assert_gaussian(out.x, mean, covariance, "positions")


@pytest.mark.parametrize("centre", [None, CENTRE], ids=["plain", "control variates"])
def test_sgld_has_its_exact_law_given_the_rows(centre):
    assert_sgld_law(SGLD(0.03, N, M), regression(centre), centre)


class WithoutWeight(MinibatchEnergy):
    """Forgets the factor N / m."""

    def on(self, index):
        rows = [part[index] for part in self.data]
        return lambda x: self.prior(x) + self.term(x, *rows).sum(1)


class WithWrongSign(MinibatchEnergy):
    """Adds the control variate where it is taken away."""

    def on(self, index):
        right, plain = super().on(index), MinibatchEnergy(self.term, self.data, self.prior).on(index)
        return lambda x: 2.0 * plain(x) - right(x)


@dataclasses.dataclass(frozen=True)
class SGLDWithHalfTheNoise(SGLD):
    """Noise of variance h where 2 h belongs, as when the paper's step is mistaken for h."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[0] / 2**0.5, noise[1]))


@pytest.mark.parametrize(
    ("kernel", "kind", "centre"),
    [(SGLD, WithoutWeight, None), (SGLD, WithWrongSign, CENTRE), (SGLDWithHalfTheNoise, MinibatchEnergy, None)],
)
def test_the_law_exposes_broken_twins_of_sgld(kernel, kind, centre):
    with pytest.raises(AssertionError, match="exact law"):
        assert_sgld_law(kernel(0.03, N, M), regression(centre, kind), centre)


def stationary_moments(h, centre=None, indices=None):
    """Mean and covariance of SGLD's stationary law: fixed points of the mean over all minibatches."""
    indices = [torch.tensor(i) for i in itertools.combinations(range(N), M)] if indices is None else indices
    maps = [(EYE - h * hessian, h * b) for hessian, b in (slope(i, centre) for i in indices)]
    shrink, push = torch.stack([s for s, _ in maps]), torch.stack([b for _, b in maps])
    mean = torch.linalg.solve(EYE - shrink.mean(0), push.mean(0))
    cross = torch.einsum("ki,kj->ij", shrink @ mean, push) / len(maps)
    known = (push.T @ push / len(maps) + cross + cross.T + 2.0 * h * EYE).reshape(-1)
    spread = torch.stack([torch.kron(s, s) for s in shrink]).mean(0)
    second = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - spread, known).reshape(2, 2)
    return mean, second - torch.outer(mean, mean)


def blocks_of(series):
    """Means over chains and over each of 100 blocks of time, ``(100, ...)``."""
    return series.mean(1).unflatten(0, (100, -1)).mean(1)


def z_of(series, expected):
    """Largest z-score of time averages of ``(time, chains, ...)``."""
    means = blocks_of(series)
    return float(((means.mean(0) - expected) / (means.std(0) / 10.0)).abs().max())


def squares(x, mean):
    return torch.einsum("tni,tnj->tnij", x - mean, x - mean)


def test_plain_sgld_is_too_wide_as_theory_says_and_control_variates_mend_it():
    h, start = 0.03, torch.randn(16, 2, generator=seeded(), dtype=torch.float64)
    centre = find_mode(regression(), torch.zeros(2, dtype=torch.float64))
    full = stationary_moments(h, indices=[None])[1]
    width = {}
    for name, at in (("plain", None), ("control variates", centre)):
        out = gb.sample(regression(at), SGLD(h, N, M), start, steps=4100, warmup=100, thin=1, rng=seeded(1))
        mean, covariance = stationary_moments(h, at)
        assert z_of(out.draws, mean) < Z_LIMIT
        assert z_of(squares(out.draws, mean), covariance) < Z_LIMIT
        width[name] = float(covariance.trace() / full.trace())
        # The test tells this law from that of full gradients, if they differ by enough to matter.
        assert name != "plain" or z_of(squares(out.draws, mean), full) > Z_LIMIT
    # By theory, relative to the chain of full gradients. What is left with control variates is that rows differ in
    # curvature, over a posterior that 12 rows leave wide.
    assert width == pytest.approx({"plain": 1.773, "control variates": 1.176}, abs=1e-3)


def test_where_rows_differ_by_their_slope_alone_control_variates_leave_nothing_to_chance():
    """The mean of a Gaussian: with control variates, the chain of full gradients."""
    rows = torch.randn(N, 2, generator=seeded(), dtype=torch.float64)
    plain = MinibatchEnergy(lambda t, r: 0.5 * (t[:, None] - r).square().sum(2), rows)
    start = normal_start()[:50]
    estimated = gb.sample(plain.around(CENTRE), SGLD(0.05, N, M), start, steps=50, rng=seeded(1))
    drawn = seeded(1)
    z, state = [], SGLD(0.05, N, M).init(plain, start)
    for _ in range(5):
        z.append(SGLD(0.05, N, M).noise(state, 10, drawn)[0])
    x = start
    for each in torch.cat(z):
        x = x - 0.05 * gb.evaluate(plain, x)[1] + 0.1**0.5 * each
    torch.testing.assert_close(estimated.x, x, rtol=0, atol=1e-12)


def assert_sghmc_law(kernel, energy, centre=None, steps=6):
    """As for SGLD, on positions and velocities; rows of a step move its velocity."""
    # Near each other, since the first kicks spread wide starts more than the noise does.
    start, h, friction = 0.1 * normal_start(), float(kernel.step_size), float(kernel.friction)
    out = gb.sample(energy, kernel, start, steps=steps, rng=seeded(1))
    known = 0.0 if kernel.gradient_noise is None else float(kernel.gradient_noise)
    mean, covariance = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    covariance[:2, :2] = 0.01 * EYE
    added = torch.zeros(4, 4, dtype=torch.float64)
    added[2:, 2:] = 2.0 * h * (friction - known) * EYE
    for index in rows_of(kernel, energy, start, steps, 1):
        hessian, b = slope(index, centre)
        move = motion(h, friction, hessian)
        mean = move @ mean + torch.cat((torch.zeros(2, dtype=torch.float64), h * b))
        covariance = move @ covariance @ move.T + added
    assert_gaussian(out.x, mean[:2], covariance[:2, :2], "positions")
    assert_gaussian(out.state.momentum[0], mean[2:], covariance[2:, 2:], "velocities")


def motion(h, friction, hessian):
    """Matrix of a step of SGHMC on (x, v)."""
    eye = torch.eye(len(hessian), dtype=torch.float64)
    return torch.cat(
        (torch.cat((eye, h * eye), 1), torch.cat((-h * hessian, (1.0 - h * friction) * eye - h * h * hessian), 1))
    )


@pytest.mark.parametrize("known", [None, 0.4])
@pytest.mark.parametrize("centre", [None, CENTRE], ids=["plain", "control variates"])
def test_sghmc_has_its_exact_law_given_the_rows(centre, known):
    assert_sghmc_law(SGHMC(0.15, 2.0, N, M, gradient_noise=known), regression(centre), centre)


@dataclasses.dataclass(frozen=True)
class SGHMCWithoutFriction(SGHMC):
    """Noise of variance h where 2 h gamma belongs."""

    def step(self, energy, state, noise):
        return super().step(energy, state, (noise[0] / (2.0 * self.friction) ** 0.5, *noise[1:]))


@dataclasses.dataclass(frozen=True)
class SGHMCWithOldGradient(SGHMC):
    """The kick takes the gradient of where the drift began."""

    def step(self, energy, state, noise):
        new, info = super().step(energy, state, noise)
        return new._replace(momentum=(new.momentum[0] + self.step_size * (new.grad - state.grad),)), info


def test_the_law_exposes_broken_twins_of_sghmc():
    for twin, kind in (
        (SGHMCWithoutFriction, MinibatchEnergy),
        (SGHMCWithOldGradient, MinibatchEnergy),
        (SGHMC, WithoutWeight),
    ):
        with pytest.raises(AssertionError, match="exact law"):
            assert_sghmc_law(twin(0.15, 2.0, N, M), regression(kind=kind))


def test_the_estimate_of_the_gradient_noise_brings_the_temperature_back():
    """The mean of a Gaussian, whose estimates have one variance everywhere: stationary law from Lyapunov's equation."""
    h, friction = 0.1, 1.5
    rows = torch.randn(N, 1, generator=seeded(2), dtype=torch.float64)
    rows = 0.64 * rows / rows.std()
    energy = MinibatchEnergy(lambda t, r: 0.5 * (t[:, None] - r).square().sum(2), rows)
    variance = float(N**2 * rows.var() / M * (1.0 - M / N))
    known = 0.5 * h * variance
    assert 0.3 * friction < known < friction, "enough noise to see, and not too much to take away"
    move = motion(h, friction, torch.tensor([[float(N)]], dtype=torch.float64))

    def covariance(from_rows, taken):
        noise = torch.zeros(2, 2, dtype=torch.float64)
        noise[1, 1] = 2.0 * h * (friction - taken) + h * h * from_rows
        return torch.from_numpy(solve_discrete_lyapunov(move.numpy(), noise.numpy()))

    cold = covariance(0.0, 0.0)
    for taken, expected in ((None, covariance(variance, 0.0)), (known, cold)):
        kernel = SGHMC(h, friction, N, M, gradient_noise=taken)
        start = rows.mean(0).expand(16, 1)
        out = gb.sample(energy, kernel, start, steps=4100, warmup=100, thin=1, rng=seeded(3))
        assert z_of(squares(out.draws, rows.mean(0)), expected[:1, :1]) < Z_LIMIT
        if taken is None:
            assert z_of(squares(out.draws, rows.mean(0)), cold[:1, :1]) > Z_LIMIT
            torch.testing.assert_close(float(expected[1, 1] / cold[1, 1]), 1.0 + known / friction, rtol=1e-9, atol=0)


def test_cyclical_steps_follow_the_cosine_and_explore_without_noise():
    kernel, cycle = CyclicalSGLD(0.3, cycle=8, exploration=0.25), 8
    start = normal_start()[:5]
    out = gb.sample(round_gaussian(), kernel, start, steps=20, thin=1, rng=seeded(1))
    k = torch.arange(20, dtype=torch.float64) % cycle
    h = 0.15 * (1.0 + (math.pi * k / cycle).cos())
    torch.testing.assert_close(out.kept["step_size"], h[:, None].expand(20, 5), rtol=0, atol=1e-15)
    assert out.kept["sampling"][:, 0].tolist() == [float(i % cycle >= 2) for i in range(20)]
    z = kernel.noise(kernel.init(round_gaussian(), start), 20, seeded(1))[0]
    x = start
    for i in range(20):
        x = (1.0 - h[i]) * x + (out.kept["sampling"][i, :, None] * (2.0 * h[i])).sqrt() * z[i]
        torch.testing.assert_close(out.draws[i], x, rtol=0, atol=1e-12)
    assert out.state.memory[0].tolist() == [4] * 5


@dataclasses.dataclass(frozen=True)
class CyclicalThatForgets(CyclicalSGLD):
    """Begins a new cycle with every call of `sample`."""

    def noise(self, state, steps, rng):
        state.memory[0].zero_()
        return super().noise(state, steps, rng)


def test_a_cycle_goes_on_where_a_run_stopped():
    energy, start = round_gaussian(), normal_start()[:5]
    assert_continues(CyclicalSGLD(0.3, cycle=16), energy, start)
    with pytest.raises(AssertionError):
        assert_continues(CyclicalThatForgets(0.3, cycle=16), energy, start)


def test_special_cases_are_ula():
    energy, start = round_gaussian(), normal_start()[:5]
    run = [
        gb.sample(energy, kernel, start, steps=9, rng=seeded(1)).x
        for kernel in (gb.ULA(0.2), CyclicalSGLD(0.2, cycle=1, exploration=0.0))
    ]
    torch.testing.assert_close(*run, rtol=0, atol=1e-13)
    # All rows in each minibatch: one stream of normals, with the permutations in between.
    full, kernel = regression(), SGLD(0.02, N, N, scale=torch.tensor([0.5, 1.5], dtype=torch.float64))
    state = kernel.init(full, start)
    z = kernel.noise(state, 4, seeded(1))[0]
    other = gb.ULA(0.02, scale=kernel.scale)
    for each in z:
        state = other.step(full, state, (each,))[0]
    torch.testing.assert_close(gb.sample(full, kernel, start, steps=4, rng=seeded(1)).x, state.x, rtol=0, atol=1e-12)


def two_clusters():
    """Location of a Cauchy law from 20 rows in two clusters: a posterior of two modes, 15 nats below what parts them.

    Its gradient is bounded, so that no step size makes chains diverge.
    """
    rng = seeded()
    rows = torch.cat([torch.randn(10, generator=rng, dtype=torch.float64) + side for side in (-5.0, 5.0)])
    return MinibatchEnergy(lambda t, r: (1.0 + (t - r).square()).log(), rows, event_shape=(1,))


def test_cyclical_sgld_visits_both_modes_where_sgld_stays_in_one():
    energy = two_clusters()
    grid = torch.linspace(-20.0, 0.0, 10_001, dtype=torch.float64)[:, None]
    mass = (-energy(grid) + energy(grid).min()).exp()[:, None]
    mean = (mass * grid).sum() / mass.sum()
    spread = float(((mass * (grid - mean) ** 2).sum() / mass.sum()).sqrt())
    start = mean.expand(32, 1)

    still = gb.sample(energy, SGLD(0.01, 20, 5), start, steps=2000, thin=1, rng=seeded(1)).draws
    assert not bool((still > 0.0).any())
    assert abs(float(still.std()) / spread - 1.0) < 0.1

    out = gb.sample(energy, CyclicalSGLD(0.3, 100, 20, 5), start, steps=2000, thin=1, rng=seeded(1))
    late = out.draws[(out.kept["sampling"] == 1) & (out.kept["step_size"] < 0.015)]
    assert 0.2 < float((late > 0.0).double().mean()) < 0.8
    assert float((out.draws > 0.0).any(0).double().mean()) > 0.8
    assert float(late[late < 0.0].std()) < 1.4 * spread

    # A constant step that long crosses too, and knows nothing of the modes.
    long = gb.sample(energy, SGLD(0.3, 20, 5), start, steps=2000, thin=1, rng=seeded(1)).draws
    assert bool((long > 0.0).any())
    assert float(long[long < 0.0].std()) > 3.0 * spread


def breast_cancer():
    """Logistic regression of 569 diagnoses on ten standardised features and a constant, with a unit prior."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.from_numpy(data.data[:, :10])
    x = torch.cat((torch.ones(len(x), 1, dtype=torch.float64), (x - x.mean(0)) / x.std(0)), 1)
    y = 2.0 * torch.from_numpy(data.target).double() - 1.0
    prior = gb.Gaussian(loc=torch.zeros(11, dtype=torch.float64))
    return MinibatchEnergy(lambda t, a, b: torch.nn.functional.softplus(-b * (t @ a.T)), (x, y), prior)


def test_on_real_data_control_variates_give_the_posterior_of_hmc():
    """A tenth of the rows a step; both compared with HMC on all of them, within six standard errors of the two."""
    energy = breast_cancer()
    centre = find_mode(energy, torch.zeros(11, dtype=torch.float64))
    curvature = torch.autograd.functional.hessian(lambda t: energy(t[None])[0], centre)
    scale = torch.linalg.cholesky(torch.linalg.inv(curvature))
    start = centre + torch.randn(64, 11, generator=seeded(5), dtype=torch.float64) @ scale.T

    exact = gb.HMC(0.4, leapfrog=6, scale=scale, jitter=0.3)
    out = gb.sample(energy, exact, start, steps=250, warmup=50, thin=1, rng=seeded(1))
    mean, spread = out.draws.mean((0, 1)), out.draws.flatten(0, 1).std(0)
    error = out.draws.mean(0).std(0) / 8.0
    assert float((error / spread).max()) < 0.01

    kernel = SGLD(0.1, energy.rows, 57, scale=scale)
    width = {}
    for name, estimated in (("plain", energy), ("control variates", energy.around(centre))):
        out = gb.sample(estimated, kernel, start, steps=2100, warmup=100, thin=1, rng=seeded(2))
        means = out.draws.mean(1).unflatten(0, (50, -1)).mean(1)
        own = means.std(0) / 50.0**0.5
        off = means.mean(0) - mean
        assert float((off / (own.square() + error.square()).sqrt()).abs().max()) < Z_LIMIT
        width[name] = out.draws.flatten(0, 1).std(0) / spread
        if name != "plain":
            assert float((off / spread).abs().max()) < 0.06
    # The Euler step of 0.1 alone makes standard deviations 2.6 % too large.
    assert bool(((width["control variates"] > 0.97) & (width["control variates"] < 1.08)).all())
    assert float(width["plain"].max()) > 1.12
