r"""Densities in the plane that are known exactly and can be drawn from: targets for samplers, and data sets for fits.

===================  ====================================================  ===========
density              what it tests                                         log Z
===================  ====================================================  ===========
`Rosenbrock`         a curved, narrow valley (the banana)                  closed form
`Ring`               a ridge that comes back to itself                     closed form
`EightGaussians`     separate modes                                        0
`Checkerboard`       edges, and regions without mass                       0
`Pinwheel`           curved arms                                           0
`TwoMoons`           two interleaved arcs, as scikit-learn draws them      0
===================  ====================================================  ===========

The last four are `Tractable`: their energy is exactly the negative log-density, so that a model fitted to their draws
can be compared with the truth, and not only with other draws.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from gibbsian.energies.targets import GaussianMixture, Quantiles, Target
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.errors import OptionError

_LOG_TWO_PI = math.log(2.0 * math.pi)


class Rosenbrock(Target):
    r"""The banana: Rosenbrock's function of two variables as an energy.

    .. math:: E(x) = \frac{(x_1 - a)^2 + b\,(x_2 - x_1^2)^2}{T}, \qquad \log Z = \log \frac{\pi T}{\sqrt{b}}.

    `An automatic method for finding the greatest or least value of a function (Rosenbrock, 1960)
    <https://doi.org/10.1093/comjnl/3.3.175>`_; :math:`x_1 \sim N(a, T/2)` and :math:`x_2 \mid x_1 \sim N(x_1^2, T/2b)`.

    Parameters
    ----------
    a
        Where the valley's floor is lowest.
    b
        Steepness of its walls.
    temperature
        T, in the units of the function.

    Raises
    ------
    OptionError
        If ``b`` or the temperature is not positive.
    """

    constants: Tensor
    event_shape = torch.Size((2,))

    def __init__(self, a: float = 1.0, b: float = 100.0, temperature: float = 1.0) -> None:
        super().__init__()
        if not b > 0 or not temperature > 0:
            raise OptionError(f"The banana needs b > 0 and temperature > 0; got b={b}, temperature={temperature}.")
        self.register_buffer("constants", torch.tensor((a, b, temperature)))
        self.log_z = math.log(math.pi * temperature / math.sqrt(b))

    def forward(self, x: Tensor) -> Tensor:
        """Rosenbrock's function over the temperature."""
        first, second = batch_rows(x, self.event_shape).unbind(1)
        a, b, temperature = self.constants.unbind()
        return ((first - a).square() + b * (second - first * first).square()) / temperature

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        a, b, temperature = self.constants.unbind()
        z = torch.randn((n, 2), generator=rng, device=self.constants.device, dtype=self.constants.dtype)
        first = a + (0.5 * temperature).sqrt() * z[:, 0]
        return torch.stack((first, first.square() + (0.5 * temperature / b).sqrt() * z[:, 1]), dim=1)

    def extra_repr(self) -> str:
        """The constants."""
        a, b, temperature = self.constants.tolist()
        return f"a={a:.4g}, b={b:.4g}, temperature={temperature:.4g}"


class Ring(Target):
    r"""A Gaussian shell in the plane: :math:`E(x) = (|x| - R)^2 / 2\sigma^2`.

    .. math:: Z = 2\pi \left(\sigma^2 e^{-R^2 / 2\sigma^2} + R \sigma \sqrt{2\pi}\, \Phi(R / \sigma)\right).

    Parameters
    ----------
    radius
        R, not negative.
    scale
        σ, the standard deviation across the shell.

    Raises
    ------
    OptionError
        If the radius is negative or the scale is not positive.
    """

    radius: Tensor
    scale: Tensor
    event_shape = torch.Size((2,))

    def __init__(self, radius: float = 3.0, scale: float = 0.2) -> None:
        super().__init__()
        if radius < 0 or not scale > 0:
            raise OptionError(f"A ring has radius >= 0 and scale > 0; got radius={radius}, scale={scale}.")
        self.register_buffer("radius", torch.tensor(float(radius)))
        self.register_buffer("scale", torch.tensor(float(scale)))
        ratio = radius / scale
        inside = 0.5 * math.erfc(-ratio / math.sqrt(2.0))
        bracket = math.exp(-0.5 * ratio**2) + ratio * math.sqrt(2.0 * math.pi) * inside
        self.log_z = _LOG_TWO_PI + 2.0 * math.log(scale) + math.log(bracket)
        self.radii = Quantiles.of(
            lambda r: 0.5 * ((r - radius) / scale) ** 2 - r.log(),
            max(0.0, radius - 10.0 * scale),
            radius + 10.0 * scale,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Half the squared distance to the circle, in units of the scale."""
        r = torch.linalg.vector_norm(batch_rows(x, self.event_shape), dim=1)
        return 0.5 * ((r - self.radius) / self.scale).square()

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points; the radius by inversion, within 1e-6 in total variation."""
        r = self.radii.sample(n, rng, self.radius)
        angle = 2.0 * math.pi * torch.rand(n, generator=rng, device=r.device, dtype=r.dtype)
        return torch.stack((r * angle.cos(), r * angle.sin()), dim=1)

    def extra_repr(self) -> str:
        """Radius and scale."""
        return f"radius={float(self.radius):.4g}, scale={float(self.scale):.4g}"


class EightGaussians(Tractable):
    """Eight equal Gaussians around a circle.

    Parameters
    ----------
    radius
        Of the circle of means.
    scale
        Standard deviation of each Gaussian.
    """

    event_shape = torch.Size((2,))

    def __init__(self, radius: float = 2.0 * math.sqrt(2.0), scale: float = 0.25 * math.sqrt(2.0)) -> None:
        super().__init__()
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4.0)
        locs = radius * torch.stack((angle.cos(), angle.sin()), dim=1)
        self.mixture = GaussianMixture(locs.to(torch.get_default_dtype()), scale)

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density."""
        return self.mixture(x)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        return self.mixture.sample(n, rng)


class Checkerboard(Tractable):
    """Uniform on the eight black squares, two by two each, of the board ``[-4, 4]^2``; infinite energy elsewhere.

    The energy is flat where it is finite: a chain that follows its gradient finds none, and a proposal outside is
    rejected. It is a data set, and a test of how a fit copes with edges, rather than a target for gradient samplers.
    """

    corners: Tensor
    event_shape = torch.Size((2,))

    def __init__(self) -> None:
        super().__init__()
        squares = [(2.0 * i, 2.0 * j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
        self.register_buffer("corners", torch.tensor(squares))

    def forward(self, x: Tensor) -> Tensor:
        """Give log 32, the log-area of the black squares, on them; infinity elsewhere."""
        x = batch_rows(x, self.event_shape)
        parity = torch.floor(0.5 * x).sum(1).remainder(2.0)
        black = (parity == 0.0) & (x.abs() <= 4.0).all(1)
        # The product with zero keeps the (vanishing) gradient defined for kernels that ask for one.
        return torch.where(black, math.log(32.0), torch.inf) + 0.0 * x.sum(1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        device, dtype = self.corners.device, self.corners.dtype
        square = torch.randint(self.corners.shape[0], (n,), generator=rng, device=device)
        return self.corners[square] + 2.0 * torch.rand((n, 2), generator=rng, device=device, dtype=dtype)


class Pinwheel(Tractable):
    r"""Arms around the origin, bent by a rotation whose angle grows with the radius.

    A Gaussian arm, of mean :math:`(m, 0)`, is repeated around the circle and every point is turned by
    :math:`\theta(r) = \rho\, e^{r / m}`. Turning each circle by an angle of its own keeps areas, so that the density
    at a point is the straight arms' density at the point turned back: exact, without a Jacobian. (The usual recipe
    turns by an angle that depends on the first coordinate, and has no such density.)

    Parameters
    ----------
    arms
        Their number.
    mean
        m, the distance of the arms' centres.
    along, across
        Standard deviations along and across an arm.
    rate
        ρ, the bend in radians.

    Raises
    ------
    OptionError
        If there is no arm, or a length is not positive.
    """

    locs: Tensor
    scales: Tensor
    event_shape = torch.Size((2,))

    def __init__(
        self, arms: int = 5, mean: float = 2.0, along: float = 0.6, across: float = 0.1, rate: float = 0.25
    ) -> None:
        super().__init__()
        if arms < 1 or not min(mean, along, across) > 0:
            raise OptionError(
                f"A pinwheel has 1 or more arms of positive lengths; got {arms}, {(mean, along, across)}."
            )
        self.register_buffer("locs", torch.tensor((mean, 0.0)))
        self.register_buffer("scales", torch.tensor((along, across)))
        angle = torch.arange(arms, dtype=torch.float64) * (2.0 * math.pi / arms)
        self.register_buffer("angles", angle.to(torch.get_default_dtype()))
        self.rate = float(rate)

    angles: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density."""
        r = torch.linalg.vector_norm(batch_rows(x, self.event_shape), dim=1)
        straight = _turned(x.unsqueeze(1), -(self._bend(r).unsqueeze(1) + self.angles))
        white = (straight - self.locs) / self.scales
        constant = self.scales.log().sum() + _LOG_TWO_PI + math.log(self.angles.numel())
        return constant - torch.logsumexp(-0.5 * white.square().sum(2), dim=1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        device, dtype = self.locs.device, self.locs.dtype
        arm = torch.randint(self.angles.numel(), (n,), generator=rng, device=device)
        straight = self.locs + self.scales * torch.randn((n, 2), generator=rng, device=device, dtype=dtype)
        return _turned(straight, self._bend(torch.linalg.vector_norm(straight, dim=1)) + self.angles[arm])

    def _bend(self, r: Tensor) -> Tensor:
        return self.rate * (r / self.locs[0]).exp()


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., 0], x[..., 1]
    return torch.stack((cos * first - sin * second, sin * first + cos * second), dim=-1)


class TwoMoons(Tractable):
    r"""Two half circles of radius 1, blurred by a Gaussian: the geometry of ``sklearn.datasets.make_moons``.

    A point is :math:`c(t) + \sigma z` with a uniform angle t on one of two arcs, :math:`(\cos t, \sin t)` or
    :math:`(1 - \cos t, \tfrac{1}{2} - \sin t)`, so the density is an integral over t of Gaussians. It is done by
    Gauss-Legendre quadrature with :math:`16/\sigma` nodes: the energy is right to 1e-6 nats within distance 3 of the
    origin, and the density everywhere to 1e-6. As the nodes' weights are probabilities, it integrates to 1 in any case.

    Parameters
    ----------
    noise
        σ, the standard deviation of the blur.

    Raises
    ------
    OptionError
        If the noise is below 0.01, which would take thousands of nodes, or not below 10.
    """

    nodes: Tensor
    log_weights: Tensor
    noise: Tensor
    event_shape = torch.Size((2,))

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        if not 0.01 <= noise < 10.0:
            raise OptionError(f"The moons' noise lies between 0.01 and 10; got {noise}.")
        abscissae, weights = np.polynomial.legendre.leggauss(max(16, math.ceil(16.0 / noise)))
        t = 0.5 * math.pi * (torch.from_numpy(abscissae) + 1.0)
        nodes = torch.cat(_arcs(t))
        log_weights = torch.from_numpy(weights / weights.sum()).repeat(2).log() - math.log(2.0)
        dtype = torch.get_default_dtype()
        self.register_buffer("nodes", nodes.to(dtype))
        self.register_buffer("log_weights", log_weights.to(dtype))
        self.register_buffer("noise", torch.tensor(float(noise)))

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density."""
        first, second = batch_rows(x, self.event_shape).unsqueeze(2).unbind(1)
        # Coordinate by coordinate, for the (n, nodes, 2) differences are several times slower to go through.
        squared = (first - self.nodes[:, 0]).square() + (second - self.nodes[:, 1]).square()
        constant = _LOG_TWO_PI + 2.0 * self.noise.log()
        return constant - torch.logsumexp(self.log_weights - squared * (0.5 / self.noise.square()), dim=1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        device, dtype = self.noise.device, self.noise.dtype
        t = math.pi * torch.rand(n, generator=rng, device=device, dtype=dtype)
        lower = torch.randint(2, (n, 1), generator=rng, device=device).bool()
        above, below = _arcs(t)
        return torch.where(lower, below, above) + self.noise * torch.randn(
            (n, 2), generator=rng, device=device, dtype=dtype
        )

    def extra_repr(self) -> str:
        """The noise."""
        return f"noise={float(self.noise):.4g}"


def _arcs(t: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = t.cos(), t.sin()
    return torch.stack((cos, sin), dim=1), torch.stack((1.0 - cos, 0.5 - sin), dim=1)
