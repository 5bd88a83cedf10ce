"""What a run of chains returns: where they stand, what was kept, and how it went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from gibbsian.diagnostics.export import to_arviz
from gibbsian.diagnostics.summary import Summary, summarise
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel, State

if TYPE_CHECKING:
    from arviz import InferenceData


@dataclass(frozen=True)
class Samples:
    """What a run of chains returns.

    Attributes
    ----------
    state
        Where the chains stand; pass it back to `sample` to go on.
    draws
        Kept positions, ``(kept, n, *event)``, or ``None`` when none were asked for.
    acceptance
        Mean acceptance probability of each chain, ``(n,)``.
    nonfinite
        Steps of each chain whose proposal was not finite, ``(n,)``: rejected, or restarted when unadjusted.
    details
        What else the kernel tells, by name: the mean over the steps of each chain, ``(n,)``.
    kept
        At each kept position, ``(kept, n)``: its ``energy``, and ``acceptance`` and the kernel's details of the step
        that led there.
    kernel
        The kernel that ran.
    steps
        Steps made, warm-up included.
    seconds
        Wall time, compilation included.
    compilation
        Seconds of those in which something was compiled.
    own
        Whether these are the chains of one process out of several, as ``sample(..., own=True)`` returns them.
    """

    state: State
    draws: Tensor | None
    acceptance: Tensor
    nonfinite: Tensor
    kernel: Kernel
    steps: int
    seconds: float
    details: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    compilation: float = 0.0
    own: bool = False

    @property
    def x(self) -> Tensor:
        """Final positions, ``(n, *event)``."""
        return self.state.x

    def summary(self, rows: int = 10) -> Summary:
        """Mean, quantiles, effective sizes and R-hat of every coordinate; printed, it says first what is wrong.

        Where these are the chains of one process out of several (``own``), it is of those of all, and all ask for it.

        Parameters
        ----------
        rows
            Coordinates that the table lists at most: the worst ones when there are more.

        Raises
        ------
        OptionError
            If no draws were kept.
        ShapeError
            If fewer than four were.
        """
        return summarise(
            self._kept_draws("A summary"),
            acceptance=self.acceptance,
            nonfinite=self.nonfinite,
            steps=self.steps,
            kept=self.kept,
            adjusted=hasattr(self.kernel, "target_acceptance"),
            rows=rows,
            title=str(self.kernel),
            own=self.own,
        )

    def to_arviz(self, name: str = "x") -> InferenceData:
        """Export to ArviZ: draws as its posterior, what was kept beside them as its sample statistics.

        Parameters
        ----------
        name
            What ArviZ shall call the positions.

        Returns
        -------
        InferenceData
            A ``DataTree`` from version 1 of ArviZ on.

        Raises
        ------
        OptionError
            If no draws were kept.
        MissingPackageError
            If ArviZ is not installed.
        """
        return to_arviz(self._kept_draws("ArviZ"), self.kept, name=name, kernel=str(self.kernel))

    def _kept_draws(self, wanted_by: str) -> Tensor:
        if self.draws is None:
            raise OptionError(f"{wanted_by} needs draws, and this run kept none; use sample(..., thin=1).")
        return self.draws

    def __repr__(self) -> str:
        """Lead with what went wrong, if anything did."""
        bad = int(self.nonfinite.sum())
        warning = f"{bad} non-finite proposals, " if bad else ""
        kept = "" if self.draws is None else f", {self.draws.shape[0]} kept"
        compiling = f" ({self.compilation:.1f} s of it compiling)" if self.compilation else ""
        return (
            f"Samples({warning}{self.x.shape[0]} chains of {tuple(self.x.shape[1:])}, {self.steps} steps{kept}, "
            f"acceptance {float(self.acceptance.mean()):.3f}, {self.seconds:.2f} s{compiling}, {self.kernel})"
        )
