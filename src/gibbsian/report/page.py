"""The report: one HTML file that holds everything it shows and asks nothing of the network."""

from __future__ import annotations

import contextlib
import os
import tempfile
from datetime import datetime
from pathlib import Path

from gibbsian.diagnostics.estimate import plain
from gibbsian.errors import StorageError
from gibbsian.report import classes, gallery, machine, sections
from gibbsian.report.content import ReportContent
from gibbsian.report.headline import headline
from gibbsian.report.markup import section, style_sheet, text

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
    target = Path(path)
    page = render(content)
    temporary = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        # mkstemp makes files private; a report is as readable as any file the user writes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise StorageError(
            f"The report could not be written to {target}: {error}. An earlier one is intact."
        ) from error
    return target


def render(content: ReportContent) -> str:
    """Return the report as a string of HTML."""
    shown = [(anchor, title, body) for anchor, title, make in _SECTIONS if (body := make(content))]
    links = "".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _ in shown)
    nav = f'<nav aria-label="Sections">{links}</nav>' if len(shown) > 1 else ""
    body = "".join(section(*part) for part in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(content.title)}</title><style>{style_sheet()}</style></head><body><main>"
        f"{_header(content)}{_notes(content)}{headline(content)}{nav}{body}"
        f"<footer>Written by Gibbsian on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. Energies and log-densities "
        "are in nats; ± is one standard error.</footer></main></body></html>\n"
    )


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
    line = "".join(f"<span>{text(f)}</span>" for f in facts)
    return (
        f'<header><p class="eyebrow">Energy-based model: report of a run</p><h1>{text(content.title)}</h1>'
        + (f'<p class="meta">{line}</p>' if line else "")
        + "</header>"
    )


def _notes(content: ReportContent) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in content.notes)
    return f'<aside class="notes" aria-label="Notes"><ul>{items}</ul></aside>' if items else ""


def duration(seconds: float) -> str:
    """Write a time as people say it: ``42 s``, ``3 min 12 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
