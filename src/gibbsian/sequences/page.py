"""The report page of a family."""

from __future__ import annotations

from pathlib import Path

from gibbsian.diagnostics.estimate import plain, with_error
from gibbsian.report.markup import card
from gibbsian.report.shell import duration, header, html_page, save_page
from gibbsian.sequences.alignment import Alignment
from gibbsian.sequences.contacts import Structure
from gibbsian.sequences.evaluation import Evaluation
from gibbsian.sequences.family import Family
from gibbsian.sequences.sections import (
    contacts_section,
    draws_section,
    family_section,
    likelihood_section,
    mutations_section,
    run_section,
)

NAMES = {
    "pseudo-likelihood": "Potts model by pseudo-likelihood",
    "boltzmann": "Potts model by Boltzmann learning",
    "rbm": "restricted Boltzmann machine",
}


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
        ("family", "The family", family_section(family, alignment, found)),
        ("contacts", "Contacts", contacts_section(family, found, structure)),
        ("mutations", "Mutation effects", mutations_section(family, found)),
        ("draws", "Drawn sequences", draws_section(family, alignment, found)),
        ("likelihood", "Log-likelihood", likelihood_section(found, alignment)),
        ("run", "The run", run_section(family, command)),
    )
    top = header("Protein family: report of a run", name or "A family", facts) + _cards(family, found)
    return save_page(path, html_page(f"{name or 'A family'}: Gibbsian", top, sections))


def _cards(family: Family, found: Evaluation) -> str:
    parts = []
    if found.precision:
        own = found.precision[family.info.by]
        n = own.marks["L"]
        good = own.at(n) - own.base_rate > 3 * own.stderr(n)
        parts.append(
            card(
                f"Precision of the first {n} contacts",
                with_error(own.at(n), own.stderr(n)),
                f"{plain(own.base_rate, 3)} at random",
                "good" if good else "bad",
            )
        )
    r = found.agreement.connected
    alike = r > 0.9 * found.ceiling.connected
    parts.append(
        card(
            "Connected pairs, drawn and natural",
            plain(r, 3),
            f"Pearson correlation; {plain(found.ceiling.connected, 3)} for as many of the family's own"
            + ("" if alike or family.info.by != "pseudo-likelihood" else "; for draws, fit --by boltzmann"),
            "good" if alike else "caution",
        )
    )
    mixed = found.draws.mixed
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
