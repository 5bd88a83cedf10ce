r"""log Z by enumeration: :math:`\log \sum_x e^{-E(x)}` over all states of bits or categories, in chunks.

The states of the last sites are listed once; every chunk is that list with other values of the sites before them. Where
an energy can be summed over some of its variables in closed form, enumerate the energy of the others: of a restricted
Boltzmann machine the free energy of its smaller layer, whose log Z is that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of
from gibbsian.energies.grids import count_states, states
from gibbsian.energies.layers import check_function
from gibbsian.errors import DivergenceError, OptionError, ShapeError
from gibbsian.partition.base import LogZ, exactly
from gibbsian.sampling import reporter

CHUNK = 1 << 15
"""States at which the energy is evaluated at once, at most."""

MOST = 1 << 25
"""States that are enumerated unless more are asked for."""


@torch.no_grad()
def enumeration(
    energy: Energy,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    most: int = MOST,
    progress: bool | Callable[[int], object] = False,
) -> LogZ:
    r"""Compute log Z of an energy on boolean or one-hot states by summing over all of them.

    Sums are kept in float64; energies come in the precision of the energy.

    Parameters
    ----------
    energy
        Over boolean or one-hot states, without context that is not fixed.
    shape
        The event's shape, when the energy does not tell it.
    dtype
        Of the states; that of the energy's parameters and buffers, where it has some, when ``None``.
    most
        States to enumerate at most: 2^25 by default, minutes for a cheap energy. Time grows with the states, memory
        does not.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of states just summed.

    Returns
    -------
    LogZ
        Exact: ``stderr`` is 0 and the bounds are the value. ``ess`` is the effective number of states that carry the
        mass, :math:`1 / \sum_x p(x)^2`.

    Raises
    ------
    OptionError
        If there are more states, or the energy is conditional.
    ShapeError
        If nothing tells the event's shape.
    DomainError
        If the states cannot be listed.
    DivergenceError
        If an energy is NaN or minus infinity, or all are infinite.
    """
    adopted = Energy.of(energy)
    event = torch.Size(shape) if adopted.event_shape is None and shape is not None else adopted.event_shape
    if event is None or (shape is not None and torch.Size(shape) != event):
        raise ShapeError(
            f"The energy's events have shape {event}; got shape={shape}. Give shape=(sites,) of one state."
        )
    if adopted.context:
        raise OptionError(f"The energy is conditional on {', '.join(adopted.context)}: fix it with energy.given(...).")
    check_function(adopted)
    count = count_states(event, adopted.support)
    if count > most:
        raise OptionError(
            f"States of shape {tuple(event)} on {adopted.support} number {count:.4g}, more than the {most} to be "
            "enumerated. Sum over part of the variables in closed form (the larger layer of a Boltzmann machine), use "
            "transfer_matrix on a lattice, or bracket; or pass a larger most, where time allows."
        )
    total = doubled = torch.full((), -torch.inf, dtype=torch.float64)
    report, close = reporter(progress, count, "enumeration")
    try:
        for x in _chunks(event, adopted, dtype):
            log_w = -adopted(x).double().cpu()
            if bool((log_w.isnan() | (log_w == torch.inf)).any()):
                raise DivergenceError(
                    f"The energy is NaN or minus infinity at {int((log_w.isnan() | (log_w == torch.inf)).sum())} of "
                    f"{len(x)} states; look for a division or a logarithm of zero in it."
                )
            total = torch.logaddexp(total, torch.logsumexp(log_w, 0))
            doubled = torch.logaddexp(doubled, torch.logsumexp(2.0 * log_w, 0))
            report(len(x))
    finally:
        close()
    if not bool(torch.isfinite(total)):
        raise DivergenceError(f"The energy is infinite at all {count} states: no state has any weight.")
    return exactly(total)._replace(ess=(2.0 * total - doubled).exp())


def _chunks(event: torch.Size, energy: Energy, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """All states, ``(m, *event)`` at a time: one buffer, of which only the first sites change."""
    like = next((t for t in (*energy.parameters(), *energy.buffers()) if t.is_floating_point()), torch.empty(()))
    like = like.new_empty((), dtype=dtype or like.dtype)
    hot = kind_of(energy.support) == "one_hot"
    sites, classes = (math.prod(event[:-1]), event[-1]) if hot else (math.prod(event), 2)
    inner = min(sites, max(1, int(math.log(CHUNK, classes) + 1e-9)))
    tail = (classes,) if hot else ()
    low = states((inner, *tail), energy.support, like, most=max(CHUNK, classes))
    x = low.new_zeros((len(low), sites, *tail))
    x[:, sites - inner :] = low
    eye = torch.eye(classes, dtype=low.dtype, device=low.device)
    places = [classes**k for k in range(sites - inner - 1, -1, -1)]
    for code in range(classes ** (sites - inner)):
        for site, place in enumerate(places):
            digit = code // place % classes
            x[:, site] = eye[digit] if hot else float(digit)
        yield x.reshape(len(low), *event)
