r"""Maximum likelihood of a normalised energy, whose log Z is 0: flows, and whatever else is exactly -log q(x).

.. math:: \min_\theta \; \mathbb{E}_{data}[E_\theta(x)], \qquad E_\theta(x) = -\log q_\theta(x)

Values that come in steps, as grey levels do, are points of a lattice, at which a density grows without end. Noise of
one step spreads each over its cell: see `gibbsian.objectives.augmented`.
"""

from __future__ import annotations

from torch import Generator

from gibbsian.energies.base import Energy
from gibbsian.energies.flows import check_continuous
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.checks import check_floating

REMEDY = (
    "Add uniform noise of one step of the values: Augmented(MaximumLikelihood(), UniformNoise(step)); drop constant "
    "and class columns; or fit discrete data by an energy on bits or classes."
)


class MaximumLikelihood(Objective):
    """The mean energy of the data, for energies that are normalised.

    `On the mathematical foundations of theoretical statistics (Fisher, 1922)
    <https://doi.org/10.1098/rsta.1922.0009>`_. The metric ``nll`` is in nats per row; where rows have uniform noise of
    one step w, ``nll - d * log(w)`` is a bound on the values' own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Mean of the energy.

        Raises
        ------
        ArgumentTypeError
            If the energy is not normalised, or the data are integers.
        DomainError
            If a density over the reals meets discrete data.
        """
        if not isinstance(energy, Tractable):
            raise ArgumentTypeError(
                f"Maximum likelihood needs a tractable energy, which is exactly -log q(x), such as spline_flow(2); "
                f"got {energy!r}. An energy whose Z is unknown is fitted by score matching, noise contrastive "
                "estimation or chains, and in one or two dimensions by ExactLikelihood."
            )
        check_floating("Maximum likelihood", batch.x)
        if not (energy.support.is_discrete or self.seen):
            check_continuous(batch.x, f"{energy!r}", REMEDY)
        self.seen = True
        value = energy(batch.x).mean()
        return Loss(value, {"nll": value.detach(), "energy_data": value.detach()})
