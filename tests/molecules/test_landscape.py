"""Landscapes of densities that are known: weights, bands that cover, basins, divergences, learned energies."""

import math

import pytest
import torch

from gibbsian.energies.fourier import FourierTable
from gibbsian.energies.periodic import TURN, VonMisesMixture
from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.molecules.basins import (
    BASINS,
    basin_differences,
    basin_weights,
    block_length,
    differences,
    in_range,
    learned_basins,
)
from gibbsian.molecules.landscape import (
    cell_centres,
    cell_of,
    divergence,
    free_energy,
    free_energy_band,
    histogram,
    learned_masses,
    profile,
    resampled_maps,
)
from gibbsian.molecules.reweighting import (
    bias_log_weights,
    block_bootstrap,
    checked_weights,
    correlation_time,
    effective_sample_size,
    normalised_weights,
    resampled_rows,
    temperature_log_weights,
    weighted_average,
)
from gibbsian.molecules.thermal import thermal_energy
from gibbsian.molecules.torsion_settings import TorsionTraining
from gibbsian.molecules.torsion_training import fit_torsion_energy, log_z_of

KT = thermal_energy(300.0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def truth():
    locs = torch.tensor([[-80.0, 150.0], [-150.0, 155.0], [-80.0, -10.0], [60.0, 40.0]])
    kappa = torch.tensor([[6.0, 6.0], [5.0, 5.0], [6.0, 4.0], [8.0, 6.0]])
    return VonMisesMixture(torch.deg2rad(locs), kappa, torch.tensor([0.35, 0.25, 0.35, 0.05]))


def persistent(n, tau, seed):
    """Draws of the truth each of which stays for some frames, of a correlation time of about ``tau``."""
    g = rng(seed)
    fresh = torch.rand(n, generator=g) < 2.0 / (tau + 1.0)
    fresh[0] = True
    return truth().sample(n, g)[torch.cummax(torch.where(fresh, torch.arange(n), 0), 0).values]


def test_weights_take_temperature_and_bias_out():
    """A harmonic oscillator simulated at 450 K and under a bias, reweighted to 300 K."""
    k, hot, cold, n = 40.0, 450.0, 300.0, 200_000
    offset = 3.0
    # Under the bias -offset * x the oscillator's centre is at offset / k.
    x = offset / k + math.sqrt(thermal_energy(hot) / k) * torch.randn(n, generator=rng(), dtype=torch.float64)
    energy, bias = 0.5 * k * x.square(), -offset * x
    log_w = bias_log_weights(bias, hot) + temperature_log_weights(energy, hot, cold)
    w = normalised_weights(log_w, fewest=50)
    for value, known in ((x, 0.0), (x.square(), thermal_energy(cold) / k), (energy, 0.5 * thermal_energy(cold))):
        found = weighted_average(value, w)
        assert abs(found.value - known) < 4.5 * found.stderr
        assert found.stderr < 0.02 * float(value.std())
    assert 0.3 * n < effective_sample_size(w) < n
    # Broken twins: the sign of the bias, and the direction of the temperature.
    for twin in (
        -bias_log_weights(bias, hot) + temperature_log_weights(energy, hot, cold),
        bias_log_weights(bias, hot) + temperature_log_weights(energy, cold, hot),
    ):
        found = [weighted_average(v, normalised_weights(twin)) for v in (x, x.square())]
        known = [0.0, thermal_energy(cold) / k]
        assert max(abs(f.value - v) / f.stderr for f, v in zip(found, known)) > 10


def test_weights_that_are_none_or_worth_too_little_are_refused():
    with pytest.raises(DataError, match=r"worth 1\.0 frames of equal weight, fewer than 50"):
        normalised_weights(torch.tensor([0.0, -100.0, -100.0]), fewest=50)
    with pytest.raises(DataError, match="at least one"):
        normalised_weights(torch.tensor([-math.inf, -math.inf]))
    with pytest.raises(DataError, match="1 of 3"):
        checked_weights([1.0, -1.0, 1.0], 3)
    with pytest.raises(ShapeError, match="Were frames left out"):
        checked_weights([1.0, 1.0], 3)


def test_rows_drawn_by_weight_come_as_often_as_they_weigh():
    w = torch.tensor([0.0, 3.0, 1.0, 0.5])
    counts = torch.bincount(resampled_rows(w, 1000, rng()), minlength=4)
    torch.testing.assert_close(counts.double(), 1000 * w.double() / w.sum(), rtol=0, atol=1.0)


def test_correlation_time_of_a_known_series():
    a = 0.9
    x, noise = torch.zeros(40_000, dtype=torch.float64), torch.randn(40_000, generator=rng(), dtype=torch.float64)
    for t in range(1, len(x)):
        x[t] = a * x[t - 1] + noise[t]
    assert abs(correlation_time(x[:, None]) - (1 + a) / (1 - a)) < 3.0
    assert correlation_time(noise[:, None]) < 1.3
    assert correlation_time(torch.zeros(100, 1)) == 1.0


def test_maps_cells_and_ranges():
    x = torch.tensor([[-math.pi, -math.pi], [math.pi - 1e-4, 0.0], [3 * math.pi - 1e-4, 0.0]])
    assert cell_of(x).tolist() == [0, 35 * 36 + 18, 35 * 36 + 18]
    assert in_range(torch.deg2rad(torch.tensor([170.0, -170.0, 0.0])), 160.0, -160.0).tolist() == [True, True, False]
    y = truth().sample(1000, rng())
    assert float(histogram(y).sum()) == pytest.approx(1.0)
    assert int(sum(b.holds(y).long() for b in BASINS).min()) == 1
    assert float(basin_weights(y).sum()) == pytest.approx(1.0)
    with pytest.raises(ShapeError, match=r"\(n, 2\)"):
        cell_of(torch.zeros(3, 3))


def test_masses_of_an_energy_are_those_of_its_density():
    energy = truth()
    masses = learned_masses(lambda x: energy(x) + 7.0)
    fine = learned_masses(energy, 36, 12)
    torch.testing.assert_close(masses, fine, rtol=0.01, atol=1e-6)
    x = energy.sample(200_000, rng())
    assert divergence(histogram(x), masses) < 3 * 1296 / 2 / len(x)
    torch.testing.assert_close(basin_weights(x), learned_basins(energy), rtol=0, atol=0.006)
    assert abs(log_z_of(energy)) < 1e-5
    # phi lies along the first axis: its profile is that of the first column.
    along = profile(masses, 0)
    counts = torch.bincount(((x[:, 0] + math.pi) * 36 / (2 * math.pi)).long(), minlength=36) / len(x)
    torch.testing.assert_close(along, counts.double(), rtol=0, atol=0.005)


def test_divergence_of_a_known_pair_and_its_pseudocount():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.0])
    assert divergence(p, q) == pytest.approx(0.5 * math.log(4 / 3))
    assert divergence(p, torch.tensor([1.0, 0.0, 0.0])) == math.inf
    assert divergence(p, torch.tensor([1.0, 0.0, 0.0]), 1e-3) < 5.0
    with pytest.raises(ShapeError, match="one grid"):
        divergence(p, q[:2])
    assert free_energy(p, KT).tolist() == [0.0, 0.0, math.inf]


def test_basin_errors_cover_the_truth_for_correlated_frames():
    """Of 60 series of correlated frames, the basin's difference is within two errors of the truth as often as due."""
    known = differences(learned_basins(truth()), KT)
    within = {"blocks": 0, "single frames": 0}
    for seed in range(60):
        x = persistent(4000, 30.0, seed)
        for name, block in (("blocks", None), ("single frames", 1)):
            if name == "blocks":
                found = list(basin_differences(x, None, KT, rng=rng(seed), block=block, resamples=60).kj_mol.values())[
                    1
                ]
                value, error = found
            else:
                # A broken twin: frames resampled one by one.
                inside = BASINS[1].holds(x).double()
                drawn = block_bootstrap(lambda c, i=inside: (c * i).sum() / c.sum(), len(x), 1, 60, rng(seed))
                spread = differences(torch.stack((drawn, 1 - drawn), 1), KT)[:, 0]
                value, error = (
                    float(differences(torch.stack((inside.mean(), 1 - inside.mean())), KT)[0]),
                    float(spread.std()),
                )
            within[name] += abs(value - float(known[1])) < 2 * error
    assert within["blocks"] >= 51
    assert within["single frames"] < 40


def test_bands_cover_profiles():
    known = free_energy(profile(learned_masses(truth()), 1), KT)
    inside, single, places = 0, 0, known < 10.0
    for seed in range(20):
        x = persistent(6000, 10.0, 100 + seed)
        maps = resampled_maps(x, None, rng=rng(seed), block=50, resamples=100)
        p, q = profile(histogram(x), 1), profile(maps, 1)
        band = free_energy_band(p, q, KT, 0.9)
        # Probabilities are normalised, so that nothing but the display's zero is free.
        zero = float((-KT * p.log()).min())
        true = -KT * profile(learned_masses(truth()), 1).log()
        inside += int(((band.lower + zero <= true) & (true <= band.upper + zero))[places].sum())
        single += int(((band.value - band.lower).abs() < 1e-9)[places].sum())
    assert 0.82 < inside / (20 * int(places.sum())) < 0.98
    assert single == 0
    with pytest.raises(OptionError, match="level"):
        free_energy_band(p, q, KT, 1.0)


def test_basins_never_visited_have_no_error_made_up():
    x = torch.rand(500, 2, generator=rng()) * torch.tensor([-3.0, 3.0])
    found = basin_differences(x, None, KT, rng=rng())
    left = found.kj_mol["left-handed - rest"]
    assert math.isnan(left.value)
    assert math.isnan(left.stderr)
    assert found.populations["left-handed"].value == 0.0


def test_bootstrap_options():
    with pytest.raises(OptionError, match="blocks of 1 to 10"):
        block_bootstrap(lambda c: c.sum(), 10, 11, 20, rng())
    counts = block_bootstrap(lambda c: c, 100, 7, 300, rng())
    assert bool((counts.sum(1) == 100).all())
    torch.testing.assert_close(counts.mean(0), torch.ones(100, dtype=torch.float64), rtol=0, atol=0.25)


FAST = {"hidden": (32, 32), "members": 1, "replicates": 0}


@pytest.fixture(scope="module")
def rows():
    return truth().sample(6000, rng(3))


@pytest.mark.parametrize("objective", ["exact", "nce", "pcd"])
def test_energies_recover_a_known_density(rows, objective):
    settings = TorsionTraining(objective, steps=(300,), batch_size=256, learning_rate=8e-3, **FAST)
    found = fit_torsion_energy(rows, None, settings, rng=rng(1))
    p, q = learned_masses(truth()), learned_masses(found.energy)
    assert divergence(p, q) < {"exact": 0.03, "nce": 0.05, "pcd": 0.12}[objective]
    gap = (differences(learned_basins(found.energy), KT) - differences(learned_basins(truth()), KT)).abs()
    assert float(gap[:2].max()) < {"exact": 0.5, "nce": 0.7, "pcd": 1.5}[objective]


@pytest.mark.slow
def test_a_flow_serves_as_noise(rows):
    pytest.importorskip("zuko", reason="zuko is not installed")
    settings = TorsionTraining("nce", noise="flow", steps=(500,), batch_size=256, learning_rate=6e-3, **FAST)
    found = fit_torsion_energy(rows, None, settings, rng=rng(1))
    assert divergence(learned_masses(truth()), learned_masses(found.energy)) < 0.05


@pytest.mark.parametrize("objective", ["denoising", "score"])
def test_scores_of_energies_recover_those_of_a_known_density(rows, objective):
    """Score matching knows slopes, of the density smoothed by its noise, and basins' masses badly."""
    settings = TorsionTraining(objective, steps=(500,), batch_size=256, learning_rate=6e-3, sigma=0.2, **FAST)
    found = fit_torsion_energy(rows, None, settings, rng=rng(1))
    x = truth().sample(2000, rng(8)).requires_grad_()
    (mine,) = torch.autograd.grad(found.energy(x).sum(), x)
    (known,) = torch.autograd.grad(truth()(x).sum(), x)
    error = float((mine - known).square().sum(1).mean() / known.square().sum(1).mean())
    assert error < 0.25
    assert float((-mine - known).square().sum(1).mean() / known.square().sum(1).mean()) > 2.0


def test_weights_and_a_known_bias_both_lead_to_the_unbiased_energy(rows):
    """Frames drawn under a bias that fills the basins."""
    axis = -math.pi + 2 * math.pi * torch.arange(24) / 24
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    bias = FourierTable(1.5 * torch.cos(b - 2.6) + 1.0 * torch.cos(a + 1.4))
    flat = torch.rand(400_000, 2, generator=rng(5)) * (2 * math.pi) - math.pi
    mass = (-truth()(flat) - bias(flat)).double().softmax(0)
    x = flat[resampled_rows(mass, 8000, rng(6))]
    x = x[torch.randperm(len(x), generator=rng(7))]
    p = learned_masses(truth())
    settings = TorsionTraining("exact", steps=(500,), batch_size=256, learning_rate=6e-3, **FAST)
    by_bias = fit_torsion_energy(x, None, settings, rng=rng(1), bias=bias)
    by_weights = fit_torsion_energy(x, bias(x).double().exp(), settings, rng=rng(1))
    neither = fit_torsion_energy(x, None, settings, rng=rng(1))
    assert divergence(p, learned_masses(by_bias.energy)) < 0.04
    assert divergence(p, learned_masses(by_weights.energy)) < 0.04
    assert divergence(p, learned_masses(neither.energy)) > 0.2


def test_training_stops_before_it_learns_noise_by_heart():
    x = truth().sample(300, rng(11))
    settings = TorsionTraining(steps=(300, 1000), members=1, replicates=1)
    told = []
    found = fit_torsion_energy(x, None, settings, rng=rng(1), progress=told.append)
    assert found.steps == 300
    assert found.scores[1000] > found.scores[300] + 0.05
    assert len(found.replicates) == 1
    assert told[0] == "choosing how long to train: 300 steps, part 1 of 2"
    assert told[-1] == "training on resample 1 of 1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "mle"}, "objective of torsions named 'mle'"),
        ({"noise": "white"}, "noise of torsions named 'white'"),
        ({"members": 0}, "1 or more members"),
        ({"steps": (400, 200)}, "ascending"),
        ({"sigma": 0.0}, "positive"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        TorsionTraining(**options)


def test_rows_that_cannot_be_learned_from_are_refused():
    with pytest.raises(ShapeError, match=r"\(n, d\)"):
        fit_torsion_energy(torch.zeros(100), rng=rng())
    with pytest.raises(DataError, match="1 of 100 frames have torsions that are NaN"):
        fit_torsion_energy(torch.cat((torch.zeros(99, 2), torch.full((1, 2), math.nan))), rng=rng())
    with pytest.raises(DataError, match=r"worth 20\.0 of equal weight"):
        fit_torsion_energy(torch.zeros(20, 2), rng=rng())


def test_blocks_grow_with_correlation():
    w = checked_weights(None, 4000)
    assert block_length(persistent(4000, 30.0, 0), w) > 3 * block_length(truth().sample(4000, rng()), w)
    assert float(cell_centres(4)[0]) == pytest.approx(-0.75 * math.pi)
    assert TURN.period == pytest.approx(2 * math.pi)
