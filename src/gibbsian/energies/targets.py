r"""Closed-form densities with known log Z and exact draws: the yardsticks of samplers and of estimates of log Z.

Those of any dimension, and the double well; `toys` has the planar ones.

Two families, one face. Normalised ones are `Tractable`: their energy is :math:`-\log p` and ``log_z`` is 0. Classical
ones keep the form they have in the literature and are a `Target`: ``log_z`` is the known constant. Both answer to
``sample(n, rng)``, ``log_prob(x)`` and the float ``log_z``.

=====================  ==========================================  ==============================================
target                 energy, up to its documented constant       log Z
=====================  ==========================================  ==============================================
`GaussianMixture`      mixture of diagonal Gaussians               0
`Funnel`               Neal's funnel                               0
`DoubleWell`           one quartic and one Gaussian coordinate     10.293480 (one-dimensional quadrature)
`ManyWell`             independent double wells                    164.695675 for 32 dimensions
=====================  ==========================================  ==============================================
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.errors import OptionError

_LOG_TWO_PI = math.log(2.0 * math.pi)


class Target(Energy):
    """An energy in its classical, unnormalised form, whose log Z is known and which can be drawn from exactly.

    Attributes
    ----------
    log_z
        log of the integral of exp(-E), in nats.
    """

    event_shape: torch.Size  # pyright: ignore[reportIncompatibleVariableOverride]
    log_z: float

    @abstractmethod
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` independent points, ``(n, *event)``, on the energy's device.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the energy's device.
        """

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each row, in nats: ``(n, *event) -> (n,)``."""
        return -self(x) - self.log_z


@dataclass(frozen=True)
class Quantiles:
    """Draws on the line by inverting the distribution function of a density tabulated on a uniform grid.

    Between the knots the density is taken as linear, so that the law drawn from is within :math:`h^2 |p''|_1 / 12` of
    the true one in total variation: below 1e-6 for the densities that use it here. The tables stay in float64 on the
    CPU whatever the dtype of the energy, since rounded ones would be the larger error.

    Attributes
    ----------
    knots
        The grid, ``(points,)``.
    density
        The normalised density at the knots.
    cumulative
        The distribution function at the knots, 0 to 1.
    log_z
        log of the integral of exp(-energy) by the trapezoidal rule, which converges exponentially on densities that
        are smooth and vanish at both ends.
    """

    knots: Tensor
    density: Tensor
    cumulative: Tensor
    log_z: float

    @staticmethod
    def of(energy: Callable[[Tensor], Tensor], low: float, high: float, points: int = 1 << 14) -> Quantiles:
        """Tabulate exp(-energy) on ``[low, high]``, which must hold all but a negligible part of it."""
        knots = torch.linspace(low, high, points, dtype=torch.float64)
        log_p = -energy(knots)
        top = log_p.max()
        p = (log_p - top).exp()
        mass = 0.5 * (p[1:] + p[:-1]) * (high - low) / (points - 1)
        cumulative = torch.cat((mass.new_zeros(1), mass.cumsum(0)))
        total = cumulative[-1]
        return Quantiles(knots, p / total, cumulative / total, float(total.log() + top))

    def sample(self, n: int, rng: Generator, like: Tensor) -> Tensor:
        """Draw ``(n,)`` numbers of the dtype and on the device of ``like``."""
        u = torch.rand(n, generator=rng, device=like.device, dtype=torch.float64)
        knots, density, cumulative = (t.to(like.device) for t in (self.knots, self.density, self.cumulative))
        cell = torch.searchsorted(cumulative, u, right=True).clamp(1, knots.numel() - 1) - 1
        step = knots[1] - knots[0]
        left, slope = density[cell], (density[cell + 1] - density[cell]) / step
        rest = u - cumulative[cell]
        # The root of left t + slope t^2 / 2 = rest in the form that does not cancel when the slope is small.
        root = (left * left + 2.0 * slope * rest).clamp(min=0.0).sqrt()
        offset = 2.0 * rest / (left + root).clamp(min=torch.finfo(torch.float64).tiny)
        return (knots[cell] + offset.clamp(max=step)).to(like.dtype)


class GaussianMixture(Tractable):
    r"""A mixture of Gaussians with diagonal covariances.

    .. math:: E(x) = -\log \sum_k w_k \prod_i N(x_i; \mu_{ki}, \sigma_{ki}^2).

    Parameters
    ----------
    locs
        Means, ``(K, d)``.
    scales
        Standard deviations: a number, ``(K,)``, or ``(K, d)``.
    weights
        Positive, ``(K,)``; equal when left out, and divided by their sum.

    Raises
    ------
    OptionError
        If the shapes do not fit, or a scale or weight is not positive.
    """

    locs: Tensor
    scales: Tensor
    log_weights: Tensor

    def __init__(self, locs: Tensor, scales: float | Tensor = 1.0, weights: Tensor | None = None) -> None:
        super().__init__()
        locs = torch.as_tensor(locs)
        locs = locs if locs.is_floating_point() else locs.to(torch.get_default_dtype())
        if locs.ndim != 2:
            raise OptionError(f"The means of a mixture form a (K, d) tensor; got shape {tuple(locs.shape)}.")
        sigma = torch.as_tensor(scales, dtype=locs.dtype)
        w = locs.new_ones(locs.shape[0]) if weights is None else torch.as_tensor(weights, dtype=locs.dtype)
        fits = tuple(sigma.shape) in {(), (locs.shape[0],), tuple(locs.shape)} and w.shape == locs.shape[:1]
        if not fits or not bool((sigma > 0).all()) or not bool((w > 0).all()):
            raise OptionError(
                f"A mixture with means of shape {tuple(locs.shape)} takes positive scales of shape (), (K,) or (K, d), "
                f"and K positive weights; got scales of shape {tuple(sigma.shape)}, weights of shape {tuple(w.shape)}."
            )
        self.event_shape = locs.shape[1:]
        self.register_buffer("locs", locs.clone())
        self.register_buffer("scales", (sigma.unsqueeze(1) if sigma.ndim == 1 else sigma).expand(locs.shape).clone())
        self.register_buffer("log_weights", (w / w.sum()).log())

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density."""
        white = (batch_rows(x, self.event_shape).unsqueeze(1) - self.locs) / self.scales
        normalizer = self.scales.log().sum(1) + 0.5 * self.event_shape[0] * _LOG_TWO_PI
        return -torch.logsumexp(self.log_weights - normalizer - 0.5 * white.square().sum(2), dim=1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=rng)
        z = torch.randn((n, *self.event_shape), generator=rng, device=self.locs.device, dtype=self.locs.dtype)
        return self.locs[k] + self.scales[k] * z

    def extra_repr(self) -> str:
        """Dimension and number of components."""
        return f"{self.event_shape[0]}, components={self.locs.shape[0]}"


class Funnel(Tractable):
    r"""Neal's funnel: :math:`v = x_1 \sim N(0, s^2)`, and :math:`x_i \mid v \sim N(0, e^v)` for the others.

    `Slice sampling (Neal, 2003) <https://doi.org/10.1214/aos/1056562461>`_. Its width runs over orders of magnitude,
    which no single step size fits.

    Parameters
    ----------
    dim
        Number of coordinates, 2 or more.
    scale
        Standard deviation s of the first one.

    Raises
    ------
    OptionError
        If there are fewer than two coordinates or the scale is not positive.
    """

    scale: Tensor

    def __init__(self, dim: int = 10, scale: float = 3.0) -> None:
        super().__init__()
        if dim < 2 or not scale > 0:
            raise OptionError(f"A funnel has 2 or more coordinates and a positive scale; got dim={dim}, scale={scale}.")
        self.event_shape = torch.Size((dim,))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density."""
        x = batch_rows(x, self.event_shape)
        v, rest = x[:, 0], x[:, 1:]
        d = self.event_shape[0]
        constant = self.scale.log() + 0.5 * d * _LOG_TWO_PI
        return 0.5 * (v / self.scale).square() + 0.5 * ((-v).exp() * rest.square().sum(1) + (d - 1) * v) + constant

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        z = torch.randn((n, *self.event_shape), generator=rng, device=self.scale.device, dtype=self.scale.dtype)
        v = self.scale * z[:, :1]
        return torch.cat((v, (0.5 * v).exp() * z[:, 1:]), dim=1)

    def extra_repr(self) -> str:
        """Dimension and scale."""
        return f"{self.event_shape[0]}, scale={float(self.scale):.4g}"


class ManyWell(Target):
    r"""Independent double wells, one per pair of coordinates.

    .. math:: E(x) = \sum_{\text{pairs}} a x_1 + b x_1^2 + c x_1^4 + \tfrac{1}{2} x_2^2,

    with the pairs interleaved, :math:`(x_1, x_2), (x_3, x_4), \ldots`, and :math:`2^{d/2}` modes. The constants are
    those of `Flow annealed importance sampling bootstrap (Midgley et al., 2023) <https://arxiv.org/abs/2208.01893>`_.

    Parameters
    ----------
    dim
        Number of coordinates, even.
    a, b, c
        Linear, quadratic and quartic constants of the first coordinate of a pair.

    Raises
    ------
    OptionError
        If ``dim`` is not even and positive, or ``c`` is not positive.
    """

    linear: Tensor
    quadratic: Tensor
    quartic: Tensor

    def __init__(self, dim: int = 32, a: float = -0.5, b: float = -6.0, c: float = 1.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise OptionError(f"A many-well has pairs of coordinates: dim is even, 2 or more; got {dim}.")
        self.event_shape = torch.Size((dim,))
        for name, first, second in (("linear", a, 0.0), ("quadratic", b, 0.5), ("quartic", c, 0.0)):
            self.register_buffer(name, torch.tensor((first, second)).repeat(dim // 2))
        self.wells = _wells(a, b, c)
        self.log_z = dim // 2 * (self.wells.log_z + 0.5 * _LOG_TWO_PI)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the pairs' energies."""
        return _polynomial(batch_rows(x, self.event_shape), self.linear, self.quadratic, self.quartic)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points; the quartic coordinates by inversion, within 1e-6 in total variation each."""
        return _draw_wells(self.wells, n, self.event_shape[0] // 2, self.linear, rng)

    def extra_repr(self) -> str:
        """Dimension."""
        return f"{self.event_shape[0]}"


class DoubleWell(Target):
    r"""One double well in the plane: :math:`E(x) = a x_1 + b x_1^2 + c x_1^4 + x_2^2 / 2`.

    The form is that of `Boltzmann generators (Noé et al., 2019) <https://doi.org/10.1126/science.aaw1147>`_. With the
    default constants, :math:`x_1^4 - 6 x_1^2 - x_1 / 2 + x_2^2 / 2`, it is one pair of `ManyWell`; log Z is 10.293480.

    Parameters
    ----------
    a, b, c
        Linear, quadratic and quartic constants of the first coordinate.

    Raises
    ------
    OptionError
        If ``c`` is not positive.
    """

    linear: Tensor
    quadratic: Tensor
    quartic: Tensor
    event_shape = torch.Size((2,))

    def __init__(self, a: float = -0.5, b: float = -6.0, c: float = 1.0) -> None:
        super().__init__()
        for name, first, second in (("linear", a, 0.0), ("quadratic", b, 0.5), ("quartic", c, 0.0)):
            self.register_buffer(name, torch.tensor((first, second)))
        self.wells = _wells(a, b, c)
        self.log_z = self.wells.log_z + 0.5 * _LOG_TWO_PI

    def forward(self, x: Tensor) -> Tensor:
        """The polynomial."""
        return _polynomial(batch_rows(x, self.event_shape), self.linear, self.quadratic, self.quartic)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points; the quartic coordinate by inversion, within 1e-6 in total variation."""
        return _draw_wells(self.wells, n, 1, self.linear, rng)


def _polynomial(x: Tensor, linear: Tensor, quadratic: Tensor, quartic: Tensor) -> Tensor:
    # One coefficient vector per power: slices with a stride would make the compiled gradient several times slower.
    squared = x * x
    return (squared * (quartic * squared + quadratic) + linear * x).sum(1)


def _wells(a: float, b: float, c: float) -> Quantiles:
    if not c > 0:
        raise OptionError(f"A double well is bounded below only with a positive quartic constant; got c={c}.")

    def energy(x: Tensor) -> Tensor:
        return a * x + b * x**2 + c * x**4

    reach = 1.0
    while c * reach**4 - abs(b) * reach**2 - abs(a) * reach < 50.0:
        reach *= 1.1
    return Quantiles.of(energy, -reach, reach)


def _draw_wells(wells: Quantiles, n: int, pairs: int, like: Tensor, rng: Generator) -> Tensor:
    first = wells.sample(n * pairs, rng, like).reshape(n, pairs)
    second = torch.randn((n, pairs), generator=rng, device=like.device, dtype=like.dtype)
    return torch.stack((first, second), dim=2).flatten(1)
