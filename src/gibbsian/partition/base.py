r"""What every estimate of log Z is made of: importance weights, what they say of Z, and how sure that is.

Let :math:`w` be nonnegative with :math:`E[w] = Z`, and :math:`w_1, \ldots, w_n` independent.

* **Value**: :math:`\log \bar w`, whose standard error by the delta method is
  :math:`\sqrt{(n / n_{eff} - 1) / (n - 1)}`, where :math:`n_{eff} = (\sum w)^2 / \sum w^2`.
* **Lower bound**: split the weights into G groups and let :math:`\bar w_g` be their means. The product of the means is
  itself nonnegative with mean :math:`Z^G`, so Markov's inequality gives, for any number of weights and any law,

  .. math:: P\left(\frac1G \sum_g \log \bar w_g \;\ge\; \log Z + \frac{\log(1/\delta)}{G}\right) \le \delta .

  Many small groups pay little for certainty and more for Jensen's gap, few large ones the opposite; several sizes are
  tried, each at its share of δ, and the best bound is taken.

From weights with :math:`E[1/w] = 1/Z`, which come from running the annealing backwards, the same bound is an upper one.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.diagnostics.chains import effective_sample_size
from gibbsian.errors import DivergenceError, OptionError


class LogZ(NamedTuple):
    """An estimate of log Z, in nats, and how sure it is.

    Attributes
    ----------
    value
        The estimate, 0-d.
    stderr
        Its standard error, 0-d.
    lower, upper
        Bounds, 0-d; infinite on the side that nothing is known of. The function that returns them says at which
        confidence they hold.
    ess
        Effective number of weights, 0-d: when it is small, value and standard error are not to be trusted, and
        only the bounds are. It judges the weights at hand: mass that no chain reached (a tail far wider than the base)
        shows neither in it nor in ``stderr``, but in the gap between a forward and a reverse run.
    chains
        How many weights there were.
    nonfinite
        How many of them came from a non-finite energy. They count as zero, which keeps both bounds valid.
    """

    value: Tensor
    stderr: Tensor
    lower: Tensor
    upper: Tensor
    ess: Tensor
    chains: int = 0
    nonfinite: int = 0

    def __str__(self) -> str:
        """Value, error, bracket and effective sample size, to the digits that the error leaves meaningful."""
        value, stderr, lower, upper, ess = (float(t) for t in self[:5])
        known = 0.0 < stderr < math.inf
        digits = min(6, max(0, math.ceil(-math.log10(stderr)))) if known else 2
        text = f"{value:.{digits}f} ± {stderr:.{digits}f}"
        bounds = max(2, digits)
        if math.isfinite(lower) and math.isfinite(upper):
            text += f", bracket [{lower:.{bounds}f}, {upper:.{bounds}f}]"
        elif math.isfinite(lower):
            text += f", at least {lower:.{bounds}f}"
        elif math.isfinite(upper):
            text += f", at most {upper:.{bounds}f}"
        text += f", ess {ess:.0f}" + (f" of {self.chains}" if self.chains else "")
        return text + (f", {self.nonfinite} non-finite weights" if self.nonfinite else "")


def from_log_weights(log_weights: Tensor, confidence: float = 0.99) -> LogZ:
    """Estimate log Z from independent log-weights with E[w] = Z; there is no upper bound in them.

    Parameters
    ----------
    log_weights
        ``(n,)``, two or more. Minus infinity is a weight of zero; NaN and plus infinity count as zero too.
    confidence
        Probability with which ``lower`` is below log Z.

    Raises
    ------
    DivergenceError
        If no weight is finite.
    OptionError
        If there are fewer than two weights, or the confidence is not between 0 and 1.
    """
    n = log_weights.numel()
    if n < 2 or not 0.0 < confidence < 1.0:
        raise OptionError(f"It takes 2 or more weights and 0 < confidence < 1; got {n} and {confidence}.")
    log_w, bad = _cleaned(log_weights)
    if bad == n:
        raise DivergenceError(
            f"None of {n} importance weights is finite: the energy is infinite or NaN at every point of the base. "
            "Choose a base that covers the energy's domain, or look for NaN in the energy."
        )
    ess = effective_size(log_w)
    value = torch.logsumexp(log_w, 0) - math.log(n)
    # Rounding may push the ratio a hair below one when all weights agree.
    stderr = ((n / ess - 1.0).clamp(min=0.0) / (n - 1)).sqrt()
    lower = lower_bound(log_w, confidence)
    return LogZ(value, stderr, lower, torch.full_like(value, torch.inf), ess, n, bad)


def exactly(log_z: Tensor) -> LogZ:
    """Present a log Z that is known to rounding: no error, bounds that meet, and no weights to judge."""
    return LogZ(log_z, torch.zeros_like(log_z), log_z, log_z, torch.full_like(log_z, torch.inf))


def mirrored(estimate: LogZ) -> LogZ:
    """Turn an estimate of -log Z into one of log Z: its lower bound becomes the upper one."""
    return estimate._replace(value=-estimate.value, lower=-estimate.upper, upper=-estimate.lower)


def lower_bound(log_weights: Tensor, confidence: float) -> Tensor:
    """Bound log Z from below at a confidence that holds for any number of weights and any law of theirs.

    Parameters
    ----------
    log_weights
        ``(n,)``, independent, with E[w] = Z; minus infinity is a weight of zero.
    confidence
        Probability with which the bound holds.
    """
    n = log_weights.numel()
    sizes = [4**i for i in range(n.bit_length()) if 4**i <= n]
    price = math.log(len(sizes) / (1.0 - confidence))
    bounds = []
    for size in sizes:
        groups = n // size
        means = torch.logsumexp(log_weights[: groups * size].reshape(groups, size), 1) - math.log(size)
        bounds.append(means.mean() - price / groups)
    return torch.stack(bounds).max()


def effective_size(log_weights: Tensor) -> Tensor:
    """Effective number of weights, (sum w)^2 / (sum w^2), 0-d."""
    return (2.0 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2.0 * log_weights, 0)).exp()


def variance_of_mean(values: Tensor) -> Tensor:
    """Variance of the mean of independent numbers ``(n,)``, or of those along chains ``(draws, chains)``, 0-d."""
    x = values.double()
    spread = (x.square().mean() - x.mean().square()).clamp(min=0.0)
    return spread / worth(x)


def worth(values: Tensor) -> Tensor:
    """How many independent numbers these are worth: ``(n,)`` as many, ``(draws, chains)`` their effective size; 0-d."""
    count = torch.full((), float(values.numel()), dtype=torch.float64, device=values.device)
    if values.ndim == 1:
        return count
    ess = effective_sample_size(values, ranked=False)
    # Numbers that are all equal are as good as independent: their spread is 0.
    return torch.where(ess.isnan(), count, ess)


def warn_if_degenerate(estimate: LogZ, what: str, remedy: str) -> None:
    """Warn when so few weights dominate that value and standard error mean little.

    Parameters
    ----------
    estimate
        The estimate to judge.
    what
        Which weights, for the message.
    remedy
        What to try.
    """
    if estimate.chains and float(estimate.ess) < max(10.0, 0.02 * estimate.chains):
        warnings.warn(
            f"The {what} are dominated by a few: ess {float(estimate.ess):.1f} of {estimate.chains}. The bounds hold, "
            f"but the value and its standard error do not mean much. {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )


def _cleaned(log_weights: Tensor) -> tuple[Tensor, int]:
    log_w = log_weights.double()
    finite = torch.isfinite(log_w)
    return torch.where(finite, log_w, -torch.inf), int((~finite).sum())
