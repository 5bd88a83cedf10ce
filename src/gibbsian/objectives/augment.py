"""Moves of a chain between two rounds of training: what the sampler finds hard and a symmetry of the data gives free.

A mirrored or shifted image is as likely as the image, and Langevin steps take very long from one to the other. Such a
move leaves the model's density invariant only as far as the model has the symmetry; otherwise it pushes the chains off
it, and the steps that follow have to bring them back.

`Improved contrastive divergence training of energy-based models (Du et al., 2021) <https://arxiv.org/abs/2012.01316>`_.

A move is any function ``(x, rng) -> x`` that keeps the shape ``(n, *event)``; those for images take the last two axes
as height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import per_chain

Move: TypeAlias = Callable[[Tensor, Generator], Tensor]
"""``(x, rng) -> x`` of one shape, ``(n, *event)``; rows do not see each other."""


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror some of the images, left to right.

    Parameters
    ----------
    probability
        Of each image.

    Raises
    ------
    OptionError
        If the probability is not between 0 and 1.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise OptionError(f"probability lies between 0 and 1; got {self.probability}.")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Move images ``(n, ..., height, width)``.

        Raises
        ------
        ShapeError
            If they are not images.
        """
        _check_images(self, x)
        mirrored = torch.rand(len(x), generator=rng, device=x.device) < self.probability
        return torch.where(per_chain(mirrored, x), x.flip(-1), x)


@dataclass(frozen=True)
class Shift:
    """Shift each image by whole pixels, drawn uniformly; the border is repeated into what comes free.

    Parameters
    ----------
    pixels
        The farthest along each axis, 1 or more.

    Raises
    ------
    OptionError
        If it is no positive whole number.
    """

    pixels: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, int) or self.pixels < 1:
            raise OptionError(f"pixels is a whole number, 1 or more; got {self.pixels!r}.")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Move images ``(n, ..., height, width)``.

        Raises
        ------
        ShapeError
            If they are not images.
        """
        _check_images(self, x)
        for axis in (-2, -1):
            by = torch.randint(-self.pixels, self.pixels + 1, (len(x), 1), generator=rng, device=x.device)
            size = x.shape[axis]
            source = (torch.arange(size, device=x.device) - by).clamp(0, size - 1)
            shape = [len(x), *[1] * (x.ndim - 1)]
            shape[axis] = size
            x = x.gather(axis, source.view(shape).expand_as(x))
        return x


@dataclass(frozen=True)
class AdditiveNoise:
    """Add Gaussian noise to every coordinate.

    Parameters
    ----------
    sigma
        Its standard deviation, in units of x.

    Raises
    ------
    OptionError
        If it is not positive.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma < float("inf"):
            raise OptionError(f"sigma is a positive number; got {self.sigma}.")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Move points ``(n, *event)``."""
        return x + self.sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


@dataclass(frozen=True)
class UniformNoise:
    """Add uniform noise to every coordinate, half of it below and half above.

    Parameters
    ----------
    width
        From the lowest to the highest, in units of x; of values that come in steps, one step.

    Raises
    ------
    OptionError
        If it is not positive.
    """

    width: float

    def __post_init__(self) -> None:
        if not 0.0 < self.width < float("inf"):
            raise OptionError(f"width is the positive step of the data's values; got {self.width}.")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Move points ``(n, *event)``."""
        return x + self.width * (torch.rand(x.shape, generator=rng, dtype=x.dtype, device=x.device) - 0.5)


@dataclass(frozen=True)
class InTurn:
    """Several moves, one after the other.

    Parameters
    ----------
    moves
        The first is made first.

    Raises
    ------
    OptionError
        If there is none.
    """

    moves: tuple[Move, ...]

    def __post_init__(self) -> None:
        if not self.moves:
            raise OptionError("InTurn makes one move or more; got none.")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Move points ``(n, *event)``."""
        for move in self.moves:
            x = move(x, rng)
        return x


def _check_images(move: object, x: Tensor) -> None:
    if x.ndim < 3:
        raise ShapeError(
            f"{type(move).__name__} moves images, (n, ..., height, width); the chains have the shape {tuple(x.shape)}."
        )
