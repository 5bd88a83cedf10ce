r"""How a row looks at several noise levels: features from a noise-conditional energy.

.. math:: \phi(x) = \bigl(E(x, \sigma_1), \dots, E(x, \sigma_L)\bigr) \quad \text{or} \quad
          \bigl(\sigma_1 |\nabla E(x, \sigma_1)|, \dots, \sigma_L |\nabla E(x, \sigma_L)|\bigr).

A foreign row may have a usual energy at one level, but seldom energies that go together as those of the data do. The
rows are taken as they are, without noise. A model of the features of reference rows (`mahalanobis`,
`gaussian_mixture`, `nearest_neighbours`) makes them a score, which also finds rows whose energies are too low.

`level_score` is the recommended one. Energies say how odd a row is, lengths of the slopes whether it lies beside the
data; of images, coarse maps of the slopes say *where* they would be changed, which sees shapes in the wrong place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from gibbsian.detection.base import Features, check_rows, check_scored, in_parts
from gibbsian.detection.features import Mixture, described, gaussian_mixture
from gibbsian.detection.scores import EnergyScore
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, unknown_name
from gibbsian.objectives.base import energy_and_gradient

Kind = Literal["energy", "score", "both"]

COMPONENTS = 10
"""Of the recommended mixtures, where there are rows enough."""

ROWS_PER_FEATURE = 10
"""Reference rows that a component has for each feature, at the least."""

CELLS = 7
"""Along each side of a map of slopes, where the image has twice as many pixels."""

MAPPED = (2 / 9, 5 / 9, 7 / 9)
"""Places on the ladder of levels, from 0 to 1, whose slopes are mapped."""

MAP_WEIGHT = 0.1
"""Of a map's log-density beside that of energies and lengths: its many cells are far from independent."""


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
        if self.kind == "energy":
            return torch.stack([EnergyScore(self.energy.given(sigma=s))(x) for s in self.sigmas], 1)
        looked = torch.stack([_looked(self.energy, x, s) for s in self.sigmas], 2)
        return looked.flatten(1) if self.kind == "both" else looked[:, 1]


def _looked(energy: Energy, x: Tensor, sigma: float, cells: tuple[int, int] | None = None) -> Tensor:
    """Energies at a level, lengths of the score times the level, and maps of it, by one pass: ``(n, 2 + cells)``."""
    fixed = Energy.of(energy.given(sigma=sigma))

    @torch.enable_grad()
    def look(part: Tensor) -> Tensor:
        at = part.detach().requires_grad_()
        value, gradient = energy_and_gradient(fixed, at, {}, create_graph=False)
        slope = sigma * gradient.detach()
        seen = [value.detach()[:, None], slope.flatten(1).norm(dim=1, keepdim=True)]
        return torch.cat([*seen, nn.functional.adaptive_avg_pool2d(slope, cells).flatten(1)] if cells else seen, 1)

    return in_parts(look, x)


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


@dataclass(frozen=True)
class LevelTable:
    """Energies, logarithms of the lengths of slopes, and maps of slopes, of each row; made by `level_score`.

    Attributes
    ----------
    energy, sigmas
        As in `LevelFeatures`.
    mapped
        Which of the levels have a map.
    cells
        Height and width of a map.
    """

    energy: Energy
    sigmas: tuple[float, ...]
    mapped: tuple[int, ...] = ()
    cells: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Describe rows, ``(n, *event) -> (n, 2 L + maps)``: energies, logarithms, maps from the lowest level up."""
        seen = [_looked(self.energy, x, s, self.cells if i in self.mapped else None) for i, s in enumerate(self.sigmas)]
        energies, lengths = (torch.stack([each[:, k] for each in seen], 1) for k in (0, 1))
        # A row where the gradient vanishes keeps a finite logarithm.
        lengths = lengths.clamp(min=torch.finfo(lengths.dtype).tiny).log()
        return torch.cat([energies, lengths, *(each[:, 2:] for each in seen)], 1)


@dataclass(frozen=True)
class Picked:
    """Some neighbouring columns of a table, as features."""

    first: int
    last: int

    def __call__(self, x: Tensor) -> Tensor:
        """Pick them, ``(n, d) -> (n, last - first)``."""
        return x[:, self.first : self.last]


@dataclass(frozen=True)
class LevelScore:
    r"""How unusual a row is at all levels together; made by `level_score`.

    .. math:: s(x) = -\log q\bigl((E(x, \sigma_i), \log \sigma_i |\nabla E(x, \sigma_i)|)_i\bigr)
              - w \sum_j \log q_j\bigl(\text{map of } \sigma_j \nabla E(x, \sigma_j)\bigr)

    Attributes
    ----------
    features
        From rows to a table.
    parts
        q and the :math:`q_j`: mixtures of columns of the table.
    weight
        w.
    """

    features: Features
    parts: tuple[Mixture, ...]
    weight: float = MAP_WEIGHT

    def __call__(self, x: Tensor) -> Tensor:
        """Scores, ``(n, *event) -> (n,)`` float64, nats."""
        table = described(self.features, x)
        first, *maps = (part(table) for part in self.parts)
        return first + self.weight * sum(maps, torch.zeros_like(first))


def level_score(energy: Energy, rows: Tensor, sigmas: Sequence[float], *, rng: Generator) -> LevelScore:
    r"""Fit the score to begin with for a noise-conditional energy: how usual its energies and slopes are, together.

    Gaussian mixtures of what reference rows show (see `LevelScore`): one of their energies and of the logarithms of the
    lengths of their slopes at all levels; of images also one of a coarse map of the slopes at each of three levels.
    After `Multiscale Score Matching for Out-of-Distribution Detection (Mahmood et al., 2021)
    <https://arxiv.org/abs/2010.13132>`_, who take the lengths alone.

    A mixture has ten components where there are rows enough, ten for each of its features and components. With fewer
    rows than suffice for one component a map is left out.

    Parameters
    ----------
    energy
        Conditional on ``sigma`` and nothing else.
    rows
        Reference rows, best those that the energy was not fitted to, and others than calibrate a threshold (see
        `gibbsian.detection.detector.detector_of`); of images a thousand or more.
    sigmas
        Noise levels, such as ``level_ladder(0.05, 8.0)``.
    rng
        Seeds the fits.

    Raises
    ------
    OptionError, ArgumentTypeError
        As of `LevelFeatures`.
    ShapeError, DataError, InputError
        If there are too few rows, or what they show does not vary or is not finite.
    """
    levels = LevelFeatures(energy, tuple(sigmas)).sigmas
    check_rows(rows, 2, "The score of levels")
    cells = None
    if rows.ndim == 4:
        cells = max(1, min(CELLS, rows.shape[2] // 2)), max(1, min(CELLS, rows.shape[3] // 2))
    size = rows.shape[1] * math.prod(cells) if cells else 0
    mapped = ()
    if 0 < size * ROWS_PER_FEATURE <= len(rows):
        # Fewer levels than places put two of these on one.
        mapped = tuple(dict.fromkeys(round(place * (len(levels) - 1)) for place in MAPPED))
    table = LevelTable(energy, levels, mapped, cells)
    values, start = described(table, rows), 2 * len(levels)
    ends = [start + size * i for i in range(len(mapped) + 1)]
    parts = [(0, start), *pairwise(ends)]
    most = [max(1, min(COMPONENTS, len(rows) // (ROWS_PER_FEATURE * (b - a)))) for a, b in parts]
    fitted = [gaussian_mixture(Picked(a, b), values, k, rng=rng) for (a, b), k in zip(parts, most)]
    return LevelScore(table, tuple(fitted))
