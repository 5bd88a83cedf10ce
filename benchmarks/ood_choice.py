"""How the default score of foreign rows was chosen: energies and slopes at levels, and models of them, side by side.

On rows kept back from training, against the foreign rows of `ood_sets.strangers`, none of which is judged by `ood.py`:
features of a noise-conditional energy (energies, slopes, their logarithms, and both) by four models of usual features.

Takes the energies of `ood.py` from ``--runs``, or trains them; then a few minutes.

    GIBBSIAN_DATA=data python benchmarks/ood_choice.py --runs runs/ood
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from common import circumstances, generator, table, write
from gibbsian.detection.base import Features, Score
from gibbsian.detection.levels import level_ladder
from mnist import SIGMA_MAX, SIGMA_MIN, Options, train
from ood_models import STEPS, UNET
from ood_sets import NAMES, strangers, usual

FITTING, NEW = 2500, 300
"""Rows kept back that fit a model, the first ones, and that are told from foreign ones, the last."""

LEVELS = level_ladder(SIGMA_MIN, SIGMA_MAX)

Kinds = dict[str, Callable[[Tensor], Tensor]]

KINDS: Kinds = {
    "energies": lambda x: x[:, : len(LEVELS)],
    "slopes": lambda x: x[:, len(LEVELS) :],
    "logarithms of slopes": lambda x: x[:, len(LEVELS) :].log(),
    "energies and slopes": lambda x: x,
    "energies and logarithms of slopes": lambda x: torch.cat((x[:, : len(LEVELS)], x[:, len(LEVELS) :].log()), 1),
}
"""What is made of energies and lengths of slopes, in this order, ``(n, 2 L)``."""

MODELS: dict[str, Callable[[Features, Tensor], Score]] = {
    "Mahalanobis": gb.mahalanobis,
    "mixture of 5": lambda f, x: gb.gaussian_mixture(f, x, 5, rng=generator(0)),
    "mixture of 10": lambda f, x: gb.gaussian_mixture(f, x, 10, rng=generator(0)),
    "fifth neighbour": lambda f, x: gb.nearest_neighbours(f, x, 5, scaling="columns"),
}


def areas(name: str, options: Options) -> dict[str, dict[str, float]]:
    """AUROC of every combination against each kind of stranger, on one set."""
    rows = usual(name)
    model = train(NAMES[name], rows.dataset, rows.dataset.train, STEPS["energy"], options, **UNET)
    new = rows.reference[-options.scaled(NEW, 20) :]
    sets = {"usual": rows.reference[: options.scaled(FITTING, 60)], "new": new}
    sets |= strangers(new, generator(options.seed, 61))
    described = gb.LevelFeatures(model.energy, LEVELS, "both")
    known = {kind: described(model.rows(x)).double() for kind, x in sets.items()}
    usual_rows, inside = known.pop("usual"), known.pop("new")
    found = {}
    for kind, features in KINDS.items():
        for way, make in MODELS.items():
            score = make(features, usual_rows)
            low, rng = score(inside), generator(options.seed, 62)
            found[f"{kind}, {way}"] = {k: gb.auroc(low, score(x), rng=rng, resamples=2).value for k, x in known.items()}
    return found


def section(sets: dict[str, dict[str, dict[str, float]]]) -> str:
    """Averages and worst cases of all combinations, the best average first."""
    lines = []
    for name in next(iter(sets.values())):
        each = [list(found[name].values()) for found in sets.values()]
        means = [sum(x) / len(x) for x in each]
        lines.append((sum(means) / len(means), name, [f"{v:.4f}" for m, x in zip(means, each) for v in (m, min(x))]))
    rows = [[name, f"{mean:.4f}", *told] for mean, name, told in sorted(lines, reverse=True)]
    ends = [f"{name}, {end}" for name in sets for end in ("average", "worst")]
    return table(["score", "average of both sets", *ends], rows)


NOTES = f"""AUROC of {NEW} rows kept back from training against as many foreign rows of each of nine kinds that are not
judged in the table of foreign images; models of the features are fitted to {FITTING} other rows kept back. Features:
energies, and lengths of gradients, at {len(LEVELS)} noise levels from {SIGMA_MIN:g} to {SIGMA_MAX:g}."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare on both sets, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on steps and rows, up to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=None, help="the folder of ood.py's checkpoints")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(given.budget, given.seed, given.threads, given.runs or Path(folder))
        sets = {name: areas(name, options) for name in NAMES}
    record = circumstances([given.seed], given.threads) | {"budget": given.budget, "sets": sets}
    write("ood_choice", "The choice of the default score of foreign images", record, [section(sets), NOTES])
    return sets


if __name__ == "__main__":
    main()
