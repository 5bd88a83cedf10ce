"""A recipe: everything that makes a model besides the data.

A recipe is a frozen dataclass of plain values. The command line overrides it field by field, the estimator carries it,
and a saved model is rebuilt from it. Its names become objects in `gibbsian.building` and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from gibbsian.errors import ModelFileError, OptionError, unknown_name
from gibbsian.training.settings import TrainingSettings

VERSION = 1
"""Version of the recipe's format; a saved recipe of a later one is refused."""

DataKind = Literal["image", "table", "binary"]
WITH_LEVELS = ("noise-conditional", "unet")
"""Energies with noise levels."""

EnergyName = Literal[
    "noise-conditional",
    "unet",
    "mlp",
    "convolutional",
    "residual",
    "rbm",
    "flow",
    "tilted-flow",
    "cooperative",
    "gan",
    "vae",
    "vae-ebm",
    "latent-ebm",
]


PlainObjective = Literal[
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
"""Objectives of energies without noise levels."""

ObjectiveName = Literal[
    "multi-level-denoising",
    PlainObjective,
    "maximum-likelihood",
    "cooperative",
    "adversarial",
    "elbo",
    "latent-likelihood",
]

OWN_OBJECTIVE = {
    "flow": "maximum-likelihood",
    "tilted-flow": "noise-contrastive",
    "cooperative": "cooperative",
    "gan": "adversarial",
    "vae": "elbo",
    "vae-ebm": "pcd",
    "latent-ebm": "latent-likelihood",
}
"""The objective of models of several networks, where there is one alone."""

FOR_BITS = ("rbm", "vae", "latent-ebm")
"""Models of zeros and ones."""
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
        "Boltzmann machine; or a model of several networks: flow, tilted-flow, cooperative, gan, vae, vae-ebm or "
        "latent-ebm.",
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
        "score-matching, sliced-score-matching, energy-discrepancy, exact-likelihood, pcd or cd; models of several "
        "networks have one of their own.",
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
    data_noise: float = _option(0.0, "Noise added to the data in pcd, cooperative and gan.")
    levels: int = _option(16, "Noise levels that sampling walks down.")
    corrector_steps: int = _option(1, "Langevin steps at each of them.")
    denoise: bool = _option(False, "End draws by taking out the last noise: the lowest level's, or pcd's data_noise.")
    sample_steps: int = _option(500, "Chain steps of sampling an energy without noise levels.")
    latent: int = _option(16, "Numbers that a generator or a decoder makes a row of.")
    generator_width: int = _option(32, "Feature maps or hidden units of the generator of cooperative and gan.")
    generator_noise: float = _option(0.1, "Noise on a cooperative generator's draws where data_noise is 0.")
    generator_rate: float = _option(1.0, "Learning rate of a cooperative generator over the energy's.")
    slope_penalty: float = _option(0.1, "Weight of a gan's penalties on the discriminator's slope, R1 and R2.")
    decoder_scale: float = _option(0.3, "Standard deviation of a row of real numbers given its latents.")
    first_phase: float = _option(
        0.5,
        "Part of the steps that train the flow of a tilted-flow, the autoencoder of a vae-ebm, or both networks of a "
        "gan, before the rest.",
    )
    tilt_limit: float = _option(5.0, "Nats that a tilted-flow raises the flow's density by, at most.")
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
        check_recipe(self)

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


def check_recipe(recipe: Recipe) -> None:
    """Check that the parts of a recipe fit each other.

    Raises
    ------
    OptionError
        If they do not.
    """
    _check_labels(recipe)
    if recipe.energy in OWN_OBJECTIVE:
        _check_networks(recipe)
        return
    if recipe.energy == "rbm" or recipe.kind == "binary" or recipe.kernel == "gibbs":
        _check_machine(recipe)
        return
    levels = recipe.energy in WITH_LEVELS
    if levels != (recipe.objective == "multi-level-denoising"):
        fits = "multi-level-denoising" if levels else f"one of {', '.join(get_args(PlainObjective))}"
        raise OptionError(f"The {recipe.energy} energy is fitted by {fits}, not by {recipe.objective}.")
    _check_numbers(recipe)
    if recipe.objective == "exact-likelihood" and recipe.shape not in ((1,), (2,)):
        raise OptionError(f"exact-likelihood is for tables of one or two columns; these rows have {recipe.shape}.")
    if recipe.energy == "unet" and (len(recipe.shape) != 3 or recipe.shape[1] % 4 or recipe.shape[2] % 4):
        raise OptionError(
            f"A unet energy is for images whose height and width are multiples of 4; these rows have shape "
            f"{recipe.shape}. Use noise-conditional."
        )
    if recipe.energy in ("convolutional", "residual") and len(recipe.shape) != 3:
        raise OptionError(f"A {recipe.energy} energy is for images; these rows have shape {recipe.shape}. Use mlp.")


def _check_numbers(recipe: Recipe) -> None:
    if recipe.energy in WITH_LEVELS and not 0 < recipe.sigma_min <= recipe.sigma_density < recipe.sigma_max:
        raise OptionError(
            "Noise levels need 0 < sigma_min <= sigma_density < sigma_max; got "
            f"{recipe.sigma_min}, {recipe.sigma_density}, {recipe.sigma_max}."
        )
    if recipe.base_fitted and not recipe.data_noise > 0.0:
        raise OptionError(
            "base_fitted makes the base as wide as data_noise, which is 0; set data_noise, or base_fitted=False."
        )
    if not 0.0 <= recipe.noise_tail < 1.0:
        raise OptionError(f"noise_tail is a part, from 0 to below 1; got {recipe.noise_tail}.")


def _check_labels(recipe: Recipe) -> None:
    if not 0.0 <= recipe.label_dropping < 1.0:
        raise OptionError(f"label_dropping is a part of the labels, 0 to below 1; got {recipe.label_dropping}.")
    if not recipe.conditional:
        return
    if recipe.energy not in WITH_LEVELS:
        raise OptionError(
            f"Classes are learned by their labels (--conditional) with an energy of noise levels, "
            f"{' or '.join(WITH_LEVELS)}, not with {recipe.energy}. Leave out --energy and --objective, or "
            "--conditional."
        )
    if len(recipe.class_names) < 2:
        found = "none" if not recipe.class_names else f"one class, {recipe.class_names[0]}"
        raise OptionError(
            f"Learning classes by their labels (--conditional) needs labels of two classes or more, and the data "
            f"have {found}. Name the column of a table, or the array of an .npz, that holds them: --labels NAME."
        )


def _check_networks(recipe: Recipe) -> None:
    if recipe.objective != OWN_OBJECTIVE[recipe.energy]:
        raise OptionError(
            f"The {recipe.energy} model is fitted by {OWN_OBJECTIVE[recipe.energy]}, not by {recipe.objective}; leave "
            "out the objective."
        )
    if recipe.kind == "binary" and recipe.energy not in FOR_BITS:
        raise OptionError(
            f"Zeros and ones are modelled by {', '.join(FOR_BITS)}, not by {recipe.energy}. To "
            "treat them as real numbers, load them with kind='table' (--kind table) or kind='image' (--kind image)."
        )
    if recipe.kernel == "gibbs":
        raise OptionError(f"The kernel gibbs moves the chains of an rbm, not of the {recipe.energy} model.")
    for name in ("latent", "generator_width"):
        if getattr(recipe, name) < 1:
            raise OptionError(f"{name} counts numbers, 1 or more; got {getattr(recipe, name)}.")
    if not 0.0 < recipe.first_phase < 1.0:
        raise OptionError(f"first_phase is a part of the steps, between 0 and 1; got {recipe.first_phase}.")
    for name in ("decoder_scale", "generator_noise", "generator_rate", "tilt_limit"):
        if not getattr(recipe, name) > 0.0:
            raise OptionError(f"{name} is positive; got {getattr(recipe, name)}.")


def _check_machine(recipe: Recipe) -> None:
    bits = recipe.kind == "binary"
    if recipe.energy != "rbm" and bits:
        raise OptionError(
            f"Zeros and ones are fitted by an rbm, not by the {recipe.energy} energy. To treat them as real numbers, "
            "load them with kind='table' (--kind table) or kind='image' (--kind image)."
        )
    if recipe.energy != "rbm" or recipe.kernel != "gibbs":
        raise OptionError(
            f"The kernel gibbs moves the chains of an rbm, and no other does; got the {recipe.energy} energy with "
            f"{recipe.kernel}."
        )
    if recipe.objective not in ("pcd", "cd"):
        raise OptionError(f"An rbm is fitted by pcd or cd, not by {recipe.objective}.")
    if bits and recipe.visible != "bernoulli":
        raise OptionError("The data are zeros and ones, of which the visible units are bernoulli, not gaussian.")
    if not bits and recipe.visible == "bernoulli":
        raise OptionError(
            f"Bernoulli units have states 0 and 1, and the rows are real numbers ({recipe.kind}). Binarise them on "
            "the way in, with binarise=0.5 (--binarise 0.5: ones above half their range), or take "
            "visible='gaussian' (--visible gaussian)."
        )


def _tuples(saved: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """JSON has no tuples: turn lists back, and name the fields that do not exist."""
    hints = get_type_hints(kind)
    for name in saved:
        if name not in hints:
            raise TypeError(f"it has a field {name!r} that this version does not know")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
