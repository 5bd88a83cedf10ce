"""What kernels that walk a ladder of inverse temperatures share: reading it, and refusing what cannot climb it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from gibbsian.compilation import wanting
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import Info, Kernel, State, has_step_size, is_adjusted
from gibbsian.kernels.scales import over_chains
from gibbsian.typing import EnergyFn


@dataclasses.dataclass(frozen=True)
class Tempered:
    """An energy times an inverse temperature, which tells of itself what the energy tells.

    Attributes
    ----------
    energy
        The energy.
    beta
        One for all rows, 0-d, or one for each.
    """

    energy: EnergyFn
    beta: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Energy of each row."""
        return self.beta * self.energy(x)

    @property
    def support(self) -> Any:
        """Where the energy lives."""
        return cast(Any, self.energy).support

    @property
    def blocks(self) -> Any:
        """Sites that are independent given the others."""
        return cast(Any, self.energy).blocks

    @property
    def conditional_logits(self) -> Callable[..., Tensor]:
        """Logits of each site given the others: they scale as the energy does."""
        inner = cast(Any, self.energy).conditional_logits
        return lambda x, block: over_chains(self.beta, x) * inner(x, block)


@runtime_checkable
class Exchanging(Protocol):
    """A kernel whose chains are replicas on a ladder, as `ParallelTempering`; training goes on with all of them."""

    betas: Any

    def init_replicas(self, energy: EnergyFn, x: Tensor, time: int = 0) -> State:
        """Start at points ``(n, K, *event)`` of replicas that have made some steps before."""
        ...

    def points(self, state: State) -> Tensor:
        """Where all replicas stand, the target's first, ``(n, K, *event)``."""
        ...

    def swap_sums(self, state: State) -> Tensor:
        """Acceptance of the swaps of neighbours, summed over the steps since `init`, mean over chains: ``(K - 1,)``."""
        ...

    def turns(self, time: int, steps: int) -> list[int]:
        """How often each pair of neighbours has its turn in some steps from a time on."""
        ...


def levels_of(kernel: object) -> int:
    """How many replicas a chain of a kernel has: 1 of most."""
    return len(kernel.betas) if isinstance(kernel, Exchanging) else 1


def step_inside(kernel: Any, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
    """Step the kernel inside a wrapper whose energy is a new function in each step.

    A dynamic kernel would compile its own inner part anew for each of them, and is kept from it.
    """
    if not getattr(kernel, "dynamic", False):
        return kernel.step(energy, state, noise)
    with wanting(False):
        return kernel.step(energy, state, noise)


def with_sizes(kernel: Any, rows: Tensor) -> Any:
    """Copy a kernel with a step size for every row, without the checks that would wait for the device."""
    new = object.__new__(type(kernel))
    for f in dataclasses.fields(kernel):
        value = getattr(kernel, f.name)
        if f.name == "step_size":
            value = rows
        elif dataclasses.is_dataclass(value) and isinstance(value, Kernel):
            value = with_sizes(value, rows)
        object.__setattr__(new, f.name, value)
    return new


def check_kernel(kernel: object) -> None:
    """Refuse what is no kernel, or a class of them.

    Raises
    ------
    ArgumentTypeError
        With what was found.
    """
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise ArgumentTypeError(f"The kernel inside needs init, noise and step, as MALA(0.1) does; got {kernel!r}.")


def ladder_of(betas: Tensor | Sequence[float], ends_in_zero: bool = False) -> Tensor:
    """Read a ladder of inverse temperatures.

    Raises
    ------
    OptionError
        If it does not decrease from 1 to something positive, or to 0 with a base.
    """
    given = betas if isinstance(betas, Tensor) else torch.tensor([float(b) for b in betas], dtype=torch.float64)
    if given.ndim != 1 or given.shape[0] < 2:
        raise OptionError(f"A ladder has two or more inverse temperatures (K,); got {_listed(given)}.")
    if given.device.type != "cpu":
        return given  # Looking at numbers on a device would wait for it.
    if float(given[0]) != 1.0 or not bool((given.diff() < 0).all()):
        raise OptionError(f"Inverse temperatures decrease from 1, the target's; got {_listed(given)}.")
    last = float(given[-1])
    if ends_in_zero and last != 0.0:
        raise OptionError(f"With a base the ladder ends in 0, where the base is; got {_listed(given)}.")
    if not ends_in_zero and last <= 0.0:
        raise OptionError(
            f"At beta = {last:g} the density is flat and has no normaliser: end the ladder above 0, or give a base; "
            f"got {_listed(given)}."
        )
    return given


def sizes_of(sizes: Tensor | Sequence[float] | None, betas: Tensor | Sequence[float], kernel: Any) -> Tensor | None:
    """Read step sizes, one for each level of a ladder.

    Raises
    ------
    ShapeError, OptionError
        If there is another number of them, one is not positive, or the kernel has no step size.
    """
    if sizes is None:
        return None
    given = sizes if isinstance(sizes, Tensor) else torch.tensor([float(h) for h in sizes], dtype=torch.float64)
    if not has_step_size(kernel):
        raise OptionError(f"{kernel!r} has no step size; leave step_sizes out.")
    if tuple(given.shape) != (len(betas),):
        raise ShapeError(f"step_sizes holds one for each of {len(betas)} levels; got shape {tuple(given.shape)}.")
    if given.device.type == "cpu" and not bool(((given > 0) & (given < torch.inf)).all()):
        raise OptionError(f"Step sizes are positive numbers; got {_listed(given)}.")
    return given


def check_exact(self: object, kernel: Any, state: State) -> None:
    """Refuse a kernel that is unadjusted, or whose memory belongs to points that would leave it.

    Raises
    ------
    OptionError
        With the reason.
    """
    if not is_adjusted(kernel):
        raise OptionError(
            f"{type(self).__name__} needs a kernel that leaves each tempered density invariant, and "
            f"{type(kernel).__name__} is unadjusted. Use MALA, HMC or another that accepts and rejects."
        )
    if state.memory:
        raise OptionError(
            f"{type(kernel).__name__} carries a memory from step to step, which does not fit the points that "
            f"{type(self).__name__} puts in its place. Use a kernel without one, such as MALA or HMC."
        )


def _listed(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values.flatten().tolist()) + "]"
