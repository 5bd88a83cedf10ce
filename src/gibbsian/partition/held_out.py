r"""Held-out log-likelihood from below: reverse annealing from the rows themselves (RAISE).

Forward annealing draws :math:`x_0` from the base and moves it along the path. The law of where it ends,
:math:`p_{ann}`, is an approximation of the model that is normalised by itself, whatever Z is, and that tends to the
model as temperatures are added. Run backwards from a row x, with the log-weight :math:`\ell` of `annealed`,

.. math:: \mathbb{E}\bigl[ e^{-E(x) - \ell} \bigr] = p_{ann}(x), \qquad\text{so}\qquad
          \mathbb{E}\bigl[ -E(x) - \log \bar w \bigr] \le \log p_{ann}(x),

the latter, for the mean of several chains' weights, by Jensen's inequality. Annealing errs in the other direction: the
expectation of its log Z is too low, and hence the log-likelihood that one computes with it too high. Where the two
agree, both are near the truth.

The bound is one on :math:`\log p_{ann}`. Averaged over draws of the model that is at most :math:`\log p`, for the
difference is a Kullback-Leibler divergence. At a single row, or over data that the model does not describe,
:math:`p_{ann}` may be the larger of the two: annealing that does not cross between two modes gives the lighter one too
much, and rows in it a log-likelihood that is too high, by as much as 0.8 nats on the double well at 200 temperatures.
Double the temperatures: what changes was not yet the model's. Weights that agree are no proof, for all chains of a row
start at one point.

`Accurate and conservative estimates of MRF log-likelihood using reverse annealing (Burda, Grosse & Salakhutdinov, 2015)
<https://arxiv.org/abs/1412.8566>`_.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable, require_support
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel
from gibbsian.partition.annealed import log_weights, settle
from gibbsian.partition.base import effective_size
from gibbsian.partition.paths import Path
from gibbsian.partition.schedule import Schedule, pilot


class HeldOut(NamedTuple):
    """Log-likelihoods of rows, estimated from below, in nats.

    Attributes
    ----------
    log_prob
        Of each row, ``(n,)``, float64; too low on average, less so with more chains and temperatures.
    errors
        Standard error of each by its chains, ``(n,)``.
    lower
        Below the mean of log p_ann over these rows with the stated confidence, for any number of chains, 0-d.
    ess
        Effective number of each row's chains, ``(n,)``.
    chains
        How many each row had.
    nonfinite
        Weights that came from a non-finite energy; they count as zero, which keeps all bounds valid.
    """

    log_prob: Tensor
    errors: Tensor
    lower: Tensor
    ess: Tensor
    chains: int
    nonfinite: int

    @property
    def value(self) -> Tensor:
        """Mean over the rows, 0-d."""
        return self.log_prob.mean()

    @property
    def stderr(self) -> Tensor:
        """Standard error of ``value`` by the chains: how far another run over the same rows would be, 0-d."""
        return self.errors.square().sum().sqrt() / len(self.errors)

    @property
    def rows_stderr(self) -> Tensor:
        """Standard error of ``value`` as an estimate for all rows like these, chains included, 0-d; NaN of one row."""
        return self.log_prob.std() / math.sqrt(len(self.log_prob))

    def __str__(self) -> str:
        """Mean, both errors, bound."""
        value, own, wide, lower = (float(t) for t in (self.value, self.stderr, self.rows_stderr, self.lower))
        return (
            f"{value:.2f} nats per row (± {own:.2f} by the chains, ± {wide:.2f} by the {len(self.log_prob)} rows), at "
            f"least {lower:.2f}, ess {float(self.ess.mean()):.1f} of {self.chains} chains per row"
        )


def raise_lower_bound(
    energy: Energy,
    base: Tractable,
    rows: Tensor,
    *,
    rng: Generator,
    chains: int = 16,
    temperatures: int | None = None,
    kernel: Kernel | None = None,
    path: Path | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    finish: int = 10,
    confidence: float = 0.99,
    compile: bool = False,
) -> HeldOut:
    r"""Estimate the log-likelihood of held-out rows from below, by annealing each of them down to the base.

    The expectation of every ``log_prob`` is at most :math:`\log p_{ann}(x)`; see above for how that is related to the
    model's own. The rows need not be draws of the model, which is what `reverse_ais` would ask for.

    Parameters
    ----------
    energy, base, rng, temperatures, kernel, path, schedule, compile
        As in `ais`. A kernel that is not reversible (a sweep of blocks in a fixed order) makes :math:`p_{ann}` the law
        of annealing with its steps reversed, which is as good.
    rows
        The held-out rows, ``(n, *event)``. All n times ``chains`` move as one batch: take some hundred rows.
    chains
        Chains per row, 2 or more.
    steps
        Kernel steps at each temperature.
    finish
        Steps at beta = 1 that close the forward run, which bring :math:`p_{ann}` closer to the model for little.
    confidence
        Probability with which ``lower`` is below the mean of :math:`\log p_{ann}` over these rows.

    Raises
    ------
    ShapeError, OptionError, DomainError, ArgumentTypeError, DivergenceError
        If an argument does not fit, or no weight of a row is finite; the message says what to try.
    """
    kernel, path = settle(energy, base, kernel, path)
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise ArgumentTypeError(f"rows is a floating-point tensor (n, *event); got {type(rows).__name__}.")
    if rows.shape[1:] != base.event_shape or len(rows) < 1:
        raise ShapeError(
            f"rows holds one or more points of shape {tuple(base.event_shape)}, the base's; got {tuple(rows.shape)}."
        )
    require_support(rows, base, "the held-out rows")
    if chains < 2 or finish < 0 or not 0.0 < confidence < 1.0:
        raise OptionError(
            f"chains is 2 or more, finish 0 or more, confidence between 0 and 1; got {chains}, {finish}, {confidence}."
        )
    with torch.no_grad():
        own = path(rows.new_ones(()))(rows).double()
    if not bool(torch.isfinite(own).all()):
        raise DivergenceError(
            f"The energy is not finite at {int((~torch.isfinite(own)).sum())} of {len(rows)} held-out rows, whose "
            "log-likelihood is then minus infinity or unknown. Look at these rows, or for NaN in the energy."
        )
    if schedule is None:
        schedule = pilot(path, base, kernel, rng=rng, temperatures=temperatures)
    start = rows.repeat_interleave(chains, 0)
    with_finish = _extended(schedule, finish)
    back = log_weights(path, with_finish, kernel, start, rng=rng, steps=steps, compile=compile, backwards=True)
    return summarised(own, back.reshape(len(rows), chains), confidence)


def summarised(own: Tensor, back: Tensor, confidence: float) -> HeldOut:
    """Read the weights ``(n, chains)`` of rows of some energies ``(n,)``."""
    log_w = -own.unsqueeze(1) - back
    finite = torch.isfinite(log_w)
    log_w = torch.where(finite, log_w, -torch.inf)
    if not bool(finite.any(1).all()):
        raise DivergenceError(
            f"All chains of {int((~finite.any(1)).sum())} of {len(own)} rows left the energy's domain on their way to "
            "the base. Choose a base on the same domain, or smaller steps."
        )
    n, chains = log_w.shape
    log_prob = torch.logsumexp(log_w, 1) - math.log(chains)
    ess = torch.stack([effective_size(row) for row in log_w])
    errors = ((chains / ess - 1.0).clamp(min=0.0) / (chains - 1)).sqrt()
    # The product over the rows of mean weight by p_ann has expectation 1: Markov's inequality, as in `base`.
    lower = log_prob.mean() - math.log(1.0 / (1.0 - confidence)) / n
    if float(ess.median()) < 0.15 * chains:
        warnings.warn(
            f"Few of a row's chains count, {float(ess.median()):.1f} of {chains}: the log-likelihoods are lower bounds "
            "still, but may be far below, and their errors do not mean much. Try more temperatures, more steps, or a "
            "kernel that moves farther.",
            RuntimeWarning,
            stacklevel=3,
        )
    return HeldOut(log_prob, errors, lower, ess, chains, int((~finite).sum()))


def _extended(schedule: Schedule, finish: int) -> Schedule:
    """Let a schedule end with more stops at beta = 1."""
    betas, sizes = schedule.betas, schedule.step_sizes
    betas = torch.cat((betas, betas.new_ones(finish)))
    if sizes is None or not finish:
        return Schedule(betas, sizes)
    # The last palette of step sizes, in turn; a schedule of one increment has none.
    last = sizes[-min(len(sizes), finish) :]
    if not len(last):
        return Schedule(betas)
    return Schedule(betas, torch.cat((sizes, last.repeat(finish // len(last) + 1)[:finish])))
