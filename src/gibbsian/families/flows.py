"""Normalizing flows, alone and with a learned correction: normalised, or with exact draws and weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.energies.base import Energy
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.neural import MLP, ConvEnergy
from gibbsian.energies.tilted import Tilted, tilted
from gibbsian.energies.tractable import Tractable
from gibbsian.families.base import Family, Progress, is_large_image
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.base import Objective
from gibbsian.objectives.combination import Phases
from gibbsian.objectives.dequantised import Dequantised, spread
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.objectives.parts import OfPart
from gibbsian.partition.base import LogZ, exactly
from gibbsian.partition.importance import importance_sampling
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample

FLOW_HIDDEN = 64
"""Units of each layer of the networks of a flow in few dimensions; twice as many in more than eight."""

LEVELS = 1024
"""Different values of images that are taken for grey levels, at most."""

WEIGHTED, COSTLY = 65_536, 4096
"""Draws by which a correction's log Z is estimated: in a few dimensions, and in more than eight."""


class Flows(Family):
    """``flow``."""

    exact_draws = True

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
        return Dequantised(MaximumLikelihood(), step) if (step := lattice_step(data)) else MaximumLikelihood()

    @property
    def unlabelled(self) -> Energy:
        """The flow."""
        return self.energy

    @property
    def density(self) -> Energy:
        """The flow."""
        return self.energy

    @property
    def base(self) -> Tractable:
        """The flow."""
        return cast(Flow, self.energy)

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Grey values with uniform noise of one step."""
        return dequantised(x, rng)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Draw from the flow."""
        return self.base.sample(n, rng)

    def chains(
        self,
        n: int,
        rng: Generator,
        steps: int | None = None,
        thin: int | None = None,
        start: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Langevin chains from the flow's draws."""
        start = self.base.sample(n, rng) if start is None else start
        return walked(self.density, start, self.recipe, rng, steps, thin, progress)

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """As `chains`."""
        return self.chains(n, rng, steps, thin)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """0: a flow is normalised."""
        return exactly(torch.zeros((), dtype=torch.float64))

    @property
    def log_z_told(self) -> tuple[str, str]:
        """That it is known."""
        return "the flow, which is normalised", ""


class TiltedFlows(Family):
    """``tilted-flow``."""

    exact_draws = True

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the flow and the correction, which starts as none."""
        if is_large_image(recipe):
            net: Energy = ConvEnergy(recipe.shape, (32, 64))
        else:
            net = MLP(recipe.shape, (recipe.width,) * recipe.depth, recipe.frequencies)
        model = tilted(build_flow(recipe), net, recipe.tilt_limit)
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
        return Dequantised(both, step) if (step := lattice_step(data)) else both

    @property
    def unlabelled(self) -> Energy:
        """The model."""
        return self.energy

    @property
    def density(self) -> Energy:
        """The model."""
        return self.energy

    @property
    def base(self) -> Tractable:
        """The flow."""
        return cast(Tilted, self.energy).base

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Grey values with uniform noise of one step."""
        return dequantised(x, rng)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Draw exactly, by rejection from the flow."""
        return cast(Tilted, self.energy).sample(n, rng)

    def chains(
        self,
        n: int,
        rng: Generator,
        steps: int | None = None,
        thin: int | None = None,
        start: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Langevin chains from exact draws."""
        start = self.draw(n, rng) if start is None else start
        return walked(self.density, start, self.recipe, rng, steps, thin, progress)

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """As `chains`."""
        return self.chains(n, rng, steps, thin)

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
    flow.calibrate(dequantised(data, Generator().manual_seed(recipe.seed))[0])


def lattice_step(x: Tensor) -> float | None:
    """Step between the values of images ``(n, channels, height, width)`` with few different ones; ``None`` for others.

    Values of tables that repeat are no grey values: maximum likelihood refuses them by name.
    """
    if x.ndim != 4:
        return None
    values = x.unique()
    if not 1 < len(values) <= LEVELS:
        return None
    # The median, as float32 rounds the steps.
    return float(values.diff().median())


def dequantised(x: Tensor, rng: Generator) -> tuple[Tensor, str]:
    """Spread grey values over their cells."""
    step = lattice_step(x)
    if step is None:
        return x, ""
    return spread(x, step, rng), "grey values with uniform noise of one step"


def first_steps(recipe: Recipe) -> int:
    """Steps of the first phase of training."""
    return max(1, round(recipe.first_phase * recipe.training.steps))


def walked(
    energy: Energy,
    start: Tensor,
    recipe: Recipe,
    rng: Generator,
    steps: int | None,
    thin: int | None,
    progress: Progress | None,
) -> Samples:
    """Run MALA with a tuned step size, from points that are close to the density."""
    kernel = tune(energy, MALA(recipe.step_size), start[:512], rng=rng, steps=100).kernel
    steps = recipe.sample_steps if steps is None else steps
    return sample(energy, kernel, start, steps=steps, thin=thin, rng=rng, progress=progress or False)
