"""Learn a proposal over internal coordinates from frames of a simulation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.energies.flows import _seeded_globally, require_zuko
from gibbsian.energies.periodic import TURN, fit_von_mises_mixture
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.internal import InternalCoordinates
from gibbsian.molecules.proposal import InternalProposal, mean_features, residual
from gibbsian.molecules.rotors import free_rotors, relabelled


@dataclass(frozen=True)
class ProposalTraining:
    """Settings of `fit_proposal`.

    Parameters
    ----------
    components
        Of the mixture over the chosen torsions, and its uniform part.
    uniform
        Mass of that part, which covers the torus.
    transforms, hidden, bins
        Of the flow of couplings over bonds, angles and stiff torsions: affine ones, or splines of so many pieces.
    steps
        Of the training; 0 leaves a Gaussian whose mean depends on the torsions.
    batch_size, learning_rate
        Of the training; the rate falls to 0 along a cosine.
    validation
        Part of the frames held out, on which the best moment is chosen.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    components: int = 30
    uniform: float = 0.01
    transforms: int = 6
    hidden: tuple[int, ...] = (64, 64)
    bins: int | None = None
    steps: int = 1000
    batch_size: int = 512
    learning_rate: float = 5e-4
    validation: float = 0.1

    def __post_init__(self) -> None:
        if min(self.components, self.transforms, self.batch_size) < 1 or self.steps < 0:
            raise OptionError(
                "components, transforms and batch_size are 1 or more, and steps 0 or more; got "
                f"{self.components}, {self.transforms}, {self.batch_size}, {self.steps}."
            )
        if self.bins is not None and self.bins < 2:
            raise OptionError(f"bins counts the pieces of a spline, 2 or more, or is None; got {self.bins}.")
        if not (0.0 < self.validation < 1.0 and self.learning_rate > 0 and 0.0 < self.uniform < 1.0):
            raise OptionError(
                "validation and uniform are between 0 and 1, and learning_rate positive; got "
                f"{self.validation}, {self.uniform}, {self.learning_rate}."
            )


@dataclass(frozen=True)
class ProposalFit:
    """A learned proposal.

    Attributes
    ----------
    proposal
        In float64.
    gaussian, validation
        Mean of -log q of rotors and rest given the chosen torsions, in nats, over the frames held out: with an
        untrained flow, and in the end.
    trace
        The same at each check, with the step.
    """

    proposal: InternalProposal
    gaussian: float
    validation: float
    trace: list[tuple[int, float]] = field(default_factory=list)


def fit_proposal(
    internal: InternalCoordinates,
    z: Tensor,
    torsions: Sequence[Sequence[int]],
    settings: ProposalTraining | None = None,
    *,
    rng: Generator,
    weights: Tensor | None = None,
    marginal: Tractable | None = None,
    progress: Callable[[str], object] | None = None,
) -> ProposalFit:
    """Learn a proposal from frames.

    Parameters
    ----------
    internal
        The coordinates.
    z
        Frames in them, ``(n, 3 * atoms - 6)``, all of one chirality, with no coordinate held fixed: see
        `gibbsian.molecules.thermal_frames.thermal_frames`.
    torsions
        Four atoms of each torsion whose density is learned first, such as phi and psi.
    settings
        Of the training.
    rng
        Of everything random.
    weights
        Of the frames towards the Boltzmann law, ``(n,)``, used for the density of the chosen torsions alone. The rest
        is learned given these, for which frames of a run biased along them need no weights.
    marginal
        A density of the chosen torsions that is known already, in place of a mixture fitted to the frames.
    progress
        Told what is being done.

    Raises
    ------
    DataError
        If there are too few frames, they are not finite, or a coordinate does not vary.
    OptionError
        If a torsion is no coordinate.
    MissingPackageError
        If zuko is not installed.
    """
    settings, say = settings or ProposalTraining(), progress or (lambda _: None)
    zuko = require_zuko()
    z = z.double()
    chosen = [internal.torsion(four) for four in torsions]
    _check(z, internal)
    if marginal is None:
        say("fitting the density of the chosen torsions")
        marginal = fit_von_mises_mixture(
            TURN.wrap(z[:, chosen]), settings.components, rng=rng, weights=weights, uniform=settings.uniform
        )
    rotors, folds = free_rotors(internal, z, chosen)
    z = relabelled(internal, z, rotors, folds, rng)
    rest = [i for i in range(internal.dim) if i not in chosen and i not in rotors]
    waves = torch.polar(torch.ones_like(z[:, rest]), z[:, rest]).mean(0).angle()
    centres = torch.where(torch.tensor([i >= 2 * internal.atoms - 3 for i in rest]), waves, z[:, rest].mean(0))
    mean, factor = _regression(residual(internal, rest, z, centres), mean_features(z[:, chosen], z[:, rotors]))
    with _seeded_globally(rng):
        context = 4 * len(chosen)
        circular = (
            zuko.flows.NCSF(len(rotors), context, transforms=2, hidden_features=(32, 32), bins=8) if rotors else None
        )
        build, shape = (zuko.flows.MAF, {}) if settings.bins is None else (zuko.flows.NSF, {"bins": settings.bins})
        linear = build(
            len(rest),
            context + 4 * len(rotors),
            transforms=settings.transforms,
            hidden_features=settings.hidden,
            passes=2,
            randperm=True,
            activation=torch.nn.SiLU,
            **shape,
        )
    proposal = InternalProposal(
        internal, chosen, marginal.double(), rotors, folds, circular, linear, mean, factor, centres
    ).double()
    return _trained(proposal, z, settings, rng, say)


def _check(z: Tensor, internal: InternalCoordinates) -> None:
    internal.split(z)
    if not bool(z.isfinite().all()):
        raise DataError(f"{int((~z.isfinite()).any(1).sum())} of {len(z)} frames have coordinates that are not finite.")
    if len(z) < 10 * internal.dim:
        raise DataError(
            f"{len(z)} frames are too few to learn {internal.dim} coordinates from; take {10 * internal.dim} or more."
        )
    lengths = internal.split(z)[0].std(0)
    if still := int((lengths < 1e-5).sum()):
        raise DataError(
            f"{still} bond lengths do not vary: the simulation held them fixed, and a density over all coordinates "
            "needs them free: thermal_frames(energy, internal, x, rng=rng) sets them free."
        )


def _regression(y: Tensor, features: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Coefficients of the mean, and the lower factor of the covariance about it."""
    gram = features.T @ features / len(y)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    mean = torch.linalg.solve(gram, features.T @ y / len(y))
    away = y - features @ mean
    covariance = away.T @ away / max(len(y) - features.shape[1], 1)
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise DataError("Some coordinates do not vary apart from others over the frames; take more frames.")
    return mean, factor


def _trained(
    proposal: InternalProposal, z: Tensor, settings: ProposalTraining, rng: Generator, say: Callable[[str], object]
) -> ProposalFit:
    """Greatest likelihood of rotors and rest given the chosen torsions, in float32; the best moment is kept."""
    with torch.no_grad():
        chosen, turned, noise = proposal.parts(z)
        context, waves = proposal.conditions(chosen, turned, z), proposal.waves(chosen)
    rows = [t.float() for t in (context, waves, turned, noise)]
    constant = float(proposal.factor.diagonal().log().sum())
    flows = [flow.float() for flow in (proposal.circular, proposal.linear) if flow is not None]

    def cost(index: Tensor | slice) -> Tensor:
        about, short, circle, line = (t[index] for t in rows)
        total = -proposal.linear(about).log_prob(line)
        return (total if proposal.circular is None else total - proposal.circular(short).log_prob(circle)) + constant

    @torch.no_grad()
    def held_out() -> float:
        value = float(torch.cat([cost(part) for part in held.split(2048)]).mean())
        return value if math.isfinite(value) else math.inf

    order = torch.randperm(len(z), generator=rng)
    count = max(1, int(settings.validation * len(z)))
    held, used = order[:count], order[count:]
    best, trace = held_out(), []
    gaussian, kept = best, [copy.deepcopy(flow.state_dict()) for flow in flows]
    parameters: list[Any] = [p for flow in flows for p in flow.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(settings.steps, 1))
    every = max(1, settings.steps // 20)
    for step in range(1, settings.steps + 1):
        index = used[torch.randint(len(used), (settings.batch_size,), generator=rng)]
        loss = cost(index).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()
        schedule.step()
        if step % every == 0:
            value = held_out()
            trace.append((step, value))
            say(f"step {step}: {value:.2f} nats over held-out frames")
            if value < best:
                best, kept = value, [copy.deepcopy(flow.state_dict()) for flow in flows]
    for flow, state in zip(flows, kept):
        flow.load_state_dict(state)
        flow.double().requires_grad_(False)
    return ProposalFit(proposal.double().eval(), gaussian, best, trace)
