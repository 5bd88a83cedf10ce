"""The sections of the report, each a function from content to markup, empty when there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gibbsian.diagnostics.estimate import Estimate, plain
from gibbsian.report import charts, curves, markup, pictures
from gibbsian.report.content import Number, QualityTable, ReportContent, estimate
from gibbsian.report.headline import at_floor
from gibbsian.report.markup import figure, panels, paragraph, table, text


def learning(content: ReportContent) -> str:
    """Draw the learning curves and list the health events."""
    body, records, events = "", content.records, content.health_events or []
    bad = curves.nonfinite_counts(records)
    figures = []
    for i, panel in enumerate(curves.panels_of(records)):
        count = sum(n for k, n in bad.items() if k in panel.keys)
        said = f" {count} values are not finite: gaps, marked × below." if count else ""
        picture = curves.learning_curve(f"curve{i}", records, panel, events)
        figures.append(figure(panel.title, picture, panel.caption + said))
    if figures:
        long = len(records) > curves.BLOCKS
        body += paragraph("Lines are medians over blocks of steps, bands their middle eight tenths." if long else "")
        body += panels(figures)
    if events:
        words = "Dashed lines in the curves." if figures else ""
        body += "<h3>Health events</h3>" + paragraph(words)
        body += table(["Step", "What", "Action", "Values"], [_event_row(e) for e in events], "words")
    return body


def _event_row(event: Mapping[str, Any]) -> tuple[str, list[str], str]:
    values = event.get("values")
    if values is None:
        named = ("step", "kind", "action", "event", "values")
        values = {k: v for k, v in event.items() if k not in named}
    listed = ", ".join(f"{k} {_value(v)}" for k, v in values.items()) if isinstance(values, Mapping) else _value(values)
    action = event.get("action") or event.get("event") or ""
    return str(event.get("step", "?")), [f"<span>{text(v)}</span>" for v in (event.get("kind", ""), action, listed)], ""


def _value(value: object) -> str:
    return plain(value) if isinstance(value, float) else str(value)


def energies(content: ReportContent) -> str:
    """Draw the energies of each set, and the map where there is one."""
    body = ""
    sets = {k: np.asarray(v, dtype=float).ravel() for k, v in content.energies.items() if np.size(v)}
    bad = {k: int((~np.isfinite(v)).sum()) for k, v in sets.items()}
    said = "".join(f" {n} of {len(sets[k])} energies of {k} are not finite and not drawn." for k, n in bad.items() if n)
    if any(np.isfinite(v).any() for v in sets.values()):
        body += figure(
            "Distribution of energy",
            markup.fitted(lambda size, width: charts.energy_histograms(f"energies-{size}", sets, width)),
            "Lower energy is more probable. Bars above span the middle nine tenths, the dot is the median. Training "
            "and held-out should coincide (a held-out shift to the right is overfitting), samples should overlap them, "
            f"and noise should lie to the right. Bad: samples well to the left, in a hole the data never fills.{said}",
            "wide",
        )
    elif said:
        body += paragraph(said.strip())
    return body + _maps(content)


def _maps(content: ReportContent) -> str:
    if content.energy_map is None:
        return ""
    xs, ys, grid = (np.asarray(a, dtype=float) for a in content.energy_map)
    names = content.column_names(2)
    drawn = (
        None if content.samples is None else np.asarray(content.samples, dtype=float).reshape(len(content.samples), -1)
    )
    drawn = drawn[np.isfinite(drawn).all(axis=1)] if drawn is not None and drawn.shape[1] == 2 else None
    bad = int((~np.isfinite(grid)).sum())
    said = f" {bad} grid points are not finite and left blank." if bad else ""
    over = "" if drawn is None else " Samples (dots) should fill the valleys and nothing else."
    figures = [
        figure(
            "Energy",
            pictures.energy_map("energymap", xs, ys, grid, drawn, names),
            f"Stronger colour is lower energy, over the lowest 12 nats; lines every 2.{over}{said}",
        )
    ]
    model = pictures.boltzmann(xs, ys, grid)
    truth = (
        None
        if content.true_density is None
        else pictures.normalised(xs, ys, np.asarray(content.true_density, dtype=float))
    )
    both = [d for d in (model, truth) if d is not None and np.isfinite(d).any()]
    top = max((float(np.nanmax(d)) for d in both), default=1.0)
    caption = "exp(−E), normalised over the map." + (
        "" if truth is None else " Should look like the true density beside it."
    )
    figures.append(
        figure(
            "Model density", pictures.density_map("modeldensity", "model density", xs, ys, model, top, names), caption
        )
    )
    if truth is not None:
        distance = 0.5 * float(np.nansum(np.abs(model - truth)) * np.gradient(xs).mean() * np.gradient(ys).mean())
        picture = pictures.density_map("truedensity", "true density", xs, ys, truth, top, names)
        words = f"On the same colour scale. Total variation between the two on this grid: {plain(distance, 2)}."
        figures.append(figure("True density", picture, words))
    return panels(figures)


def chains(content: ReportContent) -> str:
    """Show how the chains behaved."""
    c = content.chains
    if c is None:
        return ""
    facts: dict[str, object] = {}
    if c.kernel:
        facts["Kernel"] = c.kernel
    trace = None if c.energy_trace is None else np.asarray(c.energy_trace, dtype=float)
    if trace is not None:
        facts["Draws × chains"] = f"{plain(trace.shape[0])} × {plain(trace.shape[1])}"
    if c.acceptance is not None:
        facts["Acceptance"] = _mean_of(c.acceptance)
    if c.nonfinite is not None:
        facts["Proposals not finite"] = plain(c.nonfinite)
    figures = []
    if trace is not None and np.isfinite(trace).any():
        bad = int((~np.isfinite(trace)).sum())
        said = f" {bad} energies are not finite: gaps." if bad else ""
        words = (
            "Thin lines are single chains, the strong one the median of all. Should look like level noise. Bad: a "
            f"trend, or chains on levels of their own.{said}"
        )
        figures.append(figure("Energy along the chains", charts.energy_trace("trace", trace), words))
    for key, label, threshold, mark, words in (
        (
            "r_hat",
            "R-hat",
            1.01,
            "1.01",
            "One value per coordinate; all should lie left of the line. Bad: beyond 1.05.",
        ),
        ("ess", "Effective sample size", 400.0, "400", "One value per coordinate; all should lie right of the line."),
        ("acceptance", "Acceptance", 0.2, "0.2", "One value per chain. Bad: chains near 0, which are stuck."),
    ):
        values = getattr(c, key)
        if values is None:
            continue
        flat = np.asarray(values, dtype=float).ravel()
        known = flat[np.isfinite(flat)]
        if key != "acceptance" and len(flat):
            worst = (known.max() if key == "r_hat" else known.min()) if len(known) else math.nan
            facts["Largest R-hat" if key == "r_hat" else "Smallest ESS"] = (
                f"{worst:.3f}" if key == "r_hat" and math.isfinite(worst) else plain(float(np.round(worst)))
            )
        if len(known) >= 5:
            lost = len(flat) - len(known)
            said = f" {lost} have none (never move, or not finite)." if lost else ""
            picture = charts.diagnostic_histogram(f"diag{key}", flat, label, threshold, mark)
            figures.append(figure(label, picture, words + said))
    return markup.definitions(facts) + (panels(figures) if figures else "")


def _mean_of(values: Any) -> str:
    flat = np.asarray(values, dtype=float).ravel()
    if len(flat) < 2:
        return plain(float(flat[0]), 3) if len(flat) else "none"
    return str(Estimate(float(flat.mean()), float(flat.std(ddof=1) / math.sqrt(len(flat)))))


def log_z(content: ReportContent) -> str:
    """Draw log Z as brackets, and tabulate the likelihoods that use it."""
    body = ""
    estimates = content.log_z_estimates
    if estimates:
        body += figure(
            "log Z and its bracket",
            markup.fitted(lambda size, width: charts.log_z_brackets(f"logz-{size}", estimates, width)),
            "The broad band is the bracket, the strong line two standard errors, the dot the estimate. The truth "
            "should lie in every band. Bad: a wide band, or bands that do not overlap. Every log-likelihood is as "
            "uncertain as log Z.",
            "wide",
        )
        rows = [
            (
                e.method,
                [
                    f"<span>{text(v)}</span>"
                    for v in (
                        Estimate(e.value, e.stderr),
                        plain(e.lower, 5),
                        plain(e.upper, 5),
                        "–" if e.ess is None else plain(e.ess, 3),
                    )
                ],
                "",
            )
            for e in estimates
        ]
        body += table(["Method", "log Z (nats)", "Lower", "Upper", "Effective chains"], rows)
        body += "".join(paragraph(e.note) for e in estimates)
    ll = content.log_likelihood
    if ll is not None:
        entries = {
            "Training rows": ll.train,
            "Held-out rows": ll.held_out,
            "Held-out rows, by the probability flow": ll.flow,
            "Held-out, bits per dimension": ll.bits_per_dimension,
        }
        given = {k: str(estimate(v)) for k, v in entries.items() if v is not None}
        if ll.bounds is not None:
            given["Held-out rows, by the bounds of log Z"] = f"{plain(ll.bounds[0], 5)} to {plain(ll.bounds[1], 5)}"
        if given:
            body += f"<h3>Mean log-likelihood per row, {text(ll.unit)}</h3>" + markup.definitions(given)
    return body


def quality(content: ReportContent) -> str:
    """Tabulate sample quality beside baselines and the floor."""
    q = content.quality
    if q is None or not q.rows or not q.columns:
        return ""
    names = [n for n in q.rows if n != q.floor]
    names = ([q.floor] if q.floor in q.rows else []) + names
    best = {c: _best(q, c) for c in q.columns}
    rows = []
    for name in names:
        cells = [_cell(q, c, name, best[c] == name and len(names) > 2) for c in q.columns]
        rows.append((name, cells, "floor" if name == q.floor else "model" if name == q.model else ""))
    heads = ["", *(f"{c} {_arrow(q.better.get(c, 'lower'))}" for c in q.columns)]
    words = (
        "Each row compares a set of points with the data; value ± standard error. Arrows say which way is better; bold "
        "is best."
    )
    if q.floor in q.rows:
        words += " The floor compares true data with true data: a model cannot be seen to do better than that."
    return paragraph(words) + table(heads, rows)


def _best(q: QualityTable, column: str) -> str | None:
    contenders = [n for n in q.rows if n != q.floor and column in q.rows[n]]
    return min(contenders, key=lambda n: _rank(q, column, n), default=None)


def _rank(q: QualityTable, column: str, name: str) -> float:
    loss = q.loss(column, estimate(q.rows[name][column]).value)
    return math.inf if math.isnan(loss) else loss


def _arrow(better: str | float) -> str:
    return {"lower": "↓", "higher": "↑"}.get(better, "") if isinstance(better, str) else f"→ {plain(float(better))}"


def _cell(q: QualityTable, column: str, name: str, best: bool) -> str:
    if column not in q.rows[name]:
        return "<span>–</span>"
    value = text(estimate(q.rows[name][column]))
    shown = f'<span class="best">{value}</span>' if best else value
    tag = '<span class="tag">at the floor</span>' if at_floor(q, column, name) else ""
    return f"<span>{shown}{tag}</span>"


def detection(content: ReportContent) -> str:
    """Tabulate out-of-distribution detection."""
    rows: Mapping[str, Mapping[str, Number]] = content.detection
    columns = list(dict.fromkeys(c for r in rows.values() for c in r))
    if not columns:
        return ""
    lines = [
        (name, [f"<span>{text(estimate(row[c]))}</span>" if c in row else "<span>–</span>" for c in columns], "")
        for name, row in rows.items()
    ]
    words = (
        "Can the energy alone tell held-out data from foreign data? AUROC 1 separates fully, 0.5 is chance; below 0.5 "
        "the foreign points have lower energy than the data, which density models do give to simple inputs."
    )
    return paragraph(words) + table(["Foreign data", *columns], lines)


def reproduce(content: ReportContent) -> str:
    """Say how to get the run again."""
    body = ""
    if content.command:
        body += f"<pre><code>{text(content.command)}</code></pre>"
    if content.recipe:
        body += "<h3>Recipe</h3>" + markup.definitions(_flat(content.recipe))
    facts: dict[str, object] = {} if content.seed is None else {"seed": content.seed}
    facts.update(content.versions)
    if facts:
        body += "<h3>Versions and seed</h3>" + markup.definitions(facts)
    return body


def _flat(recipe: Mapping[str, Any], before: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{before}{key}."))
        else:
            flat[f"{before}{key}"] = "none" if value is None else _value(value)
    return flat
