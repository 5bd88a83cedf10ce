"""Microseconds per gradient step of the chain loop, side by side with ebmkit, torchebm and blackjax.

The peers get virtual environments of their own, made once and kept: one for those on torch, in which gibbsian runs too,
from this checkout, so that they stand on the same torch; one for blackjax on JAX.  Every case is measured in rounds:
within a round the libraries take turns, each in a process of its own that stays warm, so that a drift of the machine
falls on all of them.

    python benchmarks/chains.py                                   # everything
    python benchmarks/chains.py ULA:mlp:64 HMC:manywell32:10000   # some cases
    python benchmarks/chains.py --training                        # steps of training: contrastive divergence
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = "torch>=2.10,<2.14"
REQUIREMENTS = {
    "benchmark-peers": ("numpy>=1.26", TORCH, "ebmkit==0.16.0", "torchebm==0.8.9"),
    # Torch there only builds the shared weights.
    "benchmark-jax": ("numpy>=1.26", TORCH, "blackjax==1.7.1", "numpyro==0.22.0"),
}
JAX = ("blackjax", "numpyro")
REFERENCE = "gibbsian"
COMPILED = "+compile"
# Both ways for everyone: compiling the energy speeds the peers up on some cases and slows them down on others, and
# each library is then credited with the better of the two.
LANES = (*(name + suffix for name in (REFERENCE, "ebmkit", "torchebm") for suffix in ("", COMPILED)), "blackjax")
SIZES = {"manywell32": (100, 10_000), "mlp": (64, 4096), "conv28": (64,)}
CASES = tuple(
    f"{kernel}:{target}:{chains}"
    for target, sizes in SIZES.items()
    for chains in sizes
    for kernel in ("ULA", "MALA", "HMC")
)
TRAINING = ("CD:mlp:64", "CD:mlp:256", "CD:mlp:4096", "CD:conv28:64")
TRAINING_NOTES = (
    "Microseconds per step of training by contrastive divergence: ten Langevin steps for each row of a batch, the "
    "loss, its gradient and the optimiser's step; `chains` is the size of the batch. gibbsian through `fit`, with "
    "clipping, averaged weights and health; ebmkit through its trainer; torchebm by the loop of its documentation. "
    f"`{COMPILED}`: with `compile=True` for gibbsian, the energy passed through `torch.compile` for the peers. "
    "Every process keeps to one core."
)
NOTES = (
    "Microseconds per gradient that the kernel needs: one for a Langevin transition, ten for a trajectory of ten "
    "leapfrog steps. A library that computes more gradients than that shows it here. "
    "torchebm has no MALA; its Hamiltonian sampler with one leapfrog step, the same Markov kernel, takes its place. "
    f"`{COMPILED}`: with `compile=True` for gibbsian, the energy passed through `torch.compile` for the peers. "
    "blackjax is jitted by JAX, one chain under `vmap`. Every process keeps to one core."
)


@dataclass
class Lane:
    """One library in one mode on one case: its process, and the figures it has given so far."""

    name: str
    process: subprocess.Popen[str]
    figures: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """Library without the mode."""
        return self.name.removesuffix(COMPILED)

    @property
    def failed(self) -> bool:
        """Whether the worker gave an error or ended early."""
        return "error" in self.last

    def ask(self, case: str) -> None:
        """Have the worker measure a case, and keep what it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(case, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        self.last = json.loads(line) if line else {"error": "the worker ended without an answer"}
        if not self.failed:
            self.figures.extend(self.last["repeats"])

    def close(self) -> None:
        """End the worker by closing its input, and wait for it."""
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def summary(self) -> dict[str, Any]:
        """Outcome in the form that goes to the results."""
        if self.failed or not self.figures:
            return {"error": self.last.get("error", "not measured")}
        kept = {key: self.last[key] for key in ("version", "torch", "steps", "finite")}
        return {**kept, "us_per_gradient": statistics.median(self.figures), "repeats": self.figures}


def default_folder() -> Path:
    """Folder of the environments when none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gibbsian"


def interpreter(folder: Path) -> Path:
    """Path of the python of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def holds(python: Path, requirements: tuple[str, ...]) -> bool:
    """Whether an environment has the peers in the versions asked for."""
    pins = [requirement.split("==") for requirement in requirements if "==" in requirement]
    check = "from importlib.metadata import version as v; import torch; "
    check += f"raise SystemExit(any(v(n) != p for n, p in {pins}))"
    return python.exists() and subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode == 0


def environment_of(library: str) -> str:
    """Name of the environment that a library runs in."""
    return "benchmark-jax" if library in JAX else "benchmark-peers"


def make_environments(folder: Path, names: list[str], pip_arguments: list[str]) -> dict[str, Path]:
    """Create the environments that these lanes need, unless they are there; return the python of each library."""
    pythons = {}
    for library in dict.fromkeys(name.removesuffix(COMPILED) for name in names):
        own = folder / environment_of(library)
        pythons[library] = interpreter(own)
        if not holds(pythons[library], REQUIREMENTS[own.name]):
            print(f"installing {', '.join(REQUIREMENTS[own.name])} into {own}", file=sys.stderr)
            if not pythons[library].exists():
                venv.create(own, with_pip=True)
            command = [pythons[library], "-m", "pip", "install", "--quiet", *pip_arguments, *REQUIREMENTS[own.name]]
            subprocess.run(command, check=True)
    return pythons


def package_root() -> Path:
    """Folder of this checkout from which gibbsian can be imported."""
    for folder in (HERE.parent / "src", HERE.parent):
        if (folder / REFERENCE / "__init__.py").exists():
            return folder
    return HERE.parent


def open_lane(name: str, pythons: dict[str, Path], options: argparse.Namespace) -> Lane:
    """Start the worker of a lane."""
    library = name.removesuffix(COMPILED)
    command = [str(pythons[library]), "-W", "ignore", str(HERE / "peers" / f"{library}_worker.py")]
    command += ["--seconds", str(options.seconds), "--clock", options.clock]
    if name.endswith(COMPILED):
        command.append("--compile-energy")
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **single, "PYTHONPATH": str(package_root())}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    return Lane(name, process)


def run_case(case: str, names: list[str], pythons: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in all lanes, in alternation."""
    # Fresh processes for each case: what was compiled or allocated for one must not weigh on the next.
    lanes = [open_lane(name, pythons, options) for name in names]
    try:
        for turn in range(options.rounds):
            # Alternate the direction too, or the same library would always follow the same other one.
            for lane in lanes if turn % 2 == 0 else reversed(lanes):
                if not lane.failed:
                    lane.ask(case)
    finally:
        for lane in lanes:
            lane.close()
    outcome = {lane.name: lane.summary() for lane in lanes}
    return {"case": case, "lanes": outcome, "best": (best := best_lanes(outcome)), "ratios": ratios(outcome, best)}


def best_lanes(outcome: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Find the faster lane of each library, by median."""
    best: dict[str, str] = {}
    for name, result in outcome.items():
        library = name.removesuffix(COMPILED)
        if "error" in result or not result["finite"]:
            continue
        if library not in best or result["us_per_gradient"] < outcome[best[library]]["us_per_gradient"]:
            best[library] = name
    return best


def ratios(outcome: dict[str, dict[str, Any]], best: dict[str, str]) -> dict[str, dict[str, float]]:
    """Time of each peer over that of gibbsian, best lane against best lane, with the range over the rounds."""
    if REFERENCE not in best:
        return {}
    ours = outcome[best[REFERENCE]]
    table = {}
    for library, name in best.items():
        if library != REFERENCE:
            theirs = outcome[name]
            paired = [a / b for a, b in zip(theirs["repeats"], ours["repeats"], strict=False)]
            ratio = theirs["us_per_gradient"] / ours["us_per_gradient"]
            table[library] = {"ratio": ratio, "low": min(paired), "high": max(paired)}
    return table


def processor() -> str:
    """Name of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(pythons: dict[str, Path], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Date, machine and versions."""
    lanes = [(name, lane) for result in results for name, lane in result["lanes"].items() if "error" not in lane]
    versions = {name.removesuffix(COMPILED): lane["version"] for name, lane in lanes}
    if lanes:
        versions["torch"] = lanes[0][1]["torch"]
    python = next(iter(pythons.values()))
    versions["python"] = subprocess.run([python, "-V"], capture_output=True, text=True).stdout.split()[-1]
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "versions": versions}


def cell(lane: dict[str, Any]) -> str:
    """Write a lane's median with the range of its rounds, for the table."""
    if "error" in lane:
        return "failed"
    note = "" if lane["finite"] else " (diverged)"
    low, high = min(lane["repeats"]), max(lane["repeats"])
    return f"{lane['us_per_gradient']:,.0f} ({low:,.0f}-{high:,.0f}){note}"


def row(result: dict[str, Any], names: list[str], peers: list[str]) -> list[str]:
    """Make one line of the table."""
    compared = []
    for peer in peers:
        found = result["ratios"].get(peer)
        compared.append(f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})" if found else "-")
    return [*result["case"].split(":"), *(cell(result["lanes"][name]) for name in names), *compared]


def table(results: list[dict[str, Any]], names: list[str]) -> str:
    """All results as a Markdown table, aligned so that it reads on a terminal too."""
    peers = list(dict.fromkeys(name.removesuffix(COMPILED) for name in names if not name.startswith(REFERENCE)))
    head = ["kernel", "target", "chains", *names, *(f"{peer} / {REFERENCE}" for peer in peers)]
    rows = [row(result, names, peers) for result in results]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = [head, rule, *rows]
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write(folder: Path, report: dict[str, Any], names: list[str], training: bool) -> None:
    """Put the report into ``chains.json`` and ``chains.md``, or ``training.json`` and ``training.md``."""
    name, title = ("training", "Step of training") if training else ("chains", "Chain loop")
    what, notes = ("step", TRAINING_NOTES) if training else ("gradient step", NOTES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    where = f"{machine['processor']}, {machine['cores']} cores, one thread used; {machine['system']}"
    lines = [
        f"# {title}, microseconds per {what}, float32",
        f"{report['date']}; {where}.",
        f"Versions: {versions}.",
        f"Median of {report['rounds']} rounds in alternation (range in brackets), {report['clock']} time. {notes}",
        table(report["results"], names),
    ]
    (folder / f"{name}.md").write_text("\n\n".join(lines) + "\n")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="KERNEL:target:chains", help="default: all")
    parser.add_argument("--env-dir", type=Path, default=default_folder(), help="where the peers' environments are")
    parser.add_argument("--pip-arg", action="append", default=[], help="passed to pip install, as in --pip-arg=--pre")
    parser.add_argument("--training", action="store_true", help="steps of training instead of chains")
    parser.add_argument("--lanes", help="libraries and modes to run, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.6, help="least length of one measurement")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu on a machine shared with others")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Run the comparison."""
    options = arguments()
    # blackjax has no training.
    known = LANES[:-1] if options.training else LANES
    names = options.lanes.split(",") if options.lanes else list(known)
    pythons = make_environments(options.env_dir, names, options.pip_arg)
    results = []
    for case in options.cases or (TRAINING if options.training else CASES):
        results.append(run_case(case, names, pythons, options))
        print(table(results[-1:], names).splitlines()[-1], file=sys.stderr, flush=True)
        # Written after each case, so that an interrupted run leaves what it has.
        settings = {"rounds": options.rounds, "seconds": options.seconds, "clock": options.clock}
        write(options.out, {**describe(pythons, results), **settings, "results": results}, names, options.training)
    print(table(results, names))


if __name__ == "__main__":
    main()
