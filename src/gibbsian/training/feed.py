"""Where the batches of a run come from.

A feed is asked for the rows of a step, lane by lane, and for what training wants to know of the data as a whole;
whether these lie in memory is its own affair.
"""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gibbsian.errors import OptionError
from gibbsian.objectives.base import Batch


@runtime_checkable
class Feed(Protocol):
    """What `fit` draws its batches from."""

    @property
    def n(self) -> int:
        """Rows of data in all."""
        ...

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one row."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows of one step, of all lanes together."""
        ...

    @property
    def lanes(self) -> int:
        """Equal shares of a batch."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        ...

    def batch(self, step: int, seed: int, lane: int) -> Batch:
        """Rows of one lane at one step, ``(batch_size / lanes, *event)``: a pure function of its arguments.

        Parameters
        ----------
        step
            Number of the step, from 0. To be asked in order is cheap.
        seed
            Of the order of the data.
        lane
            Number of the lane, from 0.
        """
        ...

    def spread(self, most: int) -> Batch:
        """Pick ``most`` rows, or all where there are fewer, the same ones at every call, from all over the data."""
        ...

    def sample(self) -> Tensor:
        """Rows by which the scale of the data is measured, ``(m, *event)``: all of them where they are in memory."""
        ...

    def marks(self) -> dict[str, str]:
        """Describe the data by name, checksums included, so that a resumed run and other processes can compare."""
        ...


class MemoryFeed:
    """Batches of data that lie in memory, in the order of `Order`; lane k has the k-th equal share of each.

    Parameters
    ----------
    data
        On the device of the parameters.
    batch_size
        Rows per step; all of them when there are fewer.
    lanes
        Shares of a batch.

    Raises
    ------
    OptionError
        If the lanes do not divide a batch.
    """

    def __init__(self, data: Batch, batch_size: int, lanes: int = 1) -> None:
        self.data, self.lanes = data, lanes
        self.order = Order(len(data), batch_size, data.x.device)
        if self.order.batch_size % lanes:
            whole = max(1, self.order.batch_size // lanes) * lanes
            told = "" if len(data) >= batch_size else f" (there are no more than {len(data)} rows of data)"
            raise OptionError(
                f"A batch of {self.order.batch_size} rows{told} cannot be divided equally among {lanes} lanes; take "
                f"batch_size={whole}, or lanes that divide it."
            )
        self.share = self.order.batch_size // lanes

    @property
    def n(self) -> int:
        """Rows of data."""
        return len(self.data)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one row."""
        return self.data.x.shape[1:]

    @property
    def batch_size(self) -> int:
        """Rows of one step."""
        return self.order.batch_size

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.data.x.device

    def batch(self, step: int, seed: int, lane: int) -> Batch:
        """Rows of one lane at one step."""
        rows = self.order.rows(step, seed)
        return self.data.rows(rows[lane * self.share : (lane + 1) * self.share])

    def spread(self, most: int) -> Batch:
        """Rows from all over the data."""
        return evenly(self.data, most)

    def sample(self) -> Tensor:
        """All rows."""
        return self.data.x

    def marks(self) -> dict[str, str]:
        """Shapes and checksums of rows and context."""
        parts = {"data": self.data.x} | {f"data.context[{name!r}]": v for name, v in self.data.context.items()}
        return {name: digest(value) for name, value in parts.items()}


class Order:
    """The order of the data: a new permutation every epoch, a pure function of the seed and the step.

    Parameters
    ----------
    n
        Rows of data.
    batch_size
        Rows per step; all of them when there are fewer. Rows left over at the end of an epoch wait for another one.
    device
        Of the data.
    """

    def __init__(self, n: int, batch_size: int, device: torch.device) -> None:
        self.n, self.batch_size = n, min(batch_size, n)
        self.generator = torch.Generator(device)
        self.epoch: tuple[int, int] | None = None

    def rows(self, step: int, seed: int) -> Tensor:
        """Indices of the rows of one step, ``(batch_size,)``."""
        epoch, place = divmod(step, self.n // self.batch_size)
        if self.epoch != (seed, epoch):
            # The CPU's generator uses 32 bits of a seed.
            self.generator.manual_seed((seed + epoch) % 2**32)
            self.permutation = torch.randperm(self.n, generator=self.generator, device=self.generator.device)
            self.epoch = (seed, epoch)
        return self.permutation[place * self.batch_size : (place + 1) * self.batch_size]


def evenly(data: Batch, most: int) -> Batch:
    """Pick ``most`` rows, or all where there are fewer, evenly spread, for data may come sorted."""
    n = len(data)
    return data.rows(torch.linspace(0, n - 1, min(n, most), device=data.x.device).long())


def digest(x: Tensor) -> str:
    """Write a tensor's dtype, shape and checksum."""
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{brief(x)} #{hashlib.sha256(raw.data).hexdigest()[:16]}"


def brief(x: Tensor) -> str:
    """Write a tensor's dtype and shape."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
