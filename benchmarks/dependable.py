"""Whether training can be left alone: neural PCD over seeds and learning rates, with training health on and off.

For every set, 20 runs with 20 seeds and learning rates spread evenly over two decades (in the logarithm), from the
recipe for persistent contrastive divergence on images. A run is good when its draws meet the bar: their Frechet
distance to held-out rows, in the features of a classifier of the training rows, is at most that of draws from a
Gaussian with the training rows' mean and covariance. Otherwise it should have said so: stopped with a named cause, or
ended with the verdict that its chains are unlike the data, or were running away. What does neither is silently useless.
A run that health left alone is the same to the bit without it, so that only those that it stopped or took back are
trained again with health off; ``--again`` trains all. Writes ``results/dependable.json`` and ``.md`` after every run;
MNIST is read from the folder in GIBBSIAN_DATA. At full budget a run takes about 1 minute of one core, and there are 40
or more, of which ``--jobs`` go on at a time.

    GIBBSIAN_DATA=data python benchmarks/dependable.py --jobs 2
    python benchmarks/dependable.py --sets digits --budget 0.1
    python benchmarks/dependable.py --resume
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

import common
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.building import build_objective, initial_weights
from gibbsian.data import Dataset, load
from gibbsian.diagnostics.two_sample import frechet_distance
from gibbsian.errors import DivergenceError, GibbsianError
from gibbsian.evaluation import classifier_features
from gibbsian.models import Model
from gibbsian.recipes import choose
from gibbsian.training.fit import Fit, fit

LOWEST, HIGHEST, RUNS = 3e-5, 3e-3, 20
DRAWS, FEWEST_DRAWS = 500, 250

SPLIT = 1
"""Seed of the split: the recipe was chosen by held-out rows of another."""

SETS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 2500},
    "mnist": {"limit": 12_000, "steps": 1500},
}
"""How each set is trained, besides the recipe for PCD; ``limit`` is a number of rows."""

OUTCOMES = ("good", "stopped", "told", "useless", "broken")
"""What may become of a run: it meets the bar; it stopped with a named cause; it ended with the verdict that it was
useless; it ended below the bar and said nothing; its weights are no numbers and it said nothing."""


@dataclass(frozen=True)
class Run:
    """One run and what became of it; ``quality`` is the Frechet distance of its draws.

    ``chain_distance`` is the energy distance of its last chains to the data, in units of that of a Gaussian.
    """

    name: str
    seed: int
    learning_rate: float
    health: bool
    outcome: str
    cause: str
    quality: float
    bar: float
    chain_distance: float
    steps: int
    rollbacks: int
    cpu: float
    wall: float

    @property
    def told(self) -> str:
        """The outcome in a cell of a table."""
        back = f", {self.rollbacks} rollback{'s' * (self.rollbacks != 1)}" if self.rollbacks else ""
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.outcome}{cause}, FD {self.quality:.3g}, chains {self.chain_distance:.2g}{back}"


@dataclass(frozen=True)
class Judge:
    """How draws of one set are judged: features ``(n, *event) -> (n, k)``, those of held-out rows, and the bar."""

    features: Callable[[Tensor], Tensor]
    reference: Tensor
    low: float
    high: float
    bar: float

    def quality(self, draws: Tensor) -> float:
        """Frechet distance of draws in the pixels' range; infinite where a draw is no number."""
        if not bool(torch.isfinite(draws).all()):
            return math.inf
        return frechet_distance(self.features(draws.clamp(self.low, self.high)), self.reference).value


def judge_of(dataset: Dataset, draws: int) -> Judge:
    """Train the classifier, and see what a Gaussian reaches with as many draws."""
    net = classifier_features(dataset)
    if net is None:
        raise SystemExit(f"{dataset.name} has no labels to train a classifier on.")
    train, shape = dataset.train.flatten(1).double(), dataset.event_shape
    reference = net(dataset.held_out[:2000].flatten(1))
    low, high = float(train.min()), float(train.max())
    values, axes = torch.linalg.eigh(train.T.cov())
    noise = torch.randn((draws, len(values)), generator=generator(99), dtype=torch.float64)
    gaussian = train.mean(0) + (noise * values.clamp(min=0.0).sqrt()) @ axes.T
    judge = Judge(lambda x: net(x.flatten(1)), reference, low, high, math.inf)
    return Judge(judge.features, reference, low, high, judge.quality(gaussian.float().view(draws, *shape)))


def outcome(quality: float, bar: float, finite: bool, done: Fit | None, error: DivergenceError | None) -> str:
    """Name what became of a run."""
    if error is not None:
        return "stopped"
    if not finite:
        return "broken"
    if quality <= bar:
        return "good"
    assert done is not None
    return "told" if any(event["event"] == "verdict" for event in done.events) else "useless"


def train(task: Task, dataset: Dataset, judge: Judge) -> Run:
    """Train and judge one model."""
    name, seed, rate, health, options = task.name, task.seed, task.learning_rate, task.health, task.options
    steps = max(4, round(task.settings["steps"] * options.budget))
    told = {k: v for k, v in task.settings.items() if k not in ("limit", "steps")}
    # Warm-up and the time between records shrink with the steps.
    told |= {"learning_rate": rate, "seed": seed, "health": health, "objective": "pcd", "steps": steps}
    told |= {"warmup_steps": min(100, steps // 4), "checkpoint_every": max(2, steps // 10)}
    told |= {"log_every": max(1, min(25, steps // 10))}
    scaling = dataset.scaling()
    z = scaling.forward(dataset.train)
    recipe = choose(dataset.kind, dataset.event_shape, len(z), told)
    history: list[dict[str, Any]] = []
    done, failed = None, None
    energy = initial_weights(recipe, z)
    with Stopwatch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        objective = build_objective(recipe, z, energy)
        try:
            done = fit(energy, z, objective, rng=generator(seed), settings=recipe.training, callbacks=[history.append])
        except DivergenceError as error:
            failed = error
    finite = all(bool(torch.isfinite(p).all()) for p in energy.parameters())
    events = [record for record in history if "event" in record]
    quality = judged(Model(energy, recipe, scaling), judge, seed, options)
    cause = next((f"{e['kind']}: {e['metric']}" for e in reversed(events) if e["event"] != "rollback"), "")
    rollbacks = sum(record["event"] == "rollback" for record in events)
    found = outcome(quality, judge.bar, finite, done, failed)
    last = max((record["step"] for record in history), default=0)
    apart = next((record["chain_distance"] for record in history if "chain_distance" in record), math.nan)
    times = (watch.cpu, watch.wall)
    return Run(name, seed, rate, health, found, cause, quality, judge.bar, apart, last, rollbacks, *times)


def judged(model: Model, judge: Judge, seed: int, options: Any) -> float:
    """Quality of a model's draws; infinite where none can be made."""
    try:
        return judge.quality(model.draw(draws_of(options), generator(seed, 1)))
    except GibbsianError:
        return math.inf


def draws_of(options: Any) -> int:
    """Draws per model."""
    return max(FEWEST_DRAWS, round(DRAWS * min(1.0, options.budget)))


def rates(runs: int) -> list[float]:
    """Learning rates evenly spread over two decades."""
    return np.geomspace(LOWEST, HIGHEST, runs).tolist() if runs > 1 else [math.sqrt(LOWEST * HIGHEST)]


def grid_table(runs: Sequence[Run]) -> str:
    """Every run of one set, with and without health."""
    cells: dict[tuple[int, float], dict[bool, Run]] = {}
    for run in runs:
        cells.setdefault((run.seed, run.learning_rate), {})[run.health] = run
    rows = [
        [f"{rate:.2g}", seed, *(both[on].told if on in both else "" for on in (True, False))]
        for (seed, rate), both in sorted(cells.items(), key=lambda item: item[0][1])
    ]
    return table(["learning rate", "seed", "health on", "health off"], rows)


def count_table(runs: Sequence[Run]) -> str:
    """How many runs of each set ended how."""
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        for on in (True, False):
            own = [run for run in runs if run.name == name and run.health == on]
            if own:
                counts = Counter(run.outcome for run in own)
                back = sum(run.rollbacks for run in own)
                rows.append([f"{name}, health {'on' if on else 'off'}", len(own), *(counts[o] for o in OUTCOMES), back])
    return table(["set", "runs", *OUTCOMES, "rollbacks"], rows)


NOTES = """Good: the draws' Fréchet distance (FD) to held-out rows, in the last hidden layer of a small classifier of
the training rows, is at most that of as many draws from a Gaussian with the training rows' mean and covariance (the
bar, stated with each table); draws are clipped to the pixels' range. Stopped: training raised `DivergenceError` with
the cause in brackets. Told: it ended and said that its chains were farther from the data than a Gaussian's draws, or
that it was running away. Useless: worse than the bar without a word. Broken: weights that are no numbers, without a
word. FD inf: no draws were made. Chains: the energy distance of the last chains to the data, in units of that of a
Gaussian's draws; more than 1, and three standard errors, is told. A run that health left alone is the same without it,
less what is told, and was not trained again."""


def report(runs: Sequence[Run], options: Any) -> None:
    """Write what is known so far."""
    record = circumstances(range(options.runs), options.threads) | {
        "budget": options.budget,
        "settings": {name: SETS[name] for name in options.sets},
        "learning_rates": rates(options.runs),
        "runs": [asdict(run) for run in runs],
    }
    sections = [count_table(runs), NOTES]
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        sections.append(f"## {name}\n\nBar: FD {own[0].bar:.3g}.\n\n{grid_table(own)}")
    write("dependable", "Training left alone", record, sections)


def saved(options: Any) -> list[Run]:
    """Runs of an earlier session of the same budget, when asked for."""
    path = common.RESULTS / "dependable.json"
    if not options.resume or not path.exists():
        return []
    record = json.loads(path.read_text())
    if record["budget"] != options.budget or record["learning_rates"] != rates(options.runs):
        raise SystemExit(f"{path} is of another budget or number of runs; remove it, or ask for the same.")
    return [Run(**run) for run in record["runs"]]


@dataclass(frozen=True)
class Task:
    """A run to be made; ``settings`` are those of its set."""

    name: str
    seed: int
    learning_rate: float
    health: bool
    settings: dict[str, Any]
    options: Any


@cache
def judged_set(name: str, limit: int | None, draws: int) -> tuple[Dataset, Judge]:
    """Load a set, with its judge."""
    dataset = load(name, seed=SPLIT, limit=limit)
    return dataset, judge_of(dataset, draws)


def perform(task: Task) -> Run:
    """Do one run, in whatever process."""
    torch.set_num_threads(task.options.threads)
    warnings.filterwarnings("ignore", module="sklearn")
    return train(task, *judged_set(task.name, task.settings.get("limit"), draws_of(task.options)))


def perform_all(tasks: Sequence[Task], jobs: int) -> Iterator[Run]:
    """Do all runs, some at a time, and hand each over as it ends."""
    if jobs == 1:
        yield from map(perform, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(perform, tasks)


def found(names: Sequence[str]) -> list[str]:
    """Those sets that are there."""
    there = []
    for name in names:
        try:
            load(name, seed=SPLIT, limit=SETS[name].get("limit"))
            there.append(name)
        except GibbsianError as error:
            print(f"{name} is left out: {error}", flush=True)
    return there


def left_alone(run: Run) -> bool:
    """Whether health only watched: nothing was taken back or stopped."""
    return run.health and run.rollbacks == 0 and run.outcome != "stopped"


def unwatched(run: Run) -> Run:
    """The same run without health, of one that was left alone: nothing is told of it."""
    silent = "good" if run.outcome == "good" else "useless"
    return replace(run, health=False, outcome=silent, cause="", cpu=0.0, wall=0.0)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--runs", type=int, default=RUNS, help="seeds and learning rates per set")
    parser.add_argument("--again", action="store_true", help="train runs that health left alone without it too")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on optimiser steps and draws")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--resume", action="store_true", help="keep the runs that results/dependable.json holds")
    options = parser.parse_args(arguments)
    runs = saved(options)
    known = {(run.name, run.seed, run.health) for run in runs}
    there = found(options.sets)
    # With health first, as that is what matters should the time run out.
    for on in (True, False):
        if not (on or options.again):
            runs += [unwatched(r) for r in runs if left_alone(r) and (r.name, r.seed, False) not in known]
            known |= {(run.name, run.seed, run.health) for run in runs}
        tasks = [
            Task(name, seed, rate, on, SETS[name], options)
            for name, (seed, rate) in product(there, enumerate(rates(options.runs)))
            if (name, seed, on) not in known
        ]
        for run in perform_all(tasks, options.jobs):
            runs.append(run)
            told = f"{run.name}, {run.learning_rate:.2g}, seed {run.seed}, health {'on' if run.health else 'off'}"
            print(f"{told}: {run.told}, bar {run.bar:.3g}; {run.cpu:.0f} s CPU", flush=True)
            report(in_order(runs), options)
    report(in_order(runs), options)
    return runs


def in_order(runs: Sequence[Run]) -> list[Run]:
    """By set, seed and health."""
    return sorted(runs, key=lambda r: (list(SETS).index(r.name), r.seed, not r.health))


if __name__ == "__main__":
    main()
