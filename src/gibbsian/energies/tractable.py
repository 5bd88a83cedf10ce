r"""Normalised energies: :math:`E(x) = -\log q(x)` exactly, with exact draws.

They are where annealing starts, what replay buffers restart from, and what keeps a neural energy normalisable:
``net + Gaussian(dim=2, scale=3.0)`` has a finite Z whenever the network is bounded below.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from gibbsian.energies.base import Energy
from gibbsian.energies.layered import Natural
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError


class Tractable(Energy):
    """An energy that is exactly -log q(x) and can be drawn from."""

    event_shape: torch.Size  # pyright: ignore[reportIncompatibleVariableOverride]
    log_z: float = 0.0

    @abstractmethod
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` independent points, ``(n, *event)``, on the energy's device.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the energy's device.
        """

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each row, in nats: ``(n, *event) -> (n,)``."""
        return -self(x)


def shape_of(dim: int | Sequence[int]) -> torch.Size:
    """Read an event shape given as a size or as a shape.

    Raises
    ------
    OptionError
        If a size is not a positive integer.
    """
    shape = (dim,) if isinstance(dim, int) else tuple(dim)
    if any(not isinstance(s, int) or s < 1 for s in shape):
        raise OptionError(f"An event shape has positive whole sizes; got {dim!r}.")
    return torch.Size(shape)


def batch_rows(x: Tensor, event_shape: torch.Size) -> Tensor:
    """Check ``(n, *event)`` and return it.

    Raises
    ------
    ShapeError
        If the trailing axes are not the event's.
    """
    if tuple(x.shape[1:]) != tuple(event_shape) or x.ndim != len(event_shape) + 1:
        raise ShapeError(f"Expected points of shape (n, {', '.join(map(str, event_shape))}); got {tuple(x.shape)}.")
    return x


class Gaussian(Tractable):
    """The normal density with a scalar or diagonal scale, or a full covariance.

    Parameters
    ----------
    dim
        Size or shape of one point. May be left out when ``loc``, ``scale`` or ``covariance`` tells it.
    loc
        The mean: a number, or a tensor of the event's shape.
    scale
        The standard deviation: a number, or a tensor of the event's shape (diagonal).
    covariance
        A ``(d, d)`` matrix instead of ``scale``, for points of shape ``(d,)``.

    Raises
    ------
    OptionError
        If no argument tells the shape, both scales are given, or a scale is not positive.
    ShapeError
        If ``loc`` or ``scale`` does not fit the event's shape.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int | Sequence[int] | None = None,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        covariance: Tensor | None = None,
    ) -> None:
        super().__init__()
        loc_t, scale_t = torch.as_tensor(loc), torch.as_tensor(scale)
        if covariance is not None:
            _check_covariance(covariance, dim, scale)
        if dim is None:
            told = covariance[0] if covariance is not None else loc_t if loc_t.ndim else scale_t
            if told.ndim == 0:
                raise OptionError("Say the shape of a Gaussian: dim=2, dim=(1, 28, 28), or a tensor for loc or scale.")
            dim = tuple(told.shape)
        self.event_shape = shape_of(dim)
        dtype = next((t.dtype for t in (loc_t, scale_t, covariance) if t is not None and t.ndim), None)
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.get_default_dtype()
        if not bool(loc_t.isfinite().all()):
            raise OptionError(f"A Gaussian's mean is finite; got {loc}.")
        self.register_buffer("loc", _spread("loc", loc_t.to(dtype), self.event_shape))
        self.full = covariance is not None
        if covariance is None:
            if not bool(((scale_t > 0) & (scale_t < torch.inf)).all()):
                raise OptionError(f"A Gaussian's scale is a positive finite standard deviation; got {scale}.")
            self.register_buffer("scale", _spread("scale", scale_t.to(dtype), self.event_shape))
            log_det = self.scale.log().sum()
        else:
            factor, info = torch.linalg.cholesky_ex(covariance.to(dtype))
            if int(info):
                raise OptionError(f"A covariance is positive definite; this {tuple(covariance.shape)} matrix is not.")
            self.register_buffer("scale", factor)
            log_det = factor.diagonal().log().sum()
        constant = 0.5 * self.event_shape.numel() * math.log(2 * math.pi) + log_det
        self.register_buffer("log_normalizer", constant)

    log_normalizer: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Half the squared Mahalanobis distance plus the log-normaliser."""
        residual = batch_rows(x, self.event_shape) - self.loc
        if self.full:
            white = torch.linalg.solve_triangular(self.scale, residual.T, upper=False).T
        else:
            white = (residual / self.scale).flatten(1)
        return 0.5 * white.square().sum(1) + self.log_normalizer

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        z = torch.randn((n, *self.event_shape), generator=rng, device=self.loc.device, dtype=self.loc.dtype)
        return self.loc + (z @ self.scale.T if self.full else z * self.scale)

    @property
    def natural(self) -> Natural | None:
        """The law of each number; ``None`` with a covariance, under which they are not independent."""
        if self.full:
            return None
        precision = self.scale.flatten().square().reciprocal()
        return Natural(self.loc.flatten() * precision, precision)

    def extra_repr(self) -> str:
        """Shape and, when it is one number, scale."""
        shape = self.event_shape[0] if len(self.event_shape) == 1 else tuple(self.event_shape)
        spread = self.scale.flatten()
        told = "" if self.full or not bool((spread == spread[0]).all()) else f", scale={float(spread[0]):.4g}"
        return f"{shape}{told}"


def _check_covariance(covariance: Tensor, dim: int | Sequence[int] | None, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor) or scale != 1.0:
        raise OptionError(f"Give a Gaussian one of scale and covariance; got scale={scale} besides a covariance.")
    d = covariance.shape[-1] if covariance.ndim else 0
    told = (d,) if dim is None else tuple(shape_of(dim))
    if tuple(covariance.shape) != (d, d) or told != (d,):
        raise OptionError(
            f"A covariance is a (d, d) matrix for points of shape (d,); got shape {tuple(covariance.shape)} for points "
            f"of shape {told}."
        )
    gap = float((covariance - covariance.T).abs().max())
    if not gap <= 1e-4 * float(covariance.abs().max()):
        raise OptionError(f"A covariance is symmetric; this one differs from its transpose by up to {gap:.3g}.")


def _spread(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    try:
        return value.expand(shape).clone()
    except RuntimeError:
        raise ShapeError(f"{name} of shape {tuple(value.shape)} does not fit points of shape {tuple(shape)}.") from None


class Uniform(Tractable):
    """The uniform density on a box; infinite energy outside.

    Parameters
    ----------
    dim
        Size or shape of one point; may be left out when ``low`` or ``high`` is a tensor.
    low, high
        The corners: numbers, or tensors of the event's shape.

    Raises
    ------
    OptionError
        If ``low`` is not below ``high`` everywhere, or no argument tells the shape.
    ShapeError
        If ``low`` or ``high`` does not fit the event's shape.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, dim: int | Sequence[int] | None = None, low: float | Tensor = 0.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__()
        low_t, high_t = torch.as_tensor(low), torch.as_tensor(high)
        dtype = next((t.dtype for t in (low_t, high_t) if t.ndim and t.is_floating_point()), torch.get_default_dtype())
        low_t, high_t = low_t.to(dtype), high_t.to(dtype)
        if dim is None:
            if max(low_t.ndim, high_t.ndim) == 0:
                raise OptionError("Say the shape of a Uniform: dim=2, or a tensor for low or high.")
            dim = tuple(torch.broadcast_shapes(low_t.shape, high_t.shape))
        self.event_shape = shape_of(dim)
        self.register_buffer("low", _spread("low", low_t, self.event_shape))
        self.register_buffer("high", _spread("high", high_t, self.event_shape))
        if not bool((self.low < self.high).all() & (self.high - self.low).isfinite().all()):
            raise OptionError(f"A box needs finite low < high in every coordinate; got low={low}, high={high}.")
        self.register_buffer("log_volume", (self.high - self.low).log().sum())

    log_volume: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Log-volume inside, infinity outside."""
        inside = ((batch_rows(x, self.event_shape) >= self.low) & (x <= self.high)).flatten(1).all(1)
        # The product with zero keeps the (vanishing) gradient defined for kernels that ask for one.
        return torch.where(inside, self.log_volume, torch.inf) + 0.0 * x.flatten(1).sum(1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        u = torch.rand((n, *self.event_shape), generator=rng, device=self.low.device, dtype=self.low.dtype)
        return self.low + (self.high - self.low) * u

    def extra_repr(self) -> str:
        """Shape and corners."""
        corners = f"{float(self.low.min()):.4g}, {float(self.high.max()):.4g}"
        return f"{tuple(self.event_shape)}, {corners}"


class Bernoulli(Tractable):
    """Independent bits, 0.0 or 1.0.

    Parameters
    ----------
    logits
        Log-odds of a one, of the event's shape.
    probs
        Probabilities of a one, instead of ``logits``.

    Raises
    ------
    OptionError
        If not exactly one of the two is given, or a probability is not strictly between 0 and 1.
    """

    support = constraints.boolean
    blocks = (slice(None),)
    logits: Tensor

    def __init__(self, logits: Tensor | None = None, probs: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("logits", _logits(logits, probs, torch.logit))
        self.event_shape = self.logits.shape

    def forward(self, x: Tensor) -> Tensor:
        """Binary cross-entropy of each row, summed over its bits."""
        x = batch_rows(x, self.event_shape)
        return (torch.nn.functional.softplus(self.logits) - self.logits * x).flatten(1).sum(1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        p = self.logits.sigmoid().expand(n, *self.event_shape)
        return torch.bernoulli(p, generator=rng)

    @property
    def natural(self) -> Natural:
        """The law of each number."""
        return Natural(self.logits.flatten())

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """The logits, whatever the other sites are, ``(n, *event)``."""
        return self.logits.expand_as(x)

    def extra_repr(self) -> str:
        """Shape."""
        return f"{tuple(self.event_shape)}"


class Categorical(Tractable):
    """Independent one-hot categories: points of shape ``(*sites, K)``.

    Parameters
    ----------
    logits
        Unnormalised log-probabilities, ``(*sites, K)``.
    probs
        Probabilities instead, summing to one over the last axis.

    Raises
    ------
    OptionError
        If not exactly one of the two is given, or the probabilities are not positive.
    """

    support = constraints.one_hot
    blocks = (slice(None),)
    logits: Tensor

    def __init__(self, logits: Tensor | None = None, probs: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("logits", _logits(logits, probs, torch.log).log_softmax(-1))
        self.event_shape = self.logits.shape

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-probability of the chosen categories."""
        return -(batch_rows(x, self.event_shape) * self.logits).flatten(1).sum(1)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` one-hot points."""
        k = self.event_shape[-1]
        chosen = torch.multinomial(self.logits.exp().reshape(-1, k), n, replacement=True, generator=rng)
        hot = torch.nn.functional.one_hot(chosen.T, k).to(self.logits.dtype)
        return hot.reshape(n, *self.event_shape)

    @property
    def natural(self) -> Natural:
        """The law of each number."""
        return Natural(self.logits.flatten())

    def conditional_logits(self, x: Tensor, block: Tensor | slice) -> Tensor:
        """The logits, whatever the other sites are, ``(n, *event)``."""
        return self.logits.expand_as(x)

    def extra_repr(self) -> str:
        """Shape."""
        return f"{tuple(self.event_shape)}"


def _logits(logits: Tensor | None, probs: Tensor | None, to_logits) -> Tensor:  # noqa: ANN001
    if (logits is None) == (probs is None):
        raise OptionError("Give exactly one of logits and probs.")
    given = probs if logits is None else logits
    if not isinstance(given, Tensor):
        raise ArgumentTypeError(
            f"Logits, or probabilities, are tensors of the event's shape; got {given!r}. For n bits: torch.zeros(n)."
        )
    if logits is not None:
        return logits.clone()
    assert probs is not None
    if not bool(((probs > 0) & (probs < 1)).all()):
        raise OptionError(
            f"Probabilities lie strictly between 0 and 1; got a range of {float(probs.min()):.4g} to "
            f"{float(probs.max()):.4g}. A certain outcome has no finite energy: smooth the frequencies first."
        )
    return to_logits(probs)


def require_tractable(energy: Energy, place: str) -> Tractable:
    """Return a tractable energy, or say which place needs one.

    Raises
    ------
    ArgumentTypeError
        If the energy cannot be drawn from exactly.
    """
    if not isinstance(energy, Tractable):
        raise ArgumentTypeError(
            f"{place} must be a tractable energy (one with exact draws, such as Gaussian, Uniform, Bernoulli); "
            f"got {energy!r}."
        )
    return energy


def require_support(x: Tensor, energy: Energy, what: str) -> None:
    """Check that points lie where the energy lives.

    Raises
    ------
    DomainError
        With the number of points outside and the domain.
    """
    if (check := getattr(energy, "check_states", None)) is not None:
        check(x, what)
    inside = energy.support.check(x)
    if not bool(inside.all()):
        outside = int((~inside.reshape(x.shape[0], -1).all(1)).sum())
        bits = energy.support is constraints.boolean
        remedy = " Grey values become bits by load(..., binarise=0.5), or x.gt(threshold).float()." if bits else ""
        raise DomainError(
            f"{outside} of {x.shape[0]} rows of {what} lie outside the energy's domain, {energy.support}.{remedy}"
        )
