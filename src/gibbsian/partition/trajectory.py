r"""log Z along training: from snapshot to snapshot, by the chains that training ran anyway.

Of a model that moves through parameters :math:`\theta_0, \ldots, \theta_{T-1}`, draws of each snapshot tell the step to
the next,

.. math:: \log Z_T = \log Z_0 + \sum_t \log \frac{Z_{t+1}}{Z_t} ,

each ratio by the optimal bridge between draws of both its ends. Steps are small, so that the bridges overlap and a few
hundred chains are enough, where annealing would walk the whole way from a base for every snapshot; and :math:`\log Z_0`
is known where training begins at independent units.

**The error** is not the sum of the bridges' own: each snapshot's draws serve two bridges, and persistent chains are the
same chains all along, whose errors add up or cancel. Chains are independent of each other, though. A bridge solves
:math:`\sum_i S_i = 0`, where :math:`S_i` is the chance that draws of chain i at one end are the other's, less that of
its draws at the other end; chain i moves the solution by :math:`S_i` over the slope of the sum. What it moves all steps
by, added up, is its share in log Z, and the spread of these shares over the chains is the error.

What no error tells is a lag: chains that are behind their model, or in one of its modes, are no draws of it. Tempered
ones (`gibbsian.objectives.replicas`) lag less.

On tracking the partition function (Desjardins, Courville & Bengio, Advances in Neural Information Processing Systems,
2011); `Algorithms for estimating the partition function of restricted Boltzmann machines (Krause, Fischer & Igel, 2020)
<https://doi.org/10.24963/ijcai.2020/704>`_.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.errors import OptionError
from gibbsian.partition.base import LogZ, exactly
from gibbsian.partition.multistate import OVERLAP, bridge, energies_at, read_draws

FEWEST = 20
"""Chains whose spread tells an error."""


class Trajectory(NamedTuple):
    """What `trajectory` found of T snapshots.

    Attributes
    ----------
    value
        log Z of each, ``(T,)``, float64.
    stderr
        Its standard error, that of the first snapshot's log Z included, ``(T,)``.
    ess
        Effective draws behind each step from a snapshot to the next, ``(T - 1,)``, as of `bridge`.
    draws
        Draws of all snapshots up to each, ``(T,)``.
    start
        What was known of the first.
    """

    value: Tensor
    stderr: Tensor
    ess: Tensor
    draws: tuple[int, ...]
    start: LogZ

    def log_z(self, snapshot: int = -1) -> LogZ:
        """One snapshot's log Z, the last one's by default; its ``ess`` is that of the weakest step on the way there.

        It has no bounds: persistent chains are not in equilibrium for certain.
        """
        at = range(len(self.value))[snapshot]
        if at == 0:
            return self.start
        none = torch.full_like(self.value[at], torch.inf)
        return LogZ(self.value[at], self.stderr[at], -none, none, self.ess[:at].min(), self.draws[at])


@torch.no_grad()
def trajectory(energies: Sequence[Energy], draws: Sequence[Tensor], *, start: LogZ | float = 0.0) -> Trajectory:
    """Follow log Z along snapshots of a training run, from draws of each.

    Four energies per draw, two of its own model and one of each neighbour, and no chain is run.

    Parameters
    ----------
    energies
        The snapshots in their order, two or more: copies of the energy as it was (``copy.deepcopy``).
    draws
        Of each, ``(chains, *event)``, or ``(draws, chains, *event)``: positions of the replay buffer
        (``objective.buffer.positions.clone()``), chain i of one snapshot being chain i of all.
    start
        log Z of the first, or an estimate whose error is then counted; with 0 the result is the difference to it.

    Raises
    ------
    OptionError
        If there are fewer than two snapshots, not draws of each, or too few chains.
    ShapeError, ArgumentTypeError
        If the draws do not fit the energies.
    DivergenceError
        If an energy is not finite at its own draws.
    """
    states = [Energy.of(e) for e in energies]
    if len(states) < 2 or len(states) != len(draws):
        raise OptionError(f"Two snapshots or more, with draws of each; got {len(states)} and draws of {len(draws)}.")
    sets = read_draws(states, draws)
    chains = [s.layout[-1] for s in sets]
    if min(chains) < FEWEST:
        raise OptionError(
            f"The error comes from the spread over chains, of which there are {FEWEST} or more for each snapshot; got "
            f"{min(chains)}."
        )
    known = start if isinstance(start, LogZ) else exactly(torch.tensor(float(start), dtype=torch.float64))
    steps, shares, ess = [], [], []
    for t in range(len(states) - 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # Said once for all steps, below.
            step = bridge(states[t + 1], states[t], draws[t + 1], draws[t])
        pair = sets[t : t + 2]
        work = (energies_at(states[t], pair) - energies_at(states[t + 1], pair)).split([s.count for s in pair])
        ahead, back = (s.arranged(w) for s, w in zip(pair, work))
        shares.append(_shares(ahead, back, step.value, min(chains)))
        steps.append(step.value)
        ess.append(step.ess)
    value = torch.stack(steps).cumsum(0)
    each = torch.stack(shares).cumsum(0)
    spread = each.var(1) * each.shape[1]
    found = torch.stack(ess)
    _warn_if_torn(found, [s.count for s in sets])
    first = known.value.to(value)
    counts = torch.tensor([s.count for s in sets]).cumsum(0)
    return Trajectory(
        torch.cat((first.reshape(1), first + value)),
        torch.cat((spread.new_zeros(1), spread)).add(known.stderr.to(spread).square()).sqrt(),
        found,
        tuple(counts.tolist()),
        known,
    )


def _shares(ahead: Tensor, back: Tensor, ratio: Tensor, groups: int) -> Tensor:
    """By how much each chain, on the last axis, moves a bridge, ``(groups,)``; groups of them where an end has more."""
    odds = math.log(ahead.numel() / back.numel())
    # Of a base's draw being the energy's, and the other way round; a weight that is not finite is no draw of the other.
    there, here = (ahead - ratio - odds).sigmoid().nan_to_num(), (ratio + odds - back).sigmoid().nan_to_num()
    slope = sum((p * (1.0 - p)).sum() for p in (there, here))
    total = ratio.new_zeros(groups)
    for sign, p in ((1.0, there), (-1.0, here)):
        n = p.shape[-1]
        place = torch.arange(n, device=p.device) * groups // n
        total = total.index_add(0, place, sign * p.reshape(-1, n).sum(0))
    return total / slope


def _warn_if_torn(ess: Tensor, counts: Sequence[int]) -> None:
    worst = int(ess.argmin())
    if float(ess[worst]) < OVERLAP:
        bad = int((ess < OVERLAP).sum())
        warnings.warn(
            f"Between snapshots {worst} and {worst + 1} the models hardly overlap: {counts[worst] + counts[worst + 1]} "
            f"draws are worth {float(ess[worst]):.2g}, and a step of log Z needs {OVERLAP:.0f} or more ({bad} of "
            f"{len(ess)} steps have fewer). From there on value and standard error do not mean much. Keep snapshots "
            "more often, or more chains.",
            RuntimeWarning,
            stacklevel=4,  # Past the decorator of what called this.
        )
