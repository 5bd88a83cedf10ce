"""Recovery likelihood: its gradient is that of the conditional likelihood, and known families are recovered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

import recovery as families
from gibbsian import MALA, ULA, Bernoulli, EightGaussians, Energy, Gaussian, NoiseConditional, fit
from gibbsian.annealing import ancestral_sample
from gibbsian.energies import recovery
from gibbsian.energies.recovery import RecoveryEnergy
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, row_sum
from gibbsian.objectives import recovery_likelihood as module
from gibbsian.objectives.base import Batch
from gibbsian.objectives.recovery_likelihood import RecoveryLikelihood
from recovery import GAUSSIAN, LAPLACES, QUARTIC, assert_recovered, seeded

LEVELS = (0.3, 0.5, 0.8, 1.3, 2.0)


# ---- the known families under noise -------------------------------------------------------------------------------


class NoisyPlane(families.PlaneGaussian):
    """`recovery.PlaneGaussian` under noise: its covariance grows by sigma squared."""

    context = ("sigma",)

    def forward(self, x, sigma):
        a, b = self.log_diagonal.exp(), self.below[0]
        # The inverse of L L' with L = [[a0, 0], [b, a1]].
        det = (a[0] * a[1]).square()
        c00, c01, c11 = (b * b + a[1] * a[1]) / det, -a[0] * b / det, a[0] * a[0] / det
        v0, v1 = c00 + sigma**2, c11 + sigma**2
        y = x - self.mean
        return 0.5 * (v1 * y[:, 0] ** 2 - 2 * c01 * y[:, 0] * y[:, 1] + v0 * y[:, 1] ** 2) / (v0 * v1 - c01 * c01)


class NoisyLaplaces(families.BlurredLaplaces):
    """`recovery.BlurredLaplaces` under noise: the blur grows."""

    context = ("sigma",)

    def forward(self, x, sigma):
        s, b = (self.blur**2 + sigma**2).sqrt()[:, None], self.log_scale.exp()
        y = x - self.locations
        side = torch.stack((y, -y))
        # Not log_ndtr, which vmap does not know.
        cut = torch.erfc(-(side / s - s / b) / math.sqrt(2)).log()
        logs = torch.logsumexp(s * s / (2 * b * b) - side / b + cut, 0) - self.log_scale
        weights = torch.nn.functional.logsigmoid(torch.cat((-self.odds, self.odds)))
        return -torch.logsumexp(logs + weights, 1)


class NoisyQuartic(families.Quartic):
    """`recovery.Quartic` under noise, by a sum over a grid as fine as the least noise: right to nine digits."""

    context = ("sigma",)

    def forward(self, x, sigma):
        grid = torch.arange(-3.6, 3.7, 0.3, dtype=torch.float64)
        apart = (x - grid) / sigma[:, None]
        return -torch.logsumexp(-0.5 * apart.square() - super().forward(grid[:, None]), 1)


NOISY = {"gaussian": (NoisyPlane, GAUSSIAN), "laplaces": (NoisyLaplaces, LAPLACES), "quartic": (NoisyQuartic, QUARTIC)}


class Replicated(Energy):
    """Copies of a family side by side, each with parameters and n rows of its own, one copy after another."""

    context = ("sigma",)

    def __init__(self, family, copies, n):
        super().__init__()
        self.inner = [family()]  # In a list, so that only the stacked parameters count as this energy's.
        self.copies, self.n = copies, n
        self.names = [name for name, _ in self.inner[0].named_parameters()]
        for name, p in self.inner[0].named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().expand(copies, *p.shape).clone()))

    def forward(self, x, sigma):
        # Data and samples come one after the other.
        blocks = len(x) // (self.copies * self.n)
        x, sigma = (t.view(blocks, self.copies, self.n, -1).movedim(1, 0).flatten(1, 2) for t in (x, sigma))
        stacked = {name: getattr(self, name) for name in self.names}
        values = torch.vmap(self.one)(stacked, x, sigma.squeeze(2))
        return values.view(self.copies, blocks, self.n).movedim(0, 1).flatten()

    def one(self, params, x, sigma):
        return torch.func.functional_call(self.inner[0], params, (x, sigma))

    def params(self):
        return {name: getattr(self, name).detach() for name in self.names}

    def found(self):
        """The parameters of each copy, ``(copies, k)``."""
        return torch.cat(list(self.params().values()), 1)

    def information(self, x, sigma):
        """Covariance over rows of the energy's slopes in the parameters, ``(copies, k, k)``."""
        slopes = torch.vmap(torch.func.jacfwd(self.one))(
            self.params(), x.view(self.copies, self.n, -1), sigma.view(self.copies, self.n)
        )
        slopes = torch.cat(list(slopes.values()), 2)
        centred = slopes - slopes.mean(1, keepdim=True)
        return centred.mT @ centred / self.n

    @torch.no_grad()
    def move(self, step):
        """Add ``(copies, k)`` to the parameters."""
        at = 0
        for name in self.names:
            p = getattr(self, name)
            p += step[:, at : at + p.shape[1]]
            at += p.shape[1]


def found(name, n, copies=families.REPLICATES, steps=60, chain=10, objective=RecoveryLikelihood):
    """Fit independent data sets of n rows; the mean of the path's second half, ``(copies, k)``.

    The gradient is scaled by the covariance of slopes at all levels, which is more than the conditional information, so
    that a step does not overshoot; far from the truth it is cut.
    """
    family, case = NOISY[name]
    energy, rng = Replicated(family, copies, n), seeded(7)
    data = torch.cat([case.rows(n, seeded(seed)) for seed in range(copies)])
    loss, kept = objective(LEVELS, MALA(0.4), steps=chain), []
    for step in range(steps):
        if step % 10 == 0:
            sigma = torch.tensor(LEVELS, dtype=torch.float64)[torch.randint(4, (len(data),), generator=rng)]
            noise = torch.randn(data.shape, generator=rng, dtype=torch.float64)
            information = energy.information(data + sigma[:, None] * noise, sigma)
        energy.zero_grad()
        loss(energy, Batch.of(data), rng).value.backward()
        slope = copies * torch.cat([getattr(energy, p).grad for p in energy.names], 1)
        energy.move(-torch.linalg.solve(information, slope).clamp(-0.2, 0.2))
        if 2 * step >= steps:
            kept.append(energy.found())
    return torch.stack(kept).mean(0)


ROWS = {"gaussian": 600, "laplaces": 1000, "quartic": 1000}


def check_recovered(name):
    assert_recovered(found(name, ROWS[name]), NOISY[name][1].truth, 0.25)


@pytest.mark.parametrize("name", NOISY)
def test_parameters_are_recovered(name):
    check_recovered(name)


def test_errors_fall_as_the_square_root_of_the_rows():
    def scatter(n):
        return found("gaussian", n, copies=16, steps=50, chain=8)

    assert families.slope(scatter, GAUSSIAN.truth, (150, 600, 2400)) == pytest.approx(-0.5, abs=0.2)


# ---- twins ---------------------------------------------------------------------------------------------------------


class Untethered(RecoveryEnergy):
    """The tether is not divided by s squared."""

    def forward(self, u):
        return self.energy(self.points(u)) + recovery.tether(self.spread * u)


class Flipped(RecoveryEnergy):
    """The energy has the other sign; a weak one, so that chains do not run away."""

    def forward(self, u):
        return -0.2 * self.energy(self.points(u)) + recovery.tether(u)


def another_spread(energy, noisy, spread):
    """The noise that leads to the level above the next."""
    return RecoveryEnergy(energy, noisy, 1.6 * spread)


def another_level(energy, noisy, spread):
    """The energy of the noisier level."""
    sigma = (energy.fixed_sigma**2 + spread**2).sqrt()
    return RecoveryEnergy(energy.energy.given(sigma=sigma), noisy, spread)


def flipped_contrast(*arguments):
    value, metrics = CONTRAST(*arguments)
    return -value, metrics


CONTRAST = module.contrast
TWINS = {"no 1/s^2": Untethered, "sign": Flipped, "another spread": another_spread, "another level": another_level}


@pytest.mark.parametrize("twin", ["no 1/s^2", "another spread", "another level"])
def test_a_broken_twin_recovers_nothing(monkeypatch, twin):
    monkeypatch.setattr(module, "RecoveryEnergy", TWINS[twin])
    with pytest.raises(AssertionError, match="missed"):
        check_recovered("gaussian")


# ---- the gradient --------------------------------------------------------------------------------------------------


class Normals(Energy):
    """Independent normal coordinates under noise: means and log deviations."""

    context = ("sigma",)
    event_shape = torch.Size((2, 2))

    def __init__(self, shift=0.0):
        super().__init__()
        self.m = nn.Parameter(M + shift)
        self.log_s = nn.Parameter(S.log() - shift)

    def forward(self, x, sigma):
        return row_sum((x - self.m) ** 2 / (2 * ((2 * self.log_s).exp() + sigma[:, None, None] ** 2)))


M = torch.tensor([[0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)
S = torch.tensor([[0.4, 0.8], [1.0, 1.6]], dtype=torch.float64)


def normal_rows(n, seed=1):
    return M + S * torch.randn((n, 2, 2), generator=seeded(seed), dtype=torch.float64)


def conditional(energy, sigma, spread, noisy):
    """Mean and variance of the cleaner point given the noisier one."""
    a, b = 1 / ((2 * energy.log_s).exp() + sigma**2), 1 / spread**2
    return (a * energy.m + b * noisy) / (a + b), 1 / (a + b)


def exact_gradient(energy):
    """Of the expected -log p(x_t | x_t+1), averaged over levels, in closed form."""
    total = torch.zeros((), dtype=torch.float64)
    for low, high in pairwise(LEVELS):
        s = math.sqrt(high**2 - low**2)
        _, variance = conditional(energy, low, s, M)
        slope = 1 - variance / s**2
        # x_t - mean = slope (x_t - m) - (1 - slope) s eps, with x_t of variance S^2 + low^2.
        square = slope**2 * (S**2 + low**2 + (M - energy.m) ** 2) + (1 - slope) ** 2 * s**2
        total = total + 0.5 * (variance.log() + square / variance).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total / (len(LEVELS) - 1), list(energy.parameters()))])


@dataclass(frozen=True)
class ExactNormal:
    """Draws from any energy that is quadratic in each coordinate, by its slopes at 0 and 1."""

    gradients = 2
    domain = "real"

    def init(self, energy, x):
        return State(x, energy(x), torch.zeros_like(x))

    def noise(self, state, steps, rng):
        return (torch.randn((steps, *state.x.shape), generator=rng, dtype=state.x.dtype),)

    def step(self, energy, state, noise):
        with torch.enable_grad():
            at = [torch.full_like(state.x, value).requires_grad_() for value in (0.0, 1.0)]
            zero, one = (torch.autograd.grad(energy(x).sum(), x)[0] for x in at)
        x = (noise[0] * (one - zero).sqrt() - zero) / (one - zero)
        return State(x, energy(x), state.grad), Info(torch.ones(len(x)).double(), torch.zeros(len(x)).double())


GRADIENT_Z = 7.5
"""A t statistic with 39 degrees of freedom exceeds it once in 4e8; eight of them are looked at."""


def check_gradient(shift, kernel=ExactNormal(), steps=1):
    """The mean over 40 batches is the exact gradient of the conditional likelihood, within its standard error."""
    energy, objective, rng, each = Normals(shift), RecoveryLikelihood(LEVELS, kernel, steps=steps), seeded(5), []
    for i in range(40):
        energy.zero_grad()
        objective(energy, Batch.of(normal_rows(2000, seed=i)), rng).value.backward()
        each.append(torch.cat([p.grad.flatten() for p in energy.parameters()]))
    found, error = torch.stack(each).mean(0), torch.stack(each).std(0) / math.sqrt(40)
    exact = exact_gradient(energy)
    if shift:
        assert float((exact / error).abs().max()) > 5 * GRADIENT_Z, "no power"
    assert bool(((found - exact).abs() < GRADIENT_Z * error).all()), f"missed: z = {(found - exact) / error}"


@pytest.mark.parametrize("shift", [0.0, 0.4, -0.3])
@pytest.mark.parametrize("kernel", [(ExactNormal(), 1), (MALA(0.4), 25)], ids=["exact", "MALA"])
def test_the_gradient_is_that_of_the_conditional_likelihood(shift, kernel):
    check_gradient(shift, *kernel)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_broken_conditional_is_caught(monkeypatch, shift, twin):
    monkeypatch.setattr(module, "RecoveryEnergy", TWINS[twin])
    with pytest.raises(AssertionError, match="missed"):
        check_gradient(shift)


def test_a_flipped_contrast_is_caught(monkeypatch):
    monkeypatch.setattr(module, "contrast", flipped_contrast)
    with pytest.raises(AssertionError, match="missed"):
        check_gradient(0.4)


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_chains_move_in_units_of_the_noise_between_levels():
    """A Langevin step of h from the noisy point is -h s^2 grad E + sqrt(2h) s z in x."""
    energy, h = Normals(), 0.3
    noisy, sigma = normal_rows(50), torch.full((50,), 0.5, dtype=torch.float64)
    spread = torch.linspace(0.2, 2.0, 50, dtype=torch.float64)
    given = RecoveryEnergy(energy.given(sigma=sigma), noisy, spread)
    kernel = ULA(h)
    state = kernel.init(given, torch.zeros_like(noisy))
    z = torch.randn(noisy.shape, generator=seeded(), dtype=torch.float64)
    moved, _ = kernel.step(given, state, (z,))
    grad = (noisy - M) / (S**2 + 0.25)
    s = spread[:, None, None]
    torch.testing.assert_close(given.points(moved.x), noisy - h * s**2 * grad + math.sqrt(2 * h) * s * z)
    assert "Normals" in repr(given)


def test_metrics_and_seeds():
    energy, data = Normals(), Batch(normal_rows(300), {"unused": torch.zeros(300)})
    objective = RecoveryLikelihood(LEVELS, MALA(0.4), steps=5)
    first, again, other = (objective(energy, data, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, other.value)
    assert set(first.metrics) == {"energy_data", "energy_samples", "gap", "acceptance", "nonfinite", "moved"}
    assert all(m.ndim == 0 and not m.requires_grad for m in first.metrics.values())
    torch.testing.assert_close(first.value.detach(), first.metrics["gap"])
    # The typical distance is that of the noise between levels, not of a chain in its own units.
    assert 0.1 < float(first.metrics["moved"]) < 2.0
    penalised = RecoveryLikelihood(LEVELS, MALA(0.4), steps=5, energy_penalty=0.5)(energy, data, seeded(1))
    assert bool(penalised.value > first.value)


def test_single_precision_stays_single():
    energy = NoiseConditional(3, width=16, blocks=1)
    loss = RecoveryLikelihood(LEVELS, MALA(0.4), steps=3)(energy, Batch.of(torch.randn(20, 3)), seeded())
    assert loss.value.dtype == torch.float32
    loss.value.backward()
    assert all(p.grad is not None for p in energy.parameters())


def test_labels_go_with_their_rows():
    def at(x, sigma, y):
        return row_sum((x - 10.0 * y[:, None]) ** 2) / (2 * (0.25 + sigma[:, None] ** 2).squeeze(1))

    energy = Energy.of(at, (3,), context=("sigma", "y"))
    y = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(1000)
    x = 10.0 * y[:, None] + 0.5 * torch.randn((2000, 3), generator=seeded(3), dtype=torch.float64)
    objective = RecoveryLikelihood(LEVELS, MALA(0.4), steps=20)
    right = objective(energy, Batch(x, {"y": y}), seeded(4)).metrics
    # Both energies average d / 2 with variance d / 2 a row: labels of other rows would make them hundreds.
    for name in ("energy_data", "energy_samples"):
        assert abs(float(right[name]) - 1.5) < 6 * math.sqrt(1.5 / 2000)
    with pytest.raises(OptionError, match="conditioned on y"):
        objective(energy, Batch.of(x), seeded())


def test_steps_are_traced_once_and_give_the_same(graphs):
    values = []
    for compile in (False, True):
        energy = Normals()
        objective = RecoveryLikelihood(LEVELS, MALA(0.4), steps=4, compile=compile)
        values.append([objective(energy, Batch.of(normal_rows(64)), seeded(s)).value.item() for s in range(3)])
    assert graphs() == 1
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


def test_a_run_is_resumed_exactly_and_other_levels_are_refused(tmp_path):
    def train(folder, levels=LEVELS, **options):
        objective = RecoveryLikelihood(levels, MALA(0.4), steps=2)
        settings = {"steps": 20, "batch_size": 16, "checkpoint_every": 5, "log_every": 5, "tensorboard": False}
        return fit(
            Normals(0.3), normal_rows(64), objective, rng=seeded(), folder=tmp_path / folder, **settings, **options
        )

    plain = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 14)])
    again = train("b", resume=True)
    for p, q in zip(plain.energy.parameters(), again.energy.parameters()):
        assert torch.equal(p, q)
    with pytest.raises(OptionError, match=r"levels was \(0\.3, .*now \(0\.3, 0\.6\)"):
        train("a", levels=(0.3, 0.6), resume=True)


@pytest.mark.parametrize(
    "levels", [(), (0.5,), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.5, math.inf), (0.5, math.nan)]
)
def test_levels_that_do_not_rise_are_refused(levels):
    with pytest.raises(OptionError, match="rising"):
        RecoveryLikelihood(levels, MALA(0.1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="steps is 1 or more; got 0"):
        RecoveryLikelihood(LEVELS, MALA(0.1), steps=0)
    with pytest.raises(OptionError, match="energy_penalty is 0 or more; got nan"):
        RecoveryLikelihood(LEVELS, MALA(0.1), energy_penalty=math.nan)
    objective, rng = RecoveryLikelihood(LEVELS, MALA(0.1)), seeded()
    with pytest.raises(OptionError, match=r"context sigma.*is: none.*NoiseConditional"):
        objective(Gaussian(3), Batch.of(torch.zeros(4, 3)), rng)
    with pytest.raises(DomainError, match=r"Boolean.*PersistentContrastiveDivergence"):
        objective(Bernoulli(probs=torch.full((3,), 0.5)), Batch.of(torch.zeros(4, 3)), rng)
    with pytest.raises(ArgumentTypeError, match="int64"):
        objective(Normals(), Batch.of(torch.zeros(4, 2, 2, dtype=torch.int64)), rng)
    with pytest.raises(ShapeError, match=r"\(4, 2, 2\).*\(1, 2, 2\)"):
        RecoveryEnergy(Normals().given(sigma=0.3), torch.zeros(4, 2, 2), torch.ones(4))(torch.zeros(1, 2, 2))


@pytest.mark.slow
def test_a_network_learns_eight_modes_and_draws_them():
    """Walked down from noise, draws lie where the density has mass, an eighth of them or nearly so in each mode."""
    rng, ring = seeded(), EightGaussians()
    data = ring.sample(2000, rng)
    levels = [0.05 * 200 ** (i / 14) for i in range(15)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = NoiseConditional(2, width=64, blocks=2, frequencies=2, gain=0.0).calibrate(data)
    objective = RecoveryLikelihood(levels, MALA(0.3), steps=10)
    fit(energy, data, objective, rng=rng, steps=400, batch_size=256, learning_rate=2e-3)
    start = energy.base(levels[-1]).sample(2000, rng)
    x = ancestral_sample(energy, start, levels, MALA(0.3), steps=10, rng=rng)
    turns = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    shares = torch.bincount(turns, minlength=8) / len(x)
    assert bool(((shares > 0.06) & (shares < 0.19)).all())
    # The median is that of two coordinates' energies, and their constant; noise without a walk lies tens higher.
    assert abs(float(ring(x).median() - ring(ring.sample(2000, rng)).median())) < 1.5
