"""A trained model: an energy with its recipe and scaling, and what one asks of it, in the data's own units.

A saved model is a folder of ``model.safetensors`` and ``recipe.json``; no pickle is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.annealing import anneal, denoised
from gibbsian.building import base_of, build_annealing, build_energy, build_kernel
from gibbsian.data.scaling import Scaling
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.noise import NoiseConditionalEnergy
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DivergenceError, ModelFileError, OptionError, StorageError
from gibbsian.files import replace_file
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import ULA
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.partition.base import LogZ
from gibbsian.partition.boltzmann import exact_log_z, rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.exact import quadrature
from gibbsian.partition.paths import Path as EnergyPath
from gibbsian.partition.paths import noise_levels
from gibbsian.partition.smc import smc
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample

WEIGHTS, RECIPE = "model.safetensors", "recipe.json"
ROWS_AT_ONCE = 8192

QUICK_STATES = 1 << 20
"""States of a machine's smaller layer up to which log Z is a sum over them: some seconds."""

PARTICLES = 256
"""Particles at least that are carried to a machine, from which draws are taken."""


@dataclass(frozen=True)
class Model:
    """A fitted energy, ready to draw and score.

    Attributes
    ----------
    energy
        As it was trained; conditional on ``sigma`` where it has noise levels, and on a label ``y`` where the recipe is
        conditional.
    recipe
        How it was made.
    scaling
        From data units to model units.
    """

    energy: Energy
    recipe: Recipe
    scaling: Scaling

    def __post_init__(self) -> None:
        # What follows the weights in training (spectral norms) stands still: a saved model is the same once loaded.
        self.energy.eval()

    @property
    def unlabelled(self) -> Energy:
        """The energy of rows of all classes together: the branch without label, or all classes' mixture without one.

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
        """The energy of rows in model units, at the noise level ``sigma_density`` where it has levels."""
        energy = self.unlabelled
        return energy.given(sigma=self.recipe.sigma_density) if self.recipe.noise_conditional else energy

    @property
    def base(self) -> Tractable:
        """The tractable density where sampling and annealing start, in model units."""
        if self.recipe.noise_conditional:
            levels = next(part for part in self.energy.modules() if isinstance(part, NoiseConditionalEnergy))
            return levels.base(self.recipe.sigma_max)
        return base_of(self.recipe, self.energy)

    @torch.no_grad()
    def energies(self, x: Tensor) -> Tensor:
        """Energies of rows in data units, ``(n, *event) -> (n,)``, in nats; additive constants as trained.

        Raises
        ------
        DomainError
            If rows of a machine on bits hold anything else.
        """
        z = self.scaling.forward(x)
        if isinstance(self.energy, RBM):
            self.energy.check_states(z, "the rows")
        return torch.cat([self.density(part) for part in z.split(ROWS_AT_ONCE)])

    def log_density(self, x: Tensor) -> Tensor:
        """Unnormalised log-density in data units: minus the energy plus the scaling's constant; log Z is not in it."""
        return self.scaling.log_det - self.energies(x)

    def draw(self, n: int, rng: Generator, progress: Callable[[int], object] | None = None) -> Tensor:
        """Draw ``n`` rows in data units.

        Parameters
        ----------
        n
            How many.
        rng
            The generator.
        progress
            Called now and then with a number of steps made.
        """
        return self.scaling.backward(self.draw_scaled(n, rng, progress))

    def draw_scaled(
        self,
        n: int,
        rng: Generator,
        progress: Callable[[int], object] | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Draw ``n`` rows in model units: of the density at the noise level ``sigma``, or of the data when ``None``."""
        if n < 1:
            raise OptionError(f"n counts the draws, 1 or more; got {n}.")
        if not self.recipe.noise_conditional:
            x = self.chains(n, rng, progress=progress).x
            if not (self.recipe.denoise and self.recipe.objective == "pcd"):
                return x
            return torch.cat([denoised(self.density, part, self.recipe.data_noise) for part in x.split(ROWS_AT_ONCE)])
        start = self.base.sample(n, rng)
        annealing = build_annealing(self.recipe)
        if sigma is not None:
            annealing = dataclasses.replace(annealing, sigma_min=sigma, denoise=False)
        energy = self.unlabelled
        parts = [anneal(energy, part, annealing, rng=rng, progress=progress) for part in start.split(ROWS_AT_ONCE)]
        return torch.cat(parts)

    def chains(
        self,
        n: int,
        rng: Generator,
        steps: int | None = None,
        thin: int | None = None,
        start: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Run chains on the density, from draws of the base resampled by their weights, with a tuned step size.

        Chains of a restricted Boltzmann machine start at particles that were carried to it from its base.

        Parameters
        ----------
        n
            Chains.
        rng
            The generator.
        steps
            After tuning; the recipe's when ``None``.
        thin
            Keep every ``thin``-th position.
        start
            Positions in model units, instead of resampled draws of the base.
        progress
            Called with the number of steps made.
        """
        energy, kernel = self.density, build_kernel(self.recipe)
        if start is None:
            machine = energy if isinstance(energy, RBM) else None
            start = resampled(energy, self.base, n, rng) if machine is None else carried(machine, self.base, n, rng)
        steps = self.recipe.sample_steps if steps is None else steps
        if not isinstance(kernel, (ULA, RBMGibbs)):
            # A step size needs no more chains than these to be known to a per cent.
            kernel = tune(energy, kernel, start[:512], rng=rng, steps=min(200, max(100, steps))).kernel
        return sample(energy, kernel, start, steps=steps, thin=thin, rng=rng, progress=progress or False)

    def log_z(self, rng: Generator, temperatures: int | None = None, chains: int | None = None) -> LogZ:
        """Estimate log Z of `density`, in model units.

        By quadrature in one and two dimensions, and for a machine with a layer small enough by summing it out; else by
        annealing there and back, where the upper bound takes for exact draws the model's own, after exact chains from
        them.

        Parameters
        ----------
        rng
            The generator.
        temperatures
            Of the annealing; 1000 down noise levels, else as many as a pilot run finds fit, when ``None``.
        chains
            Of the annealing, each way; 128 down noise levels, else 256, when ``None``.
        """
        if self.is_summed:
            return exact_log_z(self.density)
        if self.is_integrated:
            return self.grid().log_z
        if isinstance(self.energy, RBM):
            # The base is made of other draws than those that are annealed to it.
            draws = self.chains(2 * (chains or 256), rng).x
            base, draws = self.energy.base(draws[::2]), draws[1::2]
            along, kernel = rbm_path(base, self.energy), build_kernel(self.recipe)
            return bracket(self.density, base, draws, rng=rng, path=along, kernel=kernel, temperatures=temperatures)
        path: EnergyPath | None = None
        if self.recipe.noise_conditional:
            levels = [self.recipe.sigma_max, self.recipe.sigma_density]
            path = noise_levels(self.unlabelled, levels, self.base, share=0.02)
            # More temperatures narrow the bracket more than more chains in the same time.
            temperatures, chains = temperatures or 1000, chains or 128
        draws = self.exact_chains(chains or 256, rng, steps=50).x
        return bracket(self.density, self.base, draws, rng=rng, path=path, temperatures=temperatures)

    @property
    def is_summed(self) -> bool:
        """Whether log Z is a sum over all states of a machine's smaller layer."""
        if not isinstance(self.energy, RBM):
            return False
        counts = [units.count for units in (self.energy.visible, self.energy.hidden)]
        return min((count for count in counts if count is not None), default=math.inf) <= QUICK_STATES

    @property
    def is_integrated(self) -> bool:
        """Whether log Z is an integral over a grid: of real numbers, in one and two dimensions."""
        return self.recipe.shape in ((1,), (2,)) and self.recipe.kind != "binary"

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """Run chains that leave `density` invariant, from the model's own draws."""
        if not self.recipe.noise_conditional:
            return self.chains(n, rng, thin=thin)
        start = self.draw_scaled(n, rng, sigma=self.recipe.sigma_density)
        tuned = tune(self.density, HMC(0.5 * self.recipe.sigma_density, leapfrog=5), start, rng=rng, steps=40)
        return sample(self.density, tuned.kernel, tuned.state, steps=steps, thin=thin, rng=rng)

    def grid(self, points: int = 400):  # noqa: ANN201
        """Integrate a density of one or two dimensions over a box that holds it; see `gibbsian.quadrature`."""
        reach = 2.0
        while True:
            try:
                return quadrature(self.density, -reach, reach, points)
            except ValueError:
                if reach > 40.0:
                    raise
                reach *= 1.25


@torch.no_grad()
def resampled(energy: Energy, base: Tractable, n: int, rng: Generator, candidates: int = 32) -> Tensor:
    """Draw from a base and resample by importance weights: starting points in the right proportions where it covers.

    Parameters
    ----------
    energy
        The density sought.
    base
        The proposal.
    n
        Points wanted.
    candidates
        Proposals per point; fewer, with replacement, in many dimensions would be copies, so none are resampled there.
    rng
        The generator.
    """
    if base.event_shape.numel() > 10:
        return base.sample(n, rng)
    x = base.sample(candidates * n, rng)
    log_w = torch.cat([base(part) - energy(part) for part in x.split(ROWS_AT_ONCE)])
    log_w = torch.where(torch.isfinite(log_w), log_w, -math.inf)
    if not bool(torch.isfinite(log_w).any()):
        raise DivergenceError("The energy is not finite at any draw of its base; the model is broken. Train it again.")
    chosen = torch.multinomial((log_w - log_w.max()).double().exp(), n, replacement=True, generator=rng)
    return x[chosen]


def carried(energy: RBM, base: Tractable, n: int, rng: Generator) -> Tensor:
    """Draw from a machine by sequential Monte Carlo along the machines between its base and it.

    Chains that start at the base find some of the modes and stay there; particles come to all of them in proportion.

    Parameters
    ----------
    energy, base
        The machine, and independent units of its kind.
    n
        Points wanted; of some there may be copies, which part as chains go on from them.
    rng
        The generator.
    """
    chains = max(PARTICLES, 2 * -(-n // 2))
    path = rbm_path(base, energy)
    found = smc(energy, base, rng=rng, kernel=RBMGibbs(), chains=chains, populations=2, moves=2, path=path)
    x = found.draw(n, rng)
    return x[torch.randperm(n, generator=rng)]


def save_model(folder: str | Path, model: Model) -> Path:
    """Write a model's folder; each file is replaced in one move, so that a failure leaves the old one.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    from safetensors.torch import save

    home = Path(folder)
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.energy.state_dict().items()}
    recipe = {"recipe": model.recipe.to_dict(), "scaling": model.scaling.to_dict()}
    try:
        home.mkdir(parents=True, exist_ok=True)
        replace_file(home / WEIGHTS, save(weights))
        replace_file(home / RECIPE, json.dumps(recipe, indent=2).encode())
    except OSError as error:
        raise StorageError(
            f"The model could not be saved in {home}: {error}. Free some space or choose another folder; files that "
            "were there before are intact."
        ) from error
    return home


def load_model(folder: str | Path) -> Model:
    """Rebuild a saved model.

    Raises
    ------
    ModelFileError
        If a file is missing, damaged, of a newer version, or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    home = Path(folder)
    parts = {}
    for name in (RECIPE, WEIGHTS):
        try:
            parts[name] = (home / name).read_bytes()
        except OSError as error:
            there = "" if home.is_dir() else f" There is no folder {home}."
            raise ModelFileError(
                f"A saved model is a folder with {WEIGHTS} and {RECIPE}; {home / name} cannot be read "
                f"({error.strerror}).{there} Train one: gibbsian train DATA --out {home}"
            ) from error
    try:
        saved = json.loads(parts[RECIPE])
        recipe, scaling = Recipe.from_dict(saved["recipe"]), Scaling.from_dict(saved["scaling"])
        energy = build_energy(recipe)
    except ModelFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelFileError(
            f"{home / RECIPE} is damaged: {error}. Train the model again or restore the file."
        ) from error
    try:
        weights = load(parts[WEIGHTS])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"{home / WEIGHTS} is truncated or damaged: {error}. Restore it, or rebuild it from the run's checkpoints: "
            "gibbsian train ... --resume."
        ) from error
    _fit_weights(energy, weights, home)
    return Model(energy, recipe, scaling)


def _fit_weights(energy: Energy, weights: dict[str, Tensor], home: Path) -> None:
    expected = energy.state_dict()
    wrong = [
        f"{name} has shape {tuple(weights[name].shape)}, not {tuple(value.shape)}"
        if name in weights
        else f"{name} is missing"
        for name, value in expected.items()
        if name not in weights or weights[name].shape != value.shape
    ]
    wrong += [f"{name} is not part of the model" for name in weights if name not in expected]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ModelFileError(
            f"The weights in {home / WEIGHTS} do not fit the recipe beside them: {'; '.join(wrong[:3])}{more}. The two "
            "files come from different models."
        )
    energy.load_state_dict(weights)
