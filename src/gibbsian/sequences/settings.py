"""How a family is fitted: one frozen dataclass, where every default lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gibbsian.errors import OptionError
from gibbsian.sequences.family import METHODS
from gibbsian.training.settings import TrainingSettings

FEWEST_CHAINS = 50
"""Of Boltzmann learning and machines."""


@dataclass(frozen=True)
class FamilySettings:
    """How `fit_family` fits.

    Parameters
    ----------
    by
        ``"pseudo-likelihood"`` (fast; contacts and mutations), ``"boltzmann"`` (a model whose draws are like the
        family) or ``"rbm"``.
    coupling_penalty
        On squared couplings; when ``None`` 0.01 for pseudo-likelihood, which is best for contacts, and 0.0001 for
        Boltzmann learning, which keeps close to the family's statistics.
    iterations
        Of pseudo-likelihood, at most.
    steps
        Of Boltzmann learning or a machine; when ``None`` 2000 and 4000.
    chains, sweeps
        Persistent chains, and the sweeps they make between two steps.
    tempering
        Temperatures of parallel tempering in Boltzmann learning; 1 for none.
    hottest
        The lowest inverse temperature.
    pseudocount
        Share of uniform letters mixed into the statistics that Boltzmann learning matches.
    hidden
        Units of a machine.
    batch_size
        Sequences per step of a machine.
    learning_rate
        When ``None`` 0.05 for Boltzmann learning (plain gradient with momentum 0.9) and 0.002 for a machine (AdamW).

    Raises
    ------
    OptionError
        If a value is out of its range.
    """

    by: str = "pseudo-likelihood"
    coupling_penalty: float | None = None
    iterations: int = 200
    steps: int | None = None
    chains: int = 2000
    sweeps: int = 2
    tempering: int = 1
    hottest: float = 0.7
    pseudocount: float = 0.001
    hidden: int = 100
    batch_size: int = 500
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.by not in METHODS:
            raise OptionError(f"by is one of {', '.join(METHODS)}; got {self.by!r}.")
        for name in ("iterations", "sweeps", "tempering", "hidden", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is 1 or more; got {getattr(self, name)}.")
        if self.chains < FEWEST_CHAINS:
            raise OptionError(
                f"chains is {FEWEST_CHAINS} or more, as statistics of pairs are taken over them; got {self.chains}."
            )
        if self.steps is not None and self.steps < 1:
            raise OptionError(f"steps is 1 or more; got {self.steps}.")
        if not 0.0 < self.hottest < 1.0 or not 0.0 <= self.pseudocount < 1.0:
            raise OptionError(
                f"hottest lies between 0 and 1 and pseudocount from 0 to below 1; got {self.hottest} and "
                f"{self.pseudocount}."
            )

    @property
    def penalty(self) -> float:
        """The penalty on squared couplings that is used."""
        usual = 0.01 if self.by == "pseudo-likelihood" else 0.0001
        return usual if self.coupling_penalty is None else self.coupling_penalty

    @property
    def told(self) -> dict[str, Any]:
        """The settings that the way of fitting reads, by name."""
        if self.by == "pseudo-likelihood":
            return {"by": self.by, "coupling_penalty": self.penalty, "iterations": self.iterations}
        training = self.training
        chains = {"steps": training.steps, "learning_rate": training.learning_rate, "chains": self.chains}
        found = {"by": self.by, **chains, "sweeps": self.sweeps}
        if self.by == "rbm":
            return found | {"hidden": self.hidden, "batch_size": self.batch_size}
        found |= {"coupling_penalty": self.penalty, "pseudocount": self.pseudocount}
        return found if self.tempering == 1 else found | {"tempering": self.tempering, "hottest": self.hottest}

    @property
    def training(self) -> TrainingSettings:
        """Settings of `fit`, for what is trained by chains."""
        if self.by == "rbm":
            return TrainingSettings(
                steps=self.steps or 4000,
                batch_size=self.batch_size,
                learning_rate=0.002 if self.learning_rate is None else self.learning_rate,
                clip_norm=0.0,
                ema_decay=0.995,
                log_every=50,
                checkpoint_every=500,
            )
        return TrainingSettings(
            steps=self.steps or 2000,
            batch_size=2,
            optimizer="sgd",
            learning_rate=0.05 if self.learning_rate is None else self.learning_rate,
            momentum=0.9,
            clip_norm=0.0,
            ema_decay=0.98,
            log_every=25,
            checkpoint_every=250,
            final_learning_rate_factor=0.05,
        )
