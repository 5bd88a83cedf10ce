r"""Fast weights: an overlay on the energy that drives persistent chains out of where they stay.

The chains run on the energy at :math:`\theta + \phi`. With g the gradient of the contrast between data and chains,
at :math:`\theta`,

.. math:: \phi \leftarrow \lambda \phi - \epsilon \, g

after every call: the energy is raised where the chains are and lowered where the data are, at a rate of its own that
stays large as the learning rate of :math:`\theta` falls, and what was raised sinks back within some
:math:`1 / (1 - \lambda)` calls. The model is that of :math:`\theta` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from gibbsian.errors import OptionError


class FastWeights(nn.Module):
    r"""The overlay :math:`\phi` of all trained parameters, as one vector that is made at the first call.

    `Using fast weights to improve persistent contrastive divergence (Tieleman & Hinton, 2009)
    <https://doi.org/10.1145/1553374.1553506>`_.

    Parameters
    ----------
    rate
        :math:`\epsilon`, the change of a parameter per unit of its gradient.
    decay
        :math:`\lambda`, what is left of the overlay after a call.

    Raises
    ------
    OptionError
        If the rate is not positive and finite, or the decay is not in ``[0, 1)``.
    """

    overlay: Tensor | None

    def __init__(self, rate: float, decay: float) -> None:
        super().__init__()
        if not 0.0 < rate < math.inf:
            raise OptionError(f"fast_rate is the positive learning rate of fast weights, or 0 for none; got {rate}.")
        if not 0.0 <= decay < 1.0:
            raise OptionError(
                f"fast_decay is what is left of fast weights after a call, from 0 to below 1; got {decay}."
            )
        self.rate, self.decay = float(rate), float(decay)
        self.register_buffer("overlay", None)

    @contextmanager
    def laid_on(self, energy: nn.Module) -> Iterator[None]:
        """Add the overlay to the energy's parameters; they come back as they were, to the bit."""
        if self.overlay is None:
            yield
            return
        params = _trained(energy)
        kept = [p.detach().clone() for p in params]
        try:
            with torch.no_grad():
                for p, part in zip(params, self.overlay.split([p.numel() for p in params])):
                    p.add_(part.view_as(p))
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(params, kept):
                    p.copy_(before)

    def update(self, value: Tensor, energy: nn.Module) -> dict[str, Tensor]:
        """Follow the gradient of a loss, unless it is an evaluation; return the overlay's length as a metric."""
        if self.training and torch.is_grad_enabled():
            params = _trained(energy)
            found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            grad = parameters_to_vector([torch.zeros_like(p) if g is None else g for p, g in zip(params, found)])
            old = torch.zeros_like(grad) if self.overlay is None else self.overlay.to(grad)
            self.overlay = self.decay * old - self.rate * grad
        return {} if self.overlay is None else {"fast_norm": self.overlay.norm()}


def _trained(energy: nn.Module) -> list[nn.Parameter]:
    return [p for p in energy.parameters() if p.requires_grad]
