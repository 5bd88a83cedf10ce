r"""Restricted Boltzmann machines: two layers of units, coupled to each other and not within.

.. math:: E(v, h) = g(v) + g(h) - (s(v) - \mu)\, b - (s(h) - \lambda)\, c - (s(v) - \mu)\, W\, (s(h) - \lambda)

The energy of a visible state is the free energy, :math:`F(v) = -\log \sum_h e^{-E(v, h)}`, in closed form for all
pairs of units; `gibbsian.energies.units` has the units and `gibbsian.energies.layered` the formulas.

**Centring.** The offsets :math:`\mu, \lambda` change the parameters' meaning, not the family: going from one pair to
another leaves the density as it is if :math:`b` gains :math:`W \Delta\lambda` and :math:`c` gains :math:`\Delta\mu W`.
What changes is the gradient, which with offsets at the units' means is that of their covariances,

.. math:: \partial_W \log p = \langle (s(v) - \mu)^T (s(h) - \lambda) \rangle_{data}
          - \langle (s(v) - \mu)^T (s(h) - \lambda) \rangle_{model},

and hence the same whether ones or zeros are the rare value of a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.independent_units import IndependentUnits, as_visible, check_sliding_factor, fitted_field
from gibbsian.energies.joined_units import JoinedUnits
from gibbsian.energies.layered import TwoLayers
from gibbsian.energies.real_units import keep_scale, with_kept_scale
from gibbsian.energies.tractable import batch_rows
from gibbsian.energies.units import CategoricalUnits, Units, as_units
from gibbsian.errors import DomainError, OptionError, ShapeError


class RBM(Energy):
    r"""A restricted Boltzmann machine; its energy of visible states is the free energy.

    `Information processing in dynamical systems: foundations of harmony theory (Smolensky, 1986)
    <https://apps.dtic.mil/sti/citations/ADA620727>`_; `Training products of experts by minimizing contrastive
    divergence (Hinton, 2002) <https://doi.org/10.1162/089976602760128018>`_. Centring: `Deep Boltzmann machines and the
    centering trick (Montavon & Müller, 2012) <https://doi.org/10.1007/978-3-642-35289-8_33>`_; `How to center deep
    Boltzmann machines (Melchior et al., 2016) <https://jmlr.org/papers/v17/14-237.html>`_.

    Parameters
    ----------
    visible
        Units of the data; a number or a shape for as many Bernoulli units.
    hidden
        Units that are summed out; a number for as many Bernoulli units.
    condition
        Size of a context ``y`` that shifts the biases, :math:`b + y A` and :math:`c + y B`: the model of
        :math:`p(v \mid y)` of `Modeling human motion using binary latent variables (Taylor et al., 2006)
        <https://papers.nips.cc/paper/3078-modeling-human-motion-using-binary-latent-variables>`_. The context is
        ``(n, condition)``, or integer labels ``(n,)``.
    weight_scale
        Standard deviation of the first weights.
    rng
        Draws the first weights; torch's global generator when left out, as torch's own layers use it.

    Attributes
    ----------
    weight, visible_bias, hidden_bias
        W ``(D, M)``, b ``(D,)``, c ``(M,)``: parameters.
    visible_offset, hidden_offset
        The offsets, 0 at first: buffers. `recentre` moves them.

    Raises
    ------
    OptionError
        If ReLU units are visible, or a size is not positive.
    """

    visible_offset: Tensor
    hidden_offset: Tensor

    def __init__(
        self,
        visible: int | Sequence[int] | Units,
        hidden: int | Sequence[int] | Units,
        *,
        condition: int | None = None,
        weight_scale: float = 0.01,
        rng: Generator | None = None,
    ) -> None:
        super().__init__()
        self._visible = keep_scale(self, "visible_scale", as_visible(visible))
        self._hidden = keep_scale(self, "hidden_scale", as_units(hidden))
        if condition is not None and condition < 1:
            raise OptionError(f"condition is the size of the context, 1 or more; got {condition}.")
        if not weight_scale >= 0.0:
            raise OptionError(f"weight_scale is a standard deviation, 0 or more; got {weight_scale}.")
        d, m = self._visible.size, self._hidden.size
        self.event_shape = self._visible.event_shape
        self.support = self._visible.support
        self.condition = condition
        self.context = () if condition is None else ("y",)
        device = None if rng is None else rng.device
        self.weight = nn.Parameter(weight_scale * torch.randn((d, m), generator=rng, device=device))
        self.visible_bias = nn.Parameter(torch.zeros(d, device=device))
        self.hidden_bias = nn.Parameter(torch.zeros(m, device=device))
        if condition is not None:
            self.visible_slope = nn.Parameter(torch.zeros((condition, d), device=device))
            self.hidden_slope = nn.Parameter(torch.zeros((condition, m), device=device))
        self.register_buffer("visible_offset", torch.zeros(d, device=device))
        self.register_buffer("hidden_offset", torch.zeros(m, device=device))

    @property
    def visible(self) -> Units:
        """Units of the data."""
        return with_kept_scale(self, "visible_scale", self._visible)

    @property
    def hidden(self) -> Units:
        """Units that are summed out."""
        return with_kept_scale(self, "hidden_scale", self._hidden)

    def two_layers(self, x: Tensor, y: Tensor | None = None) -> TwoLayers:
        """The machine, as alternating Gibbs sampling asks for it."""
        b, c = self._biases(y)
        offsets = self.visible_offset, self.hidden_offset
        return TwoLayers(self.visible, self.hidden, self.weight, b, c, *offsets)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Free energy of each row: ``(n, *event) -> (n,)``, in nats."""
        x = batch_rows(x, cast(torch.Size, self.event_shape))
        machine = self.two_layers(x, y)
        return machine.energy(x, machine.hidden_field(x))[0]

    def joint_energy(self, v: Tensor, h: Tensor, y: Tensor | None = None) -> Tensor:
        """Energy of both layers: ``(n, *event)`` and ``(n, *hidden event)`` to ``(n,)``."""
        v, h = batch_rows(v, self.visible.event_shape), batch_rows(h, self.hidden.event_shape)
        b, c = self._biases(y)
        s, t = self.visible.statistic(v) - self.visible_offset, self.hidden.statistic(h) - self.hidden_offset
        coupled = ((s @ self.weight + c) * t).sum(1) + (s * b).sum(1)
        return self.visible.own_energy(v) + self.hidden.own_energy(h) - coupled

    def hidden_given(self, v: Tensor, y: Tensor | None = None, *, u: Tensor | None = None) -> Tensor:
        """Mean hidden states given visible ones, or draws.

        Parameters
        ----------
        v
            Visible states, ``(n, *event)``.
        y
            The context, of a conditional machine.
        u
            Uniform numbers ``(n, *hidden event)``, which become draws; ``None`` for the means.
        """
        machine = self.two_layers(v, y)
        field = machine.hidden_field(batch_rows(v, self.visible.event_shape))
        return self.hidden.mean(self.hidden.natural(field)) if u is None else machine.draw_hidden(field, u)

    def visible_given(self, h: Tensor, y: Tensor | None = None, *, u: Tensor | None = None) -> Tensor:
        """Mean visible states given hidden ones, or draws with uniform numbers ``u``, ``(n, *event)``."""
        machine = self.two_layers(h, y)
        h = batch_rows(h, self.hidden.event_shape)
        if u is not None:
            return machine.draw_visible(h, u)
        return self.visible.mean(self.visible.natural(machine.visible_field(h)))

    def marginal_hidden_energy(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        """Free energy of the hidden layer, the visible one summed out: ``(n, *hidden event) -> (n,)``."""
        return self.two_layers(h, y).hidden_energy(batch_rows(h, self.hidden.event_shape))

    @property
    def blocks(self) -> tuple[slice | Tensor, ...] | None:
        """Each visible site by itself, for all are coupled; on bits or one-hot states."""
        if self.visible.states_of_one is None:
            return None
        sites = self.visible.sites
        if len(sites) == 1:
            return tuple(slice(i, i + 1) for i in range(sites[0]))
        return tuple(torch.eye(sites.numel(), dtype=torch.bool, device=self.weight.device).view(-1, *sites))

    def conditional_logits(self, x: Tensor, block: Tensor | slice, y: Tensor | None = None) -> Tensor:
        """Log-odds, or logits of the classes, of each visible site given all others, ``(n, *event)``.

        For a slice only its sites are computed, at n M numbers each; for a mask all.
        """
        units = self.visible
        if units.states_of_one is None:
            raise DomainError(f"{units} have no conditional logits; RBMGibbs draws them given the hidden units.")
        machine = self.two_layers(x, y)
        classes = units.event_shape[-1] if units.event_shape != units.sites else 1
        which = block if isinstance(block, slice) and len(units.sites) == 1 else slice(None)
        s = units.statistic(x).view(len(x), -1, classes)[:, which]
        w = self.weight.view(-1, classes, self.weight.shape[1])[which]
        b = machine.visible_bias.expand(len(x), -1).view(len(x), -1, classes)[:, which]
        # The site's own part of the hidden field is taken out, and each of its values put in.
        rest = machine.hidden_field(x)[:, None] - torch.einsum("nsk,skm->nsm", s, w)
        if classes == 1:
            low, high = units.statistic(x.new_tensor([[0.0, 1.0]])).flatten().tolist()
            gain, values = (high - low) * b[..., 0], (rest + low * w[:, 0], rest + high * w[:, 0])
            below, above = (self._hidden_part(field) for field in values)
            found = gain + above - below
        else:
            found = b + self._hidden_part(rest[:, :, None] + w)
        if which == slice(None):
            return found.reshape(x.shape)
        logits = torch.zeros_like(x)
        logits[:, which] = found
        return logits

    def base(self, data: Tensor | None = None, smoothing: float = 0.1) -> IndependentUnits:
        """Make the machine without couplings from which chains and annealing start.

        Parameters
        ----------
        data
            Rows whose means it has; with a copy of the present biases instead when left out.
        smoothing
            Weight of the uniform mean in that of the data: no bit is certain.

        Raises
        ------
        OptionError
            If the smoothing is not between 0 and 1.
        """
        if data is None:
            b = self.visible_bias.detach() - self.weight.detach() @ self.hidden_offset
            return IndependentUnits(self.visible, b)
        return IndependentUnits(self.visible, fitted_field(self.visible, data, smoothing, self.weight))

    @torch.no_grad()
    def start_at(self, data: Tensor, smoothing: float = 0.1, centre: bool = True) -> None:
        """Begin at independent units with the data's means, where hidden units are undecided; offsets at both means.

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
        ShapeError, DomainError
            If the data are no states.
        """
        self.visible.check(data, "the data")
        rows = data.to(self.weight)
        self.visible_bias.copy_(self.visible.fitted(rows, smoothing))
        self.hidden_bias.zero_()
        self.visible_offset.zero_()
        self.hidden_offset.zero_()
        if centre:
            idle = self.hidden.natural(torch.zeros_like(self.hidden_bias)[None])
            self.visible_offset.copy_(self.visible.statistic(rows).mean(0))
            self.hidden_offset.copy_(self.hidden.statistic(self.hidden.mean(idle))[0])

    @torch.no_grad()
    def means(self, v: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean statistics of both layers over rows of visible states, ``(D,)`` and ``(M,)``."""
        hidden = self.hidden.statistic(self.hidden_given(v, y))
        return self.visible.statistic(v).mean(0), hidden.mean(0)

    @torch.no_grad()
    def recentre(self, visible: Tensor, hidden: Tensor, rate: float = 1.0) -> None:
        """Slide the offsets towards means, and move the biases so that the density stays as it is.

        Parameters
        ----------
        visible, hidden
            Mean statistics of the layers, as `means` returns them.
        rate
            The sliding factor: the share of the way to go.

        Raises
        ------
        OptionError
            If the rate is not between 0 and 1.
        """
        check_sliding_factor(rate)
        before = self.visible_offset.clone(), self.hidden_offset.clone()
        self.visible_offset.add_(rate * (visible - before[0]))
        self.hidden_offset.add_(rate * (hidden - before[1]))
        self.carry(self.weight, self.visible_bias, self.hidden_bias, before)

    @torch.no_grad()
    def carry(self, weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, offsets: tuple[Tensor, Tensor]) -> None:
        """Rewrite biases, in place, that stood at other offsets for the present ones; their density stays as it is.

        The parameters need not be the machine's own: averages of them follow in the same way.

        Parameters
        ----------
        weight, visible_bias, hidden_bias
            The parameters of one machine; the biases are changed.
        offsets
            Visible and hidden offsets at which they stood.
        """
        visible_bias.add_(weight @ (self.hidden_offset - offsets[1]))
        hidden_bias.add_((self.visible_offset - offsets[0]) @ weight)

    def check_states(self, x: Tensor, what: str = "the data") -> None:
        """Refuse visible states off the units' domain, with what to do about them.

        Raises
        ------
        ShapeError, DomainError
            With the values found.
        """
        self.visible.check(x, what)

    def extra_repr(self) -> str:
        """The units."""
        return f"{self.visible}, {self.hidden}" + ("" if self.condition is None else f", condition={self.condition}")

    def _hidden_part(self, field: Tensor) -> Tensor:
        return self.hidden.log_partition(field).sum(-1) - field @ self.hidden_offset

    def _biases(self, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.condition is None:
            return self.visible_bias, self.hidden_bias
        if y is None or y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] != self.condition):
            found = "none" if y is None else f"shape {tuple(y.shape)}"
            raise ShapeError(
                f"{self!r} takes a context y of shape (n, {self.condition}), or integer labels (n,); got {found}."
            )
        if y.ndim == 1:
            return self.visible_bias + self.visible_slope[y.long()], self.hidden_bias + self.hidden_slope[y.long()]
        return self.visible_bias + y @ self.visible_slope, self.hidden_bias + y @ self.hidden_slope


def label_log_probs(energy: RBM, x: Tensor) -> Tensor:
    r"""Logarithms of :math:`p(y \mid x)` under a machine whose visible units are joined, the last of them a label.

    `Classification using discriminative restricted Boltzmann machines (Larochelle & Bengio, 2008)
    <https://doi.org/10.1145/1390156.1390224>`_.

    Parameters
    ----------
    energy
        With visible ``JoinedUnits((..., CategoricalUnits(1, classes=K)))``.
    x
        States of all other parts, flat ``(n, D - K)``.

    Returns
    -------
    Tensor
        ``(n, K)``, exact: K free energies per row.

    Raises
    ------
    OptionError
        If the last part is no single label.
    ShapeError
        If the rows are of another length.
    """
    units = energy.visible
    label = units.parts[-1] if isinstance(units, JoinedUnits) else None
    if not isinstance(label, CategoricalUnits) or label.sites.numel() != 1:
        raise OptionError(
            f"Labels are told by a machine over JoinedUnits((pixels, CategoricalUnits(1, classes=K))); got {units}."
        )
    k = label.classes
    if x.ndim != 2 or x.shape[1] != units.size - k:
        raise ShapeError(f"Rows without their label have shape (n, {units.size - k}); got {tuple(x.shape)}.")
    labels = torch.eye(k, dtype=x.dtype, device=x.device)
    both = torch.cat((x.repeat_interleave(k, 0), labels.repeat(len(x), 1)), 1)
    return (-energy(both)).view(len(x), k).log_softmax(1)
