"""Checks of what chains are given: options, energy and kernel, where they start."""

from __future__ import annotations

from numbers import Integral
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from gibbsian.chain_lanes import Plan
from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of
from gibbsian.energies.layers import check_function
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Kernel, State, owner_of_setting

_DISCRETE = (
    "Discrete states need a discrete kernel: BlockGibbs, GibbsWithGradients, DiscreteLangevin, PathAuxiliary, "
    "SingleSiteGibbs."
)
FITTING = {
    "real": "Kernels over the reals: RandomWalk, MALA, HMC, NUTS, ULA and others.",
    "box": "Kernels over the reals fit a box, as they are, reflected (Reflected), or after unconstrain(energy).",
    "torus": "Wrap a kernel over the reals: Wrapped(MALA(0.1), energy.support).",
    "sphere": "SphericalHMC moves along great circles.",
    "boolean": _DISCRETE,
    "one_hot": _DISCRETE,
    "discrete": "Discrete states need a discrete kernel, over binary (boolean) or one-hot states.",
}
"""What walks where, for messages."""

_DECLARE = (
    "If its states are zeros and ones, declare it: Energy.of(fn, support=constraints.boolean), or constraints.one_hot, "
    "or add a base such as Bernoulli. " + FITTING["real"]
)


def checked_plan(plan: Plan) -> Plan:
    """Check how far chains shall go, and what shall be kept."""
    steps, warmup, thin, _ = plan
    for name, count in (("steps", steps), ("warmup", warmup), ("thin", thin)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral)):
            raise ArgumentTypeError(f"{name} is a whole number of steps; got {count!r}.")
    if steps < 1:
        raise OptionError(f"steps is 1 or more; got {steps}.")
    if not 0 <= warmup <= steps:
        raise OptionError(f"warmup lies between 0 and steps={steps}; got {warmup}.")
    if thin is not None and not 1 <= thin <= steps - warmup:
        raise OptionError(
            f"thin lies between 1 (keep every position) and the steps after the warm-up, {steps - warmup}; got {thin}."
        )
    return plan


def check_energy(energy: object, kernel: object) -> None:
    """Check that there are an energy and a kernel that can walk on it."""
    if not callable(energy):
        raise ArgumentTypeError(f"The energy must be a function or module from (n, *event) to (n,); got {energy!r}.")
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise ArgumentTypeError(f"The kernel needs init, noise and step (ULA, MALA, HMC, ...); got {kernel!r}.")
    if isinstance(energy, Energy) and energy.context:
        missing = ", ".join(f"{name}=..." for name in energy.context)
        raise OptionError(f"The energy is conditional; fix its context before sampling: energy.given({missing}).")
    check_function(energy)
    check_domain(energy, kernel)


def check_domain(energy: object, kernel: Kernel) -> None:
    """Refuse a kernel that cannot walk where the energy lives.

    Raises
    ------
    DomainError
        With both domains and what fits.
    """
    support = getattr(energy, "support", constraints.real)
    kind = kind_of(support)
    walks = (kernel.domain,) if isinstance(kernel.domain, str) else tuple(kernel.domain)
    # Outside a box an energy is infinite, and kernels over the reals reject or restart there.
    if kind in walks or (kind == "box" and "real" in walks):
        return
    name = type(kernel).__name__
    does = "follows gradients over the reals" if walks == ("real",) else f"walks on {' and '.join(walks)} states"
    undeclared = kind == "real" and "boolean" in walks
    raise DomainError(f"{name} {does}, but the energy lives on {support}. {_DECLARE if undeclared else FITTING[kind]}")


def check_start(x: Tensor, energy: object, rng: Generator) -> None:
    """Check positions, and that the generator is where they are."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentTypeError(f"Chains start from a floating-point tensor (n, *event); got {found}.")
    if x.ndim < 2 or x.shape[0] < 1:
        raise ShapeError(f"Chains start from a tensor (n, *event) with n of 1 or more; got shape {tuple(x.shape)}.")
    expected = energy.event_shape if isinstance(energy, Energy) else None
    if expected is not None and expected != x.shape[1:]:
        raise ShapeError(f"The energy takes points of shape {tuple(expected)}; the chains start at {tuple(x.shape)}.")
    if not isinstance(rng, Generator):
        raise ArgumentTypeError(f"rng is a torch.Generator, as torch.Generator().manual_seed(0); got {rng!r}.")
    if rng.device.type != x.device.type:
        raise OptionError(
            f"The generator is on {rng.device} and the chains are on {x.device}; "
            f"use torch.Generator(device={str(x.device)!r})."
        )


def check_state(state: State) -> None:
    """Check where chains start: one floating-point energy each, and everything finite."""
    check_energies(state)
    check_sound(finite_chains(state))


def finite_chains(state: State) -> Tensor:
    """Whether energy and gradient are finite, ``(n,)`` of bools."""
    return torch.isfinite(state.energy) & torch.isfinite(state.grad).flatten(1).all(1)


def check_energies(state: State) -> None:
    """Check that there is one floating-point energy for each chain."""
    n = state.x.shape[0]
    if not state.energy.is_floating_point():
        raise ArgumentTypeError(
            f"An energy returns floating-point numbers, in nats; got {state.energy.dtype}. Return value.to(x.dtype)."
        )
    if tuple(state.energy.shape) != (n,):
        raise ShapeError(
            f"The energy of {n} points must have shape ({n},); it returned {tuple(state.energy.shape)}. "
            "Sum over the event's axes, or drop a trailing axis with .squeeze(-1)."
        )


def check_sound(finite: Tensor) -> None:
    """Refuse chains that start where the energy or its gradient is not finite: ``(n,)`` of bools."""
    if bad := int((~finite).sum()):
        raise DomainError(
            f"{bad} of {len(finite)} chains start where the energy or its gradient is not finite; start them inside "
            "the energy's domain, for example from base.sample(n, rng)."
        )


def check_chainwise(kernel: Kernel, n: int) -> None:
    """Refuse a step size that is a tensor of neither one number nor one for each of n chains."""
    if owner_of_setting(kernel, "step_size") is kernel:
        size = cast(Any, kernel).step_size
        if isinstance(size, Tensor) and tuple(size.shape) not in ((), (1,), (n,)):
            raise ShapeError(
                f"step_size is one number, or one for each of {n} chains, ({n},); got a tensor of shape "
                f"{tuple(size.shape)}. Lengths for each coordinate are a scale."
            )


def check_divisible(kernel: Kernel) -> None:
    """Refuse settings that hold a number for each chain."""
    for name in ("step_size", "friction", "noise_scale"):
        value = getattr(owner_of_setting(kernel, name), name, None)
        if isinstance(value, Tensor) and value.ndim == 1:
            raise OptionError(
                f"{name} holds {len(value)} numbers, one for each chain, and lanes share a kernel whose settings are "
                "those of all chains; give one number, or leave lanes out."
            )
