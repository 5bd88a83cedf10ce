"""Energy-based models on PyTorch: fit, sample, score, compose, and bracket the partition function."""

from typing import TYPE_CHECKING, Any

from gibbsian.adaptation import Tuned, tune
from gibbsian.annealing import Annealing, anneal
from gibbsian.buffers import ReplayBuffer
from gibbsian.data import Dataset, Scaling, datasets, load
from gibbsian.diagnostics.chains import chain_mean, effective_sample_size, grid_total_variation, split_r_hat
from gibbsian.diagnostics.detection import auroc, false_positive_rate
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.diagnostics.two_sample import (
    classifier_test,
    energy_distance,
    frechet_distance,
    kernel_mmd,
    memorisation,
    sliced_wasserstein,
)
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.minibatch import MinibatchEnergy, find_mode
from gibbsian.energies.neural import MLP, ConvEnergy, ResidualEnergy
from gibbsian.energies.noise import NoiseConditional
from gibbsian.energies.targets import DoubleWell, Funnel, GaussianMixture, ManyWell, Target
from gibbsian.energies.toys import Checkerboard, EightGaussians, Pinwheel, Ring, Rosenbrock, TwoMoons
from gibbsian.energies.tractable import Bernoulli, Categorical, Gaussian, Tractable, Uniform
from gibbsian.kernels.barker import Barker
from gibbsian.kernels.base import Info, Kernel, State, evaluate
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.kernels.preconditioned import PSGLD
from gibbsian.kernels.random_walk import RandomWalk
from gibbsian.kernels.stochastic import SGHMC, SGLD, CyclicalSGLD
from gibbsian.kernels.svgd import SVGD
from gibbsian.kernels.underdamped import Underdamped
from gibbsian.models import Model, load_model, save_model
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import (
    DenoisingScoreMatching,
    EDMWeight,
    LogNormal,
    LogUniform,
    MultiLevelDenoising,
)
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.partition.annealed import ais, reverse_ais
from gibbsian.partition.base import LogZ
from gibbsian.partition.bracket import bracket
from gibbsian.partition.exact import quadrature
from gibbsian.partition.paths import geometric, noise_levels
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import sample
from gibbsian.training.fit import Fit, fit
from gibbsian.training.settings import TrainingSettings

if TYPE_CHECKING:
    from gibbsian.estimator import EBM

__version__ = "0.1.0"

CD = ContrastiveDivergence
PCD = PersistentContrastiveDivergence


def __getattr__(name: str) -> Any:
    # scikit-learn takes longer to import than all of this package: EBM waits until it is asked for.
    if name == "EBM":
        from gibbsian.estimator import EBM

        return EBM
    raise AttributeError(f"module 'gibbsian' has no attribute {name!r}")


__all__ = [
    "CD",
    "EBM",
    "HMC",
    "MALA",
    "MLP",
    "PCD",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SVGD",
    "ULA",
    "Annealing",
    "Barker",
    "Batch",
    "Bernoulli",
    "Categorical",
    "Checkerboard",
    "ContrastiveDivergence",
    "ConvEnergy",
    "CyclicalSGLD",
    "Dataset",
    "DenoisingScoreMatching",
    "DoubleWell",
    "EDMWeight",
    "EightGaussians",
    "Energy",
    "Estimate",
    "Fit",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "Info",
    "Kernel",
    "LogNormal",
    "LogUniform",
    "LogZ",
    "Loss",
    "ManyWell",
    "MinibatchEnergy",
    "Model",
    "MultiLevelDenoising",
    "NoiseConditional",
    "NoiseContrastiveEstimation",
    "Objective",
    "PersistentContrastiveDivergence",
    "Pinwheel",
    "RandomWalk",
    "Recipe",
    "ReplayBuffer",
    "ResidualEnergy",
    "Ring",
    "Rosenbrock",
    "Samples",
    "Scaling",
    "State",
    "Target",
    "Tractable",
    "TrainingSettings",
    "Tuned",
    "TwoMoons",
    "Underdamped",
    "Uniform",
    "ais",
    "anneal",
    "auroc",
    "bracket",
    "chain_mean",
    "classifier_test",
    "datasets",
    "effective_sample_size",
    "energy_distance",
    "evaluate",
    "false_positive_rate",
    "find_mode",
    "fit",
    "frechet_distance",
    "geometric",
    "grid_total_variation",
    "kernel_mmd",
    "load",
    "load_model",
    "memorisation",
    "mixture",
    "noise_levels",
    "quadrature",
    "reverse_ais",
    "sample",
    "save_model",
    "sliced_wasserstein",
    "split_r_hat",
    "tune",
]
