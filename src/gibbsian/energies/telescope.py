r"""Telescopes: an energy as that of simple noise plus a chain of bridges, each between two distributions close by.

Let :math:`p_0, \dots, p_m` lead from the data's law to the noise's. Then

.. math:: -\log p_0(x) = -\log p_m(x) + \sum_{k=0}^{m-1} b_k(x), \qquad b_k(x) = -\log \frac{p_k(x)}{p_{k+1}(x)},

and each bridge :math:`b_k` is an easy thing to learn where the whole ratio is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gibbsian.energies.base import Energy, repeated
from gibbsian.energies.domains import common_event_shape, common_support
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError


class Telescope(Energy):
    r"""The energy of noise plus m bridges, which are one energy told the number of the bridge.

    The waymarks between data :math:`x_0` and noise :math:`x_m` are :math:`x_k = \sqrt{1 - \alpha_k^2}\,x_0 +
    \alpha_k x_m`. `Telescoping density-ratio estimation (Rhodes et al., 2020) <https://arxiv.org/abs/2006.12204>`_.
    Fitted by `TelescopingRatios`, it is an energy like any other, and close to normalised: its log Z is 0 up to the
    bridges' errors. It costs m evaluations of the bridges per point.

    Parameters
    ----------
    bridges
        Takes the number of the bridge, integers ``(n,)`` from 0 to m - 1, as a context: ``MLP(2, classes=m)`` is one.
    noise
        Where the chain ends: a tractable energy on real points.
    alphas
        :math:`\alpha_1 < \dots < \alpha_m = 1`; or m, for steps of 1/m. Data much narrower than the noise ask for
        `geometric_alphas`.
    level
        The name of the context that takes the number; the only one, when left out.

    Raises
    ------
    ArgumentTypeError
        If the noise is not tractable.
    OptionError
        If the alphas do not rise to 1, or the bridges do not take one number as context.
    ShapeError, DomainError
        If bridges and noise are over different points, or discrete ones.
    """

    alphas: Tensor

    def __init__(
        self, bridges: Energy, noise: Tractable, alphas: int | Sequence[float], level: str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(bridges, Energy):
            raise ArgumentTypeError(
                f"bridges is one energy with a context, such as MLP(2, classes=4); got {bridges!r}. Adopt a function "
                'of points and numbers by Energy.of(fn, context=("level",)).'
            )
        self.noise = require_tractable(noise, "noise")
        self.bridges = bridges
        self.level = _level_of(bridges, level)
        steps = [(k + 1) / alphas for k in range(alphas)] if isinstance(alphas, int) else [float(a) for a in alphas]
        if not steps or steps[-1] != 1.0 or steps[0] <= 0.0 or any(a >= b for a, b in pairwise(steps)):
            raise OptionError(f"alphas rise from above 0 to 1, or count the bridges, 1 or more; got {alphas}.")
        self.register_buffer("alphas", torch.tensor(steps))
        self.event_shape = common_event_shape((bridges, noise))
        self.support = common_support((bridges, noise))
        if self.support.is_discrete:
            raise DomainError(f"Waymarks are mixtures of points on the reals; these energies live on {self.support}.")
        self.context = tuple(name for name in bridges.context if name != self.level)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Energy of each row: the noise's and all bridges'."""
        m, n = len(self.alphas), x.shape[0]
        number = torch.arange(m, device=x.device).repeat_interleave(n)
        parts = self.bridge(x.repeat(m, *[1] * (x.ndim - 1)), number, **repeated(context, m))
        return self.noise(x) + parts.view(m, n).sum(0)

    def bridge(self, x: Tensor, number: Tensor, **context: Tensor) -> Tensor:
        """Energies of rows ``(n, *event)``, each of the bridge with its number ``(n,)``."""
        return self.bridges(x, **{self.level: number}, **context)

    def ends(self, x: Tensor, noise: Tensor) -> Tensor:
        """Build the two waymarks of each bridge from data ``(n, *event)`` and noise: ``(2, m, n, *event)``.

        Parameters
        ----------
        x
            Data.
        noise
            ``(m, n, *event)``, another draw for each bridge; the two ends of a bridge share it.
        """
        high = self.alphas.to(x.dtype)
        alphas = torch.stack((torch.cat((high.new_zeros(1), high[:-1])), high)).view(2, -1, *[1] * x.ndim)
        return (1.0 - alphas.square()).sqrt() * x + alphas * noise

    def extra_repr(self) -> str:
        """The number of bridges."""
        return f"{len(self.alphas)} bridges"


def geometric_alphas(bridges: int, width: float) -> tuple[float, ...]:
    r"""Waymarks whose variances grow by one factor from each to the next, for data narrower than the noise.

    .. math:: \alpha_k^2 = \frac{w^2}{1 - w^2} \left(w^{-2k/m} - 1\right)

    Parameters
    ----------
    bridges
        Their number, m.
    width
        w, the data's standard deviation over the noise's.

    Raises
    ------
    OptionError
        Unless there is a bridge, and the width lies between 0 and 1.
    """
    if bridges < 1 or not 0.0 < width < 1.0:
        raise OptionError(
            f"There are 1 or more bridges over a ratio of widths between 0 and 1; got {bridges}, {width}."
        )
    steps = [width**2 / (1.0 - width**2) * (width ** (-2.0 * k / bridges) - 1.0) for k in range(1, bridges)]
    return (*(math.sqrt(s) for s in steps), 1.0)


def _level_of(bridges: Energy, level: str | None) -> str:
    if level is None and len(bridges.context) == 1:
        return bridges.context[0]
    if level is None or level not in bridges.context:
        takes = ", ".join(bridges.context) or "none"
        raise OptionError(
            f"The bridges are one energy told its number by a context; {bridges!r} takes: {takes}, and level={level}. "
            "Build it with one, such as MLP(2, classes=4), and name it if there are several."
        )
    return level
