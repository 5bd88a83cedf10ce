r"""Stein variational gradient descent: particles that fall in energy together and push each other apart.

With the kernel :math:`k(x, y) = e^{-|x - y|^2 / (2 b^2)}`, the n particles move by

.. math:: x_i' = x_i + \frac{\varepsilon}{n} \sum_j \Big( -k(x_j, x_i)\, \nabla E(x_j)
   + k(x_j, x_i)\, \frac{x_i - x_j}{b^2} \Big).

Among directions of unit norm in the space of the kernel it is the one in which the Kullback-Leibler divergence of the
particles' law from the target falls fastest. The first term is gradient descent, shared among neighbours; the second
alone keeps the particles from meeting in the mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, restarted, settings_repr, with_origin
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.scales import over_chains
from gibbsian.typing import EnergyFn, Scalar

MOST = 10_000
"""Particles at most: a matrix of all pairs then takes 400 MB in float32, and a step holds a few of them."""

FEW = 32
"""Coordinates up to which distances are sums of squared differences; for more, a matrix product is faster by far."""


@dataclass(frozen=True)
class SVGD:
    r"""Stein variational gradient descent: no noise, no rejection; a set of points that stands for the target.

    The particles are no chains: one step of one depends on all, and averages are over particles at the end, not over
    steps. Few serve for means, at low dimension for variances too; in many dimensions the kernel hardly tells distances
    apart and variances come out too small. Particles that start at one place stay together, so start them spread out.
    A particle whose energy or gradient is no longer finite returns to where it started, and is counted.

    `Stein variational gradient descent: a general purpose Bayesian inference algorithm (Liu & Wang, 2016)
    <https://arxiv.org/abs/1608.04471>`_; variances that are too small are the subject of `Towards characterizing
    the high-dimensional bias of kernel-based particle inference algorithms (Ba et al., 2019)
    <https://openreview.net/forum?id=Byg9KJn4Fr>`_.

    Parameters
    ----------
    step_size
        :math:`\varepsilon`, in squared units of x per nat; one, or one per particle ``(n,)``.
    bandwidth
        b, the distance over which particles feel each other, in units of x. When ``None`` it follows the particles by
        the median heuristic, :math:`b^2 = \operatorname{median} |x_i - x_j|^2 / (2 \log(n + 1))` over pairs
        :math:`i \ne j`, so that the neighbours of a particle weigh together about as much as itself.

    Raises
    ------
    OptionError
        If a setting is out of its range, or there are more than `MOST` particles.
    """

    step_size: Scalar
    bandwidth: Scalar | None = None

    gradients = 1
    domain = "real"
    adjusted = False
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("bandwidth", self.bandwidth)
        if isinstance(self.bandwidth, Tensor) and self.bandwidth.ndim > 0:
            raise OptionError(f"bandwidth is one number for all pairs; got shape {tuple(self.bandwidth.shape)}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, and remember it as the place to return to."""
        if x.shape[0] > MOST:
            raise OptionError(
                f"SVGD moves at most {MOST} particles, as its memory grows with the square of their number; got "
                f"{x.shape[0]}. Take fewer, or a kernel whose chains are independent (MALA, HMC, ULA)."
            )
        return with_origin(State(x, *evaluate(energy, x)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Return one empty row per step: there is no noise, and nothing by chain, so that all particles move together.

        Raises
        ------
        ArgumentTypeError
            If the state comes from another kernel.
        """
        check_carried(self, state, origin=3)
        return (state.x.new_zeros(steps),)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Move all particles along the direction above."""
        way = stein_direction(state.x.flatten(1), state.grad.flatten(1), self.bandwidth).reshape(state.x.shape)
        x = state.x + over_chains(self.step_size, way) * way
        kept, gone = restarted(State(x, *evaluate(energy, x), state.origin))
        return kept, Info(torch.ones_like(kept.energy), gone.to(kept.energy.dtype))


def stein_direction(x: Tensor, grad: Tensor, bandwidth: Scalar | None = None) -> Tensor:
    r"""Return the direction of the module's head, :math:`(x_i' - x_i) / \varepsilon`.

    Parameters
    ----------
    x, grad
        Particles and gradients of the energy there, ``(n, d)``.
    bandwidth
        b, or ``None`` for the median heuristic.
    """
    n = x.shape[0]
    # About their mean, since sums and products of what is far from zero round its differences away.
    y = x - x.mean(0)
    mode = "donot_use_mm_for_euclid_dist" if x.shape[1] <= FEW else "use_mm_for_euclid_dist"
    squares = torch.cdist(y, y, compute_mode=mode).square()
    b2 = median_of_pairs(squares) / (2.0 * math.log(n + 1.0)) if bandwidth is None else bandwidth * bandwidth
    k = (-squares / (2.0 * b2)).exp()
    # The sum of k (x_i - x_j) by one product, without the n x n x d differences.
    apart = k.sum(1, keepdim=True) * y - k @ y
    return (apart / b2 - k @ grad) / n


def median_of_pairs(squares: Tensor) -> Tensor:
    """Median over pairs i < j of a symmetric matrix ``(n, n)``; 1 where half of them, or all, are zero or absent."""
    n = squares.shape[0]
    if n == 1:
        return squares.new_ones(())
    # The n zeros of the diagonal come first, then each pair twice.
    middle = torch.kthvalue(squares.flatten(), n + 2 * ((n * (n - 1) // 2 + 1) // 2)).values
    return torch.where(middle > 0, middle, 1.0)
