r"""Discrete Langevin: every site moves at once, each by its own softmax of the gradient.

The Gaussian proposal of Langevin dynamics, restricted to the states and normalised site by site,

.. math::

   q_\alpha(x'_s \mid x) \propto \exp\Big(-\tfrac12\, g_s \cdot (x'_s - x_s) - \frac{|x'_s - x_s|^2}{2\alpha}\Big),
   \qquad g = \nabla E(x),

is a product over sites. On binary states a bit flips with log-odds :math:`d_i / 2 - 1 / (2\alpha)`; on one-hot states,
where another class is at a squared distance of 2, class k has the logit :math:`d_{sk} / 2 - 1/\alpha` and the present
one 0. Adjusted, a proposal is accepted with probability
:math:`\min(1, e^{E(x) - E(x')}\, q_\alpha(x \mid x') / q_\alpha(x' \mid x))`. Unadjusted, the chain is biased; the bias
vanishes with :math:`\alpha` where the log-density is quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from gibbsian.kernels.base import (
    Info,
    State,
    check_carried,
    evaluate,
    metropolis,
    restarted,
    row_sum,
    settings_repr,
    with_origin,
)
from gibbsian.kernels.discrete import DISCRETE, check_states, gains, gumbel, hot_at, is_one_hot, uniforms
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.scales import over_chains
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class DiscreteLangevin:
    r"""Langevin dynamics on binary and one-hot states: DMALA when adjusted, DULA when not.

    `A Langevin-like sampler for discrete distributions (Zhang, Liu & Liu, 2022) <https://arxiv.org/abs/2206.09914>`_;
    the best acceptance of locally balanced proposals is about 0.574, `Optimal scaling for locally balanced proposals
    in discrete spaces (Sun, Dai & Schuurmans, 2022) <https://arxiv.org/abs/2209.08183>`_.

    Parameters
    ----------
    step_size
        :math:`\alpha`, in squared units of x; one, or one per chain ``(n,)``. The larger, the more sites change.
    adjusted
        Accept or reject, which makes the kernel exact; without it every move is taken, and the chain is biased.

    Raises
    ------
    OptionError
        If the step size is not positive.
    """

    step_size: Scalar
    adjusted: bool = True

    gradients = 1
    domain = DISCRETE
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)

    @property
    def target_acceptance(self) -> float | None:
        """0.574, or nothing to tune by when every move is taken."""
        return 0.574 if self.adjusted else None

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start; unadjusted chains remember it as the place to return to."""
        check_states(energy, x)
        state = State(x, *evaluate(energy, x))
        return state if self.adjusted else with_origin(state)

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Uniform numbers of the shape of x, and when adjusted one more per chain."""
        check_carried(self, state, origin=0 if self.adjusted else 3)
        shape = tuple(state.x.shape)
        return uniforms(steps, rng, state.x, shape, *([shape[:1]] if self.adjusted else []))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Propose all sites at once."""
        hot = is_one_hot(energy)
        forward = site_logits(state, self.step_size, hot)
        x = _draw(state.x, forward, noise[0], hot)
        new = State(x, *evaluate(energy, x), state.origin)
        if not self.adjusted:
            kept, gone = restarted(new)
            return kept, Info(torch.ones_like(kept.energy), gone.to(kept.energy.dtype))
        out = log_proposal(state.x, x, forward, hot)
        back = log_proposal(x, state.x, site_logits(new, self.step_size, hot), hot)
        return metropolis(state, new, state.energy - new.energy + back - out, noise[1])


def site_logits(state: State, step_size: Scalar, hot: bool) -> Tensor:
    """Log-odds of flipping each bit, or logits of the classes of each site; of the shape of x."""
    half = 0.5 * gains(state.x, state.grad, hot)
    price = 1.0 / over_chains(step_size, state.x)
    return half - price * (1.0 - state.x) if hot else half - 0.5 * price


def log_proposal(x: Tensor, to: Tensor, logits: Tensor, hot: bool) -> Tensor:
    """Log-probability of proposing ``to`` from x with the logits there, ``(n,)``."""
    if hot:
        return row_sum(logits.log_softmax(-1) * to)
    return row_sum(logsigmoid(torch.where(x == to, -logits, logits)))


def _draw(x: Tensor, logits: Tensor, u: Tensor, hot: bool) -> Tensor:
    if hot:
        return hot_at((logits + gumbel(u)).argmax(-1), x)
    return torch.where(u < logits.sigmoid(), 1.0 - x, x)
