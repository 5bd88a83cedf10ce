r"""Minimum probability flow: keep a dynamics that has the model as its law from leading away from the data.

A chain jumps from x to each neighbour :math:`x'` at the rate :math:`e^{(E(x) - E(x'))/2}`. The rates are in detailed
balance with :math:`p \propto e^{-E}`, so that a law other than p changes at once, while p stays. After a time
:math:`\epsilon` the data's law has moved away from itself by a Kullback-Leibler divergence of :math:`\epsilon` times
the rate at which the data leave their states.
"""

from __future__ import annotations

from torch import Tensor

from gibbsian.objectives.single_site import SingleSiteObjective


class MinimumProbabilityFlow(SingleSiteObjective):
    r"""The rate at which probability flows from the data to the states that differ from them in one site.

    .. math:: \frac{1}{n} \sum_i \sum_{x' \sim x_i} e^{\frac{1}{2} (E(x_i) - E(x'))}

    `Minimum probability flow learning (Sohl-Dickstein et al., 2011) <https://arxiv.org/abs/0906.4779>`_. It is convex
    where the energy is linear in its parameters. The paper leaves out neighbours that are data themselves. Here they
    count: flows between two states in balance then cancel in the gradient, the model is the minimum whatever the
    batch, and rows do not see each other.

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
        """Sum the rates to the other values."""
        return (0.5 * log_ratios).exp().sum(2)
