r"""An autoencoder's error as an energy: low where points are rebuilt well.

.. math:: E(x) = \frac{|x - g(f(x))|^2}{2 \sigma^2},

with the encoder f and the decoder g. It is the discriminator of an energy-based GAN, and, trained by its own value
alone, an ordinary autoencoder; a density's energy it becomes only by an objective that makes it one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import batch_rows, shape_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


class ReconstructionEnergy(Energy):
    r"""The squared error of an autoencoder, in units of :math:`2 \sigma^2`.

    `Energy-based generative adversarial network (Zhao et al., 2017) <https://arxiv.org/abs/1609.03126>`_.

    Parameters
    ----------
    encoder
        From points ``(n, *event)`` to codes ``(n, ...)``, such as ``Dense(2, 8)`` or ``Downsampling``.
    decoder
        From codes to as many numbers as a point has, such as ``Dense(8, 2)`` or ``Upsampling``.
    dim
        Size or shape of one point.
    scale
        :math:`\sigma`, in the units of x.

    Raises
    ------
    ArgumentTypeError
        If encoder or decoder is no module.
    OptionError
        If the scale is not positive.
    ShapeError
        At a call, if points are rebuilt with another number of values.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, dim: int | Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        for name, net in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(net, nn.Module):
                raise ArgumentTypeError(f"{name} is a torch module, such as Dense(2, 8); got {net!r}.")
        if not 0.0 < scale < math.inf:
            raise OptionError(f"scale is the positive size of an error that counts half a nat; got {scale}.")
        self.encoder, self.decoder = encoder, decoder
        self.event_shape = self.shape = shape_of(dim)
        self.scale = float(scale)

    def codes(self, x: Tensor) -> Tensor:
        """What the encoder makes of points, ``(n, *event) -> (n, codes)``."""
        return self.encoder(batch_rows(x, self.shape)).flatten(1)

    def rebuilt(self, x: Tensor) -> Tensor:
        """Points as they come back, ``(n, *event)``.

        Raises
        ------
        ShapeError
            If the decoder gives another number of values.
        """
        out = self.decoder(self.encoder(batch_rows(x, self.shape)))
        if len(out) != len(x) or out[:1].numel() != self.shape.numel():
            raise ShapeError(
                f"The decoder rebuilds {len(x)} points of shape {tuple(self.shape)}, {self.shape.numel()} "
                f"numbers each; it gave {tuple(out.shape)}."
            )
        return out.reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row: ``(n, *event) -> (n,)``."""
        return 0.5 * ((x - self.rebuilt(x)) / self.scale).flatten(1).square().sum(1)

    def extra_repr(self) -> str:
        """Shape and scale."""
        return f"{tuple(self.shape)}, scale={self.scale:.4g}"
