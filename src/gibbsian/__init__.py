"""Energy-based models on PyTorch: fit, sample, score, compose, and bracket the partition function."""

from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.tractable import Bernoulli, Categorical, Gaussian, Tractable, Uniform
from gibbsian.kernels.base import Info, Kernel, State, evaluate
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.sampling import Samples, sample

__version__ = "0.1.0.dev0"

__all__ = [
    "HMC",
    "MALA",
    "ULA",
    "Bernoulli",
    "Categorical",
    "Energy",
    "Gaussian",
    "Info",
    "Kernel",
    "Samples",
    "State",
    "Tractable",
    "Uniform",
    "evaluate",
    "mixture",
    "sample",
]
