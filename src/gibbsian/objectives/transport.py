r"""Energy matching: an energy whose gradient carries noise to data, and whose density is the data's.

Far from the data a potential :math:`V = \varepsilon E` should move points along the straight lines of optimal
transport from noise :math:`x_0` to data :math:`x_1`; that is least squares, without chains:

.. math:: L_{OT} = \mathbb{E} \, \| \nabla V(x_t) + x_1 - x_0 \|^2, \qquad x_t = (1 - t)\,x_0 + t\,x_1,

where each batch's noise is paired with its data so that the sum of squared distances is smallest. A potential that does
not depend on time can only learn the mean velocity at each point, and near the data, where lines end, its gradient says
little about the density. There contrastive divergence sharpens it, with chains at temperature :math:`\varepsilon` that
start close to their goal:

.. math:: L = L_{OT} + \lambda \left( \overline{E(x^+)} - \overline{E(x^-)} \right).

The energies here are in nats, as everywhere: :math:`e^{-E}`, which is :math:`e^{-V / \varepsilon}`, is the density
near the data. The potential that moves noise is :math:`\varepsilon E`.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import DomainError, OptionError
from gibbsian.kernels.transport import TransportLangevin, check_onset, heat
from gibbsian.objectives.base import Batch, Counting, Loss, Objective, context_of
from gibbsian.objectives.contrast import chain_metrics, contrast
from gibbsian.objectives.interpolation import between, check_matching, draw_noise, gradient_error, uniform_times
from gibbsian.samples import Samples
from gibbsian.sampling import sample
from gibbsian.typing import Context


class TransportMatching(Objective):
    r"""Flow matching of a gradient field that does not depend on time, with noise and data paired by optimal transport.

    .. math:: \mathbb{E} \, w(t) \, \| \varepsilon \nabla E(x_t) + x_1 - x_0 \|^2

    `Energy matching: unifying flow matching and energy-based models for generative modeling (Balcerak et al., 2025)
    <https://arxiv.org/abs/2504.10612>`_, its warm-up; the pairing is that of `Improving and generalizing flow-based
    generative models with minibatch optimal transport (Tong et al., 2024) <https://arxiv.org/abs/2302.00482>`_. The
    result carries noise to the neighbourhood of the data (`TransportLangevin` with an onset of 1, for a time of 1);
    it is not yet a density of them.

    A draw of noise goes with the context of a row, and is paired only among rows of equal context, so that each class
    has noise of the whole law. The pairing is found on the host, in a time that grows with the cube of the batch: about
    ten milliseconds for 256 rows, a tenth of a second for 512.

    Parameters
    ----------
    noise
        Where points start: a tractable energy of the data's shape.
    temperature
        :math:`\varepsilon`, in squared units of x per unit of time and nat; the factor between the potential and E.
    onset
        :math:`\tau`, from 0 to 1: the weight w is 1 up to it, and falls from there to 0 at the data.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable.
    OptionError
        If an option is out of its range.
    """

    def __init__(self, noise: Tractable, temperature: float = 1.0, onset: float = 1.0) -> None:
        super().__init__()
        _check_temperature(temperature)
        check_onset(onset)
        self.noise = require_tractable(noise, "noise")
        self.temperature = float(temperature)
        self.onset = float(onset)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Pair noise with the batch, and compare gradient with velocity between them.

        Raises
        ------
        DomainError, ShapeError, ArgumentTypeError, OptionError
            If noise, data and energy are not on one space of real numbers, or a label is missing.
        """
        check_matching("Transport matching", energy, self.noise, batch.x)
        value, metrics = transport_error(energy, batch, self.noise, self.temperature, self.onset, rng)
        return Loss(value, metrics)

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature}, onset={self.onset}"


class EnergyMatching(Counting):
    r"""Transport matching first, then transport matching and contrastive divergence together.

    `Energy matching: unifying flow matching and energy-based models for generative modeling (Balcerak et al., 2025)
    <https://arxiv.org/abs/2504.10612>`_. After ``warmup`` calls in training mode the loss is

    .. math:: L_{OT} + \lambda \left( \overline{E(x^+)} - \overline{E(x^-)} \right),

    whose chains are those of `TransportLangevin`: half start from data with their clock at 1, half from noise at 0.
    Calls are counted, and the count is part of the ``state_dict``. With ``warmup=0`` it is the second phase alone, for
    a schedule of one's own after `TransportMatching`.

    :math:`e^{-E}` is then the data's density near the data, where the chains go; between noise and data the transport
    term shapes it too. Sample as it was trained, ``sample(energy, objective.kernel, noise.sample(n, rng), steps=...)``
    with steps for a time of 2 or more, or with any kernel from there.

    Parameters
    ----------
    noise
        Where points start: a tractable energy of the data's shape.
    temperature
        :math:`\varepsilon`, in squared units of x per unit of time and nat. Near the data a potential of slope 1 has
        details of that length: about the data's smallest variance.
    warmup
        Steps of transport alone, 0 or more.
    onset
        :math:`\tau`: from that time on chains feel noise, and, after the warm-up, the weight of transport falls.
    contrast_weight
        :math:`\lambda`, in squared units of x per nat.
    steps
        Of each chain; times ``step_size`` it should be a time above 1, so that chains from noise arrive.
    step_size
        Of the chains, a time.
    compile
        Compile the chains' steps.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable.
    OptionError
        If an option is out of its range.
    """

    def __init__(
        self,
        noise: Tractable,
        temperature: float = 0.1,
        warmup: int = 1000,
        onset: float = 0.8,
        contrast_weight: float = 0.5,
        steps: int = 150,
        step_size: float = 0.01,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        for name, count, least in (("warmup", warmup, 0), ("steps", steps, 1)):
            if not isinstance(count, int) or count < least:
                raise OptionError(f"{name} is a whole number, {least} or more; got {count}.")
        if not 0.0 < contrast_weight < math.inf:
            raise OptionError(
                f"contrast_weight is positive; got {contrast_weight}. Without chains use TransportMatching."
            )
        self.noise = require_tractable(noise, "noise")
        self.temperature = float(temperature)
        self.warmup = warmup
        self.onset = float(onset)
        self.contrast_weight = float(contrast_weight)
        self.steps = steps
        self.step_size = float(step_size)
        self.kernel = TransportLangevin(self.step_size, self.temperature, self.onset)
        self.compile_steps = compile

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Match the transport; after the warm-up run chains too, and contrast them with the batch.

        Raises
        ------
        DomainError, ShapeError, ArgumentTypeError, OptionError
            If noise, data and energy are not on one space of real numbers, or a label is missing.
        """
        check_matching("Energy matching", energy, self.noise, batch.x)
        warming = self.next_call() < self.warmup
        onset = 1.0 if warming else self.onset
        value, metrics = transport_error(energy, batch, self.noise, self.temperature, onset, rng)
        if not warming:
            context = context_of(energy, batch)
            start, run = self._chains(energy.given(**context) if context else energy, batch.x.detach(), rng)
            gap, means = contrast(energy, batch.x, run.x, context, context)
            value = value + self.contrast_weight * gap
            metrics = metrics | means | chain_metrics(start, run.x, run.acceptance, run.nonfinite)
        return Loss(value, metrics)

    def _chains(self, energy: Energy, x: Tensor, rng: Generator) -> tuple[Tensor, Samples]:
        """Run a chain for each row: the first half from the data, the others from noise."""
        from_data = len(x) // 2
        start = torch.cat((x[:from_data], draw_noise(self.noise, len(x) - from_data, x, rng)))
        times = (torch.arange(len(x), device=x.device) < from_data).to(x.dtype)
        with dropout_paused(energy):
            state = self.kernel.init_at(energy, start, times)
            run = sample(energy, self.kernel, state, steps=self.steps, rng=rng, compile=self.compile_steps)
        return start, run

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.kernel}, warmup={self.warmup}, steps={self.steps}, contrast_weight={self.contrast_weight}"


def transport_error(
    energy: Energy, batch: Batch, noise: Tractable, temperature: float, onset: float, rng: Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared distance of the potential's velocity from that of the paired lines, and its metrics.

    Parameters
    ----------
    energy, batch, noise, temperature, rng
        As of `TransportMatching`.
    onset
        From that time on the weight of a point falls, to 0 at time 1.

    Returns
    -------
    tuple
        The weighted mean over rows, 0-d, and the metric ``transport_error``, the same per coordinate.
    """
    x, context = batch.x.detach(), context_of(energy, batch)
    drawn = draw_noise(noise, len(x), x, rng)
    drawn = drawn[pairing(x, drawn, context)]
    t = uniform_times(len(x), x, rng)
    error, _ = gradient_error(energy, between(drawn, x, t), drawn - x, context, temperature)
    value = ((1.0 - heat(t, onset)) * error).mean()
    return value, {"transport_error": value.detach() / x[0].numel()}


def pairing(data: Tensor, noise: Tensor, context: Context | None = None) -> Tensor:
    """Assign to each row of data one of noise, all different, so that the sum of squared distances is smallest.

    Parameters
    ----------
    data, noise
        ``(n, *event)`` each.
    context
        Of the rows of both; only rows of equal context are paired.

    Returns
    -------
    Tensor
        Rows of noise, ``(n,)``, one for each row of data.

    Raises
    ------
    DomainError
        If a number is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    # Squares of either side alone are the same in every pairing, as are means, without which the search is quicker.
    x, y = (rows.detach().cpu().flatten(1).double() for rows in (data, noise))
    cost = -(x - x.mean(0)) @ (y - y.mean(0)).T
    if not bool(torch.isfinite(cost).all()):
        raise DomainError("Data or noise hold NaN or infinite values and cannot be paired; drop or fill such rows.")
    for value in (context or {}).values():
        rows = value.detach().cpu().reshape(len(value), -1)
        cost[(rows.unsqueeze(0) != rows.unsqueeze(1)).any(2)] = math.inf
    return torch.as_tensor(linear_sum_assignment(cost.numpy())[1], device=data.device)


def _check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise OptionError(f"temperature is a positive factor between the potential and E; got {temperature}.")
