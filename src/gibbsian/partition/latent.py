r"""Likelihoods of models with a real latent, row by row, by annealing z from the encoder or the prior to the posterior.

For a row x, let :math:`q_x` be normal with mean m and scale s: the encoder's, or the prior's own. In the numbers
:math:`u = (z - m) / s` it is standard normal, whatever the row, and the posterior is the energy

.. math:: E_x(u) = -\log p(x, m + s u) - \textstyle\sum_i \log s_i, \qquad \int e^{-E_x(u)}\, du = p(x) .

So the log Z of every row's own annealing from N(0, I) is its log-likelihood, and chains of all rows move as one batch.
The weights of forward chains have :math:`E[w] = p(x)`, and :math:`\log \bar w` is too low on average: a bound that
improves on the importance weighted one, from which it starts, by moving the draws.

**From above.** A row that was simulated, :math:`z \sim p(z)`, :math:`x \sim p(x \mid z)`, comes with one exact draw of
its posterior: the z that made it. Annealed from there down, weights have :math:`E[1/w] = 1/p(x)`. On simulated rows the
likelihood stands between both, and their gap says how good the same settings are on rows like these.

`Annealed importance sampling (Neal, 2001) <https://arxiv.org/abs/physics/9803008>`_; `Sandwiching the marginal
likelihood using bidirectional Monte Carlo (Grosse et al., 2015) <https://arxiv.org/abs/1511.02543>`_; `On the
quantitative analysis of decoder-based generative models (Wu et al., 2017) <https://arxiv.org/abs/1611.04273>`_.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.decoders import Directed
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel
from gibbsian.kernels.hmc import HMC
from gibbsian.partition.annealed import log_weights, settle
from gibbsian.partition.held_out import HeldOut, summarised
from gibbsian.partition.latent_paths import Start, latent_schedule, sampled
from gibbsian.partition.schedule import Schedule


class SimulatedBracket(NamedTuple):
    """Rows that a model made, with their log-likelihoods under it from both sides, in nats.

    Attributes
    ----------
    x, z
        The rows ``(n, *event)``, and what each was made of.
    below
        By forward chains: too low on average, ``below.lower`` at a confidence.
    above
        By chains from z down, ``(n,)``: too high on average.
    upper
        Above the mean log-likelihood of the rows at the same confidence, 0-d.
    """

    x: Tensor
    z: Tensor
    below: HeldOut
    above: Tensor
    upper: Tensor

    @property
    def gap(self) -> Estimate:
        """Mean distance of the two sides, with its error over the rows."""
        return mean_of(self.above - self.below.log_prob)

    def __str__(self) -> str:
        """Both sides and their gap."""
        low, high = mean_of(self.below.log_prob), mean_of(self.above)
        return (
            f"between {low.value:.2f} and {high.value:.2f} nats per simulated row on average, gap {self.gap}; bounds "
            f"[{float(self.below.lower):.2f}, {float(self.upper):.2f}] ({len(self.x)} rows)"
        )


class RowBounds(NamedTuple):
    """Bounds of the log-likelihoods of rows, in nats.

    Attributes
    ----------
    values
        ``(n,)``, float64.
    errors
        Standard error of each by its draws, ``(n,)``.
    """

    values: Tensor
    errors: Tensor

    @property
    def mean(self) -> Estimate:
        """Mean over the rows, with the error by the draws: how far another run over the same rows would be."""
        return Estimate(float(self.values.mean()), float(self.errors.square().sum().sqrt()) / len(self.errors))

    def gain(self, over: Tensor) -> Estimate:
        """By how much these are above other values of the same rows ``(n,)``, with the error over rows."""
        return mean_of(self.values - over)


@torch.no_grad()
def evidence_lower_bound(energy: LatentEnergy, x: Tensor, *, rng: Generator, draws: int = 64) -> RowBounds:
    """Evaluate the evidence lower bound of rows: mean log-weights of the proposal's draws.

    ``energy.estimate(x, rng, draws)`` is minus the importance weighted bound, from as many draws.

    Parameters
    ----------
    energy
        With `ImportanceLatents`, such as `vae` makes.
    x
        Rows.
    rng
        Draws z anew, for each row its own.
    draws
        For each row, 2 or more.

    Raises
    ------
    ArgumentTypeError
        If the energy has no proposal.
    OptionError
        If there are too few draws.
    """
    _, latents = sampled(energy)
    if draws < 2:
        raise OptionError(f"draws is 2 or more, for an error needs two weights; got {draws}.")
    parts = []
    # In parts of the draws, not of the rows: a refined proposal is one of all rows.
    for count in torch.arange(draws).split(max(1, energy.chunk // len(x))):
        z, minus_log_q = latents.placed(x, latents.fresh((len(x), len(count)), rng), 1)
        parts.append(energy.log_weights(x, z, minus_log_q).double())
    log_w = torch.cat(parts, 1)
    return RowBounds(log_w.mean(1), log_w.std(1) / math.sqrt(draws))


def latent_log_likelihood(
    energy: LatentEnergy,
    x: Tensor,
    *,
    rng: Generator,
    chains: int = 16,
    temperatures: int = 200,
    start: str = "encoder",
    kernel: Kernel | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    log_z: float | None = None,
    confidence: float = 0.99,
    compile: bool = False,
) -> HeldOut:
    r"""Estimate log-likelihoods of rows from below, by annealing z from the encoder or the prior to the posterior.

    Parameters
    ----------
    energy
        A `LatentEnergy` of a `Directed` one over real z.
    x
        Rows ``(n, *event)``. All n times ``chains`` move as one batch: take some hundred rows.
    rng
        The generator.
    chains
        Of each row, 2 or more.
    temperatures
        Increments of beta when there is no schedule.
    start
        ``"encoder"``, the `GaussianProposal` of the energy; or ``"prior"``, which must then be a `Gaussian`, of
        independent numbers.
    kernel
        How z moves, in units of the start's scale; HMC with five leapfrog steps when ``None``.
    schedule
        Temperatures and step sizes; found by chains of some of the rows when ``None``, see `latent_schedule`.
    steps
        Kernel steps at each temperature.
    log_z
        Log Z of a prior that is not normalised: what `ais` or `bracket` say of it.
    confidence
        Probability with which ``lower`` is below the mean log-likelihood of these rows, for any number of chains.
    compile
        Compile blocks of temperatures.

    Returns
    -------
    HeldOut
        Each ``log_prob`` is at most the row's log-likelihood on average; here there is no other law in between.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError, ShapeError, DivergenceError
        If an argument does not fit, or no weight of a row is finite; the message says what to try.
    """
    law = Start.of(energy, start)
    constant = _prior_log_z(energy, log_z)
    rows = batch_rows(x, cast(torch.Size, energy.event_shape))
    _check_counts(chains, confidence)
    kernel, _ = settle(law.base, law.base, kernel or HMC(0.1, leapfrog=5), None)
    if schedule is None:
        schedule = latent_schedule(energy, rows, rng=rng, temperatures=temperatures, start=start, kernel=kernel)
    path = law.path(rows, chains)
    at = law.base.sample(len(rows) * chains, rng)
    log_w = log_weights(path, schedule, kernel, at, rng=rng, steps=steps, compile=compile).view(-1, chains)
    return summarised(log_w.new_full((len(rows),), constant), -log_w, confidence)


def simulated_bracket(
    energy: LatentEnergy,
    n: int,
    *,
    rng: Generator,
    chains: int = 16,
    temperatures: int = 200,
    start: str = "encoder",
    kernel: Kernel | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    confidence: float = 0.99,
    compile: bool = False,
) -> SimulatedBracket:
    """Simulate rows, and estimate their log-likelihoods from both sides by the same schedule and kernel.

    The reverse chains of a row all start at the z that made it; rows are independent, and the bound is one on their
    mean.

    Parameters
    ----------
    energy
        Its prior must be tractable.
    n
        How many rows to simulate.
    rng, chains, temperatures, start, kernel, schedule, steps, compile
        As in `latent_log_likelihood`.
    confidence
        Probability of each bound.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError, DivergenceError
        As `latent_log_likelihood`.
    """
    law = Start.of(energy, start)
    _prior_log_z(energy, None)
    _check_counts(chains, confidence)
    if n < 2:
        raise OptionError(f"n counts the rows to simulate, 2 or more; got {n}.")
    joint = cast(Directed, energy.energy)
    with torch.no_grad():
        z = cast(Tractable, joint.prior).sample(n, rng)
        x = joint.likelihood.sample(z, rng)
    kernel, _ = settle(law.base, law.base, kernel or HMC(0.1, leapfrog=5), None)
    if schedule is None:
        schedule = latent_schedule(energy, x, rng=rng, temperatures=temperatures, start=start, kernel=kernel)
    path, options = law.path(x, chains), {"rng": rng, "steps": steps, "compile": compile}
    ahead = log_weights(path, schedule, kernel, law.base.sample(n * chains, rng), **options).view(n, chains)
    back = log_weights(path, schedule, kernel, law.standard(x, z, chains), backwards=True, **options).view(n, chains)
    none = ahead.new_zeros(n)
    high = summarised(none, back, confidence)
    return SimulatedBracket(x, z, summarised(none, -ahead, confidence), -high.log_prob, -high.lower)


def mean_of(values: Tensor) -> Estimate:
    """Mean of rows and its standard error over them."""
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def _prior_log_z(energy: LatentEnergy, log_z: float | None) -> float:
    prior = cast(Directed, energy.energy).prior
    if log_z is not None:
        return float(log_z)
    if not isinstance(prior, Tractable):
        raise OptionError(
            f"The prior {prior!r} is not normalised. Of given rows, pass its log_z to latent_log_likelihood, estimated "
            "by bracket or ais; rows with exact draws of their posterior cannot be simulated from it."
        )
    return 0.0


def _check_counts(chains: int, confidence: float) -> None:
    if chains < 2 or not 0.0 < confidence < 1.0:
        raise OptionError(f"chains is 2 or more, and confidence between 0 and 1; got {chains} and {confidence}.")
