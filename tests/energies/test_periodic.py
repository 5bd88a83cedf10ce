"""Energies on the torus: periodic to the bit of rounding, normalised, drawn right; tables of two angles."""

import math

import pytest
import torch

from gibbsian.energies.fourier import FourierTable
from gibbsian.energies.periodic import TURN, PeriodicMLP, VonMisesMixture, fit_von_mises_mixture
from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.domains import Wrapped
from gibbsian.kernels.langevin import MALA
from gibbsian.sampling import sample
from oracles import P_LIMIT, cell_masses, fit_p_value

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture():
    locs = torch.tensor([[-1.4, 2.6], [-1.2, -0.5], [1.0, 0.7]], dtype=F64)
    kappa = torch.tensor([[6.0, 4.0], [9.0, 9.0], [12.0, 8.0]], dtype=F64)
    return VonMisesMixture(locs, kappa, torch.tensor([0.55, 0.35, 0.1], dtype=F64))


def test_network_is_periodic_and_smooth_across_the_seam():
    torch.manual_seed(0)
    net = PeriodicMLP(3, (16, 16), harmonics=4).double()
    x = TURN.wrap(7.0 * torch.rand(50, 3, dtype=F64, generator=rng())).requires_grad_()
    turned = (x + 2 * math.pi * torch.tensor([1.0, -2.0, 3.0], dtype=F64)).detach().requires_grad_()
    torch.testing.assert_close(net(x), net(turned), rtol=1e-10, atol=1e-10)
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    (other,) = torch.autograd.grad(net(turned).sum(), turned)
    torch.testing.assert_close(slope, other, rtol=1e-8, atol=1e-8)
    assert net.support == PeriodicMLP.support
    assert repr(net) == "PeriodicMLP(3, hidden=(16, 16), harmonics=4)"


def test_kernels_walk_it_when_wrapped():
    torch.manual_seed(0)
    net = PeriodicMLP(2, (8,))
    found = sample(net, Wrapped(MALA(0.1), net.support), torch.zeros(8, 2), steps=20, rng=rng())
    assert bool(TURN.check(found.x).all())


def test_mixture_integrates_to_one_and_draws_follow_it():
    energy = mixture()
    masses = cell_masses(energy.log_prob, -math.pi, math.pi, 40)
    assert abs(float(masses.sum()) - 1.0) < 1e-9
    x = energy.sample(40_000, rng(1))
    assert bool(TURN.check(x).all())
    assert fit_p_value(x, masses, -math.pi, math.pi) > P_LIMIT
    # A broken twin: weights of two components exchanged.
    twin = VonMisesMixture(energy.locs, energy.concentrations, torch.tensor([0.35, 0.55, 0.1], dtype=F64))
    assert fit_p_value(twin.sample(40_000, rng(1)), masses, -math.pi, math.pi) < P_LIMIT


def test_mixture_is_recovered_from_weighted_rows():
    truth = mixture()
    x = truth.sample(20_000, rng(2))
    # Half of the rows of one part are taken out and the rest doubled in weight: nothing changes but the noise.
    left = x[:, 0] > 0.2
    keep = ~left | (torch.rand(len(x), generator=rng(3)) < 0.5)
    weights = torch.where(left, 2.0, 1.0)[keep]
    found = fit_von_mises_mixture(x[keep], 3, rng=rng(5), weights=weights, uniform=0.001)
    held = truth.sample(20_000, rng(9))
    assert float((found(held) - truth(held)).mean()) < 0.02
    unweighted = fit_von_mises_mixture(x[keep], 3, rng=rng(5), uniform=0.001)
    assert abs(float(unweighted.sample(20_000, rng(4))[:, 0].gt(0.2).double().mean()) - 0.1) > 0.03


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: PeriodicMLP(0), OptionError, "positive whole"),
        (lambda: PeriodicMLP(2, harmonics=0), OptionError, "harmonics"),
        (lambda: VonMisesMixture(torch.zeros(3)), ShapeError, r"\(K, d\)"),
        (lambda: VonMisesMixture(torch.zeros(3, 2), torch.ones(2, 2)), ShapeError, "concentrations"),
        (lambda: VonMisesMixture(torch.zeros(3, 2), -1.0), OptionError, "0 or more"),
        (lambda: VonMisesMixture(torch.zeros(2, 2), 1.0, torch.tensor([1.0, 0.0])), OptionError, "positive"),
        (lambda: fit_von_mises_mixture(torch.zeros(2, 2), 3, rng=rng()), OptionError, "number of rows"),
        (lambda: FourierTable(torch.zeros(4, 5)), ShapeError, "square"),
        (lambda: FourierTable(torch.zeros(5, 5), columns=(0, 0)), OptionError, "different columns"),
        (lambda: FourierTable(torch.full((5, 5), math.nan)), OptionError, "25 are not"),
    ],
)
def test_bad_input_is_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def on_grid(m):
    axis = -math.pi + 2 * math.pi * torch.arange(m, dtype=F64) / m
    return torch.meshgrid(axis, axis, indexing="ij")


def known(a, b):
    return 1.5 + torch.cos(a - 0.3) - 2.0 * torch.sin(2 * a + b) + 0.7 * torch.cos(3 * b)


def test_table_is_the_polynomial_it_was_made_of_with_its_slopes():
    energy = FourierTable(known(*on_grid(9)), columns=(2, 0), dim=3).double()
    x = (7.0 * torch.rand(40, 3, generator=rng(), dtype=F64)).requires_grad_()
    want = known(x[:, 2], x[:, 0])
    torch.testing.assert_close(energy(x), want, rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(energy(x).sum(), x)
    (true,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(slope, true, rtol=0, atol=1e-5)


def test_table_leaves_out_what_the_tolerance_allows():
    values = known(*on_grid(41)) + 1e-5 * torch.cos(15 * on_grid(41)[0])
    exact, short = FourierTable(values), FourierTable(values, tolerance=1e-3)
    assert len(short.orders) == 7
    assert len(exact.orders) == 41
    x = 3.0 * torch.rand(100, 2, generator=rng())
    assert float((exact(x) - short(x)).abs().max()) < 1e-3


def test_a_flow_of_circular_splines_is_normalised_and_drawn_right():
    pytest.importorskip("zuko", reason="zuko is not installed")
    from gibbsian.energies.torus_flow import circular_spline_flow

    torch.manual_seed(0)
    flow = circular_spline_flow(2, transforms=2, hidden=(16,)).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.4)
    assert flow.support is TURN
    masses = cell_masses(lambda x: flow.log_prob(x).detach(), -math.pi, math.pi, 24)
    assert abs(float(masses.sum()) - 1.0) < 2e-3
    x = flow.sample(20_000, rng(1))
    assert bool(TURN.check(x).all())
    assert fit_p_value(x, masses / masses.sum(), -math.pi, math.pi) > P_LIMIT
