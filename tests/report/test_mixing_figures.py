"""Figures of chains: what they show, of which coordinates and chains, and what they refuse."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.diagnostics.chains import autocorrelation
from gibbsian.errors import OptionError, ShapeError
from gibbsian.report.mixing import autocorrelation_figure, rank_figure, trace_figure

FIGURES = {"trace": trace_figure, "rank": rank_figure, "autocorrelation": autocorrelation_figure}


def noise(*shape):
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def panels(figure):
    """Axes with a coordinate's name, by name."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def key(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def drawn(figure):
    """Render; RGB of every pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def heights(axes):
    """Histogram of each chain in a rank panel."""
    return [patch.get_data().values for patch in axes.patches if not patch.get_fill()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("shape", [(100, 4), (100, 1, 1), (101, 2, 3), (40, 512, 2, 2), (4, 3, 2), (5, 1)])
def test_every_shape_of_draws_can_be_drawn(figure, shape):
    made = FIGURES[figure](noise(*shape))
    assert len(panels(made)) == min(4, int(np.prod(shape[2:])))
    assert len(np.unique(drawn(made))) > 10


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure", FIGURES)
def test_broken_chains_are_drawn_too(figure):
    x = noise(60, 8, 5)
    x[:, :, 0] = 2.0
    x[:, 1, 1] = 2.0
    x[30:, 2, 2] = torch.nan
    x[:, :, 3] = torch.inf
    x[:, :, 4] = (x[:, :, 4] > 0).double()
    for draws in (x, x[:, :3]):
        made = FIGURES[figure](draws, range(5))
        drawn(made)
        assert list(panels(made)) == [f"x[{i}]" for i in range(5)]
    said = " ".join(text.get_text() for axes in made.axes for text in axes.texts)
    assert "finite" in said


def test_the_worst_coordinates_are_chosen_and_named_ones_kept():
    x = noise(200, 4, 3, 4)
    x[:, :, 1, 2] = x[:, :, 1, 2].cumsum(0)
    x[:, :, 2, 0] = x[:, :, 2, 0].cumsum(0)
    for figure in FIGURES.values():
        assert list(panels(figure(x, most=2))) == ["x[1,2]", "x[2,0]"]
        assert list(panels(figure(x, [(0, 1)]))) == ["x[0,1]"]
    title = panels(trace_figure(x, [(1, 2)]))["x[1,2]"].get_title(loc="right")
    assert title.startswith(("R-hat 1.", "R-hat 2."))


def test_a_trace_shows_the_draws_of_each_of_a_few_chains():
    x = noise(50, 3)
    figure = trace_figure(x)
    lines = panels(figure)["x"].lines
    assert key(figure) == ["chain 0", "chain 1", "chain 2"]
    for chain, line in enumerate(lines):
        np.testing.assert_array_equal(line.get_ydata(), x[:, chain].numpy())
        assert line.get_xdata()[0] == 1


def test_of_many_chains_the_extremes_are_shown_over_a_band():
    x = noise(50, 100)
    x[:, 17] += 3.0
    x[:, 60] -= 3.0
    figure = trace_figure(x)
    assert key(figure) == ["nine tenths of 100 chains", "lowest mean", "middle mean", "highest mean"]
    lines = panels(figure)["x"].lines
    np.testing.assert_array_equal(lines[0].get_ydata(), x[:, 60].numpy())
    np.testing.assert_array_equal(lines[2].get_ydata(), x[:, 17].numpy())
    low, high = panels(figure)["x"].get_ylim()
    assert low < float(x[:, 60].min())
    assert high > float(x[:, 17].max())


def test_heavy_tails_do_not_flatten_a_trace():
    x = torch.tan(noise(400, 4))
    low, high = panels(trace_figure(x))["x"].get_ylim()
    q05, q95 = torch.quantile(x, torch.tensor([0.05, 0.95], dtype=x.dtype)).tolist()
    assert high - low < 5 * (q95 - q05) < float(x.max() - x.min())


def outside(axes):
    """Share of bins of any chain that leave the band of chains that agree."""
    band = next(patch for patch in axes.patches if patch.get_fill()).get_data()
    return float(np.mean([(h > band.values) | (h < band.baseline) for h in heights(axes)]))


def test_ranks_are_even_for_chains_that_agree_and_lie_in_their_band():
    axes = panels(rank_figure(noise(4000, 4), bins=20))["x"]
    assert np.mean(heights(axes), axis=0) == pytest.approx(np.ones(20))
    # About one in twenty of 80 bins leaves two standard errors; eighteen would be a chance of 1 in 10^7.
    assert outside(axes) < 18 / 80


@pytest.mark.parametrize(("change", "shape"), [("shift", "slope"), ("spread", "bowl")])
def test_ranks_show_a_chain_that_sits_elsewhere_or_is_wider(change, shape):
    x = noise(4000, 4)
    x[:, 2] = x[:, 2] + 1.0 if change == "shift" else x[:, 2] * 3.0
    axes = panels(rank_figure(x))["x"]
    odd = heights(axes)[2]
    assert odd[-1] > 2.0
    assert (odd[0] < 0.5) if shape == "slope" else (odd[0] > 2.0 and odd[10] < 0.7)
    assert outside(axes) > 0.3


def test_the_rank_band_knows_that_draws_are_correlated():
    """Slow chains stray further from even; a band for independent draws would call them wrong."""
    x = noise(4000, 4)
    for t in range(1, 4000):
        x[t] = 0.95 * x[t - 1] + (1 - 0.95**2) ** 0.5 * x[t]
    axes = panels(rank_figure(x, bins=10))["x"]
    assert outside(axes) < 0.25
    independent = 2 * np.sqrt(0.9 / (0.1 * 4000) * 0.75)
    assert np.mean([np.abs(h - 1) > independent for h in heights(axes)]) > 0.5


def test_one_chain_is_compared_by_its_halves():
    figure = rank_figure(noise(400, 1) + torch.linspace(0, 2, 400)[:, None])
    assert key(figure) == ["first half", "second half"]
    first, second = heights(panels(figure)["x"])
    assert first[0] > 1.5 > 0.5 > second[0]


def test_the_rank_figure_of_many_chains_shows_those_furthest_from_even():
    x = noise(200, 64)
    x[:, 40] += 3.0
    figure = rank_figure(x)
    assert key(figure)[1] == "furthest from even"
    assert len(heights(panels(figure)["x"])) == 3
    assert heights(panels(figure)["x"])[0][-1] > 5.0


def test_autocorrelations_are_those_of_the_chains_and_their_mean():
    x = noise(300, 3)
    lines = panels(autocorrelation_figure(x, lags=15))["x"].lines
    rho = autocorrelation(x).numpy()[:16]
    for chain in range(3):
        np.testing.assert_allclose(lines[chain].get_ydata(), rho[:, chain])
    np.testing.assert_allclose(lines[3].get_ydata(), rho.mean(axis=1))


def test_slow_chains_get_more_lags_and_chains_apart_do_not():
    slow = noise(2000, 4).cumsum(0)
    ends = [panels(autocorrelation_figure(x))["x"].get_xlim()[1] for x in (noise(2000, 4), slow)]
    assert ends[0] == 20
    assert 500 < ends[1] <= 1000
    apart = noise(2000, 4) + 5 * torch.arange(4)
    assert panels(autocorrelation_figure(apart))["x"].get_xlim()[1] == 20


@pytest.mark.parametrize("figure", FIGURES)
def test_samples_are_taken_with_their_draws_and_refused_without(figure):
    energy = gb.Gaussian(2)
    options = {"steps": 30, "rng": seeded()}
    kept = gb.sample(energy, gb.MALA(0.5), torch.zeros(3, 2), thin=1, **options)
    assert len(panels(FIGURES[figure](kept))) == 2
    with pytest.raises(OptionError, match="this run kept none; use sample"):
        FIGURES[figure](gb.sample(energy, gb.MALA(0.5), torch.zeros(3, 2), **options))


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    ("draws", "options", "error", "message"),
    [
        (noise(3, 2), {}, ShapeError, r"four draws or more.* got \(3, 2\)"),
        (noise(9), {}, ShapeError, r"got \(9,\)"),
        (noise(9, 2, 3), {"coordinates": [3]}, OptionError, r"no coordinate \[3\] in events of shape \(3,\)"),
        (noise(9, 2, 3), {"coordinates": [(0, 1)]}, OptionError, r"no coordinate \[0, 1\]"),
        (noise(9, 2, 3), {"coordinates": []}, OptionError, "one coordinate or more"),
        (noise(9, 2, 3), {"most": 0}, OptionError, "got most=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(figure, draws, options, error, message):
    with pytest.raises(error, match=message):
        FIGURES[figure](draws, **options)


def test_bins_and_lags_out_of_range_are_refused():
    with pytest.raises(OptionError, match="bins is 2 or more; got 1"):
        rank_figure(noise(9, 2), bins=1)
    with pytest.raises(OptionError, match=r"lags lies between 1 and 8.*got 9"):
        autocorrelation_figure(noise(9, 2), lags=9)


ALONE = """
import sys, torch
import gibbsian.report.mixing as mixing
assert "matplotlib" not in sys.modules
import matplotlib
settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}  # asking loads pyplot
before = settings()
figure = mixing.trace_figure(torch.randn(20, 2, 3))
figure.savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert before == settings()
"""


def test_pyplot_and_the_settings_of_matplotlib_are_left_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "a.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 5000
