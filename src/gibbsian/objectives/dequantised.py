r"""Uniform noise on values that come in steps, for objectives of densities over real numbers.

The density of a value with uniform noise of one step w about it, times w, is on average at most the probability of the
value: :math:`\log P(x) \ge \mathbb{E}_u[\log q(x + w u)] + d \log w` for u uniform between -1/2 and 1/2.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy, formula
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective


class Dequantised(Objective):
    """Another objective, on batches whose values get fresh uniform noise of one step.

    `RNADE (Uria et al., 2013) <https://arxiv.org/abs/1306.0186>`_; `A note on the evaluation of generative models
    (Theis et al., 2016) <https://arxiv.org/abs/1511.01844>`_.

    Parameters
    ----------
    objective
        What is fitted.
    step
        Between the data's values, in units of x.

    Raises
    ------
    ArgumentTypeError
        If the first argument is no objective.
    OptionError
        If the step is not positive and finite.
    """

    def __init__(self, objective: Objective, step: float) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"Noise is added before an objective sees the data; got {objective!r}.")
        if not 0.0 < step < math.inf:
            raise OptionError(f"step is the positive distance between the data's values; got {step}.")
        self.objective, self.step = objective, float(step)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """The inner objective's loss of the noisy batch."""
        return self.objective(energy, Batch(spread(batch.x, self.step, rng), batch.context), rng)

    def extra_repr(self) -> str:
        """The objective and the step."""
        return f"{formula(self.objective)}, step={self.step:.4g}"


def spread(x: Tensor, step: float, rng: Generator) -> Tensor:
    """Add uniform noise of one step, half of it below and half above."""
    return x + step * (torch.rand(x.shape, generator=rng, dtype=x.dtype, device=x.device) - 0.5)
