r"""Paths: functions from beta in [0, 1] to an energy, from a base whose log Z is 0 to the energy whose log Z is sought.

The geometric path :math:`E_\beta = (1 - \beta) E_0 + \beta E_1` is always there. Any function of beta may take its
place, as long as beta = 0 gives the base and beta = 1 the energy; beta enters as a 0-d tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from gibbsian.energies.base import Combination, Energy
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import OptionError

Path: TypeAlias = Callable[[Tensor], Energy]
"""From a 0-d tensor beta in [0, 1] to an energy: the base at 0, the target at 1."""


def geometric(base: Energy, energy: Energy) -> Path:
    """Build the path (1 - beta) * base + beta * energy.

    Parameters
    ----------
    base
        Where it starts.
    energy
        Where it ends.
    """

    def path(beta: Tensor) -> Energy:
        # The algebra's beta * energy + (1 - beta) * base in one object: it is built anew at each temperature.
        return Combination([(beta, energy), (1.0 - beta, base)])

    return path


def noise_levels(energy: Energy, sigmas: Sequence[float], base: Tractable, share: float = 0.5) -> Path:
    r"""Build a path down the noise levels of a noise-conditional energy :math:`E(x, \sigma)`.

    First from the base to the energy at the largest level, geometrically in the densities; then down the levels, each
    stretch between two of them geometrically in σ: :math:`\sigma = \sigma_i^{1-t} \sigma_{i+1}^{t}`.

    Parameters
    ----------
    energy
        With context ``("sigma",)``: ``forward(x, sigma)`` takes one level per row.
    sigmas
        The levels, positive, from largest to smallest; two are enough.
    base
        Where the path starts; best when it is close to the energy at the largest level.
    share
        The part of [0, 1] that leads from the base to the largest level.

    Raises
    ------
    OptionError
        If the energy is not conditioned on sigma alone, or the levels do not decrease.
    """
    require_tractable(base, "base")
    levels = [float(s) for s in sigmas]
    if energy.context != ("sigma",):
        raise OptionError(f"noise_levels walks an energy whose context is ('sigma',); this one's is {energy.context}.")
    if len(levels) < 2 or levels[-1] <= 0 or any(a <= b for a, b in pairwise(levels)):
        raise OptionError(f"Noise levels are two or more positive numbers that decrease; got {levels}.")
    if not 0.0 < share < 1.0:
        raise OptionError(f"share lies strictly between 0 and 1; got {share}.")
    logs = [math.log(s) for s in levels]

    def path(beta: Tensor) -> Energy:
        b = float(beta)
        if b < share:
            return geometric(base, energy.given(sigma=beta.new_tensor(levels[0])))(beta / share)
        place = (b - share) / (1.0 - share) * (len(logs) - 1)
        i = min(int(place), len(logs) - 2)
        sigma = math.exp(logs[i] + (place - i) * (logs[i + 1] - logs[i]))
        return energy.given(sigma=beta.new_tensor(sigma))

    return path
