"""A flow on the torus: circular splines, whose ends meet with equal slopes."""

from __future__ import annotations

from collections.abc import Sequence

from gibbsian.energies.flows import Flow, require_zuko
from gibbsian.energies.periodic import TURN


def circular_spline_flow(dim: int, transforms: int = 3, hidden: Sequence[int] = (64, 64), bins: int = 8) -> Flow:
    r"""Build a flow over angles in :math:`[-\pi, \pi)`: zuko's ``NCSF``, from a uniform density.

    `Normalizing flows on tori and spheres (Rezende et al., 2020) <https://arxiv.org/abs/2002.02428>`_. Each transform
    is an autoregressive spline on the circle. It is not to be calibrated: angles have a scale of their own.

    Parameters
    ----------
    dim
        Number of angles.
    transforms, hidden, bins
        As in `spline_flow`.

    Raises
    ------
    MissingPackageError
        If zuko is not installed.
    """
    zuko = require_zuko()
    flow = Flow(zuko.flows.NCSF(dim, transforms=transforms, hidden_features=tuple(hidden), bins=bins), dim)
    flow.support = TURN
    return flow
