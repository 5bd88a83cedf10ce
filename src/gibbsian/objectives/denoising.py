r"""Denoising score matching: fit the score of the data's density after Gaussian smoothing.

With :math:`\tilde x = x + \sigma \epsilon`, the score of the smoothed density is the mean of
:math:`-\epsilon / \sigma` given :math:`\tilde x`. As the model's score is :math:`-\nabla E`, least squares asks that
:math:`\sigma \nabla E(\tilde x)` predict the noise:

.. math:: \tfrac{1}{2} \, \mathbb{E} \left\| \epsilon - \sigma \nabla_x E(x + \sigma \epsilon) \right\|^2,

summed over the coordinates of a point. No chain is run and Z never enters; what is learned is the data's density
convolved with :math:`N(0, \sigma^2 I)`, up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.score import Score
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.kernels.base import per_chain, row_sum
from gibbsian.objectives.base import Batch, Loss, Objective, context_of, energy_and_gradient
from gibbsian.objectives.checks import check_floating
from gibbsian.typing import Context


class NoiseLevels(Protocol):
    """A law of noise levels over a range of positive numbers."""

    @property
    def low(self) -> float:
        """The smallest level."""
        ...

    @property
    def high(self) -> float:
        """The largest level."""
        ...

    def draw(self, n: int, rng: Generator, like: Tensor) -> Tensor:
        """Draw ``n`` levels, ``(n,)``, of the dtype and device of ``like``."""
        ...


@dataclass(frozen=True)
class LogUniform:
    """Noise levels whose logarithm is uniform: every scale equally often.

    Parameters
    ----------
    low, high
        The range, in units of x: below the smallest detail of the data, and at least its overall spread.

    Raises
    ------
    OptionError
        Unless ``0 < low < high``.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def draw(self, n: int, rng: Generator, like: Tensor) -> Tensor:
        """Draw ``n`` levels."""
        u = torch.rand(n, generator=rng, dtype=like.dtype, device=like.device)
        return (math.log(self.low) + math.log(self.high / self.low) * u).exp().clamp(self.low, self.high)


@dataclass(frozen=True)
class LogNormal:
    """Noise levels whose logarithm is normal, cut to a range: effort where learning is hardest.

    `Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
    <https://arxiv.org/abs/2206.00364>`_; the defaults are theirs, for data with a standard deviation of 0.5.

    Parameters
    ----------
    mean, std
        Of the logarithm of the level.
    low, high
        The range, in units of x.

    Raises
    ------
    OptionError
        Unless ``0 < low < high`` and ``std`` is positive.
    """

    mean: float = -1.2
    std: float = 1.2
    low: float = 0.002
    high: float = 80.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if not 0.0 < self.std < math.inf:
            raise OptionError(f"std is the positive standard deviation of log sigma; got {self.std}.")

    def draw(self, n: int, rng: Generator, like: Tensor) -> Tensor:
        """Draw ``n`` levels by inverting the distribution function."""
        a, b = (math.erf((math.log(s) - self.mean) / (self.std * math.sqrt(2.0))) for s in (self.low, self.high))
        u = torch.rand(n, generator=rng, dtype=like.dtype, device=like.device)
        z = math.sqrt(2.0) * torch.erfinv(a + (b - a) * u)
        # erfinv is infinite where rounding reaches 1; the clamp brings such a draw to the end of the range.
        return (self.mean + self.std * z).exp().clamp(self.low, self.high)


@dataclass(frozen=True)
class EDMWeight:
    r"""The weighting of Karras et al. (2022): every level's denoiser starts with the same loss.

    In the denoiser's units it is :math:`(\sigma^2 + \sigma_d^2) / (\sigma \sigma_d)^2`. The denoiser's error is
    :math:`\sigma` times the noise's, so here, in the noise's units, it is :math:`(\sigma^2 + \sigma_d^2) / \sigma_d^2`.

    Parameters
    ----------
    sigma_data
        Standard deviation of the data, per coordinate.

    Raises
    ------
    OptionError
        If it is not positive.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_sigma("sigma_data", self.sigma_data)

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weight of each level: ``(n,) -> (n,)``."""
        return 1.0 + (sigma / self.sigma_data).square()


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching at one noise level.

    `A connection between score matching and denoising autoencoders (Vincent, 2011)
    <https://doi.org/10.1162/NECO_a_00142>`_, scaled by :math:`\sigma^2`: the loss is half the squared error of the
    predicted noise, summed over a point's coordinates, averaged over rows. It lies between 0 and, for a flat energy,
    half the dimension.

    Parameters
    ----------
    sigma
        Standard deviation of the noise, in units of x. The fit is to the data smoothed by as much: small keeps detail,
        large reaches between modes.

    Raises
    ------
    OptionError
        If ``sigma`` is not a positive number.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = _check_sigma("sigma", sigma)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Noise the batch, and compare noise with gradient.

        Raises
        ------
        OptionError
            If the energy asks for a noise level, or for a label that the batch lacks.
        DomainError
            If the energy lives on discrete states.
        """
        _check_continuous(energy, batch.x)
        if "sigma" in energy.context:
            raise OptionError(
                f"{energy!r} asks for a noise level, sigma. Fit it with MultiLevelDenoising(LogUniform(low, high)), "
                f"or fix the level: energy.given(sigma={self.sigma})."
            )
        sigma = batch.x.new_full((len(batch),), self.sigma)
        error, value = _noise_error(energy, batch.x, sigma, context_of(energy, batch), rng)
        return Loss(0.5 * error.mean(), _metrics(error, batch.x, value))

    def extra_repr(self) -> str:
        """The noise level."""
        return f"sigma={self.sigma}"


class MultiLevelDenoising(Objective):
    r"""Denoising score matching of a noise-conditional energy :math:`E(x, \sigma)`, a level drawn for each row.

    .. math:: \tfrac{1}{2} \, \mathbb{E}_{\sigma} \, w(\sigma) \, \mathbb{E}
              \left\| \epsilon - \sigma \nabla_x E(x + \sigma \epsilon, \sigma) \right\|^2

    With :math:`w = 1` the squared error of the score is weighted by :math:`\lambda(\sigma) = \sigma^2`, the choice of
    `Generative modeling by estimating gradients of the data distribution (Song & Ermon, 2019)
    <https://arxiv.org/abs/1907.05600>`_.

    With ``level_weight`` :math:`\lambda > 0` the change of the energy from level to level is fitted too,

    .. math:: \tfrac{\lambda}{2 d} \, \mathbb{E}_{\sigma} \, w(\sigma) \, \mathbb{E}
              \left( d - |\epsilon|^2 - \sigma \partial_\sigma E(x + \sigma \epsilon, \sigma) \right)^2,

    whose optimum is the derivative of :math:`-\log p_\sigma`, in d dimensions. Scores alone are blind to the masses of
    modes that lie far apart, and to the constant of each level; this ties them to the highest level, where there is one
    mode. `Learning normalized image densities via dual score matching (Guth et al., 2025)
    <https://arxiv.org/abs/2506.05310>`_.

    A `Score` stands in the place of :math:`-\nabla_x E` where there is no energy; it has no change from level to level.
    With `EDMWeight` it is the training of Karras et al. (2022).

    Parameters
    ----------
    levels
        The law of the noise levels: `LogUniform` or `LogNormal`.
    weight
        :math:`w`, from levels ``(n,)`` to weights ``(n,)``, for example `EDMWeight`; 1 when ``None``.
    level_weight
        :math:`\lambda` above.

    Raises
    ------
    OptionError
        If the levels are not all positive, or the level weight is negative.
    """

    def __init__(
        self, levels: NoiseLevels, weight: Callable[[Tensor], Tensor] | None = None, level_weight: float = 0.0
    ) -> None:
        super().__init__()
        if not 0.0 <= level_weight < math.inf:
            raise OptionError(f"level_weight is 0 or a positive number; got {level_weight}.")
        self.level_weight = float(level_weight)
        if not callable(getattr(levels, "draw", None)):
            raise ArgumentTypeError(f"levels is a law of noise levels, such as LogUniform(0.01, 10.0); got {levels!r}.")
        _check_range(levels.low, levels.high)
        self.levels = levels
        self.weight = weight
        self.fits_scores = True

    def forward(self, energy: Energy | Score, batch: Batch, rng: Generator) -> Loss:
        """Draw a level for each row, noise it, and compare noise with gradient.

        Raises
        ------
        OptionError
            If the energy asks for no noise level, or for a label that the batch lacks; if there is a level weight and
            no energy.
        DomainError
            If the energy lives on discrete states.
        """
        if isinstance(energy, Score):
            return self._of_score(energy, batch, rng)
        _check_continuous(energy, batch.x)
        if "sigma" not in energy.context:
            takes = ", ".join(energy.context) or "none"
            raise OptionError(
                f"Denoising at many levels needs an energy with the context sigma, called as energy(x, sigma=sigma); "
                f"this one's context is: {takes}. Adopt a function of both by "
                'Energy.of(fn, context=("sigma",)), or fit one level with DenoisingScoreMatching(sigma).'
            )
        sigma = self.levels.draw(len(batch), rng, batch.x)
        context = context_of(energy, batch, besides=("sigma",)) | {"sigma": sigma}
        metrics = {}
        if self.level_weight:
            error, change, value = _dual_error(energy, batch.x, sigma, context, rng)
            metrics["level_error"] = change.detach().mean()
            total = error + self.level_weight / batch.x[0].numel() * change
        else:
            error, value = _noise_error(energy, batch.x, sigma, context, rng)
            total = error
        return Loss(self._weighted(total, sigma), _metrics(error, batch.x, value) | metrics)

    def _of_score(self, score: Score, batch: Batch, rng: Generator) -> Loss:
        check_floating("Denoising score matching", batch.x)
        if self.level_weight:
            raise OptionError(
                f"level_weight={self.level_weight} fits the change of an energy from level to level, and a score has "
                "no energy; leave it out, or fit a NoiseConditionalEnergy."
            )
        x = batch.x.detach()
        sigma = self.levels.draw(len(batch), rng, x)
        eps = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        error = score_noise_error(score, x, eps, sigma, context_of(score, batch))
        return Loss(self._weighted(error, sigma), _metrics(error, x))

    def _weighted(self, error: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * (error if self.weight is None else self.weight(sigma) * error).mean()

    def extra_repr(self) -> str:
        """The levels and their weight."""
        return f"{self.levels}, weight={self.weight}"


def _noise_error(energy: Energy, x: Tensor, sigma: Tensor, context: Context, rng: Generator) -> tuple[Tensor, Tensor]:
    """Noise the rows; return the squared error of the predicted noise and the noised rows' energies, ``(n,)`` each."""
    eps = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
    error, value = noise_error(energy, x.detach(), eps, sigma, context)
    return error, value.detach()


def _dual_error(
    energy: Energy, x: Tensor, sigma: Tensor, context: Context, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise the rows; return squared errors of the predicted noise and of the change with the level, and energies."""
    eps = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        y = (x.detach() + per_chain(sigma, x) * eps).requires_grad_(True)
        s = sigma.detach().clone().requires_grad_(True)
        value = energy(y, **{**context, "sigma": s})
        grad, slope = torch.autograd.grad(value.sum(), (y, s), create_graph=training)
    error = row_sum((eps - per_chain(sigma, x) * grad).square())
    change = (x[0].numel() - row_sum(eps.square()) - sigma * slope).square()
    return error, change, value.detach()


def noise_error(energy: Energy, x: Tensor, eps: Tensor, sigma: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    r"""Squared error of the noise that an energy predicts.

    Parameters
    ----------
    energy
        Called as ``energy(x, **context)``.
    x
        Clean rows, ``(n, *event)``.
    eps
        Standard normals like ``x``.
    sigma
        Noise level of each row, ``(n,)``.
    context
        What each row is conditioned on.

    Returns
    -------
    tuple
        :math:`\|\epsilon - \sigma \nabla E(x + \sigma\epsilon)\|^2`, summed over the event's axes, and the energies of
        the noised rows; ``(n,)`` each, differentiable in the energy's parameters.
    """
    scale = per_chain(sigma, x)
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        value, grad = energy_and_gradient(energy, (x + scale * eps).requires_grad_(True), context, training)
    return row_sum((eps - scale * grad).square()), value


def score_noise_error(score: Score, x: Tensor, eps: Tensor, sigma: Tensor, context: Context) -> Tensor:
    r"""Squared error of the noise that a score predicts, :math:`\|\epsilon + \sigma s(x + \sigma\epsilon, \sigma)\|^2`.

    As `noise_error`, with a score, which is told the level by position: ``(n,)``.
    """
    scale = per_chain(sigma, x)
    return row_sum((eps + scale * score(x + scale * eps, sigma, **context)).square())


def _metrics(error: Tensor, x: Tensor, value: Tensor | None = None) -> dict[str, Tensor]:
    # Only this report is per coordinate, so that 1 is a flat energy's in any dimension; the loss is a sum.
    told = {"denoising_error": error.detach().mean() / x[0].numel()}
    return told if value is None else told | {"energy_noisy": value.mean()}


def _check_sigma(name: str, value: float) -> float:
    if not 0.0 < value < math.inf:
        raise OptionError(f"{name} is a positive standard deviation, in units of x; got {value}.")
    return float(value)


def _check_range(low: float, high: float) -> None:
    if not 0.0 < low < high < math.inf:
        raise OptionError(f"Noise levels lie in a range 0 < low < high; got low={low}, high={high}.")


def _check_continuous(energy: Energy, x: Tensor) -> None:
    if energy.support.is_discrete:
        raise DomainError(
            f"Denoising score matching adds Gaussian noise and follows gradients, but the energy lives on "
            f"{energy.support}, where there are none. Fit discrete states with PersistentContrastiveDivergence."
        )
    check_floating("Denoising score matching", x)
