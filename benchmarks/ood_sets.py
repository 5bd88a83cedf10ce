"""The rows of `ood.py`: usual ones, foreign ones that are judged, and others by which the default was chosen.

All are grey images ``(n, 1, 28, 28)`` with pixels from 0 to 255.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn

from gibbsian.data import Dataset, load

NAMES = {"MNIST": "mnist", "Fashion-MNIST": "fashion_mnist"}
"""Sets in distribution, and what `load` calls them."""

REFERENCE = 5000
"""The last training rows, which no network learns from: they fit the scores that compare rows with others."""

HARD = ("rotated by 180", "mirrored", "rotated by 20")
"""Told, but outside of the averages: much of what they make is of the usual kind (0, 1, 8, 6 and 9; a mirrored shirt;
a slanted digit). Set down before anything was judged."""


@dataclasses.dataclass(frozen=True)
class Usual:
    """Rows of one set.

    Attributes
    ----------
    dataset
        With the training rows that networks learn from, and as held-out rows the test set.
    reference, labels
        Training rows kept back, and their classes.
    """

    dataset: Dataset
    reference: Tensor
    labels: Tensor


def usual(name: str) -> Usual:
    """Load a set, with its last training rows kept back."""
    whole = load(NAMES[name])
    assert whole.labels is not None
    kept = min(REFERENCE, len(whole.train) // 3)
    dataset = dataclasses.replace(whole, train=whole.train[:-kept], labels=whole.labels[:-kept])
    return Usual(dataset, whole.train[-kept:], whole.labels[-kept:])


def foreign(rows: Tensor, other: Mapping[str, Tensor], rng: Generator) -> dict[str, Tensor]:
    """Foreign rows to be judged.

    Parameters
    ----------
    rows
        Test rows of the set in distribution, ``(n, 1, 28, 28)``.
    other
        Test rows of the other set, by its name.
    rng
        Draws noise.
    """
    n = len(rows)
    normal = 127.5 + 64.0 * torch.randn(rows.shape, generator=rng)
    return {
        **{name: x[:n] for name, x in other.items()},
        "rotated by 90": rows.rot90(1, (2, 3)),
        "rotated by 45": rotated(rows, 45.0),
        "inverted": 255.0 - rows,
        "digits of scikit-learn": small_digits(n),
        "Gaussian noise": normal.clamp(0.0, 255.0),
        "uniform noise": 255.0 * torch.rand(rows.shape, generator=rng),
        "constant": (255.0 * torch.rand((n, 1, 1, 1), generator=rng)).expand(rows.shape).contiguous(),
        "rotated by 180": rows.rot90(2, (2, 3)),
        "mirrored": rows.flip(3),
        "rotated by 20": rotated(rows, 20.0),
    }


def strangers(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
    """Foreign rows by which scores were chosen and classifiers tuned; none is of a kind that is judged."""
    n = len(rows)
    makers: dict[str, Callable[[], Tensor]] = {
        "quarters exchanged": lambda: exchanged(rows, 2, rng),
        "sixteenths exchanged": lambda: exchanged(rows, 4, rng),
        "mean of two": lambda: (rows + rows[torch.randperm(n, generator=rng)]) / 2.0,
        "sheared": lambda: moved(rows, [[1.0, 0.8], [0.0, 1.0]]),
        "upright stretched": lambda: moved(rows, [[1.0, 0.0], [0.0, 1.8]]),
        "blurred": lambda: nn.functional.avg_pool2d(rows, 5, 1, 2),
        "edges": lambda: edges(rows),
        "photographs": lambda: photographs(n, rng),
        "smooth noise": lambda: smooth(rows.shape, rng),
    }
    return {name: make() for name, make in makers.items()}


def turned(rows: Tensor) -> dict[str, Tensor]:
    """Two more kinds by which the score was chosen anew: shapes that are usual but for their place."""
    return {"transposed": rows.transpose(2, 3), "sheared upright": moved(rows, [[1.0, 0.0], [0.8, 1.0]])}


def moved(rows: Tensor, matrix: list[list[float]]) -> Tensor:
    """Images under a linear map about their middle, from pixel to pixel by straight lines; black comes in."""
    theta = torch.tensor([[*line, 0.0] for line in matrix]).expand(len(rows), 2, 3)
    grid = nn.functional.affine_grid(theta, list(rows.shape), align_corners=False)
    return nn.functional.grid_sample(rows, grid, align_corners=False)


def rotated(rows: Tensor, degrees: float) -> Tensor:
    """Images turned about their middle."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return moved(rows, [[c, -s], [s, c]])


def exchanged(rows: Tensor, parts: int, rng: Generator) -> Tensor:
    """Images cut into squares, so many along each side, that change places in an order of each image's own."""
    size = rows.shape[-1] // parts
    squares = nn.functional.unfold(rows, size, stride=size)
    order = torch.rand((len(rows), 1, parts**2), generator=rng).argsort(2).expand_as(squares)
    return nn.functional.fold(squares.gather(2, order), rows.shape[2:], size, stride=size)


def edges(rows: Tensor) -> Tensor:
    """Differences between neighbouring pixels, brightened."""
    across, down = rows.diff(dim=3, append=rows[..., -1:]), rows.diff(dim=2, append=rows[:, :, -1:])
    return (across.abs() + down.abs()).clamp(max=255.0)


def smooth(shape: torch.Size, rng: Generator) -> Tensor:
    """Noise on a coarse grid, drawn out to the size of the images."""
    coarse = 255.0 * torch.rand((shape[0], 1, 7, 7), generator=rng)
    return nn.functional.interpolate(coarse, size=tuple(shape[2:]), mode="bilinear", align_corners=False)


def photographs(n: int, rng: Generator) -> Tensor:
    """Squares cut out of the two photographs of scikit-learn, at half their size."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(x).float().mean(2)[None, None] for x in load_sample_images().images]
    halves = [nn.functional.avg_pool2d(x, 2)[0, 0] for x in pictures]
    found = []
    for i in range(n):
        picture = halves[i % len(halves)]
        top, left = (int(torch.randint(side - 28, (), generator=rng)) for side in picture.shape)
        found.append(picture[top : top + 28, left : left + 28])
    return torch.stack(found)[:, None]


def small_digits(n: int) -> Tensor:
    """Scikit-learn's digits of 8x8 pixels, resized; there are 1797."""
    digits = load("digits")
    rows = torch.cat((digits.train, digits.held_out))[:n] * (255.0 / 16.0)
    return nn.functional.interpolate(rows, size=(28, 28), mode="bilinear", align_corners=False)
