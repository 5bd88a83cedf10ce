r"""Energies of two layers, as alternating Gibbs sampling sees them: fields, draws, and what is left to correct.

With visible and hidden units as in `gibbsian.energies.units`, offsets :math:`\mu, \lambda`, and the hidden field
:math:`a(v) = c + (s(v) - \mu) W`, the energy of both layers and the free energy of the visible one are

.. math::

   E(v, h) &= g(v) + g(h) - (s(v) - \mu)\, b - (s(h) - \lambda)\, c - (s(v) - \mu)\, W\, (s(h) - \lambda), \\
   F(v) &= g(v) - (s(v) - \mu)\, b + \lambda\, a(v) - \sum_j A_j(a_j(v)).

Given one layer the units of the other are independent, so that a step :math:`v \to h \to v'` takes two products with W,
and the second, which draws :math:`v'`, is followed by the one that gives :math:`a(v')`: the energy there, and the field
from which the next step starts.

**Temperatures.** :math:`\beta F` is the free energy of no machine with the same hidden units, as the sum over these is
inside the power. The machine with couplings :math:`\beta W`, :math:`\beta b`, :math:`\beta c` is close to it, and
proposes; with independent sites beside it (a base) in its visible conditionals, its free energy is

.. math:: F_\beta(v) = \beta \bigl(g(v) - (s(v) - \mu) b + \lambda a\bigr) + \sum_k w_k E_k(v) - \sum_j A_j(\beta a_j),

and :math:`R = \beta F + \sum_k w_k E_k + \text{rest} - F_\beta` is the excess of the target over it. The step is
reversible under :math:`e^{-F_\beta}`, hence accepting it with probability :math:`\min(1, e^{R(v) - R(v')})` leaves the
target invariant. At :math:`\beta = 1` without a rest, R is 0. Along a path of machines, :math:`F_\beta` is itself the
target, and nothing is ever rejected: see `gibbsian.energies.boltzmann.IntermediateRBM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gibbsian.errors import ArgumentTypeError
from gibbsian.typing import Scalar


class Natural(NamedTuple):
    r"""Laws of the numbers in a state, :math:`p(x) \propto e^{l x - p x^2 / 2}`; laws multiply as these add.

    Attributes
    ----------
    linear
        l: log-odds of bits, logits of classes, mean times precision of reals, ``(..., size)``.
    precision
        p, of reals; 0 elsewhere.
    """

    linear: Tensor
    precision: Tensor | float = 0.0


class Layer(Protocol):
    """What is asked of a layer of units; see `gibbsian.energies.units`."""

    def statistic(self, x: Tensor) -> Tensor:
        """What enters the couplings, ``(n, size)``."""
        ...

    def own_energy(self, x: Tensor) -> Tensor:
        """Energy of each row without any field, ``(n,)``."""
        ...

    def natural(self, field: Tensor) -> Natural:
        """The law under a field."""
        ...

    def log_partition(self, field: Tensor) -> Tensor:
        """A of each unit."""
        ...

    def total_partition(self, field: Tensor) -> Tensor:
        """A of all units together, ``(n,)``."""
        ...

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """States from uniform numbers."""
        ...


class Couplings(Protocol):
    """A linear map W from the visible layer to the hidden one that is not kept as a matrix, such as a convolution."""

    def forth(self, s: Tensor) -> Tensor:
        """Apply it to rows: s W, ``(n, D) -> (n, M)``."""
        ...

    def back(self, t: Tensor) -> Tensor:
        """Apply its transpose: t W^T, ``(n, M) -> (n, D)``."""
        ...

    def double(self) -> Couplings:
        """Return the same in float64."""
        ...


@dataclass(frozen=True)
class TwoLayers:
    """A machine of two layers, at a temperature, with what stands beside it in a sum.

    Attributes
    ----------
    visible, hidden
        The units.
    weight
        W: ``(D, M)``, or a map that stands for one.
    visible_bias, hidden_bias
        b and c, ``(D,)`` and ``(M,)``, or one for each row.
    visible_offset, hidden_offset
        Offsets of the statistics, ``(D,)`` and ``(M,)``.
    strength
        The weight of its energy, an inverse temperature.
    sites
        Energies of independent sites beside it: weight, energy, law.
    rest
        Other energies beside it, as functions of the visible state.
    is_path
        Whether the machine at this strength is the target itself, normalised as its base at strength 0.
    source
        What holds the parameters, where the tensors here are made of them anew each time.
    """

    visible: Layer
    hidden: Layer
    weight: Tensor | Couplings
    visible_bias: Tensor
    hidden_bias: Tensor
    visible_offset: Tensor
    hidden_offset: Tensor
    strength: Scalar = 1.0
    sites: tuple[tuple[Scalar, Callable[[Tensor], Tensor], Natural], ...] = ()
    rest: tuple[tuple[Scalar, Callable[[Tensor], Tensor]], ...] = ()
    is_path: bool = False
    source: object = None

    def hidden_field(self, v: Tensor) -> Tensor:
        """Return a(v), ``(n, M)``, at strength 1."""
        s = self.visible.statistic(v) - self.visible_offset
        return self.hidden_bias + (s @ self.weight if isinstance(self.weight, Tensor) else self.weight.forth(s))

    def visible_field(self, h: Tensor) -> Tensor:
        """Return the field on the visible units, ``(n, D)``, at strength 1."""
        t = self.hidden.statistic(h) - self.hidden_offset
        return self.visible_bias + (t @ self.weight.T if isinstance(self.weight, Tensor) else self.weight.back(t))

    def shares_fields(self, other: TwoLayers) -> bool:
        """Whether these are one machine's parameters, so that ``hidden_field`` is the same at any strength."""
        if self.source is not None:
            return self.source is other.source
        mine = (self.weight, self.hidden_bias, self.visible_offset)
        return all(a is b for a, b in zip(mine, (other.weight, other.hidden_bias, other.visible_offset)))

    def draw_hidden(self, field: Tensor, u: Tensor) -> Tensor:
        """Draw hidden states from the field of a visible one, with uniform numbers ``(n, M)``."""
        return self.hidden.draw(self.hidden.natural(self._scaled(field)), u)

    def draw_visible(self, h: Tensor, u: Tensor) -> Tensor:
        """Draw visible states given hidden ones, with uniform numbers of the shape of the former."""
        linear, precision = self.visible.natural(self.visible_field(h))
        law = Natural(self._scaled(linear), self._scaled(precision))
        for w, _, (linear, precision) in self.sites:
            law = Natural(law.linear + w * linear, law.precision + w * precision)
        return self.visible.draw(law, u)

    def energy(self, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor | None]:
        """Energy of the target at v, ``(n,)``, from the field there; and the excess R, ``None`` where it is 0."""
        s = self.visible.statistic(v) - self.visible_offset
        own = self.visible.own_energy(v) - _dot(s, self.visible_bias) + field @ self.hidden_offset
        plain = isinstance(self.strength, float) and self.strength == 1.0
        if plain and not self.sites and not self.rest:
            return own - self.hidden.total_partition(field), None
        tempered = self.hidden.total_partition(self._scaled(field))
        free = self.strength * own + sum((w * e(v) for w, e, _ in self.sites), start=0.0 * own) - tempered
        if self.is_path:
            idle = self.hidden.log_partition(torch.zeros_like(field[:1])).sum()
            return free + (1.0 - self.strength) * idle, None
        if plain and not self.rest:
            return free, None
        excess = tempered - self.strength * self.hidden.total_partition(field)
        excess = excess + sum((w * e(v) for w, e in self.rest), start=0.0 * own)
        return free + excess, excess

    def hidden_energy(self, h: Tensor) -> Tensor:
        """Free energy of hidden states, ``(n,)``: of the machine at strength 1, the visible layer summed out."""
        field = self.visible_field(h)
        own = self.hidden.own_energy(h) - _dot(self.hidden.statistic(h) - self.hidden_offset, self.hidden_bias)
        return own + field @ self.visible_offset - self.visible.total_partition(field)

    def _scaled(self, value: Any) -> Any:
        return value if isinstance(self.strength, float) and self.strength == 1.0 else self.strength * value


def two_layers(energy: Callable[..., Tensor], x: Tensor, context: Mapping[str, Tensor]) -> TwoLayers:
    """Ask an energy for its two layers.

    Raises
    ------
    ArgumentTypeError
        If it has none.
    """
    method = getattr(energy, "two_layers", None)
    if method is None:
        raise ArgumentTypeError(
            f"Alternating Gibbs sampling needs an energy of two layers, such as RBM; {energy!r} is none. On discrete "
            "states BlockGibbs, GibbsWithGradients and SingleSiteGibbs serve other energies."
        )
    return method(x, **context)


def beside(terms: Sequence[tuple[Scalar, Any, dict[str, Tensor]]], x: Tensor) -> TwoLayers:
    """Read a weighted sum of energies as the machine in it, at its weight, with the other terms beside it.

    Parameters
    ----------
    terms
        Weights, energies, and the context of each.
    x
        Visible states, which tell how many rows there are.

    Raises
    ------
    ArgumentTypeError
        If not exactly one term has two layers, or it is part of a path or a sum already.
    """
    layered = [term for term in terms if has_layers(term[1])]
    if len(layered) != 1:
        raise ArgumentTypeError(
            f"Alternating Gibbs sampling proposes by the one energy of two layers in a sum; there are {len(layered)} "
            f"among {', '.join(repr(term[1]) for term in terms)}. GibbsWithGradients serves any energy on bits."
        )
    weight, energy, context = layered[0]
    machine = two_layers(energy, x, context)
    if machine.is_path or machine.sites or machine.rest or not isinstance(machine.strength, float):
        raise ArgumentTypeError(f"{energy!r} is at a temperature, or part of a sum, already; use it alone.")
    sites, rest = [], []
    for w, other, given in terms:
        if other is energy:
            continue
        law = getattr(other, "natural", None)
        if law is None:
            rest.append((w, lambda v, other=other, given=given: other(v, **given)))
        else:
            sites.append((w, other, law))
    scaled = weight if isinstance(machine.strength, float) and machine.strength == 1.0 else weight * machine.strength
    return replace(machine, strength=scaled, sites=tuple(sites), rest=tuple(rest))


def has_layers(energy: Any) -> bool:
    """Whether an energy is one of two layers, or wraps one."""
    if not hasattr(energy, "two_layers"):
        return False
    several = getattr(energy, "energies", None)
    inner = getattr(energy, "energy", None)
    return any(map(has_layers, several)) if several is not None else inner is None or has_layers(inner)


def _dot(rows: Tensor, weights: Tensor) -> Tensor:
    """Products of rows with one vector, or with one each."""
    return rows @ weights if weights.ndim == 1 else (rows * weights).sum(1)
