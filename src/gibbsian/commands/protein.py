"""Commands about proteins, by name: each lives in a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Callable

from gibbsian.commands.protein_family import family, score_sequences
from gibbsian.commands.protein_landscape import landscape
from gibbsian.commands.protein_sample import sample_conformations
from gibbsian.commands.protein_simulate import simulate

PROTEIN_COMMANDS: dict[str, Callable[..., None]] = {
    "simulate": simulate,
    "landscape": landscape,
    "sample": sample_conformations,
    "family": family,
    "score-sequences": score_sequences,
}
"""What ``gibbsian protein`` offers."""
