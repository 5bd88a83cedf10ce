"""Energies taken to the reals: the same mass by quadrature, the same draws, and twins with a wrong Jacobian caught."""

import math

import pytest
import torch
from torch.distributions import constraints

import gibbsian as gb
from contracts import ExactTarget, assert_invariant, assert_one_graph, assert_reversible, ks, seeded
from gibbsian.energies.base import Energy
from gibbsian.energies.directional import VonMises, VonMisesFisher
from gibbsian.energies.transformed import Unconstrained, unconstrain
from gibbsian.errors import DomainError, ShapeError

F64 = torch.float64
LOW, HIGH = torch.tensor([0.0, -1.0], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)


def exponential(x):
    """Rate 3 on positive numbers, unnormalised."""
    return 3.0 * x.sum(1)


def corner(x):
    """Exponential in one coordinate, linear in the other, on the box above."""
    return 3.0 * x[:, 0] - torch.log(x[:, 1] + 1.5)


def dirichlet(x):
    """Dirichlet(2, 3, 1.5), unnormalised."""
    return -(x.log() * torch.tensor([1.0, 2.0, 0.5], dtype=x.dtype)).sum(1)


LOG_DIRICHLET = sum(map(math.lgamma, (2.0, 3.0, 1.5))) - math.lgamma(6.5)
LOG_CORNER = math.log(-math.expm1(-3.0) / 3.0) + math.log(0.5 * (4.5**2 - 0.5**2))
CASES = {
    "positive": (Energy.of(exponential, (1,), constraints.positive), -math.log(3.0), 25.0),
    "above two": (Energy.of(lambda x: exponential(x - 2.0), (1,), constraints.greater_than(2.0)), -math.log(3.0), 25.0),
    "box": (Energy.of(corner, (2,), constraints.interval(LOW, HIGH)), LOG_CORNER, 25.0),
    "simplex": (Energy.of(dirichlet, (3,), constraints.simplex), LOG_DIRICHLET, 22.0),
}


def log_mass(energy, dim, reach, points=400):
    """Log of the integral over the reals, by the midpoint rule, as good as exact where it is smooth and decays."""
    x = (torch.arange(points, dtype=F64) + 0.5) * (2 * reach / points) - reach
    grid = torch.cartesian_prod(*[x] * dim).reshape(-1, dim)
    return float(torch.logsumexp(-energy(grid), 0)) + dim * math.log(2 * reach / points)


def flipped(energy):
    """The broken twin: the Jacobian with the other sign."""
    right = unconstrain(energy)
    return Energy.of(lambda y: 2.0 * right.energy(right.constrain(y)) - right(y))


@pytest.mark.parametrize("name", CASES)
def test_the_mass_is_that_of_the_constrained_energy(name):
    energy, log_z, reach = CASES[name]
    free = unconstrain(energy)
    dim = free.event_shape[0]
    assert log_mass(free, dim, reach) == pytest.approx(log_z, abs=1e-6)
    assert abs(log_mass(flipped(energy), dim, reach) - log_z) > 0.1


def box_target(broken=False):
    energy, _, _ = CASES["box"]
    free = unconstrain(energy)

    def draw(n, rng):
        u = torch.rand((n, 2), generator=rng, dtype=F64)
        first = -torch.log1p(u[:, 0] * math.expm1(-3.0)) / 3.0
        return free.unconstrain(torch.stack((first, (0.25 + 20.0 * u[:, 1]).sqrt() - 1.5), 1))

    projections = {
        "x0": (lambda y: free.constrain(y)[:, 0], lambda v: torch.expm1(-3.0 * v) / math.expm1(-3.0)),
        "x1": (lambda y: free.constrain(y)[:, 1], lambda v: ((v + 1.5) ** 2 - 0.25) / 20.0),
    }
    return ExactTarget("box", flipped(energy) if broken else free, draw, projections)


def test_kernels_over_the_reals_draw_from_the_box():
    for kernel in (gb.MALA(0.8), gb.HMC(0.8, leapfrog=3)):
        assert_invariant(kernel, box_target())
        assert_reversible(kernel, box_target())
        with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
            assert_invariant(kernel, box_target(broken=True))


def test_chains_on_the_simplex_from_one_point():
    """Marginals of a Dirichlet density are beta; 20,000 chains of 60 steps from the middle."""
    from scipy import stats

    free = unconstrain(CASES["simplex"][0])
    start = free.unconstrain(torch.full((20_000, 3), 1.0 / 3.0, dtype=F64))
    out = gb.sample(free, gb.HMC(0.6, leapfrog=4), start, steps=60, rng=seeded())
    x = free.constrain(out.x)
    torch.testing.assert_close(x.sum(1), torch.ones(20_000, dtype=F64))
    for i, (a, b) in enumerate(((2.0, 4.5), (3.0, 3.5), (1.5, 5.0))):
        assert ks(x[:, i], lambda v, a=a, b=b: torch.from_numpy(stats.beta.cdf(v.numpy(), a, b))) < 3.1


@pytest.mark.parametrize("name", CASES)
def test_points_go_there_and_back_in_any_batch(name):
    free = unconstrain(CASES[name][0])
    y = torch.randn((4, 5, *free.event_shape), generator=seeded(), dtype=F64)
    x = free.constrain(y)
    assert bool(CASES[name][0].support.check(x).all())
    torch.testing.assert_close(free.unconstrain(x), y, rtol=0, atol=1e-9)
    assert x.shape == (4, 5, *CASES[name][0].event_shape)


def test_the_jacobian_is_that_of_the_map():
    for name, (energy, _, _) in CASES.items():
        free = unconstrain(energy)
        y = torch.randn((1, *free.event_shape), generator=seeded(), dtype=F64)
        d = free.event_shape[0]
        full = torch.autograd.functional.jacobian(lambda v, f=free, d=d: f.constrain(v)[0, :d], y)[:, 0]
        expected = energy(free.constrain(y)) - torch.linalg.slogdet(full).logabsdet
        torch.testing.assert_close(free(y), expected[None].reshape(1), msg=name)


def test_images_contexts_formulas_and_the_reals():
    image = Energy.of(lambda x, c: c * x.flatten(1).sum(1), (1, 2, 2), constraints.unit_interval, context=("c",))
    free = unconstrain(image)
    assert free.context == ("c",)
    assert free.event_shape == (1, 2, 2)
    assert free(torch.zeros(3, 1, 2, 2), c=torch.ones(3)).shape == (3,)
    given = free.given(c=2.0)
    out = gb.sample(given, gb.MALA(0.3), torch.zeros(3, 1, 2, 2), steps=3, rng=seeded())
    assert bool(((free.constrain(out.x) > 0) & (free.constrain(out.x) < 1)).all())
    assert repr(unconstrain(CASES["positive"][0])) == "Unconstrained(exponential, GreaterThan(lower_bound=0.0))"
    base = gb.Gaussian(2)
    y = torch.randn(5, 2, generator=seeded())
    torch.testing.assert_close(unconstrain(base)(y), base(y))
    half = unconstrain(base, constraints.positive)
    torch.testing.assert_close(half(y), base(y.exp()) - y.sum(1))
    assert isinstance(half, Unconstrained)


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name, graphs):
    free = unconstrain(CASES[name][0])
    start = torch.randn((5, *free.event_shape), generator=seeded(), dtype=F64)
    assert_one_graph(gb.MALA(0.2), free, start, graphs)


BOX = unconstrain(CASES["box"][0])
REFUSED = {
    "outside": (
        lambda: BOX.unconstrain(torch.tensor([[0.5, 0.0], [2.0, 0.0]])),
        DomainError,
        "1 of 2 points lie outside",
    ),
    "edge at infinity": (
        lambda: unconstrain(CASES["positive"][0]).unconstrain(torch.tensor([[0.0], [1.0]])),
        DomainError,
        "1 of 2 points",
    ),
    "bits": (lambda: unconstrain(gb.Bernoulli(torch.zeros(2))), DomainError, "discrete states need a discrete kernel"),
    "one-hot": (lambda: unconstrain(gb.Categorical(torch.zeros(2))), DomainError, "discrete kernel"),
    "torus": (lambda: unconstrain(VonMises([0.0])), DomainError, "Wrapped"),
    "sphere": (lambda: unconstrain(VonMisesFisher([0.0, 1.0])), DomainError, "SphericalHMC"),
    "no map": (
        lambda: unconstrain(gb.Gaussian(2), constraints.symmetric),
        DomainError,
        "no map from the reals",
    ),
    "vectors for matrices": (
        lambda: unconstrain(Energy.of(exponential, (2,)), constraints.corr_cholesky),
        ShapeError,
        r"Points of shape \(2,\) do not fit",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_form_over_the_reals_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()
