"""Likelihoods of deep belief networks: the greedy bound by draws, and exactly for small ones.

The bound is that of `gibbsian.energies.belief`; the log Z in it is that of the top machine, exact or between bounds.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Generator, Tensor

from gibbsian.energies.belief import DeepBeliefNetwork, log_conditional
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.partition.base import LogZ
from gibbsian.partition.boltzmann import exact_log_z
from gibbsian.partition.deep import Bound, bounded

MOST_PAIRS = 1 << 26
"""Pairs of states of two neighbouring layers that are listed at most."""


@torch.no_grad()
def belief_bound(
    network: DeepBeliefNetwork, v: Tensor, log_z: LogZ, *, rng: Generator, draws: int = 100, rows: int = 1000
) -> Bound:
    """Estimate the lower bound of each row's log-likelihood from draws of the hidden layers given it.

    `On the quantitative analysis of deep belief networks (Salakhutdinov & Murray, 2008)
    <https://doi.org/10.1145/1390156.1390266>`_.

    Parameters
    ----------
    network
        The network.
    v
        Data, ``(n, *event)``.
    log_z
        log Z of ``network.top``.
    rng
        The generator.
    draws
        Draws per row, 2 or more.
    rows
        Rows at a time.

    Returns
    -------
    Bound
        ``(n,)`` each, with the standard error of the mean over draws; the mean of many rows has a smaller one.

    Raises
    ------
    ShapeError, DomainError, OptionError, ArgumentTypeError
        If data are no states of the visible units, or an argument does not fit.
    """
    _check(network, v, log_z)
    if draws < 2:
        raise OptionError(f"draws is 2 or more, for an error needs two; got {draws}.")
    means, errors = [], []
    for part in v.to(network.top.weight).split(rows):
        found = torch.stack([_log_weight(network, part, rng) for _ in range(draws)])
        means.append(found.mean(0))
        errors.append(found.std(0) / math.sqrt(draws))
    return bounded(torch.cat(means), log_z, torch.cat(errors))


@torch.no_grad()
def exact_belief_log_likelihood(network: DeepBeliefNetwork, v: Tensor, log_z: LogZ | None = None) -> Tensor:
    """Log-likelihood of each row, ``(n, *event) -> (n,)``, by listing one layer after the other, in float64.

    Parameters
    ----------
    network
        A network whose hidden layers below the highest have few states, of any two neighbours 2^26 pairs at most.
    v
        Data.
    log_z
        log Z of the top machine, when it is known already.

    Raises
    ------
    OptionError
        If there are more states, or real ones.
    ShapeError, DomainError
        If data are no states of the visible units.
    """
    z = exact_log_z(network.top) if log_z is None else log_z
    _check(network, v, z)
    network = copy.deepcopy(network).double()
    layers = [rbm.hidden for rbm in network.machines[:-1]]
    counts = [units.count for units in layers]
    known = [len(v), *(math.inf if count is None else count for count in counts)]
    if max(a * b for a, b in itertools.pairwise(known)) > MOST_PAIRS:
        raise OptionError(
            f"The layers {layers} of {len(v)} rows have more than 2^26 pairs of states of neighbours, or real states; "
            "pass fewer rows, or bound the likelihood with belief_bound."
        )
    states = [v.double(), *(units.listed(torch.arange(int(units.count or 0))).to(v.device) for units in layers)]
    log_p = -network.top(states[-1])
    for rbm, below, above in reversed(list(zip(network.machines, states, states[1:]))):
        fields = rbm.two_layers(above).visible_field(above)
        down = torch.stack([log_conditional(rbm.visible, f.expand(len(below), -1), below) for f in fields], 1)
        log_p = torch.logsumexp(down + log_p, 1)
    return log_p - z.value


def _log_weight(network: DeepBeliefNetwork, v: Tensor, rng: Generator) -> Tensor:
    states = network.up(v, rng)
    return (network.log_joint(states) - network.log_up(states)).double()


def _check(network: DeepBeliefNetwork, v: Tensor, log_z: LogZ) -> None:
    if not isinstance(network, DeepBeliefNetwork):
        raise ArgumentTypeError(f"These are likelihoods of a DeepBeliefNetwork; got {network!r}.")
    if not isinstance(log_z, LogZ):
        raise ArgumentTypeError(
            f"log_z is the LogZ of network.top, as exact_log_z or bracket return it; got {log_z!r}."
        )
    network.visible.check(v, "the rows")
