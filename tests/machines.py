"""Small Boltzmann machines of every pair of unit types, and their joint energies written out unit by unit.

The oracle shares no code with the library: it lists discrete layers, and integrates real ones on a grid.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contracts import seeded
from enumeration import System
from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.joined_units import JoinedUnits
from gibbsian.energies.real_units import GaussianUnits, ReLUUnits
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits, Units


class OfMachine(Energy):
    """The joint energy of a machine's layers."""

    context = ("z",)

    def __init__(self, machine):
        super().__init__()
        self.machine = machine
        self.event_shape, self.support = machine.event_shape, machine.support

    def forward(self, x, z):
        return self.machine.joint_energy(x, z)


SCALES = torch.tensor([0.7, 1.6], dtype=torch.float64)

VISIBLE = {
    "bernoulli": BernoulliUnits(3),
    "spin": SpinUnits(3),
    "categorical": CategoricalUnits(2, classes=3),
    "gaussian": GaussianUnits(2),
    "scaled": GaussianUnits(2, scale=SCALES),
    "joined": JoinedUnits((BernoulliUnits(2), CategoricalUnits(1, classes=3))),
}
HIDDEN = {
    "bernoulli": BernoulliUnits(2),
    "spin": SpinUnits(2),
    "categorical": CategoricalUnits(2, classes=3),
    "relu": ReLUUnits(2),
    "gaussian": GaussianUnits(2),
    "scaled": GaussianUnits(2, scale=0.8),
}
PAIRS = list(itertools.product(VISIBLE, HIDDEN))


def randomised(energy: RBM, seed: int = 0, scale: float = 0.6) -> RBM:
    """Random parameters and offsets, in float64."""
    rng, energy = seeded(seed), energy.double()
    with torch.no_grad():
        for tensor in (*energy.parameters(), energy.visible_offset, energy.hidden_offset):
            tensor.copy_(scale * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))
        if energy.visible.states_of_one is None or energy.hidden.states_of_one is None:
            # Two real layers have no density when they are coupled strongly.
            energy.weight.mul_(0.4)
    return energy


def machine(visible: str, hidden: str, seed: int = 0, scale: float = 0.6) -> RBM:
    """A random machine of two kinds of units."""
    return randomised(RBM(VISIBLE[visible], HIDDEN[hidden], rng=seeded(seed)), seed, scale)


def told(units: Units, x: Tensor) -> tuple[Tensor, Tensor]:
    """Statistic and own energy of states ``(m, *event)``: what the table of units says, one kind at a time."""
    flat = x.reshape(len(x), -1)
    if isinstance(units, JoinedUnits):
        return flat, torch.zeros(len(x), dtype=torch.float64)
    if isinstance(units, SpinUnits):
        return flat - (1.0 - flat), torch.zeros(len(x), dtype=torch.float64)
    if isinstance(units, GaussianUnits):
        variance = torch.as_tensor(units.scale, dtype=torch.float64) ** 2
        return flat / variance, (flat**2 / (2 * variance)).sum(1)
    if isinstance(units, ReLUUnits):
        return flat, (flat**2 / 2).sum(1)
    return flat, torch.zeros(len(x), dtype=torch.float64)


def table(energy: RBM, v: Tensor, h: Tensor) -> Tensor:
    """Joint energies of all pairs of visible and hidden states, ``(m, k)``."""
    (s, own_v), (t, own_h) = told(energy.visible, v), told(energy.hidden, h)
    s, t = s - energy.visible_offset, t - energy.hidden_offset
    return (
        own_v[:, None]
        + own_h[None]
        - (s @ energy.visible_bias)[:, None]
        - (t @ energy.hidden_bias)[None]
        - torch.einsum("ai,ij,bj->ab", s, energy.weight, t)
    )


def everywhere(units: Units) -> tuple[Tensor, Tensor]:
    """All states of a layer and the logarithms of their weights in a sum or an integral."""
    if isinstance(units, JoinedUnits):
        states = [everywhere(part)[0].flatten(1) for part in units.parts]
        rows = [torch.cat(each) for each in itertools.product(*states)]
        return torch.stack(rows), torch.zeros(len(rows), dtype=torch.float64)
    count = units.sites.numel()
    if isinstance(units, (BernoulliUnits, SpinUnits)):
        x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)
        return x.reshape(-1, *units.event_shape), torch.zeros(len(x), dtype=torch.float64)
    if isinstance(units, CategoricalUnits):
        labels = torch.tensor(list(itertools.product(range(units.classes), repeat=count)))
        x = torch.nn.functional.one_hot(labels, units.classes).double()
        return x, torch.zeros(len(x), dtype=torch.float64)
    low = 0.0 if isinstance(units, ReLUUnits) else -16.0
    nodes, weights = np.polynomial.legendre.leggauss(110 if low == 0.0 else 190)
    nodes, weights = 0.5 * (16.0 - low) * nodes + 0.5 * (16.0 + low), 0.5 * (16.0 - low) * weights
    x = torch.cartesian_prod(*[torch.as_tensor(nodes)] * count)
    w = torch.cartesian_prod(*[torch.as_tensor(weights).log()] * count)
    return x.reshape(-1, *units.event_shape), w.reshape(len(x), -1).sum(1)


def system_of(name: str, energy: RBM) -> System:
    """A machine on bits or one-hot states with all of its visible states."""
    states, _ = everywhere(energy.visible)
    return System(name, energy.requires_grad_(False), states, energy.visible.event_shape != energy.visible.sites)


def alternation(joint: Tensor) -> Tensor:
    """Transition matrix of v -> h -> v' from joint energies ``(m, k)``."""
    return (-joint).softmax(1) @ (-joint).softmax(0).T


class Products(TorchDispatchMode):
    """Counts matrix products of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))
