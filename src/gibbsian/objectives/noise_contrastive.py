r"""Noise contrastive estimation: learn a density by telling data from noise whose density is known.

With :math:`\nu` noise draws from q per row of data, the posterior log-odds that x is data are
:math:`h(x) = -E(x) - c - \log q(x) - \log \nu`, and logistic regression on them fits E together with c, an estimate of
log Z. No chain is run; the estimate is as efficient as maximum likelihood when :math:`\nu` is large and q covers the
data. Ranking asks instead which one of :math:`K + 1` points is the datum; the constant drops out of the question, and
with it what is hard about one constant for every condition of a conditional energy.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from gibbsian.energies.base import Energy, repeated
from gibbsian.energies.domains import same_support
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.checks import check_count, check_device, check_draws, check_floating

FAR = 50.0
"""Nats by which data may lie above the highest of the noise draws before the noise counts as not covering them."""

WIDER = (
    "Take noise that is wider than the data, such as a Gaussian of their mean and 1.5 times their standard deviation."
)
"""What to do then."""


class NoiseContrastiveEstimation(Objective):
    r"""Binary noise contrastive estimation, with a log-normaliser that is learned or given.

    .. math:: \mathbb{E}_{data} \log(1 + e^{-h(x)}) + \nu \, \mathbb{E}_q \log(1 + e^{h(x)})

    `Noise-contrastive estimation of unnormalized statistical models (Gutmann & Hyvärinen, 2012)
    <https://jmlr.org/papers/v13/gutmann12a.html>`_. A conditional energy has the one constant c for all
    conditions, so it must be able to normalise itself in each, as `MLP` with classes is; others suit `RankingNCE`.

    Parameters
    ----------
    noise
        A tractable energy that covers the data: wherever there are data, it must have density.
    ratio
        Noise draws per row of data, :math:`\nu`.
    learn_log_z
        Whether c is learned; otherwise it stays ``log_z``, and the energy must become one of that log Z.
    log_z
        Where c starts, in nats.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable.
    OptionError
        If the ratio is below 1, or log Z is not finite.
    """

    def __init__(self, noise: Tractable, ratio: int = 2, learn_log_z: bool = True, log_z: float = 0.0) -> None:
        super().__init__()
        self.noise = require_tractable(noise, "noise")
        self.ratio = check_count("ratio", ratio, "the noise draws per row of data")
        self.log_z = learned_constant(log_z, learn_log_z)
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw noise, and classify.

        Raises
        ------
        OptionError
            If the energy asks for a label that the batch lacks, or the noise does not cover the data.
        ShapeError, DomainError, ArgumentTypeError
            If noise, data and energy are not on one space.
        """
        n = len(batch)
        values, costs = evaluated(self, energy, batch, self.ratio, rng)
        odds = costs - values - self.log_z - math.log(self.ratio)
        of_data, of_noise = odds[:n], odds[n:]
        loss = softplus(-of_data).mean() + self.ratio * softplus(of_noise).mean()
        metrics = {"accuracy": accuracy(of_data, of_noise), "log_z": self.log_z.detach().clone()}
        return Loss(loss, energies(values, n) | metrics)

    def extra_repr(self) -> str:
        """Noise draws per row."""
        return f"ratio={self.ratio}"


class RankingNCE(Objective):
    r"""Ranking noise contrastive estimation: find the datum among its K noise draws.

    With the log-ratios :math:`s(x) = -E(x) - \log q(x)`, up to log Z, the loss is the cross-entropy of a softmax,

    .. math:: -\mathbb{E} \log \frac{e^{s(x_0)}}{\sum_{k=0}^K e^{s(x_k)}}, \qquad x_0 \sim data, \; x_{1..K} \sim q.

    Any constant added to the energy, another one for every condition of :math:`E(x \mid y)` too, leaves it unchanged:
    no log Z is needed and none is learned. `Exploring the limits of language modeling (Jozefowicz et al., 2016)
    <https://arxiv.org/abs/1602.02410>`_; consistent for conditional energies, where one constant is not: `Noise
    contrastive estimation and negative sampling for conditional models: consistency and statistical efficiency (Ma &
    Collins, 2018) <https://arxiv.org/abs/1809.01812>`_. InfoNCE is the same loss with the other rows of a batch for
    noise, whose unknown density is left out: `Representation learning with contrastive predictive coding (van den
    Oord et al., 2018) <https://arxiv.org/abs/1807.03748>`_; that fits a ratio of densities, this the density.

    Parameters
    ----------
    noise
        A tractable energy that covers the data.
    draws
        Noise draws per row of data, K.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable.
    OptionError
        If ``draws`` is below 1.
    """

    def __init__(self, noise: Tractable, draws: int = 8) -> None:
        super().__init__()
        self.noise = require_tractable(noise, "noise")
        self.draws = check_count("draws", draws, "the noise draws per row of data")
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw noise, and rank.

        Raises
        ------
        OptionError
            If the energy asks for a label that the batch lacks, or the noise does not cover the data.
        ShapeError, DomainError, ArgumentTypeError
            If noise, data and energy are not on one space.
        """
        n = len(batch)
        values, costs = evaluated(self, energy, batch, self.draws, rng)
        scores = (costs - values).reshape(self.draws + 1, n)
        loss = (torch.logsumexp(scores, 0) - scores[0]).mean()
        first = (scores[0] > scores[1:].amax(0)).float().mean()
        return Loss(loss, energies(values, n) | {"accuracy": first})

    def extra_repr(self) -> str:
        """Noise draws per row."""
        return f"draws={self.draws}"


def evaluated(
    objective: NoiseContrastiveEstimation | RankingNCE, energy: Energy, batch: Batch, count: int, rng: Generator
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` rows of noise per row of data; return both energies of the data, then of the noise.

    The noise's rows follow the data's in ``count`` blocks of n, each with the context of the data's rows.

    Returns
    -------
    tuple
        The model's energies and the noise's, ``((count + 1) n,)`` each; no gradient flows into the noise.
    """
    noise, x = objective.noise, batch.x
    context = context_of(energy, batch)
    check_space(energy, noise, x)
    with torch.no_grad():
        drawn = noise.sample(count * len(batch), rng).to(x.dtype)
        points = torch.cat((x, drawn))
        costs = noise(points)
        # Looking at the result waits for the device, except on a CPU: there every batch is looked at.
        if not objective.seen or x.device.type == "cpu":
            check_cover(noise, *costs.split((len(batch), len(drawn))))
            objective.seen = True
    return energy(points, **repeated(context, count + 1)), costs


def energies(values: Tensor, n: int) -> dict[str, Tensor]:
    """Mean energies of n rows of data and of the noise that follows them, as metrics."""
    detached = values.detach()
    return {"energy_data": detached[:n].mean(), "energy_noise": detached[n:].mean()}


def accuracy(of_data: Tensor, of_noise: Tensor) -> Tensor:
    """The share of right answers, from the log-odds of being data; half each for data and noise."""
    return 0.5 * ((of_data > 0).float().mean() + (of_noise < 0).float().mean())


def learned_constant(value: float, learn: bool) -> torch.nn.Parameter:
    """A 0-d parameter that holds log Z.

    Raises
    ------
    OptionError
        If the value is not finite.
    """
    if not abs(value) < torch.inf:
        raise OptionError(f"log_z is a finite number of nats; got {value}.")
    return torch.nn.Parameter(torch.tensor(float(value)), requires_grad=learn)


def check_space(energy: Energy, noise: Tractable, x: Tensor) -> None:
    """Check that noise, data and energy are on one space and device.

    Raises
    ------
    ShapeError
        If there are no rows, or the noise draws points of another shape than the data's.
    DomainError
        If one of noise and energy is discrete and the other is not.
    ArgumentTypeError
        If the data are integers.
    OptionError
        If noise and data are on two devices.
    """
    check_floating("Contrasting data with noise", x)
    if len(x) == 0:
        raise ShapeError(f"A batch has one row or more; this one has shape {tuple(x.shape)}.")
    check_draws("noise", noise, x)
    discrete = energy.support.is_discrete or noise.support.is_discrete
    if discrete and not same_support(energy.support, noise.support):
        raise DomainError(
            f"The noise draws from {noise.support} and the energy lives on {energy.support}; their densities can be "
            "compared on one domain only: Bernoulli or Categorical noise for discrete states, Gaussian or Uniform for "
            "real ones."
        )
    check_device("noise", noise, x)


def check_cover(noise: Tractable, of_data: Tensor, of_draws: Tensor, remedy: str = WIDER) -> None:
    """Check that the noise has density where the data are, from its energies of the data and of its own draws.

    Raises
    ------
    OptionError
        If its energy is not finite at a row, or most rows lie far above the highest of the draws.
    """
    check_finite_cover(noise, of_data, remedy)
    excess = float(of_data.median() - of_draws.max())
    if excess > FAR:
        raise OptionError(
            f"The noise {noise!r} does not cover the data: half of the {len(of_data)} rows lie {excess:.4g} nats or "
            f"more above the highest of {len(of_draws)} draws (limit {FAR:g}), where it never comes. {remedy}"
        )


def check_finite_cover(noise: Tractable, of_data: Tensor, remedy: str = WIDER) -> None:
    """Check that the noise's energies of the data are numbers.

    Raises
    ------
    OptionError
        If one is not.
    """
    bad = int((~torch.isfinite(of_data)).sum())
    if bad:
        raise OptionError(
            f"The noise {noise!r} does not cover the data: its energy is not finite at {bad} of {len(of_data)} rows, "
            f"from which nothing could be learned. {remedy}"
        )
