"""Families of aligned sequences: their Potts models and machines, and what is asked of these."""

from gibbsian.sequences.alignment import Alignment, alignment_of, read_alignment, read_sequences
from gibbsian.sequences.boltzmann import BoltzmannLearning
from gibbsian.sequences.contacts import Structure, precision, read_structure
from gibbsian.sequences.draws import draw_family
from gibbsian.sequences.family import Family, load_family, save_family
from gibbsian.sequences.fitting import fit_family
from gibbsian.sequences.frequencies import agreement, statistics
from gibbsian.sequences.gibbs import SequenceGibbs
from gibbsian.sequences.likelihood import family_log_z, independent_log_prob
from gibbsian.sequences.mean_field import mean_field_potts
from gibbsian.sequences.settings import FamilySettings
from gibbsian.sequences.weights import identity_weights

__all__ = [
    "Alignment",
    "BoltzmannLearning",
    "Family",
    "FamilySettings",
    "SequenceGibbs",
    "Structure",
    "agreement",
    "alignment_of",
    "draw_family",
    "family_log_z",
    "fit_family",
    "identity_weights",
    "independent_log_prob",
    "load_family",
    "mean_field_potts",
    "precision",
    "read_alignment",
    "read_sequences",
    "read_structure",
    "save_family",
    "statistics",
]
