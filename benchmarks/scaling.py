"""How the time of a step grows with the number of chains, and what a second thread is worth.

Each measurement runs in a process of its own, on a many-well energy of 32 dimensions with ``compile=True``.  The slope
is that of the logarithm of the time against the logarithm of the chains, by least squares: 1 is linear.  One thread and
two are measured in turn, several times, and the gain is the median of their ratios.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHAINS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
SECONDS = 2.0
ROUNDS = 5
PAIRS = 5


def child(kernel: str, chains: int, threads: int) -> dict[str, Any]:
    """Time one number of chains in this process: microseconds a gradient, the median of some rounds."""
    import torch

    sys.path.insert(0, str(HERE / "peers"))
    import targets

    import gibbsian as gb

    torch.set_num_threads(threads)
    moves = {"ULA": gb.ULA(1e-3), "MALA": gb.MALA(5e-3), "HMC": gb.HMC(5e-2)}[kernel]
    energy, state = gb.Energy.of(targets.build("manywell32")), targets.start("manywell32", chains)
    rng = torch.Generator().manual_seed(0)
    block = 1 if kernel == "HMC" else 10

    def run(steps: int) -> float:
        nonlocal state
        began = time.perf_counter()
        state = gb.sample(energy, moves, state, steps=steps, rng=rng, compile=True).state
        return time.perf_counter() - began

    run(2 * block)
    once = run(4 * block) / 4
    steps = block * max(5, round(SECONDS / ROUNDS / once))
    times = [run(steps) / steps * 1e6 / moves.gradients for _ in range(ROUNDS)]
    return {"kernel": kernel, "chains": chains, "threads": threads, "us": statistics.median(times), "rounds": times}


def measure(kernel: str, chains: int, threads: int) -> dict[str, Any]:
    """Run `child` in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kernel, str(chains), str(threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{kernel:5} {chains:>9,} chains, {threads} thread(s): {found['us']:12,.1f} us a gradient", file=sys.stderr)
    return found


def pair(kernel: str, turn: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure one thread and two, at every other turn in the other order."""
    found = {threads: measure(kernel, 10_000, threads) for threads in ((1, 2) if turn % 2 == 0 else (2, 1))}
    return found[1], found[2]


def slope(rows: list[dict[str, Any]]) -> float:
    """Least-squares slope of log time against log chains."""
    import numpy as np

    return float(np.polyfit(np.log([r["chains"] for r in rows]), np.log([r["us"] for r in rows]), 1)[0])


def main() -> None:
    """Measure, print, and write ``results/scaling.json`` and ``results/scaling.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("KERNEL", "CHAINS", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--kernels", default="ULA,MALA,HMC")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]), int(options.child[2]))))
        return
    import common

    rows = [measure(kernel, n, 1) for kernel in options.kernels.split(",") for n in CHAINS]
    pairs = {k: [pair(k, turn) for turn in range(PAIRS)] for k in options.kernels.split(",")}
    slopes = {k: slope([r for r in rows if r["kernel"] == k]) for k in options.kernels.split(",")}
    gains = {k: statistics.median(one["us"] / two["us"] for one, two in each) for k, each in pairs.items()}
    record = common.circumstances((0,), 1) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {"rows": rows, "pairs": pairs, "slopes": slopes, "two_threads": gains}
    lines = [
        [k, *(f"{r['us']:,.0f}" for r in rows if r["kernel"] == k), f"{slopes[k]:.3f}", f"{gains[k]:.2f}"]
        for k in slopes
    ]
    head = ["kernel", *(f"{n:,}" for n in CHAINS), "slope", "two threads, 10,000 chains"]
    text = common.table(head, lines)
    note = (
        "Microseconds a gradient by the number of chains (many-well energy, 32 dimensions, compiled, one thread); the "
        "slope of log time against log chains; and the gain of a second thread, the median of five pairs."
    )
    common.write("scaling", "Scaling in chains and threads", record, [note, text])
    print(text)


if __name__ == "__main__":
    main()
