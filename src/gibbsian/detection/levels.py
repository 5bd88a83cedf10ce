r"""How a row looks at several noise levels: features from a noise-conditional energy.

.. math:: \phi(x) = \bigl(E(x, \sigma_1), \dots, E(x, \sigma_L)\bigr) \quad \text{or} \quad
          \bigl(\sigma_1 |\nabla E(x, \sigma_1)|, \dots, \sigma_L |\nabla E(x, \sigma_L)|\bigr).

A foreign row may have a usual energy at one level, but seldom energies that go together as those of the data do. The
rows are taken as they are, without noise. A model of the features of reference rows (`mahalanobis`,
`gaussian_mixture`, `nearest_neighbours`) makes them a score, which also finds rows whose energies are too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gibbsian.detection.base import check_scored
from gibbsian.detection.scores import EnergyScore, GradientNorm
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, unknown_name

Kind = Literal["energy", "score", "both"]


@dataclass(frozen=True)
class LevelFeatures:
    r"""Energies, or lengths of the score, at several noise levels.

    `Multiscale Score Matching for Out-of-Distribution Detection (Mahmood et al., 2021)
    <https://arxiv.org/abs/2010.13132>`_ takes lengths of the score and a Gaussian mixture or nearest neighbours of
    them. Lengths are multiplied by :math:`\sigma`, so that those of noise alone are alike at all levels.

    Parameters
    ----------
    energy
        Conditional on ``sigma`` and nothing else.
    sigmas
        Noise levels, one or more, in the units of the rows.
    kind
        ``"energy"``, ``"score"``, or ``"both"``, with the energies first.

    Raises
    ------
    OptionError
        If the energy has another context than ``sigma``, a level is not positive, or the kind is unknown.
    ArgumentTypeError, InputError
        If it is no energy, or is in training mode.
    """

    energy: Energy
    sigmas: tuple[float, ...]
    kind: Kind = "score"

    def __post_init__(self) -> None:
        if not isinstance(self.energy, Energy):
            raise ArgumentTypeError(f"Features of levels are those of an Energy; got {self.energy!r}.")
        if tuple(self.energy.context) != ("sigma",):
            takes = ", ".join(self.energy.context) or "none"
            raise OptionError(
                f"Features of levels need an energy conditional on sigma alone, such as NoiseConditional; this one's "
                f"context: {takes}. Fix other conditions with energy.given(...)."
            )
        if not self.sigmas or not all(0.0 < s < math.inf for s in self.sigmas):
            raise OptionError(f"sigmas are positive noise levels, one or more; got {tuple(self.sigmas)}.")
        if self.kind not in get_args(Kind):
            raise unknown_name("kind of feature", self.kind, get_args(Kind))
        check_scored(self.energy, "energy")

    def __call__(self, x: Tensor) -> Tensor:
        """Features of rows, ``(n, *event) -> (n, L)``, or ``(n, 2 L)`` of both kinds."""
        found = []
        if self.kind != "score":
            found += [EnergyScore(self.energy.given(sigma=s))(x) for s in self.sigmas]
        if self.kind != "energy":
            found += [s * GradientNorm(self.energy.given(sigma=s))(x) for s in self.sigmas]
        return torch.stack(found, 1)
