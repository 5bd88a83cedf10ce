r"""Contrastive divergence: lower the energy of data, raise that of the model's own samples.

The gradient of the negative log-likelihood of :math:`p_\theta(x) = e^{-E_\theta(x)} / Z_\theta` is

.. math:: \nabla_\theta \, \mathbb{E}_{data}[-\log p_\theta] = \mathbb{E}_{data}[\nabla_\theta E_\theta(x)]
          - \mathbb{E}_{p_\theta}[\nabla_\theta E_\theta(x)],

since :math:`\nabla_\theta \log Z_\theta` is minus the mean of :math:`\nabla_\theta E_\theta` under the model. The
second mean is taken over chains, whose start tells the methods apart: the data (CD), or where the chains of the last
step stopped (persistent CD). The loss, mean energy of data minus that of samples, has this gradient; its value is not
a likelihood and does not go down as the fit improves.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.energies.domains import same_support
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.samples import Samples
from gibbsian.sampling import sample
from gibbsian.typing import Context


class ContrastiveDivergence(Objective):
    r"""CD-k: chains start at the data and run for ``steps`` steps.

    .. math:: \overline{E(x^+)} - \overline{E(x^-)} + \alpha \, \overline{E(x^+)^2 + E(x^-)^2}

    `Training products of experts by minimizing contrastive divergence (Hinton, 2002)
    <https://doi.org/10.1162/089976602760128018>`_. Few steps bias the gradient, except at the true model; modes
    far from the data are not seen, which `PersistentContrastiveDivergence` mends.

    Parameters
    ----------
    kernel
        How a chain moves.
    steps
        The k of CD-k.
    energy_penalty
        :math:`\alpha`, which keeps the magnitude of energies small; 0 is plain CD.
    compile
        Compile the chains' steps.

    Raises
    ------
    OptionError
        If an option is out of its range.
    """

    def __init__(self, kernel: Kernel, steps: int = 1, energy_penalty: float = 0.0, compile: bool = False) -> None:
        super().__init__()
        _check_at_least(("steps", steps, 1), ("energy_penalty", energy_penalty, 0))
        self.kernel = kernel
        self.steps = steps
        self.energy_penalty = energy_penalty
        self.compile_steps = compile

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Run chains from the batch and contrast them with it."""
        context = context_of(energy, batch)
        start = batch.x.detach()
        run = _chains(self, _given(energy, context), start, rng)
        value, metrics = contrast(energy, batch.x, run.x, context, context, self.energy_penalty)
        return Loss(value, metrics | _chain_metrics(start, run))

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.kernel}, steps={self.steps}, energy_penalty={self.energy_penalty}"


class PersistentContrastiveDivergence(Objective):
    r"""PCD: chains go on from where they stopped at the step before, kept in a replay buffer.

    The loss is that of `ContrastiveDivergence`. `Training restricted Boltzmann machines using approximations to the
    likelihood gradient (Tieleman, 2008) <https://doi.org/10.1145/1390156.1390290>`_.

    Parameters
    ----------
    kernel
        How a chain moves.
    base
        Where chains start, and restart: a tractable energy on the data's space.
    steps
        Steps of each drawn chain per call.
    buffer_size
        Chains kept; at least the batch's size.
    restart
        The fraction of drawn chains that restart from the base.
    energy_penalty
        Weight of the mean squared energies of data and samples.
    data_noise
        Standard deviation of Gaussian noise added to the data, which fits the data's density smoothed by as much.
    compile
        Compile the chains' steps.

    Attributes
    ----------
    buffer
        The `ReplayBuffer`; part of this module's ``state_dict``.

    Raises
    ------
    OptionError
        If an option is out of its range.
    ArgumentTypeError
        If the base is not tractable.
    """

    def __init__(
        self,
        kernel: Kernel,
        base: Tractable,
        steps: int = 20,
        buffer_size: int = 10_000,
        restart: float = 0.05,
        energy_penalty: float = 0.0,
        data_noise: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_at_least(("steps", steps, 1), ("energy_penalty", energy_penalty, 0), ("data_noise", data_noise, 0))
        self.kernel = kernel
        self.steps = steps
        self.buffer = ReplayBuffer(base, buffer_size, restart)
        self.energy_penalty = energy_penalty
        self.data_noise = data_noise
        self.compile_steps = compile

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Go on with as many chains as the batch has rows, put them back, and contrast them with it.

        Raises
        ------
        ShapeError, DomainError, OptionError
            If base, data and energy are not on one space, dtype and device, or a label is missing.
        """
        context = context_of(energy, batch)
        _check_space(energy, self.buffer, batch.x, self.data_noise)
        slots = self.buffer.draw(len(batch), rng, context)
        conditional = _given(energy, slots.context)
        run = _chains(self, conditional, slots.x, rng)
        self.buffer.write(slots, run.x, self.steps)
        x = batch.x
        if self.data_noise:
            x = x + self.data_noise * torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        value, metrics = contrast(energy, x, run.x, context, slots.context, self.energy_penalty)
        return Loss(value, metrics | _chain_metrics(slots.x, run) | {"buffer_age": self.buffer.mean_age})

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.kernel}, steps={self.steps}, energy_penalty={self.energy_penalty}, data_noise={self.data_noise}"


def contrast(
    energy: Energy, data: Tensor, samples: Tensor, data_context: Context, samples_context: Context, penalty: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean energy of data minus mean energy of samples, plus the penalty on squared energies.

    Parameters
    ----------
    energy
        The one being fitted.
    data, samples
        ``(n, *event)`` and ``(m, *event)``; no gradient flows into the samples.
    data_context, samples_context
        What each row is conditioned on, with the same names.
    penalty
        Weight of the mean squared energies.

    Returns
    -------
    tuple
        The loss, 0-d, and the metrics ``energy_data``, ``energy_samples`` and ``gap``.
    """
    # One pass over both halves is faster than two, and the rows of an energy do not see each other.
    context = {name: torch.cat((value, samples_context[name])) for name, value in data_context.items()}
    both = energy(torch.cat((data, samples.detach())), **context)
    positive, negative = both.split((data.shape[0], samples.shape[0]))
    gap = positive.mean() - negative.mean()
    value = gap + penalty * (positive.square().mean() + negative.square().mean()) if penalty else gap
    means = {"energy_data": positive.mean(), "energy_samples": negative.mean(), "gap": gap}
    return value, {name: mean.detach() for name, mean in means.items()}


def _chains(
    objective: ContrastiveDivergence | PersistentContrastiveDivergence, energy: Energy, start: Tensor, rng: Generator
) -> Samples:
    with dropout_paused(energy):
        return sample(energy, objective.kernel, start, steps=objective.steps, rng=rng, compile=objective.compile_steps)


def _chain_metrics(start: Tensor, run: Samples) -> dict[str, Tensor]:
    return {
        "acceptance": run.acceptance.mean(),
        "nonfinite": run.nonfinite.sum(),
        "moved": (run.x - start).square().mean().sqrt(),
    }


def _given(energy: Energy, context: Context) -> Energy:
    return energy.given(**context) if context else energy


def _check_at_least(*options: tuple[str, float, float]) -> None:
    for name, value, least in options:
        if not value >= least:
            raise OptionError(f"{name} is {least} or more; got {value}.")


def _check_space(energy: Energy, buffer: ReplayBuffer, data: Tensor, data_noise: float) -> None:
    base = buffer.base
    if tuple(base.event_shape) != tuple(data.shape[1:]):
        raise ShapeError(
            f"The base draws points of shape {tuple(base.event_shape)} and the data's have {tuple(data.shape[1:])}."
        )
    if (energy.support.is_discrete or base.support.is_discrete) and not same_support(energy.support, base.support):
        raise DomainError(
            f"The base draws from {base.support} and the energy lives on {energy.support}; chains start where the "
            "energy lives: Bernoulli or Categorical for discrete states, Gaussian or Uniform for real ones."
        )
    if data_noise and energy.support.is_discrete:
        raise DomainError(f"data_noise={data_noise} would take the data off {energy.support}; set it to 0.")
    chains = buffer.positions
    if (chains.dtype, chains.device) != (data.dtype, data.device):
        raise OptionError(
            f"The replay buffer is {chains.dtype} on {chains.device} and the data {data.dtype} on {data.device}; "
            "move the objective with .to(device, dtype)."
        )
