"""Autoencoders as densities: a decoder with a normal prior, with a learned one, and with a learned correction."""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.energies.base import Energy
from gibbsian.energies.decoders import BernoulliDecoder, Decoder, Directed, GaussianDecoder
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.networks import Dense
from gibbsian.energies.neural import MLP
from gibbsian.energies.reparametrised import VAEBM, Reparametrised
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.energies.variational import vae
from gibbsian.families.base import (
    ANNEALED,
    OWN_DRAWS,
    ROWS_AT_ONCE,
    USUAL,
    PlainFamily,
    Progress,
    Walk,
    first_steps,
    walked,
)
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.base import Objective
from gibbsian.objectives.combination import Phases
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.objectives.correction import CorrectionLikelihood
from gibbsian.objectives.latent import LatentPriorLikelihood
from gibbsian.objectives.parts import OfPart
from gibbsian.objectives.variational import EvidenceLowerBound
from gibbsian.partition.base import LogZ, exactly
from gibbsian.partition.bracket import bracket
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample

ESTIMATED = "Energies of rows are estimates by draws of the encoder, too large on average."

LEAPFROG, JITTER = 5, 0.4
"""Of Hamiltonian chains over latents: trajectories of one length would go in circles where the law is normal."""

PRIOR_WIDTH, PRIOR_STEP = 128, 0.1
"""Width of the layers of a prior's energy, and the step of its chains."""

ENCODED = 16
"""Draws of the encoder by which the energy of a row is estimated."""


class _Decoded(PlainFamily):
    """What models with a decoder share: points are made of latent ones. Abstract."""

    @classmethod
    def prepare(cls, recipe: Recipe, energy: Energy, data: Tensor) -> None:
        """Leave it as it was built."""

    @property
    def density(self) -> Energy:
        """The energy of rows, estimated with the draws that it keeps."""
        return self.energy

    @property
    def base(self) -> Tractable:
        """A Gaussian of the recipe's scale; draws do not start there."""
        return Gaussian(self.recipe.shape, scale=self.recipe.base_scale)

    def chains(self, n: int, rng: Generator, walk: Walk = USUAL) -> Samples:
        """Langevin chains on the energy of rows, from the model's draws."""
        start = self.draw(n, rng) if walk.start is None else walk.start
        # An energy of a row costs many passes of the decoder.
        return walked(self.density, start, self.recipe, rng, walk, tuned=64)


class Autoencoders(_Decoded):
    """``vae``."""

    exact_draws = True

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build encoder and decoder."""
        return build_vae(recipe)

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """The evidence lower bound."""
        return EvidenceLowerBound()

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Decode draws of the prior."""
        model = directed(self.energy)
        return decoded(model, cast(Tractable, model.prior).sample(n, rng), self.recipe.denoise, rng)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """0: it is normalised."""
        return exactly(torch.zeros((), dtype=torch.float64))

    @property
    def log_z_told(self) -> tuple[str, str]:
        """That it is known."""
        return "the autoencoder, which is normalised", ESTIMATED


class CorrectedAutoencoders(_Decoded):
    """``vae-ebm``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the autoencoder and its correction."""
        model = VAEBM(build_vae(recipe), MLP(recipe.shape, hidden_of(recipe)))
        model.vae.requires_grad_(True)  # it learns first
        return model

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """The autoencoder by its bound, and then the correction by chains over latents and noise."""
        chains = CorrectionLikelihood(
            HMC(recipe.step_size, leapfrog=LEAPFROG, jitter=JITTER),
            cast(VAEBM, energy).base,
            recipe.chain_steps,
            recipe.buffer_size,
            recipe.restart,
            recipe.energy_penalty,
        )
        return Phases([(first_steps(recipe), OfPart(EvidenceLowerBound(), "vae")), (None, OfPart(chains, held="vae"))])

    @property
    def walked(self) -> Reparametrised:
        """The energy of latents and noise."""
        return cast(VAEBM, self.energy).reparametrised

    def noises(self, n: int, rng: Generator, progress: Progress | None = None) -> Tensor:
        """Where chains over latents and noise end, from the autoencoder's own."""
        return latent_chains(self.walked, self.walked.base.sample(n, rng), self.recipe.sample_steps, rng, progress)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Chains over latents and noise, decoded."""
        u = self.noises(n, rng, progress)
        with torch.no_grad():
            return self.walked.means(u) if self.recipe.denoise else self.walked.points(u)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """Annealing over latents and noise, from the autoencoder and back."""
        draws = self.noises(chains or 256, rng)
        return bracket(self.walked, self.walked.base, draws, rng=rng, temperatures=temperatures)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Annealing over latents and noise."""
        return f"{ANNEALED}, over latents and noise", f"{OWN_DRAWS} {ESTIMATED}"


class LatentPriors(_Decoded):
    """``latent-ebm``."""

    @classmethod
    def build(cls, recipe: Recipe, data: Tensor | None = None) -> Energy:
        """Build the autoencoder and the energy of its latents."""
        return LatentPrior(build_vae(recipe), MLP(recipe.latent, (PRIOR_WIDTH,) * 2))

    @classmethod
    def objective(cls, recipe: Recipe, energy: Energy, data: Tensor) -> Objective:
        """The autoencoder by its bound, and then decoder and prior by chains over latents, given data and without."""
        normal = Gaussian(recipe.latent)
        prior = PersistentContrastiveDivergence(
            MALA(PRIOR_STEP), normal, recipe.chain_steps, recipe.buffer_size, recipe.restart
        )
        both = LatentPriorLikelihood(prior, MALA(recipe.step_size), recipe.chain_steps)
        first = OfPart(EvidenceLowerBound(), "vae")
        return Phases([(first_steps(recipe), first), (None, OfPart(both, "model"))])

    @property
    def prior(self) -> Energy:
        """The energy of latents."""
        return directed(cast(LatentPrior, self.energy).model).prior

    def latents(self, n: int, rng: Generator, progress: Progress | None = None) -> Tensor:
        """Where chains on the prior end."""
        start = Gaussian(self.recipe.latent).sample(n, rng)
        return latent_chains(self.prior, start, self.recipe.sample_steps, rng, progress)

    def draw(self, n: int, rng: Generator, progress: Progress | None = None, sigma: float | None = None) -> Tensor:
        """Chains on the prior, decoded."""
        model = directed(cast(LatentPrior, self.energy).model)
        return decoded(model, self.latents(n, rng, progress), self.recipe.denoise, rng)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """That of the prior, by annealing: the likelihood is normalised."""
        draws = self.latents(chains or 256, rng)
        return bracket(self.prior, Gaussian(self.recipe.latent), draws, rng=rng, temperatures=temperatures)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """Annealing of the prior."""
        return f"{ANNEALED}, of the prior over latents", f"{OWN_DRAWS} {ESTIMATED}"


class LatentPrior(Energy):
    """An autoencoder whose latents have an energy beside their normal law, as one module to train and to save.

    Attributes
    ----------
    vae
        With the normal law alone, which a bound can fit.
    net
        What the energy of latents adds.
    """

    def __init__(self, vae: LatentEnergy, net: Energy) -> None:
        super().__init__()
        self.vae, self.net = vae, net
        self.event_shape, self.support = vae.event_shape, vae.support
        own = directed(vae)
        # Made of the same parts; in a tuple, for a module held twice would be saved twice.
        self._model = (LatentEnergy(Directed(net + own.prior, own.likelihood), vae.latents),)

    @property
    def model(self) -> LatentEnergy:
        """The whole, with the energy of latents."""
        return self._model[0]

    def forward(self, x: Tensor) -> Tensor:
        """Free energy of each row, ``(n,)``."""
        return self.model(x)

    def extra_repr(self) -> str:
        """The whole."""
        return f"{self.model!r}"


def build_vae(recipe: Recipe) -> LatentEnergy:
    """Build an autoencoder by the recipe, of dense networks, whose decoder's noise is learned."""
    shape, hidden, size = tuple(recipe.shape), hidden_of(recipe), recipe.latent
    net, encoder = Dense(size, shape, hidden), Dense(shape, 2 * size, hidden)
    if recipe.kind == "binary":
        decoder: Decoder = BernoulliDecoder(net, shape, latent=size)
    else:
        decoder = GaussianDecoder(net, shape, recipe.decoder_scale, learn_scale=True, latent=size)
    rng = Generator().manual_seed(recipe.seed)
    return vae(shape, size, rng=rng, decoder=decoder, encoder=encoder, draws=ENCODED)


def hidden_of(recipe: Recipe) -> tuple[int, ...]:
    """Widths of the networks' hidden layers."""
    return (recipe.width,) * recipe.depth


def directed(energy: Energy) -> Directed:
    """Find prior and decoder."""
    return cast(Directed, cast(LatentEnergy, energy).energy)


@torch.no_grad()
def decoded(model: Directed, z: Tensor, means: bool, rng: Generator) -> Tensor:
    """Make points of latents: the decoder's means, or draws with its noise."""
    parts = z.split(ROWS_AT_ONCE)
    return torch.cat([model.likelihood.mean(z) if means else model.likelihood.sample(z, rng) for z in parts])


def latent_chains(energy: Energy, start: Tensor, steps: int, rng: Generator, progress: Progress | None) -> Tensor:
    """Run Hamiltonian chains in a latent space, where the base is standard normal."""
    tuned = tune(energy, HMC(0.2, leapfrog=LEAPFROG, jitter=JITTER), start[:512], rng=rng, steps=100)
    return sample(energy, tuned.kernel, start, steps=steps, rng=rng, progress=progress or False).x
