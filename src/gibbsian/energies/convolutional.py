r"""Convolutional restricted Boltzmann machines: hidden maps that see images through shared filters.

With images :math:`s(v)` of C channels, K filters :math:`W_k` of C channels and :math:`p \times q` pixels, and hidden
maps :math:`h_k`,

.. math:: E(v, h) = g(v) + g(h) - \sum_{c,j} b_c\, \tilde s_{c,j} - \sum_{k,i} c_k\, \tilde t_{k,i}
          - \sum_{k,c,i,u} \tilde t_{k,i}\, W_{k,c,u}\, \tilde s_{c,i+u}, \qquad
          \tilde s = s(v) - \mu,\; \tilde t = s(h) - \lambda .

It is the machine of `gibbsian.energies.boltzmann` whose weight matrix has one filter in all places, and everything
there holds: free energy and conditionals in closed form, alternating Gibbs sampling, the path of machines. Products
with the matrix are cross-correlations with the filters, and those with its transpose are convolutions.

Position i of a hidden map sees the pixels :math:`i + u`, with :math:`u = 0` at the filter's first corner. With
``"valid"`` padding the filter stays inside the image, and maps are smaller than it by one less than the filter; pixels
near the border are then seen by fewer units, and count less in what is learned. With ``"circular"`` padding the image
is a torus, and maps are as large as it is: exactly equivariant to shifts that wrap around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from gibbsian.energies.base import Energy
from gibbsian.energies.independent_units import IndependentUnits, as_visible, check_sliding_factor, fitted_field
from gibbsian.energies.layered import TwoLayers
from gibbsian.energies.pooled_units import PooledUnits
from gibbsian.energies.real_units import GaussianUnits, ReLUUnits
from gibbsian.energies.tractable import batch_rows
from gibbsian.energies.units import BernoulliUnits, SpinUnits, Units
from gibbsian.errors import OptionError

HIDDEN = {"bernoulli": BernoulliUnits, "spin": SpinUnits, "relu": ReLUUnits, "gaussian": GaussianUnits}
"""Kinds of hidden units by name; ``pool`` makes Bernoulli ones pooled."""

PADDINGS = ("valid", "circular")


@dataclass(frozen=True)
class Filters:
    """The couplings of images and maps: a weight matrix in the form of filters.

    Attributes
    ----------
    weight
        ``(K, C, p, q)``.
    image
        ``(C, H, W)``.
    circular
        Whether the image is a torus.
    """

    weight: Tensor
    image: torch.Size
    circular: bool

    @property
    def maps(self) -> torch.Size:
        """The shape of the hidden layer, ``(K, H', W')``."""
        k, _, p, q = self.weight.shape
        _, h, w = self.image
        return torch.Size((k, h, w) if self.circular else (k, h - p + 1, w - q + 1))

    def forth(self, s: Tensor) -> Tensor:
        """Cross-correlate flat images with the filters: ``(n, C H W) -> (n, K H' W')``."""
        x, (p, q) = s.reshape(-1, *self.image), self.weight.shape[2:]
        if self.circular:
            x = pad(x, (0, q - 1, 0, p - 1), mode="circular")
        return conv2d(x, self.weight).flatten(1)

    def back(self, t: Tensor) -> Tensor:
        """Convolve flat maps with the filters, the transpose of `forth`: ``(n, K H' W') -> (n, C H W)``."""
        x, (p, q) = t.reshape(-1, *self.maps), self.weight.shape[2:]
        if not self.circular:
            return conv_transpose2d(x, self.weight).flatten(1)
        x = pad(x, (q - 1, 0, p - 1, 0), mode="circular")
        return conv2d(x, self.weight.flip(2, 3).transpose(0, 1)).flatten(1)

    def double(self) -> Filters:
        """Return the same in float64."""
        return Filters(self.weight.double(), self.image, self.circular)

    def matrix(self) -> Tensor:
        """The weight matrix itself, ``(C H W, K H' W')``: for small images."""
        d = self.image.numel()
        return self.forth(torch.eye(d, dtype=self.weight.dtype, device=self.weight.device))


class ConvolutionalRBM(Energy):
    r"""A restricted Boltzmann machine with shared filters; its energy of images is the free energy.

    `Convolutional deep belief networks for scalable unsupervised learning of hierarchical representations (Lee et al.,
    2009) <https://doi.org/10.1145/1553374.1553453>`_. Strides are 1. `RBMGibbs` alternates between its layers,
    `rbm_path` leads to it, `exact_log_z` lists its smaller layer, and `Centred` moves its offsets.

    Parameters
    ----------
    visible
        Units that stand as ``(C, H, W)``: Bernoulli (a shape stands for these), spin or Gaussian.
    filters
        K, how many.
    size
        Pixels of a filter: a side, or ``(p, q)``.
    hidden
        Kind of hidden units, one of `HIDDEN`.
    padding
        ``"valid"`` or ``"circular"``; see the module.
    pool
        Side of blocks in which at most one Bernoulli unit is on; ``None`` for units that are independent.
    bias
        ``"channel"``, one visible bias for all pixels of a channel, as in the paper, or ``"pixel"``, one for each: for
        images that are framed alike, at the price of shift equivariance.
    weight_scale
        Standard deviation of the first filters' weights.
    rng
        Draws the first filters; torch's global generator when left out, as torch's own layers use it.

    Attributes
    ----------
    weight, visible_bias, hidden_bias
        Filters ``(K, C, p, q)``, b ``(C, 1, 1)`` or ``(C, H, W)``, c ``(K,)``: parameters.
    visible_offset, hidden_offset
        The offsets of channels ``(C,)`` and of maps ``(K,)``, 0 at first: buffers. `recentre` moves them.

    Raises
    ------
    OptionError
        If units do not stand as images or are of another kind, filters do not fit them, or an option is unknown.
    """

    visible_offset: Tensor
    hidden_offset: Tensor

    def __init__(
        self,
        visible: Sequence[int] | Units,
        filters: int,
        size: int | tuple[int, int],
        *,
        hidden: str = "bernoulli",
        padding: str = "valid",
        pool: int | None = None,
        bias: str = "channel",
        weight_scale: float = 0.01,
        rng: Generator | None = None,
    ) -> None:
        super().__init__()
        self.visible = _images(as_visible(visible))
        c, h, w = self.visible.sites
        p, q = (size, size) if isinstance(size, int) else tuple(size)
        for name, value, known in (("padding", padding, PADDINGS), ("hidden", hidden, HIDDEN)):
            if value not in known:
                raise OptionError(f"{name} is one of {', '.join(known)}; got {value!r}.")
        if bias not in ("channel", "pixel"):
            raise OptionError(f"bias is one of channel, pixel; got {bias!r}.")
        if filters < 1 or not (1 <= p <= h and 1 <= q <= w):
            raise OptionError(
                f"A machine has 1 filter or more, of at least 1 x 1 pixels and at most the image's {h} x {w}; got "
                f"{filters} of {p} x {q}."
            )
        if not weight_scale >= 0.0:
            raise OptionError(f"weight_scale is a standard deviation, 0 or more; got {weight_scale}.")
        self.padding, self.bias = padding, bias
        self.event_shape, self.support = self.visible.event_shape, self.visible.support
        device = None if rng is None else rng.device
        self.weight = nn.Parameter(weight_scale * torch.randn((filters, c, p, q), generator=rng, device=device))
        self.visible_bias = nn.Parameter(torch.zeros((c, h, w) if bias == "pixel" else (c, 1, 1), device=device))
        self.hidden_bias = nn.Parameter(torch.zeros(filters, device=device))
        self.register_buffer("visible_offset", torch.zeros(c, device=device))
        self.register_buffer("hidden_offset", torch.zeros(filters, device=device))
        self.hidden = self._hidden(hidden, pool)

    @property
    def couplings(self) -> Filters:
        """The filters, as a map between flat layers."""
        return Filters(self.weight, self.visible.sites, self.padding == "circular")

    def two_layers(self, x: Tensor) -> TwoLayers:
        """The machine, as alternating Gibbs sampling asks for it."""
        maps = self.hidden.sites
        return TwoLayers(
            self.visible,
            self.hidden,
            self.couplings,
            self.visible_bias.expand(self.visible.sites).reshape(-1),
            _over(self.hidden_bias, maps),
            _over(self.visible_offset, self.visible.sites),
            _over(self.hidden_offset, maps),
            source=self,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Free energy of each image: ``(n, C, H, W) -> (n,)``, in nats."""
        x = batch_rows(x, cast(torch.Size, self.event_shape))
        machine = self.two_layers(x)
        return machine.energy(x, machine.hidden_field(x))[0]

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """Energy of both layers: ``(n, C, H, W)`` and ``(n, K, H', W')`` to ``(n,)``."""
        v, h = batch_rows(v, self.visible.event_shape), batch_rows(h, self.hidden.event_shape)
        machine = self.two_layers(v)
        s = self.visible.statistic(v) - machine.visible_offset
        t = self.hidden.statistic(h) - machine.hidden_offset
        coupled = (machine.hidden_field(v) * t).sum(1) + s @ machine.visible_bias
        return self.visible.own_energy(v) + self.hidden.own_energy(h) - coupled

    def hidden_given(self, v: Tensor, *, u: Tensor | None = None) -> Tensor:
        """Mean hidden maps ``(n, K, H', W')`` given images, or draws with uniform numbers ``u`` of that shape."""
        machine = self.two_layers(v)
        field = machine.hidden_field(batch_rows(v, self.visible.event_shape))
        return self.hidden.mean(self.hidden.natural(field)) if u is None else machine.draw_hidden(field, u)

    def visible_given(self, h: Tensor, *, u: Tensor | None = None) -> Tensor:
        """Mean images given hidden maps, or draws with uniform numbers ``u``, ``(n, C, H, W)``."""
        machine = self.two_layers(h)
        h = batch_rows(h, self.hidden.event_shape)
        if u is not None:
            return machine.draw_visible(h, u)
        return self.visible.mean(self.visible.natural(machine.visible_field(h)))

    def pooled_given(self, v: Tensor) -> Tensor:
        """Probabilities that any unit of a block is on, ``(n, K, H' / pool, W' / pool)``: features.

        Raises
        ------
        OptionError
            If the hidden units are not pooled.
        """
        if not isinstance(self.hidden, PooledUnits):
            raise OptionError(f"The hidden units are not pooled, {self.hidden}; build the machine with pool=2.")
        field = self.two_layers(v).hidden_field(batch_rows(v, self.visible.event_shape))
        return self.hidden.pooled(self.hidden.natural(field))

    def marginal_hidden_energy(self, h: Tensor) -> Tensor:
        """Free energy of the hidden maps, the images summed out: ``(n, K, H', W') -> (n,)``."""
        return self.two_layers(h).hidden_energy(batch_rows(h, self.hidden.event_shape))

    def base(self, data: Tensor | None = None, smoothing: float = 0.1) -> IndependentUnits:
        """Make the machine without couplings from which chains and annealing start.

        Parameters
        ----------
        data
            Images whose means, pixel by pixel, it has; with a copy of the present biases when left out.
        smoothing
            Weight of the uniform mean in that of the data: no bit is certain.

        Raises
        ------
        OptionError
            If the smoothing is not between 0 and 1.
        """
        if data is None:
            machine = self.two_layers(self.weight)
            b = machine.visible_bias - self.couplings.back(machine.hidden_offset[None])[0]
            return IndependentUnits(self.visible, b.detach())
        return IndependentUnits(self.visible, fitted_field(self.visible, data, smoothing, self.weight))

    @torch.no_grad()
    def start_at(self, data: Tensor, smoothing: float = 0.1, centre: bool = True) -> None:
        """Begin at independent units with the data's means, by channel or by pixel; offsets at both means.

        Parameters
        ----------
        data
            Images ``(n, C, H, W)``.
        smoothing
            As for `base`.
        centre
            Whether to set the offsets; they stay 0 otherwise.

        Raises
        ------
        ShapeError, DomainError
            If the data are no states.
        """
        self.visible.check(data, "the data")
        rows = data.to(self.weight)
        if self.bias == "channel":
            # Every pixel is a draw of its channel's one law.
            mean = rows.mean((0, 2, 3), keepdim=True).expand(1, *self.visible.sites)
            field = self.visible.fitted(mean, smoothing).view(self.visible.sites)[:, :1, :1]
        else:
            field = self.visible.fitted(rows, smoothing).view(self.visible.sites)
        self.visible_bias.copy_(field)
        self.hidden_bias.zero_()
        self.visible_offset.zero_()
        self.hidden_offset.zero_()
        if centre:
            statistic = self.visible.statistic(rows).view(len(rows), *self.visible.sites)
            self.visible_offset.copy_(statistic.mean((0, 2, 3)))
            if self._absorbs_hidden():
                idle = self.hidden.natural(rows.new_zeros((1, self.hidden.size)))
                means = self.hidden.statistic(self.hidden.mean(idle)).view(self.hidden.sites)
                self.hidden_offset.copy_(means[:, 0, 0])

    @torch.no_grad()
    def means(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean statistics over images and positions, of channels ``(C,)`` and of maps ``(K,)``."""
        hidden = self.hidden.statistic(self.hidden_given(v)).view(len(v), *self.hidden.sites)
        visible = self.visible.statistic(v).view(len(v), *self.visible.sites)
        return visible.mean((0, 2, 3)), hidden.mean((0, 2, 3))

    @torch.no_grad()
    def recentre(self, visible: Tensor, hidden: Tensor, rate: float = 1.0) -> None:
        """Slide the offsets towards means, and move the biases so that the density stays as it is.

        With ``"valid"`` padding and one bias for a channel, the hidden offsets stay: what they change at the border no
        such bias could undo.

        Parameters
        ----------
        visible, hidden
            Mean statistics of channels and maps, as `means` returns them.
        rate
            The sliding factor: the share of the way to go.

        Raises
        ------
        OptionError
            If the rate is not between 0 and 1.
        """
        check_sliding_factor(rate)
        by_visible, by_hidden = rate * (visible - self.visible_offset), rate * (hidden - self.hidden_offset)
        self.hidden_bias.add_(torch.einsum("kcpq,c->k", self.weight, by_visible))
        self.visible_offset.add_(by_visible)
        if self._absorbs_hidden():
            shift = self.couplings.back(_over(by_hidden, self.hidden.sites)[None]).view(self.visible.sites)
            self.visible_bias.add_(shift if self.bias == "pixel" else shift[:, :1, :1])
            self.hidden_offset.add_(by_hidden)

    def check_states(self, x: Tensor, what: str = "the data") -> None:
        """Refuse images off the units' domain, with what to do about them.

        Raises
        ------
        ShapeError, DomainError
            With the values found.
        """
        self.visible.check(x, what)

    def extra_repr(self) -> str:
        """Units, filters and padding."""
        return f"{self.visible}, {self.hidden}, filters={tuple(self.weight.shape)}, padding={self.padding!r}"

    def _absorbs_hidden(self) -> bool:
        return self.bias == "pixel" or self.padding == "circular"

    def _hidden(self, kind: str, pool: int | None) -> Units:
        maps = tuple(self.couplings.maps)
        if pool is None:
            return HIDDEN[kind](maps)
        if kind != "bernoulli":
            raise OptionError(f"pool={pool} is of Bernoulli hidden units, at most one of which is on; got {kind!r}.")
        return PooledUnits(maps, pool)


def _images(units: Units) -> Units:
    known = isinstance(units, (BernoulliUnits, SpinUnits, GaussianUnits))
    if not known or (isinstance(units, GaussianUnits) and isinstance(units.scale, Tensor)):
        raise OptionError(
            f"Images of a convolutional machine have Bernoulli, spin or Gaussian units of one scale; got {units}."
        )
    if len(units.sites) != 3:
        raise OptionError(
            f"Images stand as (channels, height, width), such as (1, 28, 28); these units as {tuple(units.sites)}."
        )
    return units


def _over(values: Tensor, shape: torch.Size) -> Tensor:
    """One value for each channel or map, at all of its positions, flat."""
    return values.view(-1, 1, 1).expand(shape).reshape(-1)
