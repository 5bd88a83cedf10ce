r"""Noise contrastive estimation: learn a density by telling data from noise whose density is known.

With :math:`\nu` noise draws from q per row of data, the posterior log-odds that x is data are
:math:`h(x) = -E(x) - c - \log q(x) - \log \nu`, and logistic regression on them fits E together with c, an estimate of
log Z. No chain is run; the estimate is as efficient as maximum likelihood when :math:`\nu` is large and q covers the
data.
"""

from __future__ import annotations

import math

import torch
from torch import Generator
from torch.nn.functional import softplus

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import OptionError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of


class NoiseContrastiveEstimation(Objective):
    r"""Binary noise contrastive estimation with a learned log-normaliser.

    `Noise-contrastive estimation of unnormalized statistical models (Gutmann & Hyvärinen, 2012)
    <https://jmlr.org/papers/v13/gutmann12a.html>`_.

    Parameters
    ----------
    noise
        A tractable energy that covers the data: wherever there are data, it must have density.
    ratio
        Noise draws per row of data, :math:`\nu`.
    learn_log_z
        Whether c is learned; otherwise the energy itself must become normalised.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable.
    OptionError
        If the ratio is below 1.
    """

    def __init__(self, noise: Tractable, ratio: int = 2, learn_log_z: bool = True) -> None:
        super().__init__()
        if ratio < 1:
            raise OptionError(f"ratio counts the noise draws per row of data, 1 or more; got {ratio}.")
        self.noise = require_tractable(noise, "noise")
        self.ratio = ratio
        self.log_z = torch.nn.Parameter(torch.zeros(()), requires_grad=learn_log_z)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw noise, and classify.

        Raises
        ------
        OptionError
            If the energy asks for a label that the batch lacks.
        """
        n = len(batch)
        noise = self.noise.sample(self.ratio * n, rng).to(batch.x.dtype)
        x = torch.cat((batch.x, noise))
        context = {k: v.repeat(self.ratio + 1, *[1] * (v.ndim - 1)) for k, v in context_of(energy, batch).items()}
        values = energy(x, **context)
        odds = self.noise(x).detach() - values - self.log_z - math.log(self.ratio)
        of_data, of_noise = odds[:n], odds[n:]
        loss = softplus(-of_data).mean() + self.ratio * softplus(of_noise).mean()
        detached = values.detach()
        metrics = {
            "energy_data": detached[:n].mean(),
            "energy_noise": detached[n:].mean(),
            "accuracy": 0.5 * ((of_data > 0).float().mean() + (of_noise < 0).float().mean()).detach(),
            "log_z": self.log_z.detach().clone(),
        }
        return Loss(loss, metrics)

    def extra_repr(self) -> str:
        """Noise draws per row."""
        return f"ratio={self.ratio}"
