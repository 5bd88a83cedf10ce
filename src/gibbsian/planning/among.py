"""What each process does that `gibbsian.planning.crew` starts: ``python -m gibbsian.planning.among JOB FOUND``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gibbsian.errors import GibbsianError
from gibbsian.planning.clocks import FEWEST, chains_of, kernel_of, quantity, time_chains, time_training
from gibbsian.planning.costs import NOTHING, ONE, Quantity, total
from gibbsian.planning.crew import curve_of
from gibbsian.processes import World, gathered_objects, join_processes, told_by_main
from gibbsian.recipes import Recipe
from gibbsian.training.settings import TrainingSettings

LONGEST = 300.0
"""Seconds that a process waits for the others."""


def main(arguments: list[str]) -> None:
    """Measure as one of the processes; the first writes down what was found."""
    job = json.loads(Path(arguments[0]).read_text())
    torch.set_num_threads(job["threads"])
    recipe = Recipe.from_dict(job["recipe"])
    share = job["seconds"] / (2 + (job["batch"] is not None) + (job["chains"] is not None))
    # Before there is a group, `fit` knows of no other process.
    meeting = Meeting(job["port"])
    found: dict[str, Any] = {"refused": "", "training": _pair(ONE), "sampling": _pair(ONE), "telling": _pair(NOTHING)}
    computing = 0.0
    if job["batch"] is not None:
        alone, together = _slowed(meeting, lambda s: _step(recipe, job["batch"], s), share)
        found["training"] = _pair(_ratio(together, alone))
        computing = min(q.value for q in together)
    if job["chains"] is not None:
        energy, start = chains_of(recipe)
        x = start(job["chains"], torch.Generator().manual_seed(0))
        alone, together = _slowed(meeting, lambda s: time_chains(energy, kernel_of(recipe), x, s), share)
        found["sampling"] = _pair(_ratio(together, alone))
    with join_processes() as here:
        found["exchange"] = [(n, _pair(_exchange(n, share / 3))) for n in job["bytes"]]
        if job["batch"] is not None:
            besides = computing + curve_of(found["exchange"]).at(job["gradients"]).value
            telling, found["refused"] = _telling(recipe, job["batch"], here, share / 2, besides)
            found["telling"] = _pair(telling)
        if here.main:
            Path(arguments[1]).write_text(json.dumps(found))


class Meeting:
    """Where processes wait for each other without being a group; waiting takes no processor's time.

    Parameters
    ----------
    port
        Of this machine, on which the first process keeps the list of those who came.
    """

    def __init__(self, port: int) -> None:
        self.main, self.size = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])
        self.store = dist.TCPStore("127.0.0.1", port, self.size, self.main, timeout=timedelta(seconds=LONGEST))
        self.times = 0

    def wait(self) -> None:
        """Wait until all are here."""
        self.times += 1
        if self.store.add(f"came {self.times}", 1) == self.size:
            self.store.set(f"go {self.times}", "")
        self.store.wait([f"go {self.times}"])


def _exchange(size: int, seconds: float) -> Quantity:
    """Time an all-reduce."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    x = torch.zeros(size // 4, device=device)
    times: list[float] = []
    began = time.perf_counter()
    # Every process makes as many, which the first one decides on after some.
    for _ in range(10):
        times.append(_timed(lambda: dist.all_reduce(x), device))
    each = gathered_objects((time.perf_counter() - began) / 10)[0]
    for _ in range(max(10, min(2000, int(seconds / max(each, 1e-6))))):
        times.append(_timed(lambda: dist.all_reduce(x), device))
    return quantity(times[5:])


def _timed(run: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _step(recipe: Recipe, rows: int, seconds: float, **options: Any) -> Quantity:
    return total(time_training(recipe, rows, seconds, **options).parts.values())


def _slowed(
    meeting: Meeting, measure: Callable[[float], Quantity], seconds: float
) -> tuple[list[Quantity], list[Quantity]]:
    """Measure in turns with the first process busy alone, and with all of them; what the first one saw."""
    alone: list[Quantity] = []
    together: list[Quantity] = []
    for _ in range(2):
        meeting.wait()
        if meeting.main:
            alone.append(measure(seconds / 4))
        meeting.wait()
        together.append(measure(seconds / 4))
    return alone, together


def _ratio(together: list[Quantity], alone: list[Quantity]) -> Quantity:
    """How many times as long, by the better of the turns, and no less than once; spread by the turns' difference."""
    if not alone:
        return ONE
    ratios = [a.value / b.value for a, b in zip(together, alone)]
    ratio = min(q.value for q in together) / min(q.value for q in alone)
    return Quantity(max(1.0, ratio), abs(ratios[0] - ratios[1]) / 2)


def _telling(recipe: Recipe, rows: int, here: World, seconds: float, besides: float) -> tuple[Quantity, str]:
    """What a step of `fit` among processes takes besides computing and one all-reduce; or why it cannot be run so."""
    if "lanes" not in {f.name for f in dataclasses.fields(TrainingSettings)}:
        return NOTHING, ""
    steps = told_by_main(max(FEWEST, min(300, int(seconds / max(besides, 1e-6)))))
    try:
        step = _step(recipe, rows * here.size, 0.0, exactly=steps, lanes=here.size)
    except GibbsianError as refused:
        return NOTHING, str(refused)
    return Quantity(max(0.0, step.value - besides), step.spread), ""


def _pair(q: Quantity) -> tuple[float, float]:
    return q.value, q.spread


if __name__ == "__main__":
    main(sys.argv[1:])
