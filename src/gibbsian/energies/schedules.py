r"""Schedules of noise: how much of a point is left at a time t, and how much noise has come.

.. math:: x_t = \alpha(t)\, x_0 + \sigma(t)\, \epsilon, \qquad \epsilon \sim N(0, I).

A *variance-exploding* schedule leaves points where they are, :math:`\alpha = 1`; a *variance-preserving* one shrinks
them so that data of variance 1 keep it, :math:`\alpha^2 + \sigma^2 = 1`. The two are one family of laws in other units:

.. math:: \frac{x_t}{\alpha(t)} = x_0 + r(t)\, \epsilon, \qquad r(t) = \frac{\sigma(t)}{\alpha(t)},

so that a point of any schedule, divided by :math:`\alpha`, is a point of the variance-exploding one at the noise level
r. That level is what :math:`\sigma` means to a noise-conditional energy, to a `Score` and to every sampler here; a
schedule is needed only where a network was trained with one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gibbsian.errors import OptionError

ENOUGH_NOISE = 5.0
"""Noise at the end of a schedule, in standard deviations of the data, below which it is refused: a start from pure
noise then has a variance wrong by more than 1/25."""


def rho_levels(high: float, low: float, steps: int, rho: float) -> list[float]:
    r"""Noise levels from ``high`` down to ``low``, evenly spaced in :math:`\sigma^{1/\rho}`; ``steps + 1`` of them.

    `Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
    <https://arxiv.org/abs/2206.00364>`_.
    """
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + i / steps * (b - a)) ** rho for i in range(steps + 1)]


class Schedule(ABC):
    r"""What schedules share: a range of times, and the way to noise levels of points that are not shrunk.

    A schedule tells :math:`\alpha(t)`, :math:`r(t) = \sigma(t) / \alpha(t)`, the time of a level r, and its levels.
    """

    @property
    @abstractmethod
    def start(self) -> float:
        """The time of least noise."""

    @property
    @abstractmethod
    def end(self) -> float:
        """The time of most noise."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """What is left of a point at each time, between 0 and 1."""

    @abstractmethod
    def ratio(self, t: Tensor) -> Tensor:
        r"""The noise level :math:`r = \sigma / \alpha` at each time, in units of the data."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The time at which the noise level is ``ratio``: the inverse of `ratio`."""

    @abstractmethod
    def levels(self, steps: int) -> list[float]:
        """Noise levels r from the noisiest to the cleanest in the schedule's own spacing, ``steps + 1`` of them."""

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in :math:`x_t`."""
        return self.alpha(t) * self.ratio(t)

    @property
    def sigma_min(self) -> float:
        """The least noise level r."""
        return float(self.ratio(torch.tensor(self.start, dtype=torch.float64)))

    @property
    def sigma_max(self) -> float:
        """The largest noise level r."""
        return float(self.ratio(torch.tensor(self.end, dtype=torch.float64)))

    def explode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map points of the schedule to points that are not shrunk.

        Parameters
        ----------
        x
            :math:`x_t`, ``(n, *event)``.
        t
            Time of each, ``(n,)``.

        Returns
        -------
        tuple
            :math:`x_t / \alpha` and the noise level r of each, ``(n,)``.
        """
        return x / wide(self.alpha(t), x), self.ratio(t)

    def preserve(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Map points with noise of standard deviation ``sigma`` to the schedule's: the inverse of `explode`.

        Returns
        -------
        tuple
            :math:`x_t` and the time of each.
        """
        t = self.time(sigma)
        return x * wide(self.alpha(t), x), t


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    r"""Noise alone: :math:`\alpha = 1`, and the time is the noise level itself, :math:`\sigma(t) = t`.

    The schedule of `Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
    <https://arxiv.org/abs/2206.00364>`_, with its levels, evenly spaced in :math:`\sigma^{1/\rho}`.

    Parameters
    ----------
    sigma_low, sigma_high
        The ends, in units of the data.
    rho
        How much denser the levels are at the low end.
    sigma_data
        Standard deviation of the data per coordinate, against which the largest level is judged.

    Raises
    ------
    OptionError
        If a setting is out of its range, or the schedule never reaches noise.
    """

    sigma_low: float = 0.002
    sigma_high: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not (0.0 < self.sigma_low < self.sigma_high < math.inf and self.rho > 0.0 and self.sigma_data > 0.0):
            raise OptionError(
                "A schedule needs 0 < sigma_low < sigma_high, a positive rho and a positive sigma_data; got "
                f"{self.sigma_low}, {self.sigma_high}, {self.rho}, {self.sigma_data}."
            )
        _check_noise(self, self.sigma_data, "Raise sigma_high")

    @property
    def start(self) -> float:
        """``sigma_low``."""
        return self.sigma_low

    @property
    def end(self) -> float:
        """``sigma_high``."""
        return self.sigma_high

    def alpha(self, t: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(t)

    def ratio(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def time(self, ratio: Tensor) -> Tensor:
        """The level itself."""
        return ratio

    def levels(self, steps: int) -> list[float]:
        """As in the class's formula."""
        return rho_levels(self.sigma_high, self.sigma_low, _steps(steps), self.rho)


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    r"""Noise that comes at a rate rising linearly in time, :math:`\beta(t) = \beta_0 + t (\beta_1 - \beta_0)`.

    .. math:: \alpha(t) = e^{-B(t)/2}, \quad \sigma^2(t) = 1 - e^{-B(t)}, \quad B(t) = \beta_0 t + \tfrac{1}{2}
              (\beta_1 - \beta_0) t^2, \qquad 0 < t \le 1.

    `Denoising diffusion probabilistic models (Ho et al., 2020) <https://arxiv.org/abs/2006.11239>`_ in the continuous
    form of `Score-based generative modeling through stochastic differential equations (Song et al., 2021)
    <https://arxiv.org/abs/2011.13456>`_. The data are taken to have variance 1.

    Parameters
    ----------
    beta_0, beta_1
        The rates at the ends.
    first
        The time of least noise, above 0.

    Raises
    ------
    OptionError
        If a setting is out of its range, or the schedule never reaches noise.
    """

    beta_0: float = 0.1
    beta_1: float = 20.0
    first: float = 1e-3

    def __post_init__(self) -> None:
        if not (0.0 < self.beta_0 < self.beta_1 < math.inf and 0.0 < self.first < 1.0):
            raise OptionError(
                f"A linear schedule needs 0 < beta_0 < beta_1 and first between 0 and 1; got {self.beta_0}, "
                f"{self.beta_1}, {self.first}."
            )
        _check_noise(self, 1.0, "Raise beta_1")

    @property
    def start(self) -> float:
        """``first``."""
        return self.first

    @property
    def end(self) -> float:
        """1."""
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """What is left at each time."""
        return (-0.5 * self._total(t)).exp()

    def ratio(self, t: Tensor) -> Tensor:
        """The noise level at each time."""
        return torch.expm1(self._total(t)).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        """The root of the quadratic, in the form that does not cancel at little noise."""
        total = torch.log1p(ratio.square())
        root = (self.beta_0**2 + 2.0 * (self.beta_1 - self.beta_0) * total).sqrt()
        return 2.0 * total / (self.beta_0 + root)

    def levels(self, steps: int) -> list[float]:
        """Evenly spaced in time."""
        return _evenly(self, steps)

    def _total(self, t: Tensor) -> Tensor:
        return t * (self.beta_0 + 0.5 * (self.beta_1 - self.beta_0) * t)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""A variance-preserving schedule that loses the signal along a quarter of a cosine.

    .. math:: \alpha(t) = \frac{\cos a(t)}{\cos a(0)}, \qquad a(t) = \frac{\pi}{2} \, \frac{t + s}{1 + s}.

    `Improved denoising diffusion probabilistic models (Nichol & Dhariwal, 2021) <https://arxiv.org/abs/2102.09672>`_.
    At t = 1 nothing would be left and the noise level would be infinite, so that it ends a little before.

    Parameters
    ----------
    offset
        s above.
    first, last
        The times of least and of most noise, within (0, 1).

    Raises
    ------
    OptionError
        If a setting is out of its range, or the schedule never reaches noise.
    """

    offset: float = 0.008
    first: float = 1e-3
    last: float = 0.995

    def __post_init__(self) -> None:
        if not (0.0 < self.offset < 1.0 and 0.0 < self.first < self.last < 1.0):
            raise OptionError(
                "A cosine schedule needs an offset between 0 and 1 and 0 < first < last < 1; got "
                f"{self.offset}, {self.first}, {self.last}."
            )
        _check_noise(self, 1.0, "Bring last nearer to 1")

    @property
    def start(self) -> float:
        """``first``."""
        return self.first

    @property
    def end(self) -> float:
        """``last``."""
        return self.last

    def alpha(self, t: Tensor) -> Tensor:
        """What is left at each time."""
        return self._angle(t).cos() / math.cos(self._first_angle)

    def ratio(self, t: Tensor) -> Tensor:
        """The noise level at each time."""
        a, b = self._first_angle, self._angle(t)
        # cos^2 a - cos^2 b as a product, which does not cancel at little noise.
        return ((a + b).sin() * (b - a).sin()).sqrt() / b.cos()

    def time(self, ratio: Tensor) -> Tensor:
        """The inverse tangent of what the level says of the angle."""
        a = self._first_angle
        tangent = (ratio.square() + math.sin(a) ** 2).sqrt() / math.cos(a)
        return tangent.atan() * (2.0 / math.pi) * (1.0 + self.offset) - self.offset

    def levels(self, steps: int) -> list[float]:
        """Evenly spaced in time."""
        return _evenly(self, steps)

    @property
    def _first_angle(self) -> float:
        return 0.5 * math.pi * self.offset / (1.0 + self.offset)

    def _angle(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * (t + self.offset) / (1.0 + self.offset)


@dataclass(frozen=True)
class Tabulated(Schedule):
    r"""A variance-preserving schedule told at whole times: :math:`\bar\alpha_i = \alpha^2(i)`, i = 0, 1, ..., N - 1.

    What a network of the diffusers library was trained with: ``Tabulated.of(scheduler.alphas_cumprod)``. Between the
    whole times :math:`\log r` is interpolated linearly, as such networks take broken times, too.

    Parameters
    ----------
    alpha_bar
        Falling, within (0, 1).

    Raises
    ------
    OptionError
        If the numbers do not fall within (0, 1), or the schedule never reaches noise.
    """

    alpha_bar: tuple[float, ...]

    def __post_init__(self) -> None:
        told = self.alpha_bar
        falls = all(a > b for a, b in pairwise(told))
        if len(told) < 2 or not falls or not (told[0] < 1.0 and told[-1] > 0.0):
            raise OptionError(
                "alpha_bar lists two or more numbers that fall within (0, 1), such as a scheduler's alphas_cumprod; "
                "got "
                f"{len(told)}, from {told[0] if told else 'none'} to {told[-1] if told else 'none'}. A last one of 0 "
                f"has "
                "no noise level: leave it out."
            )
        _check_noise(self, 1.0, "Make the betas larger or the steps more")

    @staticmethod
    def of(alpha_bar: Tensor) -> Tabulated:
        """Read a tensor of cumulative products."""
        return Tabulated(tuple(alpha_bar.double().tolist()))

    @staticmethod
    def linear(steps: int = 1000, beta_0: float = 1e-4, beta_1: float = 0.02) -> Tabulated:
        """Steps whose betas rise linearly, those of Ho et al. (2020) when left as they are."""
        return Tabulated.of((1.0 - torch.linspace(beta_0, beta_1, _steps(steps), dtype=torch.float64)).cumprod(0))

    @property
    def start(self) -> float:
        """0."""
        return 0.0

    @property
    def end(self) -> float:
        """The last whole time."""
        return float(len(self.alpha_bar) - 1)

    def alpha(self, t: Tensor) -> Tensor:
        """What is left at each time."""
        return (1.0 + self.ratio(t).square()).rsqrt()

    def ratio(self, t: Tensor) -> Tensor:
        """The noise level at each time."""
        logs = self._logs(t)
        below = t.floor().long().clamp(0, len(logs) - 2)
        return torch.lerp(logs[below], logs[below + 1], t - below.to(t.dtype)).exp()

    def time(self, ratio: Tensor) -> Tensor:
        """The time between the whole ones around a level; beyond the ends the line goes on."""
        logs, log_ratio = self._logs(ratio), ratio.log()
        below = (torch.searchsorted(logs, log_ratio.contiguous(), right=True) - 1).clamp(0, len(logs) - 2)
        return below.to(ratio.dtype) + (log_ratio - logs[below]) / (logs[below + 1] - logs[below])

    def levels(self, steps: int) -> list[float]:
        """Evenly spaced in time."""
        return _evenly(self, steps)

    def _logs(self, like: Tensor) -> Tensor:
        told = torch.tensor(self.alpha_bar, dtype=torch.float64)
        return (0.5 * ((1.0 - told) / told).log()).to(like.device, like.dtype)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value per row to multiply rows: ``(n,)`` and ``(n, *event)`` to ``(n, 1, ...)``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _evenly(schedule: Schedule, steps: int) -> list[float]:
    times = torch.linspace(schedule.end, schedule.start, _steps(steps) + 1, dtype=torch.float64)
    return schedule.ratio(times).tolist()


def _steps(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"A schedule is walked in a whole number of steps, 1 or more; got {steps!r}.")
    return steps


def _check_noise(schedule: Schedule, spread: float, remedy: str) -> None:
    largest = schedule.sigma_max
    if not largest >= ENOUGH_NOISE * spread:
        raise OptionError(
            f"This schedule never reaches noise: at its end the noise is {largest:.3g} for data of standard deviation "
            f"{spread:.3g}, and a walk that starts from pure noise would start wrong. {remedy} until it is "
            f"{ENOUGH_NOISE:.3g} times as much."
        )
