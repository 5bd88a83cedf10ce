"""Scores from energies and features against closed forms, each with a twin that a check fails on."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, multivariate_normal
from sklearn.neighbors import NearestNeighbors
from torch import nn

from gibbsian import MLP, Gaussian
from gibbsian.detection.base import ROWS_AT_ONCE, parted
from gibbsian.detection.features import gaussian_mixture, mahalanobis, nearest_neighbours
from gibbsian.detection.levels import LevelFeatures
from gibbsian.detection.scores import EnergyScore, GradientNorm, disagreement, typicality
from gibbsian.detection.typicality import batch_typicality
from gibbsian.energies.base import Energy
from gibbsian.energies.noise import NoiseConditional
from gibbsian.errors import ArgumentTypeError, DataError, InputError, OptionError, ShapeError

ALARM = 1e-6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def squares(x):
    return 0.5 * x.flatten(1).square().sum(1)


def flat(x):
    return x.flatten(1)


X = normals(50, 2, 3)


def test_energies_go_through_in_parts():
    x = normals(2 * ROWS_AT_ONCE + 3, 2)
    torch.testing.assert_close(EnergyScore(squares)(x), squares(x))
    assert not EnergyScore(MLP(2).double())(x).requires_grad


def test_the_gradient_norm_of_a_gaussian_is_its_distance_in_deviations():
    energy = Gaussian(dim=(2, 3), scale=2.0).double()
    with torch.no_grad():  # gradients are taken here whatever stands around
        found = GradientNorm(energy)(X)
    torch.testing.assert_close(found, X.flatten(1).norm(dim=1) / 4.0)
    net = MLP(2, hidden=(8,)).double()
    GradientNorm(net)(normals(3, 2))
    assert all(p.grad is None for p in net.parameters())


def test_typicality_finds_rows_that_are_too_probable():
    rows = normals(4000, 100)
    score = typicality(squares, rows)
    assert score.mean == pytest.approx(float(squares(rows).mean()))
    middle, usual = torch.zeros(1, 100, dtype=torch.float64), normals(200, 100, seed=1)
    assert float(score(middle)) > float(score(usual).max())
    # The energy itself, its broken twin, finds the middle the most usual of all.
    assert float(EnergyScore(squares)(middle)) < float(EnergyScore(squares)(usual).min())
    torch.testing.assert_close(typicality(lambda x: squares(x) + 7.0, rows)(usual), score(usual))


def test_batches_of_the_same_kind_have_uniform_p_values():
    test = batch_typicality(
        squares, normals(20000, 2), normals(4000, 2, seed=1), 10, rng=seeded(), false_positive_rate=0.1, resamples=None
    )
    assert test.calibration.rows == 400
    p = [test.p_value(batch) for batch in normals(300, 10, 2, seed=2)]
    assert kstest(p, "uniform").pvalue > ALARM
    p = [test.p_value(1.5 * batch) for batch in normals(60, 10, 2, seed=3)]
    assert np.median(p) < 0.1
    assert test.is_foreign(torch.zeros(10, 2))
    # Its distance is the mean energy's, which rows that differ both ways do not reach one by one.
    assert test.distance(torch.tensor([[math.sqrt(2 * test.mean), 0.0]] * 10)) == pytest.approx(0.0, abs=1e-6)


def test_the_papers_bootstrap_agrees_with_batches_that_share_no_rows():
    made = [
        batch_typicality(squares, normals(9000, 2), normals(9000, 2, seed=1), 5, rng=seeded(2), resamples=count)
        for count in (2000, None)
    ]
    a, b = (test.calibration.threshold for test in made)
    assert a == pytest.approx(b, rel=0.15)
    # The mean of 5 exponential energies: threshold of 1.96 deviations of 1 / sqrt(5), roughly.
    assert a == pytest.approx(1.96 / math.sqrt(5), rel=0.15)


def test_disagreement_is_the_spread_of_standardised_energies():
    rows = normals(500, 2)
    members = [lambda x, k=k: (k + 1) * squares(x) + 10 * k for k in range(3)]
    alike = disagreement(members, rows)
    torch.testing.assert_close(alike(normals(20, 2)), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-9)
    other = disagreement([*members, lambda x: x[:, 0]], rows)
    x = normals(20, 2, seed=1)
    z = torch.stack([(e(x) - e(rows).mean()) / e(rows).std() for e in (*members, lambda x: x[:, 0])], 1)
    torch.testing.assert_close(other(x), z.std(1))
    # The twin that leaves the scales in calls members of one law different.
    assert float(torch.stack([e(x) - e(rows).mean() for e in members], 1).std(1).min()) > 1e-3
    torch.testing.assert_close(disagreement(members, rows, weight=0.0)(x), z[:, :3].mean(1))


def test_the_mahalanobis_distance_is_the_textbooks():
    rows = normals(300, 3) @ normals(3, 3, seed=1) + 5.0
    score, x = mahalanobis(flat, rows), normals(20, 3, seed=2)
    away = (x - rows.mean(0)).numpy()
    wanted = np.einsum("ni,ij,nj->n", away, np.linalg.inv(np.cov(rows.numpy().T)), away)
    np.testing.assert_allclose(score(x), wanted, rtol=1e-6)
    # Units do not matter.
    units = torch.tensor([1.0, 1e4, 1e-5])
    torch.testing.assert_close(mahalanobis(flat, rows * units)(x * units), score(x), rtol=1e-4, atol=0)


def test_rows_off_the_plane_of_the_data_are_far_away():
    # A pseudo-inverse, which leaves such directions out, would not see them.
    rows = torch.cat([normals(200, 2), torch.zeros(200, 1)], 1)
    score = mahalanobis(flat, rows)
    assert float(score(torch.tensor([[0.0, 0.0, 1.0]]))) > 1e6
    assert float(score(torch.tensor([[1.0, 1.0, 0.0]]))) < 10


def test_classes_have_their_own_centres_and_one_covariance():
    labels = torch.arange(400) % 2
    rows = normals(400, 2) + 20.0 * labels[:, None]
    score = mahalanobis(flat, rows, 3 + labels)
    centred = rows - torch.stack([rows[labels == c].mean(0) for c in range(2)])[labels]
    precision = torch.linalg.inv(centred.T @ centred / 398)
    away = normals(10, 2, seed=1)
    wanted = [
        ((v - c) @ precision * (v - c)).sum(1)
        for v in [away]
        for c in (rows[labels == 0].mean(0), rows[labels == 1].mean(0))
    ]
    torch.testing.assert_close(score(away), torch.stack(wanted).amin(0), rtol=1e-6, atol=1e-9)
    between = torch.tensor([[10.0, 10.0]])
    assert float(score(between)) > 80 > 1 > float(mahalanobis(flat, rows)(between))
    few = mahalanobis(flat, normals(12, 10), shrink=True)(normals(5, 10, seed=1))
    assert float(few.max()) < float(mahalanobis(flat, normals(12, 10))(normals(5, 10, seed=1)).min())


def test_a_mixture_is_an_energy_in_nats_of_standardised_features():
    rows = normals(500, 2) * torch.tensor([1.0, 100.0])
    score, x = gaussian_mixture(flat, rows, rng=seeded()), normals(9, 2, seed=1)
    z = ((rows - rows.mean(0)) / rows.std(0)).numpy()
    law = multivariate_normal(z.mean(0), np.cov(z.T, bias=True) + 1e-6 * np.eye(2))
    np.testing.assert_allclose(score(x), -law.logpdf(((x - rows.mean(0)) / rows.std(0)).numpy()), rtol=1e-8)
    two = gaussian_mixture(flat, torch.cat([rows, rows + 1000.0]), 2, rng=seeded())
    one = gaussian_mixture(flat, torch.cat([rows, rows + 1000.0]), 1, rng=seeded())
    middle = torch.tensor([[500.0, 500.0]])
    assert float(two(middle)) > float(two(rows).max())
    assert float(one(middle)) < float(one(rows).min()) + 0.1


@pytest.mark.parametrize("scaling", ["unit", "columns", "none"])
def test_neighbours_are_those_of_scikit_learn(scaling):
    rows, x = normals(60, 4) + 1.0, normals(10, 4, seed=1)
    made = {
        "unit": lambda v: v / v.norm(dim=1, keepdim=True),
        "columns": lambda v: (v - rows.mean(0)) / rows.std(0),
        "none": lambda v: v,
    }[scaling]
    wanted = NearestNeighbors(n_neighbors=3).fit(made(rows)).kneighbors(made(x))[0][:, 2]
    np.testing.assert_allclose(nearest_neighbours(flat, rows, 3, scaling=scaling)(x), wanted)


def test_features_of_levels_are_energies_and_scaled_gradients():
    energy = NoiseConditional(3, width=8, blocks=1).double().calibrate(normals(100, 3))
    sigmas, x = (0.3, 1.0, 4.0), normals(7, 3, seed=1)
    found = LevelFeatures(energy, sigmas, "both")(x)
    assert found.shape == (7, 6)
    for i, s in enumerate(sigmas):
        at = x.clone().requires_grad_()
        value = energy(at, sigma=torch.full((7,), s, dtype=torch.float64))
        (slope,) = torch.autograd.grad(value.sum(), at)
        torch.testing.assert_close(found[:, i], value.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, 3 + i], s * slope.norm(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(LevelFeatures(energy, sigmas)(x), found[:, 3:])
    assert torch.isfinite(mahalanobis(LevelFeatures(energy, sigmas, "energy"), normals(40, 3))(x)).all()


def test_infinite_features_are_infinitely_foreign_and_nan_stays_nan():
    odd = torch.tensor([[0.0, 0.0], [math.inf, 0.0], [math.nan, 0.0]], dtype=torch.float64)
    for score in (
        mahalanobis(flat, normals(30, 2)),
        gaussian_mixture(flat, normals(30, 2), rng=seeded()),
        nearest_neighbours(flat, normals(30, 2), 2, scaling="none"),
    ):
        found = score(odd)
        assert found.isfinite().tolist() == [True, False, False]
        assert found[1] == math.inf
        assert found[2].isnan()


def test_rows_are_parted_without_loss():
    a, b = parted(torch.arange(20.0), 0.3, seeded())
    assert (len(a), torch.cat([a, b]).sort().values.tolist()) == (6, list(range(20)))


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x).sum(1)


class Labelled(Energy):
    context = ("sigma", "y")

    def forward(self, x, sigma, y):
        return squares(x)


CONDITIONAL = NoiseConditional(2, width=4, blocks=1).double()
BAD = {
    "no function": (lambda: EnergyScore(3), ArgumentTypeError, "got 3"),
    "dropout": (lambda: EnergyScore(Leaky()), InputError, "dropout in training mode"),
    "no rows": (lambda: EnergyScore(squares)(torch.zeros(0, 2)), ShapeError, r"\(0, 2\)"),
    "one per column": (lambda: EnergyScore(lambda x: x)(torch.zeros(4, 2)), ShapeError, r"\(4,\); got \(4, 2\)"),
    "no gradient": (lambda: GradientNorm(lambda x: squares(x.detach()))(X), ArgumentTypeError, "does not depend on x"),
    "no reference": (lambda: typicality(squares, X[:0]), ShapeError, "1 or more reference rows"),
    "infinite": (lambda: typicality(lambda x: squares(x) / 0.0, X), InputError, "not finite at 50 of 50"),
    "one member": (lambda: disagreement([squares], X), OptionError, "two or more members; got 1"),
    "constant member": (lambda: disagreement([squares, lambda x: 0 * x[:, 0, 0]], X), DataError, "Member 1 has the"),
    "weight": (lambda: disagreement([squares, squares], X, 2.0), OptionError, "weight"),
    "features": (lambda: mahalanobis(squares, X), ShapeError, r"table \(50, d\); got \(50,\)"),
    "no spread": (lambda: mahalanobis(flat, torch.ones(9, 2)), DataError, "the same at all 9"),
    "classes": (lambda: mahalanobis(flat, X[:4], torch.arange(4)), ShapeError, "4 reference rows in 4 classes"),
    "labels": (lambda: mahalanobis(flat, X, torch.ones(50)), ArgumentTypeError, "float32"),
    "few labels": (lambda: mahalanobis(flat, X, torch.ones(5).long()), ShapeError, r"\(5,\)"),
    "components": (lambda: gaussian_mixture(flat, X, 0, rng=seeded()), OptionError, "components"),
    "few rows": (lambda: gaussian_mixture(flat, X[:5], 3, rng=seeded()), ShapeError, "6 or more reference rows"),
    "k": (lambda: nearest_neighbours(flat, X, 0), OptionError, "got 0"),
    "k of n": (lambda: nearest_neighbours(flat, X, 51), ShapeError, "51 or more reference rows"),
    "scaling": (lambda: nearest_neighbours(flat, X, scaling="units"), OptionError, "Did you mean 'unit'"),
    "levels of none": (lambda: LevelFeatures(MLP(2), (1.0,)), OptionError, "context: none"),
    "levels of labels": (lambda: LevelFeatures(Labelled(), (1.0,)), OptionError, "sigma, y"),
    "levels of no energy": (lambda: LevelFeatures(squares, (1.0,)), ArgumentTypeError, "an Energy"),
    "sigmas": (lambda: LevelFeatures(CONDITIONAL, (1.0, 0.0)), OptionError, "positive noise levels"),
    "kind": (lambda: LevelFeatures(CONDITIONAL, (1.0,), "energies"), OptionError, "Did you mean 'energy'"),
    "share": (lambda: parted(X, 1.0, seeded()), OptionError, "got 1.0"),
    "batch size": (lambda: batch_typicality(squares, X, X, 0, rng=seeded()), OptionError, "got 0"),
    "few batches": (
        lambda: batch_typicality(squares, X, X, 10, rng=seeded(), resamples=None), OptionError, "5 reference rows.*: 19"
    ),
    "other batch": (
        lambda: batch_typicality(squares, X, X, 10, rng=seeded()).p_value(X), ShapeError, "batches of 10 rows; got 50"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
