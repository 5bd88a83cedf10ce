"""One- and two-point statistics against counting, and what they say of agreement."""

import pytest
import torch

from gibbsian.errors import ShapeError
from gibbsian.sequences.frequencies import agreement, pearson, statistics
from protein_families import drawn, hot, small_potts


def test_statistics_are_weighted_counts(monkeypatch):
    monkeypatch.setattr("gibbsian.sequences.frequencies.CELLS", 45)
    codes = drawn(small_potts(4), 50)
    weights = torch.rand(50, generator=torch.Generator().manual_seed(0))
    found = statistics(codes, 3, weights)
    x, w = hot(codes, 3), (weights / weights.sum()).double()
    assert torch.allclose(found.one.double(), torch.einsum("n,nia->ia", w, x), atol=1e-6)
    i, j = found.pairs
    both = torch.einsum("n,nia,njb->ijab", w, x, x)[i, j]
    assert torch.allclose(found.two.double(), both, atol=1e-6)
    one = found.one.double()
    assert torch.allclose(found.connected.double(), both - one[i, :, None] * one[j, None, :], atol=1e-6)
    plain = statistics(codes, 3)
    assert torch.allclose(plain.two, statistics(codes, 3, torch.ones(50)).two, atol=1e-6)


def test_smoothing_keeps_sums_and_margins():
    found = statistics(drawn(small_potts(4), 50), 3).smoothed(0.2)
    i, _ = found.pairs
    assert torch.allclose(found.two.sum((1, 2)), torch.ones(6))
    assert torch.allclose(found.two.sum(2), found.one[i], atol=1e-6)


def test_agreement_of_a_family_with_itself_and_with_independent_columns():
    codes = drawn(small_potts(5), 4000)
    family = statistics(codes, 3)
    same = agreement(family, family)
    assert same.connected == pytest.approx(1.0)
    assert same.slope == pytest.approx(1.0)
    shuffled = codes.gather(0, torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)).argsort(0))
    apart = agreement(family, statistics(shuffled, 3))
    # The columns agree, and nothing else: two-point statistics as such would hide it.
    assert apart.one > 0.999
    assert abs(apart.connected) < 0.3
    assert apart.two > 0.7


def test_other_shapes_are_refused():
    codes = drawn(small_potts(4), 20)
    with pytest.raises(ShapeError, match="cannot be compared"):
        agreement(statistics(codes, 3), statistics(codes, 4))


def test_pearson_is_that_of_numpy():
    a, b = torch.randn((2, 30), generator=torch.Generator().manual_seed(0))
    assert pearson(a, b) == pytest.approx(float(torch.corrcoef(torch.stack((a, b)))[0, 1]), abs=1e-6)
