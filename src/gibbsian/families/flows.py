"""Normalizing flows, alone and with a learned correction: normalised, or with exact draws and weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.tilted import Tilted, tilted
from gibbsian.energies.tractable import Tractable
from gibbsian.families.base import USUAL, Family, Progress, Walk, first_steps, plain_network, walked
from gibbsian.objectives.augment import UniformNoise
from gibbsian.objectives.augmented import Augmented
from gibbsian.objectives.base import Objective
from gibbsian.objectives.combination import Phases
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.objectives.parts import OfPart
from gibbsian.partition.base import LogZ, exactly
from gibbsian.partition.importance import importance_sampling
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples

FLOW_HIDDEN = 64
"""Units of each layer of the networks of a flow in few dimensions; twice as many in more than eight."""

LEVELS = 1024
"""Different values of images that are taken for grey levels, at most."""

WEIGHTED, COSTLY = 65_536, 4096
"""Draws by which a correction's log Z is estimated: in a few dimensions, and in more than eight."""


class _OnFlows(Family):
    """What models on flows share: exact draws, and grey values with noise. Abstract."""

    exact_draws = True

    @property
    def unlabelled(self) -> Energy:
        """The energy."""
        return self.energy

    @property
    def density(self) -> Energy:
        """The energy."""
        return self.energy

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Grey values with uniform noise of one step."""
        noise = grey_noise(x)
        return (x, "") if noise is None else (noise(x, rng), "grey values with uniform noise of one step")

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Langevin chains from exact draws."""
        start = self.draw(n, rng) if walk.start is None else walk.start
        return walked(self.energy, start, self.recipe, rng, walk)

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """As `chains`."""
        return self.chains(n, rng, Walk(steps, thin))


class Flows(_OnFlows):
    """``flow``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the flow."""
        return build_flow(recipe)

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Scale the flow's coordinates by the data's."""
        calibrated(cast(Flow, energy), recipe, data)

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Maximum likelihood."""
        return with_noise(MaximumLikelihood(), data)

    @property
    def base(self) -> Tractable:
        """The flow."""
        return cast(Flow, self.energy)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Draw from the flow."""
        return self.base.sample(n, rng)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """0: a flow is normalised."""
        return exactly(torch.zeros((), dtype=torch.float64))

    @property
    def log_z_told(self) -> tuple[str, str]:
        """That it is known."""
        return "the flow, which is normalised", ""


class TiltedFlows(_OnFlows):
    """``tilted-flow``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the flow and the correction, which starts as none."""
        model = tilted(build_flow(recipe), plain_network(recipe), recipe.tilt_limit)
        model.base.requires_grad_(True)  # it learns first
        return model

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Scale the flow's coordinates by the data's."""
        calibrated(cast(Tilted, energy).base, recipe, data)

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """The flow by maximum likelihood, and then the correction by contrast with the flow."""
        flow = OfPart(MaximumLikelihood(), "base")
        noise = OfPart(NoiseContrastiveEstimation(cast(Tilted, energy).base, recipe.noise_ratio), held="base")
        both = Phases([(first_steps(recipe), flow), (None, noise)])
        return with_noise(both, data)

    @property
    def base(self) -> Tractable:
        """The flow."""
        return cast(Tilted, self.energy).base

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Draw exactly, by rejection from the flow."""
        return cast(Tilted, self.energy).sample(n, rng)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """From weights of the flow's draws, which are bounded, and of exact ones."""
        draws = WEIGHTED if self.base.event_shape.numel() <= 8 else COSTLY
        return importance_sampling(self.energy, self.base, self.draw(draws // 8, rng), rng=rng, draws=draws)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Importance sampling."""
        return "importance sampling from the flow, and from exact draws", ""


def build_flow(recipe: Recipe) -> Flow:
    """Build a spline flow; in many dimensions of coupling transforms, whose draws are quick."""
    d = torch.Size(recipe.shape).numel()
    if d <= 8:
        return spline_flow(recipe.shape, hidden=(FLOW_HIDDEN,) * 2)
    return spline_flow(recipe.shape, 4, hidden=(2 * FLOW_HIDDEN,) * 2, passes=2)


def calibrated(flow: Flow, recipe: Recipe, data: Tensor) -> None:
    """Scale a flow's coordinates by the data's, with their noise: a pixel may be constant without."""
    noise = grey_noise(data)
    flow.calibrate(data if noise is None else noise(data, Generator().manual_seed(recipe.seed)))


def grey_noise(x: Tensor) -> UniformNoise | None:
    """Noise of one step for images ``(n, channels, height, width)`` whose values come in steps; ``None`` for others.

    Values of tables that repeat are no grey values: maximum likelihood refuses them by name.
    """
    values = x.unique() if x.ndim == 4 else x[:0]
    if not 1 < len(values) <= LEVELS:
        return None
    # The median, as float32 rounds the steps.
    return UniformNoise(float(values.diff().median()))


def with_noise(objective: Objective, data: Tensor) -> Objective:
    """Let an objective see grey values with noise."""
    noise = grey_noise(data)
    return objective if noise is None else Augmented(objective, noise)
