r"""The network that steers a diffusion sampler: two corrections of each coordinate, from a point and its slope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gibbsian.energies.neural import check_widths

FREQUENCIES = 8
"""Waves in which the network reads the time."""

LOCAL = 16
"""Width of the network that every coordinate has to itself."""


class Controls(nn.Module):
    """Corrections of the drift, forwards and backwards, both zero before training.

    The sum of two networks: one that sees the whole point, and one that sees one coordinate at a time, the same for all
    but for what it knows of which coordinate it is. The second learns at once what coordinates have in common; the
    first what they do to each other.

    Parameters
    ----------
    size
        Numbers in one point.
    hidden
        Widths of the hidden layers of the first.
    """

    def __init__(self, size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = check_widths("hidden", hidden)
        self.size = size
        self.point = nn.Linear(2 * size, widths[0])
        self.time = nn.Linear(2 * FREQUENCIES, widths[0])
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.SiLU(), nn.Linear(before, after)]
        self.middle = nn.Sequential(*layers, nn.SiLU())
        self.last = nn.Linear(widths[-1], 2 * size)
        self.pair = nn.Linear(2, LOCAL)
        self.place = nn.Parameter(0.5 * torch.randn(size, LOCAL))
        self.local_time = nn.Linear(2 * FREQUENCIES, LOCAL)
        self.local = nn.Sequential(nn.SiLU(), nn.Linear(LOCAL, LOCAL), nn.SiLU())
        self.local_last = nn.Linear(LOCAL, 2)
        for layer in (self.last, self.local_last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, slope: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections at points, each ``(..., d)``.

        Parameters
        ----------
        x, slope
            Points in units of the base, and bounded slopes of the energy there, ``(..., d)``.
        time
            From 0 to 1, one for each point or for many, ``(..., 1)``.

        Returns
        -------
        tuple
            u and r of `gibbsian.learned.diffusion_sampler`.
        """
        phase = time * torch.arange(1, FREQUENCIES + 1, device=x.device, dtype=x.dtype) * (0.5 * math.pi)
        waves = torch.cat((phase.sin(), phase.cos()), -1)
        whole = self.last(self.middle(self.point(torch.cat((x, slope), -1)) + self.time(waves)))
        each = self.pair(torch.stack((x, slope), -1)) + self.place + self.local_time(waves).unsqueeze(-2)
        each = self.local_last(self.local(each))
        ahead, back = (a + b for a, b in zip(whole.split(self.size, -1), each.unbind(-1)))
        return ahead, back
