r"""Scores at every noise level: what a denoiser is, where no energy is behind it.

A score is :math:`s(x, \sigma) = \nabla \log p_\sigma(x)`, where :math:`p_\sigma` is the density of the data with noise
of standard deviation :math:`\sigma` added: the convention of noise-conditional energies, whose points are not shrunk.
A network's score need not be the gradient of anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.energies.base import fixed_context, keep_fixed
from gibbsian.energies.schedules import wide


class Score(nn.Module, ABC):
    r"""The gradient of a log-density at every noise level, :math:`s(x, \sigma) = \nabla \log p_\sigma(x)`.

    Attributes
    ----------
    event_shape
        The shape of one point, or ``None`` when the score takes any.
    context
        Names of the conditions asked for besides the noise level, such as a label.
    """

    event_shape: torch.Size | None = None
    context: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Scores of points at their noise levels: ``(n, *event)`` and ``(n,)`` to ``(n, *event)``."""

    def given(self, **context: Tensor | float | int) -> Score:
        """Fix part of the context, one value for all rows or one per row, as `gibbsian.Energy.given` does.

        Raises
        ------
        OptionError
            If the score does not ask for a name.
        """
        return GivenScore(self, context)

    def denoised(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        r"""The mean of the clean point given the noisy one, :math:`x + \sigma^2 s(x, \sigma)`: ``(n, *event)``."""
        return x + wide(sigma.square(), x) * self(x, sigma, **context)


class GivenScore(Score):
    """A score with part of its context fixed: see `Score.given`."""

    def __init__(self, score: Score, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.score = score
        self.fixed = keep_fixed(self, "This score", score.context, fixed)
        self.event_shape = score.event_shape
        self.context = tuple(name for name in score.context if name not in fixed)

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Scores with the fixed context spread over the rows.

        Raises
        ------
        ShapeError
            If a context of one value per row has another number of rows than ``x``.
        """
        return self.score(x, sigma, **context, **fixed_context(self, self.fixed, x))
