"""Seconds that the first call of a compiled sampler takes: on a new machine, with an empty cache, and with a warm one.

Each call runs in a process of its own.  The time is what ``Samples.compilation`` tells; importing is not in it.  On a
new machine torch also compiles its C++ headers, once and for all sorts of energies; that is measured for one kernel.

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
    """Run `child` on a new machine, if the kernel is the first; with an empty cache; and with a warm one."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", name, target, str(chains)]
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as new:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        calls = {"cold": {"TORCHINDUCTOR_CACHE_DIR": cache}, "warm": {"TORCHINDUCTOR_CACHE_DIR": cache}}
        if name == KERNELS[0]:
            # Compiled headers lie in the folder of temporary files, whatever the cache is.
            calls = {"new machine": {"TORCHINDUCTOR_CACHE_DIR": f"{new}/cache", "TMPDIR": new}} | calls
        for call, folders in calls.items():
            done = subprocess.run(command, env=environment | folders, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.strip().splitlines()[-1]) | row
            row[call] = row.pop("seconds")
    told = ", ".join(f"{row[call]:.1f} s {call}" for call in calls)
    print(f"{name:14} {target:11} {told}", file=sys.stderr)
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Write the record and its table."""
    import common

    record = common.circumstances((0,), 1) | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": rows}
    head = ["kernel", *(f"{target}, {chains:,} chains: cold, warm" for target, chains in CASES)]
    names = dict.fromkeys(row["kernel"] for row in rows)
    lines = [[name, *(f"{r['cold']:.1f}, {r['warm']:.1f}" for r in rows if r["kernel"] == name)] for name in names]
    note = "Seconds of the first call with compile=True, beyond importing: with an empty cache on disk, and a warm one."
    new = [f"{r['target']} {r['new machine']:.1f}" for r in rows if "new machine" in r]
    if new:
        note += f" On a new machine, where torch compiles its headers first, {KERNELS[0]}: {', '.join(new)}."
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
