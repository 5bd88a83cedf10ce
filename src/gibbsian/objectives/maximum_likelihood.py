r"""Maximum likelihood of a normalised energy, whose log Z is 0: flows, and whatever else is exactly -log q(x).

.. math:: \min_\theta \; \mathbb{E}_{data}[E_\theta(x)], \qquad E_\theta(x) = -\log q_\theta(x)

Values that come in steps of w, as grey levels do, are points of a lattice, at which a density grows without end.
Uniform noise of one step spreads each over its cell, and makes the density's mass there the probability of the value,
to which

.. math:: \log P(x) \;\ge\; \mathbb{E}_{u}[\log q(x + w u)] + d \log w, \qquad u \sim U(-\tfrac12, \tfrac12)^d

is a lower bound, by Jensen's inequality: `RNADE (Uria et al., 2013) <https://arxiv.org/abs/1306.0186>`_; `A note on the
evaluation of generative models (Theis et al., 2016) <https://arxiv.org/abs/1511.01844>`_.
"""

from __future__ import annotations

import math

from torch import Generator

from gibbsian.energies.base import Energy
from gibbsian.energies.flows import check_continuous
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.checks import check_floating
from gibbsian.objectives.dequantised import spread

REMEDY = (
    "Add uniform noise of one step of the values: MaximumLikelihood(dequantise=step); drop constant and class columns; "
    "or fit discrete data by an energy on bits or classes."
)


class MaximumLikelihood(Objective):
    r"""The mean energy of the data, for energies that are normalised.

    `On the mathematical foundations of theoretical statistics (Fisher, 1922)
    <https://doi.org/10.1098/rsta.1922.0009>`_. The metric ``nll`` is in nats per row, of the noisy rows where there is
    noise; a bound on the discrete values' own is ``nll - d * log(dequantise)``.

    Parameters
    ----------
    dequantise
        w, the step of the data's values in the units of the data (2/16 for sixteen grey levels scaled to [-1, 1]):
        every batch gets fresh uniform noise of this width about its values. ``None`` for continuous data.

    Raises
    ------
    OptionError
        If the step is not positive and finite.
    """

    def __init__(self, dequantise: float | None = None) -> None:
        super().__init__()
        if dequantise is not None and not 0.0 < dequantise < math.inf:
            raise OptionError(f"dequantise is the positive step of the data's values, or None; got {dequantise}.")
        self.dequantise = dequantise
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Mean of the energy.

        Raises
        ------
        ArgumentTypeError
            If the energy is not normalised, or the data are integers.
        DomainError
            If a density over the reals meets discrete data without noise, or noise an energy on discrete states.
        """
        if not isinstance(energy, Tractable):
            raise ArgumentTypeError(
                f"Maximum likelihood needs a tractable energy, which is exactly -log q(x), such as spline_flow(2); "
                f"got {energy!r}. An energy whose Z is unknown is fitted by score matching, noise contrastive "
                "estimation or chains, and in one or two dimensions by ExactLikelihood."
            )
        x, discrete = batch.x, energy.support.is_discrete
        check_floating("Maximum likelihood", x)
        if self.dequantise is not None:
            if discrete:
                raise DomainError(
                    f"{energy!r} lives on {energy.support}, where noise would lead off; use MaximumLikelihood()."
                )
            x = spread(x, self.dequantise, rng)
        elif not (discrete or self.seen):
            check_continuous(x, f"{energy!r}", REMEDY)
        self.seen = True
        value = energy(x).mean()
        return Loss(value, {"nll": value.detach(), "energy_data": value.detach()})

    def extra_repr(self) -> str:
        """The step."""
        return "" if self.dequantise is None else f"dequantise={self.dequantise}"
