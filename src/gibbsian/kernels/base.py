"""What every kernel shares: the state of chains, what a step reports, evaluation, and the accept/reject step.

A kernel is a frozen dataclass of its settings. Its ``step`` is a deterministic function of state and noise; its
``noise`` draws a block of steps at once, step by step in a fixed order, so that two blocks of five steps use the
same numbers as one of ten. The energy comes with each call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError
from gibbsian.typing import EnergyFn, Scalar


class State(NamedTuple):
    """Where the chains stand, with what was computed there.

    Attributes
    ----------
    x
        Positions, ``(n, *event)``.
    energy
        Energies there, ``(n,)``.
    grad
        Gradients of the energy there, ``(n, *event)``; ``(n, 0)`` for kernels that use none.
    origin
        For unadjusted kernels: the state to which a chain returns when it leaves the numbers. Empty otherwise.
    momentum
        For kernels that carry a velocity from step to step: one tensor ``(n, *event)``. Empty otherwise.
    memory
        What else a kernel carries, each with the chains in front. Empty for most.
    """

    x: Tensor
    energy: Tensor
    grad: Tensor
    origin: tuple[Tensor, ...] = ()
    momentum: tuple[Tensor, ...] = ()
    memory: tuple[Tensor, ...] = ()


class Info(NamedTuple):
    """What one step reports, one number per chain.

    Attributes
    ----------
    acceptance
        The probability with which the proposal was accepted (1 for unadjusted kernels).
    nonfinite
        1 where the proposal had a non-finite energy or gradient: rejected, or, unadjusted, restarted.
    details
        What else, by name: the names that the kernel declares in ``details``, in that order.
    """

    acceptance: Tensor
    nonfinite: Tensor
    details: Mapping[str, Tensor] = MappingProxyType({})


@runtime_checkable
class Kernel(Protocol):
    """How a chain moves one step.

    Besides what stands here a kernel may declare ``target_acceptance``, the acceptance to which `tune` brings its step
    size; ``details``, the names of what its `Info` tells besides acceptance; ``adjusted = False`` when it is biased;
    ``dynamic = True`` when the length of a step depends on the chains, so that the loop around it cannot be compiled
    and it compiles its own inner part; ``parted = True`` when it does so for the ``leapfrog`` steps of images;
    ``gradients_together``, how many are compiled together, where a step is so much code beside its gradients that fewer
    than usual compile in half of the time; and ``differentiable = True`` when a step that starts where x asks for
    gradients has the derivative of the whole step in the energy's parameters behind it (see `evaluate`).
    """

    @property
    def gradients(self) -> int:
        """Gradient evaluations per step."""
        ...

    @property
    def domain(self) -> str | tuple[str, ...]:
        """Where it walks: ``"real"``, ``"box"``, ``"torus"``, ``"sphere"``, ``"boolean"``, ``"one_hot"``; or some."""
        ...

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the energy where the chains start."""
        ...

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Draw the noise of a block of steps; the leading axis of each tensor counts the steps."""
        ...

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Move all chains by one step with the noise of one step."""
        ...


def evaluate(energy: EnergyFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and their gradients, ``(n,)`` and ``(n, *event)``.

    The chains are independent, so the gradient of the sum holds every chain's own gradient. There is no graph behind
    either, unless ``x`` asks for gradients where they are recorded (nowhere in `sample`): both can then be
    differentiated in ``x`` and in the energy's parameters. An energy with a method ``value_and_gradient(x)``, as what
    is computed outside of torch may have, is asked for both without a graph where none is wanted.

    Raises
    ------
    ArgumentTypeError
        If the energy is not a tensor that depends on ``x`` through differentiable operations.
    """
    if torch.compiler.is_compiling():
        # autograd.grad breaks the graph there; torch.func does not, but is the slower one eagerly.
        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            value = energy(x)
            return value.sum(), value

        grad, (_, value) = torch.func.grad_and_value(total, has_aux=True)(x)
        return value, grad
    recorded = torch.is_grad_enabled() and x.requires_grad
    if not recorded and (direct := getattr(energy, "value_and_gradient", None)) is not None:
        return direct(x.detach())
    with torch.enable_grad():
        y = x if recorded else x.detach().requires_grad_(True)
        value = energy(y)
        if not isinstance(value, Tensor) or not value.requires_grad:
            found = f"a {value.dtype} tensor that does not" if isinstance(value, Tensor) else repr(value)
            raise ArgumentTypeError(
                f"An energy returns a tensor that depends on x through differentiable operations; got {found}. "
                "Rounding, .item(), .detach(), torch.no_grad() and torch.inference_mode() all cut the dependence."
            )
        (grad,) = torch.autograd.grad(value.sum(), y, create_graph=recorded)
    return (value if recorded else value.detach()), grad


def energy_only(energy: EnergyFn, x: Tensor) -> State:
    """State of a kernel that uses no gradient: its ``grad`` is empty, ``(n, 0)``."""
    return State(x, energy(x).detach(), x.new_zeros((x.shape[0], 0)))


def check_carried(
    kernel: object, state: State, *, grad: bool = True, origin: int = 0, momentum: int = 0, memory: int = 0
) -> None:
    """Refuse a state that does not hold what a kernel carries from step to step, that is, another kernel's.

    Parameters
    ----------
    kernel
        For its name.
    state
        The state to start from; more than is asked for is let through.
    grad, origin, momentum, memory
        Whether a gradient is needed, and how many tensors of the other kinds.

    Raises
    ------
    ArgumentTypeError
        If something is missing.
    """
    missing = [] if not grad or state.grad.shape == state.x.shape else ["gradients"]
    for name, kept, asked, words in (
        ("origin", state.origin, origin, "the place to return to"),
        ("momentum", state.momentum, momentum, "momenta"),
        ("memory", state.memory, memory, "a memory of earlier steps"),
    ):
        if asked and len(kept) != asked:
            missing.append(f"{words} ({name})")
    if missing:
        raise ArgumentTypeError(
            f"This state comes from another kernel, and {type(kernel).__name__} needs {' and '.join(missing)}; "
            "start from its positions, state.x."
        )


def per_chain(values: Tensor, like: Tensor) -> Tensor:
    """Give ``(n,)`` the axes of ``(n, *event)``, to broadcast."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def row_sum(x: Tensor) -> Tensor:
    """Sum over the event's axes: ``(n, *event) -> (n,)``."""
    # Not flatten(1).sum(1), which copies images in channels_last: ten times slower for colour pictures.
    return x.sum(tuple(range(1, x.ndim)))


def is_finite(energy: Tensor, grad: Tensor) -> Tensor:
    """Chains whose energy and whole gradient are finite, ``(n,)`` of bools."""
    # x - x is 0 for numbers and NaN otherwise, so one sum tells without a second array of bools.
    return torch.isfinite(energy) & (row_sum(grad - grad) == 0)


def choose(accept: Tensor, new: State, old: State) -> State:
    """Take position, energy and gradient of each chain from ``new`` where ``accept``, else from ``old``."""
    wide = per_chain(accept, new.x)
    return State(
        torch.where(wide, new.x, old.x),
        torch.where(accept, new.energy, old.energy),
        torch.where(per_chain(accept, new.grad), new.grad, old.grad),
        old.origin,
        old.momentum,
        old.memory,
    )


def restarted(new: State) -> tuple[State, Tensor]:
    """Return chains that left the numbers to their origin; also who did, ``(n,)`` of bools."""
    finite = is_finite(new.energy, new.grad)
    x, energy, grad = new.origin
    return choose(finite, new, State(x, energy, grad, new.origin, new.momentum, new.memory)), ~finite


def with_origin(state: State) -> State:
    """Let an unadjusted kernel's chains remember where they start."""
    return state._replace(origin=(state.x.clone(), state.energy.clone(), state.grad.clone()))


def map_state(fn: Callable[..., Tensor], *states: State) -> State:
    """Apply a function to every tensor of a state, or to the corresponding tensors of several."""
    x, energy, grad = (fn(*(s[i] for s in states)) for i in range(3))
    carried = [tuple(fn(*each) for each in zip(*(s[i] for s in states))) for i in range(3, 6)]
    return State(x, energy, grad, *carried)


def metropolis(
    old: State, new: State, log_ratio: Tensor, uniform: Tensor, details: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[State, Info]:
    """Accept with probability ``min(1, exp(log_ratio))``; a proposal that is not finite is rejected and counted."""
    finite = is_finite(new.energy, new.grad) & ~log_ratio.isnan()
    probability = torch.where(finite, log_ratio.clamp(max=0.0).exp(), 0.0)
    return choose(uniform < probability, new, old), Info(probability, (~finite).to(probability.dtype), details)


def is_adjusted(kernel: object) -> bool:
    """Whether a kernel, and any kernel inside it, leaves densities invariant; those that do not, say so."""
    inner = getattr(kernel, "kernel", None)
    return bool(getattr(kernel, "adjusted", True)) and (inner is None or is_adjusted(inner))


def has_step_size(kernel: object) -> bool:
    """Whether a kernel has a step size that its acceptance can guide."""
    guided = getattr(kernel, "target_acceptance", None) is not None
    return dataclasses.is_dataclass(kernel) and hasattr(kernel, "step_size") and guided


def owner_of_setting(kernel: Any, name: str) -> Any:
    """Find whose setting it is: the kernel's, or that of the one inside a wrapper; ``None`` where nobody has it."""
    names = {f.name for f in dataclasses.fields(kernel)} if dataclasses.is_dataclass(kernel) else set()
    if name in names:
        return kernel
    return owner_of_setting(cast(Any, kernel).kernel, name) if "kernel" in names else None


def with_setting(kernel: Any, name: str, value: object) -> Any:
    """Copy a kernel with another value of a setting of its own, or of the kernel inside it."""
    if (owner := owner_of_setting(kernel, name)) is None or owner is kernel:
        return dataclasses.replace(kernel, **{name: value})
    return dataclasses.replace(kernel, kernel=with_setting(kernel.kernel, name, value))


def with_step_size(kernel: Any, step_size: Scalar) -> Any:
    """Copy a kernel with another step size; that of a wrapper is the step size of the kernel inside."""
    return with_setting(kernel, "step_size", step_size)


def settings_inside(kernel: object) -> list[Any]:
    """List the values of a kernel's settings, those of kernels inside it too."""
    values = []
    for value in vars(kernel).values():
        values += settings_inside(value) if isinstance(value, Kernel) else [value]
    return values


def settings_repr(self: Any) -> str:
    """``__repr__`` of kernels: the settings that are not ``None``, a tensor as its shape or its one number."""
    told = []
    for f in dataclasses.fields(self):
        value = getattr(self, f.name)
        if value is None:
            continue
        if isinstance(value, Tensor):
            value = f"{value.item():.6g}" if value.ndim == 0 else f"<{tuple(value.shape)}>"
        told.append(f"{f.name}={value}")
    return f"{type(self).__name__}({', '.join(told)})"
