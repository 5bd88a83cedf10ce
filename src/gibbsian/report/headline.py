"""The few numbers that matter, each with its error and one line on what it means."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from gibbsian.diagnostics.estimate import Estimate, plain
from gibbsian.report.content import LogZSummary, QualityTable, ReportContent, estimate
from gibbsian.report.curves import nonfinite_counts, number
from gibbsian.report.markup import card


def headline(content: ReportContent) -> str:
    """Lay out the cards that the content has numbers for."""
    cards = [
        _log_z(content),
        _likelihood(content),
        _quality(content.quality),
        _chains(content),
        _health(content),
    ]
    shown = "".join(c for c in cards if c)
    if not shown:
        return '<p class="empty">Nothing was measured in this run, so there is no verdict.</p>'
    return f'<div class="cards">{shown}</div>'


def narrowest(estimates: list[LogZSummary]) -> LogZSummary:
    """Pick the estimate with the narrowest finite bracket, else the first."""
    widths = [_width(e) for e in estimates]
    return min(zip(widths, range(len(widths)), estimates), key=lambda t: (not math.isfinite(t[0]), t[0], t[1]))[2]


def _width(z: LogZSummary) -> float:
    """Width of the bracket; negative where the bounds cross."""
    return z.upper - z.lower


def _log_z(content: ReportContent) -> str:
    if not content.log_z_estimates:
        return ""
    best = narrowest(content.log_z_estimates)
    width = _width(best)
    bracket = f"between {plain(best.lower, 5)} and {plain(best.upper, 5)}"
    if not (math.isfinite(best.value) and math.isfinite(best.stderr)):
        level, words = "bad", f"The estimate or its error is not finite; {bracket}."
    elif not math.isfinite(width):
        level, words = (
            "caution",
            f"One-sided: {bracket}. Without both bounds nothing catches an estimate that is too low.",
        )
    elif width < 0:
        level, words = "bad", f"The bounds cross ({bracket}): one of the runs has not converged."
    else:
        level = "good" if width <= 1 else "caution" if width <= 10 else "bad"
        words = f"{bracket[0].upper()}{bracket[1:]}" + (f": a bracket {plain(width, 2)} nats wide." if width else ".")
    if best.exact is not None:
        words += f" Exact: {plain(best.exact, 5)}."
    return card("log Z (nats)", str(Estimate(best.value, best.stderr)), words, level)


def _likelihood(content: ReportContent) -> str:
    summary = content.log_likelihood
    if summary is None or (summary.held_out is None and summary.train is None):
        return ""
    if summary.held_out is None:
        return card(
            f"Training log-likelihood ({summary.unit})",
            str(estimate(summary.train)),  # type: ignore[arg-type]
            "No rows were held out, so overfitting cannot be seen.",
            "caution",
        )
    held = estimate(summary.held_out)
    level, words = "plain", "No training value to compare with."
    if summary.train is not None:
        train = estimate(summary.train)
        gap = Estimate(train.value - held.value, math.hypot(train.stderr, held.stderr))
        if not math.isfinite(gap.value):
            level, words = "bad", f"Training: {train}."
        elif math.isnan(gap.stderr):
            words = f"Training: {train}. Without errors the gap cannot be judged."
        elif gap.value > 3 * gap.stderr:
            level, words = "caution", f"Training is higher by {gap}: a sign of overfitting."
        else:
            level, words = "good", f"Training minus held-out: {gap}, no sign of overfitting."
    if content.log_z_estimates and _width(narrowest(content.log_z_estimates)) < 0:
        level, words = "bad", "The bounds of log Z cross, and a likelihood is only as good as log Z."
    bits = summary.bits_per_dimension
    if bits is not None:
        words += f" {estimate(bits)} bits per dimension."
    return card(f"Held-out log-likelihood ({summary.unit})", str(held), words, level)


def at_floor(quality: QualityTable, column: str, name: str) -> bool | None:
    """Whether a row's value is within two joint errors of the floor's; ``None`` when that cannot be told."""
    floor = quality.rows.get(quality.floor, {}).get(column)
    value = quality.rows.get(name, {}).get(column)
    if floor is None or value is None or name == quality.floor:
        return None
    a, b = estimate(value), estimate(floor)
    excess = quality.loss(column, a.value) - quality.loss(column, b.value)
    error = math.hypot(a.stderr, b.stderr)
    return None if math.isnan(excess) or math.isnan(error) else excess <= 2 * error


def _quality(quality: QualityTable | None) -> str:
    if quality is None or quality.model is None or not quality.rows[quality.model]:
        return ""
    column, value = next(iter(quality.rows[quality.model].items()))
    mine = estimate(value)
    level, verdict = _standing(quality, column, mine)
    words = [verdict]
    if (floor := quality.rows.get(quality.floor, {}).get(column)) is not None:
        words.append(f"Floor, true data against true data: {estimate(floor)}.")
    if best := best_baseline(quality, column):
        words.append(f"Best baseline, {best}: {estimate(quality.rows[best][column])}.")
    return card(f"Sample quality: {column}", str(mine), " ".join(words), level)


def _standing(quality: QualityTable, column: str, mine: Estimate) -> tuple[str, str]:
    losses = [loss for _, loss in baselines(quality, column)]
    own = quality.loss(column, mine.value)
    beaten = any(loss < own for loss in losses)
    touching = at_floor(quality, column, quality.model or "")
    if not math.isfinite(mine.value):
        return "bad", "The distance is not finite."
    if touching:
        return "good", "Within two errors of the floor."
    if touching is None:
        return (
            ("caution", "A baseline does better.") if beaten else ("plain", "No floor with an error to compare with.")
        )
    if beaten and all(loss < own for loss in losses):
        return "bad", "Above the floor, and every baseline does better."
    return ("caution", "Above the floor, and a baseline does better.") if beaten else ("plain", "Above the floor.")


def baselines(quality: QualityTable, column: str) -> list[tuple[str, float]]:
    """List the rows besides the floor's and the model's with their finite losses."""
    others = [n for n, row in quality.rows.items() if n not in (quality.floor, quality.model) and column in row]
    losses = [(n, quality.loss(column, estimate(quality.rows[n][column]).value)) for n in others]
    return [(n, loss) for n, loss in losses if math.isfinite(loss)]


def best_baseline(quality: QualityTable, column: str) -> str | None:
    """Name the best row besides the floor's and the model's."""
    return min(baselines(quality, column), key=lambda row: row[1], default=(None, 0.0))[0]


def _chains(content: ReportContent) -> str:
    chains = content.chains
    if chains is None or chains.r_hat is None:
        return ""
    values = np.asarray(chains.r_hat, dtype=float).ravel()
    known = values[np.isfinite(values)]
    if not len(known):
        return card(
            "Largest R-hat", "NaN", "It is not defined for any coordinate: none moves, or values are not finite.", "bad"
        )
    worst = float(known.max()) if len(known) == int((~np.isnan(values)).sum()) else math.inf
    words = {
        True: "Chains agree.",
        False: "Chains disagree: they need more steps, or they are stuck in separate modes.",
    }[worst <= 1.05]
    if 1.01 < worst <= 1.05:
        words = "Chains nearly agree; below 1.01 is safe."
    if chains.ess is not None:
        ess = np.asarray(chains.ess, dtype=float).ravel()
        ess = ess[np.isfinite(ess)]
        if len(ess):
            words += f" Smallest effective sample size: {plain(float(ess.min().round()))}."
    frozen = int(np.isnan(values).sum())
    if frozen:
        words += f" {frozen} of {len(values)} coordinates never move."
    shown = f"{worst:.3f}" if math.isfinite(worst) else plain(worst)
    return card("Largest R-hat", shown, words, "good" if worst <= 1.01 else "caution" if worst <= 1.05 else "bad")


def _health(content: ReportContent) -> str:
    if content.health_events is None and not content.records:
        return ""
    bad = sum(nonfinite_counts(content.records).values())
    words = (
        f"{bad} logged values are not finite." if bad else "Every logged value is finite." if content.records else ""
    )
    apart = _chains_apart(content)
    events = content.health_events
    if apart:
        words = f"{apart} {words}"
    if events is None:
        return card("Health", "not watched", words, "caution")
    if not events:
        return card(
            "Health", "no rollbacks", words or "No event in the whole run.", "caution" if bad or apart else "good"
        )
    back = sum("roll" in str(e.get("action") or e.get("event") or "").lower() for e in events)
    value = f"{back} rollback{'s' * (back != 1)}" if back else f"{len(events)} event{'s' * (len(events) != 1)}"
    kinds = ", ".join(f"{name} ({n})" for name, n in Counter(str(e.get("kind", "event")) for e in events).items())
    last = max((s for e in events if (s := number(e.get("step"))) is not None), default=None)
    at = "" if last is None else f"; the last at step {plain(last)}"
    return card("Health", value, f"{kinds[0].upper()}{kinds[1:]}{at}. {words}", "caution")


def _chains_apart(content: ReportContent) -> str:
    """Say so where training ended with its chains at other energies than the data, beyond the spread of either."""
    gaps = [g for record in content.records if (g := number(record.get("gap"))) is not None]
    training = np.asarray(content.energies.get("training", ()), dtype=float)
    spread = float(training.std()) if len(training) > 1 else math.nan
    last = gaps[-max(1, len(gaps) // 10) :]
    mean = sum(last) / len(last) if last else 0.0
    if not abs(mean) > 2.0 * spread:
        return ""
    return (
        f"In the end the training chains lay {plain(abs(mean), 3)} nats {'above' if mean < 0 else 'below'} the data, "
        "whose energies spread by {}: the chains do not stand for the model.".format(plain(spread, 2))
    )
