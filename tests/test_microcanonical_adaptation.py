"""Tuned microcanonical chains: the error in energy they reach, the length they take, and what is refused."""

import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.microcanonical import MCLMC
from gibbsian.microcanonical_adaptation import (
    ENERGY_VARIANCE,
    EnergyErrors,
    autocorrelation_time,
    spread,
    tune_mclmc,
    variance_per_coordinate,
)

SPREAD = torch.logspace(-1, 0, 50, dtype=torch.float64)
TARGETS = {
    "round": gb.Gaussian(loc=torch.zeros(50, dtype=torch.float64)),
    "long": gb.Gaussian(loc=torch.zeros(50, dtype=torch.float64), scale=SPREAD),
}


def fresh(energy, kernel, steps=200):
    """Draws of 200 chains that start as exact ones."""
    return gb.sample(energy, kernel, energy.sample(200, seeded(8)), steps=steps, rng=seeded(9), thin=1)


@pytest.mark.parametrize("first", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("name", TARGETS)
def test_the_variance_is_reached_from_any_first_step_size(name, first):
    """Measured: within 20 % with 16 chains; a step size wrong by 10 % would be a factor of 1.8."""
    energy = TARGETS[name]
    start = torch.randn((16, 50), generator=seeded(1), dtype=torch.float64)
    tuned = tune_mclmc(energy, MCLMC(first, 3.0), start, rng=seeded(), steps=1000)
    assert 0.65 < variance_per_coordinate(fresh(energy, tuned.kernel)) / ENERGY_VARIANCE < 1.5
    assert type(tuned.kernel.step_size) is type(tuned.kernel.length) is float
    assert (tuned.acceptance, tuned.stderr) == (1.0, 0.0)
    assert len(tuned.step_sizes) == 100


def test_the_variances_are_right_within_the_bias_that_goes_with_it():
    """Root mean square over coordinates of their relative errors; measured: 0.021."""
    energy = TARGETS["long"]
    tuned = tune_mclmc(energy, MCLMC(1.0, 3.0), energy.sample(16, seeded(1)), rng=seeded())
    out = fresh(energy, tuned.kernel, steps=400)
    off = (out.draws[100:] / SPREAD).square().mean((0, 1)) - 1.0
    assert float(off.square().mean().sqrt()) < 0.03
    finer = tune_mclmc(energy, MCLMC(1.0, 3.0), energy.sample(16, seeded(1)), rng=seeded(), energy_variance=5e-6)
    assert 0.65 < variance_per_coordinate(fresh(energy, finer.kernel)) / 5e-6 < 1.5


def test_the_length_is_near_the_best():
    """Fewest effective draws of coordinates and their squares: much shorter lengths, and much longer, mix worse."""
    energy = TARGETS["long"]
    kernel = tune_mclmc(energy, MCLMC(1.0, 100.0), energy.sample(16, seeded(1)), rng=seeded(), steps=1000).kernel

    def efficiency(factor):
        made = MCLMC(kernel.step_size, factor * kernel.length)
        draws = gb.sample(energy, made, energy.sample(50, seeded(8)), steps=300, rng=seeded(9), thin=1).draws[..., ::7]
        return min(float(gb.effective_sample_size(x, ranked=False).min()) for x in (draws, draws**2))

    best = efficiency(1.0)
    assert best > 1.5 * efficiency(0.1)
    assert best > 1.5 * efficiency(30.0)


def test_a_scale_is_kept_and_lengths_are_counted_in_round_coordinates():
    energy = TARGETS["long"]
    start = energy.sample(64, seeded(1))
    scaled = tune_mclmc(energy, MCLMC(1.0, 3.0, scale=SPREAD), start, rng=seeded(), steps=400).kernel
    plain = tune_mclmc(TARGETS["round"], MCLMC(1.0, 3.0), start / SPREAD, rng=seeded(), steps=400).kernel
    assert scaled.scale is SPREAD
    assert scaled.step_size == pytest.approx(plain.step_size, rel=1e-6)
    assert scaled.length == pytest.approx(plain.length, rel=1e-6)


def test_the_spread_is_the_root_of_the_sum_of_variances():
    factor = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
    y = torch.randn((5, 400, 2), generator=seeded(), dtype=torch.float64)
    expected = float(y.flatten(0, 1).var(0).sum().sqrt())
    assert spread(y, None) == pytest.approx(expected)
    assert spread(y @ factor.T, factor) == pytest.approx(expected)
    assert spread(y * factor[0, 0], torch.full((2,), 2.0)) == pytest.approx(expected)


def test_the_autocorrelation_time_of_a_known_chain():
    """That of x' = 0.8 x + 0.6 z is (1 + 0.8) / (1 - 0.8) = 9."""
    rng, x, draws = seeded(), torch.randn((200, 4), generator=seeded(1), dtype=torch.float64), []
    for _ in range(500):
        x = 0.8 * x + 0.6 * torch.randn((200, 4), generator=rng, dtype=torch.float64)
        draws.append(x)
    assert autocorrelation_time(torch.stack(draws)) == pytest.approx(9.0, rel=0.1)
    # Chains that have not met cannot show a longer time than their own.
    apart = torch.stack(draws)[:20] + 100.0 * torch.arange(200)[:, None]
    assert 9.0 < autocorrelation_time(apart) <= 20.0


def found(power=6.0, noise=0.3, start=3.0):
    """Run the recursion on v = 2 h^power with log-normal noise of mean one, for 200 rounds."""
    search, rng = EnergyErrors(math.log(start), 5e-4), seeded()
    for _ in range(200):
        z = float(torch.randn((), generator=rng))
        search.update(2.0 * math.exp(power * search.log_h + noise * z - noise**2 / 2))
    return 2.0 * math.exp(power * search.log_h) / 5e-4


@pytest.mark.parametrize("start", [0.05, 0.25, 3.0])
def test_the_recursion_finds_the_root_of_a_known_curve(start):
    assert found(start=start, noise=0.0) == pytest.approx(1.0, abs=0.01)
    # Noise does not pull it to one side, as averaging logarithms would, by exp(noise^2 / 2) = 1.6.
    assert found(start=start, noise=1.0) == pytest.approx(1.0, abs=0.3)


def test_rounds_that_left_the_numbers_shorten_the_step():
    search = EnergyErrors(0.0, 5e-4)
    search.update(math.inf)
    assert search.log_h == pytest.approx(-math.log(2.0))
    assert search.rounds == 0


def test_most_of_a_round_must_be_numbers():
    energy = TARGETS["round"]
    made = gb.sample(energy, MCLMC(1.0, 3.0), energy.sample(4, seeded()), steps=5, rng=seeded(), thin=1)
    whole = variance_per_coordinate(made)
    assert whole == pytest.approx(float(made.kept["energy_change"].square().mean() / 50))
    made.kept["energy_change"][0] = torch.nan
    assert variance_per_coordinate(made) == pytest.approx(float(made.kept["energy_change"][1:].square().mean() / 50))
    made.kept["energy_change"][:3] = torch.nan
    assert variance_per_coordinate(made) == math.inf


def test_the_result_is_reproducible_goes_on_and_counts_its_steps():
    energy, made = TARGETS["long"], []
    tuned = tune_mclmc(
        energy, MCLMC(1.0, 3.0), energy.sample(4, seeded()), rng=seeded(), steps=90, progress=made.append
    )
    again = tune_mclmc(energy, MCLMC(1.0, 3.0), energy.sample(4, seeded()), rng=seeded(), steps=90)
    assert tuned.kernel == again.kernel
    assert torch.equal(tuned.state.x, again.state.x)
    assert sum(made) == 100
    assert gb.sample(energy, tuned.kernel, tuned.state, steps=5, rng=seeded()).x.shape == (4, 50)
    assert tune_mclmc(energy, tuned.kernel, tuned.state, rng=seeded(), steps=80).kernel.step_size > 0


def test_images_and_one_graph(graphs):
    energy = gb.Energy.of(lambda x: 0.5 * x.square().sum((1, 2, 3)), (1, 3, 4))
    start = torch.randn((8, 1, 3, 4), generator=seeded(), dtype=torch.float64)
    compiled, eager = (
        tune_mclmc(energy, MCLMC(1.0, 3.0), start, rng=seeded(), steps=80, compile=compile).kernel
        for compile in (True, False)
    )
    # A block as adaptation makes them, and a longer run is made of the same.
    assert graphs() == 1
    assert compiled.step_size == pytest.approx(eager.step_size, rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "options", "error", "message"),
    [
        (gb.MALA(0.1), {}, ArgumentTypeError, r"of an MCLMC kernel, as MCLMC\(0.1, 1.0\); got MALA"),
        (MCLMC, {}, ArgumentTypeError, "of an MCLMC kernel"),
        (MCLMC(0.1, 1.0), {"steps": 79}, OptionError, "steps is 80 or more.*; got 79"),
        (MCLMC(0.1, 1.0), {"energy_variance": 0.0}, OptionError, "energy_variance is a positive number.*; got 0.0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(kernel, options, error, message):
    with pytest.raises(error, match=message):
        tune_mclmc(lambda x: x.square().sum(1), kernel, torch.zeros(4, 2), rng=seeded(), **options)


def test_flat_energies_and_energies_without_numbers_have_no_step_size():
    with pytest.raises(DivergenceError, match=r"gave 0\. A flat energy makes none at any size"):
        tune_mclmc(lambda x: 0.0 * x.sum(1), MCLMC(0.1, 1.0), torch.zeros(8, 2), rng=seeded())
    start = torch.randn((8, 2), generator=seeded())
    with pytest.raises(DivergenceError, match=r"gave inf.*NaN or infinity"):
        tune_mclmc(
            lambda x: torch.where((x == start).all(1), x.square().sum(1), torch.nan),
            MCLMC(0.1, 1.0),
            start,
            rng=seeded(),
        )
