"""Energies with a generator beside them: cooperative learning, and generative adversarial networks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn, cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.annealing import denoised
from gibbsian.bridges.gans import ddls
from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork, WithGenerator
from gibbsian.energies.networks import Dense, NoisyNetwork, Upsampling
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
    first_steps,
    is_large_image,
    plain_network,
)
from gibbsian.families.networks import build_base, build_kernel, tuned_chains
from gibbsian.objectives.adversarial import Adversarial
from gibbsian.objectives.amortised import CooperativeLearning
from gibbsian.objectives.augment import AdditiveNoise
from gibbsian.objectives.augmented import Augmented
from gibbsian.objectives.base import Objective
from gibbsian.objectives.combination import Phases
from gibbsian.objectives.parts import OfPart
from gibbsian.partition.base import LogZ
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples

LONG = 300
"""Steps of chains that stand for the energy's density, where draws are runs as short as in training."""

ALONE = 0.1
"""The slope penalty of a discriminator that is trained alone, over that of the game: the smaller, the sharper."""


class _WithGenerator(PlainFamily):
    """What models share that are an energy and a generator. Abstract."""

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Leave both as they were built."""

    @property
    def density(self) -> Energy:
        """The energy without its generator."""
        return self.both.energy

    @property
    def both(self) -> WithGenerator:
        """The energy and its generator."""
        return cast(WithGenerator, self.energy)


class Cooperative(_WithGenerator):
    """``cooperative``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build energy and generator."""
        return WithGenerator(plain_network(recipe) + build_base(recipe, data), build_generator(recipe))

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Cooperative learning."""
        learning = CooperativeLearning(
            cast(WithGenerator, energy).generator,
            build_kernel(recipe),
            recipe.chain_steps,
            noise_of(recipe),
            energy_penalty=recipe.energy_penalty,
            learning_rate_factor=recipe.generator_rate,
        )
        fitted = OfPart(learning, "energy")
        return Augmented(fitted, AdditiveNoise(recipe.data_noise)) if recipe.data_noise else fitted

    @property
    def base(self) -> Tractable:
        """The Gaussian that the energy contains."""
        return next(part for part in self.density.modules() if isinstance(part, Gaussian))

    def proposals(self, n: int, rng: Generator) -> Tensor:
        """Draw from the generator with its noise."""
        with torch.no_grad():
            return AdditiveNoise(noise_of(self.recipe))(self.both.generator.sample(n, rng), rng)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """The generator's draws, refined by chains as in training."""
        x = self.chains(n, rng, Walk(progress=progress)).x
        if not (self.recipe.denoise and self.recipe.data_noise):
            return x
        return torch.cat([denoised(self.density, part, self.recipe.data_noise) for part in x.split(ROWS_AT_ONCE)])

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Chains from the generator's draws."""
        start = self.proposals(n, rng) if walk.start is None else walk.start
        return tuned_chains(self.density, self.base, self.recipe, n, rng, replace(walk, start=start))

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """On a grid, or by annealing from the base and back."""
        return annealed_log_z(self, rng, temperatures, chains, max(self.recipe.sample_steps, LONG))

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Quadrature or annealing."""
        return annealed_told(self.recipe)


class Gans(_WithGenerator):
    """``gan``."""

    of_rows = False

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build discriminator and generator, whose points have the noise of the data and lie in the box of images."""
        made = generator_network(recipe)
        if recipe.is_image:
            made = nn.Sequential(made, nn.Tanh())
        if not recipe.data_noise:
            return WithGenerator(plain_network(recipe), GeneratorNetwork(made, recipe.shape, recipe.latent))
        noisy = NoisyNetwork(made, recipe.latent, recipe.data_noise)
        generator = GeneratorNetwork(noisy, recipe.shape, recipe.latent + math.prod(recipe.shape))
        return WithGenerator(plain_network(recipe), generator)

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """The relativistic game, and then the discriminator alone, which makes its logit the log-ratio."""
        generator, penalty = cast(WithGenerator, energy).generator, recipe.slope_penalty
        game = Adversarial(generator, penalty, penalty, relativistic=True)
        alone = Adversarial(generator, ALONE * penalty, every=None)
        fitted = OfPart(Phases([(first_steps(recipe), game), (None, alone)]), "energy")
        return Augmented(fitted, AdditiveNoise(recipe.data_noise)) if recipe.data_noise else fitted

    @property
    def base(self) -> Tractable:
        """A Gaussian of the recipe's scale; draws do not start there."""
        return Gaussian(self.recipe.shape, scale=self.recipe.base_scale)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Langevin chains over latents, driven by the discriminator; without the noise."""
        made = ddls(self.both.energy, self.both.generator, n, rng=rng, steps=self.recipe.sample_steps)
        if progress is not None:
            progress(self.recipe.sample_steps)
        net = self.both.generator.net
        if not isinstance(net, NoisyNetwork):
            return made.x
        with torch.no_grad():
            return net.clean(made.z).reshape(made.x.shape)

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """There are none over rows."""
        self._refuse()

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """There is none over rows."""
        self._refuse()

    @property
    def log_z_told(self) -> tuple[str, str]:
        """There is none."""
        return "", ""

    def _refuse(self) -> NoReturn:
        raise OptionError(
            "A gan's discriminator is an energy over the generator's latents, p(z) exp(d(G(z))), and no density of "
            "rows: it has draws and scores, but no log Z and no chains of rows. Train --model cooperative for these."
        )


def noise_of(recipe: Recipe) -> float:
    """Noise on a cooperative generator's draws: as much as on the data, or its own where these have none."""
    return recipe.data_noise or recipe.generator_noise


def build_generator(recipe: Recipe) -> GeneratorNetwork:
    """Build a generator of rows from normal latents."""
    return GeneratorNetwork(generator_network(recipe), recipe.shape, recipe.latent)


def generator_network(recipe: Recipe) -> nn.Module:
    """Build its network."""
    latent, shape, width = recipe.latent, recipe.shape, recipe.generator_width
    return Upsampling(latent, shape, width) if is_large_image(recipe) else Dense(latent, shape, (width, width))
