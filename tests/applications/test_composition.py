"""Composition: draws and log Z of every kind against grids, Gaussians in closed form, twins that are caught."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from compositions import CASES, HIGH, LOW, POPULATIONS, A, B, check_moments, exact, gaussians, levels
from torch.distributions import constraints as supports

from contracts import seeded
from gibbsian.applications import composition
from gibbsian.applications.composition import compose
from gibbsian.applications.feynman_kac import Step
from gibbsian.applications.terms import windowed
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.classifier import ClassifierEnergy
from gibbsian.energies.noise import NoiseConditional
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA

START = Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=HIGH)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(energy, count=12, seed=0, chains=2048, **options):
    options = {"populations": POPULATIONS, "steps": 3} | options
    return compose(energy, levels(count), rng=seeded(seed), chains=chains, **options)


def check_log_z(out, energy) -> None:
    z = float((out.log_z.value - exact(energy)[0]) / out.log_z.stderr)
    assert abs(z) < 6.0, f"log Z {out.log_z} is {z} standard errors off"


WAYS = {
    "both": {},
    "weights": {"steps": 0, "resample": 0.7},
    "in place": {"predict": False},
    "HMC": {"kernel": HMC(1.0, leapfrog=3), "steps": 1},
    "a function": {"kernel": lambda sigma: MALA(0.1 * min(sigma, 1.0) ** 2)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_particles_have_the_compositions_moments_and_log_z(name, way):
    out = run(CASES[name], **WAYS[way])
    check_moments(out, CASES[name])
    check_log_z(out, CASES[name])
    assert float(out.log_z.stderr) < 0.1


def test_a_given_start_is_corrected_for():
    out = run(CASES["product"], start=Gaussian(loc=torch.tensor([3.0, 0.0]), scale=5.0))
    check_moments(out, CASES["product"])
    check_log_z(out, CASES["product"])
    narrow = run(CASES["product"], start=Gaussian(loc=torch.tensor([0.0, 0.0]), scale=50.0))
    assert narrow.temperatures > 1
    check_log_z(narrow, CASES["product"])


@pytest.mark.parametrize("name", ["product", "negation"])
def test_moves_alone_draw_from_it_as_far_as_chains_mix(name):
    out = run(CASES[name], count=20, weights=False, steps=6)
    check_moments(out, CASES[name], bias=0.05)
    assert out.log_z is None
    assert out.correction == "moves"
    assert bool((out.log_weights == 0.0).all())


@pytest.mark.parametrize("name", ["product", "negation"])
def test_the_reverse_step_alone_does_not(name):
    out = run(CASES[name], count=40, weights=False, steps=0)
    assert out.correction == "none"
    with pytest.raises(AssertionError, match="moments off"):
        check_moments(out, CASES[name])


def forgetful(honest, part):
    """A step whose weights lack a part."""

    def take(self, c, rng, rows=None):
        new, gained = honest(self, c, rng, rows)
        if part == "half":
            return new, 0.5 * gained
        value = self.value if rows is None else self.value[rows]
        return new, value.double() - self.target(new).double()

    return take


@pytest.mark.parametrize("part", ["half", "proposals"])
def test_wrong_weights_are_caught(part, monkeypatch):
    # Steps with another noise than suits a product, so that much is left to the weights.
    monkeypatch.setattr(Step, "best", lambda self, c, rng: 0.75)
    honest = Step.take
    check_moments(run(CASES["product"], count=24, steps=0, chains=8192), CASES["product"], power=0.1)
    monkeypatch.setattr(Step, "take", forgetful(honest, part))
    out = run(CASES["product"], count=24, steps=0, chains=8192)
    with pytest.raises(AssertionError, match="log Z"):
        check_log_z(out, CASES["product"])
    with pytest.raises(AssertionError, match="moments off"):
        check_moments(out, CASES["product"], power=1.0)


def test_gaussians_in_closed_form_have_even_weights():
    """Of N(m_i, s^2) the noisy product is again Gaussian, and the reverse step exact: nothing is left to repair."""
    a, b = gaussians([[1.0, 0.0]], [1.0], [1.0]), gaussians([[0.0, 2.0]], [1.0], [1.0])
    out = run(a + b, count=8, steps=0, chains=2048)
    v = 1.0 + LOW**2
    truth = -5.0 / (4.0 * v) - math.log(4.0 * math.pi * v)
    assert abs(float(out.log_z.value) - truth) < 0.01
    assert float(out.ess[-1]) > 0.97 * 2048
    x = out.draw(2048, seeded(1))
    assert float((x.mean(0) - torch.tensor([0.5, 1.0])).abs().max()) < 6.0 * math.sqrt(0.5 / 2048)
    # The product has half the noise; the step of a single density would have left uneven weights.
    assert bool((out.noise == out.noise[0]).all())
    assert abs(float(out.noise[0]) - 0.5) < 0.01
    assert isinstance(out.start, Gaussian)
    assert float((out.start.loc - torch.tensor([0.5, 1.0])).abs().max()) < 0.01


def test_terms_without_noise_levels_act_at_all_of_them_and_terms_in_windows_there():
    net = torch.nn.Linear(2, 3)
    classifier = ClassifierEnergy(net, 3, (2,)).joint.given(y=1)
    plain = A + 0.5 * classifier + Gaussian(loc=torch.tensor([0.5, 0.5]), scale=2.0)
    out = run(plain)
    check_moments(out, plain)
    check_log_z(out, plain)
    late = A + windowed(Gaussian(loc=torch.tensor([-0.5, 0.0]), scale=0.7), high=0.5)
    check_moments(run(late), late)
    early = A + windowed(B, low=1.0)
    out = run(early)
    check_moments(out, A)
    assert abs(float(out.log_z.value)) < 6.0 * float(out.log_z.stderr)


def test_levels_far_apart_are_paid_for_in_weights_not_in_errors():
    few = compose(A + B, [8.0, 2.0, 0.7, 0.25, LOW], rng=seeded(2), chains=8192, populations=POPULATIONS, steps=3)
    check_moments(few, A + B)
    assert float(few.ess.min()) < float(run(A + B).ess.min()) * 4


def test_step_sizes_follow_the_acceptance():
    out = run(A + B, count=40)
    assert out.acceptance.shape == out.ess.shape == out.step_sizes.shape == (41,)
    assert out.noise.shape == (40,)
    assert abs(float(out.acceptance[20:].mean()) - 0.574) < 0.05
    assert float(out.step_sizes[-1]) < 0.1 * float(out.step_sizes[0])
    fixed = run(A + B, count=4, kernel=lambda sigma: MALA(0.1 * sigma))
    torch.testing.assert_close(fixed.step_sizes, 0.1 * torch.tensor(fixed.levels))
    assert bool(run(A + B, count=4, steps=0).acceptance.isnan().all())


def test_an_unadjusted_kernel_is_reported_as_uncorrected():
    out = run(A + B, kernel=lambda sigma: ULA(0.05 * sigma**2))
    assert out.log_z is None
    assert out.correction == "none (ULA is not adjusted: uncorrected)"
    assert "uncorrected" in repr(out)
    assert bool((out.acceptance == 1.0).all())


def test_it_reads_well_and_draws():
    out = run(A + B, count=8)
    told = repr(out)
    for part in ("2048 points of shape (2,), 9 noise levels from 8 to 0.05", "corrected by weights and moves",
                 "effective number", "acceptance", "log Z = "):  # fmt: skip
        assert part in told
    assert out.draw(100, seeded()).shape == (100, 2)
    whole = run(A + B, count=4, populations=1, steps=1)
    assert math.isnan(float(whole.log_z.stderr))
    seen = []
    run(A + B, count=4, progress=seen.append)
    assert seen == [1] * 5
    more = run(A + B, count=4, last_steps=0)
    assert math.isnan(float(more.acceptance[-1]))


def test_float32_energies_of_other_shapes():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    a, b = NoiseConditional((1, 3, 3), width=16, blocks=1), NoiseConditional((1, 3, 3), width=16, blocks=1)
    out = compose(a + b, levels(6), rng=seeded(), chains=256, populations=2, steps=1)
    assert out.x.shape == (256, 1, 3, 3)
    assert out.x.dtype == torch.float32


def test_a_difference_that_is_not_normalisable_is_told():
    wide = gaussians([[0.0, 0.0]], [2.0], [1.0])
    with pytest.warns(RuntimeWarning, match="probably not normalisable at noise level 8"), pytest.raises(OptionError):
        run(A - 1.1 * wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(A - 0.5 * wide, count=6).growth.normalisable
        assert run(A + B, count=6).growth is None


def test_levels_that_never_reach_noise_are_told():
    far = gaussians([[-3.0, 0.0], [3.0, 0.0]], [0.3, 0.3], [0.2, 0.8])
    with pytest.raises(OptionError, match="never reach noise: at the highest, 1"):
        compose(far, [1.0, 0.5, 0.1], rng=seeded())
    with pytest.warns(RuntimeWarning, match="never reach noise"):
        out = compose(far, [1.0, 0.5, LOW], rng=seeded(), start=START, chains=8192, populations=POPULATIONS)
    check_moments(out, far, power=0.06)


def nothing_there(x, sigma):
    return x.sum(1) * math.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: A + Gaussian(3), ShapeError, "different shapes, \\(2,\\) and \\(3,\\)"),
        (lambda: mixture(Energy.of(lambda x: x.sum(1), (2,), supports.interval(0.0, 1.0)), Bernoulli(torch.zeros(2))),
         DomainError, "different domains"),
        (lambda: compose(A + B, [1.0, 2.0], rng=seeded()), OptionError, "falling"),
        (lambda: compose(A + B, [2.0, 0.0], rng=seeded()), OptionError, "last level is above 0"),
        (lambda: compose(Gaussian(2) + Gaussian(2), [2.0, 1.0], rng=seeded()), OptionError, "knows noise levels"),
        (lambda: compose(3, [2.0, 1.0], rng=seeded()), ArgumentTypeError, "built by"),
        (lambda: compose(A + math.nan * B, [2.0, 1.0], rng=seeded()), OptionError, "is nan"),
        (lambda: compose(A + torch.tensor(math.inf) * B, [2.0, 1.0], rng=seeded()), OptionError, "is inf"),
        (lambda: compose(Energy.of(nothing_there, (2,), context=("sigma", "y")), [2.0, 1.0], rng=seeded()),
         OptionError, "still asks for y"),
        (lambda: compose(Energy.of(nothing_there, (2,), context=("sigma",)), [2.0, 1.0], rng=seeded()),
         OptionError, "never reach noise"),
        (lambda: compose(Energy.of(nothing_there, context=("sigma",)), [2.0, 1.0], rng=seeded()),
         OptionError, "shape of a point"),
        (lambda: compose(Energy.of(nothing_there, (2,), supports.boolean, ("sigma",)), [2.0, 1.0], rng=seeded()),
         DomainError, "Gaussian noise"),
        (lambda: compose(A, levels(4), rng=seeded(), start=torch.zeros(4, 2)), ArgumentTypeError, "density"),
        (lambda: compose(A, levels(4), rng=seeded(), start=Gaussian(3)), ShapeError, "shape"),
        (lambda: compose(A, levels(4), rng=seeded(), kernel=MALA), ArgumentTypeError, "kernel"),
        (lambda: compose(A, levels(4), rng=seeded(), kernel=lambda sigma: 3), ArgumentTypeError, "kernel"),
        (lambda: compose(A, levels(4), rng=seeded(), chains=100, populations=16), OptionError, "multiple"),
        (lambda: compose(A, levels(4), rng=seeded(), steps=-1), OptionError, "0 or more"),
        (lambda: compose(A, levels(4), rng=seeded(), resample=0.0), OptionError, "resample"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def broken_below(x, sigma):
    return A(x, sigma=sigma) + torch.where(sigma < 1.0, math.nan, 0.0) * x[:, 0]


def half_broken(x, sigma):
    return A(x, sigma=sigma) + torch.where((sigma < 1.0) & (x[:, 0] > 0.0), math.inf, 0.0)


def test_energies_that_are_not_finite():
    broken = Energy.of(broken_below, (2,), context=("sigma",))
    with pytest.raises(DivergenceError, match="at all"):
        run(broken)
    with pytest.raises(DivergenceError, match="left the numbers"):
        run(broken, weights=False)
    half = run(Energy.of(half_broken, (2,), context=("sigma",)))
    # What is left of the two parts: 0.4 of mean -1, deviation 0.3, and 0.6 of mean 1, deviation 0.4.
    left = [math.erfc(-m / math.sqrt(2.0 * (s**2 + LOW**2))) / 2.0 for m, s in ((1.0, 0.3), (-1.0, 0.4))]
    assert half.nonfinite > 0
    assert abs(float(half.log_z.value) - math.log(0.4 * left[0] + 0.6 * left[1])) < 6.0 * float(half.log_z.stderr)
    assert float(half.log_z.stderr) < 0.1
    assert bool((half.x[:, 0] <= 0.0).all())


def test_weights_in_the_wrong_order_are_caught(monkeypatch):
    """A twin that resamples before it has weighed, so that the weights belong to other particles."""
    real = composition.weigh
    monkeypatch.setattr(composition, "weigh", lambda at, gained, *rest: real(at, gained.flip(0), *rest))
    with pytest.raises(AssertionError, match="moments off"):
        check_moments(run(CASES["product"], steps=0), CASES["product"], power=1.0)
