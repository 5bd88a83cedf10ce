r"""Flows trained on an energy without data, and what they are worth as samplers.

A trained flow q has exact draws and an exact density, so that its weights :math:`w = e^{-E(x)} / q(x)` have the mean Z.
Their effective size judges q where q draws. A flow that has collapsed to some of the modes draws nowhere else, and its
weights look even there; what it lacks is seen from outside: points annealed to p from the flow *as it was before
training* are weighed, and `FlowSampler.missed` is the share of their weight where

.. math:: \log \frac{e^{-E(x)}}{q(x)} - \log \hat Z_q > 5 ,

that is, where q has less than one in 150 of what it should.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.flows import Flow
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.learned.base import LearnedSampler, target_over_reals, warn_of_nonfinite
from gibbsian.partition.base import effective_size
from gibbsian.partition.smc import smc
from gibbsian.sampling import reporter

LACKING = 5.0
"""Nats by which a flow's density is below the energy's where mass counts as missed."""

COLLAPSED = 0.05
"""Share of the mass that a flow may miss before `fit_flow` warns."""


class FlowTraining(Protocol):
    """A way of training a flow: a frozen dataclass of its settings, `FAB` or `ReverseKL`."""

    @property
    def length(self) -> int:
        """Rounds or steps."""
        ...

    def train(
        self, energy: Energy, flow: Flow, rng: Generator, report: Callable[[int], object], every: int
    ) -> tuple[list[dict[str, float]], int, int]:
        """Train a flow in place."""
        ...


@dataclass(frozen=True)
class FlowSampler(LearnedSampler):
    """A flow that was trained on an energy.

    ``sampler.flow`` is a tractable energy like any other: the base of `gibbsian.ais`, the proposal of an independent
    Metropolis-Hastings step, where chains start.

    Attributes
    ----------
    flow
        The trained flow.
    missed
        Share of the mass, as annealing from the untrained flow found it, where the trained one has almost none; NaN
        where that annealing told nothing.
    energy, history, nonfinite
        As for every `LearnedSampler`.
    """

    flow: Flow
    energy: Energy
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    nonfinite: int = 0
    missed: float = math.nan

    @torch.no_grad()
    def propose(self, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` points and their log-weights."""
        x = self.flow.sample(n, rng)
        return x, self.flow(x).double() - self.energy(x).double()


def fit_flow(
    energy: Energy | Callable[[Tensor], Tensor],
    flow: Flow,
    method: FlowTraining,
    *,
    rng: Generator,
    progress: bool | Callable[[int], object] = False,
    record_every: int = 20,
    probes: int = 256,
) -> FlowSampler:
    """Train a flow to draw from an energy, without data.

    Parameters
    ----------
    energy
        Batched: ``(n, *event) -> (n,)``, over the reals.
    flow
        Trained in place. As it is at the start it should be at least as wide as the energy's density: set its ``loc``
        and ``scale`` by `Flow.calibrate`.
    method
        `FAB`, or `ReverseKL` for energies with one mode.
    rng
        The generator, on the flow's device.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of rounds just made.
    record_every
        Rounds or steps between records of the history, each of which costs a batch of energies.
    probes
        Points annealed from the untrained flow that tell, at the end, what the trained one misses; 0 for none.

    Returns
    -------
    FlowSampler
        With log Z, draws, weights and the training's history.

    Raises
    ------
    ArgumentTypeError, OptionError, DomainError, ShapeError
        If an argument does not fit; the message says what does.
    DivergenceError
        If the energy is finite nowhere that the flow draws.

    Warns
    -----
    RuntimeWarning
        If the flow has collapsed, or points were left out because their energy was not finite.
    """
    if not isinstance(flow, Flow):
        kind = "is tractable, but nothing in it learns" if isinstance(flow, Tractable) else "has no tractable density"
        raise ArgumentTypeError(f"fit_flow trains a Flow, as spline_flow(dim) builds one; {flow!r} {kind}.")
    if isinstance(method, type) or not hasattr(method, "train"):
        raise ArgumentTypeError(f"The method is FAB(...) or ReverseKL(...), with its settings; got {method!r}.")
    if record_every < 1 or probes < 0 or probes % 2:
        raise OptionError(f"record_every is 1 or more, probes an even number from 0; got {record_every} and {probes}.")
    target = target_over_reals(energy, flow, "flow", rng)
    untrained = copy.deepcopy(flow)
    report, close = reporter(progress, method.length, "training the flow")
    try:
        history, bad, total = method.train(target, flow, rng, report, record_every)
    finally:
        close()
    warn_of_nonfinite(bad, total)
    missed = missed_mass(target, flow, untrained, probes, rng) if probes else math.nan
    if missed > COLLAPSED:
        warnings.warn(
            f"The flow has collapsed: {missed:.0%} of the mass that annealing from the untrained flow found lies where "
            f"the trained one has less than one in {math.exp(LACKING):.0f} of what it should. Its draws and log Z "
            "leave that out. Train by FAB, with more temperatures, or start from a wider flow.",
            RuntimeWarning,
            stacklevel=2,
        )
    return FlowSampler(flow, target, history, bad, missed)


@torch.no_grad()
def missed_mass(energy: Energy, flow: Flow, start: Tractable, probes: int, rng: Generator) -> float:
    """Share of an energy's mass where a flow has almost none, judged by particles carried there from a wide start.

    Parameters
    ----------
    energy, flow
        The energy and the flow to judge.
    start
        Where the particles come from: anything tractable that is wide enough.
    probes
        How many particles.
    rng
        The generator.

    Returns
    -------
    float
        0 to 1; NaN when fewer than ten particles carry the weight, which then tell nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Populations that disagree are no news of the flow.
        try:
            found = smc(energy, start, rng=rng, chains=probes, populations=2, moves=2, spare=0.8)
        except DivergenceError:
            return math.nan
    if float(effective_size(found.log_weights)) < 10.0:
        return math.nan
    x = flow.sample(probes, rng)
    here = flow(x).double() - energy(x).double()
    here = here[torch.isfinite(here)]
    if not here.numel():
        return 1.0
    lacking = flow(found.x).double() - energy(found.x).double() - (torch.logsumexp(here, 0) - math.log(probes))
    return float((found.log_weights.softmax(0) * (lacking > LACKING)).sum())
