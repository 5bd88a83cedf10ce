r"""Concrete score matching: score matching with relative differences in the place of derivatives.

The concrete score of a density at x has an entry for every neighbour, :math:`c(x \to x') = p(x') / p(x) - 1`, and Z
drops out of it. As the data's is not known, the squared distance of the model's from it is rewritten: with
:math:`\mathbb{E}_{data} \sum_{x'} c_{data}(x \to x') \, f(x, x') = \mathbb{E}_{data} \sum_{x'} (f(x', x) - f(x, x'))`,
which holds as being a neighbour is mutual, it is up to a constant

.. math:: \mathbb{E}_{data} \sum_{x'} c(x \to x')^2 + 2 c(x \to x') - 2 c(x' \to x).
"""

from __future__ import annotations

from torch import Tensor

from gibbsian.objectives.single_site import SingleSiteObjective


class ConcreteScoreMatching(SingleSiteObjective):
    r"""The squared distance between the concrete scores of model and data, up to a constant.

    .. math:: \frac{1}{n} \sum_i \sum_{x' \sim x_i} \rho^2 - 2 \rho^{-1} + 1, \qquad \rho = e^{E(x_i) - E(x')}

    `Concrete score matching: generalized score matching for discrete data (Meng et al., 2022)
    <https://arxiv.org/abs/2211.00802>`_, with all changes of one site as the neighbours of a state.

    The ratios enter by themselves and squared, where the other objectives of this kind take their logarithm, their
    square root or a bounded function: it needs the most data of them. It is not bounded below on a finite sample. An
    energy that can be raised around every row, as a network can, falls without end, so that it is for models with
    few parameters, much data, or early stopping.

    Parameters
    ----------
    sites, chunk
        As for `PseudoLikelihood`.

    Raises
    ------
    OptionError
        If an option is no whole number of 1 or more.
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        """Sum over the other values."""
        return ((2.0 * log_ratios).exp() - 2.0 * (-log_ratios).exp() + 1.0).sum(2)
