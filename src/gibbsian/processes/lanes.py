"""Lanes: equal shares of chains, or of a batch, each with random numbers of its own.

A job of R processes divides L lanes among them. What happens in a lane depends on the lane's number and the run's seed
and on nothing else, so that draws are the same whichever process a lane runs in, and however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator

from gibbsian.errors import OptionError
from gibbsian.processes.world import world

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Lanes:
    """So many lanes, of which each process has a contiguous and equal share.

    Parameters
    ----------
    count
        How many; a multiple of the number of processes.

    Raises
    ------
    OptionError
        If there are fewer lanes than processes, or processes cannot share them equally.
    """

    count: int

    def __post_init__(self) -> None:
        here = world()
        if self.count < 1:
            raise OptionError(f"There is 1 lane or more; got {self.count}.")
        if self.count % here.size:
            raise OptionError(
                f"{self.count} lane{'s' * (self.count != 1)} cannot be shared equally by {here.size} processes; take a "
                f"multiple of {here.size}, such as lanes={-(-self.count // here.size) * here.size}, or a number of "
                f"processes that divides {self.count}."
            )

    @property
    def own(self) -> range:
        """The numbers of this process's lanes."""
        here = world()
        per = self.count // here.size
        return range(here.rank * per, (here.rank + 1) * per)

    def share(self, total: int, what: str) -> int:
        """Say how many of ``total`` things one lane has.

        Parameters
        ----------
        total
            Chains, or rows of a batch.
        what
            Their name, for the message.

        Raises
        ------
        OptionError
            If the lanes do not divide them.
        """
        if total < self.count or total % self.count:
            near = max(1, round(total / self.count)) * self.count
            raise OptionError(f"{total} {what} cannot be divided equally among {self.count} lanes; take {near}.")
        return total // self.count

    def rows(self, lane: int, total: int, what: str = "chains") -> slice:
        """Say which of ``total`` rows are those of a lane."""
        per = self.share(total, what)
        return slice(lane * per, (lane + 1) * per)

    def generators(self, seed: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Generator]]:
        """Seed a generator for each of this process's lanes; pairs of the lane's number and its generator."""
        for lane in self.own:
            yield lane, Generator(device).manual_seed(lane_seed(seed, lane))


def lane_seed(seed: int, lane: int) -> int:
    """Mix a run's seed and a lane's number into a seed of 32 bits, as the CPU's generator uses, by SplitMix64.

    Parameters
    ----------
    seed
        Of the run; one number drawn from the caller's generator, the same on every process.
    lane
        Its number.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (lane + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & 0xFFFFFFFF
