"""Networks with a Gaussian base, without noise levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.annealing import denoised
from gibbsian.energies.base import Energy
from gibbsian.energies.neural import MLP, ConvEnergy, ResidualEnergy
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.errors import OptionError
from gibbsian.families.base import (
    ROWS_AT_ONCE,
    USUAL,
    PlainFamily,
    Progress,
    Walk,
    annealed_log_z,
    annealed_told,
    resampled,
)
from gibbsian.kernels.base import Kernel
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.objectives.base import Objective
from gibbsian.objectives.conditional_noise import ConditionalNCE
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.objectives.energy_discrepancy import EnergyDiscrepancy
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE
from gibbsian.objectives.score_matching import ScoreMatching, SlicedScoreMatching
from gibbsian.partition.base import LogZ
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample

TAIL = 3.0
"""How much wider the wide part of the noise is."""


class Networks(PlainFamily):
    """``mlp``, ``convolutional`` and ``residual``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the network, with its base added."""
        return build_network(recipe) + build_base(recipe, data)

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Leave it as it was built."""

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Any objective without noise levels."""
        if recipe.objective in _PLAIN:
            return _PLAIN[recipe.objective](recipe, data)
        kernel, penalty = build_kernel(recipe), recipe.energy_penalty
        if recipe.objective == "cd":
            return ContrastiveDivergence(kernel, recipe.chain_steps, energy_penalty=penalty)
        return persistent(recipe, kernel, build_base(recipe, data))

    @property
    def density(self) -> Energy:
        """The energy."""
        return self.energy

    @property
    def base(self) -> Tractable:
        """The base, or what the energy was contrasted with."""
        if not self.recipe.base_fitted:
            return build_noise(self.recipe)
        return next(part for part in self.energy.modules() if isinstance(part, Gaussian))

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Run chains, and take out the noise that was added to the data in training."""
        x = self.chains(n, rng, Walk(progress=progress)).x
        if not (self.recipe.denoise and self.recipe.objective == "pcd"):
            return x
        return torch.cat([denoised(self.density, part, self.recipe.data_noise) for part in x.split(ROWS_AT_ONCE)])

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Chains from resampled draws of the base, with a tuned step size."""
        return tuned_chains(self.density, self.base, self.recipe, n, rng, walk)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """On a grid, or by annealing from the base and back."""
        return annealed_log_z(self, rng, temperatures, chains)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Quadrature or annealing."""
        return annealed_told(self.recipe)


def build_network(recipe: Recipe) -> Energy:
    """Build the network alone; convolutional ones double their width at each stage."""
    if recipe.energy == "mlp":
        hidden = (recipe.width,) * recipe.depth
        return MLP(recipe.shape, hidden, recipe.frequencies, spectral_norm=recipe.spectral_norm)
    widths = tuple(recipe.width * 2**i for i in range(recipe.depth))
    kind = ConvEnergy if recipe.energy == "convolutional" else ResidualEnergy
    return kind(recipe.shape, widths, spectral_norm=recipe.spectral_norm)


def build_base(recipe: Recipe, data: Tensor | None = None) -> Gaussian:
    """Build the Gaussian that an energy without noise levels contains.

    With ``base_fitted`` it is the mean of the data, in model units, with the noise that is added to them. No other base
    has the right width along the many directions in which noise is all there is, and a network finds it easier to widen
    a Gaussian along the few others than to narrow one along the many. Without data the mean is to be loaded.
    """
    if not recipe.base_fitted:
        return Gaussian(recipe.shape, scale=recipe.base_scale)
    mean = torch.zeros(recipe.shape) if data is None else data.mean(0)
    return Gaussian(recipe.shape, loc=mean, scale=recipe.data_noise)


def build_noise(recipe: Recipe, data: Tensor | None = None) -> Tractable:
    """Build what an energy without noise levels is contrasted with, and where its chains start.

    It is the Gaussian that the energy contains. For noise contrastive estimation on tables part of it is wider: where
    neither data nor noise ever are, a network's energy is anything, and may hold all the mass.
    """
    base = build_base(recipe, data)
    if (
        recipe.base_fitted
        or recipe.objective not in ("noise-contrastive", "ranking-nce")
        or recipe.noise_tail == 0.0
        or len(recipe.shape) != 1
    ):
        return base
    scales = torch.tensor([1.0, TAIL]) * recipe.base_scale
    return GaussianMixture(
        torch.zeros(2, *recipe.shape), scales, torch.tensor([1.0 - recipe.noise_tail, recipe.noise_tail])
    )


def persistent(recipe: Recipe, kernel: Kernel, base: Tractable) -> PersistentContrastiveDivergence:
    """Build persistent contrastive divergence with the recipe's settings."""
    return PersistentContrastiveDivergence(
        kernel,
        base,
        steps=recipe.chain_steps,
        buffer_size=recipe.buffer_size,
        restart=recipe.restart,
        energy_penalty=recipe.energy_penalty,
        data_noise=recipe.data_noise,
    )


_PLAIN: dict[str, Callable[[Recipe, Tensor], Objective]] = {
    "denoising": lambda recipe, data: DenoisingScoreMatching(recipe.sigma_min),
    "noise-contrastive": lambda recipe, data: NoiseContrastiveEstimation(build_noise(recipe, data), recipe.noise_ratio),
    "ranking-nce": lambda recipe, data: RankingNCE(build_noise(recipe, data), max(2, recipe.noise_ratio)),
    "conditional-nce": lambda recipe, data: ConditionalNCE(recipe.noise_scale, recipe.noise_ratio),
    "score-matching": lambda recipe, data: ScoreMatching(),
    "sliced-score-matching": lambda recipe, data: SlicedScoreMatching(),
    "energy-discrepancy": lambda recipe, data: EnergyDiscrepancy(recipe.noise_scale**2),
    "exact-likelihood": lambda recipe, data: ExactLikelihood(),
}
"""Objectives without chains and without levels, by name."""


def build_kernel(recipe: Recipe) -> Kernel:
    """Build the kernel of training chains over real numbers."""
    if recipe.kernel == "ula":
        return ULA(recipe.step_size, exact_noise(recipe.step_size, recipe.data_noise))
    return MALA(recipe.step_size) if recipe.kernel == "mala" else HMC(recipe.step_size, leapfrog=5)


def exact_noise(step_size: float, sigma: float) -> float | None:
    r"""Noise of a Langevin step that leaves a Gaussian of standard deviation ``sigma`` as it is.

    With :math:`s^2 = 2h (1 - h / 2\sigma^2)` the Euler step is the exact one along all directions in which noise of
    ``sigma`` is all there is: most of them, in images. With :math:`2h` chains would be too hot there by a part of
    :math:`h / 2\sigma^2`, which adds up to many nats over the pixels and which no energy can make up for.

    Raises
    ------
    OptionError
        If the step is too large for any noise to do so.
    """
    if not sigma:
        return None
    if not step_size < 2.0 * sigma**2:
        raise OptionError(f"step_size is below twice the square of data_noise, {2.0 * sigma**2:.4g}; got {step_size}.")
    return (2.0 * step_size * (1.0 - step_size / (2.0 * sigma**2))) ** 0.5


def tuned_chains(energy: Energy, base: Tractable, recipe: Recipe, n: int, rng: Generator, walk: Walk) -> Samples:
    """Run the recipe's chains on an energy, from draws of a base resampled by their weights unless told otherwise.

    Step sizes are tuned but for unadjusted chains, whose density depends on them.
    """
    kernel = build_kernel(recipe)
    start = resampled(energy, base, n, rng) if walk.start is None else walk.start
    steps = recipe.sample_steps if walk.steps is None else walk.steps
    if not isinstance(kernel, ULA):
        # A step size needs no more chains than these to be known to a per cent.
        kernel = tune(energy, kernel, start[:512], rng=rng, steps=min(200, max(100, steps))).kernel
    return sample(energy, kernel, start, steps=steps, thin=walk.thin, rng=rng, progress=walk.progress or False)
