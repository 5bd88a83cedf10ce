r"""Terms of a composition: windows of noise levels, and weighted sums of scores.

Energies have their own algebra (`gibbsian.energies.base`), in which products, negations and mixtures are written; a
term that is to act between two noise levels only is `windowed`. Scores, which have no density, can be added up:

.. math:: S(x, \sigma) = \sum_i w_i\, s_i(x, \sigma),

the score of :math:`\prod_i p_{i,\sigma}^{w_i}`. That is a product or a negation; a mixture needs to know how much
density each term has at a point, and so needs energies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast, overload

import torch
from torch import Tensor, nn

from gibbsian.bridges.scores import Score
from gibbsian.energies.base import Energy, formula
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import per_chain

Window = tuple[float, float]
"""Noise levels, ends included, between which something acts."""


def check_window(window: Window | None) -> None:
    """Refuse what is no pair of noise levels; ``None`` stands for all of them.

    Raises
    ------
    OptionError
        If it is empty, or reaches below 0.
    """
    if window is not None and not (len(window) == 2 and 0.0 <= window[0] < window[1]):
        raise OptionError(f"A window is a pair of noise levels 0 <= low < high; got {window}.")


def within(sigma: Tensor, window: Window) -> Tensor:
    """Tell which noise levels lie in a window: bools of the shape of ``sigma``."""
    return (sigma >= window[0]) & (sigma <= window[1])


@overload
def windowed(term: Energy, low: float = 0.0, high: float = math.inf) -> Energy: ...


@overload
def windowed(term: Score, low: float = 0.0, high: float = math.inf) -> Score: ...


def windowed(term: Energy | Score, low: float = 0.0, high: float = math.inf) -> Energy | Score:
    r"""Let a term act between two noise levels only; elsewhere its energy, or score, is 0.

    In a sum it is then a factor of the density between these levels: ``a + 2.0 * windowed(b, low=0.5)``. An energy
    without noise levels of its own (a classifier's, say) gets the context ``sigma`` by it.

    Parameters
    ----------
    term
        An energy, with the context ``sigma`` or without, or a score.
    low, high
        The ends, both included.

    Raises
    ------
    OptionError
        If the window is empty, or reaches below 0.
    ArgumentTypeError
        If the term is neither.
    """
    check_window((low, high))
    if isinstance(term, Energy):
        return WindowedTerm(term, (float(low), float(high)))
    if isinstance(term, Score):
        return WindowedScore(term, (float(low), float(high)))
    raise ArgumentTypeError(f"A window is put on an energy or a score; got {type(term).__name__}.")


class WindowedTerm(Energy):
    """An energy that is 0 outside a window of noise levels: see `windowed`."""

    def __init__(self, energy: Energy, window: Window) -> None:
        super().__init__()
        self.energy, self.window = energy, window
        self.event_shape, self.support = energy.event_shape, energy.support
        self.context = tuple(dict.fromkeys((*energy.context, "sigma")))

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Energy of each row at its noise level."""
        own = {**context, "sigma": sigma}
        value = self.energy(x, **{name: own[name] for name in cast(Energy, self.energy).context})
        return torch.where(within(sigma, self.window), value, 0.0)

    def extra_repr(self) -> str:
        """The term and its window."""
        return f"{formula(self.energy)}, {self.window[0]:.4g} to {self.window[1]:.4g}"


class WindowedScore(Score):
    """A score that is 0 outside a window of noise levels: see `windowed`."""

    def __init__(self, score: Score, window: Window) -> None:
        super().__init__()
        self.score, self.window = score, window
        self.context = score.context

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Scores of rows at their noise levels."""
        return torch.where(per_chain(within(sigma, self.window), x), self.score(x, sigma, **context), 0.0)

    def extra_repr(self) -> str:
        """The window."""
        return f"{self.window[0]:.4g} to {self.window[1]:.4g}"


class SummedScore(Score):
    r"""A weighted sum of scores, :math:`\sum_i w_i s_i(x, \sigma)`.

    Parameters
    ----------
    scores
        One or more; context that is open stays open.
    weights
        One for each, finite; all 1 when left out. Negative ones move away.

    Raises
    ------
    OptionError
        If there is no score, or weights are not finite or not one for each.
    ArgumentTypeError
        If something is no score.
    """

    weights: Tensor

    def __init__(self, scores: Sequence[Score], weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        for score in scores:
            if not isinstance(score, Score):
                raise ArgumentTypeError(f"Scores are added up; got {type(score).__name__}. score_of makes one.")
        count = len(scores)
        told = torch.ones(count) if weights is None else torch.as_tensor(weights)
        w = told.to(torch.float64)
        if count < 1 or w.shape != (count,) or not bool(w.isfinite().all()):
            raise OptionError(f"A sum of {count} scores needs {count} finite weights; got {told.tolist()}.")
        self.scores = nn.ModuleList(scores)
        self.register_buffer("weights", w, persistent=False)
        self.context = tuple(dict.fromkeys(name for score in scores for name in score.context))

    def parts(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """The scores by themselves, without weights: ``(terms, n, *event)``."""
        told = [s(x, sigma, **{k: context[k] for k in cast(Score, s).context}) for s in self.scores]
        return torch.stack(told)

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """The sum, of rows at their noise levels."""
        return torch.tensordot(self.weights.to(x.dtype), self.parts(x, sigma, **context), 1)

    def extra_repr(self) -> str:
        """The weights."""
        return f"weights={self.weights.tolist()}"
