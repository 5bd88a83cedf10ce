"""Normal noise from counters: SplitMix64's stream, independent normal numbers, whatever the blocks."""

import math

import pytest
import torch
from scipy import stats

import gibbsian as gb
from contracts import seeded
from gibbsian.compilation import wanting
from gibbsian.kernels.discrete import uniforms
from gibbsian.kernels.normals import (
    DOUBLED,
    MANY,
    _cosine_and_sine,
    _odd_and_varied,
    from_counters,
    normals,
    normals_and_uniforms,
    splitmix,
    uniforms_from_counters,
    varied,
)
from gibbsian.sampling import sample
from kernels.test_compiled import needs_compiler

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""The increment of the reference implementation."""


def counted(steps=4, m=500_000, rng=None):
    keys = torch.randint(-(2**63), 2**63 - 1, (2, steps, 1), generator=rng or seeded())
    increments = torch.tensor([[_odd_and_varied(int(k))] for k in keys[1]])
    return from_counters(keys[0], increments, m)


def assert_independent_normals(z):
    """Check marginals (Kolmogorov-Smirnov, moments, tails) and the independence of halves, neighbours and steps.

    A false alarm is about one seed in five thousand: p > 1e-4 for one test, 5 standard errors for thirty numbers.
    """
    z = z.double()
    n = z.numel()
    assert stats.kstest(z.flatten(), "norm").pvalue > 1e-4
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float(z.pow(power).mean()) - mean) < 5 * math.sqrt(variance / n)
    for limit in (3.0, 4.0, 4.75):
        expected = n * math.erfc(limit / math.sqrt(2))
        assert abs(int((z.abs() > limit).sum()) - expected) < 5 * math.sqrt(expected) + 1
    half = z.shape[1] // 2
    for one, other in ((z[:, :half], z[:, half:]), (z[:, :-1], z[:, 1:]), (z[:, :-32], z[:, 32:]), (z[:-1], z[1:])):
        for f in (lambda v: v, lambda v: v.square() - 1, torch.sign, lambda v: v.abs() - math.sqrt(2 / math.pi)):
            product = f(one) * f(other)
            assert abs(float(product.mean())) < 5 * float(product.std()) / math.sqrt(product.numel())


def test_words_are_those_of_splitmix():
    seed = torch.tensor(1234567)
    words = splitmix(seed + GOLDEN * torch.arange(1, 6))
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    assert [int(w) % 2**64 for w in words] == list(known)


def test_increments_are_odd_and_never_monotonous():
    for k in (0, 1, 2**62, -1, -(2**63), 0x5555555555555555, 12345678901234567):
        odd = _odd_and_varied(k)
        assert odd % 2
        assert ((odd ^ (odd >> 1)) % 2**64).bit_count() >= 24


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_independent_and_normal(seed):
    assert_independent_normals(counted(rng=seeded(seed)))


def test_what_is_not_normal_or_not_independent_is_caught(monkeypatch):
    z = counted()
    for twin in (z * 1.01, z + 0.01, z.clamp(-3.9, 3.9), z[:1].expand(4, -1), z.roll(1, 0) * 0.1 + z * 0.995):
        with pytest.raises(AssertionError):
            assert_independent_normals(twin)
    # The same bits for radius and angle, and a counter that is not mixed.
    monkeypatch.setattr("gibbsian.kernels.normals.splitmix", lambda w: (w >> 32 << 32) | ((w >> 32) & 0xFFFFFFFF))
    with pytest.raises(AssertionError):
        assert_independent_normals(counted())
    monkeypatch.setattr("gibbsian.kernels.normals.splitmix", lambda w: w)
    with pytest.raises(AssertionError):
        assert_independent_normals(counted())


def test_cosine_and_sine_are_those_of_torch():
    a = torch.linspace(-0.5, 0.5, 100_001) * math.pi
    for own, torchs in zip(_cosine_and_sine(a), (a.double().cos(), a.double().sin())):
        assert float((own - torchs).abs().max()) < 2e-7


def test_odd_numbers_of_normals():
    z = counted(steps=2, m=7)
    assert z.shape == (2, 7)
    assert torch.equal(z, counted(steps=2, m=8)[:, :7])


@needs_compiler
def test_two_blocks_hold_the_numbers_of_one_and_compilation_changes_rounding_only():
    like = torch.zeros(MANY // 4, 4)
    with wanting(True):
        whole = normals_and_uniforms(5, like, rng := seeded())
        rng.manual_seed(0)
        parts = [normals_and_uniforms(steps, like, rng) for steps in (3, 2)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    rng.manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (2,), generator=rng)
    eager = from_counters(keys[:1, None], torch.tensor([[_odd_and_varied(int(keys[1]))]]), like.numel())
    torch.testing.assert_close(whole[0][0].flatten(), eager[0], rtol=1e-5, atol=1e-5)


@needs_compiler
def test_many_numbers_of_a_step_come_in_halves_by_one_graph_whatever_the_steps(graphs):
    like, keys = torch.zeros(DOUBLED // 2 + 4, 4), torch.randint(-(2**63), 2**63 - 1, (3, 2, 2), generator=seeded())
    with wanting(True):
        whole = normals_and_uniforms(3, like, rng := seeded())
        rng.manual_seed(0)
        parts = [normals_and_uniforms(steps, like, rng) for steps in (2, 1)]
        assert graphs() == 1
        odd = [normals_and_uniforms(steps, torch.zeros(DOUBLED + 1), seeded())[0][0] for steps in (2, 1)]
    assert torch.equal(*odd)
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    # The words of both halves are those of the stream, each once.
    seeds, increments = keys[..., :1], varied(keys[..., 1:])
    for made, k, m, make in (
        (whole[0], 0, like.numel(), from_counters),
        (whole[1], 1, len(like), uniforms_from_counters),
    ):
        eager = make(seeds[:, k], increments[:, k], m)
        torch.testing.assert_close(made.flatten(1).sort(1).values, eager.sort(1).values, rtol=1e-5, atol=1e-5)


def test_few_numbers_doubles_and_uncompiled_runs_take_torchs_own():
    few, doubles, many = torch.zeros(8, 2), torch.zeros(MANY, 1, dtype=torch.float64), torch.zeros(MANY, 1)
    for like, wanted in ((few, True), (doubles, True), (many, False)):
        with wanting(wanted):
            z = normals(1, like, seeded())
        assert torch.equal(z[0], torch.randn(like.shape, generator=seeded(), dtype=like.dtype))


@needs_compiler
def test_many_compiled_chains_keep_their_distribution_and_go_on_exactly():
    base = gb.Gaussian(dim=2)
    start = base.sample(MANY, seeded())
    out = sample(base, gb.HMC(0.5, leapfrog=3), start, steps=12, rng=(rng := seeded(1)), compile=True)
    error = 5 / math.sqrt(MANY)
    assert float(out.x.mean(0).abs().max()) < error
    assert float((out.x.T.cov() - torch.eye(2)).abs().max()) < math.sqrt(2) * error
    rng.manual_seed(1)
    first = sample(base, gb.HMC(0.5, leapfrog=3), start, steps=7, rng=rng, compile=True)
    assert torch.equal(sample(base, gb.HMC(0.5, leapfrog=3), first.state, steps=5, rng=rng, compile=True).x, out.x)


def counted_uniforms(steps=3, m=400_000):
    keys = torch.randint(-(2**63), 2**63 - 1, (2, steps, 1), generator=seeded(7))
    return uniforms_from_counters(keys[0], varied(keys[1]), m)


def assert_independent_uniforms(u):
    """Chi-square of high, middle and low bits, and of pairs of halves, neighbours and steps; false alarms 1 in 1000."""
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    whole = (u.double() * 2.0**24).long()
    assert torch.equal(whole.double() * 2.0**-24, u.double())
    half = u.shape[1] // 2
    for cells in (whole >> 16, (whole >> 8) & 255, whole & 255):
        assert stats.chisquare(torch.bincount(cells.flatten(), minlength=256).numpy()).pvalue > 1e-4
    for one, other in ((u[:, :half], u[:, half:]), (u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        pairs = (one * 16).long() * 16 + (other * 16).long()
        assert stats.chisquare(torch.bincount(pairs.flatten(), minlength=256).numpy()).pvalue > 1e-4


def test_uniform_numbers_are_uniform_and_independent():
    assert_independent_uniforms(counted_uniforms())


def test_uniform_numbers_that_are_not_are_caught():
    u = counted_uniforms()
    for twin in (u**1.02, u[:1].expand(3, -1), torch.cat((u[:, :200_000], u[:, :200_000]), 1), u.round(decimals=4)):
        with pytest.raises(AssertionError):
            assert_independent_uniforms(twin)


@needs_compiler
def test_two_blocks_of_uniforms_are_one_and_the_compiled_ones_are_the_eager_ones():
    like, shapes = torch.zeros(4, 3), ((4, MANY), (4,))
    with wanting(True):
        whole = uniforms(3, rng := seeded(), like, *shapes)
        rng.manual_seed(0)
        parts = [uniforms(steps, rng, like, *shapes) for steps in (2, 1)]
    for each, one, other in zip(whole, *parts):
        assert torch.equal(each, torch.cat((one, other)))
    key = torch.randint(-(2**63), 2**63 - 1, (2,), generator=seeded())
    assert torch.equal(whole[0][0].flatten(), uniforms_from_counters(key[:1, None], varied(key[1:, None]), 4 * MANY)[0])
    eager = uniforms(1, seeded(), like, *shapes)
    assert torch.equal(eager[0][0], torch.rand(shapes[0], generator=seeded()))
