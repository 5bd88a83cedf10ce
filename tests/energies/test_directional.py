"""Directions: densities integrate to one, draws follow them, and twins with a wrong constant or law are caught."""

import math

import pytest
import torch
from scipy import special, stats

from gibbsian.energies.base import Energy
from gibbsian.energies.directional import VonMises, VonMisesFisher
from gibbsian.energies.domains import Sphere, Torus
from gibbsian.energies.tractable import require_support
from gibbsian.errors import OptionError, ShapeError
from oracles import P_LIMIT, cell_masses, fit_p_value, ks_p_value

F64 = torch.float64
N = 40_000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kappa", [0.0, 1e-6, 0.5, 4.0, 200.0, 1e6])
def test_angles_follow_von_mises(kappa):
    energy = VonMises(torch.tensor([3.0], dtype=F64), kappa)
    x = energy.sample(N, rng(1))
    require_support(x, energy, "draws")
    away = Torus(2 * math.pi).wrap(x - energy.loc)
    if kappa < 1e5:
        law = stats.uniform(-math.pi, 2 * math.pi) if kappa == 0 else stats.vonmises(kappa)
        assert ks_p_value(away, lambda v: torch.from_numpy(law.cdf(v.numpy()))) > P_LIMIT
        expected = -law.logpdf(away[:100, 0].numpy())
        torch.testing.assert_close(energy(x[:100]), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    else:  # normal, to one part in a million
        assert ks_p_value(away * math.sqrt(kappa), torch.special.ndtr) > P_LIMIT


def test_broken_twin_of_another_concentration_is_caught():
    energy = VonMises(torch.zeros(1, dtype=F64), 2.2)
    law = stats.vonmises(2.0)
    assert ks_p_value(energy.sample(N, rng()), lambda v: torch.from_numpy(law.cdf(v.numpy()))) < P_LIMIT


def test_angles_in_the_plane_integrate_to_one_and_are_independent():
    energy = VonMises(torch.tensor([1.0, -3.0], dtype=F64), torch.tensor([0.8, 3.0], dtype=F64))
    masses = cell_masses(energy.log_prob, -math.pi, math.pi, 40)
    assert abs(float(masses.sum()) - 1.0) < 1e-9
    x = energy.sample(N, rng(2))
    assert fit_p_value(x, masses, -math.pi, math.pi) > P_LIMIT
    assert fit_p_value(Torus(2 * math.pi).wrap(x + 0.1), masses, -math.pi, math.pi) < P_LIMIT


def test_angles_of_any_shape_and_dtype():
    energy = VonMises(torch.zeros(2, 3), torch.ones(2, 3))
    assert energy.sample(5, rng()).shape == (5, 2, 3)
    assert energy.sample(5, rng()).dtype == torch.float32
    assert energy.double().sample(5, rng()).dtype == F64
    assert energy(torch.zeros(4, 2, 3, dtype=F64)).shape == (4,)
    assert repr(energy) == "VonMises((2, 3), concentration=1)"
    assert repr(VonMises([0.0, 1.0], torch.tensor([1.0, 2.0]))) == "VonMises((2,), concentration=1 to 2)"


@pytest.mark.parametrize("kappa", [0.0, 0.3, 5.0, 2e4])
@pytest.mark.parametrize("d", [2, 3, 8, 100])
def test_the_normaliser_is_besselfunctions(d, kappa):
    energy = VonMisesFisher(torch.ones(d, dtype=F64), kappa)
    nu = d / 2 - 1
    if kappa == 0.0:
        expected = math.log(2.0) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    else:
        log_bessel = math.log(special.ive(nu, kappa)) if special.ive(nu, kappa) > 0 else math.nan
        expected = 0.5 * d * math.log(2 * math.pi) + log_bessel - nu * math.log(kappa)
    if not math.isnan(expected):
        assert float(energy(energy.loc[None])) == pytest.approx(expected, abs=1e-9)


def test_the_density_on_the_sphere_integrates_to_one():
    energy = VonMisesFisher(torch.tensor([0.3, -1.0, 0.5], dtype=F64), 3.0)
    z = torch.linspace(-1, 1, 4001, dtype=F64)[1::2]
    a = torch.arange(200, dtype=F64) * (2 * math.pi / 200)
    r = (1 - z * z).sqrt()
    x = torch.stack((r[:, None] * a.cos(), r[:, None] * a.sin(), z[:, None].expand(-1, 200)), 2).flatten(0, 1)
    mass = energy.log_prob(x).exp().mean() * 4 * math.pi
    assert abs(float(mass) - 1.0) < 1e-5
    # A twin that takes the density against angles (without the area) is off by far.
    assert abs(float((energy.log_prob(x).exp() * x[:, 2].abs()).mean() * 4 * math.pi) - 1.0) > 0.1


@pytest.mark.parametrize(("d", "kappa"), [(2, 1.5), (3, 0.0), (3, 4.0), (3, 1e6), (5, 3.0), (30, 20.0)])
def test_directions_follow_their_law(d, kappa):
    axis = torch.linspace(-1, 2, d, dtype=F64)
    energy = VonMisesFisher(axis, kappa)
    x = energy.sample(N, rng(3))
    require_support(x, energy, "draws")
    gap = 0.5 * (x - energy.loc).square().sum(1)
    w = 1.0 - gap
    if d == 3:
        law = (lambda g: g / 2.0) if kappa == 0 else (lambda g: torch.expm1(-kappa * g) / math.expm1(-2 * kappa))
        assert ks_p_value(gap, law) > P_LIMIT
        assert ks_p_value(0.9 * gap if kappa else gap**1.1, law) < P_LIMIT
    exact = special.ive(d / 2, kappa) / special.ive(d / 2 - 1, kappa) if kappa else 0.0
    assert abs(float((w.mean() - exact) / (w.std() / math.sqrt(N)))) < 5.5
    # Around the axis nothing is preferred.
    other = torch.eye(d, dtype=F64)[0] - energy.loc[0] * energy.loc
    side = x @ (other / other.norm())
    assert abs(float(side.mean() / (side.std() / math.sqrt(N)))) < 5.5


def test_one_graph():
    for energy in (VonMises(torch.zeros(3)), VonMisesFisher([1.0, 0.0, 0.0])):
        x = energy.sample(8, rng())
        graph = torch.compile(energy, backend="eager", fullgraph=True)
        torch.testing.assert_close(graph(x), energy(x))


def test_supports_survive_the_algebra():
    assert isinstance((2.0 * VonMises([0.0, 0.0])).support, Torus)
    assert isinstance((VonMisesFisher([0.0, 1.0]) + Energy.of(lambda x: x[:, 0])).support, Sphere)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VonMises(0.0), OptionError, "mean direction of every angle"),
        (lambda: VonMises([math.nan]), OptionError, "finite mean direction"),
        (lambda: VonMises([0.0], -1.0), OptionError, r"0 \(uniform\) or more, and finite; got -1.0"),
        (lambda: VonMises([0.0, 0.0], torch.ones(3)), ShapeError, r"angles \(2,\) have shape \(3,\)"),
        (lambda: VonMisesFisher([0.0, 0.0]), OptionError, "an axis: a finite vector"),
        (lambda: VonMisesFisher([1.0]), OptionError, "d of 2 or more"),
        (lambda: VonMisesFisher([1.0, 0.0], math.inf), OptionError, "finite; got inf"),
        (lambda: VonMisesFisher([1.0, 0.0])(torch.zeros(3, 3)), ShapeError, r"\(n, 2\); got \(3, 3\)"),
    ],
)
def test_what_is_no_direction_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
