"""What a recipe's names stand for: energies, noise, objectives, kernels, built from plain values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gibbsian.annealing import Annealing
from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.independent_units import IndependentUnits
from gibbsian.energies.neural import MLP, ConvEnergy, ResidualEnergy
from gibbsian.energies.noise import NoiseConditional, NoiseConditionalEnergy
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Gaussian, Tractable
from gibbsian.energies.unet import NoiseConditionalUNet
from gibbsian.energies.units import BernoulliUnits, Units
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Objective
from gibbsian.objectives.centring import Centred
from gibbsian.objectives.conditional_noise import ConditionalNCE
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching, EDMWeight, LogNormal, MultiLevelDenoising
from gibbsian.objectives.energy_discrepancy import EnergyDiscrepancy
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.label_dropping import LabelDropping
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE
from gibbsian.objectives.score_matching import ScoreMatching, SlicedScoreMatching
from gibbsian.recipes import Recipe

FIRST_SMOOTHING = 0.01
"""Weight of the uniform law in the means that an RBM's biases begin with."""

TAIL = 3.0
"""How much wider the wide part of the noise is."""


def build_energy(recipe: Recipe, data: Tensor | None = None) -> Energy:
    """Build the untrained energy; with a Gaussian base added where there are no noise levels, see `build_base`."""
    if recipe.is_machine:
        return RBM(visible_units(recipe), recipe.width)
    if recipe.energy == "unet":
        # Preconditioned as by EDM, with which it learned faster at every level (benchmarks/diffusion.py).
        sizes = (recipe.width, recipe.depth)
        return NoiseConditionalUNet(recipe.shape, *sizes, gain=recipe.gain, fade=1.0, classes=recipe.labels)
    if recipe.noise_conditional:
        sizes = (recipe.width, recipe.depth, recipe.frequencies, recipe.local)
        return NoiseConditional(recipe.shape, *sizes, gain=recipe.gain, dropout=recipe.dropout, classes=recipe.labels)
    widths = tuple(recipe.width * 2**i for i in range(recipe.depth))
    if recipe.energy == "mlp":
        hidden = (recipe.width,) * recipe.depth
        net: Energy = MLP(recipe.shape, hidden, recipe.frequencies, spectral_norm=recipe.spectral_norm)
    elif recipe.energy == "convolutional":
        net = ConvEnergy(recipe.shape, widths, spectral_norm=recipe.spectral_norm)
    else:
        net = ResidualEnergy(recipe.shape, widths, spectral_norm=recipe.spectral_norm)
    return net + build_base(recipe, data)


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


def base_of(recipe: Recipe, energy: Energy) -> Tractable:
    """Find the base of a trained energy, where its chains and its annealing start."""
    if isinstance(energy, RBM):
        return machine_base(recipe, energy)
    if not recipe.base_fitted:
        return build_noise(recipe)
    return next(part for part in energy.modules() if isinstance(part, Gaussian))


def visible_units(recipe: Recipe) -> Units:
    """Build the units of the data of a restricted Boltzmann machine."""
    return (
        BernoulliUnits(recipe.shape)
        if recipe.visible == "bernoulli"
        else GaussianUnits(recipe.shape, recipe.base_scale)
    )


def machine_base(recipe: Recipe, energy: RBM) -> IndependentUnits:
    """Build the independent units where chains of a machine start: with the data's means, which a centred one keeps."""
    if not recipe.centred:
        return energy.base()
    # What offsets are means of is the statistic, for Gaussian units the value over the variance.
    means = energy.visible_offset if recipe.visible == "bernoulli" else energy.visible_offset * recipe.base_scale**2
    return energy.base(energy.visible.shaped(means))


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


def build_objective(recipe: Recipe, data: Tensor) -> Objective:
    """Build the objective.

    Parameters
    ----------
    recipe
        Names it.
    data
        Training rows in model units; the weight of the noise levels needs their spread.
    """
    if recipe.objective == "multi-level-denoising":
        levels = LogNormal(recipe.sigma_mean, recipe.sigma_std, recipe.sigma_min, recipe.sigma_max)
        spread = float((data - data.mean(0)).square().mean().sqrt())
        denoising = MultiLevelDenoising(levels, EDMWeight(spread), recipe.level_weight)
        if not (recipe.conditional and recipe.label_dropping):
            return denoising
        return LabelDropping(denoising, len(recipe.class_names), recipe.label_dropping)
    if recipe.objective in _PLAIN:
        return _PLAIN[recipe.objective](recipe, data)
    chains = _chain_objective(recipe, data)
    return Centred(chains) if recipe.is_machine and recipe.centred else chains


def _chain_objective(recipe: Recipe, data: Tensor) -> Objective:
    kernel, penalty = build_kernel(recipe), recipe.energy_penalty
    if recipe.objective == "cd":
        return ContrastiveDivergence(kernel, recipe.chain_steps, energy_penalty=penalty)
    base = build_base(recipe, data)
    if recipe.is_machine:
        units = visible_units(recipe)
        base = IndependentUnits(units, units.fitted(data, FIRST_SMOOTHING))
    return PersistentContrastiveDivergence(
        kernel,
        base,
        steps=recipe.chain_steps,
        buffer_size=recipe.buffer_size,
        restart=recipe.restart,
        energy_penalty=penalty,
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
    """Build the kernel of training chains."""
    if recipe.kernel == "ula":
        return ULA(recipe.step_size, exact_noise(recipe.step_size, recipe.data_noise))
    if recipe.kernel == "gibbs":
        return RBMGibbs()
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


def build_annealing(recipe: Recipe) -> Annealing:
    """Build the walk down the noise levels by which a noise-conditional energy is sampled."""
    return Annealing(recipe.sigma_max, recipe.sigma_min, recipe.levels, recipe.corrector_steps, denoise=recipe.denoise)


def initial_weights(recipe: Recipe, data: Tensor) -> Energy:
    """Build the energy with weights that depend on the seed alone, calibrated to data in model units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        energy = build_energy(recipe, data)
    if isinstance(energy, NoiseConditionalEnergy):
        energy.calibrate(data)
    if isinstance(energy, RBM):
        energy.start_at(data, FIRST_SMOOTHING, centre=recipe.centred)
    return energy
