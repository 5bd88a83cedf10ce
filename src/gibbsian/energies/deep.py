r"""Deep Boltzmann machines: layers of units in a row, each coupled to its neighbours.

With layers :math:`x_0` (the data), :math:`x_1, \ldots, x_L`, their statistics :math:`s_i = s(x_i)` and offsets
:math:`o_i`,

.. math:: E(x_0, \ldots, x_L) = \sum_i g(x_i) - (s_i - o_i)\, b_i - \sum_i (s_i - o_i)\, W_i\, (s_{i+1} - o_{i+1}).

No layer is coupled to the next but one. Given the *odd* layers all units of the *even* ones are independent, and the
other way round: a deep machine is a restricted one, whose visible units are the even layers side by side, the data
first, and whose hidden units are the odd ones, with couplings in blocks. What is known of restricted machines is so
known of deep ones: the even layers' free energy, with the odd summed out, in closed form; the odd layers' likewise;
block Gibbs in two products; annealing along machines; log Z by listing the smaller side.

What is not in closed form is the free energy of the data alone, since the even layers above it remain to be summed;
see `gibbsian.energies.mean_field` for a bound, and `gibbsian.partition.deep` for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.independent_units import IndependentUnits, as_visible, check_sliding_factor, fitted_field
from gibbsian.energies.joined_units import JoinedUnits
from gibbsian.energies.layer_couplings import LayerCouplings
from gibbsian.energies.layered import TwoLayers
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.tractable import batch_rows
from gibbsian.energies.units import Units, as_units
from gibbsian.errors import OptionError, ShapeError


class Posterior(NamedTuple):
    r"""The hidden layers given data: a restricted machine for each row, odd layers visible and even ones hidden.

    Attributes
    ----------
    energy
        What the data add, :math:`g(x_0) - (s_0 - o_0) b_0`, ``(n,)``.
    machine
        With biases for each row.
    """

    energy: Tensor
    machine: TwoLayers


class DeepBoltzmannMachine(Energy):
    r"""A deep Boltzmann machine; its energy is the free energy of the even layers, the odd ones summed out.

    `Deep Boltzmann machines (Salakhutdinov & Hinton, 2009)
    <https://proceedings.mlr.press/v5/salakhutdinov09a.html>`_. Centring: `Deep Boltzmann machines and the centering
    trick (Montavon & Müller, 2012) <https://doi.org/10.1007/978-3-642-35289-8_33>`_.

    A point of this energy is the row of all even layers, flat and side by side: the data, layer 2, layer 4, ...
    `RBMGibbs` walks these rows, `gibbsian.partition.boltzmann.rbm_path` anneals them, and `visible_of` cuts the data
    out. `odd_layers` is the energy of the other layers, which are fewer in the usual shapes.

    Parameters
    ----------
    visible
        Units of the data; a number or a shape for as many Bernoulli units.
    hidden
        Units of two or more layers, from the data up; numbers for as many Bernoulli units.
    weight_scale
        Standard deviation of the first weights.
    rng
        Draws the first weights; torch's global generator when left out, as torch's own layers use it.

    Attributes
    ----------
    weights
        :math:`W_i`, ``(size of layer i, size of layer i + 1)``, from the data up: parameters.
    even_bias, odd_bias
        The layers' biases, side by side: parameters.
    even_offset, odd_offset
        Offsets likewise, 0 at first: buffers. `recentre` moves them.

    Raises
    ------
    OptionError
        If there are fewer than two hidden layers, ReLU units are visible, or a setting is out of its range.
    """

    even_offset: Tensor
    odd_offset: Tensor

    def __init__(
        self,
        visible: int | Sequence[int] | Units,
        hidden: Sequence[int | Sequence[int] | Units],
        *,
        weight_scale: float = 0.01,
        rng: Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden, (int, Units)) or len(hidden) < 2:
            raise OptionError(
                f"A deep machine has two hidden layers or more, as hidden=[500, 1000]; got {hidden!r}. With one it is "
                "an RBM."
            )
        if not weight_scale >= 0.0:
            raise OptionError(f"weight_scale is a standard deviation, 0 or more; got {weight_scale}.")
        self.layers: tuple[Units, ...] = (as_visible(visible), *map(as_units, hidden))
        if any(isinstance(units, GaussianUnits) and isinstance(units.scale, Tensor) for units in self.layers):
            raise OptionError("Gaussian units of a deep machine have one scale; divide the data by theirs.")
        self.even, self.odd = side_by_side(self.layers[::2]), side_by_side(self.layers[1::2])
        self.event_shape, self.support = self.even.event_shape, self.even.support
        device = None if rng is None else rng.device
        sizes = [units.size for units in self.layers]
        drawn = (torch.randn((a, b), generator=rng, device=device) for a, b in itertools.pairwise(sizes))
        self.weights = nn.ParameterList([nn.Parameter(weight_scale * w) for w in drawn])
        self.even_bias, self.odd_bias = (
            nn.Parameter(torch.zeros(u.size, device=device)) for u in (self.even, self.odd)
        )
        self.register_buffer("even_offset", torch.zeros(self.even.size, device=device))
        self.register_buffer("odd_offset", torch.zeros(self.odd.size, device=device))

    @property
    def visible(self) -> Units:
        """Units of the data."""
        return self.layers[0]

    @property
    def couplings(self) -> LayerCouplings:
        """All weights, as the map from even to odd layers."""
        return LayerCouplings(tuple(self.weights))

    def two_layers(self, x: Tensor) -> TwoLayers:
        """The machine of even and odd layers, as alternating Gibbs sampling asks for it."""
        biases, offsets = (self.even_bias, self.odd_bias), (self.even_offset, self.odd_offset)
        return TwoLayers(self.even, self.odd, self.couplings, *biases, *offsets, source=self)

    def forward(self, x: Tensor) -> Tensor:
        """Free energy of the even layers: ``(n, even size) -> (n,)``, in nats."""
        machine = self.two_layers(batch_rows(x, self.even.event_shape))
        return machine.energy(x, machine.hidden_field(x))[0]

    @property
    def odd_layers(self) -> OddLayers:
        """The energy of the odd layers, the even ones summed out; log Z is the same."""
        return OddLayers(self)

    def joint_energy(self, states: Sequence[Tensor]) -> Tensor:
        """Energy of all layers: states ``(n, *event)`` of each, from the data up, to ``(n,)``.

        Raises
        ------
        ShapeError
            If there are not as many as layers, or one is of another shape.
        """
        self._check_layers(states)
        rows = [units.statistic(x) for units, x in zip(self.layers, states)]
        own = torch.stack([units.own_energy(x) for units, x in zip(self.layers, states)]).sum(0)
        s, t = torch.cat(rows[::2], 1) - self.even_offset, torch.cat(rows[1::2], 1) - self.odd_offset
        return own - s @ self.even_bias - ((self.odd_bias + self.couplings.forth(s)) * t).sum(1)

    def packed(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Put states of all layers side by side, as points of this energy and of `odd_layers`.

        Raises
        ------
        ShapeError
            If there are not as many as layers, or one is of another shape.
        """
        self._check_layers(states)
        return self.even.shaped(_row(states[::2])), self.odd.shaped(_row(states[1::2]))

    def unpacked(self, even: Tensor, odd: Tensor) -> list[Tensor]:
        """Cut points of both energies into the layers' states, from the data up."""
        found: list[Tensor] = [even] * len(self.layers)
        for first, rows in enumerate((even, odd)):
            parts = self.layers[first::2]
            pieces = rows.flatten(1).split([units.size for units in parts], 1)
            found[first::2] = [units.shaped(x) for units, x in zip(parts, pieces)]
        return found

    def visible_of(self, x: Tensor) -> Tensor:
        """Cut the data out of points of this energy: ``(n, even size) -> (n, *event)``."""
        return self.visible.shaped(x[:, : self.visible.size])

    def visible_given(self, odd: Tensor, *, u: Tensor | None = None) -> Tensor:
        """Mean data given the odd layers, or draws with uniform numbers ``u``, ``(n, *event)``."""
        d = self.visible.size
        first = self.layers[1].size
        s = self.layers[1].statistic(self.layers[1].shaped(odd.flatten(1)[:, :first])) - self.odd_offset[:first]
        law = self.visible.natural(self.even_bias[:d] + s @ self.weights[0].T)
        return self.visible.mean(law) if u is None else self.visible.draw(law, u)

    def posterior(self, v: Tensor) -> Posterior:
        """The machine of the hidden layers given data ``(n, *event)``."""
        v = batch_rows(v, self.visible.event_shape)
        d, first = self.visible.size, self.layers[1].size
        s = self.visible.statistic(v) - self.even_offset[:d]
        field = s @ self.weights[0]
        # Only the first hidden layer is coupled to the data.
        bias = self.odd_bias + (
            field if first == self.odd.size else nn.functional.pad(field, (0, self.odd.size - first))
        )
        above = side_by_side(self.layers[2::2])
        offsets = self.odd_offset, self.even_offset[d:]
        machine = TwoLayers(
            self.odd, above, LayerCouplings(tuple(self.weights)[1:]), bias, self.even_bias[d:], *offsets
        )
        return Posterior(self.visible.own_energy(v) - s @ self.even_bias[:d], machine)

    def base(self, data: Tensor | None = None, smoothing: float = 0.1) -> IndependentUnits:
        """Make the even layers without couplings, from which chains and annealing start.

        Parameters
        ----------
        data
            Rows of the data whose means its visible units have; with a copy of the present biases when left out. The
            layers above are always at their biases.
        smoothing
            Weight of the uniform mean in that of the data.

        Raises
        ------
        OptionError
            If the smoothing is not between 0 and 1.
        """
        field = (self.even_bias - self.couplings.back(self.odd_offset)).detach().clone()
        if data is not None:
            field[: self.visible.size] = fitted_field(self.visible, data, smoothing, self.even_bias)
        return IndependentUnits(self.even, field)

    @torch.no_grad()
    def start_at(self, data: Tensor, smoothing: float = 0.1, centre: bool = True) -> None:
        """Begin at the data's means, where hidden units are undecided; offsets at the means of all layers.

        Parameters
        ----------
        data
            Rows ``(n, *event)``.
        smoothing
            As for `base`.
        centre
            Whether to set the offsets; they stay 0 otherwise.

        Raises
        ------
        OptionError, ShapeError, DomainError
            If the smoothing is not between 0 and 1, or the data are no states.
        """
        self.visible.check(data, "the data")
        for tensor in (self.even_bias, self.odd_bias, self.even_offset, self.odd_offset):
            tensor.zero_()
        self.even_bias[: self.visible.size] = fitted_field(self.visible, data, smoothing, self.even_bias)
        if not centre:
            return
        idle = [u.statistic(u.mean(u.natural(torch.zeros_like(b)[None])))[0] for u, b in self._sides()]
        self.even_offset.copy_(idle[0])
        self.odd_offset.copy_(idle[1])
        self.even_offset[: self.visible.size] = self.visible.statistic(data.to(self.even_bias)).mean(0)

    @torch.no_grad()
    def recentre(self, even: Tensor, odd: Tensor, rate: float = 1.0) -> None:
        """Slide the offsets towards means, and move the biases so that the density stays as it is.

        Parameters
        ----------
        even, odd
            Mean statistics of the layers, side by side.
        rate
            The sliding factor: the share of the way to go.

        Raises
        ------
        OptionError
            If the rate is not between 0 and 1.
        """
        check_sliding_factor(rate)
        by_even, by_odd = rate * (even - self.even_offset), rate * (odd - self.odd_offset)
        self.even_bias.add_(self.couplings.back(by_odd))
        self.odd_bias.add_(self.couplings.forth(by_even))
        self.even_offset.add_(by_even)
        self.odd_offset.add_(by_odd)

    def check_states(self, v: Tensor, what: str = "the data") -> None:
        """Refuse data off the units' domain, with what to do about them.

        Raises
        ------
        ShapeError, DomainError
            With the values found.
        """
        self.visible.check(v, what)

    def extra_repr(self) -> str:
        """The units of all layers."""
        return ", ".join(map(repr, self.layers))

    def _sides(self) -> tuple[tuple[Units, Tensor], tuple[Units, Tensor]]:
        return (self.even, self.even_bias), (self.odd, self.odd_bias)

    def _check_layers(self, states: Sequence[Tensor]) -> None:
        if len(states) != len(self.layers):
            raise ShapeError(
                f"{self!r} has {len(self.layers)} layers, the data's included; got states of {len(states)}."
            )
        for i, (units, x) in enumerate(zip(self.layers, states)):
            units.check_shape(x, f"the states of layer {i}")


class OddLayers(Energy):
    """The odd layers of a deep Boltzmann machine, the even ones summed out: see `DeepBoltzmannMachine.odd_layers`.

    Annealing runs on these in `Deep Boltzmann machines (Salakhutdinov & Hinton, 2009)
    <https://proceedings.mlr.press/v5/salakhutdinov09a.html>`_: with two hidden layers, on the first of them alone.

    Parameters
    ----------
    machine
        The whole; its parameters are shared.
    """

    def __init__(self, machine: DeepBoltzmannMachine) -> None:
        super().__init__()
        self.machine = machine
        self.event_shape, self.support = machine.odd.event_shape, machine.odd.support

    def two_layers(self, x: Tensor) -> TwoLayers:
        """The machine with its sides exchanged."""
        whole = self.machine.two_layers(x)
        return replace(
            whole,
            visible=whole.hidden,
            hidden=whole.visible,
            weight=LayerCouplings(tuple(self.machine.weights), flipped=True),
            visible_bias=whole.hidden_bias,
            hidden_bias=whole.visible_bias,
            visible_offset=whole.hidden_offset,
            hidden_offset=whole.visible_offset,
            source=self,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Free energy of the odd layers: ``(n, *odd event) -> (n,)``, in nats."""
        return self.machine.two_layers(x).hidden_energy(batch_rows(x, self.machine.odd.event_shape))

    def base(self) -> IndependentUnits:
        """Make the odd layers without couplings, at their biases."""
        whole = self.machine
        return IndependentUnits(whole.odd, (whole.odd_bias - whole.couplings.forth(whole.even_offset)).detach())

    def extra_repr(self) -> str:
        """The machine."""
        return repr(self.machine)


def side_by_side(layers: Sequence[Units]) -> Units:
    """Read layers as one: a single one as it is, several joined."""
    return layers[0] if len(layers) == 1 else JoinedUnits(layers)


def _row(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in states], 1)
