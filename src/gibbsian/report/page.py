"""The report: one HTML file that holds everything it shows and asks nothing of the network."""

from __future__ import annotations

import os
from pathlib import Path

from gibbsian.diagnostics.estimate import plain
from gibbsian.report import classes, gallery, machine, sections
from gibbsian.report.content import ReportContent
from gibbsian.report.headline import headline
from gibbsian.report.markup import text
from gibbsian.report.shell import duration, header, html_page, save_page

_SECTIONS = (
    ("samples", "Samples beside data", gallery.samples),
    ("classes", "Classes", classes.classes),
    ("couplings", "Couplings", machine.couplings),
    ("learning", "Learning", sections.learning),
    ("energies", "Energies", sections.energies),
    ("chains", "Chains", sections.chains),
    ("logz", "log Z and likelihood", sections.log_z),
    ("quality", "Sample quality", sections.quality),
    ("detection", "Out-of-distribution detection", sections.detection),
    ("reproduce", "Reproduce", sections.reproduce),
)


def write_report(path: str | os.PathLike[str], content: ReportContent) -> Path:
    """Write the report as one self-contained HTML file.

    The page is made in full before the file is touched, and the file is replaced in one move: whatever fails, an
    earlier report at the path stays as it was.

    Parameters
    ----------
    path
        Of the file; its folder is made if need be.
    content
        What to show; parts that are missing are left out.

    Returns
    -------
    Path
        Of the file written.

    Raises
    ------
    StorageError
        If the file cannot be written.
    """
    return save_page(path, render(content))


def render(content: ReportContent) -> str:
    """Return the report as a string of HTML."""
    shown = [(anchor, title, body) for anchor, title, make in _SECTIONS if (body := make(content))]
    return html_page(content.title, f"{_header(content)}{_notes(content)}{headline(content)}", shown)


def _header(content: ReportContent) -> str:
    facts = [content.data_name] if content.data_name else []
    for label, rows in (("training", content.train), ("held-out", content.held_out)):
        if rows is not None and len(rows):
            facts.append(f"{plain(len(rows))} {label} rows")
    if content.event_shape:
        facts.append(" × ".join(map(str, content.event_shape)) + (" pixels" if content.kind == "image" else " columns"))
    if content.seed is not None:
        facts.append(f"seed {content.seed}")
    if content.seconds is not None:
        facts.append(duration(content.seconds))
    return header("Energy-based model: report of a run", content.title, facts)


def _notes(content: ReportContent) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in content.notes)
    return f'<aside class="notes" aria-label="Notes"><ul>{items}</ul></aside>' if items else ""
