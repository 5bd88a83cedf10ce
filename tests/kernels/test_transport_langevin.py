"""Langevin dynamics with a clock: no noise before the onset, ULA from time 1 on."""

import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.transport import TransportLangevin, heat


def bowl(x):
    return 0.5 * x.square().flatten(1).sum(1)


def points(n=6, shape=(3,)):
    return torch.randn((n, *shape), generator=seeded(1), dtype=torch.float64)


def test_from_time_1_on_it_is_ula_to_the_bit():
    kernel, x = TransportLangevin(0.25, 0.5, 0.8), points()
    state = kernel.init_at(bowl, x, torch.ones(len(x)))
    ours = gb.sample(bowl, kernel, state, steps=7, rng=seeded(2)).x
    assert torch.equal(ours, gb.sample(bowl, gb.ULA(0.125), x, steps=7, rng=seeded(2)).x)


def test_its_draws_have_ulas_variance_and_not_another():
    """Of step size h and the energy x^2 / 2 it is 1 / (1 - h / 2); 6 standard errors of a variance."""
    kernel, n = TransportLangevin(0.5, 0.4, 0.8), 20_000
    x = gb.sample(bowl, kernel, torch.zeros(n, 1, dtype=torch.float64), steps=80, rng=seeded(3)).x
    assert float(x.var()) == pytest.approx(1 / 0.9, abs=6 * math.sqrt(2 / n) / 0.9)


def test_before_the_onset_it_follows_the_gradient():
    kernel, x = TransportLangevin(0.1, 2.0, 0.5), points()
    out = gb.sample(bowl, kernel, x, steps=5, rng=seeded(2))
    torch.testing.assert_close(out.x, x * 0.8**5)
    torch.testing.assert_close(out.state.memory[0], torch.full((6,), 0.5, dtype=torch.float64))
    # A step later the noise has set in.
    later = gb.sample(bowl, kernel, out.state, steps=2, rng=seeded(2))
    assert float((later.x - x * 0.8**7).abs().max()) > 0.01


def test_the_heat_rises_from_the_onset():
    t = torch.tensor([0.0, 0.79, 0.8, 0.9, 1.0, 3.0], dtype=torch.float64)
    want = {0.8: [0, 0, 0, 0.5, 1, 1], 0.0: [0, 0.79, 0.8, 0.9, 1, 1], 1.0: [0, 0, 0, 0, 1, 1]}
    for onset, values in want.items():
        torch.testing.assert_close(heat(t, onset), torch.tensor(values, dtype=torch.float64))


def test_a_run_goes_on_where_it_stopped_with_its_clocks():
    kernel, x = TransportLangevin(0.25, 0.1, 0.5), points(shape=(2, 3))
    rng = seeded(4)
    first = gb.sample(bowl, kernel, x, steps=4, rng=rng)
    both = gb.sample(bowl, kernel, first.state, steps=3, rng=rng)
    whole = gb.sample(bowl, kernel, x, steps=7, rng=seeded(4))
    assert torch.equal(both.x, whole.x)
    assert torch.equal(both.state.memory[0], whole.state.memory[0])


def test_a_chain_that_left_the_numbers_starts_again_with_its_clock():
    def cliff(x):
        return torch.where(x[:, 0] > 1.0, torch.inf, -5.0 * x[:, 0])

    x = torch.tensor([[0.0], [-9.0]], dtype=torch.float64)
    out = gb.sample(cliff, TransportLangevin(0.1, 1.0, 1.0), x, steps=3, rng=seeded())
    torch.testing.assert_close(out.x, torch.tensor([[0.0], [-7.5]], dtype=torch.float64))
    assert out.nonfinite.tolist() == [1.0, 0.0]
    torch.testing.assert_close(out.state.memory[0], torch.tensor([0.0, 0.3], dtype=torch.float64))


def test_one_graph_serves_all_times(graphs):
    kernel, x = TransportLangevin(0.25, 0.1, 0.5), points().float()
    out = gb.sample(bowl, kernel, x, steps=8, rng=seeded(), compile=True)
    assert graphs() == 1
    torch.testing.assert_close(out.x, gb.sample(bowl, kernel, x, steps=8, rng=seeded()).x)
    gb.sample(bowl, TransportLangevin(0.2, 0.3, 0.8), x, steps=8, rng=seeded(), compile=True)
    assert graphs() == 0


def test_it_can_be_saved(tmp_path):
    kernel = TransportLangevin(0.02, 0.3, 0.7)
    assert gb.load_kernel(gb.save_kernel(kernel, tmp_path / "kernel.safetensors")) == kernel


def test_what_does_not_fit_is_refused():
    for options in ((0.0, 0.1, 0.5), (0.1, -1.0, 0.5), (0.1, 0.1, 1.2), (0.1, 0.1, -0.1), (0.1, 0.1, math.nan)):
        with pytest.raises(OptionError):
            TransportLangevin(*options)
    x = points()
    state = gb.ULA(0.1).init(bowl, x)
    with pytest.raises(ArgumentTypeError, match="another kernel"):
        gb.sample(bowl, TransportLangevin(), state, steps=1, rng=seeded())
