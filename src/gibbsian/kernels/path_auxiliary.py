r"""Path auxiliary proposals: several sites change in one step, drawn along a path that can be walked backwards.

A path from x is a sequence of changes :math:`\sigma_1, \ldots, \sigma_R` of R different sites, drawn one after another
without replacement with the locally balanced weights of x, :math:`w_i(x) = e^{d_i(x) / 2}`:

.. math::

   P_x(\sigma) = \prod_{r=1}^{R} \frac{w_{\sigma_r}(x)}{\sum_{i \notin \sigma_1 \ldots \sigma_{r-1}} w_i(x)}.

The way back undoes the same changes in reverse order :math:`\bar\sigma` with the weights of the end, so that one
gradient serves a whole path. Accepting with probability
:math:`\min(1, e^{E(x) - E(x')} P_{x'}(\bar\sigma) / P_x(\sigma))` leaves the density invariant. R is uniform on
1 ... 2 length - 1: a fixed even number of flips would never change the parity of a binary state. On one-hot states a
change is a site with its new class, and all changes of a site leave together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, check_carried, evaluate, metropolis, settings_repr
from gibbsian.kernels.discrete import DISCRETE, change_logits, check_states, gumbel, hot_at, is_one_hot, uniforms
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class PathAuxiliary:
    """Change several sites per gradient, along a path of the gradient's choice.

    The fast variant (PAFS) of `Path auxiliary proposal for MCMC in discrete space (Sun et al., 2022)
    <https://openreview.net/forum?id=JSR-YDImK95>`_, its sites drawn without replacement.

    Parameters
    ----------
    length
        Mean number of sites that a proposal changes; the number is drawn between 1 and ``2 * length - 1``, for every
        chain and step.

    Raises
    ------
    OptionError
        If the length is below 1, or an event has fewer sites than the longest path.
    """

    length: int = 2

    gradients = 1
    domain = DISCRETE
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        if self.length < 1:
            raise OptionError(f"length is the mean number of sites to change, 1 or more; got {self.length}.")

    @property
    def longest(self) -> int:
        """The most sites that one proposal changes."""
        return 2 * self.length - 1

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        sites = (x.shape[1:-1] if check_states(energy, x) else x.shape[1:]).numel()
        if self.longest > sites:
            raise OptionError(
                f"Paths of mean length {self.length} change up to {self.longest} different sites, and an event has "
                f"{sites}; use length={(sites + 1) // 2} or less."
            )
        return State(x, *evaluate(energy, x))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Uniform numbers of the shape of x, then two per chain: the length of the path, and whether to accept."""
        check_carried(self, state)
        shape = tuple(state.x.shape)
        return uniforms(steps, rng, state.x, shape, shape[:1], shape[:1])

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Draw a path, and accept with the probabilities of walking it both ways."""
        u, u_length, uniform = noise
        hot = is_one_hot(energy)
        logits = _by_site(change_logits(state.x, state.grad, hot), hot)
        # The largest of a site's noisy logits is as Gumbel noise on the sum of its weights: sorted sites are a path.
        best = (logits + gumbel(u).reshape(logits.shape)).max(2)
        path = best.values.topk(self.longest, 1).indices
        steps = torch.arange(self.longest, device=u.device)
        walked = steps < 1 + (u_length * self.longest).floor().unsqueeze(1)
        x = _walk(state.x, path, walked, best.indices, hot)
        new = State(x, *evaluate(energy, x))
        there = log_path(logits, best.indices, path, walked, back=False)
        before = _by_site(state.x, hot).argmax(2)
        back = log_path(_by_site(change_logits(x, new.grad, hot), hot), before, path, walked, back=True)
        return metropolis(state, new, state.energy - new.energy + back - there, uniform)


def log_path(logits: Tensor, classes: Tensor, path: Tensor, walked: Tensor, back: bool) -> Tensor:
    """Log-probability of a path, ``(n,)``.

    Parameters
    ----------
    logits
        Logarithms of the weights at its start, ``(n, sites, K)``; K is 1 on binary states.
    classes
        What each site changes into, ``(n, sites)``.
    path, walked
        Sites in the order of the way there, ``(n, longest)``, and which of them belong to the path.
    back
        Whether they are walked from the last to the first.
    """
    chosen = logits.gather(2, classes.unsqueeze(2)).squeeze(2).gather(1, path)
    whole = logits.logsumexp(2)
    along = whole.gather(1, path)
    elsewhere = whole.scatter(1, path, -torch.inf).logsumexp(1, keepdim=True)
    if back:
        # Still to be undone at r: sites 1 ... r, besides those that were never changed.
        rest = torch.where(walked, -torch.inf, along).logsumexp(1, keepdim=True)
        left = torch.where(walked, along, -torch.inf).logcumsumexp(1).logaddexp(rest)
    else:
        left = along.flip(1).logcumsumexp(1).flip(1)
    return torch.where(walked, chosen - left.logaddexp(elsewhere), 0.0).sum(1)


def _by_site(values: Tensor, hot: bool) -> Tensor:
    """``(n, *sites, K)`` or ``(n, *event)`` as ``(n, sites, K)``, K = 1 on binary states."""
    return values.reshape(values.shape[0], -1, values.shape[-1] if hot else 1)


def _walk(x: Tensor, path: Tensor, walked: Tensor, classes: Tensor, hot: bool) -> Tensor:
    """Make the changes of a path."""
    old = _by_site(x, hot)
    moves = torch.zeros(old.shape[:2], dtype=torch.bool, device=x.device).scatter(1, path, walked).unsqueeze(2)
    return torch.where(moves, hot_at(classes, old) if hot else 1.0 - old, old).reshape(x.shape)
