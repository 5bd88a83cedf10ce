"""Energy-based models on PyTorch: fit, sample, score, compose, and bracket the partition function."""

from typing import TYPE_CHECKING, Any

from gibbsian.adaptation import Tuned, tune
from gibbsian.annealing import Annealing, ancestral_sample, anneal, annealed_chains
from gibbsian.applications.composed import Composed
from gibbsian.applications.composition import compose
from gibbsian.applications.constraints import Constraints, constraints
from gibbsian.applications.feynman_kac import compose_scores
from gibbsian.applications.guidance import guided, guided_by_label, scale_from_weight
from gibbsian.applications.normalisable import check_normalisable
from gibbsian.applications.terms import SummedScore, windowed
from gibbsian.bridges.denoisers import DenoiserMLP, DenoiserUNet
from gibbsian.bridges.discriminators import calibrate_discriminator
from gibbsian.bridges.flow_likelihood import bits_per_dim, flow_log_prob
from gibbsian.bridges.gans import GanDraws, ddls, metropolis_hastings, rejection
from gibbsian.bridges.reverse import Ancestral, Heun, Multistep, PredictorCorrector, reverse
from gibbsian.bridges.scores import score_of
from gibbsian.bridges.transport import TransportFit, fit_transport, sample_transported
from gibbsian.buffers import ReplayBuffer, joined_buffer, split_buffer
from gibbsian.data import Dataset, Rows, Scaling, datasets, load, open_rows
from gibbsian.detection.calibration import Calibration, calibrate
from gibbsian.detection.classifiers import LogSumExp, MaxProbability
from gibbsian.detection.features import gaussian_mixture, mahalanobis, nearest_neighbours
from gibbsian.detection.levels import LevelFeatures, LevelScore, level_ladder, level_score
from gibbsian.detection.scores import Disagreement, EnergyScore, GradientNorm, Typicality, disagreement, typicality
from gibbsian.detection.typicality import batch_typicality
from gibbsian.diagnostics.chains import chain_mean, chain_sd, effective_sample_size, grid_total_variation, split_r_hat
from gibbsian.diagnostics.detection import Separation, auroc, average_precision, false_positive_rate, separation
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.diagnostics.mixing import energy_bfmi, round_trips
from gibbsian.diagnostics.quantiles import chain_quantile, quantile_effective_sample_size, tail_effective_sample_size
from gibbsian.diagnostics.shared import over_processes
from gibbsian.diagnostics.summary import Summary
from gibbsian.diagnostics.two_sample import (
    classifier_test,
    energy_distance,
    frechet_distance,
    kernel_mmd,
    memorisation,
    sliced_wasserstein,
)
from gibbsian.energies.base import Energy, mixture
from gibbsian.energies.belief import DeepBeliefNetwork
from gibbsian.energies.boltzmann import RBM, label_log_probs
from gibbsian.energies.classifier import ClassifierEnergy
from gibbsian.energies.convolutional import ConvolutionalRBM
from gibbsian.energies.decoders import BernoulliDecoder, Directed, GaussianDecoder
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.directional import VonMises, VonMisesFisher
from gibbsian.energies.discriminators import Discriminator, latent_energy
from gibbsian.energies.domains import Sphere, Torus
from gibbsian.energies.fields import FieldEnergy
from gibbsian.energies.flows import Flow, inverse_autoregressive_flow, spline_flow
from gibbsian.energies.fourier import FourierTable
from gibbsian.energies.gauges import (
    average_product_correction,
    contact_scores,
    coupling_norms,
    lattice_gas_gauge,
    zero_sum_gauge,
)
from gibbsian.energies.generator_proposals import GeneratorProposal
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.independent_units import IndependentUnits
from gibbsian.energies.invariant import DistanceEnergy, InvariantNetwork
from gibbsian.energies.joined_units import JoinedUnits
from gibbsian.energies.joint_points import JointEvent
from gibbsian.energies.labels import LabelEmbedding
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents, ListedLatents
from gibbsian.energies.mean_field import MeanFieldEnergy, mean_field
from gibbsian.energies.minibatch import MinibatchEnergy, find_mode
from gibbsian.energies.networks import Dense, Downsampling, NoisyNetwork, Upsampling
from gibbsian.energies.neural import MLP, ConvEnergy, ResidualEnergy
from gibbsian.energies.noise import NoiseConditional
from gibbsian.energies.pairwise import Ising, Lattice, Potts
from gibbsian.energies.periodic import PeriodicMLP, VonMisesMixture, fit_von_mises_mixture
from gibbsian.energies.pooled_units import PooledUnits
from gibbsian.energies.real_units import GaussianUnits, ReLUUnits
from gibbsian.energies.reconstruction import ReconstructionEnergy
from gibbsian.energies.recovery import RecoveryEnergy
from gibbsian.energies.reparametrised import VAEBM, Reparametrised, reparametrised
from gibbsian.energies.rescaled import rescaled
from gibbsian.energies.schedules import Cosine, Tabulated, VarianceExploding, VariancePreserving
from gibbsian.energies.sparse_couplings import SparseCouplings
from gibbsian.energies.targets import DoubleWell, Funnel, GaussianMixture, ManyWell, Target
from gibbsian.energies.telescope import Telescope, geometric_alphas
from gibbsian.energies.tilted import Tilted, tilted
from gibbsian.energies.torus_flow import circular_spline_flow
from gibbsian.energies.toys import Checkerboard, EightGaussians, Pinwheel, Ring, Rosenbrock, TwoMoons
from gibbsian.energies.tractable import Bernoulli, Categorical, Gaussian, Tractable, Uniform
from gibbsian.energies.transformed import unconstrain
from gibbsian.energies.transport import Transported, neural_transport
from gibbsian.energies.unet import NoiseConditionalUNet
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits
from gibbsian.energies.variational import lebm, vae
from gibbsian.kernels.barker import Barker
from gibbsian.kernels.base import Info, Kernel, State, evaluate
from gibbsian.kernels.checkerboard import CheckerboardGibbs
from gibbsian.kernels.discrete_langevin import DiscreteLangevin
from gibbsian.kernels.domains import Reflected, Wrapped
from gibbsian.kernels.dynamic_hmc import DynamicHMC
from gibbsian.kernels.gibbs import BlockGibbs, SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.independent import IndependentMH
from gibbsian.kernels.jumps import Jumps
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.kernels.microcanonical import MCLMC, AdjustedMCLMC
from gibbsian.kernels.nuts import NUTS
from gibbsian.kernels.path_auxiliary import PathAuxiliary
from gibbsian.kernels.path_tempering import PathTempering
from gibbsian.kernels.preconditioned import PSGLD
from gibbsian.kernels.random_walk import RandomWalk
from gibbsian.kernels.saving import load_kernel, save_kernel
from gibbsian.kernels.spherical import SphericalHMC
from gibbsian.kernels.stochastic import SGHMC, SGLD, CyclicalSGLD
from gibbsian.kernels.svgd import SVGD
from gibbsian.kernels.tempered_transitions import TemperedTransitions
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.kernels.transport import TransportLangevin
from gibbsian.kernels.underdamped import Underdamped
from gibbsian.ladders import TunedLadder, tune_ladder
from gibbsian.learned.base import WeightedDraws
from gibbsian.learned.diffusion_sampler import CMCD, DiffusionSampler, fit_diffusion
from gibbsian.learned.fab import FAB
from gibbsian.learned.flow_sampler import FlowSampler, fit_flow
from gibbsian.learned.prioritised import PrioritisedBuffer
from gibbsian.learned.reverse_kl import ReverseKL
from gibbsian.microcanonical_adaptation import tune_mclmc
from gibbsian.models import Model, load_model, save_model
from gibbsian.objectives.adversarial import Adversarial, EnergyBasedGAN
from gibbsian.objectives.amortised import CooperativeLearning
from gibbsian.objectives.amortised_divergence import EntropyRegularised, GeneratorKL
from gibbsian.objectives.augment import AdditiveNoise, HorizontalFlip, InTurn, Shift, UniformNoise
from gibbsian.objectives.augmented import Augmented
from gibbsian.objectives.base import Batch, Loss, Objective, Ramp, WeightedSum
from gibbsian.objectives.centring import Centred
from gibbsian.objectives.combination import Phases
from gibbsian.objectives.concrete_score import ConcreteScoreMatching
from gibbsian.objectives.conditional_noise import BitFlips, ClassChanges, ConditionalNCE, GaussianPerturbation
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.correction import CorrectionLikelihood
from gibbsian.objectives.denoising import (
    DenoisingScoreMatching,
    EDMWeight,
    LogNormal,
    LogUniform,
    MultiLevelDenoising,
)
from gibbsian.objectives.energy_bounded import EnergyBounded
from gibbsian.objectives.energy_discrepancy import EnergyDiscrepancy
from gibbsian.objectives.entropy import nearest_neighbour_entropy
from gibbsian.objectives.equilibrium import Decay, EquilibriumMatching, descend
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.objectives.flow_contrastive import FlowContrastiveEstimation
from gibbsian.objectives.force_matching import ForceMatching
from gibbsian.objectives.joint import JointEnergyModel
from gibbsian.objectives.label_dropping import LabelDropping
from gibbsian.objectives.latent import CompleteData, LatentPriorLikelihood
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.objectives.mean_field import MeanFieldPCD
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE
from gibbsian.objectives.parts import OfPart
from gibbsian.objectives.probability_flow import MinimumProbabilityFlow
from gibbsian.objectives.pseudo_likelihood import PseudoLikelihood, RatioMatching
from gibbsian.objectives.recovery_likelihood import RecoveryLikelihood
from gibbsian.objectives.sampler_gradient import SamplerKL
from gibbsian.objectives.score_matching import FiniteDifferenceScoreMatching, ScoreMatching, SlicedScoreMatching
from gibbsian.objectives.sleep import SleepPhase
from gibbsian.objectives.starts import Starts
from gibbsian.objectives.telescoping import TelescopingRatios
from gibbsian.objectives.transport import EnergyMatching, TransportMatching
from gibbsian.objectives.variational import EvidenceLowerBound, ImportanceWeightedBound
from gibbsian.partition.annealed import ais, reverse_ais
from gibbsian.partition.base import LogZ
from gibbsian.partition.belief import belief_bound
from gibbsian.partition.boltzmann import MachineRungs, exact_log_likelihood, exact_log_z, rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.deep import exact_deep_log_likelihood, variational_bound
from gibbsian.partition.enumeration import enumeration
from gibbsian.partition.exact import quadrature
from gibbsian.partition.held_out import HeldOut, raise_lower_bound
from gibbsian.partition.importance import importance_sampling, reverse_kl_bound
from gibbsian.partition.integration import Integrated, thermodynamic_integration
from gibbsian.partition.latent import (
    RowBounds,
    SimulatedBracket,
    evidence_lower_bound,
    latent_log_likelihood,
    simulated_bracket,
)
from gibbsian.partition.lattices import kaufman, transfer_matrix
from gibbsian.partition.multistate import Multistate, bridge, mbar
from gibbsian.partition.paths import geometric, noise_levels
from gibbsian.partition.refinement import refine_posterior, refine_proposal
from gibbsian.partition.smc import Particles, smc
from gibbsian.partition.trajectory import trajectory
from gibbsian.path_adaptation import tune_path
from gibbsian.processes import World, join_processes, world
from gibbsian.recipes import Recipe
from gibbsian.samples import Samples
from gibbsian.sampling import own_rows, sample
from gibbsian.short_run import ShortRun, continue_chains
from gibbsian.temperatures import temper
from gibbsian.training.fit import Fit, fit
from gibbsian.training.generators import fit_generator
from gibbsian.training.greedy import pretrain, train_belief_network
from gibbsian.training.settings import TrainingSettings
from gibbsian.warmup import warm_up

if TYPE_CHECKING:
    from gibbsian import molecules, planning, sequences
    from gibbsian.detection.detector import Detector, detector_of
    from gibbsian.estimator import EBM
    from gibbsian.report.mixing import autocorrelation_figure, rank_figure, trace_figure
    from gibbsian.transformer import RBMTransformer

__version__ = "0.1.0"

CD = ContrastiveDivergence
JEM = JointEnergyModel
PCD = PersistentContrastiveDivergence


# What takes longer to import than all of this package waits until it is asked for.
_LATER = {
    "Detector": "gibbsian.detection.detector",
    "EBM": "gibbsian.estimator",
    "RBMTransformer": "gibbsian.transformer",
    "detector_of": "gibbsian.detection.detector",
    "autocorrelation_figure": "gibbsian.report.mixing",
    "rank_figure": "gibbsian.report.mixing",
    "trace_figure": "gibbsian.report.mixing",
}


_ROOMS = ("molecules", "planning", "sequences")
"""Fields of use, and planning, with namespaces of their own, such as ``gibbsian.sequences.read_alignment``."""


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"gibbsian.{name}")
    raise AttributeError(f"module 'gibbsian' has no attribute {name!r}")


__all__ = [
    "CD",
    "CMCD",
    "EBM",
    "FAB",
    "HMC",
    "JEM",
    "MALA",
    "MCLMC",
    "MLP",
    "NUTS",
    "PCD",
    "PSGLD",
    "RBM",
    "SGHMC",
    "SGLD",
    "SVGD",
    "ULA",
    "VAEBM",
    "AdditiveNoise",
    "AdjustedMCLMC",
    "Adversarial",
    "Ancestral",
    "Annealing",
    "Augmented",
    "Barker",
    "Batch",
    "Bernoulli",
    "BernoulliDecoder",
    "BernoulliUnits",
    "BitFlips",
    "BlockGibbs",
    "Calibration",
    "Categorical",
    "CategoricalUnits",
    "Centred",
    "Checkerboard",
    "CheckerboardGibbs",
    "ClassChanges",
    "ClassifierEnergy",
    "CompleteData",
    "Composed",
    "ConcreteScoreMatching",
    "ConditionalNCE",
    "Constraints",
    "ContrastiveDivergence",
    "ConvEnergy",
    "ConvolutionalRBM",
    "CooperativeLearning",
    "CorrectionLikelihood",
    "Cosine",
    "CyclicalSGLD",
    "Dataset",
    "Decay",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "DenoiserMLP",
    "DenoiserUNet",
    "DenoisingScoreMatching",
    "Dense",
    "Detector",
    "DiffusionSampler",
    "Directed",
    "Disagreement",
    "DiscreteLangevin",
    "Discriminator",
    "DistanceEnergy",
    "DoubleWell",
    "Downsampling",
    "DynamicHMC",
    "EDMWeight",
    "EightGaussians",
    "Energy",
    "EnergyBasedGAN",
    "EnergyBounded",
    "EnergyDiscrepancy",
    "EnergyMatching",
    "EnergyScore",
    "EntropyRegularised",
    "EquilibriumMatching",
    "Estimate",
    "EvidenceLowerBound",
    "ExactLikelihood",
    "FieldEnergy",
    "FiniteDifferenceScoreMatching",
    "Fit",
    "Flow",
    "FlowContrastiveEstimation",
    "FlowSampler",
    "ForceMatching",
    "FourierTable",
    "Funnel",
    "GanDraws",
    "Gaussian",
    "GaussianDecoder",
    "GaussianMixture",
    "GaussianPerturbation",
    "GaussianProposal",
    "GaussianUnits",
    "GeneratorKL",
    "GeneratorNetwork",
    "GeneratorProposal",
    "GibbsWithGradients",
    "GradientNorm",
    "HeldOut",
    "Heun",
    "HorizontalFlip",
    "ImportanceLatents",
    "ImportanceWeightedBound",
    "InTurn",
    "IndependentMH",
    "IndependentUnits",
    "Info",
    "Integrated",
    "InvariantNetwork",
    "Ising",
    "JoinedUnits",
    "JointEnergyModel",
    "JointEvent",
    "Jumps",
    "Kernel",
    "LabelDropping",
    "LabelEmbedding",
    "LatentEnergy",
    "LatentPriorLikelihood",
    "Lattice",
    "LevelFeatures",
    "LevelScore",
    "ListedLatents",
    "LogNormal",
    "LogSumExp",
    "LogUniform",
    "LogZ",
    "Loss",
    "MachineRungs",
    "ManyWell",
    "MaxProbability",
    "MaximumLikelihood",
    "MeanFieldEnergy",
    "MeanFieldPCD",
    "MinibatchEnergy",
    "MinimumProbabilityFlow",
    "Model",
    "MultiLevelDenoising",
    "Multistate",
    "Multistep",
    "NoiseConditional",
    "NoiseConditionalUNet",
    "NoiseContrastiveEstimation",
    "NoisyNetwork",
    "Objective",
    "OfPart",
    "ParallelTempering",
    "Particles",
    "PathAuxiliary",
    "PathTempering",
    "PeriodicMLP",
    "PersistentContrastiveDivergence",
    "Phases",
    "Pinwheel",
    "PooledUnits",
    "Potts",
    "PredictorCorrector",
    "PrioritisedBuffer",
    "PseudoLikelihood",
    "RBMGibbs",
    "RBMTransformer",
    "Ramp",
    "RandomWalk",
    "RankingNCE",
    "RatioMatching",
    "ReLUUnits",
    "Recipe",
    "ReconstructionEnergy",
    "RecoveryEnergy",
    "RecoveryLikelihood",
    "Reflected",
    "Reparametrised",
    "ReplayBuffer",
    "ResidualEnergy",
    "ReverseKL",
    "Ring",
    "Rosenbrock",
    "RowBounds",
    "Rows",
    "SamplerKL",
    "Samples",
    "Scaling",
    "ScoreMatching",
    "Separation",
    "Shift",
    "ShortRun",
    "SimulatedBracket",
    "SingleSiteGibbs",
    "SleepPhase",
    "SlicedScoreMatching",
    "SparseCouplings",
    "Sphere",
    "SphericalHMC",
    "SpinUnits",
    "Starts",
    "State",
    "Summary",
    "SummedScore",
    "Tabulated",
    "Target",
    "Telescope",
    "TelescopingRatios",
    "TemperedTransitions",
    "Tilted",
    "Torus",
    "Tractable",
    "TrainingSettings",
    "TransportFit",
    "TransportLangevin",
    "TransportMatching",
    "Transported",
    "Tuned",
    "TunedLadder",
    "TwoMoons",
    "Typicality",
    "Underdamped",
    "Uniform",
    "UniformNoise",
    "Upsampling",
    "VarianceExploding",
    "VariancePreserving",
    "VonMises",
    "VonMisesFisher",
    "VonMisesMixture",
    "WeightedDraws",
    "WeightedSum",
    "World",
    "Wrapped",
    "ais",
    "ancestral_sample",
    "anneal",
    "annealed_chains",
    "auroc",
    "autocorrelation_figure",
    "average_precision",
    "average_product_correction",
    "batch_typicality",
    "belief_bound",
    "bits_per_dim",
    "bracket",
    "bridge",
    "calibrate",
    "calibrate_discriminator",
    "chain_mean",
    "chain_quantile",
    "chain_sd",
    "check_normalisable",
    "circular_spline_flow",
    "classifier_test",
    "compose",
    "compose_scores",
    "constraints",
    "contact_scores",
    "continue_chains",
    "coupling_norms",
    "datasets",
    "ddls",
    "descend",
    "detector_of",
    "disagreement",
    "effective_sample_size",
    "energy_bfmi",
    "energy_distance",
    "enumeration",
    "evaluate",
    "evidence_lower_bound",
    "exact_deep_log_likelihood",
    "exact_log_likelihood",
    "exact_log_z",
    "false_positive_rate",
    "find_mode",
    "fit",
    "fit_diffusion",
    "fit_flow",
    "fit_generator",
    "fit_transport",
    "fit_von_mises_mixture",
    "flow_log_prob",
    "frechet_distance",
    "gaussian_mixture",
    "geometric",
    "geometric_alphas",
    "grid_total_variation",
    "guided",
    "guided_by_label",
    "importance_sampling",
    "inverse_autoregressive_flow",
    "join_processes",
    "joined_buffer",
    "kaufman",
    "kernel_mmd",
    "label_log_probs",
    "latent_energy",
    "latent_log_likelihood",
    "lattice_gas_gauge",
    "lebm",
    "level_ladder",
    "level_score",
    "load",
    "load_kernel",
    "load_model",
    "mahalanobis",
    "mbar",
    "mean_field",
    "memorisation",
    "metropolis_hastings",
    "mixture",
    "molecules",
    "nearest_neighbour_entropy",
    "nearest_neighbours",
    "neural_transport",
    "noise_levels",
    "open_rows",
    "over_processes",
    "own_rows",
    "planning",
    "pretrain",
    "quadrature",
    "quantile_effective_sample_size",
    "raise_lower_bound",
    "rank_figure",
    "rbm_path",
    "refine_posterior",
    "refine_proposal",
    "rejection",
    "reparametrised",
    "rescaled",
    "reverse",
    "reverse_ais",
    "reverse_kl_bound",
    "round_trips",
    "sample",
    "sample_transported",
    "save_kernel",
    "save_model",
    "scale_from_weight",
    "score_of",
    "separation",
    "sequences",
    "simulated_bracket",
    "sliced_wasserstein",
    "smc",
    "spline_flow",
    "split_buffer",
    "split_r_hat",
    "tail_effective_sample_size",
    "temper",
    "thermodynamic_integration",
    "tilted",
    "trace_figure",
    "train_belief_network",
    "trajectory",
    "transfer_matrix",
    "tune",
    "tune_ladder",
    "tune_mclmc",
    "tune_path",
    "typicality",
    "unconstrain",
    "vae",
    "variational_bound",
    "warm_up",
    "windowed",
    "world",
    "zero_sum_gauge",
]
