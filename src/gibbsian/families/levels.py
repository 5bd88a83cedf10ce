"""Energies with noise levels: fitted by denoising at all of them, drawn by walking down."""

from __future__ import annotations

import dataclasses

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.annealing import Annealing, anneal
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.noise import NoiseConditional, NoiseConditionalEnergy
from gibbsian.energies.tractable import Tractable
from gibbsian.energies.unet import NoiseConditionalUNet
from gibbsian.families.base import ROWS_AT_ONCE, USUAL, Family, Progress, Walk, annealed_told, grid_of, is_plane
from gibbsian.families.networks import tuned_chains
from gibbsian.kernels.hmc import HMC
from gibbsian.objectives.base import Objective
from gibbsian.objectives.denoising import EDMWeight, LogNormal, MultiLevelDenoising
from gibbsian.objectives.label_dropping import LabelDropping
from gibbsian.partition.base import LogZ
from gibbsian.partition.bracket import bracket
from gibbsian.partition.paths import noise_levels
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample


class Levels(Family):
    """``noise-conditional`` and ``unet``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the network."""
        if recipe.energy == "unet":
            # Preconditioned as by EDM, with which it learned faster at every level (benchmarks/diffusion.py).
            sizes = (recipe.width, recipe.depth)
            return NoiseConditionalUNet(recipe.shape, *sizes, gain=recipe.gain, fade=1.0, classes=recipe.labels)
        sizes = (recipe.width, recipe.depth, recipe.frequencies, recipe.local)
        return NoiseConditional(recipe.shape, *sizes, gain=recipe.gain, dropout=recipe.dropout, classes=recipe.labels)

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Calibrate the energy to the data's spread; what cannot be sampled is told of before training."""
        assert isinstance(energy, NoiseConditionalEnergy)
        energy.calibrate(data)
        build_annealing(recipe)

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Denoising at all levels, weighted by the data's spread."""
        levels = LogNormal(recipe.sigma_mean, recipe.sigma_std, recipe.sigma_min, recipe.sigma_max)
        spread = float((data - data.mean(0)).square().mean().sqrt())
        denoising = MultiLevelDenoising(levels, EDMWeight(spread), recipe.level_weight)
        if not (recipe.conditional and recipe.label_dropping):
            return denoising
        return LabelDropping(denoising, len(recipe.class_names), recipe.label_dropping)

    @property
    def unlabelled(self) -> Energy:
        """The branch without label, or all classes' mixture where there is none.

        That mixture weighs the classes alike but for the constants of their energies, which are as training left them.
        """
        count = len(self.recipe.class_names)
        if not self.recipe.conditional:
            return self.energy
        if self.recipe.label_dropping:
            return self.energy.given(y=count)
        return mixture(*(self.energy.given(y=label) for label in range(count)))

    @property
    def density(self) -> Energy:
        """The energy at the level ``sigma_density``."""
        return self.unlabelled.given(sigma=self.recipe.sigma_density)

    @property
    def base(self) -> Tractable:
        """The data's Gaussian at the highest level."""
        levels = next(part for part in self.energy.modules() if isinstance(part, NoiseConditionalEnergy))
        return levels.base(self.recipe.sigma_max)

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Rows with the noise of the level ``sigma_density``."""
        sigma = self.recipe.sigma_density
        noisy = x + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype)
        return noisy, f"rows with noise of sigma {sigma:g} (model units)"

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Walk down the levels."""
        start = self.base.sample(n, rng)
        annealing = build_annealing(self.recipe)
        if sigma is not None:
            annealing = dataclasses.replace(annealing, sigma_min=sigma, denoise=False)
        energy = self.unlabelled
        parts = [anneal(energy, part, annealing, rng=rng, progress=progress) for part in start.split(ROWS_AT_ONCE)]
        return torch.cat(parts)

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Chains at the level ``sigma_density``, from resampled draws of the base."""
        return tuned_chains(self.density, self.base, self.recipe, n, rng, walk)

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """Chains at the level ``sigma_density`` from draws that walked down to it."""
        start = self.draw(n, rng, sigma=self.recipe.sigma_density)
        tuned = tune(self.density, HMC(0.5 * self.recipe.sigma_density, leapfrog=5), start, rng=rng, steps=40)
        return sample(self.density, tuned.kernel, tuned.state, steps=steps, thin=thin, rng=rng)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """On a grid, or by annealing down the noise levels and back."""
        if is_plane(self.recipe):
            return grid_of(self.density).log_z
        levels = [self.recipe.sigma_max, self.recipe.sigma_density]
        path = noise_levels(self.unlabelled, levels, self.base, share=0.02)
        # More temperatures narrow the bracket more than more chains in the same time.
        temperatures, chains = temperatures or 1000, chains or 128
        draws = self.exact_chains(chains, rng, steps=50).x
        return bracket(self.density, self.base, draws, rng=rng, path=path, temperatures=temperatures)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Quadrature or annealing."""
        return annealed_told(self.recipe)


def build_annealing(recipe: Recipe) -> Annealing:
    """Build the walk down the noise levels by which a noise-conditional energy is sampled."""
    return Annealing(recipe.sigma_max, recipe.sigma_min, recipe.levels, recipe.corrector_steps, denoise=recipe.denoise)
