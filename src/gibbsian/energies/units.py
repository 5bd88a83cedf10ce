r"""Layers of units that are independent given the layer they are coupled to.

A unit of state x under a field f has the law

.. math:: p(x \mid f) \propto e^{f\, s(x) - g(x)}, \qquad A(f) = \log \sum_x e^{f\, s(x) - g(x)},

with what enters the couplings, :math:`s`, its own energy :math:`g`, and the log-partition function :math:`A` (an
integral for real states):

===========  =================  ===============  ========================  ==========================================
units        states             :math:`s(x)`     :math:`g(x)`              :math:`A(f)`
===========  =================  ===============  ========================  ==========================================
Bernoulli    0, 1               :math:`x`        0                         :math:`\log(1 + e^f)`
spin         0, 1               :math:`2x - 1`   0                         :math:`\log 2 \cosh f`
categorical  one-hot, K         :math:`x`        0                         :math:`\log \sum_k e^{f_k}`
Gaussian     reals              :math:`x / σ^2`  :math:`x^2 / (2 σ^2)`     :math:`f^2/(2σ^2) + \log\sqrt{2 \pi σ^2}`
ReLU         :math:`x \ge 0`    :math:`x`        :math:`x^2 / 2`           :math:`f^2/2 + \log(\sqrt{2\pi}\, Φ(f))`
===========  =================  ===============  ========================  ==========================================

The states of spins are bits, as in `Ising`, so that every kernel on binary states serves them; :math:`2x - 1` is what
the energy sees. The field of a Gaussian unit is its mean. A ReLU unit is a Gaussian of variance 1 that is cut off below
0: its most likely state is :math:`\max(0, f)`. `Exponential family harmoniums with an application to information
retrieval (Welling et al., 2004)
<https://papers.nips.cc/paper/2672-exponential-family-harmoniums-with-an-application-to-information-retrieval>`_;
`Learning compositional representations of interacting systems with restricted Boltzmann machines (Tubiana et al., 2019)
<https://doi.org/10.1162/neco_a_01210>`_ for ReLU units with an exact law.

States ``(n, *event)`` go in and come out; fields and all else are flat, ``(n, size)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.layered import Natural
from gibbsian.energies.tractable import shape_of
from gibbsian.errors import DomainError, OptionError, ShapeError


class Units(ABC):
    """A layer of units. Abstract; the final kinds are frozen dataclasses."""

    @property
    @abstractmethod
    def sites(self) -> torch.Size:
        """The shape in which the units stand."""

    @property
    def event_shape(self) -> torch.Size:
        """The shape of a state."""
        return self.sites

    @property
    def size(self) -> int:
        """How many numbers are in a state."""
        return self.event_shape.numel()

    @property
    @abstractmethod
    def support(self) -> Constraint:
        """Where states live."""

    @property
    def states_of_one(self) -> int | None:
        """How many states one unit has; ``None`` for reals."""
        return None

    @property
    def count(self) -> int | None:
        """How many states the layer has; ``None`` for reals."""
        return None if self.states_of_one is None else self.states_of_one ** self.sites.numel()

    def statistic(self, x: Tensor) -> Tensor:
        """What enters the couplings: ``(n, *event) -> (n, size)``."""
        return x.flatten(1)

    def own_energy(self, x: Tensor) -> Tensor:
        """Energy of each row without any field: ``(n, *event) -> (n,)``."""
        return x.new_zeros(x.shape[0])

    def natural(self, field: Tensor) -> Natural:
        """The law under a field ``(..., size)``."""
        return Natural(field)

    @abstractmethod
    def log_partition(self, field: Tensor) -> Tensor:
        """A of each unit, ``(..., size) -> (..., units)``."""

    def total_partition(self, field: Tensor) -> Tensor:
        """Sum of A over the units, ``(..., size) -> (...)``."""
        return self.log_partition(field).sum(-1)

    @abstractmethod
    def mean(self, law: Natural) -> Tensor:
        """Mean state, ``(n, *event)``."""

    @abstractmethod
    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """Turn uniform numbers ``(n, size)`` or ``(n, *event)`` into states ``(n, *event)``."""

    @abstractmethod
    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Fields ``(size,)`` under which the means are those of rows of states, mixed with the uniform law's."""

    @abstractmethod
    def check(self, x: Tensor, what: str) -> None:
        """Refuse states off the domain, with what to do about them; waits for the device.

        Raises
        ------
        ShapeError, DomainError
            With the values found.
        """

    def listed(self, index: Tensor) -> Tensor:
        """States by their number, ``(m,) -> (m, *event)``, float64; units of K states are digits in base K."""
        base = self.states_of_one
        assert base is not None, "real states cannot be listed"
        power = base ** torch.arange(self.sites.numel(), device=index.device)
        digit = (index.unsqueeze(1) // power) % base
        if self.event_shape == self.sites:
            return digit.double().view(-1, *self.event_shape)
        return torch.nn.functional.one_hot(digit, base).double().view(-1, *self.event_shape)

    def shaped(self, flat: Tensor) -> Tensor:
        """Give flat rows the shape of states."""
        return flat.reshape(-1, *self.event_shape)

    def check_shape(self, x: Tensor, what: str) -> None:
        """Refuse states of another shape."""
        if tuple(x.shape[1:]) != tuple(self.event_shape):
            raise ShapeError(f"{self} have states (n, {row(self.event_shape)}); {what} have shape {tuple(x.shape)}.")


@dataclass(frozen=True, repr=False)
class Alike(Units):
    """Units of one kind. Abstract.

    Parameters
    ----------
    shape
        How many, or the shape in which they stand.
    """

    shape: int | Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", shape_of(self.shape))

    @property
    def sites(self) -> torch.Size:
        """The shape in which the units stand."""
        return shape_of(self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({told(self.sites)}{self.settings()})"

    def settings(self) -> str:
        """What else it is made of, to print."""
        return ""


class _Bits(Alike):
    """What units whose states are bits share."""

    @property
    def support(self) -> Constraint:
        """Zeros and ones."""
        return constraints.boolean

    @property
    def states_of_one(self) -> int:
        """Two."""
        return 2

    def mean(self, law: Natural) -> Tensor:
        """Probability of a one."""
        return self.shaped(law.linear.sigmoid())

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """Bits, by comparison with the probability of a one."""
        return (self.shaped(u) < self.shaped(law.linear).sigmoid()).to(u.dtype)

    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Log-odds, in the units of the field."""
        p = (1.0 - smoothing) * x.flatten(1).mean(0) + 0.5 * smoothing
        return p.logit() / self.natural(torch.ones_like(p)).linear

    def check(self, x: Tensor, what: str) -> None:
        """Refuse anything but zeros and ones."""
        self.check_shape(x, what)
        outside = (x != 0) & (x != 1)
        if not bool(outside.any()):
            return
        rows = int(outside.flatten(1).any(1).sum())
        found = x[outside]
        if bool(((x == 1) | (x == -1)).all()):
            remedy = "These are spins of -1 and 1: pass (x + 1) / 2."
        elif bool(((x >= 0) & (x <= 1)).all()):
            remedy = (
                "Binarise them, by a threshold, (x > 0.5).to(x.dtype), or by chance, torch.bernoulli(x, "
                "generator=rng); or fit them as reals, with GaussianUnits."
            )
        else:
            remedy = "Counts and reals need other units: CategoricalUnits or GaussianUnits."
        raise DomainError(
            f"{type(self).__name__} have states 0 and 1; {rows} of {x.shape[0]} rows of {what} hold other values (for "
            f"example {float(found[0]):.4g}). {remedy}"
        )


@dataclass(frozen=True, repr=False)
class BernoulliUnits(_Bits):
    """Bits, which enter the couplings as 0 and 1.

    Parameters
    ----------
    shape
        How many, or the shape in which they stand.
    """

    def log_partition(self, field: Tensor) -> Tensor:
        """Softplus."""
        return torch.nn.functional.softplus(field)

    def total_partition(self, field: Tensor) -> Tensor:
        """Sum of softplus."""
        return total_softplus(field)


@dataclass(frozen=True, repr=False)
class SpinUnits(_Bits):
    """Bits, which enter the couplings as -1 and 1.

    Parameters
    ----------
    shape
        How many, or the shape in which they stand.
    """

    def statistic(self, x: Tensor) -> Tensor:
        """Spins."""
        return 2.0 * x.flatten(1) - 1.0

    def natural(self, field: Tensor) -> Natural:
        """Log-odds of a one."""
        return Natural(2.0 * field)

    def log_partition(self, field: Tensor) -> Tensor:
        """Logarithm of the double hyperbolic cosine."""
        return torch.nn.functional.softplus(2.0 * field) - field

    def total_partition(self, field: Tensor) -> Tensor:
        """Sum of logarithms of the double hyperbolic cosine."""
        return total_softplus(2.0 * field) - field.sum(-1)


@dataclass(frozen=True, repr=False)
class CategoricalUnits(Alike):
    """Units with one of K classes each: states ``(*shape, K)`` are one-hot.

    Parameters
    ----------
    shape
        How many, or the shape in which they stand.
    classes
        K.

    Raises
    ------
    OptionError
        If there are fewer than two classes.
    """

    classes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise OptionError(f"classes is 2 or more; got {self.classes}.")

    @property
    def support(self) -> Constraint:
        """One-hot rows."""
        return constraints.one_hot

    @property
    def states_of_one(self) -> int:
        """As many as classes."""
        return self.classes

    @property
    def event_shape(self) -> torch.Size:
        """Units and classes."""
        return torch.Size((*self.sites, self.classes))

    def settings(self) -> str:
        """Classes."""
        return f", classes={self.classes}"

    def log_partition(self, field: Tensor) -> Tensor:
        """Logarithm of the sum over classes."""
        return field.unflatten(-1, (-1, self.classes)).logsumexp(-1)

    def mean(self, law: Natural) -> Tensor:
        """Probabilities of the classes."""
        return self.shaped(law.linear).softmax(-1)

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """One-hot rows, by the largest of logits and Gumbel noise."""
        logits = self.shaped(law.linear)
        best = (logits - (-self.shaped(u).log()).log()).argmax(-1, keepdim=True)
        return (torch.arange(self.classes, device=u.device) == best).to(logits.dtype)

    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Logarithms of frequencies."""
        return ((1.0 - smoothing) * x.flatten(1).mean(0) + smoothing / self.classes).log()

    def check(self, x: Tensor, what: str) -> None:
        """Refuse rows that are not one-hot, or of another number of classes."""
        if x.shape[1:-1] == self.sites and x.shape[-1] != self.classes:
            raise ShapeError(
                f"{what} have {x.shape[-1]} categories and the units {self.classes}; pass classes={x.shape[-1]}, or "
                f"torch.nn.functional.one_hot(labels, {self.classes}).to(dtype) of the labels."
            )
        if tuple(x.shape[1:]) == tuple(self.sites):
            raise ShapeError(
                f"{self} have one-hot states (n, {row(self.event_shape)}); {what} have shape {tuple(x.shape)}. Labels "
                f"become states by torch.nn.functional.one_hot(labels, {self.classes}).to(dtype)."
            )
        self.check_shape(x, what)
        total = x.sum(-1)
        wrong = ((x != 0) & (x != 1)).any(-1) | (total != 1)
        if bool(wrong.any()):
            rows = int(wrong.flatten(1).any(1).sum())
            raise DomainError(
                f"One-hot states have a single one along the last axis; {rows} of {x.shape[0]} rows of {what} do not "
                f"(for example a site that sums to {float(total[wrong][0]):.4g}). Gaps and unknown letters of an "
                "alignment need a class of their own; probabilities become states by drawing a class."
            )


def total_softplus(a: Tensor) -> Tensor:
    r"""Sum of softplus over the last axis; without a gradient with one logarithm for four numbers.

    .. math:: \sum_j \log(1 + e^{a_j}) = \sum_j \max(a_j, 0) + \sum_g \log \prod_{j \in g} (1 + e^{-|a_j|}),

    where no product exceeds 16. The logarithm is most of a softplus.
    """
    if torch.is_grad_enabled() and a.requires_grad:
        return torch.nn.functional.softplus(a).sum(-1)
    factors, whole = 1.0 + (-a.abs()).exp(), a.shape[-1] // 4 * 4
    fours = factors[..., :whole].unflatten(-1, (4, -1)).prod(-2) if whole else factors[..., :0]
    return a.clamp(min=0.0).sum(-1) + fours.log().sum(-1) + factors[..., whole:].log().sum(-1)


def as_units(units: int | Sequence[int] | Units) -> Units:
    """Read a number or a shape as Bernoulli units."""
    return units if isinstance(units, Units) else BernoulliUnits(units)


def row(shape: torch.Size) -> str:
    """Print a shape without brackets."""
    return ", ".join(map(str, shape))


def told(shape: torch.Size) -> str:
    """Print a shape as it is given."""
    return str(shape[0]) if len(shape) == 1 else str(tuple(shape))
