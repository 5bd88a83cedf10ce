r"""The law of a cleaner point given a noisier one, under a noise-conditional energy.

Let :math:`E(x, \sigma)` be the energy of the data with noise of standard deviation :math:`\sigma`, and let the noise
grow from :math:`\sigma` to :math:`\sigma'` by adding what is missing: :math:`x' = x + s\,\epsilon` with
:math:`s^2 = \sigma'^2 - \sigma^2`. By Bayes' rule

.. math:: -\log p(x \mid x') = E(x, \sigma) + \frac{|x' - x|^2}{2 s^2} + \text{const}.

However many modes :math:`E` has, the second term holds x within about s of the point that is known: with neighbouring
levels close enough it is nearly one Gaussian, which short chains from :math:`x'` sample.

Points stay where they are as noise is added to them (variance-exploding), for that is what :math:`\sigma` means to a
noise-conditional energy. The other convention in use shrinks them on the way (variance-preserving): the same laws after
each level is rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from gibbsian.energies.base import Energy, formula
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError


class RecoveryEnergy(Energy):
    r"""The energy of cleaner points given noisier ones, in units of the noise between them.

    .. math:: E_u(u) = E(x' + s\,u) + \tfrac{1}{2} |u|^2

    for :math:`x = x' + s\,u`: all chains start at :math:`u = 0`, and a step size is a pure number, which in x is a step
    of :math:`s^2` times it. The same one serves at every level, for with noise :math:`\sigma` no density is curved more
    than :math:`1 / \sigma^2`, so that :math:`E_u` is curved by :math:`(\sigma' / \sigma)^2` at most.

    Parameters
    ----------
    energy
        At the cleaner level: without open context.
    noisy
        The noisier points :math:`x'`, ``(n, *event)``.
    spread
        Standard deviation of the noise between the levels, s, ``(n,)`` or 0-d.

    Raises
    ------
    ShapeError
        When called with another number of points than ``noisy`` has.
    """

    noisy: Tensor
    spread: Tensor

    def __init__(self, energy: Energy, noisy: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.energy = energy
        self.event_shape = energy.event_shape
        # What is still open, for `sample` to ask for.
        self.context = energy.context
        self.register_buffer("noisy", noisy, persistent=False)
        # Aligned here once, not at every step of a chain.
        self.register_buffer("spread", spread.reshape(-1, *[1] * (noisy.ndim - 1)), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        """Energy of the points that ``u`` stands for, ``(n, *event) -> (n,)``."""
        if u.shape != self.noisy.shape:
            raise ShapeError(f"The noisy points have shape {tuple(self.noisy.shape)} and u has {tuple(u.shape)}.")
        return self.energy(self.points(u)) + tether(u)

    def points(self, u: Tensor) -> Tensor:
        """The points that ``u`` stands for, ``(n, *event)``."""
        return self.noisy + self.spread * u

    def extra_repr(self) -> str:
        """The energy inside."""
        return formula(self.energy)


def tether(u: Tensor) -> Tensor:
    """Half the squared distance from the noisier point, in units of the noise between: ``(n, *event) -> (n,)``."""
    return 0.5 * u.square().sum(tuple(range(1, u.ndim)))


def spreads(levels: Sequence[float]) -> list[float]:
    """Standard deviations of the noise that leads from each level to the next, one fewer than levels."""
    return [math.sqrt((high - low) * (high + low)) for low, high in pairwise(levels)]


def check_levels(levels: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Read noise levels that rise from the cleanest to the noisiest.

    Raises
    ------
    OptionError
        Unless they are two or more positive finite numbers, each larger than the one before.
    """
    told = tuple(float(level) for level in levels)
    rise = all(low < high for low, high in pairwise(told))
    if len(told) < 2 or not rise or not (told[0] > 0.0 and told[-1] < math.inf):
        raise OptionError(
            f"levels are two or more positive noise levels, rising; got {told}. Annealing(sigma_max, sigma_min)"
            ".sigmas() lists some from the top; reverse them with [::-1]."
        )
    return told


def check_noise_conditional(energy: Energy, x: Tensor) -> None:
    """Refuse an energy without noise levels, and points that noise cannot be added to.

    Raises
    ------
    OptionError
        If the energy asks for no noise level.
    DomainError
        If it lives on discrete states.
    ArgumentTypeError
        If the points are not floating-point numbers.
    """
    if energy.support.is_discrete:
        raise DomainError(
            f"Noise levels are of Gaussian noise, but the energy lives on {energy.support}. Fit discrete states with "
            "PersistentContrastiveDivergence."
        )
    if "sigma" not in energy.context:
        takes = ", ".join(energy.context) or "none"
        raise OptionError(
            "Recovery from one noise level to the next needs an energy with the context sigma, called as "
            f"energy(x, sigma=sigma); this one's context is: {takes}. Use NoiseConditional, or adopt a function of "
            'both by Energy.of(fn, context=("sigma",)).'
        )
    if not x.is_floating_point():
        raise ArgumentTypeError(f"Noise is added to floating-point numbers; got {x.dtype}.")
