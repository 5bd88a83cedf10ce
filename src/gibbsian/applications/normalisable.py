r"""Whether a density can be normalised, judged by how its energy rises far away.

A difference of energies, :math:`E_a - w E_b`, may fall without end: the integral of :math:`p_a / p_b^w` is then
infinite, and chains run away. In d dimensions it is finite along a ray only if the energy rises faster than
:math:`d \log r`. Its growth per e-fold of distance,

.. math:: g(r) = \frac{dE}{d \log r} = r\, \frac{dE}{dr},

is looked at along random rays, well beyond where the density is expected. A growth above d at the largest radius does
not prove anything of what lies beyond, or between the rays; one below d is a reason to expect no draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Combination, Energy, Given, Mixture, event_size, formula
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import OptionError

RADII = (4.0, 8.0, 16.0, 32.0)
"""Distances at which rays are looked at, in standard deviations of the base."""


class Growth(NamedTuple):
    """What `check_normalisable` found.

    Attributes
    ----------
    normalisable
        Whether the energy rises fast enough along every ray.
    radii
        Distances from the centre, in standard deviations of the base.
    growth
        The least growth over all rays between neighbouring radii, in nats per e-fold of distance, one fewer than radii.
    failing
        The part of the rays along which the energy rises too slowly between the last two radii.
    slope
        The least slope between these, in nats per unit of x.
    distance
        The last radius, in units of x (its root mean square over rays).
    dim
        d: what the growth must exceed.
    """

    normalisable: bool
    radii: tuple[float, ...]
    growth: tuple[float, ...]
    failing: float
    slope: float
    distance: float
    dim: int

    def __str__(self) -> str:
        """What was found, in words."""
        told = (
            f"{self.distance:.3g} away from the centre the energy changes by {self.growth[-1]:.3g} nats per e-fold of "
            f"distance along the worst ray (slope {self.slope:.3g} per unit); a density in {self.dim} dimensions needs "
            f"a rise of more than {self.dim}"
        )
        return told if self.normalisable else f"{told}, and {self.failing:.0%} of the rays have less"


@torch.no_grad()
def check_normalisable(
    energy: Energy | Callable[[Tensor], Tensor],
    base: Gaussian,
    *,
    rng: Generator,
    rays: int = 256,
    radii: Sequence[float] = RADII,
    warn: bool = True,
) -> Growth:
    """Look along random rays whether an energy still rises far away, and warn if it does not.

    Parameters
    ----------
    energy
        Without open context: fix a noise level by ``energy.given(sigma=...)``.
    base
        Where the density is expected, roughly: rays start at its mean, and are measured in its standard deviations.
    rng
        The generator of the directions, on the base's device.
    rays
        How many.
    radii
        Rising distances, two or more, in standard deviations of the base.
    warn
        Whether to warn; the result tells in any case.

    Returns
    -------
    Growth
        What was found.

    Raises
    ------
    OptionError
        If the radii do not rise from above 0, there is no ray, or the energy has open context.
    """
    told = tuple(float(r) for r in radii)
    if len(told) < 2 or not told[0] > 0.0 or not all(a < b for a, b in pairwise(told)) or rays < 1:
        raise OptionError(f"Rays are 1 or more, along two or more rising radii above 0; got {rays} and {told}.")
    adopted = Energy.of(energy)
    if adopted.context:
        raise OptionError(f"{formula(adopted)} has open context, {adopted.context}; fix it with given(...).")
    shape = base.event_shape
    d = event_size(shape)
    u = torch.randn((rays, *shape), generator=rng, device=base.loc.device, dtype=base.loc.dtype)
    size = u.flatten(1).norm(dim=1).reshape(-1, *[1] * len(shape))
    # In d dimensions a standard normal point lies near radius sqrt(d): one standard deviation is that far out.
    unit = (u / size * math.sqrt(d)).flatten(1)
    unit = (unit @ base.scale.T if base.full else unit * base.scale.flatten()).reshape(u.shape)
    values = torch.stack([adopted(base.loc + r * unit).double() for r in told])
    rise = values.diff(dim=0)
    # Once infinite, always infinite: a wall. What is no number at all is nothing to rely on.
    rise = torch.where(values[1:] == torch.inf, torch.inf, rise)
    rise = torch.where(values[1:].isnan() | rise.isnan(), -torch.inf, rise)
    growth = rise / torch.tensor([math.log(b / a) for a, b in pairwise(told)], device=rise.device).unsqueeze(1)
    lengths = unit.flatten(1).norm(dim=1).double()
    slope = float((rise[-1] / ((told[-1] - told[-2]) * lengths)).min())
    failing = float((growth[-1] <= d).double().mean())
    distance = told[-1] * float(lengths.square().mean().sqrt())
    found = Growth(failing == 0.0, told, tuple(growth.min(1).values.tolist()), failing, slope, distance, d)
    if warn and not found.normalisable:
        warn_not_normalisable(adopted, found)
    return found


def warn_not_normalisable(energy: Energy, found: Growth, where: str = "", stacklevel: int = 4) -> None:
    """Say that a density is not normalisable, with what found it.

    Parameters
    ----------
    energy, found
        Which, and what was found.
    where
        At which noise level, in words.
    stacklevel
        Whose line is shown.
    """
    warnings.warn(
        f"{formula(energy)} is probably not normalisable{where}: {found}. Chains would run away. Lower the weight of "
        f"what is subtracted, or add a wide base, such as Gaussian({found.dim}, scale=...).",
        RuntimeWarning,
        stacklevel=stacklevel,
    )


def has_negative_weight(energy: Energy) -> bool:
    """Whether something is subtracted anywhere in an energy."""
    if isinstance(energy, Combination):
        return any(float(weight) < 0.0 or has_negative_weight(term) for weight, term in energy.terms)
    if isinstance(energy, Mixture):
        return any(has_negative_weight(part) for part in energy.energies if isinstance(part, Energy))
    inner = getattr(energy, "energy", None)
    return isinstance(energy, Given) and isinstance(inner, Energy) and has_negative_weight(inner)
