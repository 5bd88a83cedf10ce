"""Kernels over the reals on a torus and in a box: exact, and exposed where the folding is wrong.

The Kolmogorov-Smirnov comparisons are those of `contracts`: 1 false alarm in 10^8 each, seeds fixed.
"""

import dataclasses
import math
import os
import shutil

import pytest
import torch
from scipy import stats
from torch.distributions import constraints

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
    ks,
    normal_cdf,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.compilation import compiled, owner_of
from gibbsian.energies.directional import VonMises
from gibbsian.energies.domains import Torus
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, evaluate, has_step_size, settings_repr, with_step_size
from gibbsian.kernels.domains import Lifted, Reflected, Wrapped
from gibbsian.sampling import with_tensor_settings

F64 = torch.float64
TURN = Torus(2 * math.pi)


def angles() -> ExactTarget:
    """The first angle is von Mises, the second turns away from it by another von Mises angle."""
    parts = VonMises(torch.tensor([2.8, -1.0], dtype=F64), torch.tensor([0.7, 3.0], dtype=F64))

    def sheared(x):
        return torch.stack((x[:, 0], x[:, 1] - x[:, 0]), 1)

    def draw(n, rng):
        a, b = parts.sample(n, rng).unbind(1)
        return TURN.wrap(torch.stack((a, a + b), 1))

    def cdf(kappa):
        return lambda v: torch.from_numpy(stats.vonmises.cdf(v.numpy(), kappa))

    projections = {
        f"angle {i}": (lambda x, i=i: TURN.wrap(sheared(x)[:, i] - parts.loc[i]), cdf(float(parts.concentration[i])))
        for i in range(2)
    }
    return ExactTarget("angles", gb.Energy.of(lambda x: parts(sheared(x)), (2,), TURN), draw, projections)


LOW = torch.tensor([0.0, 0.0, -1.0, -math.inf, -math.inf], dtype=F64)
HIGH = torch.tensor([1.0, math.inf, 2.0, 0.5, math.inf], dtype=F64)


def boxed() -> ExactTarget:
    """Five coordinates: exponential on [0, 1], normal on [0, inf), [-1, 2] and (-inf, 1/2], and one without walls.

    The last is normal around the sum of the first two. The energy is steep at the walls, and smooth beyond them.
    """
    mean = torch.tensor([1.0, 0.3, 0.0], dtype=F64)
    below, above = normal_cdf(LOW[1:4] - mean), normal_cdf(HIGH[1:4] - mean)

    def energy(x):
        residual = torch.cat((x[:, 1:4] - mean, (x[:, 4] - x[:, 0] - x[:, 1])[:, None]), 1)
        return 3.0 * x[:, 0] + 0.5 * residual.square().sum(1)

    def draw(n, rng):
        u = torch.rand((n, 4), generator=rng, dtype=F64)
        first = -torch.log1p(u[:, :1] * math.expm1(-3.0)) / 3.0
        middle = mean + torch.special.ndtri(below + u[:, 1:] * (above - below))
        z = torch.randn((n, 1), generator=rng, dtype=F64)
        return torch.cat((first, middle, first + middle[:, :1] + z), 1)

    projections = {
        "x0": (lambda x: x[:, 0], lambda v: torch.expm1(-3.0 * v) / math.expm1(-3.0)),
        "x4-x0-x1": (lambda x: x[:, 4] - x[:, 0] - x[:, 1], normal_cdf),
    }
    for i in range(3):
        projections[f"x{i + 1}"] = (
            lambda x, i=i: x[:, i + 1],
            lambda v, i=i: (normal_cdf(v - mean[i]) - below[i]) / (above[i] - below[i]),
        )
    return ExactTarget("boxed", gb.Energy.of(energy, (5,)), draw, projections)


ANGLES, BOXED = angles(), boxed()
DIAGONAL = torch.tensor([0.3, 0.6, 0.8, 0.8, 1.2], dtype=F64)
ON_TORUS = (
    Wrapped(gb.MALA(0.3), TURN),
    Wrapped(gb.MALA(0.8), 2 * math.pi),
    Wrapped(gb.HMC(0.6, leapfrog=4), TURN),
    Wrapped(gb.HMC(0.4, leapfrog=3, scale=torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=F64)), TURN),
)
IN_BOX = (
    Reflected(gb.MALA(0.05), LOW, HIGH),
    Reflected(gb.MALA(0.3, scale=DIAGONAL), LOW, HIGH),
    Reflected(gb.HMC(0.15, leapfrog=4), LOW, HIGH),
    Reflected(gb.HMC(0.5, leapfrog=3, jitter=0.5), LOW, HIGH),
)


@pytest.mark.parametrize("kernel", ON_TORUS, ids=repr)
def test_wrapped_kernels_leave_densities_of_angles_invariant(kernel):
    assert_invariant(kernel, ANGLES)
    assert_reversible(kernel, ANGLES)


@pytest.mark.parametrize("kernel", IN_BOX, ids=repr)
def test_reflected_kernels_leave_densities_in_boxes_invariant(kernel):
    assert_invariant(kernel, BOXED)
    assert_reversible(kernel, BOXED)


@dataclasses.dataclass(frozen=True, repr=False)
class Clamped(Reflected):
    """Points that leave stop at the wall."""

    def fold(self, x):
        return x.clamp(self.low, self.high), torch.ones_like(x)


@dataclasses.dataclass(frozen=True, repr=False)
class WithoutTurningGradients(Reflected):
    """Positions are reflected, the gradients kept with them are those from behind the mirror."""

    def step(self, energy, state, noise):
        new, info = self.kernel.step(Lifted(energy, self), state, noise)
        return new._replace(x=self.fold(new.x)[0]), info


@dataclasses.dataclass(frozen=True, repr=False)
class StoppedAtTheCut(Wrapped):
    """Angles that leave the interval stop at its end."""

    def fold(self, x):
        return x.clamp(self.low, self.low + self.period), None


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        (Clamped(gb.MALA(0.05), LOW, HIGH), BOXED),
        (WithoutTurningGradients(gb.MALA(0.05), LOW, HIGH), BOXED),
        (WithoutTurningGradients(gb.HMC(0.15, leapfrog=4), LOW, HIGH), BOXED),
        (StoppedAtTheCut(gb.MALA(0.3), TURN), ANGLES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_twins_are_caught(kernel, target):
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(kernel, target, steps=10)


@pytest.mark.parametrize("h", [0.01, 0.3, 5.0])
def test_reflected_noise_is_uniform_at_any_step_size(h):
    """Unadjusted Langevin without a force is exact: what leaves comes back, however far."""
    flat = ExactTarget(
        "flat",
        gb.Energy.of(lambda x: 0.0 * x.sum(1), (2,)),
        lambda n, rng: 3.0 * torch.rand((n, 2), generator=rng, dtype=F64) - 1.0,
        {f"x{i}": (lambda x, i=i: x[:, i], lambda v: (v + 1.0) / 3.0) for i in range(2)},
    )
    assert_invariant(Reflected(gb.ULA(h), -1.0, 2.0), flat)
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(Clamped(gb.ULA(h), -1.0, 2.0), flat)


def test_reflected_langevin_is_biased_by_its_step_and_no_more():
    """Half a normal: the reflected Euler chain is the mirror image of the whole normal's, whose variance is known."""
    h = 0.2
    kernel = Reflected(gb.ULA(h), low=0.0)
    spread = (1.0 - h / 2.0) ** -0.5
    energy = gb.Gaussian(1).double()
    start = spread * torch.randn((50_000, 1), generator=seeded(), dtype=F64).abs()
    out = gb.sample(energy, kernel, start, steps=10, rng=seeded(1))
    assert ks(out.x[:, 0], lambda v: 2.0 * normal_cdf(v / spread) - 1.0) < 3.1
    assert ks(out.x[:, 0], lambda v: 2.0 * normal_cdf(v) - 1.0) > 3.1


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        (Wrapped(gb.ULA(0.1), TURN), ANGLES),
        (Wrapped(gb.MALA(0.8), TURN), ANGLES),
        (Reflected(gb.MALA(0.2), LOW, HIGH), BOXED),
        (Reflected(gb.HMC(0.2, leapfrog=3), LOW, HIGH), BOXED),
    ],
    ids=lambda value: str(value),
)
def test_wrappers_keep_the_contracts(kernel, target, graphs):
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_one_graph(kernel, target.energy, start, graphs)


def test_wrappers_hold_no_more_memory_as_they_go():
    assert_flat_memory(Reflected(gb.ULA(0.05), LOW, HIGH), BOXED.energy, BOXED.draw(6, seeded()))


def test_a_wrapped_chain_is_the_chain_on_the_line_wrapped():
    line = gb.Energy.of(lambda x: ANGLES.energy(x), (2,))
    start = ANGLES.draw(50, seeded())
    for inner in (gb.MALA(1.0), gb.HMC(0.7, leapfrog=3), gb.ULA(0.2)):
        wrapped = gb.sample(ANGLES.energy, Wrapped(inner, TURN), start, steps=30, rng=seeded(1), thin=1)
        free = gb.sample(line, inner, start, steps=30, rng=seeded(1), thin=1)
        assert float(free.draws.abs().max()) > 1.5 * math.pi
        gap = TURN.wrap(wrapped.draws - free.draws).abs().max()
        assert float(gap) < 1e-9
        assert bool(TURN.check(wrapped.draws).all())


def test_draws_stay_inside_and_steep_walls_are_reached_from_both_sides():
    start = BOXED.draw(200, seeded())
    out = gb.sample(BOXED.energy, Reflected(gb.MALA(0.1), LOW, HIGH), start, steps=40, rng=seeded(1), thin=1)
    assert bool(((out.draws >= LOW) & (out.draws <= HIGH)).all())
    assert int(out.nonfinite.sum()) == 0


@pytest.mark.parametrize(("low", "high"), [(-0.7, 1.1), (-0.7, math.inf), (-math.inf, 1.1), (-math.inf, math.inf)])
def test_folds_are_the_triangle_wave(low, high):
    x = torch.linspace(-9.0, 9.0, 4001, dtype=F64)[:, None].requires_grad_()
    y, sign = Reflected(gb.MALA(0.1), low, high).fold(x)
    width = high - low
    if math.isfinite(width):
        expected = low + width - (torch.remainder(x - low, 2 * width) - width).abs()
    else:
        expected = low + (x - low).abs() if math.isfinite(low) else high - (x - high).abs() if high < 2 else x
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, sign)
    inside = (x >= low) & (x <= high)
    assert torch.equal(y[inside], x[inside])
    rise = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    straight = sign[1:] == sign[:-1]
    torch.testing.assert_close(rise[straight], sign[1:][straight], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_folded_points_lie_inside_to_the_last_bit(dtype):
    x = torch.randn((200_000, 1), generator=seeded(), dtype=dtype) * 30
    x = torch.cat((x, torch.tensor([[-1e-30], [1e-30], [0.1], [-0.3], [0.7]], dtype=dtype)))
    wrapped = Wrapped(gb.MALA(0.1), 0.1, 0.0).fold(x)[0]
    assert bool(((wrapped >= 0.0) & (wrapped < torch.tensor(0.1, dtype=dtype))).all())
    assert bool(Torus(0.1, 0.0).check(Torus(0.1, 0.0).wrap(x)).all())
    folded = Reflected(gb.MALA(0.1), 0.1, 0.3).fold(x)[0]
    assert bool(((folded >= torch.tensor(0.1, dtype=dtype)) & (folded <= torch.tensor(0.3, dtype=dtype))).all())
    lost = torch.tensor([[math.nan], [math.inf], [-math.inf]], dtype=dtype)
    assert bool(Reflected(gb.MALA(0.1), 0.0, 1.0).fold(lost)[0].isnan().all())
    assert bool(Wrapped(gb.MALA(0.1), 1.0).fold(lost)[0].isnan().all())


@dataclasses.dataclass(frozen=True)
class Ball:
    """Straight on at constant velocity: a kernel with momentum and nothing else."""

    step_size: float

    gradients = 1
    domain = "real"
    __repr__ = settings_repr

    def init(self, energy, x):
        return State(x, *evaluate(energy, x), momentum=(torch.ones_like(x),))

    def noise(self, state, steps, rng):
        return (torch.zeros(steps, len(state.x)),)

    def step(self, energy, state, noise):
        x = state.x + self.step_size * state.momentum[0]
        value, grad = evaluate(energy, x)
        return state._replace(x=x, energy=value, grad=grad), Info(torch.ones_like(value), torch.zeros_like(value))


def test_a_kernel_that_compiles_a_part_of_its_own_finds_the_graph_again(graphs):
    """Each step sees the energy through a new `Lifted`, whose graphs belong to the energy inside."""
    energy, start = gb.Gaussian(2).double(), torch.rand((4, 2), generator=seeded(), dtype=F64)
    for inner in (energy, energy.forward):
        assert owner_of(Lifted(inner, IN_BOX[0])) is inner
    graphs()
    for kernel in (Reflected(gb.MALA(0.1), 0.0, 1.0), Reflected(gb.MALA(0.2), 0.0, 1.5)) * 2:
        lifted = Lifted(energy, with_tensor_settings(kernel, start))
        value, _ = compiled(evaluate, owner_of(lifted))(lifted, start)
        torch.testing.assert_close(value, energy(start))
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("kernel", "target"), [(ON_TORUS[2], ANGLES), (IN_BOX[0], BOXED), (Reflected(gb.ULA(0.05), LOW, HIGH), BOXED)]
)
def test_inductor_gives_the_eager_chains(kernel, target):
    start = target.draw(7, seeded())
    eager, compiled = (
        gb.sample(target.energy, kernel, start, steps=20, rng=seeded(1), thin=1, compile=c) for c in (False, True)
    )
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-10)


def test_momenta_are_reflected_with_positions():
    energy = gb.Energy.of(lambda x: x.square().sum(1) + x[:, 0])
    start = torch.tensor([[0.1, 0.4], [0.9, 0.0]], dtype=F64)
    kernel = Reflected(Ball(0.07), 0.0, 1.0)
    out = gb.sample(energy, kernel, start, steps=100, rng=seeded(), thin=1)
    assert not has_step_size(kernel)
    for k in range(1, 101):
        y, sign = kernel.fold(start + 0.07 * k)
        torch.testing.assert_close(out.draws[k - 1], y, rtol=0, atol=1e-12)
    assert torch.equal(out.state.momentum[0], sign)
    torch.testing.assert_close(out.state.grad, 2 * out.x + torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=1e-12)


def test_restarted_chains_return_to_where_they_started():
    def energy(x):
        return torch.where(x[:, 0] > 0.9, torch.nan, x.sum(1))

    start = torch.full((200, 1), 0.5, dtype=F64)
    out = gb.sample(energy, Reflected(gb.ULA(0.05), 0.0, 1.0), start, steps=20, rng=seeded(), thin=1)
    assert torch.equal((out.draws == start).all(2).sum(0).double(), out.nonfinite)
    assert int(out.nonfinite.sum()) > 100


def test_tuning_goes_through_the_wrapper(graphs):
    start = ANGLES.draw(256, seeded())
    tuned = tune(ANGLES.energy, Wrapped(gb.MALA(1e-3), TURN), start, rng=seeded(1), steps=200, compile=True)
    assert isinstance(tuned.kernel, Wrapped)
    assert isinstance(tuned.kernel.kernel.step_size, float)
    assert tuned.kernel.step_size == tuned.kernel.kernel.step_size > 0.05
    assert abs(tuned.acceptance - 0.574) < 0.03
    assert graphs() == 1
    boxed = tune(BOXED.energy, Reflected(gb.HMC(1e-3, 3), LOW, HIGH), BOXED.draw(256, seeded()), rng=seeded(1))
    assert abs(boxed.acceptance - 0.8) < 0.03
    with pytest.raises(ArgumentTypeError, match="accepts every step"):
        tune(ANGLES.energy, Wrapped(gb.ULA(0.1), TURN), start, rng=seeded())


def test_settings_inside_are_tensors_in_the_loop_and_step_sizes_are_set_inside():
    kernel = Wrapped(gb.MALA(0.1), TURN)
    moving = with_tensor_settings(kernel, torch.zeros(1, dtype=F64))
    for value in (moving.kernel.step_size, moving.period, moving.low):
        assert value.dtype == F64
        assert value.ndim == 0
    assert with_step_size(kernel, 0.5) == Wrapped(gb.MALA(0.5), TURN)
    assert (kernel.gradients, kernel.details, kernel.dynamic) == (1, (), False)
    assert Wrapped(gb.HMC(0.1, 7), TURN).gradients == 7
    assert Wrapped(gb.HMC(0.1, 7), TURN).details == ("hamiltonian",)
    assert repr(Reflected(gb.MALA(0.1), 0.0)) == "Reflected(kernel=MALA(step_size=0.1), low=0.0, high=inf)"


def test_chains_in_a_wrapper_may_have_step_sizes_of_their_own_on_images_too(monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(0, 2), slice(2, 4)])
    sizes = torch.tensor([0.1, 0.2, 0.1, 0.2], dtype=F64)
    energy, start = gb.Gaussian((1, 3, 3)).double(), torch.full((4, 1, 3, 3), 0.5, dtype=F64)
    each = gb.sample(energy, Reflected(gb.MALA(sizes), 0.0, 1.0), start, steps=4, rng=seeded())
    one = gb.sample(energy, Reflected(gb.MALA(0.2), 0.0, 1.0), start, steps=4, rng=seeded())
    assert torch.equal(each.x[1::2], one.x[1::2])
    assert not torch.equal(each.x[::2], one.x[::2])


def test_the_domain_of_an_energy_serves_as_the_setting():
    assert Wrapped(gb.MALA(0.1), ANGLES.energy.support) == Wrapped(gb.MALA(0.1), 2 * math.pi, -math.pi)
    assert Wrapped(gb.MALA(0.1), constraints.independent(TURN, 1)) == Wrapped(gb.MALA(0.1), TURN)
    unit = Reflected(gb.MALA(0.1), constraints.independent(constraints.interval(0.0, 1.0), 1))
    assert (unit.low, unit.high) == (0.0, 1.0)
    half = Reflected(gb.MALA(0.1), constraints.positive)
    assert (half.low, half.high) == (0.0, math.inf)
    energy = gb.Energy.of(lambda x: x.sum(1), (2,), constraints.interval(0.0, 1.0))
    gb.sample(energy, unit, torch.full((3, 2), 0.5), steps=2, rng=seeded())


def test_starts_on_the_torus_are_wrapped():
    start = ANGLES.draw(5, seeded())
    turned = start + 2 * math.pi * torch.tensor([3.0, -2.0], dtype=F64)
    a, b = (gb.sample(ANGLES.energy, ON_TORUS[0], x, steps=5, rng=seeded(1)).x for x in (start, turned))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


FACTOR = torch.eye(2)
START = torch.full((4, 2), 0.5)
REFUSED = {
    "outside": (lambda: walk(Reflected(gb.MALA(0.1), 0.0, 0.4)), DomainError, "4 of 4 chains start outside the box"),
    "dense scale": (
        lambda: walk(Reflected(gb.MALA(0.1, scale=FACTOR), 0.0)),
        OptionError,
        r"diagonal scale of \(2,\) standard deviations; a dense factor \(2, 2\)",
    ),
    "corner of another shape": (
        lambda: walk(Reflected(gb.MALA(0.1), torch.zeros(3))),
        ShapeError,
        r"event's shape, \(2,\); got \(3,\)",
    ),
    "no box": (lambda: Reflected(gb.MALA(0.1), 1.0, 1.0), OptionError, "low < high .* got low=1.0, high=1.0"),
    "NaN corner": (lambda: Reflected(gb.MALA(0.1), math.nan), OptionError, "low < high"),
    "words for corners": (lambda: Reflected(gb.MALA(0.1), "unit"), OptionError, "low is a number .* got 'unit'"),
    "no period": (lambda: Wrapped(gb.MALA(0.1), 0.0), OptionError, "positive length of a turn; got 0.0"),
    "words for a period": (lambda: Wrapped(gb.MALA(0.1), "turn"), OptionError, "such as energy.support; got 'turn'"),
    "kernel's class": (lambda: Wrapped(gb.MALA, 1.0), ArgumentTypeError, r"such as MALA\(0.1\); got"),
    "no kernel": (lambda: Reflected("mala", 0.0), ArgumentTypeError, "got 'mala'"),
    "twice": (lambda: Wrapped(Reflected(gb.MALA(0.1), 0.0), 1.0), OptionError, "needs a kernel over the reals"),
    "a box of its own": (lambda: Reflected(gb.ULA(0.1, box=(0, 1)), 0.0), OptionError, "Drop its box"),
    "torus on the reals": (lambda: walk(Wrapped(gb.MALA(0.1), 1.0)), DomainError, "Wrapped walks on torus states"),
    "reals on the torus": (
        lambda: gb.sample(ANGLES.energy, gb.MALA(0.1), START, steps=1, rng=seeded()),
        DomainError,
        "Wrapped",
    ),
}


def walk(kernel):
    return gb.sample(gb.Gaussian(2), kernel, START, steps=1, rng=seeded())


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_too_far_to_fold_are_not_finite(dtype):
    """Else a step size tuned on a flat energy grows until rounding puts every point into one corner."""
    reach = torch.finfo(dtype).eps ** -0.5
    for kernel in (Wrapped(gb.MALA(0.1), 1.0, 0.0), Reflected(gb.MALA(0.1), 0.0, 1.0)):
        near, far = (torch.full((1, 1), factor * reach, dtype=dtype) for factor in (0.9, 1.1))
        assert bool(kernel.fold(near)[0].isfinite())
        assert bool(kernel.fold(far)[0].isnan())
        assert bool(kernel.fold(-far)[0].isnan())
    half_line = Reflected(gb.MALA(0.1), 0.0)
    assert float(half_line.fold(torch.full((1, 1), -1e12, dtype=dtype))[0]) == pytest.approx(1e12)


def test_annealing_in_a_box_from_a_flat_base_finds_log_z():
    """The pilot run tunes step sizes at beta = 0 first, where every step is accepted."""
    base = gb.Uniform(2, low=0.0, high=1.0).double()
    tilted = base + gb.Energy.of(lambda x: 3.0 * x.sum(1), (2,))
    truth = 2.0 * math.log((1.0 - math.exp(-3.0)) / 3.0)
    for kernel in (Reflected(gb.MALA(0.05), 0.0, 1.0), Reflected(gb.HMC(0.1, 3), 0.0, 1.0)):
        found = gb.ais(tilted, base, kernel=kernel, rng=seeded(), chains=512)
        assert abs(float(found.value) - truth) < 5.0 * float(found.stderr)
        assert float(found.stderr) < 0.1


@pytest.mark.parametrize(
    ("kernel", "target"),
    [(Wrapped(gb.NUTS(0.7, max_depth=3), TURN), "angles"), (Reflected(gb.NUTS(0.4, max_depth=3), LOW, HIGH), "box")],
    ids=["torus", "box"],
)
def test_trajectories_that_find_their_length_are_exact_on_domains_too(kernel, target):
    assert_invariant(kernel, ANGLES if target == "angles" else BOXED, steps=2)
