"""What objectives check of options and data, each said in one way."""

from __future__ import annotations

from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.discrete import DISCRETE, check_states


def check_count(name: str, value: int, what: str) -> int:
    """Check a count of 1 or more, and return it.

    Raises
    ------
    OptionError
        If it is not a whole number from 1 on.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} counts {what}, a whole number, 1 or more; got {value!r}.")
    return value


def check_at_least(*options: tuple[str, float, float]) -> None:
    """Check options, each with its name, value and least value.

    Raises
    ------
    OptionError
        If one is below it, or no number.
    """
    for name, value, least in options:
        if not value >= least:
            raise OptionError(f"{name} is {least} or more; got {value}.")


def check_floating(method: str, x: Tensor) -> None:
    """Refuse integers: gradients need numbers that vary, and noise would be rounded to them.

    Raises
    ------
    ArgumentTypeError
        If the data are not floating-point numbers.
    """
    if not x.is_floating_point():
        raise ArgumentTypeError(f"{method} needs floating-point data; got {x.dtype}. Pass data.float().")


def check_discrete(method: str, energy: Energy, x: Tensor) -> bool:
    """Check that an energy and data ``(n, *event)`` are on binary or one-hot states; return whether on one-hot ones.

    The numbers themselves are read on the host alone, for to read them elsewhere would wait for the device; `fit` has
    read all rows before.

    Raises
    ------
    DomainError
        If the energy lives elsewhere, or a row of data is no such state.
    ShapeError
        If the data's shape is not that of the energy's points.
    ArgumentTypeError
        If the data are not floating-point numbers.
    """
    if (kind := kind_of(energy.support)) not in DISCRETE:
        raise DomainError(
            f"{method} changes the values of single sites, of binary or one-hot states, and the energy lives on "
            f"{energy.support}. Declare constraints.boolean or constraints.one_hot as its support if its states are "
            "bits or classes; fit real points by score matching, noise contrastive estimation or chains."
        )
    check_floating(method, x)
    if x.ndim < 2 or (energy.event_shape is not None and x.shape[1:] != energy.event_shape):
        own = "(n, *event)" if energy.event_shape is None else ("n", *energy.event_shape)
        raise ShapeError(f"The data have shape {tuple(x.shape)}; the energy takes {own}.")
    return check_states(energy, x, "rows") if x.device.type == "cpu" else kind == "one_hot"


def check_draws(what: str, source: Tractable, x: Tensor) -> None:
    """Check that a tractable energy draws points of the data's shape.

    Parameters
    ----------
    what
        Its part in the objective: ``"noise"``, ``"base"``.
    source
        The tractable energy.
    x
        Data, ``(n, *event)``.

    Raises
    ------
    ShapeError
        If it does not.
    """
    drawn, event = tuple(source.event_shape), tuple(x.shape[1:])
    if drawn != event:
        raise ShapeError(
            f"The {what} draws points of shape {drawn} and the data's have {event}; build it for points of the data's "
            f"shape, such as Gaussian({event})."
        )


def check_device(what: str, source: Tractable, x: Tensor) -> None:
    """Check that a tractable energy is on the data's device.

    Raises
    ------
    OptionError
        If it is not.
    """
    held = next((t for t in (*source.buffers(), *source.parameters())), x)
    if held.device != x.device:
        raise OptionError(
            f"The {what} is on {held.device} and the data on {x.device}; move the objective with "
            f".to({str(x.device)!r})."
        )
