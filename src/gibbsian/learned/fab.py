r"""Flow annealed importance sampling bootstrap: a flow fitted where annealing shows it what it lacks.

The divergence that is lowered,

.. math:: D_2(p \| q) = \log \int \frac{p(x)^2}{q(x)}\, dx, \qquad
          \nabla_\theta D_2 = - E_{g}\bigl[\nabla_\theta \log q_\theta(x)\bigr], \quad g \propto p^2 / q_\theta,

is that of the variance of the importance weights p / q, and is infinite where q leaves out mass of p. Its gradient is
an average over g, the density with which importance sampling of :math:`\int p^2 / q` has least variance. It is reached
by annealing from q itself, along

.. math:: E_\beta = (1 - \beta) E_q + \beta (2 E - E_q) = (1 - 2 \beta) E_q + 2 \beta E ,

which passes p at :math:`\beta = 1/2`. What annealing found is kept in a `PrioritisedBuffer` and used many times, as
energies are dear and gradients of the flow are not.

`Flow annealed importance sampling bootstrap (Midgley et al., 2023) <https://arxiv.org/abs/2208.01893>`_.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Combination, Energy
from gibbsian.energies.flows import Flow
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.kernels.base import Kernel, has_step_size
from gibbsian.kernels.hmc import HMC
from gibbsian.learned.base import Optimiser, record, require_counts, require_positive
from gibbsian.learned.prioritised import Drawn, PrioritisedBuffer
from gibbsian.partition.annealed import Carried, carry, settle
from gibbsian.partition.paths import Path
from gibbsian.partition.schedule import Schedule


@dataclass(frozen=True)
class FAB:
    """How `fit_flow` trains by annealed importance sampling bootstrap.

    A round anneals ``batch`` chains, which costs about ``(temperatures - 1) * (leapfrog + 1) + 2`` energies for each of
    them, and then makes ``updates`` steps of the flow without any.

    Parameters
    ----------
    rounds
        How often chains are annealed.
    batch
        Chains of a round, and points of an update.
    updates
        Optimiser steps of a round.
    temperatures
        Increments of beta from q to p^2 / q, 2 or more.
    kernel
        How chains move; its step size, where it has one, is the first guess and follows the acceptance.
    buffer
        Rounds whose chains are kept.
    warm
        Rounds before the first update.
    correction
        The most that one point may count, as its density falls behind the weight it has; ``None`` for no limit, which
        is unbiased and noisier.
    learning_rate
        The highest of Adam's rates, which rise and fall.
    clip_norm
        Gradients with a larger norm are scaled down to it.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    rounds: int = 500
    batch: int = 128
    updates: int = 8
    temperatures: int = 3
    kernel: Kernel = field(default_factory=lambda: HMC(0.1, leapfrog=5))
    buffer: int = 100
    warm: int = 10
    correction: float | None = 10.0
    learning_rate: float = 1e-3
    clip_norm: float = 10.0

    def __post_init__(self) -> None:
        require_counts(self, ("rounds", "updates", "buffer"))
        require_counts(self, ("batch", "temperatures"), 2)
        require_counts(self, ("warm",), 0)
        require_positive(self, ("learning_rate", "clip_norm"))
        if self.correction is not None:
            require_positive(self, ("correction",))
        if self.warm >= self.rounds:
            raise OptionError(
                f"warm={self.warm} of rounds={self.rounds} rounds come before the first update: none is left."
            )

    @property
    def length(self) -> int:
        """Rounds, for progress."""
        return self.rounds

    def train(
        self, energy: Energy, flow: Flow, rng: Generator, report: Callable[[int], object], every: int
    ) -> tuple[list[dict[str, float]], int, int]:
        """Train a flow in place; `fit_flow` checks the arguments and calls this.

        Returns
        -------
        tuple
            Records, the points that were not finite, and how many points there were.
        """
        settle(energy, flow, self.kernel, None)
        like = next(flow.parameters())
        buffer = PrioritisedBuffer(flow.event_shape, self.buffer * self.batch, like.dtype).to(like.device)
        optimiser = Optimiser(
            flow.parameters(), self.learning_rate, (self.rounds - self.warm) * self.updates, self.clip_norm
        )
        path, bad = toward_least_variance(flow, energy), torch.zeros((), dtype=torch.int64, device=like.device)
        log_h = initial_log_step(self.kernel, like)
        history: list[dict[str, float]] = []
        for i in range(self.rounds):
            start = flow.sample(self.batch, rng)
            log_w = None
            if i % every == 0 or i == self.rounds - 1:
                log_w = -energy(start).detach() - flow.log_prob(start).detach()
            found = self.anneal(path, start, log_h, rng)
            if log_h is not None:
                # Fast at first, from a guess that may be orders of magnitude off.
                log_h = log_h + (0.1 + 2.0 / (1.0 + 0.2 * i)) * (found.acceptance.mean() - self.aim)
            with torch.no_grad():
                bad += buffer.add(found.x, found.log_weights, flow.log_prob(found.x))
            loss = self.update(flow, buffer, optimiser, rng) if i >= self.warm else torch.full((), math.nan)
            if log_w is not None:
                _require_points(buffer, i + 1)
                annealed = record(i, found.log_weights)["ess"]
                accepted = found.acceptance.mean()
                history.append(record(i, log_w, annealed_ess=annealed, acceptance=accepted, loss=loss))
            report(1)
        return history, int(bad), self.rounds * self.batch

    @property
    def aim(self) -> float:
        """The acceptance that the step size follows."""
        return float(getattr(self.kernel, "target_acceptance", None) or 1.0)

    def anneal(self, path: Path, start: Tensor, log_h: Tensor | None, rng: Generator) -> Carried:
        """Carry draws of the flow to p^2 / q."""
        betas = torch.linspace(0.0, 1.0, self.temperatures + 1)
        sizes = None if log_h is None else log_h.exp().expand(self.temperatures - 1)
        return carry(path, Schedule(betas, sizes), self.kernel, start, rng=rng)

    def update(self, flow: Flow, buffer: PrioritisedBuffer, optimiser: Optimiser, rng: Generator) -> Tensor:
        """Make a round's steps of the optimiser; return the last loss, 0-d."""
        loss = torch.zeros(())
        for _ in range(self.updates):
            drawn = buffer.draw(self.batch, rng)
            log_q = flow.log_prob(drawn.x)
            loss = alpha_two_loss(log_q, drawn, self.correction)
            optimiser.step(loss)
            buffer.update(drawn, log_q)
        return loss.detach()


def toward_least_variance(flow: Flow, energy: Energy) -> Path:
    """Build the path from q to p^2 / q, which passes p at beta = 1/2.

    Parameters
    ----------
    flow
        q.
    energy
        p, up to its constant.
    """

    def path(beta: Tensor) -> Energy:
        return Combination([(1.0 - 2.0 * beta, flow), (2.0 * beta, energy)])

    return path


def alpha_two_loss(log_q: Tensor, drawn: Drawn, limit: float | None = None) -> Tensor:
    r"""A loss whose gradient is that of :math:`\int p^2 / q` up to a positive constant: 0-d.

    .. math:: -\frac1n \sum_i c_i \log q_\theta(x_i), \qquad c_i = q_{old}(x_i) / q_\theta(x_i) \text{ held fixed},

    with x drawn from the buffer in proportion to their weights towards :math:`p^2 / q_{old}`.

    Parameters
    ----------
    log_q
        Log-density of the drawn points, ``(n,)``, with its graph. Points where it is not finite are left out.
    drawn
        What `PrioritisedBuffer.draw` returned.
    limit
        The most that one point counts.
    """
    c = drawn.corrections(log_q.detach())
    c = (c if limit is None else c.clamp(max=limit)).to(log_q.dtype)
    sound = torch.isfinite(log_q.detach())
    return -torch.where(sound, c * log_q, 0.0).sum() / log_q.numel()


def _require_points(buffer: PrioritisedBuffer, rounds: int) -> None:
    if not bool(torch.isfinite(buffer.log_weights).any()):
        raise DivergenceError(
            f"After {rounds} rounds no chain has reached a point with a finite energy. Start from a flow that covers "
            "the energy's domain."
        )


def initial_log_step(kernel: Kernel, like: Tensor) -> Tensor | None:
    """Log of a kernel's step size, 0-d in float64; ``None`` where the acceptance guides none."""
    if not has_step_size(kernel):
        return None
    size = torch.as_tensor(getattr(kernel, "step_size"), dtype=torch.float64, device=like.device)  # noqa: B009
    return size.mean().log()
