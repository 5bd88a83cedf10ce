r"""Potts models of families by pseudo-likelihood: a convex problem, solved with all sequences at once.

.. math::

   \ell(J, h) = -\sum_n w_n \sum_i \log p(x_{ni} \mid x_{n \setminus i})
                + \lambda_J \sum_{i<j} \|J_{ij}\|^2 + \lambda_h \sum_i \|h_i\|^2,

with weights w that add to one, and one coupling :math:`J_{ij} = J_{ji}^T` for both columns of a pair: the symmetric
form. `Improved contact prediction in proteins: using pseudolikelihoods to infer Potts models (Ekeberg et al., 2013)
<https://arxiv.org/abs/1211.1281>`_. The penalty makes the optimum unique and brings it to the zero-sum gauge of the
couplings. Value and gradient look sequences up by their letters (see `gibbsian.sequences.tables`), and L-BFGS,
`On the limited memory BFGS method for large scale optimization (Liu & Nocedal, 1989)
<https://doi.org/10.1007/BF01589116>`_, of SciPy takes some hundred of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gibbsian.energies.couplings import Couplings
from gibbsian.energies.pairwise import Potts
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.sequences.frequencies import statistics

ROWS = 1024
"""Sequences that are looked up at once: their logits stay in the cache."""


@dataclass(frozen=True)
class PseudoLikelihoodSettings:
    """How `fit_pseudo_likelihood` fits.

    Parameters
    ----------
    coupling_penalty, field_penalty
        The lambdas.
    iterations
        Of L-BFGS, at most.
    tolerance
        Stop when an iteration lowers the loss by less than this share of it.

    Raises
    ------
    OptionError
        If a value is out of its range.
    """

    coupling_penalty: float = 0.01
    field_penalty: float = 0.001
    iterations: int = 200
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("coupling_penalty", "field_penalty"):
            if not getattr(self, name) > 0.0:
                raise OptionError(
                    f"{name} is above 0, for without it what was never seen has no finite field; got "
                    f"{getattr(self, name)}."
                )
        if self.iterations < 1 or not self.tolerance >= 0.0:
            raise OptionError(
                f"iterations is 1 or more and tolerance 0 or more; got {self.iterations} and {self.tolerance}."
            )


class PseudoLikelihoodLoss:
    """The penalised loss and its gradient, for sequences that are looked up by their letters.

    Parameters
    ----------
    codes
        ``(N, L)``.
    weights
        ``(N,)``.
    letters
        K.
    settings
        The penalties.
    """

    def __init__(self, codes: Tensor, weights: Tensor, letters: int, settings: PseudoLikelihoodSettings) -> None:
        distinct, place = torch.unique(codes, dim=0, return_inverse=True)
        # Copies are one sequence with the sum of their weights.
        self.weights = torch.zeros(len(distinct)).index_add_(0, place, (weights / weights.sum()).float())
        self.settings, self.letters, self.length = settings, letters, codes.shape[1]
        self.codes = distinct
        self.above = torch.triu_indices(self.length, self.length, 1)
        self.places = distinct + letters * torch.arange(self.length)
        self.bags = [_transposed(rows, self.length * letters) for rows in self.places.split(ROWS)]

    @property
    def size(self) -> int:
        """How many parameters there are: fields, then couplings."""
        return self.length * self.letters + self.above.shape[1] * self.letters**2

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Fields ``(L, K)`` and couplings of pairs ``(P, K, K)`` out of all parameters."""
        cut = self.length * self.letters
        return flat[:cut].view(self.length, -1), flat[cut:].view(-1, self.letters, self.letters)

    @torch.no_grad()
    def __call__(self, flat: Tensor) -> tuple[float, Tensor]:
        """Loss, in nats per sequence, and gradient at parameters ``(size,)``."""
        length, k = self.length, self.letters
        field, pairs = self.parts(flat)
        i, j = self.above
        table = flat.new_zeros((length, length, k, k))
        table[i, j], table[j, i] = pairs, pairs.mT
        table = table.transpose(1, 2).reshape(length * k, length * k)
        gradient, field_gradient = torch.zeros_like(table), torch.zeros_like(field)
        loss = 0.0
        for codes, places, weights, (order, offsets) in zip(
            self.codes.split(ROWS), self.places.split(ROWS), self.weights.split(ROWS), self.bags
        ):
            logits = embedding_bag(places, table, mode="sum").view(len(codes), length, k) + field
            logs = logits.log_softmax(-1)
            loss -= float((logs.gather(2, codes[:, :, None])[..., 0].sum(1) * weights).sum(dtype=torch.float64))
            residual = logs.exp_()
            residual.scatter_add_(2, codes[:, :, None], residual.new_full((len(codes), length, 1), -1.0))
            residual *= weights[:, None, None]
            field_gradient += residual.sum(0)
            gradient += embedding_bag(order, residual.flatten(1), offsets, mode="sum")
        by_pair = gradient.view(length, k, length, k).transpose(1, 2)
        pair_gradient = by_pair[i, j] + by_pair[j, i].mT
        s = self.settings
        loss += s.coupling_penalty * float(pairs.double().square().sum())
        loss += s.field_penalty * float(field.double().square().sum())
        pair_gradient += 2.0 * s.coupling_penalty * pairs
        field_gradient += 2.0 * s.field_penalty * field
        return loss, torch.cat((field_gradient.flatten(), pair_gradient.flatten()))

    def start(self) -> Tensor:
        """Begin with the logarithms of the columns' letters, and no couplings."""
        one = statistics(self.codes, self.letters, self.weights).smoothed(0.01).one.log()
        flat = torch.zeros(self.size)
        flat[: one.numel()] = (one - one.mean(1, keepdim=True)).flatten()
        return flat

    def energy(self, flat: Tensor) -> Potts:
        """The Potts model of some parameters."""
        field, pairs = self.parts(flat.float())
        energy = Potts.dense(self.length, self.letters)
        with torch.no_grad():
            energy.field.copy_(field)
            cast(Couplings, energy.interaction).pairs_above.copy_(pairs)
        return energy

    def flat(self, energy: Potts) -> Tensor:
        """The parameters of a Potts model."""
        return torch.cat((energy.field.detach().flatten(), energy.interaction.pairs()[2].detach().flatten()))


@dataclass(frozen=True)
class PseudoLikelihoodFit:
    """A Potts model fitted by pseudo-likelihood.

    Attributes
    ----------
    energy
        The model.
    loss
        Penalised, in nats per sequence, after each iteration.
    converged
        Whether the tolerance was met before the iterations ran out.
    seconds
        It took.
    """

    energy: Potts
    loss: tuple[float, ...]
    converged: bool
    seconds: float


def fit_pseudo_likelihood(
    codes: Tensor,
    weights: Tensor,
    letters: int,
    settings: PseudoLikelihoodSettings | None = None,
    *,
    start: Potts | None = None,
    progress: Callable[[int, float, Potts | None], object] | None = None,
    every: int = 20,
) -> PseudoLikelihoodFit:
    """Fit a Potts model by pseudo-likelihood.

    Parameters
    ----------
    codes, weights, letters
        Sequences ``(N, L)``, a weight for each ``(N,)``, and K.
    settings
        Penalties and when to stop.
    start
        A model to begin with; the problem is convex, and any leads to one optimum.
    progress
        Called after each iteration with its number, the loss and, at every ``every``-th, the model so far.
    every
        See ``progress``.

    Raises
    ------
    DivergenceError
        If the loss leaves the numbers.
    """
    from scipy.optimize import minimize

    settings = settings or PseudoLikelihoodSettings()
    began = time.perf_counter()
    loss = PseudoLikelihoodLoss(codes, weights, letters, settings)
    seen: list[float] = []

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        found, gradient = loss(torch.from_numpy(flat).float())
        return found, gradient.double().numpy()

    def told(intermediate_result: object) -> None:
        seen.append(float(intermediate_result.fun))  # type: ignore[attr-defined]
        if progress is not None:
            flat = torch.from_numpy(np.array(intermediate_result.x))  # type: ignore[attr-defined]
            progress(len(seen), seen[-1], loss.energy(flat) if len(seen) % every == 0 else None)

    first = loss.start() if start is None else loss.flat(start)
    found = minimize(
        value,
        first.double().numpy(),
        jac=True,
        method="L-BFGS-B",
        callback=told,
        options={"maxiter": settings.iterations, "ftol": settings.tolerance, "gtol": 0.0, "maxcor": 8},
    )
    if not np.isfinite(found.fun):
        raise DivergenceError(
            f"The pseudo-likelihood left the numbers after {len(seen)} iterations; raise coupling_penalty "
            f"(it was {settings.coupling_penalty})."
        )
    # Status 1 is a limit reached; a line search that float32 cannot improve on (2) is at the optimum.
    energy = loss.energy(torch.from_numpy(found.x))
    return PseudoLikelihoodFit(energy, tuple(seen), found.status != 1, time.perf_counter() - began)


def _transposed(places: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each row of the table the sequences that look it up, as bags: their numbers, and where each bag begins."""
    flat = places.flatten()
    order = flat.argsort(stable=True) // places.shape[1]
    counts = torch.bincount(flat, minlength=rows)
    return order, counts.cumsum(0) - counts
