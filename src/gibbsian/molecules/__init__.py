"""Molecules: force fields as energies, simulations, trajectories, and learned landscapes of conformations."""

from gibbsian.molecules.backmapping import build_conformations, with_torsions
from gibbsian.molecules.basins import Basin, basin_differences
from gibbsian.molecules.boltzmann_draws import WeightedDraws, learn_proposal, weighted_draws
from gibbsian.molecules.conformations import Landscape, landscape_of
from gibbsian.molecules.decoys import perturbed, rank_decoys
from gibbsian.molecules.dipeptide import PHI, PSI
from gibbsian.molecules.dynamics import Dynamics, SimulationResult
from gibbsian.molecules.features import Torsions, aligned, distances, fluctuations, residue_pairs, torsions
from gibbsian.molecules.frames import check_frames
from gibbsian.molecules.internal import InternalCoordinates
from gibbsian.molecules.internal_energy import InternalEnergy
from gibbsian.molecules.metadynamics import Bias
from gibbsian.molecules.physical import MolecularEnergy
from gibbsian.molecules.proposal import CartesianProposal, InternalProposal
from gibbsian.molecules.proposal_training import ProposalTraining, fit_proposal
from gibbsian.molecules.restraints import (
    Centred,
    DistanceRestraint,
    OfVariables,
    TorsionRestraint,
    bond_angles,
    pair_distances,
    torsion_angles,
)
from gibbsian.molecules.reweighting import (
    bias_log_weights,
    effective_sample_size,
    normalised_weights,
    temperature_log_weights,
    weighted_average,
)
from gibbsian.molecules.simulation import simulate
from gibbsian.molecules.sources import Frames, read_frames
from gibbsian.molecules.systems import MolecularSystem, alanine_dipeptide, system_from_pdb
from gibbsian.molecules.thermal_frames import thermal_frames
from gibbsian.molecules.torsion_model import TorsionModel, load_torsion_model, save_torsion_model
from gibbsian.molecules.torsion_settings import TorsionTraining
from gibbsian.molecules.torsion_training import fit_torsion_energy
from gibbsian.molecules.trajectories import read_trajectory, trajectory_chunks
from gibbsian.molecules.zmatrix import internal_coordinates

__all__ = [
    "PHI",
    "PSI",
    "Basin",
    "Bias",
    "CartesianProposal",
    "Centred",
    "DistanceRestraint",
    "Dynamics",
    "Frames",
    "InternalCoordinates",
    "InternalEnergy",
    "InternalProposal",
    "Landscape",
    "MolecularEnergy",
    "MolecularSystem",
    "OfVariables",
    "ProposalTraining",
    "SimulationResult",
    "TorsionModel",
    "TorsionRestraint",
    "TorsionTraining",
    "Torsions",
    "WeightedDraws",
    "alanine_dipeptide",
    "aligned",
    "basin_differences",
    "bias_log_weights",
    "bond_angles",
    "build_conformations",
    "check_frames",
    "distances",
    "effective_sample_size",
    "fit_proposal",
    "fit_torsion_energy",
    "fluctuations",
    "internal_coordinates",
    "landscape_of",
    "learn_proposal",
    "load_torsion_model",
    "normalised_weights",
    "pair_distances",
    "perturbed",
    "rank_decoys",
    "read_frames",
    "read_trajectory",
    "residue_pairs",
    "save_torsion_model",
    "simulate",
    "system_from_pdb",
    "temperature_log_weights",
    "thermal_frames",
    "torsion_angles",
    "torsions",
    "trajectory_chunks",
    "weighted_average",
    "weighted_draws",
    "with_torsions",
]
