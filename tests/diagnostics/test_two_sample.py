"""Two-sample distances against closed forms, brute force and their own errors over repetitions."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import norm, wasserstein_distance

from gibbsian.diagnostics.two_sample import (
    classifier_test,
    energy_distance,
    frechet_distance,
    kernel_mmd,
    memorisation,
    nearest,
    sliced_wasserstein,
)
from gibbsian.errors import InputError, OptionError, ShapeError

# Five and a half standard errors: one false alarm in 26 million for a normal statistic.
Z = 5.5


def normal(n, d, seed, shift=0.0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng, dtype=torch.float64) * scale + shift


def folded_mean(mean, sd):
    """Mean of |N(mean, sd^2)|."""
    return sd * math.sqrt(2 / math.pi) * math.exp(-((mean / sd) ** 2) / 2) + mean * (1 - 2 * norm.cdf(-mean / sd))


def test_energy_distance_of_shifted_normals_is_the_closed_form():
    found = energy_distance(normal(3000, 1, 0), normal(2000, 1, 1, shift=1.0))
    exact = 2 * folded_mean(1.0, math.sqrt(2)) - 2 * folded_mean(0.0, math.sqrt(2))
    assert abs(found.value - exact) < Z * found.stderr
    assert found.stderr < 0.04


def test_mmd_of_shifted_normals_is_the_closed_form():
    h, shift = 0.7, 0.8
    found = kernel_mmd(normal(3000, 1, 2), normal(2500, 1, 3, shift=shift), bandwidth=h)
    height = h / math.sqrt(h * h + 2)
    exact = 2 * height * (1 - math.exp(-(shift**2) / (2 * (h * h + 2))))
    assert abs(found.value - exact) < Z * found.stderr
    assert found.stderr < 0.02


def brute_force(x, y, k):
    kxx, kyy, kxy = k(x, x), k(y, y), k(x, y)
    n, m = len(x), len(y)
    return (kxx.sum() - kxx.trace()) / (n * (n - 1)) + (kyy.sum() - kyy.trace()) / (m * (m - 1)) - 2 * kxy.mean()


def test_value_and_jackknife_agree_with_leaving_out_every_row():
    x, y = normal(17, 3, 4), normal(11, 3, 5, shift=0.5)

    def k(a, b):
        return (-torch.cdist(a, b).square() / 2).exp()

    def without(i, rows):
        return torch.cat([rows[:i], rows[i + 1 :]])

    left = torch.stack([brute_force(without(i, x), y, k) for i in range(17)])
    right = torch.stack([brute_force(x, without(j, y), k) for j in range(11)])
    variance = 16 * left.var(correction=0) + 10 * right.var(correction=0)
    found = kernel_mmd(x, y, bandwidth=1.0)
    assert found.value == pytest.approx(float(brute_force(x, y, k)), rel=1e-10)
    assert found.stderr == pytest.approx(float(variance.sqrt()), rel=1e-8)


def repeated_mean(statistic, repeats=150):
    values = torch.tensor([statistic(normal(20, 2, 2 * s), normal(30, 2, 2 * s + 1)) for s in range(repeats)])
    return float(values.mean() / (values.std() / math.sqrt(repeats)))


def test_energy_distance_is_unbiased_when_the_samples_agree_and_the_v_statistic_is_not():
    def biased(x, y):  # the broken twin: a row counts as its own partner
        return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())

    assert abs(repeated_mean(lambda x, y: energy_distance(x, y).value)) < Z
    assert abs(repeated_mean(biased)) > 2 * Z


def test_chunks_of_rows_change_nothing(monkeypatch):
    x, y = normal(50, 2, 6), normal(40, 2, 7)
    whole = energy_distance(x, y)
    monkeypatch.setattr("gibbsian.diagnostics.two_sample._CHUNK", 7)
    assert energy_distance(x, y) == pytest.approx(whole)


@pytest.mark.parametrize(
    "statistic",
    [
        energy_distance,
        kernel_mmd,
        frechet_distance,
        lambda x, y: sliced_wasserstein(x, y, rng=torch.Generator().manual_seed(len(x)), projections=32, resamples=20),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_reported_errors_are_the_spread_over_repetitions(statistic, shift):
    found = [statistic(normal(120, 3, 2 * s), normal(100, 3, 2 * s + 1, shift=shift)) for s in range(100)]
    spread = np.std([e.value for e in found], ddof=1)
    reported = math.sqrt(np.mean([e.stderr**2 for e in found]))
    # The spread of 100 is known to 7 per cent; errors may be conservative by a factor 1.8 when the samples agree.
    assert 0.65 < reported / spread < 2.2


def test_sliced_wasserstein_of_a_translation():
    x = normal(400, 1, 8)
    rng = torch.Generator().manual_seed(0)
    assert sliced_wasserstein(x, x + 0.75, rng=rng, resamples=2).value == pytest.approx(0.75, rel=1e-12)
    x, shift = normal(300, 6, 9), torch.tensor([1.0, 2.0, 0, 0, 0, 0], dtype=torch.float64)
    found = sliced_wasserstein(x, x + shift, rng=rng, projections=4000, resamples=2)
    # E (theta . c)^2 = |c|^2 / d; its relative spread over directions is below 2, so over the root 1 / sqrt(4000).
    assert found.value == pytest.approx(math.sqrt(5 / 6), rel=Z / math.sqrt(4000))


def test_sliced_wasserstein_joins_quantiles_of_unequal_samples():
    x, y = normal(90, 1, 10), normal(60, 1, 11, shift=0.3, scale=2.0)
    found = sliced_wasserstein(x, y, p=1.0, rng=torch.Generator().manual_seed(0), projections=3, resamples=2)
    assert found.value == pytest.approx(wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy()), rel=1e-10)


def with_moments(mean, covariance, n, seed):
    """Return rows whose sample mean and covariance are exactly those asked for."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    values, vectors = torch.linalg.eigh(covariance)
    return white @ (vectors * values.clamp_min(0).sqrt()).T + mean


def frechet_formula(mean_a, cov_a, mean_b, cov_b):
    cross = sqrtm(cov_a.numpy() @ cov_b.numpy())
    return float((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * np.trace(cross.real))


@pytest.mark.parametrize("rank", [4, 2])
def test_frechet_distance_of_gaussians_with_known_moments(rank):
    d = 4
    factor_a, factor_b = normal(d, d, 12), normal(rank, d, 13)
    cov_a, cov_b = factor_a.T @ factor_a, factor_b.T @ factor_b
    mean_a, mean_b = normal(1, d, 14)[0], normal(1, d, 15)[0]
    found = frechet_distance(with_moments(mean_a, cov_a, 60, 16), with_moments(mean_b, cov_b, 50, 17))
    exact = frechet_formula(mean_a, cov_a, mean_b, cov_b)
    assert found.value == pytest.approx(exact, rel=1e-6)
    assert math.isfinite(found.stderr)
    # The broken twin ignores how the axes are turned: it needs commuting covariances.
    diagonal = (mean_a - mean_b).square().sum() + (cov_a.diagonal().sqrt() - cov_b.diagonal().sqrt()).square().sum()
    assert abs(float(diagonal) - exact) > 0.1


def test_frechet_distance_with_constant_columns_is_finite_and_zero_for_a_copy():
    x = torch.cat([normal(80, 3, 18), torch.zeros(80, 2, dtype=torch.float64)], dim=1)
    found = frechet_distance(x, x)
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert found.stderr == pytest.approx(0.0, abs=1e-9)


def test_classifier_test_reaches_the_bayes_accuracy_and_no_more():
    from sklearn.linear_model import LogisticRegression

    rng = torch.Generator().manual_seed(0)
    far = classifier_test(normal(1500, 2, 19), normal(1700, 2, 20, shift=1.0), rng=rng, classifier=LogisticRegression())
    assert abs(far.value - norm.cdf(math.sqrt(2) / 2)) < Z * far.stderr
    same = classifier_test(normal(300, 2, 21), normal(400, 2, 22), rng=rng)
    assert abs(same.value - 0.5) < Z * same.stderr
    apart = classifier_test(normal(100, 2, 23), normal(100, 2, 24, shift=50.0), rng=rng, folds=2)
    assert apart.value > 0.98
    assert apart.stderr > 0


def test_memorisation_tells_copies_from_fresh_draws():
    train, held_out = normal(300, 2, 25), normal(250, 2, 26)
    fresh = memorisation(normal(200, 2, 27), train, held_out)
    assert abs(fresh.z) < Z
    assert abs(fresh.ratio.value - 1) < Z * fresh.ratio.stderr
    copied = memorisation(train[:200] + 1e-3, train, held_out)
    assert copied.z < -10
    assert copied.ratio.value < 0.1


def test_nearest_is_exactly_zero_for_a_copy_far_from_the_origin():
    train = normal(100, 5, 28, shift=1e4)
    distance, index = nearest(train[[7, 31]], train)
    assert distance.tolist() == [0.0, 0.0]
    assert index.tolist() == [7, 31]


def test_refusals_name_the_numbers():
    with pytest.raises(ShapeError, match="3 and 2 numbers"):
        energy_distance(normal(5, 3, 0), normal(5, 2, 0))
    bad = normal(5, 2, 0)
    bad[1, 0] = math.nan
    with pytest.raises(InputError, match="1 of 5 rows"):
        frechet_distance(bad, normal(5, 2, 0))
    with pytest.raises(OptionError, match="bandwidth"):
        kernel_mmd(torch.zeros(5, 2), torch.zeros(5, 2))
    with pytest.raises(OptionError, match="folds"):
        classifier_test(normal(3, 2, 0), normal(3, 2, 1), rng=torch.Generator(), folds=5)
