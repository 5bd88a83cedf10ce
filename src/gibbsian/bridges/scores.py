r"""Scores at every noise level, from energies and from the networks of diffusion models.

What a `Score` is, `gibbsian.energies.score` says; networks of its own kind are in `gibbsian.bridges.denoisers`.

A network trained as a diffusion model tells one of three things of :math:`x_t = \alpha x_0 + \sigma_t \epsilon`, which
say the same:

==========  =========================================  ===============================================
and with :math:`\sigma = \sigma_t / \alpha` the score at :math:`x = x_t / \alpha` is :math:`-\epsilon / \sigma`.

A `Score` is no energy: a network's output need not be the gradient of anything, so that there is no density to score,
no Metropolis step and no product with other energies. `EnergyScore` comes from an energy, which has all that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.recovery import check_noise_conditional
from gibbsian.energies.schedules import Schedule
from gibbsian.energies.score import Score
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import evaluate, per_chain

Prediction: TypeAlias = Literal["eps", "v", "x0"]
"""What a network predicts."""


class EnergyScore(Score):
    r"""The score of a noise-conditional energy, :math:`-\nabla E(x, \sigma)`: a field without curl.

    Parameters
    ----------
    energy
        With the context ``sigma``; other context stays open.

    Raises
    ------
    OptionError
        If the energy takes no ``sigma``.
    DomainError
        If it lives on discrete states.
    """

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        check_noise_conditional(energy, torch.zeros(()))
        self.energy = energy
        self.event_shape = energy.event_shape
        self.context = tuple(name for name in energy.context if name != "sigma")

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Minus the gradient; differentiable in x where x asks for gradients."""
        return -evaluate(lambda y: self.energy(y, sigma=sigma, **context), x)[1]


class PredictedScore(Score):
    """The score that a diffusion model's network tells; see `score_of` for the arguments."""

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: Schedule,
        prediction: Prediction,
        context: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not callable(network):
            raise ArgumentTypeError(f"A network is called as network(x_t, t); got {network!r}.")
        if not isinstance(schedule, Schedule):
            raise ArgumentTypeError(
                "A network's times mean nothing without the schedule that it was trained with: VarianceExploding, "
                f"VariancePreserving, Cosine or Tabulated; got {schedule!r}."
            )
        check_prediction(prediction)
        self.network = network
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.context = tuple(context)

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Ask the network at the schedule's point and time, and read its answer as a score.

        Raises
        ------
        ShapeError
            If the answer's shape is not that of the points.
        ArgumentTypeError
            If it is no tensor, and has none as ``sample``.
        """
        x_t, t = self.schedule.preserve(x, sigma)
        out = self.network(x_t, t, **context)
        out = out if isinstance(out, Tensor) else getattr(out, "sample", out)
        if not isinstance(out, Tensor):
            raise ArgumentTypeError(
                f"A network returns a tensor, or an object with one as its sample; got {type(out).__name__}."
            )
        if out.shape != x.shape:
            raise ShapeError(
                f"A network returns what it predicts in the shape of its points, {tuple(x.shape)}; got "
                f"{tuple(out.shape)}. Where it tells a variance, too, drop that part."
            )
        alpha = self.schedule.alpha(t)
        eps = convert(out, x_t, alpha, alpha * sigma, self.prediction, "eps")
        return -eps / per_chain(sigma, x)

    def extra_repr(self) -> str:
        """Schedule and prediction."""
        return f"{self.schedule}, {self.prediction!r}"


def score_of(
    source: Energy | Score | Callable[..., Any],
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    context: Sequence[str] = (),
) -> Score:
    r"""Adopt an energy, or a diffusion model's network, as a score at every noise level.

    Parameters
    ----------
    source
        A noise-conditional energy, a score, or a network called as ``network(x_t, t, **context)``, where t is ``(n,)``
        in the schedule's times. It returns a tensor like :math:`x_t`, or an object that has one as ``sample``, as the
        networks of the diffusers library do.
    schedule
        What the network was trained with; for one of diffusers ``Tabulated.of(scheduler.alphas_cumprod)``.
    prediction
        ``"eps"``, ``"v"`` or ``"x0"``.
    context
        Names of what else the network takes, passed on by name, such as ``("class_labels",)``.

    Raises
    ------
    ArgumentTypeError
        If a network comes without schedule, or the source cannot be called.
    OptionError
        If the prediction is unknown, or an energy takes no ``sigma``; if an energy comes with a schedule.
    """
    if isinstance(source, (Energy, Score)):
        if schedule is not None or prediction is not None or context:
            raise OptionError(
                f"{type(source).__name__} tells its own score, in noise levels and with its own context; schedule, "
                "prediction and context are for networks."
            )
        return EnergyScore(source) if isinstance(source, Energy) else source
    return PredictedScore(source, cast(Schedule, schedule), cast(Prediction, prediction), context)


def convert(value: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, source: Prediction, target: Prediction) -> Tensor:
    r"""Turn one prediction into another, exactly.

    `v` is that of `Progressive distillation for fast sampling of diffusion models (Salimans & Ho, 2022)
    <https://arxiv.org/abs/2202.00512>`_. The formulas hold for any :math:`\alpha` and :math:`\sigma`, whether or not
    their squares add up to 1.

    Parameters
    ----------
    value
        What was predicted, ``(n, *event)``.
    x_t
        The noisy point :math:`\alpha x_0 + \sigma \epsilon`, ``(n, *event)``.
    alpha, sigma
        Of each row, ``(n,)``, positive.
    source, target
        ``"eps"``, ``"v"`` or ``"x0"``.

    Raises
    ------
    OptionError
        If a name is another.
    """
    check_prediction(source)
    check_prediction(target)
    a, s = per_chain(alpha, x_t), per_chain(sigma, x_t)
    if source == target:
        return value
    if source == "x0":
        x0, eps = value, (x_t - a * value) / s
    elif source == "eps":
        x0, eps = (x_t - s * value) / a, value
    else:
        size = a.square() + s.square()
        x0, eps = (a * x_t - s * value) / size, (a * value + s * x_t) / size
    return {"x0": x0, "eps": eps}[target] if target != "v" else a * eps - s * x0


def check_prediction(prediction: object) -> None:
    """Refuse what is not the name of a prediction.

    Raises
    ------
    OptionError
        With the names there are.
    """
    if prediction not in get_args(Prediction):
        raise OptionError(
            f"A network predicts the noise ('eps'), the clean point ('x0') or 'v'; got {prediction!r}. Its training "
            "says which: diffusers calls them epsilon, sample and v_prediction."
        )
