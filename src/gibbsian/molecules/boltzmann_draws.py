"""Boltzmann sampling with a learned proposal: from frames to a proposal, and from its draws to weighted averages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.base import Energy
from gibbsian.energies.periodic import TURN, fit_von_mises_mixture
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import OptionError, ShapeError
from gibbsian.molecules.internal import InternalCoordinates
from gibbsian.molecules.physical import MolecularEnergy
from gibbsian.molecules.proposal_training import ProposalFit, ProposalTraining, fit_proposal
from gibbsian.molecules.reweighting import weighted_average
from gibbsian.molecules.thermal_frames import thermal_frames
from gibbsian.partition.base import LogZ, from_log_weights, warn_if_degenerate

CHUNK = 4096
"""Draws made at once."""

REMEDY = "Learn the proposal from more frames, or for more steps; or run chains with Jumps, which need less of it."
"""What to try when a few weights dominate."""


@dataclass(frozen=True)
class LearnedProposal:
    """A proposal, and what learning it took.

    Attributes
    ----------
    fit
        The proposal and its likelihoods.
    evaluations
        Of the energy, with its gradient, to set bonds free; those of the simulation come on top.
    seconds
        For all of it.
    """

    fit: ProposalFit
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of a proposal with weights towards the energy's law.

    Attributes
    ----------
    z
        The draws, ``(n, 3 * atoms - 6)``.
    energy
        Energies there in nats, ``(n,)``.
    log_weights
        Minus the energy plus the proposal's, ``(n,)``; minus infinity where the energy is infinite.
    log_z
        Of the energy, with the effective number of the weights.
    """

    z: Tensor
    energy: Tensor
    log_weights: Tensor
    log_z: LogZ

    @property
    def ess(self) -> float:
        """Effective number of the weights over their number."""
        return float(self.log_z.ess) / len(self.z)

    @property
    def weights(self) -> Tensor:
        """Normalised weights, ``(n,)``."""
        return self.log_weights.softmax(0)

    def average(self, values: Tensor) -> Estimate:
        """Average under the energy's law of values ``(n,)``, such as 1 in a basin and 0 elsewhere."""
        return weighted_average(values.double(), self.weights)


def learn_proposal(
    energy: MolecularEnergy,
    internal: InternalCoordinates,
    x: Tensor,
    torsions: Sequence[Sequence[int]],
    settings: ProposalTraining | None = None,
    *,
    rng: Generator,
    weights: Tensor | None = None,
    trajectories: int = 7,
    leapfrog: int = 8,
    progress: Callable[[str], object] | None = None,
) -> LearnedProposal:
    """Learn a proposal for a molecule from a simulation's frames, biased or not.

    Bonds that the simulation held are set free by short trajectories, whose ends but the first are all learned from.

    Parameters
    ----------
    energy
        Without constraints.
    internal
        From `internal_coordinates`.
    x
        Frames, ``(n, atoms, 3)`` in nanometres.
    torsions
        Four atoms of each torsion along which the simulation was biased, or that its basins differ in.
    settings
        Of the training.
    rng
        Of everything random.
    weights
        Of the frames towards the Boltzmann law; equal when left out.
    trajectories, leapfrog
        As in `thermal_frames`.
    progress
        Told what is being done.

    Raises
    ------
    ShapeError
        If there are not as many weights as frames.
    DataError, OptionError, MissingPackageError
        As `fit_proposal` and `thermal_frames` do.
    """
    began, settings, say = time.perf_counter(), settings or ProposalTraining(), progress or (lambda _: None)
    if weights is not None and tuple(weights.shape) != (len(x),):
        raise ShapeError(f"{len(x)} frames take as many weights; got {tuple(weights.shape)}.")
    at = [internal.torsion(four) for four in torsions]
    angles, w = TURN.wrap(internal.of(x.double())[:, at]), None if weights is None else weights.double()
    marginal = fit_von_mises_mixture(angles, settings.components, rng=rng, weights=w, uniform=settings.uniform)
    say("setting bonds free")
    keep = max(1, trajectories - 1)
    z = thermal_frames(energy, internal, x, rng=rng, trajectories=trajectories, leapfrog=leapfrog, keep=keep)
    fit = fit_proposal(internal, z, torsions, settings, rng=rng, marginal=marginal, progress=progress)
    return LearnedProposal(fit, len(x) * trajectories * leapfrog, time.perf_counter() - began)


@torch.no_grad()
def weighted_draws(energy: Energy, proposal: Tractable, n: int, *, rng: Generator) -> WeightedDraws:
    """Draw from a proposal and weigh by importance: one evaluation of the energy each, without its gradient.

    Parameters
    ----------
    energy
        Over the proposal's points, such as `InternalEnergy`.
    proposal
        Tractable, such as `InternalProposal`.
    n
        Draws, 2 or more.
    rng
        Of the draws.

    Warns
    -----
    RuntimeWarning
        If a few weights dominate.

    Raises
    ------
    OptionError
        If there are fewer than two draws.
    DivergenceError
        If no energy is finite.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise OptionError(f"Weighted draws are 2 or more; got {n!r}.")
    parts: list[tuple[Any, ...]] = []
    for size in [CHUNK] * (n // CHUNK) + [n % CHUNK] * (n % CHUNK > 0):
        z = proposal.sample(size, rng)
        parts.append((z, energy(z).double(), proposal(z).double()))
    z, value, cost = (torch.cat(column) for column in zip(*parts))
    log_weights = cost - value
    log_z = from_log_weights(log_weights)
    warn_if_degenerate(log_z, "importance weights", REMEDY)
    return WeightedDraws(z, value, log_weights, log_z)
