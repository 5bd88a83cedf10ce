r"""Kernels over the reals on a torus, by wrapping, and in a box, by reflection.

Both domains are the reals folded up by a group G of isometries: whole turns of each coordinate, or the group that the
reflections in the walls generate. Let :math:`\pi` take a point to the one of its images under G that lies in the
domain. The lifted energy :math:`E \circ \pi` is the same at all images of a point. A kernel over the reals leaves the
(infinite) measure :math:`e^{-E \circ \pi}\,dx` invariant, as its balance is local: what flows from dx to dx' is what
flows back, or what flows into dx is what flows out. If it also commutes with G, that is, if the step from gx with
noise gz leads to gx' and gz has the law of z, then :math:`\pi(x)` is a Markov chain of its own, and summing the
balance over images gives balance under :math:`e^{-E}` on the domain. So the folded chain is exact wherever the kernel
is, and biased as much where it is not; no boundary needs a correction.

**Turns.** Every kernel that sees positions only through the energy, and moves by adding to them, commutes with
translations.

**Reflections** flip the sign of some coordinates, of gradients and of velocities. A kernel commutes with them if its
noise is symmetric in every coordinate by itself, and its scale, if any, is diagonal: random walks, Langevin, Barker and
Hamiltonian kernels with isotropic or diagonal noise do. A dense scale ties the coordinates together and does not. In
both cases every chain must move on its own: kernels that compare chains with each other do not commute, since each
chain is folded by itself. The gradient jumps at a wall unless it vanishes there, which costs acceptance and no
exactness.

**Far away** rounding would decide where a point folds to: beyond :math:`\epsilon^{-1/2}` widths of the domain, 2,900 in
float32, a proposal counts as not finite. As it depends on the length of a move only, that keeps the balance; and step
sizes that are tuned on a flat energy stop growing there.

`Markov Functions (Rogers & Pitman, 1981) <https://doi.org/10.1214/aop/1176994363>`_ says when a function of a Markov
chain is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, Kernel, State, settings_repr
from gibbsian.kernels.scales import is_dense
from gibbsian.typing import EnergyFn, Scalar


class Folding(ABC):
    """A kernel over the reals with its positions folded into a domain; what is said of the kernel holds of the whole.

    Attributes
    ----------
    kernel
        The one that moves.
    """

    kernel: Any

    @property
    def gradients(self) -> int:
        """Those of the kernel."""
        return self.kernel.gradients

    @property
    def details(self) -> tuple[str, ...]:
        """Those of the kernel."""
        return tuple(getattr(self.kernel, "details", ()))

    @property
    def dynamic(self) -> bool:
        """Whether the kernel is."""
        return bool(getattr(self.kernel, "dynamic", False))

    @property
    def step_size(self) -> Scalar:
        """The kernel's, where it has one."""
        return self.kernel.step_size

    @property
    def target_acceptance(self) -> float:
        """The kernel's, where it has one."""
        return self.kernel.target_acceptance

    @abstractmethod
    def fold(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take ``(n, *event)`` into the domain; also by which sign each coordinate moved there, ``None`` if by +1."""

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Draw the kernel's noise."""
        return self.kernel.noise(state, steps, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Step over the reals on the lifted energy, then fold positions, gradients and momenta."""
        new, info = self.kernel.step(Lifted(energy, self), state, noise)
        x, sign = self.fold(new.x)
        if sign is None:
            return new._replace(x=x), info
        return new._replace(
            x=x, grad=_turned(sign, new.grad), momentum=tuple(_turned(sign, v) for v in new.momentum)
        ), info


@dataclass(frozen=True)
class Lifted:
    """An energy on a domain, seen from the reals.

    Attributes
    ----------
    lifts
        The energy, batched: ``(n, *event) -> (n,)``.
    domain
        How the reals fold into its domain.
    """

    lifts: EnergyFn
    domain: Folding

    def __call__(self, x: Tensor) -> Tensor:
        """Energy of the folded points."""
        return self.lifts(self.domain.fold(x)[0])


@dataclass(frozen=True)
class Wrapped(Folding):
    r"""A kernel over the reals on a torus: after each step every coordinate is brought back by whole turns.

    The lifted energy is periodic, and a chain on the reals whose steps do not depend on where it stands but through the
    energy commutes with whole turns; so its projection is exact, see the head of this module. The energy sees wrapped
    positions only, so it need not be periodic in form.

    Parameters
    ----------
    kernel
        Any kernel over the reals that moves by adding to positions and carries no positions in its memory.
    period
        The length of a turn, or the torus itself, for example ``energy.support``: anything with ``period`` and ``low``.
    low
        Where the interval of values begins; minus half a period when ``None``.

    Raises
    ------
    ArgumentTypeError
        If ``kernel`` is none.
    OptionError
        If it does not walk over the reals, clamps positions, or the period is not positive.
    """

    kernel: Any
    period: Any
    low: Any = None

    domain = "torus"
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        _check_kernel(self)
        torus = self.period
        while hasattr(torus, "base_constraint"):
            torus = torus.base_constraint
        if hasattr(torus, "period"):
            object.__setattr__(self, "period", torus.period)
            object.__setattr__(self, "low", torus.low)
        if not isinstance(self.period, (int, float, Tensor)):
            raise OptionError(
                f"period is the length of a turn, or a torus such as energy.support; got {self.period!r}."
            )
        if not isinstance(self.period, Tensor):
            if not 0.0 < self.period < float("inf"):
                raise OptionError(f"period is the positive length of a turn; got {self.period}.")
            object.__setattr__(self, "period", float(self.period))
        object.__setattr__(self, "low", -0.5 * self.period if self.low is None else 1.0 * self.low)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, wrapped."""
        return self.kernel.init(Lifted(energy, self), self.fold(x)[0])

    def fold(self, x: Tensor) -> tuple[Tensor, None]:
        """Bring every coordinate into ``[low, low + period)``; those inside stay as they are, to the bit."""
        at = x.detach()
        y = at - self.period * torch.floor((at - self.low) / self.period)
        # By rounding, a value just below the interval may come out at its end, which is its beginning.
        y = torch.where((y >= self.low) & (y < self.low + self.period), y, self.low)
        y = torch.where((at - self.low).abs() < _reach(x) * self.period, y, torch.nan)
        return y + (x - at), None  # worth y, with slope 1; and NaN where x is not finite


@dataclass(frozen=True)
class Reflected(Folding):
    r"""A kernel over the reals in a box: walls are mirrors.

    With :math:`\pi` the fold of the line onto ``[low, high]``, the kernel walks over the reals on the energy
    :math:`E(\pi(x))`; after each step positions are folded, and gradients and momenta take the sign of the fold. The
    lifted energy is invariant under the group of reflections in the walls, and so are steps whose noise is symmetric in
    every coordinate; hence the folded chain is exact, see the head of this module.

    Parameters
    ----------
    kernel
        A kernel over the reals, whose noise is symmetric by coordinate and whose ``scale``, if it has one, is diagonal.
    low, high
        The corners: numbers or tensors of the event's shape, where any may be infinite. Or ``low`` is the domain
        itself, for example ``energy.support``: anything with ``lower_bound`` or ``upper_bound``.

    Raises
    ------
    ArgumentTypeError
        If ``kernel`` is none.
    OptionError
        If it does not walk over the reals, clamps positions, or ``low`` is not below ``high``; in ``init`` if its scale
        is dense.
    DomainError
        In ``init``, if chains start outside the box.
    """

    kernel: Any
    low: Any = float("-inf")
    high: Any = float("inf")

    domain = ("box", "real")
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        _check_kernel(self)
        box = self.low
        while hasattr(box, "base_constraint"):
            box = box.base_constraint
        if hasattr(box, "lower_bound") or hasattr(box, "upper_bound"):
            object.__setattr__(self, "low", getattr(box, "lower_bound", float("-inf")))
            object.__setattr__(self, "high", getattr(box, "upper_bound", float("inf")))
        for name in ("low", "high"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, Tensor)):
                raise OptionError(f"{name} is a number or a tensor of the event's shape; got {value!r}.")
            if not isinstance(value, Tensor):
                object.__setattr__(self, name, float(value))
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        # Looking at numbers on a device would wait for it.
        if low.device.type == high.device.type == "cpu" and not bool((low < high).all()):
            raise OptionError(f"A box has low < high in every coordinate; got low={self.low}, high={self.high}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, which must lie inside."""
        scale = getattr(self.kernel, "scale", None)
        if isinstance(scale, Tensor) and is_dense(scale, x):
            raise OptionError(
                f"Reflection needs the diagonal scale of {tuple(x.shape[1:])} standard deviations; a dense factor "
                f"{tuple(scale.shape)} mixes the coordinates that a wall reflects one by one. Give its diagonal, or "
                "sample unconstrain(energy) over the reals."
            )
        low, high = self._corners(x)
        for name, corner in (("low", low), ("high", high)):
            if corner.ndim and corner.shape != x.shape[1:]:
                raise ShapeError(
                    f"{name} is a number or has the event's shape, {tuple(x.shape[1:])}; got {tuple(corner.shape)}."
                )
        outside = int(((x < low) | (x > high)).flatten(1).any(1).sum())
        if outside:
            raise DomainError(
                f"{outside} of {x.shape[0]} chains start outside the box from {_brief(low)} to {_brief(high)}; start "
                "them inside, for example from start.clamp(low, high)."
            )
        return self.kernel.init(Lifted(energy, self), x)

    def fold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reflect every coordinate into the box as often as it takes, and give the sign of its slope there."""
        at = x.detach()
        low, high = self._corners(at)
        width = high - low
        nearest = at.clamp(low, high)
        beyond = at - nearest
        # The way back from the nearest wall, and from the other one if it is that far. A half-line has no other, and a
        # period that is finite all the same: compiled, the remainder of an infinite one is NaN.
        period = (2.0 * width).clamp(max=torch.finfo(x.dtype).max)
        far = torch.remainder(beyond.abs(), period)
        y = (nearest - torch.copysign(torch.minimum(far, period - far), beyond)).clamp(low, high)
        y = torch.where(beyond.abs() <= _reach(x) * width, y, torch.nan)
        sign = torch.where((beyond != 0.0) & (far <= width), -1.0, 1.0).to(x.dtype)
        # Worth y, with the slope of the fold and nothing else differentiated, so that no infinite corner enters.
        return y + sign * (x - at), sign

    def _corners(self, like: Tensor) -> tuple[Tensor, Tensor]:
        options = {"dtype": like.dtype, "device": like.device}
        return torch.as_tensor(self.low, **options), torch.as_tensor(self.high, **options)


def _check_kernel(wrapper: Folding) -> None:
    kernel, name = wrapper.kernel, type(wrapper).__name__
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise ArgumentTypeError(f"{name} wraps a kernel over the reals, such as MALA(0.1); got {kernel!r}.")
    walks = (kernel.domain,) if isinstance(kernel.domain, str) else tuple(kernel.domain)
    if "real" not in walks or isinstance(kernel, Folding):
        raise OptionError(f"{name} needs a kernel over the reals; {kernel} walks on {' and '.join(walks)} states.")
    if getattr(kernel, "box", None) is not None:
        raise OptionError(f"{name} folds positions; {kernel} would clamp them as well. Drop its box.")


def _reach(x: Tensor) -> float:
    """Widths of a domain from which a point still comes back to the right place, and not where rounding takes it."""
    return torch.finfo(x.dtype).eps ** -0.5


def _turned(sign: Tensor, vector: Tensor) -> Tensor:
    """Flip a vector at each chain; the empty gradient of a kernel that uses none stays."""
    return sign * vector if vector.shape == sign.shape else vector


def _brief(corner: Tensor) -> str:
    return (
        f"{float(corner):.6g}" if corner.ndim == 0 else str([float(f"{v:.6g}") for v in corner.flatten().tolist()[:6]])
    )
