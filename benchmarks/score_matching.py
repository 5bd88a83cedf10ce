"""Microseconds of forward and backward of score matching losses, beside a regression on the same network and the peers.

The network is ``dim-128-128-1`` with SiLU, the batch 256 rows, the precision float32.  The libraries run in the
environment of `chains.py`, each in a process of its own that stays warm; within a round they take turns, so that a
drift of the machine falls on all of them, and a ratio is taken within its round.

    python benchmarks/score_matching.py                        # everything
    python benchmarks/score_matching.py sliced:2:256           # some cases
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chains import Lane, default_folder, make_environments, package_root, processor

HERE = Path(__file__).resolve().parent
LIBRARIES = ("gibbsian", "ebmkit", "torchebm")
REFERENCE = "gibbsian"
# The exact loss in 784 dimensions has fewer rows, as the peers' graphs of all second derivatives would not fit.
CASES = (
    *(f"{loss}:{dim}:256" for dim in (2, 32, 784) for loss in ("sliced", "reduced", "differences", "denoising")),
    "exact:2:256",
    "exact:32:256",
    "exact:784:16",
)
NOTES = (
    "`regression` is the mean squared error of the same network's output on the same rows, forward and backward. "
    "`sliced` has one direction per row for everyone; `reduced` has the whole square of the gradient in its place; "
    "`differences` is the sliced loss by finite differences. A dash: the library does not have it."
)


def open_lane(library: str, pythons: dict[str, Path], options: argparse.Namespace) -> Lane:
    """Start the worker of a library."""
    command = [str(pythons[library]), "-W", "ignore", str(HERE / "peers" / "losses_worker.py"), library]
    command += ["--seconds", str(options.seconds), "--clock", options.clock]
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **single, "PYTHONPATH": str(package_root())}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    return Lane(library, process)


def run_case(case: str, pythons: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in all libraries, in alternation, each beside a regression."""
    _, dim, rows = case.split(":")
    lanes = {library: open_lane(library, pythons, options) for library in options.libraries.split(",")}
    yardstick: list[float] = []
    try:
        for turn in range(options.rounds):
            for lane in list(lanes.values())[:: 1 if turn % 2 == 0 else -1]:
                if lane.name == REFERENCE:
                    kept = len(lane.figures)
                    lane.ask(f"regression:{dim}:{rows}")
                    yardstick += lane.figures[kept:]
                    del lane.figures[kept:]
                if not lane.failed:
                    lane.ask(case)
    finally:
        for lane in lanes.values():
            lane.close()
    found = {name: summary(lane) for name, lane in lanes.items()}
    return {"case": case, "regression": yardstick, "libraries": found, "ratios": ratios(found, yardstick)}


def summary(lane: Lane) -> dict[str, Any]:
    """Outcome in the form that goes to the results."""
    if lane.failed or not lane.figures:
        return {"error": lane.last.get("error", "not measured")}
    kept = {key: lane.last[key] for key in ("version", "torch", "finite")}
    return {**kept, "us": statistics.median(lane.figures), "repeats": lane.figures}


def ratios(found: dict[str, dict[str, Any]], yardstick: list[float]) -> dict[str, dict[str, float]]:
    """The reference's time over that of the regression, and each peer's over the reference's: median and range."""
    ours = found.get(REFERENCE, {}).get("repeats")
    if not ours:
        return {}
    pairs = {"regression": (ours, yardstick)}
    pairs |= {name: (each["repeats"], ours) for name, each in found.items() if name != REFERENCE and "repeats" in each}
    table = {}
    for name, (above, below) in pairs.items():
        each = [a / b for a, b in zip(above, below, strict=False)]
        table[name] = {"ratio": statistics.median(each), "low": min(each), "high": max(each)}
    return table


def cell(ratio: dict[str, float] | None) -> str:
    """Write a ratio with its range."""
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-"


def table(results: list[dict[str, Any]], libraries: list[str]) -> str:
    """All results as a Markdown table."""
    peers = [name for name in libraries if name != REFERENCE]
    head = ["loss", "dim", "rows", *libraries, f"{REFERENCE} / regression", *(f"{p} / {REFERENCE}" for p in peers)]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for result in results:
        times = [f"{one['us']:,.0f}" if "us" in one else "-" for one in map(result["libraries"].get, libraries) if one]
        compared = [cell(result["ratios"].get(name)) for name in ("regression", *peers)]
        lines.append([*result["case"].split(":"), *times, *compared])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(folder: Path, report: dict[str, Any], libraries: list[str]) -> None:
    """Put the report into ``score_matching.json`` and ``score_matching.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score_matching.json").write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Score matching, microseconds of forward and backward, float32",
        f"{report['date']}; {report['machine']}; {versions}.",
        f"Medians of {report['rounds']} rounds in alternation (ranges in brackets), {report['clock']} time, each the "
        f"best of five stretches on one core. {NOTES}",
        table(report["results"], libraries),
    ]
    (folder / "score_matching.md").write_text("\n\n".join(lines) + "\n")


def describe(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Date, machine and versions."""
    measured = [(n, one) for result in results for n, one in result["libraries"].items() if "version" in one]
    versions = {name: one["version"] for name, one in measured}
    if measured:
        versions["torch"] = measured[0][1]["torch"]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "machine": f"{processor()}, {os.cpu_count()} cores, one thread used", "versions": versions}


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="loss:dim:rows", help="default: all")
    parser.add_argument("--env-dir", type=Path, default=default_folder(), help="where the peers' environments are")
    parser.add_argument("--pip-arg", action="append", default=[], help="passed to pip install")
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one measurement")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu on a machine shared with others")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args()
    libraries = options.libraries.split(",")
    pythons = make_environments(options.env_dir, libraries, options.pip_arg)
    results: list[dict[str, Any]] = []
    for case in options.cases or CASES:
        results.append(run_case(case, pythons, options))
        print(table(results[-1:], libraries).splitlines()[-1], file=sys.stderr, flush=True)
        settings = {"rounds": options.rounds, "clock": options.clock}
        write(options.out, {**describe(results), **settings, "results": results}, libraries)
    print(table(results, libraries))


if __name__ == "__main__":
    main()
