"""Every diagnostic of chains against ArviZ, on chains of many kinds."""

import math
import warnings

import numpy as np
import pytest
import torch
from chain_cases import CASES, ar1
from scipy.stats import norm, rankdata

from gibbsian.diagnostics.chains import chain_mean, chain_sd, effective_sample_size, split_r_hat
from gibbsian.diagnostics.mixing import energy_bfmi
from gibbsian.diagnostics.quantiles import chain_quantile, quantile_effective_sample_size, tail_effective_sample_size

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    az = pytest.importorskip("arviz", minversion="0.20", reason="ArviZ is the oracle: pip install 'arviz>=0.20,<1'")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not az.__version__.startswith("0."), reason="from version 1 on ArviZ has other functions"),
]


def sd_error(x):
    return chain_sd(x)[1]


def quantile_error(x, p):
    return chain_quantile(x, p)[1]


PAIRS = {
    "R-hat": (split_r_hat, lambda a: az.rhat(a)),
    "bulk ESS": (effective_sample_size, lambda a: az.ess(a, method="bulk")),
    "tail ESS": (tail_effective_sample_size, lambda a: az.ess(a, method="tail")),
    "tail ESS at 0.1": (lambda x: tail_effective_sample_size(x, 0.1), lambda a: az.ess(a, method="tail", prob=0.1)),
    "ESS of the mean": (lambda x: effective_sample_size(x, ranked=False), lambda a: az.ess(a, method="mean")),
    "ESS of the median": (quantile_effective_sample_size, lambda a: az.ess(a, method="median")),
    "ESS of a quantile": (
        lambda x: quantile_effective_sample_size(x, 0.3),
        lambda a: az.ess(a, method="quantile", prob=0.3),
    ),
    "error of the mean": (lambda x: chain_mean(x)[1], lambda a: az.mcse(a, method="mean")),
    "error of the sd": (sd_error, lambda a: az.mcse(a, method="sd")),
    "error of the median": (lambda x: quantile_error(x, 0.5), lambda a: az.mcse(a, method="median")),
    "error of 5 per cent": (lambda x: quantile_error(x, 0.05), lambda a: az.mcse(a, method="quantile", prob=0.05)),
    "error of 95 per cent": (lambda x: quantile_error(x, 0.95), lambda a: az.mcse(a, method="quantile", prob=0.95)),
    "quantile": (lambda x: chain_quantile(x, 0.05)[0], lambda a: np.quantile(a, 0.05)),
    "sd": (lambda x: chain_sd(x)[0], lambda a: np.std(a, ddof=1)),
}


def agree(found, expected):
    return found == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pair", PAIRS)
def test_equal_to_arviz(pair, case):
    ours, theirs = PAIRS[pair]
    x = CASES[case]
    expected = float(theirs(np.ascontiguousarray(x.numpy().T)))
    if pair == "R-hat" and x.shape[1] == 1:
        assert math.isnan(expected)  # Ours compares the halves, see below.
        return
    assert agree(float(ours(x)), expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_coordinates_together_are_coordinates_alone(pair):
    ours, _ = PAIRS[pair]
    same = [x for x in CASES.values() if x.shape == (300, 4)]
    together = ours(torch.stack(same, dim=-1))
    for value, x in zip(together, same, strict=True):
        assert agree(float(value), float(ours(x)))


@pytest.mark.parametrize("draws", [100, 101])
def test_the_r_hat_of_one_chain_is_that_of_its_halves(draws):
    x = ar1(0.6, draws, 1, seed=30)
    halves = np.stack([x[:50, 0].numpy(), x[-50:, 0].numpy()])

    def scores(a):
        return norm.ppf((rankdata(a) - 0.375) / (a.size + 0.25)).reshape(a.shape)

    folded = np.abs(halves - np.median(halves))
    expected = max(az.rhat(scores(a), method="identity") for a in (halves, folded))
    assert agree(float(split_r_hat(x)), float(expected))
    assert math.isnan(az.rhat(x.numpy().T))


def test_what_never_moves_is_unknown_though_arviz_counts_every_draw():
    """posterior, the R package by the authors of the method, gives NA here too."""
    x = torch.full((100, 4), 3.0)
    assert az.ess(x.numpy().T) == 400
    for value in (effective_sample_size(x), tail_effective_sample_size(x), split_r_hat(x), chain_sd(x)[1]):
        assert math.isnan(value)
    assert float(chain_quantile(x)[0]) == 3.0


@pytest.mark.parametrize("rho", [0.0, 0.95])
def test_energy_bfmi_is_arviz_s(rho):
    x = ar1(rho, 301, 5, seed=31)
    np.testing.assert_allclose(energy_bfmi(x).numpy(), az.bfmi(x.numpy().T), rtol=1e-12)


# What each diagnostic is without one of its parts: the comparison must tell.
TWINS = {
    "R-hat without folding": ("R-hat", "wider", lambda x: az.rhat(x.numpy().T, method="z_scale")),
    "R-hat without ranks": ("R-hat", "Cauchy", lambda x: az.rhat(x.numpy().T, method="split")),
    "ESS without splitting": ("ESS of the mean", "drifting", lambda x: az.ess(x.numpy().T, method="identity")),
    "ESS without ranks": ("bulk ESS", "Cauchy", lambda x: effective_sample_size(x, ranked=False)),
    "error without ESS": ("error of the mean", "correlated", lambda x: x.std() / math.sqrt(x.numel())),
    "sd's error without kurtosis": (
        "error of the sd",
        "lognormal",
        lambda x: x.std() / (2 * effective_sample_size((x - x.mean()) ** 2, ranked=False)).sqrt(),
    ),
    "upper tail alone": ("tail ESS", "lognormal", lambda x: quantile_effective_sample_size(x, 0.95)),
    "quantile as a draw's share": ("error of 5 per cent", "correlated", lambda x: (0.05 * 0.95 / x.numel()) ** 0.5),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_diagnostic_without_one_of_its_parts_is_seen(twin):
    pair, case, broken = TWINS[twin]
    x = CASES[case]
    expected = float(PAIRS[pair][1](np.ascontiguousarray(x.numpy().T)))
    assert agree(float(PAIRS[pair][0](x)), expected)
    assert float(broken(x)) != pytest.approx(expected, rel=1e-3)
