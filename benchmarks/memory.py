"""Peak resident memory of a short and of a long chain: it should not grow with the number of steps.

Each length runs in a fresh process, which reports its own peak (``ru_maxrss``).

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

# Torch stays out of the parent: on Linux a child starts from the peak of the process that forked it.

SHORT, LONG = 10_000, 1_000_000


def quartic(x: Any) -> Any:
    """Quartic well, summed over the event dimension; unlike a network, it leaves the chain loop the main cost."""
    squared = x * x
    return (squared * squared - squared).sum(dim=1)


def child(steps: int, chains: int, dimension: int, compiled: bool) -> dict[str, Any]:
    """Run one chain in this process and report the peak."""
    import torch

    import gibbsian as gb

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x0 = torch.zeros(chains, dimension)
    began = time.perf_counter()
    out = gb.sample(gb.Energy.of(quartic), gb.ULA(step_size=1e-2), x0, steps=steps, rng=rng, compile=compiled)
    seconds = time.perf_counter() - began
    if out.x.shape != x0.shape or not torch.isfinite(out.x).all():
        raise RuntimeError("the chain went wrong, so its memory means nothing")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return {"steps": steps, "peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10), "seconds": seconds}


def measure(steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run :func:`child` in a fresh process."""
    command = [sys.executable, __file__, "--child", str(steps)]
    command += ["--chains", str(options.chains), "--dimension", str(options.dimension)]
    if options.compile:
        command.append("--compile")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs=2, default=(SHORT, LONG), metavar=("SHORT", "LONG"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tolerance", type=float, default=8.0, help="growth in MiB that still counts as none")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(child(options.child, options.chains, options.dimension, options.compile)))
        return
    short, long = (measure(steps, options) for steps in options.steps)
    for result in (short, long):
        print(f"{result['steps']:>9,} steps: {result['peak_mib']:8.1f} MiB at the peak, {result['seconds']:7.1f} s")
    growth = long["peak_mib"] - short["peak_mib"]
    print(f"growth: {growth:+.1f} MiB")
    if growth > options.tolerance:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
