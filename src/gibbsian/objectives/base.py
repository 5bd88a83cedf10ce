"""What every objective shares: batches, losses, the protocol, and sums with weights.

An objective is a module, because it may own what a checkpoint must hold: a replay buffer, a learned constant, a
generator network. Its ``forward`` returns a `Loss` of tensors; nothing in it waits for the device. Objectives add up
as energies do: ``2.0 * a + b``, ``a - 0.1 * b``, ``Ramp(0.0, 1.0, 1000) * a + b``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.score import Score
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.typing import Context


@dataclass(frozen=True)
class Batch:
    """Rows of data and what goes with each.

    Attributes
    ----------
    x
        Data, ``(n, *event)``.
    context
        By name, one row per row of ``x``: labels, noise levels.
    """

    x: Tensor
    context: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.context.items():
            if value.shape[:1] != self.x.shape[:1]:
                raise ShapeError(f"{self.x.shape[0]} rows of data came with {name} of shape {tuple(value.shape)}.")

    @staticmethod
    def of(data: Tensor | Batch) -> Batch:
        """Read a bare tensor as a batch without context."""
        return data if isinstance(data, Batch) else Batch(data)

    def rows(self, index: Tensor) -> Batch:
        """Pick rows."""
        return Batch(self.x[index], {k: v[index] for k, v in self.context.items()})

    def __len__(self) -> int:
        return self.x.shape[0]


@dataclass(frozen=True)
class Loss:
    """What an objective returns.

    Attributes
    ----------
    value
        The 0-d tensor to differentiate.
    metrics
        0-d tensors, detached. Names used across objectives: ``energy_data`` and ``energy_samples`` (means, nats),
        ``gap`` (data minus samples), ``acceptance``, ``nonfinite`` (proposals that were not finite), ``buffer_age``
        (mean steps), ``moved`` (root mean square distance moved per coordinate by the round's chains).
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """How an energy is fitted.

    Attributes
    ----------
    fits_scores
        Whether it fits a `gibbsian.energies.score.Score`, too, which has no energy.
    learning_rate_factor
        What ``fit`` multiplies the learning rate of the objective's own parameters by: a weight in the loss would do
        nothing under an optimiser that is blind to the scale of gradients.
    full_precision
        Whether its loss cannot be computed in bfloat16: it takes second derivatives, or differences of close energies.
    """

    fits_scores: bool = False
    full_precision: bool = False
    learning_rate_factor: float = 1.0

    @abstractmethod
    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Compute the loss of one batch; everything random comes from ``rng``."""

    def __add__(self, other: Objective) -> Objective:
        return WeightedSum([(1.0, self), (1.0, other)])

    def __radd__(self, other: object) -> Objective:
        # The built-in sum starts from 0.
        return self if isinstance(other, int) and other == 0 else WeightedSum([(1.0, cast(Objective, other))]) + self

    def __sub__(self, other: Objective) -> Objective:
        return WeightedSum([(1.0, self), (-1.0, other)])

    def __mul__(self, weight: float | Ramp) -> Objective:
        return WeightedSum([(weight, self)])

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return WeightedSum([(-1.0, self)])


class Settling(Objective):
    """An objective that moves the energy itself by means over its batch, before its loss. Abstract.

    Where a batch is divided among lanes, ``fit`` asks for the means lane by lane and moves the energy once.

    Attributes
    ----------
    in_lanes
        Whether that is so, and ``forward`` leaves the energy as it is.
    """

    in_lanes: bool = False

    @property
    @abstractmethod
    def moves(self) -> bool:
        """Whether it is set to move anything."""

    @abstractmethod
    def statistics(self, energy: Energy, batch: Batch) -> list[Tensor]:
        """Means over the rows of a batch by which `settle` moves the energy; empty if it does not."""

    @abstractmethod
    def settle(self, energy: Energy, means: Sequence[Tensor]) -> None:
        """Move the energy by means, such as `statistics` returned or averages of these over batches."""


@dataclass(frozen=True)
class Ramp:
    """A weight that goes linearly from ``start`` to ``end`` over so many training calls, and then stays.

    Parameters
    ----------
    start, end
        Weights at the first call, and from call ``steps`` on.
    steps
        Calls in between.

    Raises
    ------
    OptionError
        If a weight is not finite or ``steps`` is below 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise OptionError(f"A ramp goes between finite weights; got {self.start} and {self.end}.")
        check_steps(self.steps, "A ramp")

    def at(self, call: int) -> float:
        """Weight of a call, counted from 0."""
        return self.start + (self.end - self.start) * min(call / self.steps, 1.0)

    def __str__(self) -> str:
        return f"ramp({self.start:.4g} to {self.end:.4g} in {self.steps})"


class Counting(Objective):
    """An objective that knows how many training calls it has had; the count is in its ``state_dict``.

    A call counts when gradients are on and the module is in training mode, so that an evaluation under
    ``torch.no_grad()`` changes nothing. The count is a number of the host: to choose by it never waits for the device.
    """

    calls: int = 0

    def next_call(self) -> int:
        """Number of this call, from 0; counts it."""
        now = self.calls
        if self.training and torch.is_grad_enabled():
            self.calls = now + 1
        return now

    def get_extra_state(self) -> int:
        """The count, for ``state_dict``."""
        return self.calls

    def set_extra_state(self, state: int) -> None:
        """Take a saved count."""
        self.calls = int(state)

    def __repr__(self) -> str:
        return formula(self)


class Term(nn.Module):
    """An objective in a sum, and its weight."""

    def __init__(self, weight: float | Ramp, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"Only objectives add up to an objective; got {objective!r}.")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number or isinstance(weight, Ramp)):
            raise ArgumentTypeError(f"The weight of an objective is a number or a Ramp; got {weight!r}.")
        if number and not math.isfinite(cast(float, weight)):
            raise OptionError(f"The weight of an objective is finite; got {weight}.")
        self.weight = weight if isinstance(weight, Ramp) else float(weight)
        self.objective = objective

    def at(self, call: int) -> float:
        """Weight of a call."""
        return self.weight.at(call) if isinstance(self.weight, Ramp) else self.weight


class WeightedSum(Counting):
    r"""A weighted sum of objectives, :math:`\sum_i w_i L_i`; what ``2.0 * a + b`` makes. Sums in it are flattened.

    Every part sees the same batch and draws from the generator in turn. A negative weight is allowed, and climbs. A
    part of weight 0 is computed all the same, as a monitor. An objective may stand in a sum twice: it is then called
    twice per step, and a replay buffer in it moves twice.

    The parts' metrics keep their names where only one part has them. Otherwise the first part keeps those of the
    chains (``gap``, ``acceptance``, ...), and all others get the part's name in front, as in
    ``DenoisingScoreMatching.energy_data``; training watches both. ``<part>.loss`` is each part's own value, and
    ``<part>.weight`` the present weight where it changes.

    Parameters
    ----------
    terms
        Pairs of weight and objective; a weight is a number or a `Ramp`.

    Raises
    ------
    OptionError
        If there is no term or a weight is not finite.
    ArgumentTypeError
        If something is not an objective, or its weight not a number or a `Ramp`.
    """

    def __init__(self, terms: Iterable[tuple[float | Ramp, Objective]]) -> None:
        super().__init__()
        flat: list[Term] = []
        for weight, objective in terms:
            term = Term(weight, objective)
            inner = objective.parts if isinstance(objective, WeightedSum) else []
            # The product of two ramps is none, so such a sum stays whole, as a part.
            if inner and not (isinstance(weight, Ramp) and any(isinstance(t.weight, Ramp) for t in inner)):
                flat += [Term(_times(term.weight, t.weight), t.objective) for t in inner]
            else:
                flat.append(term)
        if not flat:
            raise OptionError("A sum of objectives has one term or more; got none.")
        self.terms = nn.ModuleList(flat)
        self.fits_scores = all(term.objective.fits_scores for term in flat)

    @property
    def parts(self) -> list[Term]:
        """The terms."""
        return [cast(Term, term) for term in self.terms]

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Sum of weight times loss."""
        call = self.next_call()
        names = _labels([term.objective for term in self.parts])
        total: Tensor | None = None
        told: list[tuple[str, dict[str, Tensor]]] = []
        own: dict[str, Tensor] = {}
        for name, term in zip(names, self.parts):
            loss, weight = term.objective(energy, batch, rng), term.at(call)
            value = loss.value if weight == 1.0 else weight * loss.value
            total = value if total is None else total + value
            told.append((name, loss.metrics))
            if len(names) > 1:
                own[f"{name}.loss"] = loss.value.detach()
            if isinstance(term.weight, Ramp):
                own[f"{name}.weight"] = loss.value.detach().new_full((), weight)
        assert total is not None
        return Loss(total, merged(told) | own)


CHAIN_METRICS = ("energy_data", "energy_samples", "gap", "acceptance", "nonfinite", "buffer_age", "moved", "saturated")
"""Metrics whose plain name stays with the first part of a sum that reports them."""


def merged(told: Sequence[tuple[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Put the metrics of several parts, with the parts' names, into one dict; see `WeightedSum`."""
    often = Counter(name for _, metrics in told for name in metrics)
    found: dict[str, Tensor] = {}
    for part, metrics in told:
        for name, value in metrics.items():
            plain = often[name] == 1 or (name in CHAIN_METRICS and name not in found)
            found[name if plain else f"{part}.{name}"] = value
    return found


def formula(objective: nn.Module) -> str:
    """Print an objective as it was built, for example ``2*ContrastiveDivergence(...) + ExactLikelihood(...)``."""
    if not isinstance(objective, WeightedSum):
        return f"{type(objective).__name__}({objective.extra_repr()})"
    text = ""
    for term in objective.parts:
        weight = 1.0 if isinstance(term.weight, Ramp) else term.weight
        sign = ("-" if weight < 0 else "") if not text else (" - " if weight < 0 else " + ")
        factor = f"{term.weight}*" if isinstance(term.weight, Ramp) else f"{abs(weight):.4g}*"
        inner = formula(term.objective)
        inner = f"({inner})" if isinstance(term.objective, WeightedSum) else inner
        text += f"{sign}{'' if factor == '1*' else factor}{inner}"
    return text


def check_steps(steps: object, what: str) -> None:
    """Refuse a number of steps that is not a whole number from 1.

    Raises
    ------
    OptionError
        With the value.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"{what} takes a whole number of steps, 1 or more; got {steps!r}.")


def _times(a: float | Ramp, b: float | Ramp) -> float | Ramp:
    if isinstance(b, Ramp):
        a, b = b, a
    b = cast(float, b)
    return Ramp(a.start * b, a.end * b, a.steps) if isinstance(a, Ramp) else a * b


def _labels(objectives: Sequence[nn.Module]) -> list[str]:
    """Name every part by its class; parts of one class are numbered."""
    names = [type(objective).__name__ for objective in objectives]
    often, seen = Counter(names), Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if often[name] == 1 else f"{name}{seen[name]}"
    return names


def context_of(energy: Energy | Score, batch: Batch, besides: Sequence[str] = ()) -> dict[str, Tensor]:
    """Pick from a batch what the energy is conditioned on; what the energy does not ask for is left out.

    Parameters
    ----------
    energy
        Names its conditions in ``energy.context``.
    batch
        Brings them.
    besides
        Conditions that the objective brings itself.

    Raises
    ------
    OptionError
        If the batch lacks one.
    """
    wanted = [name for name in energy.context if name not in besides]
    if missing := [name for name in wanted if name not in batch.context]:
        brings = ", ".join(sorted(batch.context)) or "none"
        raise OptionError(
            f"{energy!r} is conditioned on {', '.join(missing)}, which the batch lacks (it brings: {brings}). Pass "
            "Batch(x, {name: values}) with one value per row, or fix the condition with energy.given(name=value)."
        )
    return {name: batch.context[name] for name in wanted}


def check_one_per_row(value: Tensor, rows: int) -> Tensor:
    """Check that an energy gave one number per row, and return it.

    Raises
    ------
    ShapeError
        If it did not.
    """
    if tuple(value.shape) != (rows,):
        raise ShapeError(
            f"The energy of {rows} points must have shape ({rows},); it returned {tuple(value.shape)}. "
            "Sum over the event's axes, or drop a trailing axis with .squeeze(-1)."
        )
    return value


def energy_and_gradient(energy: Energy, y: Tensor, context: Context, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Energies and their gradients in the points, ``(n,)`` and ``(n, *event)``, to be differentiated further.

    Parameters
    ----------
    energy
        Called as ``energy(y, **context)``.
    y
        Points that require gradients, ``(n, *event)``.
    context
        What each row is conditioned on.
    create_graph
        Whether the gradients are to be differentiated.

    Raises
    ------
    ShapeError
        If the energy gives anything but one number per row.
    ArgumentTypeError
        If it does not depend on the points.
    """
    value = check_one_per_row(energy(y, **context), len(y))
    grad = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value.sum(), y, create_graph=create_graph, allow_unused=True)
    if grad is None:
        raise ArgumentTypeError(
            f"{energy!r} does not depend on x through differentiable operations, so that it has no score. Rounding, "
            ".item(), .detach() and torch.no_grad() inside of it cut the dependence."
        )
    return value, grad
