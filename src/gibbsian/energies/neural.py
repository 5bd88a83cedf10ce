"""Networks with one output: multilayer perceptrons, convolutional and residual energies.

All use SiLU, which is smooth, so that scores exist and can be differentiated again. None uses batch normalisation,
which would make one chain's energy depend on the others in its batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import batch_rows, shape_of
from gibbsian.errors import OptionError, ShapeError


class MLP(Energy):
    r"""A multilayer perceptron over points of any shape, read as vectors.

    Parameters
    ----------
    dim
        Size or shape of one point.
    hidden
        Widths of the hidden layers.
    frequencies
        Octaves of Fourier features, sines and cosines of :math:`2^k \pi x / 4`, added to each coordinate. Sharp
        densities in few dimensions are learned much faster with three or four. `Fourier features let networks learn
        high frequency functions in low dimensional domains (Tancik et al., 2020) <https://arxiv.org/abs/2006.10739>`_.
    spectral_norm
        Divide each weight matrix by its largest singular value, which bounds the energy's slope.
    classes
        With a number of classes the energy is conditional: it takes the context ``y``, labels ``(n,)`` of integers, and
        is minus the ``y``-th of as many outputs.

    Raises
    ------
    OptionError
        If a size is not positive.
    """

    octaves: Tensor

    def __init__(
        self,
        dim: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        frequencies: int = 0,
        spectral_norm: bool = False,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = shape_of(dim)
        self.hidden = check_widths("hidden", hidden)
        if frequencies < 0:
            raise OptionError(f"frequencies counts octaves of Fourier features, 0 or more; got {frequencies}.")
        self.frequencies = frequencies
        self.register_buffer("octaves", octave_frequencies(frequencies))
        self.classes = classes
        self.context = () if classes is None else ("y",)
        sizes = [self.event_shape.numel() * (1 + 2 * frequencies), *self.hidden]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [_linear(a, b, spectral_norm), nn.SiLU()]
        layers.append(_linear(sizes[-1], classes or 1, spectral_norm))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Energy of each row: ``(n, *event) -> (n,)``."""
        return select(self.outputs(x), y)

    def outputs(self, x: Tensor) -> Tensor:
        """All outputs of the network: ``(n, *event) -> (n, classes or 1)``."""
        flat = batch_rows(x, cast(torch.Size, self.event_shape)).flatten(1)
        return self.net(fourier_features(flat, self.octaves))

    def extra_repr(self) -> str:
        """Shape and widths."""
        return f"{told(self.event_shape)}, hidden={self.hidden}" + ("" if self.classes is None else f", {self.classes}")


class _ImageEnergy(Energy):
    """What image energies share: maps of features, summed over space, so that the energy is extensive, and a head."""

    def __init__(
        self, shape: Sequence[int], widths: Sequence[int], net: nn.Sequential, spectral_norm: bool, classes: int | None
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(shape)
        self.widths = tuple(widths)
        self.context = () if classes is None else ("y",)
        self.net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.head = _linear(self.widths[-1], classes or 1, spectral_norm)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Energy of each image: ``(n, channels, height, width) -> (n,)``."""
        return select(self.outputs(x), y)

    def outputs(self, x: Tensor) -> Tensor:
        """All outputs of the network: ``(n, channels, height, width) -> (n, classes or 1)``."""
        features = self.net(batch_rows(x, cast(torch.Size, self.event_shape)))
        return self.head(features.sum((2, 3)))

    def extra_repr(self) -> str:
        """Shape and widths."""
        return f"{told(self.event_shape)}, widths={self.widths}"


class ConvEnergy(_ImageEnergy):
    """A plain convolutional energy for images of any size and number of channels.

    One 3x3 convolution at full size, then one of stride 2 per further width, each followed by SiLU; the last maps are
    summed over space, so that the energy is extensive, and mapped to one number.

    Parameters
    ----------
    shape
        ``(channels, height, width)`` of one image.
    widths
        Feature maps of each layer.
    spectral_norm, classes
        As in `MLP`.

    Raises
    ------
    ShapeError
        If the shape is not that of an image.
    OptionError
        If a width is not positive.
    """

    def __init__(
        self,
        shape: Sequence[int],
        widths: Sequence[int] = (32, 64, 128),
        spectral_norm: bool = False,
        classes: int | None = None,
    ) -> None:
        shape, widths = image_shape(shape), check_widths("widths", widths)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise((shape[0], *widths))):
            layers += [_conv(a, b, spectral_norm, stride=1 if i == 0 else 2), nn.SiLU()]
        super().__init__(shape, widths, nn.Sequential(*layers), spectral_norm, classes)


class ResidualEnergy(_ImageEnergy):
    """A residual convolutional energy for images of any size and number of channels.

    A 3x3 stem, then for each width a residual block of two 3x3 convolutions with SiLU before each; between widths the
    maps are averaged over 2x2 squares where they are larger than one pixel. Summed over space at the end.

    Parameters
    ----------
    shape
        ``(channels, height, width)`` of one image.
    widths
        Feature maps of each block.
    spectral_norm, classes
        As in `MLP`.

    Raises
    ------
    ShapeError
        If the shape is not that of an image.
    OptionError
        If a width is not positive.
    """

    def __init__(
        self,
        shape: Sequence[int],
        widths: Sequence[int] = (32, 64, 128),
        spectral_norm: bool = False,
        classes: int | None = None,
    ) -> None:
        shape, widths = image_shape(shape), check_widths("widths", widths)
        sizes = itertools.pairwise((widths[0], *widths))
        blocks = [_Residual(a, b, spectral_norm, shrink=i > 0) for i, (a, b) in enumerate(sizes)]
        stem = _conv(shape[0], widths[0], spectral_norm)
        super().__init__(shape, widths, nn.Sequential(stem, *blocks, nn.SiLU()), spectral_norm, classes)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, spectral: bool, shrink: bool) -> None:
        super().__init__()
        self.first = _conv(before, after, spectral)
        self.second = _conv(after, after, spectral)
        self.skip = nn.Identity() if before == after else _conv(before, after, spectral, kernel=1)
        self.shrink = shrink

    def forward(self, x: Tensor) -> Tensor:
        if self.shrink and min(x.shape[-2:]) > 1:
            x = nn.functional.avg_pool2d(x, 2)
        h = self.first(nn.functional.silu(x))
        return self.skip(x) + self.second(nn.functional.silu(h))


class SpectralNorm(nn.Module):
    r"""A parametrisation that divides a weight by its largest singular value.

    The value comes from power iteration, one round per change of the weight rather than per call: between two updates
    of the weights the energy must stay one fixed function, or the chains that walk it would follow a moving target.

    `Spectral normalization for generative adversarial networks (Miyato et al., 2018)
    <https://arxiv.org/abs/1802.05957>`_.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, rounds: int = 15) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        # A fixed start; its overlap with the leading singular vector is zero only by coincidence.
        self.register_buffer("v", nn.functional.normalize(torch.cos(torch.arange(matrix.shape[1]) + 1.0), dim=0))
        self.register_buffer("u", torch.zeros(matrix.shape[0]))
        self.seen = -1
        for _ in range(rounds):
            self._iterate(matrix)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        self.u.copy_(nn.functional.normalize(matrix @ self.v, dim=0))
        self.v.copy_(nn.functional.normalize(matrix.T @ self.u, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight over its spectral norm."""
        matrix = weight.flatten(1)
        if self.training and not torch.compiler.is_compiling() and weight._version != self.seen:
            self._iterate(matrix.detach())
            self.seen = weight._version
        return weight / torch.dot(self.u.clone(), matrix @ self.v.clone())


def octave_frequencies(octaves: int) -> Tensor:
    """Frequencies of the features that `fourier_features` appends, ``(octaves,)``."""
    return 0.25 * math.pi * 2.0 ** torch.arange(octaves)


def fourier_features(x: Tensor, octaves: Tensor) -> Tensor:
    """Append sines and cosines of each coordinate: ``(n, d)`` and ``(k,)`` to ``(n, d (1 + 2k))``."""
    if octaves.numel() == 0:
        return x
    angle = (x.unsqueeze(2) * octaves).flatten(1)
    return torch.cat((x, angle.sin(), angle.cos()), 1)


def select(outputs: Tensor, y: Tensor | None) -> Tensor:
    """Reduce a network's outputs ``(n, k)`` to energies ``(n,)``: the only one, or minus that of each row's label."""
    if y is None:
        if outputs.shape[1] != 1:
            raise ShapeError(f"This energy is conditional on {outputs.shape[1]} classes: fix labels with given(y=...).")
        return outputs.squeeze(1)
    return -outputs.gather(1, y.long().reshape(-1, 1)).squeeze(1)


def check_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Check a sequence of layer widths.

    Raises
    ------
    OptionError
        If it is empty or has a width below 1.
    """
    if len(widths) == 0 or any(w < 1 for w in widths):
        raise OptionError(f"{name} lists one or more positive layer widths; got {tuple(widths)}.")
    return tuple(widths)


def image_shape(shape: Sequence[int]) -> torch.Size:
    """Check the shape of an image.

    Raises
    ------
    ShapeError
        If it is not (channels, height, width).
    """
    if len(shape) != 3:
        raise ShapeError(f"An image's shape is (channels, height, width); got {tuple(shape)}.")
    return shape_of(shape)


def told(shape: torch.Size | None) -> str:
    """Print an event shape as a size when it has one axis."""
    if shape is None:
        return "any"
    return str(shape[0]) if len(shape) == 1 else str(tuple(shape))


def _linear(before: int, after: int, spectral: bool) -> nn.Module:
    return _normed(nn.Linear(before, after), spectral)


def _conv(before: int, after: int, spectral: bool, stride: int = 1, kernel: int = 3) -> nn.Module:
    return _normed(nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2), spectral)


def _normed(layer: nn.Module, spectral: bool) -> nn.Module:
    if spectral:
        parametrize.register_parametrization(layer, "weight", SpectralNorm(cast(Tensor, layer.weight)))
    return layer
