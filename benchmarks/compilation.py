"""Seconds that the first call of a compiled sampler takes, with an empty cache on disk and with a warm one.

Each call runs in a process of its own.  The time is what ``Samples.compilation`` tells; importing is not in it.

    python benchmarks/compilation.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASES = (("mlp", 64), ("manywell32", 10_000), ("conv28", 64))
KERNELS = ("RandomWalk", "ULA", "MALA", "Barker", "Underdamped", "HMC", "NUTS", "MCLMC", "AdjustedMCLMC")


def child(name: str, target: str, chains: int) -> dict[str, Any]:
    """Compile a kernel on a target in this process."""
    import torch

    sys.path.insert(0, str(HERE / "peers"))
    import targets

    import gibbsian as gb

    torch.set_num_threads(1)
    settings = {"Underdamped": (1e-2, 1.0), "MCLMC": (1e-2, 1.0)}.get(name, (1e-3,))
    kernel = getattr(gb, name)(*settings)
    rng = torch.Generator().manual_seed(0)
    energy, start = gb.Energy.of(targets.build(target)), targets.start(target, chains)
    import torch._inductor.compile_fx  # what torch loads at the first compilation whatever it is

    # A trajectory of NUTS takes long to run where its step size is this small; its depth compiles nothing.
    kernel, steps = (gb.NUTS(1e-3, max_depth=5), 2) if name == "NUTS" else (kernel, 20)
    made = gb.sample(energy, kernel, start, steps=steps, rng=rng, compile=True)
    return {"kernel": name, "target": target, "chains": chains, "seconds": made.compilation}


def measure(name: str, target: str, chains: int) -> dict[str, Any]:
    """Run `child` twice on a cache that is empty at first."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", name, target, str(chains)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        for _ in range(2):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    row = found[0] | {"cold": found[0]["seconds"], "warm": found[1]["seconds"]}
    print(f"{name:14} {target:11} {row['cold']:6.1f} s cold, {row['warm']:5.1f} s warm", file=sys.stderr)
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Write the record and its table."""
    import common

    record = common.circumstances((0,), 1) | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": rows}
    head = ["kernel", *(f"{target}, {chains:,} chains: cold, warm" for target, chains in CASES)]
    names = dict.fromkeys(row["kernel"] for row in rows)
    lines = [[name, *(f"{r['cold']:.1f}, {r['warm']:.1f}" for r in rows if r["kernel"] == name)] for name in names]
    note = "Seconds of the first call with compile=True, beyond importing: with an empty cache on disk, and a warm one."
    common.write("compilation", "Compilation", record, [note, common.table(head, lines)])


def main() -> None:
    """Measure, print, and write ``results/compilation.json`` and ``results/compilation.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("KERNEL", "TARGET", "CHAINS"), help=argparse.SUPPRESS)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], options.child[1], int(options.child[2]))))
        return
    import common

    names = options.kernels.split(",")
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += [measure(name, target, chains) for target, chains in CASES]
        # Written after each kernel, so that an interrupted run leaves what it has.
        report(rows)
    print((common.RESULTS / "compilation.md").read_text())


if __name__ == "__main__":
    main()
