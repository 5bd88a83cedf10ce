"""What the workers share: cases, timing, and the exchange of JSON lines with the driver.

A worker takes its cases from the command line, or, when there are none, from standard input, one a line; it answers
each with one JSON line on standard output.  Reading from standard input lets the driver keep one process for each
library alive and hand out the cases in alternation, without importing and compiling anew for each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from targets import LEAPFROG
from torch import Tensor

Runner = Callable[[int], Tensor]
"""Runs a given number of transitions from the fixed start, and returns the final positions."""

KERNELS = ("ULA", "MALA", "HMC", "CD")
"""CD is no kernel but a step of training: contrastive divergence with ten Langevin steps, and the optimiser's."""

# On a machine shared with others, the processor time of a process with one thread is what its wall time would be alone.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """One thing to time: a kernel on a target with a number of chains."""

    kernel: str
    target: str
    chains: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read ``KERNEL:target:chains``, as in ``ULA:mlp:64``."""
        kernel, target, chains = text.strip().split(":")
        if kernel not in KERNELS:
            raise ValueError(f"unknown kernel {kernel!r}; choose from {', '.join(KERNELS)}")
        return cls(kernel, target, int(chains))

    @property
    def gradients(self) -> int:
        """Gradients that one transition needs, whatever number a library spends on it.

        A Langevin transition needs one, since the gradient of the accepted point can be carried over, and a trajectory
        needs one for each leapfrog step.  A library which computes more shows that in its time.
        """
        return LEAPFROG if self.kernel == "HMC" else 1


@dataclass(frozen=True)
class Worker:
    """A library as the harness sees it.

    Attributes
    ----------
    library, version : str
        What is being timed.
    prepare : callable
        Builds the runner of a case; the second argument asks for an energy that went through ``torch.compile``.
    """

    library: str
    version: str
    prepare: Callable[[Case, bool], Runner]


@dataclass
class Prepared:
    """A runner that is warm, with the number of transitions that fills one measurement."""

    run: Runner
    steps: int


def warm_up(run: Runner, seconds: float) -> Prepared:
    """Run once for compilation and caches, then grow the chain until it lasts as long as one measurement should."""
    # Both lengths: a library that compiles blocks of steps has one graph for them and one for what is left over.
    run(2)
    run(20)
    steps, elapsed = 10, 0.0
    while True:
        began = time.perf_counter()
        run(steps)
        elapsed = time.perf_counter() - began
        if elapsed >= 0.5 * seconds:
            return Prepared(run, 10 * max(1, math.ceil(0.11 * steps * seconds / elapsed)))
        # At most tenfold at once: the short first runs are mostly overhead and would mislead a larger jump.
        steps = math.ceil(steps * min(10.0, 1.2 * seconds / max(elapsed, 1e-6)))


def measure(prepared: Prepared, gradients: int, repeats: int, clock: str) -> tuple[list[float], Tensor]:
    """Microseconds per gradient of each repeat, and the positions at the end of the last."""
    now = CLOCKS[clock]
    figures: list[float] = []
    last = torch.empty(0)
    for _ in range(repeats):
        began = now()
        last = prepared.run(prepared.steps)
        figures.append((now() - began) / (prepared.steps * gradients) * 1e6)
    return figures, last


def answer(worker: Worker, case: Case, prepared: Prepared, options: argparse.Namespace) -> dict[str, object]:
    """Measure one case and put it into the form that goes to the driver."""
    figures, last = measure(prepared, case.gradients, options.repeats, options.clock)
    return {
        "library": worker.library,
        "version": worker.version,
        "torch": torch.__version__,
        "compiled_energy": options.compile_energy,
        "kernel": case.kernel,
        "target": case.target,
        "chains": case.chains,
        "steps": prepared.steps,
        "us_per_gradient": statistics.median(figures),
        "repeats": figures,
        # Diverged chains could be cheaper or dearer than sound ones, so a figure counts only where this holds.
        "finite": bool(torch.isfinite(last).all()),
    }


def requests(listed: list[str]) -> Iterator[Case]:
    """Cases from the command line, else from standard input until it closes."""
    for text in listed or sys.stdin:
        if text.strip():
            yield Case.parse(text)


def main(worker: Worker) -> None:
    """Command line of a worker."""
    parser = argparse.ArgumentParser(description=f"Time the chain loop of {worker.library}.")
    parser.add_argument("cases", nargs="*", metavar="KERNEL:target:chains", help="read from standard input if absent")
    parser.add_argument("--seconds", type=float, default=0.6, help="least length of one measurement")
    parser.add_argument("--repeats", type=int, default=1, help="measurements for each case")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu on a machine shared with others")
    parser.add_argument("--compile-energy", action="store_true", help="pass the energy through torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # One core, so that no library's pool of threads finds a second one.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    prepared: dict[Case, Prepared] = {}
    for case in requests(options.cases):
        try:
            if case not in prepared:
                prepared[case] = warm_up(worker.prepare(case, options.compile_energy), options.seconds)
            line = answer(worker, case, prepared[case], options)
        except Exception as error:  # a case one library cannot run must not end the whole comparison
            line = {
                "library": worker.library,
                "version": worker.version,
                "torch": torch.__version__,
                "compiled_energy": options.compile_energy,
                **vars(case),
                "error": f"{type(error).__name__}: {error}",
            }
        print(json.dumps(line), flush=True)
