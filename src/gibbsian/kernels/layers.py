r"""Alternating Gibbs sampling of machines with two layers: :math:`v \to h \to v'`.

An energy of two layers tells them by ``two_layers(x)``, an object with

``hidden_field(v)``
    the field on the hidden units, ``(n, M)``;
``draw_hidden(field, u)``, ``draw_visible(h, u)``
    states from uniform numbers, ``(n, M)`` and of the shape of v;
``energy(v, field)``
    the energy of the visible states, ``(n,)``, from the field there, and by how much it exceeds that of the machine
    that draws; ``None`` where it does not;
``shares_fields(other)``
    whether another such object gives the same hidden fields.

Sums, multiples and fixed contexts pass it on, so that tempered and annealed machines are sampled too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from gibbsian.errors import ArgumentTypeError, DomainError
from gibbsian.kernels.base import Info, State, check_carried, choose, is_finite, metropolis, per_chain, settings_repr
from gibbsian.kernels.discrete import DISCRETE, check_states, uniforms
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class RBMGibbs:
    """Draw all hidden units given the visible ones, then all visible ones given the hidden.

    `Training products of experts by minimizing contrastive divergence (Hinton, 2002)
    <https://doi.org/10.1162/089976602760128018>`_. A step costs two products with the couplings and no derivative, and
    is reversible. On a machine, and on the path of machines of `rbm_path`, nothing is rejected. A machine at another
    temperature, ``beta * rbm``, or with other energies beside it, as on a geometric path, is not one of two layers with
    independent units; there the nearest machine proposes, and a Metropolis test makes the step exact: `acceptance`
    tells how near it was.

    Raises
    ------
    ArgumentTypeError
        At the start, if the energy has no two layers.
    DomainError
        At the start, if chains do not stand on states.
    """

    gradients = 1  # Two products, as many as a gradient takes.
    domain = (*DISCRETE, "discrete", "real")
    __repr__ = settings_repr

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the energy and the hidden field at the start."""
        machine = _machine(energy, x)
        _check_start(energy, x)
        return _begun(machine, x, machine.hidden_field(x).detach())

    def arrive(self, energy: EnergyFn, state: State, before: EnergyFn) -> State:
        """Start at another temperature where chains stopped under ``before``; one machine keeps its hidden fields."""
        machine = _machine(energy, state.x)
        if not machine.shares_fields(_machine(before, state.x)):
            return self.init(energy, state.x)
        return _begun(machine, state.x, state.memory[0])

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """A uniform number for each number in a hidden and in a visible state; one more where there is a test."""
        if len(state.memory) != 2:
            check_carried(self, state, grad=False, memory=1)
        shapes = [tuple(state.memory[0].shape), tuple(state.x.shape)]
        return uniforms(steps, rng, state.x, *shapes, *[tuple(state.energy.shape)] * (len(state.memory) - 1))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Draw both layers; undone, and counted, in chains where the energy is not finite."""
        machine = _machine(energy, state.x)
        field = state.memory[0]
        x = machine.draw_visible(machine.draw_hidden(field, noise[0]), noise[1]).detach()
        if x.ndim == 4:
            # As chains of images start; steps from another layout would be compiled anew.
            x = x.contiguous(memory_format=torch.channels_last)
        arrived = machine.hidden_field(x).detach()
        value, excess = machine.energy(x, arrived)
        old = State(state.x, state.energy, x.new_zeros((x.shape[0], 0)))
        new = old._replace(x=x, energy=value.detach())
        if excess is None:
            accepted = is_finite(new.energy, new.grad)
            sure = accepted.to(new.energy.dtype)
            there, info = choose(accepted, new, old), Info(sure, 1.0 - sure)
            memory = (torch.where(per_chain(accepted, field), arrived, field),)
        else:
            before, after = state.memory[1], excess.detach()
            there, info = metropolis(old, new, before - after, noise[2])
            accepted = noise[2] < info.acceptance
            memory = (torch.where(per_chain(accepted, field), arrived, field), torch.where(accepted, after, before))
        return there._replace(memory=memory), info


def _machine(energy: EnergyFn, x: Tensor) -> Any:
    method = getattr(energy, "two_layers", None)
    if method is None:
        raise ArgumentTypeError(
            f"RBMGibbs alternates between two layers, and {type(energy).__name__} does not tell any. It serves RBM, "
            "its multiples and its sums with other energies; on discrete states BlockGibbs, GibbsWithGradients and "
            "SingleSiteGibbs serve others."
        )
    return method(x)


def _begun(machine: Any, x: Tensor, field: Tensor) -> State:
    value, excess = machine.energy(x, field)
    memory = (field,) if excess is None else (field, excess.detach())
    return State(x, value.detach(), x.new_zeros((x.shape[0], 0)), memory=memory)


def _check_start(energy: EnergyFn, x: Tensor) -> None:
    """Refuse chains that do not stand on states; a compiled graph, which could not wait, does not look."""
    support: Any = getattr(energy, "support", None)
    if torch.compiler.is_compiling() or support is None or not support.is_discrete:
        return
    inside = support.check(x).reshape(len(x), -1).all(1)
    if bool(inside.all()):
        return
    if isinstance(support, (type(constraints.boolean), type(constraints.one_hot))):
        check_states(energy, x)
    outside = int((~inside).sum())
    raise DomainError(f"{outside} of {len(x)} chains start outside the energy's domain, {support}.")
