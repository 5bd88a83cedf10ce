"""RAISE against the law of annealing in closed form, against true log-likelihoods, and beside AIS; broken twins."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from enumeration import System, binary_system, single_site
from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell
from gibbsian.energies.toys import Ring
from gibbsian.energies.tractable import Bernoulli, Gaussian, Tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.kernels.gibbs import SingleSiteGibbs
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import ULA
from gibbsian.partition import held_out
from gibbsian.partition.held_out import raise_lower_bound
from gibbsian.partition.paths import geometric
from gibbsian.partition.schedule import Schedule, pilot
from oracles import Z_LIMIT, double_precision


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small() -> tuple[System, Bernoulli]:
    """Eight states, and a base that knows nothing of them."""
    return binary_system((3,), seed=4), Bernoulli(logits=torch.tensor([0.5, -0.5, 0.2], dtype=torch.float64))


def law_of_annealing(system: System, base: Bernoulli, betas: Tensor) -> Tensor:
    """Where forward annealing by single-site Gibbs ends, ``(m,)``: the base's law times one matrix per inner stop."""
    path, law = geometric(base, system.energy), base.log_prob(system.states).exp()
    for b in betas[1:-1]:
        law = law @ single_site(System("stop", path(b), system.states, False))
    return law


def assert_law(finish: int = 2, temperatures: int = 4) -> None:
    """Mean weights of 8 rows are their probabilities, each to 5.5 of its errors: a false alarm in 3 x 10^6."""
    system, base = small()
    schedule = Schedule.linear(temperatures)
    found = raise_lower_bound(
        system.energy,
        base,
        system.states,
        rng=generator(),
        chains=20_000,
        kernel=SingleSiteGibbs(),
        schedule=schedule,
        finish=finish,
    )
    law = law_of_annealing(system, base, torch.cat((schedule.betas, torch.ones(finish))).double())
    z = (found.log_prob - law.log()) / found.errors
    assert float(z.abs().max()) < Z_LIMIT, f"missed: {z}"
    assert float((law - system.law).abs().max()) > 0.02, "annealing this short should differ from the model"


def test_weights_are_the_law_of_annealing():
    assert_law()
    assert_law(finish=0)


def test_expectations_are_below_the_law_of_annealing_and_the_bound_holds():
    """Of two chains per row, over 400 runs: the mean is lower, and ``lower`` is above it in one of a hundred."""
    system, base = small()
    schedule = Schedule.linear(4)
    law = law_of_annealing(system, base, torch.cat((schedule.betas, torch.ones(2))).double()).log()
    rows = system.states.repeat(400, 1)
    found = raise_lower_bound(
        system.energy,
        base,
        rows,
        rng=generator(1),
        chains=2,
        kernel=SingleSiteGibbs(),
        schedule=schedule,
        finish=2,
    )
    runs = found.log_prob.reshape(400, 8)
    gap = law - runs
    assert float((gap.mean(0) / (gap.std(0) / 20.0)).min()) > -Z_LIMIT
    assert float(gap.mean() / (gap.std() / math.sqrt(3200))) > Z_LIMIT
    lower = runs.mean(1) - math.log(100.0) / 8.0
    # More than 20 of 400 have probability below 1e-7 at 99%.
    assert int((lower > law.mean()).sum()) <= 20


def test_raise_closes_in_from_below_on_draws_of_the_model():
    energy, base = Ring(), Gaussian(2, scale=3.0)
    rows = energy.sample(200, generator())
    truth = float(energy.log_prob(rows).mean())
    gaps = []
    for temperatures in (10, 50, 200):
        found = raise_lower_bound(energy, base, rows, rng=generator(1), chains=8, temperatures=temperatures)
        gaps.append(truth - float(found.value))
        assert float(found.lower) < float(found.value) < truth + Z_LIMIT * float(found.stderr)
    assert gaps[0] > 0.3
    assert 2.0 * gaps[2] < gaps[1] < 0.5 * gaps[0]
    assert gaps[2] < 0.05


def test_single_weights_bracket_the_truth_in_expectation():
    """The logarithm of single weights: RAISE's are too low on average, log-likelihoods by annealing too high."""
    energy, base = Ring(), Gaussian(2, scale=3.0)
    rows = energy.sample(1000, generator())
    path, kernel = geometric(base, energy), HMC(0.1, leapfrog=5)
    schedule = pilot(path, base, kernel, rng=generator(), temperatures=20)
    found = raise_lower_bound(energy, base, rows, rng=generator(3), chains=2, kernel=kernel, schedule=schedule)
    below = found.log_prob - energy.log_prob(rows).double()
    assert float(below.mean() / (below.std() / math.sqrt(1000))) < -Z_LIMIT
    ahead = held_out.log_weights(path, schedule, kernel, base.sample(1000, generator(1)), rng=generator(2))
    above = energy.log_z - ahead
    assert float(above.mean() / (above.std() / math.sqrt(1000))) > Z_LIMIT


def test_rows_of_a_mode_that_annealing_makes_too_heavy_come_out_too_high():
    """The bound is one on the law of annealing: on the model's own draws too low on average, not at every row."""
    energy, base = DoubleWell(), Gaussian(2, scale=2.0)
    rows = energy.sample(200, generator())
    found = raise_lower_bound(energy, base, rows, rng=generator(1), chains=8, temperatures=50)
    excess = found.log_prob - energy.log_prob(rows).double()
    lighter = rows[:, 0] < 0
    assert float(excess.mean()) < 0.0
    assert 10 < int(lighter.sum()) < 60
    assert float(excess[lighter].mean()) > 0.3


def test_the_normalised_model_is_its_own_annealing():
    with double_precision():
        energy = Gaussian(3)
    rows = energy.sample(20, generator())
    found = raise_lower_bound(energy, energy, rows, rng=generator(), schedule=Schedule.linear(5))
    torch.testing.assert_close(found.log_prob, energy.log_prob(rows))
    assert float(found.stderr) < 1e-6
    assert float(found.ess.min()) == pytest.approx(16.0)
    assert "16 chains" in str(found)


def test_errors_are_the_spread_of_repeats():
    energy, base = DoubleWell(), Gaussian(2, scale=2.0)
    row = energy.sample(1, generator())
    found = raise_lower_bound(energy, base, row.repeat(300, 1), rng=generator(1), chains=50, temperatures=30)
    # The spread of 300 is known to 4.1%.
    assert float(found.log_prob.std() / found.errors.square().mean().sqrt()) == pytest.approx(1.0, abs=0.25)
    assert float(found.rows_stderr) == pytest.approx(float(found.stderr), rel=0.25)


def test_any_schedule_can_be_extended():
    for sizes in (None, torch.tensor([0.3, 0.2, 0.1])):
        longer = held_out._extended(Schedule(torch.linspace(0, 1, 5), sizes), 4)
        assert longer.betas.tolist()[-5:] == [1.0] * 5
        assert longer.step_sizes is None or len(longer.step_sizes) == 7
    assert held_out._extended(Schedule(torch.tensor([0.0, 1.0]), torch.zeros(0)), 3).step_sizes is None


def test_broken_twin_weights_of_the_wrong_sign_are_caught(monkeypatch):
    right = held_out.log_weights
    monkeypatch.setattr(held_out, "log_weights", lambda *args, **kwargs: -right(*args, **kwargs))
    with pytest.raises(AssertionError, match="missed"):
        assert_law()


def test_broken_twin_forward_weights_are_caught(monkeypatch):
    right = held_out.log_weights
    monkeypatch.setattr(held_out, "log_weights", lambda *args, **kw: right(*args, **{**kw, "backwards": False}))
    with pytest.raises(AssertionError, match="missed"):
        assert_law()


def test_broken_twin_without_the_row_s_own_energy_is_caught(monkeypatch):
    right = held_out.summarised
    monkeypatch.setattr(held_out, "summarised", lambda own, back, c: right(own.mean().expand_as(own), back, c))
    with pytest.raises(AssertionError, match="missed"):
        assert_law()


def test_broken_twin_base_without_its_normaliser_is_caught():
    class Careless(Tractable):
        event_shape = torch.Size((3,))
        support = constraints.boolean

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) - 0.3

        def sample(self, n, rng):
            return self.inner.sample(n, rng)

    system, base = small()
    common = {"kernel": SingleSiteGibbs(), "schedule": Schedule.linear(4), "chains": 20_000, "finish": 2}
    found = raise_lower_bound(system.energy, Careless(base), system.states, rng=generator(), **common)
    law = law_of_annealing(system, base, torch.cat((Schedule.linear(4).betas, torch.ones(2))).double())
    assert float(((found.log_prob - law.log()) / found.errors).abs().max()) > Z_LIMIT


def test_few_chains_that_count_warn():
    energy, base = Gaussian(20, scale=0.5), Gaussian(20, scale=3.0)
    rows = energy.sample(5, generator())
    with pytest.warns(RuntimeWarning, match="lower bounds still"):
        raise_lower_bound(
            energy, base, rows, rng=generator(), kernel=HMC(0.5, 5), schedule=Schedule.linear(3), finish=0
        )


def test_refusals():
    energy, base, rng = DoubleWell(), Gaussian(2), generator()
    rows = energy.sample(4, rng)
    with pytest.raises(ShapeError, match=r"\(2,\).*\(4, 3\)"):
        raise_lower_bound(energy, base, torch.zeros(4, 3), rng=rng)
    with pytest.raises(ShapeError, match="one or more"):
        raise_lower_bound(energy, base, rows[:0], rng=rng)
    with pytest.raises(ArgumentTypeError, match="floating-point"):
        raise_lower_bound(energy, base, rows.long(), rng=rng)
    with pytest.raises(ArgumentTypeError, match="tractable"):
        raise_lower_bound(energy, energy, rows, rng=rng)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="chains is 2 or more"):
        raise_lower_bound(energy, base, rows, rng=rng, chains=1)
    with pytest.raises(OptionError, match="unadjusted"):
        raise_lower_bound(energy, base, rows, rng=rng, kernel=ULA(0.1))
    half = Energy.of(lambda x: torch.where(x[:, 0] > 0, 0.5 * x.square().sum(1), torch.inf), event_shape=(2,))
    with pytest.raises(DivergenceError, match=r"not finite at 1 of 2 held-out rows"):
        raise_lower_bound(half, base, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), rng=rng)
    system, bits = small()
    with pytest.raises(DomainError, match="held-out rows"):
        raise_lower_bound(system.energy, bits, 0.3 + 0.0 * system.states, rng=rng, kernel=SingleSiteGibbs())
