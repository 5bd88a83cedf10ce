"""What a fitted family is worth: contacts, draws beside the family, likelihoods between bounds, and mutations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.partition.base import LogZ
from gibbsian.sequences.alignment import Alignment
from gibbsian.sequences.contacts import Precision, Structure, precision
from gibbsian.sequences.draws import Draws, draw_family
from gibbsian.sequences.family import Family
from gibbsian.sequences.frequencies import Agreement, Statistics, agreement, statistics
from gibbsian.sequences.likelihood import family_log_z, independent_log_prob
from gibbsian.sequences.mean_field import mean_field_potts
from gibbsian.sequences.mutations import DoubleMutations


@dataclass(frozen=True)
class Evaluation:
    """What was found of a family.

    Attributes
    ----------
    scores
        Of contacts, ``(L, L)``.
    precision
        By name, against a structure: of the model, and of mean field beside it; empty without one.
    draws
        Sequences of the model.
    family, drawn
        Statistics of both.
    agreement
        Of these, and of as many sequences taken from the family itself, which is the most that can be reached.
    ceiling
        The latter.
    log_z
        Between bounds.
    log_likelihood, independent
        Weighted mean over the family, in nats per sequence: by the model, and by independent columns.
    single
        Effects of mutations of the reference, ``(L, K)``.
    double
        Of pairs of them.
    """

    scores: Tensor
    precision: dict[str, Precision]
    draws: Draws
    family: Statistics
    drawn: Statistics
    agreement: Agreement
    ceiling: Agreement
    log_z: LogZ
    log_likelihood: Estimate
    independent: Estimate
    single: Tensor
    double: DoubleMutations

    def to_dict(self) -> dict[str, Any]:
        """All single numbers, as plain values."""
        z = self.log_z
        return {
            "precision": {
                name: {mark: found.at(n) for mark, n in found.marks.items()}
                | {f"{mark} stderr": found.stderr(n) for mark, n in found.marks.items()}
                | {"base rate": found.base_rate, "separation": found.separation, "cutoff": found.cutoff}
                for name, found in self.precision.items()
            },
            "sequences drawn": len(self.draws.codes),
            "agreement": self.agreement._asdict(),
            "agreement of as many sequences of the family": self.ceiling._asdict(),
            "r_hat": self.draws.r_hat,
            "autocorrelation": self.draws.autocorrelation,
            "sweeps": self.draws.sweeps,
            "log_z": {name: float(getattr(z, name)) for name in ("value", "stderr", "lower", "upper", "ess")},
            "log_likelihood": [self.log_likelihood.value, self.log_likelihood.stderr],
            "log_likelihood of independent columns": [self.independent.value, self.independent.stderr],
        }


def evaluate_family(
    family: Family,
    alignment: Alignment,
    rng: Generator,
    *,
    structure: Structure | None = None,
    draws: int = 10_000,
    sweeps: int = 200,
    chains: int = 400,
    temperatures: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Evaluation:
    """Ask all of a family.

    Parameters
    ----------
    family, alignment
        The model, and what it was fitted to.
    rng
        The generator.
    structure
        To compare contacts with.
    draws, sweeps
        As of `draw_family`.
    chains, temperatures
        As of `family_log_z`.
    say
        Told what is being done.
    """
    scores = family.contacts()
    own = statistics(alignment.codes, alignment.letters, alignment.weights)
    found: dict[str, Precision] = {}
    if structure is not None:
        say("comparing contacts")
        found = {family.info.by: precision(scores, structure)}
        mean_field = Family(family.energy, family.shares, mean_field_potts(own), family.info)
        found["mean field"] = precision(mean_field.contacts(), structure)
    say("drawing sequences")
    drawn = draw_family(family, draws, rng, sweeps=sweeps, start=alignment.codes)
    model = statistics(drawn.codes, alignment.letters)
    again = torch.multinomial(alignment.weights, draws, True, generator=rng)
    say("bracketing log Z")
    log_z = family_log_z(family, drawn.codes, rng, chains=chains, temperatures=temperatures)
    logs = -family.energies(alignment.codes).double() - log_z.value
    say("scanning mutations")
    return Evaluation(
        scores,
        found,
        drawn,
        own,
        model,
        agreement(own, model),
        agreement(own, statistics(alignment.codes[again], alignment.letters)),
        log_z,
        weighted_mean(logs, alignment.weights),
        weighted_mean(independent_log_prob(family, alignment.codes), alignment.weights),
        family.mutations(),
        family.double_mutations(),
    )


def weighted_mean(values: Tensor, weights: Tensor) -> Estimate:
    """Mean of values by weights that count relatives as one, with its standard error."""
    w = weights.double() / weights.double().sum()
    mean = float((w * values.double()).sum())
    # As many values as the weights add to, not as there are rows.
    spread = float((w * (values.double() - mean).square()).sum())
    return Estimate(mean, (spread / float(weights.sum())) ** 0.5)
