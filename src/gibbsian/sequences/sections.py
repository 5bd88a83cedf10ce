"""Sections of the report page of a family, as markup."""

from __future__ import annotations

import numpy as np

from gibbsian.diagnostics.estimate import plain, with_error
from gibbsian.report.canvas import svg
from gibbsian.report.charts import energy_histograms
from gibbsian.report.markup import definitions, figure, fitted, panels, paragraph, table
from gibbsian.sequences import figures
from gibbsian.sequences.alignment import Alignment
from gibbsian.sequences.contacts import CUTOFF, SEPARATION, Structure
from gibbsian.sequences.evaluation import Evaluation
from gibbsian.sequences.family import Family
from gibbsian.sequences.outputs import strongest_epistasis


def family_section(family: Family, alignment: Alignment, found: Evaluation) -> str:
    """The profile and the numbers of an alignment."""
    shares = found.family.one.numpy()
    logo = fitted(
        lambda size, width: svg(
            f"logo-{size}",
            f"Sequence logo of {family.info.columns} columns; the consensus is {family.info.reference}.",
            lambda f: figures.profile_logo(f, shares, family.info.alphabet),
            width,
            0.7 + 1.1 * max(1, -(-family.info.columns // 70)),
        )
    )
    gaps = float((alignment.codes == 0).float().mean())
    told = {
        "sequences": f"{len(alignment):,}",
        "of which differ": f"{alignment.distinct:,}",
        "effective number": plain(alignment.effective, 5),
        "gaps": f"{gaps:.1%}",
        "focus": alignment.focus or "none",
    }
    few = alignment.effective < alignment.length
    words = "Relatives count together as one: weights add to the effective number of sequences." + (
        " There are fewer than columns: contacts and couplings are mostly guesses." if few else ""
    )
    caption = (
        "Each column's letters, as high as the column is informative, in bits: conserved columns are high. Colours: "
        "without water blue, positive red, negative violet, polar and small green. Columns count from 1."
    )
    return definitions(told) + paragraph(words) + figure("Profile", logo, caption)


def contacts_section(family: Family, found: Evaluation, structure: Structure | None) -> str:
    """The contact map, and the precision beside that of pairs at random."""
    pairs = 2 * family.info.columns
    distances = None if structure is None else structure.distances.numpy()
    drawn = svg(
        "contacts",
        f"Map of the {pairs} pairs of columns of highest score.",
        lambda f: figures.contact_map(f, found.scores.numpy(), distances, pairs, SEPARATION, CUTOFF),
        4.2,
        4.4,
    )
    words = (
        f"Pairs at least {SEPARATION} columns apart, by the Frobenius norm of their couplings in the zero-sum gauge "
        "after the average product correction; all are in contacts.csv."
    )
    below = (
        "Above the diagonal the pairs of highest score"
        + (
            "; below it all scores."
            if structure is None
            else f"; below it the structure's contacts within {CUTOFF:g} Å."
        )
        + " Lines beside the diagonal are strands side by side or helices, lines across it strands against each other."
    )
    shown = [figure(f"The first {pairs} pairs (2L)", drawn, below)]
    if not found.precision:
        return paragraph(words) + panels(shown)
    curve = svg(
        "precision",
        "Precision of contacts by the number of pairs.",
        lambda f: figures.precision_curve(f, found.precision),
        4.2,
        3.2,
    )
    shown.append(
        figure(
            "Precision",
            curve,
            "The share of contacts among the first pairs. Good: near 1 up to L pairs, and well above the broken line, "
            "pairs taken at random.",
        )
    )
    any_one = next(iter(found.precision.values()))
    rows = [
        (name, [_precise(each, n) for n in each.marks.values()] + [plain(each.base_rate, 3)], "")
        for name, each in found.precision.items()
    ]
    heads = ["precision of the first", *(f"{mark} = {n}" for mark, n in any_one.marks.items()), "at random"]
    return paragraph(words) + panels(shown) + table(heads, rows)


def _precise(found: object, n: int) -> str:
    value, error = found.at(n), found.stderr(n)  # type: ignore[attr-defined]
    return f"{value:.3f} ± {error:.3f}"


def mutations_section(family: Family, found: Evaluation) -> str:
    """Heat maps of single and double mutations."""
    info = family.info
    lines = max(1, -(-info.columns // 90))
    single = fitted(
        lambda size, width: svg(
            f"mutations-{size}",
            f"Effects of single mutations of {info.reference_name}, {info.columns} columns by {len(info.alphabet)}.",
            lambda f: figures.mutation_map(f, found.single.numpy(), info.alphabet, info.reference),
            width,
            0.4 + 2.3 * lines,
        )
    )
    double = svg(
        "epistasis",
        "Strongest epistasis of each pair of columns.",
        lambda f: figures.epistasis_map(f, strongest_epistasis(family, found).numpy()),
        4.6,
        3.9,
    )
    effects = found.single.numpy()
    harm = float(np.mean(effects[effects != 0.0] < 0.0))
    whose = "the consensus" if info.reference_name == "consensus" else info.reference_name
    words = (
        f"Of {whose} ({info.reference}): the change of log-probability when one letter changes, in nats. {harm:.0%} of "
        "all single mutations lower it. All are in mutations.csv, pairs in double_mutations.csv."
    )
    return (
        paragraph(words)
        + figure(
            "Single mutations",
            single,
            "Orange raises the probability, blue lowers it; dots are the sequence's own letters. The first row is the "
            "gap. Columns blue from top to bottom bear no change.",
        )
        + panels(
            [
                figure(
                    "Double mutations",
                    double,
                    "For each pair of columns the epistasis of largest magnitude: what two mutations do together "
                    "beyond what each does alone. Orange: they make up for each other.",
                )
            ]
        )
    )


def draws_section(family: Family, alignment: Alignment, found: Evaluation) -> str:
    """Drawn sequences beside the family's, and their chains."""
    a, own = found.agreement, found.ceiling
    rows = [
        (words, [plain(getattr(a, key), 3), plain(getattr(own, key), 3)], "")
        for key, words in (
            ("one", "letters of a column (Pearson)"),
            ("two", "letters of two columns (Pearson)"),
            ("connected", "the same less independent columns, connected (Pearson)"),
            ("slope", "slope of connected statistics"),
        )
    ]
    both = panels(
        [
            figure(
                "Connected pairs",
                svg(
                    "connected",
                    "Connected two-point statistics of drawn sequences against the family's.",
                    lambda f: figures.agreement_map(
                        f,
                        found.family.connected.flatten().numpy(),
                        found.drawn.connected.flatten().numpy(),
                        "connected",
                    ),
                    3.6,
                    3.6,
                ),
                "Each point is two letters in two columns. Good: along the diagonal. Flatter: couplings are too weak.",
            ),
            figure(
                "Single letters",
                svg(
                    "letters",
                    "Shares of letters in drawn sequences against the family's.",
                    lambda f: figures.agreement_map(
                        f, found.family.one.flatten().numpy(), found.drawn.one.flatten().numpy(), "share"
                    ),
                    3.6,
                    3.6,
                ),
                "Each point is a letter in a column.",
            ),
        ]
    )
    energies = family.energies(alignment.codes)
    weights = alignment.weights / alignment.weights.sum()
    mean = float((weights * energies).sum())
    chains = panels(
        [
            figure(
                "Chains",
                svg(
                    "chains",
                    "Mean energies of chains over sweeps.",
                    lambda f: figures.energy_traces(f, found.draws.trace.numpy(), mean),
                    4.0,
                    2.9,
                ),
                "Chains from both starts should meet long before the end.",
            ),
            figure(
                "Energies",
                energy_histograms("energies", {"data": energies.numpy(), "samples": found.draws.energies.numpy()}, 4.0),
                "Natural sequences (unweighted) beside drawn ones.",
            ),
        ]
    )
    words = (
        f"{len(found.draws.codes):,} chains of {found.draws.sweeps} sweeps each, half of which started at the family's "
        f"own sequences; R-hat of their energies {plain(found.draws.r_hat, 4)}, autocorrelation time "
        f"{plain(found.draws.autocorrelation, 3)} sweeps. They are in samples.fasta."
    )
    heads = ["agreement with the family", "drawn sequences", "as many of the family's own"]
    return paragraph(words) + table(heads, rows) + both + chains


def likelihood_section(found: Evaluation, alignment: Alignment) -> str:
    """Log Z between its bounds, and mean log-likelihoods."""
    z = found.log_z
    rows = [
        ("the model", [str(found.log_likelihood), plain(found.log_likelihood.value / alignment.length, 4)], ""),
        ("independent columns", [str(found.independent), plain(found.independent.value / alignment.length, 4)], ""),
    ]
    words = (
        f"log Z is {with_error(float(z.value), float(z.stderr))}, between {plain(float(z.lower), 5)} and "
        f"{plain(float(z.upper), 5)} with 99 % confidence, by annealing from independent columns and back. The means "
        "below are over the sequences that the model was fitted to, by weight; others of the family would do worse."
    )
    return paragraph(words) + table(["log-likelihood", "nats per sequence", "per column"], rows)


def run_section(family: Family, command: str) -> str:
    """The settings."""
    told = {name.replace("_", " "): value for name, value in family.info.settings.items() if value is not None}
    return definitions(({"command": command} if command else {}) | told)
