"""Contrastive divergence: the gradient is maximum likelihood's, and known models are recovered."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributions import constraints

from gibbsian import MALA, ULA, Bernoulli, Energy, Gaussian
from gibbsian.buffers import ReplayBuffer
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, row_sum
from gibbsian.objectives import contrastive
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence

D = 16
Z = 10.0  # A t statistic with 15 degrees of freedom exceeds it once in 2e7.


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Family(Energy):
    """Sum over coordinates of theta . f(x): each coordinate is a replicate of one experiment."""

    def __init__(self, *features) -> None:
        super().__init__()
        self.features = features
        self.theta = nn.Parameter(torch.zeros(len(features), D, dtype=torch.float64))

    def forward(self, x):
        return row_sum(sum(t * f(x) for t, f in zip(self.theta, self.features)))


class Bits(Energy):
    """All pairs of three bits, with log Z by enumeration."""

    support = constraints.boolean
    event_shape = torch.Size([3])

    def __init__(self) -> None:
        super().__init__()
        self.coupling = nn.Parameter(torch.randn(3, 3, generator=generator(1), dtype=torch.float64))

    def forward(self, x):
        return -torch.einsum("ni,ij,nj->n", x, self.coupling, x)

    @staticmethod
    def states():
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)

    def log_z(self):
        return torch.logsumexp(-self(self.states()), 0)


class NormalModel(Energy):
    """Mean and log-precision of each coordinate, with log Z in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
        self.rho = nn.Parameter(torch.linspace(-0.5, 1, 4, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * row_sum(self.rho.exp() * (x - self.mu) ** 2)

    def log_z(self):
        return 0.5 * (math.log(2 * math.pi) - self.rho).sum()


class Exact:
    """What the kernels of exact draws share: every step forgets where the chain was."""

    gradients = 1

    def init(self, energy, x):
        return State(x, torch.zeros(x.shape[0], dtype=x.dtype), torch.zeros_like(x))

    def noise(self, state, steps, rng):
        return (torch.randn((steps, *state.x.shape), generator=rng, dtype=state.x.dtype),)

    def moved(self, state, x):
        one = torch.ones_like(state.energy)
        return State(x, state.energy, state.grad), Info(one, 0 * one)


@dataclass(frozen=True)
class ExactNormal(Exact):
    domain = "real"

    def step(self, energy, state, noise):
        return self.moved(state, energy.mu + noise[0] * (-0.5 * energy.rho).exp())


@dataclass(frozen=True)
class ExactBits(Exact):
    domain = "boolean"

    def step(self, energy, state, noise):
        states = energy.states()
        u = torch.special.ndtr(noise[0][:, 0])
        chosen = torch.searchsorted((-energy(states)).softmax(0).cumsum(0), u).clamp(max=7)
        return self.moved(state, states[chosen])


@dataclass(frozen=True)
class Still(Exact):
    """A kernel that never moves."""

    domain = "real"

    def step(self, energy, state, noise):
        return self.moved(state, state.x)


def exact_gradient(energy, data) -> list[torch.Tensor]:
    return list(torch.autograd.grad(energy(data).mean() + energy.log_z(), list(energy.parameters())))


def standard_errors(energy, samples) -> list[torch.Tensor]:
    """Of the mean energy gradient over independent samples, from each row's own gradient."""
    rows = [torch.autograd.grad(energy(x[None]).sum(), list(energy.parameters())) for x in samples]
    return [torch.stack(g).std(0) / math.sqrt(len(rows)) for g in zip(*rows)]


def check_gradient(make, kernel, base, data) -> None:
    """With exact draws for samples the gradient is the negative log-likelihood's, within its Monte-Carlo error."""
    energy, rng = make(), generator(3)
    loss = (
        ContrastiveDivergence(kernel)
        if base is None
        else PersistentContrastiveDivergence(kernel, base, steps=1, buffer_size=len(data))
    )(energy, Batch.of(data), rng)
    assert all(p.grad is None for p in energy.parameters())
    loss.value.backward()
    # As many rows as the loss had samples, and the scale of the errors from 500 of them.
    start = data[:500]
    state, _ = kernel.step(
        energy, kernel.init(energy, start), tuple(z[0] for z in kernel.noise(State(start, start[:, 0], start), 1, rng))
    )
    errors = standard_errors(energy, state.x.detach())
    shrink = math.sqrt(500 / len(data))
    for found, truth, error in zip((p.grad for p in energy.parameters()), exact_gradient(energy, data), errors):
        # Six standard errors, themselves known to a few per cent, over at most nine numbers: below 1e-6.
        assert bool(((found - truth).abs() <= 6.5 * shrink * error + 1e-12).all()), (
            f"missed by {(found - truth) / error}"
        )
        assert float((truth / (shrink * error + 1e-12)).abs().max()) > 30, "no power"


NORMAL_DATA = 0.5 + 1.2 * torch.randn(20_000, 4, generator=generator(2), dtype=torch.float64)
BIT_DATA = torch.bernoulli(torch.full((20_000, 3), 0.3, dtype=torch.float64), generator=generator(2))
GRADIENTS = [
    pytest.param(NormalModel, ExactNormal(), None, NORMAL_DATA, id="cd"),
    pytest.param(NormalModel, ExactNormal(), Gaussian(4).double(), NORMAL_DATA, id="pcd"),
    pytest.param(Bits, ExactBits(), Bernoulli(probs=torch.full((3,), 0.5)).double(), BIT_DATA, id="pcd-bits"),
]


@pytest.mark.parametrize(("make", "kernel", "base", "data"), GRADIENTS)
def test_the_gradient_is_maximum_likelihoods(make, kernel, base, data):
    check_gradient(make, kernel, base, data)


def flipped(energy, data, samples, data_context, samples_context, penalty=0.0):
    value, metrics = ORIGINAL(energy, data, samples, data_context, samples_context, penalty)
    return -value, metrics


def halved(energy, data, samples, data_context, samples_context, penalty=0.0):
    positive, negative = energy(data, **data_context), energy(samples, **samples_context)
    return positive.mean() - 0.5 * negative.mean(), {}


def wrong_labels(energy, data, samples, data_context, samples_context, penalty=0.0):
    return ORIGINAL(energy, data, samples, data_context, data_context, penalty)


ORIGINAL = contrastive.contrast


@pytest.mark.parametrize("twin", [flipped, halved])
@pytest.mark.parametrize(("make", "kernel", "base", "data"), GRADIENTS)
def test_a_broken_gradient_is_caught(monkeypatch, twin, make, kernel, base, data):
    monkeypatch.setattr(contrastive, "contrast", twin)
    with pytest.raises(AssertionError, match="missed"):
        check_gradient(make, kernel, base, data)


def score_to_zero(objective, energy, data, rounds: int, rate: float = 0.3) -> torch.Tensor:
    """Follow the gradient, scaled by the data's Fisher information, and average the second half of the path."""
    features = torch.stack([f(data) for f in energy.features])
    centred = features - features.mean(1, keepdim=True)
    fisher = torch.einsum("ind,jnd->dij", centred, centred) / data.shape[0]
    rng, total = generator(4), torch.zeros_like(energy.theta)
    for i in range(rounds):
        energy.theta.grad = None
        objective(energy, Batch.of(data), rng).value.backward()
        with torch.no_grad():
            energy.theta -= rate * torch.linalg.solve(fisher, energy.theta.grad.T[..., None])[..., 0].T
        total += energy.theta.detach() if i >= rounds // 2 else 0.0
    return total / (rounds - rounds // 2)


def check_mean(estimates: torch.Tensor, truth: float, least_power: float) -> None:
    """The replicates' mean is the truth within its standard error, which is small enough to see ``least_power``."""
    assert bool(torch.isfinite(estimates).all()), "missed: not finite"
    error = estimates.std() / math.sqrt(D)
    assert float(error) * Z < least_power, f"no power: {float(error)}"
    assert abs(float(estimates.mean()) - truth) < Z * float(error), f"missed: {float(estimates.mean())} for {truth}"


def objectives(step_size: float, steps: int) -> list:
    base = Gaussian(D).double()
    return [
        ContrastiveDivergence(MALA(step_size), steps=steps),
        PersistentContrastiveDivergence(MALA(step_size), base, steps=steps, buffer_size=1000, restart=0.0),
    ]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_gaussian_is_recovered(persistent):
    m, s = 0.8, 1.3
    data = m + s * torch.randn(1000, D, generator=generator(5), dtype=torch.float64)
    energy = Family(lambda x: -x, lambda x: 0.5 * x**2)
    nn.init.ones_(energy.theta[1])
    field, precision = score_to_zero(objectives(0.25, 4)[persistent], energy, data, rounds=120)
    check_mean(precision, 1 / s**2, least_power=0.1)
    check_mean(field / precision, m, least_power=0.2)


def quartic_draws(theta, n: int) -> torch.Tensor:
    grid = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    density = (-(theta[0] * grid + theta[1] * grid**2 + theta[2] * grid**4)).exp()
    cdf = density.cumsum(0) / density.sum()
    u = torch.rand(n, D, generator=generator(6), dtype=torch.float64)
    index = torch.searchsorted(cdf, u).clamp(max=6000)
    jitter = torch.rand(n, D, generator=generator(7), dtype=torch.float64) - 0.5
    return grid[index] + (grid[1] - grid[0]) * jitter


@pytest.mark.parametrize("persistent", [False, True])
def test_a_quartic_family_is_recovered(persistent):
    theta = (-0.4, -0.5, 0.25)
    energy = Family(lambda x: x, lambda x: x**2, lambda x: x**4)
    with torch.no_grad():
        energy.theta[1:] = torch.tensor([[0.2], [0.1]])
    found = score_to_zero(objectives(0.12, 8)[persistent], energy, quartic_draws(theta, 1000), rounds=120)
    for estimates, truth in zip(found, theta):
        check_mean(estimates, truth, least_power=0.25)


class Permuted(ReplayBuffer):
    """The broken twin: chains go back to one another's slots."""

    def write(self, slots, x, steps, hot=None):
        super().write(slots, x[slots.index.argsort()], steps, hot)


class Labelled(Energy):
    """A unit normal around each class's own mean."""

    context = ("y",)

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(3, D, dtype=torch.float64))

    def forward(self, x, y):
        return 0.5 * row_sum((x - self.mu[y]) ** 2)


CENTRES = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)


def check_labelled(buffer_class: type[ReplayBuffer] = ReplayBuffer) -> None:
    """Each class's mean is found, by the parameters and by the chains under its label; classes are unequal."""
    rng, n = generator(8), 600
    y = torch.tensor([0, 1, 1, 2, 2, 2]).repeat(n // 6)
    x = CENTRES[y][:, None] + torch.randn(n, D, generator=rng, dtype=torch.float64)
    energy, base = Labelled(), Gaussian(D).double()
    objective = PersistentContrastiveDivergence(MALA(0.2), base, steps=3)
    objective.buffer = buffer_class(base, size=900, restart=0.02)
    total = torch.zeros(3, D, dtype=torch.float64)
    for i in range(160):
        energy.mu.grad = None
        objective(energy, Batch(x, {"y": y, "unused": x}), rng).value.backward()
        share = torch.bincount(y) / n
        with torch.no_grad():
            energy.mu -= 0.2 * energy.mu.grad / share[:, None]
        total += energy.mu.detach() if i >= 80 else 0.0
    labels = objective.buffer.context["y"]
    for k in range(3):
        check_mean(total[k] / 80, float(CENTRES[k]), least_power=0.6)
        chains = objective.buffer.positions[labels == k]
        # A sixth of the slots or more carry each label; the chains' spread of 1 is coarse enough for a plain bound.
        assert len(chains) > 75
        assert abs(float(chains.mean()) - float(CENTRES[k])) < 0.5, f"missed: {float(chains.mean())}"


def test_labels_condition_data_and_chains():
    check_labelled()


def test_chains_in_each_others_slots_are_caught():
    with pytest.raises(AssertionError, match=r"missed|no power"):
        check_labelled(Permuted)


def test_samples_under_the_datas_labels_are_caught(monkeypatch):
    monkeypatch.setattr(contrastive, "contrast", wrong_labels)
    with pytest.raises(AssertionError, match=r"missed|no power"):
        check_labelled()


def test_chains_that_stay_at_the_data_cancel():
    energy, data = NormalModel(), NORMAL_DATA[:50]
    loss = ContrastiveDivergence(Still(), energy_penalty=0.3)(energy, Batch.of(data), generator())
    torch.testing.assert_close(loss.value, 0.6 * energy(data).square().mean())
    plain = ContrastiveDivergence(Still())(energy, Batch.of(data), generator())
    plain.value.backward()
    assert all(float(p.grad.abs().max()) < 1e-12 for p in energy.parameters())
    assert plain.metrics["gap"] == plain.metrics["moved"] == 0


def test_metrics_are_detached_and_mean_what_they_say():
    energy, base = NormalModel(), Gaussian(4).double()
    objective = PersistentContrastiveDivergence(ULA(0.01), base, steps=5, buffer_size=100, restart=0.0)
    for _ in range(2):
        before = objective.buffer.positions.clone()
        loss = objective(energy, Batch.of(NORMAL_DATA[:100]), generator(9))
    metrics = loss.metrics
    assert set(metrics) == {
        "energy_data", "energy_samples", "gap", "acceptance", "nonfinite", "moved", "buffer_age"
    }  # fmt: skip
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
    moved = (objective.buffer.positions - before).square().mean().sqrt()
    torch.testing.assert_close(metrics["moved"], moved)
    torch.testing.assert_close(metrics["energy_samples"], energy(objective.buffer.positions).mean().detach())
    torch.testing.assert_close(metrics["energy_data"], energy(NORMAL_DATA[:100]).mean().detach())
    torch.testing.assert_close(metrics["gap"], metrics["energy_data"] - metrics["energy_samples"])
    assert metrics["buffer_age"] == 10
    assert metrics["acceptance"] == 1


def test_chains_that_leave_the_numbers_are_counted_and_return():
    energy = Energy.of(lambda x: row_sum(torch.where(x > 1.0, torch.nan, 1.0) * x))
    loss = ContrastiveDivergence(ULA(0.5), steps=10)(energy, Batch.of(torch.zeros(64, 2)), generator())
    assert loss.metrics["nonfinite"] > 0
    assert bool(torch.isfinite(loss.value))


def test_data_noise_smooths_the_data():
    base = Gaussian(D).double()
    objective = PersistentContrastiveDivergence(Still(), base, steps=1, buffer_size=2000, data_noise=2.0)
    energy = Energy.of(lambda x: row_sum(x**2) / D)
    loss = objective(energy, Batch.of(torch.zeros(2000, D, dtype=torch.float64)), generator())
    # Mean square 4 with a standard error of 4 sqrt(2 / 32000).
    assert abs(float(loss.metrics["energy_data"]) - 4.0) < 5.5 * 4 * math.sqrt(2 / (2000 * D))


def test_a_saved_objective_goes_on_as_if_never_stopped():
    def make():
        return PersistentContrastiveDivergence(MALA(0.1), Gaussian(D).double(), steps=2, buffer_size=300)

    y = torch.arange(90) % 3
    data = Batch(CENTRES[y][:, None].expand(90, D), {"y": y})
    energy, first, rng = Labelled(), make(), generator(10)
    first(energy, data, rng)
    second = make()
    second.load_state_dict(first.state_dict())
    resumed = torch.Generator()
    resumed.set_state(rng.get_state())
    a, b = first(energy, data, rng), second(energy, data, resumed)
    assert torch.equal(a.value, b.value)
    assert torch.equal(first.buffer.context["y"], second.buffer.context["y"])


def test_compiled_equals_eager_and_compiles_once():
    # A conditional energy is wrapped anew at every call, with other labels: the graph must serve them all.
    y = torch.arange(64) % 3
    data = Batch(CENTRES[y][:, None] + torch.zeros(64, D, dtype=torch.float64), {"y": y})
    values, graphs = [], 0
    for compile in (False, True):
        base, energy, rng = Gaussian(D).double(), Labelled(), generator(11)
        objective = PersistentContrastiveDivergence(MALA(0.1), base, steps=2, buffer_size=128, compile=compile)
        before = counters["stats"]["unique_graphs"]
        values.append([objective(energy, data, rng).value.item() for _ in range(4)])
        graphs = counters["stats"]["unique_graphs"] - before
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
    assert graphs == 1


def test_a_compiled_round_tells_of_chains_that_start_at_no_number():
    class Cliff(Energy):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x.square().sum(1) + torch.where(x[:, 0] > 1.0, torch.inf, 0.0)

    energy, objective = Cliff(), ContrastiveDivergence(ULA(0.01), 1, compile=True)
    inside = torch.zeros(4, 2)
    assert torch.isfinite(objective(energy, Batch(inside), generator(1)).value)
    with pytest.raises(DomainError, match="1 of 4 chains start where the energy or its gradient is not finite"):
        objective(energy, Batch(inside + torch.tensor([[0.0], [0.0], [0.0], [2.0]])), generator(1))


def test_bad_options_are_refused():
    base = Gaussian(4)
    for make in (
        lambda **o: ContrastiveDivergence(ULA(0.1), **o),
        lambda **o: PersistentContrastiveDivergence(ULA(0.1), base, **o),
    ):
        with pytest.raises(OptionError, match="steps is 1 or more; got 0"):
            make(steps=0)
        with pytest.raises(OptionError, match=r"energy_penalty is 0 or more; got -0\.1"):
            make(energy_penalty=-0.1)
        with pytest.raises(OptionError, match=r"energy_penalty.*nan"):
            make(energy_penalty=math.nan)
    with pytest.raises(OptionError, match=r"data_noise is 0 or more; got -1"):
        PersistentContrastiveDivergence(ULA(0.1), base, data_noise=-1)


def test_data_that_does_not_fit_is_refused():
    rng = generator()

    def pcd(base, **options):
        return PersistentContrastiveDivergence(ULA(0.1), base, buffer_size=16, **options)

    data = torch.zeros(8, 3)
    with pytest.raises(ShapeError, match=r"\(4,\).*\(3,\)"):
        pcd(Gaussian(4))(Gaussian(3), Batch.of(data), rng)
    with pytest.raises(OptionError, match=r"17 .* size 16"):
        pcd(Gaussian(3))(Gaussian(3), Batch.of(torch.zeros(17, 3)), rng)
    with pytest.raises(OptionError, match=r"float32.*float64.*\.to\("):
        pcd(Gaussian(3))(Gaussian(3), Batch.of(data.double()), rng)
    with pytest.raises(DomainError, match="base draws from"):
        pcd(Gaussian(3))(Bits(), Batch.of(data), rng)
    with pytest.raises(DomainError, match=r"data_noise=0\.1"):
        pcd(Bernoulli(probs=torch.full((3,), 0.5)), data_noise=0.1)(Bits(), Batch.of(data), rng)
    with pytest.raises(OptionError, match="conditioned on y"):
        ContrastiveDivergence(ULA(0.1))(Labelled(), Batch.of(data), rng)
