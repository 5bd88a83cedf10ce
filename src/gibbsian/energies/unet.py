r"""A noise-conditional energy for images: the inner product of the image with what a small U-Net makes of it.

A denoiser in the energy's clothes: with :math:`h(u) = \langle u, F(u) \rangle` the gradient of the energy starts with
the network's own output, an image, so that the score is as easy to learn as by a network that puts out scores, and it
still is the gradient of one number.

`Should EBMs model the energy or the score? (Salimans & Ho, 2021) <https://openreview.net/forum?id=9AS-TF2jRNb>`_ for
energies made of denoisers; `Learning normalized image densities via dual score matching (Guth et al., 2025)
<https://arxiv.org/abs/2506.05310>`_ for the inner product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gibbsian.energies.neural import image_shape, told
from gibbsian.energies.noise import NoiseConditionalEnergy, told_classes
from gibbsian.errors import OptionError, ShapeError

REACH = 3.0
"""Scaled images longer than about so many times the usual are shortened to it before the network sees them."""


class NoiseConditionalUNet(NoiseConditionalEnergy):
    r"""A U-Net as an energy of images at every noise level.

    Preconditioned as in `NoiseConditionalEnergy`, with the learned part

    .. math:: h(u) = \sum_i \big( u_i F_i(v) + G_i(v) \big), \qquad v = u \, (1 + |u|^2 / 9 d)^{-1/2},

    where F and G are the two images that a U-Net makes of v. As v is bounded, so are F and G: the learned part grows
    linearly at most and the density stays normalisable.

    The network works on squares of 2x2 pixels: residual blocks at half the size, at a quarter with twice the width, and
    at half again, each told of the noise level; where a square lies in the image is learned.

    Parameters
    ----------
    shape
        ``(channels, height, width)``; height and width are multiples of 4.
    width
        Feature maps at half size.
    blocks
        Residual blocks of two 3x3 convolutions on the way down and on the way up, each; twice as many at a quarter.
    gain, fade, classes
        As in `NoiseConditionalEnergy`; gain and fade at 1 are the preconditioning of EDM.

    Raises
    ------
    ShapeError
        If the shape is not that of an image, or cannot be halved twice.
    OptionError
        If a size is not positive, or gain or fade lies outside [0, 1].
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        blocks: int = 1,
        gain: float = 1.0,
        fade: float = 0.0,
        classes: int | None = None,
    ) -> None:
        size = image_shape(shape)
        super().__init__(size, gain, fade, classes)
        if not (0.0 <= gain <= 1.0 and 0.0 <= fade <= 1.0):
            raise OptionError(f"gain and fade lie between 0 and 1; got {gain}, {fade}.")
        self.width, self.blocks = width, blocks
        self.unet = UNet(size, 2 * size[0], width, blocks, self.told_size)

    def network(self, u: Tensor, level: Tensor) -> Tensor:
        """The learned part."""
        size = u.square().mean((1, 2, 3), keepdim=True)
        v = u * (1.0 + size / REACH**2).rsqrt()
        inner, outer = self.unet(v, level).chunk(2, 1)
        return (u * inner + outer).sum((1, 2, 3))

    def extra_repr(self) -> str:
        """Shape and sizes."""
        return f"{told(self.event_shape)}, width={self.width}, blocks={self.blocks}{told_classes(self.classes)}"


class UNet(nn.Module):
    """A small U-Net from images to as large images of any number of channels, told of a noise level.

    Parameters
    ----------
    shape
        ``(channels, height, width)`` of what comes in; height and width are multiples of 4.
    outputs
        Channels of what goes out.
    width, blocks
        As in `NoiseConditionalUNet`.
    levels
        Size of a level's embedding.

    Raises
    ------
    ShapeError
        If the images cannot be halved twice.
    OptionError
        If a size is not positive.
    """

    def __init__(self, shape: torch.Size, outputs: int, width: int, blocks: int, levels: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        if height % 4 or breadth % 4:
            raise ShapeError(f"Height and width are multiples of 4; got {tuple(shape)}. Pad the images.")
        if min(width, blocks) < 1:
            raise OptionError(f"width and blocks are 1 or more; got {width}, {blocks}.")
        wide = 2 * width
        self.level = nn.Sequential(nn.Linear(levels, wide), nn.SiLU())
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(1, width, height // 2, breadth // 2))
        self.falling = nn.ModuleList(_Block(width, wide) for _ in range(blocks))
        self.shrink = nn.Conv2d(width, wide, 2, stride=2)
        self.middle = nn.ModuleList(_Block(wide, wide) for _ in range(2 * blocks))
        self.grow = nn.ConvTranspose2d(wide, width, 2, stride=2)
        self.rising = nn.ModuleList(_Block(width, wide) for _ in range(blocks))
        self.leave = nn.Conv2d(width, 4 * outputs, 3, padding=1)
        with torch.no_grad():
            self.leave.weight.mul_(0.1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, v: Tensor, level: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` and embeddings ``(n, levels)`` to images ``(n, outputs, h, w)``."""
        told_level = self.level(level)
        h = self.enter(nn.functional.pixel_unshuffle(v, 2)) + self.place
        for block in self.falling:
            h = block(h, told_level)
        low = self.shrink(h)
        for block in self.middle:
            low = block(low, told_level)
        h = h + self.grow(low)
        for block in self.rising:
            h = block(h, told_level)
        return nn.functional.pixel_shuffle(self.leave(nn.functional.silu(h)), 2)


class _Block(nn.Module):
    """Two convolutions around a scale and a shift by the noise level, added to what came in."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(levels, 2 * width)
        with torch.no_grad():
            self.second.weight.mul_(0.3)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        stretch, shift = self.modulation(level)[:, :, None, None].chunk(2, 1)
        inner = self.first(nn.functional.silu(h)) * (1.0 + stretch) + shift
        return h + self.second(nn.functional.silu(inner))
