r"""Denoisers: networks that tell the clean point from the noisy one, as plain scores.

.. math::

    D(x, \sigma) = \mu + c_{\text{skip}}\, (x - \mu)
        + c_{\text{out}}\, F\big(c_{\text{in}} (x - \mu), c_{\text{noise}}\big), \qquad
    s(x, \sigma) = \frac{D(x, \sigma) - x}{\sigma^2},

with the data's mean :math:`\mu` and overall standard deviation s, and

.. math::

    c_{\text{skip}} = \frac{s^2}{s^2 + \sigma^2}, \quad c_{\text{out}} = \frac{s\, \sigma}{\sqrt{s^2 + \sigma^2}}, \quad
    c_{\text{in}} = \frac{1}{\sqrt{s^2 + \sigma^2}}, \quad c_{\text{noise}} = \log \sigma,

under which what the network F takes and what it is to give have variance 1 at every level. F is told
:math:`c_{\text{noise}}` by sines and cosines of several frequencies.

The difference from a noise-conditional energy is the gradient: there :math:`\nabla h` stands in the place of F (see
`gibbsian.energies.noise.NoiseConditionalEnergy`). A denoiser is trained in a third of the time per step, and its score
is no gradient, so that there is no density to score, to reject by, or to multiply. Its likelihood is that of its
probability flow (`gibbsian.bridges.flow_likelihood`).

`Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
<https://arxiv.org/abs/2206.00364>`_. They are trained by `gibbsian.MultiLevelDenoising` with
`gibbsian.EDMWeight(float(denoiser.scale))`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from gibbsian.energies.neural import fourier_features, image_shape, octave_frequencies, told
from gibbsian.energies.noise import ResidualBlock, level_features, level_frequencies, mean_and_scale, noisy_gaussian
from gibbsian.energies.schedules import wide
from gibbsian.energies.score import Score
from gibbsian.energies.tractable import Gaussian, batch_rows, shape_of
from gibbsian.energies.unet import UNet
from gibbsian.errors import OptionError


class Denoiser(Score):
    """What denoisers share: the preconditioning of this module's formula.

    Parameters
    ----------
    shape
        Shape of one point.
    """

    mean: Tensor
    scale: Tensor
    embedding: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = self.shape = shape
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("embedding", level_frequencies())

    @abstractmethod
    def network(self, u: Tensor, level: Tensor) -> Tensor:
        """The network F, from scaled points ``(n, *event)`` and the level's embedding ``(n, 32)``: ``(n, *event)``."""

    @torch.no_grad()
    def calibrate(self, data: Tensor) -> Self:
        """Set the mean and the overall scale from data ``(n, *event)``; returns the denoiser itself.

        Raises
        ------
        DataError
            If the data do not vary.
        """
        mean, scale = mean_and_scale(batch_rows(data, self.shape))
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        return self

    def base(self, sigma: float | Tensor) -> Gaussian:
        """The Gaussian that the noisy data come close to at a high noise level."""
        return noisy_gaussian(self.mean, self.scale, sigma)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Scores of points at their noise levels: ``(n, *event)`` and ``(n,)`` to ``(n, *event)``."""
        z = batch_rows(x, self.shape) - self.mean
        size = (self.scale.square() + sigma.square()).sqrt()
        u = z / wide(size, z)
        out = self.network(u, level_features(sigma, self.embedding))
        # (D - x) / sigma^2 with the formulas put in, as the difference would cancel at low levels.
        return wide(self.scale / (sigma * size), z) * out - u / wide(size, z)


class DenoiserUNet(Denoiser):
    r"""A U-Net as a denoiser of images; the network of `gibbsian.NoiseConditionalUNet`, with images for its output.

    Preconditioned as in this module's formula.

    Parameters
    ----------
    shape
        ``(channels, height, width)``; height and width are multiples of 4.
    width, blocks
        As in `gibbsian.NoiseConditionalUNet`.

    Raises
    ------
    ShapeError
        If the shape is not that of an image, or cannot be halved twice.
    OptionError
        If a size is not positive.
    """

    def __init__(self, shape: Sequence[int], width: int = 32, blocks: int = 1) -> None:
        size = image_shape(shape)
        super().__init__(size)
        self.width, self.blocks = width, blocks
        self.unet = UNet(size, size[0], width, blocks, 2 * len(self.embedding))

    def network(self, u: Tensor, level: Tensor) -> Tensor:
        """The network F."""
        return self.unet(u, level)

    def extra_repr(self) -> str:
        """Shape and sizes."""
        return f"{told(self.event_shape)}, width={self.width}, blocks={self.blocks}"


class DenoiserMLP(Denoiser):
    r"""A residual network over points of any shape, read as vectors, as a denoiser.

    Preconditioned as in this module's formula; with the blocks of `gibbsian.NoiseConditional`.

    Parameters
    ----------
    shape
        Size or shape of one point.
    width, blocks
        Hidden units, and blocks of two layers each.
    frequencies
        Octaves of Fourier features added to each input coordinate; sharp densities in few dimensions need some.
    dropout
        Part of the hidden units that `gibbsian.fit` drops at random in training; never elsewhere.

    Raises
    ------
    OptionError
        If a size is not positive, or dropout lies outside [0, 1).
    """

    octaves: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        width: int = 256,
        blocks: int = 3,
        frequencies: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(shape_of(shape))
        if min(width, blocks) < 1 or frequencies < 0 or not 0.0 <= dropout < 1.0:
            raise OptionError(
                "width and blocks are 1 or more, frequencies 0 or more, dropout from 0 to below 1; got "
                f"{width}, {blocks}, {frequencies}, {dropout}."
            )
        d = self.shape.numel()
        self.width, self.blocks, self.frequencies = width, blocks, frequencies
        self.register_buffer("octaves", octave_frequencies(frequencies))
        self.enter = nn.Linear(d * (1 + 2 * frequencies), width)
        self.level = nn.Linear(2 * len(self.embedding), width)
        self.layers = nn.ModuleList(ResidualBlock(width, dropout) for _ in range(blocks))
        self.dropout = nn.Dropout(dropout).eval()
        self.leave = nn.Linear(width, d)

    def network(self, u: Tensor, level: Tensor) -> Tensor:
        """The network F."""
        shift = nn.functional.silu(self.level(level))
        h = self.enter(fourier_features(u.flatten(1), self.octaves))
        for block in self.layers:
            h = block(h, shift)
        return self.leave(self.dropout(nn.functional.silu(h))).view(u.shape)

    def extra_repr(self) -> str:
        """Shape and sizes."""
        return f"{told(self.event_shape)}, width={self.width}, blocks={self.blocks}"
