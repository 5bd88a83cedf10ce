"""The section that shows samples beside data, for images, for the plane and for tables."""

from __future__ import annotations

import numpy as np

from gibbsian.diagnostics.estimate import plain
from gibbsian.report import markup, pictures
from gibbsian.report.content import ReportContent
from gibbsian.report.markup import figure, image, panels, paragraph


def samples(content: ReportContent) -> str:
    """Show samples beside data."""
    sets = {k: v for k, v in content.sets.items() if k != "held-out data" or content.train is None}
    if not sets:
        return ""
    if content.kind == "image":
        return _images(content, sets)
    flat = {k: np.asarray(v, dtype=float).reshape(len(v), -1) for k, v in sets.items()}
    lost = {k: int((~np.isfinite(v)).any(axis=1).sum()) for k, v in flat.items()}
    said = "".join(
        paragraph(f"{n} of {len(flat[k])} rows of {k} are not finite and not drawn.") for k, n in lost.items() if n
    )
    flat = {k: v[np.isfinite(v).all(axis=1)] for k, v in flat.items()}
    flat = {k: v for k, v in flat.items() if len(v)}
    if not flat:
        return said
    d = next(iter(flat.values())).shape[1]
    names = content.column_names(d)
    return said + (_plane(flat, names) if d == 2 else _table(flat, names))


def _plane(sets: dict[str, np.ndarray], names: list[str]) -> str:
    boxes = [pictures.limits(list(sets.values()), k) for k in range(2)]
    captions = {
        "data": "What was learned from.",
        "samples": "Should fill the same places as densely. Bad: bridges between clusters, missing clusters, a halo.",
    }
    return panels(
        [
            figure(
                f"{k[0].upper()}{k[1:]}, {_count(len(x))}",
                pictures.scatter(f"scatter{i}", k, x, boxes, names, i),
                captions.get(k, "The same axes, for comparison."),
            )
            for i, (k, x) in enumerate(sets.items())
        ]
    )


def _count(n: int) -> str:
    return f"{plain(n)} points" if n <= pictures.POINTS else f"{plain(pictures.POINTS)} of {plain(n)} points"


def _table(sets: dict[str, np.ndarray], names: list[str]) -> str:
    d = len(names)
    chips = markup.legend({k: _palette_name(k, i) for i, k in enumerate(sets)})
    body = ""
    if d > 1:
        some = names[: pictures.CORNER]
        first_two = dict(list(sets.items())[:2])
        picture = pictures.corner("corner", {k: x[:, : len(some)] for k, x in first_two.items()}, some)
        kept = "" if d <= len(some) else f" The first {len(some)} of {d} columns are shown."
        wide = f'<div style="min-width:{118 * len(some)}px">{picture}</div>'
        scrolled = f'<div class="scroll" tabindex="0" role="group" aria-label="Pair plot">{wide}</div>'
        body = figure(
            "Pairs of columns",
            scrolled,
            f"Dots are {next(iter(first_two))}. Curves hold half and nine tenths of each set; both should lie on each "
            f"other. Bad: one set's curves are wider, turned, or miss an island.{kept}",
            "pairs",
        )
    most = min(d, 24)
    marginals = (
        [figure(names[k], pictures.histogram(f"column{k}", sets, k, names[k]), "") for k in range(most)]
        if d > pictures.CORNER or d == 1 or len(sets) > 2
        else []
    )
    more = f" The first {most} of {d} columns are shown." if d > most else ""
    if marginals:
        body += "<h3>Columns one by one</h3>" + paragraph(f"The outlines should coincide with the filled data.{more}")
    return chips + body + panels([m.replace("<figcaption></figcaption>", "") for m in marginals]) * bool(marginals)


def _palette_name(name: str, place: int) -> str:
    shade = pictures.series_colour(name, place)
    return next(k for k, pair in markup.PALETTE.items() if pair[0] == shade)


def _images(content: ReportContent, sets: dict[str, np.ndarray]) -> str:
    images = {k: pictures.as_images(v, content.event_shape) for k, v in sets.items()}
    low, high = pictures.pixel_range(*images.values())
    width = next(iter(images.values())).shape[2]
    columns = int(np.clip(640 // max(width, 1), 4, 8))
    grids = []
    for name, x in images.items():
        shown = pictures.spread_rows(x, columns * columns)
        bad = int((~np.isfinite(shown)).any(axis=(1, 2, 3)).sum())
        grids.append(
            figure(
                f"{name[0].upper()}{name[1:]}",
                image(pictures.image_grid(shown, low, high, columns), f"Grid of {len(shown)} images: {name}."),
                f"{len(shown)} of {plain(len(x))}, spread evenly over the set, not selected."
                + (f" {bad} hold values that are not finite (magenta)." if bad else "")
                + (" Bad: all alike, noise, or copies of the data." if name == "samples" else ""),
            )
        )
    return panels(grids) + _neighbours(images, low, high)


def _neighbours(images: dict[str, np.ndarray], low: float, high: float) -> str:
    """Set samples over their nearest training rows, to see copies."""
    from gibbsian.diagnostics.two_sample import nearest

    if "data" not in images or "samples" not in images:
        return ""
    drawn = pictures.spread_rows(images["samples"], 10)
    drawn = drawn[np.isfinite(drawn).all(axis=(1, 2, 3))]
    train = images["data"]
    train = train[np.isfinite(train).all(axis=(1, 2, 3))]
    if not len(drawn) or not len(train):
        return ""
    distance, index = nearest(drawn, train)
    rows = [
        image(pictures.image_grid(part, low, high, len(drawn)), alt)
        for part, alt in (
            (drawn, "A row of samples."),
            (train[index.numpy()], "The nearest training image of each sample."),
        )
    ]
    return figure(
        "Samples (above) and their nearest training images (below)",
        f'<div class="near">{"".join(rows)}</div>',
        f"By Euclidean distance, here {plain(float(distance.min()), 3)} to {plain(float(distance.max()), 3)}. "
        "Near relatives are expected. Bad: exact copies, which means the training set was memorised.",
    )
