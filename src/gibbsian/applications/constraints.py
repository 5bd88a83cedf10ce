r"""How well draws of a composition meet each of its terms.

A term's own draws tell which energies are usual for it. Draws of a product should have usual energies under every
factor, those of a negation unusual ones under what is subtracted: counted are the draws whose energy lies below (for a
negative weight: above) the quantile that 95 per cent of the term's own draws stay below. A factor that is met as by its
own draws has 0.95; a negated term that changes nothing 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.base import Combination, Energy, Given, Mixture, formula
from gibbsian.errors import ArgumentTypeError, OptionError


class Constraint(NamedTuple):
    """How one term is met.

    Attributes
    ----------
    name
        The term.
    weight
        Its weight; of a mixture's part, its share.
    met
        The part of the draws that meet it, with its standard error.
    own
        The same part of the term's own draws: what a perfect factor, or a negation without effect, would have.
    threshold
        The energy that divides them, in nats.
    """

    name: str
    weight: float
    met: Estimate
    own: float
    threshold: float


class Constraints(NamedTuple):
    """What `constraints` returns; prints as a table.

    Attributes
    ----------
    terms
        One for each term.
    quantile
        Of the terms' own draws, at which a draw still counts as usual.
    """

    terms: tuple[Constraint, ...]
    quantile: float

    def __str__(self) -> str:
        """A table: term, weight, and the part of the draws that meet it."""
        lines = [("term", "weight", "met", "its own draws", "asked: energy")]
        for term in self.terms:
            side = "above" if term.weight < 0.0 else "at most"
            asked = f"{side} {term.threshold:.4g}"
            lines.append((term.name, f"{term.weight:.4g}", str(term.met), f"{term.own:.2f}", asked))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


@torch.no_grad()
def constraints(
    energy: Energy,
    x: Tensor,
    own: Sequence[Tensor],
    *,
    sigma: float | None = None,
    quantile: float = 0.95,
    names: Sequence[str] | None = None,
) -> Constraints:
    """Count the draws of a composition that meet each of its terms, by the energies of the term's own draws.

    Parameters
    ----------
    energy
        The composition: a sum, whose terms are judged, or a mixture, whose parts are. Anything else is one term.
    x
        Its draws, ``(n, *event)``, of equal weight: ``composed.draw(n, rng)``. They count as independent.
    own
        Draws of each term by itself, in order.
    sigma
        The noise level at which to look, where the energy has it as open context: that of the draws.
    quantile
        Of the terms' own draws.
    names
        What to call the terms; by default as they print.

    Raises
    ------
    OptionError
        If draws or names are not one for each term, the quantile is not between 0 and 1, or context is open.
    ArgumentTypeError
        If the energy is none.
    """
    if not isinstance(energy, Energy):
        raise ArgumentTypeError(f"Constraints are of an energy's terms; got {type(energy).__name__}.")
    terms = terms_of(energy)
    if len(own) != len(terms) or (names is not None and len(names) != len(terms)):
        told = ", ".join(formula(term) for _, term in terms)
        raise OptionError(
            f"This composition has {len(terms)} terms, {told}: pass draws (and names) of each; got {len(own)} sets of "
            f"draws and {'no' if names is None else len(names)} names."
        )
    if not 0.0 < quantile < 1.0 or min(len(x), *map(len, own)) < 2:
        raise OptionError(
            f"The quantile lies between 0 and 1, and every set has 2 or more draws; got {quantile}, {len(x)} draws and "
            f"{[len(each) for each in own]} of the terms."
        )
    found = []
    for i, (weight, term) in enumerate(terms):
        at = term.given(sigma=x.new_tensor(sigma)) if sigma is not None and "sigma" in term.context else term
        if at.context:
            raise OptionError(f"{formula(at)} has open context, {', '.join(at.context)}: pass sigma=..., or fix it.")
        name = formula(term) if names is None else names[i]
        found.append(_judge(name, weight, at(x).double(), at(own[i]).double(), quantile))
    return Constraints(tuple(found), quantile)


def terms_of(energy: Energy) -> list[tuple[float, Energy]]:
    """List what a composition is made of: weights and terms of a sum, shares and parts of a mixture."""
    if isinstance(energy, Combination):
        return [(float(weight), term) for weight, term in energy.terms]
    if isinstance(energy, Mixture):
        parts = [part for part in energy.energies if isinstance(part, Energy)]
        return list(zip(energy.log_weights.exp().tolist(), parts))
    if isinstance(energy, Given) and isinstance(energy.energy, (Combination, Mixture)):
        fixed = {name: getattr(energy, f"fixed_{name}") for name in energy.fixed}
        return [
            (weight, term.given(**{k: v for k, v in fixed.items() if k in term.context}))
            for weight, term in terms_of(energy.energy)
        ]
    return [(1.0, energy)]


def _judge(name: str, weight: float, values: Tensor, own: Tensor, quantile: float) -> Constraint:
    n, m = len(values), len(own)
    # Both the count and the threshold have an error; the second through the density of energies at the threshold.
    slack = math.sqrt(quantile * (1.0 - quantile) / m)
    ends = (max(quantile - slack, 0.0), quantile, min(quantile + slack, 1.0))
    thresholds = torch.quantile(own, own.new_tensor(ends))
    low, below, high = (float((values <= t).double().mean()) for t in thresholds)
    # One draw more or less is what a count of 0 leaves open.
    share = min(max(below, 1.0 / n), 1.0 - 1.0 / n)
    error = math.sqrt(share * (1.0 - share) / n + (0.5 * (high - low)) ** 2)
    flipped = weight < 0.0
    met = Estimate(1.0 - below if flipped else below, error)
    return Constraint(name, weight, met, 1.0 - quantile if flipped else quantile, float(thresholds[1]))
