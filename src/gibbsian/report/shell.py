"""What any page of results is made of, whatever it tells: a head, sections with links to them, a foot; and its file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from gibbsian.errors import StorageError
from gibbsian.report.markup import section, style_sheet, text

UNITS = "Energies and log-densities are in nats; ± is one standard error."
"""What a page's foot says unless told otherwise."""


def html_page(title: str, top: str, sections: Sequence[tuple[str, str, str]], units: str = UNITS) -> str:
    """Put a page together.

    Parameters
    ----------
    title
        Of the window, plain text.
    top
        Markup above the sections: a `header`, and what matters most.
    sections
        Anchor, title (plain text) and body (markup) of each; those without a body are left out.
    units
        What its foot says of units and errors, plain text.
    """
    shown = [part for part in sections if part[2]]
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in shown)
    nav = f'<nav aria-label="Sections">{links}</nav>' if len(shown) > 1 else ""
    body = "".join(section(*part) for part in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style_sheet()}</style></head><body><main>"
        f"{top}{nav}{body}"
        f"<footer>Written by Gibbsian on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. {text(units)}</footer>"
        "</main></body></html>\n"
    )


def header(eyebrow: str, title: str, facts: Sequence[str] = ()) -> str:
    """Write a page's head: what kind of page it is, its title, and a line of facts, all plain text."""
    line = "".join(f"<span>{text(f)}</span>" for f in facts)
    return (
        f'<header><p class="eyebrow">{text(eyebrow)}</p><h1>{text(title)}</h1>'
        + (f'<p class="meta">{line}</p>' if line else "")
        + "</header>"
    )


def save_page(path: str | os.PathLike[str], page: str) -> Path:
    """Write a page in one move: whatever fails, an earlier one at the path stays as it was.

    Parameters
    ----------
    path
        Of the file; its folder is made if need be.
    page
        The whole page.

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
