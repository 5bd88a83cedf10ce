"""Energy matching: on Gaussian data the potential is in closed form; pairs are optimal; samples reach the modes."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import gibbsian as gb
from gibbsian import Energy, Gaussian
from gibbsian.energies.neural import MLP
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels import transport as kernels
from gibbsian.objectives import transport
from gibbsian.objectives.base import Batch
from gibbsian.objectives.equilibrium import EquilibriumMatching
from gibbsian.objectives.transport import EnergyMatching, TransportMatching, pairing
from recovery import Case, assert_recovered, estimates, seeded, slope

M, S, HEAT = 1.3, 0.5, 0.4
ROWS, TIMES = 300, 72


class Bowl(Energy):
    """b x^2 / 2 + a x, whose gradient is a line."""

    def __init__(self, a=0.0, b=0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([b], dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.b * x[:, 0].square() + self.a * x[:, 0]


def normal_noise(dim=1):
    return Gaussian(dim).double()


def normal_rows(n, rng):
    return M + S * torch.randn((n, 1), generator=rng, dtype=torch.float64)


def line(onset=1.0) -> tuple[float, float]:
    """Least squares of the velocity M + (S - 1) z on x_t = t M + (1 - t + t S) z, for z normal and t uniform.

    The optimal map from noise z to data is M + S z. Moments over t are weighted by 1 up to the onset, then falling.
    """
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    w = torch.ones_like(t) if onset == 1.0 else ((1 - t) / (1 - onset)).clamp(max=1.0)
    w, spread = w / w.sum(), 1 - t + t * S
    mean = float((w * t).sum()) * M
    covariance = float((w * spread).sum()) * (S - 1)
    variance = float((w * (t.square() * M**2 + spread.square())).sum()) - mean**2
    gain = covariance / variance
    return -(M - gain * mean) / HEAT, -gain / HEAT


def newton(objective, energy, data, seed) -> None:
    """The loss is a square in the parameters: one step ends at its minimum, with one pairing."""
    params = list(energy.parameters())
    loss = objective(energy, Batch(data), seeded(1000 + seed)).value
    grads = torch.autograd.grad(loss, params, create_graph=True)
    hessian = torch.stack([torch.cat(torch.autograd.grad(g, params, retain_graph=True)) for g in grads])
    step = torch.linalg.solve(hessian, torch.cat(grads))
    with torch.no_grad():
        for p, move in zip(params, step):
            p -= move


def case(onset=1.0) -> Case:
    return Case("bowl", Bowl, line(onset), normal_rows, 0.0)


@pytest.mark.parametrize("onset", [1.0, 0.6])
def test_the_best_quadratic_potential_is_found(onset):
    found = estimates(lambda: TransportMatching(normal_noise(), HEAT, onset), case(onset), ROWS, TIMES, newton)
    assert_recovered(found, line(onset), 0.3)


def test_the_error_falls_with_the_square_root_of_the_rows():
    def scatter(n):
        return estimates(lambda: TransportMatching(normal_noise(), HEAT), case(), n, 32, newton)

    assert slope(scatter, line(), sizes=(40, 120, 360)) == pytest.approx(-0.5, abs=0.2)


TWINS = {
    "direction": lambda energy, x, u, context, heat: error(energy, x, -u, context, heat),
    "sign of the gradient": lambda energy, x, u, context, heat: error(energy, x, u, context, -heat),
    "temperature forgotten": lambda energy, x, u, context, heat: error(energy, x, u, context),
}
error = transport.gradient_error


@pytest.mark.parametrize("twin", [*TWINS, "pairs at random", "noise and data swapped", "worst pairs"])
def test_a_slip_misses(twin, monkeypatch):
    if twin == "pairs at random":
        monkeypatch.setattr(transport, "pairing", lambda data, noise, context: torch.arange(len(data)))
    elif twin == "worst pairs":
        monkeypatch.setattr(transport, "pairing", lambda data, noise, context: pairing(data, -noise))
    elif twin == "noise and data swapped":
        real = transport.between
        monkeypatch.setattr(transport, "between", lambda noise, data, t: real(data, noise, t))
    else:
        monkeypatch.setattr(transport, "gradient_error", TWINS[twin])
    found = estimates(lambda: TransportMatching(normal_noise(), HEAT, 0.6), case(0.6), ROWS, TIMES, newton)
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(found, line(0.6), 1.0)


# Pairing.


def test_pairs_are_the_best_of_all():
    data, noise = (torch.randn((6, 2, 2), generator=seeded(s), dtype=torch.float64) for s in (1, 2))
    cost = torch.cdist(data.flatten(1), noise.flatten(1)).square()
    best = min(float(cost[range(6), list(p)].sum()) for p in itertools.permutations(range(6)))
    index = pairing(data, noise)
    assert sorted(index.tolist()) == list(range(6))
    assert float(cost[range(6), index].sum()) == pytest.approx(best, rel=1e-12)


def test_on_the_line_pairs_are_in_order():
    data, noise = (torch.randn((200, 1), generator=seeded(s)) for s in (1, 2))
    index = pairing(data, noise)
    assert torch.equal(noise[index][data[:, 0].argsort(), 0], noise[:, 0].sort().values)


def test_only_rows_of_one_class_are_paired():
    data, noise = (torch.randn((60, 2), generator=seeded(s)) for s in (1, 2))
    y = torch.arange(60) % 3
    index = pairing(data, noise, {"y": y, "z": torch.zeros(60, 4)})
    assert torch.equal(y[index], y)
    assert sorted(index.tolist()) == list(range(60))
    own = torch.randn(60, generator=seeded(3))
    assert pairing(data, noise, {"y": own}).tolist() == list(range(60))


def test_one_row_duplicates_and_what_is_not_finite():
    assert pairing(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [0]
    assert sorted(pairing(torch.zeros(5, 2), torch.randn(5, 2, generator=seeded())).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(DomainError, match="NaN"):
        pairing(torch.tensor([[math.nan], [0.0]]), torch.ones(2, 1))


# The second phase.


OFF, WIDE = 1.0, 0.6
"""Where the model's own density is, off the data's."""


def contrast_slopes(repeats=30, rows=300):
    """Gradients of the contrastive part: the whole loss's less those of transport with the same noise."""
    noise, rng, found = normal_noise(), seeded(9), []
    energy = Bowl(-OFF / WIDE**2, 1 / WIDE**2)
    both = EnergyMatching(noise, 1.0, 0, 0.6, contrast_weight=0.7, steps=200, step_size=0.02)
    alone = TransportMatching(noise, 1.0, 0.6)
    for seed in range(repeats):
        batch, at = Batch(normal_rows(rows, seeded(50 + seed))), int(torch.randint(2**31, (), generator=rng))
        grads = [
            torch.cat(torch.autograd.grad(objective(energy, batch, seeded(at)).value, [energy.a, energy.b]))
            for objective in (both, alone)
        ]
        found.append((grads[0] - grads[1]) / 0.7)
    return torch.stack(found)


def check_contrast() -> None:
    """It is what the exact law of the chains gives: variance s^2 / (1 - h / (2 s^2)) for a step of h = 0.02.

    Chains run for a time of 4, and forget what they started from to e^-8 in the time of 3 after their clock is at 1.
    A t statistic with 29 degrees of freedom exceeds 8 once in 1e8.
    """
    found = contrast_slopes()
    second = WIDE**2 / (1 - 0.02 / (2 * WIDE**2)) + OFF**2
    want = torch.tensor([M - OFF, 0.5 * (S**2 + M**2 - second)], dtype=torch.float64)
    off, deviation = found.mean(0) - want, found.std(0) / len(found) ** 0.5
    assert float(deviation.max()) * 8 < 0.5, f"no power: {deviation.tolist()}"
    assert bool((off.abs() < 8 * deviation).all()), f"missed: z = {(off / deviation).tolist()}"


def test_the_contrastive_gradient_is_that_of_chains_in_equilibrium():
    check_contrast()


@pytest.mark.parametrize("twin", ["sign", "no noise", "noise twice as large"])
def test_a_slip_of_the_second_phase_is_seen(twin, monkeypatch):
    if twin == "sign":
        real = transport.contrast
        monkeypatch.setattr(
            transport, "contrast", lambda energy, data, samples, *rest: real(energy, samples, data, *rest)
        )
    else:
        factor = 0.0 if twin == "no noise" else 4.0
        monkeypatch.setattr(kernels, "heat", lambda time, onset: factor * torch.ones_like(time))
    with pytest.raises(AssertionError, match="missed"):
        check_contrast()


def test_half_of_the_chains_start_from_data_with_their_clock_at_1(monkeypatch):
    seen, real = [], kernels.TransportLangevin.init_at

    def init_at(self, energy, x, times):
        seen.append((x, times))
        return real(self, energy, x, times)

    monkeypatch.setattr(kernels.TransportLangevin, "init_at", init_at)
    x = 100 + normal_rows(5, seeded())
    loss = EnergyMatching(normal_noise(), 0.1, 0, steps=3)(Bowl(0.0, 1.0), Batch(x), seeded())
    start, times = seen[0]
    assert torch.equal(start[:2], x[:2])
    assert float(start[2:].abs().max()) < 10
    assert times.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert {"gap", "energy_data", "energy_samples", "moved", "transport_error", "nonfinite"} <= loss.metrics.keys()
    assert not any(m.requires_grad for m in loss.metrics.values())


def test_phases_follow_the_count_of_training_steps():
    objective, energy, x = (
        EnergyMatching(normal_noise(), 0.1, warmup=2, steps=2),
        Bowl(0.0, 1.0),
        normal_rows(6, seeded()),
    )
    plain = TransportMatching(normal_noise(), 0.1)
    objective.eval()
    for _ in range(5):
        objective(energy, Batch(x), seeded())
    objective.train()
    for _ in range(2):
        loss = objective(energy, Batch(x), seeded())
        assert torch.equal(loss.value, plain(energy, Batch(x), seeded()).value)
        assert "gap" not in loss.metrics
    assert "gap" in objective(energy, Batch(x), seeded()).metrics
    fresh = EnergyMatching(normal_noise(), 0.1, warmup=2, steps=2)
    fresh.load_state_dict(objective.state_dict())
    assert fresh.calls == 3
    assert torch.equal(*(o(energy, Batch(x), seeded(5)).value for o in (objective, fresh)))


RUN = {"log_every": 4, "checkpoint_every": 10, "batch_size": 16, "learning_rate": 0.01, "tensorboard": False}


@pytest.mark.parametrize("stop", [12, 28])
def test_a_broken_off_run_goes_on_exactly_in_either_phase(tmp_path, stop):
    data = gb.TwoMoons().sample(48, seeded())

    def train(folder, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            energy = MLP(2, hidden=(8,))
        objective = EnergyMatching(Gaussian(2), warmup=20, steps=3)
        gb.fit(energy, data, objective, rng=seeded(1), folder=tmp_path / folder, steps=40, **RUN, **options)
        return energy, objective

    energy, objective = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < stop)])
    again, resumed = train("b", resume=True)
    assert objective.calls == resumed.calls == 40
    for a, b in zip(energy.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def modes(turned=0.0):
    """Four places on the unit circle."""
    angle = torch.arange(4) * (math.pi / 2) + turned
    return torch.stack((angle.cos(), angle.sin()), 1)


@pytest.fixture(scope="module")
def matched():
    """Four narrow modes, matched for some seconds: noise, samples after each phase, the energy."""
    rng, noise, heat = seeded(1), Gaussian(2), 0.03
    data = modes()[torch.randint(4, (2000,), generator=rng)] + 0.125 * torch.randn((2000, 2), generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = (1 / heat) * MLP(2, hidden=(64, 64), frequencies=2)
    settings = {"rng": seeded(2), "batch_size": 128, "learning_rate": 3e-3, "log_every": 50}
    start = noise.sample(2000, seeded(3))
    warm = gb.fit(energy, data, TransportMatching(noise, heat), steps=300, **settings)
    carried = gb.sample(energy, kernels.TransportLangevin(0.02, heat, 1.0), start, steps=50, rng=seeded(4)).x
    both = EnergyMatching(noise, heat, warmup=0, contrast_weight=1.0, steps=60, step_size=0.025)
    sharp = gb.fit(energy, data, both, steps=120, **settings)
    drawn = gb.sample(energy, both.kernel, start, steps=80, rng=seeded(4)).x
    assert warm.events == sharp.events == []
    return start, carried, drawn, energy


def test_samples_land_on_the_modes_and_the_second_phase_sharpens(matched):
    near = [float((torch.cdist(x, modes()).min(1).values < 0.3).double().mean()) for x in matched[:3]]
    assert near[0] < 0.15
    assert near[1] > 0.35
    assert near[2] > max(0.65, near[1] + 0.15), near
    for x in matched[1:3]:
        share = torch.bincount(torch.cdist(x, modes()).argmin(1), minlength=4) / len(x)
        assert float((share - 0.25).abs().max()) < 0.06, share


def test_the_energy_is_that_of_the_modes(matched):
    energy = matched[3]
    with torch.no_grad():
        deep, between, middle = (float(energy(x).mean()) for x in (modes(), modes(math.pi / 4), torch.zeros(1, 2)))
    assert between > deep + 2.0
    assert middle > deep + 2.0


# Plumbing.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
@pytest.mark.parametrize("make", [TransportMatching, lambda noise: EnergyMatching(noise, warmup=0, steps=2)])
def test_any_shape_and_precision_and_the_same_numbers_for_a_seed(make, shape, dtype):
    x = torch.randn((6, *shape), generator=seeded(1), dtype=dtype)
    objective, energy = make(Gaussian(shape)), MLP(shape, hidden=(8,)).to(dtype)
    a, b, c = (objective(energy, Batch(x), seeded(s)).value for s in (1, 1, 2))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    a.backward()


def test_the_loss_is_a_sum_over_coordinates():
    x = torch.randn((40, 2, 3), generator=seeded(1), dtype=torch.float64)
    energy = Energy.of(lambda x: 0.35 * x.flatten(1).square().sum(1))
    loss = TransportMatching(Gaussian((2, 3)).double(), 2.0)(energy, Batch(x), seeded(2))
    rng = seeded(2)
    noise = torch.randn((40, 2, 3), generator=rng, dtype=torch.float64)
    noise = noise[pairing(x, noise)]
    t = torch.rand(40, generator=rng, dtype=torch.float64)[:, None, None]
    want = float((1.4 * ((1 - t) * noise + t * x) + x - noise).square().sum((1, 2)).mean())
    assert float(loss.value.detach()) == pytest.approx(want, rel=1e-12)
    assert float(loss.metrics["transport_error"]) == pytest.approx(want / 6, rel=1e-12)


def test_labels_go_with_their_rows_and_chains():
    seen = []

    def fn(x, y):
        seen.append(y)
        return (x[:, 0] - y).square()

    y = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    energy, x = Energy.of(fn, context=("y",)), torch.zeros(3, 1, dtype=torch.float64)
    EnergyMatching(normal_noise(), warmup=0, steps=2)(energy, Batch(x, {"y": y}), seeded())
    assert all(torch.equal(labels, y) for labels in seen[:-1])
    assert torch.equal(seen[-1], y.repeat(2))
    with pytest.raises(OptionError, match="y"):
        TransportMatching(normal_noise())(energy, Batch(x), seeded())


def test_a_batch_of_one_and_duplicates_are_fine():
    objective = EnergyMatching(normal_noise(), warmup=0, steps=2)
    for x in (normal_rows(1, seeded()), normal_rows(1, seeded()).repeat(5, 1)):
        assert bool(torch.isfinite(objective(Bowl(0.0, 1.0), Batch(x), seeded()).value))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"onset": 1.5},
        {"warmup": -1},
        {"steps": 0},
        {"step_size": 0.0},
        {"contrast_weight": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError):
        EnergyMatching(normal_noise(), **options)
    if options.keys() <= {"temperature", "onset"}:
        with pytest.raises(OptionError):
            TransportMatching(normal_noise(), **options)


@pytest.mark.parametrize("make", [TransportMatching, EnergyMatching, EquilibriumMatching])
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ArgumentTypeError, match="noise"):
        make(MLP(1))
    objective, x = make(normal_noise()), normal_rows(4, seeded())
    with pytest.raises(DomainError, match="EnergyDiscrepancy"):
        objective(Energy.of(lambda x: x[:, 0], support=constraints.boolean), Batch(x), seeded())
    with pytest.raises(DomainError, match="noise lives on"):
        make(gb.Bernoulli(torch.zeros(1)))(Bowl(), Batch(x), seeded())
    with pytest.raises(ShapeError, match=r"\(2,\).*\(1,\)"):
        make(Gaussian(2))(Bowl(), Batch(x), seeded())
    with pytest.raises(ArgumentTypeError, match="int64"):
        objective(Bowl(), Batch(x.long()), seeded())
    with pytest.raises(ShapeError, match="squeeze"):
        objective(Energy.of(lambda x: x), Batch(x), seeded())


@pytest.mark.parametrize("make", [TransportMatching, EnergyMatching])
def test_rows_that_cannot_be_paired_are_refused(make):
    objective, x = make(normal_noise()), normal_rows(4, seeded())
    with pytest.raises(DomainError, match="NaN"):
        objective(Bowl(), Batch(x * math.nan), seeded())
