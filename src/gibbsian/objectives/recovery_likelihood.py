r"""Diffusion recovery likelihood: learn to recover each noise level from the next.

Data with noise :math:`\sigma_1 < \dots < \sigma_T` form a chain :math:`x_{t+1} = x_t + s_t\,\epsilon`, with
:math:`s_t^2 = \sigma_{t+1}^2 - \sigma_t^2`. The likelihood of :math:`x_t` needs draws of the whole model for its
gradient; that of :math:`x_t` given :math:`x_{t+1}`, which is maximised here, needs draws of the energy with a tether:

.. math:: -\log p(x_t \mid x_{t+1}) = E(x_t, \sigma_t) + \frac{|x_{t+1} - x_t|^2}{2 s_t^2} + \log Z(x_{t+1}).

The tether is free of parameters, so the gradient is contrastive divergence's,

.. math:: \mathbb{E}[\nabla_\theta E(x_t, \sigma_t)] - \mathbb{E}[\nabla_\theta E(x_t^-, \sigma_t)],
          \qquad x_t^- \sim p_\theta(\cdot \mid x_{t+1}),

with chains that start at :math:`x_{t+1}` and stay near it. The true energies, for all levels at once, are where it
vanishes. Draws are made by the same chains, from the highest level down (`gibbsian.ancestral_sample`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.recovery import RecoveryEnergy, check_levels, check_noise_conditional, spreads
from gibbsian.kernels.base import Kernel, per_chain
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.checks import check_at_least
from gibbsian.objectives.contrast import chain_metrics, contrast
from gibbsian.sampling import sample


class RecoveryLikelihood(Objective):
    r"""Maximum likelihood of each noise level given the next, for a noise-conditional energy :math:`E(x, \sigma)`.

    Every row draws a level t below the last, uniformly; its :math:`x_t` is contrasted with the end of a chain that
    starts at :math:`x_{t+1}`. The energy at the last level is not trained: draws start there, from a Gaussian, so that
    level should drown the data.

    `Learning energy-based models by diffusion recovery likelihood (Gao, Song, Poole, Wu & Kingma, 2021)
    <https://arxiv.org/abs/2012.08125>`_, with noise added and nothing shrunk, which is the same model in other
    coordinates. Its step size, :math:`b^2 s_t^2 / 2`, is here ``step_size`` :math:`= b^2 / 2`.

    Parameters
    ----------
    levels
        :math:`\sigma_1 < \dots < \sigma_T`, in units of x, T of 2 or more. The closer they lie, the fewer steps a chain
        needs, and the more chains in a row make a draw.
    kernel
        How a chain moves, in units of :math:`s_t`. There the energy is curved by :math:`(\sigma_{t+1} / \sigma_t)^2` at
        most, so that Langevin steps much beyond the inverse of that are rejected or run away.
    steps
        Steps of a chain.
    energy_penalty
        Weight of the mean squared energies of both ends.
    compile
        Compile the chains' steps.

    Raises
    ------
    OptionError
        If an option is out of its range.
    """

    sigmas: Tensor
    spreads: Tensor

    def __init__(
        self,
        levels: Sequence[float] | Tensor,
        kernel: Kernel,
        steps: int = 10,
        energy_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.levels = check_levels(levels)
        check_at_least(("steps", steps, 1), ("energy_penalty", energy_penalty, 0))
        self.kernel = kernel
        self.steps = steps
        self.energy_penalty = energy_penalty
        self.compile_steps = compile
        self.register_buffer("sigmas", torch.tensor(self.levels[:-1]), persistent=False)
        self.register_buffer("spreads", torch.tensor(spreads(self.levels)), persistent=False)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Noise the batch to two neighbouring levels, run chains from the noisier, and contrast with the cleaner.

        Raises
        ------
        OptionError
            If the energy asks for no noise level, or for a label that the batch lacks.
        DomainError
            If the energy lives on discrete states.
        """
        check_noise_conditional(energy, batch.x)
        x = batch.x.detach()
        rung = torch.randint(len(self.sigmas), (len(batch),), generator=rng, device=x.device)
        sigma, spread = self.sigmas[rung].to(x.dtype), self.spreads[rung].to(x.dtype)
        context = context_of(energy, batch, besides=("sigma",)) | {"sigma": sigma}
        eps = torch.randn((2, *x.shape), generator=rng, dtype=x.dtype, device=x.device)
        clean = x + per_chain(sigma, x) * eps[0]
        noisy = clean + per_chain(spread, x) * eps[1]
        given = RecoveryEnergy(energy.given(**context), noisy, spread)
        with dropout_paused(energy):
            start = torch.zeros_like(noisy)
            run = sample(given, self.kernel, start, steps=self.steps, rng=rng, compile=self.compile_steps)
        recovered = given.points(run.x)
        value, metrics = contrast(energy, clean, recovered, context, context, self.energy_penalty)
        return Loss(value, metrics | chain_metrics(noisy, recovered, run.acceptance, run.nonfinite))

    def extra_repr(self) -> str:
        """The settings."""
        ends = f"{len(self.levels)} from {self.levels[0]:.4g} to {self.levels[-1]:.4g}"
        return f"levels={ends}, {self.kernel}, steps={self.steps}, energy_penalty={self.energy_penalty}"
