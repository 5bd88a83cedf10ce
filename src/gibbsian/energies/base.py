r"""Energies and their algebra.

An energy gives one number :math:`E(x)` per row, in nats, and stands for the density :math:`p(x) = e^{-E(x)} / Z`.
Sums of energies are products of densities, multiples are temperatures, differences are negations:

=================  =======================================================  =========================
expression         density (up to a constant)                               in words
=================  =======================================================  =========================
``a + b``          :math:`p_a(x)\,p_b(x)`                                   product of experts
``beta * a``       :math:`p_a(x)^{\beta}`                                   inverse temperature
``a - w * b``      :math:`p_a(x) / p_b(x)^{w}`                              negation
``mixture(a, b)``  :math:`w_1 e^{-E_a(x)} + w_2 e^{-E_b(x)}`                mixture
``a.given(y=y)``   :math:`p_a(x \mid y)`                                    context fixed
=================  =======================================================  =========================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.domains import common_event_shape, common_support
from gibbsian.energies.layered import TwoLayers, beside, two_layers
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.typing import Scalar


class Energy(nn.Module, ABC):
    """An energy, batched over its first axis, with the algebra of densities.

    Subclasses write ``forward(x, **context)`` from ``(n, *event)`` to ``(n,)`` and may set the three attributes. Those
    on discrete states may tell their conditionals, by ``conditional_logits(x, block, **context)`` and ``blocks``, as
    block Gibbs asks for them.

    Attributes
    ----------
    event_shape
        The shape of one point, or ``None`` when the energy takes any.
    support
        Where the energy lives, in the words of `torch.distributions.constraints`.
    context
        The names of the conditions that ``forward`` asks for besides ``x``; see `given`.
    """

    event_shape: torch.Size | None = None
    support: Constraint = constraints.real
    context: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Energy of each row: ``(n, *event) -> (n,)``, in nats."""

    @staticmethod
    def of(
        fn: Callable[..., Tensor],
        event_shape: Sequence[int] | None = None,
        support: Constraint = constraints.real,
        context: Sequence[str] = (),
        with_gradient: bool = False,
    ) -> Energy:
        """Adopt a function or any module as an energy.

        Parameters
        ----------
        fn
            Batched: ``(n, *event) -> (n,)``. An `Energy` is returned as it is.
        event_shape, support, context
            What the new energy declares of itself.
        with_gradient
            ``fn`` returns a pair: energies ``(n,)`` and their gradients in x ``(n, *event)``. Sampling, composition and
            tempering then use those instead of differentiating, so that ``fn`` may come from outside of torch.

        Raises
        ------
        ArgumentTypeError
            If ``fn`` cannot be called.
        """
        if isinstance(fn, Energy):
            return fn
        if not callable(fn):
            raise ArgumentTypeError(f"An energy is a function or a module from (n, *event) to (n,); got {fn!r}.")
        return Adopted(fn, event_shape, support, tuple(context), with_gradient)

    def given(self, **context: Tensor | float | int) -> Energy:
        """Fix part of the context; the result depends on ``x`` and on what is left.

        Parameters
        ----------
        context
            By name, one value for all rows (0-d) or one per row ``(n, ...)``.

        Raises
        ------
        OptionError
            If the energy does not ask for a name.
        """
        return Given(self, context)

    def __add__(self, other: Energy | Callable[[Tensor], Tensor]) -> Energy:
        return Combination([(1.0, self), (1.0, Energy.of(other))])

    def __sub__(self, other: Energy | Callable[[Tensor], Tensor]) -> Energy:
        return Combination([(1.0, self), (-1.0, Energy.of(other))])

    def __mul__(self, weight: Scalar) -> Energy:
        if not _is_scalar(weight):
            return NotImplemented
        return Combination([(weight, self)])

    __rmul__ = __mul__

    def __radd__(self, other: object) -> Energy:
        # The built-in sum starts from 0.
        return self if isinstance(other, int) and other == 0 else Energy.of(cast(Any, other)) + self

    def __truediv__(self, temperature: Scalar) -> Energy:
        if not _is_scalar(temperature):
            return NotImplemented
        return Combination([(1.0 / temperature, self)])

    def __neg__(self) -> Energy:
        return Combination([(-1.0, self)])

    def __repr__(self) -> str:
        return formula(self)


class Adopted(Energy):
    """A function or module that became an energy by `Energy.of`."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        event_shape: Sequence[int] | None,
        support: Constraint,
        context: tuple[str, ...],
        with_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.with_gradient = with_gradient
        self.event_shape = None if event_shape is None else torch.Size(event_shape)
        self.support = support
        self.context = context

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Call the adopted function."""
        if not self.with_gradient:
            return self.fn(x, **context)
        at = x.detach()
        value, grad = self.fn(at, **context)
        # Worth nothing, with the slope that was supplied; the value keeps what it depends on besides x.
        return value + (grad.detach() * (x - at)).sum(tuple(range(1, x.ndim)))


class Combination(Energy):
    """A weighted sum of energies; nested combinations are flattened."""

    def __init__(self, terms: Iterable[tuple[Scalar, Energy]]) -> None:
        super().__init__()
        flat: list[tuple[Scalar, Energy]] = []
        for weight, energy in terms:
            if isinstance(energy, Combination):
                flat += [(_times(weight, w), e) for w, e in energy.terms]
            else:
                flat.append((weight, energy))
        self.energies = nn.ModuleList(e for _, e in flat)
        # A tensor weight is a buffer: it follows .to() and can change without recompiling. A parameter stays one.
        self._weights: list[float | str] = []
        for i, (weight, _) in enumerate(flat):
            if isinstance(weight, nn.Parameter):
                self.register_parameter(f"weight_{i}", weight)
                self._weights.append(f"weight_{i}")
            elif isinstance(weight, Tensor):
                self.register_buffer(f"weight_{i}", weight)
                self._weights.append(f"weight_{i}")
            else:
                self._weights.append(float(weight))
        self.event_shape = common_event_shape(e for _, e in flat)
        self.support = common_support(e for _, e in flat)
        self.context = tuple(dict.fromkeys(name for _, e in flat for name in e.context))

    @property
    def terms(self) -> list[tuple[Scalar, Energy]]:
        """The pairs of weight and energy."""
        weights = [cast(Scalar, getattr(self, w)) if isinstance(w, str) else w for w in self._weights]
        return list(zip(weights, cast(Iterable[Energy], self.energies)))

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Sum of weight times energy."""
        total: Tensor | None = None
        for weight, energy in self.terms:
            value = energy(x, **_context_of(energy, context))
            if not isinstance(weight, float) or weight != 1.0:
                value = weight * value
            total = value if total is None else total + value
        assert total is not None
        return total

    def conditional_logits(self, x: Tensor, block: Tensor | slice, **context: Tensor) -> Tensor:
        """Sum of weight times the terms' logits: differences of energies add up as energies do."""
        total = torch.zeros_like(x)
        for weight, energy in self.terms:
            total = total + weight * conditionals(energy)(x, block, **_context_of(energy, context))
        return total

    def two_layers(self, x: Tensor, **context: Tensor) -> TwoLayers:
        """The one term of two layers, at its weight, with the others beside it."""
        return beside([(weight, energy, _context_of(energy, context)) for weight, energy in self.terms], x)

    @property
    def blocks(self) -> Any:
        """Blocks of sites that are independent in every term; ``None`` where two terms have blocks of their own."""
        told: dict[int, Any] = {}
        for energy in cast(Iterable[Energy], self.energies):
            conditionals(energy)
            own = getattr(energy, "blocks", None)
            if own is None or len(own) != 1 or own[0] != slice(None):
                told[id(energy)] = own
        return next(iter(told.values())) if len(told) == 1 else None if told else (slice(None),)


class Mixture(Energy):
    r""":math:`-\log \sum_i w_i e^{-E_i(x)}`: see `mixture`."""

    def __init__(self, energies: Sequence[Energy], log_weights: Tensor) -> None:
        super().__init__()
        self.energies = nn.ModuleList(energies)
        self.register_buffer("log_weights", log_weights)
        self.event_shape = common_event_shape(energies)
        self.support = common_support(energies)
        self.context = tuple(dict.fromkeys(name for e in energies for name in e.context))

    log_weights: Tensor

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Negative log of the weighted sum of Boltzmann factors."""
        parts = [e(x, **_context_of(cast(Energy, e), context)) for e in self.energies]
        return -torch.logsumexp(self.log_weights - torch.stack(parts, dim=-1), dim=-1)


def keep_fixed(module: nn.Module, what: str, takes: Sequence[str], fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """Keep values of context as buffers of a module, not saved with it; return their names.

    Parameters
    ----------
    module
        Keeps them.
    what
        The energy or score whose context they are, in words.
    takes
        The names that it takes.
    fixed
        Values by name.

    Raises
    ------
    OptionError
        If it takes no context of a name.
    """
    for name, value in fixed.items():
        if name not in takes:
            known = ", ".join(takes) or "none"
            raise OptionError(f"{what} takes no context named {name!r}; it takes: {known}.")
        # Not a float32 copy of everything: labels stay integers, and a tensor is kept, not cloned.
        module.register_buffer(f"fixed_{name}", torch.as_tensor(value), persistent=False)
    return tuple(fixed)


def fixed_context(module: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """Spread the values that `keep_fixed` kept over the rows of x.

    Raises
    ------
    ShapeError
        If one has a value per row, of another number of rows.
    """
    n, found = x.shape[0], {}
    for name in names:
        value = cast(Tensor, getattr(module, f"fixed_{name}"))
        if value.ndim and value.shape[0] != n:
            raise ShapeError(
                f"The fixed {name} has {value.shape[0]} rows and x has {n}; give one value per row, or a 0-d one."
            )
        found[name] = value.expand(n) if value.ndim == 0 else value
    return found


class Given(Energy):
    """An energy with part of its context fixed: see `Energy.given`."""

    def __init__(self, energy: Energy, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.energy = energy
        self.fixed = keep_fixed(self, formula(energy), energy.context, fixed)
        self.event_shape = energy.event_shape
        self.support = energy.support
        self.context = tuple(name for name in energy.context if name not in fixed)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Call the energy with the fixed context, spread over the rows.

        Raises
        ------
        ShapeError
            If a context of one value per row has another number of rows than ``x``.
        """
        return self.energy(x, **self._filled(x, context))

    def conditional_logits(self, x: Tensor, block: Tensor | slice, **context: Tensor) -> Tensor:
        """Logits of the energy with the fixed context."""
        return conditionals(cast(Energy, self.energy))(x, block, **self._filled(x, context))

    def two_layers(self, x: Tensor, **context: Tensor) -> TwoLayers:
        """The layers of the energy with the fixed context."""
        return two_layers(cast(Energy, self.energy), x, self._filled(x, context))

    @property
    def blocks(self) -> Any:
        """Those of the energy."""
        conditionals(cast(Energy, self.energy))
        return getattr(self.energy, "blocks", None)

    def _filled(self, x: Tensor, context: dict[str, Tensor]) -> dict[str, Tensor]:
        return context | fixed_context(self, self.fixed, x)


def conditionals(energy: Energy) -> Callable[..., Tensor]:
    """Return the method by which an energy on discrete states tells the law of each site given the others.

    Raises
    ------
    ArgumentTypeError
        If it has none.
    """
    method = getattr(energy, "conditional_logits", None)
    if method is None:
        raise ArgumentTypeError(
            f"Block Gibbs needs the conditionals of every term of an energy, and {formula(energy)} has none: write its "
            "conditional_logits(x, block), or use GibbsWithGradients, DiscreteLangevin or PathAuxiliary, which need a "
            "gradient only, or SingleSiteGibbs, which needs the energy only."
        )
    return method


def tells_conditionals(energy: Energy) -> bool:
    """Whether `conditionals` of an energy, and of every term of a sum, are told."""
    if isinstance(energy, Combination):
        return all(tells_conditionals(term) for _, term in energy.terms)
    if isinstance(energy, Given):
        return tells_conditionals(cast(Energy, energy.energy))
    return hasattr(energy, "conditional_logits")


def mixture(
    *energies: Energy | Callable[[Tensor], Tensor],
    weights: Sequence[float] | Tensor | None = None,
    log_z: Sequence[float] | Tensor | None = None,
) -> Energy:
    r"""Mix densities: :math:`E(x) = -\log \sum_i w_i e^{-E_i(x) - \log Z_i}`.

    The weights apply to the *unnormalised* factors :math:`e^{-E_i}` where no log Z is given; they are mixing
    probabilities when every energy is tractable (normalised), or with each one's own log Z.

    Parameters
    ----------
    energies
        Two or more, over one event shape and domain.
    weights
        Positive; equal when left out. Not normalised.
    log_z
        One per energy; zeros when left out.

    Raises
    ------
    OptionError
        If the weights are not positive or not one per energy, or a log Z is missing or not finite.
    """
    count = len(energies)
    w = torch.full((count,), 1.0 / max(count, 1)) if weights is None else torch.as_tensor(weights)
    if count < 1 or w.shape != (count,) or not bool((w > 0).all()):
        raise OptionError(f"A mixture of {count} energies needs {count} positive weights; got {w.tolist()}.")
    if not w.is_floating_point():
        w = w.to(torch.get_default_dtype())
    masses = torch.zeros_like(w) if log_z is None else torch.as_tensor(log_z, dtype=w.dtype)
    if masses.shape != w.shape or not bool(torch.isfinite(masses).all()):
        raise OptionError(f"A mixture of {count} energies takes {count} finite log Z, or none; got {masses.tolist()}.")
    return Mixture([Energy.of(e) for e in energies], w.log() - masses)


def formula(energy: nn.Module) -> str:
    """Print an energy as the formula that built it, for example ``0.5*MLP(2) + Gaussian(2)``."""
    if isinstance(energy, Combination):
        text = ""
        for weight, term in energy.terms:
            value = float(weight.detach()) if isinstance(weight, Tensor) else weight
            sign = ("-" if value < 0 else "") if not text else (" - " if value < 0 else " + ")
            factor = "" if abs(value) == 1.0 else f"{abs(value):.4g}*"
            text += f"{sign}{factor}{formula(term)}"
        return text
    if isinstance(energy, Mixture):
        weights = ", ".join(f"{w:.4g}" for w in energy.log_weights.double().exp().tolist())
        return f"mixture({', '.join(map(formula, energy.energies))}, weights=[{weights}])"
    if isinstance(energy, Given):
        fixed = [(name, getattr(energy, f"fixed_{name}")) for name in energy.fixed]
        return f"{_bracketed(energy.energy)}.given({', '.join(f'{k}={_brief(v)}' for k, v in fixed)})"
    if isinstance(energy, Adopted):
        return getattr(energy.fn, "__name__", type(energy.fn).__name__)
    return f"{type(energy).__name__}({energy.extra_repr()})"


def _bracketed(energy: Energy) -> str:
    return f"({formula(energy)})" if isinstance(energy, Combination) else formula(energy)


def _brief(value: Tensor) -> str:
    return f"{value.item():.4g}" if value.ndim == 0 else f"<{tuple(value.shape)}>"


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


def _context_of(energy: Energy, context: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: context[name] for name in energy.context if name in context}


def repeated(context: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """Give blocks of rows, one after the other, the context of the first."""
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in context.items()}


def _times(a: Scalar, b: Scalar) -> Scalar:
    # One times a tensor is the tensor itself: a weight that its owner changes, or learns, stays the same object.
    if isinstance(b, Tensor) and not isinstance(a, Tensor) and a == 1.0:
        return b
    return float(a) * float(b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else a * b


def event_size(shape: Sequence[int]) -> int:
    """Count the numbers in one point."""
    return math.prod(shape)
