r"""Equilibrium matching: a landscape that gradient descent walks from noise to data.

Between noise :math:`x_0` and data :math:`x_1`, at :math:`x_\gamma = (1 - \gamma)\,x_0 + \gamma\,x_1`, the gradient of
the energy is to point away from the data, with a length that falls to nothing where they are:

.. math:: \mathbb{E} \, \big\| \nabla E(x_\gamma) - \lambda\, c(\gamma)\,(x_0 - x_1) \big\|^2.

The data are then where descent comes to rest. **The energy is not a density of the data**: nothing ties
:math:`e^{-E}` to how often a state occurs, there is no temperature in it, and log Z, likelihoods or Langevin draws of
it mean nothing. What it is for: generating by descent, cleaning points that are noisy in part, telling outliers by
their energy, and sums of two such energies, whose descent ends where both rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.layers import check_function
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError, ShapeError
from gibbsian.kernels.base import evaluate, per_chain, row_sum
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.interpolation import between, check_matching, draw_noise, gradient_error, uniform_times
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class Decay:
    r"""How the gradient's length falls from noise to data, :math:`c(\gamma)`: in two straight pieces, to 0 at the data.

    From ``start`` at the noise to 1 at the knee, and from there to 0. ``Decay(knee=0)`` is the paper's linear decay,
    ``Decay(knee)`` its truncated one, ``Decay(knee, start)`` its piecewise one.

    Parameters
    ----------
    knee
        a, from 0 to below 1.
    start
        b, positive.

    Raises
    ------
    OptionError
        If one is out of its range.
    """

    knee: float = 0.8
    start: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.knee < 1.0:
            raise OptionError(f"knee is the place where the decay to 0 begins, from 0 to below 1; got {self.knee}.")
        if not 0.0 < self.start < math.inf:
            raise OptionError(f"start is the positive value of the decay at the noise; got {self.start}.")

    def __call__(self, gamma: Tensor) -> Tensor:
        """Value at places between 0 (noise) and 1 (data)."""
        falling = (1.0 - gamma) / (1.0 - self.knee)
        if not self.knee:
            return falling
        return torch.where(gamma < self.knee, self.start + (1.0 - self.start) * gamma / self.knee, falling)


class EquilibriumMatching(Objective):
    r"""Least squares of an energy's gradient with the direction from data to noise, scaled to vanish at the data.

    `Equilibrium matching: generative modeling with implicit energy-based models (Wang & Du, 2025)
    <https://arxiv.org/abs/2510.02300>`_, with an explicit energy: any scalar one, or the
    `FieldEnergy` of a network that returns points. Draw with `descend`. See above for what the energy is, and is not.

    Parameters
    ----------
    noise
        Where descent starts: a tractable energy of the data's shape.
    decay
        :math:`c(\gamma)`.
    multiplier
        :math:`\lambda`, which sets the energy's scale, and with it the step size of `descend`.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable, or the decay none.
    OptionError
        If the multiplier is not positive.
    """

    def __init__(self, noise: Tractable, decay: Decay | None = None, multiplier: float = 4.0) -> None:
        super().__init__()
        if not 0.0 < multiplier < math.inf:
            raise OptionError(f"multiplier is the positive scale of the gradient; got {multiplier}.")
        if not isinstance(decay, (Decay, type(None))):
            raise ArgumentTypeError(f"decay says how the gradient falls to the data, as Decay(0.8); got {decay!r}.")
        self.noise = require_tractable(noise, "noise")
        self.decay = decay or Decay()
        self.multiplier = float(multiplier)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw noise for each row and a place between them, and compare gradients there.

        Raises
        ------
        DomainError, ShapeError, ArgumentTypeError, OptionError
            If noise, data and energy are not on one space of real numbers, or a label is missing.
        """
        check_matching("Equilibrium matching", energy, self.noise, batch.x)
        x = batch.x.detach()
        drawn = draw_noise(self.noise, len(x), x, rng)
        gamma = uniform_times(len(x), x, rng)
        target = per_chain(self.multiplier * self.decay(gamma), x) * (drawn - x)
        error, value = gradient_error(energy, between(drawn, x, gamma), target, context_of(energy, batch))
        # Only this report is per coordinate.
        metrics = {"matching_error": error.detach().mean() / x[0].numel(), "energy_noisy": value.mean()}
        return Loss(error.mean(), metrics)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.decay}, multiplier={self.multiplier}"


@torch.no_grad()
def descend(
    energy: EnergyFn,
    start: Tensor,
    *,
    step_size: float,
    steps: int,
    momentum: float = 0.0,
    tolerance: float = 0.0,
) -> Tensor:
    r"""Walk down an energy by gradient descent, with Nesterov's momentum if wanted.

    .. math:: x_{k+1} = x_k - \eta\, \nabla E\big(x_k + \mu\,(x_k - x_{k-1})\big)

    It is how a model of `EquilibriumMatching` is drawn from, with start from its noise, and how a noisy point is
    cleaned, with start there.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``.
    start
        Points, ``(n, *event)``.
    step_size
        :math:`\eta`, in squared units of x per nat. With the default multiplier of 4, a time of 1 from noise to data
        is about ``steps * step_size`` of 1/4, and the end needs as much again or more.
    steps
        At most.
    momentum
        :math:`\mu`, from 0 to below 1.
    tolerance
        A point stays where it is once its gradient's norm is below this.

    Returns
    -------
    Tensor
        Where the points end, ``(n, *event)``.

    Raises
    ------
    OptionError
        If an option is out of its range.
    ArgumentTypeError, ShapeError
        If the start is no floating-point tensor ``(n, *event)``, or not of the energy's shape.
    InputError
        If the energy holds a dropout or a batch normalisation in training mode.
    DivergenceError
        If a point leaves the numbers.
    """
    _check_descent(energy, start, step_size, steps, momentum, tolerance)
    x = before = start
    for _ in range(steps):
        grad = evaluate(energy, x + momentum * (x - before))[1]
        # Said this way, a gradient that is NaN is not at rest, and shows.
        moving = ~(row_sum(grad.square()) < tolerance**2)
        x, before = torch.where(per_chain(moving, x), x - step_size * grad, x), x
    gone = int((~torch.isfinite(x).flatten(1).all(1)).sum())
    if gone:
        raise DivergenceError(
            f"{gone} of {len(x)} points left the numbers in {steps} steps of descent. Use a step_size below "
            f"{step_size}, less momentum, or train longer."
        )
    return x


def _check_descent(
    energy: EnergyFn, start: Tensor, step_size: float, steps: int, momentum: float, tolerance: float
) -> None:
    if not 0.0 < step_size < math.inf or steps < 1:
        raise OptionError(f"step_size is positive and steps 1 or more; got {step_size} and {steps}.")
    if not 0.0 <= momentum < 1.0 or not 0.0 <= tolerance < math.inf:
        raise OptionError(
            f"momentum lies from 0 to below 1 and tolerance is 0 or more; got {momentum} and {tolerance}."
        )
    if not isinstance(start, Tensor) or not start.is_floating_point():
        found = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise ArgumentTypeError(f"Descent starts from a floating-point tensor (n, *event); got {found}.")
    expected = energy.event_shape if isinstance(energy, Energy) else None
    if start.ndim < 2 or (expected is not None and expected != start.shape[1:]):
        wanted = "(n, *event)" if expected is None else f"(n, {', '.join(map(str, expected))})"
        raise ShapeError(f"Descent starts from points of shape {wanted}; got {tuple(start.shape)}.")
    check_function(energy)
