"""Runs that are killed at random moments, resumed until done, and compared with the run that nobody disturbed.

A small network is fitted by persistent contrastive divergence in double precision, with a checkpoint every few steps so
that many kills fall into the writing of one. Processes are forked from one that has imported everything, and killed by
SIGKILL after a random time; the last one of a run ends by itself. Equal means to the bit: weights, their averages, the
optimiser, the replay buffer, generators, counts, and every record of ``metrics.jsonl``, but for times. Of two processes
both are killed, or, in every third session, one, and the other has to end by itself. Writes ``results/kills.json`` and
``.md``.

    python benchmarks/kills.py               # 100 runs each way, about half an hour on one core
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import common
import gibbsian as gb
from common import circumstances, generator, table, write
from gibbsian.errors import ProcessError
from gibbsian.training.checkpoint_folder import CheckpointFolder, read_checkpoint
from gibbsian.training.metrics import read_metrics

TIMES = {"seconds", "steps_per_second"}
LOST = 3
"""Exit code of a process that has lost another."""


@dataclass(frozen=True)
class Case:
    """A way to run.

    Attributes
    ----------
    name
        For the table.
    processes
        How many.
    settings
        Of the training, besides the common ones.
    """

    name: str
    processes: int
    settings: dict[str, Any]


CASES = (
    Case("one process, a file each", 1, {}),
    Case("one process, shared folders", 1, {"checkpoint_format": "shared"}),
    Case("two processes, shared folders", 2, {"lanes": 2}),
)


def train(folder: Path, case: Case, steps: int) -> None:
    """Train, or go on."""
    torch.manual_seed(0)
    base = gb.Gaussian(2).double()
    energy = (gb.MLP(2, (16,)) + gb.Gaussian(2)).double()
    objective = gb.PCD(gb.MALA(0.1), base, steps=2, buffer_size=64)
    data = 0.5 + torch.randn(256, 2, generator=generator(1), dtype=torch.float64)
    gb.fit(
        energy,
        data,
        objective,
        rng=generator(2),
        folder=folder,
        resume=True,
        steps=steps,
        batch_size=16,
        log_every=5,
        checkpoint_every=10,
        tensorboard=False,
        **case.settings,
    )


def work(folder: Path, case: Case, steps: int, rank: int, meeting: Path) -> None:
    """What a process does: train, in company where it has some."""
    torch.set_num_threads(1)
    code = 0
    try:
        if case.processes > 1 and not meet(meeting, rank, case.processes):
            os._exit(LOST)
        train(folder, case, steps)
    except ProcessError:
        code = LOST
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def meet(meeting: Path, rank: int, size: int) -> bool:
    """Join the others; whether they came."""
    timeout = timedelta(seconds=20)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", timeout=timeout, rank=rank, world_size=size)
    except RuntimeError:
        return False
    return True


def start(folder: Path, case: Case, steps: int) -> list[BaseProcess]:
    """Begin a session."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    fork = multiprocessing.get_context("fork")
    session = [fork.Process(target=work, args=(folder, case, steps, r, meeting)) for r in range(case.processes)]
    for process in session:
        process.start()
    return session


def finish(session: list[BaseProcess], seconds: float = 600.0) -> list[int | None]:
    """Wait for a session to end; its exit codes."""
    until = time.monotonic() + seconds
    for process in session:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            for each in session:
                each.kill()
            raise RuntimeError(f"A session did not end within {seconds:.0f} seconds.")
    return [process.exitcode for process in session]


def disturb(folder: Path, case: Case, steps: int, longest: float, kills: int, luck: random.Random) -> dict[str, int]:
    """Run to the end through so many kills, as far as they come before it; say what they met."""
    met = {"kills": 0, "writing": 0, "left alone": 0}
    for _ in range(kills):
        session = start(folder, case, steps)
        time.sleep(luck.uniform(0.0, longest))
        alone = case.processes > 1 and luck.random() < 1 / 3
        victims = [luck.choice(session)] if alone else session
        hit = [process for process in victims if process.is_alive()]
        for process in hit:
            process.kill()
        codes = finish(session, 60.0)  # a lost process ends its job within a minute
        if set(codes) - {0, -9, LOST}:
            raise RuntimeError(f"A process ended by an error of its own: {codes}.")
        met["kills"] += bool(hit)
        met["left alone"] += LOST in codes
        met["writing"] += bool(hit) and any(folder.glob("checkpoints/*.partial"))
    if set(finish(start(folder, case, steps))) != {0}:
        raise RuntimeError("The last session did not come to its end.")
    return met


def outcome(folder: Path) -> tuple[Any, Any, list[int]]:
    """Everything that a run leaves behind, without times."""
    paths = CheckpointFolder(folder, 1, 2).paths()
    state = read_checkpoint(list(paths.values())[-1])
    return timeless(state), timeless(read_metrics(folder / "metrics.jsonl")), list(paths)


def timeless(tree: Any) -> Any:
    """Leave times out."""
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if k not in TIMES}
    return [timeless(part) for part in tree] if isinstance(tree, (list, tuple)) else tree


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b or (a != a and b != b)


def measure(
    case: Case, runs: int, steps: int, kills: int, seed: int, home: Path, minutes: float = math.inf
) -> dict[str, Any]:
    """Disturb so many runs, or as many as there is time for, and compare each with the undisturbed one."""
    began = time.perf_counter()
    plain = home / case.name / "plain"
    if set(finish(start(plain, case, steps))) != {0}:
        raise RuntimeError("The undisturbed run did not come to its end.")
    undisturbed = longest = time.perf_counter() - began
    wanted = outcome(plain)
    met, equal, unequal, took = {"kills": 0, "writing": 0, "left alone": 0}, 0, [], []
    tried = 0
    while len(took) < runs and time.perf_counter() - began < 60 * minutes:
        luck, folder = random.Random(1000 * seed + tried), home / case.name / f"run{tried}"
        tried, since = tried + 1, time.perf_counter()
        found = disturb(folder, case, steps, longest, kills, luck)
        # A run that came to its end before anything hit it says nothing, and the next ones are hit earlier.
        longest *= 1.05 if found["kills"] else 0.7
        if not found["kills"]:
            continue
        met = {name: met[name] + found[name] for name in met}
        alike = same(wanted, outcome(folder))
        equal += alike
        if not alike:
            parts = zip(("state", "records", "checkpoints"), wanted, outcome(folder))
            unequal.append([tried - 1, *(name for name, a, b in parts if not same(a, b))])
        took.append(time.perf_counter() - since)
        print(f"{case.name}: {equal} of {len(took)} equal, {met}", flush=True)
    return {
        "case": case.name,
        "processes": case.processes,
        "runs": len(took),
        "equal": equal,
        "unequal": unequal,
        **met,
        "undisturbed_seconds": undisturbed,
        "median_seconds": statistics.median(took),
    }


def elsewhere(rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Cases of the same length that were measured apart from these."""
    try:
        told = json.loads((common.RESULTS / "kills.json").read_text())
    except (OSError, ValueError):
        return []
    return [r for r in told["cases"] if told["steps"] == steps and r["case"] not in {row["case"] for row in rows}]


def record(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what is known after each way of running, and keep what other calls have found of the others."""
    rows = sorted([*elsewhere(rows, options.steps), *rows], key=lambda row: [c.name for c in CASES].index(row["case"]))
    own = {"steps": options.steps, "kills_per_run": options.kills, "cases": rows}
    header = ("run", "equal to the undisturbed one", "kills", "while a checkpoint was written", "survivors that ended")
    lines = [(r["case"], f"{r['equal']} of {r['runs']}", r["kills"], r["writing"], r["left alone"] or "") for r in rows]
    told = (
        f"Runs of {options.steps} steps with a checkpoint every 10, killed one to {options.kills} times each at random "
        "moments by SIGKILL and resumed until done. Equal: to the bit, in weights, averages, optimiser, replay buffer, "
        "generators and every record but for times. Survivors: sessions of which one process was killed, and the "
        "other ended by itself with an error that names it."
    )
    write(
        "kills",
        "Runs that are killed and resumed",
        circumstances([options.seed], 1) | own,
        (told, table(header, lines)),
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kills", type=int, default=3, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))), help="numbers, from 0")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which a case is broken off")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A kill must leave no damage behind that would be warned of.
    warnings.filterwarnings("error", category=RuntimeWarning)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        # What is imported on the way is imported once, here.
        for settings in ({}, {"checkpoint_format": "shared"}):
            train(Path(home) / f"warm{len(settings)}", Case("", 1, settings), 1)
        for case in (CASES[i] for i in options.cases):
            rows.append(
                measure(case, options.runs, options.steps, options.kills, options.seed, Path(home), options.minutes)
            )
            print(rows[-1], flush=True)
            record(rows, options)


if __name__ == "__main__":
    main()
