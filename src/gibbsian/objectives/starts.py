"""Where the chains of a training round start: at data, at noise, or where chains of earlier rounds stopped.

Contrastive divergence starts all of them at data, persistent contrastive divergence most in the buffer and a few at
noise, short-run training all at noise. These are corners of one triangle of fractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.buffers import Slots
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import OptionError
from gibbsian.kernels.base import per_chain
from gibbsian.typing import Context


@dataclass(frozen=True)
class Starts:
    """The fractions of a round's chains by where they start; they add to 1.

    Of n chains, the number of each kind is one of the two whole numbers around its fraction of n, and right on average.

    Parameters
    ----------
    data
        At rows of the batch, each chain under its row's labels.
    noise
        At draws of the base.
    buffer
        Where chains of earlier rounds stopped. If there are any, the others too are put into the buffer's slots, in the
        place of chains that end.

    Raises
    ------
    OptionError
        If a fraction is negative, or they do not add to 1.
    """

    data: float = 0.0
    noise: float = 0.0
    buffer: float = 0.0

    def __post_init__(self) -> None:
        for name in ("data", "noise", "buffer"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise OptionError(f"The start fraction {name} lies between 0 and 1; got {value}.")
        total = math.fsum((self.data, self.noise, self.buffer))
        if abs(total - 1.0) > 1e-9:
            raise OptionError(
                f"The start fractions add to 1; data={self.data}, noise={self.noise} and buffer={self.buffer} add to "
                f"{total:g}."
            )


AT_DATA = Starts(data=1.0)
"""All chains start at the data, as in contrastive divergence."""


@torch.no_grad()
def fresh_starts(starts: Starts, base: Tractable | None, data: Tensor, context: Context, rng: Generator) -> Slots:
    """Start as many chains as there are rows, at the rows or at draws of the base; chain i is under row i's labels.

    Parameters
    ----------
    starts
        The fractions; none from a buffer.
    base
        Draws the noise, where there is any.
    data
        ``(n, *event)``.
    context
        The rows' labels.
    rng
        The generator, on the data's device.
    """
    n, x = len(data), data.detach()
    index = torch.arange(n, device=x.device)
    if base is not None and starts.noise > 0.0:
        noise = base.sample(n, rng)
        if starts.data == 0.0:
            x = noise
        else:
            rank = torch.randperm(n, generator=rng, device=x.device)
            at_data = rank < (starts.data * n + torch.rand((), generator=rng, device=x.device)).floor()
            x = torch.where(per_chain(at_data, x), x, noise)
    return Slots(index, x, torch.zeros_like(index), dict(context))
