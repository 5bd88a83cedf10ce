"""Windowed warm-up: the scale it finds, the acceptance it gives, what it gains, and what it refuses."""

import dataclasses
import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import row_sum
from gibbsian.kernels.microcanonical import AdjustedMCLMC
from gibbsian.warmup import Moments, first_scale, warm_up, windows

DIM = 20


def correlated():
    """A covariance in 20 dimensions: correlations all around, and standard deviations from 0.01 to 1."""
    q = torch.linalg.qr(torch.randn((DIM, DIM), generator=seeded(3), dtype=torch.float64)).Q
    covariance = (q * torch.logspace(-1, 0, DIM, dtype=torch.float64)) @ q.T
    stretch = torch.logspace(-2, 0, DIM, dtype=torch.float64) / covariance.diag().sqrt()
    return covariance * stretch[:, None] * stretch


COVARIANCE = correlated()
SPREAD = COVARIANCE.diag().sqrt()
ENERGY = gb.Gaussian(covariance=COVARIANCE)
START = torch.randn((32, DIM), generator=seeded(1), dtype=torch.float64)
KERNELS = (gb.MALA(0.1), gb.HMC(0.1, leapfrog=10, jitter=0.5), AdjustedMCLMC(0.1, leapfrog=10, jitter=0.5))


def test_the_target_is_as_said():
    assert 1e4 < float(torch.linalg.cond(COVARIANCE)) < 2e4


def effective_draws(tuned):
    """Of the coordinate that has the fewest, in 200 steps after the warm-up."""
    out = gb.sample(ENERGY, tuned.kernel, tuned.state, steps=200, rng=seeded(5), thin=1)
    return float(gb.effective_sample_size(out.draws).min())


@pytest.mark.parametrize(
    ("kernel", "steps", "gain"),
    [(KERNELS[0], 1000, 3.0), (KERNELS[1], 500, 30.0), (KERNELS[2], 500, 50.0)],
    ids=["MALA", "HMC", "AdjustedMCLMC"],
)
def test_the_scale_is_recovered_the_acceptance_met_and_the_chains_mix_faster(kernel, steps, gain):
    """Positions of 32 chains in the last window, half of the steps, give standard deviations to a few per cent.

    The chains without a scale hardly move at all.
    """
    tuned = warm_up(ENERGY, kernel, START, rng=seeded(), steps=steps)
    assert float((tuned.kernel.scale / SPREAD - 1.0).abs().max()) < 0.1
    assert abs(tuned.acceptance - kernel.target_acceptance) < 0.05 + 5 * tuned.stderr
    plain = warm_up(ENERGY, kernel, START, rng=seeded(), steps=300, scale=None)
    assert plain.kernel.scale is None
    assert abs(plain.acceptance - kernel.target_acceptance) < 0.05 + 5 * plain.stderr
    assert effective_draws(tuned) > gain * effective_draws(plain)
    assert type(tuned.kernel) is type(kernel)
    assert type(tuned.kernel.step_size) is float
    assert {**vars(tuned.kernel), "step_size": 0, "scale": 0} == {**vars(kernel), "step_size": 0, "scale": 0}


@pytest.mark.parametrize(("kernel", "steps"), [(KERNELS[0], 1000), (KERNELS[1], 500)], ids=("MALA", "HMC"))
def test_a_dense_scale_makes_the_target_round(kernel, steps):
    """The covariance in round coordinates is the identity, within the error of thousands of correlated positions."""
    tuned = warm_up(ENERGY, kernel, START, rng=seeded(), steps=steps, scale="dense")
    white = torch.linalg.solve_triangular(tuned.kernel.scale, torch.linalg.cholesky(COVARIANCE), upper=False)
    error = float((white @ white.mT - torch.eye(DIM)).abs().max())
    assert error < 0.2, error
    assert abs(tuned.acceptance - kernel.target_acceptance) < 0.05 + 5 * tuned.stderr
    # In round coordinates the condition number is that of the error; the diagonal leaves the correlations, 10 and more.
    assert float(torch.linalg.cond(white @ white.mT)) < 1.5


class MomentsThatForgetTheRoot(Moments):
    """Variances where standard deviations belong."""

    def scale(self, before):
        return super().scale(before).square()


class MomentsOfEachBlock(Moments):
    """Squares about each block's own mean, summed: slow movement from block to block is not seen."""

    def add(self, draws):
        super().add(draws - draws.mean((0, 1)))


def test_the_recovery_exposes_broken_twins(monkeypatch):
    spread = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
    energy = gb.Gaussian(loc=torch.zeros(3, dtype=torch.float64), scale=spread)

    def error():
        kernel = gb.HMC(0.1, leapfrog=6, jitter=0.5)
        tuned = warm_up(energy, kernel, energy.sample(1, seeded()), rng=seeded(), steps=600)
        return float((tuned.kernel.scale / spread - 1.0).abs().max())

    assert error() < 0.2
    for twin in (MomentsThatForgetTheRoot, MomentsOfEachBlock):
        monkeypatch.setattr("gibbsian.warmup.Moments", twin)
        assert error() > 0.5


def test_chains_far_out_are_brought_in_and_forgotten():
    """They start 30 to 3000 standard deviations away; only early windows see it."""
    tuned = warm_up(ENERGY, KERNELS[1], 30.0 + START, rng=seeded(), steps=500)
    assert float((tuned.kernel.scale / SPREAD - 1.0).abs().max()) < 0.1
    excess = float((tuned.state.energy - ENERGY.log_normalizer).mean())
    # The energy's mean is d / 2 and its standard deviation (d / 2)^(1/2): six standard errors of 32 chains.
    assert abs(excess - 10.0) < 6 * 10.0**0.5 / 32**0.5


def test_the_parts_are_stans():
    assert windows(1000) == (75, [25, 50, 100, 200, 500], 50)
    assert windows(300) == (75, [25, 50, 100], 50)
    assert windows(150) == (75, [25], 50)
    assert windows(149) == (22, [113], 14)
    assert windows(20) == (3, [15], 2)
    # In blocks of ten steps each part is rounded up, and the last is long enough to settle.
    assert windows(1000, 10) == (8, [3, 5, 10, 55], 20)
    for steps in range(20, 1200):
        initial, slow, final = windows(steps)
        assert initial + sum(slow) + final == steps
        assert min(initial, *slow, final) >= 1


def test_moments_are_those_of_all_positions():
    draws = torch.randn((9, 4, 3), generator=seeded(), dtype=torch.float64).cumsum(0) + 1e3
    flat = draws.flatten(0, 1)
    before = torch.tensor([[2.0, 0.0, 0.0], [0.3, 1.0, 0.0], [0.0, 0.1, 4.0]], dtype=torch.float64)
    dense, diagonal = Moments(dense=True), Moments(dense=False)
    for block in draws.split(4):
        dense.add(block)
        diagonal.add(block)
    keep, floor = 36 / 41, 1e-3 * 5 / 41
    factor = dense.scale(before)
    torch.testing.assert_close(factor @ factor.mT, keep * flat.T.cov() + floor * before @ before.T, rtol=1e-9, atol=0)
    own = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(diagonal.scale(own) ** 2, keep * flat.var(0) + floor * own**2, rtol=1e-9, atol=0)


def test_fewer_positions_than_coordinates_make_a_factor_all_the_same():
    seen = Moments(dense=True)
    seen.add(torch.randn((2, 3, 50), generator=seeded(), dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(seen.squares)) == 5
    factor = seen.scale(torch.eye(50, dtype=torch.float64))
    assert float(factor.diagonal().min()) > 0.02
    gb.sample(gb.Gaussian(50), gb.MALA(0.1, scale=factor), torch.zeros(2, 50), steps=1, rng=seeded())
    # And so does a position alone, or chains that have not moved.
    still = Moments(dense=False)
    still.add(torch.ones((1, 1, 3), dtype=torch.float64))
    torch.testing.assert_close(still.scale(torch.ones(3)), torch.full((3,), (1e-3 * 5 / 6) ** 0.5))
    tuned = warm_up(
        gb.Gaussian(30), gb.HMC(0.1, 3), torch.randn((2, 30), generator=seeded()), rng=seeded(), steps=20, scale="dense"
    )
    assert tuned.kernel.scale.shape == (30, 30)


def test_units_do_not_matter():
    """In other units, with a first scale and step size to match, the chains are the same ones."""
    unit = 1e-5
    small = gb.Energy.of(lambda x: ENERGY(x / unit))
    ones = torch.ones(DIM, dtype=torch.float64)
    plain = warm_up(ENERGY, gb.HMC(0.1, 3, scale=ones), START, rng=seeded(), steps=100)
    other = warm_up(small, gb.HMC(0.1, 3, scale=unit * ones), unit * START, rng=seeded(), steps=100)
    torch.testing.assert_close(other.kernel.scale, unit * plain.kernel.scale, rtol=1e-6, atol=0)
    assert other.kernel.step_size == pytest.approx(plain.kernel.step_size, rel=1e-6)


def test_a_kernels_own_scale_is_where_it_starts():
    x = torch.zeros((2, 3), dtype=torch.float64)
    factor = torch.tensor([[2.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    deviations = torch.tensor([2.0, 5.0, 1.0])
    assert torch.equal(first_scale(None, "diagonal", x), torch.ones(3, dtype=torch.float64))
    assert torch.equal(first_scale(None, "dense", x), torch.eye(3, dtype=torch.float64))
    assert torch.equal(first_scale(factor, "diagonal", x), deviations.double())
    assert torch.equal(first_scale(factor, "dense", x), factor.double())
    assert torch.equal(first_scale(deviations, "diagonal", x), deviations.double())
    assert torch.equal(first_scale(deviations, "dense", x), deviations.double().diag())
    kept = warm_up(ENERGY, gb.MALA(0.1, scale=SPREAD), START, rng=seeded(), steps=100, scale=None)
    assert kept.kernel.scale is SPREAD


@pytest.mark.parametrize("scale", ["diagonal", "dense"])
def test_a_tuned_kernel_prints_and_serves_other_types(scale):
    tuned = warm_up(ENERGY, gb.MALA(0.1), START, rng=seeded(), steps=100, scale=scale)
    shape = (DIM,) if scale == "diagonal" else (DIM, DIM)
    assert repr(tuned.kernel) == f"MALA(step_size={tuned.kernel.step_size}, scale=<{shape}>)"
    assert tuned.kernel.scale.dtype == torch.float64
    out = gb.sample(gb.Gaussian(DIM), tuned.kernel, START.float(), steps=3, rng=seeded())
    assert out.x.dtype == torch.float32
    single = warm_up(gb.Gaussian(DIM), gb.MALA(0.1), START.float(), rng=seeded(), steps=100, scale=scale)
    assert single.kernel.scale.dtype == torch.float32
    gb.sample(ENERGY, single.kernel, START, steps=3, rng=seeded())


def test_images_have_a_standard_deviation_for_each_pixel():
    spread = torch.linspace(0.1, 2.0, 12, dtype=torch.float64).reshape(1, 3, 4)
    energy = gb.Energy.of(lambda x: 0.5 * row_sum((x / spread).square()), (1, 3, 4))
    start = torch.randn((64, 1, 3, 4), generator=seeded(), dtype=torch.float64)
    tuned = warm_up(energy, gb.HMC(0.1, leapfrog=5), start, rng=seeded(), steps=200)
    assert tuned.kernel.scale.shape == (1, 3, 4)
    assert float((tuned.kernel.scale / spread - 1.0).abs().max()) < 0.1
    with pytest.raises(ShapeError, match=r'dense scale is a factor \(d, d\).*\(64, 1, 3, 4\).*Use scale="diagonal"'):
        warm_up(energy, gb.HMC(0.1), start, rng=seeded(), scale="dense")


def test_the_result_goes_on_where_the_warm_up_stopped():
    made = []
    tuned = warm_up(ENERGY, gb.MALA(0.1), START[:4], rng=seeded(), steps=170, progress=made.append)
    again = warm_up(ENERGY, gb.MALA(0.1), START[:4], rng=seeded(), steps=170)
    assert torch.equal(tuned.state.x, again.state.x)
    assert torch.equal(tuned.kernel.scale, again.kernel.scale)
    initial, slow, final = windows(170, 10)
    assert made == [10] * (initial + sum(slow) + final)
    assert len(tuned.step_sizes) == len(made)
    assert gb.sample(ENERGY, tuned.kernel, tuned.state, steps=5, rng=seeded()).x.shape == (4, DIM)
    assert math.isnan(warm_up(ENERGY, tuned.kernel, START[:1], rng=seeded(), steps=20).stderr)
    assert warm_up(ENERGY, tuned.kernel, tuned.state, rng=seeded(), steps=20, target=0.3).acceptance < 0.55


@pytest.mark.parametrize("scale", ["diagonal", "dense"])
def test_all_parts_run_one_graph(graphs, scale):
    energy = gb.Gaussian(covariance=COVARIANCE)
    compiled, eager = (
        warm_up(energy, gb.HMC(0.1, 2), START[:4], rng=seeded(), steps=40, scale=scale, compile=compile)
        for compile in (True, False)
    )
    assert graphs() == 1
    torch.testing.assert_close(compiled.kernel.scale, eager.kernel.scale, rtol=1e-5, atol=0)


@dataclasses.dataclass(frozen=True)
class Unscaled:
    """A kernel with an acceptance and without a scale."""

    step_size: float
    target_acceptance = 0.5


@pytest.mark.parametrize(
    ("kernel", "options", "error", "message"),
    [
        (Unscaled(0.1), {}, ArgumentTypeError, "Unscaled has no scale to warm up; MALA, HMC, NUTS.* have one"),
        (gb.ULA(0.1), {}, ArgumentTypeError, "ULA accepts every step"),
        (gb.MALA, {}, ArgumentTypeError, "sets the step_size of a kernel"),
        (gb.MALA(0.1), {"steps": 19}, OptionError, r"steps is 20 or more.*; got 19\. tune\(\) takes fewer"),
        (gb.MALA(0.1), {"steps": 0}, OptionError, "got 0"),
        (gb.MALA(0.1), {"target": 1.0}, OptionError, "strictly between 0 and 1; got 1.0"),
        (gb.MALA(0.1), {"scale": "diag"}, OptionError, "no scale named 'diag'. Did you mean 'diagonal'"),
        (gb.MALA(0.1), {"scale": SPREAD}, OptionError, "no scale named"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused(kernel, options, error, message):
    with pytest.raises(error, match=message):
        warm_up(lambda x: x.square().sum(1), kernel, torch.zeros(4, 2), rng=seeded(), **options)


def test_energies_without_numbers_and_without_mass_are_refused_as_in_tune():
    with pytest.raises(DomainError, match="8 of 8 chains start"):
        warm_up(lambda x: torch.nan * x.sum(1), gb.MALA(0.1), torch.zeros(8, 2), rng=seeded())
    with pytest.raises(DivergenceError, match="Every step size is accepted"):
        warm_up(lambda x: 0.0 * x.sum(1), gb.HMC(0.1), torch.zeros(8, 2), rng=seeded())
