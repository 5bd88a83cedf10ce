r"""Fitting each site's law given all others: pseudo-likelihood, and ratio matching.

The conditional :math:`q_s(k) = p(x_s = k \mid x_{\setminus s})` is a softmax of the energies at the K values of site s,
in which Z drops out. A proper scoring rule of these conditionals, summed over the sites, is smallest at the truth:
pseudo-likelihood takes the logarithmic rule, ratio matching the quadratic one. See `Proper local scoring rules on
discrete sample spaces (Dawid et al., 2012) <https://doi.org/10.1214/12-AOS972>`_.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from gibbsian.objectives.single_site import SingleSiteObjective, odds_against


class PseudoLikelihood(SingleSiteObjective):
    r"""The negative log-probability of every site given all others.

    .. math:: -\frac{1}{n} \sum_i \sum_s \log p(x_{is} \mid x_{i \setminus s})

    `Statistical analysis of non-lattice data (Besag, 1975) <https://doi.org/10.2307/2987782>`_; for Boltzmann machines,
    `Consistency of pseudolikelihood estimation of fully visible Boltzmann machines (Hyvärinen, 2006)
    <https://doi.org/10.1162/neco.2006.18.10.2283>`_. It is convex where the energy is linear in its parameters.

    An energy that tells its conditionals is asked for those of all sites at once: one matrix product for Ising and
    Potts models. For any other, d (K - 1) + 1 energies are evaluated for each row, or those of ``sites`` sites alone.
    The metric ``accuracy`` is the part of the sites whose value is the most likely one given the others.

    Parameters
    ----------
    sites
        Sites of each row that are looked at, chosen at random anew in every call; ``None`` for all. The loss keeps its
        mean. Without effect where the conditionals are told, as all cost no more than some.
    chunk
        Neighbours at which the energy is evaluated at once. Where there are more, each piece is evaluated a second time
        for its gradients: memory is that of one piece, and time a third more.

    Raises
    ------
    OptionError
        If an option is no whole number of 1 or more.
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        """Minus the logarithm of the probability of the value that a site has."""
        return -logsigmoid(-odds_against(log_ratios))


class RatioMatching(SingleSiteObjective):
    r"""Half the squared distance between every site and its law given all others.

    .. math:: \frac{1}{2n} \sum_i \sum_s \sum_k \big( [x_{is} = k] - p(x_s = k \mid x_{i \setminus s}) \big)^2

    `Some extensions of score matching (Hyvärinen, 2007) <https://doi.org/10.1016/j.csda.2006.09.003>`_. For binary
    states it is the paper's :math:`\sum_s g\big(p(x) / p(x_{\bar s})\big)^2` with :math:`g(u) = 1 / (1 + u)` and
    :math:`x_{\bar s}` the state with site s flipped: the squared probability of the value that a site does not have.
    With K values it is the Brier score, of which this is the binary case (see the module). A row that the energy finds
    very unlikely counts no more than 1 per site, where the pseudo-likelihood has no bound: robust, but not convex.

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
        """Half the sum of squares; that the own value misses is what the others have."""
        odds = odds_against(log_ratios)
        others = (log_ratios + logsigmoid(-odds).unsqueeze(2)).exp()
        return 0.5 * (odds.sigmoid().square() + others.square().sum(2))
