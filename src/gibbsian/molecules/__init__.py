"""Molecules: force fields as energies, simulations, trajectories, and learned landscapes of conformations."""

from gibbsian.molecules.backmapping import build_conformations, with_torsions
from gibbsian.molecules.basins import Basin, basin_differences
from gibbsian.molecules.conformations import Landscape, landscape_of
from gibbsian.molecules.decoys import perturbed, rank_decoys
from gibbsian.molecules.dynamics import Dynamics, SimulationResult
from gibbsian.molecules.features import Torsions, aligned, distances, fluctuations, residue_pairs, torsions
from gibbsian.molecules.frames import check_frames
from gibbsian.molecules.metadynamics import Bias
from gibbsian.molecules.physical import MolecularEnergy
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
from gibbsian.molecules.torsion_model import TorsionModel, load_torsion_model, save_torsion_model
from gibbsian.molecules.torsion_settings import TorsionTraining
from gibbsian.molecules.torsion_training import fit_torsion_energy
from gibbsian.molecules.trajectories import read_trajectory, trajectory_chunks

__all__ = [
    "Basin",
    "Bias",
    "Centred",
    "DistanceRestraint",
    "Dynamics",
    "Frames",
    "Landscape",
    "MolecularEnergy",
    "MolecularSystem",
    "OfVariables",
    "SimulationResult",
    "TorsionModel",
    "TorsionRestraint",
    "TorsionTraining",
    "Torsions",
    "alanine_dipeptide",
    "aligned",
    "basin_differences",
    "bias_log_weights",
    "bond_angles",
    "build_conformations",
    "check_frames",
    "distances",
    "effective_sample_size",
    "fit_torsion_energy",
    "fluctuations",
    "landscape_of",
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
    "torsion_angles",
    "torsions",
    "trajectory_chunks",
    "weighted_average",
    "with_torsions",
]
