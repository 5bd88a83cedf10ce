"""Settings of the training of torsion energies."""

from __future__ import annotations

from dataclasses import dataclass

from gibbsian.errors import OptionError, unknown_name

OBJECTIVES = ("exact", "nce", "denoising", "score", "pcd")
"""Exact likelihood, noise contrastive estimation, denoising and exact score matching, persistent chains."""


MOST_BY_NCE = 8
"""Torsions up to which noise covers data well enough to be contrasted with."""


@dataclass(frozen=True)
class TorsionTraining:
    """Settings of `fit_torsion_energy`.

    Parameters
    ----------
    objective
        One of `OBJECTIVES`, or ``"auto"``: exact for two torsions, nce up to eight, denoising for more.
    hidden, harmonics
        Of each `PeriodicMLP`.
    members
        Networks whose mean is the energy.
    replicates
        Networks on bootstrap resamples, for errors; 0 for none.
    steps
        Numbers of training steps to try, in ascending order; one number trains for so many.
    folds
        Of the cross-validation that chooses among them.
    batch_size, learning_rate
        Of the training.
    sigma
        Noise of denoising, in radians.
    components
        Of the mixture to contrast with, and from which chains start.
    noise
        What to contrast with: ``"mixture"``, or ``"flow"``, a flow of circular splines (zuko) fitted
        to the frames first.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    objective: str = "auto"
    hidden: tuple[int, ...] = (64, 64)
    harmonics: int = 3
    members: int = 2
    replicates: int = 4
    steps: tuple[int, ...] = (800, 1600, 3200)
    folds: int = 2
    batch_size: int = 512
    learning_rate: float = 3e-3
    sigma: float = 0.15
    components: int = 8
    noise: str = "mixture"

    def __post_init__(self) -> None:
        if self.objective not in ("auto", *OBJECTIVES):
            raise unknown_name("objective of torsions", self.objective, ("auto", *OBJECTIVES))
        if self.noise not in ("mixture", "flow"):
            raise unknown_name("noise of torsions", self.noise, ("mixture", "flow"))
        if self.members < 1 or self.replicates < 0 or self.folds < 2 or self.batch_size < 2:
            raise OptionError(
                "Training takes 1 or more members, 0 or more replicates, 2 or more folds and rows in a batch; got "
                f"{self.members}, {self.replicates}, {self.folds}, {self.batch_size}."
            )
        if not self.steps or min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise OptionError(f"steps lists ascending numbers of steps, such as 400 800 1600; got {self.steps}.")
        if not (self.learning_rate > 0 and self.sigma > 0):
            raise OptionError(f"Learning rate and sigma are positive; got {self.learning_rate} and {self.sigma}.")
