r"""Contrastive divergence: lower the energy of data, raise that of the model's own samples.

The gradient of the negative log-likelihood of :math:`p_\theta(x) = e^{-E_\theta(x)} / Z_\theta` is

.. math:: \nabla_\theta \, \mathbb{E}_{data}[-\log p_\theta] = \mathbb{E}_{data}[\nabla_\theta E_\theta(x)]
          - \mathbb{E}_{p_\theta}[\nabla_\theta E_\theta(x)],

since :math:`\nabla_\theta \log Z_\theta` is minus the mean of :math:`\nabla_\theta E_\theta` under the model. The
second mean is taken over chains, whose start tells the methods apart: the data (CD), where the chains of the last step
stopped (persistent CD), noise (short-run training), or some of each; see `Starts`. The loss, mean energy of data minus
that of samples, has this gradient; its value is not a likelihood and does not go down as the fit improves.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer, Slots, tensors_of
from gibbsian.compilation import compiled, owner_of
from gibbsian.energies.base import Energy
from gibbsian.energies.domains import same_support
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel, per_chain
from gibbsian.kernels.ladder import levels_of
from gibbsian.objectives.augment import Move
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.checks import check_at_least, check_draws
from gibbsian.objectives.contrast import chain_metrics, contrast
from gibbsian.objectives.fast_weights import FastWeights
from gibbsian.objectives.replicas import Exchange
from gibbsian.objectives.round import Shapes, is_one_graph, run_round
from gibbsian.objectives.sampler_gradient import SamplerKL, check_differentiable, run_chains, sampler_kl
from gibbsian.objectives.starts import AT_DATA, Starts, fresh_starts
from gibbsian.short_run import ShortRun
from gibbsian.typing import Context

# Not with the objective itself: a copy of it, or a pickle, has nothing to do with them.
_SHAPES: WeakKeyDictionary[Objective, Shapes] = WeakKeyDictionary()


class ChainObjective(Objective):
    """What objectives that contrast data with chains share: all but where the chains start by default. Abstract."""

    def __init__(
        self,
        kernel: Kernel,
        steps: int,
        starts: Starts,
        base: Tractable | None,
        buffer: ReplayBuffer | None,
        energy_penalty: float,
        data_noise: float,
        augment: Move | None,
        augment_fraction: float,
        kl: SamplerKL | None,
        compile: bool,
        fast: FastWeights | None = None,
    ) -> None:
        super().__init__()
        check_at_least(("steps", steps, 1), ("energy_penalty", energy_penalty, 0), ("data_noise", data_noise, 0))
        if not 0.0 <= augment_fraction <= 1.0:
            raise OptionError(f"augment_fraction lies between 0 and 1; got {augment_fraction}.")
        if augment is not None and buffer is None:
            raise OptionError(
                f"augment={augment!r} moves chains between two rounds, and no chain outlives one without a buffer; "
                "take starts with a fraction in the buffer, or PersistentContrastiveDivergence."
            )
        if kl is not None and fast is not None:
            raise OptionError("kl differentiates chains in the weights that fast_rate moves them off; leave one out.")
        if kl is not None:
            check_differentiable(kernel, steps, kl)
        self.kernel = kernel
        self.steps = steps
        self.starts = starts
        # A buffer holds its base, and a module held twice would be saved twice.
        self.own_base = base if buffer is None else None
        self.buffer = buffer
        self.energy_penalty = energy_penalty
        self.data_noise = data_noise
        self.augment = augment
        self.augment_fraction = augment_fraction
        self.kl = kl
        self.fast = fast
        self.exchange = None if buffer is None or buffer.replicas == 1 else Exchange(kernel)
        self.compile_steps = compile

    @property
    def base(self) -> Tractable | None:
        """What draws the noise that chains start from, if any do."""
        return self.own_base if self.buffer is None else self.buffer.base

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Run as many chains as the batch has rows, and contrast them with it.

        Raises
        ------
        ShapeError, DomainError, OptionError
            If base, data and energy are not on one space, dtype and device, a label is missing, the buffer is smaller
            than the batch, or there are too few chains for an entropy.
        """
        context = context_of(energy, batch)
        self._check_space(energy, batch.x)
        x = batch.x
        if self.data_noise:
            x = x + self.data_noise * torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        slots = self._begin(x.detach(), context, rng)
        start = self._moved(slots, rng)
        conditional = energy.given(**slots.context) if slots.context else energy
        plain = self.kl is None and self.fast is None and self.exchange is None
        if self.compile_steps and plain and is_one_graph(energy, self.kernel, start, self.steps):
            shapes = _SHAPES.get(self)
            if shapes is None or not shapes.serve(energy, self.kernel, start):
                shapes = _SHAPES[self] = Shapes.of(conditional, self.kernel, start, rng)
            labels, penalty = (context, slots.context), self.energy_penalty
            value, metrics, samples = run_round(
                energy, conditional, shapes, start, x, *labels, self.steps, penalty, rng
            )
            hot = slots.hot
        else:
            value, metrics, samples, hot = self._round(energy, conditional, slots, start, x, context, rng)
        if self.fast is not None:
            metrics |= self.fast.update(value, energy)
        if self.buffer is not None:
            self.buffer.write(slots, samples, self.steps, hot)
            metrics["buffer_age"] = self.buffer.mean_age
        return Loss(value, metrics)

    def _round(
        self, energy: Energy, conditional: Energy, slots: Slots, start: Tensor, data: Tensor, context: Context, rng: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        """Run the chains and contrast them, step by step; also where their replicas stop."""
        recorded = 0 if self.kl is None else self.kl.steps
        hot, told = slots.hot, {}
        with dropout_paused(conditional), nullcontext() if self.fast is None else self.fast.laid_on(energy):
            if self.exchange is None or hot is None:
                run = run_chains(conditional, self.kernel, start, self.steps, rng, self.compile_steps, recorded)
            else:
                points = torch.cat((start.unsqueeze(1), hot), 1)
                run, hot, told = self.exchange.run(
                    conditional, self.kernel, points, self.steps, rng, self.compile_steps, bool(slots.context)
                )
        samples = run.state.x.detach()
        against = compiled(contrast, owner_of(energy)) if self.compile_steps else contrast
        value, metrics = against(energy, data, samples, context, slots.context, self.energy_penalty)
        metrics |= chain_metrics(start, samples, run.acceptance, run.nonfinite) | told
        if self.kl is not None:
            reference, index = self._past(samples, slots, rng)
            term, entropy = sampler_kl(run.state, reference, slots.index[:, None] == index, self.kl)
            value, metrics = value + term, metrics | {"sampler_kl": term.detach(), "entropy": entropy}
        return value, metrics, samples, hot

    def extra_repr(self) -> str:
        """The settings."""
        told = f"{self.kernel}, steps={self.steps}, {self.starts}, energy_penalty={self.energy_penalty}"
        for name, usual in (("data_noise", 0.0), ("augment", None), ("augment_fraction", 1.0), ("kl", None)):
            if (value := getattr(self, name)) != usual:
                told += f", {name}={value}"
        if self.fast is not None:
            told += f", fast_rate={self.fast.rate}, fast_decay={self.fast.decay}"
        return told

    def _begin(self, data: Tensor, context: Context, rng: Generator) -> Slots:
        if self.buffer is None:
            return fresh_starts(self.starts, self.base, data, context, rng)
        return self.buffer.draw(len(data), rng, context, data, self.starts.data)

    @torch.no_grad()
    def _moved(self, slots: Slots, rng: Generator) -> Tensor:
        """Augment a fraction of the chains that go on."""
        if self.augment is None:
            return slots.x
        x = self.augment(slots.x, rng)
        if x.shape != slots.x.shape or x.dtype != slots.x.dtype:
            raise ShapeError(
                f"{self.augment!r} moves chains of shape {tuple(slots.x.shape)} and {slots.x.dtype}, and returned "
                f"{tuple(x.shape)} and {x.dtype}; a move keeps both."
            )
        chosen = torch.rand(len(x), generator=rng, device=x.device) < self.augment_fraction
        return torch.where(per_chain(chosen & (slots.age > 0), x), x, slots.x)

    def _past(self, samples: Tensor, slots: Slots, rng: Generator) -> tuple[Tensor, Tensor]:
        """What chains are compared with for their entropy, and the slot of each; call it before they are put back."""
        if self.buffer is None:
            return samples, slots.index
        size, device = self.buffer.size, samples.device
        assert self.kl is not None
        index = torch.randperm(size, generator=rng, device=device)[: self.kl.references]
        return self.buffer.positions[index], index

    def _check_space(self, energy: Energy, data: Tensor) -> None:
        if self.base is not None:
            _check_base(energy, self.base, data)
        if self.data_noise and energy.support.is_discrete:
            raise DomainError(f"data_noise={self.data_noise} would take the data off {energy.support}; set it to 0.")
        if self.buffer is not None:
            _check_placement("The replay buffer is", "the objective", self.buffer.positions, data)
        elif self.base is not None:
            _check_placement("The base is", "the objective", next(tensors_of(self.base), data), data)
        _check_placement("The energy's parameters are", "it or the data", next(energy.parameters(), data), data)


class ContrastiveDivergence(ChainObjective):
    r"""CD-k: chains start at the data and run for ``steps`` steps; or start elsewhere, as ``starts`` says.

    .. math:: \overline{E(x^+)} - \overline{E(x^-)} + \alpha \, \overline{E(x^+)^2 + E(x^-)^2}

    `Training products of experts by minimizing contrastive divergence (Hinton, 2002)
    <https://doi.org/10.1162/089976602760128018>`_. Few steps bias the gradient, except at the true model; modes
    far from the data are not seen, which `PersistentContrastiveDivergence` mends.

    With ``starts=Starts(noise=1.0)`` it is the training of `Learning non-convergent non-persistent short-run MCMC
    toward energy-based model (Nijkamp et al., 2019) <https://arxiv.org/abs/1904.09770>`_: what then looks like the data
    is not the density but chains of just these steps, `short_run`.

    Parameters
    ----------
    kernel
        How a chain moves.
    steps
        The k of CD-k.
    energy_penalty
        :math:`\alpha`, which keeps the magnitude of energies small; 0 is plain CD.
    compile
        Compile the chains' steps and the loss (some seconds at the first call).
    starts
        The fractions of chains that start at data, at noise and in a buffer.
    base
        Draws the noise: a tractable energy on the data's space. Needed unless all chains start at data.
    buffer_size
        Chains kept, if some start in the buffer; at least the batch's size.
    data_noise
        Standard deviation of Gaussian noise added to the data, which fits the data's density smoothed by as much.
    augment
        A move ``(x, rng) -> x`` of chains that go on in the buffer, before they run; see `gibbsian.objectives.augment`.
    augment_fraction
        How many of them are moved.
    kl
        Settings of the gradient through the sampler; ``None`` leaves it out.

    Attributes
    ----------
    buffer
        The `ReplayBuffer`, part of this module's ``state_dict``, or ``None`` when no chain starts there.

    Raises
    ------
    OptionError
        If an option is out of its range, or does not fit another.
    ArgumentTypeError
        If the base is not tractable.
    """

    def __init__(
        self,
        kernel: Kernel,
        steps: int = 1,
        energy_penalty: float = 0.0,
        compile: bool = False,
        *,
        starts: Starts = AT_DATA,
        base: Tractable | None = None,
        buffer_size: int = 10_000,
        data_noise: float = 0.0,
        augment: Move | None = None,
        augment_fraction: float = 1.0,
        kl: SamplerKL | None = None,
    ) -> None:
        if starts.data < 1.0 and base is None:
            raise OptionError(f"{starts} needs a base that draws noise, such as base=Gaussian(2).")
        if base is not None:
            require_tractable(base, "The base of the chains")
        buffer = None
        if base is not None and starts.buffer:
            buffer = ReplayBuffer(base, buffer_size, starts.noise, levels_of(kernel))
        noise = base if starts.noise else None
        super().__init__(
            kernel, steps, starts, noise, buffer, energy_penalty, data_noise, augment, augment_fraction, kl, compile
        )

    @property
    def short_run(self) -> ShortRun:
        """The run as which a model that was trained from noise alone is sampled.

        Raises
        ------
        OptionError
            If chains start elsewhere too.
        """
        if self.base is None or self.starts.noise < 1.0:
            raise OptionError(
                f"A short run starts at noise, and these chains at {self.starts}; train with starts=Starts(noise=1.0). "
                "A model with a buffer is sampled from it: gibbsian.continue_chains."
            )
        return ShortRun(self.kernel, self.steps, self.base)


class PersistentContrastiveDivergence(ChainObjective):
    r"""PCD: chains go on from where they stopped at the step before, kept in a replay buffer.

    The loss is that of `ContrastiveDivergence`, with ``Starts(noise=restart, buffer=1 - restart)``. `Training
    restricted Boltzmann machines using approximations to the likelihood gradient (Tieleman, 2008)
    <https://doi.org/10.1145/1390156.1390290>`_. With a tempering kernel it is PT-PCD, see
    `gibbsian.objectives.replicas`.

    Parameters
    ----------
    kernel
        How a chain moves. Of `ParallelTempering` or `PathTempering` the buffer keeps all replicas of each chain.
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
        Compile the chains' steps and the loss (some seconds at the first call).
    augment
        A move ``(x, rng) -> x`` of chains that go on in the buffer, before they run; see `gibbsian.objectives.augment`.
    augment_fraction
        How many of them are moved.
    kl
        Settings of the gradient through the sampler; ``None`` leaves it out.
    fast_rate
        Learning rate of fast weights, which drive the chains on where they mix slowly, at the cost of one more backward
        pass; 0 leaves them out. Plain SGD's rate at the start is usual. See `gibbsian.objectives.fast_weights`.
    fast_decay
        What is left of the fast weights after a call.

    Attributes
    ----------
    buffer
        The `ReplayBuffer`; part of this module's ``state_dict``.

    Raises
    ------
    OptionError
        If an option is out of its range, or does not fit another.
    ArgumentTypeError
        If the base is not tractable.
    """

    buffer: ReplayBuffer

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
        *,
        augment: Move | None = None,
        augment_fraction: float = 1.0,
        kl: SamplerKL | None = None,
        fast_rate: float = 0.0,
        fast_decay: float = 0.95,
    ) -> None:
        buffer = ReplayBuffer(base, buffer_size, restart, levels_of(kernel))
        starts = Starts(noise=restart, buffer=1.0 - restart)
        fast = FastWeights(fast_rate, fast_decay) if fast_rate else None
        super().__init__(
            kernel,
            steps,
            starts,
            base,
            buffer,
            energy_penalty,
            data_noise,
            augment,
            augment_fraction,
            kl,
            compile,
            fast,
        )


def _check_base(energy: Energy, base: Tractable, data: Tensor) -> None:
    check_draws("base", base, data)
    if (energy.support.is_discrete or base.support.is_discrete) and not same_support(energy.support, base.support):
        raise DomainError(
            f"The base draws from {base.support} and the energy lives on {energy.support}; chains start where the "
            "energy lives: Bernoulli or Categorical for discrete states, Gaussian or Uniform for real ones."
        )


def _check_placement(whose: str, what: str, found: Tensor, data: Tensor) -> None:
    if (found.dtype, found.device) != (data.dtype, data.device):
        raise OptionError(
            f"{whose} {found.dtype} on {found.device} and the data {data.dtype} on {data.device}; "
            f"move {what} with .to(device, dtype)."
        )
