"""The section on single classes, of a model that was trained with labels: their draws, and how well it tells them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gibbsian.diagnostics.estimate import plain
from gibbsian.report import pictures
from gibbsian.report.content import ReportContent, estimate
from gibbsian.report.markup import figure, image, panels, paragraph

MOST = 12
"""Classes that are drawn, at most."""


def classes(content: ReportContent) -> str:
    """Show draws of each class, and the part of held-out rows that is classified rightly."""
    body = ""
    if content.class_accuracy is not None:
        body += paragraph(
            f"By Bayes' rule from the energies of the {plain(len(content.class_samples))} classes, "
            f"{estimate(content.class_accuracy)} of the held-out rows are classified rightly."
        )
    if not content.class_samples:
        return body
    shown = dict(list(content.class_samples.items())[:MOST])
    drawn = _images(shown, content) if content.kind == "image" else _plane(shown, content)
    return body + drawn


def _images(shown: Mapping[str, np.ndarray], content: ReportContent) -> str:
    sets = [pictures.as_images(rows, content.event_shape) for rows in shown.values()]
    data = None if content.train is None else pictures.as_images(content.train, content.event_shape)
    low, high = pictures.pixel_range(data, *sets)
    each = min(len(rows) for rows in sets)
    grid = pictures.image_grid(np.concatenate([rows[:each] for rows in sets]), low, high, each)
    names = ", ".join(shown)
    return figure(
        "Draws of each class",
        image(grid, f"Rows of draws, one row for each class: {names}."),
        f"One row for each class, from above: {names}; not selected. Without guidance. Bad: other classes in a row, or "
        "draws of a row all alike.",
    )


def _plane(shown: Mapping[str, np.ndarray], content: ReportContent) -> str:
    flat = {name: np.asarray(rows, dtype=float).reshape(len(rows), -1) for name, rows in shown.items()}
    d = next(iter(flat.values())).shape[1]
    if d < 2:
        return ""
    names = content.column_names(d)
    whole = [*flat.values()]
    if content.train is not None:
        whole.insert(0, np.asarray(content.train, dtype=float).reshape(len(content.train), -1))
    boxes = [pictures.limits(whole, k) for k in range(2)]
    return panels(
        [
            figure(
                f"Class {name}, {plain(len(rows))} draws",
                pictures.scatter(f"class{i}", "samples", rows[:, :2], boxes, names[:2]),
                "The first two columns, on the axes of the data." if d > 2 else "On the axes of the data.",
            )
            for i, (name, rows) in enumerate(flat.items())
        ]
    )
