r"""Scores of foreign rows that an energy gives by itself, or by comparison with reference rows.

==================  =================================================  =======================================
score               formula                                            finds
==================  =================================================  =======================================
`EnergyScore`       :math:`E(x)`                                       improbable rows
`GradientNorm`      :math:`|\nabla E(x)|`                              rows on slopes: little mass around them
`Typicality`        :math:`|E(x) - \overline{E}|`                      rows more probable than usual, too
`Disagreement`      spread of :math:`(E_j(x) - \mu_j) / \sigma_j`      rows of which fits know nothing
==================  =================================================  =======================================

The last two compare with reference rows, and a threshold for them wants rows of its own: see `Calibration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gibbsian.detection.base import check_finite, check_rows, check_scored, in_parts, one_each
from gibbsian.energies.base import Energy
from gibbsian.errors import DataError, OptionError
from gibbsian.objectives.base import energy_and_gradient
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class EnergyScore:
    """The energy itself, without gradients and in parts.

    A density may give simple foreign rows *lower* energies than its own data: `Do Deep Generative Models Know What They
    Don't Know? (Nalisnick et al., 2019) <https://arxiv.org/abs/1810.09136>`_.

    Parameters
    ----------
    energy
        From rows ``(n, *event)`` to ``(n,)``; a conditional one with its context fixed by ``given``.

    Raises
    ------
    ArgumentTypeError, InputError
        If it cannot be called, or is in training mode.
    """

    energy: EnergyFn

    def __post_init__(self) -> None:
        check_scored(self.energy, "energy")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Energies, ``(n, *event) -> (n,)``."""
        return in_parts(lambda part: one_each(self.energy(part), len(part), "An energy"), x)


@dataclass(frozen=True)
class GradientNorm:
    r"""Length of the energy's gradient in the row, :math:`|\nabla_x E(x)|`, which no additive constant moves.

    Of a `ClassifierEnergy` it is the approximate mass of `Your classifier is secretly an energy based model and you
    should treat it like one (Grathwohl et al., 2020) <https://arxiv.org/abs/1912.03263>`_, with the sign turned.

    Parameters
    ----------
    energy
        From rows ``(n, *event)`` to ``(n,)``, differentiable.

    Raises
    ------
    ArgumentTypeError, InputError
        If it cannot be called, does not depend on the rows, or is in training mode.
    """

    energy: EnergyFn

    def __post_init__(self) -> None:
        check_scored(self.energy, "energy")

    def __call__(self, x: Tensor) -> Tensor:
        """Lengths, ``(n, *event) -> (n,)``."""
        return in_parts(self._norm, x)

    @torch.enable_grad()
    def _norm(self, x: Tensor) -> Tensor:
        _, gradient = energy_and_gradient(Energy.of(self.energy), x.detach().requires_grad_(), {}, create_graph=False)
        return gradient.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Typicality:
    r"""Distance of the energy from its mean over reference rows, :math:`|E(x) - \overline{E}|`; made by `typicality`.

    `Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick et al., 2019)
    <https://arxiv.org/abs/1906.02994>`_, of single rows; batches of them are told apart by `batch_typicality`.

    Attributes
    ----------
    score
        The energy, or another score.
    mean
        Over the reference rows, an estimate of the entropy where the energy is normalised; nats.
    """

    score: EnergyFn
    mean: float

    def __call__(self, x: Tensor) -> Tensor:
        """Distances, ``(n, *event) -> (n,)``."""
        return (EnergyScore(self.score)(x) - self.mean).abs()


def typicality(energy: EnergyFn, rows: Tensor) -> Typicality:
    """Measure the mean energy of reference rows, for `Typicality`.

    Parameters
    ----------
    energy
        From rows to ``(n,)``.
    rows
        Training rows, or others of their kind, ``(n, *event)``; not those that calibrate a threshold.

    Raises
    ------
    ShapeError, InputError
        If there are no rows, or an energy of one is not finite.
    """
    check_rows(rows, 1, "Typicality")
    values = EnergyScore(energy)(rows).double()
    check_finite(values, "The energy")
    return Typicality(energy, float(values.mean()))


@dataclass(frozen=True)
class Disagreement:
    r"""Spread of several energies of one row, each in units of its own spread over reference rows.

    .. math:: \mathrm{std}_j \, \frac{E_j(x) - \mu_j}{\sigma_j}

    Energies have unknown constants, and scales that differ from fit to fit; :math:`\mu_j` and :math:`\sigma_j` take
    both away. The members are fits of the same data from several seeds. After the ensembles of `WAIC, but Why?
    Generative Ensembles for Robust Anomaly Detection (Choi et al., 2018) <https://arxiv.org/abs/1810.01392>`_, which
    add the variance of log-likelihoods to their mean. Made by `disagreement`.

    Attributes
    ----------
    members
        The energies, or other scores.
    means, scales
        One per member.
    weight
        Of the spread; the mean over the members has the weight 1 - ``weight``.
    """

    members: tuple[EnergyFn, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weight: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Spreads, ``(n, *event) -> (n,)``, over the members as n - 1."""
        values = torch.stack(
            [(EnergyScore(e)(x) - m) / s for e, m, s in zip(self.members, self.means, self.scales)], dim=1
        )
        spread = values.std(1)
        return spread if self.weight == 1.0 else self.weight * spread + (1.0 - self.weight) * values.mean(1)


def disagreement(members: Sequence[EnergyFn], rows: Tensor, weight: float = 1.0) -> Disagreement:
    """Standardise several energies over reference rows, for `Disagreement`.

    Parameters
    ----------
    members
        Two or more energies, fitted apart.
    rows
        ``(n, *event)``, two or more; not those that calibrate a threshold.
    weight
        Of the spread against the mean of the members, from 0 to 1.

    Raises
    ------
    OptionError
        If there are fewer than two members, or the weight is out of range.
    DataError
        If a member has one and the same energy at all rows.
    ShapeError, InputError
        If there are too few rows, or an energy of one is not finite.
    """
    if len(members) < 2:
        raise OptionError(f"Disagreement takes two or more members; got {len(members)}. Fit more from other seeds.")
    if not 0.0 <= weight <= 1.0:
        raise OptionError(f"weight of the spread lies between 0 and 1; got {weight}.")
    check_rows(rows, 2, "Disagreement")
    means, scales = [], []
    for i, member in enumerate(members):
        values = EnergyScore(member)(rows).double()
        check_finite(values, f"Member {i}")
        mean, scale = float(values.mean()), float(values.std())
        if scale <= 1e-12 * max(1.0, abs(mean)):
            raise DataError(
                f"Member {i} has the same energy, {mean:.6g}, at all {len(rows)} reference rows and cannot be "
                "standardised. Leave it out, or give rows that differ."
            )
        means.append(mean)
        scales.append(scale)
    return Disagreement(tuple(members), tuple(means), tuple(scales), float(weight))
