"""Energies that every library in the chain benchmark samples from.

Only ``torch`` is imported here, so that one file serves workers living in different environments.  Each energy maps a
batch ``(n, *event)`` to ``(n,)`` and stands for the density proportional to ``exp(-E)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

Energy = Callable[[Tensor], Tensor]

MANY_WELL_LOG_Z = 164.6957


class ManyWell(nn.Module):
    """Sum of independent planar double wells, ``(a, b)`` pairs interleaved along the event dimension.

    One pair has the energy ``a**4 - 6 a**2 - a / 2 + b**2 / 2``.
    """

    linear: Tensor
    quadratic: Tensor
    quartic: Tensor

    def __init__(self, pairs: int = 16) -> None:
        super().__init__()
        # One polynomial for every coordinate, with constants that differ: the quick form on a CPU, for everyone. Pairs
        # taken apart are strided slices, which neither PyTorch nor its compiler reads with vector instructions.
        for name, a, b in (("linear", -0.5, 0.0), ("quadratic", -6.0, 0.5), ("quartic", 1.0, 0.0)):
            self.register_buffer(name, torch.tensor((a, b)).repeat(pairs))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row of ``x``, shape ``(n, 2 * pairs)``."""
        squared = x * x
        return (squared * (self.quartic * squared + self.quadratic) + self.linear * x).sum(dim=1)


class MLP(nn.Module):
    """Fully connected energy ``2-128-128-1`` with SiLU activations."""

    def __init__(self, widths: tuple[int, ...] = (2, 128, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row of ``x``, shape ``(n, 2)``."""
        return self.net(x).squeeze(-1)


class ConvNet(nn.Module):
    """Convolutional energy on ``1x28x28`` images: three 3x3 convolutions, SiLU, and a linear read-out.

    Parameters
    ----------
    channels : tuple of int
        Output channels of the three convolutions, whose strides are 1, 2 and 2.
    """

    def __init__(self, channels: tuple[int, int, int] = (64, 64, 64)) -> None:
        super().__init__()
        first, second, third = channels
        self.net = nn.Sequential(
            nn.Conv2d(1, first, 3, stride=1, padding=1),
            nn.SiLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(second, third, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(third * 7 * 7, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each image in ``x``, shape ``(n, 1, 28, 28)``."""
        return self.net(x).squeeze(-1)


@dataclass(frozen=True)
class Target:
    """An energy with what is needed to start chains on it.

    Attributes
    ----------
    make : callable
        Builds the module; called under a fixed seed.
    event : tuple of int
        Shape of one position.
    step_sizes : dict of str to float
        Step size by kernel, such that the adjusted kernels accept most proposals; the cost of a step does not depend
        on it, but chains that diverge would.
    """

    make: Callable[[], nn.Module]
    event: tuple[int, ...]
    step_sizes: dict[str, float]


TARGETS: dict[str, Target] = {
    "manywell32": Target(ManyWell, (32,), {"ULA": 1e-3, "MALA": 5e-3, "HMC": 5e-2}),
    "mlp": Target(MLP, (2,), {"ULA": 1e-3, "MALA": 1e-3, "HMC": 1e-2}),
    "conv28": Target(ConvNet, (1, 28, 28), {"ULA": 1e-3, "MALA": 1e-3, "HMC": 1e-2}),
}

LEAPFROG = 10

CD_STEPS, CD_ROWS, LEARNING_RATE = 10, 4096, 1e-4
"""Of training by contrastive divergence: Langevin steps, rows of data, and Adam's learning rate."""


def build(name: str) -> nn.Module:
    """Build a named target, the same weights in every process: frozen and in evaluation mode."""
    torch.manual_seed(20_240_607)
    return TARGETS[name].make().eval().requires_grad_(False)


def start(name: str, chains: int) -> Tensor:
    """Draw standard normal starting positions, the same in every process."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(chains, *TARGETS[name].event, generator=rng)


def trainable(name: str) -> nn.Module:
    """Build a named target with the same weights, in training mode."""
    return build(name).train().requires_grad_(True)
