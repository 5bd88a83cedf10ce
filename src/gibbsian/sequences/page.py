"""The report page of a family."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gibbsian.diagnostics.estimate import plain, with_error
from gibbsian.report.canvas import svg
from gibbsian.report.charts import energy_histograms
from gibbsian.report.markup import card, definitions, figure, fitted, panels, paragraph, table
from gibbsian.report.shell import duration, header, html_page, save_page
from gibbsian.sequences import figures
from gibbsian.sequences.alignment import Alignment
from gibbsian.sequences.contacts import CUTOFF, SEPARATION, Structure
from gibbsian.sequences.evaluation import Evaluation
from gibbsian.sequences.family import Family
from gibbsian.sequences.outputs import strongest_epistasis

NAMES = {
    "pseudo-likelihood": "Potts model by pseudo-likelihood",
    "boltzmann": "Potts model by Boltzmann learning",
    "rbm": "restricted Boltzmann machine",
}

MIXED = 1.01
"""R-hat up to which starts are forgotten."""


def write_page(
    path: Path,
    family: Family,
    alignment: Alignment,
    found: Evaluation,
    structure: Structure | None = None,
    *,
    name: str = "",
    command: str = "",
    seconds: float | None = None,
) -> Path:
    """Write the report of a family; the errors are those of `save_page`.

    Parameters
    ----------
    path
        Of the file.
    family, alignment, found, structure
        What of.
    name
        Of the family.
    command
        That made it.
    seconds
        It took.
    """
    info = family.info
    facts = [
        f"{len(alignment):,} sequences, {plain(alignment.effective, 5)} effective",
        f"{info.columns} columns, {len(info.alphabet)} letters",
        NAMES[info.by],
    ]
    facts += [] if seconds is None else [duration(seconds)]
    sections = (
        ("family", "The family", _family(family, alignment, found)),
        ("contacts", "Contacts", _contacts(family, found, structure)),
        ("mutations", "Mutation effects", _mutations(family, found)),
        ("draws", "Drawn sequences", _draws(family, alignment, found)),
        ("likelihood", "Log-likelihood", _likelihood(found, alignment)),
        ("run", "The run", _run(family, command)),
    )
    top = header("Protein family: report of a run", name or "A family", facts) + _cards(family, found)
    return save_page(path, html_page(f"{name or 'A family'}: Gibbsian", top, sections))


def _cards(family: Family, found: Evaluation) -> str:
    parts = []
    if found.precision:
        own = found.precision[family.info.by]
        n = own.marks["L"]
        good = own.at(n) - own.base_rate > 3 * max(own.stderr(n), 1e-9)
        parts.append(
            card(
                f"Precision of the first {n} contacts",
                with_error(own.at(n), own.stderr(n)) if own.stderr(n) else plain(own.at(n), 3),
                f"{plain(own.base_rate, 3)} at random",
                "good" if good else "bad",
            )
        )
    r = found.agreement.connected
    parts.append(
        card(
            "Connected pairs, drawn and natural",
            plain(r, 3),
            f"Pearson correlation; {plain(found.ceiling.connected, 3)} for as many of the family's own",
            "good" if r > 0.9 * found.ceiling.connected else "caution",
        )
    )
    mixed = found.draws.r_hat <= MIXED
    parts.append(
        card(
            "R-hat of the chains",
            plain(found.draws.r_hat, 4),
            "starts are forgotten" if mixed else "chains remember where they started: more --sweeps",
            "good" if mixed else "bad",
        )
    )
    gain = found.log_likelihood.value - found.independent.value
    parts.append(
        card(
            "Log-likelihood per sequence",
            str(found.log_likelihood),
            f"nats, {plain(gain, 3)} above independent columns",
            "good" if gain > 0 else "caution",
        )
    )
    return f'<div class="cards">{"".join(parts)}</div>'


def _family(family: Family, alignment: Alignment, found: Evaluation) -> str:
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


def _contacts(family: Family, found: Evaluation, structure: Structure | None) -> str:
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


def _mutations(family: Family, found: Evaluation) -> str:
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
    words = (
        f"Of {info.reference_name} ({info.reference}): the change of log-probability when one letter changes, in nats. "
        f"{harm:.0%} of all single mutations lower it. All are in mutations.csv, pairs in double_mutations.csv."
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


def _draws(family: Family, alignment: Alignment, found: Evaluation) -> str:
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


def _likelihood(found: Evaluation, alignment: Alignment) -> str:
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


def _run(family: Family, command: str) -> str:
    told = {name.replace("_", " "): value for name, value in family.info.settings.items() if value is not None}
    return definitions(({"command": command} if command else {}) | told)
