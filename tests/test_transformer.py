"""The transformer: scikit-learn's own checks, exact scores by enumeration, and a fit that recovers what was planted."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import expit
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import BernoulliRBM
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

from gibbsian.energies.boltzmann import RBM
from gibbsian.errors import DomainError, OptionError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence
from gibbsian.transformer import RBMTransformer


def checks():
    for estimator, check in estimator_checks_generator(RBMTransformer(4, n_iter=2, clip=True, random_state=0)):
        yield pytest.param(estimator, check, id=getattr(check, "func", check).__name__)


@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_scikit_learns_own_checks_pass(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def bits():
    """Rows of three pairs of columns, each pair mostly alike."""
    rng = np.random.default_rng(0)
    x = (rng.random((600, 3)) < 0.4).repeat(2, 1)
    return (x ^ (rng.random(x.shape) < 0.05)).astype(np.float64)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "centred"])
def fitted(request, bits):
    return RBMTransformer(5, n_iter=20, learning_rate=0.2, centred=request.param, random_state=0).fit(bits)


def all_rows(d):
    return np.array(list(itertools.product((0.0, 1.0), repeat=d)))


def test_features_and_biases_mean_what_they_mean_in_bernoulli_rbm(fitted, bits):
    told = BernoulliRBM(5, random_state=0).fit(bits)
    told.components_, told.intercept_hidden_ = fitted.components_, fitted.intercept_hidden_
    told.intercept_visible_ = fitted.intercept_visible_
    grey = np.random.default_rng(1).random((20, 6))
    np.testing.assert_allclose(fitted.transform(grey), told.transform(grey), rtol=1e-12)
    # The free energy is the same up to a constant.
    rows = all_rows(6)
    gap = fitted.log_prob(rows) + told._free_energy(rows)
    np.testing.assert_allclose(gap, gap[0], rtol=1e-10)


def test_log_probabilities_sum_to_one_and_log_z_is_exact(fitted):
    z = fitted.log_z()
    assert z is fitted.log_z()
    assert float(z.stderr) == 0.0
    assert np.exp(fitted.log_prob(all_rows(6))).sum() == pytest.approx(1.0, abs=1e-10)


def test_scores_are_the_expectation_of_bernoulli_rbms(fitted, bits):
    rows = np.concatenate([bits[:20], np.random.default_rng(1).random((20, 6))])
    told = BernoulliRBM(5).fit(bits)
    told.components_, told.intercept_hidden_ = fitted.components_, fitted.intercept_hidden_
    told.intercept_visible_ = fitted.intercept_visible_
    expected = np.zeros(len(rows))
    for site in range(6):
        flipped = rows.copy()
        flipped[:, site] = 1.0 - flipped[:, site]
        expected += np.log(expit(told._free_energy(flipped) - told._free_energy(rows)))
    np.testing.assert_allclose(fitted.score_samples(rows), expected, rtol=1e-10)
    # On bits it is the pseudo-likelihood: every site's law given the others, from the joint law.
    p = np.exp(fitted.log_prob(all_rows(6)))
    index = (all_rows(6) @ (2 ** np.arange(5, -1, -1))).astype(int)
    assert (index == np.arange(64)).all()
    by_joint = np.zeros(64)
    for site in range(6):
        other = np.arange(64) ^ (1 << (5 - site))
        by_joint += np.log(p / (p + p[other]))
    np.testing.assert_allclose(fitted.score_samples(all_rows(6)), by_joint, rtol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_a_step_follows_the_gradient_of_contrastive_divergence(centred, bits):
    """The written-out update is automatic differentiation's, at the same data and chains, in float64."""
    model = RBMTransformer(3, batch_size=40, learning_rate=0.1, centred=centred, persistent=False, random_state=0)
    model.partial_fit(bits[:40])
    machine: RBM = model.rbm_
    before = copy.deepcopy(machine).requires_grad_(True)
    u, w = (
        torch.rand((1, 40, 6), generator=generator(1)).double(),
        torch.rand((2, 40, 3), generator=generator(2)).double(),
    )
    x = torch.from_numpy(bits[40:80])
    with torch.no_grad():
        chains = before.visible_given(before.hidden_given(x, u=w[0]), u=u[0])
    loss = before(x).mean() - before(chains).mean()
    names = ("weight", "visible_bias", "hidden_bias")
    grads = torch.autograd.grad(loss, [getattr(before, name) for name in names])
    expected = copy.deepcopy(before)
    with torch.no_grad():
        for name, grad in zip(names, grads):
            getattr(expected, name).sub_(0.1 * grad)
        model._update(x, (u, w))
    rows = torch.from_numpy(all_rows(6))
    gap = (machine(rows) - expected(rows)).detach()
    # Sliding offsets leave the density as it is, up to a constant.
    torch.testing.assert_close(gap, gap[:1].expand(64), rtol=0, atol=1e-12)
    # A twin with the sign of the chains' part flipped is told apart.
    assert float((machine(rows) - before(rows)).detach().std()) > 1e-4


def test_the_objective_agrees_on_what_the_gradient_is(bits):
    machine = RBM(6, 3, weight_scale=0.5, rng=generator()).double()
    loss = ContrastiveDivergence(RBMGibbs())(machine, Batch(torch.from_numpy(bits)), generator(3)).value
    (grad,) = torch.autograd.grad(loss, machine.weight)
    assert grad.shape == (6, 3)


@pytest.mark.parametrize("options", [{}, {"centred": True}, {"persistent": False, "steps": 5}, {"steps": 2}])
def test_a_fit_comes_close_to_the_law_of_the_rows(options, bits):
    model = RBMTransformer(6, n_iter=80, learning_rate=0.1, random_state=1, **options).fit(bits)
    # Pairs at 0.4 with a twentieth flipped each: three independent laws on two bits.
    one = np.array([[0.95**2, 0.95 * 0.05], [0.95 * 0.05, 0.05**2]])
    law = 0.6 * one + 0.4 * one[::-1, ::-1]
    entropy = -3.0 * float((law * np.log(law)).sum())
    independent = -6.0 * float(sum(p * np.log(p) for p in (law.sum(0))))
    assert model.log_prob(bits).mean() > -entropy - 0.5 > -independent + 0.3


def test_gibbs_leaves_the_law_invariant(fitted):
    rows = all_rows(6)
    p = np.exp(fitted.log_prob(rows))
    start = rows[np.random.default_rng(0).choice(64, 40_000, p=p / p.sum())]
    after = fitted.gibbs(start, random_state=3)
    assert set(np.unique(after)) <= {0.0, 1.0}
    counts = np.bincount((after @ (2 ** np.arange(5, -1, -1))).astype(int), minlength=64)
    often = p > 1e-3
    z = (counts - 40_000 * p)[often] / np.sqrt(40_000 * p * (1 - p))[often]
    assert np.abs(z).max() < 4.5
    assert not np.array_equal(fitted.gibbs(start[:50]), fitted.gibbs(start[:50]))
    np.testing.assert_array_equal(fitted.gibbs(start[:50], 1), fitted.gibbs(start[:50], 1))


def test_large_machines_get_a_bracket():
    x = (np.random.default_rng(0).random((60, 24)) < 0.3).astype(np.float32)
    model = RBMTransformer(22, n_iter=2, random_state=0).fit(x)
    z = model.log_z()
    assert float(z.lower) <= float(z.value) <= float(z.upper)
    assert np.isfinite(model.log_prob(x)).all()


def test_sparse_rows_give_what_dense_ones_give(bits):
    dense = RBMTransformer(3, n_iter=3, random_state=0).fit(bits)
    for kind in (sparse.csr_matrix, sparse.csc_array):
        model = RBMTransformer(3, n_iter=3, random_state=0).fit(kind(bits))
        np.testing.assert_allclose(model.components_, dense.components_, rtol=1e-10)
        np.testing.assert_allclose(model.transform(kind(bits)), dense.transform(bits), rtol=1e-10)
        np.testing.assert_allclose(model.score_samples(kind(bits)), dense.score_samples(bits), rtol=1e-10)


def test_a_fit_in_parts_begins_and_goes_on(bits):
    model = RBMTransformer(3, batch_size=50, random_state=0)
    for _ in range(30):
        for first in range(0, 600, 50):
            model.partial_fit(bits[first : first + 50])
    assert (
        model.score_samples(bits).mean()
        > RBMTransformer(3, n_iter=0, random_state=0).fit(bits).score_samples(bits).mean()
    )
    assert model.h_samples_.shape == (50, 3)
    assert np.isfinite(model.partial_fit(bits).components_).all()


def test_it_follows_its_seed_and_touches_nothing_outside(bits):
    state, kept = torch.get_rng_state(), bits.copy()
    a, b, c = (RBMTransformer(3, n_iter=2, random_state=s).fit(bits) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.components_, b.components_)
    assert not np.array_equal(a.components_, c.components_)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(bits, kept)


def test_it_pickles_clones_and_stands_in_a_pipeline(fitted, bits):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(bits), fitted.transform(bits))
    np.testing.assert_allclose(again.log_prob(bits), fitted.log_prob(bits))
    again.partial_fit(bits[:10])
    assert not hasattr(clone(fitted), "rbm_")
    assert clone(fitted).get_params() == fitted.get_params()
    assert fitted.get_feature_names_out()[0] == "rbmtransformer0"
    pipe = make_pipeline(RBMTransformer(3, n_iter=2, random_state=0), LogisticRegression())
    assert pipe.fit(bits, bits[:, 0]).predict(bits).shape == (600,)


def test_precision_is_kept(bits):
    single = RBMTransformer(3, n_iter=1, random_state=0).fit(bits.astype(np.float32))
    assert single.transform(bits.astype(np.float32)).dtype == single.components_.dtype == np.float32
    assert RBMTransformer(3, n_iter=1).fit_transform(bits).dtype == np.float64


def test_passes_are_told_of_when_asked(bits, capsys):
    RBMTransformer(2, n_iter=2, verbose=1, random_state=0).fit(bits)
    assert capsys.readouterr().out.count("pseudo-likelihood -") == 2


def test_mistakes_are_told_of(bits):
    for wrong in ({"n_components": 0}, {"learning_rate": 0.0}, {"steps": 0}, {"batch_size": 2.5}, {"n_iter": -1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            RBMTransformer(**wrong).fit(bits)
    model = RBMTransformer(2, n_iter=1, random_state=0)
    with pytest.raises(DomainError, match=r"runs from 0 to 16.*minmax_scale.*clip=True"):
        model.fit(bits * 16.0)
    model.fit(bits)
    with pytest.raises(DomainError, match="clip=True"):
        model.transform(bits - 0.1)
    with pytest.raises(DomainError, match="Binarise"):
        model.log_prob(bits * 0.3)
    clipped = model.set_params(clip=True).transform(bits * 2.0 - 0.5)
    np.testing.assert_array_equal(clipped, model.transform(bits))
    np.testing.assert_array_equal(clipped, model.transform(sparse.csr_matrix(bits * 2.0)))
