r"""Likelihoods of deep Boltzmann machines: exactly, where half of the hidden layers can be listed, and bounds of them.

Given the data, the hidden layers are a restricted machine of odd and even ones, and

.. math:: \log p(v) = \log \sum_{x_1, \ldots, x_L} e^{-E(v, x_1, \ldots, x_L)} - \log Z \;\ge\; -F_q(v) - \log Z

with the sum as that of one free energy per state of the smaller side, and the bound by mean field. log Z itself is that
of the restricted machine of all layers: `gibbsian.partition.boltzmann.exact_log_z` lists its smaller side, and ``ais``,
``smc`` or ``bracket`` estimate it along ``rbm_path(base, machine)`` with ``kernel=RBMGibbs()``, on the even layers or
on ``machine.odd_layers``.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.layered import Couplings, TwoLayers
from gibbsian.energies.mean_field import mean_field, variational_free_energy
from gibbsian.energies.units import Units
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.partition.base import LogZ
from gibbsian.partition.boltzmann import MOST_STATES, exact_log_z

CHUNK = 1 << 20
"""Pairs of a row and a state whose energies are held at once."""


class Bound(NamedTuple):
    """Lower bounds of log-likelihoods, in nats, one per row.

    Attributes
    ----------
    value
        The bound at the estimate of log Z, ``(n,)``, float64.
    lower, upper
        The bound at the upper and the lower end of log Z. ``lower`` bounds the log-likelihood wherever log Z is below
        its upper end; ``upper`` says nothing of the log-likelihood, only where the bound itself lies.
    stderr
        Standard error of each row's value without log Z, where it was estimated by draws; 0 where it was not.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    stderr: Tensor


@torch.no_grad()
def variational_bound(
    machine: DeepBoltzmannMachine,
    v: Tensor,
    log_z: LogZ,
    *,
    iterations: int = 500,
    damping: float = 0.0,
    tolerance: float = 1e-5,
    rows: int = 1000,
) -> Bound:
    """Bound the log-likelihood of each row from below by mean field.

    Parameters
    ----------
    machine
        The machine.
    v
        Data, ``(n, *event)``.
    log_z
        Its log Z, exact or between bounds.
    iterations, damping, tolerance
        Of mean field, as in `gibbsian.energies.mean_field.mean_field`. Where it has not settled the bound still holds.
    rows
        Rows at a time.

    Returns
    -------
    Bound
        ``(n,)`` each.

    Raises
    ------
    ShapeError, DomainError, OptionError, ArgumentTypeError
        If data are no states of the visible units, or an argument does not fit.
    """
    _check(machine, v, log_z)
    found = []
    for part in v.to(machine.even_bias).split(rows):
        q = mean_field(machine, part, iterations=iterations, damping=damping, tolerance=tolerance)
        found.append(-variational_free_energy(machine, part, q).double())
    return bounded(torch.cat(found), log_z)


def bounded(unnormalised: Tensor, log_z: LogZ, stderr: Tensor | None = None) -> Bound:
    """Take log Z off bounds of unnormalised log-likelihoods."""
    value, lower, upper = (unnormalised - z.to(unnormalised) for z in (log_z.value, log_z.upper, log_z.lower))
    return Bound(value, lower, upper, torch.zeros_like(value) if stderr is None else stderr)


@torch.no_grad()
def exact_deep_log_likelihood(machine: DeepBoltzmannMachine, v: Tensor, log_z: LogZ | None = None) -> Tensor:
    """Log-likelihood of each row, ``(n, *event) -> (n,)``, float64, by listing the smaller side of the hidden layers.

    Parameters
    ----------
    machine
        A machine whose odd layers, or even ones above the data, have at most 2^25 states together.
    v
        Data.
    log_z
        What `gibbsian.partition.boltzmann.exact_log_z` returned, when it is known already.

    Raises
    ------
    OptionError
        If there are more states; the message says how many and what else there is.
    ShapeError, DomainError
        If data are no states of the visible units.
    """
    z = exact_log_z(machine) if log_z is None else log_z
    _check(machine, v, z)
    return -exact_deep_free_energy(machine, v) - z.value


@torch.no_grad()
def exact_deep_free_energy(machine: DeepBoltzmannMachine, v: Tensor) -> Tensor:
    """Free energy of each row, all hidden layers summed out, ``(n,)``, float64; see `exact_deep_log_likelihood`."""
    given = copy.deepcopy(machine).double().posterior(v.to(machine.even_bias.device, torch.float64))
    inner = given.machine
    odd, even = cast(Units, inner.visible), cast(Units, inner.hidden)
    counts = [math.inf if units.count is None else units.count for units in (odd, even)]
    count = min(counts)
    if count > MOST_STATES:
        size = "no states to list" if math.isinf(count) else f"2^{math.log2(count):.1f} states"
        raise OptionError(
            f"The smaller side of the hidden layers of {machine!r} has {size}, more than 2^25; variational_bound "
            "bounds the likelihood instead."
        )
    units = odd if counts[0] <= counts[1] else even
    total = torch.full((len(v),), -torch.inf, dtype=torch.float64, device=v.device)
    size = max(1, CHUNK // max(1, len(v)))
    for first in range(0, int(count), size):
        states = units.listed(torch.arange(first, min(first + size, int(count)), device=v.device))
        log_p = -_of_odd(inner, states) if units is odd else -_of_even(inner, states)
        total = torch.logaddexp(total, torch.logsumexp(log_p, 1))
    return given.energy - total


def _of_odd(inner: TwoLayers, x: Tensor) -> Tensor:
    """Free energies of odd states, the even ones above the data summed out: ``(rows, states)``."""
    field = inner.hidden_field(x)
    s = inner.visible.statistic(x) - inner.visible_offset
    rest = inner.visible.own_energy(x) + field @ inner.hidden_offset - inner.hidden.log_partition(field).sum(1)
    return rest - inner.visible_bias @ s.T


def _of_even(inner: TwoLayers, x: Tensor) -> Tensor:
    """Free energies of even states above the data, the odd ones summed out: ``(rows, states)``."""
    t = inner.hidden.statistic(x) - inner.hidden_offset
    exerted = cast(Couplings, inner.weight).back(t)
    own = inner.hidden.own_energy(x) - t @ inner.hidden_bias
    found = []
    for bias in inner.visible_bias:
        field = bias + exerted
        found.append(own + field @ inner.visible_offset - inner.visible.log_partition(field).sum(1))
    return torch.stack(found)


def _check(machine: DeepBoltzmannMachine, v: Tensor, log_z: LogZ) -> None:
    if not isinstance(machine, DeepBoltzmannMachine):
        raise ArgumentTypeError(f"These are likelihoods of a DeepBoltzmannMachine; got {machine!r}.")
    if not isinstance(log_z, LogZ):
        raise ArgumentTypeError(f"log_z is a LogZ, as exact_log_z, ais or bracket return it; got {log_z!r}.")
    machine.check_states(v, "the rows")
