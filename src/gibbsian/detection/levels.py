r"""How a row looks at several noise levels: features from a noise-conditional energy.

.. math:: \phi(x) = \bigl(E(x, \sigma_1), \dots, E(x, \sigma_L)\bigr) \quad \text{or} \quad
          \bigl(\sigma_1 |\nabla E(x, \sigma_1)|, \dots, \sigma_L |\nabla E(x, \sigma_L)|\bigr).

A foreign row may have a usual energy at one level, but seldom energies that go together as those of the data do. The
rows are taken as they are, without noise. A model of the features of reference rows (`mahalanobis`,
`gaussian_mixture`, `nearest_neighbours`) makes them a score, which also finds rows whose energies are too low.

`level_score` is the recommended one: a Gaussian mixture of the energies and of the logarithms of the lengths, at levels
evenly apart from the lowest to the highest that the energy was trained at (`level_ladder`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from gibbsian.detection.base import check_rows, check_scored, in_parts
from gibbsian.detection.features import Mixture, gaussian_mixture
from gibbsian.detection.scores import EnergyScore
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, unknown_name
from gibbsian.objectives.base import energy_and_gradient

Kind = Literal["energy", "score", "both"]

COMPONENTS = 10
"""Of the recommended mixture, where there are rows enough."""

ROWS_PER_FEATURE = 10
"""Reference rows that a component has for each feature, at the least, unless it is the only one."""


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
    log_lengths
        Take the logarithms of the lengths, whose law over rows is nearer to a normal one.

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
    log_lengths: bool = False

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
        if self.kind == "energy":
            return torch.stack([EnergyScore(self.energy.given(sigma=s))(x) for s in self.sigmas], 1)
        energies, lengths = zip(*(self._both(x, s) for s in self.sigmas))
        if self.log_lengths:
            # A row where the gradient vanishes keeps a finite logarithm.
            lengths = [n.clamp(min=torch.finfo(n.dtype).tiny).log() for n in lengths]
        return torch.stack([*energies, *lengths] if self.kind == "both" else [*lengths], 1)

    def _both(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Energies at a level and lengths of the score, times the level, by one pass."""
        energy = Energy.of(self.energy.given(sigma=sigma))

        @torch.enable_grad()
        def both(part: Tensor) -> Tensor:
            at = part.detach().requires_grad_()
            value, gradient = energy_and_gradient(energy, at, {}, create_graph=False)
            return torch.stack((value.detach(), sigma * gradient.flatten(1).norm(dim=1)), 1)

        energies, lengths = in_parts(both, x).unbind(1)
        return energies, lengths


def level_ladder(low: float, high: float, levels: int = 10) -> tuple[float, ...]:
    """Noise levels evenly apart in their logarithm, for `level_score`.

    Parameters
    ----------
    low, high
        The lowest and the highest that the energy was trained at, in the units of the rows.
    levels
        How many, 2 or more.

    Raises
    ------
    OptionError
        If the ends are not positive and in this order, or there are fewer than two levels.
    """
    if not 0.0 < low < high < math.inf or levels < 2:
        raise OptionError(f"Levels run from a low to a higher noise, 2 or more; got {low} to {high}, {levels} of them.")
    return tuple(low * (high / low) ** (i / (levels - 1)) for i in range(levels))


def level_score(
    energy: Energy, rows: Tensor, sigmas: tuple[float, ...], *, rng: Generator, components: int | None = None
) -> Mixture:
    r"""The score to begin with for a noise-conditional energy: how usual its energies and slopes are, taken together.

    Minus the log-density of :math:`(E(x, \sigma_i), \log \sigma_i |\nabla E(x, \sigma_i)|)_i` under a Gaussian mixture
    fitted to reference rows. Energies at low levels see strokes and textures, at high levels shapes; lengths of the
    gradient see rows that lie beside the data, and need no constants. After `Multiscale Score Matching for
    Out-of-Distribution Detection (Mahmood et al., 2021) <https://arxiv.org/abs/2010.13132>`_, who take the lengths
    alone.

    Parameters
    ----------
    energy
        Conditional on ``sigma`` and nothing else.
    rows
        Reference rows, best those that the energy was not fitted to, and others than calibrate a threshold (see
        `gibbsian.detection.detector.detector_of`); some hundreds or more.
    sigmas
        Noise levels, such as ``level_ladder(0.05, 8.0)``.
    rng
        Seeds the fit of the mixture.
    components
        Of the mixture; 10 when left out, fewer where a component would have less than 10 rows for each feature.

    Raises
    ------
    OptionError, ArgumentTypeError
        As of `LevelFeatures` and `gaussian_mixture`.
    ShapeError, DataError, InputError
        If there are too few rows, or their features do not vary or are not finite.
    """
    features = LevelFeatures(energy, tuple(sigmas), "both", log_lengths=True)
    check_rows(rows, 2, "The score of levels")
    if components is None:
        components = max(1, min(COMPONENTS, len(rows) // (ROWS_PER_FEATURE * 2 * len(features.sigmas))))
    return gaussian_mixture(features, rows, components, rng=rng)
