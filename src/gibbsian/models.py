"""A trained model: an energy with its recipe and scaling, and what one asks of it, in the data's own units.

A saved model is a folder of ``model.safetensors`` and ``recipe.json``; no pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Generator, Tensor

from gibbsian.building import build_energy, family_of
from gibbsian.chain_lanes import in_parts
from gibbsian.data.scaling import Scaling
from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.families.base import ROWS_AT_ONCE, Family, Walk, grid_of, is_plane
from gibbsian.files import replace_file
from gibbsian.partition.base import LogZ
from gibbsian.processes.lanes import Lanes
from gibbsian.processes.work import over_lanes
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples

WEIGHTS, RECIPE = "model.safetensors", "recipe.json"


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

    @cached_property
    def family(self) -> Family:
        """What the energy's family can do with it, in model units."""
        return family_of(self.recipe)(self.energy, self.recipe)

    @property
    def value_range(self) -> tuple[float, float] | None:
        """From black to white, in the data's units; ``None`` where rows are no images."""
        if len(self.recipe.shape) != 3:
            return None
        if self.recipe.kind == "binary":
            return 0.0, 1.0
        (offset,), (scale,) = self.scaling.offset, self.scaling.scale
        return offset - scale, offset + scale

    @property
    def unlabelled(self) -> Energy:
        """The energy of rows of all classes together: the branch without label, or all classes' mixture without one."""
        return self.family.unlabelled

    @property
    def density(self) -> Energy:
        """The energy of rows in model units, at the noise level ``sigma_density`` where it has levels."""
        return self.family.density

    @property
    def base(self) -> Tractable:
        """The tractable density where sampling and annealing start, in model units."""
        return self.family.base

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

    def draw(
        self,
        n: int,
        rng: Generator,
        progress: Callable[[int], object] | None = None,
        lanes: int | None = None,
    ) -> Tensor:
        """Draw ``n`` rows in data units.

        Parameters
        ----------
        n
            How many.
        rng
            The generator; with lanes in the same state on every process.
        progress
            Called now and then with a number of steps made.
        lanes
            Shares of the rows, each drawn by itself with random numbers of its own (what is tuned is tuned in each),
            among the processes of a job. All rows are returned on each, and do not depend on how many there are.
        """
        if lanes is None:
            return self.scaling.backward(self.draw_scaled(n, rng, progress))
        if n < 1:
            raise OptionError(f"n counts the draws, 1 or more; got {n}.")
        # Equal shares of no fewer rows; the last one's surplus is left out.
        total, told = Lanes(lanes).count * -(-n // lanes), in_parts(progress or (lambda _: None), len(Lanes(lanes).own))
        work = lambda rows, own: (self.draw_scaled(rows.stop - rows.start, own, told),)  # noqa: E731
        return self.scaling.backward(over_lanes(lanes, total, rng, work, "draws")[0][:n])

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
        return self.family.draw(n, rng, progress, sigma)

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
        return self.family.chains(n, rng, Walk(steps, thin, start, progress))

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
        return self.family.log_z(rng, temperatures, chains)

    @property
    def log_z_told(self) -> tuple[str, str]:
        """How log Z is found, in words, and what to keep in mind of it, or nothing."""
        return self.family.log_z_told

    @property
    def is_integrated(self) -> bool:
        """Whether the density can be summed over a grid: of real numbers, in one and two dimensions."""
        return is_plane(self.recipe)

    def exact_chains(self, n: int, rng: Generator, steps: int, thin: int | None = None) -> Samples:
        """Run chains that leave `density` invariant, from the model's own draws."""
        return self.family.exact_chains(n, rng, steps, thin)

    def grid(self, points: int = 400):  # noqa: ANN201
        """Integrate a density of one or two dimensions over a box that holds it; see `gibbsian.quadrature`."""
        return grid_of(self.density, points)


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
