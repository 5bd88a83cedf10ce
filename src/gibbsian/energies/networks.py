"""Networks between vectors and points, for generators, decoders and encoders: no energies by themselves.

Rows of a batch never mix in them, so that every one of them may be part of an energy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gibbsian.energies.neural import check_widths, image_shape
from gibbsian.energies.tractable import shape_of
from gibbsian.errors import OptionError

GROUPS = 8
"""Groups of maps that are normalised together, at most."""


class Dense(nn.Module):
    """A multilayer network from points of one shape to points of another, with SiLU between its layers.

    Parameters
    ----------
    inputs, outputs
        Size or shape of one row of each.
    hidden
        Widths of the hidden layers.

    Raises
    ------
    OptionError
        If a size or width is not a positive whole number.
    """

    def __init__(
        self, inputs: int | Sequence[int], outputs: int | Sequence[int], hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = shape_of(inputs), shape_of(outputs)
        widths = (self.inputs.numel(), *check_widths("hidden", hidden))
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], self.outputs.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """Map rows, ``(n, *inputs) -> (n, *outputs)``."""
        return self.net(x.flatten(1)).reshape(-1, *self.outputs)

    def extra_repr(self) -> str:
        """Both shapes."""
        return f"{tuple(self.inputs)} -> {tuple(self.outputs)}"


class NoisyNetwork(nn.Module):
    """A network of the first numbers of a row, plus normal noise of a given size, which the other numbers are.

    A generator with one makes the draws that a discriminator sees when noise on data and draws keeps it from telling
    them by what no generator can match, such as a lattice of values: `Towards principled methods for training
    generative adversarial networks (Arjovsky and Bottou, 2017) <https://arxiv.org/abs/1701.04862>`_. Its latent vectors
    are ``inputs`` numbers for the network and as many as a point has for the noise.

    Parameters
    ----------
    net
        From ``(n, inputs)`` to points.
    inputs
        How many numbers the network takes.
    scale
        Standard deviation of the noise; may be set anew between trainings.

    Raises
    ------
    OptionError
        If the scale is not positive and finite, or ``inputs`` no positive whole number.
    """

    def __init__(self, net: nn.Module, inputs: int, scale: float) -> None:
        super().__init__()
        if not 0.0 < scale < math.inf:
            raise OptionError(f"scale is the positive standard deviation of the noise; got {scale}.")
        self.net, self.inputs, self.scale = net, shape_of(inputs).numel(), float(scale)

    def forward(self, z: Tensor) -> Tensor:
        """Points with noise, ``(n, inputs + d) -> (n, *outputs)``."""
        points = self.clean(z)
        return points + self.scale * z[:, self.inputs :].reshape(points.shape)

    def clean(self, z: Tensor) -> Tensor:
        """Points without."""
        return self.net(z[:, : self.inputs])

    def extra_repr(self) -> str:
        """The noise."""
        return f"scale={self.scale:.4g}"


class Upsampling(nn.Module):
    """A convolutional network from vectors to images, over a quarter and a half of their height and width.

    Parameters
    ----------
    latent
        Size or shape of one vector.
    shape
        Of one image: channels, height, width.
    width
        Feature maps at the images' full size; twice and four times as many before.

    Raises
    ------
    OptionError
        If a size is not a positive whole number.
    ShapeError
        If the shape is none of an image.
    """

    def __init__(self, latent: int | Sequence[int], shape: Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.inputs, self.outputs = shape_of(latent), image_shape(shape)
        _check_width(width)
        channels, height, breadth = self.outputs
        self.sizes = [(-(-height // part), -(-breadth // part)) for part in (4, 2, 1)]
        rows, columns = self.sizes[0]
        self.first = nn.Linear(self.inputs.numel(), 4 * width * rows * columns)
        self.blocks = nn.ModuleList(
            nn.Sequential(_norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
            for before, after in ((4 * width, 2 * width), (2 * width, width))
        )
        self.last = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """Map rows, ``(n, *latent) -> (n, *shape)``."""
        h = self.first(z.flatten(1)).unflatten(1, (-1, *self.sizes[0]))
        for block, size in zip(self.blocks, self.sizes[1:], strict=True):
            h = block(nn.functional.interpolate(h, size=size))
        return self.last(h)

    def extra_repr(self) -> str:
        """Both shapes."""
        return f"{tuple(self.inputs)} -> {tuple(self.outputs)}"


class Downsampling(nn.Module):
    """A convolutional network from images to vectors, which halves height and width twice.

    Parameters
    ----------
    shape
        Of one image: channels, height, width.
    outputs
        Size or shape of one vector.
    width
        Feature maps of the first layer; two and four times as many after it.

    Raises
    ------
    OptionError
        If a size is not a positive whole number.
    ShapeError
        If the shape is none of an image.
    """

    def __init__(self, shape: Sequence[int], outputs: int | Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.inputs, self.outputs = image_shape(shape), shape_of(outputs)
        _check_width(width)
        channels, height, breadth = self.inputs
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            _norm(2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
            _norm(4 * width),
            nn.SiLU(),
        )
        self.last = nn.Linear(4 * width * -(-height // 4) * -(-breadth // 4), self.outputs.numel())

    def forward(self, x: Tensor) -> Tensor:
        """Map rows, ``(n, *shape) -> (n, *outputs)``."""
        return self.last(self.net(x).flatten(1)).reshape(-1, *self.outputs)

    def extra_repr(self) -> str:
        """Both shapes."""
        return f"{tuple(self.inputs)} -> {tuple(self.outputs)}"


def network(inputs: int | Sequence[int], outputs: int | Sequence[int], width: int, depth: int = 2) -> nn.Module:
    """Choose a network by the shapes: convolutional where one side is an image of a plane, dense otherwise.

    Parameters
    ----------
    inputs, outputs
        Size or shape of one row of each.
    width
        Feature maps, or hidden units.
    depth
        Hidden layers of a dense one.
    """
    before, after = shape_of(inputs), shape_of(outputs)
    if len(after) == 3 and len(before) == 1:
        return Upsampling(before, after, width)
    if len(before) == 3 and len(after) == 1:
        return Downsampling(before, after, width)
    return Dense(before, after, (width,) * depth)


def _check_width(width: int) -> None:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise OptionError(f"width counts feature maps, 1 or more; got {width!r}.")


def _norm(maps: int) -> nn.Module:
    groups = next(g for g in range(min(GROUPS, maps), 0, -1) if maps % g == 0)
    return nn.GroupNorm(groups, maps)
