r"""Noise-conditional energies: one energy for every level of Gaussian noise.

:math:`E(x, \sigma)` stands for the density of the data with noise of standard deviation :math:`\sigma` added. At a
high level that is nearly one Gaussian, easy to draw from; at the lowest it is nearly the data. Walking down the levels
is how such a model is sampled, and how its log Z is annealed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.labels import LabelEmbedding
from gibbsian.energies.neural import fourier_features, octave_frequencies, told
from gibbsian.energies.tractable import Gaussian, batch_rows, shape_of
from gibbsian.errors import DataError, OptionError


class NoiseConditionalEnergy(Energy):
    r"""What noise-conditional energies share: a preconditioning under which both ends of the levels are easy.

    With the data's mean :math:`\mu` and overall standard deviation s,

    .. math::

        E(x, \sigma) = \frac{|x - \mu|^2}{2 (s^2 + \sigma^2)} + \frac{d}{2} \log 2 \pi (s^2 + \sigma^2)
            - \left(1 + \frac{s^2}{\sigma^2}\right)^{\gamma / 2}
            \left(1 + \frac{\sigma^2}{s^2}\right)^{-\delta / 2}
            h\!\left(\frac{x - \mu}{\sqrt{s^2 + \sigma^2}}, \log \sigma\right).

    The first two terms are the energy of Gaussian data under noise, normalised, and exact as :math:`\sigma \to
    \infty`; the network h adds what the data have besides. The factor in front of h grows like
    :math:`\sigma^{-\gamma}`: with :math:`\gamma = 1` the score keeps its relative precision as the noise vanishes,
    which data near a manifold need (images); with :math:`\gamma = 0` the energy stays as smooth as the network, which
    suits densities in few dimensions. The second factor takes the learned part away at high levels, if
    :math:`\delta` is 1.

    With :math:`\gamma = \delta = 1` the two factors are :math:`s / \sigma`, and the denoiser
    :math:`D = x - \sigma^2 \nabla E` is preconditioned as by EDM, with the gradient of h as the network F:

    .. math::

        D = \mu + c_{\text{skip}}\, (x - \mu)
            + c_{\text{out}}\, \nabla h\big(c_{\text{in}} (x - \mu), c_{\text{noise}}\big),
        \quad c_{\text{skip}} = \frac{s^2}{s^2 + \sigma^2},
        \quad c_{\text{out}} = \frac{s\, \sigma}{\sqrt{s^2 + \sigma^2}},
        \quad c_{\text{in}} = \frac{1}{\sqrt{s^2 + \sigma^2}}.

    The network is told :math:`c_{\text{noise}} = \log \sigma` by sines and cosines of several frequencies; EDM's is a
    quarter of it.

    The preconditioning follows `Elucidating the design space of diffusion-based generative models (Karras et al.,
    2022) <https://arxiv.org/abs/2206.00364>`_; a scalar energy instead of a score, `Should EBMs model the energy or the
    score? (Salimans & Ho, 2021) <https://openreview.net/forum?id=9AS-TF2jRNb>`_.

    With ``classes`` the network is told a label of each row beside its noise level: :math:`E(x, \sigma, y)` stands for
    the density of the rows of class y. The Gaussian part is the same for all.

    Parameters
    ----------
    shape
        Shape of one point.
    gain, fade
        :math:`\gamma` and :math:`\delta` above, between 0 and 1.
    classes
        With a number of labels, 2 or more, the context is ``sigma`` and ``y``: labels ``(n,)`` of whole numbers from 0.
        For guidance the last of them stands for none, as `LabelDropping` trains it: it counts as one.
    """

    context = ("sigma",)
    classes: int | None = None
    mean: Tensor
    scale: Tensor
    embedding: Tensor

    def __init__(self, shape: torch.Size, gain: float, fade: float = 0.0, classes: int | None = None) -> None:
        super().__init__()
        self.event_shape = shape
        self.gain, self.fade = gain, fade
        if classes is not None:
            self.labels, self.classes, self.context = LabelEmbedding(classes), classes, ("sigma", "y")
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("embedding", level_frequencies())

    @abstractmethod
    def network(self, u: Tensor, level: Tensor) -> Tensor:
        """The learned part h, from scaled points ``(n, *event)`` and what is told of each: ``(n,)``.

        What is told is the level's embedding, and the label's after it where there are classes: ``(n, told_size)``.
        """

    @property
    def told_size(self) -> int:
        """How many numbers the network is told of each row besides the point."""
        return 2 * len(self.embedding) + (0 if self.classes is None else self.labels.vectors.embedding_dim)

    @torch.no_grad()
    def calibrate(self, data: Tensor) -> Self:
        """Set the mean and the overall scale from data ``(n, *event)``; returns the energy itself.

        Raises
        ------
        DataError
            If the data do not vary.
        """
        mean, scale = mean_and_scale(batch_rows(data, cast(torch.Size, self.event_shape)))
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        return self

    def base(self, sigma: float | Tensor) -> Gaussian:
        """The Gaussian that the energy comes close to at a high noise level."""
        return noisy_gaussian(self.mean, self.scale, sigma)

    @property
    def shape(self) -> tuple[int, ...]:
        """The event shape, which is always known here."""
        return tuple(cast(torch.Size, self.event_shape))

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """Energy of each row at its noise level, of its label: ``(n, *event)`` and ``(n,)`` to ``(n,)``.

        Raises
        ------
        OptionError
            If a label is not among the classes, or not given.
        ShapeError, ArgumentTypeError
            If labels are not one whole number per row.
        """
        z = batch_rows(x, cast(torch.Size, self.event_shape)) - self.mean
        variance = self.scale.square() + sigma.square()
        u = z * variance.rsqrt().reshape(-1, *([1] * (z.ndim - 1)))
        level = torch.cat((level_features(sigma, self.embedding), *self._label(y)), 1)
        gain = (variance.sqrt() / sigma) ** self.gain
        gaussian = 0.5 * u.square().sum(tuple(range(1, u.ndim))) + 0.5 * u[0].numel() * (2 * math.pi * variance).log()
        fade = (self.scale / variance.sqrt()) ** self.fade
        return gaussian - gain * fade * self.network(u, level)

    def _label(self, y: Tensor | None) -> tuple[Tensor, ...]:
        if self.classes is None:
            return ()
        if y is None:
            raise OptionError(f"This energy is conditional on {self.classes} labels: fix them with given(y=...).")
        return (self.labels(y),)


def level_frequencies() -> Tensor:
    """Frequencies at which networks are told the logarithm of a noise level, ``(16,)``."""
    return torch.exp(torch.linspace(math.log(0.25), math.log(3.0), 16))


def level_features(sigma: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines of the logarithm of noise levels: ``(n,)`` and ``(k,)`` to ``(n, 2 k)``."""
    phase = sigma.log().unsqueeze(1) * frequencies
    return torch.cat((phase.sin(), phase.cos()), 1)


def mean_and_scale(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(*event)`` and overall standard deviation of data ``(n, *event)``.

    Raises
    ------
    DataError
        If the data do not vary.
    """
    mean = data.mean(0)
    scale = (data - mean).square().mean().sqrt()
    # The mean of equal rows may differ from them by rounding, so the rows themselves are compared.
    if bool((data == data[:1]).all()) or not bool(scale > 0):
        raise DataError("All rows of the data are equal; there is no density to learn.")
    return mean, scale


def noisy_gaussian(mean: Tensor, scale: Tensor, sigma: float | Tensor) -> Gaussian:
    """The round Gaussian with the data's mean and overall spread, after noise of ``sigma``."""
    level = torch.as_tensor(sigma, dtype=scale.dtype, device=scale.device)
    return Gaussian(loc=mean, scale=(scale.square() + level.square()).sqrt(), dim=tuple(mean.shape))


class NoiseConditional(NoiseConditionalEnergy):
    r"""A residual network over points of any shape, read as vectors, as an energy at every noise level.

    Preconditioned as in `NoiseConditionalEnergy`.

    Parameters
    ----------
    shape
        Size or shape of one point.
    width, blocks
        Of the residual network: hidden units, and blocks of two layers each.
    frequencies
        Octaves of Fourier features added to each input coordinate; sharp densities in few dimensions need some.
    local
        Terms per coordinate of an additive part :math:`\sum_i \sum_j c_{ij}\,\tanh(a_{ij} x_i + b_{ij})`, whose weights
        :math:`c_{ij}` the network moves: it learns what single coordinates do given all of them, and has steps sharp
        enough for values that the data repeat (the black of an image's border). The steps are bounded, so that the
        learned part grows linearly at most and the density stays normalisable.
    dropout
        Part of the hidden units that `gibbsian.fit` drops at random in training, against overfitting of small sets;
        never elsewhere.
    gain, classes
        :math:`\gamma`, and the number of labels, of `NoiseConditionalEnergy`.

    Raises
    ------
    OptionError
        If a size is not positive, the gain lies outside [0, 1] or dropout outside [0, 1).
    """

    octaves: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        width: int = 256,
        blocks: int = 3,
        frequencies: int = 0,
        local: int = 0,
        gain: float = 1.0,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__(shape_of(shape), gain, classes=classes)
        sizes = min(width, blocks) >= 1 and min(frequencies, local) >= 0
        if not (sizes and 0.0 <= gain <= 1.0 and 0.0 <= dropout < 1.0):
            raise OptionError(
                "width and blocks are 1 or more, frequencies and local 0 or more, gain between 0 and 1, dropout from 0 "
                f"to below 1; got {width}, {blocks}, {frequencies}, {local}, {gain}, {dropout}."
            )
        d = cast(torch.Size, self.event_shape).numel()
        self.width, self.blocks, self.frequencies, self.local = width, blocks, frequencies, local
        self.register_buffer("octaves", octave_frequencies(frequencies))
        self.enter = nn.Linear(d * (1 + 2 * frequencies), width)
        self.level = nn.Linear(self.told_size, width)
        self.layers = nn.ModuleList(ResidualBlock(width, dropout) for _ in range(blocks))
        self.leave = nn.Linear(width, 1)
        # Off until fit turns it on, so that an energy is a function wherever it is used.
        self.dropout = nn.Dropout(dropout).eval()
        if local:
            self.terms = _Local(d, local, self.told_size, width)

    def network(self, u: Tensor, level: Tensor) -> Tensor:
        """The learned part."""
        u = u.flatten(1)
        shift = nn.functional.silu(self.level(level))
        h = self.enter(fourier_features(u, self.octaves))
        for block in self.layers:
            h = block(h, shift)
        h = self.dropout(nn.functional.silu(h))
        # Times eight: at the usual initial weights the learned part then has the slope the data ask for.
        out = 8.0 * self.leave(h).squeeze(1)
        return out + self.terms(u, level, h) if self.local else out

    def extra_repr(self) -> str:
        """Shape and sizes."""
        return f"{told(self.event_shape)}, width={self.width}, blocks={self.blocks}{told_classes(self.classes)}"


def told_classes(classes: int | None) -> str:
    """Print a number of labels, where there are labels."""
    return "" if classes is None else f", classes={classes}"


class ResidualBlock(nn.Module):
    """One residual block: normalise, two layers, the noise level added between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.shift = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout).eval()
        with torch.no_grad():
            self.second.weight.mul_(0.3)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        """Hidden units ``(n, width)`` and the embedded level of each row, ``(n, width)``, to hidden units."""
        return h + self.second(self.dropout(nn.functional.silu(self.first(self.norm(h)) + self.shift(level))))


class _Local(nn.Module):
    """A sum of one-dimensional functions of the coordinates, modulated by the noise level and weighted by the network.

    Steps start anywhere in the range of a scaled coordinate, with slopes of 1 to 12: some rise within a tenth of it.
    """

    def __init__(self, dim: int, terms: int, embedding: int, width: int) -> None:
        super().__init__()
        slope = torch.exp(torch.rand(dim, terms) * math.log(12.0)) * (2.0 * torch.randint(2, (dim, terms)) - 1.0)
        self.slope = nn.Parameter(slope)
        self.offset = nn.Parameter(-slope * (4.0 * torch.rand(dim, terms) - 2.0))
        self.modulation = nn.Linear(embedding, 2 * terms)
        self.weight = nn.Linear(width, dim * terms)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)

    def forward(self, u: Tensor, level: Tensor, h: Tensor) -> Tensor:
        stretch, shift = self.modulation(level).unsqueeze(1).chunk(2, -1)
        inner = u.unsqueeze(2) * self.slope * (1.0 + 2.0 * stretch) + self.offset + 2.0 * shift
        # Bounded: the weights grow with x, and times an unbounded function they would outgrow the Gaussian's square.
        return (inner.tanh() * self.weight(h).view(inner.shape)).sum((1, 2))
