r"""Learning an energy on the torus of torsions from weighted frames.

How long to train is found by cross-validation over stretches of time: networks are trained on some stretches for more
and more steps, until frames of the others become less likely. The energy is then the mean of a few networks trained on
all frames from different initial weights, as a product of experts, which is closer to the truth than each; and networks
trained on block-bootstrap resamples of the frames say how far the data determine it.

Frames of a biased run are draws of :math:`e^{-E - V / kT}`. Where the bias V is known as a function, the sum of a
network and V is fitted to them as they are, and the network is the unbiased energy; where only weights are known, rows
are drawn by these.

Where there is no exact likelihood, networks are tilts of a mixture of von Mises densities fitted to the frames,
:math:`E(x) = f(x) - \log q(x)`: far from all frames, of which nothing is known, the energy is that of the mixture.

Two torsions are fitted by exact maximum likelihood, with log Z on a grid; up to eight by noise contrastive estimation
against a mixture of von Mises densities, whose weights of separate basins are right; more by denoising, whose noise
wraps round the torus, and which knows the shape of basins better than their relative masses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Combination, Energy
from gibbsian.energies.flows import Flow
from gibbsian.energies.periodic import TURN, PeriodicMLP, VonMisesMixture, fit_von_mises_mixture
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DataError, ShapeError
from gibbsian.kernels.domains import Wrapped
from gibbsian.kernels.langevin import MALA
from gibbsian.molecules.reweighting import (
    FEW,
    checked_weights,
    effective_sample_size,
    resample_counts,
    resampled_rows,
)
from gibbsian.molecules.torsion_settings import MOST_BY_NCE, TorsionTraining
from gibbsian.objectives.base import Batch, Objective
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.objectives.score_matching import ScoreMatching
from gibbsian.training.fit import fit

GRID = 40
"""Points along each torsion at which exact likelihood integrates: sums converge fast for smooth periodic functions."""


FAR = 1e-3
"""Part of the mixture's uniform mass that the energy has far from all frames, before the network."""

FLOW_NOISE = 0.3
"""Standard deviation in radians of the noise that a flow to contrast with is fitted to besides the frames."""


@dataclass(frozen=True)
class TorsionFit:
    """What was learned.

    Attributes
    ----------
    energy
        The mean of the members' energies: ``(n, d) -> (n,)`` in nats, over the base where there is one.
    replicates
        Energies of bootstrap resamples.
    noise
        The mixture fitted to the frames: noise to contrast with, and where chains start.
    objective
        Its name.
    steps
        As chosen.
    scores
        Held-out loss by number of steps, in nats, lower is better; empty where nothing was chosen.
    """

    energy: Energy
    replicates: tuple[Energy, ...]
    noise: VonMisesMixture
    objective: str
    steps: int
    scores: dict[int, float]


def fit_torsion_energy(
    angles: Tensor,
    weights: Any = None,
    settings: TorsionTraining | None = None,
    *,
    rng: Generator,
    bias: Energy | None = None,
    block: int = 1,
    progress: Callable[[str], object] | None = None,
) -> TorsionFit:
    """Learn an energy of torsions from frames.

    Parameters
    ----------
    angles
        In radians, ``(n, d)``, in order of time.
    weights
        Of the frames, ``(n,)``; equal when left out. Rows are drawn by them, systematically, several times as many as
        there are, so that every objective sees the weighted ones.
    settings
        The defaults when left out.
    rng
        Of everything random.
    bias
        A known energy under which the frames were drawn besides the one that is sought, in nats: what is fitted to the
        frames is the sum of both, and the sought one is returned. Frames of metadynamics then count alike, instead of
        by weights that are small wherever the bias helped.
    block
        Frames that belong together in time, as `gibbsian.molecules.landscape.block_length` finds them.
    progress
        Told what is being done.

    Raises
    ------
    ShapeError
        If the angles have another shape.
    DataError
        If they are not finite, or too few frames carry the weight.
    """
    settings = settings or TorsionTraining()
    x, w = _checked(angles, weights)
    kind = settings.objective
    if kind == "auto":
        kind = "exact" if x.shape[1] <= 2 else "nce" if x.shape[1] <= MOST_BY_NCE else "denoising"
    noise = fit_von_mises_mixture(x, min(settings.components, len(x)), rng=rng, weights=w)
    flow = fit_torsion_flow(x, w, settings, rng=rng) if settings.noise == "flow" and kind == "nce" else noise
    base = None if kind == "exact" else base_of(noise)
    problem = _Problem(settings, kind, flow, base, bias, int(torch.randint(2**31, (), generator=rng)))
    say = progress or (lambda _: None)
    scores = {}
    steps = settings.steps[-1]
    if len(settings.steps) > 1 and kind != "pcd":
        scores = _cross_validated(problem, x, w, block, say)
        steps = min(scores, key=lambda count: scores[count])
    members = []
    for i in range(settings.members):
        say(f"training network {i + 1} of {settings.members} for {steps} steps")
        members.append(problem.trained(x, w, steps, i)[0])
    replicates = []
    for i in range(settings.replicates):
        say(f"training on resample {i + 1} of {settings.replicates}")
        counts = resample_counts(len(x), min(block, len(x)), rng)
        net = problem.trained(x, w * counts, steps, i % settings.members)[0]
        replicates.append(mean_energy([net], base))
    return TorsionFit(mean_energy(members, base), tuple(replicates), noise, kind, steps, scores)


def mean_energy(members: Sequence[Energy], base: Energy | None = None) -> Energy:
    """The mean of energies, one as it is, over a base where there is one."""
    mean = members[0] if len(members) == 1 else Combination([(1.0 / len(members), e) for e in members])
    return mean if base is None else mean + base


def base_of(noise: VonMisesMixture) -> VonMisesMixture:
    """The mixture with next to nothing of its uniform part, which is there to be contrasted with."""
    weights = noise.log_weights.exp()
    return VonMisesMixture(noise.locs, noise.concentrations, torch.cat((weights[:-1], FAR * weights[-1:])))


def fit_torsion_flow(x: Tensor, weights: Tensor, settings: TorsionTraining, *, rng: Generator) -> Flow:
    """Fit a flow of circular splines to weighted torsions ``(n, d)`` by maximum likelihood, over a little noise."""
    from gibbsian.energies.torus_flow import circular_spline_flow

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        flow = circular_spline_flow(x.shape[1], hidden=settings.hidden)
    rows = x[resampled_rows(weights, max(len(x), 4096), rng)]
    # Rows that were drawn twice are no atoms of the density, and its narrowest parts no needles.
    rows = TURN.wrap(rows + FLOW_NOISE * torch.randn(rows.shape, generator=rng))
    steps, rate = settings.steps[0], settings.learning_rate
    fit(flow, rows, MaximumLikelihood(), rng=rng, steps=steps, batch_size=settings.batch_size, learning_rate=rate)
    return flow


@dataclass(frozen=True)
class _Problem:
    settings: TorsionTraining
    kind: str
    noise: Tractable
    base: VonMisesMixture | None
    bias: Energy | None
    seed: int

    def network(self, dim: int, member: int) -> PeriodicMLP:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + member)
            net = PeriodicMLP(dim, self.settings.hidden, self.settings.harmonics)
        # A flat start: the first steps find the basins instead of undoing random ones.
        nn.init.zeros_(cast(nn.Linear, net.net[-1]).weight)
        return net

    def objective(self) -> Objective:
        if self.kind == "exact":
            return ExactLikelihood(points=GRID)
        if self.kind == "nce":
            return NoiseContrastiveEstimation(self.noise, ratio=4)
        if self.kind == "denoising":
            return DenoisingScoreMatching(self.settings.sigma)
        if self.kind == "score":
            return ScoreMatching()
        return PersistentContrastiveDivergence(Wrapped(MALA(0.05), TURN), self.noise, steps=10, buffer_size=4096)

    def trained(self, x: Tensor, w: Tensor, steps: int, member: int) -> tuple[PeriodicMLP, Objective]:
        """One network on rows drawn by weight, and its objective with what that has learned."""
        rng = torch.Generator().manual_seed(self.seed + 7919 * (member + 1))
        rows = x[resampled_rows(w, max(20_000, 4 * len(x)), rng)]
        net, objective = self.network(x.shape[1], member), self.objective()
        settings = self.settings
        fit(
            self.fitted(net),
            rows,
            objective,
            rng=rng,
            steps=steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            ema_decay=0.99,
            checkpoint_every=steps,
            log_every=max(steps // 8, 1),
        )
        return net.eval(), objective

    def fitted(self, net: PeriodicMLP) -> Energy:
        """What the frames are draws of."""
        energy = mean_energy([net], self.base)
        return energy if self.bias is None else energy + self.bias

    @torch.no_grad()
    def score(self, net: PeriodicMLP, objective: Objective, x: Tensor, w: Tensor) -> float:
        """Loss of rows that the network has not seen."""
        rng = torch.Generator().manual_seed(self.seed)
        rows = x[resampled_rows(w, 8192, rng)]
        return float(objective.eval()(self.fitted(net), Batch(rows), rng).value)


def _cross_validated(
    problem: _Problem, x: Tensor, w: Tensor, block: int, say: Callable[[str], object]
) -> dict[int, float]:
    """Held-out loss by number of steps, tried until it rises."""
    folds = problem.settings.folds
    # Stretches of several blocks, so that what is held out is not the neighbour of what is trained on.
    length = max(1, min(4 * block, len(x) // (2 * folds)))
    fold = (torch.arange(len(x)) // length) % folds
    scores: dict[int, float] = {}
    for steps in problem.settings.steps:
        total = 0.0
        for k in range(folds):
            say(f"choosing how long to train: {steps} steps, part {k + 1} of {folds}")
            held = fold == k
            share = float(w[held].sum() / w.sum())
            if not 0.0 < share < 1.0:
                continue
            net, objective = problem.trained(x[~held], w[~held], steps, 0)
            total += share * problem.score(net, objective, x[held], w[held])
        if scores and total > min(scores.values()):
            scores[steps] = total
            break
        scores[steps] = total
    return scores


def _checked(angles: Tensor, weights: Any) -> tuple[Tensor, Tensor]:
    if angles.ndim != 2 or not angles.shape[1] or not angles.is_floating_point():
        raise ShapeError(f"Torsions of frames are a floating-point (n, d); got {angles.dtype}, {tuple(angles.shape)}.")
    if not bool(angles.isfinite().all()):
        raise DataError(f"{int((~angles.isfinite()).any(1).sum())} of {len(angles)} frames have torsions that are NaN.")
    x = TURN.wrap(angles.detach().float())
    w = checked_weights(weights, len(x))
    worth = effective_sample_size(w)
    if worth < FEW:
        raise DataError(
            f"The {len(x)} frames are worth {worth:.1f} of equal weight, and a landscape needs {FEW:g} or more: "
            "simulate longer, or save frames more often."
        )
    return x, w


def log_z_of(energy: Energy, points: int = 240) -> float:
    """Log Z of an energy on two torsions by the midpoint rule, in nats."""
    axis = (torch.arange(points, dtype=torch.float32) + 0.5) * (2 * math.pi / points) - math.pi
    with torch.no_grad():
        value = energy(torch.cartesian_prod(axis, axis)).double()
    return float(torch.logsumexp(-value, 0) + 2.0 * math.log(2 * math.pi / points))
