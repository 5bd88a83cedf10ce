"""Small deep Boltzmann machines, and their joint energies over all states of all layers, written out layer by layer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from contracts import seeded
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits
from machines import everywhere, told

LAYERS = {
    "two": (BernoulliUnits(3), (BernoulliUnits(2), BernoulliUnits(3))),
    "three": (BernoulliUnits(2), (BernoulliUnits(3), BernoulliUnits(2), BernoulliUnits(2))),
    "four": (BernoulliUnits(2), (BernoulliUnits(2), BernoulliUnits(1), BernoulliUnits(2), BernoulliUnits(2))),
    "spins": (SpinUnits(3), (SpinUnits(2), BernoulliUnits(1), SpinUnits(2))),
    "classes": (CategoricalUnits(2, classes=3), (CategoricalUnits(1, classes=3), SpinUnits(2))),
    "reals": (GaussianUnits(1, scale=0.7), (BernoulliUnits(2), SpinUnits(2))),
}


def deep(name: str, seed: int = 0, scale: float = 0.7) -> DeepBoltzmannMachine:
    """A machine with random parameters and offsets, in float64."""
    visible, hidden = LAYERS[name]
    machine, rng = DeepBoltzmannMachine(visible, hidden, rng=seeded(seed)).double(), seeded(seed + 1)
    with torch.no_grad():
        for tensor in (*machine.parameters(), machine.even_offset, machine.odd_offset):
            tensor.copy_(scale * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))
    return machine


def listed(machine: DeepBoltzmannMachine) -> tuple[list[Tensor], list[Tensor]]:
    """All states of each layer, and the logarithms of their weights."""
    pairs = [everywhere(units) for units in machine.layers]
    return [x for x, _ in pairs], [w for _, w in pairs]


def joint(machine: DeepBoltzmannMachine) -> Tensor:
    """Joint energies less log-weights: one axis for the states of each layer."""
    states, log_w = listed(machine)
    biases, offsets = ([None] * len(states) for _ in range(2))
    for first, bias, offset in (
        (0, machine.even_bias, machine.even_offset),
        (1, machine.odd_bias, machine.odd_offset),
    ):
        sizes = [units.size for units in machine.layers[first::2]]
        biases[first::2], offsets[first::2] = bias.split(sizes), offset.split(sizes)
    centred = [told(u, x)[0] - o for u, x, o in zip(machine.layers, states, offsets)]
    total = torch.zeros((), dtype=torch.float64)
    depth = len(states)
    for i, (units, x) in enumerate(zip(machine.layers, states)):
        own = told(units, x)[1] - log_w[i] - centred[i] @ biases[i]
        total = total + own.view([-1 if axis == i else 1 for axis in range(depth)])
    for i, w in enumerate(machine.weights):
        pairs = -torch.einsum("ad,de,be->ab", centred[i], w, centred[i + 1])
        shape = [1] * depth
        shape[i : i + 2] = pairs.shape
        total = total + pairs.view(shape)
    return total


def summed(energies: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Free energies of some layers, all others summed out; one axis for each that is kept."""
    rest = tuple(axis for axis in range(energies.ndim) if axis not in kept)
    return -torch.logsumexp(-energies, rest)


def side(machine: DeepBoltzmannMachine, first: int) -> Tensor:
    """All states of every second layer as flat rows, in the order of the axes of `summed`."""
    parts = [x.flatten(1) for x in listed(machine)[0][first::2]]
    rows = torch.stack([torch.cat(each) for each in itertools.product(*parts)])
    return (machine.even, machine.odd)[first].shaped(rows)


def evens(machine: DeepBoltzmannMachine) -> tuple[int, ...]:
    """The even layers."""
    return tuple(range(0, len(machine.layers), 2))


def odds(machine: DeepBoltzmannMachine) -> tuple[int, ...]:
    """The odd layers."""
    return tuple(range(1, len(machine.layers), 2))
