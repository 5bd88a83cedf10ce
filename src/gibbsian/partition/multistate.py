r"""log Z from draws of two densities, or of several: bridge sampling and the multistate acceptance ratio.

Where densities overlap, the draws of each say how large the others are. Given draws of K states, :math:`n_k` of each,
the odds that a point x among them came from state i are those of a multinomial logistic model,

.. math:: p_i(x) = \frac{n_i e^{-E_i(x)} / Z_i}{\sum_k n_k e^{-E_k(x)} / Z_k} ,

and the log Z that make the sum of :math:`p_i` over all draws equal to :math:`n_i`, for every i, have the least
variance, asymptotically, that these draws allow. For two states this is the optimal bridge, and Bennett's acceptance
ratio. Only ratios of Z can be told: one of the states is the base whose log Z is known.

No ratio can be told between densities without overlap, and the formula does not see it: it gives a number and a small
error. Hence ``ess``, the number of draws times :math:`1 - \lambda_2`, the spectral gap of the overlap matrix
:math:`O_{ij} = \sum_x p_i(x) p_j(x) / n_i`. It is all of them when the states are one; when they fall into two equal
halves, about 4 for each draw that could as well be of either half. Below 40 there is a warning.

`Simulating ratios of normalizing constants via a simple identity (Meng & Wong, 1996)
<https://www3.stat.sinica.edu.tw/statistica/j6n4/j6n43/j6n43.htm>`_;
`Statistically optimal analysis of samples from multiple equilibrium states (Shirts & Chodera, 2008)
<https://arxiv.org/abs/0801.1426>`_; `Estimating normalizing constants and reweighting mixtures (Geyer, 1994)
<https://hdl.handle.net/11299/58433>`_ for the error with draws from chains.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import common_event_shape
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError, ShapeError
from gibbsian.partition.base import LogZ, lower_bound, worth
from gibbsian.partition.bracket import acceptance_ratio

CHUNK = 1 << 14
"""Draws at which an energy is evaluated at once."""

OVERLAP = 40.0
"""An ``ess`` below this: fewer than ten draws link two halves of the states."""


class Multistate(NamedTuple):
    """What `mbar` found of K states.

    Attributes
    ----------
    value
        log Z of each, ``(K,)``; that of the base is as given.
    covariance
        Of their errors, ``(K, K)``, asymptotically; row and column of the base are 0. For the error of a difference,
        see `difference`.
    overlap
        The matrix O over the states with draws, ``(S, S)``: rows sum to 1, the identity when no two states overlap.
    ess
        Effective draws behind each state, ``(K,)``: see above; for a state without draws the effective number of its
        weights, where that is smaller.
    draws
        How many draws there were.
    """

    value: Tensor
    covariance: Tensor
    overlap: Tensor
    ess: Tensor
    draws: int

    @property
    def stderr(self) -> Tensor:
        """Standard error of each, ``(K,)``."""
        return self.covariance.diagonal().sqrt()

    def log_z(self, state: int) -> LogZ:
        """One state's log Z. It has no bounds."""
        return self._as_log_z(self.value[state], self.covariance[state, state], self.ess[state])

    def difference(self, state: int, other: int) -> LogZ:
        """Log Z of one state less that of another, with the error of the difference."""
        c = self.covariance
        variance = c[state, state] + c[other, other] - 2.0 * c[state, other]
        ess = torch.minimum(self.ess[state], self.ess[other])
        return self._as_log_z(self.value[state] - self.value[other], variance, ess)

    def _as_log_z(self, value: Tensor, variance: Tensor, ess: Tensor) -> LogZ:
        none = torch.full_like(value, torch.inf)
        return LogZ(value, variance.clamp(min=0.0).sqrt(), -none, none, ess, self.draws)


@torch.no_grad()
def bridge(
    energy: Energy,
    base: Energy,
    draws: Tensor,
    base_draws: Tensor,
    *,
    base_log_z: float = 0.0,
    confidence: float = 0.99,
) -> LogZ:
    r"""Estimate log Z by bridge sampling: from draws of the energy and draws of a base, without anything in between.

    Best when the base was fitted to the energy: a Gaussian with its moments, an earlier model of a training run, a
    flow. A base far from it takes `bracket`, or states in between and `mbar`.

    Parameters
    ----------
    energy
        The energy whose log Z is sought.
    base
        One whose log Z is known.
    draws, base_draws
        Draws of each: independent ones ``(n, *event)``, or those of chains, ``(draws, chains, *event)``, as
        `Samples.draws`, 4 draws or more; the error then counts their correlation.
    base_log_z
        log Z of the base: 0 when it is tractable. With 0 for another base the result is the difference to it.
    confidence
        Probability with which ``lower <= log Z <= upper``, both at once, given independent draws or independent chains
        that start in equilibrium.

    Returns
    -------
    LogZ
        The bounds hold for any number of draws, but say little where the densities differ much; see above for ``ess``.

    Raises
    ------
    ShapeError, ArgumentTypeError, OptionError
        If the draws do not fit the energies.
    DivergenceError
        If an energy is not finite at its own draws.
    """
    if not 0.0 < confidence < 1.0:
        raise OptionError(f"confidence lies between 0 and 1; got {confidence}.")
    pair = [Energy.of(base), Energy.of(energy)]
    sets = read_draws(pair, [base_draws, draws])
    u = [energies_at(e, sets).split([s.count for s in sets]) for e in pair]
    _check_own([u[0][0], u[1][1]], sets)
    ahead, back = (s.arranged(u[0][i] - u[1][i]) for i, s in enumerate(sets))
    ratio, error = acceptance_ratio(ahead, back)
    odds = math.log(sets[0].count / sets[1].count)
    # A base draw is the energy's with the first of these probabilities, and a draw of the energy the base's.
    sides = [(ahead - ratio - odds).sigmoid().nan_to_num(), (ratio + odds - back).sigmoid().nan_to_num()]
    total, linked = sets[0].count + sets[1].count, 0.5 * (sides[0].sum() + sides[1].sum())
    share = torch.stack([worth(p) / p.numel() for p in sides]).min()
    ess = linked * total**2 / (sets[0].count * sets[1].count) * share.clamp(max=1.0)
    _warn_if_apart(ess, total)
    each = 0.5 * (1.0 + confidence)
    low, high = lower_bound(_means(ahead), each), -lower_bound(_means(-back), each)
    bad = sum(int((~torch.isfinite(w)).sum()) for w in (ahead, back))
    return LogZ(ratio + base_log_z, error, low + base_log_z, high + base_log_z, ess, total, bad)


@torch.no_grad()
def mbar(
    energies: Sequence[Energy], draws: Sequence[Tensor | None], *, base: int = 0, base_log_z: float = 0.0
) -> Multistate:
    r"""Estimate log Z of several energies at once, from draws of some of them (multistate Bennett acceptance ratio).

    States that follow each other closely, as rungs of a ladder of temperatures or stages of training, tell all their
    ratios together, each draw serving every state that it could have come from.

    Parameters
    ----------
    energies
        K energies over one space. Every one is evaluated at all draws.
    draws
        For each energy its draws, as in `bridge`; ``None`` for a state that was not sampled, whose log Z the draws of
        the others tell.
    base
        Which of them has a known log Z; one with draws.
    base_log_z
        Its log Z.

    Raises
    ------
    ShapeError, ArgumentTypeError, OptionError
        If the draws do not fit the energies, or fewer than two states, or not the base, have some.
    DivergenceError
        If an energy is not finite at its own draws.
    """
    states = [Energy.of(e) for e in energies]
    if len(states) != len(draws):
        raise OptionError(f"Each of {len(states)} energies has its draws, or None; got {len(draws)}.")
    own = [k for k, d in enumerate(draws) if d is not None]
    if len(own) < 2 or base % max(len(states), 1) not in own:
        raise OptionError(f"Two states or more, the base among them, have draws; got draws of {own} and base={base}.")
    base = base % len(states)
    sets = read_draws([states[k] for k in own], [d for d in draws if d is not None])
    u = torch.stack([energies_at(e, sets) for e in states])
    sizes = torch.tensor([s.count for s in sets], dtype=torch.float64, device=u.device)
    ends = u[own].split([s.count for s in sets], 1)
    _check_own([part[i] for i, part in enumerate(ends)], sets)
    # A state without weight at a draw is infinitely far from it; NaN in another state's energy is no more than that.
    u = u.nan_to_num(nan=torch.inf, posinf=torch.inf)
    b = _solve(u[own], sizes, _first_guess(ends, sizes))
    log_p = b.unsqueeze(1) - u[own]
    log_mix = torch.logsumexp(log_p, 0)
    p = (log_p - log_mix).exp()
    log_w = -u - log_mix
    value = torch.logsumexp(log_w, 1)
    w = (log_w - value.unsqueeze(1)).exp()
    covariance = _covariance(w, p, sizes, sets, base)
    overlap = (p @ p.T) / sizes.unsqueeze(1)
    root = sizes.rsqrt()
    gap = 1.0 - torch.linalg.eigvalsh(root * (p @ p.T) * root.unsqueeze(1))[-2]
    share = [worth(s.arranged(part[i])) / s.count for i, (s, part) in enumerate(zip(sets, p.split(_counts(sets), 1)))]
    linked = len(u[0]) * gap.clamp(min=0.0) * torch.stack(share).min().clamp(max=1.0)
    _warn_if_apart(linked, len(u[0]))
    ess = torch.minimum(1.0 / w.square().sum(1), linked)
    ess[own] = linked
    return Multistate(value - value[base] + base_log_z, covariance, overlap, ess, len(u[0]))


class DrawSet(NamedTuple):
    """Draws of one state, flat, and how they lay: ``(n,)`` or ``(draws, chains)``."""

    x: Tensor
    layout: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many."""
        return math.prod(self.layout)

    def arranged(self, values: Tensor) -> Tensor:
        """One number per draw, as the draws lay."""
        return values.reshape(self.layout)


def read_draws(states: Sequence[Energy], draws: Sequence[Tensor]) -> list[DrawSet]:
    """Check draws of several states, and lay them flat.

    Raises
    ------
    ShapeError, ArgumentTypeError
        If they do not fit the states.
    """
    event = common_event_shape(states)
    sets = []
    for k, x in enumerate(draws):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentTypeError(f"Draws are floating-point tensors (n, *event); those of state {k} are {found}.")
        shape = torch.Size(draws[0].shape[1:]) if event is None else event
        lead = x.ndim - len(shape)
        if x.shape[lead:] != shape or lead not in (1, 2) or (lead == 1 and len(x) < 2) or (lead == 2 and len(x) < 4):
            raise ShapeError(
                f"Draws of points of shape {tuple(shape)} are two or more, (n, *event), or four or more of each chain, "
                f"(draws, chains, *event); those of state {k} have shape {tuple(x.shape)}."
            )
        sets.append(DrawSet(x.reshape(-1, *shape), tuple(x.shape[:lead])))
    return sets


def _counts(sets: Sequence[DrawSet]) -> list[int]:
    return [s.count for s in sets]


def energies_at(energy: Energy, sets: Sequence[DrawSet]) -> Tensor:
    """Energy of all draws, ``(N,)``, float64."""
    return torch.cat([energy(part).double() for s in sets for part in s.x.split(CHUNK)])


def _check_own(own: Sequence[Tensor], sets: Sequence[DrawSet]) -> None:
    for k, values in enumerate(own):
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise DivergenceError(
                f"Energy {k} is not finite at {bad} of its own {sets[k].count} draws: these cannot be draws of it. "
                "Were the two interchanged, or chains lost?"
            )


def _means(log_w: Tensor) -> Tensor:
    """Log of independent weights of the same mean: one per draw, or one per chain."""
    log_w = torch.where(torch.isfinite(log_w), log_w, -torch.inf)
    return log_w if log_w.ndim == 1 else torch.logsumexp(log_w, 0) - math.log(len(log_w))


def _first_guess(ends: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """Each log n - log Z, up to a constant: from each state to the next by their own draws alone."""
    steps = [torch.zeros((), dtype=torch.float64, device=sizes.device)]
    for i in range(len(ends) - 1):
        ahead, back = ends[i][i] - ends[i][i + 1], ends[i + 1][i] - ends[i + 1][i + 1]
        steps.append(acceptance_ratio(ahead, back)[0])
    return sizes.log() - torch.stack(steps).cumsum(0)


def _solve(u: Tensor, sizes: Tensor, b: Tensor) -> Tensor:
    """Find log n - log Z, ``(S,)``, by Newton's method on the convex function whose slope is sum of p - n."""

    def height(b: Tensor) -> Tensor:
        return torch.logsumexp(b.unsqueeze(1) - u, 0).sum() - sizes @ b

    for _ in range(200):
        p = (b.unsqueeze(1) - u).softmax(0)
        slope = p.sum(1) - sizes
        curve = p.sum(1).diag() - p @ p.T
        # The first is held, for a constant added to all changes nothing.
        step = torch.zeros_like(b)
        step[1:] = -torch.linalg.pinv(curve[1:, 1:], hermitian=True) @ slope[1:]
        fall, size, here = -(slope @ step), 1.0, height(b)
        if not float(fall) > 1e-9:
            # Within rounding of the bottom, where one full step more squares what is left.
            return b + step if bool(torch.isfinite(step).all()) else b
        while size > 1e-8 and not float(height(b + size * step)) <= float(here - 1e-4 * size * fall):
            size *= 0.5
        b = b + size * step
    return b


def _covariance(w: Tensor, p: Tensor, sizes: Tensor, sets: Sequence[DrawSet], base: int) -> Tensor:
    """Covariance of the log Z less the base's: each draw's influence, summed within its state.

    A draw enters log Z_i by its own weight, and by the b of all sampled states, which move by the inverse curvature
    times its p. With independent draws this is, in the limit, the covariance of Shirts & Chodera (their eq. 8).
    """
    curve = p.sum(1).diag() - p @ p.T
    moved = torch.zeros_like(p)
    moved[1:] = -torch.linalg.pinv(curve[1:, 1:], hermitian=True) @ p[1:]
    influence = w - (w @ p.T) @ moved
    influence = influence - influence[base]
    total = torch.zeros(len(w), len(w), dtype=torch.float64, device=w.device)
    for s, part in zip(sets, influence.split(_counts(sets), 1)):
        centred = part - part.mean(1, keepdim=True)
        excess = torch.stack([s.count / worth(s.arranged(row)) for row in centred]).sqrt()
        total += excess * (centred @ centred.T) * excess.unsqueeze(1)
    return total


def _warn_if_apart(ess: Tensor, draws: int) -> None:
    if float(ess) < OVERLAP:
        warnings.warn(
            f"The densities hardly overlap: {draws} draws are worth {float(ess):.2g} where they do, and a ratio of Z "
            "needs 40 or more. The value and its standard error do not mean much. Try states in between (mbar), a base "
            "closer to the energy, or bracket.",
            RuntimeWarning,
            stacklevel=4,  # Past the decorator of what called this.
        )
