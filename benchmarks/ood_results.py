"""How the results of `ood.py` are shown: tables of each set in distribution, and maps of heat."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import common
from common import table
from gibbsian.diagnostics.detection import Interval
from ood_sets import HARD

METRICS = {"auroc": "AUROC", "average_precision": "AUPR, foreign rows positive", "false_positive_rate": "FPR95"}

BEST = {"auroc": max, "average_precision": max, "false_positive_rate": min}
"""The good end of each metric."""


def counted(pairs: Mapping[str, Any], metric: str) -> list[float]:
    """A metric's values over the pairs that enter averages."""
    return [found[metric][0] for pair, found in pairs.items() if pair not in HARD]


def summary(scores: Mapping[str, Any]) -> str:
    """Average and worst of each metric over the pairs that count."""
    rows = []
    for name, pairs in scores.items():
        line: list[str] = [name]
        for metric, best in BEST.items():
            values = counted(pairs, metric)
            worst = min(values) if best is max else max(values)
            line += [f"{sum(values) / len(values):.4f}", f"{worst:.4f}"]
        rows.append(line)
    header = ["score", *(f"{name}, {end}" for name in METRICS.values() for end in ("average", "worst"))]
    return table(header, rows)


def whole(scores: Mapping[str, Any], metric: str) -> str:
    """One metric of every score and pair, with its interval."""
    pairs = list(next(iter(scores.values())))
    rows = [[name, *(Interval(*found[pair][metric]) for pair in pairs)] for name, found in scores.items()]
    return table(["score", *pairs], rows)


def set_section(name: str, part: Mapping[str, Any]) -> str:
    """All tables of a set in distribution."""
    facts = ", ".join(f"{k} {v:.4g}" for k, v in part["facts"].items())
    spent = ", ".join(f"{k} {v:.1f}" for k, v in part["minutes"].items())
    lines = [f"## {name} in distribution", summary(part["scores"])]
    for metric, told in METRICS.items():
        lines += [f"### {name}: {told}", whole(part["scores"], metric)]
    return "\n\n".join([*lines, f"Training: {facts}.", f"Minutes of scoring and bootstrap: {spent}."])


def conformal_section(part: Mapping[str, Any]) -> str:
    """Realised rates of false alarms."""
    rows = []
    for each in part["conformal"]:
        low, high = each["interval"]
        line = [f"{each['rate']:g}", each["rows"], f"[{low:.4f}, {high:.4f}]"]
        for way in ("detector", "plain quantile"):
            line += [f"{each[way]['mean']:.4f}", f"{each[way]['inside']} of {each['splits']}"]
        rows.append(line)
    header = ["rate asked for", "rows that find the threshold", "stated interval, 95%"]
    header += [f"{way}: {what}" for way in ("detector", "plain quantile") for what in ("mean rate", "inside")]
    return "### Thresholds of the default score, over random splits of the test rows\n\n" + table(header, rows)


def draw_heat(sets: Mapping[str, Any]) -> None:
    """AUROC of every score and pair as colours, with the numbers written in."""
    from matplotlib.figure import Figure
    from PIL import Image

    for name, part in sets.items():
        scores = part["scores"]
        pairs = list(next(iter(scores.values())))
        values = [[found[pair]["auroc"][0] for pair in pairs] for found in scores.values()]
        figure = Figure(figsize=(9.6, 0.27 * len(scores) + 1.8), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(values, cmap="viridis", vmin=0.5, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(pairs)), [f"({p})" if p in HARD else p for p in pairs], rotation=35, ha="right")
        axes.set_yticks(range(len(scores)), list(scores))
        axes.tick_params(labelsize=8, length=0)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                text = "1" if value >= 0.9995 else f"{value:.3f}"[1:]
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="black" if value > 0.75 else "white")
        axes.set_title(f"AUROC, {name} in distribution (in brackets: outside of the averages)", fontsize=9)
        figure.colorbar(shown, ax=axes, extend="min", pad=0.01)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110)
        common.RESULTS.mkdir(parents=True, exist_ok=True)
        path = common.RESULTS / f"ood-{name.lower()}.png"
        Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


NOTES = """The positive class of AUPR is the foreign one; as many foreign rows as usual ones, so that chance is 0.5.
FPR95: the share of usual rows above the threshold that catches 95% of the foreign ones. In brackets: from the 2.5% to
the 97.5% point of 200 bootstrap resamples of both sets, of the rows alone: training is not repeated. Where kinds are
parted without exception no resample tells otherwise. Averages and worst cases are over the pairs that count: all but
images rotated by 180 and by 20 degrees and mirrored ones, of which many are of the usual kind; they were set apart
before anything was judged, and are told with the rest.

Networks learn from the first 55,000 training rows; the last 5000 fit the scores that compare rows with usual ones; test
rows are judged. *Energy*, *slopes* (lengths of the gradient; maps are means of it over 7 x 7
cells), *typicality*: of a noise-conditional U-Net fitted by
denoising at many levels, at one level in model units, where pixels go from -1 to 1, or at ten from 0.05 to 8. *Joint
model*: a classifier with a density (JEM), the density fitted by denoising at 0.3, since chains take hours.
*Energy-bounded*: the classifier tuned for 400 more steps with foreign images of other kinds than those judged. The
ensemble has four classifiers.

The default was chosen by `ood_choice.py`, on training rows kept back, against foreign rows of eleven kinds that are not
judged, some of them relatives of judged ones (sheared, transposed and rotated). It is the second choice: the first, a
mixture of energies and slopes without maps, was judged on MNIST and missed digits rotated by 90 (AUROC 0.862, and 0.977
on average over the pairs that count); kinds of rows in the wrong place were added to those that choose, and maps to the
score. Nothing was chosen by the table of Fashion-MNIST.

*Thresholds*: the rows of a split that find a threshold and those that show its rate are drawn from the same test rows,
which neither networks nor scores have seen. Given the scores the numbers of rows called foreign follow the
beta-binomial law that states the interval, whatever the score, and splits are independent draws of it: of 100, about 95
or a few more should lie inside. The plain quantile leaves out that a new row has a place among the others."""
