"""What every score of foreignness shares: the protocol, and how rows go through it.

A score is a function from rows ``(n, *event)`` to ``(n,)``, higher for rows that are more foreign. An energy is one as
it stands. Features are functions from rows to ``(n, d)``, out of which models of the usual rows make a score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Generator, Tensor

from gibbsian.energies.layers import check_function
from gibbsian.errors import ArgumentTypeError, InputError, OptionError, ShapeError

ROWS_AT_ONCE = 1024
"""Rows that go through a network together."""


class Score(Protocol):
    """How foreign each row is: a frozen dataclass, or any function."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Score rows, ``(n, *event) -> (n,)``; higher is more foreign."""
        ...


Features: TypeAlias = Callable[[Tensor], Tensor]
"""Numbers that describe each row: ``(n, *event) -> (n, d)``."""


def in_parts(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Put rows through a function, so many at a time that memory is flat in their number.

    Parameters
    ----------
    fn
        From rows to one entry per row.
    x
        Rows, ``(n, *event)``, n at least 1.

    Raises
    ------
    ShapeError
        If there are no rows.
    """
    if x.ndim < 1 or len(x) == 0:
        raise ShapeError(f"A score takes rows (n, *event), n at least 1; got shape {tuple(x.shape)}.")
    return torch.cat([fn(part).detach() for part in x.split(ROWS_AT_ONCE)])


def one_each(values: Any, rows: int, what: str) -> Tensor:
    """Check that there is one number per row, and return them.

    Raises
    ------
    ShapeError
        If there is not.
    """
    if not isinstance(values, Tensor) or tuple(values.shape) != (rows,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"{what} gives one number for each of {rows} rows, ({rows},); got {found}. Sum over the event's axes, or "
            "drop a trailing axis with .squeeze(-1)."
        )
    return values


def check_scored(fn: object, what: str) -> None:
    """Refuse what cannot be called, or gives another number each time.

    Raises
    ------
    ArgumentTypeError
        If it cannot be called.
    InputError
        If it holds a dropout or a batch normalisation in training mode.
    """
    if not callable(fn):
        raise ArgumentTypeError(f"{what} is a function or a module that takes rows (n, *event); got {fn!r}.")
    check_function(fn)


def check_rows(x: Tensor, fewest: int, what: str) -> None:
    """Refuse reference rows that are too few.

    Raises
    ------
    ShapeError
        With their number.
    """
    if not isinstance(x, Tensor) or x.ndim < 1 or len(x) < fewest:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"{what} needs {fewest} or more reference rows, a tensor (n, *event); got {found}.")


def check_finite(values: Tensor, what: str) -> None:
    """Refuse reference values that are not finite: a mean or a distance made of them says nothing.

    Raises
    ------
    InputError
        With their number.
    """
    bad = int((~values.isfinite()).reshape(len(values), -1).any(1).sum())
    if bad:
        raise InputError(
            f"{what} is not finite at {bad} of {len(values)} reference rows. Find out why, then leave these rows out."
        )


def parted(x: Tensor, share: float, rng: Generator) -> tuple[Tensor, Tensor]:
    """Part rows at random: those that fit a score, and those that calibrate its threshold.

    A score fitted to rows finds them less foreign than new ones, so that a threshold wants rows of its own.

    Parameters
    ----------
    x
        Rows, ``(n, *event)``.
    share
        Of the first part, between 0 and 1.
    rng
        The generator.

    Raises
    ------
    OptionError
        If the share leaves a part empty.
    """
    count = round(share * len(x)) if 0.0 < share < 1.0 else 0
    if not 0 < count < len(x):
        raise OptionError(f"share parts {len(x)} rows in two, neither of them empty: between 0 and 1; got {share}.")
    order = torch.randperm(len(x), generator=rng, device=rng.device).to(x.device)
    return x[order[:count]], x[order[count:]]
