r"""`RBMTransformer`: features from a restricted Boltzmann machine behind scikit-learn's interface.

A drop-in for `sklearn.neural_network.BernoulliRBM`: the same words mean the same, and what scores rows there by one
random site is here its expectation. With offsets :math:`\mu, \lambda` at the units' means, one step of plain stochastic
gradient ascent at rate :math:`\eta` is

.. math:: W \mathrel{+}= \eta \left( \overline{(v^+ - \mu)^T (m^+ - \lambda)} - \overline{(v^- - \mu)^T (m^- - \lambda)}
          \right), \quad m = \sigma(c + (v - \mu) W),

with rows of data :math:`v^+` and rows of chains :math:`v^-`; biases follow the differences of the means alike. It is
the gradient that automatic differentiation of `gibbsian.objectives.contrastive` gives, written out: with ten rows in a
batch the graph would take longer than the arithmetic.
"""

from __future__ import annotations

import math
import time
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Generator, Tensor

from gibbsian.energies.boltzmann import RBM
from gibbsian.errors import DomainError, OptionError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.partition.base import LogZ
from gibbsian.partition.boltzmann import exact_log_z, rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.smc import smc

SLIDING = 0.01
"""The share of the way that offsets go towards a batch's means."""

QUICK_STATES = 1 << 20
"""States of the smaller layer up to which log Z is summed."""

BLOCK = 1 << 18
"""Uniform numbers drawn at once."""

CHUNK = 1 << 24
"""Numbers held at once by `score_samples`."""

FLOATS = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


class RBMTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features of binary rows, or of rows between 0 and 1, by a machine of Bernoulli units.

    Values between 0 and 1 are taken for the means of bits, as `BernoulliRBM` does. Float32 stays float32.

    Parameters
    ----------
    n_components
        Hidden units.
    learning_rate
        Of plain stochastic gradient ascent on the mean over a batch; it has no schedule.
    batch_size
        Rows per step, and chains.
    n_iter
        Passes over the rows.
    verbose
        1 or more prints a line per pass.
    random_state
        Seed or generator, as in scikit-learn.
    steps
        Steps of alternating Gibbs sampling of each chain per update.
    centred
        Keep offsets at the units' means: it makes no difference then whether ones or zeros are the rare value, and the
        density is fitted faster. Without, as in `BernoulliRBM`, hidden units are sparser where ones are rare, which was
        better for classifying digits (benchmarks/rbm_features.py).
    persistent
        Let chains go on from update to update (PCD); otherwise they start at the rows (CD).
    clip
        Cut values outside [0, 1] off, which are an error otherwise: as those may be that a `MinMaxScaler` makes of rows
        it has not seen.

    Attributes
    ----------
    rbm_
        The fitted `gibbsian.RBM`, for all else that one can ask of it.
    components_
        Couplings, ``(n_components, n_features)``.
    intercept_hidden_, intercept_visible_
        Biases ``(n_components,)`` and ``(n_features,)``, without offsets: as `BernoulliRBM` has them.
    h_samples_
        Hidden states of the chains, ``(batch_size, n_components)``.
    n_features_in_, feature_names_in_
        Columns of X, and their names where they have any.

    Examples
    --------
    >>> import numpy as np
    >>> from gibbsian.transformer import RBMTransformer
    >>> X = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
    >>> RBMTransformer(n_components=2, random_state=0).fit_transform(X).shape
    (4, 2)
    """

    rbm_: RBM
    h_samples_: np.ndarray
    n_features_in_: int

    def __init__(
        self,
        n_components: int = 256,
        *,
        learning_rate: float = 0.1,
        batch_size: int = 10,
        n_iter: int = 10,
        verbose: int = 0,
        random_state: Any = None,
        steps: int = 1,
        centred: bool = False,
        persistent: bool = True,
        clip: bool = False,
    ) -> None:
        self.n_components = n_components
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.n_iter = n_iter
        self.verbose = verbose
        self.random_state = random_state
        self.steps = steps
        self.centred = centred
        self.persistent = persistent
        self.clip = clip

    def fit(self, X: Any, y: Any = None) -> RBMTransformer:
        """Fit the machine to the rows of X, ``(n, columns)``, dense or sparse; y is ignored."""
        self._check_settings()
        X = self._read(X, reset=True)
        rng = self._seeded()
        self._begin(X, rng)
        n, began = X.shape[0], time.perf_counter()
        rows = self._tensor(X) if isinstance(X, np.ndarray) else None
        batches = list(gen_batches(n, self.batch_size))
        block = max(1, BLOCK // (self.steps * self.batch_size * (self.n_components + X.shape[1])))
        for i in range(1, self.n_iter + 1):
            order = torch.randperm(n, generator=rng)
            order = order.numpy() if rows is None else order
            for first in range(0, len(batches), block):
                some = batches[first : first + block]
                for batch, noise in zip(some, self._noise(len(some), self.batch_size, rng)):
                    at = order[batch]
                    self._update(self._tensor(X[at]) if rows is None else rows[at], noise)
            if self.verbose:
                now = time.perf_counter()
                score = float(self._scores(self._tensor(X[: min(n, 1000)])).mean())
                print(f"[{type(self).__name__}] Pass {i}, pseudo-likelihood {score:.2f}, time {now - began:.2f} s")
                began = now
        self._keep()
        return self

    def partial_fit(self, X: Any, y: Any = None) -> RBMTransformer:
        """Make one step on the rows of X, as one batch; the first call begins a machine."""
        first = not hasattr(self, "rbm_")
        self._check_settings()
        X = self._read(X, reset=first)
        if first or getattr(self, "_rng", None) is None:
            self._rng = self._seeded()
        if first:
            self._begin(X, self._rng)
        rows = self._tensor(X)
        (noise,) = self._noise(1, max(len(rows), len(self._hidden)), self._rng)
        self._update(rows, noise)
        self._keep()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Probabilities that hidden units are on, ``(n, n_components)``."""
        check_is_fitted(self)
        return self._features(self._tensor(self._read(X))).numpy()

    def gibbs(self, v: Any, random_state: Any = None) -> np.ndarray:
        """Make one step of alternating Gibbs sampling from visible states ``(n, columns)``; returns bits.

        Parameters
        ----------
        v
            Where chains stand.
        random_state
            Seed or generator; a new step each time when ``None``.
        """
        check_is_fitted(self)
        x = self._tensor(self._read(v))
        if random_state is None:
            self._rng = getattr(self, "_rng", None) or self._seeded()
            rng = self._rng
        else:
            rng = _generator(random_state)
        with torch.no_grad():
            h = self.rbm_.hidden_given(x, u=_uniform((len(x), self.rbm_.hidden.size), x, rng))
            return self.rbm_.visible_given(h, u=_uniform(tuple(x.shape), x, rng)).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        r"""Pseudo-likelihood of each row, ``(n,)`` in nats: the sum over its sites of their log-probability.

        With :math:`F` the free energy and :math:`v_{\bar i}` the row with site i flipped to :math:`1 - v_i`,

        .. math:: \sum_i \log \sigma\big( F(v_{\bar i}) - F(v) \big),

        of which `BernoulliRBM.score_samples` looks at one random site, times their number. This is exact, the same at
        every call, and takes n D M numbers. It is no density: see `log_prob`.
        """
        check_is_fitted(self)
        return self._scores(self._tensor(self._read(X))).double().numpy()

    def log_prob(self, X: Any) -> np.ndarray:
        """Log-probability of each row, ``(n,)`` in nats, by `log_z`; rows of zeros and ones.

        Raises
        ------
        DomainError
            If there are other values, which have no probability.
        """
        check_is_fitted(self)
        x = self._tensor(self._read(X))
        self.rbm_.check_states(x, "X")
        with torch.no_grad():
            return -self.rbm_(x).double().numpy() - float(self.log_z().value)

    def log_z(self) -> LogZ:
        """Estimate log Z once: exactly where a layer has at most 20 units, else by a bracket, with its error."""
        check_is_fitted(self)
        if self._log_z is None:
            self._log_z = _log_z(self.rbm_, self._seeded(1))
        return self._log_z

    @property
    def components_(self) -> np.ndarray:
        """Couplings, ``(n_components, n_features)``."""
        return self._fitted().weight.detach().T.numpy()

    @property
    def intercept_hidden_(self) -> np.ndarray:
        """Biases of the hidden units, ``(n_components,)``."""
        rbm = self._fitted()
        return (rbm.hidden_bias - rbm.visible_offset @ rbm.weight).detach().numpy()

    @property
    def intercept_visible_(self) -> np.ndarray:
        """Biases of the visible units, ``(n_features,)``."""
        rbm = self._fitted()
        return (rbm.visible_bias - rbm.weight @ rbm.hidden_offset).detach().numpy()

    @property
    def _n_features_out(self) -> int:
        return self._fitted().hidden.size

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _fitted(self) -> RBM:
        if not hasattr(self, "rbm_"):
            raise AttributeError(f"This {type(self).__name__} is not fitted yet; call fit first.")
        return self.rbm_

    def _check_settings(self) -> None:
        for name, low in (("n_components", 1), ("batch_size", 1), ("n_iter", 0), ("steps", 1), ("verbose", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < low:
                raise OptionError(f"{name} is a whole number of {low} or more; got {value!r}.")
        rate = self.learning_rate
        if not isinstance(rate, Real) or not 0.0 < float(rate) < math.inf:
            raise OptionError(f"learning_rate is a positive number; got {rate!r}.")

    def _read(self, X: Any, reset: bool = False) -> Any:
        X = validate_data(self, X, accept_sparse="csr", reset=reset, dtype=(np.float64, np.float32))
        values = X if isinstance(X, np.ndarray) else X.data
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if low >= 0.0 and high <= 1.0:
            return X
        if not self.clip:
            raise DomainError(
                f"X runs from {low:.4g} to {high:.4g}; Bernoulli units take zeros and ones, or values between as their "
                "means. Scale X (sklearn.preprocessing.minmax_scale), binarise it (X > threshold), or pass clip=True "
                "to cut off what lies outside."
            )
        X = X.copy()
        if isinstance(X, np.ndarray):
            return X.clip(0.0, 1.0)
        X.data = X.data.clip(0.0, 1.0)
        return X

    def _tensor(self, X: Any) -> Tensor:
        rows = X if isinstance(X, np.ndarray) else X.toarray()
        like = getattr(self, "rbm_", None)
        x = torch.from_numpy(np.ascontiguousarray(rows) if rows.flags.writeable else rows.copy())
        return x if like is None else x.to(like.weight.dtype)

    def _begin(self, X: Any, rng: Generator) -> None:
        dtype = FLOATS[np.dtype(X.dtype)]
        with torch.no_grad():
            rbm = RBM(X.shape[1], int(self.n_components), rng=rng).to(dtype)
            if self.centred:
                mean = torch.as_tensor(np.asarray(X.mean(0)).ravel()).to(dtype)
                rbm.visible_offset.copy_(mean)
                rbm.hidden_offset.fill_(0.5)
        self.rbm_ = rbm.requires_grad_(False)
        self._hidden = torch.zeros((int(self.batch_size), int(self.n_components)), dtype=dtype)
        self._log_z = None

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rbm = self.rbm_
        return rbm.weight, rbm.visible_bias, rbm.hidden_bias, rbm.visible_offset, rbm.hidden_offset

    def _noise(self, updates: int, rows: int, rng: Generator) -> list[tuple[Tensor, Tensor]]:
        """Uniform numbers of some updates at once: for the visible and the hidden states of every step."""
        steps, like = int(self.steps), self.rbm_.weight
        d, m = like.shape
        visible = _uniform((updates, steps, rows, d), like, rng)
        hidden = _uniform((updates, steps + (not self.persistent), rows, m), like, rng)
        return list(zip(visible, hidden))

    @torch.no_grad()
    def _update(self, v: Tensor, noise: tuple[Tensor, Tensor]) -> None:
        """One step of gradient ascent from rows of data and chains."""
        weight, b, c, mu, lam = self._parts
        for_visible, for_hidden = noise
        v = v - mu
        mean = torch.addmm(c, v, weight).sigmoid_()
        if self.persistent:
            h = self._hidden
        else:
            h, for_hidden = _drawn(mean, for_hidden[0, : len(v)]), for_hidden[1:]
        model = x = h
        for u, w in zip(for_visible, for_hidden):
            x = _drawn(torch.addmm(b, h - lam, weight.T).sigmoid_(), u[: len(h)]).sub_(mu)
            model = torch.addmm(c, x, weight).sigmoid_()
            h = _drawn(model, w[: len(h)])
        if self.persistent:
            self._hidden = h
        mean, model = mean.sub_(lam), model.sub_(lam)
        rate, n, m = float(self.learning_rate), len(v), len(x)
        weight.addmm_(v.T, mean, alpha=rate / n).addmm_(x.T, model, alpha=-rate / m)
        at_data = mean.mean(0)
        b.add_(v.mean(0).sub_(x.mean(0)), alpha=rate)
        c.add_(at_data - model.mean(0), alpha=rate)
        if self.centred:
            # As `RBM.recentre`: the offset slides, and the biases move so that the density does not.
            lam.add_(at_data, alpha=SLIDING)
            b.addmv_(weight, at_data, alpha=SLIDING)

    def _keep(self) -> None:
        self.h_samples_ = self._hidden.numpy().copy()
        self._log_z = None

    def _features(self, x: Tensor) -> Tensor:
        rbm = self.rbm_
        return torch.addmm(rbm.hidden_bias, x - rbm.visible_offset, rbm.weight).sigmoid_()

    def _scores(self, x: Tensor) -> Tensor:
        rbm = self.rbm_
        weight, bias = rbm.weight, rbm.visible_bias - rbm.weight @ rbm.hidden_offset
        rows = max(1, CHUNK // weight.numel())
        softplus = torch.nn.functional.softplus
        found = []
        for part in x.split(rows):
            field = torch.addmm(rbm.hidden_bias, part - rbm.visible_offset, weight)
            flip = 1.0 - 2.0 * part
            changed = softplus(field[:, None] + flip[:, :, None] * weight).sum(2) - softplus(field).sum(1, keepdim=True)
            found.append(torch.nn.functional.logsigmoid(-flip * bias - changed).sum(1))
        return torch.cat(found)

    def _seeded(self, stream: int = 0) -> Generator:
        if stream == 0:
            self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return torch.Generator().manual_seed((getattr(self, "_seed", 0) + 0x9E3779B9 * stream) % 2**63)

    _log_z: LogZ | None = None


def _log_z(rbm: RBM, rng: Generator) -> LogZ:
    if min(rbm.visible.count or math.inf, rbm.hidden.count or math.inf) <= QUICK_STATES:
        return exact_log_z(rbm)
    base = rbm.base()
    particles = smc(rbm, base, rng=rng, kernel=RBMGibbs(), chains=512, populations=2, path=rbm_path(base, rbm))
    draws = particles.draw(512, rng)
    base = rbm.base(draws[::2])
    return bracket(rbm, base, draws[1::2], rng=rng, kernel=RBMGibbs(), path=rbm_path(base, rbm))


def _generator(random_state: Any) -> Generator:
    return torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))


def _drawn(p: Tensor, u: Tensor) -> Tensor:
    """Bits, by comparison with the probability of a one."""
    return torch.lt(u, p, out=torch.empty_like(p))


def _uniform(shape: tuple[int, ...], like: Tensor, rng: Generator) -> Tensor:
    return torch.rand(shape, generator=rng, dtype=like.dtype)
