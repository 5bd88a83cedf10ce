"""HMC along great circles: exact on the sphere, reversible, and exposed where velocities leave the tangent space."""

import dataclasses
import math
import os
import shutil

import pytest
import torch

import gibbsian as gb
from contracts import (
    ExactTarget,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_reversible,
    assert_state_is_current,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.energies.directional import VonMisesFisher
from gibbsian.energies.domains import Sphere
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.kernels.base import State, evaluate, metropolis, row_sum
from gibbsian.kernels.spherical import SphericalHMC, arc, geodesic_leapfrog, normalised, tangent

F64 = torch.float64


def fisher(kappa: float = 2.5) -> ExactTarget:
    """The cosine with the axis is exponential on [-1, 1], the angle around it uniform."""
    energy = VonMisesFisher(torch.tensor([1.0, 2.0, 2.0], dtype=F64), kappa)
    across = torch.tensor([[2.0, -2.0, 1.0], [2.0, 1.0, -2.0]], dtype=F64) / 3.0
    projections = {
        "cosine": (
            lambda x: x @ energy.loc,
            lambda w: torch.expm1(kappa * (w + 1.0)) / math.expm1(2.0 * kappa),
        ),
        "angle": (
            lambda x: torch.atan2(x @ across[0], x @ across[1]),
            lambda a: 0.5 + a / (2.0 * math.pi),
        ),
    }
    return ExactTarget("fisher", energy, energy.sample, projections)


def two_caps() -> ExactTarget:
    """An uneven mixture of two Fisher densities around opposite poles: skewed and with two modes."""
    axis = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    caps = [VonMisesFisher(axis, 2.0), VonMisesFisher(-axis, 4.0)]
    weights = torch.tensor([0.3, 0.7], dtype=F64)

    def draw(n, rng):
        first = torch.rand((n, 1), generator=rng, dtype=F64) < 0.3
        return torch.where(first, caps[0].sample(n, rng), caps[1].sample(n, rng))

    def cdf(w):
        north = torch.expm1(2.0 * (w + 1.0)) / math.expm1(4.0)
        south = torch.expm1(-4.0 * (w + 1.0)) / math.expm1(-8.0)
        return 0.3 * north + 0.7 * south

    angle = (lambda x: torch.atan2(x[:, 0], x[:, 1]), lambda a: 0.5 + a / (2.0 * math.pi))
    return ExactTarget(
        "two_caps", gb.mixture(*caps, weights=weights), draw, {"height": (lambda x: x[:, 2], cdf), "angle": angle}
    )


TARGETS = (fisher(), two_caps())
KERNELS = (SphericalHMC(0.3, leapfrog=4), SphericalHMC(0.9, leapfrog=2), SphericalHMC(1.3, leapfrog=1))


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_kernel_leaves_densities_on_the_sphere_invariant(kernel, target):
    assert_invariant(kernel, target)
    assert_reversible(kernel, target)


def assert_moment(kernel, d, kappa):
    """In d dimensions the mean cosine of von Mises and Fisher is a ratio of Bessel functions."""
    from scipy import special

    energy = VonMisesFisher(torch.ones(d, dtype=F64), kappa)
    start = energy.sample(20_000, seeded())
    out = gb.sample(energy, kernel, start, steps=5, rng=seeded(1))
    w = out.x @ energy.loc
    exact = special.ive(d / 2, kappa) / special.ive(d / 2 - 1, kappa)
    z = float((w.mean() - exact) / (w.std() / math.sqrt(len(w))))
    assert abs(z) < 6.0, f"z = {z:.1f}"  # 2 false alarms in 10^9


@pytest.mark.parametrize(("d", "kappa", "h"), [(2, 3.0, 0.5), (20, 15.0, 0.2)])
def test_circles_and_spheres_of_many_dimensions(d, kappa, h):
    assert_moment(SphericalHMC(h, leapfrog=4), d, kappa)


@dataclasses.dataclass(frozen=True)
class Twin(SphericalHMC):
    """What is done to velocities and gradients, to be broken below; as it stands, the kernel itself."""

    def velocity(self, x, z):
        return tangent(x, z)

    def force(self, x, grad):
        return tangent(x, grad)

    def move(self, x, v):
        return arc(x, v, self.step_size)

    def step(self, energy, state, noise):
        h, v = self.step_size, self.velocity(state.x, noise[0])
        before, new = state.energy + 0.5 * row_sum(v * v), state
        for _ in range(self.leapfrog):
            v = v - 0.5 * h * self.force(new.x, new.grad)
            x, v = self.move(new.x, v)
            new = State(x, *evaluate(energy, x))
            v = v - 0.5 * h * self.force(x, new.grad)
        return metropolis(state, new, before - new.energy - 0.5 * row_sum(v * v), noise[1], {"hamiltonian": before})


class WithoutProjectingGradients(Twin):
    """Kicks push off the sphere."""

    def force(self, x, grad):
        return grad


class WithoutTangentVelocities(Twin):
    """Fresh velocities have a part along the radius."""

    def velocity(self, x, z):
        return z


class WithHotVelocities(Twin):
    """Velocities of standard deviation 1.3 under a kinetic energy that expects 1."""

    def velocity(self, x, z):
        return 1.3 * tangent(x, z)


class AlongTheChord(Twin):
    """Straight on and back to the sphere, with the velocity projected: no arc, no constant speed."""

    def move(self, x, v):
        end = normalised(x + self.step_size * v)
        return end, tangent(end, v)


def test_the_twin_that_is_whole_is_the_kernel():
    start = TARGETS[0].draw(20, seeded())
    a, b = (
        gb.sample(TARGETS[0].energy, k(0.4, leapfrog=3), start, steps=5, rng=seeded(1)) for k in (SphericalHMC, Twin)
    )
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize(
    "twin", [WithoutProjectingGradients, WithoutTangentVelocities, WithHotVelocities, AlongTheChord]
)
def test_broken_twins_are_caught(twin, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(twin(0.9, leapfrog=2), target)


def test_the_kernel_keeps_the_contracts(graphs):
    kernel, energy = SphericalHMC(0.5, leapfrog=3), TARGETS[1].energy
    start = TARGETS[1].draw(6, seeded())
    assert_continues(kernel, energy, start)
    assert_state_is_current(kernel, energy, start)
    assert_leaves_inputs_alone(kernel, energy, start)
    assert_flat_memory(kernel, energy, start)
    assert_one_graph(kernel, TARGETS[0].energy, start, graphs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_inductor_gives_the_eager_chains():
    target = TARGETS[0]
    start = target.draw(7, seeded())
    eager, compiled = (
        gb.sample(target.energy, KERNELS[0], start, steps=20, rng=seeded(1), thin=1, compile=c) for c in (False, True)
    )
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-10)


def test_arcs_stay_on_the_sphere_keep_their_speed_and_run_back():
    x = TARGETS[0].draw(100, seeded())
    v = tangent(x, torch.randn((100, 3), generator=seeded(1), dtype=F64))
    v[0] = 0.0
    end, w = arc(x, v, 0.7)
    torch.testing.assert_close(end.norm(dim=1), torch.ones(100, dtype=F64), rtol=0, atol=1e-15)
    torch.testing.assert_close(row_sum(end * w), torch.zeros(100, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(w.norm(dim=1), v.norm(dim=1), rtol=0, atol=1e-14)
    torch.testing.assert_close(row_sum(x * end), (0.7 * v.norm(dim=1)).cos(), rtol=0, atol=1e-14)
    assert torch.equal(end[0], x[0])
    back, u = arc(end, -w, 0.7)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(-u, v, rtol=0, atol=1e-14)


def energy_errors(force):
    energy = TARGETS[1].energy
    x = TARGETS[1].draw(200, seeded(2))
    v0 = tangent(x, torch.randn((200, 3), generator=seeded(3), dtype=F64))
    errors = []
    for steps in (16, 32, 64, 128):
        pushed = energy if force == 1.0 else force * energy
        state = State(x, *evaluate(pushed, x))
        end, v = geodesic_leapfrog(pushed, state, v0, 1.0 / steps, steps)
        change = energy(end.x) - energy(x) + 0.5 * row_sum(v * v) - 0.5 * row_sum(v0 * v0)
        errors.append(float(change.square().mean().sqrt()))
    return torch.tensor(errors)


def test_the_energy_error_is_of_second_order_and_a_weak_force_shows():
    errors, weak = energy_errors(1.0), energy_errors(0.9)
    assert bool((((errors[:-1] / errors[1:]).log2() - 2.0).abs() < 0.1).all())
    assert bool(((weak[:-1] / weak[1:]).log2().abs() < 0.3).all())


def test_single_precision_stays_on_the_sphere():
    energy = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 5.0)
    out = gb.sample(energy, SphericalHMC(0.3), energy.sample(200, seeded()), steps=300, rng=seeded(1))
    assert bool(Sphere().check(out.x).all())
    assert out.x.dtype == torch.float32


def test_tuning_reaches_the_acceptance():
    start = TARGETS[1].draw(256, seeded())
    tuned = tune(TARGETS[1].energy, SphericalHMC(1e-3, leapfrog=3), start, rng=seeded(1), steps=200)
    assert abs(tuned.acceptance - 0.8) < 0.03


def test_chains_may_have_step_sizes_of_their_own():
    start = TARGETS[0].draw(4, seeded())
    sizes = torch.tensor([0.1, 0.4, 0.1, 0.4], dtype=F64)
    each = gb.sample(TARGETS[0].energy, SphericalHMC(sizes, 3), start, steps=4, rng=seeded())
    one = gb.sample(TARGETS[0].energy, SphericalHMC(0.4, 3), start, steps=4, rng=seeded())
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])


def walk(start, kernel=None, energy=None):
    energy = energy or gb.Energy.of(lambda x: x[:, 0], None, Sphere())
    return gb.sample(energy, kernel or SphericalHMC(0.1), start, steps=1, rng=seeded())


NORTH = torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3)
REFUSED = {
    "off the sphere": (lambda: walk(1.1 * NORTH), DomainError, "4 of 4 chains start off the unit sphere, .* to 1.1"),
    "NaN": (lambda: walk(NORTH * math.nan), DomainError, "4 of 4 chains start off"),
    "one dimension": (lambda: walk(torch.ones(4, 1)), ShapeError, r"d of 2 or more; got shape \(4, 1\)"),
    "matrices": (lambda: walk(torch.ones(4, 1, 1)), ShapeError, r"got shape \(4, 1, 1\)"),
    "over the reals": (lambda: walk(NORTH, energy=gb.Gaussian(3)), DomainError, "SphericalHMC walks on sphere"),
    "another kernel": (lambda: walk(NORTH, gb.MALA(0.1)), DomainError, "SphericalHMC moves along great circles"),
    "step size": (lambda: SphericalHMC(-0.1), OptionError, "step_size is a positive number; got -0.1"),
    "no steps": (lambda: SphericalHMC(0.1, leapfrog=0), OptionError, "leapfrog counts the steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()
