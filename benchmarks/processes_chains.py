"""Chains per second in one process and in two that share them by lanes, each with one thread.

    python benchmarks/processes_chains.py                       # all cases, some ten minutes on two free cores
    python benchmarks/processes_chains.py --chains 200 --seconds 0.05 --repeats 1      # does it run?
    torchrun --nproc-per-node 2 benchmarks/processes_chains.py  # the same, started by torchrun

Two processes are started once and stay. In each round the first one makes the steps of all chains alone, as
``sample(energy, kernel, start, ...)``, while the other waits; then both make them, ``sample(..., lanes=2)``, the
collection of states by every process included; and, with --threads, the first one alone again with as many threads as
there are processes, which is what torch does by itself with the same cores.  They take turns, so that a drift of the
machine falls on all.  What is told is the median over rounds of each ratio to one process in the same round.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gibbsian as gb
from common import circumstances, generator, table, write
from gibbsian.processes import join_processes, told_by_main, world

ASKED = 1.7
WAYS = ("one process", "processes", "threads")


def energies():
    """Name, energy and where chains start, of each kind."""

    def seeded(build):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build().requires_grad_(False)

    net = seeded(lambda: gb.MLP(32, (128, 128)))
    images = seeded(lambda: gb.ConvEnergy((1, 28, 28), (8, 16)))
    return {
        "Gaussian": (gb.Gaussian(covariance=0.5 * torch.eye(32) + 0.5), (32,)),
        "ManyWell-32": (gb.ManyWell(32), (32,)),
        "MLP 32-128-128": (net + gb.Gaussian(32), (32,)),
        "convolution 28x28": (images + gb.Gaussian((1, 28, 28)), (1, 28, 28)),
    }


KERNELS = {"ULA": gb.ULA(1e-3), "MALA": gb.MALA(1e-3), "HMC": gb.HMC(0.02, leapfrog=5)}


def timed(run):
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(energy, kernel, start, options):
    """Seconds of each way in each round, and the steps that they took; on the first process."""

    def run(steps, lanes):
        return gb.sample(energy, kernel, start, steps=steps, rng=generator(0), lanes=lanes, compile=options.compile)

    def alone(steps, threads=1):
        """What the first process does while the others wait."""
        taken = 0.0
        if world().main:
            torch.set_num_threads(threads)
            taken = timed(lambda: run(steps, None))
            torch.set_num_threads(1)
        dist.barrier()
        return taken

    def shared(steps):
        dist.barrier()
        return timed(lambda: run(steps, world().size))

    block = 10 if options.compile else 2
    for warm in (alone, shared):  # Compiles, and warms up.
        warm(block)
    one = alone(block)
    steps = told_by_main(block * max(1, math.ceil(options.seconds / max(one, 1e-6))))
    ways = [lambda: alone(steps), lambda: shared(steps)]
    if options.threads:
        alone(block, world().size)
        ways.append(lambda: alone(steps, world().size))
    rounds = [[way() for way in ways] for _ in range(options.repeats)]
    return steps, rounds


def work(options):
    """Measure all cases; rows on the first process."""
    torch.set_num_threads(1)
    rows = []
    for name, (energy, shape) in energies().items():
        start = 0.5 * torch.randn((options.chains, *shape), generator=generator(1))
        for kernel_name, kernel in KERNELS.items():
            case = f"{kernel_name}, {name}"
            if options.only and not any(word.lower() in case.lower() for word in options.only):
                continue
            steps, rounds = measure(energy, kernel, start, options)
            if world().main:
                rows.append({"case": case, "steps": steps, "rounds": rounds} | rates(options.chains * steps, rounds))
                median = {w: statistics.median(each) for w, each in rows[-1]["ratios"].items()}
                print(f"{case}: " + ", ".join(f"{w} {v:.2f} times" for w, v in median.items()), flush=True)
    return rows


def rates(done, rounds):
    """Chain steps per second of each way, and in each round its ratio to one process."""
    ways = WAYS[: len(rounds[0])]
    return {
        "rate": {w: done / statistics.median(each[i] for each in rounds) for i, w in enumerate(ways)},
        "ratios": {w: sorted(each[0] / each[i] for each in rounds) for i, w in enumerate(ways) if i},
    }


def told(rows, options, size):
    """Write what was measured."""
    record = circumstances([0, 1], 1) | {
        "chains": options.chains,
        "compile": options.compile,
        "processes": size,
        "load": os.getloadavg(),
        "cases": rows,
    }
    lines, medians = [], []
    for row in rows:
        median = {w: statistics.median(each) for w, each in row["ratios"].items()}
        medians.append(median["processes"])
        low, high = row["ratios"]["processes"][0], row["ratios"]["processes"][-1]
        told_threads = [f"{median[w]:.2f}" for w in WAYS[2:] if w in median]
        rate = [f"{row['rate'][w]:,.0f}" for w in WAYS[:2]]
        lines.append(
            (row["case"], row["steps"], *rate, f"{median['processes']:.2f} ({low:.2f} to {high:.2f})", *told_threads)
        )
    reached = sum(value >= ASKED for value in medians)
    head = ("case", "steps", "chain steps per second: 1 process", f"{size} processes", "times")
    if options.threads:
        head += (f"{size} threads, times",)
    said = (
        f"{options.chains} chains, float32, one thread in each process"
        f"{', compiled' if options.compile else ''}. Medians over {options.repeats} rounds (and the range of the "
        f"ratio). At least {ASKED} times in {reached} of {len(medians)} cases; geometric mean "
        f"{math.exp(statistics.fmean(map(math.log, medians))):.2f}. Load average at the end {record['load'][0]:.1f}."
    )
    name = "processes_chains_compiled" if options.compile else "processes_chains"
    write(name, "Chains in one process and in several", record, (said, table(head, lines)))
    return rows


def _start(rank, size, port, options):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    joined(options)


def joined(options):
    """Measure as one of several processes."""
    with join_processes("gloo", timeout=1800.0) as here:
        rows = work(options)
        return told(rows, options, here.size) if here.main else rows


def main(arguments=None):
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one process in each round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", action="store_true", help="also one process with as many threads")
    parser.add_argument("--only", nargs="*", help="cases whose name has one of these words")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        return joined(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_start, (options.processes, port, options), nprocs=options.processes, start_method="spawn")
    return None


if __name__ == "__main__":
    main()
