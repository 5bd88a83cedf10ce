"""Energies with a generator beside them: cooperative learning, and generative adversarial networks."""

from __future__ import annotations

from typing import NoReturn, cast

import torch
from torch import Generator, Tensor

from gibbsian.annealing import denoised
from gibbsian.bridges.gans import ddls
from gibbsian.energies.base import Energy
from gibbsian.energies.generators import GeneratorNetwork, WithGenerator
from gibbsian.energies.networks import Dense, Upsampling
from gibbsian.energies.neural import MLP, ConvEnergy
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.errors import OptionError
from gibbsian.families.base import (
    ANNEALED,
    OWN_DRAWS,
    ROWS_AT_ONCE,
    Family,
    Progress,
    grid_of,
    is_large_image,
    is_plane,
)
from gibbsian.families.networks import build_base, build_kernel, tuned_chains
from gibbsian.objectives.adversarial import Adversarial
from gibbsian.objectives.amortised import CooperativeLearning
from gibbsian.objectives.base import Objective
from gibbsian.objectives.parts import OfPart
from gibbsian.partition.base import LogZ
from gibbsian.partition.bracket import bracket
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples


class Cooperative(Family):
    """``cooperative``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build energy and generator."""
        return WithGenerator(_network(recipe) + build_base(recipe, data), build_generator(recipe))

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Leave both as they were built."""

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Cooperative learning."""
        learning = CooperativeLearning(
            cast(WithGenerator, energy).generator,
            build_kernel(recipe),
            recipe.chain_steps,
            recipe.data_noise or recipe.generator_noise,
            energy_penalty=recipe.energy_penalty,
            learning_rate_factor=recipe.generator_rate,
        )
        return OfPart(learning, "energy")

    @property
    def generator(self) -> GeneratorNetwork:
        """What proposes."""
        return cast(WithGenerator, self.energy).generator

    @property
    def unlabelled(self) -> Energy:
        """The energy without its generator."""
        return cast(WithGenerator, self.energy).energy

    @property
    def density(self) -> Energy:
        """The energy without its generator."""
        return self.unlabelled

    @property
    def base(self) -> Tractable:
        """The Gaussian that the energy contains."""
        return next(part for part in self.density.modules() if isinstance(part, Gaussian))

    def proposals(self, n: int, rng: Generator) -> Tensor:
        """Draw from the generator with its noise."""
        with torch.no_grad():
            x = self.generator.sample(n, rng)
        return x + (self.recipe.data_noise or self.recipe.generator_noise) * torch.randn(x.shape, generator=rng)

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Rows as they are."""
        return x, ""

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """The generator's draws, refined by chains as in training."""
        x = self.chains(n, rng, progress=progress).x
        if not (self.recipe.denoise and self.recipe.data_noise):
            return x
        return torch.cat([denoised(self.density, part, self.recipe.data_noise) for part in x.split(ROWS_AT_ONCE)])

    def chains(
        self,
        n: int,
        rng: Generator,
        steps: int | None = None,
        thin: int | None = None,
        start: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Chains from the generator's draws."""
        start = self.proposals(n, rng) if start is None else start
        return tuned_chains(self.density, self.base, self.recipe, n, rng, steps, thin, start, progress)

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """As `chains`."""
        return self.chains(n, rng, steps, thin)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """On a grid, or by annealing from the base and back."""
        if is_plane(self.recipe):
            return grid_of(self.density).log_z
        draws = self.chains(chains or 256, rng).x
        return bracket(self.density, self.base, draws, rng=rng, temperatures=temperatures)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Quadrature or annealing."""
        return ("quadrature", "") if is_plane(self.recipe) else (ANNEALED, OWN_DRAWS)


class Gans(Family):
    """``gan``."""

    row_chains = False

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build discriminator and generator."""
        return WithGenerator(_network(recipe), build_generator(recipe))

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Leave both as they were built."""

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """Adversarial training."""
        return OfPart(Adversarial(cast(WithGenerator, energy).generator, recipe.slope_penalty), "energy")

    @property
    def unlabelled(self) -> Energy:
        """Minus the discriminator's logit."""
        return cast(WithGenerator, self.energy).energy

    @property
    def density(self) -> Energy:
        """Minus the discriminator's logit: by it rows are scored, but it is a density over latents alone."""
        return self.unlabelled

    @property
    def base(self) -> Tractable:
        """A Gaussian of the recipe's scale; draws do not start there."""
        return Gaussian(self.recipe.shape, scale=self.recipe.base_scale)

    def blurred(self, x: Tensor, rng: Generator) -> tuple[Tensor, str]:
        """Rows as they are."""
        return x, ""

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Langevin chains over latents, driven by the discriminator."""
        model = cast(WithGenerator, self.energy)
        made = ddls(model.energy, model.generator, n, rng=rng, steps=self.recipe.sample_steps)
        if progress is not None:
            progress(self.recipe.sample_steps)
        return made.x

    def chains(
        self,
        n: int,
        rng: Generator,
        steps: int | None = None,
        thin: int | None = None,
        start: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """There are none over rows."""
        self._refuse()

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
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


def build_generator(recipe: Recipe) -> GeneratorNetwork:
    """Build a generator of rows from normal latents."""
    latent, shape, width = recipe.latent, recipe.shape, recipe.generator_width
    net = Upsampling(latent, shape, width) if is_large_image(recipe) else Dense(latent, shape, (width, width))
    return GeneratorNetwork(net, shape, latent)


def _network(recipe: Recipe) -> Energy:
    if is_large_image(recipe):
        return ConvEnergy(recipe.shape, (recipe.width, 2 * recipe.width))
    return MLP(recipe.shape, (recipe.width,) * recipe.depth, recipe.frequencies)
