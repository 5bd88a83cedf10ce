r"""The Barker proposal: a normal step whose every coordinate is turned around, or not, by the gradient.

With g the gradient of the energy in round coordinates, each coordinate of a step :math:`\sigma z`, z standard normal,
keeps its sign with probability :math:`1 / (1 + e^{\sigma z g})` and is reversed otherwise. The step w that results has
density :math:`2 \varphi(w) / (1 + e^{w g})` by coordinate, with :math:`\varphi` that of :math:`N(0, \sigma^2)`, so that

.. math:: \alpha = \min\Big\{1, e^{E(x) - E(x')} \prod_i \frac{1 + e^{w_i g_i}}{1 + e^{-w_i g_i'}}\Big\}.

The gradient chooses directions and never lengths: where it is huge the step is still of size :math:`\sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from gibbsian.kernels.base import Info, State, check_carried, evaluate, metropolis, row_sum, settings_repr
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.kernels.scales import check_scale, over_chains, stretch, stretch_gradient
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class Barker:
    r"""The Barker proposal, accepted or rejected: nearly MALA's speed, and a random walk's tolerance of bad settings.

    MALA's acceptance vanishes where a step is too long for the narrowest coordinate, or the gradient grows fast; here
    it falls slowly, so that a step size may be wrong by a factor of several and still serve.

    `The Barker proposal: combining robustness and efficiency in gradient-based MCMC (Livingstone & Zanella, 2022)
    <https://doi.org/10.1111/rssb.12482>`_; the best acceptance is about 0.57, by `Optimal design of the Barker proposal
    and other locally balanced Metropolis-Hastings algorithms (Vogrinc, Livingstone & Zanella, 2023)
    <https://doi.org/10.1093/biomet/asac056>`_.

    Parameters
    ----------
    step_size
        Standard deviation of a coordinate's step, in units of x (a pure number when there is a scale); one, or one per
        chain ``(n,)``. MALA's step of size h has :math:`\sqrt{2h}`.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; the coordinates that turn are then those in which the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    scale: Tensor | None = None

    gradients = 1
    gradients_together = 5
    domain = "real"
    target_acceptance = 0.57
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_scale(self.scale)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_scale(self.scale, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Two standard normals for each coordinate, ``(steps, n, 2, *event)``, then one uniform number per chain."""
        check_carried(self, state)
        x = state.x
        return normals_and_uniforms(steps, x.unsqueeze(1).expand(-1, 2, *x.shape[1:]), rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Turn coordinates, move, and accept with the ratio of densities and of proposal densities."""
        pair, uniform = noise
        w = over_chains(self.step_size, state.x) * pair[:, 0]
        grad = stretch_gradient(self.scale, state.grad)
        # The second normal makes a uniform number, with all the digits that small probabilities need.
        w = torch.where(torch.special.ndtr(pair[:, 1]) < torch.sigmoid(-w * grad), w, -w)
        x = state.x + stretch(self.scale, w)
        new = State(x, *evaluate(energy, x))
        back = stretch_gradient(self.scale, new.grad)
        # Probabilities by their logarithms, since 1 + exp(w g) overflows; each coordinate by itself, or sums would.
        log_ratio = state.energy - new.energy + row_sum(logsigmoid(w * back) - logsigmoid(-w * grad))
        return metropolis(state, new, log_ratio, uniform)
