"""Targets: each density integrates to one, its draws follow it, and its log Z is the integral's."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import integrate

from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell, Funnel, GaussianMixture, ManyWell, Quantiles
from gibbsian.energies.toys import Checkerboard, EightGaussians, Pinwheel, Ring, Rosenbrock, TwoMoons
from gibbsian.errors import OptionError, ShapeError
from oracles import (
    P_LIMIT,
    Z_LIMIT,
    cell_masses,
    double_precision,
    fit_p_value,
    ks_p_value,
    moments,
    standard_normal_cdf,
    z_score,
)

N = 40_000


def two_gaussians() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([[-1.0, 0.5], [1.5, -0.5]]), torch.tensor([[0.5, 1.0], [0.8, 0.4]]), torch.tensor([1.0, 3.0])
    )


@dataclass(frozen=True)
class Case:
    """A planar target and the box that holds all but 1e-9 of it."""

    make: Callable[[], Energy]
    low: float
    high: float


PLANAR = {
    "mixture": Case(two_gaussians, -8.0, 8.0),
    "double well": Case(DoubleWell, -7.0, 7.0),
    "rosenbrock": Case(lambda: Rosenbrock(a=0.5, b=2.0, temperature=0.6), -6.0, 14.0),
    "ring": Case(Ring, -5.0, 5.0),
    "wide ring": Case(lambda: Ring(radius=0.5, scale=0.7), -6.0, 6.0),
    "eight gaussians": Case(EightGaussians, -6.0, 6.0),
    "checkerboard": Case(Checkerboard, -4.0, 4.0),
    "pinwheel": Case(Pinwheel, -7.0, 7.0),
    "two moons": Case(TwoMoons, -2.5, 3.5),
    "funnel": Case(lambda: Funnel(dim=2, scale=0.5), -16.0, 16.0),
}


def build(case: Case):
    with double_precision():
        return case.make()


@functools.cache
def masses_of(name):
    case = PLANAR[name]
    return cell_masses(build(case).log_prob, case.low, case.high, 40)


@pytest.mark.parametrize("name", PLANAR)
def test_density_integrates_to_one(name):
    case = PLANAR[name]
    target = build(case)
    mass, _, _ = moments(target.log_prob, case.low, case.high)
    assert abs(float(mass) - 1.0) < 1e-6


@pytest.mark.parametrize("name", PLANAR)
def test_draws_follow_the_density(name):
    case = PLANAR[name]
    target = build(case)
    x = target.sample(N, torch.Generator().manual_seed(7))
    assert x.dtype == torch.float64
    masses = masses_of(name)
    assert fit_p_value(x, masses, case.low, case.high) > P_LIMIT


@pytest.mark.parametrize("name", PLANAR)
def test_broken_twin_shifted_draws_are_caught(name):
    case = PLANAR[name]
    target = build(case)
    x = target.sample(N, torch.Generator().manual_seed(7))
    masses = masses_of(name)
    assert fit_p_value(x + 0.1, masses, case.low, case.high) < P_LIMIT


def test_broken_twin_pinwheel_bent_by_a_coordinate_is_caught():
    # Bending by the first coordinate instead of the radius changes areas, and the density with them.
    with double_precision():
        target = Pinwheel(across=0.6)
    rng = torch.Generator().manual_seed(3)
    straight = target.locs + target.scales * torch.randn((N, 2), generator=rng, dtype=torch.float64)
    angle = target._bend(straight[:, 0]) + target.angles[torch.randint(5, (N,), generator=rng)]
    cos, sin = angle.cos(), angle.sin()
    bent = torch.stack((cos * straight[:, 0] - sin * straight[:, 1], sin * straight[:, 0] + cos * straight[:, 1]), 1)
    masses = cell_masses(target.log_prob, -9.0, 9.0, 40)
    assert fit_p_value(bent, masses, -9.0, 9.0) < P_LIMIT
    assert fit_p_value(target.sample(N, rng), masses, -9.0, 9.0) > P_LIMIT


def test_many_well_log_z():
    with double_precision():
        assert ManyWell().log_z == pytest.approx(164.695675, abs=1e-6)
        assert ManyWell(8).log_z == pytest.approx(4 * DoubleWell().log_z, abs=1e-12)


def test_double_well_log_z_by_another_quadrature():
    a, b, c = 0.3, -4.0, 0.7
    z, _ = integrate.quad(lambda x: math.exp(-(a * x + b * x**2 + c * x**4)), -6, 6, epsabs=0, epsrel=1e-12)
    assert DoubleWell(a, b, c).log_z == pytest.approx(math.log(z * math.sqrt(2 * math.pi)), abs=1e-9)


def test_broken_twin_well_without_its_gaussian_is_caught():
    assert abs(16 * (DoubleWell().log_z - 0.5 * math.log(2 * math.pi)) - 164.695675) > 1.0


def test_many_well_is_a_sum_of_double_wells():
    with double_precision():
        many, one = ManyWell(6), DoubleWell()
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = sum(one(x[:, i : i + 2]) for i in (0, 2, 4))
    torch.testing.assert_close(many(x), parts, rtol=0, atol=1e-12)


def test_many_well_draws():
    with double_precision():
        target = ManyWell(8)
    x = target.sample(20_000, torch.Generator().manual_seed(1))
    knots, cdf = target.wells.knots, target.wells.cumulative

    def exact(v):
        return torch.from_numpy(np.interp(v.numpy(), knots.numpy(), cdf.numpy()))

    assert ks_p_value(x[:, 0::2], exact) > P_LIMIT
    assert ks_p_value(x[:, 1::2], standard_normal_cdf) > P_LIMIT
    wrong = x[:, 0::2].clone()
    wrong[::20] *= -1.0  # a twentieth of the draws in the other well
    assert ks_p_value(wrong, exact) < P_LIMIT


@pytest.mark.parametrize(
    "make", [lambda: DoubleWell().wells, lambda: Ring(3.0, 0.2).radii, lambda: Ring(0.5, 0.7).radii]
)
def test_inversion_is_as_accurate_as_it_says(make):
    table = make()
    # Halving the knots makes the piecewise linear error four times larger: what it then is, over four, is the error.
    coarse = 0.5 * (table.density[:-2:2] + table.density[2::2])
    distance = 0.5 * (coarse - table.density[1:-1:2]).abs().sum() * 2 * (table.knots[1] - table.knots[0])
    assert float(distance) * (2.0 / 3.0) / 4.0 < 1e-6


def test_inversion_of_a_known_law():
    table = Quantiles.of(lambda x: 0.5 * x**2, -9.0, 9.0)
    assert table.log_z == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-12)
    x = table.sample(50_000, torch.Generator().manual_seed(2), torch.zeros((), dtype=torch.float64))
    assert ks_p_value(x, standard_normal_cdf) > P_LIMIT


def test_funnel_against_its_hierarchy():
    with double_precision():
        funnel = Funnel(dim=5, scale=3.0)
    x = funnel.sample(20_000, torch.Generator().manual_seed(4))
    v, rest = x[:, :1], x[:, 1:]
    assert ks_p_value(v / 3.0, standard_normal_cdf) > P_LIMIT
    assert ks_p_value(rest * (-0.5 * v).exp(), standard_normal_cdf) > P_LIMIT
    zero, three = torch.tensor([0.0, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(zero, three).log_prob(v[:, 0])
    expected = expected + torch.distributions.Normal(zero, (0.5 * v).exp()).log_prob(rest).sum(1)
    torch.testing.assert_close(funnel.log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_mixture_against_torch_distributions():
    target = build(PLANAR["mixture"])
    d = torch.distributions
    same = d.MixtureSameFamily(
        d.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
        d.Independent(d.Normal(target.locs, target.scales), 1),
    )
    x = 3 * torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(target.log_prob(x), same.log_prob(x), rtol=1e-12, atol=1e-12)


def test_moons_quadrature_error():
    from unittest import mock

    with double_precision():
        moons = TwoMoons()
        with mock.patch("gibbsian.energies.toys.math.ceil", lambda v: 6 * round(v)):
            finer = TwoMoons()
    assert finer.nodes.shape[0] > 5 * moons.nodes.shape[0]
    x = torch.cartesian_prod(*[torch.linspace(-2.1, 2.1, 25, dtype=torch.float64)] * 2)
    assert float((moons(x) - finer(x)).abs().max()) < 1e-6
    far = 4.0 * x
    assert float((moons.log_prob(far).exp() - finer.log_prob(far).exp()).abs().max()) < 1e-6


def test_moons_are_scikit_learns():
    from sklearn.datasets import make_moons

    with double_precision():
        moons = TwoMoons(noise=0.15)
    theirs, _ = make_moons(20_000, noise=0.15, random_state=0)
    masses = cell_masses(moons.log_prob, -2.5, 3.5, 30)
    assert fit_p_value(torch.from_numpy(theirs), masses, -2.5, 3.5) > P_LIMIT
    noisier, _ = make_moons(20_000, noise=0.17, random_state=0)
    assert fit_p_value(torch.from_numpy(noisier), masses, -2.5, 3.5) < P_LIMIT


@pytest.mark.parametrize("name", PLANAR)
def test_one_graph(name):
    target = PLANAR[name].make()
    x = target.sample(16, torch.Generator().manual_seed(0))
    graph = torch.compile(target, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x), target(x))


@pytest.mark.parametrize("name", [n for n in PLANAR if n != "checkerboard"])
def test_mean_energy_matches_its_integral(name):
    case = PLANAR[name]
    target = build(case)
    x = torch.linspace(case.low, case.high, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x)
    e = torch.cat([target(part) for part in grid.split(2_000)])
    share = (-e - target.log_z).softmax(0)
    expected = float((share * e).sum())
    values = target(target.sample(N, torch.Generator().manual_seed(11)))
    assert abs(z_score(values, expected)) < Z_LIMIT


def test_dtype_follows():
    target = Ring()
    assert target.sample(3, torch.Generator()).dtype == torch.float32
    assert target.double().sample(3, torch.Generator()).dtype == torch.float64


def test_gradients_are_finite_at_the_origin():
    x = torch.zeros(1, 2, requires_grad=True)
    for target in (Ring(), Pinwheel()):
        (grad,) = torch.autograd.grad(target(x).sum(), x)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ManyWell(7),
        lambda: DoubleWell(c=-1.0),
        lambda: Funnel(1),
        lambda: Ring(scale=0.0),
        lambda: Rosenbrock(b=-1.0),
        lambda: TwoMoons(noise=0.0),
        lambda: Pinwheel(arms=0),
        lambda: GaussianMixture(torch.zeros(2, 2), weights=torch.tensor([1.0, -1.0])),
        lambda: GaussianMixture(torch.zeros(2)),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(OptionError):
        make()


def test_wrong_shape_is_refused():
    with pytest.raises(ShapeError, match="2"):
        DoubleWell()(torch.zeros(3, 4))
