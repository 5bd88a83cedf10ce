"""Small pieces of HTML, each escaping what it is given, and the page's style sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources

from gibbsian.report.canvas import PALETTE


def text(value: object) -> str:
    """Escape anything for use as text or in a quoted attribute."""
    return escape(str(value), quote=True)


def figure(title: str, picture: str, caption: str, kind: str = "") -> str:
    """Put a picture (markup) between its title and a caption that says how to read it."""
    head = f"<h3>{text(title)}</h3>" if title else ""
    return f'<figure class="{kind}">{head}{picture}<figcaption>{text(caption)}</figcaption></figure>'


def image(address: str, alt: str) -> str:
    """Show a data address as a picture with hard pixels."""
    return f'<img src="{address}" alt="{text(alt)}">'


def panels(figures: Sequence[str]) -> str:
    """Lay figures side by side as far as the page is wide."""
    return f'<div class="panels">{"".join(figures)}</div>'


def fitted(draw: Callable[[str, float], str]) -> str:
    """Draw a broad figure twice, for broad and for narrow screens; the style sheet shows one.

    Parameters
    ----------
    draw
        From a suffix for the figure's name and a width in inches to markup.
    """
    return f'<div><div class="broad">{draw("broad", 6.4)}</div><div class="narrow">{draw("narrow", 3.4)}</div></div>'


def paragraph(words: str) -> str:
    """Set a paragraph of plain text."""
    return f"<p>{text(words)}</p>" if words else ""


def legend(entries: Mapping[str, str]) -> str:
    """Name colours: label to palette name."""
    chips = "".join(f'<span><i style="background:var(--{c})"></i>{text(label)}</span>' for label, c in entries.items())
    return f'<p class="legend">{chips}</p>'


def section(anchor: str, title: str, body: str) -> str:
    """Wrap a section; without a body there is none."""
    return f'<section id="{anchor}"><h2>{text(title)}</h2>{body}</section>' if body else ""


def definitions(entries: Mapping[str, object]) -> str:
    """List names and values."""
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in entries.items())
    return f"<dl>{rows}</dl>" if rows else ""


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str]], kind: str = "") -> str:
    """Set a table; on a narrow screen each row becomes a block.

    Parameters
    ----------
    heads
        Plain text, the first over the row names.
    rows
        Name (plain text), cells (markup), and a class.
    kind
        ``"words"`` sets the cells as text, flush left.
    """
    top = "".join(f'<th scope="col">{text(h)}</th>' for h in heads)
    body = ""
    for name, cells, mark in rows:
        inside = "".join(f'<td data-label="{text(h)}">{c}</td>' for h, c in zip(heads[1:], cells))
        body += f'<tr class="{mark}"><th scope="row">{text(name)}</th>{inside}</tr>'
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def card(label: str, value: str, verdict: str, level: str = "plain") -> str:
    """Show one number that matters.

    Parameters
    ----------
    label, value, verdict
        Plain text.
    level
        ``good``, ``caution``, ``bad`` or ``plain``; said in words too, as colour alone is not for everyone.
    """
    mark = {"good": "✓ ", "caution": "! ", "bad": "✗ "}.get(level, "")
    words = {"good": "Good: ", "caution": "Caution: ", "bad": "Problem: "}.get(level, "")
    said = f'<span class="mark" aria-hidden="true">{mark}</span><span class="unseen">{words}</span>{text(verdict)}'
    number, cross, error = value.partition(" ± ")
    shown = text(number) + (f'<span class="error"> ± {text(error)}</span>' if cross else "")
    body = f'<h3>{text(label)}</h3><p class="value">{shown}</p><p class="verdict">{said}</p>'
    return f'<div class="card {level}">{body}</div>'


def style_sheet() -> str:
    """Return the page's CSS: the palettes for light, dark and print, and the rules."""
    rules = resources.files("gibbsian.report").joinpath("style.css").read_text(encoding="utf-8")
    light, dark = (";".join(f"--{name}:{pair[place]}" for name, pair in PALETTE.items()) for place in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"{rules}"
    )
