"""Effective samples per second of the No-U-Turn sampler, beside blackjax and numpyro, in one run.

Each library adapts step size and a diagonal mass matrix in its own windowed warm-up, aims at an acceptance of 0.8, and
moves all chains together, compiled, on one core, in a process of its own; a first run compiles and is not counted.
Effective sizes are of the slowest coordinate, by the same estimator for all.  In rounds, so that a drift falls on
everybody.

    python benchmarks/mixing.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import chains
import common
import gibbsian as gb

HERE = Path(__file__).resolve().parent
LIBRARIES = ("gibbsian", "blackjax", "numpyro")
TARGETS = ("gaussian100", "funnel10")
CHAINS = (4, 64)
WARMUP, DRAWS = 1000, {"gaussian100": 500, "funnel10": 4000}
"""Steps of warm-up, and draws of a chain: many in the funnel, whose neck takes long to come and go."""


def measure(library: str, target: str, n: int, python: Path) -> dict[str, Any]:
    """Run a library on a target, and judge its draws."""
    worker = "nuts_gibbsian.py" if library == "gibbsian" else "nuts_jax.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "draws.npy")
        command = [str(python), "-W", "ignore", str(HERE / "peers" / worker), library, target, str(n)]
        command += [str(WARMUP), str(DRAWS[target]), path]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        draws = torch.from_numpy(np.load(path))
    told = json.loads(done.stdout.strip().splitlines()[-1])
    bulk = gb.effective_sample_size(draws)
    told["ess"] = float(bulk.min())
    told["ess_per_second"] = told["ess"] / told["seconds"]
    told["us_per_leapfrog"] = 1e6 * told["seconds"] / (DRAWS[target] * told["leapfrogs"])
    told["r_hat"] = float(gb.split_r_hat(draws).max())
    # Of the funnel, the neck: a sampler that avoids it is fast for nothing. The truth is 0.1587.
    told["neck"] = float((draws[..., 0] < -3.0).double().mean()) if target == "funnel10" else None
    print(
        f"{target:12} {n:4} chains {library:9} {told['ess']:9.0f} effective in {told['seconds']:8.2f} s: "
        f"{told['ess_per_second']:10.1f} /s; warm-up {told['warmup_seconds']:.1f} s",
        file=sys.stderr,
    )
    return told


def main() -> None:
    """Measure, print, and write ``results/mixing.json`` and ``results/mixing.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="target:chains", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--env-dir", type=Path, default=chains.default_folder())
    options = parser.parse_args()
    pythons = chains.make_environments(options.env_dir, list(LIBRARIES), [])
    rows: list[dict[str, Any]] = []
    for case in options.cases or [f"{target}:{n}" for target in TARGETS for n in CHAINS]:
        target, n = case.split(":")
        found: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
        for turn in range(options.rounds):
            for library in LIBRARIES if turn % 2 == 0 else reversed(LIBRARIES):
                found[library].append(measure(library, target, int(n), pythons[library]))
        rows += [summary(target, int(n), library, each) for library, each in found.items()]
        # Written after each case, so that an interrupted run leaves what it has.
        write(rows, options.rounds)


def summary(target: str, n: int, library: str, each: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of one library on one case."""
    row = {"target": target, "chains": n, "library": library, "version": each[0]["version"]}
    for name in ("ess_per_second", "us_per_leapfrog", "leapfrogs", "warmup_seconds", "ess", "r_hat"):
        row[name] = statistics.median(one[name] for one in each)
    row["neck"] = statistics.median(one["neck"] for one in each) if target == "funnel10" else None
    return row | {"rounds": each}


def write(rows: list[dict[str, Any]], rounds: int) -> None:
    """Put the rows into ``results/mixing.json`` and ``results/mixing.md``, and print them."""
    record = common.circumstances((0,), 1) | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": rows}
    lines = []
    for row in rows:
        neck = "" if row["neck"] is None else f"{row['neck']:.3f}"
        numbers = [f"{row['ess_per_second']:,.0f}", f"{row['us_per_leapfrog']:,.0f}", f"{row['leapfrogs']:.0f}"]
        numbers += [f"{row['warmup_seconds']:.1f}", f"{row['r_hat']:.3f}", neck]
        lines.append([row["target"], row["chains"], f"{row['library']} {row['version']}", *numbers])
    head = ["target", "chains", "library", "effective draws a second", "us a leapfrog step of all chains"]
    head += ["leapfrog steps a draw and chain", "warm-up, s", "R-hat", "P(v < -3)"]
    text = common.table(head, lines)
    made = " and ".join(f"{count} of {target}" for target, count in DRAWS.items())
    note = (
        f"Draws of a chain: {made}, after {WARMUP} steps of warm-up; median of {rounds} round(s). gaussian100: 100 "
        "dimensions, condition number 1e4, axes turned at random. funnel10: Neal's, in 10; its neck holds 0.159."
    )
    common.write("mixing", "No-U-Turn samplers", record, [note, text])
    print(text)


if __name__ == "__main__":
    main()
