"""Recipes: which energy, objective, sampler and settings suit which kind of data.

A recipe is a frozen dataclass of plain values. The command line overrides it field by field, the estimator carries it,
and a saved model is rebuilt from it. Its names become objects in `gibbsian.building` and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from gibbsian.errors import ModelFileError, OptionError, unknown_name
from gibbsian.training.settings import TrainingSettings

VERSION = 1
"""Version of the recipe's format; a saved recipe of a later one is refused."""

DataKind = Literal["image", "table", "binary"]
EnergyName = Literal["noise-conditional", "unet", "mlp", "convolutional", "residual", "rbm"]
WITH_LEVELS = ("noise-conditional", "unet")
"""Energies with noise levels."""

ObjectiveName = Literal[
    "multi-level-denoising",
    "denoising",
    "noise-contrastive",
    "ranking-nce",
    "conditional-nce",
    "score-matching",
    "sliced-score-matching",
    "energy-discrepancy",
    "exact-likelihood",
    "pcd",
    "cd",
]
KernelName = Literal["ula", "mala", "hmc", "gibbs"]
VisibleName = Literal["bernoulli", "gaussian"]


def _option(default: Any, help: str, aliases: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "aliases": aliases})


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a model besides the data; lengths are in model units (see `gibbsian.data.Scaling`).

    Each field's ``metadata["help"]`` says what it means; the command line prints it.

    Raises
    ------
    OptionError
        If a name is unknown (the nearest is suggested) or objective and energy do not fit.
    """

    kind: DataKind = _option("table", "What the rows are: image, table or binary.")
    shape: tuple[int, ...] = _option((2,), "Shape of one row.")
    energy: EnergyName = _option(
        "noise-conditional",
        "The network: noise-conditional, unet (for images), mlp, convolutional or residual; or rbm, a restricted "
        "Boltzmann machine.",
        ("--model",),
    )
    width: int = _option(
        256, "Hidden units per layer, or of an rbm; feature maps of the first layer of a convolutional energy."
    )
    depth: int = _option(3, "Residual blocks, hidden layers, or convolutional stages.")
    frequencies: int = _option(0, "Octaves of Fourier features per coordinate; for few dimensions.")
    local: int = _option(0, "One-dimensional terms per coordinate of a noise-conditional energy.")
    conditional: bool = _option(
        False, "Learn each class by its label, too, with an energy of noise levels; the data need labels."
    )
    label_dropping: float = _option(
        0.1, "Part of the labels dropped in training, which teaches rows of all classes; 0 leaves nothing to guide by."
    )
    class_names: tuple[str, ...] = _option((), "What the classes are called, as the data tell.")
    dropout: float = _option(0.0, "Part of a noise-conditional energy's hidden units dropped at random in training.")
    gain: float = _option(
        1.0, "How a noise-conditional energy grows as the noise vanishes: 1 images, 0 few dimensions."
    )
    spectral_norm: bool = _option(False, "Bound the slope of an mlp, convolutional or residual energy.")
    visible: VisibleName = _option(
        "bernoulli", "Units of an rbm's data: bernoulli for bits, gaussian for real numbers."
    )
    centred: bool = _option(True, "Train an rbm with offsets that follow the means of its units.")
    base_scale: float = _option(
        1.3, "Standard deviation of the Gaussian base of an energy without noise levels, or of an rbm's Gaussian units."
    )
    base_fitted: bool = _option(False, "Center the base at the data's mean, as wide as data_noise; see `build_base`.")
    objective: ObjectiveName = _option(
        "multi-level-denoising",
        "How it is fitted: multi-level-denoising, denoising, noise-contrastive, ranking-nce, conditional-nce, "
        "score-matching, sliced-score-matching, energy-discrepancy, exact-likelihood, pcd or cd.",
    )
    sigma_min: float = _option(0.05, "Lowest noise level; draws are of the data with this much noise.")
    sigma_max: float = _option(8.0, "Highest noise level.")
    sigma_density: float = _option(0.05, "Noise level whose density scores and log Z are about, sigma_min or more.")
    sigma_mean: float = _option(-0.8, "Mean of the logarithm of the noise level in training.")
    sigma_std: float = _option(1.3, "Standard deviation of the logarithm of the noise level in training.")
    level_weight: float = _option(0.3, "Weight of fitting the energy's change from level to level.")
    noise_ratio: int = _option(2, "Noise draws per row of data in noise contrastive estimation.")
    noise_scale: float = _option(0.5, "Spread of the noise around each row in conditional-nce and energy-discrepancy.")
    noise_tail: float = _option(0.1, "Part of that noise drawn three times wider, which teaches the energy its tails.")
    kernel: KernelName = _option("mala", "How chains move in cd, pcd and sampling: ula, mala or hmc; gibbs for an rbm.")
    step_size: float = _option(0.01, "The kernel's step size in training; sampling tunes its own for mala and hmc.")
    chain_steps: int = _option(20, "Kernel steps per training step in cd and pcd.")
    buffer_size: int = _option(4096, "Chains in pcd's replay buffer.")
    restart: float = _option(0.05, "Part of pcd's chains that start anew at each round.")
    energy_penalty: float = _option(0.0, "Weight of the squared energies in cd and pcd.")
    data_noise: float = _option(0.0, "Noise added to the data in pcd.")
    levels: int = _option(16, "Noise levels that sampling walks down.")
    corrector_steps: int = _option(1, "Langevin steps at each of them.")
    denoise: bool = _option(False, "End draws by taking out the last noise: the lowest level's, or pcd's data_noise.")
    sample_steps: int = _option(500, "Chain steps of sampling an energy without noise levels.")
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = _option(0, "Seed of everything random.")
    version: int = VERSION

    def __post_init__(self) -> None:
        for name, kind, known in (
            ("energy", "energy", EnergyName),
            ("objective", "objective", ObjectiveName),
            ("kernel", "kernel", KernelName),
            ("visible", "kind of unit", VisibleName),
        ):
            if getattr(self, name) not in get_args(known):
                raise unknown_name(kind, str(getattr(self, name)), get_args(known))
        self._check_labels()
        if self.energy == "rbm" or self.kind == "binary" or self.kernel == "gibbs":
            self._check_machine()
            return
        levels = self.noise_conditional
        if levels != (self.objective == "multi-level-denoising"):
            others = (name for name in get_args(ObjectiveName) if name != "multi-level-denoising")
            fits = "multi-level-denoising" if levels else f"one of {', '.join(others)}"
            raise OptionError(f"The {self.energy} energy is fitted by {fits}, not by {self.objective}.")
        if levels and not 0 < self.sigma_min <= self.sigma_density < self.sigma_max:
            raise OptionError(
                "Noise levels need 0 < sigma_min <= sigma_density < sigma_max; got "
                f"{self.sigma_min}, {self.sigma_density}, {self.sigma_max}."
            )
        if self.base_fitted and not self.data_noise > 0.0:
            raise OptionError(
                "base_fitted makes the base as wide as data_noise, which is 0; set data_noise, or base_fitted=False."
            )
        if self.objective == "exact-likelihood" and self.shape not in ((1,), (2,)):
            raise OptionError(f"exact-likelihood is for tables of one or two columns; these rows have {self.shape}.")
        if not 0.0 <= self.noise_tail < 1.0:
            raise OptionError(f"noise_tail is a part, from 0 to below 1; got {self.noise_tail}.")
        if self.energy == "unet" and (len(self.shape) != 3 or self.shape[1] % 4 or self.shape[2] % 4):
            raise OptionError(
                f"A unet energy is for images whose height and width are multiples of 4; these rows have shape "
                f"{self.shape}. Use noise-conditional."
            )
        if self.energy in ("convolutional", "residual") and len(self.shape) != 3:
            raise OptionError(f"A {self.energy} energy is for images; these rows have shape {self.shape}. Use mlp.")

    def _check_labels(self) -> None:
        if not 0.0 <= self.label_dropping < 1.0:
            raise OptionError(f"label_dropping is a part of the labels, 0 to below 1; got {self.label_dropping}.")
        if not self.conditional:
            return
        if not self.noise_conditional:
            raise OptionError(
                f"Classes are learned by their labels (--conditional) with an energy of noise levels, "
                f"{' or '.join(WITH_LEVELS)}, not with {self.energy}. Leave out --energy and --objective, or "
                "--conditional."
            )
        if len(self.class_names) < 2:
            found = "none" if not self.class_names else f"one class, {self.class_names[0]}"
            raise OptionError(
                f"Learning classes by their labels (--conditional) needs labels of two classes or more, and the data "
                f"have {found}. Name the column of a table, or the array of an .npz, that holds them: --labels NAME."
            )

    def _check_machine(self) -> None:
        bits = self.kind == "binary"
        if self.energy != "rbm" and bits:
            raise OptionError(
                f"Zeros and ones are fitted by an rbm, not by the {self.energy} energy. To treat them as real numbers, "
                "load them with kind='table' (--kind table) or kind='image' (--kind image)."
            )
        if self.energy != "rbm" or self.kernel != "gibbs":
            raise OptionError(
                f"The kernel gibbs moves the chains of an rbm, and no other does; got the {self.energy} energy with "
                f"{self.kernel}."
            )
        if self.objective not in ("pcd", "cd"):
            raise OptionError(f"An rbm is fitted by pcd or cd, not by {self.objective}.")
        if bits and self.visible != "bernoulli":
            raise OptionError("The data are zeros and ones, of which the visible units are bernoulli, not gaussian.")
        if not bits and self.visible == "bernoulli":
            raise OptionError(
                f"Bernoulli units have states 0 and 1, and the rows are real numbers ({self.kind}). Binarise them on "
                "the way in, with binarise=0.5 (--binarise 0.5: ones above half their range), or take "
                "visible='gaussian' (--visible gaussian)."
            )

    @property
    def is_machine(self) -> bool:
        """Whether the energy is a restricted Boltzmann machine."""
        return self.energy == "rbm"

    @property
    def labels(self) -> int | None:
        """How many labels the energy tells apart, the one that stands for none counted; ``None`` without labels."""
        if not self.conditional:
            return None
        return len(self.class_names) + (self.label_dropping > 0.0)

    @property
    def is_image(self) -> bool:
        """Whether rows are pictures, of grey values or of bits."""
        return len(self.shape) == 3

    @property
    def noise_conditional(self) -> bool:
        """Whether the energy has noise levels."""
        return self.energy in WITH_LEVELS

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> Recipe:
        """Rebuild a saved recipe.

        Raises
        ------
        ModelFileError
            If it comes from a newer version, lacks what it needs, or holds unknown fields.
        """
        version = saved.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise ModelFileError(
                f"The recipe's version is {version!r}; this Gibbsian reads versions up to {VERSION}. "
                "Upgrade Gibbsian (pip install --upgrade gibbsian) to load this model."
            )
        try:
            training = TrainingSettings(**_tuples(saved["training"], TrainingSettings))
            rest = {k: v for k, v in saved.items() if k != "training"}
            return Recipe(**_tuples(rest, Recipe), training=training)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"The recipe cannot be read: {error}. It was changed by hand or is damaged."
            ) from error


_DENSITIES = (
    "ranking-nce",
    "conditional-nce",
    "score-matching",
    "sliced-score-matching",
    "energy-discrepancy",
    "exact-likelihood",
)
"""Objectives that tables may take in the place of noise contrastive estimation, with its network and settings."""


def choose(
    kind: DataKind,
    shape: tuple[int, ...],
    rows: int,
    overrides: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
) -> Recipe:
    """Choose the recipe for a kind and size of data, and override it field by field.

    Images and wide tables get a noise-conditional energy fitted by denoising at many levels; tables of up to five
    columns an mlp fitted by noise contrastive estimation against a Gaussian, which gets the masses of separate modes
    right; zeros and ones a restricted Boltzmann machine, centred, by persistent contrastive divergence.

    Parameters
    ----------
    kind
        Of the data.
    shape
        Of one row.
    rows
        Of the training part.
    overrides
        Fields of `Recipe` or `gibbsian.training.TrainingSettings`, by name.
    class_names
        What the data's classes are called, where they have labels; used with ``conditional``.

    Raises
    ------
    OptionError
        If a name is unknown, or the choice contradicts itself.
    """
    given = dict(overrides or {})
    fields = {f.name for f in dataclasses.fields(Recipe)} - {"training", "kind", "shape", "class_names", "version"}
    settings = {f.name for f in dataclasses.fields(TrainingSettings)}
    for name in given:
        if name not in fields | settings:
            raise unknown_name("option", name, fields | settings)
    d = 1
    for s in shape:
        d *= s
    objective = given.get("objective")
    energy = given.get("energy", "rbm" if kind == "binary" else None)
    conditional = bool(given.get("conditional"))
    if conditional and objective is None and kind != "binary":
        energy = energy or "noise-conditional"
    if objective is None:
        if energy is None:
            objective = "noise-contrastive" if kind == "table" and d <= 5 else "multi-level-denoising"
        else:
            objective = "multi-level-denoising" if energy in WITH_LEVELS else "pcd"
    chosen, training = _defaults(objective, kind, d, rows, energy)
    chosen["objective"] = objective
    chosen |= {k: v for k, v in given.items() if k in fields}
    training |= {k: v for k, v in given.items() if k in settings}
    if conditional:
        chosen["class_names"] = tuple(class_names)
    return Recipe(kind=kind, shape=tuple(shape), training=TrainingSettings(**training), **chosen)


def _defaults(
    objective: str, kind: DataKind, d: int, rows: int, energy: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings measured to work (benchmarks/digits.py, densities.py, dependable.py), by objective and kind."""
    if energy == "rbm":
        return _machine(kind, d, rows)
    if objective == "multi-level-denoising":
        recipe = {"energy": "noise-conditional", "width": 256, "depth": 3}
        # An epoch more or less does not matter; small sets overfit long before large ones have been seen once.
        steps = 1000 if rows < 5000 else 4000
        training = {"steps": steps, "batch_size": 256, "learning_rate": 2e-3, "betas": (0.9, 0.99), "ema_decay": 0.998}
        training |= {"warmup_steps": 200, "final_learning_rate_factor": 0.0}
        if kind == "image":
            # Grey values come in steps: a density of them means something only with noise well above a step.
            recipe |= {"local": 16 if d <= 256 else 4, "sigma_density": 0.2, "denoise": True}
            # Dropout keeps small sets from being learned by heart, and then more steps pay.
            few = rows < 5000
            if energy == "unet":
                # Width and depth count feature maps and blocks; a step takes about five times as long.
                recipe |= {"width": 32, "depth": 1, "local": 0, "levels": 32}
                return recipe, training | {"steps": 1000 if few else 2500, "batch_size": 128}
            return recipe | {"dropout": 0.25 if few else 0.0}, training | ({"steps": 2000} if few else {})
        narrow = {"frequencies": 2 if d <= 5 else 0, "gain": 0.0 if d <= 5 else 0.5, "sigma_mean": -1.0}
        return recipe | narrow | {"width": 128}, training
    if objective == "noise-contrastive" or (objective in _DENSITIES and kind == "table"):
        recipe = {"energy": "mlp", "width": 128, "depth": 3, "frequencies": 3 if d <= 5 else 0}
        training = {"steps": 2500, "batch_size": 512, "learning_rate": 2e-3, "betas": (0.9, 0.99), "ema_decay": 0.998}
        # Resampled draws of the base are in the right places already; the chains only take copies apart.
        return recipe | {"step_size": 0.05, "sample_steps": 100}, training
    if kind == "image":
        training = {"steps": 2000, "learning_rate": 1e-3, "betas": (0.0, 0.999), "ema_decay": 0.99}
        return _image_pcd(d, energy) if objective == "pcd" else _image_cd(), training
    recipe = {"energy": "mlp", "width": 128, "depth": 3, "step_size": 0.02}
    return recipe, {"steps": 2000, "batch_size": 256, "learning_rate": 1e-3, "ema_decay": 0.995}


def _machine(kind: DataKind, d: int, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A restricted Boltzmann machine, whose chains all move in every step, as many as rows in a batch."""
    batch = 128
    recipe = {"energy": "rbm", "kernel": "gibbs", "width": 500 if d > 256 else 100, "chain_steps": 1, "restart": 0.0}
    recipe |= {"buffer_size": batch, "sample_steps": 200}
    if kind != "binary":
        recipe["base_scale"] = 0.3 if kind == "image" else 0.5
    # Fitted by few steps: larger rates where there are few bits, smaller ones for pictures with hundreds of units.
    rate = 0.02 if d <= 32 else 5e-3 if d <= 256 else 1e-3
    training = {"steps": 5000, "batch_size": batch, "learning_rate": rate, "ema_decay": 0.0, "clip_norm": 0.0}
    return recipe, training | {"final_learning_rate_factor": 0.0}


def _image_pcd(d: int, energy: str | None) -> dict[str, Any]:
    """Images by persistent chains: the data with noise, which draws lose again.

    Noise is what lets plain Langevin chains move from image to image, in steps in proportion to its variance.
    """
    noise = 0.25 if d <= 256 else 0.5
    recipe = {"energy": "mlp", "width": 256, "depth": 3, "kernel": "ula", "step_size": 0.32 * noise**2}
    if energy in ("convolutional", "residual"):
        recipe["width"] = 32
    recipe |= {"data_noise": noise, "base_fitted": True, "denoise": True}
    return recipe | {"chain_steps": 10, "buffer_size": 1024, "restart": 0.01, "sample_steps": 300}


def _image_cd() -> dict[str, Any]:
    recipe = {"energy": "convolutional", "width": 32, "depth": 3, "kernel": "ula", "step_size": 0.01}
    return recipe | {"base_scale": 0.7, "energy_penalty": 0.01}


def _tuples(saved: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """JSON has no tuples: turn lists back, and name the fields that do not exist."""
    hints = get_type_hints(kind)
    for name in saved:
        if name not in hints:
            raise TypeError(f"it has a field {name!r} that this version does not know")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
