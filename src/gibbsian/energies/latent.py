r"""Latent energies: :math:`E(x, z)` as an energy of x, with z summed out by enumeration or by importance sampling.

.. math:: F(x) = -\log \sum_z e^{-E(x, z)}, \qquad
          \nabla F(x) = \sum_z p(z \mid x)\, \nabla E(x, z), \qquad p(z \mid x) = e^{F(x) - E(x, z)}

(an integral for real z). **By enumeration** all of it is exact. The sum goes by chunks of states; where gradients are
wanted, each chunk is computed again in the backward pass, so that memory does not grow with the states.

**By importance sampling**, with :math:`w_k = e^{-E(x, z_k)} / q(z_k \mid x)` and :math:`E[w_k] = e^{-F(x)}`,

.. math:: \hat F(x) = -\log \frac1K \sum_k w_k, \qquad \mathbb{E}\,\hat F(x) \ge F(x), \qquad
          \mathbb{E}\,\hat F(x) - F(x) \approx \frac{\operatorname{Var} w}{2 K\, (\mathbb{E} w)^2}

by Jensen's inequality: the estimate of F is an upper bound on average and the one of :math:`\log p(x)` a lower one, by
O(1/K). `Importance weighted autoencoders (Burda, Grosse & Salakhutdinov, 2016) <https://arxiv.org/abs/1509.00519>`_.
The effective number of the weights says when not to trust it, but judges the draws at hand: draws that all miss the
posterior agree with each other. A proposal that is too narrow is not seen, and one that is too wide is.

A **joint energy** is an energy of x with z as its context: it has the algebra, ``given(z=...)`` is x given z,
`Posterior` z given x, and `JointEvent` the two as one flat point, so that all kernels run on either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gibbsian.energies.base import Energy
from gibbsian.energies.joint_points import JointEvent, Posterior
from gibbsian.energies.latents import ImportanceLatents, Latents, require_fitting
from gibbsian.energies.layers import dropout_layers
from gibbsian.energies.tractable import batch_rows, shape_of
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

CHUNK = 1 << 14
"""Pairs of a row and a latent state at which the energy is evaluated at once."""


class FreeEnergy(NamedTuple):
    """Free energies of rows, in nats, and how sure they are.

    Attributes
    ----------
    value
        ``(n,)``, float64. By importance sampling too large on average: an upper bound in expectation.
    stderr
        Standard error of each by the delta method, ``(n,)``; 0 by enumeration. Half its square estimates the bias.
    ess
        Effective number of each row's weights, ``(n,)``; by enumeration of the states that carry the posterior.
    draws
        Weights of each row; 0 by enumeration.
    """

    value: Tensor
    stderr: Tensor
    ess: Tensor
    draws: int

    @property
    def degenerate(self) -> Tensor:
        """Rows of which a few weights dominate, so that value and standard error mean little, ``(n,)``."""
        if not self.draws:
            return torch.zeros_like(self.value, dtype=torch.bool)
        return ~(self.ess >= max(10.0, 0.02 * self.draws))

    def __str__(self) -> str:
        """Mean, error, bias and effective size."""
        n, mean = len(self.value), float(self.value.mean())
        if not self.draws:
            return f"{mean:.2f} nats per row (exact, {n} rows)"
        error, bias = float(self.stderr.square().sum().sqrt()) / n, float(0.5 * self.stderr.square().mean())
        return (
            f"{mean:.2f} ± {error:.2f} nats per row, too large by about {bias:.2f} on average, ess "
            f"{float(self.ess.mean()):.1f} of {self.draws} draws ({n} rows, {int(self.degenerate.sum())} degenerate)"
        )


class LatentEnergy(Energy):
    r"""The free energy of x under a joint energy of x and a latent z.

    Parameters
    ----------
    energy
        The joint energy, ``energy(x, z=z)`` from ``(n, *event)`` and ``(n, *latent)`` to ``(n,)``: an `Energy` with
        ``z`` in its context, such as `Directed`; or any function or module with an argument of that name.
    latents
        What z is summed over: `ListedLatents` or `ImportanceLatents`.
    event_shape
        The shape of one x, where the energy does not tell it; `joint` needs it.
    chunk
        Pairs of a row and a latent state at which the energy is evaluated at once.

    Raises
    ------
    ArgumentTypeError
        If the energy takes no z, or latents are none.
    OptionError, ShapeError
        If latents do not fit the energy.
    """

    def __init__(
        self,
        energy: Energy | Callable[..., Tensor],
        latents: Latents,
        event_shape: int | Sequence[int] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        shape = None if event_shape is None else shape_of(event_shape)
        self.energy = Energy.of(energy, event_shape=shape, context=("z",))
        if "z" not in self.energy.context:
            raise ArgumentTypeError(
                f"A joint energy takes its latent as a context named z, energy(x, z=...); the context of "
                f"{self.energy!r} is {self.energy.context}."
            )
        if not isinstance(latents, Latents):
            raise ArgumentTypeError(
                f"z is summed over ListedLatents, all its states, or ImportanceLatents, draws of a proposal; got "
                f"{latents!r}."
            )
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise OptionError(f"chunk counts pairs of a row and a state, 1 or more; got {chunk!r}.")
        require_fitting(latents, self.energy)
        self.latents = latents
        self.chunk = chunk
        self.event_shape = self.energy.event_shape if shape is None else shape
        if self.energy.event_shape not in (None, self.event_shape):
            raise ShapeError(
                f"The joint energy takes x of shape {tuple(self.energy.event_shape or ())}; got event_shape={shape}."
            )
        self.support = self.energy.support
        self.context = tuple(name for name in self.energy.context if name != "z")
        # In a tuple, for a module held twice would be saved twice; made once, for graphs are kept by energy.
        self._joint: tuple[JointEvent, ...] = ()

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Free energy of each row, ``(n, *event) -> (n,)``: exact, or by the draws that are kept."""
        if self.event_shape is not None:
            batch_rows(x, self.event_shape)
        parts = []
        for first, last in self._spans(len(x)):
            # Compiled, there is one graph, which keeps what it needs.
            if torch.is_grad_enabled() and self.latents.count > last - first and not torch.compiler.is_compiling():
                masks = bool(dropout_layers(self))
                part = checkpoint(self._part, x, first, last, context, use_reentrant=False, preserve_rng_state=masks)
            else:
                part = self._part(x, first, last, context)
            parts.append(cast(Tensor, part))
        return -_log_sum(torch.stack(parts, 1))

    def log_weights(self, x: Tensor, z: Tensor, log_m: Tensor, **context: Tensor) -> Tensor:
        """Minus the energies of rows with each of their latents, plus the latents' log-weights, ``(n, m)``.

        Parameters
        ----------
        x
            Rows ``(n, *event)``.
        z
            Latents ``(m, *latent)``, the same for all rows, or ``(n, m, *latent)``.
        log_m
            ``(m,)`` or ``(n, m)``.
        context
            What else the energy asks for.
        """
        n, latent = len(x), tuple(self.latents.event_shape)
        own = z if z.ndim == len(latent) + 2 else z.unsqueeze(0).expand(n, *z.shape)
        m = own.shape[1]
        rows = {name: value.repeat_interleave(m, 0) for name, value in context.items()}
        value = self.energy(x.repeat_interleave(m, 0), z=own.reshape(n * m, *latent), **rows)
        if tuple(value.shape) != (n * m,):
            raise ShapeError(
                f"The joint energy of {n * m} pairs of x and z must have shape ({n * m},); it returned "
                f"{tuple(value.shape)}. Sum over the axes of x and z."
            )
        return log_m - value.view(n, m)

    @torch.no_grad()
    def estimate(
        self, x: Tensor, rng: Generator | None = None, draws: int | None = None, **context: Tensor
    ) -> FreeEnergy:
        """Free energies with their errors, in chunks.

        Parameters
        ----------
        x
            Rows.
        rng
            Gives every row draws of its own, by which errors of rows are independent. Left out, they come from the
            draws that are kept, as in ``forward``: all rows err together.
        draws
            How many with ``rng``; as many as are kept when left out.
        context
            What else the energy asks for.

        Warns
        -----
        RuntimeWarning
            If the weights of more than a twentieth of the rows are dominated by a few.

        Raises
        ------
        OptionError
            If draws are asked for without ``rng``, fewer than 1, or of latents that are listed.
        """
        latents = self.latents
        if draws is not None and (rng is None or draws < 1 or latents.exact):
            raise OptionError(
                f"draws={draws} of each row, 1 or more, are new ones of ImportanceLatents, and need rng; got rng={rng} "
                f"and {latents!r}."
            )
        own = isinstance(latents, ImportanceLatents) and rng is not None
        count = (draws or latents.count) if own else latents.count
        once = doubled = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        for first, last in self._spans(len(x), count):
            if own:
                noise = cast(ImportanceLatents, latents).fresh((len(x), last - first), cast(Generator, rng))
                z, log_m = cast(ImportanceLatents, latents).placed(x, noise, count)
            else:
                z, log_m = latents.points(x, first, last)
            log_w = self.log_weights(x, z, log_m, **context).double()
            once = torch.logaddexp(once, log_w.logsumexp(1))
            doubled = torch.logaddexp(doubled, (2.0 * log_w).logsumexp(1))
        ess = (2.0 * once - doubled).exp()
        if latents.exact:
            return FreeEnergy(-once, torch.zeros_like(once), ess, 0)
        stderr = ((count / ess - 1.0).clamp(min=0.0) / max(count - 1, 1)).sqrt()
        found = FreeEnergy(-once, torch.where(torch.tensor(count > 1), stderr, math.inf), ess, count)
        _warn_if_degenerate(found)
        return found

    def posterior(self, x: Tensor, **context: Tensor) -> Posterior:
        """The energy of z given x, one x per chain (or one row for all): what kernels draw z from.

        Raises
        ------
        DomainError
            If z is from a list of values, which no kernel walks: `draw_latents` is exact.
        """
        if not self.latents.walkable:
            raise DomainError("No kernel walks a list of values; draw_latents(x, rng) draws them exactly.")
        energy = self.energy.given(**context) if context else self.energy
        return Posterior(energy, x, self.latents)

    @property
    def joint(self) -> JointEvent:
        """The energy of x and z as one flat point.

        Raises
        ------
        DomainError, ShapeError
            If the two are of different kinds, or x has no stated shape.
        """
        if not self._joint:
            self._joint = (JointEvent(self.energy, self.event_shape, self.latents),)
        return self._joint[0]

    @torch.no_grad()
    def draw_latents(self, x: Tensor, rng: Generator, **context: Tensor) -> Tensor:
        """Draw z given x, one per row, ``(n, *latent)``; exactly from listed latents.

        From importance samples it is resampling among the draws that are kept: as good as their weights, which
        `estimate` tells. Chains on `posterior` have no such limit.

        Parameters
        ----------
        x
            Rows.
        rng
            The generator.
        context
            What else the energy asks for.
        """
        best = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        found = x.new_zeros((len(x), *self.latents.event_shape))
        for first, last in self._spans(len(x)):
            z, log_m = self.latents.points(x, first, last)
            log_w = self.log_weights(x, z, log_m, **context).double()
            # The largest of log-weights and Gumbel noise is a draw, and the largest of chunks that of all.
            u = torch.rand(log_w.shape, generator=rng, dtype=torch.float64, device=x.device)
            top, which = (log_w - (-u.log()).log()).max(1)
            own = z[which] if z.ndim == found.ndim else z[torch.arange(len(x), device=x.device), which]
            better = top > best
            best = torch.where(better, top, best)
            found = torch.where(better.view(-1, *[1] * (found.ndim - 1)), own.to(found.dtype), found)
        return found

    def extra_repr(self) -> str:
        """Joint energy and latents."""
        return f"{self.energy!r}, {self.latents!r}"

    def _part(self, x: Tensor, first: int, last: int, context: dict[str, Tensor]) -> Tensor:
        z, log_m = self.latents.points(x, first, last)
        return _log_sum(self.log_weights(x, z, log_m, **context))

    def _spans(self, rows: int, count: int | None = None) -> list[tuple[int, int]]:
        count = self.latents.count if count is None else count
        size = max(1, self.chunk // max(1, rows))
        return [(i, min(i + size, count)) for i in range(0, count, size)]


def _log_sum(log_w: Tensor) -> Tensor:
    """Logsumexp over the last axis, whose derivative is 0, not NaN, where every weight is 0."""
    none = (log_w == -math.inf).all(-1, keepdim=True)
    total = torch.where(none, 0.0, log_w).logsumexp(-1)
    return torch.where(none.squeeze(-1), -math.inf, total)


def _warn_if_degenerate(found: FreeEnergy) -> None:
    rows, n = int(found.degenerate.sum()), len(found.value)
    if 20 * rows > n:
        warnings.warn(
            f"The importance weights of {rows} of {n} rows are dominated by a few: ess "
            f"{float(found.ess.median()):.1f} of {found.draws} in the median. The free energies are upper bounds on "
            "average, but value and standard error do not mean much. Take more draws, or a proposal nearer to the "
            "posterior and wider than it: train a GaussianProposal on this energy's own loss.",
            RuntimeWarning,
            stacklevel=3,
        )
