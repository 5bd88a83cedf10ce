r"""Brackets: log Z between a lower bound from forward chains and an upper one from reverse chains.

Both runs walk one schedule with one set of kernels, so that their log-weights :math:`\ell` obey Crooks' relation
:math:`p_F(\ell)\, e^{\ell} = Z\, p_R(\ell)`. Hence the odds that a path with log-weight :math:`\ell` came from the
forward run are :math:`(n_F / n_R)\, Z e^{-\ell}`, and the value is the maximum-likelihood log Z of that logistic model,
which is Bennett's acceptance ratio and has, asymptotically, the least variance of all estimates from these weights.

`Efficient estimation of free energy differences from Monte Carlo data (Bennett, 1976)
<https://doi.org/10.1016/0021-9991(76)90078-4>`_; `Equilibrium free energies from nonequilibrium measurements using
maximum-likelihood methods (Shirts et al., 2003) <https://arxiv.org/abs/cond-mat/0309199>`_; `Entropy production
fluctuation theorem and the nonequilibrium work relation for free energy differences (Crooks, 1999)
<https://arxiv.org/abs/cond-mat/9901352>`_.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable
from gibbsian.kernels.base import Kernel
from gibbsian.partition.annealed import (
    REMEDY,
    check_draws,
    forward_weights,
    reverse_weights,
    scheduled,
    settle,
)
from gibbsian.partition.base import LogZ, from_log_weights, mirrored, variance_of_mean, warn_if_degenerate
from gibbsian.partition.paths import Path
from gibbsian.partition.schedule import Schedule


def bracket(
    energy: Energy,
    base: Tractable,
    draws: Tensor,
    *,
    rng: Generator,
    chains: int | None = None,
    temperatures: int | None = None,
    kernel: Kernel | None = None,
    path: Path | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    confidence: float = 0.99,
    compile: bool = False,
    lanes: int | None = None,
) -> LogZ:
    """Estimate log Z from forward and reverse annealing together, between bounds.

    Parameters
    ----------
    energy, base, rng, temperatures, kernel, path, schedule, steps, compile, lanes
        As in `ais`. The value and its error assume a kernel that is reversible (HMC and MALA are); the bounds do not.
    draws
        Draws of the model, ``(n, *event)``, 2 or more. The upper bound is only as good as they are: see `reverse_ais`.
        With lanes, all of them on every process.
    chains
        Forward chains; as many as there are draws when ``None``.
    confidence
        Probability with which ``lower <= log Z <= upper``, both at once, given exact independent draws.

    Returns
    -------
    LogZ
        ``ess`` is the smaller of the two runs'. Bounds that cross refute the draws, and a warning says so.

    Raises
    ------
    ShapeError, OptionError, DomainError, ArgumentTypeError, DivergenceError
        If an argument does not fit or no energy is finite; the message says what to try.
    """
    kernel, path = settle(energy, base, kernel, path)
    check_draws(draws, base)
    schedule = scheduled(schedule, path, base, kernel, rng, temperatures, lanes)
    how = {"rng": rng, "steps": steps, "compile": compile, "lanes": lanes}
    ahead = forward_weights(path, schedule, kernel, base, draws.shape[0] if chains is None else chains, **how)
    back = reverse_weights(path, schedule, kernel, draws, **how)
    result = between(ahead, back, confidence)
    warn_if_degenerate(result, "forward or reverse weights", REMEDY)
    if float(result.lower) > float(result.upper):
        warnings.warn(
            f"The bounds of log Z cross: at least {float(result.lower):.2f} by forward chains, at most "
            f"{float(result.upper):.2f} by the draws, so these are not the model's own. The lower bound stands; the "
            "upper one, the value and all that is computed from it do not. Run longer chains for the draws, or doubt "
            "the fit they came with.",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def between(forward: Tensor, reverse: Tensor, confidence: float = 0.99) -> LogZ:
    """Combine log-weights of forward paths, with E[w] = Z, and of reverse ones, with E[1/w] = 1/Z.

    Parameters
    ----------
    forward, reverse
        ``(n_F,)`` and ``(n_R,)``.
    confidence
        Probability with which both bounds hold at once.

    Raises
    ------
    DivergenceError
        If all weights of a run are non-finite.
    """
    each = 0.5 * (1.0 + confidence)
    low, high = from_log_weights(forward, each), mirrored(from_log_weights(-reverse, each))
    value, stderr = acceptance_ratio(forward, reverse)
    return LogZ(
        value,
        stderr,
        low.lower,
        high.upper,
        torch.minimum(low.ess, high.ess),
        low.chains if float(low.ess) <= float(high.ess) else high.chains,
        low.nonfinite + high.nonfinite,
    )


def acceptance_ratio(forward: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate log Z and its standard error by Bennett's acceptance ratio, both 0-d.

    Parameters
    ----------
    forward, reverse
        Log-weights, ``(n_F,)`` and ``(n_R,)``, or of chains ``(draws, chains)``, whose correlation then counts in the
        error; non-finite ones are paths that the other direction never takes.
    """
    f, r = forward.double(), reverse.double()
    f = torch.where(torch.isfinite(f), f, -torch.inf)
    r = torch.where(torch.isfinite(r), r, torch.inf)
    odds = math.log(f.numel() / r.numel())
    ends = torch.cat((f.flatten(), r.flatten()))
    ends = ends[torch.isfinite(ends)]
    low, high = ends.min() - abs(odds) - 1.0, ends.max() + abs(odds) + 1.0
    # The equation's left side falls from positive to negative in log Z, once; 80 halvings exhaust float64.
    for _ in range(80):
        middle = 0.5 * (low + high)
        positive = (f - middle - odds).sigmoid().sum() > (middle + odds - r).sigmoid().sum()
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
    value = 0.5 * (low + high)
    variance = sum(
        variance_of_mean(a) / a.mean().square() for a in ((f - value - odds).sigmoid(), (value + odds - r).sigmoid())
    )
    return value, torch.as_tensor(variance).clamp(min=0.0).sqrt()
