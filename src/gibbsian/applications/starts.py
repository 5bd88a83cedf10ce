r"""Where a composition starts: the Gaussian that its density comes close to under much noise.

Under noise of standard deviation :math:`\sigma` far beyond the spread of what the terms describe, each of them is
close to :math:`N(m_i, \sigma^2)`, and so is every sum of them to some Gaussian. Its mean and variances are read off the
score, which is linear there,

.. math:: -\nabla E(x) \approx -\frac{x - m}{v},

by least squares at points drawn from the Gaussian that was found before. How much of the score's variance the line
explains tells whether the level is noise at all: two modes at distance 2a under noise a leave 5 to 10 per cent over,
and under noise 2a a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator, Tensor

from gibbsian.energies.tractable import Gaussian

ENOUGH = 0.95
"""The part of the score's variance that a Gaussian must explain for a noise level to count as noise."""

ROUNDS, POINTS = 4, 512
"""How often to look again where the last Gaussian was found, and at how many points."""


def fitted_gaussian(
    score: Callable[[Tensor], Tensor], first: Gaussian, rng: Generator
) -> tuple[Gaussian | None, float]:
    """Fit a Gaussian with a diagonal covariance to a score.

    Parameters
    ----------
    score
        From ``(n, *event)`` to ``(n, *event)``.
    first
        Where to look first.
    rng
        The generator, on its device.

    Returns
    -------
    tuple
        The Gaussian, ``None`` where the score does not point inwards; and the part of the score's variance that it
        explains.
    """
    base, explained = first, 0.0
    for _ in range(ROUNDS):
        x = base.sample(POINTS, rng)
        s = score(x)
        centred, slopes = x - x.mean(0), s - s.mean(0)
        slope = (centred * slopes).mean(0) / centred.square().mean(0)
        left, all_of_it = (slopes - slope * centred).square().sum(), slopes.square().sum()
        explained = float(1.0 - left / all_of_it)
        if not bool((slope < 0.0).all()):
            return None, explained
        variance = -slope.reciprocal()
        loc = x.mean(0) + variance * s.mean(0)
        if not bool(loc.isfinite().all() & variance.isfinite().all()):
            return None, explained
        base = Gaussian(loc=loc, scale=variance.sqrt())
    return base, explained
