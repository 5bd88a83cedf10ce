"""What ``gibbsian compose`` computes: one energy from a formula of trained models, and draws from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gibbsian.annealing import Annealing, denoised
from gibbsian.applications.composition import compose
from gibbsian.applications.constraints import Constraints, constraints
from gibbsian.applications.starts import ENOUGH, fitted_gaussian
from gibbsian.applications.terms import windowed
from gibbsian.energies.base import Combination, Energy, mixture
from gibbsian.energies.noise import NoiseConditionalEnergy
from gibbsian.energies.rescaled import rescaled
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.errors import OptionError, ShapeError
from gibbsian.expressions import Density, Mixture, Power, Product, Run, parse, runs_of
from gibbsian.kernels.base import evaluate
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.hmc import HMC
from gibbsian.labelled import label_codes, log_z_at_noise, of_label
from gibbsian.models import ROWS_AT_ONCE, Model, load_model
from gibbsian.partition.smc import smc
from gibbsian.runs import columns_of, require_same_columns, saved_log_z

if TYPE_CHECKING:
    from torch import Generator, Tensor

LEVELS, PARTICLES = 40, 1024
"""Noise levels, and particles at least, of a walk."""

POPULATIONS = 16

FEW_COORDINATES = 32
"""Up to so many coordinates particles are weighted unless it is asked otherwise: in more, a few outweigh the rest."""


@dataclass(frozen=True)
class Composite:
    """A formula with the models that it names, in the units of the first of them.

    Attributes
    ----------
    density
        The formula as it was read.
    models
        By folder, in the order of the formula.
    log_z
        Of each model's density, in its own model units, where it is known.
    """

    density: Density
    models: Mapping[str, Model]
    log_z: Mapping[str, float | None]

    @property
    def first(self) -> Model:
        """The model whose units are taken."""
        return next(iter(self.models.values()))

    @cached_property
    def has_levels(self) -> bool:
        """Whether every model has noise levels, which draws can then walk down."""
        return all(model.recipe.noise_conditional for model in self.models.values())

    @property
    def coordinates(self) -> int:
        """Numbers in a row."""
        return math.prod(self.first.recipe.shape)

    @property
    def is_binary(self) -> bool:
        """Whether the models are of zeros and ones."""
        return self.first.recipe.kind == "binary"

    @cached_property
    def energy(self) -> Energy:
        """The formula's energy, with the context ``sigma`` where it has levels."""
        return self._energy(self.density)

    def unit(self, model: Model) -> float:
        """How much of the first model's unit one of a model's units is: the mean over columns of its logarithm."""
        logs = [[math.log(b) for b in m.scaling.scale] for m in (model, self.first)]
        return math.exp(sum(logs[0]) / len(logs[0]) - sum(logs[1]) / len(logs[1]))

    def level(self, name: str) -> float:
        """The highest of the models' noise levels of a name, such as ``"sigma_max"``, in the units of the first."""
        return max(self.unit(m) * getattr(m.recipe, name) for m in self.models.values())

    def model(self, run: Run) -> Model:
        """The model that the formula names, of the one class where it names a label."""
        model = self.models[run.folder]
        if not model.family.of_rows:
            raise OptionError(
                f"{run.folder} is a {model.recipe.energy}, whose discriminator is no density of rows and cannot be "
                "multiplied or mixed with others. Compose models that have a density: any other of gibbsian train."
            )
        return model if run.label is None else of_label(model, label_codes(model, [run.label])[0])

    def of(self, run: Run) -> Energy:
        """The energy of a model that the formula names, in the units of the first one."""
        model = self.model(run)
        energy = model.unlabelled if self.has_levels else model.density
        here, there = self.first.scaling, model.scaling
        if there == here:
            return energy
        a, b = (torch.tensor(v, dtype=torch.float64) for v in (there.offset, there.scale))
        a0, b0 = (torch.tensor(v, dtype=torch.float64) for v in (here.offset, here.scale))
        return rescaled(energy, ((a - a0) / b0).squeeze(), (b / b0).squeeze())

    def _energy(self, density: Density) -> Energy:
        if isinstance(density, Run):
            if density.window is None:
                return self.of(density)
            if not self.has_levels:
                raise OptionError(
                    f"{density} is to act at some noise levels, and not every model of the formula has levels."
                )
            return windowed(self.of(density), *density.window)
        if isinstance(density, Power):
            return Combination([(density.exponent, self._energy(density.inside))])
        if isinstance(density, Product):
            return Combination([(1.0, self._energy(factor)) for factor in density.factors])
        masses = [self._mass(part) for part in density.parts]
        return mixture(*map(self._energy, density.parts), weights=density.weights, log_z=masses)

    def _mass(self, part: Density) -> float:
        """Log Z of a part of a mixture."""
        if isinstance(part, Mixture):
            return math.log(math.fsum(part.weights))
        if not isinstance(part, Run):
            raise OptionError(
                f"The mass of {part} is not known, so that a mixture would not have the shares that were asked. Mix "
                "models themselves, and multiply afterwards: (a + b) * c."
            )
        found = self.log_z[part.folder]
        if found is not None and part.label is None:
            return found
        model = self.model(part)
        if model.recipe.noise_conditional:
            # Training keeps it the same at all levels, and at the highest it is nearly that of a Gaussian.
            return float(log_z_at_noise(model.unlabelled.given(sigma=model.recipe.sigma_max), model.base))
        raise OptionError(
            f"A mixture needs the mass of each model, and log Z of {part.folder} is not known yet. Estimate it: "
            f"gibbsian evaluate {part.folder}"
        )


@dataclass(frozen=True)
class Drawn:
    """Draws of a formula, in data units, with what tells how far to trust them.

    Attributes
    ----------
    rows
        ``(n, *event)``.
    met
        How the draws, before any noise was taken out, meet each model of the formula.
    acceptance
        Mean acceptance of the chains, and the lowest at a level or temperature.
    ess
        The lowest effective number of particles on the way; ``None`` without weights.
    particles
        How many there were.
    stages
        Noise levels, or temperatures, walked through.
    log_z
        Of the composition, with its error, in the first model's units: what overlap is left of a product of normalised
        densities. Empty without weights.
    """

    rows: Tensor
    met: Constraints
    acceptance: tuple[float, float]
    ess: float | None
    particles: int
    stages: str
    log_z: str

    def __str__(self) -> str:
        """A few lines and the table."""
        lines = [f"{self.stages}; acceptance {self.acceptance[0]:.2f}, lowest {self.acceptance[1]:.2f}"]
        if self.ess is not None:
            copies = "" if self.ess >= len(self.rows) else "; draws are fewer than that apart: use more --particles"
            lines.append(f"at least {self.ess:.0f} of {self.particles} particles effective{copies}")
            lines.append(f"log Z of the composition: {self.log_z}")
        return "\n".join([*lines, str(self.met)])


def composite(formula: str) -> Composite:
    """Read a formula and load its models.

    Raises
    ------
    OptionError
        If it cannot be read.
    ModelFileError
        If a model cannot be loaded.
    ShapeError, DataError
        If the models are of other rows.
    """
    density = parse(formula)
    folders = list(dict.fromkeys(run.folder for run in runs_of(density)))
    models = {folder: load_model(folder) for folder in folders}
    first, *others = folders
    for folder in others:
        one, other = models[first].recipe, models[folder].recipe
        if tuple(one.shape) != tuple(other.shape) or (one.kind == "binary") != (other.kind == "binary"):
            raise ShapeError(
                f"Densities of one kind of row are composed: {first} is of {one.kind} rows of shape {one.shape}, "
                f"{folder} of {other.kind} rows of shape {other.shape}."
            )
        require_same_columns(columns_of(Path(first)), columns_of(Path(folder)), folder)
    return Composite(density, models, {folder: saved_log_z(Path(folder)) for folder in folders})


def draw(
    found: Composite,
    n: int,
    rng: Generator,
    *,
    particles: int | None = None,
    levels: int = LEVELS,
    steps: int = 5,
    weights: bool | None = None,
    progress: Callable[[int], object] | None = None,
) -> Drawn:
    """Draw from a formula: down the noise levels of its models, or along temperatures where one has none.

    Parameters
    ----------
    found
        The formula with its models.
    n
        Rows to draw.
    rng
        The generator.
    particles
        Of the walk; with weights at least four for each row when ``None``, without one.
    levels
        Noise levels.
    steps
        Of the chain at each level or temperature.
    weights
        Whether particles are weighted on their way down noise levels; up to 32 coordinates when ``None``. Without
        weights it is for the chains to bring each level's masses about.
    progress
        Called with 1 after each level.

    Raises
    ------
    OptionError
        If a count is below its least, or the formula asks for what a model does not have.
    """
    if min(n, levels - 1, steps) < 1 or (particles is not None and particles < n):
        raise OptionError(
            f"n and steps are 1 or more, levels 2 or more, particles n or more; got n={n}, steps={steps}, "
            f"levels={levels}, particles={particles}."
        )
    weights = (found.coordinates <= FEW_COORDINATES) if weights is None or not found.has_levels else weights
    count = particles or (max(PARTICLES, 4 * n) if weights or not found.has_levels else n)
    count = max(2, -(-count // POPULATIONS)) * POPULATIONS
    if found.has_levels:
        return _down_levels(found, n, rng, count, levels, steps, weights, progress)
    return _along_temperatures(found, n, rng, count, steps)


def _down_levels(
    found: Composite,
    n: int,
    rng: Generator,
    particles: int,
    levels: int,
    steps: int,
    weights: bool,
    progress: Callable[[int], object] | None,
) -> Drawn:
    energy, recipe = found.energy, found.first.recipe
    low, high = found.level("sigma_min" if recipe.denoise else "sigma_density"), found.level("sigma_max")
    told = Annealing(high, low, levels - 1).sigmas()
    done = compose(
        energy,
        told,
        rng=rng,
        chains=particles,
        steps=steps,
        start=_start(found, energy.given(sigma=high), high, rng),
        weights=weights,
        populations=POPULATIONS,
        progress=progress,
    )
    x = done.draw(n, rng)
    met = _met(found, x, rng, sigma=low)
    if recipe.denoise:
        at = energy.given(sigma=low)
        x = torch.cat([denoised(at, part, low) for part in x.split(ROWS_AT_ONCE)])
    acceptance = (float(done.acceptance.mean()), float(done.acceptance.min()))
    stages = f"{levels} noise levels from {high:.3g} to {low:.3g}, {done.correction}"
    rows = found.first.scaling.backward(x)
    ess, log_z = (float(done.ess.min()), str(done.log_z)) if weights else (None, "")
    return Drawn(rows, met, acceptance, ess, particles, stages, log_z)


def _start(found: Composite, top: Energy, sigma: float, rng: Generator) -> Tractable | None:
    """Leave the start to be found, unless no Gaussian comes close; then temperatures lead on from the first model's."""
    around = next(p for p in found.first.energy.modules() if isinstance(p, NoiseConditionalEnergy)).base(sigma)
    base, explained = fitted_gaussian(lambda x: -evaluate(top, x)[1], around, rng)
    return None if base is not None and explained >= ENOUGH else around


def _along_temperatures(found: Composite, n: int, rng: Generator, particles: int, steps: int) -> Drawn:
    kernel = GibbsWithGradients() if found.is_binary else HMC(0.1, leapfrog=5)
    moves = steps * (found.first.recipe.shape[0] if found.is_binary else 1)
    done = smc(
        found.energy, _wide(found), rng=rng, kernel=kernel, chains=particles, populations=POPULATIONS, moves=moves
    )
    x = done.draw(n, rng)
    acceptance = (float(done.acceptance.mean()), float(done.acceptance.min()))
    stages = f"{len(done.schedule.betas)} temperatures, weights and moves"
    rows = found.first.scaling.backward(x)
    met = _met(found, x, rng)
    return Drawn(rows, met, acceptance, float(done.ess.min()), particles, stages, str(done.log_z))


def _wide(found: Composite) -> Tractable:
    """A density that is about as wide as all models together, in the units of the first."""
    if found.is_binary:
        return found.first.base
    shape = tuple(found.first.recipe.shape)
    ends = []
    for model in found.models.values():
        reach = 1.5 * model.recipe.base_scale
        for side in (-reach, reach):
            ends.append(found.first.scaling.forward(model.scaling.backward(torch.full((1, *shape), side)))[0])
    low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    return Gaussian(loc=(low + high) / 2, scale=(high - low) / 3)


def _met(found: Composite, x: Tensor, rng: Generator, sigma: float | None = None) -> Constraints:
    """Compare draws with each model's own."""
    terms, own, names = [], [], []
    for run, sign in _signed(found.density):
        model, one = found.model(run), found.of(run)
        # Judged as one term, where the algebra would write out its own.
        terms.append((sign, Energy.of(one.forward, one.event_shape, one.support, one.context)))
        names.append(str(run))
        z = own_draws(model, len(x), rng, None if sigma is None else sigma / found.unit(model))
        own.append(found.first.scaling.forward(model.scaling.backward(z)))
    return constraints(Combination(terms), x, own, sigma=sigma, names=names)


def own_draws(model: Model, n: int, rng: Generator, sigma: float | None) -> Tensor:
    """Draws of a model by itself, in model units."""
    return model.draw_scaled(n, rng, sigma=sigma) if sigma is not None else model.exact_chains(n, rng, steps=50).x


def _signed(density: Density, sign: float = 1.0) -> Iterator[tuple[Run, float]]:
    """Every model with the sign of its power."""
    if isinstance(density, Run):
        yield density, sign
    elif isinstance(density, Power):
        yield from _signed(density.inside, math.copysign(sign, sign * density.exponent))
    else:
        for part in density.factors if isinstance(density, Product) else density.parts:
            yield from _signed(part, sign)
