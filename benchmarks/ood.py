"""Telling foreign images: scores of energies, classifiers and neighbours, on MNIST and on Fashion-MNIST.

For either set, networks are fitted to training rows, scores that compare rows with usual ones to training rows kept
back, and test rows are told from: the other set, test rows turned, inverted, digits of another source, noise, constant
images. AUROC, AUPR and the rate of false alarms at 95% caught, with intervals. Then thresholds: over a hundred random
splits of the test rows in two, how often the realised rate of false alarms lies where `Calibration` says it does.

Took an hour and a half on a core that had other work too, an hour of it for the two energies. MNIST and Fashion-MNIST
are read from the folder in GIBBSIAN_DATA. ``--runs`` keeps checkpoints: a run that was stopped goes on where it was.

    GIBBSIAN_DATA=data python benchmarks/ood.py --runs runs/ood
    python benchmarks/ood.py --budget 0.01
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from common import Stopwatch, circumstances, generator, write
from gibbsian.detection.base import Score
from gibbsian.detection.calibration import Calibration, calibrate, rows_needed
from gibbsian.diagnostics.detection import separation
from mnist import Options
from ood_models import DEFAULT, scores, trained
from ood_results import NOTES, conformal_section, counted, draw_heat, set_section
from ood_sets import NAMES, foreign, usual

ROWS = 1000
"""Rows of each kind that are told apart."""

RESAMPLES = 200
"""Of each bootstrap."""

RATES, SPLITS, LEVEL = (0.01, 0.05, 0.1), 100, 0.95
"""Rates of false alarms, splits in two, and the probability of the stated intervals."""

CALIBRATING = (100, 1000)
"""Rows that find a threshold; all others of the `TESTED` test rows show its rate."""

TESTED = 5000
"""Test rows that are split in two."""


def judge(
    score: Score, inside: Tensor, sets: Mapping[str, Tensor], options: Options
) -> dict[str, dict[str, Sequence[float]]]:
    """AUROC, AUPR and false alarms of a score against each foreign set, with intervals."""
    values = score(inside)
    return {
        pair: separation(
            values, score(x), positive="outside", rng=generator(options.seed, 42), resamples=RESAMPLES
        )._asdict()
        for pair, x in sets.items()
    }


def conformal(values: Tensor, options: Options) -> list[dict[str, Any]]:
    """Realised rates over random splits of rows whose scores are given, by `Detector` and by a plain quantile.

    Given the scores, the order of a split is all that is random, so that the numbers of rows called foreign follow the
    beta-binomial law of `Calibration.count_interval` exactly, whatever the score, where no scores are tied.
    """
    found = []
    for size in (options.scaled(n, 20) for n in CALIBRATING):
        for rate in RATES:
            if size < rows_needed(rate) or size >= len(values):
                continue
            rng, rest = generator(options.seed, 51, size, round(1000 * rate)), len(values) - size
            told: dict[str, list[float]] = {"detector": [], "plain quantile": []}
            inside = dict.fromkeys(told, 0)
            low, high = calibrate(values[:size], rate).count_interval(rest, LEVEL)
            for _ in range(SPLITS):
                first, second = torch.randperm(len(values), generator=rng).split([size, rest])
                detector = gb.Detector(lambda rows: values[rows], first, false_positive_rate=rate).fit()
                flagged = {
                    "detector": int((detector.predict(second) < 0).sum()),
                    "plain quantile": int(plain_quantile(values[first], rate).flags(values[second]).sum()),
                }
                for way, count in flagged.items():
                    told[way].append(count / rest)
                    inside[way] += low <= count <= high
            found.append(
                {"rate": rate, "rows": size, "interval": [low / rest, high / rest], "splits": SPLITS}
                | {way: {"mean": sum(x) / SPLITS, "inside": inside[way]} for way, x in told.items()}
            )
    return found


def plain_quantile(values: Tensor, rate: float) -> Calibration:
    """A threshold without the correction for few rows, to see what it is worth."""
    return Calibration(values.double().sort().values, rate, math.ceil(len(values) * (1.0 - rate)))


def run(options: Options) -> dict[str, Any]:
    """Train, judge and write."""
    torch.set_num_threads(options.threads)
    rows = {name: usual(name) for name in NAMES}
    found: dict[str, Any] = {"budget": options.budget, "sets": {}}
    for name, each in rows.items():
        models = trained(NAMES[name], each, options)
        count = options.scaled(ROWS, 60)
        inside = each.dataset.held_out[:count]
        others = {k: v.dataset.held_out[:count] for k, v in rows.items() if k != name}
        sets = foreign(inside, others, generator(options.seed, 40))
        judged, minutes, default = {}, {}, None
        for told, score in scores(models, each, generator(options.seed, 41)).items():
            with Stopwatch() as watch:
                judged[told] = judge(score, inside, sets, options)
            minutes[told] = watch.wall / 60.0
            areas = counted(judged[told], "auroc")
            print(f"{told}: mean {sum(areas) / len(areas):.4f}, lowest {min(areas):.4f}", flush=True)
            default = score if told == DEFAULT else default
        assert default is not None
        with Stopwatch() as watch:
            thresholds = conformal(default(each.dataset.held_out[: options.scaled(TESTED, 100)]), options)
        facts = models.facts | {"classifier accuracy": models.accuracy, "conformal minutes": watch.wall / 60.0}
        found["sets"][name] = {"scores": judged, "conformal": thresholds, "minutes": minutes, "facts": facts}
        record = circumstances([options.seed], options.threads) | found
        sections = [part for k, v in found["sets"].items() for part in (set_section(k, v), conformal_section(v))]
        draw_heat(found["sets"])
        write("ood", "Foreign images", record, [*sections, NOTES])
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on steps and rows, up to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=None, help="where checkpoints are kept; nowhere when left out")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return run(Options(given.budget, given.seed, given.threads, given.runs or Path(folder)))


if __name__ == "__main__":
    main()
