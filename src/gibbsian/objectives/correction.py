r"""Fitting the correction of a generator by chains in the space of its noise.

For :math:`p(x) \propto e^{-f(x)} p_g(x)` with the generator fixed, the gradient of the negative log-likelihood in f is

.. math:: \mathbb{E}_{data}[\nabla f(x)] - \mathbb{E}_{p}[\nabla f(x)],

and draws of p are points :math:`x(u)` of chains u on `Reparametrised`, whose density is a standard normal one times
:math:`e^{-f(x(u))}`: close to round, where p itself lies along a thin sheet.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.energies.layers import dropout_paused
from gibbsian.energies.reparametrised import VAEBM
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, ShapeError
from gibbsian.kernels.base import Kernel
from gibbsian.objectives.base import Batch, Loss, Objective, check_steps
from gibbsian.objectives.checks import check_at_least
from gibbsian.objectives.contrast import chain_metrics, contrast
from gibbsian.objectives.sampler_gradient import run_chains


class CorrectionLikelihood(Objective):
    r"""Maximum likelihood of a `VAEBM`'s correction, by persistent chains over z and noise.

    .. math:: \overline{f(x^+)} - \overline{f(x(u^-))} + \alpha\, \overline{f(x^+)^2 + f(x(u^-))^2}

    `VAEBM: A symbiosis between variational autoencoders and energy-based models (Xiao et al., 2021)
    <https://arxiv.org/abs/2010.00654>`_, which has short Langevin chains, some of them persistent. Metrics are those of
    `PersistentContrastiveDivergence`, of the correction.

    Parameters
    ----------
    kernel
        How chains move in the space of z and noise, where the base is standard normal: ``HMC(0.2, leapfrog=5,
        jitter=0.4)``, say. Without jitter a trajectory may be half a turn of some direction, whose size then stays.
    steps
        Of each drawn chain per call.
    buffer_size
        Chains kept; at least the batch's size.
    restart
        The fraction of drawn chains that start anew, at draws of the autoencoder.
    energy_penalty
        :math:`\alpha`.
    base
        ``model.base`` of the `VAEBM` to be fitted.

    Attributes
    ----------
    buffer
        The `ReplayBuffer` of flat (z, noise); part of this module's ``state_dict``.

    Raises
    ------
    OptionError
        If an option is out of its range.
    ArgumentTypeError
        If kernel or base are none.
    """

    def __init__(
        self,
        kernel: Kernel,
        base: Gaussian,
        steps: int = 10,
        buffer_size: int = 2000,
        restart: float = 0.05,
        energy_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(kernel, type) or not isinstance(kernel, Kernel):
            raise ArgumentTypeError(f"Chains over z and noise need a kernel, such as MALA(0.02); got {kernel!r}.")
        check_steps(steps, "A chain over z and noise")
        check_at_least(("energy_penalty", energy_penalty, 0))
        self.kernel, self.steps, self.energy_penalty = kernel, steps, energy_penalty
        self.buffer = ReplayBuffer(base, buffer_size, restart)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Run as many chains as the batch has rows, and contrast what they stand for with it.

        Raises
        ------
        ArgumentTypeError
            If the energy is no `VAEBM`.
        ShapeError
            If the base is that of another one.
        OptionError
            If the buffer is smaller than the batch.
        """
        model = corrected(energy)
        walked = model.reparametrised
        if self.buffer.base.event_shape != walked.base.event_shape:
            raise ShapeError(
                f"The chains' base has shape {tuple(self.buffer.base.event_shape)}, and this model's z and noise are "
                f"{tuple(walked.base.event_shape)} numbers; pass base=model.base."
            )
        slots = self.buffer.draw(len(batch), rng)
        with dropout_paused(model):
            run = run_chains(walked, self.kernel, slots.x, self.steps, rng, False)
            u = run.state.x.detach()
            with torch.no_grad():
                samples = walked.points(u)
        value, metrics = contrast(model.correction, batch.x, samples, {}, {}, self.energy_penalty)
        self.buffer.write(slots, u, self.steps)
        told = chain_metrics(slots.x, u, run.acceptance, run.nonfinite) | {"buffer_age": self.buffer.mean_age}
        return Loss(value, metrics | told)

    @torch.no_grad()
    def as_data(self, energy: Energy, chains: Tensor, rng: Generator) -> Tensor:
        """What chains of z and noise stand for."""
        return corrected(energy).reparametrised.points(chains)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.kernel}, steps={self.steps}, energy_penalty={self.energy_penalty}"


def corrected(energy: Energy) -> VAEBM:
    """Return a `VAEBM`, or say that one is needed.

    Raises
    ------
    ArgumentTypeError
        If it is none.
    """
    if not isinstance(energy, VAEBM):
        raise ArgumentTypeError(f"CorrectionLikelihood fits VAEBM(vae, correction); got {energy!r}.")
    return energy
