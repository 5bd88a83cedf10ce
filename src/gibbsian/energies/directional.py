r"""Densities of directions: von Mises on the torus, von Mises-Fisher on the sphere, normalised and with exact draws.

Both say :math:`E(x) = \text{const} - \kappa\,\mu \cdot x` for unit vectors, in the plane as an angle,
:math:`-\kappa \cos(x - \mu)`. The cosine w with the axis has a density proportional to
:math:`e^{\kappa w} (1 - w^2)^{(d-3)/2}`; it is drawn by rejection from a transformed symmetric beta variable, at all
concentrations, zero included: `Simulation of the von Mises Fisher distribution (Wood, 1994)
<https://doi.org/10.1080/03610919408813161>`_.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gibbsian.energies.domains import Sphere, Torus
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.errors import OptionError, ShapeError

_LOG_TWO_PI = math.log(2.0 * math.pi)
_TURN = Torus(2.0 * math.pi)


class VonMises(Tractable):
    r"""Independent angles in :math:`[-\pi, \pi)`, each with its mean direction and concentration.

    .. math:: E(x) = \sum_i \log 2\pi I_0(\kappa_i) - \kappa_i \cos(x_i - \mu_i).

    `Directional Statistics (Mardia & Jupp, 2000) <https://doi.org/10.1002/9780470316979>`_, section 3.5.4.

    Parameters
    ----------
    loc
        Mean directions :math:`\mu` in radians, a tensor of the event's shape.
    concentration
        :math:`\kappa`, not negative: a number, or a tensor of the event's shape; 0 is uniform.

    Raises
    ------
    OptionError
        If ``loc`` has no axes or is not finite, or a concentration is negative or not finite.
    ShapeError
        If the concentration does not fit ``loc``.
    """

    loc: Tensor
    concentration: Tensor
    support = _TURN

    def __init__(self, loc: Tensor | Sequence[float], concentration: float | Tensor = 1.0) -> None:
        super().__init__()
        mean = torch.as_tensor(loc)
        mean = mean if mean.is_floating_point() else mean.to(torch.get_default_dtype())
        if mean.ndim < 1 or not bool(mean.isfinite().all()):
            raise OptionError(f"loc holds the finite mean direction of every angle, of the event's shape; got {loc}.")
        kappa = torch.as_tensor(concentration).to(mean.dtype)
        _check_concentration(kappa)
        if kappa.ndim and kappa.shape != mean.shape:
            raise ShapeError(f"The concentrations of angles {tuple(mean.shape)} have shape {tuple(kappa.shape)}.")
        self.event_shape = mean.shape
        self.register_buffer("loc", mean.clone())
        self.register_buffer("concentration", kappa.expand(mean.shape).clone())
        self.register_buffer("log_normalizer", (_LOG_TWO_PI + torch.special.i0e(self.concentration).log()).sum())

    log_normalizer: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density; the energy at the mode and twice the squared sines of half the deviations."""
        half = torch.sin(0.5 * (batch_rows(x, self.event_shape) - self.loc))
        # kappa (1 - cos a) = 2 kappa sin^2(a / 2), which does not cancel where kappa is large.
        return self.log_normalizer + (2.0 * self.concentration * half.square()).flatten(1).sum(1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        kappa = self.concentration.double().expand(n, *self.event_shape).flatten()
        gap = _gaps(kappa, 2, rng)
        angle = 2.0 * torch.atan2(gap.sqrt(), (2.0 - gap).sqrt())
        side = torch.randint(2, angle.shape, generator=rng, device=angle.device) * 2 - 1
        x = self.loc + (side * angle).reshape(n, *self.event_shape).to(self.loc.dtype)
        return _TURN.wrap(x)

    def extra_repr(self) -> str:
        """Shape and range of the concentrations."""
        low, high = float(self.concentration.min()), float(self.concentration.max())
        told = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        return f"{tuple(self.event_shape)}, concentration={told}"


class VonMisesFisher(Tractable):
    r"""Unit vectors around an axis, as a density against the area of the sphere.

    .. math:: E(x) = \log \frac{(2\pi)^{d/2} I_{d/2-1}(\kappa)}{\kappa^{d/2-1}} - \kappa\,\mu \cdot x.

    `Dispersion on a sphere (Fisher, 1953) <https://doi.org/10.1098/rspa.1953.0064>`_.

    Parameters
    ----------
    loc
        The axis, ``(d,)`` with d of 2 or more; it is brought to unit length.
    concentration
        :math:`\kappa`, not negative; 0 is uniform.

    Raises
    ------
    OptionError
        If the axis is no direction, or the concentration is negative or not finite.
    """

    loc: Tensor
    support = Sphere()

    def __init__(self, loc: Tensor | Sequence[float], concentration: float = 1.0) -> None:
        super().__init__()
        axis = torch.as_tensor(loc)
        axis = axis if axis.is_floating_point() else axis.to(torch.get_default_dtype())
        length = torch.linalg.vector_norm(axis.double())
        if axis.ndim != 1 or axis.shape[0] < 2 or not 0.0 < float(length) < math.inf:
            raise OptionError(f"loc is an axis: a finite vector (d,), not zero, with d of 2 or more; got {loc}.")
        _check_concentration(torch.as_tensor(concentration, dtype=torch.float64))
        self.event_shape = axis.shape
        self.concentration = float(concentration)
        self.register_buffer("loc", (axis.double() / length).to(axis.dtype))
        self.register_buffer("peak", torch.tensor(_log_mass(axis.shape[0], self.concentration), dtype=axis.dtype))

    peak: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density."""
        # The distance to the axis, not the cosine: kappa (1 - cos) does not cancel where kappa is large.
        away = batch_rows(x, self.event_shape) - self.loc
        return self.peak + (0.5 * self.concentration) * away.square().sum(1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        d, device = self.event_shape[0], self.loc.device
        axis = self.loc.double()
        gap = _gaps(torch.full((n,), self.concentration, dtype=torch.float64, device=device), d, rng)[:, None]
        z = torch.randn((n, d), generator=rng, dtype=torch.float64, device=device)
        across = z - (z @ axis)[:, None] * axis
        across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True)
        x = (1.0 - gap) * axis + (gap * (2.0 - gap)).sqrt() * across
        x = x.to(self.loc.dtype)
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)

    def extra_repr(self) -> str:
        """Dimension and concentration."""
        return f"{self.event_shape[0]}, concentration={self.concentration:.4g}"


def _check_concentration(kappa: Tensor) -> None:
    if not bool(((kappa >= 0) & kappa.isfinite()).all()):
        raise OptionError(f"A concentration is 0 (uniform) or more, and finite; got {kappa.tolist()}.")


def _log_mass(d: int, kappa: float) -> float:
    r"""Log of the integral of :math:`e^{\kappa (w - 1)}` over the sphere, by the series of the Bessel function.

    Its terms are all positive and largest before k reaches kappa / 2, so that nothing cancels at any kappa and d.
    """
    order = 0.5 * d - 1.0
    k = torch.arange(int(kappa + 20.0 * math.sqrt(kappa)) + 60, dtype=torch.float64)
    half = torch.tensor(0.5 * kappa, dtype=torch.float64)
    terms = torch.xlogy(2.0 * k, half) - torch.lgamma(k + 1.0) - torch.lgamma(k + 1.0 + order)
    return 0.5 * d * _LOG_TWO_PI - order * math.log(2.0) + float(torch.logsumexp(terms, 0)) - kappa


def _gaps(kappa: Tensor, d: int, rng: Generator) -> Tensor:
    """Draw 1 - w, with w the cosine with the axis, for each concentration of ``(m,)`` in float64."""
    options = {"generator": rng, "dtype": torch.float64, "device": kappa.device}
    out = torch.empty_like(kappa)
    left = torch.arange(kappa.shape[0], device=kappa.device)
    while left.numel():
        own = kappa[left]
        # Wood's b and x_0, which suits the envelope to the concentration; b falls from 1 to 0.
        b = (d - 1.0) / (2.0 * own + (4.0 * own.square() + (d - 1.0) ** 2).sqrt())
        x = (1.0 - b) / (1.0 + b)
        # A symmetric beta variable of (d - 1) / 2 is a ratio of sums of squares of normals.
        squares = torch.randn((left.numel(), 2, d - 1), **options).square().sum(2)
        z = squares[:, 0] / squares.sum(1)
        gap = 2.0 * b * z / (1.0 - (1.0 - b) * z)
        # kappa w + (d-1) log(1 - x w), less its largest value, reached at w = x.
        log_ratio = own * (1.0 - gap - x) + (d - 1.0) * torch.log((1.0 - x + x * gap) / (1.0 - x.square()))
        kept = torch.rand(left.numel(), **options).log() <= log_ratio
        out[left[kept]] = gap[kept]
        left = left[~kept]
    return out.clamp(0.0, 2.0)
