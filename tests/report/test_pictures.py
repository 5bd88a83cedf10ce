"""What the figures show, below the drawing: levels, scales, blocks and limits."""

import math

import numpy as np
import pytest

from gibbsian.report.canvas import spread
from gibbsian.report.charts import _energy_range
from gibbsian.report.curves import _block, panels_of, series
from gibbsian.report.pictures import as_images, boltzmann, is_discrete, limits, mass_levels, spread_rows


def test_the_curves_of_a_normal_hold_half_and_nine_tenths_of_it():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200_000, 2))
    xs, ys, density, levels = mass_levels(*points.T, (-5, 5), (-5, 5), bins=100)
    for level, share in zip(sorted(levels), (0.9, 0.5)):
        radius = math.sqrt(-2 * math.log(1 - share))  # of the disc that holds the share
        area = (density >= level).sum() * (xs[1] - xs[0]) * (ys[1] - ys[0])
        # Smoothing with a tenth of the box widens the curves; it must stay well under the difference of the two.
        assert math.sqrt(area / math.pi) == pytest.approx(radius, rel=0.15)


def test_the_model_density_integrates_to_one_and_keeps_what_is_not_finite():
    xs, ys = np.linspace(-6, 6, 121), np.linspace(-7, 7, 141)
    energy = (xs[None, :] ** 2 + ys[:, None] ** 2) / 2 + 1000.0
    density = boltzmann(xs, ys, energy)
    assert density.max() == pytest.approx(1 / (2 * math.pi), rel=1e-6)
    energy[0, 0] = math.nan
    assert math.isnan(boltzmann(xs, ys, energy)[0, 0])


def test_images_keep_their_orientation():
    row = np.arange(6.0)
    assert as_images(row[None], (2, 3))[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert as_images(row.reshape(1, 1, 2, 3), (1, 2, 3))[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    colour = np.arange(12.0).reshape(1, 3, 2, 2)
    assert as_images(colour, (3, 2, 2))[0, 0, 1].tolist() == [1, 5, 9]


def test_far_sets_do_not_flatten_the_energy_axis():
    rng = np.random.default_rng(0)
    sets = {"training": rng.normal(size=500), "samples": rng.normal(size=500) + 1, "noise": rng.normal(size=500) + 900}
    low, high, far = _energy_range(sets)
    assert far == {"noise"}
    assert -5 < low < high < 6


def test_series_keep_gaps_and_read_strings_of_numbers():
    rows = [{"step": 0, "a": 1}, {"step": 1}, {"step": 2, "a": "NaN"}, {"step": 3, "a": "word"}]
    steps, values = series(rows, "a")
    assert steps.tolist() == [0, 2]
    assert values[0] == 1
    assert math.isnan(values[1])
    assert [p.keys for p in panels_of([{"step": 0, "loss": 1.0, "zeta": 2, "text": "x"}])] == [("loss",), ("zeta",)]
    assert _block(np.array([math.nan, 3.0, math.inf])) == (3.0, 3.0, 3.0)
    assert all(math.isnan(v) for v in _block(np.array([math.nan])))


def test_labels_are_moved_apart_and_stay_inside():
    moved = spread([0.5, 0.51, 0.99], 0.1, 0.0, 1.0)
    assert moved == sorted(moved)
    assert min(np.diff(moved)) >= 0.1 - 1e-12
    assert max(moved) <= 1.0


def test_rows_are_spread_evenly_and_columns_judged():
    assert spread_rows(np.arange(100), 5).tolist() == [0, 25, 50, 74, 99]
    assert is_discrete(np.tile([0.0, 1.0, 2.0], 50))
    assert not is_discrete(np.random.default_rng(0).normal(size=100))
    low, high = limits([np.tile([[0.0], [1.0]], (50, 1))], 0)
    assert (low, high) == pytest.approx((-0.6, 1.6))
