r"""Gibbs with gradients: which site changes is drawn from the gradient, and the draw is corrected.

With :math:`d` the first-order changes of the log-density (see `discrete`), a change i is proposed with

.. math:: q(i \mid x) = \frac{e^{d_i(x) / 2}}{\sum_j e^{d_j(x) / 2}},

and accepted with probability :math:`\min(1, e^{E(x) - E(x')}\, q(i \mid x') / q(i \mid x))`, where the way back has the
gradient at x'. The square root balances the proposal locally: were d exact, only the two sums would differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, metropolis, settings_repr
from gibbsian.kernels.discrete import (
    DISCRETE,
    change_at,
    change_logits,
    changed,
    check_states,
    index_back,
    is_one_hot,
    pick,
    uniforms,
)
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class GibbsWithGradients:
    """Change one site at a time, preferring the sites where the gradient promises most.

    `Oops I took a gradient: scalable sampling for discrete distributions (Grathwohl et al., 2021)
    <https://arxiv.org/abs/2102.04509>`_.

    Parameters
    ----------
    flips
        Proposals per step, made one after another; each costs a gradient.

    Raises
    ------
    OptionError
        If there is no proposal to make.
    """

    flips: int = 1

    domain = DISCRETE
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        if self.flips < 1:
            raise OptionError(f"flips counts the proposals of a step, 1 or more; got {self.flips}.")

    @property
    def gradients(self) -> int:
        """One per proposal."""
        return self.flips

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_states(energy, x)
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Two uniform numbers per proposal: what to change, and whether to accept."""
        check_carried(self, state)
        shape = (state.x.shape[0], self.flips)
        return uniforms(steps, rng, state.x, shape, shape)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Propose and decide, ``flips`` times."""
        which, uniform = noise
        acceptance, nonfinite = [], []
        for i in range(self.flips):
            state, info = one_change(energy, state, which[:, i], uniform[:, i])
            acceptance.append(info.acceptance)
            nonfinite.append(info.nonfinite)
        return state, Info(torch.stack(acceptance).mean(0), torch.stack(nonfinite).sum(0))


def one_change(energy: EnergyFn, state: State, which: Tensor, uniform: Tensor) -> tuple[State, Info]:
    """Propose one change in each chain and accept or reject it."""
    hot = is_one_hot(energy)
    forward = change_logits(state.x, state.grad, hot).flatten(1).log_softmax(1)
    index = pick(forward.exp(), which)
    change = change_at(state.x, index, hot)
    x = changed(state.x, change, hot)
    new = State(x, *evaluate(energy, x))
    backward = change_logits(x, new.grad, hot).flatten(1).log_softmax(1)
    back = backward.gather(1, index_back(x, change, hot).unsqueeze(1)).squeeze(1)
    log_ratio = state.energy - new.energy + back - forward.gather(1, index.unsqueeze(1)).squeeze(1)
    return metropolis(state, new, log_ratio, uniform)
