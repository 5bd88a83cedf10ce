"""Equilibrium matching: on Gaussian data the best quadratic energy is in closed form, and descent ends at the data."""

import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian import Energy, Gaussian
from gibbsian.energies.neural import MLP
from gibbsian.errors import ArgumentTypeError, DivergenceError, InputError, OptionError, ShapeError
from gibbsian.objectives import equilibrium
from gibbsian.objectives.base import Batch
from gibbsian.objectives.equilibrium import Decay, EquilibriumMatching, descend
from recovery import Case, assert_recovered, estimates, seeded, slope

M, S = 1.3, 0.6
DECAYS = {"linear": Decay(0.0), "truncated": Decay(0.8), "piecewise": Decay(0.5, 1.6)}


class Bowl(Energy):
    """b x^2 / 2 + a x, whose gradient is a line."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.b * x[:, 0].square() + self.a * x[:, 0]


def normal_noise(shape=1):
    return Gaussian(torch.Size((shape,)) if isinstance(shape, int) else shape).double()


def normal_rows(n, rng):
    return M + S * torch.randn((n, 1), generator=rng, dtype=torch.float64)


def line(decay, multiplier=4.0) -> tuple[float, float]:
    """Least squares of c (x_0 - x_1) on (1 - g) x_0 + g x_1, with the moments over g by the midpoint rule."""
    g = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    a, b = decay.knee, decay.start
    c = torch.where(g < a, b - (b - 1) * g / a if a else torch.ones_like(g), (1 - g) / (1 - a)) * multiplier
    second = S**2 + M**2
    mean_x, mean_u = float((g * M).mean()), float((-c * M).mean())
    covariance = float((c * (1 - g) - c * g * second).mean()) - mean_x * mean_u
    variance = float(((1 - g).square() + g.square() * second).mean()) - mean_x**2
    return mean_u - covariance / variance * mean_x, covariance / variance


def case(decay) -> Case:
    return Case("bowl", Bowl, line(decay), normal_rows, 0.0)


@pytest.mark.parametrize("name", DECAYS)
def test_the_best_quadratic_energy_is_found(name):
    decay = DECAYS[name]
    found = estimates(lambda: EquilibriumMatching(normal_noise(), decay), case(decay), 2000)
    assert_recovered(found, line(decay), 0.6)


def test_the_error_falls_with_the_square_root_of_the_rows():
    def scatter(n):
        return estimates(lambda: EquilibriumMatching(normal_noise()), case(Decay()), n, replicates=16)

    assert slope(scatter, line(Decay())) == pytest.approx(-0.5, abs=0.2)


TWINS = {
    "direction": lambda energy, x, u, context: equilibrium_error(energy, x, -u, context),
    "sign of the gradient": lambda energy, x, u, context: equilibrium_error(energy, x, u, context, -1.0),
    "scale": lambda energy, x, u, context: equilibrium_error(energy, x, u, context, 2.0),
}
equilibrium_error = equilibrium.gradient_error


@pytest.mark.parametrize("twin", [*TWINS, "noise and data swapped", "no decay"])
def test_a_slip_misses(twin, monkeypatch):
    if twin == "noise and data swapped":
        real = equilibrium.between
        monkeypatch.setattr(equilibrium, "between", lambda noise, data, t: real(data, noise, t))
    elif twin == "no decay":
        monkeypatch.setattr(Decay, "__call__", lambda self, gamma: torch.ones_like(gamma))
    else:
        monkeypatch.setattr(equilibrium, "gradient_error", TWINS[twin])
    found = estimates(lambda: EquilibriumMatching(normal_noise()), case(Decay()), 2000)
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(found, line(Decay()), 1.0)


def test_decays_are_the_papers():
    g = torch.tensor([0.0, 0.4, 0.8, 0.9, 1.0], dtype=torch.float64)
    want = {
        Decay(0.0): [1.0, 0.6, 0.2, 0.1, 0.0],
        Decay(): [1.0, 1.0, 1.0, 0.5, 0.0],
        Decay(0.8, 1.4): [1.4, 1.2, 1.0, 0.5, 0.0],
    }
    for decay, values in want.items():
        torch.testing.assert_close(decay(g), torch.tensor(values, dtype=torch.float64))


def test_the_loss_is_a_sum_over_coordinates():
    x = torch.randn((40, 2, 3), generator=seeded(1), dtype=torch.float64)
    energy = Energy.of(lambda x: 0.7 * x.flatten(1).square().sum(1))
    loss = EquilibriumMatching(normal_noise((2, 3)), Decay(0.0), 2.0)(energy, Batch(x), seeded(2))
    rng = seeded(2)
    noise = torch.randn((40, 2, 3), generator=rng, dtype=torch.float64)
    g = torch.rand(40, generator=rng, dtype=torch.float64)[:, None, None]
    error = 1.4 * ((1 - g) * noise + g * x) - 2 * (1 - g) * (noise - x)
    want = float(error.square().sum((1, 2)).mean())
    assert float(loss.value.detach()) == pytest.approx(want, rel=1e-12)
    assert float(loss.metrics["matching_error"]) == pytest.approx(want / 6, rel=1e-12)


# Descent.


def trained():
    """Two moons in a short budget."""
    data = gb.TwoMoons().sample(2000, seeded())
    objective = EquilibriumMatching(Gaussian(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(2, hidden=(64, 64))
    run = gb.fit(energy, data, objective, rng=seeded(), steps=800, batch_size=256, learning_rate=3e-3, log_every=50)
    assert run.events == []
    return energy, data, objective


def distance_to(data, x):
    """Mean distance to the nearest row of data."""
    return float(torch.cdist(x, data).min(1).values.mean())


def test_descent_from_noise_lowers_the_energy_and_ends_near_the_data():
    energy, data, objective = trained()
    start = objective.noise.sample(500, seeded(1))
    before = energy(start).detach()
    for momentum in (0.0, 0.3):
        x = descend(energy, start, step_size=0.01, steps=150, momentum=momentum)
        assert bool((energy(x) < before).double().mean() > 0.98)
        assert distance_to(data, x) < 0.12 < 0.35 * distance_to(data, start)
    # Both moons are reached.
    assert 0.25 < float((x[:, 1] > 0.25).double().mean()) < 0.75
    away = descend(-energy, start, step_size=0.01, steps=20)
    assert distance_to(data, away) > distance_to(data, start)


def test_descent_is_the_formula():
    energy = Energy.of(lambda x: 0.5 * (x.square() * torch.tensor([1.0, 4.0])).sum(1))
    x = before = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    for _ in range(7):
        ahead = x + 0.4 * (x - before)
        x, before = x - 0.1 * ahead * torch.tensor([1.0, 4.0]), x
    torch.testing.assert_close(
        descend(energy, torch.tensor([[1.0, -2.0], [0.5, 3.0]]), step_size=0.1, steps=7, momentum=0.4), x
    )


def test_points_at_rest_stay():
    energy = Energy.of(lambda x: 0.5 * x.square().sum(1))
    start = torch.tensor([[0.01], [1.0]])
    x = descend(energy, start, step_size=0.5, steps=40, tolerance=0.05)
    assert float(x[0]) == float(start[0])
    assert 0.02 < float(x[1]) < 0.05


def test_descent_refuses_what_does_not_fit():
    energy = MLP(2, hidden=(4,))
    start = torch.zeros(3, 2)
    for options in (
        {"step_size": 0.0, "steps": 5},
        {"step_size": 0.1, "steps": 0},
        {"step_size": 0.1, "steps": 5, "momentum": 1.0},
        {"step_size": 0.1, "steps": 5, "tolerance": -1.0},
    ):
        with pytest.raises(OptionError):
            descend(energy, start, **options)
    with pytest.raises(ShapeError, match=r"\(n, 2\)"):
        descend(energy, torch.zeros(3, 4), step_size=0.1, steps=1)
    with pytest.raises(ArgumentTypeError):
        descend(energy, torch.zeros(3, 2, dtype=torch.int64), step_size=0.1, steps=1)
    with pytest.raises(DivergenceError, match="step_size"):
        descend(Energy.of(lambda x: x.square().sum(1)), start + 1, step_size=1e30, steps=4)
    with pytest.raises(InputError, match="dropout"):
        descend(Energy.of(nn.Dropout(0.5)), start, step_size=0.1, steps=1)


# Plumbing.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_any_shape_and_precision_and_the_same_numbers_for_a_seed(shape, dtype):
    x = torch.randn((6, *shape), generator=seeded(1), dtype=dtype)
    objective, energy = EquilibriumMatching(Gaussian(shape)), MLP(shape, hidden=(8,)).to(dtype)
    a, b, c = (objective(energy, Batch(x), seeded(s)).value for s in (1, 1, 2))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    a.backward()


def test_labels_go_with_their_rows():
    seen = []

    def fn(x, y):
        seen.append(y)
        return (x[:, 0] - y).square()

    y = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    energy, x = Energy.of(fn, context=("y",)), torch.zeros(3, 1, dtype=torch.float64)
    EquilibriumMatching(normal_noise())(energy, Batch(x, {"y": y}), seeded())
    assert torch.equal(seen[0], y)
    with pytest.raises(OptionError, match="y"):
        EquilibriumMatching(normal_noise())(energy, Batch(x), seeded())


def test_a_batch_of_one_and_duplicates_are_fine():
    for x in (normal_rows(1, seeded()), normal_rows(1, seeded()).repeat(5, 1)):
        assert bool(torch.isfinite(EquilibriumMatching(normal_noise())(Bowl(), Batch(x), seeded()).value))


def test_options_that_do_not_fit_are_refused():
    for multiplier in (0.0, -1.0, math.nan):
        with pytest.raises(OptionError, match="positive"):
            EquilibriumMatching(normal_noise(), multiplier=multiplier)
    for knee, start in ((1.0, 1.0), (-0.1, 1.0), (0.5, 0.0)):
        with pytest.raises(OptionError):
            Decay(knee, start)
    with pytest.raises(ArgumentTypeError, match="decay"):
        EquilibriumMatching(normal_noise(), 0.8)
